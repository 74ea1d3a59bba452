"""What towers over a library's 2D backbone have in common, whichever library it is from.

Shapes: B studies, C channels, H x W pixels, N tokens on a (gh, gw) grid in row-major order, F the backbone's width, D embedding width.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvl.nn.lora import MARK, Lora, has_adapters, merged
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

    A subclass that takes ``lora`` ends its constructor with :meth:`add_adapters`. The state dict of such a tower holds the backbone and the
    adapters. A tower without adapters, as one that is loaded from a run is, adds them to the weights as it reads them, so it needs no peft
    and costs what the backbone does.

    Raises:
        ValueError: a width or size below 1.
    """

    backbone: Any
    lora_scale: Tensor

    def __init__(self, backbone: nn.Module, width: int, embed_dim: int | None, image_size: int, in_chans: int, freeze: bool) -> None:
        super().__init__()
        if min(image_size, in_chans, width if embed_dim is None else embed_dim) < 1:
            raise ValueError(f"embed_dim {embed_dim}, image_size {image_size} and in_chans {in_chans} must be at least 1")
        self.embed_dim = width if embed_dim is None else embed_dim
        self.image_size, self.in_chans, self.freeze = image_size, in_chans, freeze
        self.backbone = backbone
        self.project: nn.Module = nn.Identity() if embed_dim is None else nn.Linear(width, embed_dim, bias=False)
        self.adapted = False
        if freeze:
            backbone.requires_grad_(False).eval()
        self.register_load_state_dict_pre_hook(_with_merged_adapters)

    def add_adapters(self, lora: Lora | None) -> None:
        """Freeze the backbone and put adapters into it that train; None: nothing.

        Raises:
            ImportError: peft is not installed.
            ValueError: with ``freeze``, targets that name no layer, or layers whose weights the backbone takes without calling them.
        """
        if lora is None:
            return
        if self.freeze:
            raise ValueError("lora trains adapters in a backbone that is kept as it is otherwise; leave out freeze: true, or lora")
        self.backbone, self.adapted = lora.into(self.backbone), True
        self.register_buffer("lora_scale", torch.tensor(lora.scale))
        self._check_adapters()

    def _check_adapters(self) -> None:
        """See that every adapter has a part in what the backbone gives."""
        was_training = self.training
        self.eval()
        last = {name: p for name, p in self.backbone.named_parameters() if MARK in name and p.requires_grad and "lora_B" in name}
        first = next(self.parameters())
        with torch.enable_grad():
            pooled, tokens, _ = self.features(torch.zeros(1, self.in_chans, self.image_size, self.image_size, device=first.device))
            found = torch.autograd.grad(pooled.sum() + tokens.sum(), list(last.values()), allow_unused=True)
        self.train(was_training)
        unused = [name.partition(MARK)[0] for name, gradient in zip(last, found, strict=True) if gradient is None]
        if unused:
            raise ValueError(
                f"lora: the backbone takes the weights of {len(unused)} layers without calling them (first: {unused[0]}), so adapters "
                "there would do nothing; give targets that name other layers"
            )

    def train(self, mode: bool = True) -> BackboneEncoder:
        """Training mode for all but a frozen backbone, whose dropout and batch statistics stay as in evaluation."""
        super().train(mode)
        if self.freeze:
            self.backbone.eval()
        elif self.adapted:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()  # its statistics are the pretrained backbone's
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


def _with_merged_adapters(module: BackboneEncoder, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a tower without adapters is loaded from one with them: they become part of the weights."""
    name = f"{prefix}lora_scale"
    if module.adapted or name not in state or not has_adapters(state, f"{prefix}backbone."):
        return
    scale = float(state.pop(name))
    inside = {key: state.pop(key) for key in [key for key in state if key.startswith(f"{prefix}backbone.")]}
    state.update(merged(inside, scale))


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
