"""Metrics of similarity maps against masks: contrast-to-noise ratio, pointing game, distance to the centre, overlap at a threshold.

Maps and masks have (rows, cols) or (slices, rows, cols) of the native image. A map is NaN where the tower did not look: such a pixel is
never a peak and never above a threshold, so that a mask which reaches there is missed there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.geometry import Moments

IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Of the mean IoU, as BioViL-T has them for cosines (arXiv:2301.04558); for another scale give others, and state them with the figure."""


def contrast_to_noise(scores: NDArray[np.floating[Any]], mask: NDArray[np.bool_], absolute: bool = False) -> float:
    """(mean inside - mean outside) / sqrt(variance inside + variance outside) of a map; above 0 where the mask is brighter.

    Args:
        scores: any shape; NaN does not count.
        mask: of the same shape.
        absolute: without the sign, as published: a map that is darkest on the finding then scores as well as one that is brightest.
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
    found = float((inside.mean() - outside.mean()) / noise) if noise > 0 else math.nan
    return abs(found) if absolute else found


def contrast_of_moments(inside: Moments, whole: Moments, absolute: bool = False) -> NDArray[np.float64]:
    """(Q, R) contrast-to-noise of maps and regions from exact sums on the token grid; as :func:`contrast_to_noise`, without the maps.

    Args:
        inside: over R regions.
        whole: over all that the tower saw.
        absolute: without the sign.
    """
    outside = whole.less(inside)
    noise = (inside.variance + outside.variance).sqrt()
    contrast = (inside.mean - outside.mean).numpy()
    scale = np.maximum(np.abs(inside.mean.numpy()), np.abs(outside.mean.numpy()))
    flat = noise.numpy() <= 1e-7 * np.maximum(scale, 1e-30)  # what is left of equal sums
    found = np.divide(contrast, noise.numpy(), out=np.full_like(contrast, math.nan), where=~flat)
    return np.abs(found) if absolute else found


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


def overlap(found: NDArray[np.bool_], mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Intersection over union and Dice of two masks; NaN where both are empty: nothing to find is measured by what was found there.

    Raises:
        ValueError: shapes that differ.
    """
    if found.shape != mask.shape:
        raise ValueError(f"the masks have shapes {found.shape} and {mask.shape}; they must match")
    both, either = int((found & mask).sum()), int((found | mask).sum())
    if not either:
        return math.nan, math.nan
    return both / either, 2 * both / (both + either)


def mean_iou(scores: NDArray[np.floating[Any]], mask: NDArray[np.bool_], thresholds: Sequence[float] = IOU_THRESHOLDS) -> float:
    """Mean over thresholds of the IoU of what is at or above the threshold with the mask.

    Raises:
        ValueError: no threshold, or an empty mask (a study without the finding has no region to overlap: leave it out).
    Source: BioViL-T, arXiv:2301.04558, sec. 4; in no repository.
    """
    if not len(thresholds):
        raise ValueError("mean IoU needs at least one threshold")
    if not mask.any():
        raise ValueError("mean IoU: the mask is empty; leave the study out")
    return float(np.mean([overlap(above(scores, threshold), mask)[0] for threshold in thresholds]))


def above(scores: NDArray[np.floating[Any]], threshold: float) -> NDArray[np.bool_]:
    """Where a map is at or above the threshold; nowhere where it is NaN."""
    return np.asarray(np.nan_to_num(scores, nan=-np.inf) >= threshold)


def area_above(scores: NDArray[np.floating[Any]], threshold: float) -> float:
    """Share of what the tower saw that is at or above the threshold: false-positive area where the phrase is absent. NaN of no pixel."""
    seen = int((~np.isnan(scores)).sum())
    return int(above(scores, threshold).sum()) / seen if seen else math.nan


def distance_to_centre(
    at: tuple[int, ...] | None, mask: NDArray[np.bool_], step_mm: NDArray[np.float64] | Sequence[Sequence[float]]
) -> tuple[float, float]:
    """How far a peak lies from the centre of a finding, and how far along the first axis, in mm.

    Of a finding in several pieces (neighbours touch by a side, an edge or a corner) the one whose centre is nearest counts. A centre is
    the mean of the piece's pixels, and may lie beside a bent one.

    Args:
        at: peak as :func:`peak` gives it; None, a map that points nowhere, is NaN away.
        mask: (rows, cols) or (slices, rows, cols), not empty.
        step_mm: (m, n), column k the step in mm of one index along axis k: of a volume ``affine[:3, :3]``, of a radiograph the diagonal of
            its pixel spacing.
    Returns:
        distance, and its part along the direction of axis 0 (of a volume along the slices' stack), both not negative.
    Raises:
        ValueError: an empty mask.
    """
    from scipy import ndimage

    if not mask.any():
        raise ValueError("distance to the centre: the mask is empty; leave the study out")
    if at is None:
        return math.nan, math.nan
    step = np.asarray(step_mm, dtype=np.float64)
    pieces, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    centres = np.array(ndimage.center_of_mass(mask, pieces, range(1, count + 1)))
    away = (np.array(at, dtype=np.float64) - centres) @ step.T  # (pieces, m) mm
    length = np.linalg.norm(away, axis=1)
    nearest = int(length.argmin())
    along = abs(float(away[nearest] @ step[:, 0])) / float(np.linalg.norm(step[:, 0]))
    return float(length[nearest]), along
