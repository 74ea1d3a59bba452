"""Training: what a batch holds, that a killed run goes on exactly, and what a run leaves on disk."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import medvl
from medvl.data.augment import Augment
from medvl.data.cache import CachedReader, SampleCache
from medvl.data.manifest import read_manifest
from medvl.data.sampling import EpochBatches
from medvl.data.studies import Collate, Draw, StudyDataset
from medvl.types import ImageBatch, UnreadableImageError
from modalities.xray.reader import XrayReader
from reports.text_source import ReportSentences

STEPS = 12  # of a whole run: 24 training studies, batches of 8, 4 epochs


@pytest.fixture(scope="session")
def studies(tmp_path_factory):
    """A table of 32 small pictures: a bright square at the left or right, or none, and a report that says so."""
    root = tmp_path_factory.mktemp("studies")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(32):
        picture = rng.integers(20, 60, (40, 32), dtype=np.uint8)
        kind = i % 3
        if kind:
            column = 4 if kind == 1 else 20
            picture[10:18, column : column + 8] = 230
        Image.fromarray(picture).save(root / f"{i}.png")
        said = ["No lung nodule.", "There is a nodule in the right lung.", "There is a nodule in the left lung."][kind]
        split = "train" if i < 24 else "val" if i < 28 else "test"
        lines.append([f"s{i}", f"p{i}", "xray", f"{i}.png", split, f"{said} The heart is normal. Film {i}.", int(kind > 0)])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["study_id", "patient_id", "modality", "path", "split", "findings", "lung_nodule"], *lines])
    return root / "manifest.csv"


@pytest.fixture(scope="session")
def recipe(studies, tmp_path_factory):
    """A recipe of tiny towers, with dropout and augmentation so that randomness would show."""
    settings = {
        "trainer": {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1, "gradient_clip_val": 1.0},
        "model": {
            "image": {
                "class_path": "modalities.xray.conv.ConvEncoder",
                "init_args": {"embed_dim": 16, "widths": [8, 8, 8], "blocks": [1, 1, 1], "drop_rate": 0.2},
            },
            "report": {
                "class_path": "reports.towers.MiniLmReportEncoder",
                "init_args": {"embed_dim": 16, "hidden_dim": 16, "dropout": 0.2},
            },
            "similarity": {"class_path": "medvl.nn.similarity.TokenSimilarity"},
            "loss": {"class_path": "medvl.losses.MultiPositiveInfoNCE"},
        },
        "data": {
            "class_path": "medvl.training.data.StudyDataModule",
            "init_args": {
                "manifest": str(studies),
                "reader": {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 32}},
                "texts": {"class_path": "reports.text_source.ReportSentences"},
                "batch_size": 8,
                "sentences_per_image": 2,
                "augment": {"class_path": "medvl.data.augment.Augment"},
            },
        },
        "checkpoint_every": 1,
        "keep_best": False,
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory):
    """The folder of a run that nobody disturbed."""
    from medvl.training.cli import run

    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run("fit", ["--config", str(recipe), "--out", str(out)]) == 0
    return out


def assert_same_weights(one: Path, other: Path):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_equal_sentences_of_two_studies_are_one_text_with_two_positives(studies):
    data = StudyDataset(read_manifest(studies).select(split="train"), XrayReader(size=32), ReportSentences())
    batch = Collate(data.reader)([data[i] for i in range(6)])
    assert len(set(batch.texts.texts)) == len(batch.texts.texts)
    shared = batch.texts.texts.index("The heart is normal.")
    assert batch.positives[:, shared].all()
    for i in range(6):
        own = {text for text, positive in zip(batch.texts.texts, batch.positives[i].tolist(), strict=True) if positive}
        assert own == set(data.texts[i])


def test_draws_are_a_function_of_seed_epoch_and_image(studies):
    rows = read_manifest(studies).select(split="train")
    draws = [StudyDataset(rows, XrayReader(size=32), ReportSentences(), sentences_per_image=1, seed=s) for s in (0, 0, 1)]
    of = [[data[Draw(epoch, 3)].texts for epoch in range(12)] for data in draws]
    assert of[0] == of[1] != of[2]
    assert len(set(of[0])) > 1
    assert all(len(texts) == 1 for texts in of[0])


def test_batches_cover_an_epoch_once_and_ranks_share_it():
    whole = [d.index for batch in EpochBatches(24, 4, seed=3) for d in batch]
    assert sorted(whole) == list(range(24))
    shares = [[d for batch in EpochBatches(24, 4, seed=3, rank=r, world_size=2) for d in batch] for r in range(2)]
    assert [d.index for d in shares[0]] == [d.index for d in shares[1]] == whole  # each is told of every item
    own = [[d.index for d in share if not d.words_only] for share in shares]
    assert sorted(own[0] + own[1]) == list(range(24)) and len(own[0]) == len(own[1])
    later = EpochBatches(24, 4, seed=3)
    later.epoch, later.start = 0, 2
    assert [d.index for batch in later for d in batch] == whole[8:]
    other = EpochBatches(24, 4, seed=3)
    other.set_epoch(1)
    assert [d.index for batch in other for d in batch] != whole


@pytest.mark.parametrize(("count", "world_size", "last"), [(23, 1, [3]), (23, 2, [4, 3]), (18, 2, [1, 1]), (17, 2, None), (16, 2, None)])
def test_the_last_batch_is_shared_out_as_evenly_as_can_be(count, world_size, last):
    """Batches of 4 a process; a last one with less than an item a process is left out."""
    batches = [list(EpochBatches(count, 4, rank=r, world_size=world_size, drop_last=False)) for r in range(world_size)]
    kept = list(EpochBatches(count, 4, world_size=world_size))
    assert [len(found) for found in batches] == [len(kept) + (last is not None)] * world_size
    for r in range(world_size):
        assert [sum(not d.words_only for d in batch) for batch in batches[r]] == [4] * len(kept) + ([last[r]] if last else [])
        assert [[d.index for d in batch] for batch in batches[r][: len(kept)]] == [[d.index for d in batch] for batch in kept]


def test_augmentation_keeps_left_and_right_and_marks_what_came_from_outside():
    pixels = torch.zeros(16, 1, 32, 32)
    pixels[:, :, 12:20, 2:10] = 5.0  # bright at the image's left
    changed = Augment(rotation_deg=10, scale=0.15, shift=0.1)(ImageBatch(pixels), np.random.default_rng(0))
    weight = changed.pixels.clamp_min(2.0) - 2.0
    centre = (weight.sum((1, 2)) * torch.arange(32)).sum(-1) / weight.sum((1, 2, 3))
    assert (centre < 15).all()
    assert not changed.valid.all()
    assert (changed.pixels[:, 0][~changed.valid] == 0).all()
    again = Augment(rotation_deg=10, scale=0.15, shift=0.1)(ImageBatch(pixels), np.random.default_rng(0))
    assert torch.equal(changed.pixels, again.pixels)


def test_the_slices_of_a_volume_are_augmented_alike():
    """A rod along the slices stays straight, on its side, and what moves in is the edge and no hole."""
    pixels = torch.full((8, 2, 5, 32, 32), -1.0)
    pixels[..., 12:20, 4:8] = 3.0
    valid, position = torch.ones(8, 5, dtype=torch.bool), torch.arange(5.0).expand(8, 5)
    changed = Augment(rotation_deg=8, contrast=0, brightness=0, noise=0)(ImageBatch(pixels, valid, position), np.random.default_rng(0))
    assert torch.equal(changed.pixels, changed.pixels[:, :1, :1].expand_as(pixels))
    assert not torch.equal(changed.pixels, pixels)
    weight = changed.pixels[:, 0, 0] + 1
    assert ((weight.sum(1) * torch.arange(32)).sum(-1) / weight.sum((1, 2)) < 14).all()
    assert changed.pixels.min() >= -1 - 1e-5
    assert changed.valid is valid
    assert changed.position_mm is position


def test_a_run_leaves_a_loadable_model_its_recipe_and_a_log(finished):
    assert {"model.safetensors", "config.json", "config.yaml", "resume.ckpt", "logs"} <= {p.name for p in finished.iterdir()}
    model = medvl.load(finished, device="cpu")
    assert model.image.embed_dim == 16
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["model"]["image"]["init_args"]["widths"] == [8, 8, 8]
    provenance = json.loads((finished / "config.json").read_text())["provenance"]
    assert provenance["step"] == STEPS
    with next((finished / "logs").rglob("metrics.csv")).open() as file:
        losses = [float(line["train/loss"]) for line in csv.DictReader(file) if line["train/loss"]]
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_the_checkpoint_holds_nothing_that_needs_unpickling(finished):
    assert torch.load(finished / "resume.ckpt", weights_only=True)["global_step"] == STEPS


@pytest.mark.parametrize("stop_at", [2, 3, 7])
def test_stopped_and_resumed_ends_with_the_same_weights(recipe, finished, tmp_path, stop_at):
    """Stopped after a step in the middle or at the end of an epoch (3 steps an epoch)."""
    from medvl.training.cli import run

    arguments = ["--config", str(recipe), "--out", str(tmp_path), "--resume", "true"]

    class StopNowError(Exception):
        pass

    original = torch.optim.AdamW.step
    calls = {"n": 0}

    def step(self, *args, **kwargs):
        if calls["n"] == stop_at:
            raise StopNowError
        calls["n"] += 1
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(StopNowError):
            run("fit", arguments)
    assert torch.load(tmp_path / "resume.ckpt", weights_only=True)["global_step"] == stop_at
    assert run("fit", arguments) == 0
    assert_same_weights(tmp_path, finished)


def test_what_validation_chose_survives_a_stop_before_during_and_after_validation(recipe, tmp_path):
    """With keep_best the model on disk is that of the lowest validation loss of all epochs, whichever hook the run was stopped in."""
    from medvl.training.callbacks import KeepBest
    from medvl.training.cli import run

    def arguments(out):
        return ["--config", str(recipe), "--out", str(out), "--resume", "true", "--keep_best", "true", "--checkpoint_every", "500"]

    whole = tmp_path / "whole"
    assert run("fit", arguments(whole)) == 0

    class StopNowError(Exception):
        pass

    original = KeepBest.on_validation_end
    for name, before, nth in (("before", True, 2), ("after", False, 2), ("last", True, 4)):
        calls = {"n": 0}

        def stop(self, trainer, module, before=before, nth=nth, calls=calls):
            calls["n"] += 1
            if before and calls["n"] == nth:
                raise StopNowError
            original(self, trainer, module)
            if calls["n"] == nth:
                raise StopNowError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KeepBest, "on_validation_end", stop)
            with pytest.raises(StopNowError):
                run("fit", arguments(tmp_path / name))
        assert run("fit", arguments(tmp_path / name)) == 0
        assert_same_weights(tmp_path / name, whole)
        chosen = [json.loads((folder / "config.json").read_text())["provenance"] for folder in (whole, tmp_path / name)]
        assert chosen[0] == chosen[1]


def test_a_checkpoint_of_other_data_is_refused(recipe, finished, tmp_path):
    from medvl.training.cli import run

    (tmp_path / "resume.ckpt").write_bytes((finished / "resume.ckpt").read_bytes())
    with pytest.raises(ValueError, match="written with another batch_size"):
        run("fit", ["--config", str(recipe), "--out", str(tmp_path), "--resume", "true", "--data.init_args.batch_size", "4"])


def kill_and_resume(recipe: Path, out: Path, after_step: int) -> None:
    """SIGKILL a run once its checkpoint says ``after_step`` or later, then let it finish."""
    code = "import sys; from medvl.training.cli import run; sys.exit(run('fit', sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--config", str(recipe), "--out", str(out), "--resume", "true"]
    threads = str(torch.get_num_threads())  # that the run to compare with was made with: sums of more threads differ in the last bit
    places = os.pathsep.join([str(Path(medvl.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": threads}
    with (out / "killed.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            checkpoint = out / "resume.ckpt"
            if checkpoint.is_file() and torch.load(checkpoint, weights_only=True)["global_step"] >= after_step:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (out / "killed.log").read_text()
    subprocess.run(command, env=environment, check=True, capture_output=True)


def test_killed_and_resumed_ends_with_the_same_weights(recipe, finished, tmp_path):
    kill_and_resume(recipe, tmp_path, after_step=2)
    assert_same_weights(tmp_path, finished)


@pytest.mark.slow
@pytest.mark.parametrize("after_step", [1, 3, 4, 6, 8])
def test_killed_anywhere_and_resumed_ends_with_the_same_weights(recipe, finished, tmp_path, after_step):
    kill_and_resume(recipe, tmp_path, after_step)
    assert_same_weights(tmp_path, finished)


def test_a_run_that_was_killed_after_its_last_checkpoint_writes_its_model(recipe, finished, tmp_path):
    from medvl.training.cli import run

    for name in ("resume.ckpt", "config.yaml"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path), "--resume", "true"]) == 0
    assert_same_weights(tmp_path, finished)


@pytest.mark.parametrize(("options", "steps"), [({"accumulate_grad_batches": 2}, 8), ({"limit_train_batches": 2}, 8)])
def test_epochs_that_end_within_a_window_or_early_are_all_served_and_resumed(recipe, tmp_path, options, steps):
    """Three batches an epoch, four epochs: two steps of two batches and one, or of the first two alone."""
    from medvl.training.cli import run

    settings = yaml.safe_load(recipe.read_text())
    settings["trainer"] |= options
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(settings))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run("fit", ["--config", str(changed), "--out", str(whole)]) == 0
    assert torch.load(whole / "resume.ckpt", weights_only=True)["global_step"] == steps
    killed.mkdir()
    kill_and_resume(changed, killed, after_step=3)
    assert_same_weights(killed, whole)


@pytest.fixture
def stop(monkeypatch):
    """A callback for fits of this process, by name and by itself."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import interruptions

    monkeypatch.setattr(interruptions.Stop, "validated", [])
    for name in ("batch", "validation"):
        monkeypatch.setattr(interruptions.Stop, name, None)
    return interruptions.Stop


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7])
def test_a_run_of_accumulated_batches_resumes_from_a_whole_step(recipe, tmp_path, monkeypatch, stop, batch):
    """Killed before any batch, with a checkpoint asked for at every step: no batch is left out, and none is drawn like another."""
    from medvl.training.cli import run
    from medvl.training.module import AlignmentModule

    args = ["--config", str(recipe), "--data.init_args.batch_size=2", "--trainer.accumulate_grad_batches=3", "--trainer.max_epochs=1"]
    args += ["--trainer.callbacks+=interruptions.Stop"]
    drawn, original = [], AlignmentModule.on_train_batch_start
    monkeypatch.setattr(AlignmentModule, "on_train_batch_start", lambda self, *a: original(self, *a) or drawn.append(torch.initial_seed()))
    assert run("fit", [*args, "--out", str(tmp_path / "whole")]) == 0
    assert len(set(drawn)) == len(drawn) == 12
    stop.batch = batch
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("fit", [*args, "--out", str(tmp_path / "cut")])
    assert (tmp_path / "cut" / "resume.ckpt").is_file() == (batch >= 3)
    stop.batch = None
    assert run("fit", [*args, "--out", str(tmp_path / "cut"), "--resume=true"]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("every", [1, 2])
def test_a_validation_inside_of_an_epoch_is_neither_lost_nor_made_twice(recipe, tmp_path, stop, every):
    """Stopped while the second one runs: what validation chose is what an undisturbed run keeps."""
    from medvl.training.cli import run

    args = ["--config", str(recipe), "--keep_best=true", f"--checkpoint_every={every}", "--trainer.max_epochs=2"]
    args += ["--data.init_args.batch_size=4", "--trainer.val_check_interval=2", "--trainer.callbacks+=interruptions.Stop"]
    assert run("fit", [*args, "--out", str(tmp_path / "whole")]) == 0
    assert stop.validated == [2, 4, 6, 8, 10, 12]
    stop.validated.clear()
    stop.validation = 4
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run("fit", [*args, "--out", str(tmp_path / "cut")])
    stop.validation = None
    assert run("fit", [*args, "--out", str(tmp_path / "cut"), "--resume=true"]) == 0
    assert stop.validated == [2, 4, 6, 8, 10, 12]
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    one, other = (json.loads((tmp_path / name / "config.json").read_text())["provenance"] for name in ("whole", "cut"))
    assert (one["step"], one["value"]) == (other["step"], other["value"])


def test_a_run_that_validates_after_every_batch_can_be_told_to_stop(recipe, tmp_path, monkeypatch, stop):
    """It saves after the validation, and goes on to the weights of an undisturbed run."""
    from medvl.training.cli import run

    args = ["--config", str(recipe), "--trainer.max_epochs=1", "--trainer.val_check_interval=1", "--trainer.callbacks+=interruptions.Stop"]
    assert run("fit", [*args, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(stop, "on_validation_start", lambda self, trainer, module: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        run("fit", [*args, "--out", str(tmp_path / "cut")])
    assert ended.value.code == 143
    assert torch.load(tmp_path / "cut" / "resume.ckpt", weights_only=True)["global_step"] == 1
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert run("fit", [*args, "--out", str(tmp_path / "cut"), "--resume=true"]) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_of_other_steps_is_refused(recipe, tmp_path):
    """A step number means other batches then."""
    from medvl.training.cli import run

    args = ["--config", str(recipe), "--out", str(tmp_path / "run"), "--trainer.max_epochs=1"]
    assert run("fit", args) == 0
    for more, said in (
        ("--trainer.accumulate_grad_batches=2", "accumulate_grad_batches"),
        ("--trainer.limit_train_batches=2", "limit_train"),
    ):
        with pytest.raises(ValueError, match=f"written with another trainer.{said}"):
            run("fit", [*args, "--resume=true", "--trainer.max_epochs=2", more])


def test_a_rate_that_falls_to_an_end_wants_one(recipe, tmp_path):
    from medvl.training.cli import run

    with pytest.raises(ValueError, match=r"neither trainer\.max_epochs nor trainer\.max_steps"):
        run("fit", ["--config", str(recipe), "--out", str(tmp_path), "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:20"])


def test_a_requeued_job_goes_on_without_being_told(recipe, finished, tmp_path, monkeypatch):
    from medvl.training.cli import run

    (tmp_path / "resume.ckpt").write_bytes((finished / "resume.ckpt").read_bytes())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path)]) == 0
    assert_same_weights(tmp_path, finished)
    assert not list(tmp_path.glob("logs/*/metrics.csv"))  # it had nothing left to train


def test_parts_of_another_run_are_taken_and_kept(recipe, finished, tmp_path):
    from medvl.training.cli import run

    out = tmp_path / "second"
    shared = ["report", "similarity"]
    start = json.dumps(dict.fromkeys(shared, str(finished)))
    options = ["--trainer.max_epochs", "1", "--model.start", start, "--model.locked", json.dumps(shared)]
    assert run("fit", ["--config", str(recipe), "--out", str(out), *options]) == 0
    before, after = load_file(finished / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("image.") for name in moved)
    gone = tmp_path / "gone"
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace(str(finished), str(gone)))
    assert run("validate", ["--config", str(out / "config.yaml"), "--out", str(out)]) == 0, "a finished run does not need the other"
    more = ["--resume", "true", "--trainer.max_epochs", "2"]
    assert run("fit", ["--config", str(out / "config.yaml"), "--out", str(out), *more]) == 0, "nor does one that goes on"
    with pytest.raises(FileNotFoundError, match=r"gone: no model\.safetensors to take the weights of"):
        run("fit", ["--config", str(out / "config.yaml"), "--out", str(tmp_path / "third")])


def test_a_student_follows_the_features_of_a_finished_run(recipe, finished, tmp_path):
    """With mimicry alone beside the loss the distance to the teacher falls; the teacher is no part of what is saved."""
    from medvl.training.cli import run

    terms = {"mimic": {"class_path": "medvl.losses.FeatureMimic", "init_args": {"embed_dim": 16, "teacher_dim": 16, "weight": 20.0}}}
    args = ["--config", str(recipe), "--out", str(tmp_path), "--model.teacher", str(finished), "--model.terms", json.dumps(terms)]
    assert run("fit", [*args, "--trainer.max_epochs", "6"]) == 0
    with next(tmp_path.glob("logs/*/metrics.csv")).open() as file:
        told = [float(row["train/mimic"]) for row in csv.DictReader(file) if row.get("train/mimic")]
    assert len(told) == 18 and np.mean(told[-3:]) < 0.8 * np.mean(told[:3])
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(finished / "model.safetensors").keys()


def test_a_locked_part_stays_in_evaluation_mode_and_odd_names_are_refused(tiny):
    from medvl.losses import MultiPositiveInfoNCE
    from medvl.model import ConfigError, load_part
    from medvl.training.module import AlignmentModule

    def module(embed_dim=16, **options):
        model = medvl.load(tiny.model)
        report = type(model.report)(embed_dim, hidden_dim=None)
        return AlignmentModule(model.image, report, model.similarity, MultiPositiveInfoNCE(), **options)

    locked = module(locked=["report"]).train()
    assert locked.image.training and not locked.report.training
    assert not any(p.requires_grad for p in locked.report.parameters()) and all(p.requires_grad for p in locked.image.parameters())
    for options in ({"locked": ["text"]}, {"start": {"text": str(tiny.model)}}):
        with pytest.raises(ValueError, match="'text' is no part of the model; expected image, report, similarity"):
            module(**options)
    with pytest.raises(ConfigError, match="the weights of report do not fit"):
        load_part(type(locked.report)(8, hidden_dim=None), "report", tiny.model)
    with pytest.raises(ValueError, match="16 dimensions, the report tower in 8"):
        module(embed_dim=8)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors to take the weights of report from"):
        load_part(locked.report, "report", tiny.folder)


def test_bad_rows_are_listed_counted_and_cost_only_themselves(recipe, studies, tmp_path):
    from medvl.training.cli import run

    table = studies.parent / "with_bad_rows.csv"
    lines = studies.read_text().splitlines()
    (studies.parent / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    lines += ["s90,p90,xray,broken.png,train,No lung nodule.,0", "s91,p91,xray,missing.png,train,No lung nodule.,0"]
    silent = studies.parent / "silent.png"
    Image.new("L", (32, 32)).save(silent)
    lines += ["s92,p92,xray,silent.png,train,,0"]
    table.write_text("\n".join(lines))
    code = run("fit", ["--config", str(recipe), "--out", str(tmp_path), f"--data.init_args.manifest={table}", "--trainer.max_epochs=1"])
    assert code == 1
    with (tmp_path / "rejected.csv").open() as file:
        rejected = {line["study_id"]: line["reason"] for line in csv.DictReader(file)}
    assert set(rejected) == {"s90", "s91", "s92"}
    assert "no sentence" in rejected["s92"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_lost_during_a_run_costs_only_itself(recipe, studies, tmp_path, monkeypatch, workers):
    from medvl.training.cli import run

    shutil.copytree(studies.parent, tmp_path / "data")
    monkeypatch.setenv("LOST", "5,9")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = [f"--data.init_args.manifest={tmp_path / 'data' / 'manifest.csv'}", "--data.init_args.cache=false", "--trainer.max_epochs=2"]
    arguments = ["--config", str(recipe), "--out", str(tmp_path / "run"), f"--data.init_args.workers={workers}", *options]
    assert run("fit", [*arguments, "--trainer.callbacks+=interruptions.Lose"]) == 1
    with (tmp_path / "run" / "rejected.csv").open() as file:
        assert [(line["row"], line["study_id"]) for line in csv.DictReader(file)] in (
            [("5", "s3"), ("9", "s7")],
            [("9", "s7"), ("5", "s3")],
        )
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "model.safetensors").values())


def test_a_run_whose_storage_is_gone_ends_with_the_row_and_can_go_on(recipe, studies, tmp_path, monkeypatch):
    from medvl.training.cli import run

    shutil.copytree(studies.parent, tmp_path / "data")
    monkeypatch.setenv("LOST", "all")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = [f"--data.init_args.manifest={tmp_path / 'data' / 'manifest.csv'}", "--data.init_args.cache=false"]
    arguments = ["--config", str(recipe), "--out", str(tmp_path / "run"), *options]
    assert run("fit", [*arguments, "--trainer.max_epochs=1"]) == 0
    with pytest.raises(UnreadableImageError, match=r"row \d+: .*no such file; nor can any of the 10 items after it"):
        run("fit", [*arguments, "--resume=true", "--trainer.callbacks+=interruptions.Lose"])
    for file in studies.parent.glob("*.png"):
        shutil.copy(file, tmp_path / "data")
    assert run("fit", [*arguments, "--resume=true"]) == 0


def test_images_cached_on_disk_train_the_very_weights_that_reading_does(recipe, tmp_path):
    """With loader processes, from an empty and from a full cache, by a folder and by a cache with options; a place is no other recipe."""
    from medvl.training.cli import run

    folder = tmp_path / "cache"
    bounded = {"class_path": "medvl.data.cache.SampleCache", "init_args": {"folder": str(folder), "max_bytes": 10**7}}
    written = yaml.safe_load(recipe.read_text())
    written["data"]["init_args"] |= {"cache": bounded, "workers": 1}
    (tmp_path / "bounded.yaml").write_text(yaml.safe_dump(written))
    ways = {
        "read": (recipe, ["--data.init_args.cache=false", "--data.init_args.workers=1"]),
        "filled": (recipe, [f"--data.init_args.cache={folder}", "--data.init_args.workers=1"]),
        "full": (tmp_path / "bounded.yaml", []),
        "memory": (recipe, ["--data.init_args.cache=memory"]),
    }
    recipes, told = {}, []
    for name, (config, options) in ways.items():
        assert run("fit", ["--config", str(config), "--out", str(tmp_path / name), "--trainer.max_epochs=2", *options], told.append) == 0
        recipes[name] = json.loads((tmp_path / name / "config.json").read_text())["provenance"]["recipe_sha256"]
        assert json.loads((tmp_path / name / "config.json").read_text())["model"]["reader"] == XrayReader(size=32).spec()
        resolved = yaml.safe_load((tmp_path / name / "config.yaml").read_text())["data"]["init_args"]["cache"]
        assert resolved == {"read": False, "filled": str(folder), "memory": "memory"}.get(name, resolved)
    assert told == [tmp_path / name for name in ways], "each run told once that it ended, and where"
    assert len(list(folder.glob("samples/*/*.safetensors"))) == 28
    assert_same_weights(tmp_path / "filled", tmp_path / "read")
    assert_same_weights(tmp_path / "full", tmp_path / "read")
    assert recipes["read"] == recipes["filled"] == recipes["full"]
    assert recipes["memory"] != recipes["read"], "it rounds"


def test_memory_over_a_cache_on_disk_reads_each_image_once_from_either(studies, tmp_path, monkeypatch):
    rows, reader = read_manifest(studies).select(split="train"), XrayReader(size=32)
    data = StudyDataset(rows, CachedReader(reader, SampleCache(tmp_path)), ReportSentences(), cache=True)
    data.drop_unreadable()
    monkeypatch.setattr(XrayReader, "read", lambda *_: pytest.fail("read again"))
    again = StudyDataset(rows, CachedReader(reader, SampleCache(tmp_path)), ReportSentences(), cache=True)
    expected = [again.sample(i).pixels for i in range(len(again))]
    monkeypatch.setattr(SampleCache, "read", lambda *_: pytest.fail("taken from disk again"))
    for held in (data, again):
        assert all(torch.equal(held.sample(i).pixels, pixels) for i, pixels in enumerate(expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_one_fit_in_bf16_and_one_diagnosis_on_cuda(recipe, studies, tmp_path):
    from medvl.training.cli import run
    from reports.prompts import load_prompts
    from tasks.zero_shot import diagnose, encode_prompts

    on_cuda = ["--trainer.accelerator=cuda", "--trainer.precision=bf16-mixed"]
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path), *on_cuda]) == 0
    assert medvl.load(tmp_path).device.type == "cuda"
    films = sorted(studies.parent.glob("?.png"))[:4]
    scores = []
    for device in ("cuda", "cpu"):
        model = medvl.load(tmp_path, device=device)
        told = list(diagnose(model, films, encode_prompts(model, load_prompts())))
        assert [one.ok for one in told] == [True] * 4
        scores.append([list(one.findings.values()) for one in told])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-2)
