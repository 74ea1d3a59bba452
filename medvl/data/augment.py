"""Changes to training images that keep a report true: no left-right flip, and small enough to leave every finding in the picture.

Shapes: B images, C channels, S slices, H rows, W columns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from medvl.types import Configurable, ImageBatch


class Augment(Configurable):
    """Random rotation, scale, shift, contrast, brightness and noise, each image its own, uniform in the ranges given; of volumes every
    k-th slice, from a random one on.

    Args:
        rotation_deg: largest rotation to either side.
        scale: largest relative change of size (0.1: 0.9 to 1.1).
        shift: largest shift as a fraction of the side.
        contrast: largest relative change of contrast about zero, the mean of a normalised image.
        brightness: largest offset, in normalised units.
        noise: standard deviation of Gaussian noise, in normalised units, uniform from 0 to this.
        slice_step: k. A tower that reads slices one by one costs a k-th, and sees the others in other epochs (as FLIP leaves out patches,
            arXiv:2212.00794); choose it so that k slices are no thicker than the findings.
    Raises:
        ValueError: ``slice_step`` below 1.
    """

    def __init__(
        self,
        rotation_deg: float = 7.0,
        scale: float = 0.1,
        shift: float = 0.05,
        contrast: float = 0.2,
        brightness: float = 0.2,
        noise: float = 0.05,
        slice_step: int = 1,
    ) -> None:
        if slice_step < 1:
            raise ValueError(f"slice_step is {slice_step}, expected at least 1")
        self.rotation_deg, self.scale, self.shift = rotation_deg, scale, shift
        self.contrast, self.brightness, self.noise, self.slice_step = contrast, brightness, noise, slice_step

    def __call__(self, images: ImageBatch, rng: np.random.Generator) -> ImageBatch:
        """A changed copy. Of 2D images, what moves in from outside is 0 and not valid; the slices of a volume move together, and their edge
        moves in.
        """
        if images.pixels.ndim == 5 and self.slice_step > 1:
            images = every_kth_slice(images, self.slice_step, rng)
        pixels = images.pixels
        b, h, w = len(pixels), *pixels.shape[-2:]
        angle = np.deg2rad(rng.uniform(-self.rotation_deg, self.rotation_deg, b))
        zoom = 1 / rng.uniform(1 - self.scale, 1 + self.scale, b)
        shift = rng.uniform(-2 * self.shift, 2 * self.shift, (b, 2))  # grid_sample's coordinates run from -1 to 1
        aspect = h / w
        theta = np.stack(
            [
                np.stack([zoom * np.cos(angle), -zoom * np.sin(angle) * aspect, shift[:, 0]], axis=1),
                np.stack([zoom * np.sin(angle) / aspect, zoom * np.cos(angle), shift[:, 1]], axis=1),
            ],
            axis=1,
        )
        grid = F.affine_grid(torch.from_numpy(theta).float(), [b, 1, h, w], align_corners=False)
        each = (b, *[1] * (pixels.ndim - 1))
        gain = torch.from_numpy(rng.uniform(1 - self.contrast, 1 + self.contrast, each)).float()
        offset = torch.from_numpy(rng.uniform(-self.brightness, self.brightness, each)).float()
        sigma = torch.from_numpy(rng.uniform(0, self.noise, each)).float()
        noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
        if pixels.ndim == 5:
            moved = F.grid_sample(pixels.flatten(1, 2), grid, padding_mode="border", align_corners=False).view_as(pixels)
            return replace(images, pixels=moved * gain + offset + sigma * noise)
        valid = torch.ones(b, h, w, dtype=torch.bool) if images.valid is None else images.valid
        moved = F.grid_sample(torch.cat([pixels, valid[:, None].float()], dim=1), grid, align_corners=False)
        inside = moved[:, -1:] > 0.5
        changed = torch.where(inside, moved[:, :-1] * gain + offset + sigma * noise, 0.0)
        return replace(images, pixels=changed, valid=inside[:, 0])


def every_kth_slice(images: ImageBatch, step: int, rng: np.random.Generator) -> ImageBatch:
    """Of each volume of a batch (B, C, S, H, W) every ``step``-th slice, from one drawn among its first on, with its place in mm."""
    b, _, s, _, _ = images.pixels.shape
    count = -(-s // step)
    valid = torch.ones(b, s, dtype=torch.bool) if images.valid is None else images.valid
    begin = torch.from_numpy(rng.integers(0, np.minimum(step, valid.sum(1).numpy())))
    at = begin[:, None] + step * torch.arange(count)  # (B, count) slices; those beyond the end are padding
    inside, at = at < s, at.clamp_max(s - 1)
    rows = torch.arange(b)[:, None]
    return replace(
        images,
        pixels=images.pixels.transpose(1, 2)[rows, at].transpose(1, 2).contiguous(),
        valid=valid[rows, at] & inside,
        position_mm=None if images.position_mm is None else images.position_mm[rows, at],
    )
