"""Slices of one direction to evenly spaced runs, from their positions alone. Nothing is evened silently.

A series that changes its spacing comes back as evenly spaced runs, missing slices and positions that fit no grid are refused, and what is
filled in or rounded on request is recorded. Gantry tilt is a shear of the affine.

Positions p are DICOM's LPS mm. A step is the vector from one slice's first voxel to the next one's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.ct.headers import Kind, SliceHeader
from modalities.ct.volume import STRAIGHT_DEG

TOLERANCE_MM = 0.01


@dataclass(frozen=True)
class Series:
    """Slices that belong together, sorted along their normal. Equal spacing is promised where ``problems`` is empty."""

    kind: Kind
    slices: tuple[SliceHeader, ...]
    problems: tuple[str, ...] = ()  # why it cannot be read as it is, and what to do
    warnings: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    gaps: tuple[tuple[int, int], ...] = ()  # (i, n): n slices are missing behind slice i; refused unless filled
    step_mm: tuple[float, float, float] | None = None  # from slice to slice, LPS; None for a single slice and where there is no grid

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, each once, in the order of their slices."""
        return tuple(dict.fromkeys(item.file for item in self.slices))

    @property
    def tilt_deg(self) -> float:
        """Angle between the step and the normal of the slices."""
        first = self.slices[0]
        if self.step_mm is None or first.orientation is None:
            return 0.0
        step = np.asarray(self.step_mm)
        return math.degrees(math.acos(min(abs(float(first.normal @ step)) / float(np.linalg.norm(step)), 1.0)))

    @property
    def description(self) -> str:
        """What it is, by geometry alone: nothing from the header that identifies."""
        first = self.slices[0]
        if self.kind in ("other", "unreadable"):
            return f"{self.kind}: {len(self.slices)} image{'s' * (len(self.slices) > 1)}; {first.problem or 'no volume'}"
        words = f"{self.kind} of {len(self.slices)} slice{'s' * (len(self.slices) > 1)}, {first.shape[0]} x {first.shape[1]}"
        if first.spacing is not None:
            words += f" at {first.spacing[0]:.3g} x {first.spacing[1]:.3g} mm"
        if self.step_mm is not None:
            words += f", {float(np.linalg.norm(self.step_mm)):.4g} mm apart"
        if self.tilt_deg > STRAIGHT_DEG and self.step_mm is not None:
            apart = float(np.linalg.norm(self.step_mm)) * math.cos(math.radians(self.tilt_deg))
            words += f" ({apart:.4g} mm along their normal), tilted by {self.tilt_deg:.1f} degrees"
        missing = sum(count for _, count in self.gaps)
        return words + (f", {missing} missing" if missing else "") + (", with problems" if self.problems else "")


def even_series(kept: Sequence[SliceHeader], warned: Sequence[str], tolerance: float, split_gaps: bool) -> list[Series]:
    """One series of slices sorted along their normal, each at a place of its own, or several evenly spaced runs of them.

    Args:
        kept: the slices.
        warned: what is to be told about them already.
        tolerance: mm that a slice may lie from an even grid.
        split_gaps: part them where slices are missing.
    """
    if len(kept) == 1:
        return [Series("slice", tuple(kept), warnings=tuple(warned))]
    positions = np.array([item.position for item in kept], dtype=np.float64)
    apart = _deviation(positions, np.arange(len(kept)))
    if apart <= tolerance + 1e-6:
        return [_run(kept, positions, warned, apart)]
    index = _grid_index(positions, tolerance)
    if index is not None and not split_gaps:
        gaps = tuple((i, int(n) - 1) for i, n in enumerate(np.diff(index)) if n > 1)
        step = (positions[-1] - positions[0]) / index[-1]
        missing = sum(count for _, count in gaps)
        problem = (
            f"{missing} slice{'s' * (missing > 1)} missing in {len(gaps)} place{'s' * (len(gaps) > 1)} of a grid of "
            f"{np.linalg.norm(step):.4g} mm. Pass fill_missing=True to interpolate (recorded), or split_gaps=True to find_series"
        )
        run = _run(kept, positions, warned, _deviation(positions, index), step)
        return [replace(run, problems=(problem,), gaps=gaps)]
    runs = _even_runs(positions, tolerance)
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    uneven = f"slice spacing runs from {steps.min():.4g} to {steps.max():.4g} mm (tolerance {tolerance:g} mm)"
    if len(runs) > max(2, len(kept) // 8):
        problem = (
            f"{uneven} and fits no few even runs; expected an even grid. Pass tolerance_mm to find_series to accept more (recorded), "
            "or resample the series"
        )
        return [Series("volume", tuple(kept), problems=(problem,), warnings=tuple(warned))]
    found = []
    for number, members in enumerate(runs):
        note = f"run {number + 1} of {len(runs)} of a series that is not even: {uneven}"
        some = [kept[i] for i in members]
        if len(some) == 1:
            found.append(Series("slice", tuple(some), warnings=(*warned, note)))
        else:
            apart = _deviation(positions[members], np.arange(len(members)))
            found.append(_run(some, positions[members], [*warned, note], apart))
    return found


def _run(
    kept: Sequence[SliceHeader],
    positions: NDArray[np.float64],
    warned: Sequence[str],
    apart: float,
    step: NDArray[np.float64] | None = None,
) -> Series:
    """An even run of at least two slices, with its tilt and rounding told."""
    vector = (positions[-1] - positions[0]) / (len(positions) - 1) if step is None else step
    run = Series("volume", tuple(kept), step_mm=(float(vector[0]), float(vector[1]), float(vector[2])))
    notes = list(warned)
    if run.tilt_deg > STRAIGHT_DEG:
        notes.append(f"gantry tilt of {run.tilt_deg:.1f} degrees: the affine is sheared; its axes are not at right angles")
    repairs = (f"slices lie up to {apart:.3g} mm from the even grid that was taken",) if apart > TOLERANCE_MM + 1e-6 else ()
    return replace(run, warnings=tuple(notes), repairs=repairs)


def _deviation(positions: NDArray[np.float64], index: NDArray[Any]) -> float:
    """Largest distance in mm of a slice from the even grid through the first and the last one; ``index`` is each one's place in it."""
    step = (positions[-1] - positions[0]) / max(int(index[-1]), 1)
    return float(np.linalg.norm(positions - positions[0] - index[:, None] * step, axis=1).max())


def _grid_index(positions: NDArray[np.float64], tolerance: float) -> NDArray[np.int64] | None:
    """Each slice's place in an even grid of which a few are missing, or None where there is no such grid."""
    steps = np.diff(positions, axis=0)
    usual = np.median(steps, axis=0)
    length = float(usual @ usual)
    if length == 0:
        return None
    counts = np.rint(steps @ usual / length).astype(np.int64)
    wide = counts > 1
    if counts.min() < 1 or not wide.any() or wide.sum() > max(1, len(steps) // 10) or counts.max() > max(len(positions), 3):
        return None
    if (wide[1:] & wide[:-1]).any():  # two wide steps in a row: another spacing, not a loss
        return None
    index = np.concatenate([[0], np.cumsum(counts)])
    return index if _deviation(positions, index) <= tolerance + 1e-6 else None


def _even_runs(positions: NDArray[np.float64], tolerance: float) -> list[NDArray[np.int64]]:
    """Slices parted into evenly spaced runs, longest first where a slice could belong to two; in order along the normal."""
    steps = np.diff(positions, axis=0)
    stretches: list[tuple[int, int]] = []  # first and last slice
    start = 0
    for i in range(1, len(steps) + 1):
        if i == len(steps) or float(np.linalg.norm(steps[i] - steps[start])) > tolerance + 1e-6:
            stretches.append((start, i))
            start = i
    owner = np.full(len(positions), -1)
    for number in sorted(range(len(stretches)), key=lambda n: stretches[n][0] - stretches[n][1]):
        first, last = stretches[number]
        if owner[first] >= 0:
            first += 1
        if owner[last] >= 0:
            last -= 1
        owner[first : last + 1] = number
    borders = np.flatnonzero(np.diff(owner)) + 1
    return list(np.split(np.arange(len(positions)), borders))
