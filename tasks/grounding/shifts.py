"""Maps finer than a tower's tokens: the image is shifted by parts of a token, and the maps of all shifts are interleaved.

A token says what lies in and round its cell, but not where within it, and a lesion smaller than a cell is pointed at beside it. When the
image is shifted by d pixels, every token looks d pixels further on, at the scale it was trained at, which an enlarged crop is not.

Source: shift-and-stitch, "Fully Convolutional Networks", arXiv:1411.4038, sec. 3.2. Departure: shifts between pixels are the mean of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medvl.types import ImageBatch


def offsets(cell: int, finer: int) -> list[float]:
    """Where the middles of ``finer`` parts of a cell of so many pixels lie, from its own middle."""
    return [((part + 0.5) / finer - 0.5) * cell for part in range(finer)]


def shifted_maps(batch: ImageBatch, cells: Sequence[int], finer: int, maps_of: Callable[[ImageBatch], Tensor]) -> Tensor:
    """(B, Q, ..., finer * rows, finer * columns) maps of images from maps of the shifted images; NaN where no shift shows the image.

    Args:
        cells: height and width of a token in whole pixels.
        finer: parts of a token along rows and along columns; the tower runs about finer^2 times.
        maps_of: (B, Q, ..., rows, columns) of a batch.
    Raises:
        ValueError: a token of fewer pixels than parts.
    """
    if min(cells) < finer:
        raise ValueError(f"tokens of {tuple(cells)} pixels cannot be parted {finer} times: a part needs a pixel")
    rows, columns = (offsets(cell, finer) for cell in cells)
    made: dict[tuple[int, int], Tensor] = {}

    def at(down: int, right: int) -> Tensor:
        if (down, right) not in made:
            made[down, right] = maps_of(_shifted(batch, down, right))
        return made[down, right]

    lines = []
    for down in rows:
        parts = [_mean([at(a, b) for a in _whole(down) for b in _whole(right)]) for right in columns]
        lines.append(torch.stack(parts, -1).flatten(-2))  # (B, Q, ..., rows, finer * columns)
    return torch.stack(lines, -2).flatten(-3, -2)


def _whole(offset: float) -> list[int]:
    """The whole pixels that an offset lies between."""
    return sorted({math.floor(offset), math.ceil(offset)})


def _mean(maps: Sequence[Tensor]) -> Tensor:
    """Mean of those that are known."""
    return torch.stack(list(maps)).nanmean(0)


def _shifted(batch: ImageBatch, down: int, right: int) -> ImageBatch:
    """The batch with its images moved up and to the left, so that each cell shows what lies further down and right; 0 comes in."""
    plane = batch.pixels.ndim == 4
    valid = batch.valid
    if plane and valid is not None:
        valid = _moved(valid, down, right)
    elif plane:
        valid = _moved(torch.ones_like(batch.pixels[:, 0], dtype=torch.bool), down, right)
    return replace(batch, pixels=_moved(batch.pixels, down, right), valid=valid)


def _moved(values: Tensor, down: int, right: int) -> Tensor:
    found = torch.zeros_like(values)
    height, width = values.shape[-2:]
    found[..., max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)] = values[
        ..., max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)
    ]
    return found
