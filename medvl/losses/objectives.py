"""Contrastive losses with any number of positives: an objective over the logits of a similarity.

Shapes: B images, M texts, D embedding width. Logits are a (B, M) matrix, or a :class:`medvl.types.Product` of pooled vectors, from which no
such matrix is formed; which pairs are positive is a :class:`medvl.losses.pairs.Pairs`. A named system is a choice of options here:

    CLIP, ConVIRT, SupCon   the defaults (ConVIRT has a mean of directions with weights of its own)
    MIL-NCE                 ``inside=True``
    DCL                     ``denominator="negatives"``
    CWCL                    float positives, ``soft="image"`` or ``"text"``, or :func:`likeness_info_nce` of the vectors themselves
    MedCLIP                 float positives that are a softmax, or :func:`soft_target_loss` of label vectors
    SigLIP                  :func:`sigmoid_loss`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from medvl.losses.pairs import Pairs, pairs_of
from medvl.losses.ranks import log_sum_exp_over_ranks, sum_over_ranks
from medvl.losses.statistics import CHUNK, Matmul, absent, expected_logits, is_empty, no_pairs, softplus_sum, statistics
from medvl.types import Product

Denominator = Literal["all", "negatives", "each"]
Direction = Literal["both", "image", "text"]
Side = Literal["image", "text"]


def info_nce(
    logits: Tensor | Product,
    pairs: Pairs,
    *,
    inside: bool = False,
    denominator: Denominator = "all",
    direction: Direction = "both",
    soft: Direction = "both",
    chunk_size: int = CHUNK,
    matmul: Matmul = "exact",
) -> Tensor:
    """InfoNCE with many positives; mean over images, over texts, or of both directions, in nats.

    With s the logits, w the weights of the positives P_i of image i and Z_i = sum_k exp s_ik over the pairs that are not ignored:
        outside the log   L_image = -1/B sum_i sum_j w_ij / (sum_k w_ik) (s_ij - log Z_i)
        inside the log    L_image = -1/B sum_i (log sum_j w_ij exp s_ij - log Z_i)
    and L_text the same on the transpose. A text made to be false that is true of no image of the batch stands in the images' denominators
    and has no term of its own. What ``pairs`` drops is left out; where nothing is left the loss is 0, and so are its gradients.

    Args:
        logits: (B, M), or a product; computed in float32 at least.
        inside: the sum over positives inside the log.
        denominator: over ``all`` pairs of the line; over its ``negatives`` alone; or, for ``each`` positive, over it and the negatives, so
            that the positives of an image do not compete. A line without a negative has no term where it is over these alone.
        direction: ``image`` (each image among the texts), ``text``, or the mean of both.
        soft: in which directions weights below 1 count; in the other one, pairs with a weight of 1 and more are positives, and the rest
            are negatives.
        chunk_size, matmul: as :func:`medvl.losses.statistics.statistics`.
    Raises:
        ValueError: an unknown word; ``inside`` with ``each``; a line that has soft positives alone, in the direction that takes none;
            one-sided ``soft`` with another denominator than ``all``.
    Source: "Supervised Contrastive Learning", arXiv:2004.11362, eq. 2 (outside) and 3 (inside, there with a mean), in both directions;
        inside: "End-to-End Learning of Visual Representations from Uncurated Instructional Videos", arXiv:1912.06430, eq. 1;
        negatives: "Decoupled Contrastive Learning", arXiv:2110.06848, eq. 5; each: the images of "RadZero", arXiv:2504.07416, which has
        all for its sentences; one-sided weights: "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss",
        arXiv:2309.14580.
    """
    for name, value, known in (("denominator", denominator, Denominator), ("direction", direction, Direction), ("soft", soft, Direction)):
        _check_word(name, value, known)
    if soft != "both" and denominator != "all":
        raise ValueError(f"soft is {soft!r}, which makes negatives of soft positives: it goes with denominator all, not {denominator}")
    if inside and denominator == "each":
        raise ValueError("inside the log the positives of a line are one; their denominator is all or negatives, not each")
    _check_shape(logits, pairs)
    logits, pairs = _used(logits, pairs)
    if not len(pairs.positive):
        return _nothing(logits)
    positive, weights, excluded = pairs.of_here()
    if denominator != "all":
        excluded = _by_row(torch.cat([excluded, positive]))
    row, column, at = statistics(logits, excluded, positive, chunk_size, matmul)
    sharp = (weights >= 1).to(weights.dtype)
    by_image, by_text = (weights if soft in ("both", name) else sharp for name in ("image", "text"))
    across, losses = pairs.here is not None, []
    if direction != "text":
        found, stated = _losses(positive[:, 0], row, at, by_image.to(at.dtype), inside, denominator, "image", across=False)
        total, count = sum_over_ranks(torch.stack([found.sum(), stated.sum().to(found.dtype)]), across)
        losses.append(total / count.clamp_min(1))
    if direction != "image":
        column = log_sum_exp_over_ranks(column, across)
        found, stated = _losses(positive[:, 1], column, at, by_text.to(at.dtype), inside, denominator, "text", across)
        losses.append(found.sum() / stated.sum().clamp_min(1))
    return torch.stack(losses).mean()


def _losses(
    line: Tensor, lse: Tensor, at: Tensor, weights: Tensor, inside: bool, denominator: Denominator, name: str, across: bool
) -> tuple[Tensor, Tensor]:
    """(lines,) losses, 0 where a line has no positive, and (lines,) which have one.

    Args:
        line: (K,) of each positive the row, or the column.
        lse: (lines,) log-sum-exps of the denominators.
        at: (K,) logits of the positives.
        across: other processes have positives of the same lines.
    """
    sums, count = torch.zeros_like(lse).index_add(0, line, weights), torch.bincount(line, minlength=len(lse)).to(lse.dtype)
    if across:
        sums, count = sum_over_ranks(torch.stack([sums, count]).detach())
    stated = count > 0
    if (stated & (sums == 0)).any():
        raise ValueError(f"{name}s: one has soft positives alone, in a direction that takes none; give each a pair of weight 1")
    if denominator == "negatives":  # a line of positives alone, as of a last batch of one item, has nothing to be told from
        stated = stated & ~is_empty(lse)
    if inside:
        matched = log_sum_exp_over_ranks(_log_sums(at + weights.log(), line, len(lse)), across)
    else:
        found = at - torch.logaddexp(at, lse[line]) if denominator == "each" else at
        matched = sum_over_ranks(torch.zeros_like(lse).index_add(0, line, weights * found), across)
        matched = matched / sums.clamp_min(torch.finfo(sums.dtype).tiny)
    losses = -matched if denominator == "each" else lse - matched
    return torch.where(stated, losses, 0), stated


def likeness_info_nce(
    logits: Product, pairs: Pairs, anchor: Side, *, direction: Direction = "both", chunk_size: int = CHUNK, matmul: Matmul = "exact"
) -> Tensor:
    """InfoNCE in which all pairs count, by how like their texts are (or their images), in the direction that looks for them; in nats.

    With b_j the unit vector of text j, a_i that of the (weighted) mean over the texts of image i, and w_ij = (1 + a_i . b_j) / 2, but for
    positive pairs the weight that they were given:
        L_image = -1/B sum_i sum_j w_ij / (sum_k w_ik) (s_ij - log Z_i)
    and L_text as :func:`info_nce`. With the anchor ``image`` images and texts change places. The weights of what is ignored, and of texts
    that were made to be false, are 0. No gradient goes through weights. Neither weights nor logits are held as a matrix: the weights are
    linear in a and b, so their sums over a line are inner products with sums over all of it.

    Args:
        logits: of pooled vectors.
        anchor: the side, ``image`` or ``text``, whose vectors say what is alike: that of a tower that is locked, or far ahead.
        others: as :func:`info_nce`.
    Raises:
        ValueError: as :func:`info_nce`.
    Source: "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss", arXiv:2309.14580, eqs. 3 to 5, there with one text
        an image; its other modality is the anchor here.
    """
    _check_word("anchor", anchor, Side)
    _check_word("direction", direction, Direction)
    _check_shape(logits, pairs)
    used, pairs = _used(logits, pairs)
    assert isinstance(used, Product)
    if not len(pairs.positive):
        return _nothing(used)
    positive, weights, excluded = pairs.of_here()
    asked = torch.cat([positive, excluded])
    order = torch.argsort(asked[:, 0], stable=True)
    row, column, at = statistics(used, excluded, asked[order], chunk_size, matmul)
    at = torch.empty_like(at).index_copy(0, order, at)  # in the order of ``asked``
    given = torch.cat([weights, weights.new_zeros(len(excluded))]).to(at.dtype)
    across, matched = pairs.here is not None, at[: len(positive)]
    column = log_sum_exp_over_ranks(column, across)
    images, texts = (x if x.dtype == at.dtype else x.to(at.dtype) for x in (used.image, used.text))
    losses = []
    if direction != "text":
        if anchor == "text":
            b = _unit(texts.detach())
            a = _unit(torch.zeros_like(images).index_add(0, positive[:, 0], given[: len(positive), None] * b[positive[:, 1]]))
            counted = ~pairs.false_texts
            counted[pairs.columns] = True
            mean = _likeness_mean((images, a), (texts, b), counted, asked, given, at, used.scale, across=False)
            found, _ = _stated(positive[:, 0], row, row - mean)
        else:
            found, _ = _losses(positive[:, 0], row, matched, given[: len(positive)], False, "all", "image", across=False)
        losses.append(sum_over_ranks(found.sum(), across) / len(pairs.rows.unique()))
    if direction != "image":
        if anchor == "image":
            a = _unit(images.detach())
            sums = torch.zeros_like(texts).index_add(0, positive[:, 1], given[: len(positive), None] * a[positive[:, 0]])
            b = _unit(sum_over_ranks(sums, across))
            counted = torch.ones(len(images), dtype=torch.bool, device=images.device)
            mean = _likeness_mean((texts, b), (images, a), counted, asked.flip(1), given, at, used.scale, across)
            found, stated = _stated(pairs.columns, column, column - mean)
        else:
            found, stated = _losses(positive[:, 1], column, matched, given[: len(positive)], False, "all", "text", across)
        losses.append(found.sum() / stated.sum())
    return torch.stack(losses).mean()


def _likeness_mean(
    lines: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    counted: Tensor,
    asked: Tensor,
    given: Tensor,
    at: Tensor,
    scale: Tensor,
    across: bool,
) -> Tensor:
    """(lines,) mean logit of each line under the weights of :func:`likeness_info_nce`.

    Args:
        lines, others: of each side the vectors that make logits, and the unit vectors that make weights.
        counted: (others,) bool, False: weight 0.
        asked: (K, 2) pairs of lines and others whose weights are ``given`` (K,), with their logits ``at``.
        across: other processes have the rest of the others.
    """
    (x, a), (y, b) = lines, others
    share = counted.to(x.dtype)
    sums = [share.sum(), share @ b, share @ y, (b * share[:, None]).T @ y]
    with torch.autocast(x.device.type, enabled=False):
        count, of_b, of_y, of_both = (sum_over_ranks(one, across) for one in sums)
        line, other = asked.T
        change = given - share[other] * (1 + (a[line] * b[other]).sum(1)) / 2
        weights = torch.zeros_like(a[:, 0]).index_add(0, line, change)
        logits = torch.zeros_like(x[:, 0]).index_add(0, line, change * at)
        weights, logits = (sum_over_ranks(one, across) for one in (weights, logits))
        weights = weights + (count + a @ of_b) / 2
        logits = logits + scale.to(x.dtype) / 2 * (x @ of_y + ((a @ of_both) * x).sum(1))
    return logits / weights.clamp_min(torch.finfo(weights.dtype).tiny)


def _stated(line: Tensor, lse: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, 0 where a line has no positive, and which have one."""
    stated = torch.bincount(line, minlength=len(lse)) > 0
    return torch.where(stated, losses, 0), stated


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _log_sums(values: Tensor, line: Tensor, lines: int) -> Tensor:
    """(lines,) log-sum-exp of the values of each line."""
    top = values.detach().new_full((lines,), -torch.inf).scatter_reduce(0, line, values.detach(), "amax")
    top = torch.where(top.isfinite(), top, 0)
    sums = torch.zeros_like(top).index_add(0, line, (values - top[line]).exp())
    return torch.where(sums > 0, torch.where(sums > 0, sums, 1).log() + top, absent(top))


def sigmoid_loss(logits: Tensor | Product, bias: Tensor, pairs: Pairs, *, chunk_size: int = CHUNK, matmul: Matmul = "exact") -> Tensor:
    """Each pair judged by itself, with any number of positives; summed over texts, mean over images, in nats.

    With z = s + bias and targets w (the weights of the positives, 0 elsewhere):
        L = -1/B sum_ij w_ij log sigmoid(z_ij) + (1 - w_ij) log sigmoid(-z_ij)   over the pairs that are not ignored.

    Args:
        bias: scalar; starts at -10 (SigLIP), for next to all pairs are negative.
        others: as :func:`info_nce`. A false text needs no positive.
    Raises:
        ValueError: a weight above 1.
    Source: "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343, sec. 3.2, there with one positive each.
    """
    _check_shape(logits, pairs)
    if (pairs.weights > 1).any():
        raise ValueError("weights above 1: here they are the probabilities of a match; divide by the largest")
    logits, pairs = _used(logits, pairs)
    if not len(pairs.used_rows):
        return _nothing(logits)
    positive, weights, ignored = pairs.of_here()
    total = softplus_sum(logits, bias, ignored, positive, weights, chunk_size, matmul)
    return sum_over_ranks(total, pairs.here is not None) / len(pairs.used_rows)


def soft_target_loss(
    logits: Tensor | Product,
    image_labels: Tensor,
    text_labels: Tensor,
    temperature: float = 1.0,
    direction: Direction = "both",
    *,
    chunk_size: int = CHUNK,
    matmul: Matmul = "exact",
    across: bool = False,
) -> Tensor:
    """Cross-entropy with targets that are a softmax of label similarities, over texts and over images; mean of both, in nats.

        t_ij = exp(l_i . m_j / temperature) / sum_k exp(l_i . m_k / temperature),   L_image = -1/B sum_ij t_ij (s_ij - log sum_k exp s_ik)

    Args:
        image_labels, text_labels: (B, C) and (M, C), l and m: what each is labelled with. No gradient goes to them.
        across: other processes have other images and the same texts.
        others: as :func:`info_nce`. For a product the targets are made in tiles too.
    Raises:
        ValueError: labels of another number, or an unknown direction.
    Source: "MedCLIP", arXiv:2210.10163, eqs. 2 to 5; its code has a temperature of 1 and labels that are not normalised.
    """
    _check_word("direction", direction, Direction)
    given = logits.image if isinstance(logits, Product) else logits
    dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
    vectors = (image_labels.detach().to(dtype), text_labels.detach().to(dtype))
    labels = Product(*vectors, torch.tensor(1 / temperature, dtype=dtype, device=given.device))
    if labels.shape != tuple(logits.shape):
        raise ValueError(f"labels of {labels.shape[0]} images and {labels.shape[1]} texts, the logits have shape {tuple(logits.shape)}")
    none = no_pairs(given.device)
    row, column, _ = statistics(logits, none, none, chunk_size, matmul)
    of_row, of_column = expected_logits(logits, labels, chunk_size, across)
    column = log_sum_exp_over_ranks(column, across)
    images = sum_over_ranks(torch.tensor(float(len(row)), dtype=row.dtype, device=row.device), across)
    losses = {"image": sum_over_ranks((row - of_row).sum(), across) / images, "text": (column - of_column).mean()}
    return torch.stack([loss for name, loss in losses.items() if direction in ("both", name)]).mean()


def _check_shape(logits: Tensor | Product, pairs: Pairs) -> None:
    if tuple(logits.shape) != pairs.logits_shape:
        raise ValueError(f"the logits have shape {tuple(logits.shape)}, the pairs {pairs.logits_shape}")


def _check_word(name: str, value: str, known: object) -> None:
    """Raise for a value that is none of a Literal's."""
    if value not in get_args(known):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(get_args(known))}")


def info_nce_of_logits(logits: Tensor, positives: Tensor, ignore: Tensor | None = None, false_texts: Tensor | None = None) -> Tensor:
    """:func:`info_nce` of a matrix, its pairs given as :func:`medvl.losses.pairs.pairs_of` takes them."""
    return info_nce(logits, pairs_of(positives, (len(logits), logits.shape[1]), ignore, false_texts))


def multi_positive_info_nce(image: Tensor, text: Tensor, positives: Tensor, temperature: Tensor | float, chunk_size: int = CHUNK) -> Tensor:
    """Symmetric InfoNCE where a study may have any number of positive sentences; mean of both directions, in nats.

    With s_ij = <image_i, text_j> / temperature, :func:`info_nce` of s.

    Args:
        image: (B, D), L2-normalised.
        text: (M, D), L2-normalised; M counts the different sentences of the whole batch.
        positives: (B, M) bool or float weights, or (K, 2) integer pairs (image, text).
        temperature: the divisor (0.07), not its inverse.
        chunk_size: rows of a tile of logits; 0 forms the (B, M) matrix.
    Raises:
        ValueError: as :func:`medvl.losses.pairs.pairs_of`.
    """
    scale = 1 / torch.as_tensor(temperature, dtype=image.dtype if image.dtype == torch.float64 else torch.float32, device=image.device)
    return info_nce(Product(image, text, scale), pairs_of(positives, (len(image), len(text))), chunk_size=chunk_size)


def _used(logits: Tensor | Product, pairs: Pairs) -> tuple[Tensor | Product, Pairs]:
    """Without the rows and columns that are dropped."""
    if pairs.all_used:
        return logits, pairs
    rows = pairs.used_rows if pairs.here is None else pairs.used_rows[slice(*pairs.here)]
    if isinstance(logits, Product):
        return replace(logits, image=logits.image[rows], text=logits.text[pairs.used_columns]), pairs.compact()
    return logits[rows][:, pairs.used_columns], pairs.compact()


def _nothing(logits: Tensor | Product) -> Tensor:
    """0, with a graph, so that an optimiser and other ranks go on."""
    if isinstance(logits, Product):
        return 0 * (logits.image.sum() + logits.text.sum() + logits.scale).float()
    return 0 * torch.where(logits.isfinite(), logits, 0).sum().float()


def _by_row(pairs: Tensor) -> Tensor:
    """Sorted by row."""
    return pairs[torch.argsort(pairs[:, 0], stable=True)]
