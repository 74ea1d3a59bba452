"""From a file's own grid to a tower's and back: every turn, resampling, crop and padding as a recorded step.

All steps run along axes (an axis may be renamed or reversed), so a whole record is, per tower axis, which native axis it runs along, how
many native voxels a tower voxel is (negative: reversed) and where tower index 0 lies. Volumes that are oblique in the world stay on their
own axes; the world is in the affine alone.

Shapes: n axes, 2 or 3; C channels; a token grid covers the tower's grid evenly.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medvl.geometry.resampling import as_float, resample

Kind = Literal["reorient", "resample", "crop", "pad"]


@dataclass(frozen=True)
class Step:
    """One change of grid. Output index o along axis k lies at input index ``ratio[k] * o + shift[k]`` along input axis ``axes[k]``."""

    kind: Kind
    shape: tuple[int, ...]  # of the output
    axes: tuple[int, ...]
    ratio: tuple[float, ...]
    shift: tuple[float, ...]


@dataclass(frozen=True)
class GridTransform:
    """What was done to a native grid, in order. Begin with ``GridTransform(native_shape)`` and add steps; each returns a new record.

    Raises:
        ValueError: no 2 or 3 axes, an empty grid, or a step that does not fit or shows nothing of the image.
    """

    native_shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if len(self.native_shape) not in (2, 3) or min(self.native_shape) < 1:
            raise ValueError(f"a grid has 2 or 3 axes of at least 1, got {self.native_shape}")
        for before, step in zip((self.native_shape, *(s.shape for s in self.steps)), self.steps, strict=False):
            n = len(before)
            if not n == len(step.shape) == len(step.axes) == len(step.ratio) == len(step.shift) or sorted(step.axes) != list(range(n)):
                raise ValueError(f"{step.kind}: does not fit a grid of {n} axes")
            if min(step.shape) < 1 or 0 in step.ratio:
                raise ValueError(f"{step.kind}: leaves a grid of {step.shape}")
        if any(low >= high for low, high in self.seen):
            raise ValueError(f"{self.steps[-1].kind}: nothing of the {self.native_shape} image is left")

    # --- adding steps --------------------------------------------------------------------------------------------------------------

    def reorient(self, axes: Sequence[int], flipped: Sequence[bool]) -> GridTransform:
        """Axis k of the new grid runs along the present axis ``axes[k]``, backwards where ``flipped[k]``."""
        shape = tuple(self.shape[a] for a in axes)
        return self._with(
            "reorient",
            shape,
            ratio=[-1.0 if f else 1.0 for f in flipped],
            shift=[n - 1.0 if f else 0.0 for n, f in zip(shape, flipped, strict=True)],
            axes=axes,
        )

    def resize(self, shape: Sequence[int]) -> GridTransform:
        """The same extent in another number of voxels: edges stay where they were."""
        ratio = [n / m for n, m in zip(self.shape, shape, strict=True)]
        return self._with("resample", shape, ratio, [0.5 * r - 0.5 for r in ratio])

    def resample(self, ratio: Sequence[float], shape: Sequence[int] | None = None) -> GridTransform:
        """Another spacing, ``ratio`` present voxels each; the first voxel's centre stays where it was, as in MONAI and ITK.

        Args:
            shape: of the new grid; None takes the number of spacings that fit between the outer edges, rounded.
        """
        count = [max(1, round(n / r)) for n, r in zip(self.shape, ratio, strict=True)] if shape is None else shape
        return self._with("resample", count, ratio, [0.0] * len(ratio))

    def crop(self, start: Sequence[int], shape: Sequence[int]) -> GridTransform:
        """The part of ``shape`` that begins at ``start``.

        Raises:
            ValueError: a part that leaves the grid; pad first.
        """
        for a, m, n in zip(start, shape, self.shape, strict=True):
            if a < 0 or m < 1 or a + m > n:
                raise ValueError(f"crop of {tuple(shape)} at {tuple(start)} leaves the grid of {self.shape}")
        return self._with("crop", shape, [1.0] * len(shape), [float(a) for a in start])

    def pad(self, before: Sequence[int], after: Sequence[int]) -> GridTransform:
        """Voxels added before and after each axis; they show nothing.

        Raises:
            ValueError: a negative number.
        """
        if min(*before, *after) < 0:
            raise ValueError(f"padding {tuple(before)} and {tuple(after)}: expected no negative number; crop instead")
        shape = [n + b + a for n, b, a in zip(self.shape, before, after, strict=True)]
        return self._with("pad", shape, [1.0] * len(shape), [-float(b) for b in before])

    def fit(self, shape: Sequence[int]) -> GridTransform:
        """Centre crop where the grid is larger than ``shape``, centred padding where it is smaller."""
        keep = [min(n, m) for n, m in zip(self.shape, shape, strict=True)]
        found = self
        if tuple(keep) != self.shape:
            found = found.crop([(n - k) // 2 for n, k in zip(self.shape, keep, strict=True)], keep)
        if tuple(keep) != tuple(shape):
            before = [(m - k) // 2 for m, k in zip(shape, keep, strict=True)]
            found = found.pad(before, [m - k - b for m, k, b in zip(shape, keep, before, strict=True)])
        return found

    def _with(
        self, kind: Kind, shape: Sequence[int], ratio: Sequence[float], shift: Sequence[float], axes: Sequence[int] | None = None
    ) -> GridTransform:
        order = tuple(range(len(self.shape))) if axes is None else tuple(axes)
        numbers = tuple(float(r) for r in ratio), tuple(float(s) for s in shift)
        return GridTransform(self.native_shape, (*self.steps, Step(kind, tuple(int(n) for n in shape), order, *numbers)))

    # --- the whole record ----------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tower's grid."""
        return self.steps[-1].shape if self.steps else self.native_shape

    @functools.cached_property
    def _composed(self) -> tuple[tuple[int, ...], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Per tower axis: native axis, ratio, shift, and the (low, high) edges of what is seen, in tower index coordinates."""
        n = len(self.native_shape)
        axes, ratio, shift = list(range(n)), np.ones(n), np.zeros(n)
        seen = np.array([[-0.5, size - 0.5] for size in self.native_shape])
        for step in self.steps:
            order, r, s = list(step.axes), np.array(step.ratio), np.array(step.shift)
            axes, shift, ratio = [axes[a] for a in order], ratio[order] * s + shift[order], ratio[order] * r
            seen = np.sort((seen[order] - s[:, None]) / r[:, None], axis=1)
            seen = np.clip(seen, -0.5, (np.array(step.shape) - 0.5)[:, None])
        return tuple(axes), ratio, shift, seen

    @property
    def axes(self) -> tuple[int, ...]:
        """Native axis of each tower axis."""
        return self._composed[0]

    @property
    def scale(self) -> tuple[float, ...]:
        """Tower voxels per native voxel, by tower axis; negative where reversed."""
        return tuple(float(1 / r) for r in self._composed[1])

    @property
    def seen(self) -> tuple[tuple[float, float], ...]:
        """(low, high) edges, in tower index coordinates, of the part of the tower's grid that shows the image."""
        return tuple((float(low), float(high)) for low, high in self._composed[3])

    def matrix(self) -> NDArray[np.float64]:
        """Square of n + 1: homogeneous tower index to native index, so ``affine @ transform.matrix()`` is the affine of the tower grid."""
        n = len(self.native_shape)
        axes, ratio, shift, _ = self._composed
        found = np.zeros((n + 1, n + 1))
        found[n, n] = 1
        for k, a in enumerate(axes):
            found[a, k], found[a, n] = ratio[k], shift[k]
        return found

    # --- points, boxes, arrays, maps -----------------------------------------------------------------------------------------------

    def to_native(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., n) tower index coordinates to native ones."""
        axes, ratio, shift, _ = self._composed
        found = np.empty_like(np.asarray(points, dtype=np.float64))
        found[..., list(axes)] = np.asarray(points, dtype=np.float64) * ratio + shift
        return found

    def to_tower(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., n) native index coordinates to tower ones."""
        axes, ratio, shift, _ = self._composed
        return (np.asarray(points, dtype=np.float64)[..., list(axes)] - shift) / ratio

    def box_to_native(self, box: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 2, n) lowest and highest corner, as edges (a box of voxel 3 alone is 2.5 to 3.5), tower to native."""
        return np.sort(self.to_native(box), axis=-2)

    def box_to_tower(self, box: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., 2, n) corners as edges, native to tower."""
        return np.sort(self.to_tower(box), axis=-2)

    def valid(self) -> Tensor:
        """(*shape) bool, True where the tower's grid shows the image."""
        inside = torch.ones((), dtype=torch.bool)
        for axis in range(len(self.shape)):
            inside = inside & self.valid_along(axis).view(-1, *[1] * (len(self.shape) - 1 - axis))
        return inside

    def valid_along(self, axis: int) -> Tensor:
        """(shape[axis],) bool, True where that slab of the tower's grid shows the image; :meth:`valid` is their product."""
        index, (low, high) = torch.arange(self.shape[axis]), self.seen[axis]
        return (index > low - 1e-6) & (index < high + 1e-6)

    def apply(self, image: Tensor | NDArray[Any], fill: float = 0.0, antialias: bool = True) -> Tensor:
        """(C, *native_shape) to (C, *shape) float32, every step in turn, padding with ``fill``.

        Args:
            image: of any number type and stride; an array may be a memory map.
            antialias: as :func:`medvl.geometry.resampling.resample` takes it.
        """
        if tuple(image.shape[1:]) != self.native_shape:
            raise ValueError(f"image has {tuple(image.shape[1:])} voxels, this record was made for {self.native_shape}")
        array = image.numpy() if isinstance(image, Tensor) else image  # strides may be negative there, so turning costs nothing
        if len(array) == 1:
            return self._apply(array[0], fill, antialias)[None]
        return torch.stack([self._apply(channel, fill, antialias) for channel in array])

    def _apply(self, values: NDArray[Any] | Tensor, fill: float, antialias: bool) -> Tensor:
        for step in self.steps:
            if step.kind == "reorient":
                turned = values.numpy() if isinstance(values, Tensor) else values
                values = turned.transpose(step.axes)[tuple(slice(None, None, -1 if r < 0 else 1) for r in step.ratio)]
            elif step.kind == "resample":
                values = resample(values, step.shape, step.ratio, step.shift, antialias)
            elif step.kind == "crop":
                values = values[tuple(slice(int(a), int(a) + m) for a, m in zip(step.shift, step.shape, strict=True))]
            else:
                before = [-int(s) for s in step.shift]
                ends = [(b, m - n - b) for b, m, n in zip(before, step.shape, values.shape, strict=True)]
                values = F.pad(as_float(values), [end for pair in reversed(ends) for end in pair], value=fill)
        return as_float(values)

    def map_to_native(self, grid: Tensor, extent: Sequence[int] | None = None, offset: Sequence[float] | None = None) -> Tensor:
        """Lay scores of a token grid over the whole tower grid back on native voxels.

        Args:
            grid: (..., *tokens) with n token axes in the order of the tower's; NaN marks tokens the tower did not see.
            extent: voxels that the tokens cover along each axis, where a batch was padded at the end to more than this image's ``shape``.
            offset: voxels of the tower's grid from the middle of a token's cell to where it looks, along each axis; None: there.
        Returns:
            (..., *native_shape) float32, linear between token centres; NaN where the tower did not look.
        """
        n, axes = len(self.native_shape), self.axes
        known = torch.isfinite(grid)
        held = None if offset is None else known_box(known.flatten(0, grid.ndim - n - 1).any(0) if grid.ndim > n else known)
        weights = [along.to(grid.device) for along in self.token_weights(grid.shape[grid.ndim - n :], extent, offset, held)]

        def laid(values: Tensor) -> Tensor:
            for k, along in enumerate(weights):
                values = _contract(along, values, values.ndim - n + k)
            return values.permute(*range(values.ndim - n), *(values.ndim - n + axes.index(a) for a in range(n)))

        if known.all():  # then weights sum to 1 wherever the tower looked
            found = laid(grid.float())
            for k, along in enumerate(weights):
                unseen = torch.nonzero(along.sum(1) == 0).flatten()
                if len(unseen):
                    found.index_fill_(found.ndim - n + axes[k], unseen, torch.nan)
            return found
        total, weight = laid(torch.where(known, grid, 0.0).float()), laid(known.float())
        return torch.where(weight > 1e-6, total / weight.clamp_min(1e-6), torch.nan)

    def token_weights(
        self,
        tokens: Sequence[int],
        extent: Sequence[int] | None = None,
        offset: Sequence[float] | None = None,
        held: Sequence[tuple[int, int]] | None = None,
    ) -> list[Tensor]:
        """What a map is made of: per tower axis (native, tokens) how much each token counts at each native index; 0 outside what was seen.

        Args:
            tokens: of the grid, by the tower's axes.
            extent: as in :meth:`map_to_native`, as is ``offset``.
            held: first and last token along each axis whose value holds beyond it; None: those at the ends.
        """
        axes, ratio, shift, seen = self._composed
        found = []
        for k, (axis, count) in enumerate(zip(axes, tokens, strict=True)):
            at = (np.arange(self.native_shape[axis]) - shift[k]) / ratio[k]
            size = self.shape[k] if extent is None else extent[k]
            ends = (0, count - 1) if held is None else held[k]
            found.append(_token_weights(at, size, count, seen[k], 0.0 if offset is None else offset[k], ends))
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record, native shape and steps."""
        steps = [
            {"kind": s.kind, "shape": list(s.shape), "axes": list(s.axes), "ratio": list(s.ratio), "shift": list(s.shift)}
            for s in self.steps
        ]
        return {"native_shape": list(self.native_shape), "steps": steps}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> GridTransform:
        """The record that :meth:`to_dict` made."""
        steps = tuple(Step(s["kind"], tuple(s["shape"]), tuple(s["axes"]), tuple(s["ratio"]), tuple(s["shift"])) for s in record["steps"])
        return cls(tuple(record["native_shape"]), steps)


def letterbox(native_shape: Sequence[int], size: int) -> GridTransform:
    """Native (rows, columns) resized with their aspect kept to fit a size x size square, centred, padded.

    Each axis has its own scale; they differ by the rounding of the resized shape.
    """
    if min(*native_shape, size) < 1:
        raise ValueError(f"cannot letterbox an image of {tuple(native_shape)} pixels to {size}")
    longest = max(native_shape)
    resized = [max(1, round(n * size / longest)) for n in native_shape]
    return GridTransform(tuple(native_shape)).resize(resized).fit([size, size])


def _contract(along: Tensor, x: Tensor, axis: int) -> Tensor:
    """(native, tokens) against ``axis`` of x, which becomes native."""
    return torch.tensordot(x, along, dims=([axis], [1])).movedim(-1, axis)


def known_box(known: Tensor) -> list[tuple[int, int]] | None:
    """First and last known token along each axis where the known ones are a box, as letterboxes leave them; None where they are not."""
    ends: list[tuple[int, int]] = []
    for axis in range(known.ndim):
        along = torch.nonzero(known.any(dim=tuple(k for k in range(known.ndim) if k != axis)) if known.ndim > 1 else known).flatten()
        if not len(along):
            return None
        ends.append((int(along[0]), int(along[-1])))
    whole = known[tuple(slice(first, last + 1) for first, last in ends)]
    return ends if bool(whole.all()) else None


def _token_weights(
    at: NDArray[np.float64], size: int, tokens: int, seen: NDArray[np.float64], offset: float, ends: tuple[int, int]
) -> Tensor:
    """(native, tokens): how much each token counts at native positions ``at`` (tower index coordinates); rows of 0 outside ``seen``."""
    inside = torch.from_numpy((at > seen[0] - 1e-6) & (at < seen[1] + 1e-6))
    place = torch.from_numpy((at - offset + 0.5) * tokens / size - 0.5).clamp(*ends)  # outside the outer centres the edge holds
    low = place.floor().long().clamp(max=max(tokens - 2, 0))
    fraction = (place - low).float()
    weights = torch.zeros(len(at), tokens)
    index = torch.arange(len(at))
    weights[index, low] = 1 - fraction
    if tokens > 1:
        weights[index, low + 1] = fraction
    return weights * inside[:, None]
