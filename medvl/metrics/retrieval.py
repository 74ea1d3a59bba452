"""Retrieval over a pool: Recall@K, ranks, reciprocal rank, average precision and nDCG, over the full pool or over pools of N.

Shapes: Q queries, G gallery items, N pairs of a query and its item, K a depth of the ranking.

Items of equal score have no order. Every metric here is the exact mean over all orders of such items, so that a model that scores
everything alike is at chance, not at 0 or 1, and no result hangs on the order of the files. A matrix product may give equal items that
differ in the last bit: round before, or they are ordered by noise. What counts as relevant is the caller's to say, and to put into words as
the ``rule`` that every result carries ("strict": the item of the query's own study alone; "duplicates as hits": every item that says the
same).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.bootstrap import (
    Interval,
    PatientIds,
    bootstrap_intervals,
    bootstrap_resamples,
    mean_statistic,
    median_statistic,
    ratio_statistic,
)

Gain = Literal["exponential", "linear"]
_CELLS = 4_000_000  # of a (queries, pool) matrix worked on at once, about 32 MB an array


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


@dataclass(frozen=True)
class PooledRecall:
    """Recall@K within random pools of N, with the rule. See :func:`pooled_recall`."""

    rule: str  # what counts as relevant, in words
    pool: int  # items of every pool
    partitions: int  # times that the pairs were dealt into pools
    pools: int  # pools of one partition
    left_out: int  # pairs that a partition leaves over, others each time
    recall: dict[int, Interval]  # K -> mean over partitions; the interval is over patients
    chance: dict[int, float]
    of_partitions: dict[int, NDArray[np.float64]] = field(repr=False)  # K -> (partitions,) recall of each

    def spread(self, k: int, level: float = 0.95) -> tuple[float, float]:
        """Quantiles of Recall@k over partitions: the noise of dealing pools alone, which other work prints as its interval."""
        low, high = np.quantile(self.of_partitions[k], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, rule and pool first."""
        return {
            "rule": self.rule,
            "pool": self.pool,
            "partitions": self.partitions,
            "pools": self.pools,
            "left_out": self.left_out,
            "metrics": {
                f"recall@{k}": {**interval.to_dict(), "chance": self.chance[k], "partitions_spread": list(self.spread(k))}
                for k, interval in self.recall.items()
            },
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
    _check(similarity, relevant, ks)
    first = _first_hits(similarity, relevant)
    hits = {k: first.within(k) for k in ks}
    intervals = bootstrap_intervals(
        {str(k): mean_statistic(values) for k, values in hits.items()}, patient_ids, repeats=repeats, seed=seed, level=level
    )
    pool = similarity.shape[1]
    at_random = _FirstHits.of_random_order(np.full(len(relevant), pool), relevant.sum(axis=1))
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
    _check(similarity, relevant, ks, candidates)
    if not rule.strip():
        raise ValueError('say in words what counts as relevant, such as rule="strict" or rule="duplicates as hits"')
    if gain not in get_args(Gain):
        raise ValueError(f"gain must be one of {', '.join(get_args(Gain))}, got {gain!r}")
    _check_grades(grades, relevant, candidates)
    found: list[dict[str, NDArray[np.float64]]] = []
    at_random: list[dict[str, NDArray[np.float64]]] = []
    pools: list[NDArray[np.int64]] = []
    hits: list[NDArray[np.int64]] = []
    for rows in _row_chunks(*similarity.shape):
        scores, marked, graded = similarity[rows], relevant[rows], None if grades is None else grades[rows]
        if candidates is not None:
            scores, marked = np.where(candidates[rows], scores, np.nan), marked & candidates[rows]
            graded = None if graded is None else np.where(candidates[rows], graded, 0)
        gains = marked.astype(np.float64) if graded is None else _gained(graded, gain)
        ideal = _Ideal.of(gains)
        pools.append((~np.isnan(scores)).sum(axis=1))
        hits.append(marked.sum(axis=1))
        found.append(_values(_Ties.of(scores, marked, gains, graded), ideal, hits[-1], ks))
        at_random.append(_values(_Ties.of_random_order(pools[-1], marked, gains, graded), ideal, hits[-1], ks))
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
        chance={"median_rank": _median_of_random_order(sizes, np.concatenate(hits)), "mean_rank": chance_of_rank, **by_chance},
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


def pooled_recall(
    similarity: NDArray[np.floating[Any]],
    ks: Sequence[int],
    pool: int,
    patient_ids: PatientIds,
    *,
    rule: str,
    relevant: NDArray[np.bool_] | None = None,
    partitions: int = 100,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PooledRecall:
    """Recall@K within random pools that do not overlap, mean over ``partitions`` deals: Merlin and SPECTRE print it for pools of 32 to 128.

    A partition shuffles the N pairs, cuts them into floor(N / pool) pools and ranks each query against the items of its own pool; N mod
    pool pairs are left over, others each time. (SPECTRE measures these too, in a smaller pool, which is easier.) With h_i the hits of query
    i over all partitions and c_i the times that it was dealt, recall is sum_i h_i / sum_i c_i, the mean over partitions; its interval draws
    patients, the pools as they are. The same seed deals the same pools, so ``similarity.T`` gives the way back over the same ones. A small
    pool is an easy one: a value says nothing without its pool.

    Args:
        similarity: (N, N), higher is nearer; row i and column i are a pair.
        ks: each at least 1.
        pool: pairs of a pool, 1 to N.
        patient_ids: (N,), the patient of each pair.
        rule: what counts as relevant, such as "strict" or "duplicates as hits".
        relevant: (N, N) bool with a True diagonal, of which the part within a pool counts; the pair alone by default.
        partitions: 1 or more.
        repeats: resamples of patients, as in :func:`bootstrap_intervals`, like ``level``.
        seed: of the partitions and of the resamples.
        level: see there.
    Raises:
        ValueError: shapes that do not fit, NaN similarity, a pair that is not relevant to itself, a K or partitions below 1, a pool that is
            not within 1 to N, or an empty rule.
    Source: Blankemeier et al. 2024, arXiv:2406.06512 (Merlin), zero-shot retrieval; eval/retrieval_merlin.py of SPECTRE.
    """
    n = len(similarity)
    own = np.eye(n, dtype=bool) if relevant is None else relevant
    _check(similarity, own, ks)
    if similarity.shape != (n, n) or not own.diagonal().all():
        raise ValueError(
            f"similarity {similarity.shape} must be (N, N) with pair i in row and column i, and relevant True for all {n} pairs, "
            f"got {int(own.diagonal().sum())}"
        )
    if not rule.strip():
        raise ValueError('say in words what counts as relevant, such as rule="strict" or rule="duplicates as hits"')
    if not 1 <= pool <= n or partitions < 1:
        raise ValueError(f"pools of {pool} in {partitions} partitions; a pool holds 1 to {n} pairs, and there is at least one partition")
    generator = np.random.default_rng(seed)
    pools = n // pool
    dealt = np.zeros(n)
    totals, at_random = {k: np.zeros(n) for k in ks}, dict.fromkeys(ks, 0.0)
    of_partitions = {k: np.zeros(partitions) for k in ks}
    for p in range(partitions):
        members = generator.permutation(n)[: pools * pool].reshape(pools, pool)
        for part in _row_chunks(pools, pool * pool):
            some = members[part]
            cells = some[:, :, None], some[:, None, :]
            within = own[cells].reshape(-1, pool)
            first = _first_hits(similarity[cells].reshape(-1, pool), within)
            by_chance = _FirstHits.of_random_order(np.full(len(within), pool), within.sum(axis=1))
            dealt[some.ravel()] += 1
            for k in totals:
                hits = first.within(k)
                totals[k][some.ravel()] += hits
                of_partitions[k][p] += hits.sum() / members.size
                at_random[k] += float(by_chance.within(k).sum()) / members.size / partitions
    drawn = bootstrap_resamples(
        {str(k): ratio_statistic(total, dealt) for k, total in totals.items()}, patient_ids, repeats=repeats, seed=seed, level=level
    )
    return PooledRecall(
        rule=rule,
        pool=pool,
        partitions=partitions,
        pools=pools,
        left_out=n - pools * pool,
        recall={k: drawn.interval(str(k)) for k in totals},
        chance=at_random,
        of_partitions=of_partitions,
    )


def chance_of_a_hit(items: NDArray[np.int64], hits: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Chance that ``draws`` of ``items`` in random order bring at least one of ``hits``: 1 - C(items - hits, draws) / C(items, draws)."""
    miss = np.ones(len(items))
    for i in range(max(int(np.minimum(draws, items).max(initial=0)), 0)):
        left = np.maximum(items - i, 1)
        miss *= np.where(i < draws, np.maximum(items - hits - i, 0) / left, 1.0)
    return np.where(hits == 1, np.clip(draws, 0, items) / items, 1 - miss)  # the quotient is exact where there is one


@dataclass(frozen=True)
class _FirstHits:
    """Of each of Q queries: items above those tied with its best relevant one, the tied, and the relevant among them."""

    above: NDArray[np.int64]
    tied: NDArray[np.int64]
    hits: NDArray[np.int64]

    @classmethod
    def of_random_order(cls, items: NDArray[np.int64], hits: NDArray[np.int64]) -> _FirstHits:
        return cls(np.zeros_like(items), items, hits)

    @property
    def rank(self) -> NDArray[np.float64]:
        return self.above + (self.tied + 1) / (self.hits + 1)

    def within(self, k: int) -> NDArray[np.float64]:
        return chance_of_a_hit(self.tied, self.hits, k - self.above)

    def reciprocal_rank(self) -> NDArray[np.float64]:
        """Sum over places j among the tied of P(the first relevant is there) / (above + j), the P one from the other."""
        cases, which = np.unique(np.stack([self.above, self.tied, self.hits], axis=1), axis=0, return_inverse=True)
        above, tied, hits = cases.T
        chance, total = hits / tied, np.zeros(len(cases))
        for j in range(1, int((tied - hits).max(initial=0)) + 2):
            total += chance / (above + j)
            chance = chance * np.maximum(tied - hits - j + 1, 0) / np.maximum(tied - j, 1)
        return total[which.reshape(-1)]


def _first_hits(scores: NDArray[np.floating[Any]], relevant: NDArray[np.bool_]) -> _FirstHits:
    parts = []
    for rows in _row_chunks(*scores.shape):
        some, marked = scores[rows], relevant[rows]
        best = np.where(marked, some, -np.inf).max(axis=1, keepdims=True)
        tied = some == best
        parts.append(np.stack([(some > best).sum(axis=1), tied.sum(axis=1), (tied & marked).sum(axis=1)]))
    return _FirstHits(*np.concatenate(parts, axis=1))


@dataclass(frozen=True)
class _Ties:
    """The T groups of tied items of q queries, best first, one query after another; (T,) each."""

    query: NDArray[np.int64]
    above: NDArray[np.int64]  # items above the group
    size: NDArray[np.int64]
    hits: NDArray[np.int64]  # relevant ones of the group
    hits_above: NDArray[np.int64]
    gain: NDArray[np.float64]  # summed over the group
    grade: NDArray[np.float64] | None  # summed over the group
    queries: int
    places: int  # of the longest pool

    @classmethod
    def of(
        cls,
        scores: NDArray[np.floating[Any]],
        relevant: NDArray[np.bool_],
        gains: NDArray[np.float64],
        grades: NDArray[np.number[Any]] | None,
    ) -> _Ties:
        """Of (q, G) scores; NaN is no candidate, comes last and is neither relevant nor of a gain."""
        falling = -scores
        order = np.argsort(falling, axis=1)
        falling = np.take_along_axis(falling, order, axis=1)
        begins = np.ones(scores.shape, dtype=bool)
        begins[:, 1:] = falling[:, 1:] != falling[:, :-1]
        starts = np.flatnonzero(begins)

        def summed(values: NDArray[Any], kind: type) -> NDArray[Any]:
            return np.add.reduceat(np.take_along_axis(values, order, axis=1).ravel(), starts, dtype=kind)

        query, above = np.divmod(starts, scores.shape[1])
        hits = summed(relevant, np.int64)
        before = hits.cumsum() - hits
        return cls(
            query=query,
            above=above,
            size=np.diff(starts, append=scores.size),
            hits=hits,
            hits_above=before - before[above == 0][query],
            gain=summed(gains, np.float64),
            grade=None if grades is None else summed(grades, np.float64),
            queries=len(scores),
            places=scores.shape[1],
        )

    @classmethod
    def of_random_order(
        cls,
        items: NDArray[np.int64],
        relevant: NDArray[np.bool_],
        gains: NDArray[np.float64],
        grades: NDArray[np.number[Any]] | None,
    ) -> _Ties:
        none = np.zeros(len(items), dtype=np.int64)
        return cls(
            query=np.arange(len(items)),
            above=none,
            size=items,
            hits=relevant.sum(axis=1),
            hits_above=none,
            gain=gains.sum(axis=1),
            grade=None if grades is None else grades.sum(axis=1, dtype=np.float64),
            queries=len(items),
            places=relevant.shape[1],
        )

    def first_hits(self) -> _FirstHits:
        first = (self.hits > 0) & (self.hits_above == 0)
        return _FirstHits(self.above[first], self.size[first], self.hits[first])

    def average_precision_sum(self, k: int) -> NDArray[np.float64]:
        """(q,) sum over the first k places of y_p P_p; see :func:`ranking_metrics`, with sum_j 1 / (s + j) from harmonic numbers."""
        harmonic = np.concatenate(([0.0], np.cumsum(1 / np.arange(1, self.places + 1))))
        reached = self._reached(k)
        slope = (self.hits - 1) / np.maximum(self.size - 1, 1)
        terms = (self.hits_above + 1 - slope * (self.above + 1)) * (harmonic[self.above + reached] - harmonic[self.above])
        return self._by_query(self.hits / self.size * (terms + slope * reached))

    def discounted_gain(self, k: int) -> NDArray[np.float64]:
        """(q,) DCG of the first k places."""
        discount = np.concatenate(([0.0], np.cumsum(_discounts(self.places))))
        return self._by_query(self.gain / self.size * (discount[self.above + self._reached(k)] - discount[self.above]))

    def first_sum(self, values: NDArray[Any], k: int) -> NDArray[np.float64]:
        """(q,) sum over the first k places of what the groups hold ``values`` of."""
        return self._by_query(values / self.size * self._reached(k))

    def _reached(self, k: int) -> NDArray[np.int64]:
        return np.clip(k - self.above, 0, self.size)

    def _by_query(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self.query, weights=values, minlength=self.queries).astype(np.float64, copy=False)


@dataclass(frozen=True)
class _Ideal:
    """DCG of the best order of q queries, to each place."""

    running: NDArray[np.float64]  # (q, G)

    @classmethod
    def of(cls, gains: NDArray[np.float64]) -> _Ideal:
        return cls(np.cumsum(np.sort(gains, axis=1)[:, ::-1] * _discounts(gains.shape[1]), axis=1))

    def to(self, k: int) -> NDArray[np.float64]:
        return self.running[:, min(k, self.running.shape[1]) - 1]


def _values(ties: _Ties, ideal: _Ideal, relevant: NDArray[np.int64], ks: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Of each metric the (q,) mean over all orders of ties; ``relevant`` (q,) counts the relevant candidates."""
    first, end = ties.first_hits(), ties.places
    values = {
        "rank": first.rank,
        "mrr": first.reciprocal_rank(),
        "map": ties.average_precision_sum(end) / relevant,
        "ndcg": ties.discounted_gain(end) / ideal.to(end),
    }
    for k in ks:
        values[f"recall@{k}"] = first.within(k)
        values[f"precision@{k}"] = ties.first_sum(ties.hits, k) / k
        values[f"map@{k}"] = ties.average_precision_sum(k) / np.minimum(relevant, k)
        values[f"ndcg@{k}"] = ties.discounted_gain(k) / ideal.to(k)
        if ties.grade is not None:
            values[f"grade@{k}"] = ties.first_sum(ties.grade, k) / k
    return values


def _discounts(places: int) -> NDArray[np.float64]:
    return 1 / np.log2(np.arange(2, places + 2))


def _gained(grades: NDArray[np.number[Any]], gain: Gain) -> NDArray[np.float64]:
    given = grades.astype(np.float64)
    return np.exp2(given) - 1 if gain == "exponential" else given


def _median_of_random_order(items: NDArray[np.int64], hits: NDArray[np.int64]) -> float:
    """Median of the best relevant item's place over queries and random orders: between the first places with F >= 1/2 and F > 1/2."""
    cases, counts = np.unique(np.stack([items, hits], axis=1), axis=0, return_counts=True)
    share, miss, lower = counts / counts.sum(), np.ones(len(cases)), math.nan
    for place in range(1, int(items.max()) + 1):
        miss = miss * np.maximum(cases[:, 0] - cases[:, 1] - place + 1, 0) / np.maximum(cases[:, 0] - place + 1, 1)
        reached = 1 - float(share @ miss)
        if math.isnan(lower) and reached >= 0.5 - 1e-12:
            lower = place
        if reached > 0.5 + 1e-12:
            return (lower + place) / 2
    raise AssertionError("every query has a relevant item in its pool")


def _turned(matrix: NDArray[Any], turn: bool) -> NDArray[Any]:
    return matrix.T if turn else matrix


def _row_chunks(rows: int, cells_each: int) -> Iterator[slice]:
    step = max(1, _CELLS // max(cells_each, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _check(
    similarity: NDArray[np.floating[Any]], relevant: NDArray[np.bool_], ks: Sequence[int], candidates: NDArray[np.bool_] | None = None
) -> None:
    if similarity.ndim != 2 or similarity.shape != relevant.shape or relevant.dtype != np.bool_:
        raise ValueError(
            f"similarity {similarity.shape} and relevant {relevant.shape} ({relevant.dtype}) must be (queries, pool), the second bool"
        )
    if candidates is not None and (candidates.shape != relevant.shape or candidates.dtype != np.bool_):
        raise ValueError(f"candidates {candidates.shape} ({candidates.dtype}) must be bool of shape {relevant.shape}")
    if not similarity.size:
        raise ValueError(f"similarity {similarity.shape} has no queries or no pool")
    if any(k < 1 for k in ks):
        raise ValueError(f"every K must be 1 or more, got {list(ks)}")
    unknown, marked = np.isnan(similarity), relevant
    if candidates is not None:
        unknown, marked = unknown & candidates, marked & candidates
    if unknown.any():
        raise ValueError(f"similarity is NaN in query row {int(np.flatnonzero(unknown.any(axis=1))[0])}")
    if len(lonely := np.flatnonzero(~marked.any(axis=1))):
        raise ValueError(f"{len(lonely)} queries, the first in row {lonely[0]}, have no relevant item in the pool; leave them out")


def _check_grades(grades: NDArray[np.number[Any]] | None, relevant: NDArray[np.bool_], candidates: NDArray[np.bool_] | None) -> None:
    if grades is None:
        return
    if grades.shape != relevant.shape:
        raise ValueError(f"grades have shape {grades.shape}, expected that of relevant, {relevant.shape}")
    if not ((grades >= 0) & (grades <= 64)).all():  # 2^64: beyond it one item's gain drowns all others
        raise ValueError("grades must be 0 to 64; where they are counts of more, divide them")
    graded = grades > 0 if candidates is None else (grades > 0) & candidates
    if len(lonely := np.flatnonzero(~graded.any(axis=1))):
        raise ValueError(f"{len(lonely)} queries, the first in row {lonely[0]}, have no item of a grade above 0; leave them out")
