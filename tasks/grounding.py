"""Phrase grounding: score image tokens against a phrase and lay the scores back on the image's own pixels.

Shapes: B images, Q phrases, H rows, W columns. Scores are cosines in [-1, 1]; pixels the tower never saw are NaN, not 0.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvl.geometry import GridTransform
from medvl.metrics import peak
from medvl.model import DualEncoder
from medvl.types import ImageFeatures, ImageSample


@dataclass(frozen=True)
class SimilarityMap:
    """How much each native pixel of one image resembles one phrase."""

    phrase: str
    scores: NDArray[
        np.float32
    ]  # (rows, columns) of the file, of a volume (slices, rows, columns); cosines, NaN where the tower did not look
    peak: tuple[int, ...] | None  # index of the highest score; None for a map that points nowhere


def ground(model: DualEncoder, path: Path, phrases: Sequence[str]) -> list[SimilarityMap]:
    """Similarity maps of an image file for each phrase.

    Raises:
        UnreadableImageError: the file cannot be read.
        ValueError: no phrase, an empty one, or a tower that keeps no tokens.
    """
    if not phrases or not all(phrase.strip() for phrase in phrases):
        raise ValueError("grounding needs at least one phrase, and no empty one")
    sample = model.read(path)
    features = model.encode_samples([sample])
    maps = native_maps(token_maps(model, features, phrases)[0], sample.transform, features.extent)
    return [SimilarityMap(phrase, scores, peak(scores)) for phrase, scores in zip(phrases, maps, strict=True)]


@torch.inference_mode()
def token_maps(model: DualEncoder, images: ImageFeatures, phrases: Sequence[str]) -> Tensor:
    """(B, Q, *grid) cosines of every token with every phrase."""
    return model.similarity.maps(images, model.encode_text(phrases))


def native_maps(grids: Tensor, transform: GridTransform, extent: Sequence[int] | None = None) -> NDArray[np.float32]:
    """(Q, *native shape) of one image's (Q, *grid) token maps; ``extent`` as :func:`batch_extent` gives it."""
    maps: NDArray[np.float32] = transform.map_to_native(grids, extent).cpu().numpy().astype(np.float32, copy=False)
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
