"""Hard galleries: whether what is right ranks above what is nearly right, such as a report of the same finding on the other side.

Shapes: M galleries of a query each, with P scores of what is right and N of what is not; both may differ from gallery to gallery.

A query may have several galleries, so that an interval draws patients with all of theirs. Items of equal score have no order: a tied pair
counts half, and the first place is shared by all that have the highest score. Round scores before, as in :mod:`medvl.metrics.retrieval`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, bootstrap_resamples, mean_statistic

Scores = NDArray[np.floating[Any]]
MEASURES = ("pairwise_accuracy", "recall@1")


@dataclass(frozen=True)
class GalleryResult:
    """Figures of M galleries, all together and by kind. See :func:`gallery_metrics`."""

    metrics: dict[str, Interval]  # of MEASURES; n counts galleries
    chance: dict[str, float]  # the same for a random order
    per_kind: dict[str, dict[str, Interval]]  # kind -> the same metrics; kinds in the order of their names
    per_gallery: dict[str, NDArray[np.float64]] = field(repr=False)  # name -> (M,), NaN of a gallery that lacks one side
    by_chance: NDArray[np.float64] = field(repr=False)  # (M,) P / (P + N), the chance of recall@1; NaN of a gallery that does not count
    wrong: NDArray[np.int64] = field(repr=False)  # (M,) N of each


def pairwise_accuracy(right: Scores, wrong: Scores) -> float:
    """Share of the P x N pairs in which the right one scores higher, ties half; NaN where either side is empty.

    Args:
        right: (P,).
        wrong: (N,).
    """
    if not len(right) or not len(wrong):
        return math.nan
    ordered = np.sort(wrong)
    below = np.searchsorted(ordered, right, side="left") + np.searchsorted(ordered, right, side="right")
    return float(below.sum()) / (2 * len(right) * len(wrong))


def first_is_right(right: Scores, wrong: Scores) -> float:
    """Chance that a right one stands first, over all orders of the tied; NaN where either side is empty.

    Args:
        right: (P,).
        wrong: (N,).
    """
    if not len(right) or not len(wrong):
        return math.nan
    best = right.max()
    if wrong.max() > best:
        return 0.0
    hits = int((right == best).sum())
    return hits / (hits + int((wrong == best).sum()))


def gallery_metrics(
    galleries: Iterable[tuple[Scores, Scores]],
    kinds: Sequence[str],
    patient_ids: PatientIds,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> GalleryResult:
    """Mean over galleries of :func:`pairwise_accuracy` and of :func:`first_is_right` ("recall@1"), with patient-level intervals.

    Chance is 1/2 of a pair, and of the first place the mean of P / (P + N). A gallery with nothing right or nothing wrong does not count;
    without any, figures are NaN with n 0.

    Args:
        galleries: M pairs of (P,) and (N,) scores, higher is nearer; looked at one after the other, so that a generator holds none.
        kinds: (M,), what each is counted under besides, such as its finding.
        patient_ids: (M,), the patient of each gallery's query.
        repeats: as in :func:`bootstrap_intervals`, like ``seed`` and ``level``.
        seed: see there.
        level: see there.
    Raises:
        ValueError: NaN scores, or numbers of galleries, kinds and patients that differ.
    """
    accuracies: list[float] = []
    first: list[float] = []
    shares: list[float] = []
    wrongs: list[int] = []
    for i, (right, wrong) in enumerate(galleries):
        if np.isnan(right).any() or np.isnan(wrong).any():
            raise ValueError(f"gallery {i} has a score that is NaN")
        accuracies.append(pairwise_accuracy(right, wrong))
        first.append(first_is_right(right, wrong))
        shares.append(len(right) / (len(right) + len(wrong)) if len(right) and len(wrong) else math.nan)
        wrongs.append(len(wrong))
    if not len(accuracies) == len(kinds) == len(patient_ids):
        raise ValueError(f"{len(accuracies)} galleries, {len(kinds)} kinds and {len(patient_ids)} patients; each gallery has one of each")
    per_gallery = dict(zip(MEASURES, (np.array(accuracies, dtype=np.float64), np.array(first, dtype=np.float64)), strict=True))
    counted = ~np.isnan(per_gallery["recall@1"])
    if not counted.any():
        nothing = Interval(math.nan, math.nan, math.nan, n=0, n_patients=0, level=level)
        empty = dict.fromkeys(MEASURES, math.nan)
        return GalleryResult(dict.fromkeys(MEASURES, nothing), empty, {}, per_gallery, np.array(shares), np.array(wrongs, dtype=np.int64))
    of = np.asarray(kinds, dtype=object)
    named = sorted({kind for kind, counts in zip(kinds, counted, strict=True) if counts})
    statistics = {str((name, None)): mean_statistic(values) for name, values in per_gallery.items()}
    for kind in named:
        statistics |= {str((name, kind)): mean_statistic(np.where(of == kind, values, np.nan)) for name, values in per_gallery.items()}
    drawn = bootstrap_resamples(statistics, patient_ids, repeats=repeats, seed=seed, level=level)
    return GalleryResult(
        metrics={name: drawn.interval(str((name, None))) for name in MEASURES},
        chance={"pairwise_accuracy": 0.5, "recall@1": float(np.nanmean(shares))},
        per_kind={kind: {name: drawn.interval(str((name, kind))) for name in MEASURES} for kind in named},
        per_gallery=per_gallery,
        by_chance=np.array(shares),
        wrong=np.array(wrongs, dtype=np.int64),
    )
