"""Towers whose weights, gradients and optimiser states are divided between processes (FSDP2), for those that one accelerator cannot hold.

``--trainer.strategy fsdp2`` takes the place of ``ddp``. Blocks of a tower (:func:`medvl.training.stages.layer_stacks`) are gathered one at
a time, the rest of a tower at once; what is small (similarity, objective, terms, null image) every process holds whole, and its gradients
are averaged before the step. Checkpoints and the saved model hold whole weights, as those of any other strategy do. Batch statistics are
those of each process, and the saved ones those of the first, as under DDP. A resumed run equals the undisturbed one but for rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from medvl.training.stages import layer_stacks


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 with all processes as one group, and whole checkpoints in our format.

    Args:
        process_group_backend: None: by the device.
        timeout: of collective operations.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta | None = None) -> None:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend, **options)

    def setup_environment(self) -> None:
        """Make one group of all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        # the features of a tower are views, and nothing here writes into them
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        warnings.filterwarnings("ignore", message="(`_get_pg_default_device`|Multiple backends are registered)")
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read with ``weights_only=True``, whatever the caller asked."""
        return super().load_checkpoint(checkpoint_path, weights_only=True)


StrategyRegistry.register("fsdp2", ShardedStrategy, description="weights, gradients and optimiser states sharded (FSDP2)")


def shard(towers: Sequence[nn.Module], others: Iterable[nn.Parameter], mesh: DeviceMesh, device: torch.device) -> None:
    """Divide the weights of the towers between the processes of ``mesh``; before, all take those of the first, as they do of ``others``."""
    from torch.distributed.fsdp import fully_shard

    for tower in towers:
        tower.to(device)
        for tensor in (*tower.parameters(), *tower.buffers()):
            dist.broadcast(tensor.detach(), 0)
        for block in [block for stack in layer_stacks(tower) for block in stack]:
            fully_shard(tower.get_submodule(block), mesh=mesh)
        fully_shard(tower, mesh=mesh)
    for parameter in others:
        parameter.data = parameter.data.to(device)
        dist.broadcast(parameter.detach(), 0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over processes the gradients of what each holds whole; a sharded weight has the average already."""
    for parameter in parameters:
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def apart(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The sharded parameters, and those that each process holds whole, without empty lists: what works on both at once is refused."""
    given = list(parameters)
    groups = [[p for p in given if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
    return [group for group in groups if group]


def clip_norm(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clip the gradients by their norm over all parameters, sharded or not."""
    groups = apart(p for p in parameters if p.grad is not None)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    if norms:
        total = torch.stack(norms).norm()
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, limit, total)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a sharded one the whole; then all processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
