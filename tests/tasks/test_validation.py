"""Validation by zero-shot scores while training: the values are those of an evaluation of the same model, and the best is kept by them."""

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

import medvl
from medvl.data.manifest import read_manifest
from medvl.losses import MultiPositiveInfoNCE
from medvl.nn.similarity import PooledSimilarity
from medvl.training.cli import run
from medvl.training.data import StudyDataModule
from medvl.training.module import AlignmentModule
from modalities.pooling import MeanPooling
from modalities.xray.conv import ConvEncoder
from modalities.xray.reader import XrayReader
from modalities.xray.views import ViewPooledEncoder
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from reports.towers import MiniLmReportEncoder
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


def test_studies_have_the_labels_of_all_their_images_and_a_lost_image_costs_only_itself(tmp_path):
    table = write_cohort(tmp_path / "data", 16, 5, size=32, counts={"train": 2, "val": 12, "test": 2}, workers=1)
    with table.open() as file:
        lines = list(csv.reader(file))
    header, val = lines[0], [line for line in lines[1:] if "val" in line]
    labels = [header.index(name) for name in load_prompts().findings if name in header]
    twice = [[("" if i in labels else cell) for i, cell in enumerate(line)] for line in val]  # the first image of each has no label
    for line, first in zip(val, twice, strict=True):
        copy = table.parent / f"first_{Path(line[header.index('path')]).name}"
        shutil.copy(table.parent / line[header.index("path")], copy)
        first[header.index("path")] = copy.name
        for name in ("masks", "boxes"):
            if name in header:
                first[header.index(name)] = ""
    with (table.parent / "twice.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *(one for pair in zip(twice, val, strict=True) for one in pair)])
    tower = ViewPooledEncoder(ConvEncoder(16, widths=(8, 8, 8), blocks=(1, 1, 1)), MeanPooling())
    module = AlignmentModule(tower, MiniLmReportEncoder(16, hidden_dim=16), PooledSimilarity(), MultiPositiveInfoNCE())
    data = StudyDataModule(str(table.parent / "twice.csv"), XrayReader(size=32), ReportSentences(), views="study", cache=False)
    data.setup()
    module.eval()
    found = ZeroShot().measure(module, data)
    assert found["auroc"][1] == found["recall_at_10"][1] == 12
    for i in data.sets["val"].items[0]:
        data.sets["val"].images[i].path.unlink()
    data.sets["val"].images[data.sets["val"].items[1][0]].path.unlink()
    left = ZeroShot().measure(module, data)
    assert left["auroc"][1] == left["recall_at_10"][1] == 11


def test_odd_numbers_are_refused():
    with pytest.raises(ValueError, match="max_studies 0"):
        ZeroShot(max_studies=0)
