"""A work in parts, over the processes of Lightning's ``Trainer.predict``: any accelerator, devices, nodes and strategy that it takes.

Each process goes through its own parts, which no other has: nothing is padded to equal lengths, so that nothing is done twice. Towers run
by themselves in each; nothing is exchanged but at the start and at the end of a work.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import lightning as L
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

Part = TypeVar("Part")
Result = TypeVar("Result")
PATIENCE = timedelta(days=1)
"""How long processes that are done wait for those that are not; half an hour, as is usual in training, may be one part of a slow one."""


@dataclass(frozen=True)
class Rank:
    """Which of the processes this is."""

    number: int
    world: int
    _trainer: L.Trainer

    def of_first(self, make: Callable[[], Result]) -> Result:
        """What the first process makes, for all; all have to ask for it."""
        return cast(Result, self._trainer.strategy.broadcast(make() if self.number == 0 else None))


class Ranks:
    """Processes that share a work out. Where there are several, each of them runs the same program up to :meth:`run`.

    Args:
        model: is brought to the device of each process while it works.
        accelerator: as Lightning's ``Trainer`` takes it, and so are the others.
        devices: of each node.
        num_nodes: how many machines.
        strategy: how processes are started and joined; several are joined by "ddp" unless told.
    Raises:
        ValueError: what is not there, or not known to Lightning.
    """

    def __init__(
        self, model: nn.Module, *, accelerator: str = "auto", devices: str | int = "auto", num_nodes: int = 1, strategy: str = "auto"
    ) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # tips and lists of devices

        def trainer(strategy: Any) -> L.Trainer:
            return L.Trainer(
                accelerator=accelerator,
                devices=devices,
                num_nodes=num_nodes,
                strategy=strategy,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,  # each process has parts of its own
            )

        self._model = model
        try:
            self._trainer = trainer(strategy)
            if type(self._trainer.strategy) is DDPStrategy:
                self._trainer = trainer(DDPStrategy(timeout=PATIENCE))
        except (MisconfigurationException, ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"--accelerator {accelerator} --devices {devices} --strategy {strategy}: {error}") from error

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return bool(self._trainer.is_global_zero)

    @property
    def world(self) -> int:
        """How many there are."""
        return int(self._trainer.world_size)

    def run(self, parts: Callable[[Rank], Iterable[Part]], do: Callable[[Part], Result]) -> list[Result]:
        """Do all parts.

        Args:
            parts: called once in each process, together with the others; gives its parts, the next while one is being done.
            do: of one part.
        Returns:
            What ``do`` gave, of all processes, in each of them: those of the first, then those of the second, and so on.
        """
        work: _Work[Part, Result] = _Work(self._model, parts, do)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # of torch, to Lightning
            self._trainer.predict(work, return_predictions=False)
        return work.results


class _Stream(Generic[Part]):
    """Parts, as the trainer goes through them; how many is not known."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)


class _Work(L.LightningModule, Generic[Part, Result]):
    def __init__(self, model: nn.Module, parts: Callable[[Rank], Iterable[Part]], do: Callable[[Part], Result]) -> None:
        super().__init__()
        self.model = model
        self._parts, self._do = parts, do
        self.results: list[Result] = []

    def predict_dataloader(self) -> _Stream[Part]:
        """The parts of this process."""
        return _Stream(self._parts(Rank(self.trainer.global_rank, self.trainer.world_size, self.trainer)))

    def transfer_batch_to_device(self, batch: Part, device: Any, dataloader_idx: int) -> Part:
        """A part stays as it is: whoever works on it brings to the device what belongs there."""
        return batch

    def predict_step(self, batch: Part, *args: Any, **kwargs: Any) -> Result:
        """Do one part."""
        self.results.append(self._do(batch))
        return self.results[-1]

    def on_predict_end(self) -> None:
        """Tell all what each has done."""
        if dist.is_available() and dist.is_initialized() and self.trainer.world_size > 1:
            found: list[list[Result]] = [[] for _ in range(self.trainer.world_size)]
            dist.all_gather_object(found, self.results)
            self.results = [one for part in found for one in part]
