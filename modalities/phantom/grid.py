"""The voxel grid a phantom is drawn on, and the two ways of drawing: partial-volume coverage and splatting.

Patient frame in mm, origin at the grid centre: x grows to the patient's left, y to posterior, z downwards (inferior). Arrays are
(S, H, W) as everywhere in medvl: slices from superior to inferior, rows from anterior to posterior, columns from right to left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Box = tuple[slice, slice, slice]

FIELD_OF_VIEW_MM = 352.0
"""Height and width of the grid: what a collimated detector of 35 x 43 cm sees of a chest magnified 1.07 to 1.2 times."""
DEPTH_MM = 307.2
"""Anterior to posterior extent; holds an obese chest (soft tissue included)."""


@dataclass(frozen=True)
class Grid:
    """``size`` slices and columns and half as many rows (depth), each axis with its own spacing."""

    size: int

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 512 or self.size % 16:
            raise ValueError(f"phantom size is {self.size} voxels, expected a multiple of 16 from 32 to 512; try 128")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, H, W)."""
        return self.size, self.size // 2, self.size

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along (S, H, W)."""
        return FIELD_OF_VIEW_MM / self.size, DEPTH_MM / (self.size // 2), FIELD_OF_VIEW_MM / self.size

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel."""
        return float(np.prod(self.spacing_mm)) / 1000.0

    def axes_mm(self) -> tuple[Float, Float, Float]:
        """Voxel centres z (S, 1, 1), y (1, H, 1) and x (1, 1, W), ready to broadcast."""
        z, y, x = (
            ((np.arange(n, dtype=np.float64) + 0.5 - n / 2) * step).astype(np.float32)
            for n, step in zip(self.shape, self.spacing_mm, strict=True)
        )
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def affine(self) -> NDArray[np.float64]:
        """4 x 4, voxel index (s, h, w) to RAS mm: s runs to inferior, h to posterior, w to the patient's left."""
        (dz, dy, dx), (s, h, w) = self.spacing_mm, self.shape
        affine = np.zeros((4, 4))
        affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = -dz, -dy, -dx, 1.0
        affine[:3, 3] = (w - 1) / 2 * dx, (h - 1) / 2 * dy, (s - 1) / 2 * dz
        return affine

    def box(
        self, low_mm: NDArray[np.float64] | tuple[float, float, float], high_mm: NDArray[np.float64] | tuple[float, float, float]
    ) -> Box:
        """Slices of the voxels between two corners (z, y, x) in mm, clipped to the grid and never empty."""
        slices = []
        for low, high, n, step in zip(low_mm, high_mm, self.shape, self.spacing_mm, strict=True):
            first = min(max(int(np.floor(low / step + n / 2)), 0), n - 1)
            last = min(max(int(np.ceil(high / step + n / 2)), first + 1), n)
            slices.append(slice(first, last))
        return slices[0], slices[1], slices[2]


def axis_box(axis: Float, box: Box) -> Box:
    """The part of ``box`` that cuts one of :meth:`Grid.axes_mm`, whose other two dimensions are 1."""
    whole = slice(None)
    along = [cut if n > 1 else whole for cut, n in zip(box, axis.shape, strict=True)]
    return along[0], along[1], along[2]


def cover(signed_mm: Float, width_mm: float) -> Float:
    """Partial volume of a shape from its signed distance (positive inside): a ramp of ``width_mm`` across the border, 0 to 1."""
    ramp = signed_mm * np.float32(1.0 / width_mm)
    ramp += np.float32(0.5)
    return np.clip(ramp, 0.0, 1.0, out=ramp)


def smoothstep(value: Float) -> Float:
    """3 v^2 - 2 v^3 of the value clipped to 0..1."""
    v = np.clip(value, 0.0, 1.0)
    return np.asarray(v * v * (3.0 - 2.0 * v), dtype=np.float32)


def blend(hu: Float, coverage: Float | float, target: Float | float) -> None:
    """Replace, in place, the covered share of every voxel by tissue of ``target`` HU."""
    hu += coverage * (target - hu)


def splat(grid: Grid, points_mm: NDArray[np.float64], volume_mm3: NDArray[np.float64]) -> tuple[Box, Float]:
    """Share of each voxel that is filled by many small bits of matter; points closer than a voxel make it an exact partial volume.

    Args:
        grid: where to.
        points_mm: (N, 3) as (z, y, x); points outside the grid are dropped.
        volume_mm3: (N,) volume of each bit.
    Returns:
        the box that holds them and its (s, h, w) float32 shares, at most 1.
    """
    spacing, shape = np.array(grid.spacing_mm), np.array(grid.shape)
    index = np.floor(points_mm / spacing + shape / 2).astype(np.int64)
    inside = ((index >= 0) & (index < shape)).all(axis=1)
    if not inside.any():
        return (slice(0, 1), slice(0, 1), slice(0, 1)), np.zeros((1, 1, 1), dtype=np.float32)
    index, volume = index[inside], volume_mm3[inside] / float(np.prod(spacing))
    first, last = index.min(axis=0), index.max(axis=0) + 1
    dims = last - first
    index -= first
    flat = (index[:, 0] * dims[1] + index[:, 1]) * dims[2] + index[:, 2]
    filled = np.bincount(flat, weights=volume, minlength=int(dims.prod()))
    box = tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
    return (box[0], box[1], box[2]), np.minimum(filled, 1.0).astype(np.float32).reshape(dims)


def tubes(
    start: NDArray[np.float64], end: NDArray[np.float64], radius_mm: NDArray[np.float64], step_mm: float = 0.9, rings: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points and volumes that fill straight cylinders, for :func:`splat`.

    Args:
        start: (N, 3) in mm; ``end`` likewise.
        radius_mm: (N,).
        step_mm: distance of points along the longest cylinder; shorter ones get as many points, closer together.
        rings: 0 puts all matter on the axis; k adds k rings of 6 k points across the section.
    Returns:
        points (M, 3) and volumes (M,).
    """
    along = end - start
    length = np.linalg.norm(along, axis=1)
    count = max(2, int(np.ceil(float(length.max(initial=1.0)) / step_mm)))
    at = (np.arange(count) + 0.5) / count
    centre = start[:, None] + along[:, None] * at[None, :, None]  # (N, count, 3)
    section = np.pi * radius_mm**2 * length
    if rings == 0:
        return centre.reshape(-1, 3), np.repeat(section / count, count)
    axis = along / np.maximum(length, 1e-6)[:, None]
    helper = np.where(np.abs(axis[:, :1]) < 0.7, np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 1.0, 0.0]]))
    e1 = np.cross(axis, helper)
    e1 /= np.linalg.norm(e1, axis=1, keepdims=True)
    e2 = np.cross(axis, e1)
    disc = [(0.0, 0.0)]
    for ring in range(1, rings + 1):
        angle = np.arange(6 * ring) * (2 * np.pi / (6 * ring))
        spread = ring / (rings + 0.5)
        disc += list(zip((spread * np.cos(angle)).tolist(), (spread * np.sin(angle)).tolist(), strict=True))
    u, v = np.array(disc).T
    across = radius_mm[:, None, None] * (u[None, :, None] * e1[:, None] + v[None, :, None] * e2[:, None])  # (N, disc, 3)
    points = (centre[:, :, None] + across[:, None, :]).reshape(-1, 3)
    return points, np.repeat(section / (count * len(u)), count * len(u))


def polyline(points_mm: NDArray[np.float64], radius_mm: float, rings: int = 1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """:func:`tubes` along a path of (N, 3) points."""
    n = len(points_mm) - 1
    return tubes(points_mm[:-1], points_mm[1:], np.full(n, radius_mm), step_mm=max(0.9, 0.3 * radius_mm), rings=rings)


def spline(knots_mm: NDArray[np.float64], step_mm: float = 4.0) -> NDArray[np.float64]:
    """Points every ``step_mm`` or so on a smooth curve (Catmull-Rom) through (N, 3) knots."""
    k = np.concatenate([2 * knots_mm[:1] - knots_mm[1:2], knots_mm, 2 * knots_mm[-1:] - knots_mm[-2:-1]])
    pieces = []
    for i in range(1, len(k) - 2):
        n = max(2, int(np.ceil(np.linalg.norm(k[i + 1] - k[i]) / step_mm)))
        t = (np.arange(n) / n)[:, None]
        a = 2 * k[i]
        b = k[i + 1] - k[i - 1]
        c = 2 * k[i - 1] - 5 * k[i] + 4 * k[i + 1] - k[i + 2]
        d = -k[i - 1] + 3 * k[i] - 3 * k[i + 1] + k[i + 2]
        pieces.append(0.5 * (a + b * t + c * t**2 + d * t**3))
    return np.concatenate([*pieces, knots_mm[-1:]])


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], cells: tuple[int, int, int]) -> Float:
    """(S, H, W) noise of mean 0 and variance about 1 that varies over ``cells`` cells per axis (linear between random nodes)."""
    nodes = rng.standard_normal([c + 1 for c in cells]).astype(np.float32)
    wz, wy, wx = (_linear_weights(n, c) for n, c in zip(shape, cells, strict=True))
    rows = np.matmul(wy[None], nodes @ wx.T)  # (cz + 1, H, W)
    out = wz @ rows.reshape(cells[0] + 1, -1)
    return np.asarray(out.reshape(shape) * np.float32(1.84), dtype=np.float32)  # (2/3)^-1.5: the variance that linear interpolation loses


def _linear_weights(n: int, cells: int) -> Float:
    """(n, cells + 1) weights of linear interpolation from nodes spread evenly over n voxels."""
    at = (np.arange(n) + 0.5) * (cells / n)
    low = np.minimum(at.astype(np.int64), cells - 1)
    weights = np.zeros((n, cells + 1), dtype=np.float32)
    weights[np.arange(n), low] = 1 - (at - low)
    weights[np.arange(n), low + 1] = at - low
    return weights
