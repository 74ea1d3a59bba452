"""What a contrastive loss needs of a logit matrix: log-sum-exps of rows and columns, and the logits of some pairs. Without the matrix.

Logits s_ij = scale <image_i, text_j> (:class:`medvl.types.Product`) are made in tiles of some rows, forward and again backward; a tile
serves both directions. Kept for the backward pass are the vectors and the log-sum-exps, so memory grows with B + M, not with B M. The cost
is four matrix products (one forward, one rebuilt, two for the gradients), where a full matrix in each direction costs six.

Shapes: B images, M texts, D width, K pairs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medvl.losses.ranks import log_sum_exp_over_ranks, sum_over_ranks
from medvl.types import Product

Matmul = Literal["exact", "bfloat16"]

CHUNK = 512
"""Rows of a tile by default: between 256 and 2048 the time hardly changes, and the memory is proportional."""

_ABSENT = -1e30
"""Stands for minus infinity, whose differences are no numbers."""

_SAFE_SPAN = 80.0
"""Logits that lie no farther apart may share one exponential: exp(-80) is still a normal number of float32."""


def statistics(
    logits: Tensor | Product, excluded: Tensor, pairs: Tensor, chunk_size: int = CHUNK, matmul: Matmul = "exact"
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of every row (B,) and of every column (M,) without the excluded pairs, and the logits of the given pairs (K,).

    Args:
        logits: (B, M), or a product that makes them.
        excluded: (L, 2) int64, sorted by row. A line of nothing but excluded pairs has a very low log-sum-exp and no gradient.
        pairs: (K, 2) int64, sorted by row.
        chunk_size: rows of a tile; 0 forms the whole matrix and leaves it to autograd.
        matmul: ``bfloat16`` rounds the vectors of a product for its tiles: some times faster where the hardware has it, and not exact
            (gradients of aligned pairs were some percent off).
    Raises:
        ValueError: a negative chunk size.
    """
    if isinstance(logits, Product) and _in_tiles(chunk_size):
        return _Statistics.apply(logits.image, logits.text, logits.scale, excluded, pairs, chunk_size, matmul == "bfloat16")
    scores = _formed(logits)
    kept = scores.index_put((excluded[:, 0], excluded[:, 1]), scores.new_tensor(_ABSENT)) if len(excluded) else scores
    return kept.logsumexp(1), kept.logsumexp(0).clamp_min(_ABSENT), scores[pairs[:, 0], pairs[:, 1]]


def softplus_sum(
    logits: Tensor | Product,
    bias: Tensor,
    excluded: Tensor,
    pairs: Tensor,
    weights: Tensor,
    chunk_size: int = CHUNK,
    matmul: Matmul = "exact",
) -> Tensor:
    """sum_ij softplus(s_ij + bias) without the excluded pairs, less sum_p w_p (s_p + bias) over the given pairs.

    Args:
        pairs: (K, 2) int64, sorted by row; none of them excluded.
        weights: (K,).
        bias: scalar.
        others: as :func:`statistics`.
    """
    if isinstance(logits, Product) and _in_tiles(chunk_size):
        vectors = (logits.image, logits.text, logits.scale, bias)
        return _SoftplusSum.apply(*vectors, excluded, pairs, weights, chunk_size, matmul == "bfloat16")
    scores = _formed(logits) + bias
    losses = -F.logsigmoid(-scores)  # softplus itself is cut off above 20
    if len(excluded):
        losses = losses.index_put((excluded[:, 0], excluded[:, 1]), losses.new_tensor(0.0))
    return losses.sum() - (weights.to(scores.dtype) * scores[pairs[:, 0], pairs[:, 1]]).sum()


def expected_logits(logits: Tensor | Product, targets: Product, chunk_size: int = CHUNK, across: bool = False) -> tuple[Tensor, Tensor]:
    """Mean logit of each row (B,) under the softmax of its targets over texts, and of each column (M,) under that over images.

    Args:
        targets: logits of the targets, which get no gradient.
        across: the columns are shared with other processes.
        others: as :func:`statistics`.
    """
    none = no_pairs(targets.image.device)
    row, column, _ = statistics(targets, none, none, chunk_size)
    column = log_sum_exp_over_ranks(column, across)
    of_row, of_column = _expected(logits, targets, row, column, chunk_size)
    return of_row, sum_over_ranks(of_column, across)


def _expected(logits: Tensor | Product, targets: Product, row: Tensor, column: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Sums of the rows and columns of logits times exp(targets - their log-sum-exps)."""
    if isinstance(logits, Product) and _in_tiles(chunk_size):
        vectors = (logits.image, logits.text, logits.scale)
        return _Expected.apply(*vectors, targets.image, targets.text, targets.scale, row, column, chunk_size)
    scores, wanted = _formed(logits), targets.dense()
    return ((wanted - row[:, None]).exp() * scores).sum(1), ((wanted - column).exp() * scores).sum(0)


def no_pairs(device: torch.device) -> Tensor:
    """(0, 2) int64."""
    return torch.zeros(0, 2, dtype=torch.long, device=device)


def absent(like: Tensor) -> Tensor:
    """Log-sum-exps of nothing."""
    return torch.full_like(like, _ABSENT)


def is_empty(log_sum_exps: Tensor) -> Tensor:
    """Which of the log-sum-exps of :func:`statistics` are of nothing."""
    return log_sum_exps <= _ABSENT / 2


def _in_tiles(chunk_size: int) -> bool:
    """Whether no matrix is to be formed.

    Raises:
        ValueError: a negative number of rows.
    """
    if chunk_size < 0:
        raise ValueError(f"chunk_size is {chunk_size}, expected 0 for the plain form, or the rows of a tile")
    return chunk_size > 0


def _formed(logits: Tensor | Product) -> Tensor:
    """(B, M), in float32 at least."""
    scores = logits.dense() if isinstance(logits, Product) else logits
    return scores if scores.dtype == torch.float64 else scores.float()


class _Tiles:
    """Tiles of some rows of scaled inner products, in buffers that are used again."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, chunk_size: int, rounded: bool) -> None:
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        self.image, self.text, self.scale = (x.detach().to(dtype) for x in (image, text, scale))
        self.size, self.rounded = min(chunk_size, max(1, len(image))), rounded
        self.low = (self.image.bfloat16(), self.text.bfloat16()) if rounded else None
        self.buffer = self.image.new_empty(self.size, len(text))

    def starts(self) -> range:
        return range(0, len(self.image), self.size)

    def within(self, pairs: Tensor) -> _Within:
        """The pairs (K, 2), to be asked for by tile."""
        edges = torch.tensor([*self.starts(), len(self.image)], device=pairs.device)
        return _Within(pairs, edges, self.size)

    def logits(self, start: int) -> Tensor:
        """(b, M), in the buffer: gone with the next tile."""
        stop = min(start + self.size, len(self.image))
        tile = self.buffer[: stop - start]
        if self.low is None:
            torch.mm(self.image[start:stop], self.text.T, out=tile)
        else:
            tile.copy_(self.low[0][start:stop] @ self.low[1].T)
        return tile.mul_(self.scale)

    def take_back(self, gradient: Tensor, start: int, of_image: Tensor, of_text: Tensor) -> None:
        """Add what a tile's gradient (b, M) means for the vectors, before the scale."""
        stop = start + len(gradient)
        if self.low is None:
            torch.mm(gradient, self.text, out=of_image[start:stop])
            of_text.addmm_(gradient.T, self.image[start:stop])
        else:
            low = gradient.bfloat16()
            of_image[start:stop] = low @ self.low[1]
            of_text += low.T @ self.low[0][start:stop]

    def span(self) -> Tensor:
        """At least the largest size of a logit."""
        if not len(self.image) or not len(self.text):
            return self.scale.abs()
        return 1.01 * self.scale.abs() * self.image.norm(dim=1).amax() * self.text.norm(dim=1).amax()


class _Within:
    """Pairs sorted by row, found by tile.

    Args:
        edges: (tiles + 1,) int64, the first row of every tile, and the number of rows.
    """

    def __init__(self, pairs: Tensor, edges: Tensor, size: int) -> None:
        self.pairs, self.size = pairs, size
        self.cuts = torch.searchsorted(pairs[:, 0].contiguous(), edges).tolist()

    def of(self, start: int) -> tuple[slice, Tensor, Tensor]:
        """Which pairs are in the tile, their rows in it, and their columns."""
        tile = start // self.size
        here = slice(self.cuts[tile], self.cuts[tile + 1])
        return here, self.pairs[here, 0] - start, self.pairs[here, 1]


class _Statistics(torch.autograd.Function):
    """See :func:`statistics`."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        excluded: Tensor,
        pairs: Tensor,
        chunk_size: int,
        rounded: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):
            tiles = _Tiles(image, text, scale, chunk_size, rounded)
            asked, left_out = tiles.within(pairs), tiles.within(excluded)
            shift = tiles.span()
            shared = bool(2 * shift < _SAFE_SPAN)
            row = tiles.image.new_empty(len(image))
            top = tiles.image.new_full((len(text),), _ABSENT)
            total = tiles.image.new_zeros(len(text))
            at = tiles.image.new_empty(len(pairs))
            for start in tiles.starts():
                tile = tiles.logits(start)
                here, i, j = asked.of(start)
                at[here] = tile[i, j]
                _, i, j = left_out.of(start)
                if shared:
                    tile.sub_(shift).exp_()[i, j] = 0
                    torch.sum(tile, 1, out=row[start : start + len(tile)])
                    total += tile.sum(0)
                else:
                    tile[i, j] = _ABSENT
                    row[start : start + len(tile)] = tile.logsumexp(1)
                    higher = torch.maximum(top, tile.amax(0)) if len(tile) else top
                    total = total * (top - higher).exp() + tile.sub_(higher).exp_().sum(0)
                    top = higher
            if shared:
                row, column = (sums.log_().add_(shift).clamp_min_(_ABSENT) for sums in (row, total))
            else:
                column = (top + total.log()).clamp_min_(_ABSENT)
        ctx.save_for_backward(image, text, scale, excluded, pairs, row, column)
        ctx.chunk_size, ctx.rounded, ctx.shift = chunk_size, rounded, shift if shared else None
        return row, column, at

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_row: Tensor, of_column: Tensor, of_at: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, excluded, pairs, row, column = ctx.saved_tensors
        with torch.autocast(image.device.type, enabled=False):
            tiles = _Tiles(image, text, scale, ctx.chunk_size, ctx.rounded)
            asked, left_out = tiles.within(pairs), tiles.within(excluded)
            of_image, of_text = torch.empty_like(tiles.image), torch.zeros_like(tiles.text)
            of_row, of_column = (torch.where(is_empty(lse), 0, g) for lse, g in ((row, of_row), (column, of_column)))
            row, column = (torch.where(is_empty(lse), 0, lse) for lse in (row, column))
            other = torch.empty_like(tiles.buffer)
            for start in tiles.starts():
                tile = tiles.logits(start)
                mine, spare = slice(start, start + len(tile)), other[: len(tile)]
                if ctx.shift is not None:
                    by_row, by_column = of_row[mine] * (ctx.shift - row[mine]).exp(), of_column * (ctx.shift - column).exp()
                    tile.sub_(ctx.shift).exp_().mul_(torch.add(by_row[:, None], by_column, out=spare))
                else:
                    torch.sub(tile, column, out=spare).exp_().mul_(of_column)
                    tile.sub_(row[mine, None]).exp_().mul_(of_row[mine, None]).add_(spare)
                _, i, j = left_out.of(start)
                tile[i, j] = 0
                here, i, j = asked.of(start)
                tile.index_put_((i, j), of_at[here].to(tile.dtype), accumulate=True)
                tiles.take_back(tile, start, of_image, of_text)
            return *_of_vectors(ctx, tiles, of_image, of_text, (image, text, scale)), None, None, None, None


_SPARE_ROWS = 32
"""Rows of a tile that are worked on at a time where a copy is needed."""


class _SoftplusSum(torch.autograd.Function):
    """See :func:`softplus_sum`. The loss is a plain sum, so the gradients are made on the way forward and no tile is made twice.

    They are handed over once, not copied: a graph that is kept serves no second backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        excluded: Tensor,
        pairs: Tensor,
        weights: Tensor,
        chunk_size: int,
        rounded: bool,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:4])
        with torch.autocast(image.device.type, enabled=False):
            tiles = _Tiles(image, text, scale, chunk_size, rounded)
            positive, left_out = tiles.within(pairs), tiles.within(excluded)
            of_image, of_text = (torch.empty_like(tiles.image), torch.zeros_like(tiles.text)) if wanted else (None, None)
            weights, offset = weights.to(tiles.image.dtype), bias.detach().to(tiles.image.dtype)
            total, of_bias = tiles.image.new_zeros(()), tiles.image.new_zeros(())
            spare = torch.empty_like(tiles.buffer[:_SPARE_ROWS])
            for start in tiles.starts():
                tile = tiles.logits(start).add_(offset)
                here, i, j = positive.of(start)
                total -= (weights[here] * tile[i, j]).sum()
                _, out_i, out_j = left_out.of(start)
                tile[out_i, out_j] = _ABSENT  # adds nothing, and its sigmoid is 0
                for part in tile.split(_SPARE_ROWS):
                    total += torch.clamp_min(part, 0, out=spare[: len(part)]).sum()
                    total += torch.abs(part, out=spare[: len(part)]).neg_().exp_().log1p_().sum()
                if of_image is not None and of_text is not None:
                    tile.sigmoid_()
                    tile.index_put_((i, j), -weights[here], accumulate=True)
                    of_bias += tile.sum()
                    tiles.take_back(tile, start, of_image, of_text)
            if of_image is not None and of_text is not None:
                of_scale = torch.dot(of_image.flatten(), tiles.image.flatten())
                ctx.found = (of_image.mul_(tiles.scale), of_text.mul_(tiles.scale), of_scale, of_bias)
        ctx.types = [x.dtype for x in (image, text, scale, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError("the sigmoid loss serves one backward pass; call it again, or take chunk_size=0 to keep its graph")
        made, ctx.found = ctx.found, None
        needed = zip(made, ctx.types, ctx.needs_input_grad, strict=False)
        return *(g.mul_(of_total).to(t) if need else None for g, t, need in needed), None, None, None, None, None


class _Expected(torch.autograd.Function):
    """See :func:`expected_logits`: linear in the logits, so that no tile of them is made, only tiles of targets."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        labels: Tensor,
        text_labels: Tensor,
        label_scale: Tensor,
        row: Tensor,
        column: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(image.device.type, enabled=False):
            targets = _Tiles(labels, text_labels, label_scale, chunk_size, rounded=False)
            x, y, s = (one.detach().to(targets.image.dtype) for one in (image, text, scale))
            of_row, mean_image = torch.empty_like(row), torch.zeros_like(y)
            for start in targets.starts():
                tile = targets.logits(start)
                mine = slice(start, start + len(tile))
                mean_image.addmm_((tile - column).exp_().T, x[mine])
                of_row[mine] = ((tile.sub_(row[mine, None]).exp_() @ y) * x[mine]).sum(1)
        ctx.save_for_backward(image, text, scale, labels, text_labels, label_scale, row, column)
        ctx.chunk_size = chunk_size
        return of_row.mul_(s), (mean_image * y).sum(1).mul_(s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_row: Tensor, of_column: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, labels, text_labels, label_scale, row, column = ctx.saved_tensors
        with torch.autocast(image.device.type, enabled=False):
            targets = _Tiles(labels, text_labels, label_scale, ctx.chunk_size, rounded=False)
            tiles = _Tiles(image, text, scale, 1, rounded=False)
            of_image, of_text = torch.empty_like(tiles.image), torch.zeros_like(tiles.text)
            for start in targets.starts():
                tile = targets.logits(start)
                mine = slice(start, start + len(tile))
                by_column = (tile - column).exp_().mul_(of_column)
                tile.sub_(row[mine, None]).exp_().mul_(of_row[mine, None]).add_(by_column)
                tiles.take_back(tile, start, of_image, of_text)
            return *_of_vectors(ctx, tiles, of_image, of_text, (image, text, scale)), None, None, None, None, None, None


def _of_vectors(ctx: Any, tiles: _Tiles, of_image: Tensor, of_text: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of image, text and scale from those before the scale."""
    of_scale = torch.dot(of_image.flatten(), tiles.image.flatten()) if ctx.needs_input_grad[2] else None
    found = (of_image.mul_(tiles.scale), of_text.mul_(tiles.scale), of_scale)
    return tuple(g.to(x.dtype) if need and g is not None else None for g, x, need in zip(found, inputs, ctx.needs_input_grad, strict=False))
