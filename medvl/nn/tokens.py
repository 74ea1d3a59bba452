"""Token grids: which tokens of a tower saw the image and which only its padding.

Shapes: B images, H x W pixels, a grid of (gh, gw) tokens that covers the pixels evenly, N = gh * gw tokens in row-major order.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cell_valid(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N) bool, True where any pixel under a token's cell is valid.

    Args:
        valid: (B, H, W) bool, False on padding.
        grid: (gh, gw). Where H / gh is no whole number, cells share their border pixels.
    Raises:
        ValueError: ``valid`` is not (B, H, W), or has fewer pixels than the grid has tokens.
    """
    if valid.ndim != 3 or valid.shape[1] < grid[0] or valid.shape[2] < grid[1]:
        raise ValueError(f"valid has shape {tuple(valid.shape)}, expected (B, H, W) with at least {grid[0]} x {grid[1]} pixels")
    return F.adaptive_max_pool2d(valid.float(), grid).flatten(1) > 0
