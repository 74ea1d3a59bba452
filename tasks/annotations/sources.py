"""Annotation files as rows and entries: CSV and JSON, read whole, and numbers and boxes out of their cells."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvl.geometry.regions import Box
from tasks.annotations.records import AnnotationError, BadRowError

MAX_BYTES = 2**30
"""Largest file that is read, and to which a packed one is inflated."""


@dataclass(frozen=True)
class Table:
    """A CSV file: stripped header, and each record with its number; records are of any length."""

    path: Path
    header: tuple[str, ...]
    records: tuple[tuple[int, tuple[str, ...]], ...]
    sha256: str

    def need(self, *names: str) -> None:
        """Check that there are these columns.

        Raises:
            AnnotationError: one is missing.
        """
        if missing := [name for name in names if name not in self.header]:
            other = "; it looks as if semicolons part them" if len(self.header) == 1 and ";" in self.header[0] else ""
            raise AnnotationError(f"{self.path}: missing column {', '.join(missing)}; its first row has {len(self.header)} columns{other}")

    def cells(self, record: Sequence[str]) -> dict[str, str]:
        """Stripped cells by column; a record of another length than the header is a bad row."""
        if len(record) != len(self.header):
            raise BadRowError(f"{len(record)} cells where the header has {len(self.header)}: a comma or quote is missing or one too many")
        return {name: cell.strip() for name, cell in zip(self.header, record, strict=True)}


def read_table(path: str | Path, *needed: str) -> Table:
    """A CSV file, gzipped or not.

    Raises:
        AnnotationError: it cannot be read, or one of the columns is missing.
    """
    path = Path(path)
    data, sha256 = _data(path)
    text = _text(path, data)
    try:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise AnnotationError(f"{path}: no readable CSV: {error}") from None
    header = tuple(name.strip() for name in lines[0]) if lines else ()
    records = tuple((number, tuple(line)) for number, line in enumerate(lines[1:], start=2) if any(cell.strip() for cell in line))
    table = Table(path, header, records, sha256)
    table.need(*needed)
    return table


def read_json(path: str | Path) -> tuple[Any, str]:
    """The content of a JSON file and the SHA-256 of the file.

    Raises:
        AnnotationError: it cannot be read.
    """
    path = Path(path)
    data, sha256 = _data(path)
    try:
        return json.loads(_text(path, data)), sha256
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: no JSON: line {error.lineno}, column {error.colno}") from None
    except (RecursionError, ValueError):  # ValueError: a number of more digits than Python converts
        raise AnnotationError(f"{path}: JSON that is nested too deep or holds a number too long") from None


def entries(path: Path, content: Any, what: str) -> list[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSON list, with their numbers; what is no object comes as an empty one, which lacks every field.

    Raises:
        AnnotationError: no list.
    """
    if not isinstance(content, list):
        raise AnnotationError(f"{path}: expected a list of {what}, got {type(content).__name__}")
    return [(number, entry if isinstance(entry, dict) else {}) for number, entry in enumerate(content, start=1)]


def text_of(entry: Mapping[str, Any], name: str, *, needed: bool = True) -> str:
    """A field that holds text, or a whole number as text; "" where it is not there and not needed."""
    value = entry.get(name)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if needed:
        raise BadRowError(f"{name} is missing or no text")
    return ""


def number_of(value: object, name: str) -> float:
    """A finite number, from JSON or a cell."""
    if isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"{name} is no finite number")


def numbers_of(value: object, name: str, count: int | None = None) -> list[float]:
    """A list of finite numbers, ``count`` of them if that is given."""
    if not isinstance(value, (list, tuple)) or (count is not None and len(value) != count):
        raise ValueError(f"{name} is no list of {count or ''} numbers".replace("  ", " "))
    return [number_of(one, name) for one in value]


def shape_of(value: object, name: str) -> tuple[int, int]:
    """(rows, columns) from a list of two whole numbers of at least 1."""
    rows, columns = whole(value, name, 2)
    return rows, columns


def whole(value: object, name: str, count: int) -> list[int]:
    """A list of ``count`` whole numbers of at least 1."""
    numbers = numbers_of(value, name, count)
    if any(number < 1 or number != int(number) for number in numbers):
        raise ValueError(f"{name} is no size in whole pixels")
    return [int(number) for number in numbers]


def size_of(fields: Mapping[str, Any], height: str, width: str) -> tuple[int, int] | None:
    """(rows, columns) from two fields; None where neither holds anything."""
    given = [fields.get(name) for name in (height, width)]
    if all(value in (None, "") for value in given):
        return None
    try:
        return shape_of(given, f"{height} and {width}")
    except ValueError as error:
        raise BadRowError(str(error)) from None


def xywh(fields: Mapping[str, Any], names: Sequence[str] = ("x", "y", "w", "h")) -> tuple[Box]:
    """One box from the fields of its corner and its size."""
    return (Box.from_xywh(*(number_of(fields.get(name, ""), name) for name in names)),)


def xyxy(fields: Mapping[str, Any], names: Sequence[str] = ("x_min", "y_min", "x_max", "y_max")) -> tuple[Box]:
    """One box from the fields of its two corners."""
    return (Box.from_xyxy(*(number_of(fields.get(name, ""), name) for name in names)),)


def _data(path: Path) -> tuple[bytes, str]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AnnotationError(f"{path}: larger than the {MAX_BYTES} bytes that are read")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or type(error).__name__}") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() != ".gz":
        return data, sha256
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError) as error:
        raise AnnotationError(f"{path}: not a whole gzip file ({type(error).__name__})") from None
    if len(data) > MAX_BYTES:
        raise AnnotationError(f"{path}: inflates to more than the {MAX_BYTES} bytes that are read")
    return data, sha256


def _text(path: Path, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: byte {error.start} is not UTF-8") from None
    if "\0" in text:
        raise AnnotationError(f"{path}: holds a null byte; is this a text file?")
    return text
