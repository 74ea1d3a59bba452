"""Embeddings on disk by content: float32 vectors under 32-byte keys, for any number of processes at once, some of which may be killed.

``FOLDER/embeddings.sqlite3`` is one SQLite database. SQLite's locks and its rollback journal make an entry whole or absent: what a killed
writer left half done is undone by whoever opens the file next. Every entry has a checksum of its key and vector, so that damage of the
file gives an absent entry or an error, not a wrong vector. A key must be a hash of all that the vector depends on: the text, the model's
weights, pooling, where the text is cut.

A connection is opened for each transaction and closed after it (0.2 ms). So an object may be used by several threads, be sent to a spawned
process, and be used on both sides of a fork; only at the moment of a fork no other thread may be in it. The journal is a rollback journal,
not a write-ahead log (WAL): a log needs memory that all processes share, which a network file system does not give, and a folder that is
written to even by who only reads. Several computers may use one folder if its file system keeps POSIX locks (NFS 4, or NFS 3 with its lock
daemon); where it does not, give each computer a folder of its own.

Letters: W the width of a vector. The file holds keys and vectors, no texts; but embeddings tell much of a text: protect the folder as the
reports are protected. Nothing is unpickled. The checksum finds damage, not malice.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Whoever changes the tables, or what a checksum is of, raises this: files of another format are refused."""

KEY_BYTES = 32  # SHA-256
APPLICATION = 0x4D564C45  # SQLite's application_id, "MVLE": tells our files from other programs' databases
PAGE_BYTES = 16384  # ten vectors of 384; at SQLite's 4096 a fifth of the file is unused and reading takes 1.6 times as long
READ_ROWS = 4096  # of one transaction, between which writers get their turn
WRITE_BYTES = 2**24  # of the vectors in one transaction; the page cache is twice that, so that nothing spills before the commit

log = logging.getLogger(__name__)


class EmbeddingStore:
    """float32 vectors by 32-byte content key, on disk, for any number of processes at once.

    Where the folder can only be read, :meth:`get` works and :meth:`add` raises; ``writable`` tells. There is no bound on size and nothing
    is ever deleted: an entry takes about 4 W + 100 bytes; to start anew, delete the folder.

    Attributes:
        damaged: entries that this object found damaged so far.

    Args:
        folder: made if absent. One folder holds vectors of one width.
        width: W.
        timeout_s: how long to wait for other processes that write.
    Raises:
        ValueError: a width below 1, or a file there that is damaged, of another program, of another format or of another width.
        OSError: a folder that cannot be made, or a file that cannot be read.
    """

    def __init__(self, folder: Path, width: int, timeout_s: float = 60.0) -> None:
        if width < 1:
            raise ValueError(f"width of embeddings is {width}, expected at least 1")
        self.folder, self.width, self.timeout_s = Path(folder), width, timeout_s
        self.file = self.folder / "embeddings.sqlite3"
        self.damaged = 0
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            code = error.errno or errno.EIO
            raise OSError(
                code, f"embedding store {folder}: no such folder, and it cannot be made; name one that can be written to"
            ) from error
        self.get([bytes(KEY_BYTES)])  # refuses a file of another width now, not after the first texts were embedded

    @property
    def writable(self) -> bool:
        """Whether this process may write to the file, or make it."""
        return os.access(self.folder, os.W_OK) and (not self.file.exists() or os.access(self.file, os.W_OK))

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """The vectors, each (W,), of those keys that are there, in the order of ``keys``; the arrays are the caller's own.

        An entry that fails its checksum is as if absent; it is counted in ``damaged``, and the next :meth:`add` of its key replaces it.

        Raises:
            ValueError: a key that is not 32 bytes, or a damaged file.
            TimeoutError: other processes kept the file locked for ``timeout_s``.
            OSError: the file cannot be read.
        """
        _check_keys(keys)
        found: dict[bytes, NDArray[np.float32]] = {}
        before = self.damaged
        asked = list(dict.fromkeys(keys))
        for start in range(0, len(asked), READ_ROWS):
            if not self.file.exists():
                break
            with self._transaction("BEGIN") as connection:
                if not self._holds_table(connection):
                    break
                for key in asked[start : start + READ_ROWS]:
                    row = connection.execute("SELECT checksum, vector FROM embeddings WHERE key = ?", (key,)).fetchone()
                    if row is not None and self._intact(key, *row):
                        found[key] = np.frombuffer(row[1], "<f4").astype(np.float32)
                    self.damaged += row is not None and key not in found
        if self.damaged > before:
            log.warning("embedding store %s: %d damaged entries, treated as absent", self.file, self.damaged - before)
        return found

    def add(self, keys: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        """Store vectors; when it returns they are flushed to the disk (SQLite's synchronous = FULL).

        A key that is there keeps its vector, unless that is damaged. Of equal keys the first counts. After an error a part of the entries
        may be stored, each of them whole.

        Args:
            keys: N of 32 bytes.
            vectors: (N, W) float32, finite.
        Raises:
            ValueError: keys or vectors that are not as above, or a damaged file.
            TimeoutError: other processes kept the file locked for ``timeout_s``.
            PermissionError: a folder or file that may only be read.
            OSError: a full disk, or one that fails.
        """
        _check_keys(keys)
        self._check_vectors(keys, vectors)
        rows = max(1, WRITE_BYTES // (4 * self.width))
        for start in range(0, len(keys), rows):
            with self._transaction("BEGIN IMMEDIATE") as connection:
                if not self._holds_table(connection):
                    self._make_table(connection)
                connection.create_function("checksum_of", 2, _checksum, deterministic=True)
                connection.executemany(
                    "INSERT INTO embeddings (key, checksum, vector) VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
                    "SET checksum = excluded.checksum, vector = excluded.vector "
                    "WHERE checksum IS NOT checksum_of(excluded.key, coalesce(CAST(vector AS BLOB), x''))",
                    _rows(keys[start : start + rows], vectors[start : start + rows]),
                )

    def __len__(self) -> int:
        """Entries in the file, damaged ones included.

        Raises:
            ValueError: a damaged file.
            OSError: the file cannot be read, or is kept locked.
        """
        if not self.file.exists():
            return 0
        with self._transaction("BEGIN") as connection:
            if not self._holds_table(connection):
                return 0
            return int(connection.execute("SELECT count(*) FROM embeddings").fetchone()[0])

    @contextmanager
    def _transaction(self, begin: Literal["BEGIN", "BEGIN IMMEDIATE"]) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction, which is committed at the end and rolled back on an error.

        Who writes takes the write lock at once: a reader that asked for it later could meet another that did, and neither would get it.
        """
        mode = "rwc" if begin == "BEGIN IMMEDIATE" else "rw"  # a reader too, where it may: it undoes what a killed writer began
        try:
            place = f"{self.file.absolute().as_uri()}?mode={mode}"
            with closing(sqlite3.connect(place, timeout=self.timeout_s, isolation_level=None, uri=True)) as connection:
                connection.text_factory = bytes  # there is no text in the tables; what damage makes text of may be no UTF-8
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                connection.execute(f"PRAGMA cache_size = -{2 * WRITE_BYTES // 1024}")  # KiB
                connection.execute("PRAGMA journal_mode = TRUNCATE")
                connection.execute("PRAGMA synchronous = FULL")  # the journal's truncation included
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise _explained(error, self.file, self.timeout_s) from error

    def _holds_table(self, connection: sqlite3.Connection) -> bool:
        """False for a new, empty file; else the file is of our format and width."""
        (application,), (version,), (tables,) = (
            connection.execute(question).fetchone()
            for question in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if application == version == tables == 0:
            return False
        advice = "name another folder, or delete the file, it is made again"
        if application != APPLICATION:
            raise ValueError(f"embedding store {self.file}: a database of another program; {advice}")
        if version != FORMAT:
            raise ValueError(f"embedding store {self.file}: format {version}, this version of medvl reads {FORMAT}; {advice}")
        (width,) = connection.execute("SELECT width FROM shape").fetchone() or (None,)
        if width != self.width:
            raise ValueError(f"embedding store {self.file}: vectors of width {width}, expected {self.width}; {advice}")
        return True

    def _make_table(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("CREATE TABLE shape (width INTEGER NOT NULL)")
        connection.execute("INSERT INTO shape VALUES (?)", (self.width,))
        connection.execute(
            "CREATE TABLE embeddings (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, checksum INTEGER NOT NULL, vector BLOB NOT NULL)"
        )

    def _intact(self, key: bytes, checksum: object, vector: object) -> bool:
        """Whether this is an entry as it was written under ``key``; a damaged file may give any type."""
        return isinstance(vector, bytes) and len(vector) == 4 * self.width and _checksum(key, vector) == checksum

    def _check_vectors(self, keys: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        if vectors.dtype != np.float32 or vectors.shape != (len(keys), self.width):
            raise ValueError(
                f"embedding store {self.file}: vectors are {vectors.dtype} {vectors.shape}, expected float32 ({len(keys)}, {self.width}) "
                "for the keys given"
            )
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if bad.size:
            raise ValueError(f"embedding store {self.file}: {bad.size} vectors are not finite, the first in row {bad[0]}; none is stored")


def _check_keys(keys: Sequence[bytes]) -> None:
    for i, key in enumerate(keys):
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            came = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
            raise ValueError(f"key {i} of an embedding is {came}, expected {KEY_BYTES} bytes such as hashlib.sha256(...).digest()")


def _rows(keys: Sequence[bytes], vectors: NDArray[np.float32]) -> Iterator[tuple[bytes, int, bytes]]:
    """(key, checksum, vector as little-endian bytes) of each entry, made one at a time."""
    for key, vector in zip(keys, vectors, strict=True):
        content = vector.astype("<f4", copy=False).tobytes()
        yield key, _checksum(key, content), content


def _checksum(key: bytes, vector: bytes) -> int:
    """CRC-32 of the key and the vector, so that a whole vector under another's key is damage too."""
    return zlib.crc32(vector, zlib.crc32(key))


def _explained(error: sqlite3.Error | UnicodeDecodeError, file: Path, timeout_s: float) -> Exception:
    """What SQLite says, as the exception that it is. Told by SQLite's fixed texts: Python 3.10 does not give the error codes.

    A damaged file can make SQLite's own text undecodable.
    """
    where = f"embedding store {file}"
    if not isinstance(error, sqlite3.OperationalError) or "no such" in str(error):
        return ValueError(f"{where}: damaged ({type(error).__name__}); delete it, it is made again")
    text = str(error)
    if "locked" in text:
        return TimeoutError(
            errno.ETIMEDOUT, f"{where}: locked by other processes for {timeout_s:g} s ({text}); try again when they are done"
        )
    if "full" in text:
        return OSError(errno.ENOSPC, f"{where}: {text}; what was stored before is kept. Make room, or name a folder on another disk")
    if "readonly" in text or ("unable to open" in text and not os.access(file.parent, os.W_OK)):
        return PermissionError(
            errno.EACCES,
            f"{where}: may only be read; name a folder that can be written to. If this came on reading, a writer was killed: "
            "open the folder once from where it can be written to, which undoes what that one began",
        )
    return OSError(errno.EIO, f"{where}: {text}; see that folder and file can be read and written, and that its file system keeps locks")
