"""Embedding store: against a dict, against SQLite's own reading of the file, and under kills, forks, damage and failing disks."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reports import embeddings
from reports.embeddings import EmbeddingStore

WIDTH = 24
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(FORK is None, reason="needs os.fork")

WRITER = """
import hashlib, os, sys
from pathlib import Path
import numpy as np
from reports.embeddings import EmbeddingStore

folder, log, width, first, batches, size = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
store = EmbeddingStore(folder, width)
acknowledged = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for batch in range(batches):
    names = range(first + batch * size, first + (batch + 1) * size)
    keys = [hashlib.sha256(str(name).encode()).digest() for name in names]
    vectors = np.stack([np.random.default_rng(name).standard_normal(width, dtype=np.float32) for name in names])
    os.write(acknowledged, b"begun\\n")
    store.add(keys, vectors)
    os.write(acknowledged, b"".join(b"%d\\n" % name for name in names))
    os.fsync(acknowledged)
"""
"""Writes the vectors of consecutive names; to a file of its own "begun" before each batch, and its names once the store has taken it."""


def key(name: int) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def vector(name: int, width: int = WIDTH) -> NDArray[np.float32]:
    """What every writer here stores under ``key(name)``."""
    return np.random.default_rng(name).standard_normal(width, dtype=np.float32)


def fill(store: EmbeddingStore, names: range) -> None:
    store.add([key(n) for n in names], np.stack([vector(n, store.width) for n in names]))


def wrong(store: EmbeddingStore, names: range) -> list[int]:
    """The names under which there is another vector than their own."""
    found = store.get([key(n) for n in names])
    return [n for n in names if key(n) in found and not np.array_equal(found[key(n)], vector(n, store.width))]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "store", WIDTH)


def raw(store: EmbeddingStore, question: str, *values: object) -> list[tuple]:
    """Rows as SQLite gives them, without the store; changes are committed."""
    with closing(sqlite3.connect(store.file)) as connection, connection:
        return connection.execute(question, values).fetchall()


def test_a_vector_comes_back_bit_for_bit_and_others_are_absent(store: EmbeddingStore) -> None:
    special = np.array([[0.0, -0.0, 1e-45, 3.4e38] * 6, range(24)], dtype=np.float32)
    assert len(store) == 0 and store.get([key(1)]) == {}
    store.add([key(1), key(2)], special)
    found = EmbeddingStore(store.folder, WIDTH).get([key(2), key(3), key(1), key(2)])
    assert list(found) == [key(2), key(1)] and len(store) == 2
    assert found[key(1)].tobytes() == special[0].tobytes() and found[key(2)].dtype == np.float32
    found[key(1)][:] = 7  # the caller's own
    assert store.get([key(1)])[key(1)].tobytes() == special[0].tobytes()
    ((stored, there),) = raw(store, "SELECT key, vector FROM embeddings WHERE key = ?", key(2))
    assert stored == key(2) and np.array_equal(np.frombuffer(there, "<f4"), special[1])
    assert raw(store, "PRAGMA integrity_check") == [("ok",)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.booleans(), st.lists(st.tuples(st.integers(0, 7), st.floats(width=32, allow_nan=False, allow_infinity=False)), max_size=6)
        )
    )
)
def test_any_order_of_adding_and_asking_is_as_of_a_dict_that_keeps_the_first(tmp_path: Path, steps: list) -> None:
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    store, model = EmbeddingStore(tmp_path / "store", 2), {}
    for adds, entries in steps:
        keys = [key(n) for n, _ in entries]
        if adds:
            rows = np.array([[value, n] for n, value in entries], dtype=np.float32).reshape(-1, 2)
            store.add(keys, rows)
            for one, row in zip(keys, rows, strict=True):
                model.setdefault(one, row)
        found = store.get(keys)
        assert found.keys() == model.keys() & set(keys)
        assert all(found[k].tobytes() == model[k].tobytes() for k in found)
        assert len(store) == len(model)


def test_batches_larger_than_a_transaction_are_stored_whole(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "WRITE_BYTES", 7 * 4 * WIDTH)
    monkeypatch.setattr(embeddings, "READ_ROWS", 5)
    fill(store, range(100))
    assert len(store.get([key(n) for n in range(120)])) == len(store) == 100 and not wrong(store, range(100))


@pytest.mark.parametrize(
    ("keys", "vectors", "says"),
    [
        ([b"short"], np.zeros((1, WIDTH), np.float32), "key 0 .* 5 bytes, expected 32"),
        (["a" * 32], np.zeros((1, WIDTH), np.float32), "key 0 .* str, expected 32"),
        ([key(1)], np.zeros((1, WIDTH)), r"float64 \(1, 24\), expected float32 \(1, 24\)"),
        ([key(1)], np.zeros((2, WIDTH), np.float32), r"\(2, 24\), expected float32 \(1, 24\)"),
        ([key(1)], np.zeros((1, 25), np.float32), r"\(1, 25\), expected float32 \(1, 24\)"),
        ([key(1), key(2)], np.array([[0.0], [np.nan]], np.float32).repeat(WIDTH, 1), "1 vectors are not finite, the first in row 1"),
    ],
)
def test_what_is_no_key_or_vector_is_refused_and_nothing_stored(store: EmbeddingStore, keys: list, vectors: NDArray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        store.add(keys, vectors)
    assert len(store) == 0
    with pytest.raises(ValueError, match="width of embeddings is 0"):
        EmbeddingStore(store.folder, 0)
    with pytest.raises(ValueError, match="expected 32"):
        store.get([b"short"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE shape SET width = 25", "vectors of width 25, expected 24"),
        ("DELETE FROM shape", "vectors of width None, expected 24"),
        ("PRAGMA user_version = 99", "format 99, this version of medvl reads 1"),
        ("PRAGMA application_id = 7", "a database of another program"),
        ("DROP TABLE embeddings", "damaged"),
    ],
)
def test_another_width_format_or_database_is_refused_at_once(store: EmbeddingStore, change: str, says: str) -> None:
    fill(store, range(3))
    raw(store, change)
    before = store.file.read_bytes()
    for attempt in (lambda: EmbeddingStore(store.folder, WIDTH), lambda: fill(store, range(9, 12)), lambda: store.get([key(1)])):
        with pytest.raises(ValueError, match=says) as caught:
            attempt()
        assert str(store.file) in str(caught.value) and "it is made again" in str(caught.value)
    assert store.file.read_bytes() == before


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "embeddings.sqlite3")) as connection, connection:
        connection.execute("CREATE TABLE patients (name)")
    with pytest.raises(ValueError, match="another program"):
        EmbeddingStore(tmp_path, WIDTH)


def test_an_empty_file_that_a_killed_process_made_is_a_new_store(tmp_path: Path) -> None:
    (tmp_path / "embeddings.sqlite3").touch()
    store = EmbeddingStore(tmp_path, WIDTH)
    assert store.get([key(1)]) == {} and len(store) == 0
    fill(store, range(3))
    assert len(store) == 3


def test_a_damaged_entry_is_absent_counted_and_replaced(store: EmbeddingStore, caplog: pytest.LogCaptureFixture) -> None:
    fill(store, range(5))
    raw(store, "UPDATE embeddings SET vector = (SELECT vector FROM embeddings WHERE key = ?) WHERE key = ?", key(0), key(1))
    raw(store, "UPDATE embeddings SET vector = zeroblob(5) WHERE key = ?", key(2))
    raw(store, "UPDATE embeddings SET checksum = 'text', vector = 'text' WHERE key = ?", key(3))
    with caplog.at_level(logging.WARNING):
        assert set(store.get([key(n) for n in range(5)])) == {key(0), key(4)}
    assert store.damaged == 3 and "3 damaged entries" in caplog.text
    fill(store, range(5))
    assert len(store.get([key(n) for n in range(5)])) == 5 and not wrong(store, range(5)) and store.damaged == 3


def test_bytes_changed_anywhere_never_give_a_wrong_vector(store: EmbeddingStore, tmp_path: Path) -> None:
    fill(store, range(200))
    whole, rng, outcomes = store.file.read_bytes(), random.Random(0), {"error": 0, "absent": 0, "unchanged": 0}
    for trial in range(150):
        folder = tmp_path / str(trial)
        folder.mkdir()
        content = bytearray(whole)
        for _ in range(rng.choice((1, 20, 400))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if trial % 5 == 0:
            del content[rng.randrange(len(content)) :]
        (folder / store.file.name).write_bytes(content)
        try:
            damaged = EmbeddingStore(folder, WIDTH)
            assert not wrong(damaged, range(210))
            outcomes["absent" if len(damaged.get([key(n) for n in range(200)])) < 200 else "unchanged"] += 1
        except (ValueError, OSError) as error:
            assert str(folder) in str(error)
            outcomes["error"] += 1
    assert min(outcomes.values()) > 0


def test_what_is_no_database_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "embeddings.sqlite3").write_bytes(b"not a database" * 1000)
    with pytest.raises(ValueError, match=r"embeddings\.sqlite3: damaged .*; delete it, it is made again"):
        EmbeddingStore(tmp_path, WIDTH)


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be made; name one that can be written to"):
        EmbeddingStore(tmp_path / "file" / "store", WIDTH)
    with pytest.raises(OSError, match="cannot be made; name one that can be written to"):
        EmbeddingStore(tmp_path / "file", WIDTH)


def test_folders_whose_names_mean_something_in_a_uri(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path / "a ?mode=ro#%41 ü", WIDTH)
    fill(store, range(2))
    assert store.file.is_file() and len(store) == 2


def test_a_locked_file_is_waited_for_and_then_named(store: EmbeddingStore) -> None:
    fill(store, range(2))
    hasty = EmbeddingStore(store.folder, WIDTH, timeout_s=0.2)
    with closing(sqlite3.connect(store.file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for attempt in (lambda: hasty.get([key(1)]), lambda: fill(hasty, range(3, 4)), lambda: len(hasty)):
            with pytest.raises(TimeoutError, match=r"locked by other processes for 0\.2 s"):
                attempt()
    fill(hasty, range(3, 4))
    assert len(hasty) == 3


def as_nobody(work: Callable[[], None]) -> None:
    """Run in a child process that has no special rights; a failed assertion there fails the test."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    child = FORK.Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into (pytest's own are for one user)."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@needs_fork
def test_a_folder_that_may_only_be_read_is_read(open_folder: Path) -> None:
    store = EmbeddingStore(open_folder / "store", WIDTH)
    fill(store, range(20))
    assert store.writable
    store.file.chmod(0o444)
    store.folder.chmod(0o555)

    def work() -> None:
        reader = EmbeddingStore(store.folder, WIDTH)
        assert not reader.writable and len(reader) == 20 and not wrong(reader, range(20))
        assert len(reader.get([key(n) for n in range(30)])) == 20
        with pytest.raises(PermissionError, match="may only be read; name a folder that can be written to"):
            fill(reader, range(20, 21))

    before = sorted(open_folder.rglob("*")), store.file.read_bytes()
    as_nobody(work)
    assert (sorted(open_folder.rglob("*")), store.file.read_bytes()) == before
    store.folder.chmod(0o755)  # so that it can be deleted


@needs_fork
def test_an_empty_folder_that_may_only_be_read_is_an_empty_store(open_folder: Path) -> None:
    def work() -> None:
        reader = EmbeddingStore(open_folder, WIDTH)
        assert not reader.writable and len(reader) == 0 and reader.get([key(1)]) == {}
        with pytest.raises(PermissionError, match=r"embeddings\.sqlite3: may only be read"):
            fill(reader, range(1))

    as_nobody(work)


@needs_fork
def test_a_disk_that_takes_no_more_is_named_and_what_was_there_stays(store: EmbeddingStore) -> None:
    """A limit on the size of files makes the system refuse writes half way through a transaction."""
    fill(store, range(200))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.file.stat().st_size + 100_000,) * 2)
        with pytest.raises(OSError, match=r"embeddings\.sqlite3: .*I/O"):
            fill(store, range(200, 9000))
        assert len(store) == 200

    child = FORK.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert len(store) == 200 and not wrong(store, range(300)) and raw(store, "PRAGMA integrity_check") == [("ok",)]
    fill(store, range(200, 300))
    assert len(store) == 300


@needs_fork
def test_both_sides_of_a_fork_read_and_write(store: EmbeddingStore) -> None:
    fill(store, range(50))

    def work(first: int) -> None:
        for start in range(first, first + 100, 10):
            fill(store, range(start, start + 10))
            assert not wrong(store, range(400))
        assert len(store.get([key(n) for n in range(first, first + 100)])) == 100

    children = [FORK.Process(target=work, args=(first,)) for first in (100, 200, 150)]
    for child in children:
        child.start()
    work(300)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(store) == 350 and not wrong(store, range(400))


def test_threads_share_one_object_and_processes_a_copy(store: EmbeddingStore) -> None:
    threads = [threading.Thread(target=fill, args=(store, range(n, n + 40))) for n in range(0, 120, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    copy = pickle.loads(pickle.dumps(store))
    assert len(copy) == 140 and not wrong(copy, range(140))


def start_writer(folder: Path, log: Path, *numbers: int) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", WRITER, str(folder), str(log), *map(str, numbers)]
    return subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def acknowledged(log: Path) -> set[int]:
    """The names that a writer has noted; a last line without its end was cut by the kill."""
    content = log.read_bytes() if log.exists() else b""
    return {int(line) for line in content[: content.rfind(b"\n") + 1].split() if line != b"begun"}


def kill_round(folder: Path, seed: int) -> dict[str, int]:
    """Two writers run to their end, a third is killed at a random moment; all three write some names in common.

    Returns:
        ``wrong`` vectors, ``lost`` acknowledged entries, and what the round was: acknowledged ``entries``, those of the ``killed`` one,
        and whether it was killed ``while_adding``, between "begun" and the note of what was taken.
    """
    width, size = 384, 64
    rng = random.Random(seed)
    store, logs = EmbeddingStore(folder, width), [folder / f"{n}.log" for n in range(3)]
    writers = [
        start_writer(folder, logs[0], width, 0, 30, size),
        start_writer(folder, logs[1], width, 1000, 30, size),
        start_writer(folder, logs[2], width, 500, 10_000, 4 * size),
    ]
    bad = 0
    try:
        deadline = time.monotonic() + 120
        while not acknowledged(logs[2]) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        writers[2].kill()
        assert writers[2].wait(60) == -signal.SIGKILL
        while any(writer.poll() is None for writer in writers[:2]):
            bad += len(wrong(store, range(rng.randrange(3000), 3100)))
            assert time.monotonic() < deadline
        assert [writer.wait() for writer in writers[:2]] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    noted = [acknowledged(log) for log in logs]
    every = range(max(max(names) for names in noted) + 4 * size + 1)
    there = EmbeddingStore(folder, width).get([key(n) for n in every])
    bad += sum(not np.array_equal(there[key(n)], vector(n, width)) for n in every if key(n) in there)
    assert noted[0] == set(range(30 * size)) and noted[1] == set(range(1000, 1000 + 30 * size))
    assert raw(store, "PRAGMA integrity_check") == [("ok",)] and len(store) == len(there)
    lost = sum(key(n) not in there for n in set.union(*noted))
    while_adding = int(logs[2].read_bytes().endswith(b"begun\n"))
    return {"wrong": bad, "lost": lost, "entries": len(set.union(*noted)), "killed": len(noted[2]), "while_adding": while_adding}


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_two_writers_and_a_killed_one_lose_nothing_acknowledged(tmp_path: Path, rounds: int) -> None:
    found = [kill_round(tmp_path / str(seed), seed) for seed in range(rounds)]
    totals = {name: sum(one[name] for one in found) for name in found[0]}
    logging.getLogger(__name__).info("%d rounds: %s", rounds, totals)  # shown by pytest --log-cli-level=INFO
    assert totals["wrong"] == totals["lost"] == 0, totals
    assert all(one["killed"] > 0 for one in found)
    assert rounds < 20 or totals["while_adding"] > 0, "no kill came while a batch was being added"


def leave_half_written(store: EmbeddingStore) -> None:
    """A process ends inside a transaction, its journal and some of its pages on the disk."""
    script = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA cache_size = 1'); c.execute('PRAGMA cache_spill = 1'); c.execute('BEGIN IMMEDIATE')\n"
        "c.execute('UPDATE embeddings SET vector = zeroblob(96), checksum = 0')\n"
        "os._exit(9)\n"
    )
    before = store.file.read_bytes()
    assert subprocess.run([sys.executable, "-c", script, str(store.file)]).returncode == 9
    assert store.file.read_bytes() != before and Path(f"{store.file}-journal").stat().st_size > 0


def test_what_a_killed_writer_left_half_written_is_undone(store: EmbeddingStore) -> None:
    fill(store, range(300))
    leave_half_written(store)
    assert len(store.get([key(n) for n in range(300)])) == 300 and not wrong(store, range(300)) and store.damaged == 0


@needs_fork
def test_half_written_where_it_cannot_be_undone_is_told_not_read(open_folder: Path) -> None:
    store = EmbeddingStore(open_folder / "store", WIDTH)
    fill(store, range(300))
    leave_half_written(store)
    store.file.chmod(0o444)
    Path(f"{store.file}-journal").chmod(0o444)
    store.folder.chmod(0o555)

    def work() -> None:
        with pytest.raises(OSError, match=r"embeddings\.sqlite3: may only be read; .* a writer was killed: open the folder once"):
            EmbeddingStore(store.folder, WIDTH)

    as_nobody(work)
    store.folder.chmod(0o755)
    assert not wrong(store, range(300)) and len(store) == 300
