"""The archive in one SQLite file (WAL): the embedded store.

Transactions are flushed to disk before they are acknowledged (``synchronous=FULL``); what is deleted is overwritten (``secure_delete``), in
the full-text index too once it is merged. The file is made readable and writable by its owner alone, and SQLite gives the files beside it
(``-wal``, ``-shm``) the same rights.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from medvl.types import Fact
from tasks.archive.records import SEARCHED, SECTIONS, ArchivedStudy, ModelKey, StudyVectors
from tasks.archive.store import (
    FORMAT,
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

APPLICATION_ID = 0x6D76_6C61
"""SQLite's mark of whose file it is: "mvla"."""
TIMEOUT_S = 60.0
PART = 500
"""Values of one ``IN (...)``; SQLite takes 999 at least."""
FACT = tuple(one.name for one in fields(Fact))
OWNER = {"report": "study", "sentence": "text", "image": "image"}
SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE models (
    id INTEGER PRIMARY KEY, weights_sha256 TEXT NOT NULL, preprocessing_sha256 TEXT NOT NULL, width INTEGER NOT NULL,
    UNIQUE (weights_sha256, preprocessing_sha256));
CREATE TABLE studies (
    id INTEGER PRIMARY KEY, study_id TEXT NOT NULL UNIQUE, patient_id TEXT NOT NULL, modality TEXT NOT NULL, view TEXT, split TEXT,
    date TEXT, sex TEXT, age REAL, source TEXT NOT NULL, digest BLOB NOT NULL, text_digest BLOB);
CREATE INDEX studies_of_patient ON studies (patient_id);
CREATE TABLE reports (
    study INTEGER PRIMARY KEY REFERENCES studies ON DELETE CASCADE, {", ".join(f"{name} TEXT NOT NULL" for name in SECTIONS)});
CREATE VIRTUAL TABLE words USING fts5 (
    {", ".join(SECTIONS)}, content='reports', content_rowid='study', tokenize='unicode61 remove_diacritics 2');
CREATE TRIGGER reports_in AFTER INSERT ON reports BEGIN
    INSERT INTO words (rowid, {", ".join(SECTIONS)}) VALUES (new.study, {", ".join(f"new.{name}" for name in SECTIONS)}); END;
CREATE TRIGGER reports_out AFTER DELETE ON reports BEGIN
    INSERT INTO words (words, rowid, {", ".join(SECTIONS)})
    VALUES ('delete', old.study, {", ".join(f"old.{name}" for name in SECTIONS)}); END;
CREATE TABLE images (
    id INTEGER PRIMARY KEY, study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, place INTEGER NOT NULL, path TEXT NOT NULL,
    view TEXT, UNIQUE (study, place));
CREATE TABLE texts (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, text TEXT);
CREATE TABLE sentences (
    study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, place INTEGER NOT NULL, text INTEGER NOT NULL REFERENCES texts,
    PRIMARY KEY (study, place)) WITHOUT ROWID;
CREATE INDEX studies_of_text ON sentences (text);
CREATE TABLE facts (
    text INTEGER NOT NULL REFERENCES texts ON DELETE CASCADE, place INTEGER NOT NULL,
    {", ".join(f"{name} {'REAL' if name == 'size_mm' else 'TEXT'}" for name in FACT)}, PRIMARY KEY (text, place)) WITHOUT ROWID;
CREATE TABLE study_findings (
    study_id TEXT NOT NULL REFERENCES studies (study_id) ON DELETE CASCADE, finding TEXT NOT NULL, fact INTEGER, label INTEGER,
    PRIMARY KEY (study_id, finding)) WITHOUT ROWID;
CREATE TABLE report_vectors (
    study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, model INTEGER NOT NULL REFERENCES models, vector BLOB NOT NULL,
    UNIQUE (study, model));
CREATE TABLE sentence_vectors (
    text INTEGER NOT NULL REFERENCES texts ON DELETE CASCADE, model INTEGER NOT NULL REFERENCES models, vector BLOB NOT NULL,
    UNIQUE (text, model));
CREATE TABLE image_vectors (
    image INTEGER NOT NULL REFERENCES images ON DELETE CASCADE, model INTEGER NOT NULL REFERENCES models, vector BLOB NOT NULL,
    UNIQUE (image, model));
CREATE TABLE embedded (
    study INTEGER NOT NULL REFERENCES studies ON DELETE CASCADE, model INTEGER NOT NULL REFERENCES models, PRIMARY KEY (study, model))
    WITHOUT ROWID;
"""


class SqliteStore(ArchiveStore):
    """A store in one file.

    Args:
        path: of the file.
        create: make it if it is not there; False: it must be.
        with_text: of a store that is made: keep the words of reports, sentences and what they state. A store that is there keeps its own.
    Raises:
        ArchiveError: no such file, no store, one of another format, or a place that cannot be written to.
    """

    def __init__(self, path: Path, *, create: bool = False, with_text: bool = True) -> None:
        self.path = Path(path)
        fresh = not self.path.exists()
        if fresh and not create:
            raise ArchiveError(f"{path}: no such store; `medvl index build` makes one")
        if self.path.is_dir():
            raise ArchiveError(f"{path}: is a folder, expected the file of a store")
        if fresh:
            try:
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            except OSError as error:
                raise ArchiveError(f"{path}: cannot be made: {error.strerror}") from error
        try:
            self._open(with_text)
        except BaseException:
            if fresh:
                for name in (self.path, *beside(self.path)):
                    name.unlink(missing_ok=True)
            raise

    def _open(self, with_text: bool) -> None:
        self.read_only = not (os.access(self.path, os.W_OK) and os.access(self.path.absolute().parent, os.W_OK))
        uri = self.path.absolute().as_uri() + ("?mode=rw" if not self.read_only else "?mode=ro&immutable=1")
        with self._explained():
            self._db = sqlite3.connect(uri, uri=True, timeout=TIMEOUT_S, isolation_level=None, check_same_thread=False)
            if not self.read_only:
                self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA secure_delete = ON;")
            if self._one("PRAGMA user_version") == 0 and self._one("SELECT count(*) FROM sqlite_master") == 0:
                self._make(with_text)
            if self._one("PRAGMA application_id") != APPLICATION_ID:
                raise ArchiveError(f"{self.path}: an SQLite file of something else, expected a store of `medvl index build`")
            if (found := self._one("PRAGMA user_version")) != FORMAT:
                raise ArchiveError(f"{self.path}: a store of format {found}, this version reads {FORMAT}; build it anew")
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
        self.uid, self.with_text = meta["uid"], meta["with_text"] == "1"

    def _make(self, with_text: bool) -> None:
        with self._transaction():
            if self._one("SELECT count(*) FROM sqlite_master"):  # another process was faster
                return
            for statement in statements(SCHEMA):
                self._db.execute(statement)
            values = {"uid": uuid.uuid4().hex, "salt": os.urandom(16).hex(), "with_text": str(int(with_text)), "generation": "0"}
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def close(self) -> None:
        """Let go of the file; the last to do so puts all of it in one file."""
        self._db.close()

    def generation(self) -> int:
        """One more after each change."""
        with self._explained():
            return int(self._one("SELECT value FROM meta WHERE key = 'generation'"))

    def models(self) -> dict[int, ModelKey]:
        """The models it has vectors of."""
        with self._explained():
            found = self._db.execute("SELECT id, weights_sha256, preprocessing_sha256, width FROM models ORDER BY id")
            return {row[0]: ModelKey(*row[1:]) for row in found}

    def model(self, key: ModelKey) -> int:
        """The number of a model, entered if it is new."""
        for number, known in self.models().items():
            if known == key:
                return number
        with self._explained(), self._transaction():
            values = (key.weights_sha256, key.preprocessing_sha256, key.width)
            made = self._db.execute("INSERT INTO models (weights_sha256, preprocessing_sha256, width) VALUES (?, ?, ?)", values)
            return int(made.lastrowid or 0)

    def kept(self, study_ids: Collection[str]) -> dict[str, Kept]:
        """What there is of these studies."""
        found: dict[str, Kept] = {}
        with self._explained():
            for part in parts(study_ids):
                rows = self._db.execute(
                    "SELECT study_id, digest, group_concat(model) FROM studies LEFT JOIN embedded ON study = id "
                    f"WHERE study_id IN ({marks(part)}) GROUP BY id",
                    part,
                )
                for name, digest, models in rows:
                    found[name] = Kept(digest, frozenset(map(int, models.split(","))) if models else frozenset())
        return found

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
        there = self._db.execute("SELECT id, digest FROM studies WHERE study_id = ?", (study.study_id,)).fetchone()
        if there is not None and there[1] != digest:
            self._delete([there[0]])
            there = None
        number = self._insert(study, digest) if there is None else int(there[0])
        self._db.execute("INSERT OR IGNORE INTO embedded VALUES (?, ?)", (number, model))
        texts = [row[0] for row in self._db.execute("SELECT text FROM sentences WHERE study = ? ORDER BY place", (number,))]
        images = [row[0] for row in self._db.execute("SELECT id FROM images WHERE study = ? ORDER BY place", (number,))]
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
                (owner, model, checked_vector(row, width, f"study {study.study_id}"))
                for owner, row in zip(owners, rows, strict=True)
                if row is not None
            ]
            self._db.executemany(f"INSERT OR REPLACE INTO {kind}_vectors ({OWNER[kind]}, model, vector) VALUES (?, ?, ?)", values)

    def _insert(self, study: ArchivedStudy, digest: bytes) -> int:
        columns = (*METADATA, "digest", "text_digest")
        values = (*(getattr(study, name) for name in METADATA), digest, study.text_digest() if self.with_text else None)
        made = self._db.execute(f"INSERT INTO studies ({', '.join(columns)}) VALUES ({marks(columns)})", values)
        number = int(made.lastrowid or 0)
        if self.with_text and any(study.sections.values()):
            text = [study.sections.get(name, "") for name in SECTIONS]
            self._db.execute(f"INSERT INTO reports VALUES (?, {marks(SECTIONS)})", (number, *text))
        self._db.executemany(
            "INSERT INTO images (study, place, path, view) VALUES (?, ?, ?, ?)",
            [(number, i, image.path, image.view) for i, image in enumerate(study.images)],
        )
        for place, sentence in enumerate(study.sentences):
            text_id = self._text(sentence.text, sentence.facts)
            self._db.execute("INSERT INTO sentences VALUES (?, ?, ?)", (number, place, text_id))
        said = study.findings if self.with_text else {}
        named = sorted({*said, *study.labels})
        self._db.executemany(
            "INSERT INTO study_findings VALUES (?, ?, ?, ?)",
            [(study.study_id, name, said.get(name), study.labels.get(name)) for name in named],
        )
        return number

    def _text(self, text: str, facts: Sequence[Fact]) -> int:
        """The number of a sentence. It is told by a keyed hash, so that where words are not kept none is found by guessing alone."""
        key = bytes.fromhex(self._one("SELECT value FROM meta WHERE key = 'salt'"))
        digest = hashlib.blake2b(text.encode(), key=key, digest_size=32).digest()
        there = self._db.execute("SELECT id FROM texts WHERE digest = ?", (digest,)).fetchone()
        if there is not None:
            return int(there[0])
        made = self._db.execute("INSERT INTO texts (digest, text) VALUES (?, ?)", (digest, text if self.with_text else None))
        number = int(made.lastrowid or 0)
        if self.with_text:
            rows = [(number, i, *(getattr(fact, name) for name in FACT)) for i, fact in enumerate(facts)]
            self._db.executemany(f"INSERT INTO facts VALUES (?, ?, {marks(FACT)})", rows)
        return number

    def remove(self, *, study_ids: Collection[str] = (), patient_ids: Collection[str] = ()) -> Removed:
        """Take studies out, with every trace of them in the file: rows are overwritten, the full-text index is merged, the log emptied.

        Raises:
            ArchiveError: a file that cannot be written to.
        """
        with self._explained():
            with self._transaction():
                found: dict[int, tuple[str, str]] = {}
                for column, values in (("study_id", study_ids), ("patient_id", patient_ids)):
                    for part in parts(values):
                        rows = self._db.execute(f"SELECT id, study_id, patient_id FROM studies WHERE {column} IN ({marks(part)})", part)
                        found |= {row[0]: (row[1], row[2]) for row in rows}
                before = self._words_of(found)
                self._delete(list(found))
                before |= {name for names in found.values() for name in names}
                traces = before - self._still_there(before)
                if found:
                    self._changed()
            if found:
                self._db.execute("INSERT INTO words (words) VALUES ('optimize')")
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return Removed(tuple(sorted(study for study, _ in found.values())), tuple(sorted(traces)))

    def _words_of(self, ids: Collection[int]) -> set[str]:
        """Paths and sentences of studies."""
        found: set[str] = set()
        for part in parts(ids):
            found |= {row[0] for row in self._db.execute(f"SELECT path FROM images WHERE study IN ({marks(part)})", part)}
            asked = f"SELECT texts.text FROM sentences JOIN texts ON texts.id = sentences.text WHERE study IN ({marks(part)})"
            found |= {row[0] for row in self._db.execute(asked, part) if row[0]}
        return found

    def _still_there(self, words: Collection[str]) -> set[str]:
        """Those that another study has too, be it as a part of something longer: "p3" of "p30"."""
        columns = {"studies": ("study_id", "patient_id", "source"), "images": ("path",), "texts": ("text",), "reports": SECTIONS}
        found: set[str] = set()
        for word in words:
            for table, names in columns.items():
                inside = " OR ".join(f"instr({name}, ?1)" for name in names)
                if self._db.execute(f"SELECT 1 FROM {table} WHERE {inside} LIMIT 1", (word,)).fetchone():
                    found.add(word)
                    break
        return found

    def _delete(self, ids: Sequence[int]) -> None:
        for part in parts(ids):
            texts = [row[0] for row in self._db.execute(f"SELECT DISTINCT text FROM sentences WHERE study IN ({marks(part)})", part)]
            self._db.execute(f"DELETE FROM studies WHERE id IN ({marks(part)})", part)
            self._db.executemany(
                "DELETE FROM texts WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM sentences WHERE text = ?1)", [(text,) for text in texts]
            )

    def counts(self) -> Counts:
        """How much it holds."""
        with self._explained():
            number = {name: int(self._one(f"SELECT count(*) FROM {name}")) for name in ("studies", "reports", "texts", "images")}
            patients = int(self._one("SELECT count(DISTINCT patient_id) FROM studies"))
            vectors: dict[int, dict[VectorKind, int]] = {model: dict.fromkeys(KINDS, 0) for model in self.models()}
            for kind in KINDS:
                for model, count in self._db.execute(f"SELECT model, count(*) FROM {kind}_vectors GROUP BY model"):
                    vectors[model][kind] = count
        return Counts(number["studies"], patients, number["reports"], number["texts"], number["images"], vectors)

    def rows(self) -> Iterator[StudyRow]:
        """All studies by rising ``study_id``."""
        with self._explained():
            for row in self._db.execute(f"SELECT id, text_digest, {', '.join(METADATA)} FROM studies ORDER BY study_id"):
                yield StudyRow(row[0], row[2:], row[1])

    def findings(self) -> Iterator[tuple[int, str, int | None, int | None]]:
        """(study, finding, what its report says, its label) of all studies."""
        with self._explained():
            yield from self._db.execute("SELECT id, finding, fact, label FROM study_findings JOIN studies USING (study_id)")

    def vectors(self, model: int, kind: VectorKind) -> Iterator[tuple[int, bytes]]:
        """(owner, vector) by rising owner."""
        with self._explained():
            owner = OWNER[kind]
            yield from self._db.execute(f"SELECT {owner}, vector FROM {kind}_vectors WHERE model = ? ORDER BY {owner}", (model,))

    def owners(self, kind: VectorKind) -> Iterator[tuple[int, int]]:
        """(study, owner) of each, in their order in the study."""
        asked = {
            "report": "SELECT id, id FROM studies",
            "sentence": "SELECT study, text FROM sentences ORDER BY study, place",
            "image": "SELECT study, id FROM images ORDER BY study, place",
        }
        with self._explained():
            yield from self._db.execute(asked[kind])

    def documents(self) -> Iterator[tuple[int, str]]:
        """(study, the words of its report that are ranked)."""
        with self._explained():
            for number, *text in self._db.execute(f"SELECT study, {', '.join(SEARCHED)} FROM reports ORDER BY study"):
                yield number, "\n".join(part for part in text if part)

    def matching(self, expression: str) -> list[int]:
        """Studies whose report fits an expression of SQLite's full-text index: words, "phrases", AND, OR, NOT, NEAR, section:word.

        Raises:
            ArchiveError: an expression that the index cannot read, or a store without text.
        """
        if not self.with_text:
            raise ArchiveError(f"{self.path}: keeps no text (it was made with --no-text), so no words can be looked for in it")
        try:
            return [row[0] for row in self._db.execute("SELECT rowid FROM words WHERE words MATCH ?", (expression,))]
        except sqlite3.OperationalError as error:
            raise ArchiveError(f'the words to match cannot be read ({error}); write words, "phrases", AND, OR, NOT, section:word') from None

    def found(self, ids: Sequence[int]) -> list[FoundStudy]:
        """Studies by their numbers, in the order given."""
        return [self._found(number) for number in ids]

    def _found(self, number: int) -> FoundStudy:
        with self._explained():
            row = self._db.execute(f"SELECT {', '.join(METADATA)} FROM studies WHERE id = ?", (number,)).fetchone()
            if row is None:
                raise ArchiveError(f"{self.path}: study number {number} was removed meanwhile; ask again")
            report = self._db.execute(f"SELECT {', '.join(SECTIONS)} FROM reports WHERE study = ?", (number,)).fetchone()
            asked = "SELECT texts.id, texts.text FROM sentences JOIN texts ON texts.id = sentences.text WHERE study = ? ORDER BY place"
            sentences = self._db.execute(asked, (number,)).fetchall()
            values = self._db.execute("SELECT finding, fact, label FROM study_findings WHERE study_id = ?", (row[0],)).fetchall()
            images = self._db.execute("SELECT path, view FROM images WHERE study = ? ORDER BY place", (number,)).fetchall()
        return FoundStudy(
            row[0],
            row[1],
            dict(zip(METADATA, row, strict=True)),
            {} if report is None else {name: part for name, part in zip(SECTIONS, report, strict=True) if part},
            tuple(sentences),
            {name: fact for name, fact, _ in values if fact is not None},
            {name: label for name, _, label in values if label is not None},
            tuple(images),
        )

    def ids(self, numbers: Sequence[int]) -> list[str]:
        """The ids of studies, in the order given."""
        known: dict[int, str] = {}
        with self._explained():
            for part in parts(numbers):
                known |= dict(self._db.execute(f"SELECT id, study_id FROM studies WHERE id IN ({marks(part)})", part).fetchall())
        return [known[number] for number in numbers if number in known]

    def number(self, study_id: str) -> int | None:
        """The number of a study; None if it is not there."""
        with self._explained():
            found = self._db.execute("SELECT id FROM studies WHERE study_id = ?", (study_id,)).fetchone()
        return None if found is None else int(found[0])

    def facts(self, texts: Collection[int]) -> dict[int, tuple[Fact, ...]]:
        """What sentences state."""
        found: dict[int, list[Fact]] = {text: [] for text in texts}
        with self._explained():
            for part in parts(texts):
                for text, *values in self._db.execute(
                    f"SELECT text, {', '.join(FACT)} FROM facts WHERE text IN ({marks(part)}) ORDER BY text, place", part
                ):
                    found[text].append(Fact(*values))
        return {text: tuple(facts) for text, facts in found.items()}

    def verify(self) -> list[str]:
        """What is wrong with the file: its pages, references, full-text index, and the vectors."""
        problems: list[str] = []
        with self._explained():
            problems += [f"pages: {row[0]}" for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            problems += [f"references: a row of {row[0]} belongs to nothing" for row in self._db.execute("PRAGMA foreign_key_check")]
            if not self.read_only:
                try:
                    self._db.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
                except sqlite3.DatabaseError:
                    problems.append("full-text index: differs from the reports")
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
                    "SELECT count(*) FROM embedded JOIN sentences USING (study) WHERE embedded.model = ?1 AND NOT EXISTS "
                    "(SELECT 1 FROM sentence_vectors v WHERE v.text = sentences.text AND v.model = ?1)",
                    (number,),
                )
                if missing:
                    problems.append(f"vectors: {missing} sentences of studies that model {number} has seen have none")
        return problems

    def files(self) -> tuple[Path, ...]:
        """The files that hold the store."""
        return tuple(path for path in (self.path, *beside(self.path)) if path.exists())

    def _changed(self) -> None:
        self._db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'")

    def _one(self, statement: str, values: Sequence[Any] = ()) -> Any:
        return self._db.execute(statement, values).fetchone()[0]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        if self.read_only:
            raise ArchiveError(f"{self.path}: the file or its folder cannot be written to")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise ArchiveError(f"{self.path}: {explained(error)}") from error


def explained(error: sqlite3.DatabaseError) -> str:
    """What an error of SQLite means for whoever asked, without any value of the statement."""
    name = getattr(error, "sqlite_errorname", "") or ""
    reasons = {
        "SQLITE_FULL": "the disk is full; the store is as it was before. Make room and go on with the same command",
        "SQLITE_READONLY": "cannot be written to; the store is as it was before",
        "SQLITE_IOERR": "the disk cannot be read or written to; the store is as it was before",
        "SQLITE_BUSY": f"another process has been writing to it for more than {TIMEOUT_S:.0f} s; try again",
        "SQLITE_LOCKED": f"another process has been writing to it for more than {TIMEOUT_S:.0f} s; try again",
        "SQLITE_NOTADB": "no SQLite file, expected a store of `medvl index build`",
        "SQLITE_CORRUPT": "the file is damaged; restore a copy, or build it anew",
        "SQLITE_CANTOPEN": "cannot be opened; the store or its folder cannot be read or written to",
    }
    for code, reason in reasons.items():
        if name.startswith(code):
            return reason
    return f"SQLite says {name or type(error).__name__}"


def beside(path: Path) -> tuple[Path, Path]:
    """The log and the shared index that SQLite keeps beside a file."""
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def statements(script: str) -> Iterator[str]:
    """The statements of a script one by one, so that they can stand in one transaction."""
    held = ""
    for line in script.splitlines():
        held += line + "\n"
        if sqlite3.complete_statement(held):
            yield held
            held = ""


def marks(values: Collection[Any]) -> str:
    """As many placeholders as values."""
    return ", ".join("?" * len(values))


def parts(values: Collection[Any]) -> Iterator[list[Any]]:
    """Values in lists that one statement takes."""
    given = list(values)
    for start in range(0, len(given), PART):
        yield given[start : start + PART]
