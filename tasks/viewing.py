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


def shown(reader: ImageReader, path: Path) -> Shown:
    """Read a file for showing.

    Raises:
        UnreadableImageError: the file cannot be read.
    """
    orientation = read_radiograph(path).patient_orientation if path.is_file() and has_dicom_magic(path) else None
    return Shown(reader.native(path).numpy(), orientation)
