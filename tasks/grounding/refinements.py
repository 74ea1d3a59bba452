"""Training-free refinements of token maps, each for itself: contrast with other phrases, alike neighbours, smoothing, finer grids.

Shapes: Q maps on a grid of n axes. A token that is NaN (padding) stays NaN and counts for no neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHARE_FLOOR = 0.1
"""Of CARVE's ratio, lambda: of the general map's mean, so that a token which nothing attends to is not divided by 0."""


def against_general(scores: Tensor, general: Tensor, ratio: bool) -> Tensor:
    """What a phrase says beyond a general one ("a chest X-ray"): what every phrase finds there is no sign of this one.

    Args:
        scores: (B, Q, *grid).
        general: (B, 1, *grid), of the general phrase.
        ratio: shares, which are not negative, are divided, a / (g + lambda); cosines are subtracted.
    Source: CARVE, arXiv:2509.06461, sec. 4, for attention. Departures: lambda is a tenth of the general map's mean; cosines.
    """
    if not ratio:
        return scores - general
    axes = tuple(range(2, general.ndim))
    floor = SHARE_FLOOR * general.nanmean(dim=axes, keepdim=True)
    return scores / (general + floor).clamp_min(1e-12)


def mixed_by(scores: Tensor, affinity: Tensor) -> Tensor:
    """(B, Q, *grid) maps in which each token takes the mean of the tokens that it is like.

    Args:
        affinity: (B, N, N), rows sum to 1 (:func:`medvl.nn.activations.early_affinity`).
    """
    flat = scores.flatten(2)
    known = torch.isfinite(flat)
    total = torch.where(known, flat, 0.0).float() @ affinity.transpose(1, 2)
    weight = known.float() @ affinity.transpose(1, 2)
    return torch.where(known, total / weight.clamp_min(1e-6), torch.nan).view(scores.shape)


def resampled(grids: Tensor, finer: Sequence[int], shift: Sequence[float]) -> Tensor:
    """Maps on a grid that is ``finer[k]`` times finer along axis k, whose tokens look ``shift[k]`` tokens beside their cells.

    Args:
        grids: (Q, *tokens); linear between tokens, the edge held.
    Returns:
        (Q, *cells) float32, whose cells look at themselves; NaN where the token that a cell lies in is.
    """
    known = torch.isfinite(grids)
    total, weight = torch.where(known, grids, 0.0).float(), known.float()
    own = weight
    for k, (count, parts, away) in enumerate(zip(grids.shape[1:], finer, shift, strict=True)):
        along = _linear(count, parts, away).to(grids.device)
        total, weight = (torch.tensordot(x, along, dims=([k + 1], [1])).movedim(-1, k + 1) for x in (total, weight))
        own = own.repeat_interleave(parts, dim=k + 1)
    return torch.where((own > 0) & (weight > 1e-6), total / weight.clamp_min(1e-6), torch.nan)


def smoothed(grids: Tensor, token_mm: Sequence[float], sigma_mm: float, finer: int = 1) -> Tensor:
    """Gaussian smoothing in mm, on a grid that may be some times finer than the tokens.

    Maps that are linear between token centres have their peak at one; smoothed on a finer grid, the peak lies where the tokens round it
    say, between them.

    Args:
        grids: (Q, *tokens).
        token_mm: size of a token along each axis.
        sigma_mm: standard deviation of the Gaussian, cut at 4 of them; 0: none.
        finer: cells of the result per token along each axis.
    Returns:
        (Q, *cells) float32, ``finer`` times the tokens along each axis; NaN where the token that a cell lies in is.
    """
    if sigma_mm < 0 or finer < 1:
        raise ValueError(f"smoothing of {sigma_mm} mm on a grid {finer} times finer: expected 0 or more, and 1 or more")
    known = torch.isfinite(grids)
    total, weight = torch.where(known, grids, 0.0).float(), known.float()
    own = weight
    for k, (count, step) in enumerate(zip(grids.shape[1:], token_mm, strict=True)):
        along = _kernel(count, step, sigma_mm, finer).to(grids.device)
        total, weight = (torch.tensordot(x, along, dims=([k + 1], [1])).movedim(-1, k + 1) for x in (total, weight))
        own = own.repeat_interleave(finer, dim=k + 1)
    return torch.where(own > 0, total / weight.clamp_min(1e-6), torch.nan)


def _linear(tokens: int, finer: int, shift: float = 0.0) -> Tensor:
    """(cells, tokens): linear interpolation to cells from tokens that look ``shift`` tokens beside themselves, the edge held."""
    cells = tokens * finer
    place = ((torch.arange(cells) + 0.5) / finer - 0.5 - shift).clamp(0, tokens - 1)
    low = place.floor().long().clamp(max=max(tokens - 2, 0))
    linear = torch.zeros(cells, tokens)
    linear[torch.arange(cells), low] = 1 - (place - low)
    if tokens > 1:
        linear[torch.arange(cells), low + 1] = place - low
    return linear


def _kernel(tokens: int, step_mm: float, sigma_mm: float, finer: int) -> Tensor:
    """(cells, tokens): linear interpolation to cells, then a Gaussian over cells whose rows sum to 1."""
    linear, cells = _linear(tokens, finer), tokens * finer
    if sigma_mm == 0:
        return linear
    away = (torch.arange(cells)[:, None] - torch.arange(cells)) * (step_mm / finer / sigma_mm)
    gaussian = torch.exp(-0.5 * away**2) * (away.abs() <= 4)
    return gaussian / gaussian.sum(1, keepdim=True) @ linear
