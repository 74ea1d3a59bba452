"""An image as it is shown to a person: its own pixels, and which side of the patient is where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvl.types import ImageReader
from modalities.dicom import has_dicom_magic, read_radiograph


@dataclass(frozen=True)
class Shown:
    """H x W pixels in 0..1, bright = dense, and where a row and a column run to in the patient, such as ("L", "F"); None if unknown."""

    pixels: NDArray[np.float32]
    orientation: tuple[str, str] | None
    pixel_aspect: float = 1.0  # height of a pixel over its width, in mm
    column_mm: float | None = None  # width of a pixel, of a radiograph at the detector; None if the file does not say


def shown(reader: ImageReader, path: Path) -> Shown:
    """Read a file for showing.

    Raises:
        UnreadableImageError: the file cannot be read.
    """
    if not path.is_file() or not has_dicom_magic(path):
        return Shown(reader.native(path).numpy(), None)
    film = read_radiograph(path)
    aspect, width = (1.0, None) if film.spacing_mm is None else (film.spacing_mm[0] / film.spacing_mm[1], film.spacing_mm[1])
    return Shown(reader.native(path).numpy(), film.patient_orientation, aspect, width)


def in_plane(peak: tuple[int, ...] | None) -> tuple[int, int] | None:
    """Row and column of a peak, of a volume within its slice."""
    return None if peak is None else (peak[-2], peak[-1])


def shown_slice(
    volume: NDArray[np.float32], scores: NDArray[np.float32], affine: NDArray[np.float64], peak: tuple[int, ...] | None
) -> tuple[Shown, NDArray[np.float32], tuple[int, int] | None, int]:
    """The slice of a volume that a map points at, as radiologists see slices: front up, the patient's right at the left.

    Args:
        volume: (S, H, W) in 0..1 on the file's own grid; ``scores`` likewise.
        affine: (s, h, w) to RAS mm.
        peak: of the map; None takes the middle slice.
    Returns:
        the slice, its scores, the peak's (row, column) in it, and which slice from below it is.
    """
    from modalities.ct.reader import turn_to_tower

    axes, flipped = turn_to_tower(affine)
    cut = tuple(slice(None, None, -1 if f else 1) for f in flipped)
    shape = tuple(volume.shape[a] for a in axes)
    at = tuple(n // 2 for n in shape)
    if peak is not None:
        at = tuple(n - 1 - peak[a] if f else peak[a] for a, f, n in zip(axes, flipped, shape, strict=True))
    pixels, found = (np.ascontiguousarray(x.transpose(axes)[cut][at[0]]) for x in (volume, scores))
    step = np.linalg.norm(affine[:3, :3], axis=0)[list(axes)]
    return Shown(pixels, ("L", "P"), float(step[1] / step[2]), float(step[2])), found, None if peak is None else (at[1], at[2]), at[0]
