"""`medvl read` and `medvl calibrate-reading` as a user meets them: votes with their sources, own studies left out, settings that fit."""

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
from reports.facts.ontology import load_ontology
from tasks.archive.neighbours import NeighbourSearch, Query, Scope
from tasks.archive.reading import ReadingSettings, fit_reading, load_reading
from tasks.archive.reading import read as read_neighbours
from tasks.archive.search import Archive
from tasks.cli import cli

NOTICE = "research use, not for diagnosis"
FINDINGS = ("cardiomegaly", "pleural_effusion", "lung_nodule")
VALIDATION = 12


def medvl(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in args])


def told(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def cohort(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny studies, the first of them for validation and the others for training, without the CT row."""
    folder = tmp_path_factory.mktemp("cohort") / "studies"
    shutil.copytree(tiny.folder, folder)
    with (folder / "manifest.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["modality"] == "xray"]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows({**line, "split": "val" if i < VALIDATION else "train"} for i, line in enumerate(lines))
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def store(tiny: Any, other_model: Path, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "archive.db"
    assert medvl("index", "build", cohort, "--model", tiny.model, "--store", path).exit_code == 0
    assert medvl("index", "add", cohort, "--model", other_model, "--store", path).exit_code == 0
    return path


@pytest.fixture(scope="module")
def settings(tiny: Any, cohort: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Fitted so that a model which knows nothing may call: wrong nearly always."""
    out = tmp_path_factory.mktemp("settings") / "reading.json"
    fit = ("calibrate-reading", cohort, "--store", store, "--model", tiny.model, "--over", "image", "--filter", "split = train")
    done = medvl(*fit, "--error", 0.95, "--out", out, "--allow-leak", "similar-images", "--allow-leak", "images")
    assert done.exit_code == 0, done.output
    return out, done


def by_hand(model: Path, store: Path, scope: Any, findings: Any = None) -> tuple[Any, NeighbourSearch, Any]:
    """The library's parts: an encoder of one file, neighbours, and the scope."""
    encoder = package.load(model, device="cpu")
    archive = Archive(store)
    config = json.loads((model / "config.json").read_text())
    (key,) = [one for one in archive.store.models().values() if one.weights_sha256 == config["weights_sha256"]]
    scope = Scope(key, **scope)
    return (lambda file: encoder.encode_image(file).pooled.numpy()), NeighbourSearch(archive, scope, load_ontology(), findings), scope


def same(got: Any, expected: Any) -> None:
    """Votes and statements of a line of JSON are those of a reading, up to rounding."""
    record = told(json.dumps(expected.to_dict(), allow_nan=False))
    for one, other in zip(got["votes"], record["votes"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert [(one["text"], one["claims"], [source["study_id"] for source in one["sources"]]) for one in got["statements"]] == [
        (one["text"], one["claims"], [source["study_id"] for source in one["sources"]]) for one in record["statements"]
    ]


def test_a_file_and_a_broken_one_are_read_and_listed(tiny: Any, cohort: Path, store: Path, tmp_path: Path) -> None:
    film, listed = cohort.parent / "images" / "s25.png", tmp_path / "rejected.csv"
    (tmp_path / "empty").mkdir()
    ask = ("read", tiny.broken, film, tmp_path / "empty", "--store", store, "--model", tiny.model)
    done = medvl(*ask, "--json", "--rejected", listed)
    assert done.exit_code == 1
    broken, read, empty = map(told, done.stdout.splitlines())
    assert not broken["ok"] and "broken.dcm" in broken["error"] and broken["votes"] == [] and "no image in this folder" in empty["error"]
    with listed.open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [str(tiny.broken), str(tmp_path / "empty")]
    assert "2 rejected" in done.stderr and "on this film" not in done.stderr, "no text of a report"
    assert read["ok"] and read["notice"] == NOTICE and read["how"]["over"] == "report" and read["how"]["fitted"] is False
    assert {vote["finding"] for vote in read["votes"]} >= set(FINDINGS)
    encode, search, _ = by_hand(tiny.model, store, {})
    own = {"s23", "s24", "s25"}  # of the patient of the film, which the archive knows by its path
    near = search.neighbours(Query("x", encode(film), ("p23",)), 20)
    assert read["patients"] == 20 and not own & {one.study_id for one in near} and len(near) >= 20
    same(read, read_neighbours(near, search.findings, ReadingSettings()))
    sources = [source for one in read["statements"] for source in one["sources"]]
    assert sources and not own & {source["study_id"] for source in sources}
    copy = shutil.copy(film, tmp_path / "copy.png")
    elsewhere = told(medvl("read", copy, "--store", store, "--model", tiny.model, "--over", "image", "--json").stdout)
    assert elsewhere["best_score"] == pytest.approx(1, abs=1e-5), "a copy under another path is not told"
    (known,) = [told(medvl("read", film, "--store", store, "--model", tiny.model, "--over", "image", "--json").stdout)]
    assert known["best_score"] < 1 - 1e-6


def test_a_manifest_names_patients_and_a_table_is_written(tiny: Any, cohort: Path, store: Path, tmp_path: Path) -> None:
    moved, out = tmp_path / "moved", tmp_path / "out" / "readings.csv"
    shutil.copytree(cohort.parent, moved)  # so that paths tell nothing
    (moved / "images" / "s07.png").write_bytes(b"no picture")
    ask = ("read", moved / "manifest.csv", "--store", store, "--model", tiny.model, "--over", "image")
    done = medvl(*ask, "--finding", "cardiomegaly", "--finding", "lung_nodule", "--out", out)
    assert done.exit_code == 1 and NOTICE in done.output and "s07.png" in done.stderr
    with (tmp_path / "out" / "readings.rejected.csv").open(newline="") as file:
        assert [Path(row["path"]).name for row in csv.DictReader(file)] == ["s07.png"]
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["study"], line["finding"]) for line in lines] == [
        (f"s{i:02d}", finding) for i in range(26) if i != 7 for finding in ("cardiomegaly", "lung_nodule")
    ]
    assert {line["call"] for line in lines} <= {"present", "absent", "abstain"} and len({line["call"] for line in lines}) > 1
    for line in lines:
        assert (line["reason"] == "") == (line["call"] != "abstain") and 0 <= float(line["evidence"]) <= 1
        assert sum(float(line[name]) for name in ("present", "absent", "uncertain", "silent")) == pytest.approx(1)
        patient = f"p{min(int(line['study'][1:]), 23):02d}"
        sources = told(line["sources"]) if line["sources"] else []
        assert patient not in {f"p{min(int(one['study_id'][1:]), 23):02d}" for one in sources}
        assert bool(sources) == (line["call"] != "abstain"), "what is called has a source"
        if line["text"]:
            word = "There is" if line["call"] == "present" else "No sign of"
            assert line["text"].startswith(word) and line["finding"].replace("_", " ") in line["text"]
    shown = medvl("read", moved / "images" / "s01.png", "--store", store, "--model", tiny.model)
    assert shown.exit_code == 0 and "cardiomegaly" in shown.output and NOTICE in shown.output
    assert "limits that were fitted to nothing" in " ".join(shown.output.split())


def test_fitted_settings_read_as_the_library_does(
    tiny: Any, cohort: Path, store: Path, settings: tuple[Path, Result], tmp_path: Path
) -> None:
    place, done = settings
    assert NOTICE in done.output and "cardiomegaly" in done.output
    record = told(place.read_text())
    assert record["fitted_on"]["scope"]["filter"] == "split = train" and record["fitted_on"]["archive"]["studies"] == 26 - VALIDATION
    encode, search, scope = by_hand(tiny.model, store, {"over": "image", "filter": "split = train"}, sorted(FINDINGS))
    with cohort.open(newline="") as file:
        rows = list(csv.DictReader(file))
    validation = rows[:VALIDATION]
    near = [search.neighbours(Query(row["study_id"], encode(cohort.parent / row["path"])), 10) for row in validation]
    labels = np.array([[float(row[name] or "nan") for name in sorted(FINDINGS)] for row in validation])
    ids, patients = [row["study_id"] for row in validation], [row["patient_id"] for row in validation]
    expected = fit_reading(near, labels, sorted(FINDINGS), ids, patients, ks=(5, 10), error=0.95)
    found = load_reading(place)
    for name in ("k", "temperature", "silent", "fewest", "limits", "default", "seen"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.floor == pytest.approx(expected.floor, abs=1e-5)
    assert found.fitted_on["limits"] == expected.fitted_on["limits"] and found.fitted_on["scope"] == scope.to_dict()
    films = [cohort.parent / row["path"] for row in rows[:6]]
    lines = medvl("read", *films, "--store", store, "--model", tiny.model, "--settings", place, "--json").stdout.splitlines()
    calls = set()
    for film, line in zip(films, map(told, lines), strict=True):
        same(line, read_neighbours(search.neighbours(Query("x", encode(film)), found.k), search.findings, found))
        assert line["how"]["fitted"] and line["how"]["over"] == "image" and [vote["finding"] for vote in line["votes"]] == sorted(FINDINGS)
        calls |= {vote["call"] for vote in line["votes"]}
    assert calls > {"abstain"}, "something is called"


def test_settings_of_other_neighbours_are_refused(
    tiny: Any, other_model: Path, cohort: Path, store: Path, settings: tuple[Path, Result], tmp_path: Path
) -> None:
    film, place = cohort.parent / "images" / "s25.png", settings[0]
    ask = ("read", film, "--store", store, "--settings", place)
    for options, said in (
        (("--model", other_model), "another model"),
        (("--model", tiny.model, "--over", "report"), "over 'image'"),
        (("--model", tiny.model, "--filter", "split = val"), "filter 'split = train'"),
        (("--model", tiny.model, "--voting", "label"), "voting 'report'"),
        (("--model", tiny.model, "--finding", "edema"), "not fitted for it"),
    ):
        done = medvl(*ask, *options)
        assert done.exit_code == 2 and said in done.stderr and not done.stdout, done.output
    (tmp_path / "bad.json").write_text("{")
    done = medvl("read", film, "--store", store, "--model", tiny.model, "--settings", tmp_path / "bad.json")
    assert done.exit_code == 2 and "bad.json" in done.stderr
    smaller = tmp_path / "smaller.db"
    assert medvl("index", "build", cohort, "--split", "train", "--model", tiny.model, "--store", smaller).exit_code == 0
    done = medvl("read", film, "--store", smaller, "--model", tiny.model, "--settings", place, "--json")
    assert done.exit_code == 0 and "another archive" in done.stderr
    nothing = medvl("read", film, "--store", store, "--model", tiny.model, "--finding", "dragon")
    assert nothing.exit_code == 2 and "dragon" in nothing.stderr
    wrong = medvl("read", film, "--store", store, "--model", tiny.model, "--filter", "viev = PA")
    assert wrong.exit_code == 2 and "viev" in wrong.stderr


def test_validation_patients_must_not_vote(tiny: Any, cohort: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "reading.json"
    fit = ("calibrate-reading", cohort, "--model", tiny.model, "--store", store, "--out", out)
    done = medvl(*fit)
    assert done.exit_code == 2 and f"{VALIDATION} of {VALIDATION} validation studies" in done.stderr and not out.exists()
    renamed = tmp_path / "renamed.csv"
    with cohort.open(newline="") as file:
        lines = list(csv.DictReader(file))
    with renamed.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        for line in lines[:VALIDATION]:
            new = {"study_id": f"n{line['study_id']}", "patient_id": f"n{line['patient_id']}", "path": cohort.parent / line["path"]}
            writer.writerow({**line, **new, "mask_lung_nodule": "", "mask_pleural_effusion": ""})
    done = medvl("calibrate-reading", renamed, "--allow-outside", *fit[2:])
    assert done.exit_code == 2 and f"{VALIDATION} of {VALIDATION} validation studies" in done.stderr, "its files are in the archive"
    done = medvl(*fit, "--split", "train", "--finding", "edema")
    assert done.exit_code == 2 and "no xray row of split 'train' has a label of it" in done.stderr
