"""Files that annotations point to: masks, read when they are needed, and the images that the keys of a source stand for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from medvl.data.manifest import Manifest
from medvl.geometry.regions import Box, Mask, Region
from medvl.types import UnreadableImageError
from tasks.annotations.records import Annotation, BadRowError

VOLUMES = (".nii", ".nii.gz")
IMAGES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".mha", ".mhd", ".nrrd", *VOLUMES)
"""Suffixes that a key may have and its file not, or the other way round."""


@dataclass(frozen=True)
class FileMask(Region):
    """A mask in a file, read anew each time: a picture, or one of the masks of a NIfTI; what is not 0 is inside."""

    path: Path
    index: int = 0  # of a NIfTI with several
    shape: tuple[int, int, int] | None = None  # (S, H, W) that a NIfTI is expected to have

    @property
    def is_volume(self) -> bool:
        """Whether it is a NIfTI."""
        return _suffix(self.path.name) in VOLUMES

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The box around all of it, in the file's own axes. Reads the file."""
        return Mask(self._read()).boxes

    def check(self, shape: Sequence[int]) -> None:
        """See :meth:`Region.check`; does not read the file, so of a picture only the number of axes is known."""
        if self.shape is not None and tuple(shape) != self.shape:
            raise ValueError(f"a mask of {self.shape} does not belong to an image of {tuple(shape)}")
        if len(shape) != (3 if self.is_volume else 2):
            raise ValueError(f"a mask in a {'volume' if self.is_volume else 'picture'} does not belong to an image of {len(shape)} axes")

    def mask(self, shape: Sequence[int]) -> NDArray[np.bool_]:
        """See :meth:`Region.mask`. A NIfTI in its own axes; :meth:`on` turns it to the axes of a volume.

        Raises:
            UnreadableImageError: the file cannot be read.
        """
        self.check(shape)
        return Mask(self._read()).mask(shape)

    def on(self, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """The mask on the voxels of the volume that it belongs to, whatever its own axes.

        Args:
            affine: of the volume, (s, h, w) to RAS mm.
        Raises:
            UnreadableImageError: the file cannot be read, or its voxels are not those of the volume.
        """
        from modalities.ct.mask_stack import laid_on, read_stacked_mask

        mask, own = read_stacked_mask(self.path, self.index, self.shape)
        return laid_on(self.path, mask, own, affine, shape)

    def scaled(self, shape_from: Sequence[int], shape_to: Sequence[int]) -> Region:
        """See :meth:`Region.scaled`; reads the file where the shapes differ."""
        return self if tuple(shape_from) == tuple(shape_to) else Mask(self.mask(shape_from)).scaled(shape_from, shape_to)

    def _read(self) -> NDArray[np.bool_]:
        if self.is_volume:
            from modalities.ct.mask_stack import read_stacked_mask

            return read_stacked_mask(self.path, self.index, self.shape)[0]
        from PIL import Image

        try:
            with Image.open(self.path) as picture:
                values = np.asarray(picture)  # of a palette the index counts
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImageError(f"{self.path}: a mask that is no readable picture ({type(error).__name__})") from None
        colours = values[..., :3] if values.ndim == 3 and values.shape[-1] > 3 else values  # without what makes it transparent
        return np.asarray(colours.any(axis=-1) if colours.ndim == 3 else colours != 0)


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a table names, below the table's folder.

    Raises:
        BadRowError: an absolute name, or one with a '..' step.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in name:
        raise BadRowError("names a file outside the annotations' folder")
    return folder.joinpath(*parts.parts)


@dataclass(frozen=True)
class ImageFiles:
    """Where the images of some annotations are."""

    paths: Mapping[str, Path] = field(repr=False)  # key -> file, or a series' folder
    missing: tuple[str, ...]  # keys without a file
    ambiguous: tuple[str, ...]  # keys that several files could be
    patients: Mapping[str, str] = field(default_factory=dict, repr=False)  # key -> patient, from a manifest


def find_images(annotations: Iterable[Annotation], where: str | Path | Manifest) -> ImageFiles:
    """The file of each annotated image.

    A key is a file's name, or the end of its path, with or without the suffix of an image; the most exact of these that any file answers
    to counts. Links to folders are not followed.

    Args:
        where: a folder, with all below it, or a manifest, whose patients come along.
    Raises:
        ValueError: no such folder.
    """
    patients: dict[Path, str] = {}
    if isinstance(where, Manifest):
        files = [row.path for row in where]
        patients = {row.path: row.patient_id for row in where}
    else:
        if not Path(where).is_dir():
            raise ValueError(f"{where}: no such folder")
        files = [Path(folder) / name for folder, _, names in os.walk(where) for name in names]
    named: dict[str, list[Path]] = {}
    for file in sorted(files):
        named.setdefault(_stem(file.name), []).append(file)
    paths: dict[str, Path] = {}
    missing: list[str] = []
    ambiguous: list[str] = []
    for key in dict.fromkeys(one.image for one in annotations):
        wanted = PurePosixPath(key.replace("\\", "/").strip("/")).parts
        close = named.get(_stem(wanted[-1]), []) if wanted else []
        ending = [file for file in close if file.parent.parts[len(file.parts) - len(wanted) :] == wanted[:-1]]
        exact = [file for file in ending if file.name == wanted[-1]] or ending
        if len(exact) == 1:
            paths[key] = exact[0]
        else:
            (ambiguous if exact else missing).append(key)
    found = {key: patients[path] for key, path in paths.items() if path in patients}
    return ImageFiles(paths, tuple(missing), tuple(ambiguous), found)


def _suffix(name: str) -> str:
    lower = name.lower()
    return next((suffix for suffix in (".nii.gz", *IMAGES) if lower.endswith(suffix)), "")


def _stem(name: str) -> str:
    suffix = _suffix(name)
    return name[: -len(suffix)] if suffix else name
