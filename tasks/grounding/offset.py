"""Where a tower's tokens look, by masks of validation images: the shift of maps at which their peaks lie in what they point at most often.

What :mod:`medvl.training.offset` measures without masks, from gradients, is where a token's evidence lies on average. Where findings
have masks this is the better measure: it asks of the peaks themselves. Offsets are in voxels of the tower's grid, in the plane; depth stays
as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medvl.metrics import peak
from tasks.grounding.evaluation import GroundingImage, encoded
from tasks.grounding.grounder import Grounder

STEP = 0.5
"""Between two offsets that are tried, in voxels of the tower's grid."""
REACH = 6
"""How far to either side they are tried."""
FEWEST = 30
"""Masks that a choice rests on at least."""


@dataclass(frozen=True)
class OffsetByMasks:
    """What was chosen, and what it changes on the masks it was chosen on."""

    offset: tuple[float, ...]
    before: float  # mean over findings of the share of masks that the peak lies in, at the offset that was
    after: float  # the same at the offset chosen
    masks: int


def offset_by_masks(
    grounder: Grounder,
    images: Sequence[GroundingImage],
    rejected: list[tuple[str, str]],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> OffsetByMasks:
    """Choose the offset of a model's tokens on validation images.

    The share at a shift is averaged with its neighbours', so that a lucky voxel is not taken; of equals the nearest to what was is.

    Args:
        grounder: of the model, as maps are to be made.
        images: with masks, all radiographs or all volumes.
        rejected: is added to.
        batch_size: images encoded at once.
        progress: called with how many images more are done.
    Raises:
        ValueError: fewer than ``FEWEST`` masks.
    """
    steps = np.arange(-REACH, REACH + STEP / 2, STEP)
    shifts = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1)  # (n, n, 2) rows and columns of the tower's grid
    hits: dict[str, list[NDArray[np.bool_]]] = {}
    was: tuple[float, ...] | None = None
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        for image, sample, maps in encoded(grounder, part, rejected):
            axes = len(sample.transform.native_shape)
            was = maps.offset or (0.0,) * axes
            for asked in image.asked:
                mask = None if asked.mask is None else asked.mask(sample)
                at = None if mask is None or not mask.any() else peak(maps.native(asked.query))
                if mask is None or at is None:
                    continue
                tower = np.zeros((*shifts.shape[:2], axes))
                tower[..., -2:] = shifts
                moved = np.asarray(at) + sample.transform.to_native(tower) - sample.transform.to_native(np.zeros(axes))
                hits.setdefault(grounder.queries[asked.query].name, []).append(_inside(mask, moved))
        progress(len(part))
    count = sum(map(len, hits.values()))
    if was is None or count < FEWEST:
        raise ValueError(f"an offset by masks needs {FEWEST} masks of findings, got {count}; give a manifest with masks or boxes")
    share = np.mean([np.mean(one, axis=0) for one in hits.values()], axis=0)  # (n, n)
    smooth = ndimage.uniform_filter(share, 3, mode="nearest").round(9)
    best = np.argwhere(smooth == smooth.max())
    row, column = best[np.linalg.norm(shifts[tuple(best.T)], axis=-1).argmin()]
    chosen = (*was[:-2], *(float(old + new) for old, new in zip(was[-2:], shifts[row, column], strict=True)))
    middle = len(steps) // 2
    return OffsetByMasks(chosen, float(share[middle, middle]), float(share[row, column]), count)


def _inside(mask: NDArray[np.bool_], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each of (..., n) points lies in a mask; outside the image it does not."""
    at = np.rint(points).astype(np.int64)
    within = np.logical_and.reduce([(at[..., axis] >= 0) & (at[..., axis] < size) for axis, size in enumerate(mask.shape)])
    at = np.clip(at, 0, np.array(mask.shape) - 1)
    return np.asarray(mask[tuple(np.moveaxis(at, -1, 0))] & within)
