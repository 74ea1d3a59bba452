"""Masks of findings, from a manifest's mask files and boxes, on the grid of the image that they belong to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medvl.data.manifest import StudyImage
from medvl.types import ImageSample, UnreadableImageError


class MaskError(ValueError):
    """A mask that cannot be laid on its image; its study is rejected."""


def finding_mask(row: StudyImage, name: str, sample: ImageSample) -> NDArray[np.bool_] | None:
    """The mask of a finding that is present, from its mask file or boxes, on the image's own grid; None if there is none.

    Args:
        sample: the image as it was read, which knows its own grid.
    Raises:
        MaskError: a mask file that cannot be read, or that lies on another grid than the image.
    """
    if row.labels.get(name) != 1:
        return None
    shape = sample.transform.native_shape
    mask = np.zeros(shape, dtype=bool)
    if name in row.masks:
        mask = _volume_mask(row, name, sample) if len(shape) == 3 else _picture_mask(row, name, shape)
    for box in row.boxes if len(shape) == 2 else ():
        if box.finding == name:
            mask = mask | box.mask((shape[0], shape[1]))
    return mask if mask.any() else None


def masked_slices(mask: NDArray[np.bool_], sample: ImageSample) -> NDArray[np.bool_]:
    """(S,) which slices of a volume's tower grid cut a mask on its native grid: those whose thickness overlaps a native slice of it.

    False on padding; what lies outside the slices that the tower saw counts for none.
    """
    axis, count = sample.transform.axes[0], sample.pixels.shape[1]
    cut = np.asarray(mask.any(axis=tuple(a for a in range(3) if a != axis)))
    ends = np.zeros((count + 1, 3))
    ends[:, 0] = np.arange(count + 1) - 0.5
    edges = sample.transform.to_native(ends)[:, axis]
    low, high = np.minimum(edges[:-1], edges[1:]) + 1e-6, np.maximum(edges[:-1], edges[1:]) - 1e-6
    first, last = np.floor(low + 0.5).astype(int), np.floor(high + 0.5).astype(int)  # native slice i runs from i - 1/2 to i + 1/2
    inside = [bool(cut[max(a, 0) : max(b + 1, 0)].any()) for a, b in zip(first, last, strict=True)]
    return np.array(inside) & sample.valid.numpy()


def _picture_mask(row: StudyImage, name: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    from PIL import Image

    try:
        with Image.open(row.masks[name]) as picture:
            plain = picture.mode in ("1", "L", "P", "F") or picture.mode.startswith("I")  # of a palette the index counts
            mask = np.asarray(picture if plain else picture.convert("L")) != 0
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise MaskError(f"study {row.study_id}: the mask of {name} is no readable picture ({type(error).__name__})") from None
    if mask.shape != shape:
        raise MaskError(f"study {row.study_id}: the mask of {name} has {mask.shape} pixels, the image {shape}; masks are in native pixels")
    return mask


def _volume_mask(row: StudyImage, name: str, sample: ImageSample) -> NDArray[np.bool_]:
    from modalities.ct.mask import read_mask

    assert sample.affine is not None
    try:
        return read_mask(row.masks[name], sample.affine, sample.transform.native_shape)
    except UnreadableImageError as error:
        raise MaskError(f"study {row.study_id}: the mask of {name} cannot be used: {error}") from None
