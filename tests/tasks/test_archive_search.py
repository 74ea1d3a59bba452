"""Questions to an archive against plain loops over everything: every mode, filters, ties, equal reports, hits and what they name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import Stemmer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medvl.types import Fact
from tasks.archive.records import ArchivedImage, ArchivedStudy, ArchivedText, ModelKey, StudyVectors
from tasks.archive.search import Archive, Question, ranking
from tasks.archive.sqlite import SqliteStore
from tasks.archive.store import ArchiveError

D = 8
WORDS = [
    "heart",
    "lung",
    "effusion",
    "effusions",
    "pneumothorax",
    "left",
    "right",
    "small",
    "large",
    "opacity",
    "nodule",
    "clear",
    "enlarged",
    "edema",
    "the",
    "a",
    "of",
]


@dataclass
class World:
    """An archive, and what is in it as plain values."""

    archive: Archive
    model: int
    studies: list[ArchivedStudy] = field(default_factory=list)
    sentence: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    images: dict[str, list[NDArray[np.float32] | None]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """240 studies: with and without reports and images, sentences that repeat, whole reports that repeat, vectors that tie exactly."""
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("archive") / "a.db"
    store = SqliteStore(path, create=True)
    number = store.model(ModelKey("w" * 64, "p" * 64, D))
    made = World(None, number)  # type: ignore[arg-type]
    few = [np.array(v, np.float32) for v in rng.integers(-1, 2, (12, D)) if np.any(v)]  # coarse: many equal cosines
    batch = []
    for i in range(240):
        told = [" ".join(rng.choice(WORDS, rng.integers(1, 4))).capitalize() + "." for _ in range(rng.integers(0, 4))]
        if i % 9 == 0 and i:
            told = [one.text for one in made.studies[i - 5].sentences]
        told = list(dict.fromkeys(told))
        for text in told:
            vector = few[rng.integers(len(few))]
            made.sentence.setdefault(text, (vector / np.linalg.norm(vector)).astype(np.float32))
        images = [few[rng.integers(len(few))] / 1.0 for _ in range(rng.integers(0, 3))]
        units = [(v / np.linalg.norm(v)).astype(np.float32) for v in images]
        study = ArchivedStudy(
            f"s{(i * 37) % 240:03d}",
            f"p{i // 3}",
            "ct" if i % 4 == 0 else "xray",
            age=None if i % 7 == 0 else float(i % 90),
            sections={"findings": " ".join(told)} if told else {},
            sentences=tuple(ArchivedText(text, (Fact("edema", "present"),)) for text in told),
            images=tuple(ArchivedImage(f"/films/{i}-{k}.png") for k in range(len(units))),
        )
        kept: list[NDArray[np.float32] | None] = [None if k == 1 and i % 5 == 0 else v for k, v in enumerate(units)]
        rows = np.stack([made.sentence[text] for text in told]) if told else None
        vectors = StudyVectors(None if rows is None else rows.mean(0), rows, tuple(kept) if kept else None)
        made.studies.append(study)
        made.images[study.study_id] = kept
        batch.append((study, vectors))
    for start in range(0, len(batch), 50):
        store.write(batch[start : start + 50], number)
    store.close()
    made.archive = Archive(path)
    return made


def unit(vector: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = np.asarray(vector, np.float64)
    return wide / math.sqrt(sum(float(x) ** 2 for x in wide))


def vector_score(world: World, study: ArchivedStudy, queries: NDArray[np.float64], over: str) -> float | None:
    """The rule of the module, one product at a time."""
    if over == "image":
        rows = [vector for vector in world.images[study.study_id] if vector is not None]
    else:
        rows = [world.sentence[one.text] for one in study.sentences]
        if over == "report" and rows:
            rows = [np.mean(np.stack(rows), axis=0, dtype=np.float32)]
            if not np.linalg.norm(rows[0]) > 1e-6:
                return 0.0
    if not rows:
        return None
    return sum(max(sum(float(a) * float(b) for a, b in zip(unit(q), unit(row), strict=True)) for row in rows) for q in queries) / len(
        queries
    )


def text_scores(world: World, words: str) -> dict[str, float]:
    """BM25 as Lucene has it, over stems, by its formula."""
    stem = Stemmer.Stemmer("english").stemWord
    docs = {s.study_id: [stem(w) for w in re.findall(r"[a-z0-9]+", s.sections["findings"].lower())] for s in world.studies if s.sections}
    mean = sum(map(len, docs.values())) / len(docs)
    found: dict[str, float] = {}
    for name, doc in docs.items():
        total = 0.0
        for word in (stem(w) for w in re.findall(r"[a-z0-9]+", words.lower())):
            n = sum(word in other for other in docs.values())
            f = doc.count(word)
            total += math.log(1 + (len(docs) - n + 0.5) / (n + 0.5)) * f / (f + 1.2 * (0.25 + 0.75 * len(doc) / mean)) if f else 0.0
        if total > 0:
            found[name] = total
    return found


def expected(scores: dict[str, float], world: World, top: int, group: bool) -> list[tuple[str, float]]:
    said = {s.study_id: " ".join(s.sections.get("findings", "").casefold().split()) or s.study_id for s in world.studies}
    order = sorted(scores, key=lambda name: (-round(scores[name], 9), name))
    if group:
        first: dict[str, str] = {}
        for name in order:
            first.setdefault(said[name], name)
        order = list(first.values())
    return [(name, scores[name]) for name in order[:top]]


def names(world: World, question: Question, model: int | None) -> tuple[list[str], list[float]]:
    derived = world.archive.derived
    found = ranking(derived, question, model)
    return world.archive.store.ids([int(derived.numbers[place]) for place in found.places]), list(found.scores)


def mask(world: World, keep: set[str]) -> NDArray[np.bool_]:
    derived = world.archive.derived
    return np.array([name in keep for name in world.archive.store.ids([int(n) for n in derived.numbers])])


@pytest.mark.parametrize("over", ["report", "sentence", "image"])
@pytest.mark.parametrize("group", [True, False])
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_vector_search_is_the_full_sort_of_the_formula(world: World, over: str, group: bool, data: st.DataObject) -> None:
    seed, count = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 3))
    coarse, top = data.draw(st.booleans()), data.draw(st.integers(1, 60))
    kept = data.draw(st.sampled_from([1.0, 0.6, 0.1, 0.01]))
    rng = np.random.default_rng(seed)
    queries = rng.integers(-1, 2, (count, D)).astype(float) if coarse else rng.standard_normal((count, D))
    queries[:, 0] += 0.5  # never zero
    keep = {study.study_id for study in world.studies if rng.random() < kept}
    allowed = None if kept == 1.0 else mask(world, keep)
    scores = {
        study.study_id: score
        for study in world.studies
        if (kept == 1.0 or study.study_id in keep) and (score := vector_score(world, study, queries, over)) is not None
    }
    got = names(world, Question(vectors=queries, over=over, top=top, group=group, allowed=allowed), world.model)  # type: ignore[arg-type]
    want = expected(scores, world, top, group)
    assert got[1] == pytest.approx([score for _, score in want], abs=1e-6)
    said = {study.study_id: study.sections.get("findings", study.study_id) for study in world.studies}
    settled = [  # of others that are as near, float32 may order all but those of the very vectors
        i
        for i, (name, score) in enumerate(want)
        if all(abs(score - other) > 1e-6 or (over != "image" and said[name] == said[one]) for one, other in scores.items() if one != name)
    ]
    assert [got[0][i] for i in settled] == [want[i][0] for i in settled]


@pytest.mark.parametrize("words", ["large effusion", "edema", "the heart is enlarged", "nothing of this", "Opacity, opacity!"])
@pytest.mark.parametrize("group", [True, False])
def test_words_are_ranked_by_bm25(world: World, words: str, group: bool) -> None:
    got = names(world, Question(words=words, top=15, group=group), None)
    want = expected(text_scores(world, words), world, 15, group)
    assert got[1] == pytest.approx([score for _, score in want], rel=1e-5)
    close = [i for i, (_, score) in enumerate(want) if sum(abs(score - other) < 1e-5 for _, other in want) == 1]
    assert [got[0][i] for i in close] == [want[i][0] for i in close]


def test_both_are_joined_by_reciprocal_ranks(world: World) -> None:
    rng = np.random.default_rng(5)
    for words in ("large effusion", "small nodule", "edema"):
        queries = rng.standard_normal((2, D))
        keep = {study.study_id for study in world.studies if rng.random() < 0.7}
        question = {"vectors": queries, "words": words, "allowed": mask(world, keep), "over": "sentence"}
        vectors = names(world, Question(**{**question, "words": None, "top": 1000, "group": False}), world.model)[0]
        texts = names(world, Question(**{**question, "vectors": None, "top": 1000, "group": False}), None)[0]
        total: dict[str, float] = {}
        for ranked in (vectors, texts):
            for rank, name in enumerate(ranked, start=1):
                total[name] = total.get(name, 0.0) + 1 / (60 + rank)
        assert set(total) <= keep
        got = names(world, Question(**question, top=10), world.model)
        want = expected(total, world, 10, True)
        assert got[0] == [name for name, _ in want]
        assert got[1] == pytest.approx([score for _, score in want])


def test_a_filter_decides_before_the_first_are_taken(world: World) -> None:
    """The only study that may answer is found although it is the last of all."""
    query = np.random.default_rng(1).standard_normal((1, D))
    everything = names(world, Question(vectors=query, top=1000, group=False), world.model)[0]
    got = names(world, Question(vectors=query, top=5, allowed=mask(world, {everything[-1]})), world.model)[0]
    assert got == [everything[-1]]
    assert names(world, Question(vectors=query, allowed=mask(world, set())), world.model)[0] == []


def test_examples_of_what_is_not_wanted_push_away(world: World) -> None:
    query, other = np.eye(D)[0], np.eye(D)[1]
    question = Question(vectors=query, unlike=other[None], away=0.5, top=1000, group=False)
    moved = unit(query - 0.5 * other)
    assert names(world, question, world.model)[1] == pytest.approx(
        names(world, Question(vectors=moved, top=1000, group=False), world.model)[1]
    )


def kind_rows(world: World, kind: str) -> list[NDArray[np.float64]]:
    """Every vector of a kind that the archive has, each sentence once."""
    if kind == "sentence":
        return [unit(vector) for vector in world.sentence.values()]
    if kind == "image":
        return [unit(vector) for kept in world.images.values() for vector in kept if vector is not None]
    return [unit(rows.mean(0)) if np.linalg.norm(rows.mean(0)) > 1e-6 else np.zeros(D) for rows in report_rows(world).values()]


def report_rows(world: World) -> dict[str, NDArray[np.float32]]:
    return {s.study_id: np.stack([world.sentence[one.text] for one in s.sentences]) for s in world.studies if s.sentences}


def corrected_score(world: World, rows: list[NDArray[np.float64]], query: NDArray[np.float64], over: str, asked: str, how: str) -> float:
    """The best of a study's vectors by the rule of the correction, one product at a time."""
    like = kind_rows(world, asked)
    if how == "centre":
        away, own = np.mean(like, axis=0), np.mean(kind_rows(world, over), axis=0)
        return max(float(unit(unit(query) - away) @ unit(row - own)) for row in rows)
    found = []
    for row in rows:
        cosines = sorted((float(row @ one) for one in like if one.any()), reverse=True)
        if over == asked:
            cosines.remove(min(cosines, key=lambda value: abs(value - 1)))  # itself
        found.append(2 * float(unit(query) @ row) - sum(cosines[:10]) / 10)
    return max(found)


@pytest.mark.parametrize("how", ["centre", "csls"])
@pytest.mark.parametrize(("over", "asked"), [("report", "image"), ("sentence", "sentence"), ("image", "sentence"), ("image", "image")])
def test_corrections_are_their_formulas(world: World, how: str, over: str, asked: str) -> None:
    reports = report_rows(world)
    query = np.random.default_rng(8).standard_normal(D)
    scores = {}
    for study in world.studies:
        if over == "image":
            rows = [unit(one) for one in world.images[study.study_id] if one is not None]
        elif study.study_id not in reports:
            rows = []
        elif over == "sentence":
            rows = [unit(one) for one in reports[study.study_id]]
        else:
            mean = reports[study.study_id].mean(0)
            rows = [unit(mean)] if np.linalg.norm(mean) > 1e-6 else []
        if rows:
            scores[study.study_id] = corrected_score(world, rows, query, over, asked, how)
    question = Question(vectors=query, over=over, asked=asked, correction=how, top=300, group=False)  # type: ignore[arg-type]
    got = dict(zip(*names(world, question, world.model), strict=True))
    assert len(scores) > 100 and set(scores) <= set(got)
    assert [got[name] for name in scores] == pytest.approx(list(scores.values()), abs=2e-6)


def test_a_correction_needs_vectors_like_the_questions(world: World, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="for questions of one kind"):
        world.archive.search(Question(vectors=np.ones(D), correction="csls"), world.model)
    store = SqliteStore(tmp_path / "a.db", create=True)
    number = store.model(ModelKey("w" * 64, "p" * 64, D))
    vector = np.eye(D, dtype=np.float32)[0]
    study = ArchivedStudy("s", "p", "xray", sentences=(ArchivedText("Clear."),), sections={"findings": "Clear."})
    store.write([(study, StudyVectors(vector, vector[None]))], number)
    archive = Archive(tmp_path / "a.db")
    with pytest.raises(ArchiveError, match="fitted on image vectors like the question's, and the archive has none"):
        archive.search(Question(vectors=vector, correction="centre", asked="image"), number)


def test_a_correction_goes_when_the_archive_changes(tmp_path: Path) -> None:
    """No row of a study that was taken out stays in a file of a correction."""
    store = SqliteStore(tmp_path / "a.db", create=True)
    number = store.model(ModelKey("w" * 64, "p" * 64, D))
    rng = np.random.default_rng(0)
    for name in "abcdefghijklmno":
        rows = rng.standard_normal((1, D)).astype(np.float32)
        study = ArchivedStudy(name, name, "xray", sentences=(ArchivedText(name),), sections={"findings": name})
        store.write([(study, StudyVectors(rows[0], rows))], number)
    archive = Archive(tmp_path / "a.db")
    question = Question(vectors=np.ones(D), correction="csls", asked="report", top=20)
    before = archive.search(question, number)
    made = {path.name for path in archive.store.derived.glob("*csls*")}
    assert len(before) == 15 and len(made) == 1
    store.remove(study_ids=["a"])
    after = archive.search(question, number)
    assert len(after) == 14 and not made & {path.name for path in archive.store.derived.iterdir()}


def test_a_hit_names_its_sentences_and_the_reports_of_the_same_words(world: World) -> None:
    query = world.sentence[world.studies[1].sentences[0].text] if world.studies[1].sentences else np.ones(D, np.float32)
    hits = world.archive.search(Question(vectors=query, over="sentence", top=30), world.model)
    said = {s.study_id: s.sections.get("findings", "") for s in world.studies}
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert any(hit.same_report for hit in hits)
    for hit in hits:
        own = hit.study.study_id
        assert sorted(hit.same_report) == sorted(n for n, t in said.items() if n != own and t and t.casefold() == said[own].casefold())
        cosines = {one.text: float(unit(query) @ unit(world.sentence[one.text])) for one in _study(world, own).sentences}
        best = sorted(cosines.values(), reverse=True)[:3]
        sure = [score for score in best[1:] if best[0] > 0 and score > best[0] / 2 + 1e-6]
        perhaps = [score for score in best[1:] if best[0] > 0 and abs(score - best[0] / 2) <= 1e-6]
        assert [one.score for one in hit.sentences][: 1 + len(sure)] == pytest.approx([best[0], *sure], abs=1e-6)
        assert 1 + len(sure) <= len(hit.sentences) <= 1 + len(sure) + len(perhaps)
        assert all(cosines[one.words or ""] == pytest.approx(one.score, abs=1e-6) for one in hit.sentences)


def _study(world: World, name: str) -> ArchivedStudy:
    return next(study for study in world.studies if study.study_id == name)


def test_questions_that_cannot_be_asked(world: World) -> None:
    archive = world.archive
    with pytest.raises(ArchiveError, match="nothing is asked"):
        archive.search(Question())
    with pytest.raises(ArchiveError, match="of 3 numbers, expected 8"):
        archive.search(Question(vectors=np.ones(3)), world.model)
    with pytest.raises(ArchiveError, match="is 0 or not finite"):
        archive.search(Question(vectors=np.zeros(D)), world.model)
    with pytest.raises(ArchiveError, match="at least 1"):
        archive.search(Question(words="edema", top=0))
    with pytest.raises(ArchiveError, match="no vectors of this model, but of its weights with another preprocessing"):
        archive.model(ModelKey("w" * 64, "q" * 64, D))
    assert archive.model(ModelKey("w" * 64, "p" * 64, D)) == world.model


def test_words_can_be_demanded_by_the_full_text_index(world: World) -> None:
    found = world.archive.matching('"large effusion"')
    ids = world.archive.store.ids([int(n) for n in world.archive.derived.numbers])
    said = {s.study_id: s.sections.get("findings", "").lower() for s in world.studies}
    assert [name for name, is_in in zip(ids, found, strict=True) if is_in] == sorted(
        name for name, text in said.items() if re.search(r"\blarge\W+effusion\b", text)
    )
    with pytest.raises(ArchiveError, match="cannot be read"):
        world.archive.matching('"open')


def test_what_another_process_adds_is_seen_at_the_next_question(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.db", create=True)
    number = store.model(ModelKey("w" * 64, "p" * 64, D))
    vector = np.eye(D, dtype=np.float32)

    def put(name: str, row: int) -> None:
        study = ArchivedStudy(name, name, "xray", sentences=(ArchivedText(name),), sections={"findings": name})
        store.write([(study, StudyVectors(vector[row], vector[row][None]))], number)

    put("first", 0)
    archive = Archive(tmp_path / "a.db")
    assert [hit.study.study_id for hit in archive.search(Question(vectors=vector[1]), number)] == ["first"]
    put("second", 1)
    assert [hit.study.study_id for hit in archive.search(Question(vectors=vector[1]), number)] == ["second", "first"]
    store.remove(study_ids=["second"])
    assert [hit.study.study_id for hit in archive.search(Question(vectors=vector[1]), number)] == ["first"]


def test_a_large_archive_is_searched_by_an_index_of_stated_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limits lowered: the index is made, its recall is told, holds on new questions, and filters are inside it."""
    faiss = pytest.importorskip("faiss", reason="needs the extra faiss")
    monkeypatch.setattr("tasks.archive.approximate.ROWS", 1000)
    monkeypatch.setattr("tasks.archive.search.EXACT", 100)
    rng = np.random.default_rng(2)
    centres = rng.standard_normal((30, 16))
    vectors = (centres[rng.integers(30, size=3000)] + 0.8 * rng.standard_normal((3000, 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = SqliteStore(tmp_path / "a.db", create=True)
    number = store.model(ModelKey("w" * 64, "p" * 64, 16))
    studies = [
        ArchivedStudy(
            f"s{i:04d}", f"p{i}", "ct" if i % 3 else "xray", sentences=(ArchivedText(f"No {i}."),), sections={"findings": f"No {i}."}
        )
        for i in range(3000)
    ]
    store.write([(one, StudyVectors(vector, vector[None])) for one, vector in zip(studies, vectors, strict=True)], number)
    archive = Archive(store)
    assert isinstance(archive.derived.gallery(number, "report").approximate.index, faiss.IndexIVF)  # type: ignore[union-attr]
    told = archive.derived.approximate(number, "report")
    assert told is not None and told["probes"] < told["lists"] and told["trials"] == 200
    films = np.array([study.modality == "xray" for study in studies])
    found: dict[bool, list[float]] = {False: [], True: []}
    for query in vectors[rng.choice(3000, 50)] + 0.2 * rng.standard_normal((50, 16)).astype(np.float32):
        for filtered in found:
            question = Question(vectors=query, allowed=films if filtered else None, group=False)
            assert archive.recall(question, number) == told["recall"] >= 0.9
            true = np.argsort(-np.where(films | (not filtered), vectors @ query, -np.inf), kind="stable")[:10]
            got = [int(hit.study.study_id[1:]) for hit in archive.search(question, number)]
            assert len(got) == 10 and (not filtered or films[got].all())
            found[filtered].append(len(set(got) & set(true.tolist())) / 10)
    assert np.mean(found[False]) >= 0.9 and np.mean(found[True]) >= 0.9
    assert archive.recall(Question(vectors=vectors[0], correction="csls", asked="report"), number) is None
    few = np.arange(3000) < 100
    assert archive.recall(Question(vectors=vectors[0], allowed=few), number) is None
    assert archive.search(Question(vectors=vectors[0], allowed=few), number)[0].study.study_id == "s0000"
