"""The archive in one SQLite file (WAL): the embedded store.

Transactions are flushed to disk before they are acknowledged (``synchronous=FULL``); what is deleted is overwritten (``secure_delete``), in
the full-text index too once it is merged. The file is made readable and writable by its owner alone, and SQLite gives the files beside it
(``-wal``, ``-shm``) the same rights.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.archive.records import SECTIONS
from tasks.archive.sql import SqlStore, schema
from tasks.archive.store import FORMAT, ArchiveError

APPLICATION_ID = 0x6D76_6C61
"""SQLite's mark of whose file it is: "mvla"."""
TIMEOUT_S = 60.0
WORDS = (
    f"CREATE VIRTUAL TABLE words USING fts5 ({', '.join(SECTIONS)}, content='reports', content_rowid='study', "
    "tokenize='unicode61 remove_diacritics 2')",
    f"CREATE TRIGGER reports_in AFTER INSERT ON reports BEGIN INSERT INTO words (rowid, {', '.join(SECTIONS)}) "
    f"VALUES (new.study, {', '.join(f'new.{name}' for name in SECTIONS)}); END",
    f"CREATE TRIGGER reports_out AFTER DELETE ON reports BEGIN INSERT INTO words (words, rowid, {', '.join(SECTIONS)}) "
    f"VALUES ('delete', old.study, {', '.join(f'old.{name}' for name in SECTIONS)}); END",
)
"""The full-text index, and what keeps it in step with the reports."""


class SqliteStore(SqlStore):
    """A store in one file.

    Args:
        path: of the file.
        create: make it if it is not there; False: it must be.
        with_text: of a store that is made: keep the words of reports, sentences and what they state. A store that is there keeps its own.
    Raises:
        ArchiveError: no such file, no store, one of another format, or a place that cannot be written to.
    """

    place_of = "instr"

    def __init__(self, path: Path, *, create: bool = False, with_text: bool = True) -> None:
        self.path, self.name = Path(path), str(path)
        self.derived = self.path.with_name(self.path.name + ".derived")
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
            for statement in (*schema(key="INTEGER PRIMARY KEY", blob="BLOB", vector="BLOB", number="REAL"), *WORDS):
                self._db.execute(statement)
            values = {"uid": uuid.uuid4().hex, "salt": os.urandom(16).hex(), "with_text": str(int(with_text)), "generation": "0"}
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {FORMAT}")

    def close(self) -> None:
        """Let go of the file; the last to do so puts all of it in one file."""
        self._db.close()

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        yield from self._db.execute(statement, values)

    def _run(self, statement: str, values: Sequence[Any] = ()) -> None:
        self._db.execute(statement, values)

    def _run_each(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        self._db.executemany(statement, values)

    def _after_removal(self) -> None:
        """Merge the full-text index, and empty the log; deleted rows are overwritten as they go."""
        self._db.execute("INSERT INTO words (words) VALUES ('optimize')")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

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

    def verify(self) -> list[str]:
        """What is wrong with the file: its pages, references, full-text index, and what every store looks at."""
        problems: list[str] = []
        with self._explained():
            problems += [f"pages: {row[0]}" for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok"]
            problems += [f"references: a row of {row[0]} belongs to nothing" for row in self._db.execute("PRAGMA foreign_key_check")]
            if not self.read_only:
                try:
                    self._db.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
                except sqlite3.DatabaseError:
                    problems.append("full-text index: differs from the reports")
        return [*problems, *super().verify()]

    def files(self) -> tuple[Path, ...]:
        """The files that hold the store."""
        return tuple(path for path in (self.path, *beside(self.path)) if path.exists())

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
