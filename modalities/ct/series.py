"""DICOM CT: which files make which volume, told from their headers.

Slices are grouped by series, frame of reference, size and orientation, sorted by position along their normal (never by InstanceNumber),
told apart where several lie at one place, and then checked to be even (:mod:`modalities.ct.runs`).

UIDs, names, dates and descriptions are compared but neither kept in clear nor shown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modalities.ct.archive import is_zip, list_members, unpacked
from modalities.ct.assembly import identical
from modalities.ct.headers import KINDS, SliceHeader, read_headers
from modalities.ct.runs import TOLERANCE_MM, Series, even_series
from modalities.ct.volume import refused

SAME_DIRECTION = 1e-4
"""Direction cosines of one series agree to this: 0.03 mm over a field of 250 mm."""
MAX_FILES = 100_000

Locate = Callable[[SliceHeader], Path]


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
            headers += read_headers(file, member, place, given)
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


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files below a folder, sorted; hidden ones and linked folders are passed over."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and name != "DICOMDIR" and path.is_file():
                yield path


def _group(headers: Sequence[SliceHeader], tolerance: float, split_gaps: bool, locate: Locate) -> list[Series]:
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


def _slots(part: Sequence[SliceHeader], tolerance: float) -> list[list[SliceHeader]]:
    """Slices sorted along their normal, those at one place together."""
    normal = part[0].normal
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


def _series(part: Sequence[SliceHeader], notes: Sequence[str], tolerance: float, split_gaps: bool, locate: Locate) -> list[Series]:
    """One series, or several evenly spaced runs of it."""
    warned = list(notes)
    kept: list[SliceHeader] = []
    dropped = 0
    for slot in _slots(part, tolerance):
        if len(slot) > 1 and not identical(slot, locate):
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
    return even_series(kept, warned, tolerance, split_gaps)
