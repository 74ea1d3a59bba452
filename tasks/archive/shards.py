"""Embedded studies in Parquet files: what a part of a source became, to be merged into a store without reading its reports again.

A folder holds ``shard-00000.parquet`` and so on, a row for each study with everything an archive keeps of it, and ``embedding.json``, the
plan: what they were asked to be, and how many there are once all are made. Vectors are float32 lists: of the report, of each sentence, of
each image. Each file says in its metadata which part of which embedding it is, by which model, of what, and what could not be used.
Pages have checksums and the metadata a hash, so that a file is read whole or not at all.

Shards hold the words of reports and what they state, and are their owner's alone to read (0600). With ``--no-text`` they hold none:
in place of a sentence stands a hash of it with the plan's key, by which equal sentences are told.

Shapes: D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medvl.files import replacing, write_atomically
from medvl.types import RESEARCH_USE, Fact
from tasks.archive.records import ArchivedImage, ArchivedStudy, ArchivedText, ModelKey, StudyVectors
from tasks.archive.sql import FACT

FORMAT = 1
PLAN = "embedding.json"
HEAD, HASH = b"medvl", b"medvl_sha256"
"""Keys of a file's metadata: JSON, and its SHA-256."""
RIGHTS = 0o600
_NAME = re.compile(r"shard-(\d{5,})\.parquet")
_PLAIN = ("study_id", "patient_id", "modality", "source", "view", "split", "date", "sex")
_VECTOR = pa.list_(pa.float32())
_FACT = pa.struct([(name, pa.float64() if name == "size_mm" else pa.string()) for name in FACT])
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _PLAIN),
        ("age", pa.float64()),
        ("digest", pa.binary()),
        ("sections", pa.map_(pa.string(), pa.string())),
        ("sentences", pa.list_(pa.struct([("text", pa.string()), ("facts", pa.list_(_FACT))]))),
        ("findings", pa.map_(pa.string(), pa.int64())),
        ("labels", pa.map_(pa.string(), pa.int64())),
        ("images", pa.list_(pa.struct([("path", pa.string()), ("view", pa.string()), ("stamp", pa.string())]))),
        ("report_vector", _VECTOR),
        ("sentence_vectors", pa.list_(_VECTOR)),
        ("image_vectors", pa.list_(_VECTOR)),
    ]
)
"""Columns of a shard."""


class ShardError(RuntimeError):
    """Shards that cannot be made or used as asked; the message says which, why, and what to do."""


class DamagedShardError(ShardError):
    """A shard that is not as it was written."""


@dataclass(frozen=True)
class Plan:
    """What the shards of a folder are."""

    set_id: str
    """Of this embedding, so that a shard of another is told."""
    model: ModelKey
    asked: Mapping[str, Any]
    """Options that decide what is in the shards, by their names."""
    key: str | None = field(default=None, repr=False)
    """Hexadecimal, of the hashes that stand for sentences; None: the words are kept."""
    shards: int | None = None  # None: the end of the source was not reached yet
    studies: int | None = None

    @property
    def with_text(self) -> bool:
        """Whether words of reports are in the shards."""
        return self.key is None


@dataclass(frozen=True)
class Shard:
    """One file."""

    number: int
    set_id: str
    model: ModelKey
    with_text: bool
    made_of: str
    """SHA-256 of the ids and digests of the studies of its part, those that could not be used among them."""
    rejected: tuple[tuple[str, str], ...] = field(repr=False)
    """(path or row, why)."""
    studies: tuple[tuple[ArchivedStudy, StudyVectors], ...] = field(repr=False)


@dataclass(frozen=True)
class ShardStudy(ArchivedStudy):
    """A study as a shard has it, which may be without its words."""

    whole: bytes = field(default=b"", repr=False)

    def digest(self) -> bytes:
        """Of the study with its words, as its source has it."""
        return self.whole


def wordless(study: ArchivedStudy, key: str) -> ShardStudy:
    """A study without the words of its report and what they state; a hash stands for each sentence.

    Args:
        study: as its source has it.
        key: hexadecimal, of the hashes.
    """

    def hashed(text: str) -> str:
        return hashlib.blake2b(text.encode(), key=bytes.fromhex(key), digest_size=32).hexdigest()

    sentences = tuple(ArchivedText(hashed(one.text)) for one in study.sentences)
    plain = {name: getattr(study, name) for name in (*_PLAIN, "age", "labels", "images")}
    return ShardStudy(**plain, sentences=sentences, whole=study.digest())


def made_of(studies: Sequence[ArchivedStudy]) -> str:
    """SHA-256 of the ids and digests of studies, in their order."""
    told = hashlib.sha256()
    for study in studies:
        told.update(json.dumps([study.study_id, study.digest().hex()]).encode())
    return told.hexdigest()


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{number:05d}.parquet"


def shards_in(folder: Path) -> dict[int, Path]:
    """The shards that are in a folder, by number, in their order."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def misfit(shard: Shard, plan: Plan, number: int) -> str | None:
    """Why a shard is not that of this number of a plan; None: it is."""
    if shard.model != plan.model:
        return f"made by another model, with weights {shard.model.weights_sha256[:12]} and not {plan.model.weights_sha256[:12]}"
    if shard.set_id != plan.set_id or shard.with_text != plan.with_text:
        return f"belongs to another embedding than {PLAN} says"
    return None if shard.number == number else f"is shard {shard.number}, and named as another"


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan of a folder, whole or not at all."""
    told = {"format": FORMAT, "notice": RESEARCH_USE, **asdict(plan)}
    write_atomically(folder / PLAN, (json.dumps(told, indent=2, allow_nan=False) + "\n").encode(), RIGHTS)


def read_plan(folder: Path) -> Plan | None:
    """The plan of a folder; None if it has none.

    Raises:
        ShardError: it cannot be read, or is of another format.
    """
    path = folder / PLAN
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = told.pop("format")
        if found == FORMAT:
            told.pop("notice")
            return Plan(**{**told, "model": ModelKey(**told["model"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: no plan of `medvl index embed` that can be read ({type(error).__name__}); restore a copy") from error
    raise ShardError(f"{path}: of format {found!r}, this version reads {FORMAT}; embed the source again into another folder")


def write_shard(folder: Path, shard: Shard) -> None:
    """Write a shard, whole or not at all, for its owner alone."""
    head = json.dumps(
        {
            "format": FORMAT,
            "notice": RESEARCH_USE,
            "set": shard.set_id,
            "number": shard.number,
            "model": asdict(shard.model),
            "with_text": shard.with_text,
            "made_of": shard.made_of,
            "rejected": shard.rejected,
        }
    ).encode()
    columns = {name: [getattr(study, name) for study, _ in shard.studies] for name in (*_PLAIN, "age")}
    columns["digest"] = [study.digest() for study, _ in shard.studies]
    for name in ("sections", "findings", "labels"):
        columns[name] = [list(getattr(study, name).items()) for study, _ in shard.studies]
    for name in ("sentences", "images"):
        columns[name] = [[asdict(one) for one in getattr(study, name)] for study, _ in shard.studies]
    columns["report_vector"] = [vectors.report for _, vectors in shard.studies]
    columns["sentence_vectors"] = [None if vectors.sentences is None else list(vectors.sentences) for _, vectors in shard.studies]
    columns["image_vectors"] = [None if vectors.images is None else list(vectors.images) for _, vectors in shard.studies]
    arrays = [pa.array(columns[one.name], type=one.type) for one in SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata({HEAD: head, HASH: hashlib.sha256(head).hexdigest().encode()}))
    with replacing(shard_path(folder, shard.number), RIGHTS) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_shard(path: Path) -> Shard:
    """All of a shard.

    Raises:
        DamagedShardError: it is cut short, or not as it was written.
        ShardError: it is none, or of another format.
    """
    head, table = _read(path, rows=True)
    try:
        return replace(head, studies=tuple(zip(_studies(table), _vectors(table, head.model.width), strict=True)))
    except (pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def read_head(path: Path) -> Shard:
    """A shard without its studies.

    Raises:
        ShardError: as :func:`read_shard` does.
    """
    return _read(path, rows=False)[0]


def _read(path: Path, *, rows: bool) -> tuple[Shard, pa.Table]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            told = file.schema_arrow.metadata or {}
            table = file.read() if rows else None
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    head = told.get(HEAD)
    if head is None:
        raise ShardError(f"{path}: no shard of `medvl index embed`; take it away")
    if told.get(HASH) != hashlib.sha256(head).hexdigest().encode():
        raise _damaged(path, None)
    known = json.loads(head)
    if known["format"] != FORMAT:
        raise ShardError(f"{path}: a shard of format {known['format']!r}, this version reads {FORMAT}; embed the source again")
    rejected = tuple((place, reason) for place, reason in known["rejected"])
    model = ModelKey(**known["model"])
    return Shard(known["number"], known["set"], model, known["with_text"], known["made_of"], rejected, ()), table


def _damaged(path: Path, error: Exception | None) -> DamagedShardError:
    how = "" if error is None else f" ({type(error).__name__})"  # what Arrow says may quote what the file holds
    return DamagedShardError(f"{path}: cut short or damaged{how}; the same `medvl index embed` command again makes it anew")


def _studies(table: pa.Table) -> list[ShardStudy]:
    """The studies of the rows."""
    columns = [one.name for one in SCHEMA if not one.name.endswith(("_vector", "_vectors"))]
    return [
        ShardStudy(
            **{name: row[name] for name in (*_PLAIN, "age")},
            sections=dict(row["sections"]),
            sentences=tuple(ArchivedText(one["text"], tuple(Fact(**fact) for fact in one["facts"])) for one in row["sentences"]),
            findings=dict(row["findings"]),
            labels=dict(row["labels"]),
            images=tuple(ArchivedImage(**one) for one in row["images"]),
            whole=row["digest"],
        )
        for row in table.select(columns).to_pylist()
    ]


def _vectors(table: pa.Table, width: int) -> list[StudyVectors]:
    """The vectors of the rows, as many as there are sentences and images.

    Raises:
        ValueError: another number of them, or of numbers in one.
    """

    def rows(column: pa.ListArray) -> list[NDArray[np.float32] | None]:
        numbers = column.values.to_numpy(zero_copy_only=False)
        found = [None if part is None else numbers[slice(*part)] for part in _parts(column)]
        if any(one is not None and one.shape != (width,) for one in found):
            raise ValueError("width")
        return found

    def lists(name: str, owners: str) -> list[list[NDArray[np.float32] | None] | None]:
        column, counts = _column(table, name), _column(table, owners).value_lengths().to_pylist()
        each = rows(column.values)
        found = [None if part is None else each[slice(*part)] for part in _parts(column)]
        if any(one is not None and len(one) != count for one, count in zip(found, counts, strict=True)):
            raise ValueError("count")
        return found

    reports = rows(_column(table, "report_vector"))
    sentences, images = lists("sentence_vectors", "sentences"), lists("image_vectors", "images")
    return [
        StudyVectors(
            report, None if texts is None else np.stack([one for one in texts if one is not None]), None if ours is None else tuple(ours)
        )
        for report, texts, ours in zip(reports, sentences, images, strict=True)
    ]


def _column(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece."""
    return table.column(name).combine_chunks()


def _parts(column: pa.ListArray) -> list[tuple[int, int] | None]:
    """From where to where in its values each list is; None of one that is null."""
    ends = column.offsets.to_pylist()
    return [(start, stop) if valid else None for start, stop, valid in zip(ends, ends[1:], column.is_valid().to_pylist(), strict=False)]
