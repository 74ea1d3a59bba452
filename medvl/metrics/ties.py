"""What tied items make of a ranking: of every metric its mean over all orders of items of equal score, in closed form.

Shapes: Q queries, G gallery items, T groups of tied items. A group is held by how many items stand above it, how many it has and how many
of these are relevant; see :func:`medvl.metrics.retrieval.ranking_metrics` for the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Gain = Literal["exponential", "linear"]
CELLS = 4_000_000
"""Of a (queries, pool) matrix worked on at once, about 32 MB an array."""


def chance_of_a_hit(items: NDArray[np.int64], hits: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Chance that ``draws`` of ``items`` in random order bring at least one of ``hits``: 1 - C(items - hits, draws) / C(items, draws)."""
    miss = np.ones(len(items))
    for i in range(max(int(np.minimum(draws, items).max(initial=0)), 0)):
        left = np.maximum(items - i, 1)
        miss *= np.where(i < draws, np.maximum(items - hits - i, 0) / left, 1.0)
    return np.where(hits == 1, np.clip(draws, 0, items) / items, 1 - miss)  # the quotient is exact where there is one


@dataclass(frozen=True)
class FirstHits:
    """Of each of Q queries: items above those tied with its best relevant one, the tied, and the relevant among them."""

    above: NDArray[np.int64]
    tied: NDArray[np.int64]
    hits: NDArray[np.int64]

    @classmethod
    def of_random_order(cls, items: NDArray[np.int64], hits: NDArray[np.int64]) -> FirstHits:
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


def first_hits_of(scores: NDArray[np.floating[Any]], relevant: NDArray[np.bool_]) -> FirstHits:
    parts = []
    for rows in row_chunks(*scores.shape):
        some, marked = scores[rows], relevant[rows]
        best = np.where(marked, some, -np.inf).max(axis=1, keepdims=True)
        tied = some == best
        parts.append(np.stack([(some > best).sum(axis=1), tied.sum(axis=1), (tied & marked).sum(axis=1)]))
    return FirstHits(*np.concatenate(parts, axis=1))


@dataclass(frozen=True)
class Ties:
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
    ) -> Ties:
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
    ) -> Ties:
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

    def first_hits(self) -> FirstHits:
        first = (self.hits > 0) & (self.hits_above == 0)
        return FirstHits(self.above[first], self.size[first], self.hits[first])

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
class Ideal:
    """DCG of the best order of q queries, to each place."""

    running: NDArray[np.float64]  # (q, G)

    @classmethod
    def of(cls, gains: NDArray[np.float64]) -> Ideal:
        return cls(np.cumsum(np.sort(gains, axis=1)[:, ::-1] * _discounts(gains.shape[1]), axis=1))

    def to(self, k: int) -> NDArray[np.float64]:
        return self.running[:, min(k, self.running.shape[1]) - 1]


def tie_values(ties: Ties, ideal: Ideal, relevant: NDArray[np.int64], ks: Sequence[int]) -> dict[str, NDArray[np.float64]]:
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


def gained(grades: NDArray[np.number[Any]], gain: Gain) -> NDArray[np.float64]:
    given = grades.astype(np.float64)
    return np.exp2(given) - 1 if gain == "exponential" else given


def _discounts(places: int) -> NDArray[np.float64]:
    return 1 / np.log2(np.arange(2, places + 2))


def median_of_random_order(items: NDArray[np.int64], hits: NDArray[np.int64]) -> float:
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


def row_chunks(rows: int, cells_each: int) -> Iterator[slice]:
    step = max(1, CELLS // max(cells_each, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def check_pool(
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


def check_grades(grades: NDArray[np.number[Any]] | None, relevant: NDArray[np.bool_], candidates: NDArray[np.bool_] | None) -> None:
    if grades is None:
        return
    if grades.shape != relevant.shape:
        raise ValueError(f"grades have shape {grades.shape}, expected that of relevant, {relevant.shape}")
    if not ((grades >= 0) & (grades <= 64)).all():  # 2^64: beyond it one item's gain drowns all others
        raise ValueError("grades must be 0 to 64; where they are counts of more, divide them")
    graded = grades > 0 if candidates is None else (grades > 0) & candidates
    if len(lonely := np.flatnonzero(~graded.any(axis=1))):
        raise ValueError(f"{len(lonely)} queries, the first in row {lonely[0]}, have no item of a grade above 0; leave them out")
