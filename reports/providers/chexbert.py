"""Labels of CheXbert, or of any labeller that writes a CSV of 1 (present), 0 (absent), -1 (uncertain) and blank (not mentioned).

Such labels are of a text as a whole. They come as one sentence that is the whole text, whose statements span all of it: which words a
label came from is not known.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from medvl.types import Fact, State
from reports.facts.label_sets import load_label_set
from reports.facts.statements import FactSource, Statement
from reports.providers.base import Provider, Reading
from reports.providers.files import read_studies, warn_of_rejections
from reports.providers.keys import text_key
from reports.providers.names import LabelMeaning, label_meanings
from reports.providers.records import Rejection

_STATES: dict[str, State | None] = {
    "": None,
    "1": "present",
    "1.0": "present",
    "0": "absent",
    "0.0": "absent",
    "-1": "uncertain",
    "-1.0": "uncertain",
}


class CheXbertFacts(Provider):
    """Labels of a CSV file.

    Args:
        path: the file, UTF-8, with one row a report.
        label_set: the set that the label columns are of, spelled as it is published (:mod:`reports.facts.label_sets`); what a label says is
            told by :func:`reports.providers.names.label_meanings`. None if ``names`` has them all.
        names: label column -> finding id, instead of or beside those of the set ({"Edema": "edema"}: 1 then says that there is edema, and
            not only one of what the label stands for); None as an id leaves the column out.
        text_column: the text that was labelled, as the labeller writes it out.
        study_column: the study, where the file has no text; then ``reports`` says what its texts are.
        reports: a CSV with the column study_id and one or more of report, findings and impression, see ``labelled``.
        labelled: which of the columns of ``reports`` the labels are of; of findings and impression together, not of either alone. A text
            that has several rows with different labels is not known.
        fallback: see :class:`Provider`.
    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown label set, columns that are missing, or no row that can be used.
    """

    def __init__(
        self,
        path: Path,
        label_set: str | None = "chexpert_14",
        names: dict[str, str | None] | None = None,
        text_column: str = "Report Impression",
        study_column: str = "study_id",
        reports: Path | None = None,
        labelled: tuple[str, ...] = ("impression",),
        fallback: FactSource | None = None,
    ) -> None:
        super().__init__(fallback)
        self.path = Path(path)
        self.labels = _labels(label_set, names or {})
        studies = read_studies(Path(reports), labelled) if reports is not None else None
        found: dict[str, tuple[int, tuple[State | None, ...]]] = {}
        rejections: list[Rejection] = []
        disputed: set[str] = set()
        with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            table = csv.DictReader(file)
            by_text = _check_columns(self.path, table.fieldnames or (), self.labels, text_column, study_column, studies is not None)
            for row, cells in _rows(table, rejections):
                states, faults = _states(cells, self.labels, row)
                if by_text:
                    keys: tuple[str, ...] = (text_key(cells[text_column] or ""),)
                else:
                    keys = (studies or {}).get(cells[study_column] or "", ())[-1:]  # one column's text, or all of them together
                    faults += [] if keys else [Rejection(row, study_column, "no text of this study is known")]
                rejections += faults
                if not faults:
                    for key in keys:
                        if found.setdefault(key, (row, states))[1] != states:
                            disputed.add(key)
                            rejections.append(Rejection(row, text_column if by_text else study_column, "an equal text has other labels"))
        for key in disputed:
            del found[key]
        self._found, self.rejections = found, tuple(rejections)
        warn_of_rejections(self.path, self.rejections, usable=bool(found))

    def reading(self, text: str) -> Reading | None:
        """The labels of this text."""
        known = self._found.get(text_key(text))
        if known is None:
            return None
        facts = [fact for label, state in zip(self.labels.values(), known[1], strict=True) for fact in _facts(label, state)]
        return Reading(tuple(Statement(fact, 0, len(text)) for fact in dict.fromkeys(facts)), whole=True)


def _facts(label: LabelMeaning, state: State | None) -> list[Fact]:
    if state == "absent":
        return [Fact(finding, "absent") for finding in label.absent]
    return [Fact(label.present, state)] if state is not None and label.present is not None else []


def _labels(label_set: str | None, names: Mapping[str, str | None]) -> dict[str, LabelMeaning]:
    """Label column -> what it says, of the columns to read."""
    given = {column: LabelMeaning(finding, (finding,)) for column, finding in names.items() if finding is not None}
    of_set = label_meanings(load_label_set(label_set)) if label_set is not None else {}
    labels = {**{column: meaning for column, meaning in of_set.items() if column not in names}, **given}
    if not labels:
        raise ValueError("labels: none to read; give label_set, or names with a finding for at least one column")
    return labels


def _check_columns(path: Path, columns: Sequence[str], labels: Iterable[str], text_column: str, study_column: str, studies: bool) -> bool:
    """Whether rows are told by their text, and not by their study."""
    if missing := [column for column in labels if column not in columns]:
        raise ValueError(f"{path}: expected the label columns {missing}; give names with the labels spelled as they are in the file")
    if text_column in columns:
        return True
    if study_column in columns and studies:
        return False
    raise ValueError(f"{path}: expected the column {text_column!r}, or {study_column!r} and reports; give text_column or reports")


def _rows(table: csv.DictReader[str], rejections: list[Rejection]) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    """Rows from 1, without those that are no CSV."""
    row = 0
    while True:
        row += 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error:
            rejections.append(Rejection(row, "", "not CSV: a NUL byte or a cell over 128 KiB"))
            continue
        if None in cells or None in cells.values():
            rejections.append(Rejection(row, "", "more or fewer cells than columns"))
            continue
        yield row, cells


def _states(cells: Mapping[str, str | None], columns: Iterable[str], row: int) -> tuple[tuple[State | None, ...], list[Rejection]]:
    values = {column: (cells[column] or "").strip() for column in columns}
    faults = [Rejection(row, column, "expected 1, 0, -1 or nothing") for column, value in values.items() if value not in _STATES]
    return tuple(_STATES.get(value) for value in values.values()), faults
