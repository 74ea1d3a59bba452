"""Two models on the same patients: differences of their metrics with paired intervals, from the patient-level bootstrap.

Both models are measured on the same resamples, so what makes a patient hard for both does not widen the interval of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from medvl.metrics.bootstrap import MACRO, Interval, PatientIds, Statistic, bootstrap_resamples


@dataclass(frozen=True)
class Comparison:
    """A metric of two models on the same rows, and their difference."""

    first: Interval
    second: Interval
    difference: Interval  # first - second
    p_value: float  # two-sided, of no difference; NaN without resamples

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: NaN becomes None."""
        sides = {name: getattr(self, name).to_dict() for name in ("first", "second", "difference")}
        return sides | {"p_value": None if math.isnan(self.p_value) else self.p_value}


def compare_models(
    first: Mapping[str, Statistic],
    second: Mapping[str, Statistic],
    patient_ids: PatientIds,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Comparison]:
    """Metrics of two models, name by name, with paired intervals of the difference, and of their means under ``MACRO``.

    The mean is over the metrics that both models have defined on the table as it is; a single one gets no mean. The p-value inverts the
    percentile interval: with R resamples in which the difference d* is defined,
        p = min(1, 2 min(1 + #{d* <= 0}, 1 + #{d* >= 0}) / (R + 1))
    so it is never below 2 / (R + 1). Nothing is corrected for the number of findings compared.

    Args:
        first: name -> metric of the first model.
        second: name -> the same metric of the second.
        patient_ids: (N,), what resamples are drawn by.
        repeats: as in :func:`bootstrap_intervals`, like ``seed`` and ``level``.
        seed: see there.
        level: see there.
    Raises:
        ValueError: names that differ, a metric whose models count different rows, lengths that differ, or a level outside (0, 1).
    Source: Efron & Tibshirani 1993, chapters 13 and 15; the 1 in both counts: Davison & Hinkley 1997, section 4.2.
    """
    if set(first) != set(second):
        raise ValueError(f"both models need the same metrics; only one has {sorted(set(first) ^ set(second))}")
    if MACRO in first:
        raise ValueError(f"no metric may be called {MACRO!r}: it is the name of the mean")
    for name in first:
        if not np.array_equal(first[name].used, second[name].used):
            raise ValueError(f"{name}: the two models count different rows; compare them on the rows that both have")
    both = {f"first/{name}": statistic for name, statistic in first.items()} | {f"second/{name}": second[name] for name in first}
    drawn = bootstrap_resamples(both, patient_ids, repeats=repeats, seed=seed, level=level)
    groups = {name: [name] for name in first}
    if len(first) > 1:
        value = {name: drawn.values[at] for name, at in drawn.column.items()}
        groups[MACRO] = [name for name in first if not math.isnan(value[f"first/{name}"] + value[f"second/{name}"])]
    compared = {}
    for name, group in groups.items():
        ours, theirs = [f"first/{one}" for one in group], [f"second/{one}" for one in group]
        sides = [drawn.mean(side) if name == MACRO else drawn.interval(side[0]) for side in (ours, theirs)]
        compared[name] = Comparison(sides[0], sides[1], *drawn.difference(ours, theirs))
    return compared
