"""Two processes of a run against one with the same batches: what they pair, and the weights that they end with."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import medvl
from medvl.data.manifest import read_manifest
from medvl.data.sampling import EpochBatches
from medvl.data.studies import Collate, StudyDataset
from medvl.training.averaging import Ema
from medvl.training.sharding import ShardedStrategy
from medvl.types import _own_class
from modalities.xray.reader import XrayReader
from reports.pairs import HardNegatives, ReportPairs
from reports.text_source import ReportSentences

SENTENCES = [
    "There is a small left pleural effusion. The heart is normal in size.",
    "No pneumothorax. Lungs are clear.",
    "Small left pleural effusion. No pleural effusion on the right.",
    "Consolidation in the right upper lobe. Mild cardiomegaly.",
    "Large right pleural effusion. The heart is not enlarged.",
]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A table of 19 noise films with reports."""
    folder, rng = tmp_path_factory.mktemp("ddp"), np.random.default_rng(0)
    lines = []
    for i in range(19):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append([f"s{i}", f"p{i}", "xray", f"{i}.png", "PA", "train", SENTENCES[i % 5]])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["study_id", "patient_id", "modality", "path", "view", "split", "findings"], *lines])
    return folder / "manifest.csv"


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_agree_on_the_pairs_of_a_batch(phantoms, world_size):
    """With flips, hard negatives and drawn sentences: all that is left to chance."""
    pairs = ReportPairs(negatives=HardNegatives(per_study=1))
    rows = read_manifest(phantoms).select(split="train", modality="xray")[:15]
    data = StudyDataset(rows, XrayReader(size=32), ReportSentences(), sentences_per_image=2, cache=True, pairs=pairs)
    data.drop_unreadable()
    pairs.prepare(data.studies())
    collate = Collate(data.reader, None, 0, pairs, 0.5, training=True)

    def batches(rank, world_size, size):
        plan = EpochBatches(len(data), size, seed=1, rank=rank, world_size=world_size, drop_last=False)
        return [collate([data[draw] for draw in draws]) for draws in plan]

    whole = batches(0, 1, 2 * world_size)
    shares = [batches(rank, world_size, 2) for rank in range(world_size)]
    assert all(len(found) == len(whole) for found in shares)
    assert whole[0].share is None and len({tuple(w.texts.texts) for w in whole}) > 1
    for k, one in enumerate(whole):
        parts = [found[k] for found in shares]
        for rank, part in enumerate(parts):
            assert part.texts == one.texts and part.rows == one.rows and part.share.rank == rank
            torch.testing.assert_close(part.positives, one.positives)
            torch.testing.assert_close(part.false_texts, one.false_texts)
            assert part.share.here[1] - part.share.here[0] == len(part.images.pixels)
            assert sum(part.share.texts) == len(one.texts.texts)
        torch.testing.assert_close(torch.cat([part.images.pixels for part in parts]), one.images.pixels)


def written(phantoms, folder):
    """A recipe of tiny towers."""
    recipe = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0, "log_every_n_steps": 1},
        "model": {
            "image": {
                "class_path": "modalities.xray.towers.TimmEncoder",
                "init_args": {"name": "test_vit", "embed_dim": 16, "image_size": 32},
            },
            "report": {
                "class_path": "reports.towers.MiniLmReportEncoder",
                "init_args": {"embed_dim": 16, "tokens": "words", "keep_tokens": True},
            },
            "similarity": {"class_path": "medvl.nn.local.WordRegionSimilarity"},
            "loss": {"class_path": "medvl.losses.MultiPositiveInfoNCE"},
        },
        "data": {
            "class_path": "medvl.training.data.StudyDataModule",
            "init_args": {
                "manifest": str(phantoms),
                "reader": {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 32}},
                "texts": {"class_path": "reports.text_source.ReportSentences"},
                "pairs": {"class_path": "reports.pairs.ReportPairs"},
                "drop_last": False,
            },
        },
        "keep_best": False,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(phantoms, tmp_path):
    written(phantoms, tmp_path)
    runs = {
        "one": ["--data.init_args.batch_size", "8"],
        "two": ["--data.init_args.batch_size", "4", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.micro_batch", "3"],
    }
    for name, more in runs.items():
        command = [sys.executable, "-m", "medvl", "fit", "--config", "recipe.yaml", "--out", name, *more]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in runs)
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one if one[name].is_floating_point()])
    assert (apart > 1e-4).float().mean() < 1e-3  # where a gradient is next to nothing, Adam steps by its sign
    with_loss = [pd.read_csv(next((tmp_path / name).glob("logs/*/metrics.csv")))["train/loss"].dropna() for name in runs]
    assert len(with_loss[0]) == 6
    np.testing.assert_allclose(with_loss[0], with_loss[1], rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_ddp_fit_in_bf16_on_cuda(phantoms, tmp_path):
    written(phantoms, tmp_path)
    more = ["--trainer.accelerator", "cuda", "--trainer.devices", "1", "--trainer.strategy", "ddp", "--trainer.precision", "bf16-mixed"]
    command = [sys.executable, "-m", "medvl", "fit", "--config", "recipe.yaml", "--out", "run", "--model.micro_batch", "3", *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = pd.read_csv(next((tmp_path / "run").glob("logs/*/metrics.csv")))["train/loss"].dropna()
    assert len(losses) > 2 and np.isfinite(losses).all()


STAGES = {
    "trainer": {
        "callbacks": [
            {
                "class_path": "medvl.training.stages.Stages",
                "init_args": {"stages": [{"epoch": 0, "freeze": ["image.backbone.blocks"]}, {"epoch": 1}]},
            }
        ]
    }
}


def fitted(folder, name, *more, code=0, env=None):
    """A run of two processes; its weights, if it was not stopped."""
    command = [sys.executable, "-m", "medvl", "fit", "--config", "recipe.yaml", "--out", name, "--trainer.devices", "2", *more]
    command += ["--data.init_args.batch_size", "4", "--trainer.gradient_clip_val", "1.0"]
    places = os.pathsep.join([str(Path(__file__).parents[1] / "medvl"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places, "BATCH_LOG": str(folder / "batches")} | (env or {})
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr[-3000:]
    return load_file(folder / name / "model.safetensors") if code == 0 else None


def assert_near(one, other, limit):
    assert one.keys() == other.keys()
    apart = torch.cat([(one[name].float() - other[name].float()).abs().flatten() for name in one])
    assert (apart > limit).float().mean() < 1e-3, apart.max()  # where a gradient is next to nothing, Adam steps by its sign


@pytest.mark.slow
def test_divided_towers_train_as_whole_ones_do_and_go_on(phantoms, tmp_path):
    """In stages, with clipped gradients and in two passes; stopped and resumed; saved as any model is."""
    written(phantoms, tmp_path)
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(STAGES))
    stages = ["--config", "stages.yaml"]
    whole = fitted(tmp_path, "whole", "--trainer.strategy", "ddp_find_unused_parameters_true", *stages)
    divided = fitted(tmp_path, "divided", "--trainer.strategy", "fsdp2", "--model.micro_batch", "2", *stages)
    assert_near(divided, whole, 1e-4)
    start = medvl.load(tmp_path / "divided")
    assert type(start.image).__name__ == "TimmEncoder"
    assert json.loads((tmp_path / "divided" / "config.json").read_text())["model"]["image"]["class_path"].startswith("modalities.xray.")

    again = ["--trainer.strategy", "fsdp2", "--trainer.callbacks+=interruptions.Interrupt"]
    undisturbed = fitted(tmp_path, "undisturbed", *again)
    fitted(tmp_path, "stopped", *again, code=143, env={"INTERRUPT_AT": "3", "INTERRUPT_BY": "TERM"})
    assert_near(fitted(tmp_path, "stopped", *again, "--resume", "true"), undisturbed, 1e-6)


def test_an_average_of_divided_weights_is_refused():
    with pytest.raises(ValueError, match="ema needs all weights in each process, and fsdp2 divides them"):
        Ema().setup(SimpleNamespace(strategy=ShardedStrategy()), None, "fit")


def test_a_class_that_was_mixed_into_is_itself():
    class FSDPModule:
        pass

    class Tower:
        pass

    mixed = type("FSDPTower", (FSDPModule, Tower), {})
    assert _own_class(mixed) is Tower
    assert _own_class(Tower) is Tower
