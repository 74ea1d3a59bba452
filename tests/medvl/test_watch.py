"""What a run tells of itself: values against plain formulas, what a fit logs, and a dry run that writes nothing."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from medvl.data.studies import StudyBatch
from medvl.losses import pairs_of
from medvl.training.callbacks import KeepBest
from medvl.training.cli import LOGGERS, run
from medvl.training.module import Observed
from medvl.training.watch import false_negative_share, memory_mb, of_step
from medvl.types import ImageBatch, TextBatch


@pytest.fixture
def seen():
    rng = torch.Generator().manual_seed(0)
    positives = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    ignore = torch.zeros(3, 4, dtype=torch.bool)
    ignore[0, 3] = True
    batch = StudyBatch(ImageBatch(torch.zeros(3, 1, 4, 4)), TextBatch(("a", "b", "c", "d")), positives, (2, 3, 4))
    images, texts = torch.randn(3, 5, generator=rng), torch.randn(4, 5, generator=rng)
    return Observed(images, texts, pairs_of(positives, (3, 4), ignore), batch)


def test_values_are_what_they_say(seen):
    x, y = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (seen.images, seen.texts))
    found = of_step(seen)
    apart = [((x[i] - y[j]) ** 2).sum() for i, j in seen.pairs.positive.tolist()]
    assert found["alignment"] == pytest.approx(np.mean(apart), rel=1e-5)
    for name, v in (("images", x), ("texts", y)):
        values = [math.exp(-2 * ((v[i] - v[k]) ** 2).sum()) for i in range(len(v)) for k in range(i)]
        assert found[f"uniformity_{name}"] == pytest.approx(math.log(np.mean(values)), rel=1e-4)
    assert found["gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), rel=1e-5)
    assert found["positives_per_image"] == pytest.approx(5 / 3) and found["ignored_share"] == pytest.approx(1 / 12)
    assert found["texts"] == 4


def test_false_negatives_are_texts_of_the_own_report_that_were_not_drawn(seen):
    """Of 12 pairs 5 are positive and 1 is ignored; study 3 also says c, and study 2 what is ignored."""
    said = {2: frozenset("abd"), 3: frozenset("bcx"), 4: frozenset("cd")}
    assert false_negative_share(seen, said) == pytest.approx(1 / 6)
    assert false_negative_share(seen, {}) == 0


def test_memory_grows_with_what_is_held():
    before = memory_mb(torch.device("cpu"))
    held = torch.ones(40 * 2**20)  # 160 MiB
    assert before > 50 and memory_mb(torch.device("cpu")) >= before and held.sum() > 0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("watch")
    rng = np.random.default_rng(0)
    lines = ["study_id,patient_id,modality,path,split,findings"]
    for i in range(28):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(root / f"{i}.png")
        said = ["No lung nodule.", "There is a nodule in the right lung."][i % 2]
        lines.append(f"s{i},p{i},xray,{i}.png,{'train' if i < 24 else 'val'},{said} The heart is normal. Film {i}.")
    (root / "manifest.csv").write_text("\n".join(lines))
    settings = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 2},
        "model": {
            "image": {"class_path": "modalities.xray.conv.ConvEncoder", "init_args": {"embed_dim": 16, "widths": [8, 8], "blocks": [1, 1]}},
            "report": {"class_path": "reports.towers.MiniLmReportEncoder", "init_args": {"embed_dim": 16, "hidden_dim": 8}},
            "similarity": {"class_path": "medvl.nn.similarity.TokenSimilarity"},
            "loss": {"class_path": "medvl.losses.MultiPositiveInfoNCE"},
        },
        "data": {
            "class_path": "medvl.training.data.StudyDataModule",
            "init_args": {
                "manifest": str(root / "manifest.csv"),
                "reader": {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 32}},
                "texts": {"class_path": "reports.text_source.ReportSentences"},
                "batch_size": 6,
                "sentences_per_image": 1,
            },
        },
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return root / "recipe.yaml"


def test_a_fit_logs_what_it_watches(recipe, tmp_path):
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run")]) == 0
    table = pd.read_csv(next((tmp_path / "run").glob("logs/*/metrics.csv")))
    names = ["temperature", "token_temperature", "sharpness", "alignment", "uniformity_images", "uniformity_texts", "gap", "texts"]
    names += ["positives_per_image", "ignored_share", "false_negative_share", "samples_per_second", "data_share", "memory_mb"]
    watched = table[[f"watch/{name}" for name in names]].dropna()
    assert len(watched) == 4 and np.isfinite(watched.to_numpy()).all()
    assert ((watched["watch/data_share"] > 0) & (watched["watch/data_share"] < 1)).all()
    assert (watched["watch/positives_per_image"] == 1).all()
    assert (watched["watch/false_negative_share"] > 0).any()  # "The heart is normal." is true of all and drawn for some


def test_the_best_may_be_the_highest(tmp_path):
    class Trainer:
        sanity_checking, callback_metrics, global_step = False, {}, 1

    written = []
    best = KeepBest(tmp_path, monitor="val/auroc", mode="max")
    best._write = lambda trainer, module, chosen_by, value: written.append(value)
    for value in (math.nan, 0.5, 0.7, math.nan, 0.6, 0.8):
        Trainer.callback_metrics = {"val/auroc": value}
        best.on_validation_end(Trainer(), None)
    assert written == [0.5, 0.7, 0.8]


def test_a_dry_run_tells_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    files = sorted(recipe.parent.rglob("*"))
    assert run("fit", ["--config", str(recipe), "--out", "run", "--dry-run", "--model.micro_batch", "2"]) == 0
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and sorted(recipe.parent.rglob("*")) == files
    rows = {cells[1].strip(): cells[2].strip() for line in said.splitlines() if len(cells := line.split("│")) in (4, 5)}
    assert rows["steps an epoch"] == "4" and rows["steps in all"] == "8" and rows["encoded at once"] == "2"
    assert rows["pixels"] == "6 x 1 x 32 x 32"
    head = 384 * 8 + 8 + 2 * 8 + 8 * 16 + 16  # linear, norm, linear
    assert any(line.split("│")[1].strip() == "report" and f"{head:,}" in line for line in said.splitlines() if line.count("│") == 4), said
    assert "seconds a step" in rows and "MiB" in rows["peak memory"]


def test_a_dry_run_leaves_out_what_cannot_be_read(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for path in recipe.parent.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = (recipe.parent / "manifest.csv").read_text()
    (tmp_path / "manifest.csv").write_text(table)
    for i in range(0, 24, 5):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    args = [
        "--config",
        str(recipe),
        "--data.init_args.manifest",
        str(tmp_path / "manifest.csv"),
        "--out",
        str(tmp_path / "run"),
        "--dry-run",
    ]
    assert run("fit", args) == 0
    assert "5 so far" in capsys.readouterr().out and not (tmp_path / "run").exists()
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="no usable xray image in split 'train'; first of 24 left out"):
        run("fit", args)


def test_a_dry_run_of_a_bad_recipe_says_what_a_fit_would(recipe, tmp_path):
    with pytest.raises(ValueError, match="dimensions"):
        run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run"), "--dry-run", "--model.report.init_args.embed_dim", "8"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_names_its_extra(name, tmp_path):
    if name in ("wandb", "mlflow") and __import__("importlib.util").util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ModuleNotFoundError, match=rf"medvl\[{name}\]"):
        LOGGERS[name](tmp_path)
