"""Neighbours of images against a plain loop over what the SQLite file holds; a query's own patients never answer."""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medvl.types import Fact, State
from reports.facts.ontology import Ontology
from tasks.archive.filters import FilterError
from tasks.archive.neighbours import NeighbourSearch, Over, Query, Scope, Voting
from tasks.archive.reading import ReadingError, ReadingSettings, load_reading, vote
from tasks.archive.records import ArchivedImage, ArchivedStudy, ArchivedText, ModelKey, StudyVectors
from tasks.archive.search import Archive
from tasks.archive.sqlite import SqliteStore
from tasks.archive.store import ArchiveError

D = 8
KEY = ModelKey("w" * 64, "p" * 64, D)
ONTOLOGY = Ontology({"opacity": (), "nodule": ("opacity",), "edema": (), "fracture": ()})
STATES: dict[int, State] = {1: "present", 0: "absent", -1: "uncertain"}
COUNT = 90


def unit(values: Any) -> Any:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def study(i: int, rng: np.random.Generator) -> tuple[ArchivedStudy, StudyVectors]:
    """Some patients have three studies, some studies have no report or no image, and every fifth report has the vector of the first."""
    texts: list[ArchivedText] = []
    if i % 8:
        for name in ("nodule", "edema"):
            states = [STATES[value] for value in STATES if rng.random() < 0.3][:1]
            texts += [ArchivedText(f"{state} {name} number {i}.", (Fact(name, state),)) for state in states]
        texts.append(ArchivedText("Nothing that is a finding."))
        texts.append(ArchivedText("Edema, but no fracture.", (Fact("edema", "present"), Fact("fracture", "absent"))))
    findings = {"edema": 1, "fracture": 0} if texts else {}
    films = rng.integers(0, 3)
    record = ArchivedStudy(
        f"s{i:02d}",
        f"p{i // 3 if i < 30 else i}",
        "xray",
        split="train" if i % 4 else "val",
        sections={"findings": " ".join(one.text for one in texts)} if texts else {},
        sentences=tuple(texts),
        findings=findings | ({"nodule": int(rng.integers(-1, 2))} if texts and i % 3 else {}),
        labels={"nodule": int(rng.integers(0, 2))} if i % 5 else {},
        images=tuple(ArchivedImage(f"/films/{i}-{k}.png") for k in range(films)),
    )
    rows = unit(rng.standard_normal((max(len(texts), 1), D))).astype(np.float32)
    report: Any = np.arange(1, D + 1, dtype=np.float32) / 10 if i % 5 == 0 else rows.mean(0)
    images = tuple(unit(rng.standard_normal((films, D))).astype(np.float32))
    return record, StudyVectors(report if texts else None, rows if texts else None, images or None)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "a.db"
    rng = np.random.default_rng(11)
    store = SqliteStore(path, create=True)
    store.write([study(i, rng) for i in range(COUNT)], store.model(KEY))
    store.close()
    return path


def reference(
    file: Path, queries: np.ndarray, k: int, over: Over, voting: Voting, split: str | None, without: tuple[str, ...]
) -> dict[str, tuple[float, str, dict[str, int]]]:
    """Study -> score, patient and facts of all neighbours: float64, one study at a time, from the tables of the file."""
    base = sqlite3.connect(file)
    told = base.execute("SELECT id, study_id, patient_id, split FROM studies").fetchall()
    scores, patient_of = {}, {}
    for number, name, patient, own_split in told:
        asked = (
            "SELECT vector FROM report_vectors WHERE study = ?"
            if over == "report"
            else "SELECT vector FROM image_vectors v JOIN images i ON i.id = v.image WHERE i.study = ?"
        )
        rows = [np.frombuffer(blob, "<f4").astype(np.float64) for (blob,) in base.execute(asked, (number,))]
        if not rows or patient in without or split not in (None, own_split):
            continue
        total = 0.0
        for q in queries:
            total += max(sum(a * b for a, b in zip(q, r, strict=True)) / math.dist(q, q * 0) / math.dist(r, r * 0) for r in rows)
        scores[name], patient_of[name] = total / len(queries), patient
    best: dict[str, float] = {}
    for name, score in scores.items():
        best[patient_of[name]] = max(best.get(patient_of[name], -2.0), score)
    last = sorted(best.values(), reverse=True)[min(k, len(best)) - 1]
    column = "fact" if voting == "report" else "label"
    found = {}
    for name, score in scores.items():
        if best[patient_of[name]] >= last - 1e-6:
            facts = base.execute(f"SELECT finding, {column} FROM study_findings WHERE study_id = ? AND {column} IS NOT NULL", (name,))
            found[name] = (score, patient_of[name], dict(facts.fetchall()))
    base.close()
    return found


@pytest.mark.parametrize("over", ["report", "image"])
@pytest.mark.parametrize("voting", ["report", "label"])
@pytest.mark.parametrize(("split", "k"), [(None, 1), (None, 6), ("train", 3), (None, 500)])
def test_neighbours_are_all_studies_of_the_nearest_patients(file: Path, over: Over, voting: Voting, split: str | None, k: int) -> None:
    search = NeighbourSearch(Archive(file), Scope(KEY, over, split and f"split = {split}", voting), ONTOLOGY)
    rng = np.random.default_rng(k)
    tied = 0
    for views in (1, 1, 2, 3):
        queries = rng.standard_normal((views, D))
        if views == 2 and over == "report":
            queries = np.tile(np.arange(1.0, D + 1), (2, 1))  # as near to every fifth report as can be
        without = tuple(f"p{one}" for one in rng.integers(0, 10, views - 1))
        expected = reference(file, queries, k, over, voting, split, without)
        found = search.neighbours(Query("new", queries, without), k)
        assert {one.study_id: one.score for one in found} == pytest.approx(
            {name: score for name, (score, _, _) in expected.items()}, abs=1e-6
        )
        assert {one.study_id: (one.patient_id, dict(one.facts)) for one in found} == {
            name: (patient, facts) for name, (_, patient, facts) in expected.items()
        }
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        patients = {one.patient_id for one in found}
        tied += len(patients) > k
        assert len(patients) >= min(k, 20) and not patients & set(without)
    assert tied or over == "image" or k == 500, "ties with the last patient are there to be tried"


def test_sentences_are_those_of_the_file_with_what_they_state(file: Path) -> None:
    search = NeighbourSearch(Archive(file), Scope(KEY), ONTOLOGY, ["nodule", "opacity", "fracture"])
    base = sqlite3.connect(file)
    asked = (
        "SELECT study_id, texts.text, facts.finding, facts.state FROM studies JOIN sentences s ON s.study = studies.id JOIN texts ON "
        "texts.id = s.text JOIN facts ON facts.text = texts.id"
    )
    stated: dict[str, set[tuple[str, str, str]]] = {}
    for name, text, finding, state in base.execute(asked):
        above = {"opacity"} if finding == "nodule" and state != "absent" else set()  # a nodule is an opacity; none may still be one
        stated.setdefault(name, set()).update((text, one, state) for one in {finding, *above})
    base.close()
    found = search.neighbours(Query("new", np.ones((1, D))), COUNT)
    assert len(found) > 60
    for one in found:
        assert {(text, name, state) for text, names, state in one.sentences for name in names} == stated.get(one.study_id, set())
    assert any(text == "Edema, but no fracture." and names == ("fracture",) for text, names, _ in found[0].sentences), "one for each state"
    assert any("opacity" in names for one in found for _, names, _ in one.sentences)
    without = NeighbourSearch(Archive(file), Scope(KEY), ONTOLOGY, ["nodule"]).neighbours(Query("new", np.ones((1, D))), COUNT)
    assert not any("opacity" in names for one in without for _, names, _ in one.sentences), (
        "what was not asked for is not said of a kind of it"
    )
    assert not any(one.sentences for one in search.neighbours(Query("new", np.ones((1, D))), 5, sentences=False))


def test_own_studies_do_not_answer_whichever_way_they_are_known(file: Path) -> None:
    search = NeighbourSearch(Archive(file), Scope(KEY, "image"), ONTOLOGY)
    base = sqlite3.connect(file)
    path, name, patient, blob = base.execute(
        "SELECT path, study_id, patient_id, vector FROM images i JOIN studies ON studies.id = study JOIN image_vectors v ON v.image = i.id "
        "WHERE patient_id = 'p4' LIMIT 1"
    ).fetchone()
    own = {row[0] for row in base.execute("SELECT study_id FROM studies WHERE patient_id = ?", (patient,))}
    base.close()
    vectors = np.frombuffer(blob, "<f4")[None]
    alone = search.neighbours(Query("elsewhere", vectors), 1)
    assert name in {one.study_id for one in alone} and alone[0].score == pytest.approx(1, abs=1e-6), "it is its own nearest"
    studies = [
        ("elsewhere", [Path("/films/none.png"), Path(path)], ()),
        ("x", [Path("/films/none.png")], ("p1",)),
        ("y", [Path("a\udcff")], ()),
    ]
    known = search.with_known_patients(studies)
    assert [list(patients) for _, _, patients in known] == [[patient], ["p1"], []]
    assert len(own) == 3
    for query in (Query("elsewhere", vectors, tuple(known[0][2])), Query("elsewhere", vectors, (patient, "p1"))):
        assert not {one.study_id for one in search.neighbours(query, COUNT)} & own
    assert name not in {one.study_id for one in search.neighbours(Query(name, vectors), COUNT)}, "a study of this id is itself"


def test_neighbours_for_more_patients_vote_as_those_for_fewer(file: Path) -> None:
    """So that what validation chose on many neighbours is what reading has with few."""
    search = NeighbourSearch(Archive(file), Scope(KEY), ONTOLOGY)
    rng = np.random.default_rng(3)
    differ = 0
    for _ in range(10):
        query = Query("new", rng.standard_normal((1, D)))
        many, few = search.neighbours(query, 40), search.neighbours(query, 4)
        differ += len(many) > len(few)
        for temperature in (0.05, None):
            settings = ReadingSettings(k=4, temperature=temperature, fewest=1)
            for one, other in zip(vote(many, search.findings, settings), vote(few, search.findings, settings), strict=True):
                assert (one.finding, one.call, one.reason, one.speaking) == (other.finding, other.call, other.reason, other.speaking)
                assert (one.present, one.absent, one.silent) == pytest.approx((other.present, other.absent, other.silent), abs=1e-12)
    assert differ == 10


def test_what_cannot_answer_is_told(file: Path, tmp_path: Path) -> None:
    archive = Archive(file)
    with pytest.raises(ArchiveError, match="no vectors of this model"):
        NeighbourSearch(archive, Scope(replace(KEY, weights_sha256="x" * 64)), ONTOLOGY)
    with pytest.raises(FilterError):
        NeighbourSearch(archive, Scope(KEY, filter="present(dragon)"), ONTOLOGY)
    search = NeighbourSearch(archive, Scope(KEY), ONTOLOGY, ["dragon", "edema"])
    assert search.findings == ("dragon", "edema") and search.silent_findings == ("dragon",)
    with pytest.raises(ArchiveError, match="study lost: none of its images"):
        search.neighbours(Query("lost", None), 3)
    with pytest.raises(ValueError, match="k 0"):
        search.neighbours(Query("new", np.ones((1, D))), 0)
    nobody = NeighbourSearch(archive, Scope(KEY, filter="split = test"), ONTOLOGY)
    assert nobody.neighbours(Query("new", np.ones((1, D))), 3) == () and nobody.patients == 0
    bare = SqliteStore(tmp_path / "bare.db", create=True, with_text=False)
    record, vectors = study(1, np.random.default_rng(0))
    bare.write([(record, replace(vectors, images=None))], bare.model(KEY))
    with pytest.raises(ArchiveError, match="--voting label"):
        NeighbourSearch(Archive(bare), Scope(KEY), ONTOLOGY)
    with pytest.raises(ArchiveError, match="no image vectors of this model; take --over report"):
        NeighbourSearch(Archive(bare), Scope(KEY, "image"), ONTOLOGY)
    (one,) = NeighbourSearch(Archive(bare), Scope(KEY, voting="label"), ONTOLOGY).neighbours(Query("new", np.ones((1, D))), 3)
    assert one.facts == record.labels and record.labels and one.sentences == ()


def test_settings_go_with_their_scope_and_come_back_from_disk(tmp_path: Path) -> None:
    scope = Scope(KEY, "image", "split = train")
    settings = ReadingSettings(k=7, fitted_on={"scope": scope.to_dict()}, seen=("ab",))
    settings.save(tmp_path / "new" / "reading.json")
    again = load_reading(tmp_path / "new" / "reading.json")
    assert again == settings
    scope.check(again)
    for other, told in (
        (replace(scope, model=replace(KEY, preprocessing_sha256="q" * 64)), "another model"),
        (replace(scope, over="report"), "over 'image' and not 'report'"),
        (replace(scope, filter=None), "filter 'split = train' and not None"),
        (replace(scope, voting="label"), "voting"),
    ):
        with pytest.raises(ReadingError, match=told):
            other.check(again)
    with pytest.raises(ReadingError, match="do not say"):
        scope.check(ReadingSettings())
    for odd in ({"over": "sentence"}, {"voting": "all"}, {"filter": 3}):
        with pytest.raises(ValueError, match="expected report or image"):
            Scope(KEY, **odd)
    record = settings.to_dict()
    for damaged in (
        "",
        "[]",
        "{}",
        json.dumps({**record, "format": 9}),
        json.dumps({**record, "k": "7"}),
        json.dumps({**record, "fitted_on": 3}),
        json.dumps({**record, "floor": math.nan}),
    ):
        (tmp_path / "damaged.json").write_text(damaged)
        with pytest.raises(ReadingError, match=r"damaged\.json"):
            load_reading(tmp_path / "damaged.json")
    with pytest.raises(ReadingError, match=r"none\.json"):
        load_reading(tmp_path / "none.json")
