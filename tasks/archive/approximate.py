"""Approximate search for archives of hundreds of thousands: faiss IVF over 8-bit codes, whose first rows are scored again exactly.

Shapes: N rows of unit length, D width. An index is made where faiss is installed (extra ``faiss``). How many of the true first 10 it finds
is measured when it is made, and kept beside it: by rows of its own, each of which is no answer to itself, and by the archive's vectors of
other kinds (images ask for reports). So many lists are looked through that those that are served least well are served well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS = 300_000
"""Fewer are searched exactly: a scan of them takes some 30 ms."""
WANTED_RECALL = 0.97
"""Of the first 10, by vectors of the archive; what lies far from all of them may be served less well."""
PROBES = (8, 16, 24, 32, 48, 64, 96, 128, 256)
TRIALS = 200
TRAINED_ON = 40
"""Rows a list that the lists' centres are fitted on."""
CHUNK = 65536
FIRST = 10


def available() -> bool:
    """Whether faiss is installed."""
    return find_spec("faiss") is not None


def build(
    matrix: NDArray[np.float32],
    asking: Mapping[str, NDArray[np.float32]],
    path: Path,
    advance: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Make an index of a matrix and write it.

    Args:
        matrix: (N, D).
        asking: kind -> (M, D) other vectors that may ask it.
        path: of the index.
        advance: called with how many rows more are in it.
    Returns:
        How it is searched and how well: ``lists``, ``probes``, ``recall`` of the first 10, the least of ``recalls`` by ``trials`` vectors
        of each kind, rows of its own under "own".
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
    trials = {"own": _Trials.drawn(matrix, matrix, rng, own=True)}
    trials |= {kind: _Trials.drawn(matrix, vectors, rng) for kind, vectors in asking.items()}
    recalls, probes = dict.fromkeys(trials, 0.0), PROBES[0]
    for probes in PROBES:
        recalls = {kind: one.recall(matrix, index, probes) for kind, one in trials.items()}
        if min(recalls.values()) >= WANTED_RECALL:
            break
    faiss.write_index(index, str(path))
    return {"lists": lists, "probes": probes, "recall": min(recalls.values()), "recalls": recalls, "trials": min(count, TRIALS)}


@dataclass(frozen=True)
class _Trials:
    """Q vectors that ask, and the rows that are to be found."""

    queries: NDArray[np.float32]  # (Q, D)
    themselves: NDArray[np.int64]  # (Q,) the row that each is, -1: none
    best: list[NDArray[np.int64]]

    @classmethod
    def drawn(cls, matrix: NDArray[np.float32], vectors: NDArray[np.float32], rng: np.random.Generator, *, own: bool = False) -> _Trials:
        chosen = np.sort(rng.choice(len(vectors), min(len(vectors), TRIALS), replace=False))
        queries = np.ascontiguousarray(vectors[chosen])
        themselves = chosen if own else np.full(len(chosen), -1)
        best = _first(matrix, queries, FIRST + own)
        return cls(queries, themselves, [_without(rows, row) for rows, row in zip(best, themselves, strict=True)])

    def recall(self, matrix: NDArray[np.float32], index: Any, probes: int) -> float:
        """Share of what is to be found that is, as :class:`tasks.archive.search.VectorScores` looks for it."""
        shares = []
        for query, row, best in zip(self.queries, self.themselves, self.best, strict=True):
            rows = search(index, query, rows_for(FIRST), probes)
            rows = rows[rows != row]
            kept = rows[np.argsort(-(matrix[rows] @ query))[:FIRST]]
            shares.append(len(np.intersect1d(kept, best)) / max(len(best), 1))
        return float(np.mean(shares))


def _without(rows: NDArray[np.int64], row: int) -> NDArray[np.int64]:
    """The first of some rows, nearest first, less one."""
    return rows[rows != row][:FIRST]


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


def _first(matrix: NDArray[np.float32], queries: NDArray[np.float32], count: int) -> list[NDArray[np.int64]]:
    """The true first ``count`` rows of each query, nearest first."""
    scores, rows = [], []
    for start in range(0, len(matrix), CHUNK):
        part = queries @ matrix[start : start + CHUNK].T
        kept = np.argpartition(part, max(part.shape[1] - count, 0), axis=1)[:, -count:]
        scores.append(np.take_along_axis(part, kept, 1))
        rows.append(kept + start)
    order = np.argsort(-np.concatenate(scores, axis=1), axis=1)[:, :count]
    return list(np.take_along_axis(np.concatenate(rows, axis=1), order, 1))
