"""Contrastive losses with any number of positives: an objective over a similarity matrix.

Shapes: B images, M texts, D embedding width. A matrix of logits is (B, M), ``positives`` (B, M) bool is True where text j is true of
image i. A sentence that stands in two studies is one text (one column) with two positive images, so it is a negative of neither.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def check_each_has_a_positive(positives: Tensor, ignore: Tensor | None = None) -> None:
    """Raise unless every image has a text and every text an image; rows and columns that ``ignore`` covers whole are let go.

    Raises:
        ValueError: naming how many rows or columns lack a positive, and the first of them.
    """
    for dim, line, other in ((1, "image", "text"), (0, "text", "image")):
        bare = ~positives.any(dim)
        if ignore is not None:
            bare &= ~ignore.all(dim)
        if bare.any():
            first = int(bare.nonzero()[0, 0])
            raise ValueError(
                f"{int(bare.sum())} of {bare.numel()} {line}s have no positive {other} (first: {line} {first}); leave them out of the "
                f"batch, or mark the whole {'row' if dim else 'column'} in `ignore` to drop it"
            )


def info_nce_of_logits(logits: Tensor, positives: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of a logit matrix with many positives, the sum outside the log; mean of both directions, in nats.

    With s the logits and P_i = {j : positives_ij}:
        L_image = -1/B sum_i 1/|P_i| sum_{j in P_i} (s_ij - log sum_k exp s_ik),   L_text the same on the transpose.

    Args:
        logits: (B, M), any float type; computed in float32 at least.
        positives: (B, M) bool.
        ignore: (B, M) bool, pairs of which it is not known whether they match (an uncertain finding): they leave the denominators.
            A row or column that is ignored whole is dropped.
    Raises:
        ValueError: shapes or types that do not fit, a pair both positive and ignored, a row or column without a positive.
    Source: "Supervised Contrastive Learning", arXiv:2004.11362, eq. 2 (sum outside the log), here in both directions.
    """
    if positives.shape != logits.shape or positives.dtype != torch.bool:
        raise ValueError(f"positives must be bool of shape {tuple(logits.shape)}, got {positives.dtype} of {tuple(positives.shape)}")
    if ignore is not None:
        if ignore.shape != logits.shape or ignore.dtype != torch.bool:
            raise ValueError(f"ignore must be bool of shape {tuple(logits.shape)}, got {ignore.dtype} of {tuple(ignore.shape)}")
        if (positives & ignore).any():
            raise ValueError("a pair is both positive and ignored; make up your mind before the loss")
    check_each_has_a_positive(positives, ignore)
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if ignore is not None:
        rows, columns = ~ignore.all(1), ~ignore.all(0)
        scores = scores.masked_fill(ignore, -torch.inf)[rows][:, columns]
        positives = positives[rows][:, columns]
    return (_mean_nll(scores, positives) + _mean_nll(scores.T, positives.T)) / 2


def multi_positive_info_nce(image: Tensor, text: Tensor, positives: Tensor, temperature: Tensor | float) -> Tensor:
    """Symmetric InfoNCE where a study may have any number of positive sentences; mean of both directions, in nats.

    With s_ij = <image_i, text_j> / temperature, :func:`info_nce_of_logits` of s.

    Args:
        image: (B, D), L2-normalised.
        text: (M, D), L2-normalised; M counts the different sentences of the whole batch.
        positives: (B, M) bool, True where sentence j describes study i.
        temperature: the divisor (0.07), not its inverse.
    Raises:
        ValueError: as :func:`info_nce_of_logits`.
    """
    return info_nce_of_logits(image @ text.T / temperature, positives)


def _mean_nll(scores: Tensor, positives: Tensor) -> Tensor:
    """-1/B sum_i 1/|P_i| sum_{j in P_i} log softmax(scores)_ij."""
    count = positives.sum(1)
    matched = torch.where(positives, scores, 0.0).sum(1) / count
    return (scores.logsumexp(1) - matched).mean()


class MultiPositiveInfoNCE(nn.Module):
    """Objective of a recipe: :func:`info_nce_of_logits` of every part of a similarity, averaged with weights.

    Args:
        weights: weight of each named part (``{"pooled": 1.0, "tokens": 1.0}``); None weighs all parts alike. A part not named counts 0.
    """

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, parts: Mapping[str, Tensor], positives: Tensor, ignore: Tensor | None = None) -> dict[str, Tensor]:
        """Loss of every part and their weighted mean under the key ``loss``.

        Args:
            parts: name -> (B, M) logits, as a :class:`medvl.nn.similarity.Similarity` gives them.
        Raises:
            ValueError: a weight that names no part, or as :func:`info_nce_of_logits`.
        """
        weights = dict.fromkeys(parts, 1.0) if self.weights is None else self.weights
        unknown = set(weights) - set(parts)
        if unknown:
            raise ValueError(f"loss weights name {sorted(unknown)}, the similarity has parts {sorted(parts)}")
        losses = {name: info_nce_of_logits(parts[name], positives, ignore) for name, weight in weights.items() if weight}
        total = sum(weights[name] for name in losses)
        return {**losses, "loss": torch.stack([weights[name] / total * value for name, value in losses.items()]).sum()}
