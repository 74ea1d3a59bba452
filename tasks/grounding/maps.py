"""Maps on the token grid, which is what is kept, and the same laid back on the image's own pixels, one at a time.

Shapes: B images, Q queries, n axes (2 or 3); a grid is (H, W) or (S, H, W) tokens. Pixels the tower never saw are NaN, not 0.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvl.geometry import GridMoments, GridTransform
from medvl.model import DualEncoder
from medvl.types import ImageFeatures, ImageSample

EXTERNAL = "external"
"""Unit of maps that were made elsewhere."""
ASSUMED_SIDE_MM = 430.0
"""The longer side of a radiograph whose file states no pixel spacing: that of a film of 35 x 43 cm (14 x 17 inches)."""


@dataclass(frozen=True)
class SimilarityMap:
    """How much each native pixel of one image resembles one phrase."""

    phrase: str
    scores: NDArray[
        np.float32
    ]  # (rows, columns) of the file, of a volume (slices, rows, columns); cosines, NaN where the tower did not look
    peak: tuple[int, ...] | None  # index of the highest score; None for a map that points nowhere


@dataclass(frozen=True)
class GridMaps:
    """Scores of one image for Q queries on its token grid."""

    scores: Tensor  # (Q, *grid), NaN on padding; float16 is enough to keep
    transform: GridTransform
    step_mm: tuple[float, ...]  # of the native image, by its axes
    extent: tuple[int, ...] | None = None  # voxels that the grid covers, as :class:`medvl.types.ImageFeatures` has it
    offset: tuple[float, ...] | None = None  # where tokens look, as :attr:`medvl.model.DualEncoder.token_offset` has it
    unit: str = "cosine"

    def native(self, query: int) -> NDArray[np.float32]:
        """One map on the native pixels."""
        return native_maps(self.scores[query].float()[None], self.transform, self.extent, self.offset)[0]

    @functools.cached_property
    def moments(self) -> GridMoments:
        """What regions of the native image are measured by, without laying maps out.

        Raises:
            ValueError: queries whose tokens are not known in the same places.
        """
        known = torch.isfinite(self.scores)
        if not bool((known == known[0]).all()):
            raise ValueError("maps that are NaN in different places cannot be measured together on the grid; take one at a time")
        return GridMoments(self.transform, self.scores.shape[1:], self.extent, known[0], self.offset)

    def token_mm(self) -> tuple[float, ...]:
        """Size of a token's cell by the grid's axes, in mm."""
        return token_mm(self.transform, self.step_mm, self.scores.shape[1:], self.extent)


def token_mm(
    transform: GridTransform, step_mm: Sequence[float], grid: Sequence[int], extent: Sequence[int] | None = None
) -> tuple[float, ...]:
    """Size of a token's cell by the grid's axes, in mm."""
    covered = transform.shape if extent is None else extent
    return tuple(
        size / count * step_mm[axis] / abs(scale)
        for size, count, axis, scale in zip(covered, grid, transform.axes, transform.scale, strict=True)
    )


def native_step_mm(sample: ImageSample) -> tuple[float, ...]:
    """Native spacing by native axes, in mm; of a radiograph whose file does not say by :data:`ASSUMED_SIDE_MM`."""
    if sample.affine is not None:
        return tuple(float(step) for step in np.linalg.norm(sample.affine[:3, :3], axis=0))
    if sample.spacing_mm is None:
        return (ASSUMED_SIDE_MM / max(sample.transform.native_shape),) * len(sample.transform.native_shape)
    transform = sample.transform
    found = dict(zip(transform.axes, (mm * abs(k) for mm, k in zip(sample.spacing_mm, transform.scale, strict=True)), strict=True))
    return tuple(found[axis] for axis in range(len(found)))


@torch.inference_mode()
def token_maps(model: DualEncoder, images: ImageFeatures, phrases: Sequence[str]) -> Tensor:
    """(B, Q, *grid) cosines of every token with every phrase."""
    return model.similarity.maps(images, model.encode_text(phrases))


def native_maps(
    grids: Tensor, transform: GridTransform, extent: Sequence[int] | None = None, offset: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """(Q, *native shape) of one image's (Q, *grid) token maps.

    Args:
        extent: as :func:`batch_extent` gives it.
        offset: where tokens look, ``model.token_offset.get(axes)``.
    """
    maps: NDArray[np.float32] = transform.map_to_native(grids, extent, offset).cpu().numpy().astype(np.float32, copy=False)
    return maps


def batch_extent(samples: Sequence[ImageSample], features: ImageFeatures | None = None) -> tuple[int, ...]:
    """Voxels along each axis that the tokens of a batch cover: a batch of volumes is padded to the longest.

    Args:
        features: of the batch, for towers whose cells may reach beyond it.
    """
    if features is not None and features.extent is not None:
        return features.extent
    return tuple(max(sizes) for sizes in zip(*(sample.pixels.shape[1:] for sample in samples), strict=True))


def slug(phrase: str) -> str:
    """The phrase as a file name: plain lower case, runs of anything but letters and digits as one underscore.

    Accents go; of a phrase without a Latin letter or digit there is a hash of its words left.
    """
    plain = unicodedata.normalize("NFKD", phrase.lower()).encode("ascii", "ignore").decode()
    words = "_".join(re.findall(r"\w+", phrase.lower()))
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")[:80] or f"phrase_{hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}"
