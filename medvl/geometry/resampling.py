"""Separable resampling of 2D and 3D grids along their own axes: linear, or anti-aliased where a grid gets coarser.

Letters: n input and m output samples of an axis, K taps. Output sample o lies at input index ``ratio * o + shift``. Volumes are made
slice by slice, so that only a few slices are in floating point at a time and the input may be a memory map of integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

BLOCK = 40
"""Output columns that are made at once."""


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
    """Resample a 2D or 3D array along its own axes; no gradient goes through it.

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
            image = as_float(values)[None, None]
            return F.interpolate(image, size=tuple(shape), mode="bilinear", antialias=True, align_corners=False)[0, 0]
        return _volume(values[None], (1, *shape), (1.0, *ratio), (0.0, *shift), antialias)[0]
    return _volume(values, shape, ratio, shift, antialias)


def _volume(
    values: NDArray[np.generic] | Tensor, shape: Sequence[int], ratio: Sequence[float], shift: Sequence[float], antialias: bool
) -> Tensor:
    """Slice by slice, each in scratch memory that serves them all: fresh pages cost more than the arithmetic on them."""
    mirrored = isinstance(values, np.ndarray) and values.strides[2] < 0  # rows that run backwards are turned once there are fewer
    straight = values[:, :, ::-1] if mirrored else values
    slices, rows, columns = (Taps.of(n, m, r, s, antialias) for n, m, r, s in zip(values.shape, shape, ratio, shift, strict=True))
    finish = _Columns(columns, values.shape[2], mirrored)
    out = torch.empty(tuple(shape), dtype=torch.float32)
    if len(slices.index) <= len(values):
        _blend_and_finish(straight, slices, rows, finish, out)
    else:
        _finish_and_blend(straight, slices, rows, finish, out)
    return out


def _blend_and_finish(values: NDArray[np.generic] | Tensor, slices: Taps, rows: Taps, finish: _Columns, out: Tensor) -> None:
    """Of each output slice, its rows from rows of several input slices in one step, then its columns."""
    _, h, w = values.shape
    count = slices.index.shape[1]
    held = torch.empty(count, h, w)  # the input slices of one output slice, as floats
    place: dict[int, int] = {}  # input slice to where it is held
    for result, index, weights in zip(out, slices.index, slices.weight, strict=True):
        indices, weights = index[weights > 0].tolist(), weights[weights > 0]
        place = {i: at for i, at in place.items() if i in indices}
        free = [at for at in range(count) if at not in place.values()]
        for i in sorted(set(indices) - set(place)):
            place[i] = free.pop()
            _float_into(held[place[i]], values[i])
        taps = torch.tensor([place[i] for i in indices])[:, None] * h + rows.index[:, None]  # (rows, slice taps, row taps)
        each = weights[:, None] * rows.weight[:, None]
        picked = F.embedding_bag(taps.flatten(1), held.view(-1, w), mode="sum", per_sample_weights=each.flatten(1))
        finish(picked, result)


def _finish_and_blend(values: NDArray[np.generic] | Tensor, slices: Taps, rows: Taps, finish: _Columns, out: Tensor) -> None:
    """Of each input slice its plane, once, then the output slices between: for a stack that gets longer."""
    plain = torch.empty(tuple(values.shape[1:]))
    ready: dict[int, Tensor] = {}
    for result, index, weight in zip(out, slices.index, slices.weight, strict=True):
        indices, weights = index[weight > 0].tolist(), weight[weight > 0].tolist()
        ready = {i: plane for i, plane in ready.items() if i in indices}
        for i in set(indices) - set(ready):
            picked = F.embedding_bag(rows.index, _float_into(plain, values[i]), mode="sum", per_sample_weights=rows.weight)
            ready[i] = finish(picked, torch.empty_like(result))
        torch.mul(ready[indices[0]], weights[0], out=result)
        for i, part in zip(indices[1:], weights[1:], strict=True):
            result.add_(ready[i], alpha=part)


class _Columns:
    """The last axis, by one small matrix product for each block of output columns, since these need few input ones."""

    def __init__(self, taps: Taps, n: int, mirrored: bool) -> None:
        self.mirrored = mirrored
        self.blocks = None if taps.is_identity and len(taps.index) == n else _blocks(taps, n)

    def __call__(self, image: Tensor, out: Tensor) -> Tensor:
        """(h, W) to ``out`` (h, w)."""
        if self.mirrored:
            image = torch.from_numpy(image.numpy()[:, ::-1].copy())
        if self.blocks is None:
            return out.copy_(image)
        for (low, high), (start, end), matrix in self.blocks:
            torch.mm(image[:, low:high], matrix, out=out[:, start:end])
        return out


Block = tuple[tuple[int, int], tuple[int, int], Tensor]


def _blocks(taps: Taps, n: int) -> list[Block]:
    """For each BLOCK output samples: the input samples that they need, which ones they are, and (inputs, outputs) weights."""
    found: list[Block] = []
    dense = taps.matrix(n).T
    for start in range(0, len(taps.index), BLOCK):
        part = taps.index[start : start + BLOCK]
        low, high, end = int(part.min()), int(part.max()) + 1, start + len(part)
        found.append(((low, high), (start, end), dense[low:high, start:end].contiguous()))
    return found


def as_float(values: NDArray[Any] | Tensor) -> Tensor:
    """``values`` as a float32 tensor, whatever their type and strides."""
    if isinstance(values, Tensor):
        return values.float()
    whole = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(whole.copy() if min(whole.strides) < 0 else whole)  # an axis of one may keep a stride that torch refuses


def _float_into(buffer: Tensor, values: NDArray[np.generic] | Tensor) -> Tensor:
    """``values`` in the float32 ``buffer``."""
    if isinstance(values, Tensor):
        return buffer.copy_(values)
    np.copyto(buffer.numpy(), values, casting="unsafe")
    return buffer


def _edges_meet(before: Sequence[int], after: Sequence[int], ratio: Sequence[float], shift: Sequence[float]) -> bool:
    """Whether input and output cover the same extent, as torch's resize takes it."""
    return all(
        abs(r - n / m) < 1e-12 * max(n, m) and abs(s - (0.5 * r - 0.5)) < 1e-9
        for n, m, r, s in zip(before, after, ratio, shift, strict=True)
    )
