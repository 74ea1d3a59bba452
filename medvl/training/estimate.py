"""``medvl fit --dry-run``: what a run would cost, from its recipe and a few steps, with no file of a run written.

Memory is in MiB. A step is one of the optimiser: of as many batches as the trainer accumulates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import BaseFinetuning, Callback, WeightAveraging
from rich.console import Console
from rich.table import Table
from torch import Tensor

from medvl.training.data import StudyDataModule
from medvl.training.module import AlignmentModule, Observed
from medvl.training.stages import Stages
from medvl.training.watch import memory_mb

WARM_UP, MEASURED = 3, 3
"""Batches before and while the clock runs; the latter are the former once more, so that caches are as in all epochs but the first."""

RUN = (Stages, WeightAveraging, BaseFinetuning)
"""Callbacks that change what a step takes, by what they freeze or hold, and write nothing."""

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Part:
    """Weights of one part of what is trained; one that two parts share counts in the first."""

    weights: int
    trained: int


@dataclass(frozen=True)
class Cost:
    """What a run takes."""

    parts: dict[str, Part]
    processes: int
    loss_batch: int  # items under one loss, of all processes
    step_batch: int  # items of a step
    encoded: int  # items that a process encodes at once
    pixels: tuple[tuple[int, ...], ...]  # shape of each kind of image of a batch
    texts: int  # of a batch
    positives: float  # of an item
    epoch_steps: int
    steps: int | None  # None: the run has no end of its own
    seconds: float  # of a step
    waiting: float  # share of them, for the loader
    weights_mb: float  # with buffers
    gradients_mb: float
    optimiser_mb: float
    rest_mb: float  # activations and whatever else a batch took at its peak
    peak_mb: float  # measured, of the accelerator or else of the process with all its libraries
    left_out: int  # rows and images left out so far
    not_counted: tuple[str, ...] = ()  # what of the recipe no step was taken with

    @property
    def total_mb(self) -> float:
        """Weights, gradients, state of the optimiser, activations."""
        return self.weights_mb + self.gradients_mb + self.optimiser_mb + self.rest_mb


class _Clock(Callback):
    """Seconds of each batch and those of them spent waiting for it, and what the last one was."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.waits: list[float] = []
        self.seen: Observed | None = None
        self.trained: set[str] = set()
        self.last = self.ready = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = _now(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.ready = _now(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, AlignmentModule)
        now = _now(pl_module)
        self.batches.append(now - self.last)
        self.waits.append(self.ready - self.last)
        self.seen, pl_module.observed = pl_module.observed, None
        if trainer.global_step < WARM_UP + MEASURED:
            self.seen = None  # its images are not held through the next step
        self.trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        self.last = _now(pl_module)


def _now(module: L.LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def parameters(module: AlignmentModule, trained: Container[str]) -> dict[str, Part]:
    """Part -> its weights, and those of them that are ``trained``."""
    counts: dict[str, list[int]] = {}
    for name, weight in module.named_parameters():
        found = counts.setdefault(name.split(".", 1)[0], [0, 0])
        found[0] += weight.numel()
        found[1] += weight.numel() if name in trained else 0
    return {name: Part(*found) for name, found in counts.items()}


def planned(data: StudyDataModule, trainer: L.Trainer) -> tuple[int, int | None]:
    """Steps of an epoch and of the whole run, as a fit would take them; None where neither epochs nor steps end it.

    Raises:
        ValueError: no usable training image.
    """
    batches, limit = data.batches_per_epoch(trainer.world_size), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = -(-batches // trainer.accumulate_grad_batches)
    epochs = trainer.max_epochs
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if epochs is not None and epochs >= 0:
        ends.append(epochs * steps)
    return steps, min(ends, default=None)


def estimate(module: AlignmentModule, data: StudyDataModule, trainer: L.Trainer, callbacks: Sequence[Callback] = ()) -> Cost:
    """Take a few steps in one process, and say what the whole run would take.

    Weights are moved by these steps, and the data cut to them, so neither is of use for a fit afterwards.

    Args:
        trainer: as the recipe made it; its precision, device and lengths are used, it does not run itself.
        callbacks: of the recipe. Those run that change what a step takes (``RUN``); the others are named in ``not_counted``, as are stages
            after the first, which alone is measured.
    Raises:
        ValueError, FileNotFoundError, ...: what a fit would raise.
    """
    epoch_steps, steps = planned(data, trainer)
    module.take_start()
    data.keep_batches(WARM_UP)
    data.batches_per_epoch()  # raises where nothing of it could be read
    module.report.precompute([text for found in data.sets["train"].texts for text in found])
    device, clock = trainer.strategy.root_device, _Clock()
    _restart_peak(device)
    before = _peak_mb(device)
    probe = _probe(trainer, [*(one for one in callbacks if isinstance(one, RUN)), clock])
    probe.fit(module, datamodule=data)
    seen = clock.seen
    assert seen is not None
    peak = _peak_mb(device)
    weights = _mb([*module.parameters(), *module.buffers()])
    gradients = _mb([p for name, p in module.named_parameters() if name in clock.trained])
    optimiser = _mb(
        [value for one in probe.optimizers for state in one.state.values() for value in state.values() if torch.is_tensor(value)]
    )
    known = gradients + optimiser + (weights if device.type == "cuda" else 0.0)  # of a process, weights were there before
    batch, waits = (statistics.median(times[WARM_UP:]) for times in (clock.batches, clock.waits))
    images = seen.batch.images
    return Cost(
        parts=parameters(module, clock.trained),
        processes=trainer.world_size,
        loss_batch=data.batch_size * trainer.world_size,
        step_batch=data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        encoded=min(module.micro_batch or data.batch_size, data.batch_size),
        pixels=tuple(tuple(part.pixels.shape) for part in (images, images.others) if part is not None),
        texts=len(seen.batch.texts.texts),
        positives=len(seen.pairs.positive) / max(1, seen.pairs.shape[0]),
        epoch_steps=epoch_steps,
        steps=steps,
        seconds=batch * trainer.accumulate_grad_batches,
        waiting=waits / batch,
        weights_mb=weights,
        gradients_mb=gradients,
        optimiser_mb=optimiser,
        rest_mb=max(0.0, peak - before - known),
        peak_mb=peak,
        left_out=len(data.skipped()),
        not_counted=_not_counted(callbacks),
    )


def _probe(trainer: L.Trainer, callbacks: list[Callback]) -> L.Trainer:
    """A trainer of a few steps on one device, that writes nothing, whoever started this process."""
    device = trainer.strategy.root_device
    return L.Trainer(
        max_steps=WARM_UP + MEASURED,
        max_epochs=-1,
        accelerator=trainer.accelerator,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        num_nodes=1,
        plugins=[LightningEnvironment()],
        precision=trainer.precision,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        callbacks=callbacks,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
    )


def _not_counted(callbacks: Sequence[Callback]) -> tuple[str, ...]:
    later = sum(len(one.stages) - 1 for one in callbacks if isinstance(one, Stages))
    found = [f"{later} stage{'s' if later > 1 else ''} after the first, which may take more"] if later else []
    if any(isinstance(one, BaseFinetuning) for one in callbacks):
        found.append("what is unfrozen in later epochs")
    if names := [type(one).__name__ for one in callbacks if not isinstance(one, RUN)]:
        found.append(f"callbacks that were not run: {', '.join(names)}")
    return tuple(found)


def _restart_peak(device: torch.device) -> None:
    """Forget what was in use before, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            CLEAR.write_text("5")  # proc(5): the peak of the resident set starts anew


def _peak_mb(device: torch.device) -> float:
    """The most memory in use since then: of the accelerator, or of this process; where it cannot start anew, since its start."""
    if device.type != "cuda" and CLEAR.exists():
        lines = STATUS.read_text().splitlines()
        return next(float(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:"))
    return memory_mb(device)


def _mb(tensors: list[Tensor]) -> float:
    return sum(one.numel() * one.element_size() for one in tensors) / 2**20


def show(cost: Cost, console: Console) -> None:
    """Two tables: weights of each part, and what a run takes."""
    parts = Table("part", "weights", "trained")
    for name, part in cost.parts.items():
        parts.add_row(name, f"{part.weights:,}", f"{part.trained:,}")
    parts.add_section()
    parts.add_row("all", f"{sum(p.weights for p in cost.parts.values()):,}", f"{sum(p.trained for p in cost.parts.values()):,}")
    console.print(parts)
    steps, one = cost.steps, cost.processes == 1
    rows = {
        "processes": str(cost.processes),
        "items under one loss": str(cost.loss_batch),
        "items of a step": str(cost.step_batch),
        "encoded at once": str(cost.encoded),
        "pixels": " and ".join(" x ".join(map(str, shape)) for shape in cost.pixels),
        "texts of a batch": f"{cost.texts}" + ("" if one else " of one process"),
        "positives of an item": f"{cost.positives:.1f}",
        "steps an epoch": str(cost.epoch_steps),
        "steps in all": "no end: neither trainer.max_epochs nor trainer.max_steps is set" if steps is None else str(steps),
        "memory": f"{cost.total_mb:.1f} MiB" + ("" if one else ", of each process at least"),
        "  weights": f"{cost.weights_mb:.1f} MiB",
        "  gradients": f"{cost.gradients_mb:.1f} MiB",
        "  optimiser": f"{cost.optimiser_mb:.1f} MiB",
        "  activations and the rest": f"{cost.rest_mb:.1f} MiB",
        "peak measured": f"{cost.peak_mb:.0f} MiB, libraries and kept images included",
        "seconds a step": f"{cost.seconds:.3g} (median of {MEASURED} batches after {WARM_UP}), {cost.waiting:.0%} of it for the loader",
        "training time": "without end" if steps is None else _duration(cost.seconds * steps),
        "not counted": "; ".join(["reading, validation, checkpoints", *cost.not_counted]),
        "left out": f"{cost.left_out} so far; a fit reads every image first and lists what it leaves out",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"about {hours} h {rest // 60} min" if hours else f"about {rest // 60} min {rest % 60} s"
