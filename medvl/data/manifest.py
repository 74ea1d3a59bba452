"""The study manifest: one table, one row per image or series, read once, checked whole, handed on as typed rows.

A table is CSV, TSV (either may be gzipped) or Parquet. Its columns are ``study_id, patient_id, modality, path`` (required), ``view``,
``split``, ``report`` or ``findings`` and ``impression``, one column per finding (1 present, 0 absent, -1 uncertain, empty not mentioned),
``boxes`` (a JSON list of ``{"finding", "x", "y", "width", "height"}`` in native pixels) and ``mask_<finding>`` (a path); ``sex``, ``age``,
``scanner`` and ``site`` part an evaluation into subgroups. Paths are relative to the table's folder. :class:`ColumnMap` reads tables that
name things otherwise.

Row numbers are those a spreadsheet shows: the header is row 1, the first record row 2. Messages hold study ids, row numbers, column names
and paths, never a patient id or the content of another cell.
"""

from __future__ import annotations

import csv
import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from medvl.types import FINDINGS

Modality = Literal["xray", "ct"]
Split = Literal["train", "val", "test"]

SPLITS: tuple[Split, ...] = ("train", "val", "test")
REQUIRED = ("study_id", "patient_id", "modality", "path")
_OPTIONAL = ("view", "split", "report", "findings", "impression", "boxes", "date")
GROUPS = ("sex", "age", "scanner", "site")
"""Columns that part an evaluation into subgroups, besides the view, where a column map names no others."""
_SHOWN = 20  # bad rows spelled out in an error; the rest are counted

_MODALITIES: Mapping[str, Modality] = {
    **dict.fromkeys(("xray", "xr", "cxr", "dx", "cr", "dr", "rg", "radiograph"), "xray"),
    **dict.fromkeys(("ct", "computedtomography"), "ct"),
}
_SPLIT_NAMES: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LATERAL = {"l", "ll", "rl", "lat", "lateral"}
_ALIASES: Mapping[str, tuple[str, ...]] = {  # what other tables call it; only ever suggested, never assumed
    "study_id": ("study", "exam_id", "accession"),
    "patient_id": ("patient", "subject_id", "patientid", "subject"),
    "modality": ("type",),
    "path": ("image", "file", "filename", "image_path", "image_index", "dicom"),
}
_HOW_TO_MAP = (
    "Name the table's own columns in a column map: lines 'ours: theirs' in a YAML file, for --columns of a command, `columns` of a "
    "recipe or ColumnMap.load"
)
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_LEAVES = re.compile(r"^(?:[/\\]|[A-Za-z]:)|(?:^|[/\\])\.\.(?:[/\\]|$)")


@dataclass(frozen=True)
class Box:
    """A finding's rectangle in native pixels: pixel (row, col) is inside if x <= col < x + width and y <= row < y + height."""

    finding: str
    x: float
    y: float
    width: float
    height: float

    def mask(self, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """(rows, cols) bool, True inside."""
        rows, cols = (np.arange(n) for n in shape)
        inside = (rows >= self.y) & (rows < self.y + self.height)
        return inside[:, None] & ((cols >= self.x) & (cols < self.x + self.width))[None, :]


@dataclass(frozen=True)
class ColumnMap:
    """Which column of a table holds what. A name other than the default must be there; a default that is not required may be absent.

    Attributes:
        labels: finding -> column, or a list of columns that are named as their finding; None: the columns named in ``FINDINGS``.
        label_values: column -> cell -> finding -> label, for a table with one diagnosis column, as in
            ``{"finding": {"Pneumonia": {"consolidation": 1}}}``. Fills only what the label columns leave open.
        constants: field -> the value of every row, for a field that the table has no column for: ``{"modality": "xray"}``.
        groups: what parts an evaluation into subgroups -> column, or a list of columns that are named so; None: those of ``GROUPS``.
        split: set to None to leave a split column unread and split by patient instead.
    """

    study_id: str = "study_id"
    patient_id: str = "patient_id"
    modality: str = "modality"
    path: str = "path"
    view: str = "view"
    split: str | None = "split"
    report: str = "report"
    findings: str = "findings"
    impression: str = "impression"
    boxes: str = "boxes"
    date: str = "date"
    mask_prefix: str = "mask_"
    labels: dict[str, str] | list[str] | None = None
    label_values: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] | list[str] | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.constants) - {"study_id", "patient_id", "modality", "view", "split"}):
            raise ValueError(f"column map: constants may set study_id, patient_id, modality, view or split, not {', '.join(unknown)}")
        for column, cells in self.label_values.items():
            if any(label not in (1, 0, -1) for labels in cells.values() for label in labels.values()):
                raise ValueError(f"column map: label_values of column {column!r} must be 1, 0 or -1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ColumnMap:
        """A map from plain values, as YAML or JSON gives them.

        Raises:
            ValueError: a key that is no field of this class.
        """
        known = [f.name for f in fields(cls)]
        if unknown := [str(key) for key in values if key not in known]:
            raise ValueError(f"column map: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> ColumnMap:
        """A map from a YAML or JSON file of ``field: column`` lines."""
        import yaml

        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"column map {path}: expected lines 'field: column', got {type(values).__name__}")
        return cls.from_dict(values)

    def label_columns(self, header: Sequence[str]) -> dict[str, str]:
        """Finding -> column, as this table has them."""
        if self.labels is None:
            return {name: name for name in header if name in FINDINGS}
        return dict(self.labels) if isinstance(self.labels, Mapping) else {name: name for name in self.labels}

    def group_columns(self, header: Sequence[str]) -> dict[str, str]:
        """What parts into subgroups -> column, as this table has them."""
        if self.groups is None:
            return {name: name for name in GROUPS if name in header}
        return dict(self.groups) if isinstance(self.groups, Mapping) else {name: name for name in self.groups}


@dataclass(frozen=True)
class SplitFractions:
    """Shares of train, val and test for a table without a split column. A patient's split hangs on its id and the seed alone.

    So a table that grows keeps every patient where it was; in return the shares are met on average only, and in a table of a few
    patients a split can be empty.
    """

    train: float = 0.7
    val: float = 0.1
    test: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        shares = (self.train, self.val, self.test)
        if not all(math.isfinite(share) and share >= 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-9):
            raise ValueError(f"split fractions must be 0 or more and add to 1, got train {self.train}, val {self.val}, test {self.test}")

    def split_of(self, patient_id: str) -> Split:
        """The split of one patient: where SHA-256 of ``seed:patient_id`` falls in [0, 1)."""
        digest = hashlib.sha256(f"{self.seed}:{patient_id}".encode("utf-8", "surrogatepass")).digest()
        at = int.from_bytes(digest[:6], "big") / 2**48
        if at < self.train:
            return "train"
        return "val" if at < self.train + self.val or self.test == 0 else "test"


@dataclass(frozen=True)
class StudyImage:
    """One checked row: an image, or a CT series (a file, or the folder that holds its slices). Its repr hides text and patient."""

    study_id: str
    patient_id: str = field(repr=False)
    modality: Modality
    path: Path  # absolute
    view: str | None  # PA, AP, lateral, or as the table has it; None if empty
    split: Split
    report: str | None = field(repr=False)
    findings: str | None = field(repr=False)
    impression: str | None = field(repr=False)
    labels: dict[str, int]  # finding -> 1 present, 0 absent, -1 uncertain; a finding that is not mentioned has no key
    boxes: tuple[Box, ...]
    masks: dict[str, Path]  # finding -> absolute path
    row: int
    groups: dict[str, str] = field(default_factory=dict, repr=False)  # sex, age, scanner, site, as the table has them; no key if empty
    date: str | None = field(default=None, repr=False)  # of the study, as the table has it

    @property
    def text(self) -> str:
        """The report; made of findings and impression under their headings where there is no whole report; "" without any."""
        if self.report:
            return self.report
        sections = (("FINDINGS", self.findings), ("IMPRESSION", self.impression))
        return "\n".join(f"{heading}: {body}" for heading, body in sections if body)


@dataclass(frozen=True)
class RejectedRow:
    """A row that was left out, and every reason for it."""

    row: int
    study_id: str
    path: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"row {self.row}: study {_shown(self.study_id)}, {_shown(self.path)}: {'; '.join(self.reasons)}"


class ManifestError(ValueError):
    """A table that cannot be used as it is; ``rejected`` lists every bad row where the rows could be read at all."""

    def __init__(self, message: str, rejected: tuple[RejectedRow, ...] = ()) -> None:
        super().__init__(message)
        self.rejected = rejected


@dataclass(frozen=True)
class Manifest(Sequence[StudyImage]):
    """The good rows of a table, in its order, and what was left out. A sequence of its rows."""

    rows: tuple[StudyImage, ...] = field(repr=False)
    root: Path
    label_names: tuple[str, ...]
    split_source: str  # "column split", or how the splits were made
    sha256: str  # of the file
    rejected: tuple[RejectedRow, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[StudyImage]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> StudyImage: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[StudyImage, ...]: ...
    def __getitem__(self, index: int | slice) -> StudyImage | tuple[StudyImage, ...]:
        return self.rows[index]

    @property
    def without_report(self) -> int:
        """How many rows have no report text. Training on pairs drops them and says how many."""
        return sum(not row.text for row in self.rows)

    def select(self, *, split: str | Sequence[str] | None = None, modality: str | None = None, with_report: bool = False) -> Manifest:
        """The rows of these splits and this modality, and if ``with_report`` only those with text; None keeps all.

        Raises:
            ValueError: a split or modality that does not exist.
        """
        splits = SPLITS if split is None else (split,) if isinstance(split, str) else tuple(split)
        if unknown := [name for name in splits if name not in SPLITS]:
            raise ValueError(f"unknown split {', '.join(map(repr, unknown))}; expected train, val or test")
        if modality not in (None, "xray", "ct"):
            raise ValueError(f"unknown modality {modality!r}; expected xray or ct")
        rows = tuple(
            row for row in self.rows if row.split in splits and modality in (None, row.modality) and (not with_report or bool(row.text))
        )
        return replace(self, rows=rows)

    def label_array(self, names: Sequence[str] | None = None) -> NDArray[np.float64]:
        """(rows, names) of 1 present, 0 absent, -1 uncertain, NaN not mentioned; all ``label_names`` unless told."""
        chosen = self.label_names if names is None else tuple(names)
        cells = [[row.labels.get(name, math.nan) for name in chosen] for row in self.rows]
        return np.asarray(cells, dtype=np.float64).reshape(len(self.rows), len(chosen))

    def write_rejected(self, path: str | Path) -> None:
        """Write the rejected rows as CSV: row, study_id, path, reasons."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("row", "study_id", "path", "reasons"))
            writer.writerows((bad.row, bad.study_id, bad.path, "; ".join(bad.reasons)) for bad in self.rejected)


def read_manifest(
    path: str | Path,
    *,
    columns: ColumnMap | Mapping[str, Any] | None = None,
    allow_outside: bool = False,
    check_files: bool = True,
    splits: SplitFractions | None = None,
    strict: bool = True,
) -> Manifest:
    """Read and check a study manifest.

    Args:
        path: the table; its folder is the root that paths are relative to.
        columns: how the table names things.
        allow_outside: accept paths that leave the root (absolute, through ``..`` or through a symbolic link).
        check_files: images and masks must exist: a file, or for CT a file or folder.
        splits: shares for a table without a split column, ``SplitFractions()`` unless told; a split column wins.
        strict: raise if any row is bad; otherwise leave bad rows out and list them in ``rejected``.
    Raises:
        ManifestError: the table cannot be read, a column is missing, or (strict) rows are bad: all of them are listed at once.
            Bad is: an empty or unreadable cell where one is needed, an unknown modality, split or label, a path that is missing,
            leaves the root or came before, broken boxes, a study of two patients, and every row of a patient in two splits.
    """
    table = Path(path)
    names = columns if isinstance(columns, ColumnMap) else ColumnMap.from_dict(columns or {})
    header, records, sha256 = _read_table(table)
    _check_columns(table, header, names)
    reader = _RowReader(table, header, names, splits or SplitFractions(), allow_outside=allow_outside, check_files=check_files)
    read = [(number, record, *reader.read(number, record)) for number, record in records if any(cell.strip() for cell in record)]
    reasons = _across_rows([row for _, _, row, _ in read])
    rows, rejected = [], []
    for number, record, row, own in read:
        if row is not None and not own and number not in reasons:
            rows.append(row)
        else:
            study_id, where = reader.cell(record, "study_id"), reader.cell(record, "path")
            rejected.append(RejectedRow(number, study_id, where, (*own, *reasons.get(number, ()))))
    if strict and rejected:
        raise ManifestError(_listing(table, rejected, len(read)), tuple(rejected))
    return Manifest(tuple(rows), reader.root, reader.label_names, reader.split_source, sha256, tuple(rejected))


class _RowReader:
    """Cells of one record to a :class:`StudyImage` and the reasons against it; what needs other rows is checked by the caller."""

    def __init__(
        self, table: Path, header: list[str], names: ColumnMap, splits: SplitFractions, *, allow_outside: bool, check_files: bool
    ) -> None:
        self.names, self.header, self.splits = names, header, splits
        self.root = Path(os.path.realpath(table.parent))
        self.allow_outside, self.check_files = allow_outside, check_files
        self._at = {column: index for index, column in enumerate(header)}
        self._fields = {name: self._at.get(getattr(names, name)) for name in (*REQUIRED, *_OPTIONAL)}
        self._labels = {finding: self._at[column] for finding, column in names.label_columns(header).items()}
        self._groups = {name: self._at[column] for name, column in names.group_columns(header).items()}
        prefix = names.mask_prefix
        self._masks = {column[len(prefix) :]: index for column, index in self._at.items() if prefix and column.startswith(prefix)}
        mapped = (finding for cells in names.label_values.values() for labels in cells.values() for finding in labels)
        self.label_names = tuple(dict.fromkeys((*self._labels, *mapped)))
        self._split_column = "split" in names.constants or (names.split is not None and names.split in self._at)
        shares = f"train {splits.train:g}, val {splits.val:g}, test {splits.test:g}, seed {splits.seed}"
        self.split_source = f"column {names.split}" if self._split_column else f"hash of patient_id: {shares}"
        self._inside = functools.lru_cache(maxsize=None)(self._is_inside)  # the same folders come again in row after row
        self._split_of = functools.lru_cache(maxsize=None)(splits.split_of)

    def cell(self, record: Sequence[str], name: str) -> str:
        """The stripped cell of a field, "" where the record or the table has none."""
        if name in self.names.constants:
            return self.names.constants[name]
        index = self._fields[name]
        return record[index].strip() if index is not None and index < len(record) else ""

    def read(self, number: int, record: Sequence[str]) -> tuple[StudyImage | None, list[str]]:
        """The row, None if a cell that it cannot be without is bad, and every reason against it."""
        if len(record) != len(self.header):
            return None, [f"{len(record)} cells where the header has {len(self.header)}: a comma or quote is missing or one too many"]
        reasons: list[str] = []
        study_id, patient_id = self.cell(record, "study_id"), self.cell(record, "patient_id")
        reasons += [f"{name} is empty" for name, value in (("study_id", study_id), ("patient_id", patient_id)) if not value]
        modality = _modality(self.cell(record, "modality"))
        if modality is None:
            reasons.append("modality is not one of xray (also X-ray, DX, CR, RG) and ct")
        split = _SPLIT_NAMES.get(self.cell(record, "split").lower()) if self._split_column else self._split_of(patient_id)
        if split is None:
            reasons.append("split is not one of train, val, test")
        image = self._path(self.cell(record, "path"), "path", folder=modality != "xray", reasons=reasons)
        boxes = _read_boxes(self.cell(record, "boxes"), reasons)
        masks = {finding: record[index].strip() for finding, index in self._masks.items() if record[index].strip()}
        masks_at = {
            finding: self._path(value, f"{self.names.mask_prefix}{finding}", folder=False, reasons=reasons)
            for finding, value in masks.items()
        }
        labels = self._read_labels(record, reasons)
        if modality is None or split is None or image is None:
            return None, reasons
        row = StudyImage(
            study_id=study_id,
            patient_id=patient_id,
            modality=modality,
            path=image,
            view=_view(self.cell(record, "view")),
            split=split,
            report=self.cell(record, "report") or None,
            findings=self.cell(record, "findings") or None,
            impression=self.cell(record, "impression") or None,
            labels=labels,
            boxes=boxes,
            masks={finding: where for finding, where in masks_at.items() if where is not None},
            row=number,
            groups={name: cell for name, index in self._groups.items() if (cell := record[index].strip())},
            date=self.cell(record, "date") or None,
        )
        return row, reasons

    def _read_labels(self, record: Sequence[str], reasons: list[str]) -> dict[str, int]:
        labels = {}
        for column, cells in self.names.label_values.items():
            labels.update(cells.get(record[self._at[column]].strip(), {}))
        for finding, index in self._labels.items():
            if cell := record[index].strip():
                label = _label(cell)
                if label is None:
                    reasons.append(f"{self.header[index]} is none of 1, 0, -1 and empty")
                else:
                    labels[finding] = label
        return labels

    def _path(self, value: str, name: str, *, folder: bool, reasons: list[str]) -> Path | None:
        """Absolute path of a cell; None, with the reason noted, if it is empty, leaves the root or is not there."""
        if not value:
            reasons.append(f"{name} is empty")
            return None
        if not self.allow_outside and _LEAVES.search(value):
            reasons.append(f"{name} is absolute or has a '..' step, so it may leave the table's folder; move it there or set allow_outside")
            return None
        where = os.path.normpath(os.path.join(self.root, value))  # noqa: PTH118 (pathlib would be a third of the reading time)
        try:
            if not self.allow_outside and not self._is_inside(where):
                reasons.append(f"{name} leaves the table's folder through a symbolic link; move it there or set allow_outside")
                return None
            mode = os.stat(where).st_mode if self.check_files else stat.S_IFREG  # noqa: PTH116
        except (OSError, ValueError):  # ValueError: a null byte in the path
            mode = 0
        if not stat.S_ISREG(mode) and not (folder and stat.S_ISDIR(mode)):
            reasons.append(f"{name} is no file" if mode else f"{name} names a file that is not there")
            return None
        return Path(where)

    def _is_inside(self, where: str) -> bool:
        """Whether a path below the root stays there when links are followed. One lstat a path, one for each folder on the way."""
        if where == str(self.root):
            return True
        try:
            linked = stat.S_ISLNK(os.lstat(where).st_mode)
        except OSError:
            linked = False
        if linked:
            return Path(os.path.realpath(where)).is_relative_to(self.root)
        parent = os.path.dirname(where)  # noqa: PTH120
        return parent == where or self._inside(parent)


def _read_table(table: Path) -> tuple[list[str], list[tuple[int, list[str]]], str]:
    """Header, numbered records of text cells, and the SHA-256 of the file."""
    try:
        data = table.read_bytes()
    except OSError as error:
        raise ManifestError(f"manifest {table}: cannot be read: {error.strerror}") from None
    sha256 = hashlib.sha256(data).hexdigest()
    suffixes = [suffix.lower() for suffix in table.suffixes]
    if suffixes[-1:] in ([".parquet"], [".pq"]):
        header, records = _read_parquet(table, data)
    else:
        kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
        if kind not in (".csv", ".tsv"):
            raise ManifestError(f"manifest {table}: expected .csv, .tsv, .csv.gz, .tsv.gz or .parquet")
        header, records = _read_csv(table, data, gzipped=suffixes[-1] == ".gz", delimiter="," if kind == ".csv" else "\t")
    if repeated := [name for name, count in Counter(header).items() if count > 1 and name]:
        raise ManifestError(f"manifest {table}: column {', '.join(repeated)} appears more than once")
    return header, list(enumerate(records, start=2)), sha256


def _read_csv(table: Path, data: bytes, *, gzipped: bool, delimiter: str) -> tuple[list[str], list[list[str]]]:
    """Header and records; ragged records are kept as they are, so that they can be told by number."""
    try:
        text = (gzip.decompress(data) if gzipped else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"manifest {table}: byte {error.start} is not UTF-8; save the table as UTF-8") from None
    except (OSError, EOFError) as error:
        raise ManifestError(f"manifest {table}: not a whole gzip file: {error}") from None
    if "\0" in text:  # Python 3.10's csv stops here, later ones read on
        raise ManifestError(f"manifest {table}: line {text[: text.index(chr(0))].count(chr(10)) + 1}: null byte; is this a text table?")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        records = list(reader)
    except csv.Error as error:
        raise ManifestError(f"manifest {table}: line {reader.line_num}: {error}; a quote may be missing above") from None
    if len(header) < 2:
        found = next((name for mark, name in _SEPARATORS.items() if mark in "".join(header)), None)
        raise ManifestError(
            f"manifest {table}: row 1 has {len(header)} columns; expected a header with {', '.join(REQUIRED)}, parted by "
            "commas, in a .tsv by tabs" + (f"; it looks as if {found} part them" if found else "")
        )
    return header, records


def _read_parquet(table: Path, data: bytes) -> tuple[list[str], list[list[str]]]:
    """Header and records, each value as the text a CSV would hold."""
    import pyarrow
    import pyarrow.parquet

    try:
        content = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        columns = [[_as_text(value) for value in column.to_pylist()] for column in content.columns]
    except (pyarrow.ArrowException, OSError, TypeError) as error:
        raise ManifestError(f"manifest {table}: not a readable Parquet file ({type(error).__name__})") from None
    return [str(name).strip() for name in content.column_names], [list(record) for record in zip(*columns, strict=True)]


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def _check_columns(table: Path, header: Sequence[str], names: ColumnMap) -> None:
    """Required columns, and every column that the map names otherwise than by default, must be there."""
    default = ColumnMap()
    wanted = {name: getattr(names, name) for name in REQUIRED if name not in names.constants}
    for name in (*REQUIRED, *_OPTIONAL):
        if getattr(names, name) not in (None, getattr(default, name)) and name not in names.constants:
            wanted[name] = getattr(names, name)
    wanted |= {f"labels[{finding}]": column for finding, column in names.label_columns(header).items()}
    wanted |= {f"label_values[{column}]": column for column in names.label_values}
    wanted |= {f"groups[{group}]": column for group, column in names.group_columns(header).items()}
    missing = {name: column for name, column in wanted.items() if column not in header}
    if not missing:
        return
    if not {name.lower() for name in header} & {*REQUIRED, *_OPTIONAL, *FINDINGS, *(alias for many in _ALIASES.values() for alias in many)}:
        # a table without a header would otherwise have its first record, perhaps a patient's, quoted in a log
        raise ManifestError(
            f"manifest {table}: missing column {', '.join(missing.values())}; none of the {len(header)} names in row 1 is a known one. "
            f"If row 1 is a record, add a header; if it is the header: {_HOW_TO_MAP}"
        )
    guesses = {name: _guess(name, column, header) for name, column in missing.items()}
    hints = [f"{name}: {guess}" for name, guess in guesses.items() if guess and name in REQUIRED + _OPTIONAL]
    if "modality" in missing:
        hints.append("constants: {modality: xray}")
    raise ManifestError(
        f"manifest {table}: missing column {', '.join(f'{column} (for {name})' for name, column in missing.items())}; "
        f"the table has {', '.join(map(_shown, header))}. {_HOW_TO_MAP}" + (f"; here: {'; '.join(hints)}" if hints else "")
    )


def _guess(name: str, column: str, header: Sequence[str]) -> str | None:
    by_lower = {known.lower(): known for known in header}
    for alias in (column.lower(), *_ALIASES.get(name, ())):
        if alias in by_lower:
            return by_lower[alias]
    close = difflib.get_close_matches(column.lower(), list(by_lower), n=1, cutoff=0.75)
    return by_lower[close[0]] if close else None


def _across_rows(rows: Sequence[StudyImage | None]) -> dict[int, list[str]]:
    """Row number -> what is wrong with the row beside others: a path that came before, a study of two patients, a patient in two splits."""
    first_path: dict[Path, int] = {}
    patients: dict[str, set[str]] = {}
    splits: dict[str, dict[str, int]] = {}
    known = [row for row in rows if row is not None]
    for row in known:
        patients.setdefault(row.study_id, set()).add(row.patient_id)
        splits.setdefault(row.patient_id, {}).setdefault(row.split, row.row)
    reasons: dict[int, list[str]] = {}
    for row in known:
        if (first := first_path.setdefault(row.path, row.row)) != row.row:
            reasons.setdefault(row.row, []).append(f"path is that of row {first} too")
        if row.study_id and len(patients[row.study_id]) > 1:
            reasons.setdefault(row.row, []).append(f"study has rows of {len(patients[row.study_id])} patients")
        if row.patient_id and len(at := splits[row.patient_id]) > 1:
            where = ", ".join(f"{name} (row {number})" for name, number in at.items())
            reasons.setdefault(row.row, []).append(f"its patient is in more than one split: {where}")
    return reasons


def _read_boxes(cell: str, reasons: list[str]) -> tuple[Box, ...]:
    if not cell:
        return ()
    try:
        return tuple(_box(item) for item in json.loads(cell))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        reasons.append("boxes is no JSON list of {finding, x, y, width, height} with x, y >= 0 and width, height > 0 in native pixels")
        return ()


def _box(item: Mapping[str, Any]) -> Box:
    if not isinstance(item["finding"], str) or not item["finding"]:
        raise TypeError
    numbers = [item[name] for name in ("x", "y", "width", "height")]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in numbers):
        raise TypeError
    x, y, width, height = map(float, numbers)
    if not all(map(math.isfinite, (x, y, width, height))) or min(x, y) < 0 or min(width, height) <= 0:
        raise ValueError
    return Box(item["finding"], x, y, width, height)


def _modality(cell: str) -> Modality | None:
    return _MODALITIES.get(re.sub(r"[\s_-]", "", cell.lower()))


def _label(cell: str) -> int | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return int(value) if value in (1, 0, -1) else None


def _view(cell: str) -> str | None:
    """The table's view in the project's words: PA, AP (supine too) and lateral; another word stays as it is."""
    if cell.lower() in _LATERAL:
        return "lateral"
    first = cell.split(maxsplit=1)[0].upper() if cell else ""
    return first if first in ("PA", "AP") else cell or None


def _listing(table: Path, rejected: Sequence[RejectedRow], total: int) -> str:
    lines = [f"manifest {table}: {len(rejected)} of {total} rows are bad"]
    lines += [f"  {bad}" for bad in rejected[:_SHOWN]]
    if len(rejected) > _SHOWN:
        lines.append(f"  and {len(rejected) - _SHOWN} more")
    return "\n".join([*lines, "Mend them, or read with strict=False to go on without them and list them with write_rejected()."])


def _shown(text: str) -> str:
    """Text fit for one line of a message."""
    clipped = text if len(text) <= 120 else f"{text[:117]}..."
    return clipped if clipped.isprintable() else repr(clipped)
