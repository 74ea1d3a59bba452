"""Two-pass encoding: a batch of any size under one loss, encoded a few studies at a time.

A tower runs once over each part without a graph, the loss takes the features of all parts, and on the way back each part is encoded again,
with a graph, just before its gradients are needed. This is gradient caching ("Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", arXiv:2101.06983), here as a checkpoint (torch.utils.checkpoint) around each part, so that it holds for any loss of any
features. The state of the random numbers is restored for the second pass. Memory is that of one part, the features, and the input.

Layers that look at their batch (batch norm in training mode) see parts of it: gradients then equal those of the parts, not of one batch.
Their running statistics are updated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvl.model import beside, join
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, ReportEncoder, TextBatch, TextFeatures, join_texts

Batch = TypeVar("Batch")
Features = TypeVar("Features")


def encode_images(tower: ImageEncoder, batch: ImageBatch, size: int | None, passes: int = 0) -> ImageFeatures:
    """Features of a batch, ``size`` studies at a time; None: all at once. Of two kinds each is encoded by itself.

    Args:
        passes: how often the tower runs at least, where all processes must run it equally often (FSDP); what is too much counts 0.
    """
    if batch.others is not None:
        return beside(encode_images(tower, replace(batch, others=None), size), encode_images(tower, batch.others, size))
    count = batch.count
    if size is None or (size >= count and passes <= 1):
        return tower(batch)

    def encode(pixels: Tensor, part: ImageBatch) -> ImageFeatures:  # the tensor tells which device's random state to keep
        return tower(replace(part, pixels=pixels))

    parts = [batch.studies(start, min(start + size, count)) for start in range(0, count, size)]
    found = [_twice(tower, encode, part.pixels, part) for part in parts]
    idle = [0 * _twice(tower, encode, parts[0].pixels, parts[0]).pooled.sum() for _ in range(passes - len(parts))]
    joined = join(found)
    return joined.replace(pooled=joined.pooled + sum(idle)) if idle else joined


def encode_texts(tower: ReportEncoder, texts: tuple[str, ...], parts: int, device: torch.device) -> TextFeatures:
    """Features of texts, in ``parts`` parts of about equal size; where there are fewer texts, the tower still runs so often."""
    if parts <= 1:
        return tower(TextBatch(texts))

    def encode(_: Tensor, part: TextBatch) -> TextFeatures:
        return tower(part)

    size = -(-len(texts) // parts)
    batches = [TextBatch(texts[start : start + size]) for start in range(0, len(texts), size)]
    found = [_twice(tower, encode, torch.empty(0, device=device), batch) for batch in batches]
    idle = [0 * _twice(tower, encode, torch.empty(0, device=device), batches[0]).pooled.sum() for _ in range(parts - len(batches))]
    joined = join_texts(found)
    return replace(joined, pooled=joined.pooled + sum(idle)) if idle else joined


def _twice(tower: nn.Module, encode: Callable[[Tensor, Batch], Features], tensor: Tensor, batch: Batch) -> Features:
    """``encode(tensor, batch)``; with gradients, as a checkpoint."""
    if not torch.is_grad_enabled():
        return encode(tensor, batch)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _still(tower)

    return checkpoint(encode, tensor, batch, use_reentrant=False, context_fn=contexts)


@contextmanager
def _still(tower: nn.Module) -> Iterator[None]:
    """While entered, batch norms do not move their running statistics."""
    norms = [one for one in tower.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.training]
    kept = [(one.momentum, None if one.num_batches_tracked is None else one.num_batches_tracked.clone()) for one in norms]
    for one in norms:
        one.momentum = 0.0
    try:
        yield
    finally:
        for one, (momentum, count) in zip(norms, kept, strict=True):
            one.momentum = momentum
            if count is not None and one.num_batches_tracked is not None:
                one.num_batches_tracked.copy_(count)
