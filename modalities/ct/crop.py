"""Where the body is, and the chest in it, without a network.

A box is (start, shape) over the (S, H, W) grid it was found on. Both boxes rest on the body's outline and on air inside it, never on a lung
mask: consolidated or drowned lung is as dense as muscle and would be cut off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

COARSE_MM = 4.0
"""The grid that outlines are found on."""
BODY_HU = -300.0
"""Between air and fat; a mattress is mostly below."""
AIR_HU = -500.0
LEAST_BODY = 0.02
"""A body covers at least this share of a scan's voxels; else there is none to crop to."""
LEAST_LUNG_MM2 = 2000.0
"""Air inside the body of an axial slice with lung in it, an apex included; bowel gas of one slice is rarely as large."""

Box = tuple[tuple[int, int, int], tuple[int, int, int]]


def body_box(voxels: NDArray[Any], spacing_mm: tuple[float, float, float], margin_mm: float = 8.0) -> Box:
    """The body's bounding box with a margin; the whole grid where no body stands out.

    Args:
        voxels: (S, H, W) HU, slices axial.
        spacing_mm: along (S, H, W).
    """
    body, steps = _body(voxels, spacing_mm)
    if body is None:
        return (0, 0, 0), _shape(voxels)
    return _box(body, steps, spacing_mm, (margin_mm,) * 3, _shape(voxels))


def thorax_box(voxels: NDArray[Any], spacing_mm: tuple[float, float, float], margin_mm: float = 8.0, margin_z_mm: float = 60.0) -> Box:
    """The body across, and along z the slices with lung air in them, ``margin_z_mm`` more on either side.

    The margin is wide on purpose: an effusion or a consolidation may leave no air in the lowest 5 cm. Without any air inside the body, the
    whole length is kept.
    """
    body, steps = _body(voxels, spacing_mm)
    if body is None:
        return (0, 0, 0), _shape(voxels)
    start, shape = _box(body, steps, spacing_mm, (margin_mm,) * 3, _shape(voxels))
    coarse = voxels[:: steps[0], :: steps[1], :: steps[2]]
    pixel_mm2 = steps[1] * spacing_mm[1] * steps[2] * spacing_mm[2]
    area = np.count_nonzero(body & (coarse < AIR_HU), axis=(1, 2)) * pixel_mm2
    lung = np.flatnonzero(area >= LEAST_LUNG_MM2)
    if not len(lung):
        return start, shape
    margin = int(np.ceil(margin_z_mm / spacing_mm[0]))
    low = max(start[0], int(lung[0]) * steps[0] - margin)
    high = min(start[0] + shape[0], int(lung[-1] + 1) * steps[0] + margin)
    return (low, start[1], start[2]), (high - low, shape[1], shape[2])


def _body(voxels: NDArray[Any], spacing_mm: tuple[float, float, float]) -> tuple[NDArray[np.bool_] | None, tuple[int, int, int]]:
    """The largest connected body on a coarse grid, its air included, table and blanket opened off; and the grid's steps."""
    from scipy import ndimage

    s, h, w = (max(1, round(COARSE_MM / step)) for step in spacing_mm)
    solid = _filled(np.asarray(voxels[::s, ::h, ::w] > BODY_HU))  # filled first: a chest wall is thinner than a table
    square = {"size": (1, 5, 5), "mode": "constant", "cval": 0}
    opened = ndimage.maximum_filter(ndimage.minimum_filter(solid.view(np.uint8), **square), **square)
    labels, count = ndimage.label(opened)
    if count == 0:
        return None, (s, h, w)
    sizes = np.bincount(labels.ravel())
    largest = int(sizes[1:].argmax()) + 1
    if sizes[largest] < LEAST_BODY * solid.size:
        return None, (s, h, w)
    return labels == largest, (s, h, w)


def _filled(dense: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Each slice with its holes: what is not dense and not joined to the slice's edge. As ``ndimage.binary_fill_holes`` of every slice."""
    from scipy import ndimage

    in_plane = ndimage.generate_binary_structure(3, 1)
    in_plane[[0, 2]] = False
    labels, count = ndimage.label(~dense, in_plane)
    edge = np.concatenate([labels[:, [0, -1]].ravel(), labels[:, :, [0, -1]].ravel()])
    outside = np.zeros(count + 1, dtype=bool)
    outside[edge] = True
    outside[0] = False  # label 0 is what is dense
    return ~outside[labels]


def _box(
    mask: NDArray[np.bool_],
    steps: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    margin_mm: tuple[float, ...],
    whole: tuple[int, int, int],
) -> Box:
    """Bounding box of a coarse mask on the fine grid."""
    start, shape = [], []
    for axis, (step, spacing, margin, n) in enumerate(zip(steps, spacing_mm, margin_mm, whole, strict=True)):
        seen = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        reach = int(np.ceil(margin / spacing))
        low, high = max(0, int(seen[0]) * step - reach), min(n, (int(seen[-1]) + 1) * step + reach)
        start.append(low)
        shape.append(high - low)
    return (start[0], start[1], start[2]), (shape[0], shape[1], shape[2])


def _shape(voxels: NDArray[Any]) -> tuple[int, int, int]:
    s, h, w = voxels.shape
    return s, h, w
