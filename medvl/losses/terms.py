"""Terms that add to a contrastive objective: what else features, texts and labels of a batch can be held to.

Shapes: B images of the whole batch, b of them here (all, unless processes share it), M texts, D embedding width, C codes, K prototypes.
Every term is the mean over the whole batch, on every process, with the gradients that :mod:`medvl.losses.ranks` describes.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.losses.objectives import info_nce
from medvl.losses.pairs import Pairs, pairs_of
from medvl.losses.ranks import rows_of_ranks, sum_over_ranks
from medvl.losses.statistics import no_pairs, statistics
from medvl.types import ImageFeatures, Product, TextFeatures


@dataclass(frozen=True)
class TermContext:
    """What a term may look at."""

    images: ImageFeatures  # of the b images here
    texts: TextFeatures  # of all M texts
    pairs: Pairs  # of all B images and M texts; its ``here`` says which images are here
    items: tuple[int, ...] | None = None  # images of each process, in the order of ranks; None: one process has all
    again: ImageFeatures | None = None  # of the same b images, changed by chance once more
    labels: Tensor | None = None  # (b, C) float, 1 present, 0 absent, NaN or -1 not known
    teacher_images: Tensor | None = None  # (b, D') of the same images by a teacher
    teacher_texts: Tensor | None = None  # (M, D') of the same texts by a teacher
    generator: torch.Generator | None = None  # of what terms draw, in the same state on every process; None: torch's own

    @property
    def across(self) -> bool:
        """Whether other processes have other images."""
        return self.items is not None

    def all_images(self, local: Tensor) -> Tensor:
        """(B, ...) from the (b, ...) that are here."""
        return local if self.items is None else rows_of_ranks(local, self.items)

    def mean_over_images(self, values: Tensor) -> Tensor:
        """Mean over all B of (b,) values."""
        return sum_over_ranks(values.sum(), self.across) / self.pairs.shape[0]


class Term(nn.Module, abc.ABC):
    """Base of terms.

    Args:
        weight: what the term is multiplied with before it is added to the objective.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abc.abstractmethod
    def forward(self, context: TermContext) -> Tensor:
        """The term, a scalar, without its weight."""


class ImageImageContrast(Term):
    """Symmetric InfoNCE between two views of the same images, each changed by chance in its own way.

    Args:
        weight: see :class:`Term`.
        temperature: fixed.
    Source: "CXR-CLIP", arXiv:2310.13292, eq. 4 (there also two films of a study).
    """

    def __init__(self, weight: float = 1.0, temperature: float = 0.07) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def forward(self, context: TermContext) -> Tensor:
        """Raises ValueError where the batch has no second view."""
        if context.again is None:
            raise ValueError(
                "image-image contrast needs a second view of every image: set data.init_args.second_view to true, with an augment"
            )
        one, other = _unit(context.images.pooled), context.all_images(_unit(context.again.pooled))
        same = torch.arange(len(other), device=other.device)
        pairs = pairs_of(torch.stack([same, same], 1), (len(other), len(other)), here=context.pairs.here)
        return info_nce(Product(one, other, one.new_tensor(1 / self.temperature)), pairs)


class TextTextContrast(Term):
    """Symmetric InfoNCE between texts, where those that are true of one study are positives of each other.

    A text that shares no study with another has no term and is no negative. 0 where there are none.

    Args:
        weight: see :class:`Term`.
        temperature: fixed.
    Source: "CXR-CLIP", arXiv:2310.13292, eq. 5, there with two texts a study; many positives as in arXiv:2004.11362.
    """

    def __init__(self, weight: float = 0.5, temperature: float = 0.07) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def forward(self, context: TermContext) -> Tensor:
        """See the class."""
        texts = _unit(context.texts.pooled)
        together = siblings(context.pairs)
        used = torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
        used[together.flatten()] = True
        if not len(together):
            return 0 * texts.sum()
        number = used.long().cumsum(0) - 1
        chosen, count = texts[used], int(used.sum())
        itself = torch.arange(count, device=texts.device)
        pairs = pairs_of(number[together], (count, count), ignore=torch.stack([itself, itself], 1))
        return info_nce(Product(chosen, chosen, chosen.new_tensor(1 / self.temperature)), pairs)


class FalseTextContrast(Term):
    """Each text that is true of an image against the texts that were made to be false, and no others.

        L = 1/B' sum_i 1/|P_i| sum_{j in P_i} log(1 + sum_{f in F_i} exp(s_if - s_ij))   over the B' images that have a positive

    F_i are the texts made to be false, without those that are true of image i after all (what is false of one study may be true of
    another) and those that ``pairs`` ignores. 0 in a batch without false texts. Under the objective they are negatives among many; here
    they are all there is.

    Args:
        weight: see :class:`Term`.
        temperature: fixed, of s.
    Source: ours, after "When and why vision-language models behave like bags-of-words" (NegCLIP), arXiv:2210.01936, where false captions
        join the batch.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 0.07) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def forward(self, context: TermContext) -> Tensor:
        """See the class."""
        images, texts = _unit(context.images.pooled), _unit(context.texts.pooled)
        positive, _, ignored = context.pairs.of_here()
        false = context.pairs.false_texts & context.pairs.used_columns
        if not false.any():
            return 0 * (images.sum() + texts.sum())
        wrong = self._wrong(images, texts, false, torch.cat([positive, ignored]))
        right = (images[positive[:, 0]] * texts[positive[:, 1]]).sum(1) / self.temperature
        losses = F.softplus(wrong[positive[:, 0]] - right)
        count = torch.bincount(positive[:, 0], minlength=len(images)).clamp_min(1)
        stated = max(1, len(context.pairs.rows.unique()))
        return sum_over_ranks((losses / count[positive[:, 0]]).sum(), context.across) / stated

    def _wrong(self, images: Tensor, texts: Tensor, false: Tensor, excluded: Tensor) -> Tensor:
        """(b,) log-sum-exp over the false texts of each image, without the excluded pairs (L, 2) of images here and texts."""
        excluded = excluded[false[excluded[:, 1]]]
        excluded = excluded[torch.argsort(excluded[:, 0], stable=True)]
        numbered = torch.stack([excluded[:, 0], (false.long().cumsum(0) - 1)[excluded[:, 1]]], dim=1)
        scores = Product(images, texts[false], images.new_tensor(1 / self.temperature))
        return statistics(scores, numbered, no_pairs(images.device))[0]


class UniformityAlignment(Term):
    """Positive pairs close, and images, and texts, spread over the sphere.

        align = mean over positive pairs |x_i - y_j|^2,   uniform(x) = log mean_{i != k} exp(-t |x_i - x_k|^2)
        L = alignment * align + uniformity * (uniform(images) + uniform(texts)) / 2

    Args:
        weight: see :class:`Term`.
        alignment, uniformity: weights of the two.
        t: how far points push each other.
    Source: "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere", arXiv:2005.10242,
        eqs. 3 and 5, across two modalities; against the gap between them, arXiv:2203.02053.
    """

    def __init__(self, weight: float = 1.0, alignment: float = 1.0, uniformity: float = 1.0, t: float = 2.0) -> None:
        super().__init__(weight)
        self.alignment, self.uniformity, self.t = alignment, uniformity, t

    def forward(self, context: TermContext) -> Tensor:
        """See the class."""
        images, texts = _unit(context.images.pooled), _unit(context.texts.pooled)
        positive, _, _ = context.pairs.of_here()
        apart = sum_over_ranks(alignment(images, texts, positive).sum(), context.across) / max(1, len(context.pairs.positive))
        spread = (uniformity(context.all_images(images), self.t) + uniformity(texts, self.t)) / 2
        return self.alignment * apart + self.uniformity * spread


class FeatureMimic(Term):
    """Images and texts where a frozen teacher has them; the teacher is a run of ours.

        L = mean_i |A x_i - x'_i|^2 + mean_j |A y_j - y'_j|^2   of unit vectors x, y and those of the teacher; A the identity, or learned

    Args:
        weight: see :class:`Term`.
        embed_dim, teacher_dim: widths of student and teacher; where they differ, A is linear (and renormalised).
    Source: "CLIP-KD", arXiv:2307.12732, feature distillation, eq. 6.
    """

    def __init__(self, embed_dim: int, teacher_dim: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.teacher_dim = teacher_dim
        self.out = nn.Identity() if embed_dim == teacher_dim else nn.Linear(embed_dim, teacher_dim, bias=False)

    def forward(self, context: TermContext) -> Tensor:
        """Raises ValueError where the batch has no teacher's features, or features of another width."""
        if context.teacher_images is None or context.teacher_texts is None:
            raise ValueError("feature mimicry needs the features of a teacher: set model.teacher to the folder of a run")
        for features in (context.teacher_images, context.teacher_texts):
            if features.shape[1] != self.teacher_dim:
                raise ValueError(
                    f"feature mimicry: teacher_dim is {self.teacher_dim}, the teacher embeds in {features.shape[1]} dimensions"
                )
        of_images = mimicry(self.out(_unit(context.images.pooled)), context.teacher_images)
        of_texts = mimicry(self.out(_unit(context.texts.pooled)), context.teacher_texts)
        return context.mean_over_images(of_images) + of_texts.mean()


class MultiLabelCodes(Term):
    """Binary cross-entropy of codes from the pooled vector of the image, by a linear layer of its own; what is not known is left out.

    Mean over the known values of the batch; 0 where there are none. The layer is no part of the model that is saved.

    Args:
        embed_dim: D.
        codes: C, how many labels the data gives (``labels`` of the data module).
        weight: see :class:`Term`.
        positive_weight: of present codes (``pos_weight`` of torch).
    Source: "Merlin", arXiv:2406.06512, phenotype classification beside contrast; labels of -1 or empty are not known.
    """

    def __init__(self, embed_dim: int, codes: int, weight: float = 1.0, positive_weight: float = 1.0) -> None:
        super().__init__(weight)
        self.out, self.positive_weight = nn.Linear(embed_dim, codes), positive_weight

    def forward(self, context: TermContext) -> Tensor:
        """Raises ValueError where the batch has no labels, or another number."""
        labels = context.labels
        if labels is None or labels.shape[1] != self.out.out_features:
            raise ValueError(
                f"multi-label codes: the model has {self.out.out_features}, the batch {'none' if labels is None else labels.shape[1]}; "
                "name as many in data.init_args.labels"
            )
        total = masked_codes(self.out(context.images.pooled), labels, self.positive_weight)
        count = sum_over_ranks((labels >= 0).sum().float(), context.across)
        return sum_over_ranks(total, context.across) / count.clamp_min(1)


class SentencePrototypes(Term):
    """A bank of sentence prototypes: texts are made of them, and images foretell which ones their texts are made of.

    With p_j = softmax_k(cos(t_j, c_k) / tau) and q_i the same of images:
        L = mean_j |t_j - unit(sum_k p_jk c_k)|^2 + mean_i H(mean_{j in P_i} p_j, q_i)
    where no gradient goes through p in the second part. With ``gumbel`` the first part draws a prototype for each text in training
    (straight-through Gumbel softmax, by the context's ``generator``); in evaluation nothing is drawn.

    Args:
        embed_dim: D.
        prototypes: K.
        weight: see :class:`Term`.
        temperature: tau, fixed.
        gumbel: draw.
    Source: "PRIOR", arXiv:2307.12577, sentence prototype bank (512, Gumbel softmax). Departures: the reconstruction is of vectors, not of
        tokens by a decoder; the bank is trained by gradients, not moved by averages; zero-shot use draws nothing.
    """

    def __init__(self, embed_dim: int, prototypes: int = 512, weight: float = 1.0, temperature: float = 0.1, gumbel: bool = False) -> None:
        super().__init__(weight)
        self.bank = nn.Parameter(torch.randn(prototypes, embed_dim) * embed_dim**-0.5)
        self.temperature, self.gumbel = temperature, gumbel

    def forward(self, context: TermContext) -> Tensor:
        """See the class."""
        images, texts, bank = _unit(context.images.pooled), _unit(context.texts.pooled), _unit(self.bank)
        scores = _exact_product(texts, bank.T) / self.temperature
        shares = drawn(scores, context.generator) if self.gumbel and self.training else scores.softmax(1)
        rebuilt = (texts - _unit(_exact_product(shares, bank))).square().sum(1).mean()
        positive, weights, _ = context.pairs.of_here()
        weights = weights.to(images.dtype)
        total = torch.zeros(len(images), dtype=images.dtype, device=images.device).index_add(0, positive[:, 0], weights)
        wanted = images.new_zeros(len(images), len(bank)).index_add(
            0, positive[:, 0], (weights / total[positive[:, 0]])[:, None] * scores.detach().softmax(1)[positive[:, 1]]
        )
        foretold = -(wanted * (_exact_product(images, bank.T) / self.temperature).log_softmax(1)).sum(1)
        return rebuilt + sum_over_ranks(foretold.sum(), context.across) / max(1, len(context.pairs.rows.unique()))


def alignment(images: Tensor, texts: Tensor, positive: Tensor) -> Tensor:
    """(K,) squared distances of the pairs (K, 2) of unit vectors."""
    return (images[positive[:, 0]] - texts[positive[:, 1]]).square().sum(1)


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """Log mean over pairs of exp(-t |x_i - x_k|^2) of unit vectors (N, D); 0 of fewer than two. No (N, N) matrix is held.

    Of unit vectors it is a log-sum-exp of inner products: -t |x_i - x_k|^2 = 2t (x_i . x_k) - 2t.
    """
    if len(x) < 2:
        return 0 * x.sum()
    itself = torch.arange(len(x), device=x.device)
    rows, _, _ = statistics(Product(x, x, x.new_tensor(2 * t)), torch.stack([itself, itself], 1), no_pairs(x.device))
    return rows.logsumexp(0) - 2 * t - math.log(len(x) * (len(x) - 1))


def mimicry(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) squared distances of the unit vectors of student and teacher; no gradient goes to the teacher."""
    return (_unit(student) - _unit(teacher.detach()).to(student.dtype)).square().sum(1)


def masked_codes(logits: Tensor, labels: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Sum of binary cross-entropies over the known labels; NaN, and -1, is not known, and what stands there has no gradient.

    Args:
        logits, labels: (N, C).
        positive_weight: of present codes.
    Raises:
        ValueError: labels of another shape, or one that is neither from 0 to 1 nor -1 nor NaN.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)}, logits of {tuple(logits.shape)}")
    known = labels >= 0
    if ((labels > 1) | (~known & (labels != -1) & ~labels.isnan())).any():
        raise ValueError("labels must be 1 (present), 0 (absent), a probability between, or NaN or -1 (not known)")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weight = logits.new_tensor(positive_weight)
    return F.binary_cross_entropy_with_logits(logits[known], labels[known].to(logits.dtype), reduction="sum", pos_weight=weight)


def drawn(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(N, K) one-hot draws by the softmax of each row, whose gradients are those of the softmax of the noisy scores.

    Args:
        generator: of the draws, on any device; None: torch's own of the scores' device.
    Source: "Categorical Reparameterization with Gumbel-Softmax", arXiv:1611.01144, sec. 2.2 (straight-through).
    """
    device = scores.device if generator is None else generator.device
    noise = torch.empty(scores.shape, dtype=scores.dtype, device=device).exponential_(generator=generator)
    soft = (scores - noise.to(scores.device).clamp_min(torch.finfo(scores.dtype).tiny).log()).softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


def siblings(pairs: Pairs) -> Tensor:
    """(S, 2) pairs of different texts that are true of one image, each once in either order."""
    found: list[Tensor] = []
    rows, columns = pairs.rows, pairs.columns
    for size in torch.bincount(rows).unique().tolist():  # all images with so many texts at once
        if size < 2:
            continue
        counts = torch.bincount(rows)
        groups = columns[counts[rows] == size].view(-1, size)
        one, other = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        keep = (one != other).flatten()
        found.append(torch.stack([groups[:, one.flatten()[keep]], groups[:, other.flatten()[keep]]], -1).flatten(0, 1))
    return torch.cat(found).unique(dim=0) if found else rows.new_zeros(0, 2)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product, not rounded under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
