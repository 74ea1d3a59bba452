"""Pooling: how the vectors of a study's parts become one, and which part had which share in it.

The parts are the slices of a volume (modalities.ct.slices), or the views or series of a study (modalities.studies).

Shapes: B studies, S parts (slices, or views), D embedding width. ``valid`` is (B, S) bool, False on padding; ``position_mm`` is (B, S),
the height of each slice along the stacking axis. Every pooling of the family takes and returns the same, so that a recipe changes one by
its class path; none lets padding, its amount or the order of the batch move the result. The pooled vector lies in the space of the
parts: it is a mixture of them, or starts training as one, so that one phrase can be compared with a study and with each of its parts.
Poolings that know where a slice lies are in modalities.ct.pooling.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.types import Configurable


@dataclass(frozen=True)
class Pooled:
    """What a pooling returns."""

    pooled: Tensor  # (B, D)
    weights: Tensor  # (B, S), the share of each part; rows sum to 1, exactly 0 on padding


class Pooling(Configurable, nn.Module, abc.ABC):
    """Base of poolings: (B, S, D) parts in, :class:`Pooled` out.

    ``embed_dim`` is the D that a pooling was made for, None if it takes any; ``needs_position`` says whether it reads ``position_mm``.
    """

    embed_dim: int | None = None
    needs_position: bool = False

    def forward(self, parts: Tensor, valid: Tensor | None = None, position_mm: Tensor | None = None) -> Pooled:
        """Pool over S, in float32 at least, under autocast too. What lies on padding is never read, be it NaN.

        Args:
            parts: (B, S, D).
            valid: (B, S) bool, False on padding; None: all valid.
            position_mm: (B, S); needed by poolings that know where a slice is, in any order and from any origin.
        Raises:
            ValueError: shapes that do not fit, a study without a valid part, positions that are missing or not finite.
        """
        if parts.ndim != 3 or (self.embed_dim is not None and parts.shape[-1] != self.embed_dim):
            raise ValueError(f"parts have shape {tuple(parts.shape)}, {type(self).__name__} takes (B, S, {self.embed_dim or 'D'})")
        valid = checked_valid(valid, parts)
        parts = parts if parts.dtype == torch.float64 else parts.float()
        parts = torch.where(valid[..., None], parts, 0.0)
        with torch.autocast(parts.device.type, enabled=False):  # cheap beside the parts' own encoding, and weights must sum to 1
            return self._pool(parts, valid, self._centred(position_mm, valid) if self.needs_position else None)

    @abc.abstractmethod
    def _pool(self, parts: Tensor, valid: Tensor, position_mm: Tensor | None) -> Pooled:
        """Pool parts that are 0 on padding; ``position_mm`` is centred, and None unless ``needs_position``."""

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


class MeanPooling(Pooling):
    """Mean of the valid parts, each with the same weight."""

    def _pool(self, parts: Tensor, valid: Tensor, position_mm: Tensor | None) -> Pooled:
        weights = valid / valid.sum(1, keepdim=True).to(parts.dtype)
        return Pooled(mix(weights, parts), weights)


class MaxPooling(Pooling):
    """Maximum over the valid parts in each dimension; a part's weight is the share of the D dimensions in which it holds the maximum.

    Slices that hold it together share it, in the weight and in the gradient.
    """

    def _pool(self, parts: Tensor, valid: Tensor, position_mm: Tensor | None) -> Pooled:
        masked = parts.masked_fill(~valid[..., None], -torch.inf)
        pooled = masked.amax(1)
        holds = (masked == pooled[:, None]).to(parts.dtype)
        return Pooled(pooled, (holds / holds.sum(1, keepdim=True)).mean(-1))


class GatedAttention(Pooling):
    """Gated attention of multiple-instance learning: a part is weighed by what it shows, wherever it lies.

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

    def _pool(self, parts: Tensor, valid: Tensor, position_mm: Tensor | None) -> Pooled:
        scores = self.score(self.content(parts).tanh() * self.gate(parts).sigmoid()).squeeze(-1)
        weights = masked_softmax(scores, valid)
        return Pooled(mix(weights, parts), weights)


def masked_softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """Softmax over axis 1, in float32 at least; exactly 0 where ``valid`` is False."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return F.softmax(scores.masked_fill(~valid, -torch.inf), dim=1)


def mix(weights: Tensor, parts: Tensor) -> Tensor:
    """sum_s weights_s parts_s, (B, D)."""
    return (weights[:, None] @ parts).squeeze(1)


def checked_valid(valid: Tensor | None, parts: Tensor) -> Tensor:
    """``valid`` for ``parts`` (B, S, ...), made if it is None.

    Raises:
        ValueError: another shape, or a study without a valid part.
    """
    if valid is None:
        valid = torch.ones(parts.shape[:2], dtype=torch.bool, device=parts.device)
    if valid.shape != parts.shape[:2] or valid.dtype != torch.bool:
        raise ValueError(f"valid is {valid.dtype} of shape {tuple(valid.shape)}, expected bool of shape {tuple(parts.shape[:2])}")
    empty = (~valid.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"nothing valid in studies {empty} of the batch: at least one is needed to pool")
    return valid
