"""A small radiograph tower that trains from scratch on a CPU in minutes.

Shapes: B studies, H x W pixels, D embedding width. A residual trunk reads the image at strides 4, 8 and 16 and a top-down path
(feature pyramid, arXiv:1612.03144) brings what the coarse levels know back to stride 4, so that a nodule of a few pixels has tokens
of its own. Every halving is by whole cells (pixels to channels, area means), never by a strided 3 x 3 convolution: those are centred
up and to the left of their cell, and the offsets add up to several pixels in a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.nn.tokens import cell_valid
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures


class ConvEncoder(ImageEncoder):
    """Residual trunk with a feature pyramid; tokens at stride 4, ``pooled`` from mean and maximum of every level.

    Args:
        embed_dim: width D of pooled vector and tokens.
        widths: channels at strides 4, 8 and 16.
        blocks: residual blocks per stride.
        in_chans: channels of the image.
        drop_rate: dropout before the pooled projection.
        bands: odd widths in pixels; the image less its mean over each such window is shown to the trunk as further channels, scaled to
            unit variance, so that faint small structures (a nodule, a catheter) are not drowned by the large ones (unsharp masking).
    """

    stride = 4

    def __init__(
        self,
        embed_dim: int = 128,
        widths: Sequence[int] = (64, 128, 256),
        blocks: Sequence[int] = (2, 2, 2),
        in_chans: int = 1,
        drop_rate: float = 0.1,
        bands: Sequence[int] = (5, 17),
    ) -> None:
        super().__init__()
        if len(widths) != len(blocks):
            raise ValueError(f"widths {tuple(widths)} and blocks {tuple(blocks)} differ in length")
        self.embed_dim = embed_dim
        if any(band < 3 or band % 2 == 0 for band in bands):
            raise ValueError(f"bands must be odd and at least 3 pixels wide, got {tuple(bands)}")
        self.bands = tuple(bands)
        channels = in_chans * (1 + len(self.bands))
        self.scale = nn.BatchNorm2d(channels, affine=False)
        self.stem = nn.Sequential(nn.PixelUnshuffle(self.stride), _conv(channels * self.stride**2, widths[0]))
        stages, before = [], widths[0]
        for level, (width, depth) in enumerate(zip(widths, blocks, strict=True)):
            residual = [_Residual(before if i == 0 else width, width) for i in range(depth)]
            stages.append(nn.Sequential(*([nn.AvgPool2d(2)] if level else []), *residual))
            before = width
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(width, widths[0], 1) for width in widths)
        self.join = nn.Sequential(_conv(widths[0], widths[0]), nn.Conv2d(widths[0], embed_dim, 1))
        self.pool = nn.Sequential(nn.Dropout(drop_rate), nn.Linear(2 * sum(widths), embed_dim))

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """``batch.pixels`` (B, C, H, W), H and W multiples of 16.

        Raises:
            ValueError: sides that are no multiple of 16.
        """
        if batch.pixels.shape[-1] % 16 or batch.pixels.shape[-2] % 16:
            raise ValueError(f"ConvEncoder takes sides that are multiples of 16, got {tuple(batch.pixels.shape[-2:])}")
        x = self.stem(self._with_detail(batch).contiguous(memory_format=torch.channels_last))
        levels: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        pooled = self.pool(torch.cat([stat for level in levels for stat in (level.mean((2, 3)), level.amax((2, 3)))], dim=1))
        top = self.lateral[-1](levels[-1])
        for lateral, level in zip(list(self.lateral)[-2::-1], levels[-2::-1], strict=True):
            top = F.interpolate(top, scale_factor=2.0, mode="bilinear", align_corners=False) + lateral(level)
        tokens = self.join(top)
        grid = (tokens.shape[2], tokens.shape[3])
        valid = None if batch.valid is None else cell_valid(batch.valid, grid)
        return ImageFeatures(pooled=pooled, tokens=tokens.flatten(2).transpose(1, 2), grid=grid, token_valid=valid)

    def _with_detail(self, batch: ImageBatch) -> Tensor:
        """(B, C * (1 + bands), H, W): the image and what differs from its surroundings, each of unit variance and cut at 5 deviations.

        Means are over valid pixels only, so that the edge of the letterbox is no structure.
        """
        pixels = batch.pixels.float()
        valid = pixels.new_ones(1, 1, *pixels.shape[2:]) if batch.valid is None else batch.valid[:, None].float()
        pixels = pixels * valid
        channels = [pixels]
        for band in self.bands:
            total, seen = _box_mean(pixels, band), _box_mean(valid, band)
            channels.append((pixels - total / seen.clamp_min(1e-6)) * valid)
        scaled: Tensor = self.scale(torch.cat(channels, dim=1))
        return scaled.clamp(-5.0, 5.0)


def _box_mean(x: Tensor, width: int) -> Tensor:
    """Mean over a width x width window round each pixel, 0 outside the image; by running sums, whose cost does not grow with the width."""
    for dim in (-2, -1):
        pad = (width // 2 + 1, width // 2) if dim == -1 else (0, 0, width // 2 + 1, width // 2)
        sums = F.pad(x, pad).cumsum(dim)
        x = (sums.narrow(dim, width, x.shape[dim]) - sums.narrow(dim, 0, x.shape[dim])) / width
    return x


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class _Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (ResNet basic block, arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))
