"""The DICOM images under a map, plane by plane: which instance or frame each is, and where it lies.

Planes are in the order of the map's own first axis, which is that of the readers: along the slices' normal, whatever the files are called.
Letters: S planes, H rows, W columns; positions are DICOM's LPS mm until they are compared with an affine, which is RAS.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from medvl.geometry import lps_to_ras
from medvl.types import UnreadableImageError
from modalities.ct.archive import unpacked
from modalities.ct.headers import SliceHeader
from modalities.ct.read import choose_series
from modalities.ct.series import find_series
from modalities.dicom.stated import OF_THE_CHEST
from modalities.export import uid
from modalities.structured_report import check_one_study, is_uid, not_dicom, read_header

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

WHAT = "a map as DICOM (--dicom)"
"""What needs the source, in errors."""
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
LOSSY_METHODS = {
    "1.2.840.10008.1.2.4.50": "ISO_10918_1",
    "1.2.840.10008.1.2.4.51": "ISO_10918_1",
    "1.2.840.10008.1.2.4.81": "ISO_14495_1",
    "1.2.840.10008.1.2.4.91": "ISO_15444_1",
    "1.2.840.10008.1.2.4.203": "ISO_15444_15",
}
"""Transfer syntax -> Lossy Image Compression Method (PS3.3 C.7.6.1.1.5.1)."""
DETAILS = (
    *SPACINGS,
    *("Rows", "Columns", "NumberOfFrames", "SliceThickness", "PixelAspectRatio", "FrameOfReferenceUID"),
    *("PatientOrientation", "BodyPartExamined", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
TOWARDS: Mapping[str, tuple[float, float, float]] = {
    "L": (1.0, 0.0, 0.0),
    "R": (-1.0, 0.0, 0.0),
    "P": (0.0, 1.0, 0.0),
    "A": (0.0, -1.0, 0.0),
    "H": (0.0, 0.0, 1.0),
    "F": (0.0, 0.0, -1.0),
}
"""Letter of Patient Orientation -> LPS direction (PS3.3 C.7.6.1.1.1)."""
SAME_PLACE_MM = 0.02
"""Header positions are rounded, and the readers accept slices 0.01 mm beside their grid."""


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane of a map."""

    image: Dataset  # the instance, as evidence
    frame: int | None = None  # of a multi-frame one, from 1
    position: tuple[float, ...] | None = None  # (3,) LPS mm, centre of the first pixel; None: a film that nobody knows the sides of


@dataclass(frozen=True, eq=False)
class MapSource:
    """What a map was made of. A film has one plane, which lies nowhere in the patient."""

    path: Path
    planes: tuple[Plane, ...]
    shape: tuple[int, int]  # H, W
    frame_of_reference: str  # of a film one of its own, which holds for its pixels alone
    orientation: tuple[float, ...] | None = None  # (6,) LPS, along a row, along a column; of a film as its letters say, or None
    spacing: tuple[float, float] | None = None  # between rows, between columns, mm; of a film at the detector where it has no other
    aspect: tuple[int, int] | None = None  # height to width of a pixel, where there is no spacing
    thickness: float | None = None  # mm
    between: float | None = None  # mm along the normal
    patient_orientation: str = ""  # of a film, as in DICOM
    film: bool = False
    chest: bool = False
    lossy: Mapping[str, str] = field(default_factory=dict)  # Lossy Image Compression and what goes with it

    @property
    def images(self) -> list[Dataset]:
        """The instances, each once, in the order of the planes."""
        return list({str(plane.image.SOPInstanceUID): plane.image for plane in self.planes}.values())


def read_source(
    path: Path, shape: Sequence[int], affine: NDArray[np.float64] | None, series: int | Literal["largest"] | None = "largest"
) -> MapSource:
    """The images under a map of native ``shape``.

    Args:
        path: a DICOM radiograph for a map of two axes; for one of three whatever :class:`modalities.ct.CtReader` reads as DICOM.
        shape: (H, W) or (S, H, W).
        affine: (s, h, w) to RAS mm; None for two axes.
        series: as the reader was told.
    Raises:
        ValueError: no DICOM, or images that are not the planes of such a map.
    """
    path = Path(path)
    if len(shape) not in (2, 3) or (len(shape) == 3) != (affine is not None):
        raise ValueError(f"{path}: expected a map (H, W) without affine or (S, H, W) with one, got shape {tuple(shape)}")
    if affine is None:
        return _film(path, (shape[0], shape[1]))
    if np.shape(affine) != (4, 4):
        raise ValueError(f"{path}: affine has shape {np.shape(affine)}, expected (4, 4)")
    return _volume(path, (shape[0], shape[1], shape[2]), np.asarray(affine, dtype=np.float64), series)


def _film(path: Path, shape: tuple[int, int]) -> MapSource:
    """One radiograph."""
    if not path.is_file():
        raise ValueError(f"{path}: {WHAT} of two axes lies on one DICOM file; this is {'a folder' if path.is_dir() else 'not there'}")
    image, details = read_header(path, path, DETAILS, WHAT)
    if (frames := _whole(details, "NumberOfFrames", 1)) != 1:
        raise ValueError(f"{path}: holds {frames} frames; {WHAT} of two axes lies on an image of one")
    own = _whole(details, "Rows", 0), _whole(details, "Columns", 0)
    if own != shape:
        raise ValueError(f"{path}: has {own[0]} x {own[1]} pixels, the map {shape[0]} x {shape[1]}; give the map in the file's own pixels")
    letters = _patient_orientation(details)
    orientation = _directions(letters)
    return MapSource(
        path,
        (Plane(image, position=None if orientation is None else (0.0, 0.0, 0.0)),),
        shape,
        uid(str(image.SOPInstanceUID), "frame of reference"),
        orientation,
        film=True,
        spacing=_spacing(details),
        aspect=_aspect(details),
        patient_orientation=letters,
        chest=_is_chest(details),
        lossy=_lossy(path, details),
    )


def _volume(path: Path, shape: tuple[int, int, int], affine: NDArray[np.float64], series: int | Literal["largest"] | None) -> MapSource:
    """The series that the reader takes."""
    try:
        chosen, _ = choose_series(path, find_series(path), series)
        if chosen.kind not in ("volume", "slice"):
            raise UnreadableImageError(f"{path}: {chosen.slices[0].problem or 'is a localizer, not a volume'}")
    except UnreadableImageError as error:
        raise not_dicom(path, error, what=WHAT) from None
    slices = chosen.slices
    own = (len(slices), *slices[0].shape)
    if chosen.problems or own != shape:
        why = "; ".join(chosen.problems) or "slices that were filled in, left out or resampled are no instances"
        raise ValueError(f"{path}: {_sized(own)} voxels of DICOM cannot carry a map of {_sized(shape)}: {why}")
    _check_places(path, slices, affine)
    with ExitStack() as stack:
        members = list(dict.fromkeys(item.member for item in slices if item.member is not None))
        unzipped = dict(zip(members, stack.enter_context(unpacked(path, members)), strict=True)) if members else {}
        read: dict[tuple[Path, int | None], tuple[Dataset, dict[str, str]]] = {}
        for item in slices:
            if (item.file, item.member) not in read:
                place = item.file if item.member is None else unzipped[item.member]
                read[item.file, item.member] = read_header(item.file, place, DETAILS, WHAT)
        first = slices[0]
        image, details = read[first.file, first.member]
        lossy = _lossy(first.file if first.member is None else unzipped[first.member], details)
    check_one_study(path, [one for one, _ in read.values()])
    _, orientation, spacing = _place(path, first)
    steps = [float(first.normal @ (np.asarray(b.position) - np.asarray(a.position))) for a, b in itertools.pairwise(slices)]
    return MapSource(
        path,
        tuple(Plane(read[item.file, item.member][0], None if item.frame is None else item.frame + 1, item.position) for item in slices),
        first.shape,
        _frame_of_reference(image, details),
        orientation=orientation,
        spacing=spacing,
        thickness=_number(details, "SliceThickness") or first.thickness or (steps[0] if steps else float(np.linalg.norm(affine[:3, 0]))),
        between=sum(steps) / len(steps) if steps else None,
        chest=_is_chest(details),
        lossy=lossy,
    )


def _place(path: Path, item: SliceHeader) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, float]]:
    """Position (3,), orientation (6,) and spacing (2,) of a slice, LPS mm.

    Raises:
        ValueError: a header without one of them.
    """
    if item.position is None or item.orientation is None or item.spacing is None:
        raise ValueError(f"{path}: a slice without position, orientation or pixel spacing; {WHAT} needs to know where its pixels lie")
    return tuple(item.position), tuple(item.orientation), (item.spacing[0], item.spacing[1])


def _check_places(path: Path, slices: Sequence[SliceHeader], affine: NDArray[np.float64]) -> None:
    """Refuse a map whose voxels lie elsewhere than the pixels of the slices: it was turned, flipped or resampled."""
    for k, item in enumerate(slices):
        position, orientation, spacing = _place(path, item)
        h, w = (n - 1.0 for n in item.shape)
        along_row, along_column = np.asarray(orientation[:3]) * spacing[1], np.asarray(orientation[3:]) * spacing[0]
        for row, column in ((0.0, 0.0), (h, 0.0), (0.0, w)):
            own = np.asarray(position) + along_row * column + along_column * row
            apart = float(np.linalg.norm(own - (lps_to_ras(affine) @ [k, row, column, 1])[:3]))
            if not apart <= SAME_PLACE_MM:
                raise ValueError(
                    f"{path}: pixel ({row:g}, {column:g}) of slice {k} lies {apart:.3g} mm from where the map's affine has it (tolerance "
                    f"{SAME_PLACE_MM:g} mm); give the map on the series' own voxels, in the order of its reader, with their affine"
                )


def _sized(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _frame_of_reference(image: Dataset, details: Mapping[str, str]) -> str:
    """The series' own, else one that hangs on the series alone."""
    own = details.get("FrameOfReferenceUID", "")
    return own if is_uid(own) else uid(str(image.SeriesInstanceUID), "frame of reference")


def _number(details: Mapping[str, str], keyword: str) -> float | None:
    numbers = _numbers(details, keyword)
    return numbers[0] if len(numbers) == 1 and numbers[0] > 0 else None


def _numbers(details: Mapping[str, str], keyword: str) -> tuple[float, ...]:
    """The values of an element where all are finite numbers."""
    try:
        found = tuple(float(part) for part in details.get(keyword, "").split("\\") if part.strip())
    except ValueError:
        return ()
    return found if all(map(math.isfinite, found)) else ()


def _whole(details: Mapping[str, str], keyword: str, default: int) -> int:
    numbers = _numbers(details, keyword)
    return int(numbers[0]) if len(numbers) == 1 else default


def _spacing(details: Mapping[str, str]) -> tuple[float, float] | None:
    for keyword in SPACINGS:
        numbers = _numbers(details, keyword)
        if len(numbers) == 2 and min(numbers) > 0 and max(numbers) < 1e4:
            return numbers[0], numbers[1]
    return None


def _aspect(details: Mapping[str, str]) -> tuple[int, int] | None:
    numbers = _numbers(details, "PixelAspectRatio")
    fits = len(numbers) == 2 and all(number == int(number) and 0 < number < 1e9 for number in numbers)
    return (int(numbers[0]), int(numbers[1])) if fits else None


def _patient_orientation(details: Mapping[str, str]) -> str:
    """Where a row and a column run to; empty where the header does not say it in DICOM's letters."""
    text = details.get("PatientOrientation", "").upper()
    return text if re.fullmatch(r"[LRAPHF]{1,3}\\[LRAPHF]{1,3}", text) else ""


def _directions(letters: str) -> tuple[float, ...] | None:
    """(6,) LPS directions of a row and a column by the first letter of each; None where they are not known or not across each other."""
    parts = letters.split("\\")
    if len(parts) != 2:
        return None
    row, column = (TOWARDS[part[0]] for part in parts)
    return None if any(r and c for r, c in zip(row, column, strict=True)) else (*row, *column)


def _is_chest(details: Mapping[str, str]) -> bool:
    return re.sub("[ _^-]", "", details.get("BodyPartExamined", "").upper()) in OF_THE_CHEST


def _lossy(place: Path, details: Mapping[str, str]) -> dict[str, str]:
    """What was once compressed with loss says so ever after (PS3.3 C.7.6.1.1.5)."""
    from pydicom.filereader import read_file_meta_info

    try:
        syntax = str(read_file_meta_info(place).get("TransferSyntaxUID", ""))
    except Exception:  # a file without meta information holds plain pixels
        syntax = ""
    stated = details.get("LossyImageCompression")
    if stated == "00" or (stated != "01" and syntax not in LOSSY_METHODS):
        return {"LossyImageCompression": "00"}
    found = {"LossyImageCompression": "01"}
    if ratio := _number(details, "LossyImageCompressionRatio"):
        found["LossyImageCompressionRatio"] = f"{ratio:.6g}"
    named = details.get("LossyImageCompressionMethod", "")
    if method := named if named in LOSSY_METHODS.values() else LOSSY_METHODS.get(syntax):
        found["LossyImageCompressionMethod"] = method
    return found
