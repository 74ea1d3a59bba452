"""Approximate search for archives of hundreds of thousands: faiss IVF over 8-bit codes, whose first rows are scored again exactly.

Shapes: N rows of unit length, D width. An index is made where faiss is installed (extra ``faiss``); how many of the true first 10 it finds
is measured when it is made, at the number of lists that is looked through, and kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 300_000
"""Fewer are searched exactly: a scan of them takes some 30 ms."""
WANTED_RECALL = 0.97
"""Of the first 10, on vectors of the archive; others may be found less well."""
PROBES = (8, 16, 24, 32, 48, 64, 96, 128, 256)
TRIALS = 200
TRAINED_ON = 64
"""Rows a list that the lists' centres are fitted on."""
CHUNK = 65536
FIRST = 10


def available() -> bool:
    """Whether faiss is installed."""
    return find_spec("faiss") is not None


def build(matrix: NDArray[np.float32], path: Path, advance: Callable[[int], None] = lambda rows: None) -> dict[str, Any]:
    """Make an index of a matrix and write it.

    Returns:
        How it is searched and how well: ``lists``, ``probes``, ``recall`` of the first 10 on ``trials`` rows of the matrix.
    """
    import faiss

    count, width = matrix.shape
    lists = int(2 ** round(np.log2(np.sqrt(count))))
    rng = np.random.default_rng(0)
    index = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(matrix[np.sort(rng.choice(count, min(count, TRAINED_ON * lists), replace=False))]))
    for start in range(0, count, CHUNK):
        part = np.ascontiguousarray(matrix[start : start + CHUNK])
        index.add(part)
        advance(len(part))
    asked = np.ascontiguousarray(matrix[np.sort(rng.choice(count, min(count, TRIALS), replace=False))])
    best = _first(matrix, asked)
    recall, probes = 0.0, PROBES[0]
    for probes in PROBES:
        found = [search(index, query, rows_for(FIRST), probes) for query in asked]
        kept = [rows[np.argsort(-(matrix[rows] @ query))[:FIRST]] for rows, query in zip(found, asked, strict=True)]
        recall = float(np.mean([len(np.intersect1d(one, true)) / len(true) for one, true in zip(kept, best, strict=True)]))
        if recall >= WANTED_RECALL:
            break
    faiss.write_index(index, str(path))
    return {"lists": lists, "probes": probes, "recall": recall, "trials": len(asked)}


def load(path: Path) -> Any:
    """An index, its codes mapped."""
    import faiss

    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)


def rows_for(count: int) -> int:
    """How many rows are scored again for so many hits."""
    return max(30, 3 * count)


def search(index: Any, query: NDArray[np.float32], count: int, probes: int, allowed: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """The rows whose codes are nearest to a (D,) unit vector, ``count`` at most, of those ``allowed`` (N,)."""
    import faiss

    parameters: dict[str, Any] = {"nprobe": probes}
    if allowed is not None:
        bits = np.packbits(allowed, bitorder="little")
        parameters["sel"] = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
    rows = index.search(query[None].astype(np.float32), count, params=faiss.SearchParametersIVF(**parameters))[1][0]
    return np.asarray(rows[rows >= 0], np.int64)


def _first(matrix: NDArray[np.float32], queries: NDArray[np.float32]) -> list[NDArray[np.int64]]:
    """The true first rows of each query."""
    scores = np.full((len(queries), 0), -np.inf, np.float32)
    rows = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(matrix), CHUNK):
        part = queries @ matrix[start : start + CHUNK].T
        scores = np.concatenate([scores, part], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(np.arange(start, start + part.shape[1]), part.shape)], axis=1)
        keep = np.argpartition(-scores, min(FIRST, scores.shape[1]) - 1, axis=1)[:, :FIRST]
        scores, rows = np.take_along_axis(scores, keep, 1), np.take_along_axis(rows, keep, 1)
    return list(rows)
