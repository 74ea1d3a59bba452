"""One slice of CT, or one frame, as its header tells it: what grouping compares and what turns its stored values into HU.

UIDs are kept as hashes; names, dates and descriptions not at all.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medvl.types import UnreadableImageError
from modalities.dicom.file import DicomFile, Header, has_dicom_magic, opened

MAX_FRAMES = 20_000
MAX_FILE_BYTES = 2**33
UNSCALED = (1.0, 0.0)
MAX_NUMBER = 1e7
"""Positions, spacings and rescales beyond this are none."""
STRAIGHT = 5e-3
"""Directions are of unit length and at right angles to this, and are then made of unit length."""
DICOM_SUFFIXES = frozenset({".dcm", ".ima", ".dicom"})
"""Where a file without the DICM mark is taken for DICOM all the same."""
HU_TYPES = frozenset({"", "HU", "US"})  # US: unspecified
LOCALIZERS = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM"})

Kind = Literal["volume", "slice", "localizer", "other", "unreadable"]
KINDS: tuple[Kind, ...] = ("volume", "slice", "localizer", "other", "unreadable")


@dataclass(frozen=True)
class SliceHeader:
    """What the header says of one slice: a file, or a frame of one."""

    file: Path  # in a zip: the zip
    member: int | None = None  # which file of the zip
    frame: int | None = None  # of a multi-frame file, from 0
    group: str = ""  # hash of series and frame of reference; compared, never shown
    shape: tuple[int, int] = (0, 0)  # rows, columns
    position: tuple[float, ...] | None = None  # (3,) LPS mm, centre of the first voxel
    orientation: tuple[float, ...] | None = None  # (6,) along a row, along a column, unit length
    spacing: tuple[float, ...] | None = None  # between rows, between columns, mm
    thickness: float | None = None  # mm; SpacingBetweenSlices where there is one
    slope: float | None = None
    intercept: float | None = None
    hu: bool = True  # False where RescaleType names another unit
    looked_up: bool = False  # a modality LUT makes HU of the stored values, in the place of slope and intercept
    padding: tuple[float, float] | None = None  # stored values, low and high
    photometric: str = ""
    image_type: str = ""
    acquisition: str = ""
    phase: str = ""  # temporal position
    kernel: str = ""
    time: float | None = None  # seconds, only to compare
    lossy: bool = False
    kind: Kind = "slice"
    problem: str | None = None  # why it belongs to no volume

    @property
    def rescale(self) -> tuple[float, float] | None:
        """Slope and intercept; those of no change where there is a modality LUT; None where the header has none that can be meant."""
        if self.looked_up:
            return UNSCALED
        return None if not self.slope or self.intercept is None else (self.slope, self.intercept)

    @property
    def normal(self) -> NDArray[np.float64]:
        """(3,) LPS, of unit length: row direction x column direction."""
        assert self.orientation is not None
        across = np.cross(self.orientation[:3], self.orientation[3:])
        return np.asarray(across / np.linalg.norm(across), dtype=np.float64)


def read_headers(file: Path, member: int | None, place: Path, given: bool) -> list[SliceHeader]:
    """The slices of one file; none where it is no DICOM and was not named itself.

    Args:
        file: how it is called.
        member: which one, of a zip.
        place: where it lies now.
        given: it was named itself, not found in a folder.
    """
    blank = SliceHeader(file, member)
    try:
        if not given and place.suffix.lower() not in DICOM_SUFFIXES and not has_dicom_magic(place):
            return []
        with opened(place, header_only=True, largest=MAX_FILE_BYTES) as parsed:
            return _slices(blank, parsed)
    except UnreadableImageError as error:
        return [replace(blank, kind="unreadable", problem=str(error).removeprefix(f"{place}: "))]
    except OSError as error:
        return [replace(blank, kind="unreadable", problem=f"cannot be opened: {error.strerror or type(error).__name__}")]


def _slices(blank: SliceHeader, file: DicomFile) -> list[SliceHeader]:
    header = file.header
    if header.get("Rows") is None and header.get("SOPClassUID") is None:
        return [replace(blank, kind="unreadable", problem="expected a DICOM file; it has neither a SOP class nor image attributes")]
    whole = replace(
        blank,
        shape=(header.whole("Rows", 0), header.whole("Columns", 0)),
        group=_digest(header, "SeriesInstanceUID", "FrameOfReferenceUID"),
        photometric=header.text("PhotometricInterpretation"),
        looked_up=bool(header.items("ModalityLUTSequence")),
        padding=_padding(header),
        lossy=header.text("LossyImageCompression") == "01",
    )
    problem = _no_slice(header, whole)
    if problem:
        return [replace(whole, kind="other", problem=problem)]
    count, frames = header.whole("NumberOfFrames", 1), header.frames()
    if not frames:
        if count != 1:
            return [replace(whole, kind="other", problem=f"holds {count} frames without saying where each lies")]
        return [_slice(whole, header)]
    if not 1 <= count <= MAX_FRAMES or count != len(frames):
        return [replace(whole, kind="unreadable", problem=f"declares {count} frames and describes {len(frames)}")]
    return [_slice(replace(whole, frame=index), own) for index, own in enumerate(frames)]


def _no_slice(header: Header, whole: SliceHeader) -> str | None:
    """Why a file holds no slice of a CT, or None."""
    if min(whole.shape) < 1:
        return "holds no image (no rows and columns)"
    modality = header.text("Modality")
    if modality != "CT":
        return f"its modality is {modality if re.fullmatch('[A-Z]{2}', modality) else 'missing or unusual'}, expected CT"
    if header.whole("SamplesPerPixel", 1) != 1 or whole.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        return "is a colour image, expected grey CT values"
    return None


def _slice(whole: SliceHeader, header: Header) -> SliceHeader:
    """One slice from the elements of its file or frame."""
    position, spacing = _numbers(header, "ImagePositionPatient", 3), _numbers(header, "PixelSpacing", 2)
    orientation = _directions(header)
    if spacing is not None and min(spacing) <= 0:
        spacing = None
    image_type = header.texts("FrameType") or header.texts("ImageType")
    thickness = _number(header, "SpacingBetweenSlices") or _number(header, "SliceThickness")
    found = replace(
        whole,
        position=position,
        orientation=orientation,
        spacing=spacing,
        thickness=abs(thickness) if thickness else None,
        slope=_number(header, "RescaleSlope"),
        intercept=_number(header, "RescaleIntercept"),
        hu=header.text("RescaleType") in HU_TYPES,
        image_type=_joined(image_type),
        acquisition=_joined(header.texts("FrameAcquisitionNumber") or header.texts("AcquisitionNumber")),
        phase=_joined(header.texts("TemporalPositionIndex") or header.texts("TemporalPositionIdentifier")),
        kernel=_joined(header.texts("ConvolutionKernel")),
        time=_time(header),
    )
    if LOCALIZERS & set(image_type):
        return replace(found, kind="localizer")
    absent = [name for name, value in (("position", position), ("orientation", orientation), ("pixel spacing", spacing)) if value is None]
    if absent:
        return replace(found, kind="other", problem=f"has no usable {' or '.join(absent)}, so it cannot be placed in a volume")
    return found


def _directions(header: Header) -> tuple[float, ...] | None:
    """Along a row and along a column, of unit length; None where they are not nearly that and at right angles."""
    directions = _numbers(header, "ImageOrientationPatient", 6)
    if directions is None:
        return None
    row, column = directions[:3], directions[3:]
    lengths = math.hypot(*row), math.hypot(*column)
    across = sum(r * c for r, c in zip(row, column, strict=True))
    if abs(lengths[0] - 1) >= STRAIGHT or abs(lengths[1] - 1) >= STRAIGHT or abs(across) >= STRAIGHT:
        return None
    return (*(r / lengths[0] for r in row), *(c / lengths[1] for c in column))


def _numbers(header: Header, keyword: str, count: int) -> tuple[float, ...] | None:
    """The values of an element where they are ``count`` finite numbers of a sane size."""
    numbers = header.numbers(keyword)
    return numbers if len(numbers) == count and all(math.isfinite(n) and abs(n) < MAX_NUMBER for n in numbers) else None


def _number(header: Header, keyword: str) -> float | None:
    numbers = _numbers(header, keyword, 1)
    return numbers[0] if numbers else None


def _joined(texts: tuple[str, ...]) -> str:
    return "\\".join(texts)


def _time(header: Header) -> float | None:
    """Seconds since some midnight from the first date-time or time element that holds one."""
    for keyword in ("FrameAcquisitionDateTime", "AcquisitionDateTime", "AcquisitionTime", "ContentTime"):
        digits = re.match(r"[0-9]+(\.[0-9]+)?", header.text(keyword))
        if digits is None:
            continue
        text, day = digits.group(), 0
        if keyword.endswith("DateTime"):
            text, day = text[8:], int(text[6:8] or 0)
        if len(text) >= 6:
            return day * 86400 + int(text[:2]) * 3600 + int(text[2:4]) * 60 + float(text[4:])
    return None


def _padding(header: Header) -> tuple[float, float] | None:
    value, limit = _number(header, "PixelPaddingValue"), _number(header, "PixelPaddingRangeLimit")
    if value is None:
        return None
    other = value if limit is None else limit
    return min(value, other), max(value, other)


def _digest(header: Header, *keywords: str) -> str:
    joined = "\x1f".join(str(header.get(keyword) or "") for keyword in keywords)
    return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()
