"""What an annotation file says of an image: phrases, each with its regions, and the rows that say nothing that can be used.

Row numbers are those a spreadsheet shows, the header being row 1; in JSON an entry's number, counting from 1. Reasons hold row numbers,
field names and coordinates, never a phrase, a patient or the content of another cell.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import overload

from medvl.geometry.regions import Region

SHOWN = 20  # rejected rows spelled out in a message; the rest are counted


class AnnotationError(ValueError):
    """A file that cannot be used at all."""


class BadRowError(ValueError):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Annotation:
    """One phrase of one image as one reader drew it. Its repr hides text and patient.

    Without regions there is nothing to point at: ``negative`` says that the source states so (the finding is absent, or the sentence is
    one of normal anatomy), otherwise the phrase is true of the image but nobody drew it, or the drawing is not published.
    """

    image: str  # the source's key: a DICOM id, a file name without its folder, or a path
    phrase: str = field(repr=False)
    study: str | None = None
    patient: str | None = field(default=None, repr=False)
    finding: str | None = None  # id of the prompt registry where it knows the label
    category: str | None = None  # the label, or code, as the source has it
    regions: tuple[Region, ...] = ()
    size: tuple[int, ...] | None = None  # of the image that the regions are drawn on; (1, 1): fractions of it; None: the image at hand
    split: str | None = None  # train, val or test, or as the source has it
    reader: str | None = None
    negative: bool = False


@dataclass(frozen=True)
class Rejected:
    """A row or entry that was left out, and why."""

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


@dataclass(frozen=True)
class AnnotationSet(Sequence[Annotation]):
    """The good annotations of a file, in its order, and what was left out. A sequence of its annotations."""

    annotations: tuple[Annotation, ...] = field(repr=False)
    rejected: tuple[Rejected, ...] = field(repr=False)
    format: str
    sha256: str  # of the file

    def __len__(self) -> int:
        return len(self.annotations)

    def __iter__(self) -> Iterator[Annotation]:
        return iter(self.annotations)

    @overload
    def __getitem__(self, index: int) -> Annotation: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Annotation, ...]: ...
    def __getitem__(self, index: int | slice) -> Annotation | tuple[Annotation, ...]:
        return self.annotations[index]

    @property
    def images(self) -> tuple[str, ...]:
        """Keys of the images, each once."""
        return tuple(dict.fromkeys(one.image for one in self.annotations))

    def select(self, keep: Callable[[Annotation], bool]) -> AnnotationSet:
        """The set with only some of its annotations."""
        return replace(self, annotations=tuple(one for one in self.annotations if keep(one)))

    def rejection_report(self) -> str:
        """How many rows were left out, and why, in lines fit for a log; "" if none was."""
        if not self.rejected:
            return ""
        lines = [f"{self.format}: {len(self.rejected)} rows left out, {len(self.annotations)} annotations kept"]
        lines += [f"  {bad}" for bad in self.rejected[:SHOWN]]
        return "\n".join(lines + ([f"  and {len(self.rejected) - SHOWN} more"] if len(self.rejected) > SHOWN else []))

    def write_rejected(self, path: str | Path) -> None:
        """Write what was left out as CSV: row, reason."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("row", "reason"))
            writer.writerows((bad.row, bad.reason) for bad in self.rejected)


Key = tuple[str, str, str | None, str | None]


class Gathering:
    """Annotations as they are read: rows of one image, phrase, category and reader become one annotation with all their regions.

    A bad row takes the other rows of its annotation with it: a part of a region as the whole truth would count hits as misses.
    """

    def __init__(self) -> None:
        self._rows: dict[Key, list[tuple[int, Annotation]]] = {}
        self._spoilt: dict[Key, int] = {}
        self._rejected: list[Rejected] = []

    @contextmanager
    def row(self, number: int) -> Iterator[None]:
        """What is read of a row; :class:`BadRowError` rejects it and the reading goes on."""
        try:
            yield
        except BadRowError as error:
            self._rejected.append(Rejected(number, str(error)))

    def add(self, number: int, annotation: Annotation, draw: Callable[[], Sequence[Region]] | None = None) -> None:
        """One row's annotation; ``draw`` makes its regions, which are checked against the annotation's size."""
        if not annotation.image or not annotation.phrase.strip():
            raise BadRowError("names no image or holds no phrase")
        key = annotation.image, annotation.phrase, annotation.category, annotation.reader
        try:
            regions = tuple(draw()) if draw is not None else ()
            for region in regions:
                if annotation.size is not None:
                    region.check(annotation.size)
        except ValueError as error:  # of geometry, which knows numbers alone
            self._spoilt.setdefault(key, number)
            self._rejected.append(Rejected(number, str(error)))
            return
        self._rows.setdefault(key, []).append((number, replace(annotation, regions=regions)))

    def close(self, kind: str, sha256: str) -> AnnotationSet:
        """All of it, in the order of each annotation's first row."""
        kept: list[Annotation] = []
        for key, rows in self._rows.items():
            first = rows[0][1]
            reason = None
            if key in self._spoilt:
                reason = f"row {self._spoilt[key]} of the same phrase and image is bad, so its region is not whole"
            elif len({one.size for _, one in rows}) > 1:
                reason = "rows of the same image give it different sizes"
            elif len({one.negative for _, one in rows}) > 1:
                reason = "rows of the same phrase and image say both that it is there and that it is not"
            if reason is not None:
                self._rejected += [Rejected(number, reason) for number, _ in rows]
                continue
            kept.append(replace(first, regions=tuple(region for _, one in rows for region in one.regions)))
        rejected = tuple(sorted(self._rejected, key=lambda bad: bad.row))
        return AnnotationSet(tuple(kept), rejected, kind, sha256)


def finding_of(label: str, *label_sets: str) -> str | None:
    """The finding that a published label means in the first label set that knows it; None if none does. Case and underscores are one."""
    plain = _plain(label)
    return next((known[plain] for known in map(_labels, label_sets) if plain in known), None)


def split_of(name: str | None) -> str | None:
    """A split in the project's words: train, val, test; another word stays as it is."""
    plain = (name or "").strip().lower()
    if plain in ("valid", "validate", "validation", "dev"):
        return "val"
    return {"training": "train", "testing": "test"}.get(plain, plain) or None


def split_named(path: Path) -> str | None:
    """The split that a file is named after, as in train.json or annotations_test.csv; None if it is after none."""
    words = (split_of(word) for word in re.split(r"[^a-z]+", path.name.lower()))
    return next((word for word in words if word in ("train", "val", "test")), None)


@cache
def _labels(label_set: str) -> dict[str, str]:
    from reports.prompts import load_prompts

    return {_plain(label): finding for label, finding in load_prompts(label_set).label_set(label_set).items()}


def _plain(label: str) -> str:
    return " ".join(label.replace("_", " ").casefold().split())
