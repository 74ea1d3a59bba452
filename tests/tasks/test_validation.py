"""Validation by zero-shot scores while training: the values are those of an evaluation of the same model, and the best is kept by them."""

import json

import pandas as pd
import pytest
import yaml

import medvl
from medvl.data.manifest import read_manifest
from medvl.training.cli import run
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.demo import recipe_path
from tasks.evaluation import predict, results
from tasks.phantoms import write_cohort
from tasks.validation import ZeroShot


def test_the_values_are_those_of_an_evaluation_and_choose_the_model(tmp_path):
    table = write_cohort(tmp_path / "data", 40, 5, size=32, counts={"train": 16, "val": 20, "test": 4}, workers=1)
    recipe = yaml.safe_load(recipe_path("xray_phantom.yaml").read_text())
    recipe["model"]["image"]["init_args"] |= {"embed_dim": 16, "widths": [8, 8, 8], "blocks": [1, 1, 1]}
    recipe["model"]["report"]["init_args"] |= {"embed_dim": 16, "hidden_dim": 16}
    recipe["data"]["init_args"] |= {"manifest": str(table), "batch_size": 8, "augment": None, "cache": False}
    recipe["data"]["init_args"]["reader"]["init_args"]["size"] = 32
    recipe["trainer"] = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1}
    recipe["trainer"]["callbacks"] = [
        {"class_path": "medvl.training.validation.MeasureValidation", "init_args": {"measure": {"class_path": "tasks.validation.ZeroShot"}}}
    ]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    assert run("fit", ["--config", str(tmp_path / "recipe.yaml"), "--out", str(out), "--monitor", "val/auroc", "--mode", "max"]) == 0
    logged = pd.read_csv(next(out.glob("logs/*/metrics.csv")))[["epoch", "val/auroc", "val/recall_at_10"]].dropna()
    assert len(logged) == 3
    best = logged.loc[logged["val/auroc"].idxmax()]
    kept = json.loads((out / "config.json").read_text())["provenance"]
    assert kept["chosen_by"] == "val/auroc" and kept["value"] == pytest.approx(best["val/auroc"]) and kept["epoch"] == best["epoch"]
    rows = read_manifest(table).select(split="val").rows
    found = results(predict(medvl.load(out, device="cpu"), rows, load_prompts(), ReportSentences()), repeats=0)
    usable = [one["auroc"] for one in found["zero_shot"]["per_finding"].values() if one["auroc"] is not None]
    assert sum(usable) / len(usable) == pytest.approx(best["val/auroc"], abs=1e-4)
    assert found["retrieval"]["image_to_report"]["recall_at_10"] == pytest.approx(best["val/recall_at_10"], abs=1e-4)


def test_odd_numbers_are_refused():
    with pytest.raises(ValueError, match="max_studies 0"):
        ZeroShot(max_studies=0)
