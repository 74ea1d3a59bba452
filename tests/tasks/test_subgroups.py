"""Which subgroup a study is of, from table cells; one score for a study of several images; and both in `medvl evaluate`."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import medvl
from medvl.data.manifest import ColumnMap, ManifestError, StudyImage, read_manifest
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.cli import cli
from tasks.evaluation import by_unit, joined_labels, predict, results
from tasks.scoring import Scorer, preset
from tasks.subgroups import age_band, subgroups
from tasks.zero_shot import diagnose, encode_prompts

FINDINGS = ("cardiomegaly", "pleural_effusion", "lung_nodule")


def row(study: str, patient: str, at: int, view: str | None = None, labels: dict[str, int] | None = None, **groups: str) -> StudyImage:
    return StudyImage(study, patient, "xray", Path(f"{at}.png"), view, "test", None, None, None, labels or {}, (), {}, at, groups)


@pytest.mark.parametrize(
    ("age", "band"),
    [("17.9", "under 18"), ("058Y", "40 to 59"), ("18", "18 to 39"), ("60", "60 to 79"), ("79", "60 to 79"), ("80", "80 and over"),
     ("006M", "under 18"), ("240 months", "18 to 39"), ("030D", "under 18"), ("sixty", "not readable"), ("-4", "not readable")],
)  # fmt: skip
def test_ages_fall_into_bands(age: str, band: str) -> None:
    assert age_band(age) == band


@given(st.text(max_size=12))
def test_no_age_cell_is_too_odd(cell: str) -> None:
    assert age_band(cell) in {"under 18", "18 to 39", "40 to 59", "60 to 79", "80 and over", "not readable"}


def test_a_study_of_two_views_is_a_subgroup_of_its_own_and_what_is_missing_is_told() -> None:
    rows = [row("a", "p", 0, "PA", sex="F"), row("a", "p", 1, "lateral", sex="F"), row("b", "q", 2, "PA", sex="male"), row("c", "r", 3)]
    found = subgroups(rows, by_unit(rows, "study"))
    assert found == {"sex": ["female", "male", "not stated"], "view": ["PA + lateral", "PA", "not stated"]}


def test_only_the_largest_subgroups_are_told_apart() -> None:
    sites = [f"s{i}" for i in range(15) for _ in range(15 - i)]
    rows = [row(str(i), str(i), i, site=site) for i, site in enumerate(sites)]
    (found,) = subgroups(rows, by_unit(rows, "image")).values()
    assert found[:15] == ["s0"] * 15 and set(found) == {f"s{i}" for i in range(12)} | {"other"} and found.count("other") == 3 + 2 + 1


def test_labels_and_units_of_studies_and_patients() -> None:
    rows = [row("a", "p", 0, labels={"x": 0}), row("a", "p", 1, labels={"x": -1}), row("b", "p", 2, labels={"x": 1}), row("c", "q", 3)]
    assert by_unit(rows, "image") == [[0], [1], [2], [3]]
    assert by_unit(rows, "study") == [[0, 1], [2], [3]]
    assert by_unit(rows, "patient") == [[0, 1, 2], [3]]
    for unit, expected in {"image": [0, -1, 1, None], "study": [-1, -1, 1, None], "patient": [1, 1, 1, None]}.items():
        found = joined_labels(rows, ["x"], unit)[:, 0]  # type: ignore[arg-type]
        assert [None if np.isnan(value) else value for value in found] == expected


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return medvl.load(tiny.model, device="cpu")


@pytest.fixture(scope="module")
def paired(tiny: Any) -> list[StudyImage]:
    """The test films, two by two one study."""
    rows = read_manifest(tiny.manifest).select(split="test", modality="xray").rows
    return [replace(row, study_id=f"s{i // 2}", patient_id=f"p{i // 4}") for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", [None, "xplainer_like", "chexzero"])
def test_a_study_of_two_films_has_the_score_that_diagnose_gives_it(model: Any, paired: list[StudyImage], name: str | None) -> None:
    """`medvl diagnose` joins views in its own code."""
    prompts = load_prompts()
    scorer = None
    if name is not None:
        rule = preset("chexzero") if name == "chexzero" else replace(preset("radzero"), name=name, views="max")
        scorer = Scorer.of(model, rule, prompts, FINDINGS)
    found = predict(model, paired, prompts, ReportSentences(), findings=FINDINGS, scorer=scorer, batch_size=5)
    scoring = encode_prompts(model, prompts, FINDINGS) if scorer is None else scorer
    studies = [[row.path for row in paired[i : i + 2]] for i in range(0, len(paired), 2)]
    for k, one in enumerate(diagnose(model, (), scoring, studies=studies)):
        expected = [one.findings[name] for name in FINDINGS]
        np.testing.assert_allclose(found.scores[2 * k : 2 * k + 2], [expected, expected], atol=1e-6)
    measured = results(found, repeats=10)
    assert measured["unit"] == {"name": "study", "n": 12} and measured["images"] == 24
    assert measured["retrieval"]["image_to_report"]["recall_at_1_interval"]["n"] == 12
    alone = predict(model, paired, prompts, ReportSentences(), findings=FINDINGS, scorer=scorer, unit="image")
    assert results(alone, repeats=0)["unit"] == {"name": "image", "n": 24}
    assert not np.allclose(alone.scores[0], alone.scores[1])


def test_a_patient_has_one_score_of_all_films(model: Any, paired: list[StudyImage]) -> None:
    prompts = load_prompts()
    found = predict(model, paired, prompts, ReportSentences(), findings=FINDINGS, unit="patient")
    alone = predict(model, paired, prompts, ReportSentences(), findings=FINDINGS, unit="image")
    logits = np.log(alone.scores / (1 - alone.scores))
    for k in range(0, 24, 4):
        expected = 1 / (1 + np.exp(-logits[k : k + 4].mean(0)))
        np.testing.assert_allclose(found.scores[k : k + 4], np.tile(expected, (4, 1)), atol=1e-6)
    assert results(found, repeats=0)["unit"] == {"name": "patient", "n": 6}


@pytest.fixture(scope="module")
def grouped(tiny: Any) -> Path:
    """The table with a sex, an age in DICOM's words and a scanner under another name."""
    with tiny.manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    path = tiny.folder / "grouped.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], "sex", "age", "device"])
        table.writeheader()
        for i, one in enumerate(rows):
            table.writerow({**one, "sex": "FM"[i % 2], "age": f"{20 + i:03d}Y", "device": "one"})
    return path


def test_evaluate_measures_every_subgroup(tiny: Any, grouped: Path, tmp_path: Path) -> None:
    columns = tmp_path / "columns.yaml"
    columns.write_text("groups: {sex: sex, age: age, scanner: device}\n")
    arguments = ["evaluate", str(grouped), "--model", str(tiny.model), "--columns", str(columns), "--repeats", "20", "--no-baseline"]
    done = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "out"), "--allow-leak", "similar-images"])
    assert done.exit_code == 0, done.output
    measured = json.loads((tmp_path / "out" / "results.json").read_text())
    found = measured["subgroups"]
    assert found["of_one_kind"]["scanner"] == "one" and {"sex", "age"} <= set(found["attributes"])
    assert "device" not in json.dumps(found) and "subgroups" in done.output
    sexes = {
        int(r["row"]): r for r in csv.DictReader((tmp_path / "out" / "predictions.csv").open(newline="")) if r["finding"] == FINDINGS[1]
    }
    with grouped.open(newline="") as file:
        of_row = dict(enumerate((one["sex"] for one in csv.DictReader(file)), start=2))
    for letter, word in (("F", "female"), ("M", "male")):
        own = [one for at, one in sexes.items() if of_row[at] == letter and one["label"] in ("0", "1")]
        labels = [int(one["label"]) for one in own]
        group = found["attributes"]["sex"]["groups"][word]
        assert group["n"] == 12
        if min(labels.count(0), labels.count(1)) >= 10:
            expected = roc_auc_score(labels, [float(one["score"]) for one in own])
            assert group["auroc"]["per_finding"][FINDINGS[1]]["value"] == pytest.approx(expected)
    assert measured["protocol"]["unit"] == "study"


def test_a_group_column_that_is_not_there_is_told(grouped: Path) -> None:
    with pytest.raises(ManifestError, match=r"hospital \(for groups\[site\]\)"):
        read_manifest(grouped, columns=ColumnMap(groups={"site": "hospital"}))


def test_a_tower_that_pools_studies_cannot_count_images(tiny: Any, model: Any, paired: list[StudyImage], monkeypatch: Any) -> None:
    monkeypatch.setattr(type(model.image), "pools", lambda self, modality: True)
    with pytest.raises(ValueError, match="count studies or patients"):
        predict(model, paired, load_prompts(), ReportSentences(), findings=FINDINGS, unit="image")
