"""What ends a run from outside, as the operating system and torch really tell it: signals, full disks, loader processes that die."""

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

import medvl.model
from medvl.training import cli, signals
from medvl.training.callbacks import AtomicCheckpointIO
from medvl.training.cli import RunError, run
from medvl.training.signals import STOPPED, SaveOnSignal, explained, ignore_sigterm, slurm_job
from modalities.xray.reader import XrayReader


class Failing(Dataset):
    """Items of a loader process that fills the disk, or is killed."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/chunk-0-0.bin")
        if self.how == "missing":
            raise OSError(errno.ENOENT, "No such file", "/cache/chunk-0-0.bin")
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(5)


def loaded(how):
    """The error that a training sees."""
    with pytest.raises((OSError, RuntimeError)) as caught:
        list(DataLoader(Failing(how), num_workers=1))
    return caught.value


@pytest.mark.parametrize(("how", "word"), [("full", "the disk is full"), ("killed", "data.init_args.workers")])
def test_what_happens_to_a_loader_process_is_explained(tmp_path, how, word):
    words = explained(loaded(how), tmp_path)
    assert words is not None and word in words and str(tmp_path) in words and "\n" not in words


def test_another_error_of_a_loader_process_is_not_called_a_full_disk(tmp_path):
    assert explained(loaded("missing"), tmp_path) is None


@pytest.mark.parametrize("where", ["write", "flush"])
def test_a_disk_that_fills_up_inside_a_write_leaves_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch, where):
    path = tmp_path / "resume.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "flush":
            patch.setattr(os, "fsync", full)
        else:
            opened = os.fdopen

            class Full:
                def __init__(self, handle, mode):
                    self.file = opened(handle, mode)

                def __enter__(self):
                    return self

                def __exit__(self, *args):
                    self.file.close()

                def write(self, content):
                    self.file.write(content[:100])
                    full()

            patch.setattr(medvl.model.os, "fdopen", Full)
        with pytest.raises(OSError, match="No space") as caught:
            AtomicCheckpointIO().save_checkpoint({"global_step": 6, "weights": torch.zeros(1000)}, path)
    assert "the disk is full" in (explained(caught.value, tmp_path) or "")
    assert AtomicCheckpointIO().load_checkpoint(path) == {"global_step": 3}
    assert [one.name for one in tmp_path.iterdir()] == ["resume.ckpt"]


@pytest.mark.parametrize("given", ["command", "recipe", "default"])
def test_the_checkpoint_is_looked_for_where_the_run_has_its_folder(recipe, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / ("runs/last" if given == "default" else "here")
    (tmp_path / "out.yaml").write_text(yaml.safe_dump({"out": str(out)}))
    more = {"command": ["--out", str(out)], "recipe": ["--config", str(tmp_path / "out.yaml")], "default": []}[given]

    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache")

    monkeypatch.setattr(XrayReader, "read", full)
    monkeypatch.setattr(cli.StudyDataModule, "read_images", lambda self, splits, progress: self.reader.read(None))
    with pytest.raises(RunError, match=r"the disk is full .* no step was saved in .*begin anew"):
        run("fit", ["--config", str(recipe), *more])
    (out / "resume.ckpt").touch()
    with pytest.raises(RunError, match=r"the last checkpoint in .* is whole: go on with --resume true"):
        run("fit", ["--config", str(recipe), *more])


@pytest.fixture
def handlers():
    """Handlers of this process that must be there again after a run, and that a signal no run answers does no harm to."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    missed = []

    def miss(number, frame):
        missed.append(number)

    before = {number: signal.signal(number, miss) for number in numbers}
    yield missed
    assert all(signal.getsignal(number) is miss for number in numbers)
    for number, handler in before.items():
        signal.signal(number, handler)


SHOWN = {  # lines of `scontrol show job` of SLURM 22.05: cancelled, at the end of its time, and signalled alone
    "scancel": "JobId=17 JobName=fit JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=0",
    "time": "JobId=17 JobName=fit JobState=COMPLETING Reason=TimeLimit Dependency=(null) Requeue=1 Restarts=0",
    "signal": "JobId=17 JobName=fit JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0",
}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A SLURM job whose scontrol notes in this file what it is asked, but for the state, which it takes from a file."""
    notes, command = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    (command.parent / "shown").write_text(SHOWN["scancel"])
    command.write_text(f"#!/bin/sh\nif [ $1 = show ]; then cat {command.parent}/shown; else echo $@ >> {notes}; fi\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"JOB_ID": "17", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "fit"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return notes


@pytest.mark.parametrize(
    ("by", "shown", "queued"),
    [
        (signal.SIGTERM, SHOWN["time"], True),
        (signal.SIGTERM, SHOWN["signal"], True),
        (signal.SIGTERM, SHOWN["scancel"], False),
        (signal.SIGTERM, "", False),
        (signal.SIGUSR1, SHOWN["scancel"], True),
    ],
)
def test_a_job_that_slurm_ends_is_requeued_and_one_that_is_cancelled_is_not(recipe, tmp_path, handlers, asked, caplog, by, shown, queued):
    (tmp_path / "bin" / "shown").write_text(shown)
    with caplog.at_level(logging.WARNING, logger="medvl"), pytest.raises(SystemExit) as ended:
        told(recipe, tmp_path, number=int(by), batch=0)
    assert ended.value.code == STOPPED and not handlers
    assert (tmp_path / "run" / "resume.ckpt").is_file()
    assert (asked.read_text() == "requeue 17\n") if queued else not asked.exists()
    assert ("; requeued" in caplog.text) == queued and ("--resume true" in caplog.text) != queued


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1])
def test_told_while_files_are_read_it_ends_at_once_and_promises_nothing(recipe, tmp_path, monkeypatch, handlers, asked, caplog, by):
    reads = []

    def read(self, path):
        reads.append(path)
        os.kill(os.getpid(), by)
        time.sleep(0.01)

    monkeypatch.setattr(XrayReader, "read", read)
    with caplog.at_level(logging.WARNING, logger="medvl"), pytest.raises(SystemExit) as ended:
        run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run")])
    assert ended.value.code == STOPPED and len(reads) == 1 and not handlers
    told = " ".join(record.message for record in caplog.records)
    assert "nothing to save" in told and "--resume" not in told and ("not requeued" in told) == (by == signal.SIGUSR1)
    assert not asked.exists() and not (tmp_path / "run" / "resume.ckpt").exists()


def test_a_dry_run_that_is_told_to_stop_leaves_nothing(recipe, tmp_path, monkeypatch, handlers):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(XrayReader, "read", lambda self, path: os.kill(os.getpid(), signal.SIGTERM))
    args = ["--config", str(recipe), "--out", str(tmp_path / "run"), "--data.init_args.cache", str(tmp_path / "images"), "--dry-run"]
    with pytest.raises(SystemExit) as ended:
        run("fit", args)
    assert ended.value.code == STOPPED and not handlers
    assert list(tmp_path.rglob("*")) == [scratch]


class Tell(Callback):
    """Sends this process a signal once: at the start of a batch, or at the end of training."""

    def __init__(self, number: int, batch: int | None = None) -> None:
        self.number, self.batch, self.seen = number, batch, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.seen == self.batch:
            os.kill(os.getpid(), self.number)
        self.seen += 1

    def on_fit_end(self, trainer, pl_module):
        if self.batch is None:
            os.kill(os.getpid(), self.number)


def told(recipe, tmp_path, *args, **when):
    """A run with :class:`Tell`: exit code."""
    (tmp_path / "tell.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": f"{__name__}.Tell", "init_args": when}]}}))
    return run("fit", ["--config", str(recipe), "--config", str(tmp_path / "tell.yaml"), "--out", str(tmp_path / "run"), *args])


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1])
def test_told_after_the_last_step_it_ends_as_it_would_have(recipe, tmp_path, handlers, asked, by):
    """Lightning, which believes to be under SLURM too, requeues nothing."""
    assert told(recipe, tmp_path, number=int(by)) == 0
    assert not asked.exists() and not handlers
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model.safetensors", "resume.ckpt"}
    assert len(list((tmp_path / "run").rglob("*.ckpt"))) == 1


def test_lightning_requeues_nothing_by_itself(recipe, tmp_path, monkeypatch, handlers, asked):
    found = []
    monkeypatch.setattr(cli.AlignmentCLI, "_run_subcommand", lambda self, _: found.append(self.trainer))
    run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run")])
    environment = found[0]._accelerator_connector.cluster_environment
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue


@pytest.mark.parametrize("batch", [0, 4, 5])
def test_told_between_accumulated_batches_it_makes_the_step(recipe, tmp_path, handlers, batch):
    """Of 4 batches an epoch two make a step; the run that goes on has the weights of one that nobody disturbed."""
    two = ["--trainer.accumulate_grad_batches", "2", "--keep_best", "false"]
    with pytest.raises(SystemExit) as ended:
        told(recipe, tmp_path, *two, number=int(signal.SIGTERM), batch=batch)
    assert ended.value.code == STOPPED and not handlers
    saved = AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / "resume.ckpt")
    assert saved["global_step"] == batch // 2 + 1
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path / "run"), "--resume", "true", *two]) == 0
    assert run("fit", ["--config", str(recipe), "--out", str(tmp_path / "whole"), *two]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_processes_share_what_they_were_told_once_a_step_and_one_alone_never(monkeypatch, tmp_path):
    shared = []
    monkeypatch.setattr(signals, "largest_over_ranks", lambda flags: (shared.append(flags.tolist()), flags)[1])
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    for world, times in ((1, 0), (2, 3)):
        of_loop = {"is_last_batch": False, "accumulate_grad_batches": 2, "enable_validation": False}
        of_loop |= {"val_check_batch": float("inf"), "check_val_every_n_epoch": 1}
        trainer = SimpleNamespace(world_size=world, strategy=strategy, **of_loop)
        for i in range(6):
            SaveOnSignal(tmp_path / "resume.ckpt").on_train_batch_end(trainer, None, None, None, i)
        assert shared == [[0, 0]] * times


def test_an_array_task_is_requeued_and_not_its_array(monkeypatch):
    """SLURM gives the last task of an array the number of the array itself."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert slurm_job() == "17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job() == "17_3"


def _load(ready):
    ignore_sigterm(0)
    ready.set()
    time.sleep(60)


def test_a_loader_process_hears_the_trainer_and_nobody_else():
    """It would otherwise outlive the trainer, which waits for it at its end."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_load, args=(ready,), daemon=True)
    process.start()
    try:
        assert ready.wait(20)
        for _ in range(2):
            subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
            process.join(0.3)
            assert process.is_alive()
        process.terminate()
        process.join(10)
        assert process.exitcode == 0
    finally:
        process.kill()
