"""The store of results, against sqlite3 itself, several processes, and writers that are killed."""

import hashlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reports.providers import store as module
from reports.providers.keys import result_key
from reports.providers.store import ResultStore

WRITER = """
import hashlib, sys
from pathlib import Path
from reports.providers.store import ResultStore
store = ResultStore(Path(sys.argv[1]))
for i in range(int(sys.argv[3])):
    key = f"{sys.argv[2]}-{i}"
    store.put(key, hashlib.sha256(key.encode()).digest() * 2000)
    sys.stdout.write(key + "\\n")
    sys.stdout.flush()
"""


def start_writer(path, name, count):
    root = Path(module.__file__).parents[2]
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)})


def value_of(key):
    return hashlib.sha256(key.encode()).digest() * 2000


def test_what_is_put_is_got_again_also_from_another_process(tmp_path):
    path = tmp_path / "deep" / "results.sqlite"
    store = ResultStore(path)
    assert store.get("a") is None and store.keys() == frozenset()
    store.put("a", b"one")
    store.put("a", b"two")
    store.put("b", b"")
    assert (store.get("a"), store.get("b"), store.keys()) == (b"two", b"", {"a", "b"})
    assert start_writer(path, "c", 1).wait() == 0
    assert store.get("c-0") == value_of("c-0")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_writers_and_one_killed_lose_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "results.sqlite"
    writers = [start_writer(path, "a", 40), start_writer(path, "b", 40)]
    killed = start_writer(path, "k", 100_000)
    acknowledged = []
    for line in killed.stdout:
        acknowledged.append(line.strip())
        if len(acknowledged) == 25:
            killed.send_signal(signal.SIGKILL)
            break
    acknowledged += [line.strip() for line in killed.stdout if line.endswith("\n")]
    killed.wait()
    for writer in writers:
        out, _ = writer.communicate(timeout=120)
        assert writer.returncode == 0
        acknowledged += out.split()
    assert len(acknowledged) >= 105
    store = ResultStore(path)
    kept = store.keys()
    assert set(acknowledged) <= kept
    assert all(store.get(key) == value_of(key) for key in kept)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_threads_and_forked_processes_share_a_store(tmp_path):
    store = ResultStore(tmp_path / "results.sqlite")
    with store.many(), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put(str(i), str(i).encode()), range(100)))
    assert [store.get(str(i)) for i in range(100)] == [str(i).encode() for i in range(100)]
    assert threading.active_count() < 20
    child = os.fork()
    if child == 0:  # the connection of a parent must not be used in a child
        store.put("child", b"x")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get("child") == b"x"


def test_many_processes_may_make_the_store_at_once(tmp_path):
    path = tmp_path / "results.sqlite"
    writers = [start_writer(path, str(i), 3) for i in range(4)]
    for writer in writers:
        writer.communicate(timeout=120)
    assert [writer.returncode for writer in writers] == [0] * 4
    assert len(ResultStore(path).keys()) == 12


def test_a_damaged_result_is_as_good_as_missing(tmp_path):
    store = ResultStore(tmp_path / "results.sqlite")
    store.put("a", b"right")
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE results SET value = ?", (b"wrong",))
    assert store.get("a") is None
    store.put("a", b"right")
    assert store.get("a") == b"right"


def test_a_file_of_something_else_is_left_alone(tmp_path):
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    before = other.read_bytes()
    with pytest.raises(ValueError, match="is an SQLite file of something else"):
        ResultStore(other)
    text = tmp_path / "notes.txt"
    text.write_text("no database, and long enough to be looked at " * 100)
    with pytest.raises(ValueError, match="is not a result store"):
        ResultStore(text)
    assert other.read_bytes() == before and text.read_text().startswith("no database")
    with pytest.raises(OSError, match=r"."):
        ResultStore(tmp_path)


def test_a_writer_waits_for_another(tmp_path):
    store = ResultStore(tmp_path / "results.sqlite")
    blocker = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, lambda: blocker.execute("ROLLBACK")).start()
    begin = time.monotonic()
    store.put("a", b"x")
    assert time.monotonic() - begin > 0.2 and store.get("a") == b"x"
    blocker.close()


def test_a_key_depends_on_everything():
    base = ("text", "provider", "1", "schema", "prompt")
    keys = {result_key(*base), *(result_key(*base[:i], base[i] + "x", *base[i + 1 :]) for i in range(5))}
    assert len(keys) == 6 and all(len(key) == 64 for key in keys)
    assert result_key("a", "b", "c", "d", "e") != result_key("a", "bc", "", "d", "e")
