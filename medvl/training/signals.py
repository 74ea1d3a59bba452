"""Runs that are told to stop: the step is finished, the checkpoint written, and a SLURM job whose time is up put back into the queue.

Lightning's own handlers (a SIGTERM that raises, SLURM's requeueing with a checkpoint of another name) are replaced during a fit, so that a
stopped run has one checkpoint, ``resume.ckpt``, whatever stopped it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from medvl.losses.ranks import largest_over_ranks

log = logging.getLogger(__name__)

RESUME = "resume.ckpt"
STOPPED = 143
"""Exit code of a run that was told to stop and can go on: 128 + SIGTERM."""


class SaveOnSignal(Callback):
    """On SIGTERM, and under SLURM on SIGUSR1, save at the end of the step and end with exit code 143; on SIGUSR1 requeue the job as well.

    SIGUSR1 is what ``#SBATCH --signal=USR1@90`` sends 90 s before a job's time is up. A SIGTERM comes from ``scancel``, which wants no new
    run, or from preemption, where SLURM requeues by itself. With several processes all stop after the same step, whichever was told. On the
    last batch of an epoch the validation that is due comes first, for a resumed run would skip it. Before the first step a signal ends the
    process as it ends any other: there is nothing to save.

    Args:
        path: the run's ``resume.ckpt``.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.told, self.requeue = path, False, False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals; only the main thread may."""
        signals = [signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
        try:
            self._before = {number: signal.signal(number, self._note) for number in signals}
        except ValueError:
            log.warning("not in the main thread: a SIGTERM will end the run without a checkpoint")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop here if told, but for the last batch of an epoch."""
        if not trainer.is_last_batch:
            self._stop_if_told(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop here if told during the last batch or the validation."""
        self._stop_if_told(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        self.requeue = self.requeue or number == signal.SIGUSR1

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        told, requeue = self.told, self.requeue
        if trainer.world_size > 1:
            flags = torch.tensor([told, requeue], dtype=torch.uint8, device=trainer.strategy.root_device)
            told, requeue = largest_over_ranks(flags).bool().tolist()
        if not told:
            return
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            queued = requeue and _requeue()
            after = "requeued" if queued else "go on with --resume true"
            log.warning("told to stop: step %d is saved in %s; %s", trainer.global_step, self.path, after)
        raise SystemExit(STOPPED)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _requeue() -> bool:
    """Put this SLURM job back into the queue; whether that was done."""
    job, scontrol = os.environ.get("SLURM_JOB_ID"), shutil.which("scontrol")
    if job is None or scontrol is None:
        return False
    done = subprocess.run([scontrol, "requeue", job], check=False)  # noqa: S603 (fixed words)
    return done.returncode == 0


def ignore_sigterm(_: int) -> None:
    """For loader processes: a SIGTERM to the whole group is for the trainer, which saves its step and then ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def explained(error: BaseException, folder: Path) -> str | None:
    """What a person can do about the end of a run: a full disk, a loader process that died, memory that ran out. None for anything else.

    Args:
        folder: of the run; a checkpoint that is there is whole, for it was written beside and renamed.
    """
    whole = (folder / RESUME).is_file()
    go_on = f"the last checkpoint in {folder} is whole: go on with --resume true" if whole else f"no step was saved in {folder}: begin anew"
    if isinstance(error, OSError) and _is_full(error):
        return f"the disk is full ({error.filename or folder}): make room; {go_on}"
    words = str(error)
    if isinstance(error, RuntimeError) and "DataLoader worker" in words:
        return (
            f"a loader process died ({words.splitlines()[0]}): it was killed, mostly for want of memory; give fewer "
            f"data.init_args.workers or a smaller batch_size; {go_on}"
        )
    if isinstance(error, torch.cuda.OutOfMemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in words):
        return f"memory ran out: give a smaller model.micro_batch (the batch under the loss stays as it is); {go_on}"
    return None


def _is_full(error: OSError) -> bool:
    """Whether a disk is full; an error that comes from a loader process has lost its number and keeps it in its words alone."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return error.errno in numbers or (error.errno is None and any(f"[Errno {number}]" in str(error) for number in numbers))
