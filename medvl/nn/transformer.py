"""The transformer block that our own layers are made of, over slices of a volume or tokens of an image.

Shapes: B studies, N items (slices, tokens), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TransformerBlock(nn.Module):
    """A pre-norm block, (B, N, D) to (B, N, D); n is a layer norm, p an optional encoding of positions, g a gain per channel.

        x += g1 * attention(query = key = n(x) + p, value = n(x));   x += g2 * mlp(n(x))

    Without p this is the block of DINOv2 (arXiv:2304.07193; its LayerScale is g). Items that are not valid are attended by none.

    Args:
        width: D, a multiple of ``heads``.
        heads: attention heads.
        hidden: hidden width of the mlp.
        drop_rate: dropout of what the block adds.
        gain: start of g1 and g2 (LayerScale, arXiv:2103.17239).
    """

    def __init__(self, width: int, heads: int, hidden: int, drop_rate: float, gain: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop = nn.Dropout(drop_rate)
        self.gain1, self.gain2 = nn.Parameter(torch.full((width,), gain)), nn.Parameter(torch.full((width,), gain))

    def forward(self, x: Tensor, valid: Tensor | None = None, place: Tensor | None = None) -> Tensor:
        """``valid`` (B, N) bool with at least one True a row, None: all; ``place`` (B, N, D), p."""
        normed = self.norm1(x)
        placed = normed if place is None else normed + place
        mixed, _ = self.attention(placed, placed, normed, key_padding_mask=None if valid is None else ~valid, need_weights=False)
        x = x + self.gain1 * self.drop(mixed)
        return x + self.gain2 * self.drop(self.mlp(self.norm2(x)))
