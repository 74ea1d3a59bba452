"""Every local similarity in use: fitted by the command, loaded, and asked to diagnose, ground, search and evaluate."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

import medvl
from medvl.data.manifest import read_manifest
from medvl.model import DualEncoder
from medvl.training.cli import run
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.cli import cli
from tasks.demo import recipe_path
from tasks.evaluation import predict, results
from tasks.grounding import ground
from tasks.retrieval import build_index, image_to_reports

WIDTH = 8
SIMILARITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "radzero": ("medvl.nn.local.SentenceAttentionSimilarity", {"norm_width": WIDTH}),
    "gloria": ("medvl.nn.local.WordRegionSimilarity", {}),
    "filip": ("medvl.nn.local.TokenwiseSimilarity", {}),
    "conceptclip": ("medvl.nn.local.ConceptSimilarity", {}),
    "llip": ("medvl.nn.cross.MixtureSimilarity", {"embed_dim": WIDTH, "heads": 2, "mixtures": 4}),
    "carzero": (
        "medvl.nn.cross.CrossAttentionSimilarity",
        {"embed_dim": WIDTH, "layers": 1, "heads": 2, "feedforward": 16, "hidden": [16]},
    ),
}
MINILM = {
    "class_path": "reports.towers.MiniLmReportEncoder",
    "init_args": {"embed_dim": WIDTH, "hidden_dim": None, "tokens": "words", "keep_tokens": True},
}
CONCEPTS = {"class_path": "reports.towers.ConceptReportEncoder", "init_args": {"tower": MINILM}}
SENTENCES = (
    "There is a small left pleural effusion. No pneumothorax.",
    "No pleural effusion.",
    "Consolidation in the right upper lobe. Mild cardiomegaly.",
)
STUDIES = [
    ("a", ("There is a small nodule in the right upper lobe.", "No effusion.")),
    ("b", ("No effusion.", "x")),
    ("c", ("The heart is large.", "No effusion.")),
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("studies"), np.random.default_rng(0)
    lines = []
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (32, 24), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append([f"s{i}", f"p{i}", "xray", f"{i}.png", "PA", "train" if i < 6 else "val", SENTENCES[i % 3]])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["study_id", "patient_id", "modality", "path", "view", "split", "findings"], *lines])
    return folder / "manifest.csv"


@pytest.fixture(scope="module", params=SIMILARITIES)
def fitted(request: pytest.FixtureRequest, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps under each similarity."""
    torch.set_num_threads(1)
    recipe, out = yaml.safe_load(recipe_path("xray_phantom.yaml").read_text()), tmp_path_factory.mktemp(request.param)
    class_path, arguments = SIMILARITIES[request.param]
    recipe["model"]["image"]["init_args"] = {"embed_dim": WIDTH, "widths": [8, 8, 8], "blocks": [1, 1, 1]}
    recipe["model"]["report"] = CONCEPTS if request.param == "conceptclip" else MINILM
    recipe["model"]["similarity"] = {"class_path": class_path, "init_args": arguments}
    recipe["model"]["loss"] = {"class_path": "medvl.losses.MultiPositiveInfoNCE"}
    recipe["data"]["init_args"] |= {"manifest": str(manifest), "batch_size": 3}
    recipe["data"]["init_args"]["reader"]["init_args"]["size"] = 32
    recipe["trainer"] |= {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("fit", ["--config", str(out / "recipe.yaml"), "--out", str(out / "run"), "--keep_best", "false"]) == 0
    return out / "run"


@pytest.fixture(scope="module")
def model(fitted: Path) -> DualEncoder:
    return medvl.load(fitted, device="cpu")


def test_it_trains(fitted: Path, model: DualEncoder) -> None:
    with next((fitted / "logs").rglob("metrics.csv")).open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(losses) == 4 and np.isfinite(losses).all()
    arguments = dict(SIMILARITIES.values())[model.similarity.spec()["class_path"]]
    for name, parameter in model.similarity.named_parameters():
        assert torch.isfinite(parameter).all(), name
    start = type(model.similarity)(**arguments)
    for name, parameter in start.named_parameters():
        if name.endswith(".log"):  # what does not start at random has moved
            assert dict(model.similarity.named_parameters())[name].item() != parameter.item(), name


def test_it_diagnoses_from_the_command_line(fitted: Path, tiny: Any) -> None:
    done = CliRunner().invoke(cli, ["diagnose", str(tiny.png), str(tiny.dicom), "--model", str(fitted), "--json"])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 2 and all(0 <= score <= 1 for one in found for score in one["findings"].values())


def test_it_points(model: DualEncoder, tiny: Any) -> None:
    one, other = ground(model, tiny.png, ["There is a pleural effusion.", "nodule"])
    assert one.scores.shape == (48, 40) and one.peak is not None
    alone = ground(model, tiny.png, ["nodule"])[0]  # without the padding of the longer phrase
    np.testing.assert_allclose(other.scores, alone.scores, atol=1e-5)
    assert np.nanmin(one.scores) >= -1 - 1e-5 and np.nanmax(one.scores) <= 1 + 1e-5


def test_an_index_made_in_parts_scores_as_each_sentence_alone(model: DualEncoder, tiny: Any) -> None:
    index = build_index(model, STUDIES, batch_size=2)
    assert (index.features.tokens is not None) == model.similarity.reads_words
    image = model.encode_image(tiny.png)
    with torch.inference_mode():
        expected = [np.mean([model.similarity(image, model.encode_text(s)).item() for s in sentences]) for _, sentences in STUDIES]
    np.testing.assert_allclose(image_to_reports(model, image, index)[0][0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_it_is_evaluated(model: DualEncoder, tiny: Any) -> None:
    rows = read_manifest(tiny.manifest).select(split="test", modality="xray").rows
    measured = results(predict(model, rows, load_prompts(), ReportSentences(), batch_size=7), repeats=10, seed=0)
    assert json.dumps(measured, allow_nan=False)
    assert 0 <= measured["zero_shot"]["macro_auroc"] <= 1
    assert measured["grounding"] and measured["retrieval"]["image_to_report"]["pool"] > 1
