"""What towers over a library's 2D backbone have in common, whichever library it is from.

Shapes: B studies, C channels, H x W pixels, N tokens on a (gh, gw) grid in row-major order, F the backbone's width, D embedding width.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medvl.nn.tokens import cell_valid
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures


class BackboneEncoder(ImageEncoder):
    """Square images of one size through a backbone, frozen or not, and one linear projection that pooled vector and tokens share.

    Args:
        backbone: the library's module; what it gives is up to :meth:`features`.
        width: F of what :meth:`features` gives.
        embed_dim: D; None leaves the projection out, so that D is F.
        image_size: side in pixels of the images.
        in_chans: C.
        freeze: keep the backbone as it is (no gradients, evaluation mode); the projection is trained.
    Raises:
        ValueError: a width or size below 1.
    """

    backbone: Any

    def __init__(self, backbone: nn.Module, width: int, embed_dim: int | None, image_size: int, in_chans: int, freeze: bool) -> None:
        super().__init__()
        if min(image_size, in_chans, width if embed_dim is None else embed_dim) < 1:
            raise ValueError(f"embed_dim {embed_dim}, image_size {image_size} and in_chans {in_chans} must be at least 1")
        self.embed_dim = width if embed_dim is None else embed_dim
        self.image_size, self.in_chans, self.freeze = image_size, in_chans, freeze
        self.backbone = backbone
        self.project: nn.Module = nn.Identity() if embed_dim is None else nn.Linear(width, embed_dim, bias=False)
        if freeze:
            backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> BackboneEncoder:
        """Training mode for all but a frozen backbone, whose dropout and batch statistics stay as in evaluation."""
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        return self

    @abc.abstractmethod
    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(B, C, H, W) to pooled (B, F), tokens (B, N, F) in the space of pooled, and their grid; all before the projection."""

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
        pooled, tokens, grid = self.features(batch.pixels)
        valid = None if batch.valid is None else cell_valid(batch.valid, grid)
        return ImageFeatures(pooled=self.project(pooled), tokens=self.project(tokens), grid=grid, token_valid=valid)


def square_grid(count: int) -> tuple[int, int]:
    """The grid of ``count`` tokens of a square image.

    Raises:
        ValueError: no square number.
    """
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(f"{count} tokens make no square grid, so no map can be laid on the image")
    return side, side


def in_rgb(pixels: Tensor, channels: int) -> Tensor:
    """Grey images repeated to a backbone's channels: the same as summing its first kernel, and its weights stay as published."""
    return pixels.expand(-1, channels, -1, -1) if pixels.shape[1] == 1 else pixels


def check_channels(in_chans: int, channels: int, name: str) -> None:
    """Raise ValueError unless images of ``in_chans`` channels can be shown to a backbone of ``channels``."""
    if in_chans not in (1, channels):
        raise ValueError(f"backbone {name} takes {channels} channels; in_chans is 1 (grey, repeated) or {channels}, got {in_chans}")


def timm_features(backbone: Any, pixels: Tensor, pre_logits: bool = True) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """What a timm model's own head makes of an image, and of each of its tokens as if that were the whole image.

    Args:
        backbone: the timm model.
        pixels: (B, C, H, W).
        pre_logits: leave out the head's last layer, the classifier.
    Returns:
        pooled (B, F), tokens (B, N, F) without class and register tokens, and their grid.
    Raises:
        ValueError: tokens that make no square grid.
    """
    features = backbone.forward_features(pixels)
    pooled = backbone.forward_head(features, pre_logits=pre_logits)
    prefix: int = getattr(backbone, "num_prefix_tokens", 0) or 0
    channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    if features.ndim == 4:
        maps = features if channels_last else features.permute(0, 2, 3, 1)
        tokens, grid = maps.flatten(1, 2), (maps.shape[1], maps.shape[2])
        single = tokens.flatten(0, 1)
        images = single[:, None, None, :] if channels_last else single[:, :, None, None]
    else:
        tokens = features[:, prefix:]
        grid = square_grid(tokens.shape[1])
        images = tokens.flatten(0, 1)[:, None, :].expand(-1, prefix + 1, -1)  # class and register places hold the token too
    return pooled, backbone.forward_head(images, pre_logits=pre_logits).unflatten(0, tokens.shape[:2]), grid


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file.

    Raises:
        ValueError: another format.
    """
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoint {path}: expected a .safetensors file; other formats are pickles, which run code when loaded")
    return load_file(path)


def set_weights(backbone: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load the state dict of a checkpoint strictly.

    Raises:
        ValueError: keys or shapes that are another backbone's, or of another image size or channel count.
    """
    try:
        backbone.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} does not hold the weights of {name} at this image size and channel count: {error}") from error
