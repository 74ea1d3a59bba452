"""Where a token looks: the place of the evidence of a token's score, beside the middle of its cell.

A loss over the best token of an image asks that some token fires, and not which one. A tower of convolutions can learn to say what it sees
one cell further on, the same everywhere, at no cost to the loss; strided convolutions do so from the start. Maps then lie beside the
lesion by a constant, which for small lesions is a miss. The constant can be measured without any mask: it is where the gradient of a
token's score lies.

Shapes: B images, M texts, n axes of the tower's grid. Offsets are in voxels of that grid: negative, a token looks up, or to the left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medvl.types import ImageBatch, ImageEncoder, Similarity, TextFeatures

REACH = 3.5
"""Tokens to either side of one in which its evidence is looked for; of a small grid a quarter of it, so that some lie whole within."""


def token_offsets(image: ImageEncoder, similarity: Similarity, batch: ImageBatch, texts: TextFeatures, pairs: Tensor) -> Tensor:
    """(P, n) for each pair of an image and a text that is true of it: the centre of the squared gradient of the map's highest token, less
    the middle of that token's cell.

    Args:
        image: a tower, one row for each image.
        batch: B images of one kind.
        texts: M.
        pairs: (B, M) bool, P of them True.
    Raises:
        ValueError: a tower that keeps no tokens, or whose map does not hang on the pixels.

    NaN along an axis where the token is too near the border: a window that is cut on one side has its centre on the other.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pixels = batch.pixels.detach().clone().requires_grad_(True)
        features = image(ImageBatch(pixels, batch.valid, batch.position_mm, batch.view))
        maps = similarity.maps(features, texts.copied())
        if not maps.requires_grad:
            raise ValueError("the map does not hang on the pixels: its tower takes no gradient")
        grid = maps.shape[2:]
        covered = pixels.shape[2:] if features.extent is None else features.extent
        flat = maps.flatten(2).nan_to_num(nan=-torch.inf)
        highest = flat.detach().argmax(2)  # (B, M)
        found = []
        for j in torch.nonzero(pairs.any(0)).flatten().tolist():
            rows = torch.nonzero(pairs[:, j]).flatten()
            chosen = highest[rows, j]
            (gradient,) = torch.autograd.grad(flat[rows, j, chosen].sum(), pixels, retain_graph=True, allow_unused=True)
            if gradient is None:
                raise ValueError("the map does not hang on the pixels: its tower takes no gradient")
            found.append(_centres(gradient[rows].pow(2).sum(1), chosen, grid, covered))
        return torch.cat(found) if found else pixels.new_zeros(0, len(grid))


def _centres(weights: Tensor, tokens: Tensor, grid: torch.Size, covered: torch.Size | tuple[int, ...]) -> Tensor:
    """(P, n) centres of (P, *voxels) weights near each one's token, less the middle of that token's cell; NaN of no weight."""
    window = torch.ones_like(weights)
    border: list[Tensor] = []
    places, left = [], tokens
    for count in reversed(grid):
        places.append(left % count)
        left = left // count
    away = []
    for k, (count, size, place) in enumerate(zip(grid, covered, reversed(places), strict=True)):
        cell = size / count
        middle = (place + 0.5) * cell - 0.5
        along = torch.arange(weights.shape[k + 1], device=weights.device) - middle[:, None]  # (P, voxels)
        along = along.view(len(tokens), *[-1 if axis == k else 1 for axis in range(len(grid))])
        reach = min(REACH, count / 4) * cell
        window = window * (along.abs() <= reach)
        near = (middle < reach - 0.5) | (middle > size - 0.5 - reach)
        border.append(near & (count > 1))
        away.append(along)
    weights = weights * window
    axes = tuple(range(1, weights.ndim))
    total = weights.sum(axes)
    centres = torch.stack([(weights * along).sum(axes) for along in away], 1) / total.where(total > 0, torch.nan)[:, None]
    return centres.masked_fill(torch.stack(border, 1), torch.nan)
