"""Radiographs on disk or in memory to what a tower takes, with the record that lays a map back on native pixels.

Shapes: H x W native pixels, S the side of the tower's square, C channels. Grey is float32 in 0..1, bright = dense. Nothing is ever
flipped left to right.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medvl.geometry import GridTransform, letterbox
from medvl.types import ImageBatch, ImageReader, ImageSample, UnreadableImageError, view_index

MAX_PICTURE_PIXELS = 2**27
"""Largest PNG, JPEG or TIFF that is decoded; half of what DICOM may have, as a small file can unfold to it."""

MAX_SIZE, MAX_CHANNELS, MAX_NUMBERS = 8192, 16, 2**28
"""Of what the reader makes: pixels a side, channels, and numbers in all (1 GiB), so that no config calls for memory without bound."""

CLIP_PERCENTILES = (0.01, 0.99)
"""Tails left out when an image is standardised: markers, metal and collimator edges say nothing of the exposure."""

PICTURE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
NO_SUFFIX_TO_PROBE = frozenset(
    {".csv", ".tsv", ".parquet", ".json", ".jsonl", ".txt", ".md", ".html", ".yaml", ".gz", ".nii", ".npy", ".zip"}
)


@dataclass(frozen=True)
class _Native:
    """Grey pixels as shown, before any resizing, or resized already from an image of ``shape``."""

    pixels: NDArray[np.float32]
    view: str | None
    warnings: tuple[str, ...]
    shape: tuple[int, int] | None = None  # of the native image, if not that of ``pixels``
    spacing_mm: tuple[float, float] | None = None  # of the native image, between rows and between columns


class XrayReader(ImageReader):
    """Reads DICOM, PNG, JPEG and TIFF radiographs; letterboxes to ``size`` and normalises.

    Args:
        size: side S of the square the tower takes.
        channels: C; the grey image is repeated.
        normalise: ``image`` standardises each image over its own pixels, clipped to its percentiles 1 and 99 first, so that exposure
            and window do not matter; ``fixed`` subtracts ``mean`` and divides by ``std``, as published weights expect.
        mean: of 0..1 grey, one number or one per channel; only for ``fixed``.
        std: likewise.
        reduced_decoding: decode JPEG 2000 at a half, a quarter, ... of its resolution where that keeps 1.2 times the pixels needed
            (``fit_radiograph`` says where it is left out); several times faster, and a warning of the sample says where it was done. On
            two real films grey moved by 0.1 to 0.4 levels of 256 in the mean at 224 and 512 pixels, by 0.9 at 64, at fine edges by up
            to 13. Off, every pixel is decoded.
    Raises:
        ValueError: sizes below 1 or beyond ``MAX_SIZE``, ``MAX_CHANNELS`` and ``MAX_NUMBERS``, a ``std`` that is not positive, a number
            that is not finite, or another count of numbers than of channels.

    :meth:`native` and :meth:`read_array` never reduce. Letterbox padding is 0 after either normalisation.
    """

    suffixes: ClassVar[frozenset[str]] = frozenset({".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff"})

    def __init__(
        self,
        size: int = 224,
        channels: int = 1,
        normalise: Literal["image", "fixed"] = "image",
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.25,
        reduced_decoding: bool = False,
    ) -> None:
        if not (1 <= size <= MAX_SIZE and 1 <= channels <= MAX_CHANNELS) or size**2 * channels > MAX_NUMBERS:
            raise ValueError(
                f"size {size} and channels {channels} must be at least 1, and at most {MAX_SIZE} pixels a side, {MAX_CHANNELS} channels "
                f"and {MAX_NUMBERS} numbers in all"
            )
        if normalise not in ("image", "fixed"):
            raise ValueError(f"normalise is {normalise!r}, expected 'image' or 'fixed'")
        self.size, self.channels, self.normalise = size, channels, normalise
        self.mean, self.std = _per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")
        if (self.std <= 0).any():
            raise ValueError(f"std is {std}, expected positive numbers")
        self.reduced_decoding = reduced_decoding

    def describe(self) -> dict[str, str]:
        """What is done to an image, for a person; step -> words with units."""
        from modalities.dicom.pixels import MAX_SAMPLES

        numbers = f"mean {_words(self.mean)} and standard deviation {_words(self.std)} of grey in 0..1"
        low, high = (f"{100 * share:g}" for share in CLIP_PERCENTILES)
        normalisation = {
            "image": f"image: each image clipped to its own percentiles {low} and {high}, then to mean 0 and standard deviation 1 over its "
            f"own pixels ({numbers} are not used)",
            "fixed": f"fixed: {numbers}, the mean subtracted, then divided by the standard deviation",
        }
        return {
            "size": f"{self.size} x {self.size} pixels",
            "channels": f"{self.channels}" + (", the grey image repeated" if self.channels > 1 else ", grey"),
            "spacing": "not made equal: pixels have whatever mm follow from the film's own size",
            "grey values": "DICOM: modality LUT or rescale, then the file's VOI LUT or window, else its own range, then inversion of "
            "MONOCHROME1; pictures: by the bits in use; 0..1, bright = dense",
            "crop": "none: the whole film, its aspect kept, centred on a square (letterbox), padded with 0 after normalisation; no flips",
            "interpolation": "bilinear, anti-aliased where the image gets smaller",
            "normalisation": normalisation[self.normalise],
            "reduced decoding": "on: JPEG 2000 at a half, a quarter, ... of its resolution where that keeps 1.2 times the pixels needed"
            if self.reduced_decoding
            else "off: every pixel is decoded",
            "refused": "slices of CT, MR, PET and ultrasound, files of several frames, damaged or cut short files, DICOM of more "
            f"than {MAX_SAMPLES} samples, pictures of more than {MAX_PICTURE_PIXELS} pixels",
        }

    def study_key(self, path: Path) -> str | None:
        """A hash of the DICOM header's StudyInstanceUID; None for a picture, an unreadable header or a missing UID. Never raises."""
        path = Path(path)
        if not os.path.isfile(path) or not _is_dicom(path, _head(path)):  # noqa: PTH113 (pathlib's may raise)
            return None
        from modalities.dicom import study_key

        return study_key(path)

    def read(self, path: Path) -> ImageSample:
        """One file to a sample.

        Raises:
            UnreadableImageError: not a file of these formats, a slice of CT or MR, damaged, several frames, or absurdly large.
        """
        return self._sample(_read_native(Path(path), self.size if self.reduced_decoding else None))

    def read_array(self, array: ArrayLike, view: str | None = None) -> ImageSample:
        """One (H, W) array, bright = dense, to a sample.

        Floats within 0..1 and booleans are taken as they are; unsigned integers are divided by the top of the bits in use (8, or as many
        as the largest value needs), with a warning where those are fewer than the dtype's; all else goes from its lowest to its
        highest value, with a warning.

        Raises:
            ValueError: not two axes, empty, or values that are not finite.
        """
        pixels, notes = grey_from_array(np.asarray(array))
        return self._sample(_Native(pixels, view, notes))

    def native(self, path: Path) -> Tensor:
        """(H, W) float32 in 0..1 in native pixels, as shown.

        Raises:
            UnreadableImageError: as :meth:`read`.
        """
        return torch.from_numpy(_read_native(Path(path)).pixels)

    def enlarged(self, factor: int, path: Path | None = None) -> XrayReader:
        """A reader of images ``factor`` times as wide and high."""
        return XrayReader(**{**self.spec()["init_args"], "size": self.size * factor})

    def collate(self, samples: Sequence[ImageSample]) -> ImageBatch:
        """Samples of this reader to ``pixels`` (I, C, S, S), ``valid`` (I, S, S) and ``view`` (I,).

        Raises:
            ValueError: no samples, or samples of another size or channel count.
        """
        if not samples:
            raise ValueError("no samples to collate")
        expected = (self.channels, self.size, self.size)
        for sample in samples:
            if tuple(sample.pixels.shape) != expected:
                raise ValueError(f"a sample has shape {tuple(sample.pixels.shape)}, this reader makes {expected}")
        view = torch.tensor([view_index(s.view) for s in samples])
        return ImageBatch(torch.stack([s.pixels for s in samples]), torch.stack([s.valid for s in samples]), view=view)

    def find_images(self, folder: Path) -> list[Path]:
        """Every file under ``folder`` that this reader reads, sorted: by suffix, or by DICOM's mark where the suffix says nothing.

        Tables, hidden files, DICOMDIR and subfolders named ``masks`` are passed over; links to folders are not followed.
        """
        found: list[Path] = []
        for root, folders, files in os.walk(folder):
            folders[:] = sorted(f for f in folders if f != "masks" and not f.startswith("."))
            found += [Path(root, name) for name in sorted(files) if self._reads(Path(root, name))]
        return sorted(found)

    def _reads(self, path: Path) -> bool:
        suffix = path.suffix.lower()
        if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
            return False
        if suffix in self.suffixes:
            return True
        return suffix not in NO_SUFFIX_TO_PROBE and _head(path)[128:132] == b"DICM"

    def _sample(self, native: _Native) -> ImageSample:
        transform = letterbox(native.shape or native.pixels.shape, self.size)
        if native.shape is None:
            image = transform.apply(torch.from_numpy(native.pixels)[None])
        else:
            image = GridTransform(native.pixels.shape).fit((self.size, self.size)).apply(torch.from_numpy(native.pixels)[None])
        (top, bottom), (left, right) = ((round(low + 0.5), round(high + 0.5)) for low, high in transform.seen)
        inside = image[:, top:bottom, left:right]
        if self.normalise == "image":
            normal = _standardise(inside).expand(self.channels, -1, -1)
        else:
            normal = (inside - self.mean[:, None, None]) / self.std[:, None, None]
        pixels = torch.zeros(self.channels, self.size, self.size)
        pixels[:, top:bottom, left:right] = normal
        valid = transform.valid()
        spacing = None if native.spacing_mm is None else tuple(own / k for own, k in zip(native.spacing_mm, transform.scale, strict=True))
        return ImageSample(pixels, valid, transform, view=native.view, warnings=native.warnings, spacing_mm=spacing)


def grey_from_array(array: NDArray[Any]) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """(H, W) numbers to float32 in 0..1 by the rule of :meth:`XrayReader.read_array`, and what was assumed.

    Raises:
        ValueError: not two axes, empty, not real numbers, or not finite.
    """
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "buif":
        raise ValueError(f"array has shape {array.shape} and dtype {array.dtype}, expected real numbers of shape (H, W)")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"array of shape {array.shape} holds NaN or infinite values, expected finite ones")
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and low >= 0 and high <= 1):
        return array.astype(np.float32), ()
    if array.dtype.kind in "ui" and low >= 0:
        bits, room = max(8, int(high).bit_length()), array.dtype.itemsize * 8 - (array.dtype.kind == "i")
        notes = (f"values need {bits} of {room} bits; scaled by {2**bits - 1}",) if bits < room else ()
        return (array / np.float64(2**bits - 1)).astype(np.float32), notes
    span = high - low
    note = f"{array.dtype} values from {low:g} to {high:g} have no agreed range; scaled from lowest to highest"
    return ((array.astype(np.float64) - low) / (span or 1)).astype(np.float32), (note,)


def _standardise(inside: Tensor) -> Tensor:
    """(1, rows, columns) clipped to its percentiles 1 and 99, to mean 0 and standard deviation 1; all 0 for a constant image."""
    flat = inside.flatten().numpy()
    low, high = np.quantile(flat[:: max(1, flat.size // 2**16)], CLIP_PERCENTILES)
    clipped = inside.clamp(float(low), float(high))
    return (clipped - clipped.mean()) / clipped.std(correction=0).clamp_min(1e-4)


def _per_channel(value: float | Sequence[float], channels: int, name: str) -> Tensor:
    numbers = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * channels
    if len(numbers) != channels:
        raise ValueError(f"{name} has {len(numbers)} numbers for {channels} channels")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} is {value}, expected finite numbers")
    return torch.tensor(numbers)


def _words(numbers: Tensor) -> str:
    """One number where all are the same, as they were given."""
    shown = [str(number) for number in numbers.numpy()]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe or device would be waited for
            return b""
        with path.open("rb") as file:
            return file.read(132)
    except OSError:
        return b""


def _is_dicom(path: Path, head: bytes) -> bool:
    """By what the file holds, not by its suffix: DICOM's mark, else no picture's signature and a name that a bare dataset may have."""
    return head[128:132] == b"DICM" or (not head.startswith(PICTURE_MAGIC) and path.suffix.lower() in (".dcm", ".dicom", ""))


def _read_native(path: Path, reduce_to: int | None = None) -> _Native:
    """The image in native pixels; a DICOM file, given ``reduce_to``, with so many on its longer side, decoded reduced where that goes."""
    if not path.is_file():
        raise UnreadableImageError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    head = _head(path)
    if not _is_dicom(path, head):
        if head.startswith(PICTURE_MAGIC):
            return _native_picture(path)
        raise UnreadableImageError(f"{path}: expected a DICOM, PNG, JPEG or TIFF file, its first bytes are of none of these")
    from modalities.dicom import fit_radiograph, read_radiograph

    if reduce_to is not None:
        fitted = fit_radiograph(path, reduce_to, reduce=True, sections=False)
        note = (f"decoded at 1/{2**fitted.reduced} of its resolution, as the reader's reduced_decoding allows",) if fitted.reduced else ()
        return _Native(fitted.pixels, fitted.view, (*fitted.warnings, *note), fitted.native_shape, fitted.spacing_mm)
    radiograph = read_radiograph(path, sections=False)
    return _Native(radiograph.pixels, radiograph.view, radiograph.warnings, spacing_mm=radiograph.spacing_mm)


def read_picture_values(path: Path) -> tuple[NDArray[Any], tuple[str, ...]]:
    """A PNG, JPEG or TIFF of 8 or 16 bits, or a TIFF of floats, as (H, W) grey levels of its own type, and what was noticed.

    Where white is 0 the levels are turned round, so that bright is high in every file.

    Raises:
        UnreadableImageError: not a readable picture, or absurdly large.
    """
    values, white_is_zero, notes = _read_picture(path)
    if white_is_zero:
        values = (np.iinfo(values.dtype).max if values.dtype.kind in "iu" else values.max()) - values
    return values, notes


def _native_picture(path: Path) -> _Native:
    values, white_is_zero, notes = _read_picture(path)
    pixels, scaling = grey_from_array(values)
    return _Native(1 - pixels if white_is_zero else pixels, None, (*notes, *scaling))


def _read_picture(path: Path) -> tuple[NDArray[Any], bool, tuple[str, ...]]:
    """Grey levels (H, W), whether white is 0, and what was noticed."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as picture:
                if picture.width * picture.height > MAX_PICTURE_PIXELS:
                    raise UnreadableImageError(
                        f"{path}: {picture.height} x {picture.width} pixels, more than the {MAX_PICTURE_PIXELS} that are decoded"
                    )
                return _grey_levels(picture)
        except UnreadableImageError:
            raise
        except Exception as error:  # damaged files raise anything; their texts may quote embedded comments
            raise UnreadableImageError(f"{path}: not a readable PNG, JPEG or TIFF image ({type(error).__name__})") from None


def _grey_levels(picture: Any) -> tuple[NDArray[Any], bool, tuple[str, ...]]:
    from PIL import ImageOps

    notes: list[str] = []
    if getattr(picture, "n_frames", 1) > 1:
        notes.append(f"holds {picture.n_frames} images; the first was read")
    white_is_zero = getattr(picture, "tag_v2", {}).get(262) == 0 and picture.mode not in ("1", "L")  # Pillow inverts those two itself
    if picture.getexif().get(274, 1) != 1:
        notes.append("turned as its EXIF orientation says")
        picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") and picture.getchannel("A").getextrema()[0] < 255:
        notes.append("transparency ignored")
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("L", "LA"):
        array = np.asarray(picture if picture.mode == "L" else picture.getchannel("L"))
    elif picture.mode.startswith("I") or picture.mode == "F":
        array = np.asarray(picture)
        if picture.mode == "I" and array.min() >= 0 and array.max() < 2**16:
            array = array.astype(np.uint16)  # Pillow opens some 16-bit files as 32-bit integers
    else:
        colour = np.asarray(picture.convert("RGB"))
        if (colour[..., 0] != colour[..., 1]).any() or (colour[..., 0] != colour[..., 2]).any():
            notes.append("colour image turned to grey; a photograph or a screen capture may differ from the original")
        array = np.asarray(picture.convert("RGB").convert("L"))
    return array, white_is_zero, tuple(notes)
