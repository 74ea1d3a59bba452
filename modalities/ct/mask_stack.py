"""Masks of several findings in one NIfTI file, stacked along its first axis or its last, read one at a time.

NIfTI has time as the fourth axis, so :func:`modalities.ct.read_nifti` refuses such files: here they are what is expected. A stack along
the first axis, (F, X, Y, Z), is not what the standard's header can describe; its affine is taken as that of (X, Y, Z).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from medvl.types import UnreadableImageError
from modalities.ct.mask import SAME_PLACE_MM
from modalities.ct.nifti import GZIP_MAGIC
from modalities.ct.volume import MAX_VOXELS, affine_problem, check_file, refused, xyz_affine

MOST_SLICE_BYTES = 2**30
"""Of one slice with all its findings, which is what is held at a time: 100 findings of 1024 x 1024 in float64 fit."""


def read_stacked_mask(
    path: Path, index: int = 0, shape: tuple[int, int, int] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """One mask of a file: where its voxels are not 0.

    Args:
        path: ``.nii`` or ``.nii.gz``, of one mask (X, Y, Z) or of F masks (F, X, Y, Z) or (X, Y, Z, F).
        index: which of them, from 0.
        shape: (S, H, W) that is expected; tells the two stacks apart, without it the first axis is taken.
    Returns:
        (S, H, W) bool, turned to no patient axis, and the 4 x 4 affine from (s, h, w) to RAS mm.
    Raises:
        UnreadableImageError: no such file, no mask of this index or shape in it, or a file that is damaged.
    """
    path = Path(path)
    size = check_file(path)
    try:
        header = _header(path)
        dims = tuple(int(n) for n in header.get_data_shape())
        dtype, affine = header.get_data_dtype(), np.asarray(header.get_best_affine(), dtype=np.float64)
        offset = int(header["vox_offset"]) or (352 if int(header["sizeof_hdr"]) == 348 else 544)
        slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    except UnreadableImageError:
        raise
    except Exception as error:  # hostile headers raise anything; texts may quote header values
        raise refused(path, f"not a readable NIfTI file: {type(error).__name__} while reading its header") from None
    before, volume, count = _stack(path, dims, None if shape is None else shape[::-1])
    if not 0 <= index < count:
        raise refused(path, f"holds {count} masks, so there is none with index {index}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise refused(path, "holds values that are neither integers nor floats")
    if problem := affine_problem(affine):
        raise refused(path, f"its affine {problem}")
    if math.prod(volume) > MAX_VOXELS or count * volume[0] * volume[1] * dtype.itemsize > MOST_SLICE_BYTES:
        raise refused(path, f"declares {count} masks of {volume} voxels, more than is read")
    if not math.isfinite(slope) or slope == 0:  # the standard's way to say "not scaled"
        slope, intercept = 1.0, 0.0
    step = volume[0] * volume[1] * (count if before else 1)
    start = offset + (0 if before else index * math.prod(volume) * dtype.itemsize)
    mask = np.zeros(volume[::-1], dtype=bool)
    with _opened(path) as stream:
        try:
            stream.seek(start)
            for plane in mask:
                data = stream.read(step * dtype.itemsize)
                if len(data) < step * dtype.itemsize:
                    raise refused(path, f"is cut short: {dims} values are declared, its {size} bytes hold fewer")
                values = np.frombuffer(data, dtype=dtype)
                values = values.reshape(volume[1], volume[0], count)[..., index] if before else values.reshape(volume[1], volume[0])
                plane[:] = values * slope + intercept != 0
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, UnreadableImageError):
                raise
            raise refused(path, f"its gzip stream is damaged or cut short ({type(error).__name__}); copy the file again") from None
    return mask, xyz_affine(affine)


def laid_on(
    path: Path, mask: NDArray[np.bool_], affine: NDArray[np.float64], onto: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """A mask with its axes turned to those of the volume that it belongs to; no voxel is moved in the world.

    Args:
        path: of the mask, for messages.
        mask: (S, H, W) in its own axes.
        affine: of the mask, (s, h, w) to RAS mm.
        onto: affine of the volume.
        shape: of the volume.
    Raises:
        UnreadableImageError: its voxels are not those of the volume.
    """
    along, wanted = (matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0) for matrix in (affine, onto))
    cosines = wanted.T @ along
    order = [int(axis) for axis in np.abs(cosines).argmax(axis=1)]
    if sorted(order) == [0, 1, 2]:
        turned, moved = mask.transpose(order), affine[:, [*order, 3]].copy()
        for axis in range(3):
            if cosines[axis, order[axis]] < 0:
                turned = np.flip(turned, axis)
                moved[:3, 3] += moved[:3, axis] * (turned.shape[axis] - 1)
                moved[:3, axis] *= -1
        ends = np.array([[0, 0, 0, 1], [n - 1 for n in shape] + [1]], dtype=float).T
        if turned.shape == tuple(shape) and np.abs(moved @ ends - onto @ ends).max() <= SAME_PLACE_MM:
            return turned
    raise refused(path, f"a mask of {mask.shape} voxels that do not lie on the volume's {tuple(shape)}; expected the same grid")


def _header(path: Path) -> Any:
    import nibabel

    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):
        raise refused(path, "expected a NIfTI file")
    with _opened(path) as stream:  # an image's own header has forgotten where the values start and how they are scaled
        return type(image.header).from_fileobj(stream, check=False)


def _stack(path: Path, dims: tuple[int, ...], shape: tuple[int, ...] | None) -> tuple[bool, tuple[int, int, int], int]:
    """Whether the findings run along the first axis, (X, Y, Z), and how many there are."""
    while len(dims) > 4 and dims[-1] == 1:
        dims = dims[:-1]
    if len(dims) == 3 and shape in (None, dims):
        return False, (dims[0], dims[1], dims[2]), 1
    if len(dims) == 4 and shape in (None, dims[1:]):
        return True, (dims[1], dims[2], dims[3]), dims[0]
    if len(dims) == 4 and shape == dims[:3]:
        return False, (dims[0], dims[1], dims[2]), dims[3]
    raise refused(path, f"holds {dims} values, expected masks of {shape or 'three axes'}, one or a stack of them")


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
    if not packed:
        return path.open("rb")
    from isal import igzip

    opened: BinaryIO = igzip.open(path, "rb")
    return opened
