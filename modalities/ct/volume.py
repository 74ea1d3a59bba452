"""One CT volume: HU, where every voxel lies, and what was noticed or repaired on the way.

Voxels are (S, H, W): slices, rows, columns as the file holds them, not yet turned to any patient axis. The affine goes from voxel index
(s, h, w), integers at voxel centres, to RAS mm. (X, Y, Z) is the same volume with its axes permuted and flipped, and no more, to run as
closely to right, anterior and superior as they can: nibabel's closest canonical.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.types import UnreadableImageError
from modalities.ct.hu import HuVerdict

MAX_VOXELS = 2**30
"""Largest volume that is read: 1024 slices of 1024 x 1024; 2 GiB of int16."""

STRAIGHT_DEG = 0.1
"""Angles below this are rounding of header values, not a tilt: 0.9 mm over a field of 500 mm."""


@dataclass(frozen=True, eq=False)
class CtVolume:
    """A CT volume in HU."""

    voxels: NDArray[Any]  # (S, H, W) int16 or float32, in native byte order; may be a read-only memory map
    affine: NDArray[np.float64]  # 4 x 4, (s, h, w) to RAS mm; sheared where the gantry was tilted
    hu_verdict: HuVerdict  # what the histogram says of the units
    warnings: tuple[str, ...] = ()  # what was noticed
    repairs: tuple[str, ...] = ()  # what was changed, always by metadata or on request
    valid_slices: NDArray[np.bool_] | None = None  # (S,), False where a slice was missing and has been filled in; None: all are real
    padding_hu: tuple[float, float] | None = None  # lowest and highest value that marks "outside the scanned field"; kept in voxels
    transfer_syntax: str | None = None  # of DICOM: registered name
    photometric: str | None = None  # of DICOM

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or min(self.voxels.shape) < 1:
            raise ValueError(f"a CT volume is (S, H, W) with at least one voxel, got shape {self.voxels.shape}")
        if self.voxels.dtype not in (np.int16, np.float32) or not self.voxels.dtype.isnative:
            raise ValueError(f"CT voxels are int16 or float32 in native byte order, got {self.voxels.dtype.str}")
        problem = affine_problem(self.affine)
        if problem:
            raise ValueError(f"a CT volume needs an affine from (s, h, w) to RAS mm; this one {problem}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, H, W)."""
        s, h, w = self.voxels.shape
        return s, h, w

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along (S, H, W); along a tilted S, of the centres and not of the planes."""
        s, h, w = (float(step) for step in np.linalg.norm(self.affine[:3, :3], axis=0))
        return s, h, w

    @property
    def orientation(self) -> str:
        """Where the file's axes run to, in (x, y, z) = (w, h, s) order, as nibabel writes it: 'LPS' for an ordinary axial series."""
        from nibabel.orientations import aff2axcodes

        return "".join(aff2axcodes(xyz_affine(self.affine)))

    @property
    def tilt_deg(self) -> float:
        """Angle between the step from slice to slice and the normal of the slices; 0 unless the gantry was tilted."""
        along_s, along_h, along_w = self.affine[:3, :3].T
        normal = np.cross(along_h, along_w)
        cosine = abs(float(normal @ along_s)) / float(np.linalg.norm(normal) * np.linalg.norm(along_s))
        return math.degrees(math.acos(min(cosine, 1.0)))

    @property
    def is_oblique(self) -> bool:
        """True where an axis leaves its closest patient axis by more than 0.1 degrees: a permutation and flips do not reach RAS."""
        axes = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        return bool(np.abs(axes).max(axis=0).min() < math.cos(math.radians(STRAIGHT_DEG)))

    def replace(self, **changes: Any) -> CtVolume:
        """A copy with the named fields changed."""
        return replace(self, **changes)


def closest_ras(volume: CtVolume) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The volume with axes permuted and flipped to the closest of RAS, nothing resampled: nibabel's ``as_closest_canonical``.

    Returns:
        (X, Y, Z) view of the voxels, and the 4 x 4 affine from (x, y, z) to RAS mm.
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    affine = xyz_affine(volume.affine)
    values = volume.voxels.transpose(2, 1, 0)
    turn = io_orientation(affine)
    return apply_orientation(values, turn), affine @ inv_ornt_aff(turn, values.shape)


def value_sha256(volume: CtVolume) -> str:
    """SHA-256 of the values as little-endian float32, (X, Y, Z) of the closest RAS in C order: equal for equal content in any format."""
    values, _ = closest_ras(volume)
    digest = hashlib.sha256()
    step = max(1, 2**22 // (values.shape[1] * values.shape[2]))
    for start in range(0, len(values), step):
        digest.update(np.ascontiguousarray(values[start : start + step], dtype="<f4").data)
    return digest.hexdigest()


def xyz_affine(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """An affine of (s, h, w) turned into that of (x, y, z) = (w, h, s), or back."""
    return affine[:, [2, 1, 0, 3]]


def affine_problem(affine: NDArray[Any]) -> str | None:
    """What makes a 4 x 4 matrix no affine of a volume, in words that follow "this one"; None if nothing does."""
    if np.shape(affine) != (4, 4) or not np.isfinite(affine).all():
        return "is not a finite 4 x 4 matrix"
    if np.abs(affine).max() > 1e9:  # before anything is squared
        return "holds numbers beyond 1e9"
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if steps.min() < 1e-4 or steps.max() > 1e4:
        return f"has voxel steps from {steps.min():.3g} to {steps.max():.3g} mm, expected 0.0001 to 10000"
    if abs(np.linalg.det(affine[:3, :3] / steps)) < 1e-3:
        return "has axes that lie in one plane"
    if np.abs(affine[:3, 3]).max() > 1e6:
        return "lies more than a kilometre away"
    return None


def refused(path: Path, message: str) -> UnreadableImageError:
    """The error for a file; the message must hold nothing from its header that identifies."""
    return UnreadableImageError(f"{path}: {message}")


def check_file(path: Path) -> int:
    """Bytes of a regular file.

    Raises:
        UnreadableImageError: it cannot be opened, or is a folder, pipe or device.
    """
    try:
        regular, size = path.is_file(), path.stat().st_size
    except (OSError, ValueError) as error:
        raise refused(path, f"cannot be opened: {getattr(error, 'strerror', None) or type(error).__name__}") from None
    if not regular:
        raise refused(path, "expected a file, this is a folder, pipe or device")
    return size


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """int16 where the values are whole numbers that fit, without a copy where they are already; else float32."""
    if values.dtype == np.int16 and values.dtype.isnative:
        return values
    if values.dtype.kind in "iu" and (np.can_cast(values.dtype, np.int16) or fits_int16(values)):
        return values.astype(np.int16)
    return values.astype(np.float32, copy=False)


def fits_int16(values: NDArray[Any]) -> bool:
    """Whether every value lies within int16."""
    return values.size == 0 or (int(values.min()) >= -32768 and int(values.max()) <= 32767)
