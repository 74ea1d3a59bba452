"""What a run tells of itself: values against plain formulas, what a fit logs and where, and by what the best model is kept."""

import itertools
import logging
import math
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from medvl.data.studies import Share, StudyBatch, StudyDataset
from medvl.losses import pairs_of
from medvl.training.callbacks import KeepBest, ResumePoint
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


def test_what_is_dropped_is_no_negative_and_left_out_of_the_loss(seen):
    """Text d is ignored by all, image 4 ignores all: 2 x 3 pairs stay, of which a is ignored once more by image 3."""
    positives = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    ignore = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    seen = Observed(seen.images, seen.texts, pairs_of(positives, (3, 4), ignore), seen.batch)
    found = of_step(seen)
    assert found["ignored_share"] == pytest.approx(7 / 12) and found["positives_per_image"] == 2
    assert false_negative_share(seen, {2: frozenset("abd"), 3: frozenset("ab"), 4: frozenset("abcd")}) == 0
    assert false_negative_share(seen, {2: frozenset("c")}) == 1  # the one negative that is left


def test_the_null_image_is_none_of_the_images(seen):
    alone = of_step(seen)
    null = torch.tensor([[False, False, False, False]])
    positives = torch.cat([seen.batch.positives, null])
    ignore = torch.zeros(4, 4, dtype=torch.bool)
    ignore[0, 3], ignore[3] = True, True
    with_null = Observed(torch.cat([seen.images, 9 * torch.ones(1, 5)]), seen.texts, pairs_of(positives, (4, 4), ignore), seen.batch)
    assert of_step(with_null) == pytest.approx(alone)
    said = {2: frozenset("abd"), 3: frozenset("bcx"), 4: frozenset("cd")}
    assert false_negative_share(with_null, said) == false_negative_share(seen, said)


def test_a_process_tells_of_its_own_images(seen):
    """Images 0 and 1 of 3 are here; what is counted is of the whole batch."""
    batch = StudyBatch(seen.batch.images, seen.batch.texts, seen.batch.positives, seen.batch.rows, share=Share(0, (2, 1), (2, 2)))
    part = of_step(Observed(seen.images[:2], seen.texts, pairs_of(seen.batch.positives, (3, 4), here=(0, 2)), batch))
    x, y = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (seen.images[:2], seen.texts))
    assert part["alignment"] == pytest.approx(np.mean([((x[i] - y[j]) ** 2).sum() for i, j in ((0, 0), (0, 1), (1, 1))]), rel=1e-5)
    assert part["gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), rel=1e-5)
    assert part["positives_per_image"] == pytest.approx(5 / 3)


def test_memory_grows_with_what_is_held():
    before = memory_mb(torch.device("cpu"))
    held = torch.ones(40 * 2**20)  # 160 MiB
    assert before > 50 and memory_mb(torch.device("cpu")) >= before and held.sum() > 0


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


def watched(out):
    return pd.read_csv(next(out.glob("logs/*/metrics.csv")))[["watch/data_share", "watch/samples_per_second"]].dropna()


def slowed(monkeypatch, owner, name, seconds):
    method = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


def test_validation_is_neither_waiting_nor_training(recipe, tmp_path, monkeypatch):
    """Were it counted, no window of 12 images that has it would be faster than 12 / 0.5 s."""
    slowed(monkeypatch, KeepBest, "on_validation_end", 0.5)
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run"), "--trainer.val_check_interval", "2"]) == 0
    found = watched(tmp_path / "run")
    assert len(found) == 4 and (found["watch/samples_per_second"].iloc[1:] > 24).all() and (found["watch/data_share"].iloc[1:] < 0.9).all()


def test_checkpoints_are_no_waiting(recipe, tmp_path, monkeypatch):
    slowed(monkeypatch, ResumePoint, "on_train_batch_end", 0.2)
    slowed(monkeypatch, ResumePoint, "on_train_epoch_end", 0.5)
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert (watched(tmp_path / "run")["watch/data_share"].iloc[1:] < 0.3).all()


def test_a_slow_loader_is_seen(recipe, tmp_path, monkeypatch):
    slowed(monkeypatch, StudyDataset, "__getitem__", 0.05)
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run"), "--trainer.limit_val_batches", "0"]) == 0
    found = watched(tmp_path / "run").iloc[1:]
    assert (found["watch/data_share"] > 0.5).all() and (found["watch/samples_per_second"] < 20).all()


def test_accumulated_batches_are_logged_once_a_step(recipe, tmp_path):
    """8 batches, 4 steps, each second one logged with all 4 batches that came since."""
    args = ["--config", str(recipe), "--out", str(tmp_path / "run"), "--trainer.accumulate_grad_batches", "2"]
    assert run("fit", args) == 0
    assert len(watched(tmp_path / "run")) == 2


def test_own_texts_are_looked_up_for_the_batch_alone(recipe, tmp_path, monkeypatch):
    """The texts of the whole table are made anew at each asking: once a run is enough."""
    asked = itertools.count()
    texts = StudyDataset.texts.fget
    monkeypatch.setattr(StudyDataset, "texts", property(lambda self: (next(asked), texts(self))[1]))
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert next(asked) <= 3  # of each split, for the frozen text tower


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


def test_a_monitored_value_that_is_not_logged_is_told_once(recipe, tmp_path, caplog):
    args = ["--config", str(recipe), "--out", str(tmp_path / "run"), "--monitor", "val/aurok", "--mode", "max"]
    with caplog.at_level(logging.WARNING, logger="medvl"):
        assert run("fit", args) == 0
    told = [record.message for record in caplog.records if "val/aurok" in record.message]
    assert len(told) == 1 and "val/loss" in told[0] and "--monitor" in told[0]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_names_its_extra(name, tmp_path):
    if name in ("wandb", "mlflow") and __import__("importlib.util").util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ModuleNotFoundError, match=rf"medvl\[{name}\]"):
        LOGGERS[name](tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_logger_writes_into_the_runs_folder_and_names_no_patient(name, recipe, tmp_path):
    """In a process of its own, for a logger may write at its very end."""
    pytest.importorskip(name)
    environment = {key: value for key, value in os.environ.items() if key not in ("WANDB_MODE", "MLFLOW_TRACKING_URI")}
    command = [
        sys.executable,
        "-m",
        "medvl",
        "fit",
        "--config",
        str(recipe),
        "--out",
        "run",
        f"--{name}",
        "true",
        "--trainer.max_epochs",
        "1",
    ]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and name in str(path.relative_to(tmp_path))]
    content = b"".join(path.read_bytes() for path in written)
    assert b"watch/gap" in content
    for private in (b"lung nodule", b".png", b"manifest.csv", recipe.parent.name.encode()):
        assert private not in content
