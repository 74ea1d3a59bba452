"""DICOM CT: which files make which volume, told from their headers; then the volume in HU.

Slices are grouped by series, frame of reference, size and orientation, sorted by position along their normal (never by InstanceNumber),
and checked to be even. Nothing is evened silently: a series that changes its spacing comes back as evenly spaced runs, missing slices
and positions that fit no grid are refused, and what is filled in or rounded on request is recorded. Gantry tilt is a shear of the affine.

Positions p are DICOM's LPS mm until the affine is made, which is RAS. A step is the vector from one slice's first voxel to the next one's.
UIDs, names, dates and descriptions are compared but neither kept in clear nor shown.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvl.geometry import lps_to_ras
from medvl.types import UnreadableImageError
from modalities.ct.archive import list_members, unpacked
from modalities.ct.hu import hu_verdict
from modalities.ct.volume import MAX_VOXELS, STRAIGHT_DEG, CtVolume, affine_problem, check_file, refused
from modalities.dicom import has_dicom_magic
from modalities.dicom.file import quiet

TOLERANCE_MM = 0.01
SAME_DIRECTION = 1e-4
"""Direction cosines of one series agree to this: 0.03 mm over a field of 250 mm."""
MAX_FILES = 100_000
MAX_FRAMES = 20_000
MAX_FILE_BYTES = 2**33
MAX_INFLATED = 2**28
DEFLATED = b"1.2.840.10008.1.2.1.99"
DICOM_SUFFIXES = frozenset({".dcm", ".ima", ".dicom"})
"""Where a file without the DICM mark is taken for DICOM all the same."""
HU_TYPES = frozenset({"", "HU", "US"})  # US: unspecified
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "ImageType", "AcquisitionNumber",
    "TemporalPositionIdentifier", "TemporalPositionIndex", "ConvolutionKernel", "ContentDate", "ContentTime", "AcquisitionDate",
    "AcquisitionTime", "AcquisitionDateTime", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BitsAllocated",
    "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "LossyImageCompression", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip

Kind = Literal["volume", "slice", "localizer", "other", "unreadable"]
KINDS: tuple[Kind, ...] = ("volume", "slice", "localizer", "other", "unreadable")


@dataclass(frozen=True)
class SliceHeader:
    """What the header says of one slice: a file, or a frame of one."""

    file: Path  # in a zip: the zip
    member: int | None = None  # which file of the zip
    frame: int | None = None  # of a multi-frame file, from 0
    group: str = ""  # hash of series and frame of reference; compared, never shown
    instance: str = ""  # hash of the SOP instance and frame
    shape: tuple[int, int] = (0, 0)  # rows, columns
    position: tuple[float, ...] | None = None  # (3,) LPS mm, centre of the first voxel
    orientation: tuple[float, ...] | None = None  # (6,) along a row, along a column, unit length
    spacing: tuple[float, ...] | None = None  # between rows, between columns, mm
    thickness: float | None = None  # mm; SpacingBetweenSlices where there is one
    slope: float | None = None
    intercept: float | None = None
    hu: bool = True  # False where RescaleType names another unit
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

    def name(self) -> str:
        """How messages call it; names inside a zip are not shown."""
        member = "" if self.member is None else f" (member {self.member + 1})"
        return f"{self.file}{member}" + ("" if self.frame is None else f" (frame {self.frame + 1})")


@dataclass(frozen=True)
class Series:
    """Slices that belong together, sorted along their normal. Equal spacing is promised where ``problems`` is empty."""

    kind: Kind
    slices: tuple[SliceHeader, ...]
    problems: tuple[str, ...] = ()  # why it cannot be read as it is, and what to do
    warnings: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    gaps: tuple[tuple[int, int], ...] = ()  # (i, n): n slices are missing behind slice i; refused unless filled
    step_mm: tuple[float, float, float] | None = None  # from slice to slice, LPS; None for a single slice and where there is no grid

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, each once, in the order of their slices."""
        return tuple(dict.fromkeys(item.file for item in self.slices))

    @property
    def tilt_deg(self) -> float:
        """Angle between the step and the normal of the slices."""
        orientation = self.slices[0].orientation
        if self.step_mm is None or orientation is None:
            return 0.0
        step = np.asarray(self.step_mm)
        return math.degrees(math.acos(min(abs(float(_normal(orientation) @ step)) / float(np.linalg.norm(step)), 1.0)))

    @property
    def description(self) -> str:
        """What it is, by geometry alone: nothing from the header that identifies."""
        first = self.slices[0]
        if self.kind in ("other", "unreadable"):
            return f"{self.kind}: {len(self.slices)} image{'s' * (len(self.slices) > 1)}; {first.problem or 'no volume'}"
        words = f"{self.kind} of {len(self.slices)} slice{'s' * (len(self.slices) > 1)}, {first.shape[0]} x {first.shape[1]}"
        if first.spacing is not None:
            words += f" at {first.spacing[0]:.3g} x {first.spacing[1]:.3g} mm"
        if self.step_mm is not None:
            words += f", {float(np.linalg.norm(self.step_mm)):.4g} mm apart"
        if self.tilt_deg > STRAIGHT_DEG and self.step_mm is not None:
            apart = float(np.linalg.norm(self.step_mm)) * math.cos(math.radians(self.tilt_deg))
            words += f" ({apart:.4g} mm along their normal), tilted by {self.tilt_deg:.1f} degrees"
        missing = sum(count for _, count in self.gaps)
        return words + (f", {missing} missing" if missing else "") + (", with problems" if self.problems else "")


def find_series(source: Path | Iterable[Path], *, tolerance_mm: float = TOLERANCE_MM, split_gaps: bool = False) -> list[Series]:
    """The series in a folder, a zip, or a list of files, from headers alone (pixels are compared only where two slices share a place).

    Args:
        source: a folder (searched with its subfolders), a zip, a DICOM file, or several of these. In folders and zips, what is no DICOM is
            passed over.
        tolerance_mm: how far a slice may lie from an even grid. Above 0.01, slices that need it are read as even and ``repairs`` says so.
        split_gaps: part a series where slices are missing, instead of one series that reports the gap.
    Returns:
        Volumes first, then single slices, localizers, other images and unreadable files, each kind in the order of the paths.
    Raises:
        UnreadableImageError: nothing there, no DICOM in it, or a zip that is refused.
    """
    if not (math.isfinite(tolerance_mm) and tolerance_mm > 0):
        raise ValueError(f"tolerance_mm must be above 0, got {tolerance_mm}")
    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    with ExitStack() as stack:
        headers: list[SliceHeader] = []
        real: dict[tuple[Path, int | None], Path] = {}
        for file, member, place, given in _files(paths, stack):
            real[file, member] = place
            headers += _headers(file, member, place, given)
        if not headers:
            shown = paths[0] if paths else Path()
            raise refused(shown, "holds no DICOM file; expected a folder, a zip or files of a CT series")
        found = _group(headers, tolerance_mm, split_gaps, lambda item: real[item.file, item.member])
    return sorted(found, key=lambda series: KINDS.index(series.kind))


def _files(paths: Sequence[Path], stack: ExitStack) -> Iterator[tuple[Path, int | None, Path, bool]]:
    """(file, member of a zip, where it lies now, whether it was named itself) of everything to look into."""
    count = 0
    for path in paths:
        if path.is_dir():
            inside: Iterable[tuple[Path, int | None, Path, bool]] = ((file, None, file, False) for file in _walk(path))
        elif is_zip(path):
            indices = [member.index for member in list_members(path)]
            places = stack.enter_context(unpacked(path, indices))
            inside = ((path, index, place, False) for index, place in zip(indices, places, strict=True))
        else:
            inside = ((path, None, path, True),)
        for entry in inside:
            count += 1
            if count > MAX_FILES:
                raise refused(path, f"holds more than the {MAX_FILES} files that are looked into; name the folder of one study")
            yield entry


def is_zip(path: Path) -> bool:
    """True for a regular file that starts as a zip does."""
    check_file(path)
    with path.open("rb") as file:
        return file.read(4) in ZIP_MAGIC


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files below a folder, sorted; hidden ones and linked folders are passed over."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and name != "DICOMDIR" and path.is_file():
                yield path


# Headers


def _headers(file: Path, member: int | None, place: Path, given: bool) -> list[SliceHeader]:
    """The slices of one file; none where it is no DICOM and was not named itself."""
    blank = SliceHeader(file, member)
    try:
        magic = check_file(place) > 0 and has_dicom_magic(place)
        if not magic and not given and place.suffix.lower() not in DICOM_SUFFIXES:
            return []
        with quiet():
            return _parse(blank, place, magic)
    except UnreadableImageError as error:
        return [replace(blank, kind="unreadable", problem=str(error).removeprefix(f"{place}: "))]
    except Exception as error:  # hostile headers raise anything; texts may quote header values
        return [replace(blank, kind="unreadable", problem=f"no readable DICOM header ({type(error).__name__})")]


def _parse(blank: SliceHeader, place: Path, magic: bool) -> list[SliceHeader]:
    dataset = _plain(_open(place, magic, header_only=True))
    if "Rows" not in dataset and "SOPClassUID" not in dataset:
        return [replace(blank, kind="unreadable", problem="expected a DICOM file; it has neither a SOP class nor image attributes")]
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    modality = str(dataset.get("Modality") or "").strip()
    whole = replace(
        blank,
        shape=(rows, columns),
        group=_digest(dataset, "SeriesInstanceUID", "FrameOfReferenceUID"),
        instance=_digest(dataset, "SOPInstanceUID"),
        photometric=str(dataset.get("PhotometricInterpretation") or ""),
        padding=_padding(dataset),
        lossy=str(dataset.get("LossyImageCompression") or "") == "01",
        kernel=_text(dataset, "ConvolutionKernel"),
    )
    if rows < 1 or columns < 1:
        return [replace(whole, kind="other", problem="holds no image (no rows and columns)")]
    if modality != "CT":
        named = modality if re.fullmatch("[A-Z]{2}", modality) else "missing or unusual"
        return [replace(whole, kind="other", problem=f"its modality is {named}, expected CT")]
    if int(dataset.get("SamplesPerPixel") or 1) != 1 or whole.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        return [replace(whole, kind="other", problem="is a colour image, expected grey CT values")]
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    count = int(dataset.get("NumberOfFrames") or 1)
    if frames is None:
        if count != 1:
            return [replace(whole, kind="other", problem=f"holds {count} frames without saying where each lies")]
        return [_slice(whole, [dataset])]
    if not 1 <= count <= MAX_FRAMES or count != len(frames):
        return [replace(whole, kind="unreadable", problem=f"declares {count} frames and describes {len(frames)}")]
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])[:1]
    return [_slice(replace(whole, frame=index), [*_macros(own), *_macros(*shared), dataset]) for index, own in enumerate(frames)]


def _plain(dataset: Any) -> dict[str, Any]:
    """Keyword to value, each parsed once: pydicom's own look-up costs far more."""
    return {element.keyword: element.value for element in dataset}


def _macros(*groups: Any) -> list[dict[str, Any]]:
    """The first item of every functional group sequence that speaks of geometry, values or time (PS3.3 C.7.6.16.2)."""
    wanted = (
        "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "PixelValueTransformationSequence",
        "CTImageFrameTypeSequence", "FrameContentSequence", "CTReconstructionSequence",
    )  # fmt: skip
    return [_plain(group.get(name)[0]) for group in groups for name in wanted if group.get(name)]


def _slice(whole: SliceHeader, places: Sequence[Any]) -> SliceHeader:
    """One slice from the datasets that may speak of it, the first that does winning."""

    def look(*keywords: str) -> Any:
        return next((place for keyword in keywords for place in places if place.get(keyword) not in (None, "")), {})

    position, orientation = _numbers(look("ImagePositionPatient"), "ImagePositionPatient", 3), None
    directions = _numbers(look("ImageOrientationPatient"), "ImageOrientationPatient", 6)
    if directions is not None:
        row, column = np.asarray(directions[:3]), np.asarray(directions[3:])
        lengths = np.linalg.norm(row), np.linalg.norm(column)
        if abs(lengths[0] - 1) < 5e-3 and abs(lengths[1] - 1) < 5e-3 and abs(float(row @ column)) < 5e-3:
            orientation = tuple(float(v) for v in (*(row / lengths[0]), *(column / lengths[1])))
    spacing = _numbers(look("PixelSpacing"), "PixelSpacing", 2)
    if spacing is not None and min(spacing) <= 0:
        spacing = None
    kinds = look("ImageType") or look("FrameType")
    image_type = _text(kinds, "FrameType") or _text(kinds, "ImageType")
    thick = _numbers(look("SpacingBetweenSlices"), "SpacingBetweenSlices", 1) or _numbers(look("SliceThickness"), "SliceThickness", 1)
    scale = look("RescaleSlope")
    slope, intercept = _numbers(scale, "RescaleSlope", 1), _numbers(look("RescaleIntercept"), "RescaleIntercept", 1)
    header = replace(
        whole,
        position=position,
        orientation=orientation,
        spacing=spacing,
        thickness=abs(thick[0]) if thick and thick[0] else None,
        slope=slope[0] if slope else None,
        intercept=intercept[0] if intercept else None,
        hu=str(look("RescaleType").get("RescaleType") or "").strip().upper() in HU_TYPES,
        image_type=image_type,
        acquisition=_text(look("FrameAcquisitionNumber"), "FrameAcquisitionNumber")
        or _text(look("AcquisitionNumber"), "AcquisitionNumber"),
        phase=_text(look("TemporalPositionIndex"), "TemporalPositionIndex")
        or _text(look("TemporalPositionIdentifier"), "TemporalPositionIdentifier"),
        kernel=_text(look("ConvolutionKernel"), "ConvolutionKernel"),
        time=_time(look("FrameAcquisitionDateTime"), look("AcquisitionDateTime"), look("AcquisitionTime"), look("ContentTime")),
    )
    if {"LOCALIZER", "SCOUT", "TOPOGRAM"} & set(image_type.split("\\")):
        return replace(header, kind="localizer")
    absent = [name for name, value in (("position", position), ("orientation", orientation), ("pixel spacing", spacing)) if value is None]
    if absent:
        return replace(header, kind="other", problem=f"has no usable {' or '.join(absent)}, so it cannot be placed in a volume")
    return header


def _open(place: Path, magic: bool, header_only: bool) -> Any:
    """The dataset of a file."""
    from pydicom import dcmread

    size = check_file(place)
    if size > MAX_FILE_BYTES:
        raise refused(place, f"has {size} bytes, more than the {MAX_FILE_BYTES} that are opened")
    if magic:
        _check_deflated(place)
    return dcmread(place, stop_before_pixels=header_only, specific_tags=list(TAGS) if header_only else None, force=not magic)


def _check_deflated(place: Path) -> None:
    """Refuse a deflated file (PS3.5 A.5) that pydicom would inflate beyond bounds."""
    with place.open("rb") as file:
        start = file.read(1024)
        if DEFLATED not in start:
            return
        file.seek(144 + int.from_bytes(start[140:144], "little"))  # behind the file meta group, whose length stands first in it
        inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := file.read(2**16):
            while chunk and not inflater.eof:
                total += len(inflater.decompress(chunk, 2**20))
                chunk = inflater.unconsumed_tail
                if total > MAX_INFLATED:
                    raise refused(place, f"is deflated and would inflate to more than {MAX_INFLATED} bytes; it looks like a bomb")


def _numbers(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """The values of an element where they are ``count`` finite numbers of a sane size."""
    value = dataset.get(keyword)
    if value is None or value == "":
        return None
    listed = [value] if isinstance(value, (str, int, float)) else list(value)
    try:
        numbers = tuple(float(item) for item in listed)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(math.isfinite(n) and abs(n) < 1e7 for n in numbers) else None


def _text(dataset: Any, keyword: str) -> str:
    value = dataset.get(keyword)
    if value is None:
        return ""
    return str(value).strip().upper() if isinstance(value, (str, int, float)) else "\\".join(str(item).strip().upper() for item in value)


def _time(*places: Any) -> float | None:
    """Seconds since some midnight from the first of the date-time and time elements that the places were found by."""
    for place, keyword in zip(places, ("FrameAcquisitionDateTime", "AcquisitionDateTime", "AcquisitionTime", "ContentTime"), strict=True):
        digits = re.match(r"[0-9]+(\.[0-9]+)?", str(place.get(keyword) or ""))
        if digits is None:
            continue
        text = digits.group()
        if keyword.endswith("DateTime"):
            text, day = text[8:], int(text[6:8] or 0)
        else:
            day = 0
        if len(text) >= 6:
            return day * 86400 + int(text[:2]) * 3600 + int(text[2:4]) * 60 + float(text[4:])
    return None


def _padding(dataset: Any) -> tuple[float, float] | None:
    value, limit = _numbers(dataset, "PixelPaddingValue", 1), _numbers(dataset, "PixelPaddingRangeLimit", 1)
    if value is None:
        return None
    ends = (value[0], (limit or value)[0])
    return min(ends), max(ends)


def _digest(dataset: Any, *keywords: str) -> str:
    joined = "\x1f".join(str(dataset.get(keyword) or "") for keyword in keywords)
    return hashlib.blake2b(joined.encode(), digest_size=16).hexdigest()


# Which slices make which volume


def _group(headers: Sequence[SliceHeader], tolerance: float, split_gaps: bool, locate: Callable[[SliceHeader], Path]) -> list[Series]:
    """Series of all headers, in the order of their first file."""
    parts: dict[Hashable, list[SliceHeader]] = {}
    sizes: dict[str, set[tuple[int, int]]] = {}
    representatives: dict[Hashable, list[NDArray[np.float64]]] = {}
    for item in headers:
        if item.kind in ("other", "unreadable"):
            parts.setdefault((item.kind, item.group, item.problem, item.file if item.kind == "unreadable" else None), []).append(item)
            continue
        key = (item.kind, item.group, item.shape, tuple(round(v, 4) for v in item.spacing or ()), item.hu)
        known = representatives.setdefault(key, [])
        directions = np.asarray(item.orientation or (0.0,) * 6)
        which = next((i for i, other in enumerate(known) if np.abs(other - directions).max() <= SAME_DIRECTION), len(known))
        if which == len(known):
            known.append(directions)
        parts.setdefault((*key, which), []).append(item)
        sizes.setdefault(item.group, set()).add(item.shape)
    found: list[Series] = []
    for part in parts.values():
        first = part[0]
        if first.kind != "slice":
            found.append(Series(first.kind, tuple(part), problems=(first.problem,) if first.problem else ()))
            continue
        apart = len(sizes[first.group]) > 1
        notes = ["its DICOM series holds images of several sizes, which were kept apart"] if apart else []
        for phase, phase_notes in _split_clashes(part, tolerance):
            found += _series(phase, [*notes, *phase_notes], tolerance, split_gaps, locate)
    return found


def _normal(orientation: Sequence[float]) -> NDArray[np.float64]:
    normal = np.cross(orientation[:3], orientation[3:])
    return np.asarray(normal / np.linalg.norm(normal), dtype=np.float64)


def _slots(part: Sequence[SliceHeader], tolerance: float) -> list[list[SliceHeader]]:
    """Slices sorted along their normal, those at one place together."""
    normal = _normal(part[0].orientation or ())
    along = [float(normal @ np.asarray(item.position)) for item in part]
    slots: list[list[SliceHeader]] = []
    start = -math.inf
    for index in sorted(range(len(part)), key=along.__getitem__):  # stable: the order of the paths holds within a place
        if along[index] - start <= tolerance:
            slots[-1].append(part[index])
        else:
            slots.append([part[index]])
            start = along[index]
    return slots


def _split_clashes(part: list[SliceHeader], tolerance: float) -> list[tuple[list[SliceHeader], list[str]]]:
    """Parts that share places told apart by image type, acquisition, phase, kernel or time; as it is where none of them does it."""
    fold = max(len(slot) for slot in _slots(part, tolerance))
    if fold == 1:
        return [(part, [])]
    keys: tuple[tuple[str, Callable[[SliceHeader], Hashable]], ...] = (
        ("image type", lambda item: item.image_type),
        ("acquisition number", lambda item: item.acquisition),
        ("temporal position", lambda item: item.phase),
        ("convolution kernel", lambda item: item.kernel),
        ("time", _by_time(_slots(part, tolerance), fold)),
    )
    for name, key in keys:
        split: dict[Hashable, list[SliceHeader]] = {}
        for item in part:
            split.setdefault(key(item), []).append(item)
        clean = all(len(some) > 1 and len(_slots(some, tolerance)) == len(some) for some in split.values())
        if len(split) == fold and clean:
            note = f"one of {fold} stacks at the same place in one DICOM series, told apart by {name}"
            return [(some, [note]) for some in split.values()]
    return [(part, [])]


def _by_time(slots: Sequence[Sequence[SliceHeader]], fold: int) -> Callable[[SliceHeader], Hashable]:
    """Which of ``fold`` stacks, by times that part them: every slice of the first was made before any of the second."""
    times = [sorted(item.time for item in slot if item.time is not None) for slot in slots if len(slot) == fold]
    if any(len(some) != fold for some in times):
        return lambda item: None
    cuts = [(max(some[i] for some in times), min(some[i + 1] for some in times)) for i in range(fold - 1)]
    if any(before >= after for before, after in cuts):
        return lambda item: None
    borders = [(before + after) / 2 for before, after in cuts]
    return lambda item: None if item.time is None else sum(item.time > border for border in borders)


def _series(
    part: Sequence[SliceHeader], notes: Sequence[str], tolerance: float, split_gaps: bool, locate: Callable[[SliceHeader], Path]
) -> list[Series]:
    """One series, or several evenly spaced runs of it."""
    warned = list(notes)
    kept: list[SliceHeader] = []
    dropped = 0
    for slot in _slots(part, tolerance):
        if len(slot) > 1 and not _identical(slot, locate):
            problem = (
                f"{len(slot)} different images lie at one place and neither image type, acquisition, phase, kernel nor time tells which "
                "belong together; pass only the files of one stack"
            )
            return [Series("volume", tuple(part), problems=(problem,), warnings=tuple(warned))]
        kept.append(slot[0])
        dropped += len(slot) - 1
    if dropped:
        warned.append(f"{dropped} duplicate{'s' * (dropped > 1)} (same place, same pixels) left out")
    if not kept[0].hu:
        warned.append("RescaleType names another unit than HU")
    if len(kept) == 1:
        return [Series("slice", tuple(kept), warnings=tuple(warned))]
    positions = np.array([item.position for item in kept], dtype=np.float64)
    apart = _deviation(positions, np.arange(len(kept)))
    if apart <= tolerance + 1e-6:
        return [_run(kept, positions, warned, apart)]
    index = _grid_index(positions, tolerance)
    if index is not None and not split_gaps:
        gaps = tuple((i, int(n) - 1) for i, n in enumerate(np.diff(index)) if n > 1)
        step = (positions[-1] - positions[0]) / index[-1]
        missing = sum(count for _, count in gaps)
        problem = (
            f"{missing} slice{'s' * (missing > 1)} missing in {len(gaps)} place{'s' * (len(gaps) > 1)} of a grid of "
            f"{np.linalg.norm(step):.4g} mm. Pass fill_missing=True to interpolate (recorded), or split_gaps=True to find_series"
        )
        run = _run(kept, positions, warned, _deviation(positions, index), step)
        return [replace(run, problems=(problem,), gaps=gaps)]
    runs = _even_runs(positions, tolerance)
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    uneven = f"slice spacing runs from {steps.min():.4g} to {steps.max():.4g} mm (tolerance {tolerance:g} mm)"
    if len(runs) > max(2, len(kept) // 8):
        problem = (
            f"{uneven} and fits no few even runs; expected an even grid. Pass tolerance_mm to find_series to accept more (recorded), "
            "or resample the series"
        )
        return [Series("volume", tuple(kept), problems=(problem,), warnings=tuple(warned))]
    found = []
    for number, members in enumerate(runs):
        note = f"run {number + 1} of {len(runs)} of a series that is not even: {uneven}"
        some = [kept[i] for i in members]
        if len(some) == 1:
            found.append(Series("slice", tuple(some), warnings=(*warned, note)))
        else:
            apart = _deviation(positions[members], np.arange(len(members)))
            found.append(_run(some, positions[members], [*warned, note], apart))
    return found


def _run(
    kept: Sequence[SliceHeader],
    positions: NDArray[np.float64],
    warned: Sequence[str],
    apart: float,
    step: NDArray[np.float64] | None = None,
) -> Series:
    """An even run of at least two slices, with its tilt and rounding told."""
    vector = (positions[-1] - positions[0]) / (len(positions) - 1) if step is None else step
    run = Series("volume", tuple(kept), step_mm=(float(vector[0]), float(vector[1]), float(vector[2])))
    notes = list(warned)
    if run.tilt_deg > STRAIGHT_DEG:
        notes.append(f"gantry tilt of {run.tilt_deg:.1f} degrees: the affine is sheared; its axes are not at right angles")
    repairs = (f"slices lie up to {apart:.3g} mm from the even grid that was taken",) if apart > TOLERANCE_MM + 1e-6 else ()
    return replace(run, warnings=tuple(notes), repairs=repairs)


def _deviation(positions: NDArray[np.float64], index: NDArray[Any]) -> float:
    """Largest distance in mm of a slice from the even grid through the first and the last one; ``index`` is each one's place in it."""
    step = (positions[-1] - positions[0]) / max(int(index[-1]), 1)
    return float(np.linalg.norm(positions - positions[0] - index[:, None] * step, axis=1).max())


def _grid_index(positions: NDArray[np.float64], tolerance: float) -> NDArray[np.int64] | None:
    """Each slice's place in an even grid of which a few are missing, or None where there is no such grid."""
    steps = np.diff(positions, axis=0)
    usual = np.median(steps, axis=0)
    length = float(usual @ usual)
    if length == 0:
        return None
    counts = np.rint(steps @ usual / length).astype(np.int64)
    wide = counts > 1
    if counts.min() < 1 or not wide.any() or wide.sum() > max(1, len(steps) // 10) or counts.max() > max(len(positions), 3):
        return None
    if (wide[1:] & wide[:-1]).any():  # two wide steps in a row: another spacing, not a loss
        return None
    index = np.concatenate([[0], np.cumsum(counts)])
    return index if _deviation(positions, index) <= tolerance + 1e-6 else None


def _even_runs(positions: NDArray[np.float64], tolerance: float) -> list[NDArray[np.int64]]:
    """Slices parted into evenly spaced runs, longest first where a slice could belong to two; in order along the normal."""
    steps = np.diff(positions, axis=0)
    stretches: list[tuple[int, int]] = []  # first and last slice
    start = 0
    for i in range(1, len(steps) + 1):
        if i == len(steps) or float(np.linalg.norm(steps[i] - steps[start])) > tolerance + 1e-6:
            stretches.append((start, i))
            start = i
    owner = np.full(len(positions), -1)
    for number in sorted(range(len(stretches)), key=lambda n: stretches[n][0] - stretches[n][1]):
        first, last = stretches[number]
        if owner[first] >= 0:
            first += 1
        if owner[last] >= 0:
            last -= 1
        owner[first : last + 1] = number
    borders = np.flatnonzero(np.diff(owner)) + 1
    return list(np.split(np.arange(len(positions)), borders))


def _identical(slot: Sequence[SliceHeader], locate: Callable[[SliceHeader], Path]) -> bool:
    """Whether slices at one place hold the same pixels in the same units."""
    if len({(item.position, item.slope, item.intercept) for item in slot}) > 1:
        return False
    digests = set()
    for item in slot:
        (_, stored, _), *_ = _decoded([item], locate)
        digests.add(hashlib.blake2b(np.ascontiguousarray(stored).tobytes(), digest_size=16).digest())
    return len(digests) == 1


# Pixels


def read_series(series: Series, *, fill_missing: bool = False) -> CtVolume:
    """Decode a series to HU.

    Args:
        series: from :func:`find_series`.
        fill_missing: where slices are missing, interpolate linearly between their neighbours; ``valid_slices`` and ``repairs`` tell which.
    Returns:
        The volume, slices ascending along their normal (row direction x column direction). A single slice is a volume of one, its step
        along the normal being the header's slice spacing or thickness.
    Raises:
        UnreadableImageError: no volume (localizer, other modality), a problem that :func:`find_series` reported, or a slice that is
            damaged or cannot be decoded.
    """
    first = series.slices[0]
    if series.kind not in ("volume", "slice"):
        why = first.problem or "is a localizer, not a volume"
        raise refused(first.file, f"{why}; choose another series")
    if series.problems and not (series.gaps and fill_missing):
        raise refused(first.file, "; ".join(series.problems))
    missing = dict(series.gaps)
    total = len(series.slices) + sum(missing.values())
    if total * math.prod(first.shape) > MAX_VOXELS:
        raise refused(
            first.file, f"{total} slices of {first.shape[0]} x {first.shape[1]} are more than the {MAX_VOXELS} voxels that are read"
        )
    places = np.cumsum([0, *(1 + missing.get(i, 0) for i in range(len(series.slices) - 1))])
    affine = _affine(series)
    problem = affine_problem(affine)
    if problem:
        raise refused(first.file, f"its geometry {problem}")
    warned, repairs, syntaxes = list(series.warnings), list(series.repairs), Counter[str]()
    voxels: NDArray[Any] | None = None
    with _located(series.slices) as locate:
        for index, stored, syntax in _decoded(series.slices, locate):
            if voxels is None:
                voxels = np.empty((total, *first.shape), dtype=np.int16)
            voxels = _place(voxels, int(places[index]), stored, series.slices[index])
            syntaxes[syntax] += 1
    assert voxels is not None
    warned += _value_notes(series.slices)
    valid = None
    if missing:
        valid = np.zeros(total, dtype=bool)
        valid[places] = True
        _fill(voxels, places)
        repairs.append(f"{total - len(places)} missing slices interpolated between their neighbours")
    padding = _padding_hu(series.slices)
    verdict = hu_verdict(voxels, padding)
    if verdict.state != "ok":
        warned.append(f"units: {verdict.state}: {verdict.evidence}")
    return CtVolume(
        voxels,
        affine,
        verdict,
        tuple(warned),
        tuple(repairs),
        valid,
        padding,
        next(iter(syntaxes)) if len(syntaxes) == 1 else "several",
        first.photometric,
    )


@contextmanager
def _located(slices: Sequence[SliceHeader]) -> Iterator[Callable[[SliceHeader], Path]]:
    """Where each slice's file lies; members of zips are unpacked for the time of the block."""
    wanted: dict[Path, list[int]] = {}
    for item in slices:
        if item.member is not None and item.member not in wanted.setdefault(item.file, []):
            wanted[item.file].append(item.member)
    with ExitStack() as stack:
        table: dict[tuple[Path, int | None], Path] = {}
        for archive, members in wanted.items():
            for member, place in zip(members, stack.enter_context(unpacked(archive, members)), strict=True):
                table[archive, member] = place
        yield lambda item: table.get((item.file, item.member), item.file)


def _decoded(slices: Sequence[SliceHeader], locate: Callable[[SliceHeader], Path]) -> Iterator[tuple[int, NDArray[Any], str]]:
    """(index in ``slices``, (H, W) stored values, name of the transfer syntax), file by file."""
    by_file: dict[tuple[Path, int | None], list[int]] = {}
    for index, item in enumerate(slices):
        by_file.setdefault((item.file, item.member), []).append(index)
    for indices in by_file.values():
        item = slices[indices[0]]
        try:
            with quiet():
                yield from _decode_file([(index, slices[index]) for index in indices], locate(item))
        except UnreadableImageError as error:
            raise refused(item.file, str(error).split(": ", 1)[-1]) if item.member is not None else error from None
        except BaseException as error:  # damaged pixels raise anything; texts may quote header values
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of decoders in Rust, which is no Exception
                raise
            raise refused(
                item.file,
                f"{item.name().removeprefix(str(item.file)).strip() or 'a slice'} could not be decoded ({type(error).__name__}); "
                "it is damaged or no installed decoder reads it",
            ) from None


def _decode_file(wanted: Sequence[tuple[int, SliceHeader]], place: Path) -> Iterator[tuple[int, NDArray[Any], str]]:
    from pydicom.pixels import iter_pixels
    from pydicom.uid import UID

    dataset = _open(place, has_dicom_magic(place), header_only=False)
    header = wanted[0][1]
    _prepare(dataset, header)
    syntax = UID(str(dataset.file_meta.TransferSyntaxUID))
    name = syntax.name if not syntax.name[:1].isdigit() else "an unregistered coding"
    if header.frame is None:
        planes: Iterable[NDArray[Any]] = [dataset.pixel_array]
    else:
        planes = iter_pixels(dataset, indices=[item.frame for _, item in wanted if item.frame is not None])
    for (index, item), plane in zip(wanted, planes, strict=True):
        if plane.shape != item.shape:
            raise refused(item.file, f"declares {item.shape} pixels, but {plane.shape} were decoded")
        if dataset.get("ModalityLUTSequence"):
            from pydicom.pixels import apply_modality_lut

            plane = apply_modality_lut(plane, dataset)
        yield index, plane, name


def _prepare(dataset: Any, header: SliceHeader) -> None:
    """Refuse before decoding what is cut short, changed or absurd; supply a transfer syntax where the file has none."""
    if "PixelData" not in dataset:
        raise refused(header.file, "has no pixel data; it may be cut short")
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    bits, frames = int(dataset.get("BitsAllocated") or 0), int(dataset.get("NumberOfFrames") or 1)
    if (rows, columns) != header.shape or bits not in (8, 16, 32):
        raise refused(header.file, f"has {rows} x {columns} pixels of {bits} bits; expected {header.shape} of 8, 16 or 32")
    meta = getattr(dataset, "file_meta", None)
    if meta is None or "TransferSyntaxUID" not in meta:
        from pydicom.dataset import FileMetaDataset
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

        implicit, little = dataset.original_encoding
        dataset.file_meta = meta = meta or FileMetaDataset()
        meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    if not meta.TransferSyntaxUID.is_encapsulated:
        need = rows * columns * bits // 8 * frames
        if len(dataset.PixelData) < need:
            raise refused(
                header.file, f"is cut short: {frames} x {rows} x {columns} pixels need {need} bytes, it has {len(dataset.PixelData)}"
            )
        return
    from pydicom.encaps import generate_frames

    for coded in generate_frames(dataset.PixelData, number_of_frames=frames):
        shape = _coded_shape(coded)
        if shape is not None and shape[0] * shape[1] > rows * columns:
            raise refused(header.file, f"declares {rows} x {columns} pixels, its compressed image would unfold to {shape[0]} x {shape[1]}")


def _coded_shape(coded: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 image says of itself, None if it does not: a decoder allocates by these.

    Source: SIZ of ITU-T T.800 A.5.1, SOF of T.81 B.2.2 and T.87 C.2.2.
    """
    start = coded.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0 and len(coded) >= start + 24:
        columns, rows, left, top = (int.from_bytes(coded[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
        return rows - top, columns - left
    at = 2 if coded[:2] == b"\xff\xd8" else len(coded)
    while at + 9 <= len(coded) and coded[at] == 0xFF:
        marker = coded[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(coded[at + 5 : at + 7], "big"), int.from_bytes(coded[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(coded[at + 2 : at + 4], "big")
    return None


def _scale(item: SliceHeader) -> tuple[float, float]:
    """Slope and intercept of a slice; 1 and 0 where the header has none that can be meant."""
    if item.slope is None or item.intercept is None or item.slope == 0:
        return 1.0, 0.0
    return item.slope, item.intercept


def _place(voxels: NDArray[Any], at: int, stored: NDArray[Any], item: SliceHeader) -> NDArray[Any]:
    """Put one slice in HU into the volume, which turns float32 the first time that a value needs it."""
    slope, intercept = _scale(item)
    if stored.dtype.kind not in "iu" or slope != int(slope) or intercept != int(intercept):
        voxels = voxels.astype(np.float32, copy=False)
        voxels[at] = stored.astype(np.float64) * slope + intercept
        return voxels
    ends = [int(end) * int(slope) + int(intercept) for end in (stored.min(), stored.max())]
    if voxels.dtype == np.int16 and (min(ends) < -32768 or max(ends) > 32767):
        voxels = voxels.astype(np.float32)
    if voxels.dtype == np.int16 and slope == 1 and stored.dtype.itemsize == 2 and stored.dtype.isnative:
        # the sum fits, so 16 bits that wrap around on the way are right: one pass and no copy
        np.add(stored.view(np.uint16), np.uint16(int(intercept) % 65536), out=voxels[at].view(np.uint16))
    else:
        voxels[at] = stored.astype(np.int64) * int(slope) + int(intercept)
    return voxels


def _value_notes(slices: Sequence[SliceHeader]) -> list[str]:
    """What is odd about how stored values become HU."""
    notes = []
    bare = sum(item.slope is None or item.intercept is None or item.slope == 0 for item in slices)
    if bare:
        notes.append(f"{bare} of {len(slices)} slices have no usable rescale slope and intercept; their stored values were taken")
    if len({_scale(item) for item in slices}) > 1:
        notes.append("rescale slope or intercept differ between slices; each slice was rescaled by its own")
    if any(item.lossy for item in slices):
        notes.append("the pixels were compressed with loss")
    return notes


def _padding_hu(slices: Sequence[SliceHeader]) -> tuple[float, float] | None:
    """The padding values in HU where all slices agree on them."""
    found = set()
    for item in slices:
        if item.padding is None:
            return None
        slope, intercept = _scale(item)
        ends = sorted(value * slope + intercept for value in item.padding)
        found.add((ends[0], ends[1]))
    return found.pop() if len(found) == 1 else None


def _affine(series: Series) -> NDArray[np.float64]:
    """(s, h, w) to RAS mm (PS3.3 C.7.6.2.1.1 with the step between slices as first column)."""
    first = series.slices[0]
    assert first.position is not None and first.orientation is not None and first.spacing is not None
    step = series.step_mm
    if step is None:
        normal = _normal(first.orientation) * (first.thickness or 1.0)
        step = float(normal[0]), float(normal[1]), float(normal[2])
    lps = np.eye(4)
    lps[:3, 0] = step
    lps[:3, 1] = np.asarray(first.orientation[3:]) * first.spacing[0]
    lps[:3, 2] = np.asarray(first.orientation[:3]) * first.spacing[1]
    lps[:3, 3] = first.position
    return lps_to_ras(lps)


def _fill(voxels: NDArray[Any], places: NDArray[Any]) -> None:
    """Interpolate the slices between ``places`` linearly, in place; whole HU stay whole."""
    for before, after in zip(places[:-1].tolist(), places[1:].tolist(), strict=True):
        for at in range(before + 1, after):
            part = (at - before) / (after - before)
            plane = voxels[before] * (1 - part) + voxels[after] * part
            voxels[at] = np.rint(plane) if voxels.dtype == np.int16 else plane
