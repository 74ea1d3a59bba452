"""The thumbnail baseline against scikit-learn: its fit, and its AUROC made again from predictions.csv."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import medvl
from medvl.data.manifest import read_manifest
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.baseline import learnable, logistic_scores, thumbnail_baseline, thumbnails
from tasks.cli import cli
from tasks.evaluation import predict

TRAIN = tuple(range(0, 22, 2))  # the last patient, with studies 23 to 25, is tested on
TEST = tuple(i for i in range(26) if i not in TRAIN)


def test_scores_equal_scikit_learns_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is in the extra 'test'")
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 2, (120, 10)), rng.normal(3, 2, (30, 10))
    labels = (train @ rng.normal(size=(10, 2)) + rng.normal(0, 2, (120, 2)) > 0).astype(float)
    labels[:7, 0], labels[7:12, 0] = np.nan, -1
    scores = logistic_scores(train, labels, test, penalty=2.0)
    scaled, scaled_test = ((part - train.mean(0)) / train.std(0) for part in (train, test))
    for j in range(2):
        known = np.isin(labels[:, j], (0, 1))
        fitted = linear_model.LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(scaled[known], labels[known, j])
        np.testing.assert_allclose(scores[:, j], fitted.predict_proba(scaled_test)[:, 1], atol=1e-4)


def test_thumbnails_are_area_means() -> None:
    pixels = torch.arange(32 * 48, dtype=torch.float32).reshape(1, 1, 32, 48)
    small = thumbnails(pixels).reshape(16, 16)
    assert small[3, 5] == pytest.approx(float(pixels[0, 0, 6:8, 15:18].mean()))


@pytest.fixture
def studies(tiny: Any, tmp_path: Path) -> Path:
    """The tiny table with 11 studies to train on and 15 to test."""
    shutil.copytree(tiny.folder, tmp_path / "studies")
    table = tmp_path / "studies" / "manifest.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "split": "train" if i in TRAIN else "test"} for i, row in enumerate(rows))
    return table


def evaluate(tiny: Any, table: Path, out: Path, *more: object) -> Any:
    arguments = ["evaluate", "--model", tiny.model, "--manifest", table, "--out", out, "--repeats", 0, "--json", *more]
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_evaluate_shows_it_unless_told_not_to_and_predictions_csv_makes_it_again(tiny: Any, studies: Path, tmp_path: Path) -> None:
    roc_auc_score = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the extra 'test'").roc_auc_score
    done = evaluate(tiny, studies, tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["baseline"]
    assert (found["train_images"], found["train_rejected"], found["images"]) == (len(TRAIN), 0, len(TEST))
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["study_id", "finding", "label", "score", "peak_row", "peak_col"]
    areas = []
    for name, area in found["per_finding"].items():
        known = [(int(r["label"]), float(r["baseline_score"])) for r in rows if r["finding"] == name and r["label"] in ("0", "1")]
        areas.append(roc_auc_score(*zip(*known, strict=True)))
        assert area == pytest.approx(areas[-1], abs=1e-12)
    assert len(areas) == 3 and found["macro_auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    done = evaluate(tiny, studies, tmp_path / "without", "--no-baseline")
    assert done.exit_code == 0 and "baseline" not in json.loads(done.stdout)
    assert "baseline_score" not in (tmp_path / "without" / "predictions.csv").read_text()


def test_an_unreadable_training_image_is_skipped_and_counted(tiny: Any, studies: Path, tmp_path: Path) -> None:
    (studies.parent / "images" / "s04.dcm").write_bytes(b"gone bad")
    done = evaluate(tiny, studies, tmp_path / "out")
    assert done.exit_code == 1, done.output
    told = json.loads(done.stdout)
    assert told["baseline"]["train_rejected"] == 1 and told["baseline"]["train_images"] == len(TRAIN) - 1
    assert told["images"] == len(TEST) and told["rejected"] == 0
    assert "1 rejected (training images of the baseline; all in" in done.stderr and "s04.dcm" in done.stderr


def test_training_images_are_not_scored(tiny: Any, studies: Path, tmp_path: Path) -> None:
    done = evaluate(tiny, studies, tmp_path / "out", "--split", "all")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["images"] == 26 and json.loads(done.stdout)["baseline"]["images"] == len(TEST)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        scored = {row["study_id"] for row in csv.DictReader(file) if row["baseline_score"]}
    assert scored == {f"s{i:02d}" for i in TEST}
    done = evaluate(tiny, studies, tmp_path / "out", "--split", "train")
    assert done.exit_code == 0 and "baseline" not in json.loads(done.stdout)
    assert evaluate(tiny, studies, tmp_path / "out", "--split", "train", "--baseline").exit_code == 2


def test_a_finding_that_training_shows_one_side_of_only_has_no_score(tiny: Any, studies: Path) -> None:
    manifest = read_manifest(studies)
    train = [row for row in manifest.select(split="train", modality="xray") if row.labels.get("lung_nodule") == 0]
    assert len(train) > 3 and learnable(train, ("lung_nodule", "pleural_effusion")) == ("pleural_effusion",)
    model = medvl.load(tiny.model, device="cpu")
    predictions = predict(model, manifest.select(split="test", modality="xray").rows, load_prompts(), ReportSentences())
    found = thumbnail_baseline(model, train, predictions)
    column = predictions.findings.index("lung_nodule")
    assert np.isnan(found.scores[:, column]).all() and found.measured["per_finding"]["lung_nodule"] is None
    others = [value for name, value in found.measured["per_finding"].items() if name != "lung_nodule" and value is not None]
    assert others and math.isclose(found.measured["macro_auroc"], np.mean(others))
