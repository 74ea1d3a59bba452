"""Metrics of similarity maps against masks: contrast-to-noise ratio and pointing game."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
