"""Slice pooling: how the vectors of a volume's slices become one, and which slice had which share in it.

Shapes: B studies, S slices, D embedding width, h heads. ``valid`` is (B, S) bool, False on padding; ``position_mm`` is (B, S), the
height of each slice along the stacking axis. Every pooling of the family takes and returns the same, so that a recipe changes one by
its class path; none lets padding, its amount or the order of the batch move the result. The pooled vector lies in the space of the
slices: it is a mixture of them, or starts training as one, so that one phrase can be compared with a study and with each of its slices.
The pooling in which a phrase chooses the slices needs the text and is therefore a similarity: medvl.nn.similarity.SliceSimilarity.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.nn.transformer import TransformerBlock
from medvl.types import Configurable

SHORTEST_MM, LONGEST_MM = 4.0, 2000.0  # wavelengths: two slices of 2 mm are half of the one, a body is shorter than half of the other


@dataclass(frozen=True)
class PooledSlices:
    """What a pooling returns."""

    pooled: Tensor  # (B, D)
    weights: Tensor  # (B, S), the share of each slice; rows sum to 1, exactly 0 on padding


class SlicePooling(Configurable, nn.Module, abc.ABC):
    """Base of poolings: (B, S, D) slices in, :class:`PooledSlices` out.

    ``embed_dim`` is the D that a pooling was made for, None if it takes any; ``needs_position`` says whether it reads ``position_mm``.
    """

    embed_dim: int | None = None
    needs_position: bool = False

    def forward(self, slices: Tensor, valid: Tensor | None = None, position_mm: Tensor | None = None) -> PooledSlices:
        """Pool over S, in float32 at least, under autocast too. What lies on padding is never read, be it NaN.

        Args:
            slices: (B, S, D).
            valid: (B, S) bool, False on padding; None: all valid.
            position_mm: (B, S); needed by poolings that know where a slice is, in any order and from any origin.
        Raises:
            ValueError: shapes that do not fit, a study without a valid slice, positions that are missing or not finite.
        """
        if slices.ndim != 3 or (self.embed_dim is not None and slices.shape[-1] != self.embed_dim):
            raise ValueError(f"slices have shape {tuple(slices.shape)}, {type(self).__name__} takes (B, S, {self.embed_dim or 'D'})")
        valid = checked_valid(valid, slices)
        slices = slices if slices.dtype == torch.float64 else slices.float()
        slices = torch.where(valid[..., None], slices, 0.0)
        with torch.autocast(slices.device.type, enabled=False):  # cheap beside the slices' own encoding, and weights must sum to 1
            return self._pool(slices, valid, self._centred(position_mm, valid) if self.needs_position else None)

    @abc.abstractmethod
    def _pool(self, slices: Tensor, valid: Tensor, position_mm: Tensor | None) -> PooledSlices:
        """Pool slices that are 0 on padding; ``position_mm`` is centred, and None unless ``needs_position``."""

    def _centred(self, position_mm: Tensor | None, valid: Tensor) -> Tensor:
        """Positions from the middle of the study's extent, so that neither the scanner's origin nor padding matters; 0 on padding."""
        name = type(self).__name__
        if position_mm is None:
            raise ValueError(f"{name} needs position_mm, the height of each slice in mm; the reader of the series gives it")
        if position_mm.shape != valid.shape:
            raise ValueError(f"position_mm has shape {tuple(position_mm.shape)}, expected {tuple(valid.shape)}")
        position_mm = torch.where(valid, position_mm.float(), 0.0)
        if not position_mm.isfinite().all():
            raise ValueError(f"{name}: position_mm of a valid slice is not finite")
        low = position_mm.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        high = position_mm.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
        return torch.where(valid, position_mm - (low + high) / 2, 0.0)


class MeanPooling(SlicePooling):
    """Mean of the valid slices, each with the same weight."""

    def _pool(self, slices: Tensor, valid: Tensor, position_mm: Tensor | None) -> PooledSlices:
        weights = valid / valid.sum(1, keepdim=True).to(slices.dtype)
        return PooledSlices(mix(weights, slices), weights)


class MaxPooling(SlicePooling):
    """Maximum over the valid slices in each dimension; a slice's weight is the share of the D dimensions in which it holds the maximum.

    Slices that hold it together share it, in the weight and in the gradient.
    """

    def _pool(self, slices: Tensor, valid: Tensor, position_mm: Tensor | None) -> PooledSlices:
        masked = slices.masked_fill(~valid[..., None], -torch.inf)
        pooled = masked.amax(1)
        holds = (masked == pooled[:, None]).to(slices.dtype)
        return PooledSlices(pooled, (holds / holds.sum(1, keepdim=True)).mean(-1))


class GatedAttention(SlicePooling):
    """Gated attention of multiple-instance learning: a slice is weighed by what it shows, wherever it lies.

        a_s = softmax_s w . (tanh(V x_s) * sigmoid(U x_s)),   pooled = sum_s a_s x_s

    Source: "Attention-based Deep Multiple Instance Learning", arXiv:1802.04712, eq. 9 and 7; no biases, as in the equation.

    Args:
        embed_dim: D.
        hidden_dim: rows of V and U.
    """

    def __init__(self, embed_dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.content = nn.Linear(embed_dim, hidden_dim, bias=False)  # V
        self.gate = nn.Linear(embed_dim, hidden_dim, bias=False)  # U
        self.score = nn.Linear(hidden_dim, 1, bias=False)  # w

    def _pool(self, slices: Tensor, valid: Tensor, position_mm: Tensor | None) -> PooledSlices:
        scores = self.score(self.content(slices).tanh() * self.gate(slices).sigmoid()).squeeze(-1)
        weights = masked_softmax(scores, valid)
        return PooledSlices(mix(weights, slices), weights)


class AttentionAdapter(SlicePooling):
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

    def _pool(self, slices: Tensor, valid: Tensor, position_mm: Tensor | None) -> PooledSlices:
        assert position_mm is not None
        placed = self.norm(slices) + encode_position(position_mm, slices)
        mixed, attention = self.attention(placed, placed, slices, key_padding_mask=~valid)
        asking = valid / valid.sum(1, keepdim=True).to(slices.dtype)
        return PooledSlices(mix(asking, mixed.to(slices.dtype)), mix(asking, attention.to(slices.dtype)))


class TransformerPooling(SlicePooling):
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

    def _pool(self, slices: Tensor, valid: Tensor, position_mm: Tensor | None) -> PooledSlices:
        assert position_mm is not None
        place = encode_position(position_mm, slices)
        for block in self.blocks:
            slices = block(slices, valid, place)
        keys = self.key(self.norm(slices) + place).unflatten(-1, (self.heads, -1))  # (B, S, h, D / h)
        scores = (keys * self.query.view(self.heads, -1)).sum(-1) / math.sqrt(keys.shape[-1])
        weights = masked_softmax(scores, valid[..., None]).mean(-1)
        return PooledSlices(mix(weights, slices), weights)


def encode_position(position_mm: Tensor, like: Tensor, shortest_mm: float = SHORTEST_MM, longest_mm: float = LONGEST_MM) -> Tensor:
    """(B, S) heights in mm to (B, S, D) in [-1, 1], of the width and type of ``like`` (B, S, D).

    With D / 2 wavelengths l_i from ``shortest_mm`` to ``longest_mm`` in equal ratios: sin(2 pi z / l_i), then cos(2 pi z / l_i).
    Source: arXiv:1706.03762, section 3.5, with a height in mm in the place of an index, so that slice spacing does not matter.
    """
    half = like.shape[-1] // 2
    steps = torch.arange(half, dtype=like.dtype, device=like.device) / max(half - 1, 1)
    angles = 2 * math.pi * position_mm.to(like.dtype)[..., None] / (shortest_mm * (longest_mm / shortest_mm) ** steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def masked_softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """Softmax over axis 1, in float32 at least; exactly 0 where ``valid`` is False."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return F.softmax(scores.masked_fill(~valid, -torch.inf), dim=1)


def mix(weights: Tensor, slices: Tensor) -> Tensor:
    """sum_s weights_s slices_s, (B, D)."""
    return (weights[:, None] @ slices).squeeze(1)


def checked_valid(valid: Tensor | None, slices: Tensor) -> Tensor:
    """``valid`` for ``slices`` (B, S, ...), made if it is None.

    Raises:
        ValueError: another shape, or a study without a valid slice.
    """
    if valid is None:
        valid = torch.ones(slices.shape[:2], dtype=torch.bool, device=slices.device)
    if valid.shape != slices.shape[:2] or valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype} of shape {tuple(valid.shape)}, expected bool of shape {tuple(slices.shape[:2])}")
    empty = (~valid.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"no valid slice in studies {empty} of the batch: at least one is needed to pool")
    return valid


def check_width(embed_dim: int, heads: int) -> None:
    """Raise ValueError unless D is even (sine and cosine) and a multiple of the number of heads."""
    if embed_dim % 2 or embed_dim % heads:
        raise ValueError(f"embed_dim {embed_dim} must be even and a multiple of {heads} heads")
