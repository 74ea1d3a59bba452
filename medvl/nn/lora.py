"""Low-rank adapters in a pretrained model that is kept as it is otherwise, by peft where it can.

Source: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medvl.types import Configurable

MARK = ".lora_"
"""In the name of every weight that peft adds."""

LARGEST_RANK = 1024
"""Beyond it an adapter is no smaller than the layer."""

_FORMS = (
    (".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"),  # peft's, of a layer
    (".0.lora_A", ".0.lora_B", ".original"),  # LowRank, of a weight
)
"""Ends of the names of A, of B and of W."""


class Lora(Configurable):
    """What is added to a model: W x becomes W x + alpha / rank * B A x in each of the named layers, A random, B 0 at the start.

    Args:
        rank: rows of A.
        alpha: what the product is scaled by, times ``rank``; None is twice the rank.
        dropout: of x before A; there is none for ``nn.MultiheadAttention``, of which open_clip's ViTs are made.
        targets: ends of the names of the linear layers, such as ``["q_proj", "v_proj"]``; None takes every linear layer, fused ones
            (``qkv``, ``in_proj``) as a whole.
    Raises:
        ValueError: a rank outside 1 to 1024, or a dropout outside [0, 1).
    """

    def __init__(self, rank: int = 16, alpha: int | None = None, dropout: float = 0.0, targets: Sequence[str] | None = None) -> None:
        if not 1 <= rank <= LARGEST_RANK or not 0 <= dropout < 1:
            raise ValueError(f"lora: rank is 1 to {LARGEST_RANK} and dropout in [0, 1), got {rank} and {dropout}")
        self.rank, self.alpha, self.dropout = rank, 2 * rank if alpha is None else alpha, dropout
        self.targets = None if targets is None else list(targets)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def into(self, model: Any) -> Any:
        """The model with adapters that train, in float32, and all else frozen.

        Raises:
            ImportError: peft is not installed.
            ValueError: ``targets`` that name no layer, or layers that peft has no such adapters for.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("LoRA needs peft, which is not installed: pip install 'medvl[lora]'") from error
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        ends = {name.removesuffix(".weight").removesuffix("_weight") for name in names} | names
        if missing := [one for one in self.targets or () if not any(name == one or name.endswith(f".{one}") for name in ends)]:
            raise ValueError(f"lora: targets {', '.join(missing)} name no layer of {type(model).__name__}")
        model.requires_grad_(False)
        attention = {name for name, one in model.named_modules() if isinstance(one, nn.MultiheadAttention)}
        weights = [name for name in _attention_weights(attention) if self._wants(name.removesuffix("weight").rstrip("._"))]
        if weights and self.dropout:
            raise ValueError(f"lora: dropout is {self.dropout}, and {weights[0]} is used as a matrix, before which there is none; give 0")
        layers = self._layers(model, attention)
        if layers or not weights:
            config = LoraConfig(
                r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=layers or self.targets or [], bias="none"
            )
            model = inject_adapter_in_model(config, model)
        for name in weights:
            add_low_rank(model, name, self.rank, self.scale)
        for name, parameter in model.named_parameters():
            if MARK in name:
                parameter.data = parameter.data.float()
        return model

    def _layers(self, model: Any, attention: Collection[str]) -> str | list[str]:
        """What peft is to put adapters into."""
        if not attention:
            whole = hasattr(model, "save_pretrained")  # of Hugging Face: peft knows which layers to leave out
            return self.targets or ("all-linear" if whole else linear_layers(model))
        return [name for name in linear_layers(model) if self._wants(name)]

    def _wants(self, name: str) -> bool:
        return self.targets is None or any(name == target or name.endswith(f".{target}") for target in self.targets)


class LowRank(nn.Module):
    """A matrix W as W + scale B A: for weights that a module uses without calling a layer, which peft's adapters of layers cannot reach.

    peft's own for ``nn.MultiheadAttention`` adds to the frozen weights and takes off again in each pass, which wears them by rounding.
    """

    def __init__(self, rows: int, columns: int, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(rank, columns)), nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as peft does it
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """(rows, columns) to the same."""
        return weight + self.scale * (self.lora_B @ self.lora_A).to(weight.dtype)


def add_low_rank(model: nn.Module, name: str, rank: int, scale: float) -> None:
    """Put :class:`LowRank` over the parameter ``name``, a matrix, of a model."""
    place, _, tensor = name.rpartition(".")
    module = model.get_submodule(place)
    weight = getattr(module, tensor)
    added = LowRank(weight.shape[0], weight.shape[1], rank, scale).to(weight.device)
    parametrize.register_parametrization(module, tensor, added, unsafe=True)  # the shape stays: no need to try


def _attention_weights(attention: Iterable[str]) -> list[str]:
    """Matrices of attention modules with these names."""
    return [f"{name}.{weight}".lstrip(".") for name in sorted(attention) for weight in ("in_proj_weight", "out_proj.weight")]


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers but those of ``nn.MultiheadAttention``, which never calls its own."""
    attention = [name for name, one in model.named_modules() if isinstance(one, nn.MultiheadAttention)]
    linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    return [name for name in linear if not any(name.startswith(f"{one}.") for one in attention)]


def has_adapters(state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a state dict holds adapters under ``prefix``."""
    return any(name.startswith(prefix) and MARK in name for name in state)


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes the same: W + scale B A in the place of W, A and B.

    Args:
        state: of a model with adapters.
        scale: :attr:`Lora.scale`.
    Raises:
        KeyError: an adapter without its other half, or without a layer.
    """
    plain = {name: tensor for name, tensor in state.items() if MARK not in name}
    for one in state:
        for down_end, up_end, base_end in _FORMS:
            if one.endswith(down_end):
                layer = one.removesuffix(down_end)
                down, up = state[one].float().flatten(1), state[f"{layer}{up_end}"].float().flatten(1)
                weight = plain[f"{layer}{base_end}"]
                plain[f"{layer}{base_end}"] = (weight.float() + scale * (up @ down).view_as(weight)).to(weight.dtype)
    return {_plain_name(name): tensor for name, tensor in plain.items()}


def _plain_name(name: str) -> str:
    """Of a weight in the model without adapters."""
    return name.replace(".base_layer.", ".").replace("parametrizations.", "").removesuffix(".original")
