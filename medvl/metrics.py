"""Metrics with their intervals: AUROC, pointing game, Recall@K, and the patient-level bootstrap they share.

Shapes: N rows (studies), F findings, R bootstrap resamples, Q queries, G gallery items.

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
    positive, values = _checked(labels, scores)
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
    positive, values = _checked(given[used], np.asarray(scores, dtype=np.float64)[used])
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
        return _ratio(wins, p.sum(axis=1) * n.sum(axis=1))

    return Statistic(of_weights, used, int(positive.sum()))


def mean_statistic(values: ArrayLike) -> Statistic:
    """The mean of (N,) values as a function of row weights; rows that are NaN do not count."""
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1:
        raise ValueError(f"values have shape {given.shape}, expected (N,)")
    used = ~np.isnan(given)
    numbers = given[used]

    def of_weights(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return _ratio(weights[:, used] @ numbers, weights[:, used].sum(axis=1))

    return Statistic(of_weights, used)


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


def contrast_to_noise(scores: NDArray[np.floating[Any]], mask: NDArray[np.bool_]) -> float:
    """(mean inside - mean outside) / sqrt(variance inside + variance outside) of a map; above 0 where the mask is brighter.

    Args:
        scores: any shape; NaN does not count.
        mask: of the same shape.
    Returns:
        NaN where nothing of the map lies inside, or outside, or all of it is one value.
    Raises:
        ValueError: shapes that differ.
    Source: contrast-to-noise ratio as BioViL has it (arXiv:2204.09817, sec. 4), there without the sign.
    """
    if scores.shape != mask.shape:
        raise ValueError(f"the map has shape {scores.shape}, the mask {mask.shape}; they must match")
    seen = ~np.isnan(scores)
    inside, outside = (scores[seen & part].astype(np.float64) for part in (mask, ~mask))
    if not len(inside) or not len(outside):
        return math.nan
    noise = math.sqrt(inside.var() + outside.var())
    return float((inside.mean() - outside.mean()) / noise) if noise > 0 else math.nan


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
    if not 0 < level < 1 or repeats < 0:
        raise ValueError(f"level must lie between 0 and 1 and repeats be 0 or more, got {level} and {repeats}")
    patients, member = _patients(patient_ids)
    for name, statistic in statistics.items():
        if len(statistic.used) != len(member):
            raise ValueError(f"{name or 'the metric'} has {len(statistic.used)} rows for {len(member)} patient ids; they must match")
    if MACRO in statistics:
        raise ValueError(f"no metric may be called {MACRO!r}: it is the name of the mean")
    names = list(statistics)
    values = _evaluate(statistics, np.ones((1, len(member))))[0]
    draws = _resampled(statistics, member, patients, repeats, seed)
    counted = np.array([statistic.used for statistic in statistics.values()]).reshape(len(names), len(member))
    intervals = {
        name: _interval(values[i], draws[:, i], counted[i], member, level, statistics[name].n_positive) for i, name in enumerate(names)
    }
    defined = ~np.isnan(values)
    if len(names) > 1:
        macro = values[defined].mean() if defined.any() else math.nan
        macro_draws = draws[:, defined].mean(axis=1) if defined.any() else np.full(repeats, math.nan)
        intervals[MACRO] = _interval(macro, macro_draws, counted[defined].any(axis=0), member, level, None)
    return intervals


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


def tied_peaks(similarity: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """(K, n) index of every pixel or voxel that holds the maximum of a map of n axes, in row-major order; NaN is never a peak.

    Empty (0, n) for a map that is NaN throughout or the same wherever it is known: it points nowhere.
    """
    if similarity.ndim not in (2, 3):
        raise ValueError(f"a similarity map must be (rows, cols) or (slices, rows, cols), got shape {similarity.shape}")
    known = similarity[~np.isnan(similarity)]
    if not known.size or (known.size > 1 and known.min() == known.max()):
        return np.zeros((0, similarity.ndim), dtype=np.int64)
    return np.argwhere(similarity == known.max())


def peak(similarity: NDArray[np.floating[Any]]) -> tuple[int, ...] | None:
    """Index of the maximum of a (rows, cols) or (slices, rows, cols) map; None for a map that points nowhere (see :func:`tied_peaks`).

    Of several tied pixels the one nearest their centroid, and of several of those the first in row-major order: a plateau, as a map
    laid back on pixels has along the border, is pointed at in its middle, not in its upper left corner.
    """
    tied = tied_peaks(similarity)
    if not len(tied):
        return None
    distance = ((tied - tied.mean(axis=0)) ** 2).sum(axis=1)
    return tuple(int(i) for i in tied[int(np.argmin(np.round(distance, 9)))])


def pointing_game(peaks: tuple[int, ...] | NDArray[np.int64] | None, mask: NDArray[Any]) -> float:
    """1 if the peak of a similarity map lies in the finding's mask, else 0.

    Args:
        peaks: index as :func:`peak` gives it; or (K, n) tied ones, which count as the fraction of them inside; None or (0, n), a map
            that points nowhere, is a miss.
        mask: (rows, cols) or (slices, rows, cols), nonzero on the finding, on the map's own grid. No tolerance is added around it.
    Raises:
        ValueError: an empty mask (a study without the finding has nothing to point at: leave it out) or a peak outside the mask's array.
    Source: Zhang et al. 2016, arXiv:1608.00507, there with a tolerance of 15 pixels; here without.
    """
    inside = np.asarray(mask) != 0
    n = inside.ndim
    if n not in (2, 3) or not inside.any():
        raise ValueError(f"pointing game: the mask of shape {inside.shape} must have 2 or 3 axes and a finding in it; leave the study out")
    points = np.zeros((0, n), dtype=np.int64) if peaks is None else np.atleast_2d(np.asarray(peaks))
    if not len(points):
        return 0.0
    if points.shape[1] != n or (points < 0).any() or (points >= inside.shape).any():
        raise ValueError(f"pointing game: the peak lies outside the mask's grid of {inside.shape}; map and mask must share it")
    return float(inside[tuple(points.T)].mean())


@dataclass(frozen=True)
class Retrieval:
    """Recall@K of Q queries against a pool. ``ranks`` (Q,) is the expected rank of each query's best relevant item, 1 the best."""

    recall: dict[int, Interval]  # K -> share of queries with a relevant item among the first K
    chance: dict[int, float]  # K -> the same for a random order of the pool; K / pool if every query has one relevant item
    pool: int
    ranks: NDArray[np.float64] = field(repr=False)
    hits: dict[int, NDArray[np.float64]] = field(repr=False)  # K -> (Q,) chance of a hit of each query, 0 or 1 but for ties


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

    Strict pairs: ``relevant`` has one True a query. Duplicates as hits: True wherever the item says the same. Ties are counted at their
    expectation over a random order of the tied items, so a model that scores everything alike is at chance, not at 0 or 1. A matrix product
    may give equal items that differ in the last bit: round before, or they are ordered by noise.

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
    if similarity.ndim != 2 or similarity.shape != relevant.shape or relevant.dtype != np.bool_:
        raise ValueError(
            f"similarity {similarity.shape} and relevant {relevant.shape} ({relevant.dtype}) must be (queries, pool), the second bool"
        )
    if np.isnan(similarity).any():
        raise ValueError(f"similarity is NaN in query row {int(np.flatnonzero(np.isnan(similarity).any(axis=1))[0])}")
    if len(lonely := np.flatnonzero(~relevant.any(axis=1))):
        raise ValueError(f"{len(lonely)} queries, the first in row {lonely[0]}, have no relevant item in the pool; leave them out")
    if any(k < 1 for k in ks):
        raise ValueError(f"every K must be 1 or more, got {list(ks)}")
    pool = similarity.shape[1]
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    above = (similarity > best).sum(axis=1)
    tied = similarity == best
    n_tied, n_hits = tied.sum(axis=1), (tied & relevant).sum(axis=1)
    hits = {k: _chance_of_a_hit(n_tied, n_hits, k - above) for k in ks}
    statistics = {str(k): mean_statistic(values) for k, values in hits.items()}
    intervals = bootstrap_intervals(statistics, patient_ids, repeats=repeats, seed=seed, level=level)
    everything = np.full(len(relevant), pool)
    return Retrieval(
        recall={k: intervals[str(k)] for k in ks},
        chance={k: float(_chance_of_a_hit(everything, relevant.sum(axis=1), np.full(len(relevant), k)).mean()) for k in ks},
        pool=pool,
        ranks=above + (n_tied + 1) / (n_hits + 1),
        hits=hits,
    )


def _chance_of_a_hit(items: NDArray[np.int64], hits: NDArray[np.int64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Chance that ``draws`` of ``items`` in random order bring at least one of ``hits``: 1 - C(items - hits, draws) / C(items, draws)."""
    miss = np.ones(len(items))
    for i in range(max(int(np.minimum(draws, items).max(initial=0)), 0)):
        left = np.maximum(items - i, 1)
        miss *= np.where(i < draws, np.maximum(items - hits - i, 0) / left, 1.0)
    return np.where(hits == 1, np.clip(draws, 0, items) / items, 1 - miss)  # the quotient is exact where there is one


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    given, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if given.ndim != 1 or given.shape != values.shape:
        raise ValueError(f"labels have shape {given.shape}, scores {values.shape}; both must be (N,)")
    if not np.isin(given, (0, 1)).all():
        raise ValueError("labels must be 1 or 0; drop the uncertain (-1) and the missing first")
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of {len(values)} scores are NaN; a score that is unknown cannot be ranked")
    return given.astype(bool), values


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


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient, NaN where the bottom is 0."""
    return np.divide(top, bottom, out=np.full_like(top, math.nan), where=bottom > 0)
