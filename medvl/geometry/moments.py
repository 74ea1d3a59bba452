"""Means and variances of a map over regions of native pixels, without the map: exact sums on the token grid that it is made of.

A map is linear in its tokens (:meth:`medvl.geometry.GridTransform.map_to_native`): M_p = sum_n w_pn g_n at pixel p, w a product of
one weight per axis, and along an axis a pixel lies between two neighbouring tokens. So over any region R

    sum_{p in R} M_p   = sum_n c_n g_n,                   c_n  = sum_{p in R} w_pn
    sum_{p in R} M_p^2 = sum_d sum_n q_dn g_n g_{n+d},    q_dn = sum_{p in R} w_pn w_p,n+d,    d in {-1, 0, 1}^axes

and for a box c and q are products of one vector per axis. The variance is quadratic in the tokens: taking that of the tokens themselves
would be another number, too large, for between tokens the map is smoother than they are.

Shapes: Q maps, R regions, n axes (2 or 3). Sums are in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvl.geometry.grids import GridTransform, known_box

REGIONS_AT_ONCE = 256


@dataclass(frozen=True)
class Moments:
    """Of Q maps over R regions; pixels where a map is NaN do not count."""

    count: Tensor  # (R,) float64, pixels
    total: Tensor  # (Q, R) float64, sum of the map
    square: Tensor  # (Q, R) float64, sum of its square

    @property
    def mean(self) -> Tensor:
        """(Q, R), NaN over no pixel."""
        return self.total / self.count.where(self.count > 0, torch.nan)

    @property
    def variance(self) -> Tensor:
        """(Q, R), of the pixels as they are (divided by their number, not by one less), NaN over no pixel."""
        mean = self.mean
        return (self.square / self.count.where(self.count > 0, torch.nan) - mean**2).clamp_min(0.0)

    def less(self, other: Moments) -> Moments:
        """Over what is in these regions and not in the others, which lie within them."""
        return Moments(self.count - other.count, self.total - other.total, self.square - other.square)


class GridMoments:
    """Sums over regions of the maps that one image's token grids would be laid out to.

    Args:
        transform: of the image.
        tokens: of the grid, by the tower's axes.
        extent: voxels that the tokens cover, as :meth:`GridTransform.map_to_native` takes it, and ``offset`` likewise.
        known: (*tokens) bool, False on tokens that are NaN in every map; None: all are known.
    Raises:
        ValueError: another number of axes than the image has.
    """

    def __init__(
        self,
        transform: GridTransform,
        tokens: Sequence[int],
        extent: Sequence[int] | None = None,
        known: Tensor | None = None,
        offset: Sequence[float] | None = None,
    ) -> None:
        if len(tokens) != len(transform.native_shape):
            raise ValueError(f"a grid of {tuple(tokens)} tokens for an image of {transform.native_shape}: expected as many axes")
        self.transform, self.tokens = transform, tuple(tokens)
        self.known = torch.ones(self.tokens, dtype=torch.bool) if known is None else known.cpu()
        held = None if offset is None else known_box(self.known)
        weights = [one.double() for one in transform.token_weights(tokens, extent, offset, held)]
        along = [self.known.any(dim=tuple(a for a in range(len(tokens)) if a != k)) for k in range(len(tokens))]
        separable = bool((self.known == _product(along)).all())
        self._share: NDArray[np.float64] | None = None
        if separable:  # the known tokens are a box of rows and columns, so weights can be brought to 1 axis by axis
            weights = [_normalised(one * k) for one, k in zip(weights, along, strict=True)]
        else:
            share = self.known.double()
            for k, one in enumerate(weights):
                share = torch.tensordot(share, one, dims=([k], [1])).movedim(-1, k)
            self._share = share.numpy()
        self.weights = weights
        self._seen = [one.sum(1) > 0 for one in weights]  # (native,) per tower axis

    def of_boxes(self, grids: Tensor, boxes: NDArray[np.float64]) -> Moments:
        """Sums over boxes.

        Args:
            grids: (Q, *tokens).
            boxes: (R, 2, n) lowest and highest corner by native axes, as edges; a pixel counts whose centre lies within.
        """
        if self._share is not None:
            return self._joined([self.of_mask(grids, self._box_mask(box)) for box in boxes], len(grids))
        values = self._values(grids)
        return self._joined([self._of_boxes(values, part) for part in self._parts(boxes)], len(grids))

    @staticmethod
    def _parts(boxes: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        return [boxes[start : start + REGIONS_AT_ONCE] for start in range(0, len(boxes), REGIONS_AT_ONCE)]

    def box_means(self, grids: Tensor, boxes: NDArray[np.float64]) -> Tensor:
        """(Q, R) means over boxes alone: a fifth of what :meth:`of_boxes` costs."""
        if self._share is not None:
            return self.of_boxes(grids, boxes).mean
        values, means = self._values(grids).flatten(1), []
        for part in self._parts(boxes):
            count, linear, _ = self._along(part, bands=False)
            means.append(values @ _outer(linear).flatten(1).T / count.where(count > 0, torch.nan))
        return torch.cat(means, 1) if means else values.new_zeros(len(values), 0)

    def whole(self, grids: Tensor) -> Moments:
        """Sums over all that the tower saw; R is 1."""
        shape = np.array(self.transform.native_shape, dtype=np.float64)
        return self.of_boxes(grids, np.stack([np.full(len(shape), -0.5), shape - 0.5])[None])

    def of_mask(self, grids: Tensor, mask: NDArray[np.bool_]) -> Moments:
        """Sums over one region of any form; R is 1.

        Args:
            grids: (Q, *tokens).
            mask: of the native shape.
        Raises:
            ValueError: a mask of another shape.
        """
        if mask.shape != self.transform.native_shape:
            raise ValueError(f"the mask has shape {mask.shape}, the image {self.transform.native_shape}; they must match")
        turned = mask.transpose(self.transform.axes)
        places = [np.flatnonzero(turned.any(axis=tuple(a for a in range(turned.ndim) if a != k))) for k in range(turned.ndim)]
        values = self._values(grids)
        if any(not len(at) for at in places):
            nothing = values.new_zeros(len(values), 1)
            return Moments(values.new_zeros(1), nothing, nothing)
        cut = tuple(slice(int(at[0]), int(at[-1]) + 1) for at in places)
        region = torch.from_numpy(turned[cut].astype(np.float64))
        weights = [one[part] for one, part in zip(self.weights, cut, strict=True)]
        if self._share is None:
            seen = region * _product([one[part] for one, part in zip(self._seen, cut, strict=True)])
            count, once, twice = seen.sum(), region, region
        else:
            share = torch.from_numpy(np.ascontiguousarray(self._share[cut]))
            inverse = torch.where(share > 1e-6, 1 / share.clamp_min(1e-6), 0.0)
            count, once = (region * (share > 1e-6)).sum(), region * inverse
            twice = once * inverse
        linear = _contracted(once, weights)
        total = (values.flatten(1) * (linear * self.known).flatten()).sum(1)
        square = values.new_zeros(len(values))
        for offset, first in self._pairs(twice, weights):
            here, there = _neighbours(self.tokens, offset)
            product = (_at(values, here) * _at(values, there)).flatten(1)
            square = square + (2.0 if any(offset) else 1.0) * (product * first.flatten()).sum(1)
        return Moments(count[None], total[:, None], square[:, None])

    def _along(self, boxes: NDArray[np.float64], bands: bool = True) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Per box: pixels, and by axis the sums of weights, and of products of the weights of a token with its own and the next one's."""
        ends = np.ceil(np.asarray(boxes, dtype=np.float64) - 1e-9).astype(np.int64)  # first pixel within, first beyond
        count = torch.ones(len(boxes), dtype=torch.float64)
        linear: list[Tensor] = []
        products: list[tuple[Tensor, Tensor]] = []
        for k, (axis, one) in enumerate(zip(self.transform.axes, self.weights, strict=True)):
            low, high = (torch.from_numpy(np.clip(ends[:, side, axis], 0, len(one))) for side in (0, 1))
            high = torch.maximum(low, high)
            count = count * _between(self._seen[k].double()[:, None], low, high)[:, 0]
            linear.append(_between(one, low, high))
            if bands:
                products.append((_between(one**2, low, high), _between(one[:, :-1] * one[:, 1:], low, high)))
        return count, linear, products

    def _of_boxes(self, values: Tensor, boxes: NDArray[np.float64]) -> Moments:
        count, linear, products = self._along(boxes)
        total = values.flatten(1) @ _outer(linear).flatten(1).T
        square = torch.zeros_like(total)
        for offset in _offsets(len(products)):
            here, there = _neighbours(self.tokens, offset)
            product = (_at(values, here) * _at(values, there)).flatten(1)
            factors = [band[abs(step)] for band, step in zip(products, offset, strict=True)]
            square += (2.0 if any(offset) else 1.0) * (product @ _outer(factors).flatten(1).T)
        return Moments(count, total, square)

    def _pairs(self, region: Tensor, weights: list[Tensor]) -> list[tuple[tuple[int, ...], Tensor]]:
        """Every offset with the sums over the region of products of the weights of two tokens that lie so."""
        found = {}
        for bands in itertools.product((0, 1), repeat=len(weights)):
            factors = [one**2 if band == 0 else one[:, :-1] * one[:, 1:] for one, band in zip(weights, bands, strict=True)]
            found[bands] = _contracted(region, factors)
        pairs = []
        for offset in _offsets(len(weights)):
            here, there = _neighbours(self.tokens, offset)
            both = self.known[here] & self.known[there]
            pairs.append((offset, found[tuple(abs(step) for step in offset)] * both))
        return pairs

    def _values(self, grids: Tensor) -> Tensor:
        """(Q, *tokens) float64, 0 where tokens are not known."""
        if tuple(grids.shape[1:]) != self.tokens:
            raise ValueError(f"grids have shape {tuple(grids.shape)}, expected (Q, {', '.join(map(str, self.tokens))})")
        return torch.where(self.known, grids.cpu().double(), 0.0)

    def _box_mask(self, box: NDArray[np.float64]) -> NDArray[np.bool_]:
        mask = np.zeros(self.transform.native_shape, dtype=bool)
        low, high = np.maximum(np.ceil(box - 1e-9).astype(int), 0)
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
        return mask

    @staticmethod
    def _joined(parts: list[Moments], maps: int) -> Moments:
        if not parts:
            nothing = torch.zeros(maps, 0, dtype=torch.float64)
            return Moments(torch.zeros(0, dtype=torch.float64), nothing, nothing)
        return Moments(
            torch.cat([one.count for one in parts]), torch.cat([one.total for one in parts], 1), torch.cat([one.square for one in parts], 1)
        )


def _normalised(weights: Tensor) -> Tensor:
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 1e-6, weights / total.clamp_min(1e-6), 0.0)


def _product(vectors: Sequence[Tensor]) -> Tensor:
    """(*sizes) product of one vector per axis."""
    found = vectors[0]
    for one in vectors[1:]:
        found = found[..., None] * one
    return found


def _outer(vectors: Sequence[Tensor]) -> Tensor:
    """(R, *sizes) product of one (R, size) per axis."""
    found = vectors[0]
    for one in vectors[1:]:
        found = found[..., None] * one.view(len(one), *[1] * (found.ndim - 1), one.shape[1])
    return found


def _contracted(region: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """(*tokens) of a region (*native) and one (native, tokens) per axis."""
    for factor in factors:
        region = torch.tensordot(region, factor, dims=([0], [0]))  # the axis that is done goes to the end, so the first is always next
    return region


def _between(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(R, ...) sums of (native, ...) from ``low`` to before ``high``."""
    sums = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    return sums[high] - sums[low]


def _offsets(axes: int) -> list[tuple[int, ...]]:
    """Half of {-1, 0, 1}^axes: of a pair of opposite offsets the later one, and the offset 0."""
    return [offset for offset in itertools.product((-1, 0, 1), repeat=axes) if offset >= (0,) * axes]


def _at(values: Tensor, cut: tuple[slice, ...]) -> Tensor:
    """A part of the cells of every map."""
    of_every_map = (slice(None), *cut)
    return values[of_every_map]


def _neighbours(tokens: Sequence[int], offset: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where tokens lie that have a neighbour at the offset, and where these neighbours lie."""
    here = tuple(slice(max(0, -step), n - max(0, step)) for n, step in zip(tokens, offset, strict=True))
    there = tuple(slice(max(0, step), n - max(0, -step)) for n, step in zip(tokens, offset, strict=True))
    return here, there
