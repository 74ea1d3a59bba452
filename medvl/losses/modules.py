"""Objectives as a recipe names them: one loss over every part of a similarity.

Shapes: B images, M texts.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medvl.losses.objectives import Denominator, Direction, info_nce, sigmoid_loss
from medvl.losses.pairs import Pairs, pairs_of
from medvl.losses.statistics import CHUNK, Matmul
from medvl.types import Product


class Objective(nn.Module, abc.ABC):
    """Base of objectives: the loss of every part of a similarity, averaged with weights.

    Args:
        weights: weight of each named part (``{"pooled": 1.0, "tokens": 1.0}``); None weighs all parts alike. A part not named counts 0.
    """

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.weights = weights

    @abc.abstractmethod
    def of(self, logits: Tensor | Product, pairs: Pairs) -> Tensor:
        """The loss of one part."""

    def forward(
        self,
        parts: Mapping[str, Tensor | Product],
        positives: Tensor,
        ignore: Tensor | None = None,
        false_texts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of every part and their weighted mean under the key ``loss``.

        Args:
            parts: name -> (B, M) logits, as a :class:`medvl.types.Similarity` gives them.
            positives, ignore, false_texts: as :func:`medvl.losses.pairs.pairs_of` takes them.
        Raises:
            ValueError: a weight that names no part, or as ``pairs_of`` and the loss itself.
        """
        weights = dict.fromkeys(parts, 1.0) if self.weights is None else self.weights
        unknown = set(weights) - set(parts)
        if unknown:
            raise ValueError(f"loss weights name {sorted(unknown)}, the similarity has parts {sorted(parts)}")
        shapes = {tuple(part.shape) for part in parts.values()}
        if len(shapes) != 1:
            raise ValueError(f"parts of different shapes: {sorted(shapes)}")
        pairs = pairs_of(positives, shapes.pop(), ignore, false_texts)  # type: ignore[arg-type]
        losses = {name: self.of(parts[name], pairs) for name, weight in weights.items() if weight}
        total = sum(weights[name] for name in losses)
        return {**losses, "loss": torch.stack([weights[name] / total * value for name, value in losses.items()]).sum()}


class MultiPositiveInfoNCE(Objective):
    """:func:`medvl.losses.info_nce` of every part.

    Args:
        weights: see :class:`Objective`.
        others: see :func:`medvl.losses.info_nce`.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        inside: bool = False,
        denominator: Denominator = "all",
        direction: Direction = "both",
        soft: Direction = "both",
        chunk_size: int = CHUNK,
        matmul: Matmul = "exact",
    ) -> None:
        super().__init__(weights)
        self.inside, self.denominator, self.direction, self.soft = inside, denominator, direction, soft
        self.chunk_size, self.matmul = chunk_size, matmul

    def of(self, logits: Tensor | Product, pairs: Pairs) -> Tensor:
        """The loss of one part."""
        return info_nce(
            logits,
            pairs,
            inside=self.inside,
            denominator=self.denominator,
            direction=self.direction,
            soft=self.soft,
            chunk_size=self.chunk_size,
            matmul=self.matmul,
        )


class MultiPositiveSigmoid(Objective):
    """:func:`medvl.losses.sigmoid_loss` of every part, with one learned bias; take a similarity with a temperature of 0.1.

    Args:
        weights: see :class:`Objective`.
        bias: to start with.
        chunk_size, matmul: see :func:`medvl.losses.sigmoid_loss`.
    """

    def __init__(
        self, weights: dict[str, float] | None = None, bias: float = -10.0, chunk_size: int = CHUNK, matmul: Matmul = "exact"
    ) -> None:
        super().__init__(weights)
        self.bias = nn.Parameter(torch.tensor(bias))
        self.chunk_size, self.matmul = chunk_size, matmul

    def of(self, logits: Tensor | Product, pairs: Pairs) -> Tensor:
        """The loss of one part."""
        return sigmoid_loss(logits, self.bias, pairs, chunk_size=self.chunk_size, matmul=self.matmul)
