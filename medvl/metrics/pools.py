"""Retrieval over small random pools, as other work prints it: Recall@K within pools of N that do not overlap, mean over many deals.

Shapes: N pairs of a query and its item, K a depth of the ranking. Ties and rules are as in :mod:`medvl.metrics.retrieval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, bootstrap_resamples, ratio_statistic
from medvl.metrics.ties import FirstHits, check_pool, first_hits_of, row_chunks


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
    check_pool(similarity, own, ks)
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
        for part in row_chunks(pools, pool * pool):
            some = members[part]
            cells = some[:, :, None], some[:, None, :]
            within = own[cells].reshape(-1, pool)
            first = first_hits_of(similarity[cells].reshape(-1, pool), within)
            by_chance = FirstHits.of_random_order(np.full(len(within), pool), within.sum(axis=1))
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
