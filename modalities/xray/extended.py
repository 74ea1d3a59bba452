"""Trainable transformer layers over a tower that is frozen, so that image tokens are aligned with text where the tower itself never was.

Shapes: B studies, N tokens, W the width of the tower below, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medvl.nn.transformer import TransformerBlock
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures


class ExtendedEncoder(ImageEncoder):
    """Pre-norm transformer layers with LayerScale over the pooled vector and the tokens of another tower.

    The sequence is the tower's pooled vector in the place of a class token, then its tokens; the first output is the new pooled vector,
    the others are the new tokens, on the same grid. Positions are those that the tower has put into its tokens. Tokens on padding
    are attended by none and are 0 in the result.

    Whether the tower below learns too is its own affair: give it ``freeze: true``, and ``embed_dim: null`` so that no projection of
    its own stands between, for layers that alone are trained.

    Source: the align transformer of "RadZero" (arXiv:2504.07416): two layers of the kind of DINOv2 over class and patch tokens of a
    frozen DINOv2. Departures: a last layer norm, as pre-norm stacks have it, and an optional projection.

    Args:
        backbone: a tower with tokens.
        layers: number of layers.
        heads: attention heads; W is a multiple of it.
        mlp_ratio: hidden width of the layers' mlp over W.
        drop_rate: dropout of what the layers add.
        layer_scale: start of LayerScale. Small values start near the tower as it is; 1 is what transformers' DINOv2 starts with.
        embed_dim: D of a projection after the layers, shared by pooled vector and tokens; None: none, D is W.
    Raises:
        ValueError: fewer than one layer, W no multiple of ``heads``, a tower that pools views.
    """

    def __init__(
        self,
        backbone: ImageEncoder,
        layers: int = 2,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        layer_scale: float = 1.0,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        if backbone.pools_views:
            raise ValueError(f"{type(backbone).__name__} pools views; put ExtendedEncoder below it, over the tower of single images")
        width = backbone.embed_dim
        if layers < 1 or heads < 1 or width % heads:
            raise ValueError(
                f"{layers} layers of {heads} heads over {width} dimensions: expected positive numbers, the width a multiple of heads"
            )
        self.embed_dim = width if embed_dim is None else embed_dim
        self.backbone = backbone
        hidden = round(mlp_ratio * width)
        self.layers = nn.ModuleList(TransformerBlock(width, heads, hidden, drop_rate, layer_scale) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.project: nn.Module = nn.Identity() if embed_dim is None else nn.Linear(width, embed_dim, bias=False)

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """What ``backbone`` takes.

        Raises:
            ValueError: the tower below keeps no tokens, or pools slices.
        """
        features = self.backbone(batch)
        if features.tokens is None:
            raise ValueError(f"{type(self.backbone).__name__} keeps no tokens, over which ExtendedEncoder's layers could go")
        if features.slices is not None:
            raise ValueError(f"{type(self.backbone).__name__} pools slices; put ExtendedEncoder below it, over the tower of single slices")
        valid, tokens = features.token_valid, features.tokens
        seen: Tensor | None = None
        if valid is not None:
            tokens = torch.where(valid[..., None], tokens, 0.0)  # what is masked is still multiplied, and may be anything
            seen = torch.cat([valid.new_ones(len(valid), 1), valid], dim=1)
        x = torch.cat([features.pooled[:, None], tokens], dim=1)
        for layer in self.layers:
            x = layer(x, seen)
        x = self.project(self.norm(x))
        pooled, tokens = x[:, 0], x[:, 1:]
        return features.replace(pooled=pooled, tokens=tokens if valid is None else torch.where(valid[..., None], tokens, 0.0))
