"""Several images of one study (views of a radiograph, series of a CT) as one: what any tower says of each, laid out by study and pooled.

Shapes: I images, B studies, V images of the study that has most, S slices, D embedding width. Images come as they are, with the study of
each, so nothing is encoded for one that is missing; features are laid out by study.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medvl.types import ImageFeatures
from modalities.pooling import Pooling


def check_pooling(pooling: Pooling, embed_dim: int) -> None:
    """Refuse a pooling that images of a study cannot be given to.

    Raises:
        ValueError: one of another width, or one that needs positions.
    """
    if pooling.embed_dim not in (None, embed_dim):
        raise ValueError(f"the backbone embeds in {embed_dim} dimensions, {type(pooling).__name__} takes {pooling.embed_dim}")
    if pooling.needs_position:
        raise ValueError(
            f"{type(pooling).__name__} needs the position of each slice, which views and series do not have; take GatedAttention"
        )


def pool_by_study(features: ImageFeatures, study: Tensor | None, pooling: Pooling) -> ImageFeatures:
    """Features of I images as those of B studies.

    Args:
        features: of I images, with the grid of one.
        study: (I,) int64, whose each is; None: each is a study by itself, and grid, tokens and slices stay as they are.
        pooling: how the vectors of a study's images become one.
    Returns:
        ``pooled`` (B, D); ``views``, ``view_weights`` and ``view_valid`` of V images; with ``study`` tokens on the grid (V, ...), and
        slices of one series after those of another, weighed by the share of their series.
    Raises:
        ValueError: ``study`` of another shape or with an index that does not exist, or a study without an image.
    """
    images = len(features.pooled)
    whose = torch.arange(images, device=features.pooled.device) if study is None else checked_index(study, images, "study")
    slot, counts = places(whose)
    b, v = len(counts), int(counts.max())
    at = whose * v + slot

    def by_study(parts: Tensor) -> Tensor:
        """(I, ...) to (B, V, ...), 0 where an image is missing."""
        return parts.new_zeros(b * v, *parts.shape[1:]).index_copy(0, at, parts).unflatten(0, (b, v))

    views, valid = by_study(features.pooled), by_study(torch.ones_like(whose, dtype=torch.bool))
    mixed = pooling(views, valid)
    found = features.replace(pooled=mixed.pooled, views=views, view_weights=mixed.weights, view_valid=valid)
    if study is None:
        return found
    if features.tokens is not None:
        assert features.grid is not None
        seen = torch.ones_like(features.tokens[..., 0], dtype=torch.bool) if features.token_valid is None else features.token_valid
        found = found.replace(
            tokens=by_study(features.tokens).flatten(1, 2), grid=(v, *features.grid), token_valid=by_study(seen).flatten(1, 2)
        )
    if features.slices is not None:
        assert features.slice_weights is not None
        seen = torch.ones_like(features.slices[..., 0], dtype=torch.bool) if features.slice_valid is None else features.slice_valid
        found = found.replace(
            slices=by_study(features.slices).flatten(1, 2),
            slice_weights=(by_study(features.slice_weights) * mixed.weights[..., None]).flatten(1, 2),
            slice_valid=by_study(seen).flatten(1, 2),
        )
    return found


def places(study: Tensor) -> tuple[Tensor, Tensor]:
    """Which image of its study each of I images is, in the order given (I,), and how many each of the B studies has (B,).

    Raises:
        ValueError: a study below the highest that has no image.
    """
    counts = torch.bincount(study)
    if (empty := (counts == 0).nonzero().flatten().tolist()) or not len(counts):
        raise ValueError(f"studies {empty} of the batch have no image; number those that have one from 0 on")
    order = study.argsort(stable=True)
    slot = torch.empty_like(study)
    slot[order] = torch.arange(len(study), device=study.device) - (counts.cumsum(0) - counts)[study[order]]
    return slot, counts


def checked_index(index: Tensor, images: int, name: str) -> Tensor:
    """The index (I,) itself.

    Raises:
        ValueError: another shape or type, or a number below 0.
    """
    if index.shape != (images,) or index.dtype != torch.int64 or bool((index < 0).any()):
        raise ValueError(f"{name} is {index.dtype} of shape {tuple(index.shape)}, expected ({images},) indices from 0 on, int64")
    return index
