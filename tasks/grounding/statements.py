"""From a map to a statement: whether a phrase was found, how sure that is, and the regions where, in native pixels and mm.

A region is grown by hysteresis: what is above ``spread`` and hangs together with something above ``detect``. A phrase whose map nowhere
reaches ``detect`` was not found, and has no region: an honest answer for what is absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.metrics import above, peak


@dataclass(frozen=True)
class Levels:
    """Of one query, on the scale of its map."""

    detect: float  # the phrase is found where a map reaches this; inf: never, for validation gave no level
    spread: float  # a region reaches as far as this, at most ``detect``


@dataclass(frozen=True)
class FoundRegion:
    """A connected part of an image that speaks for a phrase."""

    low: tuple[float, ...]  # edges of its box by native axes: a box of pixel 3 alone is 2.5 to 3.5
    high: tuple[float, ...]
    size: float  # mm2 of a radiograph (at the detector), mL of a volume
    score: float  # highest of the map in it
    peak: tuple[int, ...]

    def to_dict(self, unit: str) -> dict[str, Any]:
        """Strict JSON."""
        size = {f"size_{unit}": round(self.size, 3), "score": self.score, "peak": list(self.peak)}
        return {"low": list(self.low), "high": list(self.high), **size}


@dataclass(frozen=True)
class Statement:
    """What a map says of a phrase."""

    peak: tuple[int, ...] | None  # None: the map is the same everywhere
    score: float  # highest of the map; NaN where the tower saw nothing
    levels: Levels | None
    probability: float | None  # calibrated; None without a calibration
    regions: tuple[FoundRegion, ...]  # the largest score first; empty where not found, or without levels
    mask: NDArray[np.bool_]  # native; all False where not found

    @property
    def found(self) -> bool | None:
        """None without levels."""
        return None if self.levels is None else bool(self.regions)


def state(
    scores: NDArray[np.float32], step_mm: Sequence[float], levels: Levels | None = None, probability: float | None = None
) -> Statement:
    """What a native map says.

    Args:
        scores: native map, NaN where the tower did not look.
        step_mm: native spacing by axes.
        levels: chosen on validation; None: peak and score alone.
        probability: of the map's score.
    """
    at = peak(scores)
    highest = float(np.nanmax(scores)) if np.isfinite(scores).any() else math.nan
    mask: NDArray[np.bool_] = np.zeros(scores.shape, dtype=bool)
    regions: tuple[FoundRegion, ...] = ()
    if levels is not None and highest >= levels.detect:
        mask, regions = grown(scores, step_mm, levels)
    return Statement(at, highest, levels, probability, regions, mask)


def grown(scores: NDArray[np.float32], step_mm: Sequence[float], levels: Levels) -> tuple[NDArray[np.bool_], tuple[FoundRegion, ...]]:
    """Mask and regions of a map; neighbours touch by a side, an edge or a corner."""
    from scipy import ndimage

    pieces, count = ndimage.label(above(scores, min(levels.spread, levels.detect)), structure=np.ones((3,) * scores.ndim))
    if not count:
        return np.zeros(scores.shape, dtype=bool), ()
    known = np.nan_to_num(scores, nan=-np.inf)
    numbers = np.arange(1, count + 1)
    highest = ndimage.maximum(known, pieces, numbers)
    kept = numbers[np.asarray(highest) >= levels.detect]
    if not len(kept):
        return np.zeros(scores.shape, dtype=bool), ()
    boxes = ndimage.find_objects(pieces)
    pixel = math.prod(step_mm) / (1000.0 if scores.ndim == 3 else 1.0)  # mm3 are thousandths of a mL
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    regions = []
    for number in kept:
        cut = boxes[number - 1]
        inside = np.where(pieces[cut] == number, scores[cut], np.nan)
        at = peak(inside)
        if at is None:  # one plateau: its middle will do
            at = tuple(int(i) for i in np.argwhere(pieces[cut] == number).mean(0).round())
        place = tuple(int(part.start) + i for part, i in zip(cut, at, strict=True))
        low, high = (tuple(float(getattr(part, end)) - 0.5 for part in cut) for end in ("start", "stop"))
        regions.append(FoundRegion(low, high, float(sizes[number] * pixel), float(highest[number - 1]), place))
    regions.sort(key=lambda one: -one.score)
    return np.isin(pieces, kept), tuple(regions)
