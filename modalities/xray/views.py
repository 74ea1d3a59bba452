"""Several views of one radiograph study: any 2D tower over each of them, and a pooling over what it says of each.

Shapes: I images, B studies, V views of the study that has most, C channels, H x W pixels, (gh, gw) the 2D tower's token grid, D embedding
width. Images come as they are, with the study of each, so nothing is encoded for a view that is missing; features are laid out by study.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medvl.types import OTHER_VIEW, ImageBatch, ImageEncoder, ImageFeatures
from modalities.pooling import Pooling


class ViewPooledEncoder(ImageEncoder):
    """Radiograph tower by studies: ``backbone`` encodes each image, ``pooling`` makes one vector of a study's images.

    With x_v what the backbone says of view v, pooled or a token, and e a learned vector for each kind of view (PA, AP, lateral, other or
    not known), views and tokens are x_v + e[kind of v]: the pooling may tell a lateral from a frontal film, and what all films of a kind
    share need not be in every text. e starts at 0, so that training starts from the backbone; then a study of one view has the very
    features of its image. Tokens stay those of their own view, whatever stands beside it: a map of a view is the same alone and in a study.

    The order of a study's views does not move ``pooled``, and neither do other studies of the batch (in training through batch
    normalisation alone, as in any batch).

    Args:
        backbone: a 2D tower.
        pooling: how views become one vector; none that needs positions, as views have none.
        unknown_rate: share of the images whose kind is hidden in training, so that the vector for kinds that are not known is learned
            where every film's kind is; pictures that are not DICOM seldom say what they are.
    Raises:
        ValueError: a backbone that pools views itself, a pooling of another width or one that needs positions, a rate outside [0, 1].
    """

    pools_views: bool = True

    def __init__(self, backbone: ImageEncoder, pooling: Pooling, unknown_rate: float = 0.0) -> None:
        super().__init__()
        if backbone.pools_views:
            raise ValueError(f"{type(backbone).__name__} pools views already; give a tower that encodes images one by one")
        if pooling.embed_dim not in (None, backbone.embed_dim):
            raise ValueError(f"the backbone embeds in {backbone.embed_dim} dimensions, {type(pooling).__name__} takes {pooling.embed_dim}")
        if pooling.needs_position:
            raise ValueError(f"{type(pooling).__name__} needs the position of each slice, which views do not have; take GatedAttention")
        if not 0 <= unknown_rate <= 1:
            raise ValueError(f"unknown_rate is {unknown_rate}, expected a share from 0 to 1")
        self.embed_dim = backbone.embed_dim
        self.backbone, self.pooling, self.unknown_rate = backbone, pooling, unknown_rate
        self.view_embedding = nn.Embedding(OTHER_VIEW + 1, self.embed_dim)
        nn.init.zeros_(self.view_embedding.weight)

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """``batch.pixels`` (I, C, H, W), ``valid`` (I, H, W), ``view`` (I,) and ``study`` (I,).

        Returns:
            Features of B studies with the grid (V, gh, gw); where ``study`` is None, of I single images with the grid (gh, gw), in which a
            tower without views has it. ``views``, ``view_weights`` and ``view_valid`` have V = 1 there.
        Raises:
            ValueError: ``view`` or ``study`` of another shape or with an index that does not exist, or a study without an image.
        """
        images = len(batch.pixels)
        features = self.backbone(ImageBatch(batch.pixels, batch.valid))
        mark = self.view_embedding(self._kinds(batch)).to(features.pooled.dtype)  # (I, D)
        study = torch.arange(images, device=batch.pixels.device) if batch.study is None else _checked(batch.study, images, "study")
        slot, counts = places(study)
        b, v = len(counts), int(counts.max())
        at = study * v + slot

        def by_study(parts: Tensor) -> Tensor:
            """(I, ...) to (B, V, ...), 0 where a view is missing."""
            return parts.new_zeros(b * v, *parts.shape[1:]).index_copy(0, at, parts).unflatten(0, (b, v))

        views, valid = by_study(features.pooled + mark), by_study(torch.ones_like(study, dtype=torch.bool))
        mixed = self.pooling(views, valid)
        found = ImageFeatures(mixed.pooled, views=views, view_weights=mixed.weights, view_valid=valid)
        if features.tokens is None:
            return found
        assert features.grid is not None
        tokens, token_valid = features.tokens + mark[:, None], features.token_valid
        if batch.study is None:
            return found.replace(tokens=tokens, grid=features.grid, token_valid=token_valid)
        seen = torch.ones_like(tokens[..., 0], dtype=torch.bool) if token_valid is None else token_valid
        return found.replace(tokens=by_study(tokens).flatten(1, 2), grid=(v, *features.grid), token_valid=by_study(seen).flatten(1, 2))

    def _kinds(self, batch: ImageBatch) -> Tensor:
        """(I,) rows of the embedding; in training a share of them is hidden."""
        images = len(batch.pixels)
        hidden = torch.full((images,), OTHER_VIEW, device=batch.pixels.device)
        if batch.view is None:
            return hidden
        kinds = _checked(batch.view, images, "view")
        if int(kinds.max()) > OTHER_VIEW:
            raise ValueError(f"view holds {int(kinds.max())}, expected 0 to {OTHER_VIEW}, as medvl.types.view_index gives it")
        if self.training and self.unknown_rate > 0:
            return torch.where(torch.rand(images, device=kinds.device) < self.unknown_rate, hidden, kinds)
        return kinds


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


def _checked(index: Tensor, images: int, name: str) -> Tensor:
    if index.shape != (images,) or index.dtype != torch.int64 or bool((index < 0).any()):
        raise ValueError(f"{name} is {index.dtype} of shape {tuple(index.shape)}, expected ({images},) indices from 0 on, int64")
    return index
