"""Runs that are told to stop: the step is finished, the checkpoint written, and a SLURM job whose time is up put back into the queue.

Lightning's own handlers (a SIGTERM that raises, SLURM's requeueing with a checkpoint of another name) are replaced during a fit, so that a
stopped run has one checkpoint, ``resume.ckpt``, whatever stopped it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from medvl.losses.ranks import largest_over_ranks

log = logging.getLogger(__name__)

RESUME = "resume.ckpt"
STOPPED = 143
"""Exit code of a run that was told to stop and can go on: 128 + SIGTERM."""


class SaveOnSignal(Callback):
    """On SIGTERM, and under SLURM on SIGUSR1, save at the end of the step and end with exit code 143; under SLURM requeue the job as well.

    SIGUSR1 is what ``#SBATCH --signal=USR1@90`` sends 90 s before a job's time is up. SLURM sends SIGTERM when it is up, the cluster's
    KillWait before it kills, and on preemption; ``scancel`` sends it too, and then no new run is wanted (:func:`was_cancelled`). On the
    last batch of an epoch the validation that is due comes first, for a resumed run would skip it; of accumulated batches the step is made.

    While files are read, and until training begins, a signal ends the run at once (:meth:`listening`), also with 143: there is nothing to
    save. A job whose time is up by then is not requeued, for it would come no further. After the last step one process alone ends as it
    would have.

    With several processes all stop after the same step, whichever was told: after each step, which has waited for the others already, they
    share two bytes. One process alone shares nothing.

    Args:
        path: the run's ``resume.ckpt``.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.told, self.warned = path, False, False
        self._process, self._training, self._speaks = os.getpid(), False, True

    @contextmanager
    def listening(self, trainer: L.Trainer) -> Iterator[None]:
        """From here on, before the first step too, a signal is answered by us; Lightning then requeues nothing by itself."""
        self._speaks = trainer.is_global_zero
        before = self._take()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def leave_rendezvous(self, trainer: L.Trainer) -> None:
        """Where processes wait for each other to begin, Python answers no signal: a SIGTERM there ends them as it ends any process."""
        if trainer.world_size > 1 and signal.getsignal(signal.SIGTERM) == self._note:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals, from Lightning too, which gives them back at the end."""
        self._training = True
        self._take()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop here if told, but for the last batch of an epoch, and batches whose step is to come."""
        if not trainer.is_last_batch and ends_step(trainer, batch_idx) and not validates_next(trainer, batch_idx):
            self._stop_if_told(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop here if told before or during a validation inside of an epoch."""
        if ended_inside(trainer):
            self._stop_if_told(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop here if told during the last batch or the validation."""
        self._stop_if_told(trainer)

    def _take(self) -> dict[int, Any]:
        """Answer the signals, which only the main thread may; who did it before."""
        numbers = [signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
        try:
            return {number: signal.signal(number, self._note) for number in numbers}
        except ValueError:
            log.warning("not in the main thread: a SIGTERM will end the run without a checkpoint")
            return {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader process that does not ignore it yet
        self.told = True
        self.warned = self.warned or number == signal.SIGUSR1
        if self._training:
            return
        if self._speaks:
            short = "; the job is not requeued, give it more time" if self.warned else ""
            log.warning("told to stop before a step was made: nothing to save, the next start begins where this one did%s", short)
        raise SystemExit(STOPPED)

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        told, warned = self.told, self.warned
        if trainer.world_size > 1:
            flags = torch.tensor([told, warned], dtype=torch.uint8, device=trainer.strategy.root_device)
            told, warned = largest_over_ranks(flags).bool().tolist()
        if not told:
            return
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            after = "go on with --resume true"
            if slurm_job() is not None and (warned or not was_cancelled()):
                after = "requeued" if _requeue() else f"the job could not be requeued, {after}"
            log.warning("told to stop: step %d is saved in %s; %s", trainer.global_step, self.path, after)
        raise SystemExit(STOPPED)


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a batch is the last of those that a step is made of."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def ended_inside(trainer: L.Trainer) -> bool:
    """Whether a validation that ends is one inside of an epoch, after a whole step."""
    fits = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return fits and not trainer.is_last_batch and ends_step(trainer, trainer.fit_loop.batch_idx)


def validates_next(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation inside of the epoch follows a batch."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or every is None or not math.isfinite(every):
        return False
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % int(every) == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (batch_idx + 1) % int(every) == 0


def no_other_requeue(trainer: L.Trainer) -> None:
    """Keep Lightning from requeueing a SLURM job by itself, with a checkpoint of its own that would come before ours."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def slurm_job() -> str | None:
    """What ``scontrol`` calls this job: of an array this task, for the number of its last task is that of the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def was_cancelled() -> bool:
    """Whether it is ``scancel`` that ends this SLURM job; True where SLURM does not say.

    A job that is cancelled is completing for no reason, one whose time is up for the reason TimeLimit; a signal alone leaves it running.
    SLURM would requeue a cancelled job, so that one which asks for it could not be cancelled (both seen with SLURM 22.05).
    """
    shown = _scontrol("show", "job")
    facts = dict(word.split("=", 1) for word in (shown or "").split() if "=" in word)
    return facts.get("JobState") not in ("RUNNING", "PREEMPTED") and facts.get("Reason") != "TimeLimit"


def _requeue() -> bool:
    """Put this SLURM job back into the queue; whether that was done."""
    return _scontrol("requeue") is not None


def _scontrol(*words: str) -> str | None:
    """What ``scontrol`` says when asked this of the job; None where it fails, or is not there."""
    job, scontrol = slurm_job(), shutil.which("scontrol")
    if job is None or scontrol is None:
        return None
    done = subprocess.run([scontrol, *words, job], check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603 (fixed words)
    return done.stdout if done.returncode == 0 else None


def ignore_sigterm(worker_id: int) -> None:
    """For loader processes: a SIGTERM to the whole group is for the trainer, which saves its step and then ends them.

    One from the trainer itself still ends them: Python sends it at its end to those that are left, and waits for them without limit. Where
    the system does not tell who sent a signal (not Linux), all are heard.

    Args:
        worker_id: of torch's loader, which calls this in each of its processes.
    """
    if sys.platform != "linux":
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # left pending, for the thread to take
    threading.Thread(target=_end_with, args=(os.getppid(),), name=f"signals-{worker_id}", daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler does


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
