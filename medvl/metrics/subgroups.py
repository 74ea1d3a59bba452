"""Metrics of subgroups (one sex, one scanner, one view), each against all other rows, and the widest gap between two of them.

Shapes: N rows (studies), F findings, R bootstrap resamples.

A finding counts in a subgroup if it has at least ``least`` positive and as many negative rows there: AUROCs of two or three positives
would make gaps of their own. All metrics come from the same resamples of patients, so that a difference has an interval of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, Resamples, Statistic, bootstrap_resamples
from medvl.metrics.classification import sensitivity_statistic, specificity_statistic
from medvl.metrics.labels import label_counts
from medvl.metrics.ranking import auroc_statistic

LEAST = 10


@dataclass(frozen=True)
class Difference:
    """A mean over findings in one set of rows less that in another, over the findings that count in both."""

    interval: Interval
    p_value: float  # two-sided, of no difference; NaN without resamples
    findings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        p_value = None if math.isnan(self.p_value) else self.p_value
        return {**self.interval.to_dict(), "p_value": p_value, "findings": list(self.findings)}


@dataclass(frozen=True)
class Subgroup:
    """One metric in one subgroup."""

    per_finding: Mapping[str, Interval]  # of the findings that count
    mean: Interval  # over these; NaN without any
    to_rest: Difference  # the mean less that of all rows outside the subgroup


@dataclass(frozen=True)
class Gap:
    """The widest difference between the means of two subgroups that share enough findings.

    They were chosen because they differ most, so expect a gap by chance.
    """

    highest: str
    lowest: str
    difference: Difference


@dataclass(frozen=True)
class SubgroupTable:
    """All subgroups that one attribute parts the rows into."""

    rows: Mapping[str, int]
    patients: Mapping[str, int]
    metrics: Mapping[str, Mapping[str, Subgroup]]  # metric -> subgroup
    gaps: Mapping[str, Gap | None]  # metric -> None where no two subgroups share a finding that counts
    least: int

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON, subgroup by subgroup."""
        groups = {
            group: {
                "n": self.rows[group],
                "n_patients": self.patients[group],
                **{
                    metric: {
                        "mean": of[group].mean.to_dict(),
                        "less_the_rest": of[group].to_rest.to_dict(),
                        "per_finding": {name: one.to_dict() for name, one in of[group].per_finding.items()},
                    }
                    for metric, of in self.metrics.items()
                },
            }
            for group in self.rows
        }
        gaps = {
            metric: None if gap is None else {"highest": gap.highest, "lowest": gap.lowest, **gap.difference.to_dict()}
            for metric, gap in self.gaps.items()
        }
        return {"groups": groups, "widest_gap": gaps, "least_of_each_label": self.least}


def subgroup_table(
    labels: NDArray[np.float64],
    scores: NDArray[np.float64],
    names: Sequence[str],
    groups: Sequence[str],
    patient_ids: PatientIds,
    *,
    thresholds: Mapping[str, float] | None = None,
    probabilities: NDArray[np.float64] | None = None,
    least: int = LEAST,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> SubgroupTable:
    """AUROC, and where there are thresholds sensitivity and specificity, of every subgroup.

    Args:
        labels: (N, F) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        scores: (N, F), any order-preserving scale.
        names: (F,).
        groups: (N,) the subgroup of each row.
        patient_ids: (N,), what resamples are drawn by; a patient may have rows in several subgroups.
        thresholds: finding -> threshold, chosen on other patients; None for AUROC alone.
        probabilities: (N, F) that the thresholds are of; None: they are of the scores. AUROC is of the scores always: a calibration may
            turn a finding round.
        least: rows of each label that a finding needs in a subgroup, at least 1.
        repeats, seed, level: as in :func:`bootstrap_resamples`.
    Raises:
        ValueError: shapes that differ, or ``least`` below 1.
    """
    if labels.shape != scores.shape or labels.shape != (len(groups), len(names)):
        raise ValueError(f"labels {labels.shape}, scores {scores.shape}: expected both ({len(groups)}, {len(names)}), as groups and names")
    if least < 1:
        raise ValueError(f"least is {least}, expected at least 1")
    decided = scores if probabilities is None else probabilities
    if decided.shape != scores.shape:
        raise ValueError(f"probabilities {decided.shape}: expected {scores.shape}, as the scores")
    member = np.array(groups, dtype=object)
    order = sorted(set(groups))
    rest = dict(zip(order, reversed(order), strict=True)) if len(order) == 2 else {group: f"all but\0{group}" for group in order}
    sides = {**{group: member == group for group in order}, **({} if len(order) == 2 else {rest[one]: member != one for one in order})}
    statistics: dict[str, Statistic] = {}
    counting: dict[tuple[str, str], list[str]] = {}  # metric and rows -> findings that count
    for side, rows in sides.items():
        for f, name in enumerate(names):
            own = np.where(rows, labels[:, f], np.nan)
            counts = label_counts(own)
            if min(counts.positive, counts.negative) < least:
                continue
            for metric, statistic in _statistics(own, scores[:, f], decided[:, f], (thresholds or {}).get(name)).items():
                statistics[_key(metric, side, name)] = statistic
                counting.setdefault((metric, side), []).append(name)
    drawn = bootstrap_resamples(statistics, patient_ids, repeats=repeats, seed=seed, level=level)
    metrics = ["auroc", *(("sensitivity", "specificity") if thresholds else ())]
    ids = np.array([str(one) for one in patient_ids], dtype=object)
    return SubgroupTable(
        rows={group: int((member == group).sum()) for group in order},
        patients={group: len(set(ids[member == group])) for group in order},
        metrics={metric: {group: _subgroup(drawn, counting, metric, group, rest[group]) for group in order} for metric in metrics},
        gaps={metric: _widest(drawn, counting, metric, order) for metric in metrics},
        least=least,
    )


def _statistics(
    labels: NDArray[np.float64], scores: NDArray[np.float64], decided: NDArray[np.float64], threshold: float | None
) -> dict[str, Statistic]:
    found = {"auroc": auroc_statistic(labels, scores)}
    if threshold is not None:
        found["sensitivity"] = sensitivity_statistic(labels, decided, threshold)
        found["specificity"] = specificity_statistic(labels, decided, threshold)
    return found


def _subgroup(drawn: Resamples, counting: Mapping[tuple[str, str], list[str]], metric: str, group: str, rest: str) -> Subgroup:
    names = counting.get((metric, group), [])
    return Subgroup(
        per_finding={name: drawn.interval(_key(metric, group, name)) for name in names},
        mean=drawn.mean([_key(metric, group, name) for name in names]),
        to_rest=_difference(drawn, counting, metric, group, rest),
    )


def _difference(drawn: Resamples, counting: Mapping[tuple[str, str], list[str]], metric: str, first: str, second: str) -> Difference:
    shared = [name for name in counting.get((metric, first), []) if name in counting.get((metric, second), [])]
    keys = [[_key(metric, side, name) for name in shared] for side in (first, second)]
    return Difference(*drawn.difference(*keys), tuple(shared))


def _widest(drawn: Resamples, counting: Mapping[tuple[str, str], list[str]], metric: str, groups: Sequence[str]) -> Gap | None:
    """Of the pairs that share at least half as many findings as the pair that shares most: a gap in one finding is none in ten."""
    pairs = [(_difference(drawn, counting, metric, a, b), a, b) for a, b in combinations(groups, 2)]
    most = max((len(one.findings) for one, _, _ in pairs), default=0)
    known = [(one, a, b) for one, a, b in pairs if one.findings and 2 * len(one.findings) >= most]
    if not known:
        return None
    widest, a, b = max(known, key=lambda pair: abs(pair[0].interval.value))
    if widest.interval.value < 0:
        a, b = b, a
        widest = _difference(drawn, counting, metric, a, b)
    return Gap(a, b, widest)


def _key(metric: str, side: str, name: str) -> str:
    return f"{metric}\0{side}\0{name}"
