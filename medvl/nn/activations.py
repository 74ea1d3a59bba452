"""What a tower makes on its way: spatial activations of its layers, caught without knowing the tower, and gradients through them.

Shapes: B images, C channels, (H, W) or (S, H, W) cells, N cells in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def caught(module: nn.Module, batch: int) -> Iterator[list[Tensor]]:
    """While entered, the outputs of all layers, in order, that are maps of ``batch`` images: (B, C, H, W) or (B, C, S, H, W), of 2 or more
    cells along each side; or (B, L, C) tokens of a transformer.
    """
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or len(output) != batch or not output.is_floating_point():
            return
        if (output.ndim in (4, 5) and min(output.shape[2:]) > 1) or (output.ndim == 3 and output.shape[1] > 1):
            found.append(output)

    handles = [one.register_forward_hook(keep) for one in module.modules() if one is not module]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def on_grid(activation: Tensor, grid: Sequence[int]) -> Tensor | None:
    """(B, N, C) of an activation as the mean over each cell of a grid; None if its cells do not divide evenly into the grid's.

    Of (B, L, C) the last N places are the grid's: class and register tokens come first.
    """
    count = math.prod(grid)
    if activation.ndim == 3:
        return activation[:, -count:] if count <= activation.shape[1] <= count + 16 else None
    sides = activation.shape[2:]
    if len(sides) != len(grid) or any(side < cells or side % cells for side, cells in zip(sides, grid, strict=True)):
        return None
    if len(grid) == 2:
        return F.adaptive_avg_pool2d(activation, (grid[0], grid[1])).flatten(2).transpose(1, 2)
    return F.adaptive_avg_pool3d(activation, (grid[0], grid[1], grid[2])).flatten(2).transpose(1, 2)


def early_affinity(run: Callable[[], Any], module: nn.Module, batch: int, grid: Sequence[int], temperature: float = 0.05) -> Tensor:
    """(B, N, N) how alike two cells are to the first layer of a tower that has them, rows summing to 1.

        A = softmax_j(cos(e_i, e_j) / temperature)

    Early layers keep edges that late ones have smeared: A mixes a late map so that alike neighbours agree.

    Source: CLIPer, arXiv:2411.13836, early-layer fusion, there of attention; here of embeddings, so that convolutions have it too.
    Raises:
        ValueError: no layer whose cells are those of the grid or divide them.
    """
    with torch.no_grad(), caught(module, batch) as found:
        run()
    for activation in found:
        cells = on_grid(activation, grid)
        if cells is not None:
            alike = F.normalize(cells.float(), dim=-1)
            return (alike @ alike.transpose(1, 2) / temperature).softmax(-1)
    raise ValueError(f"no layer of {type(module).__name__} has cells on the grid {tuple(grid)} of its tokens; early-layer fusion needs one")


def gradient_maps(score: Callable[[], Tensor], module: nn.Module, batch: int) -> Tensor:
    """(B, M, *cells) Grad-CAM of (B, M) scores on the deepest spatial layer that they hang on, nothing below 0.

        map = relu(sum_c (mean_cells d score / d A_c) A_c)

    Args:
        score: a pass of ``module`` and what is scored of it, with gradients; row i hangs on image i alone.
    Raises:
        ValueError: no layer with maps of the images that the score hangs on.
    Source: Grad-CAM, arXiv:1610.02391, eqs. 1 and 2.
    """
    with torch.enable_grad(), caught(module, batch) as found:
        scores = score()
        spatial = [one for one in found if one.ndim in (4, 5) and one.requires_grad]
        for activation in reversed(spatial):
            first = torch.autograd.grad(scores[:, 0].sum(), activation, retain_graph=True, allow_unused=True)[0]
            if first is None:
                continue
            maps = []
            for j in range(scores.shape[1]):
                (gradient,) = torch.autograd.grad(scores[:, j].sum(), activation, retain_graph=True)
                weights = gradient.flatten(2).mean(2)
                maps.append(torch.einsum("bc,bc...->b...", weights, activation).relu().detach())
            return torch.stack(maps, 1).float()
    raise ValueError(f"no layer of {type(module).__name__} keeps maps of single images that its vector is made of; take another source")
