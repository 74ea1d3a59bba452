"""Training in stages: which parts are frozen from which epoch or step on, and learning rates that fall with the depth of a layer.

Names of parameters are those of :class:`medvl.training.module.AlignmentModule`: they begin with the part, ``image``, ``report`` or
``similarity``. A pattern is such a name, the name of a module, which stands for all that is in it, or has wildcards as file names have
them (``image.backbone.*``, ``*.norm?.weight``); letter case counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

log = logging.getLogger(__name__)

LAST = ("proj", "text_projection")
"""Parameters that open_clip's towers own directly, and so register first, though they are used last."""


@dataclass(frozen=True)
class Stage:
    """From when on what is trained.

    Without ``train`` and ``freeze`` all is trained that the recipe does not lock: a part that is ``locked``, or a tower with
    ``freeze: true``, is no stage's to train.
    """

    epoch: int | None = None  # first epoch of the stage, from 0; give this or ``step``
    step: int | None = None  # number of optimiser steps taken before the first of the stage
    train: list[str] = field(default_factory=list)  # patterns of what is trained; empty: all
    freeze: list[str] = field(default_factory=list)  # patterns of what is not, of that
    rate: float = 1.0  # factor on the learning rate that the schedule gives


class Stages(Callback):
    """Freeze and unfreeze parts of the model as training goes on.

    The stage is a function of the trainer's epoch and step alone, so a resumed run is in the right one. A frozen parameter gets no
    gradient, no step and no weight decay; Adam's moments of one that is unfrozen later begin there. The optimiser holds all that any
    stage may train from the start. A module whose parameters are all frozen is in evaluation mode, with all in it: its dropout is off and
    its batch statistics stay.

    Across processes DDP must look for parameters without gradients: ``trainer.strategy: ddp_find_unused_parameters_true``.

    Args:
        stages: in their order, the first from epoch or step 0. The stage in force is the last that has begun.
    Raises:
        ValueError: no stage, one that names no beginning or two, beginnings out of order, or a rate below 0.
    """

    def __init__(self, stages: list[Stage]) -> None:
        _check(stages)
        self.stages = list(stages)
        self._current: int | None = None
        self._trainable: list[str] = []  # names, for a strategy may put other parameters in the place of those that were there at first
        self._evaluated: list[nn.Module] = []  # modules that were in training mode and that this callback put into evaluation mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note what the recipe trains, and see that every pattern names some of it.

        Raises:
            ValueError: a pattern that names nothing, or nothing that the recipe trains; a stage that trains nothing; DDP that does not
                look for parameters without gradients.
        """
        if stage != "fit":
            return
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ValueError("stages freeze parameters that DDP waits for: set trainer.strategy to ddp_find_unused_parameters_true")
        named = dict(pl_module.named_parameters())
        self._trainable = [name for name, p in named.items() if p.requires_grad]
        for i, one in enumerate(self.stages):
            for pattern in (*one.train, *one.freeze):
                check_pattern(pattern, named, self._trainable)
            if not trained_names(one, self._trainable):
                raise ValueError(f"stage {i}: nothing is left to train; name less in freeze, or more in train")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Enter the stage that the trainer is in, also where it has just been resumed."""
        self._enter(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter the next stage if its time has come; keep frozen modules in evaluation mode; scale the learning rate."""
        self._enter(trainer, pl_module)
        for module in self._evaluated:
            module.training = False
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate * self.stages[self._current or 0].rate

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as the recipe made it."""
        if stage == "fit":
            self._release(pl_module)
            self._current = None

    def _enter(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = stage_at(self.stages, trainer.current_epoch, trainer.global_step)
        if now == self._current:
            return
        self._release(pl_module)
        self._current = now
        trained = trained_names(self.stages[now], self._trainable)
        trainable = self._of(pl_module)
        for name, parameter in trainable.items():
            parameter.requires_grad_(name in trained)
            if name not in trained:
                parameter.grad = None
        self._evaluated = [one for module in frozen_modules(pl_module) for one in module.modules() if one.training]
        for module in self._evaluated:
            module.training = False
        weights = sum(trainable[name].numel() for name in trained)
        log.info("stage %d of %d: %d of %d weights train", now + 1, len(self.stages), weights, _count(trainable.values()))

    def _of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        named = dict(module.named_parameters())
        return {name: named[name] for name in self._trainable}

    def _release(self, module: nn.Module) -> None:
        for parameter in self._of(module).values():
            parameter.requires_grad_(True)
        for module in self._evaluated:
            module.training = True
        self._evaluated = []


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _check(stages: Sequence[Stage]) -> None:
    if not stages:
        raise ValueError("stages is empty; give at least one, or leave the callback out")
    for i, one in enumerate(stages):
        given = [value for value in (one.epoch, one.step) if value is not None]
        if len(given) != 1 or given[0] < 0:
            raise ValueError(f"stage {i}: expected epoch or step, one of the two and 0 or more, got epoch {one.epoch}, step {one.step}")
        if one.rate < 0:
            raise ValueError(f"stage {i}: rate is {one.rate}, expected 0 or more")
    if (stages[0].epoch, stages[0].step) not in ((0, None), (None, 0)):
        raise ValueError(f"the first stage begins at epoch {stages[0].epoch}, step {stages[0].step}; expected epoch 0 or step 0")
    for unit in ("epoch", "step"):
        begins = [value for one in stages if (value := getattr(one, unit)) is not None]
        if any(later <= earlier for earlier, later in pairwise(begins)):
            raise ValueError(f"stages begin at {unit} {begins}; expected each later than the one before")


def stage_at(stages: Sequence[Stage], epoch: int, step: int) -> int:
    """Index of the last of the stages that has begun at this epoch and step."""
    begun = [i for i, one in enumerate(stages) if (epoch >= one.epoch if one.epoch is not None else step >= (one.step or 0))]
    return begun[-1]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter; see the module."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def trained_names(stage: Stage, names: Iterable[str]) -> set[str]:
    """Those of the names that a stage trains."""
    wanted = [name for name in names if not stage.train or any(matches(name, pattern) for pattern in stage.train)]
    return {name for name in wanted if not any(matches(name, pattern) for pattern in stage.freeze)}


def check_pattern(pattern: str, names: Iterable[str], trainable: Iterable[str]) -> None:
    """Refuse a pattern that would do nothing.

    Raises:
        ValueError: it matches no parameter, or none that the recipe trains.
    """
    names = list(names)
    if not any(matches(name, pattern) for name in names):
        near = [name for name in names if name.startswith(pattern.split(".")[0].strip("*"))][:3] or names[:3]
        raise ValueError(f"stages: {pattern!r} names no parameter; names are such as {', '.join(near)}")
    if not any(matches(name, pattern) for name in trainable):
        raise ValueError(
            f"stages: all that {pattern!r} names is frozen by the recipe, so that no stage can train it; leave it out of model.locked, and "
            "of its tower freeze: true"
        )


def frozen_modules(module: nn.Module) -> list[nn.Module]:
    """The largest modules inside ``module`` that have parameters of which none requires a gradient."""
    found: list[nn.Module] = []
    for child in module.children():
        own = list(child.parameters())
        if own and not any(p.requires_grad for p in own):
            found.append(child)
        else:
            found.extend(frozen_modules(child))
    return found


def layer_stacks(module: nn.Module, prefix: str = "") -> list[list[str]]:
    """Names of the repeated blocks of a tower: of each stack of them, in the order in which they are registered.

    A stack is an ``nn.ModuleList`` or ``nn.Sequential`` of two or more modules, all of one class, which has modules of its own (so lists
    of bare layers are none). It is not looked for inside of a block, so the blocks of a hierarchical tower (Swin, ConvNeXt) are its
    stages.
    """
    stacks: list[list[str]] = []
    for name, child in module.named_children():
        blocks = list(child.children())
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(blocks) > 1 and _alike(blocks):
            stacks.append([f"{prefix}{name}.{place}" for place, _ in child.named_children()])
        else:
            stacks.extend(layer_stacks(child, f"{prefix}{name}."))
    return stacks


def _alike(blocks: Sequence[nn.Module]) -> bool:
    return all(type(one) is type(blocks[0]) and any(True for _ in one.children()) for one in blocks)


def layer_rates(module: nn.Module, decay: float) -> dict[str, float]:
    """Factor on the learning rate of every parameter of a tower, by its depth.

    With L blocks in all stacks of :func:`layer_stacks`, the block l = 1 .. L has depth l, what is registered before the first block
    (patch embedding, positions) depth 0, between two stacks that of the block before, and after the last (norm, pooling, projection)
    depth L + 1:
        factor = decay ** (L + 1 - depth)
    A parameter is taken to be used where it is registered, which holds for timm, transformers and our towers, and for open_clip's but for
    ``LAST``, which have depth L + 1. A tower without stacks has the factor 1 everywhere.

    Args:
        module: the tower.
        decay: in (0, 1].
    Raises:
        ValueError: a decay outside it.
    Source: layer-wise learning-rate decay of "ELECTRA", arXiv:2003.10555, for ViTs "BEiT", arXiv:2106.08254.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay is {decay}, expected above 0 and at most 1")
    places = {name: depth for depth, name in enumerate((block for stack in layer_stacks(module) for block in stack), 1)}
    last, depth = len(places) + 1, 0
    depths: dict[str, int] = {}
    for name, _ in module.named_parameters():
        block = next((place for place in places if name.startswith(f"{place}.")), None)
        if block is not None:
            depth = places[block]
            depths[name] = depth
        else:
            depths[name] = last if depth == last - 1 or name.rpartition(".")[2] in LAST else depth
    return {name: decay ** (last - found) if places else 1.0 for name, found in depths.items()}


def layer_decay_groups(
    module: nn.Module, decay: float, learning_rate: float, weight_decay: float, towers: Sequence[str] = ("image", "report")
) -> list[dict[str, Any]]:
    """Groups of all parameters of ``module`` that require a gradient, for an optimiser: rates by depth, weight decay on matrices only.

    Args:
        module: holds the towers and what is beside them, whose factor is 1.
        decay: see :func:`layer_rates`, of each tower by itself.
        learning_rate: of what has the factor 1.
        weight_decay: of parameters of two and more dimensions; others have none.
        towers: names of children of ``module``.
    Returns:
        ``params``, ``lr`` and ``weight_decay`` of each group, the deepest layers, whose rate is highest, last. Each parameter is in one.
    """
    factors = {f"{tower}.{name}": rate for tower in towers for name, rate in layer_rates(getattr(module, tower), decay).items()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (factors.get(name, 1.0), weight_decay if parameter.ndim > 1 else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": learning_rate * rate, "weight_decay": wd} for (rate, wd), params in sorted(groups.items(), key=_order)]


def _order(group: tuple[tuple[float, float], list[nn.Parameter]]) -> tuple[float, float]:
    return group[0]
