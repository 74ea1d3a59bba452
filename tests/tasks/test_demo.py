"""The commands that train, run as a user runs them: what ``medvl demo`` leaves behind, made again with other tools, and a fit on notes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import medvl

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "tasks" / "recipes" / "xray_notes.yaml"
FIXED = ("study_id", "finding", "label", "score", "peak_row", "peak_col")
FINDINGS = (
    "cardiomegaly",
    "pleural_effusion",
    "consolidation",
    "pneumothorax",
    "lung_nodule",
    "edema",
    "atelectasis",
    "rib_fracture",
    "support_device",
    "emphysema",
)


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("medvl")
    assert program.is_file(), "install the package first: pip install -e '.[test]'"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=900)


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Demo:
    """A finished small demo."""

    out: Path
    told: Any  # what it printed
    seconds: float

    @property
    def predictions(self) -> list[dict[str, str]]:
        """Rows of predictions.csv."""
        return table(self.out / "predictions.csv")


def run_demo(out: Path, *options: object) -> Demo:
    start = time.monotonic()
    size = options or ("--train-studies", 96, "--test-studies", 40, "--epochs", 1)
    done = command("demo", "--out", out, "--seed", 3, *size, "--json", cwd=out.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    return Demo(out, strict(done.stdout), time.monotonic() - start)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run_demo(tmp_path_factory.mktemp("demo") / "out")


@pytest.mark.slow
def test_the_demo_leaves_the_fixed_files_and_keys(demo: Demo) -> None:
    for name in ("results.json", "predictions.csv", "report.html", "model/MODEL_CARD.md", "data/manifest.csv", "data/xray", "data/masks"):
        assert (demo.out / name).exists(), name
    found = strict((demo.out / "results.json").read_text())
    assert found == demo.told
    assert 0 <= found["zero_shot"]["macro_auroc"] <= 1
    assert set(FINDINGS) <= set(found["zero_shot"]["per_finding"])
    for one in found["zero_shot"]["per_finding"].values():
        assert {"auroc", "ci_low", "ci_high", "n"} <= set(one) and one["n"] > 30
    assert 0 <= found["grounding"]["pointing_game_macro"] <= 1 and found["grounding"]["per_finding"]
    retrieval = found["retrieval"]["image_to_report"]
    assert retrieval["pool"] == found["studies"] in (39, 40, 41), "a patient's second study may move a split's size by one"
    assert 0 <= retrieval["recall_at_10"] <= 1 and retrieval["chance"] == pytest.approx(10 / retrieval["pool"])
    assert tuple(demo.predictions[0])[: len(FIXED)] == FIXED
    assert len(demo.predictions) == found["images"] * len(found["zero_shot"]["per_finding"])
    card = (demo.out / "model" / "MODEL_CARD.md").read_text()
    assert found["protocol"]["name"] == "phantom" and found["protocol"]["score"]["weights_sha256"] == found["facts"]["weights_sha256"]
    assert found["leak_check"]["training_table_compared"] and set(found["leak_check"]["shared"].values()) == {0}
    assert found["subgroups"]["attributes"].keys() >= {"sex", "view"} and found["protocol"]["method_sha256"] in card
    assert f"{found['zero_shot']['macro_auroc']:.3f} (" in card and found["facts"]["weights_sha256"] in card and "synthetic" in card
    page = (demo.out / "report.html").read_text()
    assert "synthetic" in page.lower() and "<script" not in page and 'src="http' not in page


@pytest.mark.slow
@pytest.mark.parametrize("figures", ["zero_shot", "baseline"])
def test_auroc_is_that_of_scikit_learn_on_predictions_csv(demo: Demo, figures: str) -> None:
    roc_auc_score = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the extra 'test'").roc_auc_score
    column = "score" if figures == "zero_shot" else "baseline_score"
    areas = []
    for name, one in demo.told[figures]["per_finding"].items():
        rows = [row for row in demo.predictions if row["finding"] == name and row["label"] in ("0", "1")]
        labels, scores = [int(row["label"]) for row in rows], [row[column] for row in rows]
        got = one["auroc"] if figures == "zero_shot" else one
        if len(set(labels)) < 2 or "" in scores:
            assert got is None, f"{name}: one class only"
            continue
        areas.append(roc_auc_score(labels, [float(score) for score in scores]))
        assert got == pytest.approx(areas[-1], abs=1e-9)
    assert len(areas) > 5
    assert demo.told[figures]["macro_auroc"] == pytest.approx(np.mean(areas), abs=1e-9)


@pytest.mark.slow
def test_the_pointing_game_is_that_of_peaks_and_mask_files(demo: Demo) -> None:
    manifest = {row["path"].rpartition("/")[2]: row for row in table(demo.out / "data" / "manifest.csv") if row["modality"] == "xray"}
    hits: dict[str, list[bool]] = {}
    covered: dict[str, list[float]] = {}
    for row in demo.predictions:
        cell = manifest[row["path"]].get(f"mask_{row['finding']}")
        if row["label"] == "1" and cell:
            mask = np.asarray(Image.open(demo.out / "data" / cell)) > 0
            hits.setdefault(row["finding"], []).append(bool(mask[int(row["peak_row"]), int(row["peak_col"])]) if row["peak_row"] else False)
            covered.setdefault(row["finding"], []).append(mask.mean())
    found = demo.told["grounding"]
    assert set(found["per_finding"]) == set(hits)
    for name, one in found["per_finding"].items():
        assert (one["pointing_game"], one["n"]) == (pytest.approx(np.mean(hits[name])), len(hits[name]))
    focal = [name for name in hits if np.median(covered[name]) < 0.25]
    assert set(focal) == set(found["focal_findings"]) and len(focal) > 3
    assert found["pointing_game_macro"] == pytest.approx(np.mean([np.mean(hits[name]) for name in focal]))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["image_to_report", "report_to_image"])
def test_recall_follows_from_retrieval_csv(demo: Demo, direction: str) -> None:
    rows = [row for row in table(demo.out / "retrieval.csv") if row["direction"] == direction]
    single = [row for row in rows if row["hits_strict"] == "1"]
    assert len(single) == len(rows) > 30, "one radiograph a study"
    shares = [min(max((10 - int(row["above_strict"])) / int(row["tied_strict"]), 0), 1) for row in rows]
    assert demo.told["retrieval"][direction]["recall_at_10"] == pytest.approx(np.mean(shares))


@pytest.mark.slow
def test_no_patient_is_trained_on_and_tested(demo: Demo) -> None:
    rows = table(demo.out / "data" / "manifest.csv")
    patients = {split: {row["patient_id"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert all(patients.values())
    assert not patients["train"] & patients["test"] and not patients["val"] & patients["test"] and not patients["train"] & patients["val"]
    test = {row["study_id"] for row in rows if row["split"] == "test"}
    assert {row["study_id"] for row in demo.predictions} == test


@pytest.mark.slow
def test_the_model_loads_and_encodes(demo: Demo) -> None:
    model = medvl.load(demo.out / "model", device="cpu")
    image = model.encode_image(next((demo.out / "data" / "xray").glob("*.dcm")))
    text = model.encode_text(["There is a large left pleural effusion.", "The lungs are clear."])
    assert image.pooled.shape[0] == 1 and text.pooled.shape[0] == 2 and image.pooled.shape[1] == text.pooled.shape[1]
    assert image.pooled.isfinite().all() and text.pooled.isfinite().all()


@pytest.mark.slow
def test_the_same_demo_again_is_quick_and_says_the_same(demo: Demo) -> None:
    before = (demo.out / "predictions.csv").read_bytes()
    weights = (demo.out / "model" / "model.safetensors").stat().st_mtime_ns
    again = run_demo(demo.out)
    assert (demo.out / "model" / "model.safetensors").stat().st_mtime_ns == weights, "it was not trained again"
    assert again.told["facts"].pop("seconds")["training"] < demo.told["facts"]["seconds"]["training"]
    first = {**demo.told, "facts": {name: value for name, value in demo.told["facts"].items() if name != "seconds"}}
    assert again.told == first
    assert (demo.out / "predictions.csv").read_bytes() == before
    assert again.seconds < demo.seconds


@pytest.mark.slow
def test_the_demo_of_both_ends_in_one_model_for_both(tmp_path: Path) -> None:
    roc_auc_score = pytest.importorskip("sklearn.metrics", reason="scikit-learn is in the extra 'test'").roc_auc_score
    demo = run_demo(tmp_path / "both", "--modality", "both", "--train-studies", 48, "--test-studies", 24, "--epochs", 1)
    assert demo.told == strict((demo.out / "results.json").read_text())
    for kind, found in (("xray", demo.told), ("ct", demo.told["ct"])):
        areas = []
        rows = table(demo.out / kind / "predictions.csv")
        for name, one in found["zero_shot"]["per_finding"].items():
            known = [row for row in rows if row["finding"] == name and row["label"] in ("0", "1")]
            if len({row["label"] for row in known}) == 2:
                areas.append(roc_auc_score([int(row["label"]) for row in known], [float(row["score"]) for row in known]))
                assert one["auroc"] == pytest.approx(areas[-1], abs=1e-9)
        assert len(areas) > 5 and found["facts"]["weights_sha256"] == demo.told["facts"]["weights_sha256"]
    assert 0 <= demo.told["ct"]["slices"]["slice_hit_macro"] <= 1 and demo.told["ct"]["facts"]["data"] == "synthetic"
    patients = [{row["patient_id"] for row in table(demo.out / kind / "data" / "manifest.csv")} for kind in ("xray", "ct")]
    assert all(patients) and not patients[0] & patients[1], "no one is trained on in one kind of image and tested in the other"
    files = [next((demo.out / "xray/data/xray").glob("*.dcm")), next((demo.out / "ct/data/ct").glob("*.nii.gz"))]
    done = command("diagnose", *files, "--model", demo.out / "model", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    film, volume = (strict(line) for line in done.stdout.splitlines())
    assert film["ok"] and volume["ok"] and len(volume["slices"]) == 1 and "slices" not in film
    for file, shape in zip(files, (2, 3), strict=True):
        done = command("ground", file, "--phrase", "left effusion", "--model", demo.out / "model", "--out", tmp_path / "maps", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert np.load(tmp_path / "maps" / "left_effusion.npy").ndim == shape
    page = (demo.out / "report.html").read_text()
    assert "chest radiographs and chest CT" in page and "<script" not in page
    card = (demo.out / "model" / "MODEL_CARD.md").read_text()
    assert "### Radiographs" in card and "### CT" in card and "### Slices" in card


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Forty grey squares with a note each, in a table that names its columns its own way; one file is no picture."""
    rng = np.random.default_rng(5)
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(40):
        side = "left" if rng.random() < 0.5 else "right"
        image = rng.normal(110, 20, (72, 64))
        image[40:60, 40:56] += 60 * (side == "left")
        image[40:60, 8:24] += 60 * (side == "right")
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / f"{i:02d}.png")
        note = f"Patchy opacity in the {side} lower lobe. No pneumothorax."
        rows.append([f"n{i:02d}", f"p{i // 2:02d}", f"images/{i:02d}.png", "X-ray", "PA", note])
    with (tmp_path / "films.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["study_id", "patient_id", "image", "modality", "view", "text"], *rows])
    return tmp_path / "films.csv"


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_a_table_of_notes_is_trained_on_and_searched(notes: Path, damaged: bool) -> None:
    if damaged:
        (notes.parent / "images" / "07.png").write_bytes(b"no picture")
    run, epochs = notes.parent / "run", ("--trainer.max_epochs", 1)
    done = command("fit", "--config", RECIPE, "--data.init_args.manifest", notes, *epochs, "--out", run, cwd=notes.parent)
    assert done.returncode == int(damaged), done.stderr[-4000:]
    for name in ("config.yaml", "config.json", "model.safetensors", *(["rejected.csv"] if damaged else [])):
        assert (run / name).is_file(), name
    if damaged:
        assert "07.png" in (run / "rejected.csv").read_text() or "n07" in (run / "rejected.csv").read_text()
        return
    for again in ("validate", "test"):
        done = command(again, "--config", run / "config.yaml", "--out", run, cwd=notes.parent)
        assert done.returncode == 0 and "loss" in done.stdout + done.stderr, done.stderr[-4000:]
    columns = ("--columns", RECIPE.with_name("columns_notes.yaml"))
    done = command("index", "build", notes, "--model", run, *columns, "--store", notes.parent / "a.db", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    query = notes.parent / "images" / "03.png"
    done = command("search", "--model", run, "--store", notes.parent / "a.db", "--query", query, "--json", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    told = strict(done.stdout)
    assert told["pool"] == 40 and len(told["hits"]) == 2, "there are two notes, each of many films"
    assert sorted(one for hit in told["hits"] for one in (hit["study_id"], *hit["same_report"])) == [f"n{i:02d}" for i in range(40)]


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", ["fit", "validate", "test"])
def test_help_of_training_opens_with_examples_and_lists_the_options(subcommand: str, tmp_path: Path) -> None:
    done = command(subcommand, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.index("Examples:") < done.stdout.index(f"medvl {subcommand} --config") < done.stdout.index("--trainer.max_epochs")
