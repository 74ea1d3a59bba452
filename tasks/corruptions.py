"""What may happen to an image on its way to a model: corruptions at five severities, and films that are turned or mirrored.

Films are (H, W) in 0 to 1, as they are shown to a person. Volumes are (C, S, H, W) as the reader gives them to the tower, windows and all:
what a corruption adds is in parts of their own deviation.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

SEVERITIES = (1, 2, 3, 4, 5)
Corruption = Callable[[NDArray[np.float32], int, np.random.Generator], NDArray[np.float32]]
Turn = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Volume = NDArray[np.float32]


def _noise(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return (image + rng.normal(0, (0.02, 0.04, 0.08, 0.12, 0.2)[severity - 1], image.shape)).clip(0, 1).astype(np.float32)


def _blur(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    sigma = (0.004, 0.008, 0.014, 0.022, 0.035)[severity - 1] * min(image.shape)
    return np.asarray(ndimage.gaussian_filter(image, sigma), dtype=np.float32)


def _contrast(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    return (image.mean() + (image - image.mean()) * (0.8, 0.6, 0.45, 0.3, 0.2)[severity - 1]).astype(np.float32)


def _jpeg(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    stream = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(stream, "JPEG", quality=(60, 40, 25, 15, 8)[severity - 1])
    return (np.asarray(Image.open(stream)) / 255).astype(np.float32)


def _crop(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    share = (0.95, 0.9, 0.85, 0.8, 0.7)[severity - 1]
    rows, columns = (max(1, round(side * share)) for side in image.shape)
    top, left = (image.shape[0] - rows) // 2, (image.shape[1] - columns) // 2
    return image[top : top + rows, left : left + columns]


def _rotation(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    degrees = (2, 4, 8, 12, 20)[severity - 1] * rng.choice([-1, 1])
    return np.asarray(ndimage.rotate(image, degrees, reshape=False, order=1, mode="constant"), dtype=np.float32).clip(0, 1)


def _resolution(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    factor = (1.5, 2, 3, 4, 6)[severity - 1]
    picture = Image.fromarray(image)
    width, height = (max(8, round(side / factor)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR), dtype=np.float32).clip(0, 1)


def _marker(image: NDArray[np.float32], severity: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A burnt-in letter in an upper corner, of either side: what it says is not to be trusted."""
    picture = Image.fromarray((image * 255).round().astype(np.uint8))
    size = max(6, round(min(image.shape) * (0.04, 0.07, 0.1, 0.14, 0.2)[severity - 1]))
    right, letter = bool(rng.integers(2)), "LR"[int(rng.integers(2))]
    at = (picture.width - 2 * size if right else size // 2, size // 2)
    ImageDraw.Draw(picture).text(at, letter, fill=255, font=ImageFont.load_default(size=size))
    return (np.asarray(picture) / 255).astype(np.float32)


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "noise": _noise,
        "blur": _blur,
        "contrast": _contrast,
        "JPEG": _jpeg,
        "crop": _crop,
        "rotation": _rotation,
        "resolution": _resolution,
        "marker": _marker,
    }
)
"""Of films in 0 to 1, at the severities 1 to 5."""


def _volume_noise(volume: Volume, severity: int, rng: np.random.Generator) -> Volume:
    return (volume + rng.normal(0, (0.1, 0.2, 0.4, 0.7, 1.2)[severity - 1] * volume.std(), volume.shape)).astype(np.float32)


def _volume_blur(volume: Volume, severity: int, rng: np.random.Generator) -> Volume:
    sigma = (0.004, 0.008, 0.014, 0.022, 0.035)[severity - 1] * min(volume.shape[2:])
    return np.asarray(ndimage.gaussian_filter(volume, (0, 0, sigma, sigma), mode="nearest"), dtype=np.float32)


def _volume_contrast(volume: Volume, severity: int, rng: np.random.Generator) -> Volume:
    return _contrast(volume, severity, rng)


def _volume_rotation(volume: Volume, severity: int, rng: np.random.Generator) -> Volume:
    degrees = (2, 4, 8, 12, 20)[severity - 1] * rng.choice([-1, 1])
    return np.asarray(ndimage.rotate(volume, degrees, axes=(3, 2), reshape=False, order=1, mode="nearest"), dtype=np.float32)


def _thick_slices(volume: Volume, severity: int, rng: np.random.Generator) -> Volume:
    return np.asarray(ndimage.uniform_filter1d(volume, (2, 3, 4, 6, 8)[severity - 1], axis=1, mode="nearest"), dtype=np.float32)


VOLUME_CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "noise": _volume_noise,
        "blur within slices": _volume_blur,
        "contrast": _volume_contrast,
        "rotation": _volume_rotation,
        "thick slices": _thick_slices,
    }
)
"""Of volumes, at the severities 1 to 5; rotation is about the long axis, thick slices are means of neighbours."""


TURNS: Mapping[str, Turn] = MappingProxyType(
    {
        "by 90 degrees, clockwise": lambda image: np.ascontiguousarray(np.rot90(image, -1)),
        "by 180 degrees": lambda image: np.ascontiguousarray(np.rot90(image, 2)),
        "by 90 degrees, counterclockwise": lambda image: np.ascontiguousarray(np.rot90(image, 1)),
        "mirrored left to right": lambda image: np.ascontiguousarray(image[:, ::-1]),
        "mirrored top to bottom": lambda image: np.ascontiguousarray(image[::-1]),
    }
)
"""Of films. No finding goes away when a film is turned, so a score that falls hangs on how it lies."""
