"""Metrics that hang on the order of scores alone: AUROC and average precision (AUPRC).

Shapes: N rows (studies), F findings, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, Statistic, bootstrap_intervals, ratio
from medvl.metrics.labels import checked, known_rows


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting half.

    Args:
        labels: (N,) of 1 (or True) and 0. Uncertain and missing ones are the caller's to drop.
        scores: (N,), any order-preserving scale; infinities are fine.
    Returns:
        NaN if one class is missing.
    Raises:
        ValueError: another label, a NaN score, or lengths that differ.
    Source: Hanley & McNeil 1982, doi:10.1148/radiology.143.1.7063747 (the Mann-Whitney statistic with midranks).
    """
    positive, values = checked(labels, scores)
    if not 0 < positive.sum() < len(positive):
        return math.nan
    negatives, positives = np.sort(values[~positive]), values[positive]
    wins = np.searchsorted(negatives, positives, side="left").sum() + np.searchsorted(negatives, positives, side="right").sum()
    return float(wins / (2 * len(negatives) * len(positives)))


def auroc_statistic(labels: ArrayLike, scores: ArrayLike) -> Statistic:
    """:func:`auroc` as a function of row weights. Rows whose label is NaN (not mentioned) or -1 (uncertain) do not count.

    With rows sorted by score into groups g of equal scores, p_g and n_g the weight of positives and negatives in a group:
        AUROC = sum_g p_g (sum_{h<g} n_h + n_g / 2) / (sum_g p_g sum_g n_g)
    """
    used, positive, values = known_rows(labels, scores)
    groups = _Groups.of(used, positive, values)

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        p, n = groups.weigh(weights)
        wins = (p * (n.cumsum(axis=1) - n / 2)).sum(axis=1)
        return ratio(wins, p.sum(axis=1) * n.sum(axis=1))

    return Statistic(of_weights, used, int(positive.sum()))


def concordance_statistic(levels: ArrayLike, scores: ArrayLike) -> Statistic:
    """Chance that of two rows of different level that of the higher one has the higher score, a tie counting half; of two levels the AUROC.

    As a function of row weights w, over the pairs with x_i > x_j:
        C = sum w_i w_j (1[s_i > s_j] + 1[s_i = s_j] / 2) / sum w_i w_j
    NaN where all rows are of one level. It holds an (n, n) matrix of the n rows that count.

    Args:
        levels: (N,) ordered, such as 0 mild, 1 moderate, 2 severe; NaN rows do not count.
        scores: (N,), any order-preserving scale; may be NaN where the level is.
    Raises:
        ValueError: shapes that differ, or a NaN score of a row that counts.
    Source: Harrell et al. 1982, doi:10.1001/jama.1982.03320430047030; (Somers' D + 1) / 2.
    """
    given, values = np.asarray(levels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if given.ndim != 1 or values.shape != given.shape:
        raise ValueError(f"levels have shape {given.shape}, scores {values.shape}; both must be (N,)")
    used = ~np.isnan(given)
    level, score = given[used], values[used]
    if np.isnan(score).any():
        raise ValueError("a row that counts has a NaN score")
    higher = (level[:, None] > level[None, :]).astype(np.float64)
    wins = higher * ((score[:, None] > score[None, :]) + 0.5 * (score[:, None] == score[None, :]))

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        own = weights[:, used]
        return ratio(((own @ wins) * own).sum(axis=1), ((own @ higher) * own).sum(axis=1))

    return Statistic(of_weights, used)


def auprc_statistic(labels: ArrayLike, scores: ArrayLike) -> Statistic:
    """Average precision, the area under the precision-recall steps, as a function of row weights. NaN without a positive.

    With rows sorted by falling score into groups g of equal scores, p_g and n_g the weight of positives and negatives in a group:
        AP = sum_g (p_g / sum_h p_h) * sum_{h<=g} p_h / sum_{h<=g} (p_h + n_h)
    A tie is one step, and nothing is interpolated between steps. Of rows without an order (all scores the same) it is the prevalence, so it
    is not to be compared between findings or cohorts of another prevalence.

    Args:
        labels: (N,) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        scores: (N,), any order-preserving scale; infinities are fine.
    Raises:
        ValueError: another label, a NaN score of a row that counts, or shapes that differ.
    Source: ``sklearn.metrics.average_precision_score``; Davis & Goadrich 2006, doi:10.1145/1143844.1143874, on why not to interpolate.
    """
    used, positive, values = known_rows(labels, scores)
    groups = _Groups.of(used, positive, -values)

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        p, n = groups.weigh(weights)
        found = p.cumsum(axis=1)
        called = found + n.cumsum(axis=1)
        precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
        return ratio((p * precision).sum(axis=1), p.sum(axis=1))

    return Statistic(of_weights, used, int(positive.sum()))


def auroc_intervals(
    labels: NDArray[np.float64],
    scores: NDArray[np.float64],
    names: Sequence[str],
    patient_ids: PatientIds,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """AUROC of each finding and their mean (``MACRO``) with patient-level intervals.

    Args:
        labels: (N, F) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        scores: (N, F).
        names: (F,).
        patient_ids: (N,).
        repeats: as in :func:`bootstrap_intervals`, like ``seed`` and ``level``.
        seed: see there.
        level: see there.
    """
    if labels.shape != scores.shape or labels.shape[1:] != (len(names),):
        raise ValueError(f"labels have shape {labels.shape}, scores {scores.shape}; both must be (N, {len(names)}), a column per name")
    statistics = {name: auroc_statistic(labels[:, i], scores[:, i]) for i, name in enumerate(names)}
    return bootstrap_intervals(statistics, patient_ids, repeats=repeats, seed=seed, level=level)


@dataclass(frozen=True)
class _Groups:
    """Rows that count, sorted by rising value into G groups of equal ones."""

    rows: NDArray[np.int64]  # (n,) of the N rows, in that order
    positive: NDArray[np.bool_]  # (n,)
    starts: NDArray[np.int64]  # (G,)

    @classmethod
    def of(cls, used: NDArray[np.bool_], positive: NDArray[np.bool_], values: NDArray[np.float64]) -> _Groups:
        order = np.argsort(values, kind="stable")
        values = values[order]
        starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1]))) if len(values) else np.zeros(0, dtype=np.int64)
        return cls(np.flatnonzero(used)[order], positive[order], starts)

    def weigh(self, weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of (R, N) weights the (R, G) weight of positives and of negatives in each group."""
        if not len(self.rows):
            return np.zeros((len(weights), 0)), np.zeros((len(weights), 0))
        taken = weights[:, self.rows]
        p = np.add.reduceat(taken * self.positive, self.starts, axis=1)
        return p, np.add.reduceat(taken * ~self.positive, self.starts, axis=1)
