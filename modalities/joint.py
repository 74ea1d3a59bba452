"""Radiographs and CT in one model: a reader and a tower that hand each image to the one for its kind.

Shapes: B studies, C channels, H x W pixels, S slices. What is one image (H, W) is a radiograph, what is a volume (S, H, W) is CT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, ImageReader, ImageSample, UnreadableImageError
from modalities.ct.reader import CtReader
from modalities.dicom import modality_of
from modalities.xray.reader import XrayReader


class JointReader(ImageReader):
    """Reads radiographs with ``xray`` and CT with ``ct``; which a file is, its content says.

    CT is a folder, a zip, NIfTI, MHA or NRRD, or a DICOM file whose modality is CT; everything else goes to ``xray``.
    """

    suffixes: ClassVar[frozenset[str]] = XrayReader.suffixes | CtReader.suffixes

    def __init__(self, xray: ImageReader, ct: ImageReader) -> None:
        self.xray, self.ct = xray, ct

    def reader_of(self, path: Path) -> ImageReader:
        """The reader for a path.

        Raises:
            UnreadableImageError: no such file.
        """
        from modalities.ct.read import sniff
        from modalities.ct.series import is_zip

        path = Path(path)
        if path.is_dir() or is_zip(path) or sniff(path) != "dicom" or modality_of(path) == "CT":
            return self.ct
        return self.xray

    def sources(self, path: Path) -> tuple[Path, ...] | None:
        """As the reader of the path has it."""
        try:
            return self.reader_of(path).sources(path)
        except UnreadableImageError:
            return super().sources(path)

    def describe(self) -> dict[str, str]:
        """What either reader does."""
        both = {"radiographs": self.xray.describe(), "CT": self.ct.describe()}
        return {f"{kind}: {step}": words for kind, steps in both.items() for step, words in steps.items()}

    def find_images(self, folder: Path) -> list[Path]:
        """Radiographs, pictures and volume files under ``folder``, and each folder that holds DICOM slices of CT; sorted."""
        films = self.xray.find_images(folder)
        slices = {path for path in films if modality_of(path) == "CT"}
        series = {path.parent for path in slices}
        volumes = {path for path in self.ct.find_images(folder) if not path.is_dir()}
        return sorted({*films, *volumes, *series} - slices)

    def study_key(self, path: Path) -> str | None:
        """As the reader of the path has it."""
        try:
            return self.reader_of(path).study_key(path)
        except UnreadableImageError:
            return None

    def read(self, path: Path) -> ImageSample:
        """One file, folder or zip to a sample.

        Raises:
            UnreadableImageError: it cannot be read as what it is.
        """
        return self.reader_of(path).read(path)

    def read_array(self, array: Any) -> ImageSample:
        """An (H, W) array as a radiograph, an (S, H, W) array of HU as CT."""
        return (self.ct if np.ndim(array) == 3 else self.xray).read_array(array)

    def native(self, path: Path) -> Tensor:
        """(H, W) or (S, H, W) float32 in 0..1, as the reader of the path shows it."""
        return self.reader_of(path).native(path)

    def enlarged(self, factor: int, path: Path | None = None) -> ImageReader:
        """Of the reader for the path; without one, of both."""
        if path is not None:
            return self.reader_of(path).enlarged(factor)
        return JointReader(self.xray.enlarged(factor), self.ct.enlarged(factor))

    def collate(self, samples: Sequence[ImageSample]) -> ImageBatch:
        """Samples of one kind to a batch.

        Raises:
            ValueError: no samples, or radiographs and CT together.
        """
        if not samples:
            raise ValueError("no samples to collate")
        axes = {sample.pixels.ndim for sample in samples}
        if len(axes) > 1:
            raise ValueError("radiographs and CT cannot share a batch; encode each kind on its own")
        return (self.ct if axes == {4} else self.xray).collate(samples)


class JointEncoder(ImageEncoder):
    """A tower for radiographs and one for CT, in one space: each batch goes to the tower for its kind.

    Args:
        xray: takes (B, C, H, W).
        ct: takes (B, C, S, H, W); of the same width D.
    Raises:
        ValueError: towers of different width.
    """

    def __init__(self, xray: ImageEncoder, ct: ImageEncoder) -> None:
        super().__init__()
        if xray.embed_dim != ct.embed_dim:
            raise ValueError(f"the radiograph tower embeds in {xray.embed_dim} dimensions, the CT tower in {ct.embed_dim}")
        self.embed_dim = xray.embed_dim
        self.xray, self.ct = xray, ct
        self.pools_views = xray.pools_views or ct.pools_views

    def pools(self, modality: str) -> bool:
        """What the tower for that modality says."""
        return (self.ct if modality == "ct" else self.xray).pools(modality)

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        """``batch.pixels`` (B, C, H, W) or (B, C, S, H, W)."""
        several = batch.study is not None and len(batch.study.unique()) < len(batch.study)
        if batch.pixels.ndim == 5 and several and not self.ct.pools_views:
            raise ValueError("volumes are encoded one by one: a study of several cannot be pooled; give a row to each")
        features: ImageFeatures = (self.ct if batch.pixels.ndim == 5 else self.xray)(batch)
        return features
