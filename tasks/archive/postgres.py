"""The archive in PostgreSQL with pgvector: the same store for many machines.

Tables stand in a schema of their own, vectors in pgvector's type, so that a question by vectors can be answered by the server alone
(:meth:`PostgresStore.nearest`, exact). Everything else that searches reads what is derived, in a folder of the user's on this machine.
Needs the extra ``postgres``, and the extension ``vector`` in the database.

What is removed is gone from its tables, which are written anew; what the server's log, replicas and backups keep is beyond a client.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.archive.records import SEARCHED
from tasks.archive.sql import OWNER, SqlStore, schema
from tasks.archive.store import FORMAT, ArchiveError, VectorKind

if TYPE_CHECKING:
    from tasks.archive.filters import Filter

TABLES = (
    *("studies", "reports", "images", "texts", "sentences", "facts", "study_findings", "embedded"),
    *(f"{kind}_vectors" for kind in OWNER),
)
MEMBERS = {
    "report": "SELECT study, vector FROM report_vectors WHERE model = ?",
    "sentence": "SELECT study, vector FROM sentence_vectors JOIN sentences USING (text) WHERE model = ?",
    "image": "SELECT study, vector FROM image_vectors JOIN images ON images.id = image WHERE model = ?",
}
AT_ONCE = 2000
"""Rows that a server-side cursor sends together."""


class PostgresStore(SqlStore):
    """A store in a schema of a PostgreSQL database.

    Args:
        where: its address, ``postgresql://user@host/database``. A password belongs into ~/.pgpass or the environment (PGPASSWORD).
        namespace: the schema.
        create: make it if it is not there; False: it must be.
        with_text: of a store that is made: keep the words.
    Raises:
        ArchiveError: no connection, no store, one of another format, or no extension ``vector``.
    """

    place_of = "strpos"

    def __init__(self, where: str, *, namespace: str = "medvl_archive", create: bool = False, with_text: bool = True) -> None:
        if re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", namespace) is None:
            raise ArchiveError(f"schema {namespace!r}: expected small letters, digits and underscores")
        try:
            import psycopg
        except ImportError as error:
            raise ArchiveError("a store in PostgreSQL needs the extra 'postgres': pip install 'medvl[postgres]'") from error
        self._errors = psycopg.Error
        self.name = f"schema {namespace} of the database"  # an address may hold a password
        with self._explained():
            self._db = psycopg.connect(where, autocommit=True)
            there = self._one("SELECT count(*) FROM pg_namespace WHERE nspname = ?", (namespace,))
            if not there and not create:
                raise ArchiveError(f"{self.name}: no such store; `medvl index build` makes one")
            if not there:
                self._make(namespace, with_text)
            self._run(f"SET search_path TO {namespace}, public")
            if not self._one("SELECT count(*) FROM pg_tables WHERE schemaname = ? AND tablename = 'meta'", (namespace,)):
                raise ArchiveError(f"{self.name}: holds something else, expected a store of `medvl index build`")
            meta = {row[0]: row[1] for row in self._rows("SELECT key, value FROM meta")}
        if meta.get("format") != str(FORMAT):
            raise ArchiveError(f"{self.name}: a store of format {meta.get('format')}, this version reads {FORMAT}; build it anew")
        self.uid, self.with_text = meta["uid"], meta["with_text"] == "1"
        self.derived = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medvl" / "archives" / self.uid

    def _make(self, namespace: str, with_text: bool) -> None:
        with self._transaction():
            self._run("CREATE EXTENSION IF NOT EXISTS vector")
            self._run(f"CREATE SCHEMA {namespace}")
            self._run(f"SET search_path TO {namespace}, public")
            key = "INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
            for statement in schema(key=key, blob="BYTEA", vector="vector", number="DOUBLE PRECISION"):
                self._run(statement)
            values = {"uid": uuid.uuid4().hex, "salt": os.urandom(16).hex(), "with_text": str(int(with_text)), "generation": "0"}
            self._run_each("INSERT INTO meta VALUES (?, ?)", {**values, "format": str(FORMAT)}.items())

    def close(self) -> None:
        """End the connection."""
        self._db.close()

    def matching(self, expression: str) -> list[int]:
        """Studies whose report fits words as a search engine takes them: words, "phrases", or, -without (``websearch_to_tsquery``).

        Raises:
            ArchiveError: a store without text.
        """
        if not self.with_text:
            raise ArchiveError(f"{self.name}: keeps no text (it was made with --no-text), so no words can be looked for in it")
        words = " || ' ' || ".join(SEARCHED)
        asked = f"SELECT study FROM reports WHERE to_tsvector('simple', {words}) @@ websearch_to_tsquery('simple', ?)"
        with self._explained():
            return [row[0] for row in self._rows(asked, (expression,))]

    def nearest(
        self, vectors: NDArray[np.floating], model: int, over: VectorKind, *, where: Filter | None = None, top: int = 10
    ) -> list[tuple[str, float]]:
        """The studies that answer best and their scores, found by the server by the rule of :mod:`tasks.archive.search`, exactly.

        Args:
            vectors: (m, D) of the question.
            model: the number of the model that they are of.
            over: which vectors of the studies answer.
            where: which studies may.
            top: how many.
        """
        condition, values = ("TRUE", []) if where is None else where.where("postgres")
        condition = condition.replace("%s", "?")
        queries = [(i, self._vector(np.ascontiguousarray(row, "<f4").tobytes())) for i, row in enumerate(np.atleast_2d(vectors))]
        asked = (
            f"WITH q (j, asked) AS (VALUES {', '.join(['(CAST(? AS INTEGER), CAST(? AS vector))'] * len(queries))}), "
            f"members AS ({MEMBERS[over]}), "
            "best AS (SELECT s.id, s.study_id, q.j, max(1 - (members.vector <=> q.asked)) AS nearness FROM members "
            f"JOIN studies s ON s.id = members.study CROSS JOIN q WHERE {condition} GROUP BY s.id, s.study_id, q.j) "
            "SELECT study_id, avg(nearness) AS score FROM best GROUP BY study_id "
            'ORDER BY round(avg(nearness)::numeric, 6) DESC, study_id COLLATE "C" LIMIT ?'
        )
        given = [value for query in queries for value in query]
        with self._explained():
            return [(name, float(score)) for name, score in self._rows(asked, [*given, model, *values, top])]

    def vectors(self, model: int, kind: VectorKind) -> Iterator[tuple[int, bytes]]:
        """(owner, vector) by rising owner, some at a time."""
        owner = OWNER[kind]
        asked = f"SELECT {owner}, vector FROM {kind}_vectors WHERE model = %s ORDER BY {owner}"
        with self._explained(), self._db.transaction(), self._db.cursor(name="vectors") as cursor:
            cursor.itersize = AT_ONCE
            for number, vector in cursor.execute(asked, (model,)):
                yield number, self._bytes(vector)

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        yield from self._db.execute(_signs(statement), values or None)

    def _run(self, statement: str, values: Sequence[Any] = ()) -> None:
        self._db.execute(_signs(statement), values or None)

    def _run_each(self, statement: str, values: Iterable[Sequence[Any]]) -> None:
        with self._db.cursor() as cursor:
            cursor.executemany(_signs(statement), list(values))

    def _vector(self, values: bytes) -> str:
        return "[" + ",".join(map(str, np.frombuffer(values, "<f4").tolist())) + "]"

    def _bytes(self, value: Any) -> bytes:
        return np.array(str(value).strip("[]").split(","), "<f4").tobytes()

    def _order(self, column: str) -> str:
        return f'{column} COLLATE "C"'

    def _after_removal(self) -> None:
        """Write the tables anew, without what was deleted."""
        for table in TABLES:
            self._run(f"VACUUM FULL {table}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._db.transaction():
            yield

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            state = getattr(error, "sqlstate", None)
            reasons = {
                "53100": "the server's disk is full; the store is as it was before",
                "25006": "the server takes no changes (read-only); the store is as it was before",
                "42501": "the user may not do this",
                "0A000": "the server has no extension vector (pgvector); ask its administrator to install it",
                "58P01": "the server has no extension vector (pgvector); ask its administrator to install it",
                None: "no connection to the server; look at the address, the password and whether it runs",
            }
            raise ArchiveError(f"{self.name}: {reasons.get(state, f'PostgreSQL says {type(error).__name__} ({state})')}") from None


def _signs(statement: str) -> str:
    """With the placeholders of psycopg."""
    return statement.replace("?", "%s")
