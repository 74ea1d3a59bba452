"""A series of CT slices to one volume in HU: decoded slice by slice, each rescaled by its own header, each in its place.

Positions are DICOM's LPS mm until the affine is made, which is RAS.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.geometry import lps_to_ras
from medvl.types import UnreadableImageError
from modalities.ct.archive import unpacked
from modalities.ct.headers import MAX_FILE_BYTES, UNSCALED, SliceHeader
from modalities.ct.hu import hu_verdict
from modalities.ct.runs import Series
from modalities.ct.volume import MAX_VOXELS, CtVolume, affine_problem, refused
from modalities.dicom.file import opened
from modalities.dicom.luts import modality_lut
from modalities.dicom.pixels import decode, read_layout


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
        place = locate(item)
        try:
            yield from _decode_file([(index, slices[index]) for index in indices], place)
        except UnreadableImageError as error:
            member = "" if item.member is None else f"member {item.member + 1} "
            raise refused(item.file, member + str(error).removeprefix(f"{place}: ")) from None


def _decode_file(wanted: Sequence[tuple[int, SliceHeader]], place: Path) -> Iterator[tuple[int, NDArray[Any], str]]:
    """Frames of one file, refused where it is no longer what its header was."""
    with opened(place, largest=MAX_FILE_BYTES) as file:
        layout = read_layout(file, "CT")
        if layout.samples != 1 or layout.allocated not in (8, 16, 32):
            raise file.notes.refuse(f"has {layout.samples} samples of {layout.allocated} bits per pixel, expected 1 of 8, 16 or 32")
        table = modality_lut(file.header, layout.signed)
        for index, item in wanted:
            if (layout.rows, layout.cols) != item.shape or (item.frame or 0) >= layout.frames:
                raise file.notes.refuse(f"has {layout.frames} frames of {layout.rows} x {layout.cols} pixels, not those of its header")
            stored, _ = decode(file, layout, item.frame or 0)
            yield index, stored if table is None else table(stored), file.syntax_name


def identical(slot: Sequence[SliceHeader], locate: Callable[[SliceHeader], Path]) -> bool:
    """Whether slices at one place hold the same pixels in the same units."""
    if len({(item.position, item.slope, item.intercept) for item in slot}) > 1:
        return False
    digests = set()
    for item in slot:
        (_, stored, _), *_ = _decoded([item], locate)
        digests.add(hashlib.blake2b(np.ascontiguousarray(stored).tobytes(), digest_size=16).digest())
    return len(digests) == 1


def _place(voxels: NDArray[Any], at: int, stored: NDArray[Any], item: SliceHeader) -> NDArray[Any]:
    """Put one slice in HU into the volume, which turns float32 the first time that a value needs it."""
    slope, intercept = item.rescale or UNSCALED
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
    bare = sum(item.rescale is None for item in slices)
    if bare:
        notes.append(f"{bare} of {len(slices)} slices have no usable rescale slope and intercept; their stored values were taken")
    if len({(item.rescale or UNSCALED) for item in slices}) > 1:
        notes.append("rescale slope or intercept differ between slices; each slice was rescaled by its own")
    if any(item.lossy for item in slices):
        notes.append("the pixels were compressed with loss")
    return notes


def _padding_hu(slices: Sequence[SliceHeader]) -> tuple[float, float] | None:
    """The padding values in HU where all slices agree on them."""
    found = set()
    for item in slices:
        if item.padding is None or item.looked_up:
            return None
        slope, intercept = item.rescale or UNSCALED
        ends = sorted(value * slope + intercept for value in item.padding)
        found.add((ends[0], ends[1]))
    return found.pop() if len(found) == 1 else None


def _affine(series: Series) -> NDArray[np.float64]:
    """(s, h, w) to RAS mm (PS3.3 C.7.6.2.1.1 with the step between slices as first column)."""
    first = series.slices[0]
    assert first.position is not None and first.orientation is not None and first.spacing is not None
    step = series.step_mm
    if step is None:
        normal = first.normal * (first.thickness or 1.0)
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
