"""What an archive keeps of a study, whatever it came from, and what it keeps with it: vectors of one model.

Shapes: D embedding width. Findings are the names of ``reports/lexicon``; their values 1 present, 0 absent, -1 uncertain.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medvl.types import Fact

SECTIONS = (
    *("exam", "indication", "technique", "comparison", "findings", "impression"),
    *("recommendation", "addendum", "notification", "other"),
)
"""The sections of :class:`reports.sections.Sections` that are kept, in their order."""
SEARCHED = ("findings", "impression", "addendum", "other")
"""Sections whose words are ranked: what a report says of the image. An indication asks, it does not say."""


@dataclass(frozen=True)
class ArchivedImage:
    """An image file, or the folder of a series."""

    path: str  # absolute
    view: str | None = None
    stamp: str = ""
    """Size and time of change, so that a file that is another one by now is told."""


@dataclass(frozen=True)
class ArchivedText:
    """A sentence, and what it states."""

    text: str = field(repr=False)
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class ArchivedStudy:
    """One study. Its repr shows its id alone."""

    study_id: str
    patient_id: str = field(repr=False)
    modality: str = field(repr=False)
    source: str = field(default="", repr=False)  # the table, folder or file it came from
    view: str | None = field(default=None, repr=False)  # of its first image
    split: str | None = field(default=None, repr=False)
    date: str | None = field(default=None, repr=False)  # YYYY-MM-DD
    sex: str | None = field(default=None, repr=False)
    age: float | None = field(default=None, repr=False)  # years
    sections: Mapping[str, str] = field(default_factory=dict, repr=False)
    sentences: tuple[ArchivedText, ...] = field(default=(), repr=False)
    """What is embedded, in the order of the report."""
    findings: Mapping[str, int] = field(default_factory=dict, repr=False)
    """What the report says of each finding, kinds counted for what they are kinds of."""
    labels: Mapping[str, int] = field(default_factory=dict, repr=False)
    images: tuple[ArchivedImage, ...] = field(default=(), repr=False)

    def digest(self) -> bytes:
        """SHA-256 of all of it: the same study again has the same, a changed one another."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(content.encode()).digest()

    def text_digest(self) -> bytes | None:
        """SHA-256 of the words of the report, case and white space aside: equal for equal reports; None without one."""
        words = " ".join(" ".join(self.sections.get(name, "") for name in SEARCHED).casefold().split())
        return hashlib.sha256(words.encode()).digest() if words else None


@dataclass(frozen=True)
class ModelKey:
    """What made vectors, so that no other model's are compared with them."""

    weights_sha256: str
    preprocessing_sha256: str
    """Of the reader of images and of the source of texts."""
    width: int


@dataclass(frozen=True)
class StudyVectors:
    """What one model makes of a study. Rows are of unit length but for ``report``."""

    report: NDArray[np.float32] | None = field(default=None, repr=False)
    """(D,) the mean of the unit vectors of its sentences; None without a report."""
    sentences: NDArray[np.float32] | None = field(default=None, repr=False)  # (sentences, D)
    images: tuple[NDArray[np.float32] | None, ...] | None = field(default=None, repr=False)
    """(D,) of each image; None for one that could not be read."""
