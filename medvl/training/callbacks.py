"""What a run leaves on disk: a checkpoint to resume from, and the model that validation chose, as safetensors."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from medvl.data.studies import Skipped
from medvl.files import write_atomically
from medvl.model import commit
from medvl.training.averaging import Ema
from medvl.training.data import REJECTED, StudyDataModule
from medvl.training.module import AlignmentModule
from medvl.training.sharding import whole
from medvl.training.signals import RESUME, ended_inside, ends_step, validates_next

log = logging.getLogger(__name__)

RESOLVED = "config.yaml"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, whole or not at all, and never unpickled: tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        """Write beside the target, flush to disk, rename."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), buffer.getvalue())

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read with ``weights_only=True``, whatever the caller asked."""
        return torch.load(path, map_location=map_location, weights_only=True)


class ResumePoint(Callback):
    """Write ``resume.ckpt`` every so many steps and at the end of each epoch, there after validation and what :class:`KeepBest` made of it.

    Args:
        folder: the run's folder.
        every_n_steps: steps between two checkpoints.
    """

    def __init__(self, folder: Path, every_n_steps: int = 200) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, expected at least 1")
        self.path, self.every_n_steps = folder / RESUME, every_n_steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where the step count says so; not before a validation that is due, which a resumed run would skip, and not within a step."""
        if self._is_due(trainer) and ends_step(trainer, batch_idx) and not trainer.is_last_batch and not validates_next(trainer, batch_idx):
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation inside of an epoch, if the step before it was to be saved."""
        if ended_inside(trainer) and self._is_due(trainer):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save at the end of the epoch."""
        trainer.save_checkpoint(self.path)

    def _is_due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step > 0 and trainer.global_step % self.every_n_steps == 0


class ListUnread(Callback):
    """List in ``rejected.csv`` the images that could be read before the first step, and no longer when their turn came.

    Their items are left out of the loss of that batch; when they come again they are tried again.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """List again what the processes agreed to leave out."""
        if trainer.world_size > 1 and trainer.is_global_zero:
            trainer.datamodule.write_skipped(self.folder)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """List those of all processes."""
        assert isinstance(pl_module, AlignmentModule)
        found = [batch.unread]
        if pl_module.unread_somewhere and batch.share is not None:
            found = [()] * trainer.world_size
            dist.all_gather_object(found, batch.unread)
        self._list(trainer, [one for part in found for one in part])

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """List those of this process, which validates all."""
        self._list(trainer, batch.unread)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """List those of this process, which tests all."""
        self._list(trainer, batch.unread)

    def _list(self, trainer: L.Trainer, unread: Sequence[Skipped]) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        new = [one for one in unread if one.path not in data.unread]
        if not new or not trainer.is_global_zero:
            return
        data.unread.update((one.path, one) for one in new)
        data.write_skipped(self.folder)
        for one in new:
            log.warning("left out at step %d, see %s: row %d, %s", trainer.global_step, REJECTED, one.row, one.reason)


class KeepBest(Callback):
    """Write the model whenever what is monitored is the best so far; without validation, the last one.

    Args:
        folder: the run's folder; gets ``model.safetensors`` and ``config.json``.
        monitor: logged value to choose by.
        best: False writes the last model whatever validation says.
        mode: whether the best value is the lowest (``min``) or the highest (``max``).
    """

    def __init__(self, folder: Path, monitor: str = "val/loss", best: bool = True, mode: Literal["min", "max"] = "min") -> None:
        self.folder, self.monitor, self.best, self.mode = folder, monitor, best, mode
        self.lowest: float | None = None
        self._wrote = self._missed = False

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, for a resumed run; of a value to be high, less than nothing."""
        return {"lowest": self.lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best value so far."""
        self.lowest = state_dict["lowest"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare, and write if better."""
        if trainer.sanity_checking or not self.best:
            return
        if self.monitor not in trainer.callback_metrics:
            self._say_missing(trainer)
            return
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):  # nothing is better than that, nor worse
            log.warning("%s is not a number at step %d: the model is not kept", self.monitor, trainer.global_step)
            return
        cost = value if self.mode == "min" else -value
        if self.lowest is None or cost < self.lowest:
            self.lowest = cost
            self._write(trainer, pl_module, chosen_by=self.monitor, value=value)

    def _say_missing(self, trainer: L.Trainer) -> None:
        if self._missed or not trainer.is_global_zero:
            return
        self._missed = True
        logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
        log.warning("validation logged no %s to choose the best model by (--monitor), but %s", self.monitor, logged)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without a validated model, write the last."""
        if self.lowest is None:
            self._write(trainer, pl_module, chosen_by="last step", value=None)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without a validated model, write the last of a run that was stopped after its last checkpoint: it has nothing left to train."""
        if self.lowest is None and not self._wrote:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Ema):
                    callback.on_train_end(trainer, pl_module)
            self._write(trainer, pl_module, chosen_by="last step", value=None)

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, chosen_by: str, value: float | None) -> None:
        assert isinstance(pl_module, AlignmentModule)
        self._wrote = True
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, StudyDataModule)
        model = pl_module.dual_encoder(data.reader)
        state = {name: whole(tensor.detach()) for name, tensor in model.state_dict().items()} if pl_module.sharded else None
        if not trainer.is_global_zero:
            return
        model.save(
            self.folder,
            state,
            chosen_by=chosen_by,
            value=value,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            manifest_sha256=None if data.manifest is None else data.manifest.sha256,
            recipe_sha256=_recipe_sha256(self.folder / RESOLVED),
            commit=commit(),
        )


def _recipe_sha256(path: Path) -> str | None:
    """Hash of a resolved recipe without the places of one run: equal for runs that differ in folders and stops alone.

    A cache on disk gives the bits that reading gives, unless it rounds them; then it stays in the recipe, without its folder and size.
    """
    import yaml

    if not path.is_file():
        return None
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in ("out", "resume", "ckpt_path"):
        recipe.pop(name, None)
    data = recipe.get("data", {}).get("init_args", {})
    data.pop("manifest", None)
    if "model" in recipe:
        recipe["model"]["start"] = sorted(recipe["model"].get("start") or {})  # which parts; what they hold ends in the weights
    if isinstance(data.get("cache"), str) and data["cache"] != "memory":
        data["cache"] = False
    elif isinstance(data.get("cache"), dict):
        data["cache"] = {"dtype": "float16"} if data["cache"].get("init_args", {}).get("dtype") == "float16" else False
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
