"""Contrastive losses with any number of positives: an objective over a similarity matrix.

Shapes: B images, M texts, D embedding width. A matrix of logits is (B, M), ``positives`` (B, M) bool is True where text j is true of
image i; as floats of 0 and more it says how much so. A sentence that stands in two studies is one text (one column) with two positive
images, so it is a negative of neither.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def check_each_has_a_positive(positives: Tensor, ignore: Tensor | None = None, false_texts: Tensor | None = None) -> None:
    """Raise unless every image has a text and every text an image; rows and columns that ``ignore`` covers whole are let go, and so are
    columns of ``false_texts``.

    Raises:
        ValueError: naming how many rows or columns lack a positive, and the first of them.
    """
    for dim, line, other in ((1, "image", "text"), (0, "text", "image")):
        bare = ~positives.any(dim)
        if ignore is not None:
            bare &= ~ignore.all(dim)
        if dim == 0 and false_texts is not None:
            bare &= ~false_texts
        if bare.any():
            first = int(bare.nonzero()[0, 0])
            raise ValueError(
                f"{int(bare.sum())} of {bare.numel()} {line}s have no positive {other} (first: {line} {first}); leave them out of the "
                f"batch, or mark the whole {'row' if dim else 'column'} in `ignore` to drop it"
            )


def info_nce_of_logits(logits: Tensor, positives: Tensor, ignore: Tensor | None = None, false_texts: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of a logit matrix with many positives, the sum outside the log; mean of both directions, in nats.

    With s the logits and w the weights of the positives (1 or 0 where ``positives`` is bool):
        L_image = -1/B sum_i sum_j w_ij / (sum_k w_ik) (s_ij - log sum_k exp s_ik),   L_text the same on the transpose.

    Args:
        logits: (B, M), any float type; computed in float32 at least.
        positives: (B, M) bool, or float: finite, 0 and more.
        ignore: (B, M) bool, pairs of which it is not known whether they match (an uncertain finding): they leave the denominators.
            A row or column that is ignored whole is dropped; where nothing is left the loss is 0, and so is its gradient.
        false_texts: (M,) bool, texts made to be false (hard negatives). One that is true of no image of the batch stands in the images'
            denominators and has no term of its own in L_text.
    Raises:
        ValueError: shapes or types that do not fit, a weight below 0 or not finite, a pair both positive and ignored, a row or column
            without a positive.
    Source: "Supervised Contrastive Learning", arXiv:2004.11362, eq. 2 (sum outside the log), here in both directions; with weights
        "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss", arXiv:2309.14580, which weighs one direction only, and
        the soft targets of "MedCLIP", arXiv:2210.10163, in both.
    """
    true = _true_pairs(logits, positives)
    for name, mask, shape in (("ignore", ignore, logits.shape), ("false_texts", false_texts, logits.shape[1:])):
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool):
            raise ValueError(f"{name} must be bool of shape {tuple(shape)}, got {mask.dtype} of {tuple(mask.shape)}")
    if ignore is not None and (true & ignore).any():
        raise ValueError("a pair is both positive and ignored; make up your mind before the loss")
    check_each_has_a_positive(true, ignore, false_texts)
    scores = logits if logits.dtype == torch.float64 else logits.float()
    weights = positives.to(scores.dtype)
    if ignore is not None:
        rows, columns = ~ignore.all(1), ~ignore.all(0)
        scores = scores.masked_fill(ignore, -torch.inf)[rows][:, columns]
        weights = weights[rows][:, columns]
    stated = (weights > 0).any(0)  # all columns, unless there are false texts
    if not stated.any():  # all of it dropped by ``ignore``, or made of false texts
        return 0 * torch.where(logits.isfinite(), logits, 0).sum().to(scores.dtype)
    return (_mean_nll(scores, weights) + _mean_nll(scores.T[stated], weights.T[stated])) / 2


def _true_pairs(logits: Tensor, positives: Tensor) -> Tensor:
    """(B, M) bool, where there is any weight.

    Raises:
        ValueError: another shape or type, or weights that are none.
    """
    fits = positives.shape == logits.shape and (positives.dtype == torch.bool or positives.is_floating_point())
    if not fits:
        raise ValueError(
            f"positives must be bool, or float weights, of shape {tuple(logits.shape)}, got {positives.dtype} of {tuple(positives.shape)}"
        )
    if positives.dtype == torch.bool:
        return positives
    if not (torch.isfinite(positives) & (positives >= 0)).all():
        raise ValueError("weights of positives must be finite and 0 or more")
    return positives > 0


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


def _mean_nll(scores: Tensor, weights: Tensor) -> Tensor:
    """-1/B sum_i sum_j w_ij / (sum_k w_ik) log softmax(scores)_ij."""
    matched = (weights * torch.where(weights > 0, scores, 0.0)).sum(1) / weights.sum(1)
    return (scores.logsumexp(1) - matched).mean()


class MultiPositiveInfoNCE(nn.Module):
    """Objective of a recipe: :func:`info_nce_of_logits` of every part of a similarity, averaged with weights.

    Args:
        weights: weight of each named part (``{"pooled": 1.0, "tokens": 1.0}``); None weighs all parts alike. A part not named counts 0.
    """

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.weights = weights

    def forward(
        self, parts: Mapping[str, Tensor], positives: Tensor, ignore: Tensor | None = None, false_texts: Tensor | None = None
    ) -> dict[str, Tensor]:
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
        losses = {name: info_nce_of_logits(parts[name], positives, ignore, false_texts) for name, weight in weights.items() if weight}
        total = sum(weights[name] for name in losses)
        return {**losses, "loss": torch.stack([weights[name] / total * value for name, value in losses.items()]).sum()}
