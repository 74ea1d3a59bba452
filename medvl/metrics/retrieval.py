"""Recall@K over a pool.

Shapes: Q queries, G gallery items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, bootstrap_intervals, mean_statistic


@dataclass(frozen=True)
class Retrieval:
    """Recall@K of Q queries against a pool. ``ranks`` (Q,) is the expected rank of each query's best relevant item, 1 the best."""

    recall: dict[int, Interval]  # K -> share of queries with a relevant item among the first K
    chance: dict[int, float]  # K -> the same for a random order of the pool; K / pool if every query has one relevant item
    pool: int
    ranks: NDArray[np.float64] = field(repr=False)
    hits: dict[int, NDArray[np.float64]] = field(repr=False)  # K -> (Q,) chance of a hit of each query, 0 or 1 but for ties


def recall_at_k(
    similarity: NDArray[np.floating[Any]],
    relevant: NDArray[np.bool_],
    ks: Sequence[int],
    patient_ids: PatientIds,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Retrieval:
    """Recall@K over the full pool, with patient-level intervals over queries (the pool stays as it is).

    Strict pairs: ``relevant`` has one True a query. Duplicates as hits: True wherever the item says the same. Ties are counted at their
    expectation over a random order of the tied items, so a model that scores everything alike is at chance, not at 0 or 1. A matrix product
    may give equal items that differ in the last bit: round before, or they are ordered by noise.

    Args:
        similarity: (Q, G), higher is nearer.
        relevant: (Q, G) bool.
        ks: each at least 1; from the pool size on, recall is 1.
        patient_ids: (Q,), the patient of each query.
        repeats: as in :func:`bootstrap_intervals`, like ``seed`` and ``level``.
        seed: see there.
        level: see there.
    Raises:
        ValueError: shapes that differ, NaN similarity, a query without a relevant item, or a K below 1.
    """
    if similarity.ndim != 2 or similarity.shape != relevant.shape or relevant.dtype != np.bool_:
        raise ValueError(
            f"similarity {similarity.shape} and relevant {relevant.shape} ({relevant.dtype}) must be (queries, pool), the second bool"
        )
    if np.isnan(similarity).any():
        raise ValueError(f"similarity is NaN in query row {int(np.flatnonzero(np.isnan(similarity).any(axis=1))[0])}")
    if len(lonely := np.flatnonzero(~relevant.any(axis=1))):
        raise ValueError(f"{len(lonely)} queries, the first in row {lonely[0]}, have no relevant item in the pool; leave them out")
    if any(k < 1 for k in ks):
        raise ValueError(f"every K must be 1 or more, got {list(ks)}")
    pool = similarity.shape[1]
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    above = (similarity > best).sum(axis=1)
    tied = similarity == best
    n_tied, n_hits = tied.sum(axis=1), (tied & relevant).sum(axis=1)
    hits = {k: chance_of_a_hit(n_tied, n_hits, k - above) for k in ks}
    statistics = {str(k): mean_statistic(values) for k, values in hits.items()}
    intervals = bootstrap_intervals(statistics, patient_ids, repeats=repeats, seed=seed, level=level)
    everything = np.full(len(relevant), pool)
    return Retrieval(
        recall={k: intervals[str(k)] for k in ks},
        chance={k: float(chance_of_a_hit(everything, relevant.sum(axis=1), np.full(len(relevant), k)).mean()) for k in ks},
        pool=pool,
        ranks=above + (n_tied + 1) / (n_hits + 1),
        hits=hits,
    )


def chance_of_a_hit(items: NDArray[np.int64], hits: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Chance that ``draws`` of ``items`` in random order bring at least one of ``hits``: 1 - C(items - hits, draws) / C(items, draws)."""
    miss = np.ones(len(items))
    for i in range(max(int(np.minimum(draws, items).max(initial=0)), 0)):
        left = np.maximum(items - i, 1)
        miss *= np.where(i < draws, np.maximum(items - hits - i, 0) / left, 1.0)
    return np.where(hits == 1, np.clip(draws, 0, items) / items, 1 - miss)  # the quotient is exact where there is one
