"""A store by where it is: the address of a PostgreSQL database, or the path of a file."""

from __future__ import annotations

from pathlib import Path

from tasks.archive.sqlite import SqliteStore
from tasks.archive.store import ArchiveStore

SCHEMES = ("postgresql://", "postgres://")


def open_store(where: str, *, create: bool = False, with_text: bool = True) -> ArchiveStore:
    """Open a store.

    Args:
        where: a path, or ``postgresql://user@host/database``.
        create: make it if it is not there; False: it must be.
        with_text: of a store that is made: keep the words of reports and what they state.
    Raises:
        ArchiveError: it cannot be opened.
    """
    if where.startswith(SCHEMES):
        from tasks.archive.postgres import PostgresStore

        return PostgresStore(where, create=create, with_text=with_text)
    return SqliteStore(Path(where), create=create, with_text=with_text)
