"""What search needs beside a store, made from it and made again whenever it is of another generation: matrices to be mapped into memory,
the columns that filters look at, and a ranking index of the words.

Shapes: N studies by rising ``study_id`` (their places here, so that equal scores are in the order of ids), T different sentences, I images,
D width. Rows of matrices are of unit length.

Files stand in a folder of the store's (``FILE.derived``) and carry the generation in their names; ``current.json``, written last and by
renaming, says which are valid. A process that is killed while it writes leaves files that nothing names, and the next one to build takes
them away.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.files import write_atomically
from tasks.archive import approximate
from tasks.archive.filters import NOT_MENTIONED, Columns, TextColumn, day_number
from tasks.archive.store import KINDS, METADATA, ArchiveError, ArchiveStore, VectorKind

VERSION = 1
CURRENT = "current.json"
TEXT_COLUMNS = tuple(name for name in METADATA if name not in ("age", "date"))
BM25 = {"k1": 1.2, "b": 0.75, "method": "lucene"}
"""Of the ranking of words, as in Lucene and SQLite."""
CHUNK = 4096
_WORD = re.compile(r"[^\W_]+")
Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Approximate:
    """An index of a large matrix."""

    index: Any = field(repr=False)
    probes: int


@dataclass(frozen=True)
class Gallery:
    """The vectors of one kind, and which studies they are of."""

    matrix: NDArray[np.float32] = field(repr=False)  # (rows, D), mapped
    starts: NDArray[np.int64] = field(repr=False)  # (N + 1,) study n has members[starts[n]:starts[n + 1]]
    members: NDArray[np.int64] = field(repr=False)  # rows of the matrix, by study
    owners: NDArray[np.int64] = field(repr=False)  # (rows,) the store's number of the report, sentence or image
    approximate: Approximate | None = None

    @cached_property
    def one_each(self) -> bool:
        """Whether row n is of study n, for every study."""
        n = len(self.starts) - 1
        return len(self.matrix) == n and len(self.members) == n and bool((self.members == np.arange(n)).all())

    @cached_property
    def has(self) -> NDArray[np.bool_]:
        """(N,) whether a study has any."""
        return np.asarray(np.diff(self.starts) > 0)

    @cached_property
    def study_of(self) -> NDArray[np.int64] | None:
        """(rows,) the study of each row; None where a row is of several."""
        if len(self.members) != len(self.matrix):
            return None
        found = np.empty(len(self.matrix), np.int64)
        found[self.members] = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        return found


class Derived:
    """The files of one generation, open. What is not asked for is not read."""

    def __init__(self, folder: Path, current: dict[str, Any]) -> None:
        self.folder, self.current = folder, current
        self.generation = int(current["generation"])

    def _array(self, name: str) -> NDArray[Any]:
        return np.load(self.folder / f"{self.current['prefix']}-{name}.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """(N,) the store's number of each study."""
        return np.asarray(self._array("numbers"))

    @cached_property
    def places(self) -> dict[int, int]:
        """The store's number of a study -> its place here."""
        return {int(number): place for place, number in enumerate(self.numbers)}

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """(N,) the first study whose report is the same text; of a study without a report itself."""
        return np.asarray(self._array("groups"))

    @cached_property
    def columns(self) -> Columns:
        """What filters look at."""
        tables = {of: self._array(f"findings-{of}") for of in ("fact", "label")}
        return Columns(
            len(self.numbers),
            {
                name: TextColumn(
                    np.asarray(self._array(f"column-{name}")),
                    json.loads((self.folder / f"{self.current['prefix']}-words-{name}.json").read_text(encoding="utf-8")),
                )
                for name in TEXT_COLUMNS
            },
            np.asarray(self._array("column-age")),
            np.asarray(self._array("column-date")),
            *({name: tables[of][i] for i, name in enumerate(self.findings)} for of in ("fact", "label")),
        )

    @property
    def findings(self) -> tuple[str, ...]:
        """Findings that some study has a fact or a label of."""
        return tuple(self.current["findings"])

    def gallery(self, model: int, kind: VectorKind) -> Gallery:
        """The vectors of a model.

        Raises:
            ArchiveError: the archive has none of it.
        """
        key = f"{model}-{kind}"
        if key not in self._galleries:
            if key not in self.current["galleries"]:
                raise ArchiveError(f"the archive has no {kind} vectors of this model")
            names = ("matrix", "starts", "members", "owners")
            how = self.current["galleries"][key]
            file = self.folder / f"{self.current['prefix']}-{key}-ivf.faiss"
            index = None if how is None or not approximate.available() else Approximate(approximate.load(file), int(how["probes"]))
            matrix, starts, members, owners = (self._array(f"{key}-{name}") for name in names)
            self._galleries[key] = Gallery(matrix, starts, members, owners, index)
        return self._galleries[key]

    def approximate(self, model: int, kind: VectorKind) -> dict[str, Any] | None:
        """Of the approximate index of a kind of vectors: lists, those looked through, and the recall of the first 10 that was measured when
        it was made, by what kind of vectors asked it least well; None where there is none.
        """
        told: dict[str, Any] | None = self.current["galleries"].get(f"{model}-{kind}")
        return told

    def kinds(self, model: int) -> tuple[VectorKind, ...]:
        """Of what the archive has vectors of a model."""
        return tuple(kind for kind in KINDS if f"{model}-{kind}" in self.current["galleries"])

    @cached_property
    def _galleries(self) -> dict[str, Gallery]:
        return {}

    @cached_property
    def words(self) -> Any:
        """The ranking index of the words (bm25s), and None where no study has a report."""
        if not self.current["documents"]:
            return None
        import bm25s

        folder = self.folder / f"{self.current['prefix']}-bm25"
        return bm25s.BM25.load(folder, mmap=True, load_corpus=False, show_progress=False)

    @cached_property
    def document_places(self) -> NDArray[np.int64]:
        """(documents,) the study of each document of :attr:`words`."""
        return np.asarray(self._array("documents"))


def open_derived(store: ArchiveStore, advance: Advance | None = None) -> Derived:
    """What is derived of a store, built if it is missing, damaged or of another generation.

    Args:
        store: the truth; its folder of derived files is made if absent, for its owner alone.
        advance: called with what is being built and how many rows more are done.
    Raises:
        ArchiveError: a place that cannot be written to, or a full disk.
    """
    generation, folder = store.generation(), store.derived
    current = _read(folder)
    if current is None or current["generation"] != generation or current["store"] != store.uid or not _whole(folder, current):
        current = build(store, advance)
    return Derived(folder, current)


def build(store: ArchiveStore, advance: Advance | None = None) -> dict[str, Any]:
    """Make the derived files, put them in place, and take those of other generations away.

    Raises:
        ArchiveError: a place that cannot be written to, or a full disk.
    """
    folder = store.derived
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _build(store, folder, advance or (lambda what, done: None))
    except OSError as error:
        raise ArchiveError(
            f"{folder}: what is derived of the store cannot be written ({error.strerror}); the store itself is whole. Make room or give "
            "the folder back its rights, and ask again"
        ) from error


def _build(store: ArchiveStore, folder: Path, advance: Advance) -> dict[str, Any]:
    generation = store.generation()
    rows = list(store.rows())
    prefix = f"g{generation}-{os.urandom(4).hex()}"
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    try:
        made = _Files(work, prefix)
        place = {row.id: i for i, row in enumerate(rows)}
        made.array("numbers", np.array([row.id for row in rows], np.int64))
        first: dict[bytes, int] = {}
        made.array(
            "groups",
            np.array([i if d is None else first.setdefault(d, i) for i, d in enumerate(row.text_digest for row in rows)], np.int64),
        )
        for column, name in enumerate(METADATA):
            values = [row.metadata[column] for row in rows]
            if name == "age":
                made.array("column-age", np.array([np.nan if value is None else value for value in values], np.float64))
            elif name == "date":
                made.array("column-date", np.array([day_number(None if value is None else str(value)) for value in values], np.int32))
            else:
                coded = TextColumn.encode(None if value is None else str(value) for value in values)
                made.array(f"column-{name}", coded.codes)
                made.text(f"words-{name}.json", json.dumps(coded.vocabulary))
        findings = _findings(store, made, place)
        galleries: dict[str, dict[str, Any] | None] = {}
        for number, key in store.models().items():
            matrices = {kind: _gallery(store, made, place, number, kind, key.width, advance) for kind in KINDS}
            there = {kind: matrix for kind, matrix in matrices.items() if matrix is not None}
            for kind, matrix in there.items():
                asking: dict[str, NDArray[np.float32]] = {other: one for other, one in there.items() if other != kind}
                galleries[f"{number}-{kind}"] = _approximate(matrix, asking, made, f"{number}-{kind}", advance)
        documents = _documents(store, made, place, advance)
        current = {
            "version": VERSION,
            "store": store.uid,
            "generation": generation,
            "prefix": prefix,
            "findings": findings,
            "galleries": galleries,
            "documents": documents,
            "files": {str(path.relative_to(work)): path.stat().st_size for path in sorted(work.rglob("*")) if path.is_file()},
        }
        if store.generation() != generation:  # somebody wrote meanwhile: the parts may be of different states
            return _build(store, folder, advance)
        for path in sorted(work.rglob("*")):
            if path.is_file():
                _flush(path)
        for path in list(work.iterdir()):
            path.rename(folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_atomically(folder / CURRENT, json.dumps(current).encode())
    _sweep(folder, prefix)
    return current


class _Files:
    """Where the files of a build go."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix

    def path(self, name: str) -> Path:
        return self.folder / f"{self.prefix}-{name}"

    def array(self, name: str, values: NDArray[Any]) -> None:
        np.save(self.path(f"{name}.npy"), values, allow_pickle=False)

    def mapped(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.lib.format.open_memmap(self.path(f"{name}.npy"), mode="w+", dtype=dtype, shape=shape)

    def text(self, name: str, content: str) -> None:
        self.path(name).write_text(content, encoding="utf-8")


def _findings(store: ArchiveStore, made: _Files, place: dict[int, int]) -> list[str]:
    """Facts and labels as (F, N) int8, a row a finding, so that one finding is read at once."""
    found = list(store.findings())
    names = sorted({name for _, name, _, _ in found})
    row = {name: i for i, name in enumerate(names)}
    tables = {of: np.full((len(names), len(place)), NOT_MENTIONED, np.int8) for of in ("fact", "label")}
    for study, name, *values in found:
        for of, value in zip(("fact", "label"), values, strict=True):
            if value is not None:
                tables[of][row[name], place[study]] = value
    for of, table in tables.items():
        made.array(f"findings-{of}", table)
    return names


def _approximate(
    matrix: NDArray[np.float32], asking: Mapping[str, NDArray[np.float32]], made: _Files, key: str, advance: Advance
) -> dict[str, Any] | None:
    """An index for approximate search beside a large matrix, where faiss is installed; how it is searched."""
    if len(matrix) < approximate.ROWS or not approximate.available():
        return None
    return approximate.build(matrix, asking, made.path(f"{key}-ivf.faiss"), lambda rows: advance("approximate index", rows))


def _gallery(
    store: ArchiveStore, made: _Files, place: dict[int, int], model: int, kind: VectorKind, width: int, advance: Advance
) -> NDArray[np.float32] | None:
    """The matrix of a kind of vectors, and its studies; None where there is none. Rows lie in the order of the studies."""
    pairs = np.array([(place[study], owner) for study, owner in store.owners(kind)], np.int64).reshape(-1, 2)
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    known = np.array([owner for owner, _ in store.vectors(model, kind)], np.int64) if len(pairs) else np.zeros(0, np.int64)
    if not len(known):
        return None
    pairs = pairs[np.isin(pairs[:, 1], known)]
    owners, first = np.unique(pairs[:, 1], return_index=True)
    owners = owners[np.argsort(first)]  # by the first study that has it
    order = np.argsort(owners)  # rows by rising owner
    matrix = made.mapped(f"{model}-{kind}-matrix", (len(owners), width), np.float32)
    sorted_owners = owners[order]
    for batch in _in_chunks(store.vectors(model, kind)):
        numbers = np.array([owner for owner, _ in batch], np.int64)
        at = np.searchsorted(sorted_owners, numbers)
        inside = (at < len(sorted_owners)) & (sorted_owners[np.minimum(at, len(sorted_owners) - 1)] == numbers)
        values = np.frombuffer(b"".join(vector for _, vector in batch), "<f4").reshape(len(batch), width)
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        matrix[order[at[inside]]] = (values / np.maximum(lengths, 1e-12))[inside]
        advance(f"{kind} vectors", len(batch))
    matrix.flush()  # type: ignore[attr-defined]
    members = order[np.searchsorted(sorted_owners, pairs[:, 1])]
    starts = np.zeros(len(place) + 1, np.int64)
    np.cumsum(np.bincount(pairs[:, 0], minlength=len(place)), out=starts[1:])
    made.array(f"{model}-{kind}-starts", starts)
    made.array(f"{model}-{kind}-members", members)
    made.array(f"{model}-{kind}-owners", owners)
    return matrix


def _documents(store: ArchiveStore, made: _Files, place: dict[int, int], advance: Advance) -> int:
    """The ranking index of the words; how many reports it has."""
    places: list[int] = []
    ids: list[list[int]] = []
    vocabulary: dict[str, int] = {}
    for study, text in store.documents():
        places.append(place[study])
        ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)])
        advance("words", 1)
    if not any(ids):
        return 0
    import bm25s

    order = np.argsort(places, kind="stable")
    index = bm25s.BM25(k1=BM25["k1"], b=BM25["b"], method=BM25["method"])
    index.index(bm25s.tokenization.Tokenized([ids[i] for i in order], vocabulary), create_empty_token=False, show_progress=False)
    index.save(made.path("bm25"), show_progress=False)
    made.array("documents", np.array(places, np.int64)[order])
    return len(places)


def words_of(text: str) -> list[str]:
    """The words that are ranked: runs of letters and digits, case and accents aside, reduced to their stems (Snowball, English)."""
    plain = text.casefold()
    if not plain.isascii():
        plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
    stems: list[str] = _stemmer().stemWords(_WORD.findall(plain))
    return stems


@cache
def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


def still_current(derived: Derived) -> bool:
    """Whether no other build has taken the place of this one."""
    current = _read(derived.folder)
    return current is not None and current["prefix"] == derived.current["prefix"]


def _in_chunks(vectors: Iterator[tuple[int, bytes]]) -> Iterator[Sequence[tuple[int, bytes]]]:
    batch: list[tuple[int, bytes]] = []
    for one in vectors:
        batch.append(one)
        if len(batch) == CHUNK:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        current = json.loads((folder / CURRENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return current if isinstance(current, dict) and current.get("version") == VERSION else None


def _whole(folder: Path, current: dict[str, Any]) -> bool:
    """Whether each file is there in its length."""
    try:
        return all((folder / name).stat().st_size == size for name, size in current["files"].items())
    except OSError:
        return False


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sweep(folder: Path, prefix: str) -> None:
    """Take away what is of another build. A process that has it open keeps what it has."""
    for path in folder.iterdir():
        if path.name == CURRENT or path.name.startswith(prefix):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
