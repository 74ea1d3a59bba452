"""One way in for CT: a path to a volume, whatever the format. The format is told by content, not by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from medvl.types import UnreadableImageError
from modalities.ct.archive import is_zip, list_members, unpacked
from modalities.ct.assembly import read_series
from modalities.ct.hu import RescalePolicy
from modalities.ct.itk import read_itk
from modalities.ct.nifti import GZIP_MAGIC, read_nifti
from modalities.ct.runs import TOLERANCE_MM, Series
from modalities.ct.series import find_series
from modalities.ct.volume import CtVolume, check_file, refused

NIFTI_SUFFIXES = (".nii", ".nii.gz")
OTHER_SUFFIXES = (".mha", ".nrrd")

Format = Literal["nifti", "itk", "dicom"]


def read_ct(
    path: Path,
    series: int | Literal["largest"] | None = None,
    *,
    rescale: tuple[float, float] | None = None,
    rescale_policy: RescalePolicy = "auto",
    spacing_mm: tuple[float, float, float] | None = None,
    allow_no_orientation: bool = False,
    tolerance_mm: float = TOLERANCE_MM,
    fill_missing: bool = False,
) -> CtVolume:
    """Read one CT volume in HU.

    Args:
        path: a folder or zip with a DICOM series (or a zip with one NIfTI, MHA or NRRD), a DICOM file (multi-frame, or one slice, which
            is a volume of one), ``.nii``, ``.nii.gz``, ``.mha``, ``.mhd``, ``.nrrd`` or ``.nhdr``.
        series: which volume of a folder or zip that holds several, counting from 0 in the order of :func:`find_series`; 'largest' takes
            the one with most slices and says so. None refuses such a folder.
        rescale: of NIfTI, as are ``rescale_policy``, ``spacing_mm`` and ``allow_no_orientation``: see :func:`read_nifti`.
        rescale_policy: likewise.
        spacing_mm: likewise.
        allow_no_orientation: likewise.
        tolerance_mm: of DICOM: see :func:`find_series`.
        fill_missing: of DICOM: see :func:`read_series`.
    Raises:
        UnreadableImageError: it cannot be read as one CT volume; the message says what was expected, what came and what to do.
    """
    path = Path(path)
    if not path.is_dir():
        if is_zip(path):
            inside = [member for member in list_members(path) if member.suffix in NIFTI_SUFFIXES + OTHER_SUFFIXES]
            if inside:
                return _read_packed(path, [member.index for member in inside], rescale, rescale_policy, spacing_mm, allow_no_orientation)
        else:
            kind = sniff(path)
            if kind == "nifti":
                return read_nifti(
                    path,
                    rescale=rescale,
                    rescale_policy=rescale_policy,
                    spacing_mm=spacing_mm,
                    allow_no_orientation=allow_no_orientation,
                )
            if kind == "itk":
                return read_itk(path)
    found = find_series(path, tolerance_mm=tolerance_mm)
    chosen, note = choose_series(path, found, series)
    volume = read_series(chosen, fill_missing=fill_missing)
    return volume.replace(warnings=(*volume.warnings, *note)) if note else volume


def sniff(path: Path) -> Format:
    """The format of a file by its first bytes; what is none of the others is for DICOM to judge."""
    check_file(path)
    with path.open("rb") as file:
        start = file.read(512)
    if start[128:132] == b"DICM":
        return "dicom"
    if start.startswith(GZIP_MAGIC) or 348 in _lengths(start) or 540 in _lengths(start):
        return "nifti"
    if start.startswith(b"NRRD000") or re.match(rb"\s*(ObjectType|NDims|Comment)\s*=", start):
        return "itk"
    return "nifti" if path.name.lower().endswith(NIFTI_SUFFIXES) else "dicom"


def _lengths(start: bytes) -> set[int]:
    return {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")} if len(start) >= 4 else set()


def _read_packed(
    path: Path,
    indices: list[int],
    rescale: tuple[float, float] | None,
    rescale_policy: RescalePolicy,
    spacing_mm: tuple[float, float, float] | None,
    allow_no_orientation: bool,
) -> CtVolume:
    """The one volume file of a zip, held in memory: what it was unpacked to is gone afterwards."""
    if len(indices) > 1:
        raise refused(path, f"holds {len(indices)} volume files, expected one; unpack it and name the one that is meant")
    with unpacked(path, indices) as (place,):
        try:
            if sniff(place) == "itk":
                return read_itk(place)
            volume = read_nifti(
                place, rescale=rescale, rescale_policy=rescale_policy, spacing_mm=spacing_mm, allow_no_orientation=allow_no_orientation
            )
        except UnreadableImageError as error:
            raise refused(path, f"member {indices[0] + 1} {str(error).removeprefix(f'{place}: ')}") from None
        return volume.replace(voxels=volume.voxels.copy())


def choose_series(path: Path, found: list[Series], series: int | Literal["largest"] | None) -> tuple[Series, list[str]]:
    """The series that :func:`read_ct` reads of those found in a folder or zip, and what to note about those left.

    Raises:
        UnreadableImageError: none that is a volume, or several and ``series`` does not say which.
    """
    unreadable = [item for item in found if item.kind == "unreadable"]
    note = [f"{len(unreadable)} file{'s' * (len(unreadable) > 1)} beside it could not be read"] if unreadable else []
    if isinstance(series, int):
        if not 0 <= series < len(found):
            raise refused(path, f"has no series {series}; there are {len(found)}: {_listed(found)}")
        return found[series], note
    volumes = [item for item in found if item.kind == "volume"] or [item for item in found if item.kind == "slice"]
    if not volumes and len(found) == 1:
        raise refused(path, f"holds no CT volume: {found[0].slices[0].problem or found[0].description}")
    if not volumes:
        raise refused(path, f"holds no CT volume; there is {_listed(found)}")
    if len(volumes) == 1:
        return volumes[0], note
    if series == "largest":
        best = max(volumes, key=lambda item: len(item.slices))
        return best, [*note, f"the largest of {len(volumes)} volumes was taken"]
    raise refused(path, f"holds {len(volumes)} volumes; choose one by series=, or series='largest': {_listed(volumes)}")


def _listed(found: list[Series]) -> str:
    shown = [f"{index}: {item.description}" for index, item in enumerate(found[:12])]
    return "; ".join(shown) + (f"; and {len(found) - 12} more" if len(found) > 12 else "")
