"""Slice pooling: the poolings of modalities.pooling, and those in which slices know where they lie.

Shapes: B studies, S slices, D embedding width, h heads; ``valid`` and ``position_mm`` as there. The pooling in which a phrase chooses the
slices needs the text and is therefore a similarity: medvl.nn.similarity.SliceSimilarity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medvl.nn.transformer import TransformerBlock
from modalities.pooling import GatedAttention as GatedAttention  # these names are in configs of saved models
from modalities.pooling import MaxPooling as MaxPooling
from modalities.pooling import MeanPooling as MeanPooling
from modalities.pooling import Pooled, Pooling, masked_softmax, mix

SHORTEST_MM, LONGEST_MM = 4.0, 2000.0  # wavelengths: two slices of 2 mm are half of the one, a body is shorter than half of the other


class AttentionAdapter(Pooling):
    """Slice-pooling adapter: one layer of self-attention over the slices, which know their place, and the mean of what comes out.

        A_h = softmax_t(Q_h(n(x) + p) . K_h(n(x) + p)),   y_s = O [sum_t A_hst V_h x_t]_h,   pooled = mean_s y_s

    n is a layer norm, p the sinusoidal encoding of the height in mm. Weights are the mean of A over heads and over the slices that ask:
    what each slice gave to the mean. Values and output start as the identity, so that training starts from a mixture of slices.

    Source: "RadCLIP", arXiv:2403.09948: V = MHSA(I + PE(P)). Departures: positions in mm instead of indices, added to queries and keys
    alone, so that a height is no part of the embedding; the norm; the start at the identity; the mean (the formula leaves the reduction
    open).

    Args:
        embed_dim: D, even and a multiple of ``heads``.
        heads: attention heads.
    """

    needs_position = True

    def __init__(self, embed_dim: int, heads: int = 4) -> None:
        super().__init__()
        check_width(embed_dim, heads)
        self.embed_dim = embed_dim
        self.norm = nn.LayerNorm(embed_dim)
        self.attention = nn.MultiheadAttention(embed_dim, heads, batch_first=True)
        with torch.no_grad():
            self.attention.in_proj_weight[2 * embed_dim :].copy_(torch.eye(embed_dim))
            self.attention.out_proj.weight.copy_(torch.eye(embed_dim))

    def _pool(self, slices: Tensor, valid: Tensor, position_mm: Tensor | None) -> Pooled:
        assert position_mm is not None
        placed = self.norm(slices) + encode_position(position_mm, slices)
        mixed, attention = self.attention(placed, placed, slices, key_padding_mask=~valid)
        asking = valid / valid.sum(1, keepdim=True).to(slices.dtype)
        return Pooled(mix(asking, mixed.to(slices.dtype)), mix(asking, attention.to(slices.dtype)))


class TransformerPooling(Pooling):
    """A transformer in which slices see each other and know their height in mm, then one query that weighs what they became.

    Each of ``depth`` blocks adds to the stream of slices x, with n a layer norm and p the sinusoidal encoding of the height:
        x += g1 * attention(query = key = n(x) + p, value = n(x));   x += g2 * mlp(n(x))
    Then w = mean over heads of softmax_s(q_h . K_h(n(x_s) + p_s)) and pooled = sum_s w_s x_s: the weights are the shares.

    Sources: pre-norm blocks, arXiv:2010.11929; positions added to queries and keys of every layer and not to values, arXiv:2005.12872;
    gains g that start small, and a last layer in which only the class query looks, arXiv:2103.17239. Departure from the latter: its
    values are the slices themselves, so that pooled stays in their space.

    Args:
        embed_dim: D, even and a multiple of ``heads``.
        depth: blocks before the query.
        heads: attention heads.
        mlp_ratio: hidden width of the mlp over D.
        drop_rate: dropout of what the blocks add.
        gain: start of g1 and g2; small, so that training starts near attention pooling of the slices as they are.
    """

    needs_position = True

    def __init__(
        self, embed_dim: int, depth: int = 2, heads: int = 4, mlp_ratio: float = 2.0, drop_rate: float = 0.0, gain: float = 0.1
    ) -> None:
        super().__init__()
        check_width(embed_dim, heads)
        self.embed_dim, self.heads = embed_dim, heads
        self.blocks = nn.ModuleList(TransformerBlock(embed_dim, heads, round(mlp_ratio * embed_dim), drop_rate, gain) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.query = nn.Parameter(torch.randn(embed_dim) * 0.02)
        self.key = nn.Linear(embed_dim, embed_dim)

    def _pool(self, slices: Tensor, valid: Tensor, position_mm: Tensor | None) -> Pooled:
        assert position_mm is not None
        place = encode_position(position_mm, slices)
        for block in self.blocks:
            slices = block(slices, valid, place)
        keys = self.key(self.norm(slices) + place).unflatten(-1, (self.heads, -1))  # (B, S, h, D / h)
        scores = (keys * self.query.view(self.heads, -1)).sum(-1) / math.sqrt(keys.shape[-1])
        weights = masked_softmax(scores, valid[..., None]).mean(-1)
        return Pooled(mix(weights, slices), weights)


def encode_position(position_mm: Tensor, like: Tensor, shortest_mm: float = SHORTEST_MM, longest_mm: float = LONGEST_MM) -> Tensor:
    """(B, S) heights in mm to (B, S, D) in [-1, 1], of the width and type of ``like`` (B, S, D).

    With D / 2 wavelengths l_i from ``shortest_mm`` to ``longest_mm`` in equal ratios: sin(2 pi z / l_i), then cos(2 pi z / l_i).
    Source: arXiv:1706.03762, section 3.5, with a height in mm in the place of an index, so that slice spacing does not matter.
    """
    half = like.shape[-1] // 2
    steps = torch.arange(half, dtype=like.dtype, device=like.device) / max(half - 1, 1)
    angles = 2 * math.pi * position_mm.to(like.dtype)[..., None] / (shortest_mm * (longest_mm / shortest_mm) ** steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def check_width(embed_dim: int, heads: int) -> None:
    """Raise ValueError unless D is even (sine and cosine) and a multiple of the number of heads."""
    if embed_dim % 2 or embed_dim % heads:
        raise ValueError(f"embed_dim {embed_dim} must be even and a multiple of {heads} heads")
