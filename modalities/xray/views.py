"""Several views of one radiograph study: any 2D tower over each of them, and a pooling over what it says of each.

Shapes: I images, B studies, V views of the study that has most, C channels, H x W pixels, (gh, gw) the 2D tower's token grid, D embedding
width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medvl.types import OTHER_VIEW, ImageBatch, ImageEncoder, ImageFeatures
from modalities.pooling import Pooling
from modalities.studies import check_pooling, checked_index, pool_by_study


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
        check_pooling(pooling, backbone.embed_dim)
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
        features = self.backbone(ImageBatch(batch.pixels, batch.valid))
        mark = self.view_embedding(self._kinds(batch)).to(features.pooled.dtype)  # (I, D)
        tokens = None if features.tokens is None else features.tokens + mark[:, None]
        return pool_by_study(features.replace(pooled=features.pooled + mark, tokens=tokens), batch.study, self.pooling)

    def _kinds(self, batch: ImageBatch) -> Tensor:
        """(I,) rows of the embedding; in training a share of them is hidden."""
        images = len(batch.pixels)
        hidden = torch.full((images,), OTHER_VIEW, device=batch.pixels.device)
        if batch.view is None:
            return hidden
        kinds = checked_index(batch.view, images, "view")
        if int(kinds.max()) > OTHER_VIEW:
            raise ValueError(f"view holds {int(kinds.max())}, expected 0 to {OTHER_VIEW}, as medvl.types.view_index gives it")
        if self.training and self.unknown_rate > 0:
            return torch.where(torch.rand(images, device=kinds.device) < self.unknown_rate, hidden, kinds)
        return kinds
