"""``medvl fit --dry-run``: what a run would cost, from its recipe, one batch at a time and no file written."""

from __future__ import annotations

import statistics
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import nn

from medvl.training.data import StudyDataModule
from medvl.training.module import AlignmentModule
from medvl.training.watch import memory_mb

WARM_UP, MEASURED = 2, 3
"""Steps before and while the clock runs."""


class _Clock(Callback):
    """Seconds of each step, with its share of waiting for data."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.last = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now


def parameters(module: AlignmentModule) -> dict[str, tuple[int, int]]:
    """Part -> weights, and those of them that are trained."""
    names = ("image", "report", "similarity", "loss", "terms")
    parts: dict[str, nn.Module] = {name: getattr(module, name) for name in names}
    found = {name: list(part.parameters()) for name, part in parts.items()}
    return {name: (sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)) for name, own in found.items() if own}


def estimate(module: AlignmentModule, data: StudyDataModule, trainer: L.Trainer) -> dict[str, str]:
    """Take a few steps, and say what the whole run would take.

    Weights are moved by these steps, so the module is of no use for a fit afterwards.

    Args:
        trainer: as the recipe made it; its precision, device and lengths are used, it does not run itself.
    Raises:
        ValueError: as a fit would.
    """
    per_epoch, world = data.batches_per_epoch(trainer.world_size), trainer.world_size
    data.keep_batches(WARM_UP + MEASURED)
    data.batches_per_epoch()  # raises where nothing of it could be read
    clock = _Clock()
    before = memory_mb(trainer.strategy.root_device)
    probe = L.Trainer(
        max_steps=WARM_UP + MEASURED,
        max_epochs=-1,
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,
        gradient_clip_val=trainer.gradient_clip_val,
        callbacks=[clock],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
    )
    probe.fit(module, datamodule=data)
    seen = module.observed
    assert seen is not None
    total = trainer.max_steps if trainer.max_steps > 0 else per_epoch * (trainer.max_epochs or 1)
    step = statistics.median(clock.steps[WARM_UP:])
    trained = sum(count for _, count in parameters(module).values())
    images = seen.batch.images
    shapes = [tuple(part.pixels.shape) for part in (images, images.others) if part is not None]
    return {
        "batch under the loss": f"{data.batch_size * world} items of {world} {'process' if world == 1 else 'processes'}",
        "encoded at once": str(module.micro_batch or data.batch_size),
        "pixels": " and ".join(" x ".join(map(str, shape)) for shape in shapes),
        "texts of a batch": str(len(seen.batch.texts.texts)),
        "positives of an item": f"{len(seen.pairs.positive) / max(1, seen.pairs.shape[0]):.1f}",
        "steps an epoch": str(per_epoch),
        "steps in all": str(total),
        "weights, gradients, optimiser": f"{(sum(n for n, _ in parameters(module).values()) + 3 * trained) * 4 / 2**20:.1f} MiB",
        "peak memory": f"{memory_mb(module.device):.0f} MiB measured, {before:.0f} before the first step",
        "seconds a step": f"{step:.3g} (median of {MEASURED} after {WARM_UP})",
        "training time": _duration(step * total),
        "left out": f"{len(data.skipped())} so far; a fit reads every image first and lists what it leaves out",
    }


def show(module: AlignmentModule, told: dict[str, str], console: Console) -> None:
    """Two tables."""
    table = Table("part", "weights", "trained")
    for name, (count, trained) in parameters(module).items():
        table.add_row(name, f"{count:,}", f"{trained:,}")
    console.print(table)
    table = Table(show_header=False)
    for name, value in told.items():
        table.add_row(name, value)
    console.print(table)
    console.print("Nothing was written.")


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"about {hours} h {rest // 60} min" if hours else f"about {rest // 60} min {rest % 60} s"
