"""Objectives as a recipe names them: one loss over every part of a similarity.

Shapes: B images, M texts.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medvl.losses.objectives import Denominator, Direction, Side, info_nce, likeness_info_nce, sigmoid_loss
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
    def of(self, logits: Tensor | Product, pairs: Pairs, name: str) -> Tensor:
        """The loss of the part of that name."""

    def forward(
        self,
        parts: Mapping[str, Tensor | Product],
        positives: Tensor | Pairs,
        ignore: Tensor | None = None,
        false_texts: Tensor | None = None,
        here: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Loss of every part and their weighted mean under the key ``loss``.

        Args:
            parts: name -> (B, M) logits, as a :class:`medvl.types.Similarity` gives them; with ``here`` those of its images alone.
            positives, ignore, false_texts, here: as :func:`medvl.losses.pairs.pairs_of` takes them, or what it made of them.
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
        rows, columns = shapes.pop()
        if isinstance(positives, Pairs):
            pairs = positives
        else:
            pairs = pairs_of(positives, (rows if here is None else len(positives), columns), ignore, false_texts, here)
        losses = {name: self.of(parts[name], pairs, name) for name, weight in weights.items() if weight}
        total = sum(weights[name] for name in losses)
        return {**losses, "loss": torch.stack([weights[name] / total * value for name, value in losses.items()]).sum()}


class MultiPositiveInfoNCE(Objective):
    """:func:`medvl.losses.info_nce` of every part.

    Args:
        weights: see :class:`Objective`.
        denominator: one for both directions, or one for each (``{image: each, text: all}`` as in RadZero).
        direction: one for all parts, or by the name of the part (``{image: image, text: text}`` of a
            :class:`medvl.nn.local.TokenwiseSimilarity`, as in FILIP); a part that is not named is trained in both.
        image_share: weight of the images' direction where there are both, the rest being that of the texts (ConVIRT, arXiv:2010.00747:
            0.75).
        others: see :func:`medvl.losses.info_nce`.
    Raises:
        ValueError: a share outside 0 to 1, or a denominator for something else than images and texts.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        inside: bool = False,
        denominator: Denominator | dict[str, Denominator] = "all",
        direction: Direction | dict[str, Direction] = "both",
        soft: Direction = "both",
        image_share: float = 0.5,
        chunk_size: int = CHUNK,
        matmul: Matmul = "exact",
    ) -> None:
        super().__init__(weights)
        if not 0 <= image_share <= 1:
            raise ValueError(f"image_share is {image_share}, expected 0 to 1")
        if direction in ("image", "text") and image_share != 0.5:
            raise ValueError(f"image_share is {image_share}, and direction {direction} has no other to share with")
        if isinstance(denominator, dict) and set(denominator) != {"image", "text"}:
            raise ValueError(f"denominators are given for {sorted(denominator)}, expected image and text")
        self.denominators = denominator if isinstance(denominator, dict) else {"image": denominator, "text": denominator}
        self.inside, self.direction, self.soft, self.image_share = inside, direction, soft, image_share
        self.chunk_size, self.matmul = chunk_size, matmul

    def forward(self, parts: Mapping[str, Tensor | Product], *args: Any, **options: Any) -> dict[str, Tensor]:
        """As :class:`Objective`.

        Raises:
            ValueError: a direction of a part that the similarity has not, or as there.
        """
        if isinstance(self.direction, dict) and (unknown := sorted(set(self.direction) - set(parts))):
            raise ValueError(f"directions name {unknown}, the similarity has parts {sorted(parts)}")
        return super().forward(parts, *args, **options)

    def of(self, logits: Tensor | Product, pairs: Pairs, name: str) -> Tensor:
        """The loss of the part of that name."""
        direction = self.direction.get(name, "both") if isinstance(self.direction, dict) else self.direction
        image, text = self.denominators["image"], self.denominators["text"]
        if direction != "both" or (image == text and self.image_share == 0.5):  # one pass over the logits serves both
            return self._one(logits, pairs, direction, text if direction == "text" else image)
        shares = {"image": self.image_share, "text": 1 - self.image_share}
        return torch.stack([share * self._one(logits, pairs, side, self.denominators[side]) for side, share in shares.items()]).sum()  # type: ignore[arg-type]

    def _one(self, logits: Tensor | Product, pairs: Pairs, direction: Direction, denominator: Denominator) -> Tensor:
        return info_nce(
            logits,
            pairs,
            inside=self.inside,
            denominator=denominator,
            direction=direction,
            soft=self.soft,
            chunk_size=self.chunk_size,
            matmul=self.matmul,
        )


class LikenessInfoNCE(Objective):
    """:func:`medvl.losses.likeness_info_nce` of every part, which must be of pooled vectors.

    Args:
        weights: see :class:`Objective`.
        anchor: the side whose vectors say what is alike: lock its tower (``model.locked``), or start from a trained one.
        direction: of all parts.
        chunk_size, matmul: see :func:`medvl.losses.info_nce`.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        anchor: Side = "text",
        direction: Direction = "both",
        chunk_size: int = CHUNK,
        matmul: Matmul = "exact",
    ) -> None:
        super().__init__(weights)
        self.anchor, self.direction, self.chunk_size, self.matmul = anchor, direction, chunk_size, matmul

    def of(self, logits: Tensor | Product, pairs: Pairs, name: str) -> Tensor:
        """The loss of the part of that name.

        Raises:
            ValueError: a part that is no product of pooled vectors.
        """
        if not isinstance(logits, Product):
            raise ValueError(f"part {name!r} has no vectors to say what is alike; weigh it 0, or take medvl.nn.similarity.PooledSimilarity")
        options: dict[str, Any] = {"direction": self.direction, "chunk_size": self.chunk_size, "matmul": self.matmul}
        return likeness_info_nce(logits, pairs, self.anchor, **options)


class MultiPositiveSigmoid(Objective):
    """:func:`medvl.losses.sigmoid_loss` of every part, with one learned bias; take a similarity with a temperature of 0.1.

    The bias is kept within [-30, 10]: beyond, next to no pair has a gradient. The gradient passes the bound, so it is not stuck there.

    Args:
        weights: see :class:`Objective`.
        bias: to start with: about the log odds of a positive among all pairs of a batch.
        chunk_size, matmul: see :func:`medvl.losses.sigmoid_loss`.
    Raises:
        ValueError: a bias outside its bounds.
    """

    LOW, HIGH = -30.0, 10.0

    def __init__(
        self, weights: dict[str, float] | None = None, bias: float = -10.0, chunk_size: int = CHUNK, matmul: Matmul = "exact"
    ) -> None:
        super().__init__(weights)
        if not self.LOW <= bias <= self.HIGH:
            raise ValueError(f"bias {bias} is not in [{self.LOW}, {self.HIGH}]")
        self.bias = nn.Parameter(torch.tensor(bias))
        self.chunk_size, self.matmul = chunk_size, matmul

    def of(self, logits: Tensor | Product, pairs: Pairs, name: str) -> Tensor:
        """The loss of the part of that name."""
        bias = self.bias + (self.bias.clamp(self.LOW, self.HIGH) - self.bias).detach()
        return sigmoid_loss(logits, bias, pairs, chunk_size=self.chunk_size, matmul=self.matmul)
