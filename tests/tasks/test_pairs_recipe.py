"""The recipe that lays pair building over another: every variant fits a few studies, from the command line's options."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from medvl.training.cli import run
from tasks.demo import recipe_path

P = "--data.init_args.pairs"
OPTIONS = f"{P}.init_args"
MINILM = ["reports.MiniLmReportEncoder", f"{OPTIONS}.soft.init_args.encoder.init_args.embed_dim", "8"]
VARIANTS = {
    "text": [f"{OPTIONS}.across", "text"],
    "findings": [],
    "open": [f"{OPTIONS}.unknown", "ignore_related"],
    "drop": [f"{OPTIONS}.without_content", "drop"],
    "ignore": [f"{OPTIONS}.without_content", "ignore", f"{OPTIONS}.unknown", "ignore"],
    "target": [f"{OPTIONS}.without_content", "target", "--model.null_target", "true"],
    "negatives": [f"{OPTIONS}.negatives", "reports.pairs.HardNegatives", f"{OPTIONS}.negatives.init_args.per_study", "2"],
    "labels": [f"{OPTIONS}.soft", "reports.pairs.SoftTargets", f"{OPTIONS}.soft.init_args.likeness", "labels"],
    "likeness": [f"{OPTIONS}.soft", "reports.pairs.SoftTargets", f"{OPTIONS}.soft.init_args.encoder", *MINILM],
    "flip": ["--data.init_args.flip", "0.5"],
}
SENTENCES = [
    "There is a small left pleural effusion. No pneumothorax.",
    "No pleural effusion or pneumothorax.",
    "The lungs are clear. Comparison is made to the prior study.",
    "Consolidation in the right upper lobe. Mild cardiomegaly.",
    "Large right pleural effusion. The heart is not enlarged.",
    "Findings were discussed with Dr. Smith.",
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = []
    for i in range(18):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append([f"s{i}", f"p{i}", "xray", f"{i}.png", "PA", "train" if i < 12 else "val", SENTENCES[i % 6]])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["study_id", "patient_id", "modality", "path", "view", "split", "findings"], *lines])
    return folder / "manifest.csv"


def fit(manifest: Path, out: Path, options: list[str], *recipes: str) -> dict[str, list[float]]:
    """Logged losses of one fit of the recipes, laid one over another, with tiny towers."""
    tiny = json.dumps({"embed_dim": 8, "widths": [8, 8, 8], "blocks": [1, 1, 1]})
    names = ("xray_phantom.yaml", *(recipes or ("pairs.yaml",)))
    configs = [part for name in names for part in ("--config", str(recipe_path(name)))]
    small = ["--model.image.init_args", tiny, "--model.report.init_args", json.dumps({"embed_dim": 8, "hidden_dim": 8})]
    data = ["--data.init_args.manifest", str(manifest), "--data.init_args.reader.init_args.size", "32", "--data.init_args.batch_size", "6"]
    trainer = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert run("fit", [*configs, *small, *data, *trainer, "--trainer.log_every_n_steps", "1", "--out", str(out), *options]) in (0, 1)
    with next((out / "logs").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in ("train/loss", "val/loss")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_fits(manifest: Path, tmp_path: Path, variant: str) -> None:
    losses = fit(manifest, tmp_path / "run", VARIANTS[variant])
    assert len(losses["train/loss"]) == 4 or (variant == "drop" and losses["train/loss"])
    assert np.isfinite(losses["train/loss"] + losses["val/loss"]).all()
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["data"]["init_args"]["pairs"]["class_path"] == "reports.pairs.ReportPairs"
    assert resolved["model"]["image"]["init_args"]["widths"] == [8, 8, 8]
    if variant == "drop":  # the study of which nothing is left is listed
        assert "no sentence to train on" in (tmp_path / "run" / "rejected.csv").read_text()


def test_texts_for_a_null_image_need_one(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set model\.null_target to true"):
        fit(manifest, tmp_path / "run", [f"{OPTIONS}.without_content", "target"])


def test_several_texts_a_study_come_from_the_command_line(manifest: Path, tmp_path: Path) -> None:
    """Sources by name with weights, a file of rewrites among them."""
    rewrites = tmp_path / "rewrites.jsonl"
    rewrites.write_text("".join(json.dumps({"study_id": f"s{i}", "texts": [f"Rewritten report {i % 6}."]}) + "\n" for i in range(18)))
    sources = {
        "report": {"class_path": "reports.text_source.ReportSentences"},
        "rewrites": {"class_path": "reports.pairs.RewrittenTexts", "init_args": {"path": str(rewrites)}},
        "captions": {"class_path": "reports.pairs.HierarchicalCaptions"},
    }
    texts = {"class_path": "reports.pairs.MixedTexts", "init_args": {"sources": sources, "weights": {"captions": 0.5}}}
    losses = fit(manifest, tmp_path / "run", ["--data.init_args.texts", json.dumps(texts), "--data.init_args.sentences_per_image", "2"])
    assert len(losses["train/loss"]) == 4
    assert np.isfinite(losses["train/loss"]).all()


def test_the_recipe_of_mixed_texts_fits(manifest: Path, tmp_path: Path) -> None:
    losses = fit(manifest, tmp_path / "run", [], "mixed_texts.yaml", "pairs.yaml")
    assert len(losses["train/loss"]) == 4
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]
    assert resolved["texts"]["init_args"]["weights"] == {"report": 3.0, "captions": 1.0}
    assert resolved["pairs"]["class_path"] == "reports.pairs.ReportPairs"
