"""A tower whose vector of an image is the mean of its tokens."""

from __future__ import annotations

from typing import Any

from medvl.types import ImageBatch, ImageEncoder, ImageFeatures


class TokenMeanEncoder(ImageEncoder):
    """The tokens of another tower, (B, N, D), and in the place of its pooled vector their mean over what is not padding.

    Whatever aligns the pooled vectors so aligns the tokens, and a map means something without a local loss.

    Args:
        backbone: a tower that keeps tokens, one row for each image. What it pools itself is not used, and gets no gradient.
    Raises:
        ValueError: at the first batch, a tower that keeps no tokens.
    Source: "BioViL", arXiv:2204.09817: the global image embedding is the mean of the projected patch embeddings.
    """

    def __init__(self, backbone: ImageEncoder) -> None:
        super().__init__()
        self.backbone, self.embed_dim = backbone, backbone.embed_dim
        pool: Any = getattr(backbone, "pool", None)
        if pool is not None:
            pool.requires_grad_(False)  # no process of several may wait for its gradients

    def files(self) -> dict[str, bytes]:
        """Those of the backbone."""
        return {f"backbone/{name}": content for name, content in self.backbone.files().items()}

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """``batch`` as the backbone takes it."""
        features = self.backbone(batch)
        if features.tokens is None:
            raise ValueError(f"{type(self.backbone).__name__} keeps no tokens to take the mean of")
        if features.token_valid is None:
            return features.replace(pooled=features.tokens.mean(1))
        seen = features.token_valid[..., None]
        return features.replace(pooled=features.tokens.masked_fill(~seen, 0.0).sum(1) / seen.sum(1))
