"""Results kept on disk under the hash of what they were made from: an SQLite file that several processes may read and write at once.

A result is kept once :meth:`ResultStore.put` returns (SQLite's write-ahead log, synchronised at every commit); a writer that is killed
leaves either the whole result or none. Every result carries its sha256, and one that does not match is as good as missing.
The file is for local disks: the log needs memory shared between its users. It holds what was made of reports and is readable by its owner
alone.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_APPLICATION = 0x6D65646C  # "medl", in the file's header
_VERSION = 1
_WAIT_S = 60.0
_SCHEMA = "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value BLOB NOT NULL, sha256 BLOB NOT NULL)"


class ResultStore:
    """Key -> bytes, on disk. Holds no connection between calls, so that it may be shared by threads and carried into forked processes.

    Args:
        path: of the SQLite file; made if missing, folders too.
    Raises:
        ValueError: a file that is something else.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            with self._connection() as connection:
                self._prepare(connection)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"result store {path}: {error}; expected a file on a local disk that this user may write") from error
            raise ValueError(f"{path} is not a result store; give the path of one or of a file that does not exist") from error

    def get(self, key: str) -> bytes | None:
        """The result, or None if there is none or it is damaged."""
        with self._connection() as connection:
            row = connection.execute("SELECT value, sha256 FROM results WHERE key = ?", (key,)).fetchone()
        return row[0] if row is not None and hashlib.sha256(row[0]).digest() == row[1] else None

    def put(self, key: str, value: bytes) -> None:
        """Keep a result, in place of one under the same key; on disk when this returns."""
        with self._connection() as connection:
            row = (key, value, hashlib.sha256(value).digest())
            connection.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", row)

    def keys(self) -> frozenset[str]:
        """Every key there is now."""
        with self._connection() as connection:
            return frozenset(key for (key,) in connection.execute("SELECT key FROM results"))

    @contextmanager
    def many(self) -> Iterator[None]:
        """Around many calls of this process: some times faster, for the last to close the file has to tidy its log away.

        Not to be entered before a fork.
        """
        with self._connection() as connection:
            connection.execute("SELECT key FROM results LIMIT 1").fetchone()  # a connection opens the log when it first reads
            yield

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
        finally:
            connection.close()

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the table in an empty file; leave a file of something else as it is."""
        connection.execute("BEGIN IMMEDIATE")  # one process at a time
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and (application, version) != (_APPLICATION, _VERSION):
            connection.execute("ROLLBACK")
            raise ValueError(f"{self.path} is an SQLite file of something else, or of another version; give another path")
        if not tables:
            connection.execute(_SCHEMA)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute("COMMIT")
        _use_log(connection)


def _use_log(connection: sqlite3.Connection) -> None:
    """Turn the write-ahead log on. The switch needs the file to itself and, unlike other statements, does not wait for it."""
    give_up = time.monotonic() + _WAIT_S
    while not _is_log_on(connection):
        if time.monotonic() > give_up:
            raise sqlite3.OperationalError("the write-ahead log cannot be turned on")
        time.sleep(0.02)


def _is_log_on(connection: sqlite3.Connection) -> bool:
    try:
        return bool(connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",))
    except sqlite3.OperationalError:
        return False
