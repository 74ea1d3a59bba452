"""From the vectors of a text's tokens to one vector of the text.

Shapes: M texts, L tokens, W width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Pooling = Literal["cls", "mean", "weighted_mean", "eos", "last", "attention"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def pool(hidden: Tensor, valid: Tensor, pooling: Pooling) -> Tensor:
    """(M, W) from the tokens that are not padding, wherever the padding is.

    "cls" is the first token, "last" and "eos" the last one (the trunk sees to it that with "eos" this is the end token), "mean" the mean,
    "weighted_mean" the mean with token i of n weighing i: with causal attention later tokens have seen more.

    Args:
        hidden: (M, L, W).
        valid: (M, L) bool, False on padding; every text has a token.
        pooling: "attention" has weights and is :class:`AttentionPooling`.
    Source: weighted_mean is "SGPT: GPT Sentence Embeddings for Semantic Search", arXiv:2202.08904, eq. 2.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, valid.int().argmax(1)]
    if pooling in ("last", "eos"):
        return hidden[rows, valid.shape[1] - 1 - valid.flip(1).int().argmax(1)]
    weights = valid.to(hidden.dtype)
    if pooling == "weighted_mean":
        weights = weights * valid.cumsum(1).to(hidden.dtype)
    elif pooling != "mean":
        raise ValueError(f"pooling {pooling!r} is none of cls, mean, weighted_mean, eos, last")
    return (hidden * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)


class AttentionPooling(nn.Module):
    """A learned query over the tokens of a text: sum_l softmax_l(q . h_l / sqrt(W)) h_l. It starts as the mean, at q = 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """(M, L, W) and (M, L) bool, with a token in every text, to (M, W)."""
        scores = (hidden @ self.query).float() / hidden.shape[-1] ** 0.5
        weights = scores.masked_fill(~valid, -torch.inf).softmax(dim=1)
        return (weights[..., None].to(hidden.dtype) * hidden).sum(dim=1)
