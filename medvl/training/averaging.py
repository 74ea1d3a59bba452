"""Averages of weights over training: what validation measures and the run keeps is the average, not the last step.

Source: W. Polyak and B. Juditsky 1992, doi:10.1137/0330046; for vision models "Mean teachers", arXiv:1703.01780.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from medvl.training.sharding import ShardedStrategy


class Ema(WeightAveraging):
    """Exponential moving average of all weights. With theta_n those after the n-th update that counts:
        e_1 = theta_1,   e_n = e_{n-1} + (1 - d_n) (theta_n - e_{n-1}),   d_n = decay, or min(decay, n / (9 + n)) with ``warmup``

    Floating-point buffers (batch statistics) are averaged likewise, others copied. From the start of a validation to the next training
    step the module has the averaged weights, so that whatever runs at a validation's end measures and saves these; they are the module's
    when training has ended, too. A checkpoint holds both, and a resumed run goes on with both exactly.

    Models that a strategy shards between processes (FSDP) have no such average: each process must hold all weights.

    Departures from Lightning's callback: before the first update nothing is exchanged (there an average that has not begun is the initial
    weights), whole numbers are never averaged, weights that do not move keep every bit, and the average stays in place until callbacks
    at the end of a validation have run.

    Args:
        decay: of the average, in [0, 1): 0.999 averages over about the last 1000 steps.
        warmup: begin with a smaller decay, so that the first steps are forgotten soon; for runs of few thousand steps.
        start_step: optimiser steps that are left out at the beginning.
    Raises:
        ValueError: a decay outside [0, 1), or a negative step.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = False, start_step: int = 0) -> None:
        if not 0 <= decay < 1 or start_step < 0:
            raise ValueError(f"ema: decay lies in [0, 1) and start_step is 0 or more, got {decay} and {start_step}")
        self.decay, self.warmup, self.start_step = decay, warmup, start_step

        def average(mean: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            return ema_update(mean, current, ema_decay(int(updates) + 1, decay, warmup))

        super().__init__(use_buffers=True, avg_fn=average)
        self._exchanged = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the average.

        Raises:
            ValueError: under the strategy ``fsdp2``.
        """
        if isinstance(trainer.strategy, ShardedStrategy):
            raise ValueError("ema needs all weights in each process, and fsdp2 divides them: set trainer.strategy to ddp, or leave Ema out")
        with warnings.catch_warnings():  # of a model that may be divided, which was just seen not to be
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")
            super().setup(trainer, pl_module, stage)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimiser step from ``start_step`` on."""
        return step_idx is not None and step_idx >= self.start_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the average to where the module has been moved since."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on with the weights that are trained."""
        self._back(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module the averaged weights."""
        if self._begun() and not self._exchanged:
            self._swap_models(pl_module)
            self._exchanged = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the averaged weights stay for the callbacks that follow."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module back the weights that are trained."""
        self._back(pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the module with the averaged weights."""
        self._back(pl_module)
        if self._begun():
            super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put both into the checkpoint, whose ``state_dict`` is the average."""
        self._back(pl_module)  # what the checkpoint holds already are the module's own tensors, which this changes in place
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def _begun(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def _back(self, pl_module: L.LightningModule) -> None:
        if self._exchanged:
            self._swap_models(pl_module)
            self._exchanged = False


def ema_decay(update: int, decay: float, warmup: bool) -> float:
    """The decay of the n-th update, n from 1; with ``warmup`` at most n / (9 + n), that is 0.1 at first and 0.9 at the 81st."""
    return min(decay, update / (9 + update)) if warmup else decay


def ema_update(mean: Tensor, current: Tensor, decay: float) -> Tensor:
    """The new mean, mean + (1 - decay) (current - mean): the old one, to the bit, if both are equal; of whole numbers the current ones."""
    return torch.lerp(mean, current.to(mean.dtype), 1 - decay) if mean.is_floating_point() else current
