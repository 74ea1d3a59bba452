"""Metrics that hang on the order of scores alone.

Shapes: N rows (studies), F findings, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, Statistic, bootstrap_intervals, ratio


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
    given = np.asarray(labels, dtype=np.float64)
    used = ~(np.isnan(given) | (given == -1))
    if np.shape(scores) != given.shape:
        raise ValueError(f"labels have shape {given.shape}, scores {np.shape(scores)}; they must match")
    positive, values = checked(given[used], np.asarray(scores, dtype=np.float64)[used])
    order = np.argsort(values, kind="stable")
    rows, positive, values = np.flatnonzero(used)[order], positive[order], values[order]
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1]))) if len(values) else np.zeros(0, dtype=np.intp)

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        if not len(rows):
            return np.full(len(weights), math.nan)
        sorted_weights = weights[:, rows]
        p = np.add.reduceat(sorted_weights * positive, starts, axis=1)
        n = np.add.reduceat(sorted_weights * ~positive, starts, axis=1)
        wins = (p * (n.cumsum(axis=1) - n / 2)).sum(axis=1)
        return ratio(wins, p.sum(axis=1) * n.sum(axis=1))

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


def checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    given, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if given.ndim != 1 or given.shape != values.shape:
        raise ValueError(f"labels have shape {given.shape}, scores {values.shape}; both must be (N,)")
    if not np.isin(given, (0, 1)).all():
        raise ValueError("labels must be 1 or 0; drop the uncertain (-1) and the missing first")
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; a score that is unknown cannot be ranked")
    return given.astype(bool), values
