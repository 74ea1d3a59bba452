"""CT by slices: any 2D tower over the slices of a volume, and a pooling over what it says of each.

Shapes: B studies, C channels (HU windows), S slices, H x W pixels, n valid slices of the whole batch, (gh, gw) the 2D tower's token
grid, D embedding width. Slices go through the tower in chunks and, where gradients are wanted, are encoded again in the backward
pass, so that memory grows with the stored embeddings alone and not with what the tower needs for each slice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from medvl.types import ImageBatch, ImageEncoder, ImageFeatures
from modalities.pooling import Pooling, checked_valid


class SlicePooledEncoder(ImageEncoder):
    """CT tower: ``backbone`` encodes each valid slice as if it were an image, ``pooling`` makes one vector of a study's slices.

    ``slices`` are the backbone's pooled vectors, ``tokens`` its tokens, row-major in (S, gh, gw), so that a map is a volume; both are 0
    on padding, which is never encoded. Where all tokens of 60 slices are too many (ViT-S/16 at 224 pixels: 18 MB a study), take a
    coarser grid or none.

    Chunking does not change the result in evaluation. In training, batch normalisation sees one chunk at a time: it normalises by the
    chunk's own statistics and updates the running ones once a chunk. Chunks are therefore of nearly equal size and take every k-th slice
    of the batch, so that each sees all heights and studies. Encoding again does not update them a second time.

    Args:
        backbone: a 2D tower, which sees (n, C, H, W) and no ``valid``; C is the number of HU windows.
        pooling: how slices become one vector.
        chunk: slices encoded at once, in training and evaluation.
        tokens: keep tokens (maps and token similarities need them).
        token_pool: tokens are averaged over squares of this side; the token grid must be a multiple of it.
        recompute: encode again in the backward pass. Costs a forward pass; turn it off for a backbone that is frozen, which keeps
            little for it, and where memory is no matter.
    Raises:
        ValueError: a pooling of another width than the backbone, or sizes below 1.
    """

    def __init__(
        self,
        backbone: ImageEncoder,
        pooling: Pooling,
        chunk: int = 8,
        tokens: bool = True,
        token_pool: int = 1,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        if pooling.embed_dim not in (None, backbone.embed_dim):
            raise ValueError(f"the backbone embeds in {backbone.embed_dim} dimensions, {type(pooling).__name__} takes {pooling.embed_dim}")
        if chunk < 1 or token_pool < 1:
            raise ValueError(f"chunk and token_pool must be at least 1, got {chunk} and {token_pool}")
        self.embed_dim = backbone.embed_dim
        self.backbone, self.pooling = backbone, pooling
        self.chunk, self.keep_tokens, self.token_pool, self.recompute = chunk, tokens, token_pool, recompute

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """``batch.pixels`` (B, C, S, H, W), ``valid`` and ``position_mm`` (B, S).

        Raises:
            ValueError: pixels or ``valid`` of another shape, a study without a valid slice, positions missing that the pooling needs.
        """
        pixels = batch.pixels
        if pixels.ndim != 5:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, SlicePooledEncoder takes volumes (B, C, S, H, W)")
        b, _, s, _, _ = pixels.shape
        valid = checked_valid(batch.valid, pixels.transpose(1, 2))
        where = valid.nonzero()  # (n, 2): study and slice
        chunks = -(-len(where) // self.chunk)
        rows = [where[k::chunks] for k in range(chunks)]
        places = [at[:, 0] * s + at[:, 1] for at in rows]
        encoded = (self._encode(pixels, at) for at in rows)
        slices, *rest = _gather(encoded, places, b * s)
        slices = slices.unflatten(0, (b, s))
        mixed = self.pooling(slices, valid, batch.position_mm)
        features = ImageFeatures(mixed.pooled, slices=slices, slice_weights=mixed.weights, slice_valid=batch.valid)
        if not rest:
            return features
        gh, gw = rest[0].shape[1:3]
        token_valid = None if batch.valid is None else valid[..., None].expand(b, s, gh * gw).flatten(1)
        return features.replace(tokens=rest[0].reshape(b, s * gh * gw, -1), grid=(s, gh, gw), token_valid=token_valid)

    def _encode(self, pixels: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        """One chunk; for the backward pass nothing but its result is kept, and its slices are taken from the volume again."""
        if self.recompute and torch.is_grad_enabled():
            again = _FrozenStatistics(self.backbone)
            result: tuple[Tensor, ...] = checkpoint(
                self._encode_now, pixels, at, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again)
            )
            return result
        return self._encode_now(pixels, at)

    def _encode_now(self, pixels: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        """Pooled vectors (n, D) and, if kept, tokens (n, gh, gw, D) of the slices ``at`` (n, 2)."""
        features = self.backbone(ImageBatch(pixels[at[:, 0], :, at[:, 1]]))
        if not self.keep_tokens or features.tokens is None:
            return (features.pooled,)
        assert features.grid is not None
        tokens = features.tokens.unflatten(1, features.grid)
        if self.token_pool > 1:
            if features.grid[0] % self.token_pool or features.grid[1] % self.token_pool:
                raise ValueError(f"token_pool {self.token_pool} does not divide the backbone's token grid {features.grid}")
            tokens = F.avg_pool2d(tokens.permute(0, 3, 1, 2), self.token_pool).permute(0, 2, 3, 1)
        return features.pooled, tokens


def _gather(encoded: Any, places: Sequence[Tensor], total: int) -> list[Tensor]:
    """The parts of all chunks in ``total`` rows, row ``places[k][i]`` from row i of chunk k, 0 elsewhere.

    Without gradients each chunk is written to its place as it comes, so that nothing is held twice.
    """
    full: list[Tensor] = []
    kept: list[tuple[Tensor, ...]] = []
    for parts, at in zip(encoded, places, strict=True):
        if parts[0].requires_grad:
            kept.append(parts)
            continue
        full = full or [part.new_zeros(total, *part.shape[1:]) for part in parts]
        for whole, part in zip(full, parts, strict=True):
            whole[at] = part
    if full:
        return full
    order = torch.cat(list(places))
    columns = list(zip(*kept, strict=True))
    return [part.new_zeros(total, *part.shape[1:]).index_copy(0, order, part) for part in (torch.cat(column) for column in columns)]


class _FrozenStatistics:
    """While entered, normalisation layers in training normalise by the batch but leave their running statistics alone.

    For the second forward pass of activation checkpointing. The running buffers are still passed to the layer: without them it would
    keep other tensors for its backward pass than in the first. May be entered many times, as a graph may be gone through again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [layer for layer in module.modules() if isinstance(layer, _NormBase)]
        self.before: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self.before = [(layer.momentum, layer.num_batches_tracked) for layer in self.layers]
        for layer in self.layers:
            layer.momentum, layer.num_batches_tracked = 0.0, None  # 0: keep the old value whole; no count: keep the momentum

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for layer, (momentum, count) in zip(self.layers, self.before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count
