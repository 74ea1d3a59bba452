"""Measures of the validation studies beside the loss, while a model trains."""

from __future__ import annotations

import abc
import logging

import lightning as L
from lightning.pytorch.callbacks import Callback

from medvl.training.data import StudyDataModule
from medvl.training.module import AlignmentModule

log = logging.getLogger(__name__)


class ValidationMeasure(abc.ABC):
    """Base of what measures a model that trains, such as :class:`tasks.validation.ZeroShot`."""

    @abc.abstractmethod
    def measure(self, module: AlignmentModule, data: StudyDataModule) -> dict[str, tuple[float, int]]:
        """Name -> value and number of studies it is of, on the validation split; what cannot be measured is left out."""


class MeasureValidation(Callback):
    """Log what a measure finds, each under ``val/`` and its name; ``--monitor val/NAME --mode max`` then keeps the best model by it.

    Args:
        measure: what is measured.
        every_n_epochs: how often.
    Raises:
        ValueError: ``every_n_epochs`` below 1.
    """

    def __init__(self, measure: ValidationMeasure, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs is {every_n_epochs}, expected at least 1")
        self.measure, self.every_n_epochs = measure, every_n_epochs

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and log."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, AlignmentModule) and isinstance(data, StudyDataModule)
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        found = self.measure.measure(pl_module, data)
        if not found:
            log.warning("nothing could be measured on the validation split, for want of labels and reports")
        for name, (value, count) in found.items():
            pl_module.log(f"val/{name}", value, batch_size=count, sync_dist=True)
