"""NIfTI to a CT volume: ``.nii`` as a memory map, ``.nii.gz`` inflated by igzip and no further than its header declares.

nibabel parses the header; the values are read here, with the file's own scaling applied exactly once. (X, Y, Z) is the file's order, x
fastest; in memory that is (S, H, W) = (z, y, x) without a copy. World is RAS mm, as NIfTI has it.

Exactly the named file is read: SimpleITK, given x.nii.gz, reads an x.nii beside it.
"""

from __future__ import annotations

import io
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medvl.types import UnreadableImageError
from modalities.ct.hu import RescalePolicy, hu_verdict, needs_rescale, spread_sample
from modalities.ct.volume import MAX_VOXELS, CtVolume, affine_problem, check_file, narrow, refused, xyz_affine

GZIP_MAGIC = b"\x1f\x8b"
MOST_DEFLATED = 1032
"""Deflate cannot shrink further: 258 bytes in two bits."""
FORMS_AGREE_MM = 0.1
"""qform and sform may differ by this at a corner: a quaternion in float32 over 500 mm."""
CHUNK_BYTES = 2**24


@dataclass
class _Notes:
    path: Path
    warnings: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Layout:
    """Where and how the values lie in the (inflated) file."""

    shape: tuple[int, int, int]  # (X, Y, Z)
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_nifti(
    path: Path,
    *,
    rescale: tuple[float, float] | None = None,
    rescale_policy: RescalePolicy = "auto",
    spacing_mm: tuple[float, float, float] | None = None,
    allow_no_orientation: bool = False,
) -> CtVolume:
    """Read a CT volume from ``.nii`` or ``.nii.gz``, NIfTI-1 or NIfTI-2.

    The affine is nibabel's: the sform if its code is not 0, else the qform; a warning says so where they disagree.

    Args:
        path: the file.
        rescale: (slope, intercept) to HU from metadata, such as a CT-RATE table (:func:`modalities.ct.rescale_from_metadata`).
        rescale_policy: with ``rescale``: 'auto' applies it only where the histogram says that it was not applied yet, 'apply' always,
            'never' not. What was done stands in ``repairs`` or ``warnings``.
        spacing_mm: (S, H, W) from metadata; where the header's differ by over 1 %, the affine's axes are stretched to these and
            ``repairs`` says so.
        allow_no_orientation: read a file whose qform and sform codes are both 0, with nibabel's guess for the affine.
    Raises:
        UnreadableImageError: no NIfTI, truncated, too large, several volumes in it, no orientation, colour or complex values, or
            'auto' cannot tell whether the rescale was applied.
    """
    path = Path(path)
    notes = _Notes(path)
    try:
        return _read(notes, rescale, rescale_policy, spacing_mm, allow_no_orientation)
    except UnreadableImageError:
        raise
    except Exception as error:  # hostile headers raise anything; texts may quote header values
        raise refused(path, f"not a readable NIfTI file: {type(error).__name__} while reading its header or values") from None


def _read(
    notes: _Notes,
    rescale: tuple[float, float] | None,
    policy: RescalePolicy,
    spacing_mm: tuple[float, float, float] | None,
    allow_no_orientation: bool,
) -> CtVolume:
    path = notes.path
    size = check_file(path)
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
    with _opened(path, packed) as stream:
        header = _header(notes, stream)
        layout = _layout(notes, header, size, packed)
        affine = xyz_affine(_affine(notes, header, layout.shape, allow_no_orientation))
        if packed:
            stored = _inflate(notes, stream, layout)
    if not packed:
        mapped = np.memmap(path, dtype=layout.dtype, mode="r", offset=layout.offset, shape=layout.shape, order="F")
        stored = np.asarray(mapped).transpose(2, 1, 0)
    values = _scaled(stored, layout.slope, layout.intercept)
    try:
        wanted, note = needs_rescale(values, rescale, policy)
    except ValueError as error:
        raise refused(path, str(error)) from None
    if wanted and rescale is not None:
        values = _scaled(values, *rescale)
        notes.repairs.append(note or "")
    elif note:
        notes.warnings.append(note)
    values = narrow(values)
    sample = spread_sample(values)
    if values.dtype == np.float32 and not np.isfinite(sample).all():
        if not np.isfinite(sample).any():
            raise refused(path, "holds no finite value")
        notes.warnings.append("holds voxels that are not finite numbers; kept as they are")
    verdict = hu_verdict(sample)
    if verdict.state != "ok":
        notes.warnings.append(f"units: {verdict.state}: {verdict.evidence}")
    if spacing_mm is not None:
        affine = _stretched(notes, affine, spacing_mm)
    return CtVolume(values, affine, verdict, tuple(notes.warnings), tuple(notes.repairs))


def _opened(path: Path, packed: bool) -> AbstractContextManager[BinaryIO]:
    """The file's bytes, inflated as they are read."""
    if not packed:
        return path.open("rb")
    from isal import igzip

    opened: AbstractContextManager[BinaryIO] = igzip.open(path, "rb")
    return opened


def _take(notes: _Notes, stream: BinaryIO, count: int) -> bytes:
    """``count`` bytes, or fewer at the end."""
    try:
        return stream.read(count)
    except (OSError, EOFError, ValueError) as error:
        raise refused(notes.path, f"its gzip stream is damaged or cut short ({type(error).__name__}); copy the file again") from None


def _header(notes: _Notes, stream: BinaryIO) -> Any:
    """The parsed header, NIfTI-1 or -2, either byte order."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    start = _take(notes, stream, 4)
    sizes = {int.from_bytes(start, "little"), int.from_bytes(start, "big")} if len(start) == 4 else set()
    kind, length = (Nifti2Header, 540) if 540 in sizes else (Nifti1Header, 348)
    if not sizes & {348, 540}:
        raise refused(notes.path, "expected a NIfTI file; it does not start with the length of a NIfTI header")
    raw = start + _take(notes, stream, length - 4)
    if len(raw) < length:
        raise refused(notes.path, f"is cut short: a NIfTI header has {length} bytes, this file {len(raw)}")
    magic = raw[344:348] if length == 348 else raw[4:8]
    if magic not in (b"n+1\0", b"n+2\0"):
        raise refused(notes.path, "is the header of a two-file image (.hdr and .img) or an Analyze file; convert it to one .nii file")
    return kind.from_fileobj(io.BytesIO(raw), check=False)  # what matters is checked below; nibabel's check logs and repairs


def _layout(notes: _Notes, header: Any, size: int, packed: bool) -> _Layout:
    """Shape, type and place of the values, checked against limits and the file's size before anything is allocated."""
    path = notes.path
    count = int(header["dim"][0])
    dims = [int(n) for n in header["dim"][1 : count + 1]] if 1 <= count <= 7 else []
    if len(dims) < 3 or min(dims) < 1:
        raise refused(path, f"declares {count} dimensions of sizes {dims}; expected a volume of 3 with at least one voxel each")
    volumes = math.prod(dims[3:])
    if volumes > 1:
        raise refused(
            path, f"holds {volumes} volumes of {dims[0]} x {dims[1]} x {dims[2]} voxels; expected one. Save the one that is meant"
        )
    if len(dims) > 3:
        notes.warnings.append(f"declared with {len(dims)} dimensions, of which only three are longer than 1")
    voxels = math.prod(dims[:3])
    if voxels > MAX_VOXELS:
        raise refused(path, f"declares {dims[0]} x {dims[1]} x {dims[2]} voxels, more than the {MAX_VOXELS} that are read")
    try:
        dtype = header.get_data_dtype()
    except Exception:
        raise refused(path, f"has data type code {int(header['datatype'])}, which no NIfTI volume of numbers has") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise refused(path, f"holds {'complex' if dtype.kind == 'c' else 'colour or unusual'} values, expected integers or floats")
    declared = float(header["vox_offset"])
    least = 544 if int(header["sizeof_hdr"]) == 540 else 352
    if not math.isfinite(declared) or declared != int(declared) or not (declared == 0 or least - 4 <= declared <= 2**31):
        raise refused(path, f"declares that its values start at byte {declared:g}; expected {least} or later")
    offset = int(declared) or least  # 0 in a single file means right behind the header, as nibabel has it
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not math.isfinite(slope) or slope == 0:  # the standard's way to say "not scaled"
        slope, intercept = 1.0, 0.0
    elif not math.isfinite(intercept):
        raise refused(path, "has a scl_slope but a scl_inter that is no finite number")
    layout = _Layout((dims[0], dims[1], dims[2]), dtype, offset, slope, intercept)
    need = offset + layout.nbytes
    if not packed and size < need:
        raise refused(path, f"is cut short: {dims[0]} x {dims[1]} x {dims[2]} voxels need {need} bytes, it has {size}")
    if not packed and size > need:
        notes.warnings.append(f"{size - need} bytes follow the values; not read")
    if packed and need > size * MOST_DEFLATED:
        raise refused(path, f"declares {need} bytes inflated, more than its {size} bytes can hold; it is cut short or its header is wrong")
    return layout


def _inflate(notes: _Notes, stream: BinaryIO, layout: _Layout) -> NDArray[Any]:
    """(Z, Y, X) stored values from a gzip stream that stands behind the header; reads what is declared and one byte more."""
    at = stream.tell()
    while at < layout.offset:  # extensions; passed over
        skipped = len(_take(notes, stream, min(CHUNK_BYTES, layout.offset - at)))
        if not skipped:
            raise refused(notes.path, f"is cut short: its values start at byte {layout.offset}, it inflates to {at}")
        at += skipped
    values = np.empty(math.prod(layout.shape), dtype=layout.dtype)
    view = values.view(np.uint8).data
    done = 0
    while done < len(view):
        try:
            got = stream.readinto(view[done : done + CHUNK_BYTES])  # type: ignore[attr-defined]
        except (OSError, EOFError, ValueError) as error:
            raise refused(notes.path, f"its gzip stream is damaged or cut short ({type(error).__name__}); copy the file again") from None
        if not got:
            raise refused(notes.path, f"is cut short: {len(view)} bytes of values are declared, {done} came")
        done += got
    if _take(notes, stream, 1):  # at the end of the stream this checks its checksum
        notes.warnings.append("the gzip stream holds more than the header declares; the rest was not read and no checksum was checked")
    return values.reshape(layout.shape[::-1])


def _scaled(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    """``slope * stored + intercept``: int16 where that is exact, else float32 of the float64 result, slice by slice."""
    if (slope, intercept) == (1, 0):
        return stored
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 4 and slope == int(slope) and intercept == int(intercept):
        ends = [int(end) * int(slope) + int(intercept) for end in (stored.min(), stored.max())]
        if min(ends) >= -32768 and max(ends) <= 32767:
            whole = np.empty(stored.shape, dtype=np.int16)
            for index, plane in enumerate(stored):
                whole[index] = plane.astype(np.int64) * int(slope) + int(intercept)
            return whole
    scaled = np.empty(stored.shape, dtype=np.float32)
    for index, plane in enumerate(stored):
        scaled[index] = plane.astype(np.float64) * slope + intercept
    return scaled


def _affine(notes: _Notes, header: Any, shape: tuple[int, int, int], allow_no_orientation: bool) -> NDArray[np.float64]:
    """(x, y, z) to RAS mm by nibabel's rule, with what is odd about it noted."""
    path = notes.path
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    if not 0 <= sform_code <= 5 or not 0 <= qform_code <= 5:
        notes.warnings.append(f"sform code {sform_code} and qform code {qform_code}; codes of NIfTI run from 0 to 5")
    if sform_code == 0 and qform_code == 0:
        if not allow_no_orientation:
            raise refused(
                path, "has no orientation (qform and sform codes are 0), so left and right are unknown; "
                "pass allow_no_orientation=True to read it with nibabel's guess"
            )  # fmt: skip
        notes.warnings.append("has no orientation (qform and sform codes are 0); nibabel's guess was used, left and right are unknown")
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except Exception:
        raise refused(path, "has a qform that is no rotation") from None
    used = "sform" if sform_code else "qform" if qform_code else "affine"
    problem = affine_problem(affine)
    if problem:
        raise refused(path, f"its {used} {problem}")
    units = int(header["xyzt_units"]) & 7
    if units not in (0, 2):
        notes.warnings.append("its header gives lengths in another unit than mm; taken as mm, as nibabel does")
    if sform_code and qform_code:
        _compare_forms(notes, header, affine, shape)
    steps, zooms = np.linalg.norm(affine[:3, :3], axis=0), np.abs(np.asarray(header["pixdim"][1:4], dtype=np.float64))
    if sform_code and not np.allclose(steps, zooms, rtol=0.01):
        listed = " x ".join(f"{z:.4g}" for z in zooms), " x ".join(f"{s:.4g}" for s in steps)
        notes.warnings.append(f"pixdim says {listed[0]} mm, the sform {listed[1]} mm; the sform was used")
    return affine


def _compare_forms(notes: _Notes, header: Any, affine: NDArray[np.float64], shape: tuple[int, int, int]) -> None:
    """Warn where the qform would put a corner elsewhere."""
    try:
        other = np.asarray(header.get_qform(), dtype=np.float64)
    except Exception:
        notes.warnings.append("its qform is no rotation; the sform was used")
        return
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)], dtype=np.float64)
    if not np.abs(other).max() <= 1e9:
        notes.warnings.append("its qform holds absurd numbers; the sform was used")
        return
    apart = float(np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max())
    if not apart <= FORMS_AGREE_MM:
        notes.warnings.append(f"qform and sform disagree by up to {apart:.4g} mm; the sform was used, as nibabel does")


def _stretched(notes: _Notes, affine: NDArray[np.float64], spacing_mm: tuple[float, float, float]) -> NDArray[np.float64]:
    """The affine with steps as metadata has them, where they differ by over 1 %; the first voxel and the directions stay."""
    wanted, steps = np.asarray(spacing_mm, dtype=np.float64), np.linalg.norm(affine[:3, :3], axis=0)
    if wanted.shape != (3,) or not np.isfinite(wanted).all() or wanted.min() <= 0:
        raise refused(notes.path, "spacing_mm must be three lengths above 0 in (S, H, W) order")
    if np.allclose(steps, wanted, rtol=0.01):
        return affine
    listed = " x ".join(f"{s:.4g}" for s in steps), " x ".join(f"{s:.4g}" for s in wanted)
    notes.repairs.append(f"spacing of the header, {listed[0]} mm, replaced by that of the metadata, {listed[1]} mm (S, H, W)")
    turned = affine.copy()
    turned[:3, :3] *= wanted / steps
    return turned
