"""Tables of reports, read row by row: CSV, TSV, JSONL (each may be gzipped), Parquet, text files, Open-i, study manifests.

Whatever the size of a table, one row of it is in memory at a time (of Parquet a batch). A row that cannot be read is handed on as
:class:`RejectedRow`, and reading goes on. Row numbers are those a spreadsheet shows: the header is row 1. Messages hold row numbers, column
names and paths, never the content of a cell.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast, get_args

from medvl.files import replacing
from reports.sections import SectionName, split_sections

if TYPE_CHECKING:
    from typing import TypeAlias

MAX_CELL = 2**24
"""Characters of a cell; a longer one is taken for a quote that was never closed."""
BATCH = 256
"""Rows of Parquet in memory at a time."""

_TABLES = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")
_ARCHIVES = (".tgz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz")
_FORMATS = "a .csv, .tsv or .jsonl table (.gz too), a .parquet table, a .txt file or a folder of them, Open-i's .tgz or .xml"
_MANIFEST = {"study_id", "patient_id", "modality", "path"}
USUAL = (("findings", "impression"), ("report",), ("report_text",), ("text",))
"""Groups of columns that tables have their reports in."""
_WHOLE = {"report", "text", "note", "body"}
_SHORT: tuple[SectionName, ...] = ("exam", "indication", "technique", "comparison")
_SURROGATE = re.compile("[\ud800-\udfff]")


class ReportTableError(ValueError):
    """A source that cannot be read as a whole: of an unknown format, without the column, broken off."""


@dataclass(frozen=True)
class ReportRow:
    """One row: its id and the text of each column asked for, "" where there is none."""

    place: str  # where it stands in the source: "row 7", "line 7", a path
    id: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class RejectedRow:
    """A row that could not be read, and why."""

    place: str
    reason: str


Row: TypeAlias = "ReportRow | RejectedRow"


@dataclass(frozen=True)
class ReportTable:
    """An open source. ``rows`` can be gone through once.

    ``size`` is in units of its own (bytes, rows, files), of which ``position()`` says how many are behind; None: not known.
    """

    id_column: str
    text_columns: tuple[str, ...]
    rows: Iterator[Row]
    position: Callable[[], int]
    size: int | None
    is_manifest: bool = False


@contextmanager
def open_reports(
    source: Path,
    text_columns: Sequence[str] = (),
    id_column: str | None = None,
    *,
    usual: Sequence[Sequence[str]] = USUAL,
    every_column: bool = False,
) -> Iterator[ReportTable]:
    """Open a source of reports and close it afterwards.

    Args:
        source: a file or folder.
        text_columns: what to read; empty: as ``usual`` says.
        id_column: of a table; None: its first column.
        usual: columns to take if none is named: the first of these groups that the table has any of.
        every_column: read every column instead, the id's too; of JSONL, what the first line does not name comes last, as "others".
    Raises:
        ReportTableError: no such source, an unknown format, or a column that is not there; also while reading, where the source breaks off.
    """
    if not source.exists():
        raise ReportTableError(f"{source}: no such file or folder; expected {_FORMATS}")
    wanted = _Wanted(source, tuple(text_columns), id_column, usual, every_column)
    with ExitStack() as stack:
        yield _open(source, wanted, stack)


def join_texts(columns: Sequence[str], texts: Sequence[str]) -> str:
    """One report of the texts of several columns: each under its section's heading on a line of its own, parted by blank lines.

    A column is a section's if its name is a heading's ("findings", "Impressions_EN"); others come without a heading. One column alone is
    left as it is, so that offsets count in its cell.
    """
    if len(columns) == 1:
        return texts[0]
    parts = []
    for column, text in zip(columns, texts, strict=True):
        if not text.strip():
            continue
        name = section_of(column)
        if name in _SHORT:  # these end at a blank line
            text = re.sub(r"\n\s*\n", "\n", text.strip())
        parts.append(text if name is None else f"{name.upper()}:\n{text}")
    return "\n\n".join(parts)


@cache
def section_of(column: str) -> SectionName | None:
    """The section that a column of this name holds; None if the name is no heading, or that of a whole report."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", column)
    if len(words) > 1 and len(words[-1]) == 2:  # a language
        words.pop()
    if not words or words[0].casefold() in _WHOLE:
        return None
    sections = split_sections(f"{' '.join(words).title()}:\nx")
    held = (name for name in get_args(SectionName) if name != "other" and getattr(sections, name, "") == "x")
    return cast("SectionName | None", next(held, None))


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Write UTF-8 text under a temporary name beside ``path``, gzipped if that ends in .gz, and rename it if nothing was raised.

    Whoever looks sees the old file or the whole new one; a process that is killed leaves a hidden file of another name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as raw, ExitStack() as stack:
        packed = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0)) if path.suffix == ".gz" else raw
        text = io.TextIOWrapper(cast(IO[bytes], packed), encoding="utf-8", newline="")
        yield text
        text.flush()
        text.detach()


@dataclass(frozen=True)
class _Wanted:
    """What is to be read of a source, before its columns are known."""

    source: Path
    text_columns: tuple[str, ...]
    id_column: str | None
    usual: Sequence[Sequence[str]]
    every_column: bool

    def columns(self, header: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """Name of the id column and names of the text columns."""
        if not header:
            raise ReportTableError(f"{self.source}: no columns; expected a header and a row per report")
        if self.every_column:
            return header[0], tuple(header)
        id_column = header[0] if self.id_column is None else self._known(self.id_column, header)
        if self.text_columns:
            return id_column, tuple(self._known(name, header) for name in self.text_columns)
        for names in self.usual:
            if found := tuple(column for name in names for column in header if column.casefold() == name.casefold()):
                return id_column, found
        names = ", ".join(name for group in self.usual for name in group)
        raise ReportTableError(f"{self.source}: none of its {len(header)} columns is named {names}; say which with --text-column")

    def _known(self, name: str, header: Sequence[str]) -> str:
        """The name, if exactly one column has it. Of others only one like it is told: a row 1 that is no header may hold a report."""
        if (count := list(header).count(name)) == 1:
            return name
        if count:
            raise ReportTableError(f"{self.source}: column {name!r} is there {count} times; give each a name of its own")
        folded = {column.casefold(): column for column in header}
        close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.75)
        hint = f"did you mean {folded[close[0]]!r}?" if close else "is row 1 the header?"
        raise ReportTableError(f"{self.source}: no column {name!r} among its {len(header)}; {hint}")


def _open(source: Path, wanted: _Wanted, stack: ExitStack) -> ReportTable:
    suffixes = [suffix.lower() for suffix in source.suffixes]
    gzipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[-2:-1] if gzipped else suffixes[-1:]) or [""]
    name = source.name.lower()
    if source.is_dir():
        folder = [path for path in source.rglob("*.txt") if path.is_file()]
        return _texts(source, sorted(folder)) if folder else _openi(source, wanted)
    if name.endswith((*_ARCHIVES, ".xml")):
        return _openi(source, wanted)
    if kind[0] in _TABLES:
        return _csv(source, wanted, stack, _TABLES[kind[0]], gzipped)
    if kind[0] in _LINES:
        return _jsonl(source, wanted, stack, gzipped)
    if kind[0] in (".parquet", ".pq"):
        return _parquet(source, wanted, stack)
    if kind[0] == ".txt" and not gzipped:
        return _texts(source.parent, [source])
    raise ReportTableError(f"{source}: expected {_FORMATS}")


def _open_text(source: Path, stack: ExitStack, gzipped: bool) -> tuple[io.TextIOWrapper, Callable[[], int], int]:
    """The decoded file, how many bytes are read, and its size. Bytes that are not UTF-8 come as surrogates, so that rows can be named."""
    try:
        raw = stack.enter_context(source.open("rb"))
    except OSError as error:
        raise ReportTableError(f"{source}: cannot be read: {error.strerror}") from None
    packed = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=raw))) if gzipped else raw
    text = io.TextIOWrapper(packed, encoding="utf-8-sig", errors="surrogateescape", newline="")
    stack.callback(text.close)
    return text, raw.raw.tell if isinstance(raw, io.BufferedReader) else raw.tell, source.stat().st_size


def _csv(source: Path, wanted: _Wanted, stack: ExitStack, delimiter: str, gzipped: bool) -> ReportTable:
    text, position, size = _open_text(source, stack, gzipped)
    stack.callback(csv.field_size_limit, csv.field_size_limit(MAX_CELL))  # the limit is the process's: put back afterwards
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    with _whole(source):
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise ReportTableError(f"{source}: row 1: {_csv_fault(error)}") from None
    if any(map(_not_text, header)):
        raise ReportTableError(f"{source}: row 1 {_not_text(' '.join(header))}")
    if len(header) == 1 and (mark := next((mark for mark in ";\t|," if mark in header[0]), None)) is not None:
        raise ReportTableError(f"{source}: one column, which {mark!r} seems to part; expected {delimiter!r} between columns")
    id_column, columns = wanted.columns(header)
    at, texts_at = header.index(id_column), [header.index(column) for column in columns]
    if wanted.every_column:
        texts_at = list(range(len(header)))
    rows = _csv_rows(source, reader, header, at, texts_at, need_id=not wanted.every_column)
    return ReportTable(id_column, columns, rows, position, size, set(header) >= _MANIFEST)


def _csv_rows(source: Path, reader: Any, header: Sequence[str], at: int, texts_at: Sequence[int], need_id: bool) -> Iterator[Row]:
    number = 1
    while True:
        number, line = number + 1, reader.line_num + 1
        try:
            with _whole(source):
                record = next(reader, None)
        except csv.Error as error:
            yield RejectedRow(f"row {number}", f"{_csv_fault(error)} (lines {line} to {reader.line_num})")
            continue
        if record is None:
            return
        if not record:  # a blank line
            continue
        if len(record) != len(header):
            yield RejectedRow(
                f"row {number}", f"{len(record)} cells where the header has {len(header)}: a comma or quote is missing or one too many"
            )
            continue
        names = (header[at], *(header[index] for index in texts_at))
        yield _row(f"row {number}", record[at].strip(), tuple(record[index] for index in texts_at), names, need_id)


def _row(place: str, id_: str, texts: tuple[str, ...], columns: Sequence[str], need_id: bool = True) -> Row:
    """The row, unless its id is empty or a text is not one."""
    for column, text in zip(columns, (id_, *texts), strict=True):
        if fault := _not_text(text):
            return RejectedRow(place, f"column {column!r} {fault}")
    if need_id and not id_:
        return RejectedRow(place, f"column {columns[0]!r} is empty, expected the id of the report")
    return ReportRow(place, id_, texts)


def _not_text(value: str) -> str | None:
    """What is wrong with a decoded text."""
    if value.isascii():
        return "holds a null byte: is this a text table?" if "\0" in value else None
    if _SURROGATE.search(value):
        return "holds what is not UTF-8; save the table as UTF-8"
    return "holds a null byte: is this a text table?" if "\0" in value else None


def _csv_fault(error: csv.Error) -> str:
    told = str(error)  # csv's messages hold nothing of the cells
    return (
        f"a cell of more than {MAX_CELL} characters; a quote may be missing" if "field limit" in told else f"{told}; a quote may be missing"
    )


@contextmanager
def _whole(source: Path) -> Iterator[None]:
    """A gzip file that breaks off, or a disk that fails, ends the reading."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise ReportTableError(f"{source}: breaks off or cannot be read ({type(error).__name__}); fetch it again") from None


def _jsonl(source: Path, wanted: _Wanted, stack: ExitStack, gzipped: bool) -> ReportTable:
    text, position, size = _open_text(source, stack, gzipped)
    lines = _lines(source, text)
    first = next(lines, None)
    if first is None:
        raise ReportTableError(f"{source}: no lines; expected a JSON object a line")
    header = _object(first[1])
    if isinstance(header, str):
        raise ReportTableError(f"{source}: line {first[0]} {header}")
    id_column, columns = wanted.columns(list(header))
    rows = _jsonl_rows(_before(first, lines), id_column, columns, every_column=wanted.every_column)
    shown = (*columns, "others") if wanted.every_column else columns
    return ReportTable(id_column, shown, rows, position, size, set(header) >= _MANIFEST)


def _before(first: tuple[int, str | None], rest: Iterator[tuple[int, str | None]]) -> Iterator[tuple[int, str | None]]:
    yield first
    yield from rest


def _lines(source: Path, text: io.TextIOWrapper) -> Iterator[tuple[int, str | None]]:
    """Lines that are not blank and their numbers; None for one that is too long."""
    number = 0
    while True:
        with _whole(source):
            if not (line := text.readline(MAX_CELL)):
                return
            too_long = len(line) == MAX_CELL and not line.endswith("\n")
            while too_long and (more := text.readline(MAX_CELL)) and not more.endswith("\n"):
                pass
        number += 1
        if too_long or line.strip():
            yield number, None if too_long else line


def _object(line: str | None) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    if line is None:
        return f"has more than {MAX_CELL} characters, expected one report"
    if fault := _not_text(line):
        return fault
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "is no JSON"
    return value if isinstance(value, dict) and value else f"is a JSON {type(value).__name__}, expected an object with keys"


def _jsonl_rows(lines: Iterable[tuple[int, str | None]], id_column: str, columns: tuple[str, ...], every_column: bool) -> Iterator[Row]:
    for number, line in lines:
        place, found = f"line {number}", _object(line)
        if isinstance(found, str):
            yield RejectedRow(place, found)
        elif every_column:
            others = [_as_text(value) for key, value in found.items() if key not in columns]
            texts = (*(_as_text(found.get(column)) for column in columns), "\n".join(others))
            yield _row(place, "", texts, (id_column, *columns, "others"), need_id=False)
        elif odd := [name for name in columns if not isinstance(found.get(name), str | None)]:
            yield RejectedRow(place, f"key {odd[0]!r} holds a JSON {type(found[odd[0]]).__name__}, expected text")
        else:
            texts = tuple(found.get(column) or "" for column in columns)
            yield _row(place, _as_text(found.get(id_column)).strip(), texts, (id_column, *columns))


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


@dataclass
class _Count:
    """How many units are behind."""

    value: int = 0


def _counted(rows: Iterable[Row], count: _Count) -> Iterator[Row]:
    for row in rows:
        count.value += 1
        yield row


def _parquet(source: Path, wanted: _Wanted, stack: ExitStack) -> ReportTable:
    import pyarrow
    import pyarrow.parquet

    try:
        file = stack.enter_context(pyarrow.parquet.ParquetFile(source))
    except (pyarrow.ArrowException, OSError) as error:
        raise ReportTableError(f"{source}: not a readable Parquet file ({type(error).__name__})") from None
    header = [str(name) for name in file.schema_arrow.names]
    id_column, columns = wanted.columns(header)
    count = _Count()
    rows = _counted(_parquet_rows(source, file, id_column, columns, wanted.every_column), count)
    return ReportTable(id_column, columns, rows, lambda: count.value, file.metadata.num_rows, set(header) >= _MANIFEST)


def _parquet_rows(source: Path, file: Any, id_column: str, columns: tuple[str, ...], every_column: bool) -> Iterator[Row]:
    import pyarrow

    number, batches = 1, file.iter_batches(BATCH, columns=list(dict.fromkeys((id_column, *columns))))
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ReportTableError(f"{source}: row group after row {number} is damaged ({type(error).__name__})") from None
        if batch is None:
            return
        for record in batch.to_pylist():
            number += 1
            odd = [] if every_column else [name for name in columns if not isinstance(record[name], str | None)]
            if odd:
                yield RejectedRow(f"row {number}", f"column {odd[0]!r} holds {type(record[odd[0]]).__name__}, expected text")
                continue
            texts = tuple(_as_text(record[column]) for column in columns)
            yield _row(f"row {number}", _as_text(record[id_column]).strip(), texts, (id_column, *columns), need_id=not every_column)


def _texts(root: Path, paths: Sequence[Path]) -> ReportTable:
    """Text files, a report each; the id is the path below the folder without its suffix."""
    count = _Count()
    rows = _counted((_text_file(root, path) for path in paths), count)
    return ReportTable("id", ("report",), rows, lambda: count.value, len(paths))


def _text_file(root: Path, path: Path) -> Row:
    id_ = path.relative_to(root).with_suffix("").as_posix()
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        return RejectedRow(str(path), f"cannot be read: {error.strerror}")
    return _row(str(path), id_, (text,), ("id", "report"))


_OPENI = ("indication", "comparison", "findings", "impression")


def _openi(source: Path, wanted: _Wanted) -> ReportTable:
    """Open-i's reports: the sections together under their headings as ``report``, or those asked for."""
    columns = _OPENI if wanted.every_column else wanted.text_columns or ("report",)
    if unknown := [name for name in columns if name not in (*_OPENI, "report")]:
        raise ReportTableError(f"{source}: no column {unknown[0]!r}; Open-i's reports have report, {', '.join(_OPENI)}")
    return ReportTable("study_id", tuple(columns), _openi_rows(source, tuple(columns)), lambda: 0, None)


def _openi_rows(source: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    from reports.openi import UnreadableReportError, read_openi

    faults: list[UnreadableReportError] = []
    for report in read_openi(source, faults.append):
        yield from _rejected(source, faults)
        texts = tuple(report.text if name == "report" else str(getattr(report.sections, name)) for name in columns)
        yield _row(f"study {report.study_id}", report.study_id, texts, ("study_id", *columns))
    yield from _rejected(source, faults)


def _rejected(source: Path, faults: list[Any]) -> Iterator[RejectedRow]:
    while faults:
        yield RejectedRow(str(source), str(faults.pop(0)))
