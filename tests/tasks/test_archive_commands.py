"""`medvl index` and `medvl search` as a user meets them: sources, the same again, rejects, filters, pages, and what must not be said."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import medvl as package
from reports.sentences import report_sentences
from tasks.cli import cli

NOTICE = "research use, not for diagnosis"


def medvl(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in args])


def told(done: Result) -> Any:
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def store(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "archive.db"
    done = medvl("index", "build", tiny.manifest, "--model", tiny.model, "--store", path, "--json")
    assert done.exit_code == 0, done.output
    assert told(done)["added"] == 26 and told(done)["studies"] == 26 and told(done)["notice"] == NOTICE
    return path


@pytest.fixture(scope="module")
def rows(tiny: Any) -> dict[str, dict[str, str]]:
    with tiny.manifest.open(newline="") as file:
        return {line["study_id"]: line for line in csv.DictReader(file)}


def unit(values: Any) -> np.ndarray:
    array = np.asarray(values, np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def test_a_text_finds_the_reports_that_say_it(tiny: Any, store: Path, rows: dict[str, dict[str, str]]) -> None:
    query = "There is cardiomegaly on this film."
    done = medvl(
        "search", "--model", tiny.model, "--store", store, "--query", query, "--mode", "vector", "--top", 40, "--all-duplicates", "--json"
    )
    found = told(done)
    assert found["mode"] == "vector" and found["over"] == "sentence" and found["pool"] == 26
    model = package.load(tiny.model, device="cpu")
    expected = {}
    for name, row in rows.items():
        if sentences := report_sentences(None, row["findings"], row["impression"]):
            vectors = unit(model.encode_text(sentences).pooled.numpy())
            expected[name] = float((vectors @ unit(model.encode_text(query).pooled.numpy())[0]).max())
    assert {hit["study_id"]: hit["score"] for hit in found["hits"]} == pytest.approx(expected, abs=1e-5)
    assert [hit["rank"] for hit in found["hits"]] == list(range(1, 27))
    said = {name for name, row in rows.items() if query in row["findings"]}
    assert {hit["study_id"] for hit in found["hits"][: len(said)]} == said
    assert all(hit["sentences"][0]["text"] == query for hit in found["hits"][: len(said)])


def test_an_image_finds_reports_and_images(tiny: Any, store: Path, rows: dict[str, dict[str, str]]) -> None:
    model = package.load(tiny.model, device="cpu")
    image = unit(model.encode_image(tiny.png).pooled.numpy())[0]
    done = medvl("search", "--model", tiny.model, "--store", store, "--query", tiny.png, "--top", 40, "--all-duplicates", "--json")
    expected = {}
    for name, row in rows.items():
        if sentences := report_sentences(None, row["findings"], row["impression"]):
            expected[name] = float(unit(unit(model.encode_text(sentences).pooled.numpy()).mean(0)) @ image)
    assert told(done)["over"] == "report"
    assert {hit["study_id"]: hit["score"] for hit in told(done)["hits"]} == pytest.approx(expected, abs=1e-5)
    done = medvl("search", "--model", tiny.model, "--store", store, "--query", tiny.png, "--over", "image", "--top", 1, "--json")
    (hit,) = told(done)["hits"]
    assert hit["study_id"] == "s01" and hit["score"] == pytest.approx(1, abs=1e-5) and hit["images"] == [str(tiny.png)]
    done = medvl(
        "search", "--model", tiny.model, "--store", store, "--like", "s01", "--over", "image", "--top", 40, "--json", "--all-duplicates"
    )
    assert "s01" not in {hit["study_id"] for hit in told(done)["hits"]} and len(told(done)["hits"]) == 25
    composed = medvl(
        "search", "--model", tiny.model, "--store", store, "--query", tiny.png, "--query", "a nodule", "--mode", "vector", "--json"
    )
    text = unit(model.encode_text("a nodule").pooled.numpy())[0]
    for hit in told(composed)["hits"]:
        row = rows[hit["study_id"]]
        report = unit(unit(model.encode_text(report_sentences(None, row["findings"], row["impression"])).pooled.numpy()).mean(0))
        assert hit["score"] == pytest.approx(float(report @ unit(image + text)), abs=1e-5)


@pytest.mark.parametrize("how", ["centre", "csls"])
def test_a_correction_is_of_the_archive_by_its_formula(tiny: Any, store: Path, rows: dict[str, dict[str, str]], how: str) -> None:
    """Image to reports: means and neighbours are those of the images and reports of the archive."""
    model = package.load(tiny.model, device="cpu")
    rows = {name: row for name, row in rows.items() if row["modality"] == "xray"}
    names = [name for name, row in rows.items() if report_sentences(None, row["findings"], row["impression"])]
    images = unit(np.stack([unit(model.encode_image(tiny.manifest.parent / rows[name]["path"]).pooled.numpy())[0] for name in rows]))
    reports = np.stack(
        [
            unit(unit(model.encode_text(report_sentences(None, rows[name]["findings"], rows[name]["impression"])).pooled.numpy()).mean(0))
            for name in names
        ]
    )
    query = unit(model.encode_image(tiny.png).pooled.numpy())[0]
    if how == "centre":
        expected = unit(reports - reports.mean(0)) @ unit(query - images.mean(0))
    else:
        expected = 2 * reports @ query - np.sort(reports @ images.T, axis=1)[:, -10:].mean(1)
    search = ("search", "--model", tiny.model, "--store", store, "--query", tiny.png, "--correct", how)
    found = told(medvl(*search, "--top", 40, "--all-duplicates", "--json"))
    assert found["correction"] == how and found["recall_at_10_of_index"] is None
    scores = {hit["study_id"]: hit["score"] for hit in found["hits"]}
    assert scores == pytest.approx(dict(zip(names, expected.tolist(), strict=True)), abs=1e-5)
    mixed = medvl(*search, "--query", "cardiomegaly")
    assert mixed.exit_code == 2 and "for questions of one kind" in mixed.output


def test_words_and_filters_decide(tiny: Any, store: Path, rows: dict[str, dict[str, str]]) -> None:
    ask = ("search", "--model", tiny.model, "--store", store, "--top", 40, "--all-duplicates", "--json")
    done = told(medvl(*ask, "--query", "number 3", "--mode", "text"))
    assert {hit["study_id"] for hit in done["hits"][:2]} == {name for name, row in rows.items() if "Number 3 " in row["impression"]} | (
        {done["hits"][1]["study_id"]} if len({n for n, r in rows.items() if "Number 3 " in r["impression"]}) == 1 else set()
    )
    done = told(medvl(*ask, "--query", "a nodule", "--filter", "split = train"))
    assert {hit["study_id"] for hit in done["hits"]} == {"s00", "s01"} and done["pool"] == 2 and done["mode"] == "hybrid"
    done = told(medvl(*ask, "--query", tiny.png, "--filter", "present(cardiomegaly) and patient_id != p23"))
    assert {hit["study_id"] for hit in done["hits"]} == {
        name for name, row in rows.items() if "There is cardiomegaly" in row["findings"] and row["patient_id"] != "p23"
    }
    done = told(medvl(*ask, "--query", tiny.png, "--filter", "label(cardiomegaly) = -1"))
    assert [hit["study_id"] for hit in done["hits"]] == ["s05"]
    done = told(medvl(*ask, "--query", tiny.png, "--match", '"no sign of cardiomegaly"'))
    assert {hit["study_id"] for hit in done["hits"]} == {name for name, row in rows.items() if "No sign of cardiomegaly" in row["findings"]}
    for wrong, said in (("age >> 3", "expected"), ("present(dragon)", "dragon"), ("viev = PA", "view")):
        failed = medvl(*ask, "--query", "x", "--filter", wrong)
        assert failed.exit_code == 2 and said in failed.output


def test_equal_reports_are_one_hit_that_names_the_others(tiny: Any, store: Path, rows: dict[str, dict[str, str]]) -> None:
    found = told(medvl("search", "--model", tiny.model, "--store", store, "--query", tiny.png, "--top", 40, "--json"))["hits"]
    words: dict[str, set[str]] = {}
    for name, row in rows.items():
        if row["findings"]:
            words.setdefault(f"{row['findings']} {row['impression']}".strip(), set()).add(name)
    assert {frozenset([hit["study_id"], *hit["same_report"]]) for hit in found} == {frozenset(names) for names in words.values()}


def test_the_same_again_changes_nothing_and_bad_rows_are_listed(tiny: Any, tmp_path: Path) -> None:
    studies, store, listed = tmp_path / "studies", tmp_path / "a.db", tmp_path / "rejected.csv"
    shutil.copytree(tiny.folder, studies)
    (studies / "images" / "s07.png").unlink()
    (studies / "images" / "s09.png").write_bytes(b"no picture")
    build = ("index", "build", studies / "manifest.csv", "--model", tiny.model, "--store", store, "--rejected", listed, "--json")
    done = medvl(*build)
    assert done.exit_code == 1 and told(done)["added"] == 25 and told(done)["rejected"] == 2
    with listed.open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert len(reasons) == 2 and "s07" in reasons[0] and "s09.png" in reasons[1]
    assert "cardiomegaly on" not in done.output, "no text of a report"
    again = medvl(*build)
    assert (told(again)["added"], told(again)["changed"], told(again)["unchanged"]) == (0, 0, 25)
    (studies / "images" / "s09.png").write_bytes((studies / "images" / "s11.png").read_bytes())
    mended = medvl(*build)
    assert (told(mended)["changed"], told(mended)["unchanged"]) == (1, 24)
    assert medvl("index", "verify", "--store", store).exit_code == 0
    stats = told(medvl("index", "stats", "--store", store, "--json"))
    assert (stats["studies"], stats["images"], stats["models"][0]["vectors"]["image"]) == (25, 25, 25)
    assert stats["findings"]["cardiomegaly"]["present"] > 0
    assert "cardiomegaly" in medvl("index", "stats", "--store", store).output


def test_another_model_is_refused_until_it_is_added(tiny: Any, other_model: Path, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a.db"
    shutil.copy(store, copy)
    asked = ("search", "--model", other_model, "--store", copy, "--query", "a nodule", "--json")
    failed = medvl(*asked)
    assert failed.exit_code == 2 and "has no vectors of this model" in failed.output and "index add" in failed.output
    done = medvl("index", "add", tiny.manifest, "--model", other_model, "--store", copy, "--json")
    assert done.exit_code == 0 and told(done)["studies"] == 26
    one, other = (told(medvl("search", "--model", m, *asked[3:])) for m in (tiny.model, other_model))
    assert [hit["score"] for hit in one["hits"]] != [hit["score"] for hit in other["hits"]]
    failed = medvl("index", "add", tiny.manifest, "--model", tiny.model, "--store", copy, "--text-policy", "impression")
    assert failed.exit_code == 2 and "--text-policy" in failed.output


def test_a_patient_is_removed_with_every_trace(tiny: Any, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a.db"
    shutil.copy(store, copy)
    medvl("search", "--model", tiny.model, "--store", copy, "--query", "a nodule")
    done = medvl("index", "remove", "--patient", "p23", "--store", copy, "--json")
    assert done.exit_code == 0 and told(done) == {"removed": ["s23", "s24", "s25"], "traces_left": 0, "ok": True}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"s24.dcm" in path.read_bytes()]
    assert medvl("index", "verify", "--store", copy).exit_code == 0
    assert medvl("index", "remove", "--patient", "nobody", "--store", copy).exit_code == 1


def test_without_text_ids_and_vectors_alone(tiny: Any, tmp_path: Path) -> None:
    store = tmp_path / "a.db"
    done = medvl("index", "build", tiny.manifest, "--model", tiny.model, "--store", store, "--no-text")
    assert done.exit_code == 0
    found = told(medvl("search", "--model", tiny.model, "--store", store, "--query", "There is cardiomegaly on this film.", "--json"))
    assert found["mode"] == "vector" and found["hits"][0]["sentences"][0]["text"] is None and found["hits"][0]["findings"] == {}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"on this film" in path.read_bytes()]
    failed = medvl("search", "--model", tiny.model, "--store", store, "--query", "heart", "--mode", "text")
    assert failed.exit_code == 2 and "keeps no words" in failed.output


def test_folders_tables_and_openi_are_sources(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "films"
    shutil.copytree(tiny.folder / "images", folder / "a")
    (folder / "a" / "s01.txt").write_text("FINDINGS: There is edema.\n\nIMPRESSION: Edema.", encoding="utf-8")
    (folder / "alone.txt").write_text("There is a pneumothorax.", encoding="utf-8")
    (folder / "bad.txt").write_bytes(b"\xff\xfe\x00")
    done = medvl("index", "build", folder, "--model", tiny.model, "--store", tmp_path / "f.db", "--json")
    assert done.exit_code == 1 and told(done)["added"] == 27 and "bad.txt" in done.stderr
    hit = told(medvl("search", "--model", tiny.model, "--store", tmp_path / "f.db", "--query", "edema", "--mode", "text", "--json"))[
        "hits"
    ][0]
    assert hit["study_id"] == "a/s01.png" and hit["findings"]["edema"] == 1
    table = tmp_path / "reports.csv"
    table.write_text('id,report\nr1,"FINDINGS: The heart is large."\nr2,"No effusion."\nr1,"Again."\n', encoding="utf-8")
    done = medvl("index", "build", table, "--text-column", "report", "--model", tiny.model, "--store", tmp_path / "t.db", "--json")
    assert done.exit_code == 1 and told(done)["added"] == 2 and told(done)["rejected"] == 1
    xml = tmp_path / "7.xml"
    xml.write_text(
        '<eCitation><uId id="CXR7"/><MedlineCitation><Article><Abstract><AbstractText Label="FINDINGS">Clear lungs.</AbstractText>'
        '<AbstractText Label="IMPRESSION">No acute disease.</AbstractText></Abstract></Article></MedlineCitation></eCitation>',
        encoding="utf-8",
    )
    done = medvl("index", "build", xml, "--model", tiny.model, "--store", tmp_path / "o.db", "--json")
    assert done.exit_code == 0 and told(done)["added"] == 1, done.output
    found = told(medvl("search", "--model", tiny.model, "--store", tmp_path / "o.db", "--query", "acute", "--json"))["hits"]
    assert [hit["study_id"] for hit in found] == ["CXR7"]


def test_a_page_shows_pictures_sentences_and_maps_and_runs_no_script(tiny: Any, store: Path, tmp_path: Path) -> None:
    page = tmp_path / "hits.html"
    query = "<script>alert(1)</script> cardiomegaly"
    done = medvl("search", "--model", tiny.model, "--store", store, "--query", query, "--query", tiny.png, "--html", page, "--top", 3)
    assert done.exit_code == 0, done.output
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert text.count("<article>") == 3 and text.count("data:image/jpeg") == 4 and "<mark>" in text
    assert "Research use, not for diagnosis" in text
    for rank in (1, 2, 3):
        assert f'href="hits_maps/{rank}.png"' in text and (tmp_path / "hits_maps" / f"{rank}.png").stat().st_size > 1000


def test_an_image_that_cannot_be_read_is_rejected(tiny: Any, store: Path) -> None:
    done = medvl("search", "--model", tiny.model, "--store", store, "--query", tiny.broken, "--json")
    assert done.exit_code == 1 and told(done)["ok"] is False and "broken.dcm" in told(done)["error"]
