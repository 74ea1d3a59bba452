"""What stores in SQL databases share: the tables, and everything that is said in words that SQLite and PostgreSQL both understand.

Statements have ``?`` for values; which sign a database wants is its store's matter. Names of columns are put together, values never.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np

from medvl.types import Fact
from tasks.archive.records import SEARCHED, SECTIONS, ArchivedStudy, ModelKey, StudyVectors
from tasks.archive.store import (
    KINDS,
    METADATA,
    ArchiveError,
    ArchiveStore,
    Counts,
    FoundStudy,
    Kept,
    Removed,
    StudyRow,
    VectorKind,
    checked_vector,
)

PART = 500
"""Values of one ``IN (...)``; SQLite takes 999 at least."""
FACT = tuple(one.name for one in fields(Fact))
OWNER = {"report": "study", "sentence": "text", "image": "image"}
TRACED = {"studies": ("study_id", "patient_id", "source"), "images": ("path",), "texts": ("text",), "reports": SECTIONS}
"""Tables and columns that hold what a study may be known by."""


def schema(*, key: str, blob: str, vector: str, number: str) -> tuple[str, ...]:
    """The statements that make the tables.

    Args:
        key: type of a number that is given by the database.
        blob: type of bytes.
        vector: type of a vector.
        number: type of a float64.
    """

    def vectors(kind: str, owner: str, table: str) -> str:
        return (
            f"CREATE TABLE {kind}_vectors ({owner} INTEGER NOT NULL REFERENCES {table} ON DELETE CASCADE, "
            f"model INTEGER NOT NULL REFERENCES models, vector {vector} NOT NULL, PRIMARY KEY ({owner}, model))"
        )

    return (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
        f"CREATE TABLE models (id {key}, weights_sha256 TEXT NOT NULL, preprocessing_sha256 TEXT NOT NULL, width INTEGER NOT NULL, "
        "UNIQUE (weights_sha256, preprocessing_sha256))",
        f"CREATE TABLE studies (id {key}, study_id TEXT NOT NULL UNIQUE, patient_id TEXT NOT NULL, modality TEXT NOT NULL, view TEXT, "
        f"split TEXT, date TEXT, sex TEXT, age {number}, source TEXT NOT NULL, digest {blob} NOT NULL, text_digest {blob})",
        "CREATE INDEX studies_of_patient ON studies (patient_id)",
        "CREATE TABLE reports (study INTEGER PRIMARY KEY REFERENCES studies ON DELETE CASCADE, "
        f"{', '.join(f'{name} TEXT NOT NULL' for name in SECTIONS)})",
        f"CREATE TABLE images (id {key}, study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, place INTEGER NOT NULL, "
        "path TEXT NOT NULL, view TEXT, UNIQUE (study, place))",
        f"CREATE TABLE texts (id {key}, digest {blob} NOT NULL UNIQUE, text TEXT)",
        "CREATE TABLE sentences (study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, place INTEGER NOT NULL, "
        "text INTEGER NOT NULL REFERENCES texts, PRIMARY KEY (study, place))",
        "CREATE INDEX studies_of_text ON sentences (text)",
        "CREATE TABLE facts (text INTEGER NOT NULL REFERENCES texts ON DELETE CASCADE, place INTEGER NOT NULL, "
        f"{', '.join(f'{name} {number}' if name == 'size_mm' else f'{name} TEXT' for name in FACT)}, PRIMARY KEY (text, place))",
        "CREATE TABLE study_findings (study_id TEXT NOT NULL REFERENCES studies (study_id) ON DELETE CASCADE, finding TEXT NOT NULL, "
        "fact INTEGER, label INTEGER, PRIMARY KEY (study_id, finding))",
        vectors("report", "study", "studies"),
        vectors("sentence", "text", "texts"),
        vectors("image", "image", "images"),
        "CREATE TABLE embedded (study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, model INTEGER NOT NULL REFERENCES models, "
        "PRIMARY KEY (study, model))",
    )


class SqlStore(ArchiveStore):
    """Base of the stores in SQL."""

    place_of: ClassVar[str]
    """The function that says where a text holds another."""

    @abc.abstractmethod
    def _rows(self, statement: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """What a statement gives, row by row."""

    @abc.abstractmethod
    def _run(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Do what a statement says."""

    @abc.abstractmethod
    def _run_each(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        """Do what a statement says for each of many values."""

    @abc.abstractmethod
    def _transaction(self) -> AbstractContextManager[None]:
        """All of it or nothing; on the disk when it ends."""

    @abc.abstractmethod
    def _explained(self) -> AbstractContextManager[None]:
        """Errors of the database as :class:`ArchiveError`."""

    def _vector(self, values: bytes) -> Any:
        """A vector of float32 as the database takes it."""
        return values

    def _bytes(self, value: Any) -> bytes:
        """A vector that the database gave, as float32."""
        return bytes(value)

    def _after_removal(self) -> None:
        """Overwrite what is left of what was deleted."""

    def _order(self, column: str) -> str:
        """How texts are ordered: as bytes of UTF-8."""
        return column

    def _first(self, statement: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        with contextlib.closing(self._rows(statement, values)) as rows:  # type: ignore[type-var]
            return next(rows, None)

    def _one(self, statement: str, values: Sequence[Any] = ()) -> Any:
        found = self._first(statement, values)
        if found is None:
            raise ArchiveError(f"{self.name}: a row is missing that every store has; restore a copy, or build it anew")
        return found[0]

    def _inserted(self, statement: str, values: Sequence[Any]) -> int:
        return int(self._one(f"{statement} RETURNING id", values))

    def _changed(self) -> None:
        self._run("UPDATE meta SET value = CAST(CAST(value AS INTEGER) + 1 AS TEXT) WHERE key = 'generation'")

    def generation(self) -> int:
        """One more after each change."""
        with self._explained():
            return int(self._one("SELECT value FROM meta WHERE key = 'generation'"))

    def models(self) -> dict[int, ModelKey]:
        """The models it has vectors of."""
        with self._explained():
            found = self._rows("SELECT id, weights_sha256, preprocessing_sha256, width FROM models ORDER BY id")
            return {row[0]: ModelKey(*row[1:]) for row in found}

    def model(self, key: ModelKey) -> int:
        """The number of a model, entered if it is new."""
        for number, known in self.models().items():
            if known == key:
                return number
        with self._explained(), self._transaction():
            values = (key.weights_sha256, key.preprocessing_sha256, key.width)
            return self._inserted("INSERT INTO models (weights_sha256, preprocessing_sha256, width) VALUES (?, ?, ?)", values)

    def kept(self, study_ids: Collection[str]) -> dict[str, Kept]:
        """What there is of these studies."""
        found: dict[str, tuple[bytes, set[int]]] = {}
        with self._explained():
            for part in parts(study_ids):
                asked = f"SELECT study_id, digest, model FROM studies LEFT JOIN embedded ON study = id WHERE study_id IN ({marks(part)})"
                for name, digest, model in self._rows(asked, part):
                    models = found.setdefault(name, (bytes(digest), set()))[1]
                    models |= set() if model is None else {model}
        return {name: Kept(digest, frozenset(models)) for name, (digest, models) in found.items()}

    def write(self, batch: Sequence[tuple[ArchivedStudy, StudyVectors]], model: int) -> None:
        """Studies and their vectors in one transaction; a study that was there is replaced if it changed.

        Raises:
            ArchiveError: a vector of another width or with NaN, a full or read-only disk; nothing of the batch is there then.
        """
        width = self.models()[model].width
        with self._explained(), self._transaction():
            for study, vectors in batch:
                self._write_study(study, vectors, model, width)
            self._changed()

    def _write_study(self, study: ArchivedStudy, vectors: StudyVectors, model: int, width: int) -> None:
        digest = study.digest()
        there = self._first("SELECT id, digest FROM studies WHERE study_id = ?", (study.study_id,))
        if there is not None and bytes(there[1]) != digest:
            self._delete([there[0]])
            there = None
        number = self._insert(study, digest) if there is None else int(there[0])
        self._run("INSERT INTO embedded VALUES (?, ?) ON CONFLICT DO NOTHING", (number, model))
        texts = [row[0] for row in self._rows("SELECT text FROM sentences WHERE study = ? ORDER BY place", (number,))]
        images = [row[0] for row in self._rows("SELECT id FROM images WHERE study = ? ORDER BY place", (number,))]
        given = {
            "report": ([number], None if vectors.report is None else vectors.report[None]),
            "sentence": (texts, vectors.sentences),
            "image": (images, vectors.images),
        }
        for kind, (owners, rows) in given.items():
            if rows is None:
                continue
            if len(rows) != len(owners):
                raise ArchiveError(f"study {study.study_id}: {len(rows)} {kind} vectors, expected {len(owners)}")
            values = [
                (owner, model, self._vector(checked_vector(row, width, f"study {study.study_id}")))
                for owner, row in zip(owners, rows, strict=True)
                if row is not None
            ]
            self._run_each(
                f"INSERT INTO {kind}_vectors ({OWNER[kind]}, model, vector) VALUES (?, ?, ?) "
                f"ON CONFLICT ({OWNER[kind]}, model) DO UPDATE SET vector = excluded.vector",
                values,
            )

    def _insert(self, study: ArchivedStudy, digest: bytes) -> int:
        columns = (*METADATA, "digest", "text_digest")
        values = (*(getattr(study, name) for name in METADATA), digest, study.text_digest() if self.with_text else None)
        number = self._inserted(f"INSERT INTO studies ({', '.join(columns)}) VALUES ({marks(columns)})", values)
        if self.with_text and any(study.sections.values()):
            text = [study.sections.get(name, "") for name in SECTIONS]
            self._run(f"INSERT INTO reports VALUES (?, {marks(SECTIONS)})", (number, *text))
        images = [(number, i, image.path, image.view) for i, image in enumerate(study.images)]
        self._run_each("INSERT INTO images (study, place, path, view) VALUES (?, ?, ?, ?)", images)
        sentences = [(number, place, self._text(one.text, one.facts)) for place, one in enumerate(study.sentences)]
        self._run_each("INSERT INTO sentences VALUES (?, ?, ?)", sentences)
        said = study.findings if self.with_text else {}
        named = sorted({*said, *study.labels})
        findings = [(study.study_id, name, said.get(name), study.labels.get(name)) for name in named]
        self._run_each("INSERT INTO study_findings VALUES (?, ?, ?, ?)", findings)
        return number

    def _text(self, text: str, facts: Sequence[Fact]) -> int:
        """The number of a sentence. It is told by a keyed hash, so that where words are not kept none is found by guessing alone."""
        key = bytes.fromhex(self._one("SELECT value FROM meta WHERE key = 'salt'"))
        digest = hashlib.blake2b(text.encode(), key=key, digest_size=32).digest()
        there = self._first("SELECT id FROM texts WHERE digest = ?", (digest,))
        if there is not None:
            return int(there[0])
        number = self._inserted("INSERT INTO texts (digest, text) VALUES (?, ?)", (digest, text if self.with_text else None))
        if self.with_text:
            rows = [(number, i, *(getattr(fact, name) for name in FACT)) for i, fact in enumerate(facts)]
            self._run_each(f"INSERT INTO facts VALUES (?, ?, {marks(FACT)})", rows)
        return number

    def remove(self, *, study_ids: Collection[str] = (), patient_ids: Collection[str] = ()) -> Removed:
        """Take studies out, with every trace of them in the store.

        Raises:
            ArchiveError: a store that cannot be written to.
        """
        with self._explained():
            with self._transaction():
                found: dict[int, tuple[str, str]] = {}
                for column, values in (("study_id", study_ids), ("patient_id", patient_ids)):
                    for part in parts(values):
                        rows = self._rows(f"SELECT id, study_id, patient_id FROM studies WHERE {column} IN ({marks(part)})", part)
                        found |= {row[0]: (row[1], row[2]) for row in rows}
                before = self._words_of(found) | {name for names in found.values() for name in names}
                self._delete(list(found))
                traces = before - self._still_there(before)
                if found:
                    self._changed()
            if found:
                self._after_removal()
        return Removed(tuple(sorted(study for study, _ in found.values())), tuple(sorted(traces)))

    def _words_of(self, ids: Collection[int]) -> set[str]:
        """Paths and sentences of studies."""
        found: set[str] = set()
        for part in parts(ids):
            found |= {row[0] for row in self._rows(f"SELECT path FROM images WHERE study IN ({marks(part)})", part)}
            asked = f"SELECT texts.text FROM sentences JOIN texts ON texts.id = sentences.text WHERE study IN ({marks(part)})"
            found |= {row[0] for row in self._rows(asked, part) if row[0]}
        return found

    def _still_there(self, words: Collection[str]) -> set[str]:
        """Those that another study has too, be it as a part of something longer: "p3" of "p30"."""
        found: set[str] = set()
        for word in words:
            for table, names in TRACED.items():
                inside = " OR ".join(f"{self.place_of}({name}, ?) > 0" for name in names)
                if self._first(f"SELECT 1 FROM {table} WHERE {inside} LIMIT 1", (word,) * len(names)):
                    found.add(word)
                    break
        return found

    def _delete(self, ids: Sequence[int]) -> None:
        for part in parts(ids):
            texts = [row[0] for row in self._rows(f"SELECT DISTINCT text FROM sentences WHERE study IN ({marks(part)})", part)]
            self._run(f"DELETE FROM studies WHERE id IN ({marks(part)})", part)
            alone = "DELETE FROM texts WHERE id = ? AND NOT EXISTS (SELECT 1 FROM sentences WHERE sentences.text = texts.id)"
            self._run_each(alone, [(text,) for text in texts])

    def counts(self) -> Counts:
        """How much it holds."""
        with self._explained():
            number = {name: int(self._one(f"SELECT count(*) FROM {name}")) for name in ("studies", "reports", "texts", "images")}
            patients = int(self._one("SELECT count(DISTINCT patient_id) FROM studies"))
            vectors: dict[int, dict[VectorKind, int]] = {model: dict.fromkeys(KINDS, 0) for model in self.models()}
            for kind in KINDS:
                for model, count in self._rows(f"SELECT model, count(*) FROM {kind}_vectors GROUP BY model"):
                    vectors[model][kind] = count
        return Counts(number["studies"], patients, number["reports"], number["texts"], number["images"], vectors)

    def rows(self) -> Iterator[StudyRow]:
        """All studies by rising ``study_id``."""
        with self._explained():
            asked = f"SELECT id, text_digest, {', '.join(METADATA)} FROM studies ORDER BY {self._order('study_id')}"
            for row in self._rows(asked):
                yield StudyRow(row[0], row[2:], None if row[1] is None else bytes(row[1]))

    def findings(self) -> Iterator[tuple[int, str, int | None, int | None]]:
        """(study, finding, what its report says, its label) of all studies."""
        with self._explained():
            yield from self._rows("SELECT id, finding, fact, label FROM study_findings JOIN studies USING (study_id)")

    def vectors(self, model: int, kind: VectorKind) -> Iterator[tuple[int, bytes]]:
        """(owner, vector) by rising owner."""
        owner = OWNER[kind]
        with self._explained():
            for number, vector in self._rows(f"SELECT {owner}, vector FROM {kind}_vectors WHERE model = ? ORDER BY {owner}", (model,)):
                yield number, self._bytes(vector)

    def owners(self, kind: VectorKind) -> Iterator[tuple[int, int]]:
        """(study, owner) of each, in their order in the study."""
        asked = {
            "report": "SELECT id, id FROM studies",
            "sentence": "SELECT study, text FROM sentences ORDER BY study, place",
            "image": "SELECT study, id FROM images ORDER BY study, place",
        }
        with self._explained():
            yield from self._rows(asked[kind])

    def documents(self) -> Iterator[tuple[int, str]]:
        """(study, the words of its report that are ranked)."""
        with self._explained():
            for number, *text in self._rows(f"SELECT study, {', '.join(SEARCHED)} FROM reports ORDER BY study"):
                yield number, "\n".join(part for part in text if part)

    def found(self, ids: Sequence[int]) -> list[FoundStudy]:
        """Studies by their numbers, in the order given."""
        return [self._found(number) for number in ids]

    def _found(self, number: int) -> FoundStudy:
        with self._explained():
            row = self._first(f"SELECT {', '.join(METADATA)} FROM studies WHERE id = ?", (number,))
            if row is None:
                raise ArchiveError(f"{self.name}: study number {number} was removed meanwhile; ask again")
            report = self._first(f"SELECT {', '.join(SECTIONS)} FROM reports WHERE study = ?", (number,))
            asked = "SELECT texts.id, texts.text FROM sentences JOIN texts ON texts.id = sentences.text WHERE study = ? ORDER BY place"
            sentences = list(self._rows(asked, (number,)))
            values = list(self._rows("SELECT finding, fact, label FROM study_findings WHERE study_id = ?", (row[0],)))
            images = list(self._rows("SELECT path, view FROM images WHERE study = ? ORDER BY place", (number,)))
        return FoundStudy(
            row[0],
            row[1],
            dict(zip(METADATA, row, strict=True)),
            {} if report is None else {name: part for name, part in zip(SECTIONS, report, strict=True) if part},
            tuple((text, words) for text, words in sentences),
            {name: fact for name, fact, _ in values if fact is not None},
            {name: label for name, _, label in values if label is not None},
            tuple((path, view) for path, view in images),
        )

    def ids(self, numbers: Sequence[int]) -> list[str]:
        """The ids of studies, in the order given."""
        known: dict[int, str] = {}
        with self._explained():
            for part in parts(numbers):
                known |= {row[0]: row[1] for row in self._rows(f"SELECT id, study_id FROM studies WHERE id IN ({marks(part)})", part)}
        return [known[number] for number in numbers if number in known]

    def number(self, study_id: str) -> int | None:
        """The number of a study; None if it is not there."""
        with self._explained():
            found = self._first("SELECT id FROM studies WHERE study_id = ?", (study_id,))
        return None if found is None else int(found[0])

    def patients_of(self, paths: Collection[str]) -> dict[str, frozenset[str]]:
        """The patients of the studies that have an image at a path."""
        found: dict[str, set[str]] = {}
        with self._explained():
            for part in parts(paths):
                asked = f"SELECT path, patient_id FROM images JOIN studies ON studies.id = study WHERE path IN ({marks(part)})"
                for path, patient in self._rows(asked, part):
                    found.setdefault(path, set()).add(patient)
        return {path: frozenset(patients) for path, patients in found.items()}

    def facts(self, texts: Collection[int]) -> dict[int, tuple[Fact, ...]]:
        """What sentences state."""
        found: dict[int, list[Fact]] = {text: [] for text in texts}
        with self._explained():
            for part in parts(texts):
                asked = f"SELECT text, {', '.join(FACT)} FROM facts WHERE text IN ({marks(part)}) ORDER BY text, place"
                for text, *values in self._rows(asked, part):
                    found[text].append(Fact(*values))
        return {text: tuple(facts) for text, facts in found.items()}

    def verify(self) -> list[str]:
        """What is wrong with the store, in words."""
        problems: list[str] = []
        with self._explained():
            if alone := self._one("SELECT count(*) FROM texts WHERE id NOT IN (SELECT text FROM sentences)"):
                problems.append(f"sentences: {alone} belong to no study")
            for number, key in self.models().items():
                for kind in KINDS:
                    bad = sum(
                        len(vector) != 4 * key.width or not np.isfinite(np.frombuffer(vector, "<f4")).all()
                        for _, vector in self.vectors(number, kind)
                    )
                    if bad:
                        problems.append(f"vectors: {bad} of the {kind} vectors of model {number} are damaged")
                missing = self._one(
                    "SELECT count(*) FROM embedded JOIN sentences USING (study) WHERE embedded.model = ? AND NOT EXISTS "
                    "(SELECT 1 FROM sentence_vectors v WHERE v.text = sentences.text AND v.model = embedded.model)",
                    (number,),
                )
                if missing:
                    problems.append(f"vectors: {missing} sentences of studies that model {number} has seen have none")
        return problems


def marks(values: Collection[Any]) -> str:
    """As many placeholders as values."""
    return ", ".join("?" * len(values))


def parts(values: Collection[Any]) -> Iterator[list[Any]]:
    """Values in lists that one statement takes."""
    given = list(values)
    for start in range(0, len(given), PART):
        yield given[start : start + PART]
