"""Overlapping crops at a higher resolution: the tower looks at parts of an enlarged image, and what it says of them is put together.

Shapes: Q queries; a crop is what the tower takes, an enlarged image ``factor`` times as wide and high. Crops overlap by half, and begin on
whole tokens, so that all lie on one fine token grid; a token counts more the nearer it is to the middle of its crop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medvl.model import batches
from medvl.types import ImageSample

CropMaps = Callable[[Sequence[ImageSample]], Tensor]


def crop_maps(enlarged: ImageSample, side: Sequence[int], tokens: Sequence[int], maps_of: CropMaps, batch_size: int = 16) -> Tensor:
    """(Q, *fine grid) maps of an enlarged image from its crops; NaN where no crop shows the image.

    Args:
        enlarged: read at a whole multiple of ``side`` along rows and columns; of a volume its slices are those of the crops.
        side: (rows, columns) in pixels of what the tower takes.
        tokens: (rows, columns) of the tower's grid of that.
        maps_of: (B, Q, *grid) of crops.
    Raises:
        ValueError: pixels that are no multiple of the side, or a side that is no multiple of its tokens.
    """
    pixels = tuple(enlarged.pixels.shape[-2:])
    if any(n % s for n, s in zip(pixels, side, strict=True)) or any(s % t for s, t in zip(side, tokens, strict=True)):
        raise ValueError(f"crops of {tuple(side)} pixels and {tuple(tokens)} tokens do not lie evenly on {pixels} pixels")
    cell = [s // t for s, t in zip(side, tokens, strict=True)]
    starts = [_starts(n // c, t) for n, c, t in zip(pixels, cell, tokens, strict=True)]
    places = [at for at in itertools.product(*starts) if _shows(enlarged, at, cell, side)]
    fine = [n // c for n, c in zip(pixels, cell, strict=True)]
    weight_of = _tent(tokens[0])[:, None] * _tent(tokens[1])

    def looked_at() -> Iterator[tuple[Tensor, Sequence[int]]]:
        for part in batches(places, batch_size):
            yield from zip(maps_of([_crop(enlarged, at, cell, side) for at in part]).float(), part, strict=True)

    crops = looked_at()
    first, at = next(crops)  # a crop shows the image: together they cover it
    total = first.new_zeros(*first.shape[:-2], *fine)
    weight = torch.zeros_like(total)
    for one, (row, column) in itertools.chain([(first, at)], crops):
        inside = (..., slice(row, row + tokens[0]), slice(column, column + tokens[1]))
        known = torch.isfinite(one)
        shares = weight_of.to(one.device) * known
        total[inside] += torch.where(known, one, 0.0) * shares
        weight[inside] += shares
    return torch.where(weight > 0, total / weight.clamp_min(1e-6), torch.nan)


def _starts(cells: int, tokens: int) -> list[int]:
    """First tokens of crops along an axis: every half crop, and the last flush with the end."""
    step = max(1, tokens // 2)
    return sorted({*range(0, cells - tokens + 1, step), cells - tokens})


def _tent(tokens: int) -> Tensor:
    """Weight of each token of a crop along an axis, highest in the middle and nowhere 0."""
    at = (torch.arange(tokens) + 0.5) / tokens
    return 1 - (2 * at - 1).abs() + 1e-3


def _shows(enlarged: ImageSample, at: Sequence[int], cell: Sequence[int], side: Sequence[int]) -> bool:
    """Whether a crop shows any of the image and not padding alone."""
    low = [a * c for a, c in zip(at, cell, strict=True)]
    seen = enlarged.transform.seen[-2:]
    return all(first < a + s - 0.5 and last > a - 0.5 for a, s, (first, last) in zip(low, side, seen, strict=True))


def _crop(enlarged: ImageSample, at: Sequence[int], cell: Sequence[int], side: Sequence[int]) -> ImageSample:
    (top, left), (height, width) = (a * c for a, c in zip(at, cell, strict=True)), side
    inside = (..., slice(top, top + height), slice(left, left + width))
    plane = enlarged.pixels.ndim == 3
    start, shape = ((top, left), (height, width)) if plane else ((0, top, left), (enlarged.pixels.shape[1], height, width))
    valid = enlarged.valid[inside] if plane else enlarged.valid
    return replace(enlarged, pixels=enlarged.pixels[inside], valid=valid, transform=enlarged.transform.crop(start, shape))
