"""Grounding measured: maps and statements of many images against what is drawn on them, per finding and over findings, with intervals.

Shapes: N cases, a query on an image each. A case is present, with a mask, or absent: then whatever is found is false. Pointing, contrast,
overlap and distance are of present cases; found and false area are also of absent ones. Intervals draw patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.data.manifest import StudyImage
from medvl.metrics import (
    IOU_THRESHOLDS,
    MACRO,
    Interval,
    Matches,
    Statistic,
    accuracy_at_iou,
    average_precision_statistic,
    bootstrap_intervals,
    contrast_to_noise,
    distance_to_centre,
    match_boxes,
    mean_iou,
    mean_statistic,
    overlap,
    pointing_game,
    tied_peaks,
)
from medvl.types import RESEARCH_USE, ImageSample, UnreadableImageError
from tasks.grounding.grounder import Grounder
from tasks.grounding.maps import GridMaps
from tasks.grounding.sources import SourceError
from tasks.grounding.statements import Statement, state
from tasks.grounding.thresholds import MapThresholds
from tasks.masks import MaskError, finding_mask

MaskOf = Callable[[ImageSample], NDArray[np.bool_] | None]
BOX_IOU = 0.5
"""Overlap at which a box counts as right."""
MEANS = (
    *("pointing_game", "contrast", "contrast_absolute", "mean_iou", "dice", "iou", "accuracy_at_iou", "found"),
    *("distance_mm", "distance_along_slices_mm", "false_found", "false_area", "false_area_size"),
)
"""Measures that are means over cases; average precision is not."""


@dataclass(frozen=True)
class Asked:
    """What is asked of one image: a query, and its mask; None: it is absent."""

    query: int
    group: str  # what figures are given by: a finding, or a category of the data set
    mask: MaskOf | None
    present: bool = True  # without a mask too, where it is only calibrated


@dataclass(frozen=True)
class GroundingImage:
    """An image with all that is asked of it."""

    path: Path
    study: str
    patient: str
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class CaseResult:
    """What became of one case; NaN where a measure does not apply."""

    study: str
    path: Path
    patient: str
    query: str
    group: str
    present: bool
    peak: tuple[int, ...] | None
    score: float
    values: dict[str, float]  # of MEANS, without those that do not apply
    matches: Matches | None  # None without levels


@dataclass(frozen=True)
class Measured:
    """All cases, and the images that could not be measured."""

    cases: tuple[CaseResult, ...]
    rejected: tuple[tuple[str, str], ...]  # study and reason
    volumes: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def of_manifest(rows: Sequence[StudyImage], findings: Sequence[str], without_masks: bool = False) -> list[GroundingImage]:
    """Findings of a manifest's images: present with their masks or boxes, absent by their labels; the others are not asked.

    Args:
        without_masks: also those that are present and have no mask: to calibrate by, not to measure.
    """
    found = []
    for row in rows:
        asked = []
        for i, name in enumerate(findings):
            label = row.labels.get(name)
            if label == 1 and (name in row.masks or any(box.finding == name for box in row.boxes)):
                asked.append(Asked(i, name, _mask_of(row, name)))
            elif label == 0 or (label == 1 and without_masks):
                asked.append(Asked(i, name, None, present=label == 1))
        if asked:
            found.append(GroundingImage(row.path, row.study_id, row.patient_id, tuple(asked)))
    return found


def _mask_of(row: StudyImage, name: str) -> MaskOf:
    return lambda sample: finding_mask(row, name, sample)


def measure(
    grounder: Grounder,
    images: Sequence[GroundingImage],
    thresholds: MapThresholds | None = None,
    *,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Measure every case; an image that cannot be read, or whose mask does not fit, is listed and the others go on."""
    cases: list[CaseResult] = []
    rejected: list[tuple[str, str]] = []
    volumes = False
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        for image, sample, maps in encoded(grounder, part, rejected):
            volumes = volumes or len(sample.transform.native_shape) == 3
            try:
                cases += _of_image(grounder, image, sample, maps, thresholds, iou_thresholds)
            except (MaskError, UnreadableImageError, ValueError) as error:
                rejected.append((image.study, str(error)))
        progress(len(part))
    return Measured(tuple(cases), tuple(rejected), volumes)


def encoded(
    grounder: Grounder, part: Sequence[GroundingImage], rejected: list[tuple[str, str]]
) -> Iterator[tuple[GroundingImage, ImageSample, GridMaps]]:
    """Images of a batch with their maps; what cannot be read, or not be taken by the tower, is added to ``rejected``.

    Raises:
        SourceError: a model that the source of the maps cannot read.
    """
    by_shape: dict[tuple[int, ...], list[tuple[GroundingImage, ImageSample]]] = {}
    for image in part:
        try:
            sample = grounder.model.read(image.path)
        except UnreadableImageError as error:
            rejected.append((image.study, str(error)))
            continue
        by_shape.setdefault((sample.pixels.ndim, *sample.pixels.shape[-2:]), []).append((image, sample))
    for group in by_shape.values():
        yield from _mapped(grounder, group, rejected)


def _mapped(
    grounder: Grounder, group: Sequence[tuple[GroundingImage, ImageSample]], rejected: list[tuple[str, str]]
) -> Iterator[tuple[GroundingImage, ImageSample, GridMaps]]:
    """Images that go through the tower together; where it does not take them, one by one, to tell which one it is."""
    try:
        maps = grounder.of_samples([sample for _, sample in group], [image.path for image, _ in group])
    except SourceError:
        raise
    except (ValueError, NotImplementedError) as error:
        if len(group) == 1:
            rejected.append((group[0][0].study, str(error)))
            return
        for one in group:
            yield from _mapped(grounder, [one], rejected)
        return
    for (image, sample), own in zip(group, maps, strict=True):
        yield image, sample, own


def _of_image(
    grounder: Grounder,
    image: GroundingImage,
    sample: ImageSample,
    maps: GridMaps,
    thresholds: MapThresholds | None,
    iou_thresholds: Sequence[float],
) -> list[CaseResult]:
    found = []
    for asked in image.asked:
        mask = None if asked.mask is None else asked.mask(sample)
        if asked.mask is not None and (mask is None or not mask.any()):
            continue  # nothing of it lies in this image
        query = grounder.queries[asked.query]
        scores = maps.native(asked.query)
        levels = None if thresholds is None else thresholds.levels(query)
        said = state(scores, maps.step_mm, levels)
        values, matches = _values(said, scores, mask, maps.step_mm, sample, iou_thresholds)
        common = (image.study, image.path, image.patient, query.name, asked.group)
        found.append(CaseResult(*common, mask is not None, said.peak, said.score, values, matches))
    return found


def _values(
    said: Statement,
    scores: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
    step_mm: Sequence[float],
    sample: ImageSample,
    iou_thresholds: Sequence[float],
) -> tuple[dict[str, float], Matches | None]:
    boxes = np.array([[one.low, one.high] for one in said.regions]).reshape(-1, 2, scores.ndim)
    confidence = np.array([one.score for one in said.regions])
    if mask is None:
        if said.levels is None:
            return {}, None
        seen = int(np.isfinite(scores).sum())
        values = {
            "false_found": float(bool(said.regions)),
            "false_area": int(said.mask.sum()) / seen if seen else math.nan,
            "false_area_size": sum(one.size for one in said.regions),
        }
        return values, match_boxes(boxes, confidence, np.zeros((0, 2, scores.ndim)), BOX_IOU)
    step = np.diag(np.asarray(step_mm, dtype=np.float64)) if sample.affine is None else sample.affine[:3, :3]
    away, along = distance_to_centre(said.peak, mask, step)
    values = {
        "pointing_game": pointing_game(tied_peaks(scores), mask),
        "contrast": contrast_to_noise(scores, mask),
        "contrast_absolute": contrast_to_noise(scores, mask, absolute=True),
        "mean_iou": mean_iou(scores, mask, iou_thresholds),
        "distance_mm": away,
    }
    if scores.ndim == 3:
        values["distance_along_slices_mm"] = along
    if said.levels is None:
        return values, None
    true = boxes_of(mask)
    iou, dice = overlap(said.mask, mask)
    values |= {
        "found": float(bool(said.regions)),
        "iou": iou,
        "dice": dice,
        "accuracy_at_iou": accuracy_at_iou(boxes, confidence, true, BOX_IOU),
    }
    return values, match_boxes(boxes, confidence, true, BOX_IOU)


def boxes_of(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(T, 2, n) boxes of the connected pieces of a mask, as edges."""
    from scipy import ndimage

    pieces, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    cuts = ndimage.find_objects(pieces)
    return np.array([[[part.start - 0.5 for part in cut], [part.stop - 0.5 for part in cut]] for cut in cuts]).reshape(-1, 2, mask.ndim)


def results(
    measured: Measured,
    grounder: Grounder,
    thresholds: MapThresholds | None,
    *,
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    repeats: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every measure with n and a patient-level interval, per group and over groups; strict JSON.

    Raises:
        ValueError: no case at all.
    """
    cases = measured.cases
    if not cases:
        raise ValueError(f"nothing could be measured; {len(measured.rejected)} images were left out")
    groups = sorted({one.group for one in cases})
    patients = [one.patient for one in cases]
    place = {group: np.array([one.group == group for one in cases]) for group in groups}
    found: dict[str, Any] = {
        "notice": RESEARCH_USE,
        "cases": {"present": sum(one.present for one in cases), "absent": sum(not one.present for one in cases)},
        "images": len({one.path for one in cases}),
        "patients": len(set(patients)),
        "rejected": len(measured.rejected),
        "maps": {**grounder.settings.to_dict(), "unit": grounder.source.unit, "sha256": grounder.settings.sha256},
        "mean_iou_thresholds": list(iou_thresholds),
        "box_iou": BOX_IOU,
        "pointing_game_tolerance_px": 0,
        "size_unit": "mL" if measured.volumes else "mm2",
        "thresholds": None if thresholds is None else {"threshold": thresholds.threshold, "fitted_on": dict(thresholds.fitted_on)},
        "interval": {"level": 0.95, "method": "percentile bootstrap over patients", "repeats": repeats, "seed": seed},
        "macro": {},
        "per_group": {group: {} for group in groups},
    }
    tables: dict[str, dict[str, Statistic]] = {}
    for name in MEANS:
        column = np.array([one.values.get(name, math.nan) for one in cases])
        own = {group: mean_statistic(np.where(place[group], column, math.nan)) for group in groups}
        tables[name] = {group: statistic for group, statistic in own.items() if statistic.used.any()}
    if thresholds is not None:
        tables["average_precision"] = {
            group: _precision(cases, at)
            for group, at in place.items()
            if any(one.present for one, here in zip(cases, at, strict=True) if here)
        }
    for name, own in tables.items():
        if not own:
            continue
        intervals = bootstrap_intervals(own, patients, repeats=repeats, seed=seed)
        mean = intervals.get(MACRO) or next(iter(intervals.values()))
        found["macro"][name] = {**_interval(mean), "groups": len(own)}
        for group in own:
            found["per_group"][group][name] = _interval(intervals[group])
    return found


def _precision(cases: Sequence[CaseResult], at: NDArray[np.bool_]) -> Statistic:
    """Average precision over the cases of a group, as a function of the weights of all cases."""
    own = average_precision_statistic([one.matches for one, here in zip(cases, at, strict=True) if here and one.matches is not None])
    return Statistic(lambda weights: own.of_weights(weights[:, at]), at, own.n_positive)


def _interval(interval: Interval) -> dict[str, Any]:
    return {name: value for name, value in interval.to_dict().items() if name in ("value", "ci_low", "ci_high", "n", "n_patients")}
