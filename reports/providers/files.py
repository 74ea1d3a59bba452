"""Facts from a JSONL file: one report a line, as a language model was asked for them elsewhere.

    {"text_sha256": "...", "sentences": [{"text": "Small left effusion.", "facts": [{"finding": "pleural_effusion", "state": "present",
     "side": "left", "severity": "mild", "quote": "left effusion"}]}]}

The file is read once to check every line and to note where it is; a line is read again when its report is asked for, so that memory holds
some 200 bytes a report whatever the file's size.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from reports.facts.statements import FactSource
from reports.providers.base import Provider, Reading, read_record
from reports.providers.keys import text_key, text_sha256
from reports.providers.names import FindingNames
from reports.providers.records import LineRecord, RecordError, Rejection, ReportRecord, parse_line

log = logging.getLogger(__name__)
TEXT_COLUMNS = ("report", "findings", "impression")
"""The texts of a study in a table of reports."""

_LONGEST_LINE = 16 * 2**20  # bytes


@dataclass(frozen=True)
class _Place:
    """Where in a file a record is."""

    row: int
    offset: int
    length: int


class JsonlFacts(Provider):
    """Facts and minimal sentences of a JSONL file.

    A line says which text it is of by ``text_sha256`` (sha256 of the text's UTF-8 as it was given, or of the text without white space), by
    ``study_id``, or both. Lines that break the format are listed in ``rejections`` and passed over; so is a second line for a study.

    Args:
        path: the file, UTF-8.
        names: what its names of findings mean, see :class:`reports.providers.names.FindingNames`.
        lexicon: reads findings out of names that are not in ``names``.
        reports: a CSV with the column study_id and one or more of report, findings and impression, for lines that have only a study_id.
        fallback: see :class:`Provider`.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no line can be used; the message gives the first reason.
    """

    def __init__(
        self,
        path: Path,
        names: dict[str, str | None] | None = None,
        lexicon: FactSource | None = None,
        reports: Path | None = None,
        fallback: FactSource | None = None,
    ) -> None:
        super().__init__(fallback)
        self.path, self.names = Path(path), FindingNames(names, lexicon)
        studies = read_studies(Path(reports)) if reports is not None else {}
        places: dict[str, _Place] = {}
        rejections: list[Rejection] = []
        rows: dict[str, int] = {}
        contents: dict[int, bytes] = {}  # line -> hash of what it says, for equal reports of two studies are no fault
        with self.path.open("rb") as file:
            self._stamp = _stamp(file)
            for place, data in _lines(file):
                try:
                    line = _parse(data)
                    keys = _keys(line, studies, rows, place.row)
                except RecordError as error:
                    rejections += [Rejection(place.row, where, reason) for where, reason in error.faults]
                    continue
                contents[place.row] = hashlib.sha256(line.model_dump_json(include={"sentences"}).encode()).digest()
                others = {places[key].row for key in keys if key in places and contents[places[key].row] != contents[place.row]}
                if others:
                    rejections.append(Rejection(place.row, "", f"the text of line {min(others)} with other sentences; that one counts"))
                for key in keys:
                    places.setdefault(key, place)
        self._places, self.rejections = places, tuple(rejections)
        warn_of_rejections(self.path, self.rejections, usable=bool(places))

    def reading(self, text: str) -> Reading | None:
        """What the line for this text says, checked.

        Raises:
            ValueError: the file has changed since it was read.
        """
        place = self._places.get(text_sha256(text)) or self._places.get(text_key(text))
        return None if place is None else read_record(self._record(place), text, self.names, place.row)

    def records(self) -> Iterator[ReportRecord]:
        """The usable records in the order of the file."""
        for place in dict.fromkeys(self._places.values()):
            yield self._record(place)

    def _record(self, place: _Place) -> ReportRecord:
        try:
            with self.path.open("rb") as file:
                if _stamp(file) != self._stamp:
                    raise RecordError([("", "the file has another size or date")])
                file.seek(place.offset)
                return parse_line(file.read(place.length))
        except RecordError as error:
            raise ValueError(f"{self.path} has changed since it was read, at line {place.row}: {error}; make the source anew") from None


def read_studies(path: Path, columns: Sequence[str] = TEXT_COLUMNS) -> Mapping[str, tuple[str, ...]]:
    """Study id -> :func:`text_key` of each of its texts, and of findings and impression with white space between.

    Args:
        path: a CSV, UTF-8, with the column study_id.
        columns: the texts to take, of those that the table has.
    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8, or the columns are not there.
    """
    keys: dict[str, dict[str, None]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            present = [name for name in columns if name in (table.fieldnames or ())]
            if "study_id" not in (table.fieldnames or ()) or not present:
                raise ValueError(f"{path}: expected the column study_id and one of {', '.join(columns)}; rename its columns")
            for row in table:
                texts = {name: row[name] for name in present if row[name] and row[name].strip()}
                both = "".join(texts[name] for name in ("findings", "impression") if name in texts)
                keys.setdefault(row["study_id"] or "", {}).update(dict.fromkeys(text_key(text) for text in [*texts.values(), both] if text))
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path}: expected a CSV in UTF-8; save it as one") from None
    return {study: tuple(found) for study, found in keys.items()}


def write_jsonl(path: Path, records: Iterable[tuple[str, ReportRecord]]) -> int:
    """Write (text, record) as lines that :class:`JsonlFacts` reads, each with its text's sha256; gives the number of lines.

    What comes of a callable or an endpoint is thus kept as a file, and training needs neither.
    """
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text, record in records:
            line = {"text_sha256": text_sha256(text), **record.model_dump(mode="json", exclude_defaults=True, include={"sentences"})}
            file.write(json.dumps(line) + "\n")
            count += 1
    return count


def warn_of_rejections(path: Path, rejections: tuple[Rejection, ...], usable: bool) -> None:
    """Log how many records of a file were refused; the first place and reason stand for the rest.

    Raises:
        ValueError: nothing of the file is usable.
    """
    first = next((f"first at row {r.row}, {r.place or 'record'}: {r.reason}" for r in rejections), "it holds no record")
    if not usable:
        raise ValueError(f"{path}: no record can be used; {first}")
    if rows := len({r.row for r in rejections}):
        log.warning("%s: %d records refused, %s; all are in .rejections", path, rows, first)


def _stamp(file: BinaryIO) -> tuple[int, int]:
    """Size and time of the last change of a file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _lines(file: BinaryIO) -> Iterator[tuple[_Place, bytes | None]]:
    """Lines that are not blank, with their places; None for one that is too long."""
    file.seek(0)
    row, offset = 0, 0
    while line := file.readline(_LONGEST_LINE):
        row, length, short = row + 1, len(line), True
        while not line.endswith(b"\n") and (more := file.readline(_LONGEST_LINE)):
            line, length, short = more, length + len(more), False
        data = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if not short or data.strip():
            yield _Place(row, offset + len(line) - len(data), length - (len(line) - len(data))), data if short else None
        offset += length


def _parse(data: bytes | None) -> LineRecord:
    if data is None:
        raise RecordError([("", f"expected a line of at most {_LONGEST_LINE} bytes")])
    return parse_line(data)


def _keys(line: LineRecord, studies: Mapping[str, tuple[str, ...]], rows: dict[str, int], row: int) -> tuple[str, ...]:
    """The keys of the texts that a line is of; notes in ``rows`` the study that it is of.

    Raises:
        RecordError: a study seen before, or one whose texts are not known.
    """
    keys = [] if line.text_sha256 is None else [line.text_sha256]
    if line.study_id is not None:
        study = str(line.study_id)
        if study in rows:
            raise RecordError([("study_id", f"a second line for the study of line {rows[study]}")])
        keys += studies.get(study, ())
        rows[study] = row
    if not keys:
        raise RecordError([("study_id", "no text of this study is known: give reports, a CSV that has it, or text_sha256 in the line")])
    return tuple(keys)
