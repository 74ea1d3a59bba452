"""Metrics with their intervals: a metric as a function of row weights, and the patient-level bootstrap that all of them share.

Shapes: N rows (studies), F findings, R bootstrap resamples.

A resample draws patients with replacement and takes all rows of each. It is held as weights (R, N): how often each row was drawn. Every
metric is a function of such weights (:class:`Statistic`), so all metrics of one table come from the same resamples, and the mean over
findings has an interval of its own. A metric that a resample leaves undefined (AUROC without both classes) is skipped there and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK = 4_000_000  # weights held at once, about 32 MB
MACRO = "macro"
PatientIds = Sequence[Hashable] | NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A metric with its percentile bootstrap interval. NaN where it is not defined.

    An interval says nothing about what was not sampled: at a value of exactly 0 or 1 it collapses to that point.
    """

    value: float
    ci_low: float
    ci_high: float
    n: int  # rows that count (for a mean over findings: rows that count for any of them)
    n_patients: int  # patients of those rows
    n_positive: int | None = None  # for AUROC
    repeats: int = 0  # resamples that the interval rests on
    skipped: int = 0  # resamples in which the metric was not defined
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: NaN becomes None, a field that does not apply is left out."""
        values = asdict(self).items()
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values if v is not None}


@dataclass(frozen=True)
class Statistic:
    """A metric as a function of row weights: (R, N) to (R,), NaN where not defined. ``used`` (N,) marks the rows that count."""

    of_weights: Callable[[NDArray[np.float64]], NDArray[np.float64]] = field(repr=False)
    used: NDArray[np.bool_] = field(repr=False)
    n_positive: int | None = None

    @property
    def value(self) -> float:
        """The metric of the rows as they are, each counted once."""
        return float(self.of_weights(np.ones((1, len(self.used))))[0])


def mean_statistic(values: ArrayLike) -> Statistic:
    """The mean of (N,) values as a function of row weights; rows that are NaN do not count."""
    used, numbers = _numbers(values)
    every = bool(used.all())

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        counted = weights if every else weights[:, used]  # a copy of all weights costs more than the product
        return ratio(counted @ numbers, counted.sum(axis=1))

    return Statistic(of_weights, used)


def median_statistic(values: ArrayLike) -> Statistic:
    """The median of (N,) values as a function of row weights, that of each row repeated as often as it weighs; NaN rows do not count.

    With rows sorted by value, W their weight and C its running sum, the mean of the first value with C >= W / 2 and of the first with
    C > W / 2: of an even number the middle of the two middle ones, as ``numpy.median`` has it.

    Raises:
        ValueError: values that are not (N,).
    """
    used, numbers = _numbers(values)
    order = np.argsort(numbers, kind="stable")
    rows, ranked = np.flatnonzero(used)[order], numbers[order]

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        if not len(rows):
            return np.full(len(weights), math.nan)
        running = weights[:, rows].cumsum(axis=1)
        half = running[:, -1:] / 2
        middle = (ranked[(running >= half).argmax(axis=1)] + ranked[(running > half).argmax(axis=1)]) / 2
        return np.where(half[:, 0] > 0, middle, math.nan)

    return Statistic(of_weights, used)


def ratio_statistic(top: ArrayLike, bottom: ArrayLike) -> Statistic:
    """A quotient of two sums over rows as a function of row weights w, sum_i w_i top_i / sum_i w_i bottom_i, NaN where the bottom is 0.

    Args:
        top: (N,) finite.
        bottom: (N,) finite, 0 or more. Rows in which both are 0 do not count.
    Raises:
        ValueError: shapes that differ or are not (N,), a value that is not finite, or a bottom below 0.
    """
    over, under = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
    if over.ndim != 1 or over.shape != under.shape:
        raise ValueError(f"top has shape {over.shape}, bottom {under.shape}; both must be (N,)")
    if not (np.isfinite(over).all() and np.isfinite(under).all()) or (under < 0).any():
        raise ValueError("a quotient of sums needs finite numbers, those of the bottom 0 or more")

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return ratio(weights @ over, weights @ under)

    return Statistic(of_weights, (over != 0) | (under != 0))


def combined(terms: Sequence[tuple[float, Statistic]]) -> Statistic:
    """A weighted sum of metrics over the same rows, as a metric: a mean over findings or seeds, a difference of two models.

    In a resample in which one of them is not defined neither is the sum.

    Raises:
        ValueError: no metric, or metrics over other rows.
    """
    if not terms or len({len(statistic.used) for _, statistic in terms}) != 1:
        raise ValueError("a combination needs at least one metric, all over the same rows")

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.sum([factor * statistic.of_weights(weights) for factor, statistic in terms], axis=0)

    return Statistic(of_weights, np.any([statistic.used for _, statistic in terms], axis=0))


@dataclass(frozen=True)
class Resamples:
    """S metrics on a table and on R resamples of its patients, the same for all of them, so that differences and means can be taken."""

    column: dict[str, int]  # name of a metric -> its place in what follows
    values: NDArray[np.float64]  # (S,) on the table as it is
    draws: NDArray[np.float64]  # (R, S), NaN where a resample leaves the metric undefined
    used: NDArray[np.bool_]  # (S, N) rows that count
    n_positive: tuple[int | None, ...]  # (S,)
    member: NDArray[np.int64]  # (N,) the patient of each row, as a number
    level: float = 0.95

    def interval(self, name: str) -> Interval:
        """A metric with its percentile interval."""
        i = self.column[name]
        return _interval(self.values[i], self.draws[:, i], self.used[i], self.member, self.level, self.n_positive[i])

    def mean(self, names: Sequence[str]) -> Interval:
        """The mean of several metrics; a resample counts only if all of them are defined there. NaN of no metric."""
        return self._interval_of(names, *self._mean(names))

    def difference(self, first: Sequence[str], second: Sequence[str]) -> tuple[Interval, float]:
        """The mean of the first metrics less that of the second, and the two-sided p of no difference, NaN without resamples.

        The p inverts the percentile interval: with R resamples in which the difference d* is defined,
            p = min(1, 2 min(1 + #{d* <= 0}, 1 + #{d* >= 0}) / (R + 1))
        """
        (value, draws), (other, other_draws) = self._mean(first), self._mean(second)
        differences = draws - other_draws
        good = differences[~np.isnan(differences)]
        tail = 1 + min(int((good <= 0).sum()), int((good >= 0).sum()))
        p_value = min(1.0, 2 * tail / (len(good) + 1)) if len(good) else math.nan
        return self._interval_of([*first, *second], value - other, differences), p_value

    def _mean(self, names: Sequence[str]) -> tuple[float, NDArray[np.float64]]:
        at = [self.column[name] for name in names]
        return (float(self.values[at].mean()), self.draws[:, at].mean(axis=1)) if at else (math.nan, np.full(len(self.draws), math.nan))

    def _interval_of(self, names: Sequence[str], value: float, draws: NDArray[np.float64]) -> Interval:
        used = self.used[[self.column[name] for name in names]].any(axis=0).reshape(-1)
        return _interval(value, draws, used, self.member, self.level, None)


def bootstrap_resamples(
    statistics: Mapping[str, Statistic], patient_ids: PatientIds, *, repeats: int = 1000, seed: int = 0, level: float = 0.95
) -> Resamples:
    """Every metric on the table and on the same resamples of its patients; see :func:`bootstrap_intervals`.

    Raises:
        ValueError: lengths that differ, no rows, or a level outside (0, 1).
    """
    if not 0 < level < 1 or repeats < 0:
        raise ValueError(f"level must lie between 0 and 1 and repeats be 0 or more, got {level} and {repeats}")
    patients, member = _patients(patient_ids)
    for name, statistic in statistics.items():
        if len(statistic.used) != len(member):
            raise ValueError(f"{name or 'the metric'} has {len(statistic.used)} rows for {len(member)} patient ids; they must match")
    return Resamples(
        column={name: i for i, name in enumerate(statistics)},
        values=_evaluate(statistics, np.ones((1, len(member))))[0],
        draws=_resampled(statistics, member, patients, repeats, seed),
        used=np.array([statistic.used for statistic in statistics.values()]).reshape(len(statistics), len(member)),
        n_positive=tuple(statistic.n_positive for statistic in statistics.values()),
        member=member,
        level=level,
    )


def bootstrap_interval(
    statistic: Statistic, patient_ids: PatientIds, *, repeats: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """One metric with its patient-level interval; see :func:`bootstrap_intervals`."""
    return bootstrap_intervals({"": statistic}, patient_ids, repeats=repeats, seed=seed, level=level)[""]


def bootstrap_intervals(
    statistics: Mapping[str, Statistic], patient_ids: PatientIds, *, repeats: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Interval]:
    """Metrics of one table with percentile intervals from the same resamples of its patients, and their mean under ``MACRO``.

    The mean is over the metrics that are defined on the table as it is, and a resample counts for it only if all of these are defined
    there too, so that it never means another set of findings. A single metric, or none, gets no mean.

    Args:
        statistics: name -> metric, each over the same N rows.
        patient_ids: (N,), what resamples are drawn by. The order of the rows does not move the answer.
        repeats: resamples; 0 for values without intervals.
        seed: of the resamples. The same patients, seed and repeats give the same resamples in every call.
        level: of the interval; its ends are the (1 - level) / 2 and (1 + level) / 2 quantiles, interpolated linearly.
    Raises:
        ValueError: lengths that differ, no rows, a level outside (0, 1), or a metric called ``MACRO``.
    Source: cluster bootstrap, Davison & Hinkley 1997, section 3.8; percentile interval, Efron & Tibshirani 1993, chapter 13.
    """
    if MACRO in statistics:
        raise ValueError(f"no metric may be called {MACRO!r}: it is the name of the mean")
    drawn = bootstrap_resamples(statistics, patient_ids, repeats=repeats, seed=seed, level=level)
    intervals = {name: drawn.interval(name) for name in statistics}
    if len(intervals) > 1:
        intervals[MACRO] = drawn.mean([name for name, found in intervals.items() if not math.isnan(found.value)])
    return intervals


def mean_intervals(
    values: NDArray[np.float64],
    names: Sequence[str],
    patient_ids: PatientIds,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Mean of each column of (N, F) values, NaN not counting, and the mean of these means (``MACRO``), with patient-level intervals.

    For the pointing game: a column a finding, NaN where the finding has no mask.
    """
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(f"values have shape {values.shape}, expected (N, {len(names)}), a column per name")
    statistics = {name: mean_statistic(values[:, i]) for i, name in enumerate(names)}
    return bootstrap_intervals(statistics, patient_ids, repeats=repeats, seed=seed, level=level)


def _numbers(values: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(N,) bool, the rows that are not NaN, and their values."""
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"values have shape {given.shape}, expected (N,)")
    used = ~np.isnan(given)
    return used, given[used]


def _patients(patient_ids: PatientIds) -> tuple[int, NDArray[np.int64]]:
    """Number of patients, and each row's patient as a number that does not hang on the order of the rows."""
    names, member = np.unique(np.asarray([str(name) for name in patient_ids]), return_inverse=True)
    if not len(names):
        raise ValueError("no rows to measure")
    return len(names), member.reshape(-1)


def _evaluate(statistics: Mapping[str, Statistic], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    columns = [statistic.of_weights(weights) for statistic in statistics.values()]
    return np.stack(columns, axis=1) if columns else np.zeros((len(weights), 0))


def _resampled(
    statistics: Mapping[str, Statistic], member: NDArray[np.int64], patients: int, repeats: int, seed: int
) -> NDArray[np.float64]:
    """(repeats, metrics) on resamples, made a chunk at a time."""
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // len(member))
    parts = [np.zeros((0, len(statistics)))]
    for start in range(0, repeats, chunk):
        r = min(chunk, repeats - start)
        drawn = generator.integers(patients, size=(r, patients)) + np.arange(r)[:, None] * patients
        counts = np.bincount(drawn.ravel(), minlength=r * patients).reshape(r, patients)
        parts.append(_evaluate(statistics, counts[:, member].astype(np.float64)))
    return np.concatenate(parts)


def _interval(
    value: float, draws: NDArray[np.float64], used: NDArray[np.bool_], member: NDArray[np.int64], level: float, n_positive: int | None
) -> Interval:
    good = draws[~np.isnan(draws)]
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2]) if len(good) else (math.nan, math.nan)
    return Interval(
        value=float(value),
        ci_low=float(low),
        ci_high=float(high),
        n=int(used.sum()),
        n_patients=len(np.unique(member[used])),
        n_positive=n_positive,
        repeats=len(good),
        skipped=len(draws) - len(good),
        level=level,
    )


def ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient, NaN where the bottom is 0."""
    return np.divide(top, bottom, out=np.full_like(top, math.nan), where=bottom > 0)
