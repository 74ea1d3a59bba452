"""Leak check: does what is measured share patients, studies, images or texts with what the model was trained and chosen on?

An image is two fingerprints of what the model sees of it, the first channel after the reader: SHA-256, which a copy in another lossless
file shares, and a perceptual hash of 256 bits (pHash: signs of the lowest 16 x 16 coefficients of a cosine transform against their
median; Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010; as ImageHash computes it), which JPEG, another
size or another window change by a few bits. Volumes are seen as their mean along the rows, a coronal view.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from medvl.data.manifest import Manifest, StudyImage
from medvl.types import ImageReader, ImageSample, UnreadableImageError

SIDE = 16
"""Of the square of coefficients that a perceptual hash has the signs of."""

SIMILAR_BITS = 30
"""Hashes that differ in this many of 256 bits or fewer are looked at again, by ``SAME_IMAGE``.

Of 130 real films as the reader shows them, copies as JPEG of quality 40, at half the size or at 224 px, brighter, or with another gamma or
contrast differ from their original in 26 bits at most, two films in 52 at least; two of 1,200 phantoms, which are plainer, in 22. A copy
with 2 % cropped away differs in 36 bits (median): three of four are not found.
"""

SAME_IMAGE = 0.985
"""Least correlation of two images of near hashes, as means of cells of a coarse grid, to be one image.

Copies as above (JPEG, 224 px, gamma, contrast) have 0.994 or more, two real films 0.913 at most, two phantoms of near hashes 0.966.
"""

KINDS = ("patients", "studies", "images", "similar-images")
"""What may not be shared, unless it is allowed by this name."""

_TILE = 4096  # hashes compared with all others at once


class Leak(NamedTuple):
    """A measured row that shares something with a row that the model was trained or chosen on; the first such row stands for all."""

    kind: str  # one of KINDS
    study_id: str
    row: int
    table: str  # which of the others, as the caller calls it
    other_study_id: str
    other_row: int
    bits: int | None  # of 256 that differ, for images; None otherwise
    correlation: float | None  # of similar images


@dataclass(frozen=True)
class Others:
    """Rows that the model was trained or chosen on, of one table."""

    name: str
    manifest_sha256: str
    rows: tuple[StudyImage, ...]

    @classmethod
    def of(cls, name: str, table: Manifest, measured_split: str | None = None, *, trained: bool = False) -> Others:
        """Training and validation rows of a table.

        Args:
            measured_split: which split of this very table is measured, "all" for all; None: another table is measured.
            trained: the model was trained on this very table, so that training rows that are measured are leaks, not left out.
        """
        seen = ("train",) if measured_split == "val" else ("train", "val")
        kept = [row for row in table.rows if row.split in seen and (trained or measured_split not in ("all", row.split))]
        return cls(name, table.sha256, tuple(kept))


@dataclass(frozen=True)
class LeakCheck:
    """What was compared and what was found."""

    leaks: tuple[Leak, ...]
    others: tuple[Others, ...]
    shared_texts: int  # measured studies whose report is, word for word, that of a study the model was trained or chosen on
    studies_with_text: int
    unread: int  # images of either side that could not be read, so that they were not compared
    training_table: bool  # the table that the model was trained on is among those compared
    images: bool = True  # images were compared too

    def counts(self) -> dict[str, int]:
        """Measured rows that share something, by kind."""
        found = Counter(leak.kind for leak in self.leaks)
        return {kind: found[kind] for kind in KINDS}

    def refused(self, allowed: Iterable[str]) -> dict[str, int]:
        """Kinds that were found and not allowed by name."""
        return {kind: count for kind, count in self.counts().items() if count and kind not in set(allowed)}

    def as_dict(self, allowed: Sequence[str] = ()) -> dict[str, Any]:
        """For JSON."""
        return {
            "against": [{"manifest_sha256": one.manifest_sha256, "rows": len(one.rows)} for one in self.others],
            "training_table_compared": self.training_table,
            "shared": self.counts(),
            "allowed": sorted(set(allowed)),
            "images_compared": self.images,
            "similar_images": {"hash_bits_at_most": SIMILAR_BITS, "correlation_at_least": SAME_IMAGE},
            "images_not_read": self.unread,
            "shared_texts": self.shared_texts,
            "studies_with_text": self.studies_with_text,
        }


def check_leaks(
    measured: Sequence[StudyImage],
    others: Sequence[Others],
    reader: ImageReader,
    *,
    trained_on: str | None = None,
    images: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> LeakCheck:
    """Compare the rows to be measured with all rows of other tables. Images are read once, those of near hashes again.

    Args:
        reader: of the model; ``trained_on`` the SHA-256 of the table that the model was trained on, if it is known.
        images: False compares patients, studies and texts alone, and reads no image.
        progress: called with the number of images done: those of :func:`images_to_read`.
    """
    modalities = {row.modality for row in measured}
    shown: dict[Path, tuple[bytes, NDArray[np.bool_]] | None] = {}

    def seen(rows: Iterable[StudyImage]) -> tuple[list[StudyImage], list[bytes], NDArray[np.bool_]]:
        kept, exact, bits = [], [], []
        for row in rows:
            if row.path not in shown:
                shown[row.path] = _fingerprint_of(reader, row)
                progress(1)
            if (found := shown[row.path]) is not None:
                kept.append(row)
                exact.append(found[0])
                bits.append(found[1])
        return kept, exact, np.array(bits, dtype=bool).reshape(-1, SIDE * SIDE)

    leaks: list[Leak] = []
    rows, exact, bits = seen(measured if others and images else ())
    for table in others:
        leaks += _shared("patients", measured, table, lambda row: row.patient_id)
        leaks += _shared("studies", measured, table, lambda row: row.study_id)
        known, known_exact, known_bits = seen(row for row in table.rows if images and row.modality in modalities)
        first = {digest: i for i, digest in reversed(list(enumerate(known_exact)))}
        nearest, distance = nearest_hash(bits, known_bits)
        for row, digest, near, differ in zip(rows, exact, nearest, distance, strict=True):
            if (at := first.get(digest)) is not None:
                leaks.append(_leak("images", row, table, known[at], 0))
            elif differ <= SIMILAR_BITS and (same := correlation(reader.read(row.path), reader.read(known[near].path))) >= SAME_IMAGE:
                leaks.append(_leak("similar-images", row, table, known[near], int(differ), round(same, 4)))
    texts = {_plain(row.text) for table in others for row in table.rows} - {""}
    own = {row.study_id: text for row in measured if (text := _plain(row.text))}
    return LeakCheck(
        leaks=tuple(leaks),
        others=tuple(others),
        shared_texts=sum(text in texts for text in own.values()),
        studies_with_text=len(own),
        unread=sum(one is None for one in shown.values()),
        training_table=trained_on is not None and trained_on in {one.manifest_sha256 for one in others},
        images=images,
    )


def images_to_read(measured: Sequence[StudyImage], others: Sequence[Others]) -> int:
    """How many images a check reads."""
    modalities = {row.modality for row in measured}
    return len({row.path for row in measured} | {row.path for table in others for row in table.rows if row.modality in modalities})


def fingerprint(sample: ImageSample) -> tuple[bytes, NDArray[np.bool_]]:
    """SHA-256 and the 256 bits of the perceptual hash of an image, from the first channel of what the model sees."""
    import imagehash

    first = sample.pixels[0].float().cpu().contiguous().numpy()
    digest = hashlib.sha256(repr(first.shape).encode() + first.tobytes()).digest()
    flat = first if first.ndim == 2 else first.mean(axis=1)  # (S, H, W) along H
    low, high = float(flat.min()), float(flat.max())
    grey = np.zeros(flat.shape) if high == low else (flat - low) / (high - low) * 255
    return digest, imagehash.phash(Image.fromarray(np.round(grey).astype(np.uint8)), hash_size=SIDE).hash.ravel()


def correlation(first: ImageSample, second: ImageSample) -> float:
    """Pearson's, of two images as means of 64 x 64 cells, of volumes 32 x 32 x 32; 0 where one of them is flat."""
    cells = torch.stack([_coarse(one.pixels[:1].float()) for one in (first, second)]).double()
    cells = cells - cells.mean(1, keepdim=True)
    lengths = cells.norm(dim=1)
    return float(cells[0] @ cells[1] / lengths.prod()) if bool((lengths > 0).all()) else 0.0


def _coarse(pixels: torch.Tensor) -> torch.Tensor:
    pooled = F.adaptive_avg_pool2d(pixels[None], 64) if pixels.ndim == 3 else F.adaptive_avg_pool3d(pixels[None], 32)
    return pooled.flatten()


def nearest_hash(bits: NDArray[np.bool_], others: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """For each of (N, K) hashes the first nearest of (M, K), and in how many bits it differs; K + 1 where there is none.

    With bits as +1 and -1, two hashes differ in (K - product) / 2.
    """
    width = bits.shape[1]
    nearest, distance = np.zeros(len(bits), dtype=np.intp), np.full(len(bits), width + 1, dtype=np.int64)
    signs = torch.from_numpy(bits).float() * 2 - 1
    for start in range(0, len(others), _TILE):
        tile = torch.from_numpy(others[start : start + _TILE]).float() * 2 - 1
        best, at = ((width - signs @ tile.T) / 2).min(1) if len(signs) else (signs.new_zeros(0), torch.zeros(0, dtype=torch.long))
        closer = best.numpy() < distance
        distance[closer], nearest[closer] = best.numpy()[closer].astype(np.int64), at.numpy()[closer] + start
    return nearest, distance


def _fingerprint_of(reader: ImageReader, row: StudyImage) -> tuple[bytes, NDArray[np.bool_]] | None:
    try:
        return fingerprint(reader.read(row.path))
    except UnreadableImageError:
        return None  # whoever measures rejects it by name; here it is counted


def _shared(kind: str, measured: Sequence[StudyImage], table: Others, key: Callable[[StudyImage], str]) -> list[Leak]:
    first: dict[str, StudyImage] = {}
    for row in table.rows:
        first.setdefault(key(row), row)
    return [_leak(kind, row, table, first[key(row)]) for row in measured if key(row) in first]


def _leak(kind: str, row: StudyImage, table: Others, other: StudyImage, bits: int | None = None, same: float | None = None) -> Leak:
    return Leak(kind, row.study_id, row.row, table.name, other.study_id, other.row, bits, same)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
