"""Radiograph towers over any timm backbone.

Shapes: B studies, C channels, H x W pixels, N tokens on a (gh, gw) grid, F the backbone's width, D embedding width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from medvl.nn.tokens import cell_valid
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures

if TYPE_CHECKING:
    from typing_extensions import Self


class TimmEncoder(ImageEncoder):
    """A timm backbone (ViT, Swin, ConvNeXt, ResNet ...) and one linear projection that pooled vector and tokens share.

    The pooled vector is what the backbone's own head gives before its classifier (class token, mean, attention pooling ...). Each
    token goes through the same head as if it were the whole image, so that pooled and tokens lie in one space: an image whose tokens
    are all equal has a pooled vector equal to each of them. Class and register tokens are left out of ``tokens``.

    The grid is taken to cover the square evenly. That is so for patch backbones (ViT, Swin, ConvNeXt: off by under 1 pixel by the
    centre of a token's gradient at 224 pixels); 3 x 3 convolutions of stride 2 look to the upper left of it (ResNet-18 by 16 of a
    token's 32 pixels, EfficientNet-B0 by 9), so prefer the former where maps matter.

    Args:
        name: a timm model name, such as ``vit_small_patch16_224`` or ``convnext_atto``.
        embed_dim: D.
        pretrained: load timm's published weights (from its cache or the network).
        checkpoint: a safetensors file with this backbone's state dict, instead of ``pretrained``; its classifier, if any, is left out.
        image_size: side in pixels of the square images; position embeddings and windows are made for it.
        in_chans: C.
        freeze: keep the backbone as it is (no gradients, evaluation mode); the projection is trained.
        drop_rate: dropout in the backbone's head.
    Raises:
        ValueError: a name timm does not know, a checkpoint of another backbone or with missing keys.
    """

    def __init__(
        self,
        name: str,
        embed_dim: int,
        pretrained: bool = False,
        checkpoint: Path | None = None,
        image_size: int = 224,
        in_chans: int = 1,
        freeze: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if pretrained and checkpoint is not None:
            raise ValueError(f"backbone {name}: give pretrained=True or checkpoint={checkpoint}, not both")
        self.embed_dim, self.image_size, self.in_chans, self.freeze = embed_dim, image_size, in_chans, freeze
        self.backbone: Any = _create(name, pretrained, image_size, in_chans, drop_rate)
        if checkpoint is not None:
            _load_backbone(self.backbone, Path(checkpoint), name)
        self.prefix_tokens: int = getattr(self.backbone, "num_prefix_tokens", 0) or 0
        self.channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        width = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.project = nn.Linear(width, embed_dim, bias=False)
        if freeze:
            self.backbone.requires_grad_(False).eval()

    @classmethod
    def architecture(cls, arguments: dict[str, Any], folder: Path) -> Self:
        """The tower without initial weights."""
        return cls(**{**arguments, "pretrained": False, "checkpoint": None})

    def train(self, mode: bool = True) -> TimmEncoder:
        """Training mode for all but a frozen backbone, whose dropout and batch statistics stay as in evaluation."""
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        return self

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """``batch.pixels`` (B, C, H, W) with H = W = ``image_size``.

        Raises:
            ValueError: pixels of another shape.
        """
        expected = (self.in_chans, self.image_size, self.image_size)
        if batch.pixels.ndim != 4 or tuple(batch.pixels.shape[1:]) != expected:
            raise ValueError(
                f"pixels have shape {tuple(batch.pixels.shape)}, this tower takes (B, {', '.join(map(str, expected))}); "
                "give the reader the tower's size and channels"
            )
        features = self.backbone.forward_features(batch.pixels)
        pooled = self.project(self.backbone.forward_head(features, pre_logits=True))
        tokens, grid = self._tokens(features)
        b, n, _ = tokens.shape
        tokens = self.project(self.backbone.forward_head(self._as_images(tokens, features.ndim), pre_logits=True)).view(
            b, n, self.embed_dim
        )
        valid = None if batch.valid is None else cell_valid(batch.valid, grid)
        return ImageFeatures(pooled=pooled, tokens=tokens, grid=grid, token_valid=valid)

    def _tokens(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The backbone's last features, in whatever form, to (B, N, F) in row-major order, and their grid."""
        if features.ndim == 4:
            maps = features if self.channels_last else features.permute(0, 2, 3, 1)
            return maps.flatten(1, 2), (maps.shape[1], maps.shape[2])
        tokens = features[:, self.prefix_tokens :]
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens make no square grid, so no map can be laid on the image")
        return tokens, (side, side)

    def _as_images(self, tokens: Tensor, ndim: int) -> Tensor:
        """(B, N, F) to B * N images of one token each, in the form the backbone's head takes: maps (4 axes) or sequences (3)."""
        single = tokens.flatten(0, 1)
        if ndim == 4:
            return single[:, None, None, :] if self.channels_last else single[:, :, None, None]
        return single[:, None, :].expand(-1, self.prefix_tokens + 1, -1)  # class and register places hold the token too


def _create(name: str, pretrained: bool, image_size: int, in_chans: int, drop_rate: float) -> Any:
    """A timm model without classifier for images of this size."""
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(f"timm {timm.__version__} has no model named {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, "in_chans": in_chans, "drop_rate": drop_rate}
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:  # convolutional backbones take any size and have no such argument
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **options)


def _load_backbone(backbone: nn.Module, path: Path, name: str) -> None:
    """Load a backbone's state dict strictly, but for the classifier that we do not have."""
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoint {path}: expected a .safetensors file; other formats are pickles, which run code when loaded")
    classifier = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{n}." for n in ([classifier] if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in load_file(path).items() if not (heads and key.startswith(heads))}
    try:
        backbone.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} does not hold the weights of {name} at this image size and channel count: {error}") from error
