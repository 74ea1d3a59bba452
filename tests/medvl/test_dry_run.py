"""A dry run: its numbers against counting by hand and against a fit, and that it leaves nothing behind."""

import json
import tempfile
import time

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from medvl.data.cache import SampleCache
from medvl.data.studies import StudyDataset
from medvl.training import cli
from medvl.training.cli import run
from medvl.types import ImageEncoder
from modalities.xray.reader import XrayReader


@pytest.fixture
def tried(recipe, tmp_path, monkeypatch):
    """Try a run with more arguments: its :class:`medvl.training.estimate.Cost`, and the rows that were shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    costs = []

    def show(cost, console):
        costs.append(cost)
        real(cost, console)

    real = cli.show
    monkeypatch.setattr(cli, "show", show)

    def tries(*args):
        before = sorted([*tmp_path.rglob("*"), *recipe.parent.rglob("*")])
        assert run("fit", ["--config", str(recipe), "--out", "run", "--dry-run", *args]) == 0
        assert sorted([*tmp_path.rglob("*"), *recipe.parent.rglob("*")]) == before
        return costs[-1] if costs else None

    return tries


def test_numbers_are_those_of_counting(tried, capsys):
    cost = tried("--model.micro_batch", "2")
    head = 384 * 8 + 8 + 2 * 8 + 8 * 16 + 16  # linear, norm, linear; the language model is frozen
    assert cost.parts["report"].trained == head and cost.parts["similarity"].weights == cost.parts["similarity"].trained == 3
    trained = sum(part.trained for part in cost.parts.values())
    assert cost.gradients_mb == pytest.approx(trained * 4 / 2**20)
    assert 2 * cost.gradients_mb < cost.optimiser_mb < 2 * cost.gradients_mb + 100 * 4 / 2**20  # two moments, and a count a tensor
    assert cost.weights_mb >= sum(part.weights for part in cost.parts.values()) * 4 / 2**20
    assert cost.pixels == ((6, 1, 32, 32),) and cost.encoded == 2 and cost.loss_batch == cost.step_batch == 6
    assert cost.epoch_steps == 4 and cost.steps == 8 and cost.processes == 1 and cost.left_out == 0
    assert 1 <= cost.texts <= 6 and cost.positives == 1 and cost.seconds > 0 and 0 < cost.waiting < 1
    assert cost.total_mb == pytest.approx(cost.weights_mb + cost.gradients_mb + cost.optimiser_mb + cost.rest_mb)
    said = capsys.readouterr().out
    rows = {cells[1].strip(): [one.strip() for one in cells[2:-1]] for line in said.splitlines() if len(cells := line.split("│")) in (4, 5)}
    assert rows["report"][1] == f"{head:,}" and rows["all"][1] == f"{trained:,}"
    assert rows["steps in all"] == ["8"] and rows["pixels"] == ["6 x 1 x 32 x 32"] and "Nothing was written to run." in said


@pytest.mark.parametrize(
    "length",
    [
        [],
        ["--trainer.accumulate_grad_batches", "2"],
        ["--trainer.limit_train_batches", "3", "--trainer.accumulate_grad_batches", "2"],
        ["--trainer.max_steps", "3"],
        ["--trainer.max_steps", "30"],
    ],
)
def test_steps_are_those_that_a_fit_takes(length, tried, recipe, tmp_path):
    cost = tried(*length)
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run"), "--keep_best", "false", *length]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["provenance"]["step"] == cost.steps


def test_a_run_without_end_is_called_so(tried, capsys):
    assert tried("--trainer.max_epochs", "-1").steps is None and "no end" in capsys.readouterr().out


def test_time_is_that_of_a_step_with_its_loading(tried, monkeypatch):
    get = StudyDataset.__getitem__
    monkeypatch.setattr(StudyDataset, "__getitem__", lambda self, draw: (time.sleep(0.05), get(self, draw))[1])
    cost = tried("--trainer.accumulate_grad_batches", "2")
    assert cost.step_batch == 12 and cost.epoch_steps == 2 and 0.6 <= cost.seconds < 6 and cost.waiting > 0.2


def test_activations_are_measured(tried):
    """Four times the pixels: the first layer alone holds (6, 8, 128, 128) floats and more for the way back, 3 MiB each."""
    assert tried("--data.init_args.reader.init_args.size", "512").rest_mb > 12


def test_nothing_is_kept_in_the_caches_of_a_recipe(tried, tmp_path, monkeypatch):
    """The fixture compares all files before and after; what was written for a while is gone, too."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    images = tmp_path / "images"
    tried("--data.init_args.cache", str(images), "--model.report.init_args.cache_dir", str(tmp_path / "texts"))
    for kind in ("medvl.data.cache.SampleCache", f"{__name__}.Noted"):
        tried("--data.init_args.cache", kind, "--data.init_args.cache.init_args.folder", str(images))


class Noted(SampleCache):
    """A cache of someone else's, by another name."""


def test_nor_in_those_of_towers_inside_of_others(tried, tmp_path):
    projected = {
        "class_path": "medvl.nn.projector.ProjectedEncoder",
        "init_args": {"cache_dir": str(tmp_path / "features"), "embed_dim": 16},
    }
    trunk = {"class_path": "modalities.xray.conv.ConvEncoder", "init_args": {"embed_dim": 16, "widths": [8, 8], "blocks": [1, 1]}}
    projected["init_args"] |= {"backbone": trunk, "tokens": True}
    inner = {"class_path": f"{__name__}.FirstOf", "init_args": {"towers": [projected]}}
    (tmp_path / "towers.yaml").write_text(yaml.safe_dump({"model": {"image": inner}}))
    tried("--config", str(tmp_path / "towers.yaml"))


class FirstOf(ImageEncoder):
    """Towers in a list, of which one is used."""

    def __init__(self, towers: list[ImageEncoder]) -> None:
        super().__init__()
        self.towers = torch.nn.ModuleList(towers)
        self.embed_dim = towers[0].embed_dim

    def forward(self, batch):
        return self.towers[0](batch)


def test_images_that_a_recipe_keeps_on_disk_are_read_once(tried, tmp_path, monkeypatch):
    """The batches that are timed are those before once more, as a fit has them kept."""
    reads = []
    read = XrayReader.read
    monkeypatch.setattr(XrayReader, "read", lambda self, path: (reads.append(path), read(self, path))[1])
    tried("--data.init_args.cache", str(tmp_path / "images"))
    assert len(reads) == len(set(reads)) > 0


def test_what_no_step_was_taken_with_is_said(tried, tmp_path, capsys):
    callbacks = [
        {"class_path": "medvl.training.stages.Stages", "init_args": {"stages": [{"epoch": 0, "freeze": ["image"]}, {"epoch": 1}]}},
        {"class_path": "medvl.training.averaging.Ema"},
        {"class_path": f"{__name__}.Untold"},
    ]
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    cost = tried("--config", str(tmp_path / "callbacks.yaml"))
    assert cost.not_counted == ("1 stage after the first, which may take more", "callbacks that were not run: Untold")
    said = capsys.readouterr().out
    assert "1 stage after the first, which may take more; callbacks that were not run: Untold" in " ".join(said.replace("│", " ").split())
    assert tried().not_counted == ()


class Untold(Callback):
    """Would end a run that it is part of."""

    def on_train_start(self, trainer, pl_module):
        raise AssertionError


def test_weights_that_are_averaged_are_held_once_more(tried, tmp_path):
    """Against the same without, of a report tower of many weights."""
    wide = ["--model.report.init_args.hidden_dim", "20000"]
    (tmp_path / "ema.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "medvl.training.averaging.Ema"}]}}))
    without, averaged = tried(*wide), tried(*wide, "--config", str(tmp_path / "ema.yaml"))
    assert averaged.rest_mb - without.rest_mb > 0.5 * without.weights_mb


def test_a_stage_that_freezes_is_measured(tried, tmp_path):
    stages = {
        "trainer": {
            "callbacks": [{"class_path": "medvl.training.stages.Stages", "init_args": {"stages": [{"epoch": 0, "freeze": ["image"]}]}}]
        }
    }
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(stages))
    cost = tried("--config", str(tmp_path / "stages.yaml"))
    assert cost.parts["image"].trained == 0 < cost.parts["image"].weights
    rest = sum(part.trained for part in cost.parts.values())
    assert cost.gradients_mb == pytest.approx(rest * 4 / 2**20)
    assert 2 * cost.gradients_mb < cost.optimiser_mb < 2 * cost.gradients_mb + 100 * 4 / 2**20


def test_processes_of_a_launcher(tried, monkeypatch, capsys):
    """As torchrun starts two; the first tells for both, and the other is silent."""
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    variables |= {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # of the whole process: given back at the end
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.init_args.batch_size", "4"]
    cost = tried(*two)
    assert cost.processes == 2 and cost.loss_batch == 8 and cost.epoch_steps == 3 and cost.pixels == ((4, 1, 32, 32),)
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    tried(*two)
    assert capsys.readouterr().out == ""


def test_what_cannot_be_read_is_left_out(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for path in recipe.parent.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "manifest.csv").write_text((recipe.parent / "manifest.csv").read_text())
    for path in list(tmp_path.glob("*.png"))[:12]:
        path.write_bytes(b"no image")
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
    assert "so far" in capsys.readouterr().out and not (tmp_path / "run").exists()
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no usable xray image in split 'train'; first of .* left out"):
        run("fit", args)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (["--model.report.init_args.embed_dim", "8"], "dimensions"),
        (["--model.start", "{image: nowhere}"], "nowhere"),
        (["--out", "manifest.csv/run"], "cannot be made a folder"),
        (["--data.init_args.cache", " "], "empty text"),
        (["--data.init_args.manifest", "absent.csv"], "absent.csv"),
    ],
)
def test_a_bad_recipe_is_refused_as_a_fit_refuses_it(wrong, error, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.csv").write_text("")
    told = []
    for dry in (["--dry-run"], []):
        with pytest.raises((ValueError, OSError, SystemExit), match=error) as caught:
            run("fit", ["--config", str(recipe), "--out", "run", *wrong, *dry])
        told.append((type(caught.value), str(caught.value).split(":")[0]))
        if dry:
            assert [path.name for path in tmp_path.iterdir()] == ["manifest.csv"]
    assert told[0] == told[1]
