"""Retrieval over a pool: Recall@K, ranks, reciprocal rank, average precision and nDCG; over small pools see :mod:`medvl.metrics.pools`.

Shapes: Q queries, G gallery items, K a depth of the ranking.

Items of equal score have no order. Every metric here is the exact mean over all orders of such items, so that a model that scores
everything alike is at chance, not at 0 or 1, and no result hangs on the order of the files. A matrix product may give equal items that
differ in the last bit: round before, or they are ordered by noise. What counts as relevant is the caller's to say, and to put into words as
the ``rule`` that every result carries ("strict": the item of the query's own study alone; "duplicates as hits": every item that says the
same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, bootstrap_intervals, bootstrap_resamples, mean_statistic, median_statistic
from medvl.metrics.ties import (
    FirstHits,
    Gain,
    Ideal,
    Ties,
    check_grades,
    check_pool,
    first_hits_of,
    gained,
    median_of_random_order,
    row_chunks,
    tie_values,
)


@dataclass(frozen=True)
class Retrieval:
    """Recall@K of Q queries against a pool. ``ranks`` (Q,) is the expected rank of each query's best relevant item, 1 the best."""

    recall: dict[int, Interval]  # K -> share of queries with a relevant item among the first K
    chance: dict[int, float]  # K -> the same for a random order of the pool; K / pool if every query has one relevant item
    pool: int
    ranks: NDArray[np.float64] = field(repr=False)
    hits: dict[int, NDArray[np.float64]] = field(repr=False)  # K -> (Q,) chance of a hit of each query, 0 or 1 but for ties


@dataclass(frozen=True)
class RankingResult:
    """Ranking metrics of Q queries, what a random order of the pool would give, the pool and the rule. See :func:`ranking_metrics`."""

    rule: str  # what counts as relevant, in words
    pool: int  # items that a query is ranked against; the most, where queries have candidates of their own
    smallest_pool: int  # the fewest
    ks: tuple[int, ...]
    gain: Gain  # of nDCG
    metrics: dict[str, Interval]
    chance: dict[str, float]  # name of a metric -> the same for a random order
    per_query: dict[str, NDArray[np.float64]] = field(repr=False)  # name -> (Q,); "rank" is that of the best relevant item

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, rule and pool first."""
        return {
            "rule": self.rule,
            "pool": self.pool,
            "smallest_pool": self.smallest_pool,
            "gain": self.gain,
            "metrics": {name: {**interval.to_dict(), "chance": self.chance[name]} for name, interval in self.metrics.items()},
        }


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

    Strict pairs: ``relevant`` has one True a query. Duplicates as hits: True wherever the item says the same. Nothing is sorted; of the
    other metrics see :func:`ranking_metrics`.

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
    check_pool(similarity, relevant, ks)
    first = first_hits_of(similarity, relevant)
    hits = {k: first.within(k) for k in ks}
    intervals = bootstrap_intervals(
        {str(k): mean_statistic(values) for k, values in hits.items()}, patient_ids, repeats=repeats, seed=seed, level=level
    )
    pool = similarity.shape[1]
    at_random = FirstHits.of_random_order(np.full(len(relevant), pool), relevant.sum(axis=1))
    return Retrieval(
        recall={k: intervals[str(k)] for k in ks},
        chance={k: float(at_random.within(k).mean()) for k in ks},
        pool=pool,
        ranks=first.rank,
        hits=hits,
    )


def ranking_metrics(
    similarity: NDArray[np.floating[Any]],
    relevant: NDArray[np.bool_],
    ks: Sequence[int],
    patient_ids: PatientIds,
    *,
    rule: str,
    grades: NDArray[np.number[Any]] | None = None,
    gain: Gain = "exponential",
    candidates: NDArray[np.bool_] | None = None,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> RankingResult:
    """Every ranking metric over the full pool, with patient-level intervals over queries (the pool stays as it is) and chance levels.

    Of a query with relevant items R in one order of its pool, y_p 1 if the item in place p is relevant and g_p its grade:

    - ``recall@K``: 1 if any of the first K is relevant (also called hit rate). ``precision@K``: the mean y of the first K.
    - ``mean_rank``, ``median_rank`` over queries of the place of the best relevant item, ``mrr`` the mean of its inverse.
    - ``map``: the mean of AP = 1/R sum_p y_p P_p with P_p = 1/p sum_{q<=p} y_q. ``map@K``: the sum to p = K, over min(R, K).
    - ``ndcg``: the mean of DCG / (DCG of the best order), DCG = sum_p G(g_p) / log2(p + 1) with G(g) = 2^g - 1 (``gain`` exponential) or g
      (linear). ``ndcg@K``: both sums to p = K. ``grade@K``, where grades are given: the mean g of the first K.

    Each is its mean over all orders of tied items, in closed form: with s items (R_s of them relevant) above a group of t tied items, r of
    them relevant, the group adds to the sum of AP
        r/t sum_{j=1..t} (R_s + 1 + (j - 1)(r - 1)/(t - 1)) / (s + j)
    to DCG the group's mean gain in each of its places, and of the first group with a relevant item
        E[rank] = s + (t + 1)/(r + 1),  E[1/rank] = sum_{j=1..t-r+1} C(t - j, r - 1)/C(t, r) / (s + j)
    ``median_rank`` is the median over queries of E[rank].

    Chance is the same mean over all orders of the pool; of the median rank it is the median over queries and orders together.

    "MAP@K" in print is more than one thing. SPECTRE's is ours with R the other volumes of the identical label vector
    (``same_present_facts``, the query itself no candidate; queries without one are skipped there and an error here). CT-CLIP's is no
    average precision but ``grade@K``, with the overlap of labels over their union as grade (``fact_relevance(..., "jaccard")``), and there
    the query itself is in the gallery.

    Args:
        similarity: (Q, G), higher is nearer; infinities are fine.
        relevant: (Q, G) bool.
        ks: each at least 1.
        patient_ids: (Q,), the patient of each query.
        rule: what ``relevant`` means, such as "strict" or "duplicates as hits".
        grades: (Q, G), 0 (not relevant) or more, for nDCG; without them ``relevant`` as 0 and 1.
        gain: of nDCG, "exponential" (Burges et al. 2005) or "linear" (Jarvelin & Kekalainen 2002).
        candidates: (Q, G) bool, what each query is ranked against: not its own study or patient, or a gallery made harder. All by default.
        repeats: as in :func:`bootstrap_intervals`, like ``seed`` and ``level``.
        seed: see there.
        level: see there.
    Raises:
        ValueError: shapes that differ, NaN similarity of a candidate, a query without a relevant candidate or without one of a grade above
            0, grades that are negative, not finite or too large for 2^g, a K below 1, another gain, or an empty rule.
    Source: McSherry & Najork 2008, doi:10.1007/978-3-540-78646-7_38, on ties; Jarvelin & Kekalainen 2002, doi:10.1145/582415.582418, on
        DCG; eval/retrieval_ct_rate.py of SPECTRE and scripts/volume_to_volume_new.py of CT-CLIP.
    """
    check_pool(similarity, relevant, ks, candidates)
    if not rule.strip():
        raise ValueError('say in words what counts as relevant, such as rule="strict" or rule="duplicates as hits"')
    if gain not in get_args(Gain):
        raise ValueError(f"gain must be one of {', '.join(get_args(Gain))}, got {gain!r}")
    check_grades(grades, relevant, candidates)
    found: list[dict[str, NDArray[np.float64]]] = []
    at_random: list[dict[str, NDArray[np.float64]]] = []
    pools: list[NDArray[np.int64]] = []
    hits: list[NDArray[np.int64]] = []
    for rows in row_chunks(*similarity.shape):
        scores, marked, graded = similarity[rows], relevant[rows], None if grades is None else grades[rows]
        if candidates is not None:
            scores, marked = np.where(candidates[rows], scores, np.nan), marked & candidates[rows]
            graded = None if graded is None else np.where(candidates[rows], graded, 0)
        gains = marked.astype(np.float64) if graded is None else gained(graded, gain)
        ideal = Ideal.of(gains)
        pools.append((~np.isnan(scores)).sum(axis=1))
        hits.append(marked.sum(axis=1))
        found.append(tie_values(Ties.of(scores, marked, gains, graded), ideal, hits[-1], ks))
        at_random.append(tie_values(Ties.of_random_order(pools[-1], marked, gains, graded), ideal, hits[-1], ks))
    per_query = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    by_chance = {name: float(np.concatenate([part[name] for part in at_random]).mean()) for name in found[0]}
    ranks, chance_of_rank = per_query["rank"], by_chance.pop("rank")
    statistics = {
        "median_rank": median_statistic(ranks),
        "mean_rank": mean_statistic(ranks),
        **{name: mean_statistic(values) for name, values in per_query.items() if name != "rank"},
    }
    drawn = bootstrap_resamples(statistics, patient_ids, repeats=repeats, seed=seed, level=level)
    sizes = np.concatenate(pools)
    return RankingResult(
        rule=rule,
        pool=int(sizes.max()),
        smallest_pool=int(sizes.min()),
        ks=tuple(ks),
        gain=gain,
        metrics={name: drawn.interval(name) for name in statistics},
        chance={"median_rank": median_of_random_order(sizes, np.concatenate(hits)), "mean_rank": chance_of_rank, **by_chance},
        per_query=per_query,
    )


def both_directions(
    similarity: NDArray[np.floating[Any]],
    relevant: NDArray[np.bool_],
    ks: Sequence[int],
    query_patients: PatientIds,
    gallery_patients: PatientIds,
    *,
    rule: str,
    names: tuple[str, str] = ("image_to_report", "report_to_image"),
    grades: NDArray[np.number[Any]] | None = None,
    gain: Gain = "exponential",
    candidates: NDArray[np.bool_] | None = None,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, RankingResult]:
    """:func:`ranking_metrics` of rows against columns and of columns against rows, under the names given. Arguments as there.

    Args:
        similarity: (Q, G).
        relevant: (Q, G) bool, with a True in every row and in every column.
        ks: as in :func:`ranking_metrics`, like all that is not listed.
        query_patients: (Q,), the patient of each row.
        gallery_patients: (G,), the patient of each column.
        names: of the direction of rows to columns, and of that back.
    Raises:
        ValueError: as :func:`ranking_metrics`, or names that are the same.
    """
    if names[0] == names[1]:
        raise ValueError(f"both directions are called {names[0]!r}")
    forth, back = (
        ranking_metrics(
            _turned(similarity, turn),
            _turned(relevant, turn),
            ks,
            gallery_patients if turn else query_patients,
            rule=rule,
            grades=None if grades is None else _turned(grades, turn),
            gain=gain,
            candidates=None if candidates is None else _turned(candidates, turn),
            repeats=repeats,
            seed=seed,
            level=level,
        )
        for turn in (False, True)
    )
    return {names[0]: forth, names[1]: back}


def _turned(matrix: NDArray[Any], turn: bool) -> NDArray[Any]:
    return matrix.T if turn else matrix
