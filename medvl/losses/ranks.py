"""Sums, log-sum-exps and rows across the processes of a run, with true gradients.

Every process holds the logits of its own images with the texts of all, and returns the loss of the joined batch. The gradient that flows
back here is that of the sum of what all W processes return, which is W times the loss: averaged over processes, as DDP and FSDP do, the
gradients of the weights are those of one process with the joined batch. Functions take ``across``: False leaves one process alone.

All processes must come here in the same order, forward and backward. Backward they do: the engine takes first what was made last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medvl.types import TextFeatures


def sum_over_ranks(x: Tensor, across: bool = True) -> Tensor:
    """The sum of what each process has, of equal shapes."""
    return _Sum.apply(x) if across else x


def largest_over_ranks(x: Tensor) -> Tensor:
    """The largest of what the processes have, entry by entry, of equal shapes; without gradients."""
    found = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found


def log_sum_exp_over_ranks(x: Tensor, across: bool = True) -> Tensor:
    """The log-sum-exp of what each process has, of equal shapes; very low numbers stand for minus infinity."""
    if not across:
        return x
    top = largest_over_ranks(x)
    return sum_over_ranks((x - top).exp()).log() + top


def rows_of_ranks(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes one below the other, (sum of counts, ...), from those of this one, (counts[rank], ...).

    Raises:
        ValueError: another number of rows than this process was said to have.
    """
    rank = dist.get_rank()
    if len(counts) != dist.get_world_size() or len(x) != counts[rank]:
        raise ValueError(f"process {rank} of {dist.get_world_size()} has {len(x)} rows; expected {list(counts)} of all processes")
    return _Rows.apply(x, tuple(counts))


def texts_of_ranks(texts: TextFeatures, counts: Sequence[int]) -> TextFeatures:
    """The features of the texts of all processes, in the order of ranks; words are padded to the longest."""
    tokens, valid, concepts = texts.tokens, texts.token_valid, texts.concepts
    if tokens is not None:
        if valid is None:
            valid = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        more = int(largest_over_ranks(torch.tensor(tokens.shape[1], device=tokens.device))) - tokens.shape[1]
        tokens, valid = F.pad(tokens, (0, 0, 0, more)), F.pad(valid, (0, more))
        concepts = None if concepts is None else F.pad(concepts, (0, more), value=-1)
    parts = {"pooled": texts.pooled, "tokens": tokens, "token_valid": valid, "concepts": concepts}
    return TextFeatures(**{name: None if part is None else rows_of_ranks(part, counts) for name, part in parts.items()})  # type: ignore[arg-type]


class _Sum(torch.autograd.Function):
    """All-reduce, whose adjoint is an all-reduce."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class _Rows(torch.autograd.Function):
    """All-gather of unequal shares, whose adjoint is an all-reduce of which each process takes its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        given = x.detach().to(torch.uint8) if x.dtype == torch.bool else x.detach()
        padded = given.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = given
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        joined = torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
        if x.dtype == torch.bool:
            joined = joined.bool()
        if not x.is_floating_point():
            ctx.mark_non_differentiable(joined)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()], None
