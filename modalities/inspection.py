"""What a file holds, as one record: modality, geometry, units, warnings, and a hash of its values that does not hang on how they are coded.

A radiograph or slice is (rows, columns). A volume is (x, y, z), turned to the closest RAS and not resampled; its affine goes from (x, y, z)
index to RAS mm. Values are those after modality LUT and rescale, before any window. Nothing from a header that identifies is in a record.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvl.types import UnreadableImageError

if TYPE_CHECKING:
    from modalities.ct.runs import Series
    from modalities.ct.volume import CtVolume


@dataclass(frozen=True)
class Inspection:
    """One image, slice or volume; None where the file does not say or it does not apply."""

    path: str  # as it was given, or of the file within a folder that was
    ok: bool
    error: str | None = None
    series: int | None = None  # which one of a folder or zip, counting from 0; what read_ct(path, series) takes
    kind: str | None = None  # image or volume
    modality: str | None = None  # DICOM's term; CT for a volume in HU
    shape: tuple[int, ...] | None = None  # (rows, columns) or (x, y, z)
    spacing_mm: tuple[float, ...] | None = None  # in the order of shape
    affine: tuple[tuple[float, ...], ...] | None = None  # of volumes
    value_range: tuple[float, float] | None = None
    unit: str | None = None
    hu_verdict: str | None = None  # ok, not_rescaled, rescaled_twice, not_ct or unknown; of CT
    hu_evidence: str | None = None
    photometric: str | None = None
    transfer_syntax: str | None = None
    frames: int | None = None
    orientation: str | None = None  # of a volume as the file holds it, (x, y, z), such as LPS
    view: str | None = None
    files: int | None = None  # of a series
    repairs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    sha256: str | None = None  # of the little-endian float32 values in C order

    def to_dict(self) -> dict[str, Any]:
        """For strict JSON: numbers that are not finite are None."""
        return {name: _plain(value) for name, value in self.__dict__.items()}


def inspect_paths(path: Path) -> Iterator[Inspection]:
    """A file as one record; a folder or zip as one per image and series in it."""
    from modalities.ct.archive import is_zip

    path = Path(path)
    try:
        if path.is_dir():
            yield from _inspect_folder(path)
        elif path.is_file() and is_zip(path):
            yield from _inspect_zip(path)
        else:
            yield inspect_file(path)
    except (UnreadableImageError, OSError) as error:
        yield _failed(path, error)


def inspect_file(path: Path) -> Inspection:
    """One file; never raises for what the file holds."""
    path = Path(path)
    try:
        return _inspect_file(path)
    except UnreadableImageError as error:
        return _failed(path, error)
    except (ValueError, OSError) as error:  # a name that no file may have
        return _failed(path, UnreadableImageError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or type(error).__name__}"))


def _inspect_file(path: Path) -> Inspection:
    from modalities.ct.read import sniff
    from modalities.xray.reader import PICTURE_MAGIC

    if not path.is_file():
        raise UnreadableImageError(f"{path}: {'is a folder or device, expected a file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(PICTURE_MAGIC):
        return _inspect_picture(path)
    if sniff(path) in ("nifti", "itk"):
        return _inspect_volume(path)
    return _inspect_dicom(path)


def _inspect_dicom(path: Path) -> Inspection:
    from modalities.ct.hu import hu_verdict
    from modalities.dicom import read_dicom

    image = read_dicom(path)
    if image.frames > 1 and image.modality == "CT":
        return _inspect_volume(path)
    verdict = hu_verdict(image.values) if image.modality == "CT" else None
    return Inspection(
        path=str(path),
        ok=True,
        kind="image",
        modality=image.modality,
        shape=(image.rows, image.columns),
        spacing_mm=image.spacing_mm,
        value_range=image.value_range,
        unit=image.unit,
        hu_verdict=None if verdict is None else verdict.state,
        hu_evidence=None if verdict is None else verdict.evidence,
        photometric=image.photometric,
        transfer_syntax=image.transfer_syntax,
        frames=image.frames,
        view=image.view,
        files=1,
        warnings=image.warnings,
        sha256=image.sha256,
    )


def _inspect_volume(path: Path, series: int | None = None, files: int | None = 1) -> Inspection:
    from modalities.ct.read import read_ct

    return _volume_record(path, read_ct(path, series), series, files)


def _volume_record(path: Path, volume: CtVolume, series: int | None, files: int | None) -> Inspection:
    from modalities.ct.volume import closest_ras, value_sha256

    values, affine = closest_ras(volume)
    return Inspection(
        path=str(path),
        ok=True,
        series=series,
        kind="volume",
        modality=None if volume.hu_verdict.state == "not_ct" else "CT",
        shape=values.shape,
        spacing_mm=tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()),
        affine=tuple(tuple(row) for row in affine.tolist()),
        value_range=(float(values.min()), float(values.max())),
        unit="HU" if volume.hu_verdict.state == "ok" else None,
        hu_verdict=volume.hu_verdict.state,
        hu_evidence=volume.hu_verdict.evidence,
        photometric=volume.photometric,
        transfer_syntax=volume.transfer_syntax,
        orientation=volume.orientation,
        files=files,
        repairs=volume.repairs,
        warnings=volume.warnings,
        sha256=value_sha256(volume),
    )


def _inspect_picture(path: Path) -> Inspection:
    from modalities.xray.reader import read_picture_values

    values, note = read_picture_values(path)
    return Inspection(
        path=str(path),
        ok=True,
        kind="image",
        shape=values.shape,
        value_range=(float(values.min()), float(values.max())),
        unit="grey level",
        photometric="MONOCHROME2",
        files=1,
        warnings=note,
        sha256=hash_values(values),
    )


def _inspect_folder(folder: Path) -> Iterator[Inspection]:
    """Series of CT slices as volumes, every other image on its own."""
    from modalities.ct.series import find_series
    from modalities.xray import XrayReader

    volumes = [
        p for p in sorted(folder.rglob("*")) if p.name.lower().endswith((".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")) and p.is_file()
    ]
    images = XrayReader().find_images(folder)
    found = find_series(folder) if images else []
    in_series = {header.file for series in found if series.kind in ("volume", "localizer") for header in series.slices}
    for index, series in enumerate(found):
        if series.kind == "volume":
            yield _series(folder, index, series)
    for path in sorted({*images, *volumes} - in_series):
        yield inspect_file(path)
    if not images and not volumes:
        raise UnreadableImageError(f"{folder}: no image in this folder; expected DICOM, NIfTI, MHA, NRRD, PNG, JPEG or TIFF files")


def _inspect_zip(path: Path) -> Iterator[Inspection]:
    from modalities.ct.archive import list_members
    from modalities.ct.series import find_series

    if any(member.suffix in (".nii", ".nii.gz", ".mha", ".nrrd") for member in list_members(path)):
        yield _inspect_volume(path)
        return
    found = find_series(path)
    for index, series in enumerate(found):
        yield _series(path, index, series)
    if not found:
        raise UnreadableImageError(f"{path}: no image in this archive; expected a DICOM series or one NIfTI, MHA or NRRD file")


def _series(path: Path, index: int, series: Series) -> Inspection:
    from modalities.ct.assembly import read_series

    files = len({(header.file, header.member) for header in series.slices})
    try:
        return _volume_record(path, read_series(series), index, files)
    except UnreadableImageError as error:
        return Inspection(path=str(path), ok=False, error=str(error), series=index, kind="volume", files=files)


def hash_values(values: NDArray[Any]) -> str:
    """SHA-256 of the values as little-endian float32 in C order."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").data).hexdigest()


def _failed(path: Path, error: Exception) -> Inspection:
    return Inspection(path=str(path), ok=False, error=str(error))


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
