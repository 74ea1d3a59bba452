"""Low-rank adapters in a trunk that is kept as it is otherwise, by peft.

Source: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medvl.types import Configurable

MARK = ".lora_"
"""In the name of every weight that peft adds."""


LARGEST_RANK = 1024
"""Beyond it an adapter is no smaller than the layer."""


class Lora(Configurable):
    """What is added to a trunk: W x becomes W x + alpha / rank * B A x in each of the named layers, A random, B 0 at the start.

    Args:
        rank: rows of A.
        alpha: what the product is scaled by, times ``rank``; None is twice the rank.
        dropout: of x before A.
        targets: ends of the names of the linear layers, such as ``["q_proj", "v_proj"]``; None takes every linear layer.
    Raises:
        ValueError: a rank outside 1 to 1024, or a dropout outside [0, 1).
    """

    def __init__(self, rank: int = 16, alpha: int | None = None, dropout: float = 0.0, targets: Sequence[str] | None = None) -> None:
        if not 1 <= rank <= LARGEST_RANK or not 0 <= dropout < 1:
            raise ValueError(f"lora: rank is 1 to {LARGEST_RANK} and dropout in [0, 1), got {rank} and {dropout}")
        self.rank, self.alpha, self.dropout = rank, 2 * rank if alpha is None else alpha, dropout
        self.targets = None if targets is None else list(targets)

    def into(self, encoder: Any) -> Any:
        """The Hugging Face model with adapters that train, in float32, and all else frozen.

        Raises:
            ImportError: peft is not installed.
            ValueError: ``targets`` that name no layer.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("LoRA needs peft, which is not installed: pip install 'medvl[lora]'") from error
        encoder.requires_grad_(False)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # of BERT and its kin: no pooling here uses it, so an adapter there would not train
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets or "all-linear",
            bias="none",
        )
        encoder = inject_adapter_in_model(config, encoder)
        for name, parameter in encoder.named_parameters():
            if MARK in name:
                parameter.data = parameter.data.float()
        return encoder
