"""Runs that are killed, or told to stop, and go on: the batches and the weights are those of a run that nobody disturbed."""

import errno
import json
import os
import random
import signal
import socket
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

from medvl.training.callbacks import AtomicCheckpointIO
from medvl.training.signals import STOPPED, explained

STEPS = 24
"""Of a whole run: three epochs."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("interrupted")
    rng = np.random.default_rng(0)
    lines = ["study_id,patient_id,modality,path,split,findings"]
    for i in range(68):
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(root / f"{i}.png")
        said = ["No lung nodule.", "There is a nodule in the right lung.", "There is an effusion."][i % 3]
        lines.append(f"s{i},p{i},xray,{i}.png,{'train' if i < 64 else 'val'},{said} Film {i}.")
    (root / "manifest.csv").write_text("\n".join(lines))
    settings = {
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "callbacks": [{"class_path": "interruptions.Interrupt"}],
        },
        "model": {
            "image": {
                "class_path": "modalities.xray.conv.ConvEncoder",
                "init_args": {"embed_dim": 16, "widths": [8, 8], "blocks": [1, 1], "drop_rate": 0.2},
            },
            "report": {"class_path": "reports.towers.MiniLmReportEncoder", "init_args": {"embed_dim": 16, "dropout": 0.2}},
            "similarity": {"class_path": "medvl.nn.similarity.TokenSimilarity"},
            "loss": {"class_path": "medvl.losses.MultiPositiveInfoNCE"},
        },
        "data": {
            "class_path": "medvl.training.data.StudyDataModule",
            "init_args": {
                "manifest": str(root / "manifest.csv"),
                "reader": {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 32}},
                "texts": {"class_path": "reports.text_source.ReportSentences"},
                "batch_size": 8,
                "sentences_per_image": 1,
                "augment": {"class_path": "medvl.data.augment.Augment"},
            },
        },
        "checkpoint_every": 3,
        "keep_best": False,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def shards(recipe):
    """The films in shards of a few."""
    pytest.importorskip("litdata", reason="shards need the extra 'streaming'")
    from medvl.data.manifest import read_manifest
    from medvl.data.shards import write_shards
    from modalities.xray.reader import XrayReader

    rows = read_manifest(recipe.parent / "manifest.csv").rows
    write_shards(XrayReader(size=32), rows, recipe.parent, recipe.parent / "shards", shard_mib=0)
    return [
        "--data.init_args.cache",
        "medvl.data.shards.ShardStore",
        "--data.init_args.cache.init_args.folder",
        str(recipe.parent / "shards"),
    ]


def fit(recipe, out, ranks, at=-1, by="KILL", options=()):
    """One process (with its ranks) of a run; its exit code and what it said."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "INTERRUPT_AT": str(at), "INTERRUPT_BY": by}
    env["BATCH_LOG"] = str(out.with_suffix(".batches"))
    more = ["--trainer.devices", str(ranks), *(["--trainer.strategy", "ddp", "--data.init_args.batch_size", "4"] if ranks > 1 else [])]
    command = [sys.executable, "-m", "medvl", "fit", "--config", str(recipe), "--out", str(out), "--resume", "true", *more, *options]
    running = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, _ = running.communicate(timeout=400)
    return running.returncode, said


def batches(out):
    """(step, rank) -> rows of every batch that was seen; one that was seen again must be the same."""
    found = {}
    for line in out.with_suffix(".batches").read_text().splitlines():
        step, rank, rows = json.loads(line)
        assert found.setdefault((step, rank), rows) == rows, (step, rank)
    return found


def assert_as_undisturbed(out, whole, ranks):
    assert batches(out) == batches(whole)
    assert set(batches(whole)) == {(step, rank) for step in range(STEPS) for rank in range(ranks)}
    one, other = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def whole(recipe):
    """Number of processes -> folder of a run that nobody disturbed, made once."""
    made = {}

    def of(ranks, options=()):
        key = (ranks, *options)
        if key not in made:
            made[key] = recipe.parent / f"whole{len(made)}"
            code, said = fit(recipe, made[key], ranks, options=options)
            assert code == 0, said
        return made[key]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "streamed"), [(1, False), (1, True), (2, True)])
def test_killed_at_random_steps_and_resumed(recipe, shards, whole, tmp_path, ranks, streamed):
    """MEDVL_KILLS times (3 unless told), each at a random moment of a random step after where the run is."""
    options = tuple(shards) if streamed else ()
    out, rng, done, kills = tmp_path / "run", random.Random(ranks), 0, 0
    while kills < int(os.environ.get("MEDVL_KILLS", "3")):
        at = rng.randint(done, min(done + 4, STEPS - 1))
        code, said = fit(recipe, out, ranks, at, options=options)
        if code == 0 and at >= STEPS - 12:  # it ended before the kill came: another run from the start
            assert_as_undisturbed(out, whole(ranks, options), ranks)
            out, done = tmp_path / f"ended{kills}-{at}-{rng.random()}", 0
            continue
        assert code == -signal.SIGKILL, (at, said)
        kills += 1
        saved = AtomicCheckpointIO().load_checkpoint(out / "resume.ckpt")["global_step"] if (out / "resume.ckpt").is_file() else 0
        done = saved if saved < STEPS - 4 else done
        if saved >= STEPS - 4:  # near its end: another run from the start
            code, said = fit(recipe, out, ranks, options=options)
            assert code == 0, said
            assert_as_undisturbed(out, whole(ranks, options), ranks)
            out, done = tmp_path / f"run{kills}", 0
    code, said = fit(recipe, out, ranks, options=options)
    assert code == 0, said
    assert_as_undisturbed(out, whole(ranks, options), ranks)


@pytest.mark.slow
def test_what_one_process_cannot_read_all_leave_out(recipe, tmp_path):
    """Else they would shuffle different sets, and train on pairs of other studies' images."""
    out = tmp_path / "run"
    reader = ["--data.init_args.reader", "interruptions.Shaky", "--data.init_args.reader.init_args.size", "32"]
    code, said = fit(recipe, out, 2, options=[*reader, "--trainer.max_epochs", "1", "--data.init_args.cache", "false"])
    assert code == 1, said
    found = batches(out)
    assert all(found[step, 0] == found[step, 1] for step, _ in found) and len(found) == 14
    assert 5 not in {row for rows in found.values() for row in rows}  # the row of film 3
    assert "3.png" in (out / "rejected.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "at"), [(1, 4), (1, 7), (2, 4)])
def test_told_to_stop_it_saves_and_goes_on(recipe, whole, tmp_path, ranks, at):
    """In the middle of an epoch, and in its last step; with two processes one is told and both stop."""
    out = tmp_path / "run"
    code, said = fit(recipe, out, ranks, at, "TERM")
    assert code == STOPPED, said
    assert "go on with --resume true" in said
    saved = AtomicCheckpointIO().load_checkpoint(out / "resume.ckpt")
    assert saved["global_step"] == at + 1  # the step was finished
    code, said = fit(recipe, out, ranks)
    assert code == 0, said
    assert_as_undisturbed(out, whole(ranks), ranks)


@pytest.mark.slow
def test_a_group_told_to_stop_saves_though_its_loaders_are_told_too(recipe, whole, tmp_path):
    out = tmp_path / "run"
    code, said = fit(recipe, out, 1, 4, "GROUP", ["--data.init_args.workers", "2"])
    assert code == STOPPED, said
    assert AtomicCheckpointIO().load_checkpoint(out / "resume.ckpt")["global_step"] == 5
    code, said = fit(recipe, out, 1)
    assert code == 0, said
    assert_as_undisturbed(out, whole(1), 1)


@pytest.mark.slow
def test_told_while_it_waits_for_another_process_it_ends_at_once(recipe, tmp_path):
    """As torchrun starts the first of two, of which the second does not come."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, "-m", "medvl", "fit", "--config", str(recipe), "--out", str(tmp_path / "run")]
    running = subprocess.Popen(
        [*command, "--trainer.devices", "2", "--trainer.strategy", "ddp"],
        env=env,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stderr is not None
        assert any("images: 64 train" in line for line in running.stderr)  # all files are read
        time.sleep(3)
        assert running.poll() is None
        running.terminate()
        assert running.wait(5) == -signal.SIGTERM
    finally:
        running.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("by", "queued"), [("USR1", True), ("TERM", False)])
def test_a_job_is_requeued_when_its_time_is_up_and_not_when_it_is_cancelled(recipe, tmp_path, monkeypatch, by, queued):
    """With a stand-in for scontrol that shows a cancelled job and notes what else it is asked; Lightning believes to run under SLURM."""
    commands, asked = tmp_path / "bin", tmp_path / "asked"
    commands.mkdir()
    shown = "JobId=17 JobState=COMPLETING Reason=None"
    (commands / "scontrol").write_text(f"#!/bin/sh\nif [ $1 = show ]; then echo {shown}; else echo $@ >> {asked}; fi\n")
    (commands / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    slurm = {"JOB_ID": "17", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "fit"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    code, said = fit(recipe, tmp_path / "run", 1, 2, by)
    assert code == STOPPED and ("; requeued" in said) == queued, said
    assert (asked.read_text() == "requeue 17\n") if queued else not asked.exists()
    assert [path.name for path in (tmp_path / "run").glob("*.ckpt")] == ["resume.ckpt"]


def test_ends_that_a_person_can_mend_are_explained(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "resume.ckpt"))
    dead = RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. \nmore")
    memory = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ...")
    for error, word in ((full, "disk is full"), (dead, "data.init_args.workers"), (memory, "model.micro_batch")):
        words = explained(error, tmp_path)
        assert words is not None and word in words and "no step was saved" in words and "--resume" not in words
    (tmp_path / "resume.ckpt").touch()
    for error, word in ((full, "disk is full"), (dead, "data.init_args.workers"), (memory, "model.micro_batch")):
        words = explained(error, tmp_path)
        assert words is not None and word in words and "--resume true" in words
    assert explained(RuntimeError("shapes"), tmp_path) is None and explained(OSError(errno.ENOENT, "gone"), tmp_path) is None
