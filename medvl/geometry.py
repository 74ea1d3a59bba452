"""Geometry as a record: how native pixels became tower pixels, and the way back; LPS to RAS, once.

Pixel coordinates are (row, column) with integers at pixel centres, so an H x W image covers [-0.5, H - 0.5] x [-0.5, W - 0.5].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM's patient axes (left, posterior, superior) to RAS; its own inverse. DICOM PS3.3 C.7.6.2.1.1."""


def lps_to_ras(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn a 4 x 4 affine whose world is LPS (DICOM) into one whose world is RAS (NIfTI), or back."""
    if affine.shape != (4, 4):
        raise ValueError(f"affine has shape {affine.shape}, expected (4, 4)")
    return LPS_TO_RAS @ affine


@dataclass(frozen=True)
class Letterbox:
    """Native (rows, cols) resized with its aspect kept to fit a size x size square, centred, padded.

    A native point p lies at ``(p + 0.5) * scale - 0.5 + offset`` in tower pixels, each axis with its own scale (they differ by the
    rounding of the resized shape) and offset.
    """

    native_shape: tuple[int, int]
    size: int

    def __post_init__(self) -> None:
        if min(*self.native_shape, self.size) < 1:
            raise ValueError(f"cannot letterbox an image of {self.native_shape} pixels to {self.size}")

    @property
    def resized_shape(self) -> tuple[int, int]:
        """Rows and columns of the image inside the square."""
        longest = max(self.native_shape)
        rows, cols = (max(1, round(n * self.size / longest)) for n in self.native_shape)
        return rows, cols

    @property
    def offset(self) -> tuple[int, int]:
        """Rows above and columns left of the image inside the square."""
        rows, cols = self.resized_shape
        return (self.size - rows) // 2, (self.size - cols) // 2

    @property
    def scale(self) -> tuple[float, float]:
        """Tower pixels per native pixel along rows and columns."""
        rows, cols = self.resized_shape
        return rows / self.native_shape[0], cols / self.native_shape[1]

    def apply(self, image: Tensor, fill: float = 0.0) -> Tensor:
        """(C, rows, cols) native to (C, size, size): anti-aliased bilinear resize, then padding with ``fill``."""
        if tuple(image.shape[-2:]) != self.native_shape:
            raise ValueError(f"image has {tuple(image.shape[-2:])} pixels, this letterbox was made for {self.native_shape}")
        resized = image
        if self.resized_shape != self.native_shape:
            resized = F.interpolate(image[None], size=self.resized_shape, mode="bilinear", antialias=True, align_corners=False)[0]
        (top, left), (rows, cols) = self.offset, self.resized_shape
        return F.pad(resized, (left, self.size - left - cols, top, self.size - top - rows), value=fill)

    def valid(self) -> Tensor:
        """(size, size) bool, True where the square shows the image."""
        inside = torch.zeros(self.size, self.size, dtype=torch.bool)
        (top, left), (rows, cols) = self.offset, self.resized_shape
        inside[top : top + rows, left : left + cols] = True
        return inside

    def to_tower(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 2) native (row, column) to tower pixels."""
        return (np.asarray(points, dtype=np.float64) + 0.5) * self.scale - 0.5 + self.offset

    def to_native(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 2) tower (row, column) to native pixels."""
        return (np.asarray(points, dtype=np.float64) + 0.5 - self.offset) / self.scale - 0.5

    def map_to_native(self, grid: Tensor) -> Tensor:
        """Lay scores of a (gh, gw) token grid over the whole square back on native pixels.

        Args:
            grid: (..., gh, gw), the grid that covers the square evenly; NaN marks tokens the tower did not see.
        Returns:
            (..., rows, cols) float32, bilinear between token centres; NaN where the tower did not look.
        """
        gh, gw = grid.shape[-2:]
        rows = _axis_weights(self.native_shape[0], self.scale[0], self.offset[0], self.size, gh).to(grid.device)
        cols = _axis_weights(self.native_shape[1], self.scale[1], self.offset[1], self.size, gw).to(grid.device)
        seen = torch.isfinite(grid)
        total = rows @ torch.where(seen, grid, 0.0).float() @ cols.T
        weight = rows @ seen.float() @ cols.T  # the share of each pixel's interpolation that rests on seen tokens
        return torch.where(weight > 1e-6, total / weight.clamp_min(1e-6), torch.nan)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record."""
        return asdict(self)


def _axis_weights(native: int, scale: float, offset: int, size: int, tokens: int) -> Tensor:
    """(native, tokens) bilinear weights: how much each token counts at each native pixel centre along one axis."""
    tower = (torch.arange(native, dtype=torch.float64) + 0.5) * scale + offset  # tower position, pixel edges at integers
    at = (tower * tokens / size - 0.5).clamp(0, tokens - 1)  # token position; outside the outer centres the edge holds
    low = at.floor().long().clamp(max=max(tokens - 2, 0))
    fraction = (at - low).float()
    weights = torch.zeros(native, tokens)
    index = torch.arange(native)
    weights[index, low] = 1 - fraction
    if tokens > 1:
        weights[index, low + 1] = fraction
    return weights
