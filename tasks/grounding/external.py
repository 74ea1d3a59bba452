"""Maps made elsewhere, such as the cross-attention of a diffusion model: read from files or given by a function, then measured, thresholded
and shown like our own.

A map has the native shape of its image, or any other number of cells that cover the image evenly. With the two biases of a generative model
beside it, they can be merged (:func:`merged_biases`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medvl.geometry import GridTransform
from medvl.types import ImageSample
from tasks.grounding.grounder import Query
from tasks.grounding.maps import EXTERNAL, GridMaps, native_step_mm, slug

SAME_PLACE_MM = 0.05
SUFFIXES = (".npy", ".npz", ".nii.gz", ".nii")
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".mha", ".mhd", ".nrrd", ".zip")


@dataclass(frozen=True)
class ExternalMap:
    """One query's map of one image, and what it may be merged with."""

    scores: NDArray[np.floating[Any]]
    image_bias: NDArray[np.floating[Any]] | None = None  # the map of the image with an empty text
    text_bias: NDArray[np.floating[Any]] | None = None  # the map of the text without the image
    affine: NDArray[np.float64] | None = None  # of a volume's map, (s, h, w) to RAS mm, where its file says


Provider = Callable[[Path, Query], ExternalMap]


def merged_biases(
    scores: NDArray[np.floating[Any]], image_bias: NDArray[np.floating[Any]], text_bias: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Bimodal bias merging: where the biases of image and text agree, their product is trusted, else the map.

    With A, I and T the map and the biases scaled to 0..1, s = max(0, SSIM(I, T)) and M = I T (a product of matrices) scaled to 0..1:
        (1 - s)^2 A + s^2 M + 2 s (1 - s) (A + M + A M) / 2

    Args:
        scores: (H, W) square, as attention of diffusion models is; the biases likewise.
    Raises:
        ImportError: scikit-image is not installed (extra ``maps``).
        ValueError: shapes that differ, or that are not square.
    Source: "Generate to Ground", arXiv:2507.12236, and its code. SSIM is of 8-bit images there, and here.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("bias merging needs scikit-image, which is not installed: pip install 'medvl[maps]'") from error
    shape = scores.shape
    if not shape == image_bias.shape == text_bias.shape or len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"bias merging: map and biases have shapes {shape}, {image_bias.shape} and {text_bias.shape}; expected one square")
    a, i, t = (_scaled(one) for one in (scores, image_bias, text_bias))
    m = _scaled(i @ t)
    levels = [np.round(one * 255).astype(np.uint8) for one in (i, t)]
    s = max(0.0, float(structural_similarity(*levels, win_size=min(7, shape[0] - 1 + shape[0] % 2))))
    return np.asarray((1 - s) ** 2 * a + s**2 * m + s * (1 - s) * (a + m + a * m))


def _scaled(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    given = np.asarray(values, dtype=np.float64)
    low, high = float(given.min()), float(given.max())
    return (given - low) / (high - low) if high > low else np.zeros_like(given)


def from_folder(folder: Path, several: bool = False) -> Provider:
    """Maps that lie in a folder: SLUG.npy, .npz (its ``scores``) or .nii.gz; of several images in a subfolder named after each one.

    A subfolder has the image's whole name, or that without the suffix of an image.

    Biases lie beside them as SLUG.image_bias.npy and SLUG.text_bias.npy.
    """

    def provide(path: Path, query: Query) -> ExternalMap:
        name = slug(query.name)
        bare = (
            path.name[: -len(suffix)]
            if (suffix := next((end for end in IMAGE_SUFFIXES if path.name.lower().endswith(end)), ""))
            else path.name
        )
        own = [folder / path.name, folder / bare]
        places = [place for place in (own if several else [*own, folder]) if place.is_dir()]
        for place in places:
            for suffix in SUFFIXES:
                if (place / f"{name}{suffix}").is_file():
                    kinds = ("image_bias", "text_bias")
                    image, text = (_read(file)[0] if (file := place / f"{name}.{kind}.npy").is_file() else None for kind in kinds)
                    scores, affine = _read(place / f"{name}{suffix}")
                    return ExternalMap(scores, image, text, affine)
        raise ValueError(f"{folder}: no map of {path.name}; expected {name} with one of {', '.join(SUFFIXES)}")

    return provide


def _read(file: Path) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    try:
        if file.name.endswith((".nii", ".nii.gz")):
            from modalities.export import read_map

            return read_map(file)
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                return np.asarray(archive["scores"], dtype=np.float64), None
        return np.asarray(np.load(file, allow_pickle=False), dtype=np.float64), None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{file}: no map that can be read ({type(error).__name__}); expected an array of numbers") from error


def _apart(one: NDArray[np.float64], other: NDArray[np.float64], shape: Sequence[int]) -> float:
    """How far the farthest corner of a volume lies from itself under two affines, in mm."""
    corners = np.array([[0, 0, 0, 1], [*(n - 1 for n in shape), 1]], dtype=float).T
    return float(np.abs(one @ corners - other @ corners).max())


def external_maps(provider: Provider, path: Path, sample: ImageSample, queries: Sequence[Query]) -> GridMaps:
    """Maps of one image as if its tokens were their cells.

    Raises:
        ValueError: a map that is missing, of another number of axes than the image, or of another number of cells than its fellows.
    """
    native = sample.transform.native_shape
    found: list[torch.Tensor] = []
    for query in queries:
        given = provider(path, query)
        scores = np.asarray(given.scores, dtype=np.float64)
        if given.image_bias is not None and given.text_bias is not None:
            scores = merged_biases(scores, given.image_bias, given.text_bias)
        if given.affine is not None and (
            sample.affine is None or scores.shape != native or _apart(given.affine, sample.affine, native) > SAME_PLACE_MM
        ):
            raise ValueError(
                f"{path.name}: a map of {scores.shape} voxels that do not lie on the volume's {native}; expected the same grid"
            )
        if scores.ndim != len(native) or (found and scores.shape != found[0].shape):
            raise ValueError(
                f"{path.name}: a map of shape {scores.shape} for an image of {native}; expected as many axes, and one shape for all"
            )
        found.append(torch.from_numpy(np.where(np.isfinite(scores), scores, np.nan)).float())
    return GridMaps(torch.stack(found), GridTransform(native), native_step_mm(sample), unit=EXTERNAL)
