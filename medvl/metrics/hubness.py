"""Hubness and the gap between modalities: how large they are, and what takes them out of a similarity.

In many dimensions some items are near to every query (hubs) and many to none, and images lie in one cone, texts in another. Both make a
ranking say less than the vectors know. Centring moves both cones to one place; CSLS takes from an item what it has in common with all
queries.

Shapes: Q queries, G gallery items, N and M vectors, D embedding width, k neighbours. Vectors need not be normalised; similarities are
cosines in [-1, 1]. What is large (a gallery, which may be a memory map) is worked through in chunks: beside the inputs and the result some
64 MB, or of more than 125,000 items 16 rows of cosines.

A correction that is fitted on the queries of a test (their mean, their neighbours) has seen that test: fit it on others, and measure it
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import skew

Vectors = NDArray[np.floating[Any]]
_CELLS = 2_000_000  # of a matrix worked on at once


@dataclass(frozen=True)
class Hubness:
    """How unevenly G items share the first k places of Q queries. See :func:`measure_hubness`."""

    k: int
    skewness: float  # of the k-occurrences; 0 where all items are found equally often, and the larger the more a few items take all
    never: float  # share of items that no query finds ("antihubs")
    largest: float  # share of queries that find the greatest hub
    occurrences: NDArray[np.float64] = field(repr=False)  # (G,)


def centre(vectors: Vectors) -> NDArray[np.float64]:
    """(D,) mean of (N, D) vectors, each of them normalised first.

    Raises:
        ValueError: no vectors, or one that is 0 or not finite.
    """
    total = np.zeros(_width(vectors))
    for rows in _chunks(vectors.shape[0], vectors.shape[1]):
        total += _normalised(vectors[rows], rows.start).sum(axis=0, dtype=np.float64)
    return total / len(vectors)


def centred(vectors: Vectors, centre: NDArray[np.float64]) -> Vectors:
    """(N, D) unit vectors without what their modality has in common: x/|x| - centre, normalised again, in the precision given.

    With each modality's own :func:`centre` (of training or validation vectors) the gap between their means all but goes. It is a fixed map
    of each modality, so that an index may hold centred vectors.

    Args:
        vectors: (N, D).
        centre: (D,), the mean of this modality.
    Raises:
        ValueError: a width that differs, or a vector that is 0, not finite, or equal to the centre.
    Source: Liang et al. 2022, arXiv:2203.02053, which moves embeddings along the gap; here the whole of it, and both modalities.
    """
    if _width(vectors) != len(centre) or centre.ndim != 1:
        raise ValueError(f"vectors {vectors.shape} and centre {centre.shape} differ in width")
    moved = np.empty(vectors.shape, dtype=vectors.dtype)
    for rows in _chunks(vectors.shape[0], vectors.shape[1]):
        moved[rows] = _normalised(_normalised(vectors[rows], rows.start) - centre, rows.start)
    return moved


def modality_gap(first: Vectors, second: Vectors) -> float:
    """Distance of the centres of (N, D) and (M, D) vectors, 0 to 2: |mean x/|x| - mean y/|y||.

    Raises:
        ValueError: widths that differ, no vectors, or one that is 0 or not finite.
    Source: Liang et al. 2022, arXiv:2203.02053.
    """
    if _width(first) != _width(second):
        raise ValueError(f"vectors {first.shape} and {second.shape} differ in width")
    return float(np.linalg.norm(centre(first) - centre(second)))


def neighbour_similarity(vectors: Vectors, reference: Vectors, k: int = 10) -> NDArray[np.float64]:
    """(N,) mean cosine of each vector to the k nearest of the reference: r of CSLS, high for a hub.

    Of gallery items the reference is a set of queries, of queries it is the gallery.

    Args:
        vectors: (N, D).
        reference: (M, D).
        k: 1 to M.
    Raises:
        ValueError: widths that differ, k outside 1 to M, or a vector that is 0 or not finite.
    Source: Conneau et al. 2018, arXiv:1710.04087, eq. 2 (k = 10 there).
    """
    means = np.zeros(len(vectors))
    for rows, similarity in _similarities(vectors, reference, k):
        nearest = np.partition(similarity, similarity.shape[1] - k, axis=1)[:, -k:]
        means[rows] = nearest.mean(axis=1, dtype=np.float64)
    return means


def csls(similarity: Vectors, query_mean: NDArray[np.float64], gallery_mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """(Q, G) cross-domain similarity local scaling, 2 cos(x, y) - r(x) - r(y): a similarity in which hubs are no nearer than others.

    r of the query moves all items alike: for the order of one query's items it may be left out (0), for a threshold over queries it counts.

    Args:
        similarity: (Q, G) cosines.
        query_mean: (Q,), :func:`neighbour_similarity` of the queries to the gallery.
        gallery_mean: (G,), that of the gallery to reference queries.
    Raises:
        ValueError: shapes that do not fit.
    Source: Conneau et al. 2018, arXiv:1710.04087, eq. 3.
    """
    if similarity.ndim != 2 or query_mean.shape != similarity.shape[:1] or gallery_mean.shape != similarity.shape[1:]:
        raise ValueError(
            f"similarity {similarity.shape} needs a mean a row and one a column, got {query_mean.shape} and {gallery_mean.shape}"
        )
    return 2 * similarity - query_mean[:, None] - gallery_mean[None, :]


def k_occurrences(similarity: Vectors, k: int) -> NDArray[np.float64]:
    """(G,) how many of Q queries have each item among their first k; items that tie for the last places share them, so that the sum is Q k.

    Args:
        similarity: (Q, G), any scale, higher is nearer: cosines, or what :func:`csls` makes of them. Counts of chunks of queries add up.
        k: 1 to G.
    Raises:
        ValueError: shapes, NaN, or k outside 1 to G.
    Source: Radovanovic et al. 2010, JMLR 11:2487-2531 (N_k).
    """
    if similarity.ndim != 2 or not 1 <= k <= similarity.shape[1]:
        raise ValueError(f"similarity {similarity.shape} must be (queries, pool) and k 1 to the pool, got {k}")
    counts = np.zeros(similarity.shape[1])
    for rows in _chunks(*similarity.shape):
        some = similarity[rows]
        if np.isnan(some).any():
            raise ValueError(f"similarity is NaN in query row {rows.start + int(np.flatnonzero(np.isnan(some).any(axis=1))[0])}")
        last = np.partition(some, some.shape[1] - k, axis=1)[:, [-k]]
        above, tied = some > last, some == last
        share = (k - above.sum(axis=1)) / tied.sum(axis=1)
        counts += above.sum(axis=0) + share @ tied
    return counts


def hubness_of(occurrences: NDArray[np.float64], k: int, queries: int) -> Hubness:
    """What (G,) k-occurrences over so many queries amount to.

        skewness = E[(N_k - mean N_k)^3] / std(N_k)^3 over items
    Raises:
        ValueError: no items or queries.
    Source: Radovanovic et al. 2010, JMLR 11:2487-2531.
    """
    if not len(occurrences) or queries < 1:
        raise ValueError(f"{len(occurrences)} items and {queries} queries; there is at least one of each")
    return Hubness(
        k=k,
        skewness=float(skew(occurrences)) if np.ptp(occurrences) > 0 else 0.0,
        never=float((occurrences == 0).mean()),
        largest=float(occurrences.max() / queries),
        occurrences=occurrences,
    )


def measure_hubness(queries: Vectors, gallery: Vectors, k: int = 10, gallery_mean: NDArray[np.float64] | None = None) -> Hubness:
    """Hubness of a gallery under queries, by cosine, or by CSLS where the gallery's ``neighbour_similarity`` is given.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        k: 1 to G.
        gallery_mean: (G,), see :func:`csls`.
    Raises:
        ValueError: shapes that differ, k outside 1 to G, or a vector that is 0 or not finite.
    """
    counts = np.zeros(len(gallery))
    for rows, similarity in _similarities(queries, gallery, k):
        scores = similarity if gallery_mean is None else csls(similarity, np.zeros(rows.stop - rows.start), gallery_mean)
        counts += k_occurrences(scores, k)
    return hubness_of(counts, k, len(queries))


def _similarities(vectors: Vectors, reference: Vectors, k: int) -> Iterator[tuple[slice, Vectors]]:
    """Rows of ``vectors``, chunk by chunk, and their cosines to all of the reference, of which no copy is made but of half precision."""
    if _width(vectors) != _width(reference):
        raise ValueError(f"vectors {vectors.shape} and {reference.shape} differ in width")
    if not 1 <= k <= len(reference):
        raise ValueError(f"k must be 1 to the {len(reference)} vectors to choose from, got {k}")
    against = np.asarray(reference, dtype=np.result_type(reference.dtype, np.float32))
    norms = np.concatenate([_norms(against[rows], rows.start) for rows in _chunks(*against.shape)])
    for rows in _chunks(len(vectors), max(against.shape), least=16):
        similarity = _normalised(vectors[rows], rows.start).astype(against.dtype, copy=False) @ against.T
        similarity /= norms
        yield rows, similarity


def _width(vectors: Vectors) -> int:
    if vectors.ndim != 2 or not vectors.size:
        raise ValueError(f"vectors have shape {vectors.shape}, expected (N, D) with at least one")
    return int(vectors.shape[1])


def _norms(vectors: Vectors, start: int) -> Vectors:
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.result_type(vectors.dtype, np.float32)))
    if len(bad := np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))):
        raise ValueError(
            f"vector {start + int(bad[0])} and {len(bad) - 1} others near it have no direction: 0, not finite, or the centre itself"
        )
    return norms


def _normalised(vectors: Vectors, start: int) -> Vectors:
    return vectors / _norms(vectors, start)[:, None]


def _chunks(rows: int, cells_each: int, least: int = 1) -> Iterator[slice]:
    step = max(least, _CELLS // cells_each)  # of a few rows a matrix product would read the whole reference for little
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
