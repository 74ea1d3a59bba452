"""The recipe of layers over a frozen backbone, with tiny models in the place of the published ones: fitted, loaded, asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import medvl
from tasks.cli import cli
from tasks.demo import recipe_path
from tasks.phantoms import write_cohort

SIZE, WIDTH = 56, 24


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    """A DINOv2 of one small layer, published for images of half the size."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIZE // 2, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def test_layers_over_a_frozen_backbone_are_fitted_and_the_run_stands_alone(dinov2: Path, tiny_bert: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    manifest = write_cohort(tmp_path / "data", 8, 3, size=64, counts={"train": 4, "val": 2, "test": 2}, workers=1)
    recipe = yaml.safe_load(recipe_path("xray_radzero.yaml").read_text())
    image, report = recipe["model"]["image"]["init_args"], recipe["model"]["report"]["init_args"]
    image["backbone"]["init_args"] |= {"name": str(dinov2), "image_size": SIZE}
    report |= {"model": str(tiny_bert), "embed_dim": WIDTH}
    recipe["data"]["init_args"]["reader"]["init_args"]["size"] = SIZE
    recipe["trainer"]["precision"] = "32-true"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "run"
    arguments = {
        "config": tmp_path / "recipe.yaml",
        "data.init_args.manifest": manifest,
        "data.init_args.batch_size": 2,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "out": run,
    }
    done = CliRunner().invoke(cli, ["fit", *(f"--{name}={value}" for name, value in arguments.items())])
    assert done.exit_code == 0, done.output

    published, kept = load_file(dinov2 / "model.safetensors"), load_file(run / "model.safetensors")
    name = "embeddings.position_embeddings"
    assert torch.equal(kept[f"image.backbone.backbone.{name}"], published[name])  # neither trained nor resized
    assert not any(".project." in key for key in kept if key.startswith("image."))
    shutil.rmtree(dinov2)
    shutil.rmtree(tiny_bert)
    model = medvl.load(run, device="cpu")
    assert model.image.layers[0].gain1.ne(1).any()  # trained
    picture = np.random.default_rng(0).random((40, 30), dtype=np.float32)
    features = model.encode_image(picture)
    assert features.grid == (4, 4) and features.tokens.shape == (1, 16, WIDTH)
    maps = model.similarity.maps(features, model.encode_text(["The heart is enlarged."]))
    valid = features.token_valid.view(4, 4)
    assert maps.shape == (1, 1, 4, 4) and torch.isfinite(maps[0, 0][valid]).all()
    asked = CliRunner().invoke(cli, ["diagnose", str(next((tmp_path / "data" / "xray").glob("*.dcm"))), "--model", str(run), "--json"])
    assert asked.exit_code == 0, asked.output
