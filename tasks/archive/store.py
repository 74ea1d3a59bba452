"""Where an archive is kept: what every store can do, and what is common to them.

A store is the truth: studies, reports by section, sentences, facts, metadata, paths, and vectors of any number of models, written together
in one transaction or not at all. What search needs besides (:mod:`tasks.archive.derived`) is made from it and can be made again.

Shapes: D embedding width. Vectors are float32, little-endian where they are bytes.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medvl.types import Fact
from tasks.archive.records import ArchivedStudy, ModelKey, StudyVectors

FORMAT = 1
VectorKind = Literal["report", "sentence", "image"]
KINDS: tuple[VectorKind, ...] = ("report", "sentence", "image")
METADATA = ("study_id", "patient_id", "modality", "view", "split", "date", "sex", "age", "source")
"""Columns of the table ``studies`` that filters name."""


class ArchiveError(RuntimeError):
    """A store that cannot be opened, read or written to as asked; the message says why and what to do. What is in it is as it was."""


@dataclass(frozen=True)
class Kept:
    """What a store has of a study."""

    digest: bytes
    models: frozenset[int]
    """Models whose vectors it has."""


@dataclass(frozen=True)
class StudyRow:
    """A study as derived files need it."""

    id: int
    metadata: tuple[str | float | None, ...] = field(repr=False)  # in the order of METADATA
    text_digest: bytes | None = field(repr=False)


@dataclass(frozen=True)
class FoundStudy:
    """A study as a hit shows it."""

    study_id: str
    patient_id: str = field(repr=False)
    metadata: Mapping[str, str | float | None] = field(repr=False)
    sections: Mapping[str, str] = field(repr=False)
    sentences: tuple[tuple[int, str | None], ...] = field(repr=False)  # (text, its words; None in a store without text)
    findings: Mapping[str, int] = field(repr=False)
    labels: Mapping[str, int] = field(repr=False)
    images: tuple[tuple[str, str | None], ...] = field(repr=False)  # (path, view)


@dataclass(frozen=True)
class Removed:
    """What was taken out."""

    studies: tuple[str, ...]
    traces: tuple[str, ...] = field(repr=False)
    """Ids, paths and sentences that no other study has: what must not be found in any file afterwards."""


@dataclass(frozen=True)
class Counts:
    """How much a store holds."""

    studies: int
    patients: int
    reports: int
    sentences: int  # different ones
    images: int
    vectors: Mapping[int, Mapping[VectorKind, int]]  # by model


class ArchiveStore(abc.ABC):
    """Base of the stores. All methods raise :class:`ArchiveError` where the store cannot be read or written to."""

    name: str
    """What it is called in messages."""
    uid: str
    """Of this store, so that derived files of another are told."""
    derived: Path
    """The folder of what is derived of it."""
    with_text: bool
    """Whether words are kept; without, ids, metadata and vectors alone."""

    @abc.abstractmethod
    def generation(self) -> int:
        """One more after each change."""

    @abc.abstractmethod
    def models(self) -> dict[int, ModelKey]:
        """The models it has vectors of."""

    @abc.abstractmethod
    def model(self, key: ModelKey) -> int:
        """The number of a model, entered if it is new."""

    @abc.abstractmethod
    def kept(self, study_ids: Collection[str]) -> dict[str, Kept]:
        """What there is of these studies; a study that is not there has no key."""

    @abc.abstractmethod
    def write(self, batch: Sequence[tuple[ArchivedStudy, StudyVectors]], model: int) -> None:
        """Studies and their vectors in one transaction. A study that changed is replaced, and loses the vectors of other models."""

    @abc.abstractmethod
    def remove(self, *, study_ids: Collection[str] = (), patient_ids: Collection[str] = ()) -> Removed:
        """Take studies out, with every trace of them in the store."""

    @abc.abstractmethod
    def counts(self) -> Counts:
        """How much it holds."""

    @abc.abstractmethod
    def rows(self) -> Iterator[StudyRow]:
        """All studies by rising ``study_id`` (as bytes of UTF-8)."""

    @abc.abstractmethod
    def findings(self) -> Iterator[tuple[int, str, int | None, int | None]]:
        """(study, finding, what its report says, its label) of all studies."""

    @abc.abstractmethod
    def vectors(self, model: int, kind: VectorKind) -> Iterator[tuple[int, bytes]]:
        """(owner, vector) by rising owner: the study of a report, the text of a sentence, the image of an image."""

    @abc.abstractmethod
    def owners(self, kind: VectorKind) -> Iterator[tuple[int, int]]:
        """(study, owner): which texts and images are of which study, in their order in it."""

    @abc.abstractmethod
    def documents(self) -> Iterator[tuple[int, str]]:
        """(study, the words of its report that are ranked) of the studies that have a report."""

    @abc.abstractmethod
    def found(self, ids: Sequence[int]) -> list[FoundStudy]:
        """Studies by their numbers, in the order given."""

    @abc.abstractmethod
    def ids(self, numbers: Sequence[int]) -> list[str]:
        """The ids of studies, in the order given."""

    @abc.abstractmethod
    def number(self, study_id: str) -> int | None:
        """The number of a study; None if it is not there."""

    @abc.abstractmethod
    def patients_of(self, paths: Collection[str]) -> dict[str, frozenset[str]]:
        """The patients of the studies that have an image at a path; a path that no study has has no key."""

    @abc.abstractmethod
    def matching(self, expression: str) -> list[int]:
        """Studies whose report fits an expression in the language of the store's full-text search."""

    def files(self) -> tuple[Path, ...]:
        """The files of its own that hold it; none where a server keeps them."""
        return ()

    @abc.abstractmethod
    def facts(self, texts: Collection[int]) -> dict[int, tuple[Fact, ...]]:
        """What sentences state."""

    @abc.abstractmethod
    def verify(self) -> list[str]:
        """What is wrong with the store, in words; empty: nothing."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of it."""


def checked_vector(vector: NDArray[np.float32], width: int, what: str) -> bytes:
    """The bytes of a (D,) vector.

    Raises:
        ArchiveError: another width, or a number that is not finite.
    """
    if vector.shape != (width,):
        raise ArchiveError(f"{what}: a vector of shape {vector.shape}, expected ({width},), the width of the model")
    if not np.isfinite(vector).all():
        raise ArchiveError(f"{what}: a vector with NaN or infinity; the image or the weights of the model are at fault")
    return np.ascontiguousarray(vector, dtype="<f4").tobytes()
