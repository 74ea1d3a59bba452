"""Every recipe of a published system: says what it is, is built as written, takes a step on phantoms, and its model is loaded and asked."""

import re

import numpy as np
import pytest
import torch
import yaml

import medvl
from medvl.data.manifest import read_manifest
from medvl.training.cli import run
from tasks.demo import recipe_path
from tasks.phantoms import write_cohort

XRAY = (
    *("clip", "siglip", "convirt", "biovil", "gloria", "medclip", "cxr_clip", "radzero", "carzero", "conceptclip", "unimed_clip"),
    *("filip", "llip", "projector"),
)
CT = ("radclip", "ct_clip", "merlin")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp("recipes"), 12, 3, size=64, ct=True, workers=1)


def test_all_recipes_are_here():
    folder = recipe_path("clip.yaml").parent
    others = {
        "columns_notes",
        "ct_phantom",
        "ct_phantom_fine",
        "ct_series",
        "ct_slices",
        "mixed_texts",
        "mixed_xray_ct",
        "pairs",
        "xray_notes",
        "xray_phantom",
        "xray_radzero",
        "xray_views",
    }
    assert {path.stem for path in folder.glob("*.yaml")} == {*XRAY, *CT, *others}


@pytest.mark.parametrize("name", [*XRAY, *CT])
def test_a_recipe_says_what_it_reproduces_and_what_differs(name):
    text = recipe_path(f"{name}.yaml").read_text()
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|10\.\d{4,}/", head)
    for word in ("Run:", "Smoke:", f"tasks/recipes/{name}.yaml", f"runs/{name}", "weights" if name == "projector" else "Differs:"):
        assert word in head, word
    assert max(map(len, text.splitlines())) <= 140


def test_what_is_compared_differs_in_what_makes_the_system_alone():
    """Equal towers, pixels, batches and schedule, but for what a system is known by."""
    base = yaml.safe_load(recipe_path("xray_phantom.yaml").read_text())
    for name in XRAY[:-1]:
        recipe = yaml.safe_load(recipe_path(f"{name}.yaml").read_text())
        assert recipe["trainer"] == base["trainer"]
        for key in ("learning_rate", "weight_decay"):
            assert recipe["model"][key] == base["model"][key]
        for key in ("reader", "batch_size", "augment"):
            assert recipe["data"]["init_args"][key] == base["data"]["init_args"][key]
        image = recipe["model"]["image"]
        assert image.get("init_args", {}).get("backbone", image) == base["model"]["image"]


@pytest.mark.parametrize("name", [*XRAY, *CT, "ct_series", "ct_phantom", "ct_phantom_fine"])
def test_a_smoke_run(name, table, tmp_path):
    """Three steps: every weight that trains is moved, and the model that is saved reads a file."""
    args = ["--config", str(recipe_path(f"{name}.yaml")), "--data.init_args.manifest", str(table), "--out", str(tmp_path / "run")]
    args += ["--data.init_args.batch_size", "4", "--trainer.max_steps", "3", "--trainer.max_epochs", "-1", "--trainer.accelerator", "cpu"]
    args += ["--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "1"]
    args += ["--model.start", "{}"] if name.startswith("ct_phantom") else []
    if name in XRAY:
        args += ["--data.init_args.reader.init_args.size", "64"]
        args += ["--model.image.init_args.backbone.init_args.image_size", "64"] if name == "projector" else []
    assert run("fit", args) == 0
    with next((tmp_path / "run").glob("logs/*/metrics.csv")).open() as file:
        header = file.readline().strip().split(",")
        losses = [float(v) for line in file if (v := line.strip().split(",")[header.index("train/loss")])]
    assert len(losses) == 3 and np.isfinite(losses).all()
    model = medvl.load(tmp_path / "run", device="cpu")
    row = read_manifest(table).select(modality="xray" if name in XRAY else "ct").rows[0]
    features = model.encode_image(row.path)
    scores = model.similarity(features, model.encode_text(["There is a pleural effusion.", "No pneumothorax."]))
    assert scores.shape == (1, 2) and torch.isfinite(scores).all()
    if features.tokens is None:
        assert name == "projector"  # unless asked for tokens
        return
    maps = model.similarity.maps(features, model.encode_text(["There is a pleural effusion."]))
    assert torch.isfinite(maps[~maps.isnan()]).all() and not maps.isnan().all()
