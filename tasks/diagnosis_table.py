"""Scores of many studies as a table on disk that grows a study at a time: a run that was killed goes on, and ends with what one run writes.

A line a study: id, ok, error, a score for each label, whether these are calibrated, why it is not what the model was made for (empty where
nothing says so), and the hash of the protocol that made them.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from medvl.types import RESEARCH_USE

SUFFIXES = (".csv", ".jsonl")
LAST = ("calibrated", "unfamiliar", "protocol", "paths", "notice")


class DiagnosisTable:
    """The table, for as long as it is written.

    Args:
        path: ``.csv`` or ``.jsonl``.
        labels: columns of scores, in their order.
        protocol: hash of what makes the scores.
        calibrated: whether they are probabilities.
        anew: begin anew where there is one already; else it goes on, after the last whole line.
    Raises:
        ValueError: another suffix, or a table that is there and is of other labels or another protocol.
    """

    def __init__(self, path: Path, labels: Sequence[str], protocol: str, calibrated: bool = False, anew: bool = False) -> None:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
        self.path, self.labels, self.protocol, self.calibrated = path, tuple(labels), protocol, calibrated
        self.header = ("id", "ok", "error", *self.labels, *LAST)
        self.done: set[str] = set()
        self.unfamiliar = 0  # lines that say so
        self.rejected: list[tuple[str, str]] = []  # path and error of what an earlier run could not read
        if anew:
            path.unlink(missing_ok=True)
        content = _whole_lines(path)
        if content:
            self._take_up(content)
        self._file = path.open("a", encoding="utf-8", newline="")
        if not content and path.suffix == ".csv":
            self._write(_csv_line(self.header))

    def __enter__(self) -> DiagnosisTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(
        self, study: str, ok: bool, error: str | None, scores: Mapping[str, float], paths: Sequence[str], unfamiliar: str | None = None
    ) -> None:
        """A line, on the disk when this returns. ``scores`` by label; none of a study that is not ok."""
        if study in self.done:
            return
        values = [scores.get(label) for label in self.labels]
        rest: list[Any] = [self.calibrated, unfamiliar, self.protocol, list(paths), RESEARCH_USE]
        if self.path.suffix == ".jsonl":
            line = dict(zip(self.header, [study, ok, error, *values, *rest], strict=True))
            self._write(json.dumps(line, allow_nan=False) + "\n")
        else:
            cells = [study, int(ok), error or "", *("" if value is None else repr(value) for value in values)]
            self._write(_csv_line([*cells, int(self.calibrated), unfamiliar or "", self.protocol, json.dumps(list(paths)), RESEARCH_USE]))
        self.done.add(study)
        self.unfamiliar += bool(unfamiliar)

    def _write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def _take_up(self, content: str) -> None:
        if self.path.suffix == ".jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            headers = {tuple(line) for line in lines}
        else:
            table = csv.DictReader(io.StringIO(content))
            lines, headers = list(table), {tuple(table.fieldnames or ())}
        if headers != {self.header} or {line["protocol"] for line in lines} - {self.protocol}:
            raise ValueError(
                f"{self.path} was written with other labels, another model, preset or prompts; name another file, or give --anew"
            )
        self.done = {line["id"] for line in lines}
        self.unfamiliar = sum(bool(line["unfamiliar"]) for line in lines)
        first = [line["paths"] if isinstance(line["paths"], list) else json.loads(line["paths"]) for line in lines]
        self.rejected = [(paths[0], line["error"]) for paths, line in zip(first, lines, strict=True) if line["error"]]


def _whole_lines(path: Path) -> str:
    """What is in the file, without a line that was cut short, which goes from the file too."""
    if not path.is_file():
        return ""
    content = path.read_bytes()
    if path.suffix == ".csv":  # a field may hold a line break
        kept = content
        while kept and not _is_whole(kept):
            kept = kept[: kept.rstrip(b"\n").rfind(b"\n") + 1]
    else:
        kept = content[: content.rfind(b"\n") + 1]
    if len(kept) < len(content):
        os.truncate(path, len(kept))
    return kept.decode("utf-8")


def _is_whole(content: bytes) -> bool:
    """Whether CSV ends with a line, and that not inside of quotes."""
    return content.endswith(b"\n") and content.count(b'"') % 2 == 0


def _csv_line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
