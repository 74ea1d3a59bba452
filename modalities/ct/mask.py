"""Masks of findings in a CT volume, from NIfTI, MHA or NRRD, on the volume's own voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvl.types import UnreadableImageError

SAME_PLACE_MM = 0.05


def read_mask(path: Path, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Voxels that are not 0, turned to the axes of the volume that the mask belongs to.

    Args:
        affine: of the volume, (s, h, w) to RAS mm.
        shape: of the volume, (S, H, W).
    Returns:
        (S, H, W) bool.
    Raises:
        UnreadableImageError: no volume in the file, or one that lies on other voxels.
    """
    from nibabel.orientations import aff2axcodes, axcodes2ornt, io_orientation, ornt_transform

    from modalities.ct.read import read_ct

    mask = read_ct(path, rescale_policy="never")
    turn = ornt_transform(io_orientation(mask.affine), axcodes2ornt(aff2axcodes(affine)))  # mask axis -> (volume axis, direction)
    order = [int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in range(3)]
    reverse = tuple(slice(None, None, -1 if turn[axis, 1] < 0 else 1) for axis in order)
    voxels = mask.voxels.transpose(order)[reverse]
    moved = mask.affine[:, [*order, 3]].copy()
    for axis, cut in enumerate(reverse):
        if cut.step == -1:
            moved[:3, 3] += moved[:3, axis] * (voxels.shape[axis] - 1)
            moved[:3, axis] *= -1
    corners = np.array([[0, 0, 0, 1], [n - 1 for n in shape] + [1]], dtype=float).T
    if voxels.shape != tuple(shape) or np.abs(moved @ corners - affine @ corners).max() > SAME_PLACE_MM:
        raise UnreadableImageError(
            f"{path}: a mask of {voxels.shape} voxels that do not lie on the volume's {tuple(shape)}; expected the same grid"
        )
    return np.asarray(voxels != 0)
