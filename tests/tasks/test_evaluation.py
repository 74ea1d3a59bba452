"""Evaluation: results.json against scikit-learn and loops over predictions.csv, and what is left out is counted."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import medvl
from medvl.data.manifest import read_manifest
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.evaluation import predict, results, write

FINDINGS = ("cardiomegaly", "pleural_effusion", "lung_nodule")


@pytest.fixture(scope="module")
def model(tiny: Any) -> Any:
    return medvl.load(tiny.model, device="cpu")


@pytest.fixture(scope="module")
def predictions(model: Any, tiny: Any) -> Any:
    rows = read_manifest(tiny.manifest).select(split="test", modality="xray").rows
    return predict(model, rows, load_prompts(), ReportSentences(), batch_size=5)


@pytest.fixture(scope="module")
def folder(predictions: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation")
    write(predictions, results(predictions, repeats=200, seed=1), out)
    return out


@pytest.fixture(scope="module")
def measured(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def source_rows(tiny: Any) -> dict[str, dict[str, str]]:
    with tiny.manifest.open(newline="") as file:
        return {row["study_id"]: row for row in csv.DictReader(file)}


def test_the_table_has_a_row_for_every_image_and_finding(table: list[dict[str, str]], tiny: Any, measured: Any) -> None:
    assert len(table) == 24 * 3 and measured["images"] == 24 and measured["studies"] == 24 and measured["patients"] == 22
    for row in table:
        assert row["label"] == source_rows(tiny)[row["study_id"]][row["finding"]]
        assert 0 < float(row["score"]) < 1


def test_auroc_of_predictions_csv_is_that_of_scikit_learn(table: list[dict[str, str]], measured: Any) -> None:
    areas = []
    for name in FINDINGS:
        rows = [(int(r["label"]), float(r["score"])) for r in table if r["finding"] == name and r["label"] in ("0", "1")]
        labels, scores = zip(*rows, strict=True)
        one = measured["zero_shot"]["per_finding"][name]
        assert one["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert (one["n"], one["n_positive"]) == (len(labels), sum(labels))
        assert one["ci_low"] <= one["auroc"] <= one["ci_high"] and one["ci_low"] < one["ci_high"]
        areas.append(one["auroc"])
    assert measured["zero_shot"]["per_finding"]["cardiomegaly"]["n"] == 22, "one label is uncertain, one missing"
    assert measured["zero_shot"]["macro_auroc"] == pytest.approx(np.mean(areas), abs=1e-12)


def mask_of(tiny: Any, row: dict[str, str], finding: str) -> np.ndarray:
    """From the manifest's own cells, in plain loops."""
    mask = np.zeros((48, 40), dtype=bool)
    if cell := row.get(f"mask_{finding}"):
        mask |= np.asarray(Image.open(tiny.folder / cell)) > 0
    for box in json.loads(row["boxes"] or "[]"):
        if box["finding"] == finding:
            for r in range(48):
                for c in range(40):
                    mask[r, c] |= box["y"] <= r < box["y"] + box["height"] and box["x"] <= c < box["x"] + box["width"]
    return mask


def test_pointing_game_can_be_made_again_from_peaks_and_masks(table: list[dict[str, str]], measured: Any, tiny: Any) -> None:
    manifest = source_rows(tiny)
    for name in ("pleural_effusion", "lung_nodule"):
        hits = []
        for row in table:
            if row["finding"] == name and row["label"] == "1":
                mask = mask_of(tiny, manifest[row["study_id"]], name)
                assert mask.any()
                hits.append(mask[int(row["peak_row"]), int(row["peak_col"])])
        found = measured["grounding"]["per_finding"][name]
        assert len(hits) > 3 and found["n"] == len(hits)
        assert found["pointing_game"] == pytest.approx(np.mean(hits))
    assert "cardiomegaly" not in measured["grounding"]["per_finding"], "it has no masks"
    assert measured["grounding"]["focal_findings"] == ["pleural_effusion", "lung_nodule"]


def test_recall_can_be_made_again(folder: Path, measured: Any, predictions: Any) -> None:
    with (folder / "retrieval.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    one = measured["retrieval"]["image_to_report"]
    assert len(rows) == 24 and {int(r["pool"]) for r in rows} == {24} == {one["pool"]}
    ranks = [float(r["rank_strict"]) for r in rows]
    similarity, own = predictions.retrieval.similarity, predictions.retrieval.own
    for k in (1, 5, 10):
        hits = []
        for i in range(24):  # of a tie that K cuts, the expected share
            mine = similarity[i, own[i]].item()
            above, tied = (similarity[i] > mine).sum(), (similarity[i] == mine).sum()
            hits.append(min(max((k - above) / tied, 0), 1))
        assert one[f"recall_at_{k}"] == pytest.approx(np.mean(hits))
    assert one["median_rank"] == np.median(ranks)
    assert one["chance"] == pytest.approx(10 / 24)
    assert all(float(r["rank_duplicates"]) <= float(r["rank_strict"]) for r in rows)


def test_retrieval_ranks_equal_reports_alike(predictions: Any) -> None:
    """Two reports of the same sentences must tie exactly, or noise orders them."""
    pairs = predictions.retrieval
    equal = [(a, b) for a in range(24) for b in range(a) if set(pairs.sentences[a]) == set(pairs.sentences[b])]
    for a, b in equal:
        np.testing.assert_array_equal(pairs.similarity[:, a], pairs.similarity[:, b])
    own = np.array([[row.study_id == study for study in pairs.study_ids] for row in predictions.rows])
    np.testing.assert_array_equal(pairs.own, own)


def test_batch_size_does_not_move_a_prediction(model: Any, tiny: Any, predictions: Any) -> None:
    rows = read_manifest(tiny.manifest).select(split="test", modality="xray").rows
    other = predict(model, rows, load_prompts(), ReportSentences(), batch_size=24)
    np.testing.assert_allclose(other.scores, predictions.scores, atol=1e-5)
    np.testing.assert_array_equal(other.hits, predictions.hits)


def test_the_same_seed_gives_the_same_results(predictions: Any) -> None:
    assert results(predictions, repeats=50, seed=3) == results(predictions, repeats=50, seed=3)
    assert results(predictions, repeats=50, seed=3) != results(predictions, repeats=50, seed=4)


def test_bad_images_and_bad_masks_cost_only_their_study_and_are_counted(model: Any, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "studies")
    manifest = tmp_path / "studies" / "manifest.csv"
    rows = read_manifest(manifest).select(split="test", modality="xray").rows
    masked = [r for r in rows if r.masks]
    rows[0].path.write_bytes(b"gone bad")
    Image.new("L", (39, 48), 255).save(next(iter(masked[-1].masks.values())))
    next(iter(masked[-2].masks.values())).write_bytes(b"no picture")
    found = predict(model, rows, load_prompts(), ReportSentences(), batch_size=4)
    bad = {rows[0].study_id, masked[-1].study_id, masked[-2].study_id}
    assert len(bad) == 3
    assert {row.study_id for row, _ in found.rejected} == bad
    assert {row.study_id for row in found.rows} == {row.study_id for row in rows} - bad
    reasons = {row.study_id: why for row, why in found.rejected}
    assert "(48, 39)" in reasons[masked[-1].study_id] and "(48, 40)" in reasons[masked[-1].study_id]
    measured = results(found, repeats=0)
    assert measured["rejected"] == 3 and measured["images"] == len(rows) - 3
    assert measured["retrieval"]["image_to_report"]["pool"] == len(rows) - 3, "a report without a readable image is nobody's hit"
    write(found, measured, tmp_path / "out")
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        assert {r["study_id"] for r in csv.DictReader(file)} == bad
    assert not any(math.isnan(v) for v in found.scores.ravel())


def test_no_readable_image_is_an_error(model: Any, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "studies")
    rows = read_manifest(tmp_path / "studies" / "manifest.csv").select(split="train").rows
    for row in rows:
        row.path.write_bytes(b"gone bad")
    with pytest.raises(ValueError, match="none of 2 images"):
        predict(model, rows, load_prompts(), ReportSentences())
