"""Separable resampling of 2D and 3D grids along their own axes: linear, or anti-aliased where a grid gets coarser.

Letters: n input and m output samples of an axis, K taps. Output sample o lies at input index ``ratio * o + shift``. Volumes are made
slice by slice, so that only a few slices are in floating point at a time and the input may be a memory map of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Taps:
    """One axis: which input samples make an output sample, and with what weight."""

    index: Tensor  # (m, K) int64, within the input
    weight: Tensor  # (m, K) float32, rows sum to 1

    @classmethod
    def of(cls, n: int, m: int, ratio: float, shift: float, antialias: bool = True) -> Taps:
        """Taps of an axis; beyond the first and last centre the edge holds.

        Args:
            antialias: where ``ratio`` > 1 use a triangle as wide as the output's spacing (the filter of Pillow's and torch's anti-aliased
                bilinear resize) and not the two nearest samples. Taps outside the input are left out and the rest weighed up.
        """
        at = torch.arange(m, dtype=torch.float64) * ratio + shift
        if antialias and ratio > 1:
            index = (at - ratio).floor().long()[:, None] + torch.arange(int(np.ceil(2 * ratio)) + 2)
            weight = (1 - (index - at[:, None]).abs() / ratio).clamp_min(0) * ((index >= 0) & (index < n))
            outside = weight.sum(1) <= 0  # so far from the input that the edge alone is left
            weight[outside, 0], index[outside, 0] = 1, at[outside].round().long()
        else:
            low = at.clamp(0, n - 1).floor().clamp(max=max(n - 2, 0))
            fraction = at.clamp(0, n - 1) - low
            index = low.long()[:, None] + torch.arange(2)
            weight = torch.stack([1 - fraction, fraction], 1)
        weight = weight / weight.sum(1, keepdim=True)
        used = weight.any(0)
        return cls(index.clamp(0, n - 1)[:, used].contiguous(), weight[:, used].float().contiguous())

    @property
    def is_identity(self) -> bool:
        """Whether the output is the input."""
        return self.index.shape[1] == 1 and bool((self.index[:, 0] == torch.arange(len(self.index))).all())

    def matrix(self, n: int) -> Tensor:
        """(m, n) dense float32."""
        dense = torch.zeros(len(self.index), n)
        return dense.scatter_add_(1, self.index, self.weight)


def resample(
    values: NDArray[np.generic] | Tensor, shape: Sequence[int], ratio: Sequence[float], shift: Sequence[float], antialias: bool = True
) -> Tensor:
    """Resample a 2D or 3D array along its own axes.

    Args:
        values: (H, W) or (S, H, W) numbers of any type and stride; a memory map is read slice by slice.
        shape: of the output, as many axes.
        ratio: input samples per output sample of each axis, positive.
        shift: input index of each axis' first output sample.
        antialias: see :meth:`Taps.of`.
    Returns:
        float32 of ``shape``.
    Raises:
        ValueError: another number of axes than 2 or 3, or a ratio that is not positive.
    """
    if values.ndim not in (2, 3) or not len(shape) == len(ratio) == len(shift) == values.ndim:
        raise ValueError(f"cannot resample {tuple(values.shape)} to {tuple(shape)}: expected 2 or 3 axes, as many in ratio and shift")
    if min(ratio) <= 0:
        raise ValueError(f"ratios are {tuple(ratio)}, expected positive ones; turn reversed axes first")
    if values.ndim == 2:
        if antialias and _edges_meet(values.shape, shape, ratio, shift):  # torch's own kernel: same filter, faster
            image = _as_float(values)[None, None]
            return F.interpolate(image, size=tuple(shape), mode="bilinear", antialias=True, align_corners=False)[0, 0]
        return _Plane.of(values.shape, shape, ratio, shift, antialias)(_as_float(values))
    slices = Taps.of(values.shape[0], shape[0], ratio[0], shift[0], antialias)
    plane = _Plane.of(values.shape[1:], shape[1:], ratio[1:], shift[1:], antialias)
    out = torch.empty(tuple(shape), dtype=torch.float32)
    blend_first = shape[0] <= values.shape[0]  # the plane is resampled once per slice of the shorter stack
    ready: dict[int, Tensor] = {}  # input slices that the next output slice may use again
    for o in range(shape[0]):
        weights = {int(i): float(w) for i, w in zip(slices.index[o], slices.weight[o], strict=True) if w > 0}
        ready = {i: ready[i] if i in ready else _as_float(values[i]) if blend_first else plane(_as_float(values[i])) for i in weights}
        (first, weight), *others = weights.items()
        blended = ready[first] * weight
        for i, weight in others:
            blended.add_(ready[i], alpha=weight)
        out[o] = plane(blended) if blend_first else blended
    return out


@dataclass(frozen=True)
class _Plane:
    """Rows by taps, columns by one matrix product: gathers along the last axis are slow."""

    rows: Taps
    columns: Tensor | None  # (n, m)

    @classmethod
    def of(cls, before: Sequence[int], after: Sequence[int], ratio: Sequence[float], shift: Sequence[float], antialias: bool) -> _Plane:
        rows, columns = (Taps.of(before[i], after[i], ratio[i], shift[i], antialias) for i in (0, 1))
        return cls(rows, None if columns.is_identity and before[1] == after[1] else columns.matrix(before[1]).T.contiguous())

    def __call__(self, image: Tensor) -> Tensor:
        """(H, W) to (h, w)."""
        if not self.rows.is_identity or len(self.rows.index) != image.shape[0]:
            out = image.index_select(0, self.rows.index[:, 0]) * self.rows.weight[:, :1]
            for k in range(1, self.rows.index.shape[1]):
                out.addcmul_(image.index_select(0, self.rows.index[:, k]), self.rows.weight[:, k : k + 1])
            image = out
        return image if self.columns is None else image @ self.columns


def _as_float(values: NDArray[np.generic] | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.float()
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _edges_meet(before: Sequence[int], after: Sequence[int], ratio: Sequence[float], shift: Sequence[float]) -> bool:
    """Whether input and output cover the same extent, as torch's resize takes it."""
    return all(
        abs(r - n / m) < 1e-12 * max(n, m) and abs(s - (0.5 * r - 0.5)) < 1e-9
        for n, m, r, s in zip(before, after, ratio, shift, strict=True)
    )
