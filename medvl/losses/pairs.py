"""Which texts are true of which images: the one contract of all losses, kept sparse.

Shapes: B images, M texts, K positive pairs, L ignored pairs. A sentence that stands in two studies is one text (one column) with two
positive images, so it is a negative of neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Positive and ignored pairs of B images and M texts, each pair once, in the order of rows, then columns."""

    shape: tuple[int, int]  # (B, M)
    positive: Tensor  # (K, 2) int64, image and text
    weights: Tensor  # (K,) float, above 0
    ignored: Tensor  # (L, 2) int64, pairs of which it is not known whether they match, those of rows and columns out of use left out
    used_rows: Tensor  # (B,) bool, False: the image is dropped
    used_columns: Tensor  # (M,) bool, False: the text is dropped
    false_texts: Tensor  # (M,) bool, made to be false: no term of their own where they have no positive
    here: tuple[int, int] | None = None  # first and one past the last image that this process has logits of; None: it has all

    @property
    def rows(self) -> Tensor:
        """(K,) int64, images of the positive pairs."""
        return self.positive[:, 0]

    @property
    def columns(self) -> Tensor:
        """(K,) int64, texts of the positive pairs."""
        return self.positive[:, 1]

    @property
    def all_used(self) -> bool:
        """Whether nothing is dropped."""
        return bool(self.used_rows.all()) and bool(self.used_columns.all())

    @property
    def logits_shape(self) -> tuple[int, int]:
        """Of the logits that this process has."""
        return self.shape if self.here is None else (self.here[1] - self.here[0], self.shape[1])

    def of_here(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positive pairs, their weights and ignored pairs of the images that this process has, which are numbered from 0."""
        if self.here is None:
            return self.positive, self.weights, self.ignored
        first, stop = self.here
        mine, left_out = ((pairs[:, 0] >= first) & (pairs[:, 0] < stop) for pairs in (self.positive, self.ignored))
        offset = torch.tensor([first, 0], device=self.positive.device)
        return self.positive[mine] - offset, self.weights[mine], self.ignored[left_out] - offset

    def compact(self) -> Pairs:
        """The pairs of what is used, renumbered."""
        if self.all_used:
            return self
        numbers = [used.long().cumsum(0) - 1 for used in (self.used_rows, self.used_columns)]
        here = None if self.here is None else (int(self.used_rows[: self.here[0]].sum()), int(self.used_rows[: self.here[1]].sum()))
        return replace(
            self,
            shape=(int(self.used_rows.sum()), int(self.used_columns.sum())),
            positive=torch.stack([numbers[d][self.positive[:, d]] for d in (0, 1)], dim=1),
            ignored=torch.stack([numbers[d][self.ignored[:, d]] for d in (0, 1)], dim=1),
            used_rows=self.used_rows[self.used_rows],
            used_columns=self.used_columns[self.used_columns],
            false_texts=self.false_texts[self.used_columns],
            here=here,
        )


def pairs_of(
    positives: Tensor,
    shape: tuple[int, int],
    ignore: Tensor | None = None,
    false_texts: Tensor | None = None,
    here: tuple[int, int] | None = None,
) -> Pairs:
    """Check what a batch says of its pairs.

    Args:
        positives: (B, M) bool; or (B, M) float weights, finite, 0 and more; or (K, 2) integer, the pairs (image, text). Told apart by type.
        shape: (B, M), of all processes.
        ignore: (B, M) bool or (L, 2) integer: pairs that leave the loss. A row or column that is ignored whole is dropped.
        false_texts: (M,) bool, texts made to be false (hard negatives).
        here: the images, first and one past the last, whose logits this process has, where others have the rest; None: all. Processes in
            the order of ranks share all images without a gap, and each is told of all pairs.
    Raises:
        ValueError: a type, shape or index that does not fit, a weight below 0 or not finite, a pair both positive and ignored, a row or
            column without a positive that is neither dropped nor a false text.
    """
    b, m = shape
    none = torch.zeros(m, dtype=torch.bool, device=positives.device)
    if false_texts is not None and (false_texts.shape != (m,) or false_texts.dtype != torch.bool):
        raise ValueError(f"false_texts must be bool of shape {(m,)}, got {false_texts.dtype} of {tuple(false_texts.shape)}")
    true, weights = _positives(positives, shape)
    ignored = _ignored(ignore, shape, positives.device)
    used_rows, used_columns = (torch.bincount(ignored[:, d], minlength=shape[d]) < shape[1 - d] for d in (0, 1))
    if b and m and (clash := torch.isin(true[:, 0] * m + true[:, 1], ignored[:, 0] * m + ignored[:, 1])).any():
        first = true[clash][0].tolist()
        raise ValueError(
            f"a pair is both positive and ignored (first: image {first[0]}, text {first[1]}); make up your mind before the loss"
        )
    false = none if false_texts is None else false_texts
    _check_each_has_a_positive(true, (used_rows, used_columns & ~false))
    ignored = ignored[used_rows[ignored[:, 0]] & used_columns[ignored[:, 1]]]
    if here is not None and not 0 <= here[0] <= here[1] <= b:
        raise ValueError(f"images {here[0]} to {here[1]} are said to be here, of {b}")
    return Pairs((b, m), true, weights, ignored, used_rows, used_columns, false, here)


def _positives(positives: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(K, 2) int64 and (K,) float."""
    dense = positives.dtype == torch.bool or positives.is_floating_point()
    if dense and positives.shape == shape:
        if positives.dtype != torch.bool and not (torch.isfinite(positives) & (positives >= 0)).all():
            raise ValueError("weights of positives must be finite and 0 or more")
        true = positives.nonzero()
        weights = positives[true[:, 0], true[:, 1]]
        return true, weights if weights.is_floating_point() else weights.float()
    if not dense and not positives.is_complex() and positives.ndim == 2 and positives.shape[1] == 2:
        true = _indices(positives, shape, "positives")
        return true, torch.ones(len(true), device=positives.device)
    raise ValueError(
        f"positives must be bool, or float weights, of shape {tuple(shape)}, or integer pairs of shape (K, 2), "
        f"got {positives.dtype} of {tuple(positives.shape)}"
    )


def _ignored(ignore: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    """(L, 2) int64."""
    if ignore is None:
        return torch.zeros(0, 2, dtype=torch.long, device=device)
    if ignore.dtype == torch.bool and ignore.shape == shape:
        return ignore.nonzero()
    if not (ignore.dtype == torch.bool or ignore.is_floating_point() or ignore.is_complex()) and ignore.ndim == 2 and ignore.shape[1] == 2:
        return _indices(ignore, shape, "ignore")
    raise ValueError(
        f"ignore must be bool of shape {tuple(shape)}, or integer pairs of shape (L, 2), got {ignore.dtype} of {tuple(ignore.shape)}"
    )


def _indices(pairs: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """Sorted, each pair once."""
    pairs = pairs.long()
    if len(pairs) and ((pairs < 0) | (pairs >= torch.tensor(shape, device=pairs.device))).any():
        raise ValueError(f"{name} names an image or a text that is not there: expected indices from 0 to below {tuple(shape)}")
    flat = torch.unique(pairs[:, 0] * shape[1] + pairs[:, 1])
    return torch.stack([flat // max(1, shape[1]), flat % max(1, shape[1])], dim=1)


def _check_each_has_a_positive(true: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    for dim, line, other in ((0, "image", "text"), (1, "text", "image")):
        bare = wanted[dim] & (torch.bincount(true[:, dim], minlength=len(wanted[dim])) == 0)
        if bare.any():
            first = int(bare.nonzero()[0, 0])
            raise ValueError(
                f"{int(bare.sum())} of {bare.numel()} {line}s have no positive {other} (first: {line} {first}); leave them out of the "
                f"batch, or mark the whole {'row' if dim == 0 else 'column'} in `ignore` to drop it"
            )
