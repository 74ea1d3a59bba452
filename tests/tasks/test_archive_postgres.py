"""The archive in PostgreSQL: what it keeps and what it finds is what the file keeps and finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvl.types import Fact
from reports.facts.ontology import Ontology
from tasks.archive.filters import parse_filter
from tasks.archive.neighbours import NeighbourSearch, Query, Scope
from tasks.archive.postgres import PostgresStore
from tasks.archive.records import ArchivedImage, ArchivedStudy, ArchivedText, ModelKey, StudyVectors
from tasks.archive.search import Archive, Question
from tasks.archive.sqlite import SqliteStore
from tasks.archive.store import ArchiveError, ArchiveStore
from tasks.archive.upkeep import problems_of, removed_for_good

D = 12
KEY = ModelKey("w" * 64, "p" * 64, D)
FILTERS = (
    None,
    "age >= 40",
    "modality = ct or view = pa",
    "not present(edema) and date < 2015-06",
    "label(lung_nodule) = 1 or uncertain(edema)",
    'patient_id != "p 7" and sex in (F)',
)


def studies(count: int = 150) -> list[tuple[ArchivedStudy, StudyVectors]]:
    rng = np.random.default_rng(2)
    said = {f"Sentence number{k}.": rng.standard_normal(D).astype(np.float32) for k in range(60)}
    made = []
    for i in range(count):
        texts = [str(one) for one in rng.choice(list(said), rng.integers(0, 4), replace=False)]
        rows = np.stack([said[text] / np.linalg.norm(said[text]) for text in texts]) if texts else None
        images = rng.standard_normal((rng.integers(0, 3), D)).astype(np.float32)
        units = [row / np.linalg.norm(row) for row in images]
        study = ArchivedStudy(
            f"{'süß' if i % 9 == 0 else 'Study'}-{i:03d}",
            f"p {i // 3}",
            "ct" if i % 4 == 0 else "xray",
            view=None if i % 5 == 0 else "PA",
            date=None if i % 6 == 0 else f"20{10 + i % 10}-{1 + i % 12:02d}-15",
            sex=(None, "F", "M")[i % 3],
            age=None if i % 7 == 0 else float(i % 90),
            sections={"findings": " ".join(texts)} if texts else {},
            sentences=tuple(ArchivedText(text, (Fact("edema", "present", size_mm=3.5),)) for text in texts),
            findings={"edema": (1, 0, -1)[i % 3]} if texts else {},
            labels={"lung_nodule": i % 2},
            images=tuple(ArchivedImage(f"/films/{i}-{k}.png", "PA") for k in range(len(units))),
        )
        vectors = StudyVectors(None if rows is None else rows.mean(0), rows, tuple(units) if units else None)
        made.append((study, vectors))
    return made


@pytest.fixture(scope="module")
def stores(address: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[PostgresStore, SqliteStore]:
    pytest.MonkeyPatch().setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    both = PostgresStore(address, create=True), SqliteStore(tmp_path_factory.mktemp("s") / "a.db", create=True)
    for store in both:
        model = store.model(KEY)
        for start in range(0, 150, 40):
            store.write(studies()[start : start + 40], model)
    return both


def everything(store: ArchiveStore) -> Any:
    """All that a store gives out, without its own numbers."""
    rows = list(store.rows())
    name = {row.id: row.metadata[0] for row in rows}
    found = store.found([row.id for row in rows])
    words = [[text for _, text in one.sentences] for one in found]
    plain = [(one.study_id, one.metadata, one.sections, one.findings, one.labels, one.images) for one in found]
    texts = store.facts({text for one in found for text, _ in one.sentences})
    stated = [[texts[text] for text, _ in one.sentences] for one in found]
    vectors = {name[study]: vector for study, vector in store.vectors(1, "report")}
    documents = {name[study]: text for study, text in store.documents()}
    return [row.metadata for row in rows], [row.text_digest for row in rows], plain, words, stated, vectors, documents, store.counts()


def test_both_keep_the_same(stores: tuple[PostgresStore, SqliteStore]) -> None:
    postgres, sqlite = stores
    assert everything(postgres) == everything(sqlite)
    assert problems_of(postgres) == []
    before = postgres.generation(), everything(postgres)
    postgres.write(studies()[:30], 1)
    assert everything(postgres) == before[1] and postgres.generation() == before[0] + 1


@pytest.mark.parametrize("over", ["report", "sentence", "image"])
def test_the_server_finds_the_same_ranks(stores: tuple[PostgresStore, SqliteStore], over: Any) -> None:
    """170 vector queries over each kind, most with filters: ids at the same ranks where scores do not tie."""
    postgres, archive = stores[0], Archive(stores[1])
    rng = np.random.default_rng(4)
    columns = archive.derived.columns
    for i in range(170):
        query = rng.standard_normal((1 + i % 3, D))
        where = None if FILTERS[i % 6] is None else parse_filter(FILTERS[i % 6] or "", archive.derived.findings)
        allowed = None if where is None else where.mask(columns)
        want = archive.search(Question(vectors=query, over=over, top=12, allowed=allowed, group=False), 1)
        unit = query / np.linalg.norm(query, axis=1, keepdims=True)
        got = postgres.nearest(unit, 1, over, where=where, top=12)
        assert [score for _, score in got] == pytest.approx([hit.score for hit in want], abs=2e-6)
        scores = [hit.score for hit in want]
        apart = [k for k, score in enumerate(scores[:-1]) if sum(abs(score - other) < 4e-6 for other in scores) == 1]
        assert [got[k][0] for k in apart] == [want[k].study.study_id for k in apart]
        may = np.diff(archive.derived.gallery(1, over).starts) > 0
        assert len(want) == min(12, int((may if allowed is None else may & allowed).sum())) > 0


def test_the_server_gives_the_same_neighbours(stores: tuple[PostgresStore, SqliteStore]) -> None:
    """Ids, patients, facts and sentences of the neighbours of images, own patients left out."""
    search = [NeighbourSearch(Archive(one), Scope(KEY, "report", "age >= 10"), Ontology({"edema": ()})) for one in stores]
    rng = np.random.default_rng(5)
    asked = [(f"new {i}", [Path(f"/films/{i}-0.png"), Path(f"/films/{i}-9.png")], ()) for i in range(12)]
    known = [[patients for _, _, patients in one.with_known_patients(asked)] for one in search]
    films = {image.path for study, _ in studies() for image in study.images}
    assert known[0] == known[1] == [[f"p {i // 3}"] if f"/films/{i}-0.png" in films else [] for i in range(12)]
    for patients in known[0]:
        query = Query("new", rng.standard_normal((2, D)), tuple(patients))
        there, here = (one.neighbours(query, 7) for one in search)
        assert len({one.patient_id for one in here}) >= 7 and not {one.patient_id for one in here} & set(patients)
        assert {one.study_id: (one.facts, one.sentences, one.patient_id) for one in there} == {
            one.study_id: (one.facts, one.sentences, one.patient_id) for one in here
        }
        assert any(one.sentences for one in here)
        assert [one.score for one in there] == pytest.approx([one.score for one in here], abs=1e-6)


def test_every_mode_works_over_the_server_too(stores: tuple[PostgresStore, SqliteStore]) -> None:
    one, other = (Archive(store) for store in stores)
    query = np.random.default_rng(5).standard_normal((2, D))
    for question in (
        Question(vectors=query, over="sentence", top=20),
        Question(words="number7 number12", top=20),
        Question(vectors=query, words="sentence number7", over="sentence", top=20),
    ):
        model = None if question.vectors is None else 1
        got, want = one.search(question, model), other.search(question, model)
        assert [(hit.study.study_id, hit.same_report) for hit in got] == [(hit.study.study_id, hit.same_report) for hit in want]
        assert [hit.score for hit in got] == pytest.approx([hit.score for hit in want], abs=1e-6)
    assert one.matching("number7").tolist() == other.matching("number7").tolist()


def test_a_patient_is_removed_and_a_bad_batch_leaves_nothing(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = PostgresStore(address, namespace="other", create=True)
    model = store.model(KEY)
    store.write(studies()[:9], model)
    Archive(store)
    gone, left = removed_for_good(store, patients=["p 1"])
    assert len(gone.studies) == 3 and left == [] and store.counts().studies == 6
    study, vectors = studies()[9]
    broken = StudyVectors(np.full(D, np.nan, np.float32), vectors.sentences, vectors.images)
    with pytest.raises(ArchiveError, match="NaN or infinity"):
        store.write([studies()[3], (study, broken)], model)
    assert store.counts().studies == 6 and problems_of(store) == []
    bare = PostgresStore(address, namespace="bare", create=True, with_text=False)
    bare.write(studies()[:9], bare.model(KEY))
    assert list(bare.documents()) == [] and not bare.with_text
    with pytest.raises(ArchiveError, match="keeps no text"):
        bare.matching("sentence")


def test_what_is_no_store_is_told(address: str) -> None:
    with pytest.raises(ArchiveError, match="no such store"):
        PostgresStore(address, namespace="nowhere")
    with pytest.raises(ArchiveError, match="something else"):
        PostgresStore(address, namespace="public")
    with pytest.raises(ArchiveError, match="small letters"):
        PostgresStore(address, namespace='x"; DROP SCHEMA public')
    with pytest.raises(ArchiveError, match="no connection") as error:
        PostgresStore("postgresql://somebody:secret@127.0.0.1:1/none")
    assert "secret" not in str(error.value)
