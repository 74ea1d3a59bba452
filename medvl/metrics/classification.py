"""Metrics of probabilities (Brier, expected calibration error) and of decisions at a threshold, and the table of all of them.

Shapes: N rows (studies), F findings, R bootstrap resamples.

A row is called positive if its score is at or above the threshold. Labels that are uncertain (-1) or not mentioned (NaN) do not count and
are counted. Every metric is a :class:`Statistic`, a function of row weights, so that the patient-level bootstrap takes it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, Statistic, bootstrap_resamples, ratio
from medvl.metrics.labels import LabelCounts, known_probabilities, known_rows, label_counts
from medvl.metrics.ranking import auprc_statistic, auroc_statistic

Binning = Literal["width", "mass"]
Formula = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def brier_statistic(labels: ArrayLike, probabilities: ArrayLike) -> Statistic:
    """Brier score, the mean of (p - y)^2: 0 is best, 0.25 is p = 0.5 throughout.

    Args:
        labels: (N,) of 1, 0, -1 and NaN.
        probabilities: (N,) in [0, 1].
    Raises:
        ValueError: shapes that differ, another label, or a value that is no probability.
    Source: Brier 1950, doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2, there summed over both classes, which doubles it.
    """
    used, positive, values = known_probabilities(labels, probabilities)
    squares = np.zeros(len(used))
    squares[used] = (values - positive) ** 2

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return ratio(weights @ squares, weights @ used.astype(np.float64))

    return Statistic(of_weights, used, int(positive.sum()))


def calibration_error_statistic(labels: ArrayLike, probabilities: ArrayLike, bins: int = 15, binning: Binning = "width") -> Statistic:
    """Expected calibration error of the probability of "present", in [0, 1], as a function of row weights w.

        ECE = sum_b |sum_{i in b} w_i (y_i - p_i)| / sum_i w_i
    which is the mean over bins b, by their weight, of |frequency of positives - mean probability|.

    Bins are made once, of the n rows that count, and stay as they are in resamples. ``width``: B bins of equal width, ((b - 1) / B, b / B],
    0 in the first. ``mass``: B bins of equally many rows; a row with l rows below it and t rows of its own probability goes to bin
    floor(B (l + (t - 1) / 2) / n), counted from 0, so that equal probabilities share a bin.

    The error of a resample is larger on average than that of the table, which itself is larger than the truth (noise in a bin does not
    cancel): its interval is one of this estimate, and a value is only to be compared with one of as many rows and bins.

    Args:
        labels: (N,) of 1, 0, -1 and NaN.
        probabilities: (N,) in [0, 1].
        bins: B, at least 1.
        binning: ``width`` or ``mass``.
    Raises:
        ValueError: shapes that differ, another label, a value that is no probability, no bins, or no such binning.
    Source: Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602, and Guo et al. 2017, arXiv:1706.04599, eq. 3, there of the more likely class;
        equal mass: Roelofs et al. 2022, arXiv:2012.08668.
    """
    used, positive, values = known_probabilities(labels, probabilities)
    if bins < 1 or binning not in get_args(Binning):
        raise ValueError(f"calibration error needs at least one bin, of equal width or mass, got {bins} of equal {binning}")
    member = _equal_width(values, bins) if binning == "width" else _equal_mass(values, bins)
    gaps = np.zeros((len(used), bins))
    gaps[np.flatnonzero(used), member] = positive - values

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return ratio(np.abs(weights @ gaps).sum(axis=1), weights @ used.astype(np.float64))

    return Statistic(of_weights, used, int(positive.sum()))


def sensitivity_statistic(labels: ArrayLike, scores: ArrayLike, threshold: float) -> Statistic:
    """Share of positives that are called positive, TP / (TP + FN); NaN without a positive. Arguments as in :func:`f1_statistic`."""
    return _of_confusion(labels, scores, threshold, sensitivity)


def specificity_statistic(labels: ArrayLike, scores: ArrayLike, threshold: float) -> Statistic:
    """Share of negatives that are called negative, TN / (TN + FP); NaN without a negative. Arguments as in :func:`f1_statistic`."""
    return _of_confusion(labels, scores, threshold, specificity)


def f1_statistic(labels: ArrayLike, scores: ArrayLike, threshold: float) -> Statistic:
    """F1 of the positives, 2 TP / (2 TP + FP + FN); NaN without a positive, where scikit-learn has 0.

    Args:
        labels: (N,) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        scores: (N,), any scale.
        threshold: on that scale; a score at or above it is called positive.
    Raises:
        ValueError: shapes that differ, another label, a NaN score of a row that counts, or a NaN threshold.
    """
    return _of_confusion(labels, scores, threshold, f1)


def mcc_statistic(labels: ArrayLike, scores: ArrayLike, threshold: float) -> Statistic:
    """Matthews correlation of label and decision, in [-1, 1]. Arguments as in :func:`f1_statistic`.

        MCC = (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))
    0 if all rows are called the same, as scikit-learn has it; NaN without both labels, where scikit-learn has 0 too.
    Source: Matthews 1975, doi:10.1016/0005-2795(75)90109-9.
    """
    return _of_confusion(labels, scores, threshold, mcc)


def sensitivity(tp: NDArray[np.float64], fp: NDArray[np.float64], fn: NDArray[np.float64], tn: NDArray[np.float64]) -> NDArray[np.float64]:
    """See :func:`sensitivity_statistic`; each count (R,)."""
    return ratio(tp, tp + fn)


def specificity(tp: NDArray[np.float64], fp: NDArray[np.float64], fn: NDArray[np.float64], tn: NDArray[np.float64]) -> NDArray[np.float64]:
    """See :func:`specificity_statistic`; each count (R,)."""
    return ratio(tn, tn + fp)


def f1(tp: NDArray[np.float64], fp: NDArray[np.float64], fn: NDArray[np.float64], tn: NDArray[np.float64]) -> NDArray[np.float64]:
    """See :func:`f1_statistic`; each count (R,)."""
    return ratio(2 * tp, np.where(tp + fn > 0, 2 * tp + fp + fn, 0))


def mcc(tp: NDArray[np.float64], fp: NDArray[np.float64], fn: NDArray[np.float64], tn: NDArray[np.float64]) -> NDArray[np.float64]:
    """See :func:`mcc_statistic`; each count (R,)."""
    labels, calls = (tp + fn) * (tn + fp), (tp + fp) * (tn + fn)
    return ratio(tp * tn - fp * fn, np.where(calls > 0, np.sqrt(labels) * np.sqrt(calls), (labels > 0).astype(np.float64)))


@dataclass(frozen=True)
class Macro:
    """The plain mean of a metric over the findings that have both labels and the metric; the rest is named, not dropped in silence."""

    interval: Interval
    findings: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: the interval, with the number of findings that count and the names of those that do not."""
        return self.interval.to_dict() | {"n_findings": len(self.findings), "left_out": list(self.left_out)}


@dataclass(frozen=True)
class ClassificationTable:
    """Metrics of every finding, their means, and what was masked."""

    counts: dict[str, LabelCounts]  # finding -> labels of each kind
    metrics: dict[str, dict[str, Interval]]  # metric -> finding -> value; a finding without a threshold has no metrics that need one
    macro: dict[str, Macro]  # metric -> mean

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, finding by finding."""
        return {
            "findings": {
                name: {"labels": counts.to_dict()} | {m: found[name].to_dict() for m, found in self.metrics.items() if name in found}
                for name, counts in self.counts.items()
            },
            "macro": {metric: mean.to_dict() for metric, mean in self.macro.items()},
        }


def classification_table(
    labels: NDArray[np.float64],
    scores: NDArray[np.float64],
    names: Sequence[str],
    patient_ids: PatientIds,
    *,
    thresholds: Mapping[str, float] | None = None,
    probabilities: NDArray[np.float64] | None = None,
    bins: int = 15,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> ClassificationTable:
    """AUROC and AUPRC of each finding, Brier and ECE of its probabilities, and its decisions, all from the same resamples of patients.

    Metrics are called ``auroc``, ``auprc``, ``brier``, ``ece_width``, ``ece_mass``, ``f1``, ``mcc``, ``sensitivity``, ``specificity``.

    NaN rule: a finding without a positive or without a negative label has its row in the table, with NaN where a metric is not defined, and
    is left out of every mean, also of those that one label defines (Brier, specificity); so is a finding without a threshold where one is
    needed. A resample counts for a mean only if all its findings are defined in it. Both are counted.

    Args:
        labels: (N, F) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        scores: (N, F), any order-preserving scale.
        names: (F,).
        patient_ids: (N,), what resamples are drawn by.
        thresholds: finding -> threshold on the scale of ``scores``, chosen on other patients; None for no decisions.
        probabilities: (N, F) in [0, 1], calibrated on other patients; None for no Brier and no ECE.
        bins: of the calibration error, of equal width and of equal mass.
        repeats: as in :func:`bootstrap_intervals`, like ``seed`` and ``level``.
        seed: see there.
        level: see there.
    Raises:
        ValueError: shapes that differ, names that repeat, a threshold of no finding, or what a metric refuses, with the finding's name.
    """
    shapes = [given.shape for given in (labels, scores, probabilities) if given is not None]
    if len(set(shapes)) != 1 or shapes[0][1:] != (len(names),):
        raise ValueError(f"labels, scores (and probabilities) have shapes {shapes}; all must be (N, {len(names)}), a column per name")
    if len(set(names)) != len(names):
        raise ValueError(f"finding names must differ, got {list(names)}")
    if unknown := sorted(set(thresholds or {}) - set(names)):
        raise ValueError(f"thresholds of findings that are not in the table: {unknown}; it has {list(names)}")
    counts: dict[str, LabelCounts] = {}
    by_metric: dict[str, dict[str, Statistic]] = {}
    for f, name in enumerate(names):
        try:
            counts[name] = label_counts(labels[:, f])
            threshold = (thresholds or {}).get(name)
            found = _statistics(labels[:, f], scores[:, f], threshold, None if probabilities is None else probabilities[:, f], bins)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        for metric, statistic in found.items():
            by_metric.setdefault(metric, {})[name] = statistic
    flat = {f"{metric}/{name}": statistic for metric, of in by_metric.items() for name, statistic in of.items()}
    drawn = bootstrap_resamples(flat, patient_ids, repeats=repeats, seed=seed, level=level)
    macro = {}
    for metric, of in by_metric.items():
        kept = tuple(name for name in of if counts[name].has_both)
        mean = drawn.mean([f"{metric}/{name}" for name in kept])
        macro[metric] = Macro(mean, kept, tuple(name for name in names if name not in kept))
    metrics = {metric: {name: drawn.interval(f"{metric}/{name}") for name in of} for metric, of in by_metric.items()}
    return ClassificationTable(counts, metrics, macro)


def _statistics(
    labels: NDArray[np.float64], scores: NDArray[np.float64], threshold: float | None, probabilities: NDArray[np.float64] | None, bins: int
) -> dict[str, Statistic]:
    found = {"auroc": auroc_statistic(labels, scores), "auprc": auprc_statistic(labels, scores)}
    if probabilities is not None:
        found["brier"] = brier_statistic(labels, probabilities)
        found["ece_width"] = calibration_error_statistic(labels, probabilities, bins, "width")
        found["ece_mass"] = calibration_error_statistic(labels, probabilities, bins, "mass")
    if threshold is not None:
        found["f1"] = f1_statistic(labels, scores, threshold)
        found["mcc"] = mcc_statistic(labels, scores, threshold)
        found["sensitivity"] = sensitivity_statistic(labels, scores, threshold)
        found["specificity"] = specificity_statistic(labels, scores, threshold)
    return found


def _of_confusion(labels: ArrayLike, scores: ArrayLike, threshold: float, formula: Formula) -> Statistic:
    """A formula of TP, FP, FN and TN as a function of row weights."""
    used, positive, values = known_rows(labels, scores)
    if math.isnan(threshold):
        raise ValueError("the threshold is NaN; choose one on validation scores first")
    called = values >= threshold
    cells = np.zeros((len(used), 4))
    cells[used] = np.stack([positive & called, ~positive & called, positive & ~called, ~positive & ~called], axis=1)

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        tp, fp, fn, tn = (weights @ cells).T
        return formula(tp, fp, fn, tn)

    return Statistic(of_weights, used, int(positive.sum()))


def _equal_width(values: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], values, side="left").astype(np.int64)


def _equal_mass(values: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    ordered = np.sort(values)
    below, up_to = np.searchsorted(ordered, values, side="left"), np.searchsorted(ordered, values, side="right")
    return (bins * (below + up_to - 1) // (2 * max(len(values), 1))).astype(np.int64)
