"""CT on disk or in memory to what a tower takes, with the record that lays a map back on the file's own voxels and millimetres.

Shapes: (S, H, W) slices, rows, columns; C HU windows as channels. The tower's grid runs to superior along S, posterior along H and to the
patient's left along W, whatever the file's axes, so a slice looks as radiologists are used to see it. Nothing is mirrored: axes are turned
by what the affine says, and the affine goes with them. Oblique and tilted volumes keep their own axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvl.geometry import GridTransform
from medvl.types import ImageBatch, ImageReader, ImageSample, UnreadableImageError
from modalities.ct.crop import body_box, thorax_box
from modalities.ct.volume import CtVolume, refused

LUNG_HU, MEDIASTINUM_HU, BONE_HU = (-1350.0, 150.0), (-160.0, 240.0), (-450.0, 1050.0)
"""Low and high ends of the usual chest windows: -600/1500, 40/400, 300/1500."""
AIR_HU = -1024.0
MAX_SIDE, MAX_WINDOWS, MAX_NUMBERS = 8192, 16, 2**31
"""Of what the reader makes: voxels along an axis, windows, and numbers in all (8 GiB: 1300 slices of 512 x 512 in three windows take half),
so that no config or header calls for memory without bound."""
AXES = {"superior": (2, 1.0), "posterior": (1, -1.0), "left": (0, -1.0)}
"""World axis (RAS) and sign of the directions that S, H and W run to."""


class CtReader(ImageReader):
    """Reads DICOM series, NIfTI, MHA and NRRD; turns, crops, resamples, windows and normalises. Its arguments are the preprocessing.

    Args:
        spacing_mm: of the tower's grid along (S, H, W); None keeps the file's along that axis.
        shape: (S, H, W) that is cropped or padded to about the centre; None keeps what there is along that axis, so slice counts vary.
        windows_hu: (low, high) of each channel, scaled to 0..1 and clipped; lung, mediastinum and bone unless told.
        crop: ``body``: the body's box; ``thorax``: that, and along z the slices with lung air and a wide margin
            (:mod:`modalities.ct.crop`); ``none``.
        max_slices: after resampling, the middle ones are kept; None keeps all.
        antialias: average where the grid gets coarser (default), or take plain linear interpolation as MONAI and ITK do.
        mean: subtracted from every channel after windowing.
        std: that divides it then.
        series: which series of a folder that holds several, see :func:`modalities.ct.read.read_ct`.
    Raises:
        ValueError: spacings or shapes that are not positive, windows that do not rise, none of them, numbers that are not finite, or
            sizes beyond ``MAX_SIDE``, ``MAX_WINDOWS`` and ``MAX_NUMBERS``.
    """

    suffixes: ClassVar[frozenset[str]] = frozenset({".nii", ".gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".zip"})

    def __init__(
        self,
        spacing_mm: Sequence[float | None] = (3.0, 1.5, 1.5),
        shape: Sequence[int | None] = (None, 224, 224),
        windows_hu: Sequence[Sequence[float]] = (LUNG_HU, MEDIASTINUM_HU, BONE_HU),
        crop: Literal["none", "body", "thorax"] = "body",
        max_slices: int | None = None,
        antialias: bool = True,
        mean: float = 0.5,
        std: float = 0.25,
        series: int | Literal["largest"] | None = "largest",
    ) -> None:
        if len(spacing_mm) != 3 or len(shape) != 3 or any(v is not None and v <= 0 for v in (*spacing_mm, *shape, max_slices, std)):
            raise ValueError(f"spacing_mm {tuple(spacing_mm)}, shape {tuple(shape)}, max_slices {max_slices}: expected positive numbers")
        if not windows_hu or any(len(window) != 2 or window[0] >= window[1] for window in windows_hu):
            raise ValueError(f"windows_hu is {windows_hu}, expected (low, high) pairs with low below high")
        if crop not in ("none", "body", "thorax"):
            raise ValueError(f"crop is {crop!r}, expected 'none', 'body' or 'thorax'")
        numbers = (*spacing_mm, *shape, max_slices, mean, std, *(end for window in windows_hu for end in window))
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise ValueError("spacing_mm, shape, windows_hu, max_slices, mean and std: expected finite numbers")
        sides = [side or 1 for side in (*shape, max_slices)]
        if max(sides) > MAX_SIDE or len(windows_hu) > MAX_WINDOWS or math.prod(sides[:3]) * len(windows_hu) > MAX_NUMBERS:
            raise ValueError(
                f"shape {tuple(shape)}, max_slices {max_slices} and {len(windows_hu)} windows: expected at most {MAX_SIDE} voxels along "
                f"an axis, {MAX_WINDOWS} windows and {MAX_NUMBERS} numbers in all"
            )
        self.spacing_mm, self.shape, self.crop, self.max_slices = tuple(spacing_mm), tuple(shape), crop, max_slices
        self.windows_hu = tuple((float(low), float(high)) for low, high in windows_hu)
        self.antialias, self.mean, self.std, self.series = antialias, mean, std, series

    def describe(self) -> dict[str, str]:
        """What is done to a volume, for a person; step -> words with units."""
        axes = ("slices", "rows", "columns")
        spacing = ", ".join("the file's own" if step is None else f"{step:.15g} mm" for step in self.spacing_mm)
        sizes = ", ".join(f"{name}: {'as many as there are' if n is None else n}" for name, n in zip(axes, self.shape, strict=True))
        crop = {
            "none": "none: the whole volume",
            "body": "body: the body's box",
            "thorax": "thorax: the body's box, and along z the slices with lung air and a wide margin",
        }
        series: dict[Any, str] = {
            "largest": "largest: of a folder with several the one with most slices",
            None: "none: a folder with several is refused",
        }
        return {
            "size": f"{sizes}; cropped or padded with air ({AIR_HU:.15g} HU) about the centre",
            "slices": "all are kept" if self.max_slices is None else f"at most {self.max_slices} after resampling, the middle ones",
            "spacing": f"{spacing} (slices, rows, columns)",
            "HU windows as channels": "; ".join(f"{i}: {low:.15g} to {high:.15g} HU" for i, (low, high) in enumerate(self.windows_hu)),
            "crop": crop[self.crop],
            "axes": "turned by the affine, never mirrored: slices to superior, rows to posterior, columns to the patient's left",
            "interpolation": "linear, averaged (anti-aliased) where the grid gets coarser"
            if self.antialias
            else "linear, without anti-aliasing",
            "normalisation": f"each window to 0..1 and clipped, then less {self.mean:.15g} (mean) and divided by "
            f"{self.std:.15g} (standard deviation)",
            "series": series.get(self.series, f"{self.series}: that one of a folder with several, counted from 0"),
            "refused": "what cannot be read as one CT volume on an even grid (doubtful units are warned of); what would become more than "
            f"{MAX_SIDE} voxels along an axis or {MAX_NUMBERS} numbers",
        }

    def sources(self, path: Path) -> tuple[Path, ...] | None:
        """As of the base class, and of a MetaImage or NRRD header the file that holds its values."""
        from modalities.ct.itk import data_file

        found = super().sources(path)
        try:
            values = data_file(path) if path.is_file() else None
        except UnreadableImageError:  # reading the image is what tells of it
            return None
        return found if values is None or found is None else (*found, values)

    def find_images(self, folder: Path) -> list[Path]:
        """Volume files under ``folder``, and each folder that holds DICOM files; sorted. Hidden ones and ``masks`` are passed over."""
        import os

        from modalities.dicom import has_dicom_magic

        found: list[Path] = []
        for root, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if name != "masks" and not name.startswith("."))
            paths = [Path(root, name) for name in sorted(files) if not name.startswith(".")]
            found += [path for path in paths if path.suffix.lower() in self.suffixes and (path.suffix.lower() != ".gz" or _is_nifti(path))]
            slices = (path for path in paths if path.suffix.lower() in ("", ".dcm", ".dicom", ".ima"))
            if any(has_dicom_magic(path) for path in slices):
                found.append(Path(root))
        return sorted(found)

    def study_key(self, path: Path) -> str | None:
        """A hash of the StudyInstanceUID of a DICOM file, or of the first in a folder: series of one study share it. Never raises.

        None for files of other formats, for archives, and where the header has none.
        """
        from modalities.dicom import has_dicom_magic, study_key

        try:
            files = (one for one in sorted(path.iterdir()) if one.is_file()) if path.is_dir() else iter([path])
            first = next((one for one in files if has_dicom_magic(one)), None)
        except OSError:
            return None
        return None if first is None else study_key(first)

    def read(self, path: Path) -> ImageSample:
        """One file, folder or zip to a sample.

        Raises:
            UnreadableImageError: it holds no CT volume that can be read, or none in HU; or what would be made of it is too large.
        """
        from modalities.ct.read import read_ct

        volume = read_ct(Path(path), self.series)
        try:
            return self.sample(volume)
        except UnreadableImageError as error:
            raise refused(path, str(error)) from None

    def read_array(self, array: Any, affine: NDArray[np.float64] | None = None) -> ImageSample:
        """An (S, H, W) array of HU.

        Args:
            affine: (s, h, w) to RAS mm; None: axes as the tower's, spaced as ``spacing_mm``, 1 mm where that is None.
        """
        from modalities.ct.hu import hu_verdict

        values = np.asarray(array)
        values = values if values.dtype == np.int16 else values.astype(np.float32)
        given = _plain_affine([step or 1.0 for step in self.spacing_mm]) if affine is None else np.asarray(affine, dtype=np.float64)
        return self.sample(CtVolume(values, given, hu_verdict(values)))

    def sample(self, volume: CtVolume) -> ImageSample:
        """A volume to a sample: turned, cropped on its own grid, resampled, fitted, windowed."""
        record = self.transform(volume)
        hu = record.apply(volume.voxels[None], fill=AIR_HU, antialias=self.antialias)[0]
        alone = len(self.windows_hu) == 1 and not np.may_share_memory(hu.numpy(), volume.voxels)
        pixels = hu[None] if alone else torch.empty(len(self.windows_hu), *hu.shape)
        for channel, (low, high) in zip(pixels, self.windows_hu, strict=True):  # in place: a volume has tens of MB
            torch.sub(hu, low, out=channel).mul_(1 / (high - low)).clamp_(0, 1).sub_(self.mean).mul_(1 / self.std)
        affine = volume.affine @ record.matrix()
        return ImageSample(
            pixels=pixels,
            valid=record.valid_along(0),
            transform=record,
            warnings=(*volume.warnings, *volume.repairs),
            affine=volume.affine,
            spacing_mm=tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()),
        )

    def transform(self, volume: CtVolume) -> GridTransform:
        """The record of what this reader does to a volume's grid.

        Raises:
            UnreadableImageError: ``spacing_mm`` would make a grid beyond ``MAX_SIDE`` or ``MAX_NUMBERS`` of it.
        """
        axes, flipped = turn_to_tower(volume.affine)
        record = GridTransform(volume.shape).reorient(axes, flipped)
        spacing = [volume.spacing_mm[a] for a in axes]
        if self.crop != "none":
            turned = volume.voxels.transpose(axes)[tuple(slice(None, None, -1 if f else 1) for f in flipped)]
            find = body_box if self.crop == "body" else thorax_box
            start, shape = find(turned, (spacing[0], spacing[1], spacing[2]))
            if shape != record.shape:
                record = record.crop(start, shape)
        ratio = [1.0 if wanted is None else wanted / own for wanted, own in zip(self.spacing_mm, spacing, strict=True)]
        if any(abs(r - 1) > 1e-4 for r in ratio):
            expected = [n / r for n, r in zip(record.shape, ratio, strict=True)]
            if max(expected) > MAX_SIDE or math.prod(expected) > MAX_NUMBERS or max(ratio) > MAX_SIDE:
                raise _too_large(f"resampling voxels of {_listed(spacing)} mm", expected)
            record = record.resample(ratio)
        slices = record.shape[0] if self.max_slices is None else min(record.shape[0], self.max_slices)
        fitted = [n if wanted is None else wanted for n, wanted in zip((slices, *record.shape[1:]), self.shape, strict=True)]
        if math.prod(fitted) * len(self.windows_hu) > MAX_NUMBERS:
            raise _too_large(f"{len(self.windows_hu)} windows", fitted)
        return record.fit(fitted)

    def native(self, path: Path) -> Tensor:
        """(S, H, W) float32 in 0..1, the file's own voxels in the first window."""
        from modalities.ct.read import read_ct

        low, high = self.windows_hu[0]
        values = torch.from_numpy(np.ascontiguousarray(read_ct(Path(path), self.series).voxels, dtype=np.float32))
        return ((values - low) / (high - low)).clamp_(0, 1)

    def enlarged(self, factor: int, path: Path | None = None) -> CtReader:
        """A reader of the same slices with ``factor`` times the rows and columns."""
        if self.spacing_mm[1] is None or self.spacing_mm[2] is None:
            raise NotImplementedError("a CT reader that keeps the file's own spacing has no finer one; give it spacing_mm")
        spacing = (self.spacing_mm[0], self.spacing_mm[1] / factor, self.spacing_mm[2] / factor)
        shape = (self.shape[0], *(None if side is None else side * factor for side in self.shape[1:]))
        return CtReader(**{**self.spec()["init_args"], "spacing_mm": spacing, "shape": shape})

    def collate(self, samples: Sequence[ImageSample]) -> ImageBatch:
        """Samples of this reader to ``pixels`` (B, C, S, H, W), ``valid`` (B, S) and ``position_mm`` (B, S); S is that of the longest.

        Raises:
            ValueError: no samples, or slices of different size.
        """
        if not samples:
            raise ValueError("no samples to collate")
        planes = {tuple(sample.pixels.shape[2:]) for sample in samples}
        if len(planes) > 1:
            raise ValueError(f"slices of {sorted(planes)} pixels cannot share a batch; give the reader shape=(None, H, W)")
        longest = max(sample.pixels.shape[1] for sample in samples)
        shape = (len(samples), len(self.windows_hu), longest, *next(iter(planes)))
        pixels, valid = torch.zeros(shape), torch.zeros(len(samples), longest, dtype=torch.bool)
        position = torch.zeros(len(samples), longest)
        for i, sample in enumerate(samples):
            count = sample.pixels.shape[1]
            pixels[i, :, :count], valid[i, :count] = sample.pixels, sample.valid
            assert sample.spacing_mm is not None
            position[i] = torch.arange(longest) * sample.spacing_mm[0]
        return ImageBatch(pixels, valid, position)


def turn_to_tower(affine: NDArray[np.float64]) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which of the file's axes S, H and W of the tower run along, and which of them backwards.

    Each axis goes to the patient axis it is closest to, as nibabel's ``io_orientation`` settles it.
    """
    from nibabel.orientations import io_orientation

    world = io_orientation(affine)  # (file axis) -> (world axis, sign)
    axes, flipped = [], []
    for wanted, sign in AXES.values():
        axis = int(np.flatnonzero(world[:, 0] == wanted)[0])
        axes.append(axis)
        flipped.append(bool(world[axis, 1] != sign))
    return (axes[0], axes[1], axes[2]), (flipped[0], flipped[1], flipped[2])


def _too_large(what: str, shape: Sequence[float]) -> UnreadableImageError:
    return UnreadableImageError(
        f"{what} would make {_listed(shape)} voxels of it, expected at most {MAX_SIDE} along an axis and {MAX_NUMBERS} numbers in all; "
        "give the reader a coarser spacing_mm, a shape or fewer windows"
    )


def _listed(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.3g}" for number in numbers)


def _plain_affine(spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """Of a grid that runs as the tower's."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for column, ((axis, sign), step) in enumerate(zip(AXES.values(), spacing_mm, strict=True)):
        affine[axis, column] = sign * step
    return affine


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(".nii.gz")
