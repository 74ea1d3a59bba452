"""What is written of a phrase that was looked for in an image, and of what looked for it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modalities.export import uid
from modalities.structured_report import Concept, Device, private

Box = tuple[tuple[float, ...], tuple[float, ...]]
"""Lowest and highest corner in native index coordinates, as edges: voxel 3 alone is 2.5 to 3.5."""
HASH_SHOWN = 16
"""Letters of a weights hash that stand in an object."""
SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}")


@dataclass(frozen=True, eq=False)
class MapFinding:
    """What one phrase is found to be in one image; n axes, (H, W) of a film or (S, H, W) of a volume, native index order."""

    phrase: str
    slug: str  # how its files are called
    scores: NDArray[np.float32]  # native shape; NaN where the tower did not look
    mask: NDArray[np.bool_]  # native shape; what lies above the threshold, all False where nothing does
    boxes: tuple[Box, ...] = ()  # around parts of the mask
    peak: tuple[int, ...] | None = None  # index of the highest score
    score: float | None = None  # of the whole image
    threshold: float | None = None  # that ``mask`` and ``found`` go by
    probability: float | None = None  # only where it was calibrated
    found: bool | None = None  # None: not decided
    concept: Concept | None = None  # the finding's term, where there is one

    @property
    def term(self) -> Concept:
        """The term, else one of our own that hangs on the words."""
        if self.concept is not None:
            return self.concept
        words = " ".join(self.phrase.lower().split())
        return private(f"phrase_{hashlib.blake2b(words.encode(), digest_size=4).hexdigest()}", self.phrase)


@dataclass(frozen=True)
class Algorithm:
    """What looked for the phrases."""

    model: str  # name
    weights_sha256: str
    version: str  # of medvl

    @property
    def device(self) -> Device:
        """As the observer of a report."""
        return Device("medvl", self.version, self.model)

    @property
    def weights(self) -> str:
        """The beginning of the hash."""
        return self.weights_sha256[:HASH_SHOWN]


def check_findings(findings: Sequence[MapFinding], algorithm: Algorithm) -> tuple[int, ...]:
    """The shape that all findings share.

    Raises:
        ValueError: none, shapes that differ, names that repeat or are no file names, values that are no numbers, or parts that disagree.
    """
    if not findings:
        raise ValueError("a map as DICOM needs at least one phrase, got none")
    if not (algorithm.model.strip() and algorithm.version.strip() and algorithm.weights_sha256.strip()):
        raise ValueError("objects must say what made them; model, version or weights_sha256 is empty")
    shape = findings[0].scores.shape
    slugs = [finding.slug for finding in findings]
    if len(set(slugs)) < len(slugs) or not all(map(SLUG.fullmatch, slugs)):
        raise ValueError(f"slugs are {', '.join(map(repr, slugs))}; expected file names that differ")
    for finding in findings:
        problem = _problem(finding, shape)
        if problem:
            raise ValueError(f"{finding.slug}: {problem}")
    return shape


def _problem(finding: MapFinding, shape: tuple[int, ...]) -> str | None:
    """What is wrong with one, or None."""
    n = len(shape)
    if not finding.phrase.strip():
        return "its phrase is empty"
    if finding.scores.shape != shape or finding.mask.shape != shape:
        return f"scores {finding.scores.shape} and mask {finding.mask.shape}, expected both {shape}"
    if finding.scores.dtype != np.float32 or finding.mask.dtype != np.bool_:
        return f"scores are {finding.scores.dtype} and the mask {finding.mask.dtype}, expected float32 and bool"
    if np.isinf(finding.scores).any():
        return "scores are infinite somewhere; expected numbers, or NaN where nothing is known"
    if finding.found is False and (finding.mask.any() or finding.boxes):
        return "it is not found, but has a mask or boxes"
    numbers = [number for number in (finding.score, finding.threshold, finding.probability) if number is not None]
    if not np.isfinite(numbers).all():
        return "score, threshold or probability is no finite number; None stands for what is not known"
    if finding.probability is not None and not 0 <= finding.probability <= 1:
        return f"probability is {finding.probability}, expected 0 to 1"
    for low, high in finding.boxes:
        ends = zip(low, high, shape, strict=False)
        if len(low) != n or len(high) != n or not all(-0.5 <= a < b <= size - 0.5 for a, b, size in ends):
            return f"box {low} to {high} is no box of {n} axes inside {shape}; edges run from -0.5 to the size less 0.5"
    if finding.peak is not None and (
        len(finding.peak) != n or not all(0 <= i < size for i, size in zip(finding.peak, shape, strict=False))
    ):
        return f"peak {finding.peak} is no index into {shape}"
    return None


def identity(images: Sequence[str], findings: Sequence[MapFinding], algorithm: Algorithm, *more: str) -> str:
    """One name for all that is written, so that equal input gives equal UIDs and other input others.

    Args:
        images: instances and frames.
        findings: the findings.
        algorithm: what found them.
        more: whatever else the objects hold.
    """
    digest = hashlib.blake2b(digest_size=32)
    for finding in findings:
        digest.update(np.ascontiguousarray(finding.scores, dtype="<f4").data)
        digest.update(np.packbits(finding.mask).data)
        numbers = (finding.boxes, finding.peak, finding.score, finding.threshold, finding.probability, finding.found, finding.term)
        digest.update(repr((finding.phrase, finding.slug, finding.scores.shape, _plain(numbers))).encode())
    digest.update(repr((tuple(images), algorithm, more)).encode())
    return digest.hexdigest()


def _plain(value: object) -> object:
    """Numbers of numpy as those of Python, so that they print alike."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def tracking_uid(key: str, finding: MapFinding) -> str:
    """By which the segment and the report mean the same."""
    return uid(key, finding.slug, "tracking")
