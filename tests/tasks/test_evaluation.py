"""Evaluation: results.json against scikit-learn and loops over predictions.csv, and what is left out is counted."""

from __future__ import annotations

import csv
import itertools
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
from tasks.evaluation import finding_maps, predict, results, write
from tasks.grounding import token_maps
from tasks.retrieval_figures import expected_rank
from tasks.zero_shot import encode_prompts

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


def chance_of_a_hit(items: int, hits: int, draws: int) -> float:
    draws = min(max(draws, 0), items)
    return 1 - math.comb(items - hits, draws) / math.comb(items, draws)


@pytest.fixture(scope="module")
def retrieval(folder: Path) -> list[dict[str, str]]:
    with (folder / "retrieval.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("direction", ["image_to_report", "report_to_image"])
@pytest.mark.parametrize("rule", ["strict", "duplicates"])
def test_recall_can_be_made_again_from_retrieval_csv(retrieval: list[dict[str, str]], measured: Any, direction: str, rule: str) -> None:
    rows = [row for row in retrieval if row["direction"] == direction]
    one = measured["retrieval"][direction]
    found = one if rule == "strict" else one["duplicates_as_hits"]
    assert len(rows) == len({row["study_id"] for row in rows}) == 24 and {int(r["pool"]) for r in rows} == {24} == {found["pool"]}
    above, tied, hits, relevant = ([int(row[f"{name}_{rule}"]) for row in rows] for name in ("above", "tied", "hits", "relevant"))
    for k in (1, 5, 10):
        recall = [chance_of_a_hit(t, h, k - a) for a, t, h in zip(above, tied, hits, strict=True)]
        assert found[f"recall_at_{k}"] == pytest.approx(np.mean(recall), abs=1e-12)
        assert found[f"recall_at_{k}_interval"]["n"] == 24
        chance = np.mean([chance_of_a_hit(24, r, k) for r in relevant])
        assert found[f"recall_at_{k}_interval"]["chance"] == pytest.approx(chance, abs=1e-12)
    ranks = [float(row[f"rank_{rule}"]) for row in rows]
    assert ranks == [a + (t + 1) / (h + 1) for a, t, h in zip(above, tied, hits, strict=True)]
    assert found["median_rank"] == np.median(ranks)
    assert all(float(r["rank_duplicates"]) <= float(r["rank_strict"]) for r in rows)


@pytest.mark.parametrize("direction", ["image_to_report", "report_to_image"])
def test_retrieval_csv_counts_what_the_similarity_holds(retrieval: list[dict[str, str]], predictions: Any, direction: str) -> None:
    """One query at a time, in plain loops over the matrix."""
    pairs = predictions.retrieval
    images = [row.study_id for row in predictions.rows]
    reports = {study: frozenset(sentences) for study, sentences in zip(pairs.study_ids, pairs.sentences, strict=True)}
    for row in (row for row in retrieval if row["direction"] == direction):
        study = row["study_id"]
        if direction == "image_to_report":
            items = dict(zip(pairs.study_ids, pairs.similarity[images.index(study)].tolist(), strict=True))
        else:
            items = dict(zip(images, pairs.similarity[:, pairs.study_ids.index(study)].tolist(), strict=True))
        for rule, good in (("strict", {study}), ("duplicates", {other for other in items if reports[other] == reports[study]})):
            best = max(items[other] for other in good)
            assert int(row[f"above_{rule}"]) == sum(value > best for value in items.values())
            assert int(row[f"tied_{rule}"]) == sum(value == best for value in items.values())
            assert int(row[f"hits_{rule}"]) == sum(items[other] == best for other in good)
            assert int(row[f"relevant_{rule}"]) == len(good)


def test_retrieval_ranks_equal_reports_alike(predictions: Any) -> None:
    """Two reports of the same sentences must tie exactly, or noise orders them."""
    pairs = predictions.retrieval
    equal = [(a, b) for a in range(24) for b in range(a) if set(pairs.sentences[a]) == set(pairs.sentences[b])]
    for a, b in equal:
        np.testing.assert_array_equal(pairs.similarity[:, a], pairs.similarity[:, b])
    own = np.array([[row.study_id == study for study in pairs.study_ids] for row in predictions.rows])
    np.testing.assert_array_equal(pairs.own, own)


def test_the_expected_rank_of_ties_is_the_mean_over_their_orders() -> None:
    """Two relevant and two other items tie behind one that scores higher: every order of the four, one at a time."""
    similarity, relevant = np.array([0.5, 0.5, 0.9, 0.5, 0.5, 0.1]), np.array([1, 0, 0, 1, 0, 1], dtype=bool)
    orders = list(itertools.permutations((True, False, True, False)))
    assert expected_rank(similarity, relevant) == pytest.approx(np.mean([2 + order.index(True) for order in orders]))


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


def test_a_findings_map_is_the_highest_of_its_prompts_maps(model: Any, tiny: Any) -> None:
    """Each prompt grounded on its own as a phrase; the finding's map against their maximum, on the token grid."""
    prompts = load_prompts()
    features = model.encode_samples([model.read(tiny.dicom), model.read(tiny.png)])
    found = finding_maps(model, features, encode_prompts(model, prompts, FINDINGS)).numpy()
    for j, name in enumerate(FINDINGS):
        alone = [token_maps(model, features, [phrase])[:, 0].numpy() for phrase in prompts.findings[name].positive]
        np.testing.assert_allclose(found[:, j], np.max(alone, axis=0), atol=1e-6)


def test_no_readable_image_is_an_error(model: Any, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "studies")
    rows = read_manifest(tmp_path / "studies" / "manifest.csv").select(split="train").rows
    for row in rows:
        row.path.write_bytes(b"gone bad")
    with pytest.raises(ValueError, match="none of 2 images"):
        predict(model, rows, load_prompts(), ReportSentences())
