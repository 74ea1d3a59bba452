"""The store: all or nothing, whatever ends a process; the same again changes nothing; what is removed is gone from every byte."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from medvl.types import Fact
from tasks.archive.derived import open_derived
from tasks.archive.records import ArchivedImage, ArchivedStudy, ArchivedText, ModelKey, StudyVectors
from tasks.archive.search import Archive, Question
from tasks.archive.sqlite import SqliteStore
from tasks.archive.store import ArchiveError
from tasks.archive.upkeep import facts_of, files_with, problems_of, removed_for_good
from tasks.report_facts import said_of

D = 16
KEY = ModelKey("w" * 64, "p" * 64, D)


def study(number: int, patient: str | None = None, words: str = "") -> tuple[ArchivedStudy, StudyVectors]:
    """A study with a report of two sentences, one of which all share."""
    own = words or f"Opacity number{number} seen."
    rng = np.random.default_rng(number)
    rows = np.stack([np.eye(D, dtype=np.float32)[0], rng.standard_normal(D).astype(np.float32)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    record = ArchivedStudy(
        f"study-{number:04d}",
        patient or f"patient-{number // 2:04d}",
        "xray",
        source="table.csv",
        date="2020-01-31",
        age=60.0,
        sections={"findings": f"No pneumothorax. {own}", "indication": f"Reason{number}"},
        sentences=(
            ArchivedText("No pneumothorax.", (Fact("pneumothorax", "absent"),)),
            ArchivedText(own, (Fact("opacity", "present", "left"),)),
        ),
        findings={"pneumothorax": 0, "opacity": 1},
        labels={"edema": 1},
        images=(ArchivedImage(f"/films/{number}.png", "PA"),),
    )
    return record, StudyVectors(rows.mean(0), rows, (rows[1],))


def filled(path: Path, count: int = 12) -> tuple[SqliteStore, int]:
    store = SqliteStore(path, create=True)
    model = store.model(KEY)
    store.write([study(i) for i in range(count)], model)
    return store, model


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "a.db")
    record, vectors = study(5)
    number = store.number(record.study_id)
    assert number is not None
    (found,) = store.found([number])
    assert (found.study_id, found.patient_id) == (record.study_id, record.patient_id)
    assert found.sections == record.sections
    assert [words for _, words in found.sentences] == [one.text for one in record.sentences]
    assert (found.findings, found.labels) == (dict(record.findings), dict(record.labels))
    assert found.images == (("/films/5.png", "PA"),)
    assert store.facts([text for text, _ in found.sentences]) == {
        text: one.facts for (text, _), one in zip(found.sentences, record.sentences, strict=True)
    }
    assert dict(store.vectors(model, "report"))[number] == vectors.report.astype("<f4").tobytes()  # type: ignore[union-attr]
    counts = store.counts()
    assert (counts.studies, counts.patients, counts.reports, counts.sentences, counts.images) == (12, 6, 12, 13, 12)
    assert counts.vectors[model] == {"report": 12, "sentence": 13, "image": 12}
    assert problems_of(store) == []


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store, _ = filled(tmp_path / "a.db")
        Archive(tmp_path / "a.db")
    finally:
        os.umask(before)
    for path in (*store.files(), store.derived):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert {path.name for path in store.files()} == {"a.db", "a.db-wal", "a.db-shm"}


def test_the_same_again_changes_nothing_and_a_change_replaces(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "a.db")
    everything = [dump(store), store.counts()]
    store.write([study(i) for i in range(12)], model)
    assert [dump(store), store.counts()] == everything
    record, vectors = study(3)
    changed = dataclasses.replace(
        record, sections={"findings": "No pneumothorax. Clear."}, sentences=(record.sentences[0], ArchivedText("Clear."))
    )
    store.write([(changed, vectors)], model)
    assert store.counts().studies == 12
    assert store.matching("number3") == []
    assert len(store.matching("clear")) == 1
    assert store.kept([record.study_id])[record.study_id].digest == changed.digest()
    assert problems_of(store) == []
    assert sqlite3.connect(store.path).execute("SELECT 1 FROM texts WHERE text LIKE '%number3 %'").fetchall() == []


def dump(store: SqliteStore) -> set[tuple[object, ...]]:
    db = sqlite3.connect(store.path)
    tables = (
        "studies",
        "reports",
        "texts",
        "sentences",
        "facts",
        "study_findings",
        "images",
        "report_vectors",
        "sentence_vectors",
        "image_vectors",
    )
    return {(table, *row) for table in tables for row in db.execute(f"SELECT * FROM {table}")}


def test_a_second_model_stands_beside_the_first(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "a.db")
    other = store.model(ModelKey("x" * 64, "p" * 64, D + 1))
    assert store.kept(["study-0001"])["study-0001"].models == {model}
    record, _ = study(1)
    wide = np.ones((2, D + 1), np.float32)
    store.write([(record, StudyVectors(wide[0], wide, None))], other)
    assert store.kept(["study-0001"])["study-0001"].models == {model, other}
    with pytest.raises(ArchiveError, match=r"study study-0002: a vector of shape \(16,\), expected \(17,\)"):
        store.write([study(2)], other)
    assert store.kept(["study-0002"])["study-0002"].models == {model}
    archive = Archive(tmp_path / "a.db")
    assert [hit.study.study_id for hit in archive.search(Question(vectors=np.ones(D + 1)), other)] == ["study-0001"]
    assert len(archive.search(Question(vectors=np.ones(D), top=50), model)) == 12


def test_a_bad_vector_leaves_nothing_of_its_batch(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "a.db", 2)
    record, vectors = study(7)
    broken = dataclasses.replace(vectors, report=np.full(D, np.nan, np.float32))
    with pytest.raises(ArchiveError, match="NaN or infinity"):
        store.write([study(6), (record, broken)], model)
    assert store.counts().studies == 2
    assert problems_of(store) == []


def _ingest(path: Path, pipe: Connection, first: int) -> None:
    """Write batches for ever and say which are safe."""
    store = SqliteStore(path)
    model = store.model(KEY)
    for at in range(first, first + 100_000, 3):
        store.write([study(i) for i in range(at, at + 3)], model)
        pipe.send(at)
        if at % 4 == 0:
            open_derived(store)


@pytest.mark.slow
def test_killed_at_any_moment_nothing_that_was_safe_is_lost(tmp_path: Path) -> None:
    """SIGKILL 20 times in the midst of writing: each acknowledged batch is whole, none is half there, and search works at once."""
    path = tmp_path / "a.db"
    SqliteStore(path, create=True).close()
    chance, fork = random.Random(8), multiprocessing.get_context("fork")
    safe: set[int] = set()
    first = 0
    for _ in range(20):
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=_ingest, args=(path, there, first))
        process.start()
        there.close()
        wait = chance.uniform(0.02, 0.6)
        assert here.poll(20)
        time.sleep(wait)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                safe.add(here.recv())
        first = max(safe) + 3
        store = SqliteStore(path)
        assert store.verify() == []
        found = {row.metadata[0] for row in store.rows()}
        expected = {f"study-{i:04d}" for at in safe for i in range(at, at + 3)}
        beyond = found - expected
        assert expected <= found
        assert len(beyond) in (0, 3), "a batch that was not acknowledged is there whole or not at all"
        first += len(beyond)
        safe |= {int(sorted(beyond)[0][-4:])} if beyond else set()
        archive = Archive(path)
        hit = archive.search(Question(vectors=study(min(safe))[1].images[0], over="image", top=1), 1)[0]  # type: ignore[index]
        assert hit.study.study_id == f"study-{min(safe):04d}"
        assert len(archive.derived.numbers) == len(found)
        assert problems_of(store) == []
        archive.close()
        store.close()
    assert len(safe) >= 20


def test_a_full_disk_is_said_and_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "a.db")
    before = store.counts()
    pages = store._one("PRAGMA page_count")
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ArchiveError, match=r"a\.db: the disk is full; the store is as it was before"):
        store.write([study(i) for i in range(100, 400)], model)
    assert store.counts() == before
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.write([study(i) for i in range(100, 110)], model)
    assert store.counts().studies == before.studies + 10
    assert problems_of(store) == []


def _limited(path: Path, pipe: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = SqliteStore(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    try:
        for at in range(100, 10_000, 50):
            store.write([study(i) for i in range(at, at + 50)], 1)
            pipe.send(at)
    except ArchiveError as error:
        pipe.send(str(error))


def test_a_file_that_may_not_grow_is_said_and_the_store_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    filled(path)[0].close()
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_limited, args=(path, there))
    process.start()
    there.close()
    told: list[object] = []
    while not told or isinstance(told[-1], int):
        told.append(here.recv())
    process.join()
    assert "the store is as it was before" in str(told[-1])
    store = SqliteStore(path)
    assert store.counts().studies == 12 + 50 * (len(told) - 1)
    assert problems_of(store) == []


def _as_nobody(folder: Path, model: int, pipe: Connection) -> None:
    """Root may write anywhere: look as a user who may not."""
    os.setgid(65534)
    os.setuid(65534)
    try:
        check_read_only(folder, model)
        pipe.send("fine")
    except BaseException as error:
        pipe.send(repr(error))


def test_a_store_on_a_disk_that_cannot_be_written_to_answers_and_refuses() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        store, model = filled(folder / "a.db")
        Archive(folder / "a.db").close()
        store.close()
        if os.geteuid() != 0:
            check_read_only(folder, model)
            return
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        fork = multiprocessing.get_context("fork")
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=_as_nobody, args=(folder, model, there))
        process.start()
        assert here.recv() == "fine"
        process.join()


def test_a_store_that_cannot_be_written_to_answers_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only disk, whose files may be read and not locked."""
    store, model = filled(tmp_path / "a.db")
    Archive(tmp_path / "a.db").close()
    store.close()
    really = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and really(path, mode))
    kept = SqliteStore(tmp_path / "a.db")
    assert kept.read_only
    with pytest.raises(ArchiveError, match="cannot be written to"):
        kept.write([study(99)], model)
    with pytest.raises(ArchiveError, match="cannot be written to"):
        kept.remove(study_ids=["study-0001"])
    assert kept.counts().studies == 12
    assert len(Archive(tmp_path / "a.db").search(Question(vectors=np.ones(D), top=3), model)) == 3


def check_read_only(folder: Path, model: int) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        store = SqliteStore(folder / "a.db")
        with pytest.raises(ArchiveError, match="cannot be written to"):
            store.write([study(99)], model)
        assert len(Archive(folder / "a.db").search(Question(vectors=np.ones(D), top=3), model)) == 3
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)


def test_a_removed_patient_is_in_no_byte_of_any_file(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "a.db")
    secret = "Zebraword beside the quokka, née Ångström."
    store.write([study(50, "Mx. Secret Person", secret), study(51, "Mx. Secret Person")], model)
    archive = Archive(tmp_path / "a.db")
    assert len(archive.search(Question(words="zebraword"))) == 1
    assert files_with(store, ["Zebraword"])
    gone, left = removed_for_good(store, patients=["Mx. Secret Person"])
    assert gone.studies == ("study-0050", "study-0051")
    assert left == []
    assert {"Mx. Secret Person", secret, "study-0050", "/films/51.png"} <= set(gone.traces)
    assert "No pneumothorax." not in gone.traces  # others say so too
    for word in (b"ebraword", b"quokka", b"zebraword", b"Secret", b"number51", b"study-0051", b"/films/50.png", "Ångström".encode()):
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and word in path.read_bytes()], word
    assert archive.search(Question(words="zebraword")) == []
    assert problems_of(store) == []
    assert removed_for_good(store, patients=["nobody"])[0].studies == ()


def test_without_text_no_word_is_kept(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.db", create=True, with_text=False)
    model = store.model(KEY)
    store.write([study(i) for i in range(5)], model)
    archive = Archive(tmp_path / "a.db")
    hit = archive.search(Question(vectors=study(2)[1].sentences, over="sentence", top=1), model)[0]  # type: ignore[arg-type]
    assert hit.study.study_id == "study-0002"
    assert [one.words for one in hit.sentences] == [None, None]
    assert hit.study.sections == {}
    for word in (b"neumothorax", b"pacity", b"number2", b"Reason2"):
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and word in path.read_bytes()], word
    with pytest.raises(ArchiveError, match="keeps no text"):
        store.matching("edema")
    with pytest.raises(ArchiveError, match="keeps no words"):
        archive.search(Question(words="edema"))
    assert SqliteStore(tmp_path / "a.db").with_text is False


def test_derived_files_are_made_again_when_they_are_damaged_or_gone(tmp_path: Path) -> None:
    store, model = filled(tmp_path / "a.db")
    question = Question(vectors=np.ones(D), top=5)
    want = [hit.study.study_id for hit in Archive(tmp_path / "a.db").search(question, model)]
    folder = store.derived
    matrix = next(folder.glob("*report-matrix.npy"))
    damages = [
        lambda: shutil.rmtree(folder),
        lambda: next(folder.glob("*report-matrix.npy")).write_bytes(b"short"),
        lambda: (folder / "current.json").write_text("{"),
        lambda: (folder / "current.json").write_text("[]"),
        lambda: next(folder.glob("*-numbers.npy")).unlink(),
    ]
    for damage in damages:
        damage()
        assert [hit.study.study_id for hit in Archive(tmp_path / "a.db").search(question, model)] == want
    assert not matrix.exists()
    values = np.load(next(folder.glob("*report-matrix.npy")), mmap_mode="r+")
    values[0] = -values[0]
    values.flush()
    assert any("1 report vectors of model 1 differ" in problem for problem in problems_of(store))


def test_other_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no such store"):
        SqliteStore(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("this is no database at all, but long enough to be looked at as one")
    with pytest.raises(ArchiveError, match="no SQLite file"):
        SqliteStore(tmp_path / "text.db")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.commit()
    with pytest.raises(ArchiveError, match="of something else"):
        SqliteStore(tmp_path / "other.db")
    store, _ = filled(tmp_path / "a.db")
    store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(ArchiveError, match="of format 99"):
        SqliteStore(tmp_path / "a.db")
    with pytest.raises(ArchiveError, match="is a folder"):
        SqliteStore(tmp_path)


def test_damage_is_found(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "a.db")
    store._db.execute("UPDATE sentence_vectors SET vector = x'00' WHERE text = 1")
    assert any("1 of the sentence vectors" in problem for problem in store.verify())
    store._db.execute("DELETE FROM sentence_vectors WHERE text = 1")
    assert any("12 sentences of studies" in problem for problem in store.verify())
    store._db.execute("DROP TRIGGER reports_out")
    store._db.execute("DELETE FROM reports WHERE study = 1")
    assert any("full-text index" in problem for problem in store.verify())


def test_what_reports_say_counts_kinds_for_what_they_are_kinds_of() -> None:
    above = {"hydropneumothorax": ("pneumothorax", "effusion"), "pneumothorax": ()}
    facts = [Fact("hydropneumothorax", "uncertain"), Fact("pneumothorax", "absent"), Fact("edema", "absent"), Fact("edema", "present")]
    assert said_of(facts, above) == {"hydropneumothorax": -1, "pneumothorax": -1, "effusion": -1, "edema": 1}
    assert said_of([Fact("hydropneumothorax", "absent")], above) == {"hydropneumothorax": 0}


def test_counts_are_told(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "a.db")
    told = facts_of(store)
    assert told["findings"] == {
        "opacity": {"present": 12, "absent": 0, "uncertain": 0},
        "pneumothorax": {"present": 0, "absent": 12, "uncertain": 0},
    }
    assert told["models"][0]["vectors"] == {"report": 12, "sentence": 13, "image": 12}
    assert told["bytes"] > 0
