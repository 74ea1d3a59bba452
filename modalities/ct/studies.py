"""Several series of one CT study: any CT tower over each of them, and a pooling over what it says of each.

Shapes: I series, B studies, V series of the study that has most, C channels, S slices, H x W pixels, D embedding width.
"""

from __future__ import annotations

from medvl.types import ImageBatch, ImageEncoder, ImageFeatures
from modalities.pooling import Pooling
from modalities.studies import check_pooling, pool_by_study


class SeriesPooledEncoder(ImageEncoder):
    """CT tower by studies: ``backbone`` encodes each series (kernel, phase, reconstruction), ``pooling`` makes one vector of a study's.

    Tokens stay those of their own series, whatever stands beside it: a map of a series is the same alone and in a study. The order of a
    study's series does not move ``pooled``, and neither do other studies of the batch.

    Args:
        backbone: a tower by slices or of volumes.
        pooling: how series become one vector; none that needs positions, as series have none.
    Raises:
        ValueError: a backbone that pools series itself, a pooling of another width or one that needs positions.
    """

    pools_views: bool = True

    def __init__(self, backbone: ImageEncoder, pooling: Pooling) -> None:
        super().__init__()
        if backbone.pools_views:
            raise ValueError(f"{type(backbone).__name__} pools series already; give a tower that encodes volumes one by one")
        check_pooling(pooling, backbone.embed_dim)
        self.embed_dim = backbone.embed_dim
        self.backbone, self.pooling = backbone, pooling

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """``batch.pixels`` (I, C, S, H, W), ``valid`` and ``position_mm`` (I, S), ``study`` (I,).

        Returns:
            Features of B studies with the grid (V, s, gh, gw) and V * S slices; where ``study`` is None those of I single series, as the
            backbone gives them, with V = 1.
        Raises:
            ValueError: as of the backbone and :func:`modalities.studies.pool_by_study`.
        """
        return pool_by_study(self.backbone(ImageBatch(batch.pixels, batch.valid, batch.position_mm)), batch.study, self.pooling)
