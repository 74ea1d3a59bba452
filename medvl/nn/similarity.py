"""Similarities: how an image's features and a text's become one logit, and the map that this logit is made of.

Shapes: B images, M texts, N image tokens, S slices of a CT, D embedding width. Logits are cosines divided by a learned temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.types import ImageFeatures, Product, Similarity, TextFeatures


class Temperature(nn.Module):
    """A learned positive number (the divisor of cosines, a sharpness), kept as its logarithm and clamped to [low, high].

    The gradient passes the clamp, so a value beyond its bound is not stuck there; it may drift beyond and need as long to come back.
    """

    def __init__(self, init: float = 0.07, low: float = 0.01, high: float = 1.0) -> None:
        super().__init__()
        if not 0 < low <= init <= high:
            raise ValueError(f"temperature {init} is not in [{low}, {high}]")
        self.log = nn.Parameter(torch.tensor(math.log(init)))
        self.low, self.high = math.log(low), math.log(high)

    def forward(self) -> Tensor:
        """The value, a scalar."""
        inside = self.log.clamp(self.low, self.high)
        return (self.log + (inside - self.log).detach()).exp()


class PooledSimilarity(Similarity):
    """Cosine of the pooled vectors (CLIP, arXiv:2103.00020); a map is the cosine of each token."""

    reads_words = False

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """One part, ``pooled``."""
        return {"pooled": pooled_logits(images, texts, self.temperature())}

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Cosine of every token with the text."""
        return lay_on_grid(token_cosines(images, texts), images)


class TokenSimilarity(Similarity):
    """A soft maximum over token cosines, so that a logit is made of the very map that explains it.

    The token part is a log-mean-exp of token cosines at sharpness r (multiple-instance pooling, arXiv:1411.6228, eq. 6):
        l_ij = 1/(r tau) log 1/N sum_n exp(r cos(token_in, text_j)),
    between the mean (r -> 0) and the maximum (r -> infinity); r is learned and clamped to [1, 100]. Started blunt (10), a finding of a few
    tokens never gets a gradient of its own; 30 lets it. Tokens on padding do not count. The cosine of the pooled vectors is a part of its
    own: trained beside, so that pooled vectors can be compared and searched, and left out of the score.
    """

    reads_words = False

    def __init__(self, temperature: float = 0.07, sharpness: float = 30.0) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        self.token_temperature = Temperature(temperature)
        self.sharpness = Temperature(sharpness, low=1.0, high=100.0)

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """Parts ``tokens`` and ``pooled``."""
        return {
            "tokens": self._soft_maximum(images, texts),
            "pooled": pooled_logits(images, texts, self.temperature()),
        }

    def forward(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, M) scores: the token part."""
        return self._soft_maximum(images, texts)

    def _soft_maximum(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        sharpness = self.sharpness()
        scaled = token_cosines(images, texts, sharpness)  # (B, M, N)
        count = (
            torch.full_like(scaled[:, :1, 0], scaled.shape[-1]) if images.token_valid is None else images.token_valid.sum(1, keepdim=True)
        )
        soft_max = (wide(scaled.logsumexp(-1)) - wide(count).log()) / sharpness
        return soft_max / self.token_temperature()

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """The token cosines that the soft maximum is taken of."""
        return lay_on_grid(token_cosines(images, texts), images)


class SliceSimilarity(Similarity):
    """Text-conditioned slice pooling: a text attends to the slices of a CT, and its logit is its cosine with what they mix to.

    With x_is the unit vectors of the valid slices of study i, t_j that of text j and r a learned sharpness in [1, 100]:
        a_ijs = softmax_s(r x_is . t_j),   v_ij = sum_s a_ijs x_is,   l_ij = cos(v_ij, t_j) / tau
    so that each phrase has its own mixture: an effusion chooses the slices of the lung bases and a nodule its few. :meth:`weights` gives
    a, :func:`slice_scores` the cosines that it is made of. The cosine of the pooled vectors is a part of its own, trained beside and left
    out of the score, as in :class:`TokenSimilarity`; the tower's pooling serves that part alone. Maps are token cosines.

    Source: "Stacked Cross Attention for Image-Text Matching", arXiv:1803.08024, text to image, with slices in the place of regions and a
    whole text in that of a word. Departures: cosines are not cut at 0 and normalised over the words (there is one); r is learned.
    """

    reads_words = False

    def __init__(self, temperature: float = 0.07, sharpness: float = 30.0) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        self.slice_temperature = Temperature(temperature)
        self.sharpness = Temperature(sharpness, low=1.0, high=100.0)

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """Parts ``slices`` and ``pooled``."""
        return {"slices": self(images, texts), "pooled": pooled_logits(images, texts, self.temperature())}

    def forward(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, M) scores: the part of the slices."""
        mixed = unit(self.weights(images, texts) @ _unit_slices(images))  # (B, M, D)
        return (mixed * unit(texts.pooled)).sum(-1) / self.slice_temperature()

    def weights(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, M, S) share of each slice in the mixture of each text: sums to 1 over S, 0 on padding."""
        scores = _slice_cosines(images, texts) * self.sharpness()
        return scores.masked_fill(~_slice_valid(images)[:, None], -torch.inf).softmax(-1)

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Cosine of every token with the text."""
        return lay_on_grid(token_cosines(images, texts), images)


def pooled_logits(images: ImageFeatures, texts: TextFeatures, temperature: Tensor) -> Product:
    """Cosines of the pooled vectors divided by a temperature, not formed."""
    return Product(unit(images.pooled), unit(texts.pooled), 1 / temperature)


def slice_scores(images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """(B, M, S) cosine of every slice with every text, in [-1, 1]: which slices speak for it; NaN on padding.

    Raises:
        ValueError: the image tower keeps no slices.
    """
    return _slice_cosines(images, texts).masked_fill(~_slice_valid(images)[:, None], torch.nan)


def slice_logits(similarity: Similarity, images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """(B, M, S) scores that a study would have if one slice were all of it: which slices speak for a text; NaN on padding.

    What the similarity makes of a study it makes here of each slice: of its tokens, of its vector, or of both.

    Raises:
        ValueError: the image tower keeps no slices.
    """
    single, valid = slices_as_studies(images)
    scores = similarity(single, texts).unflatten(0, valid.shape).transpose(1, 2)
    return scores.masked_fill(~valid[:, None], torch.nan)


def slices_as_studies(images: ImageFeatures) -> tuple[ImageFeatures, Tensor]:
    """Features of B * S studies of one slice each, in the order of studies and slices, and (B, S) bool, False on padding.

    Raises:
        ValueError: the image tower keeps no slices.
    """
    slices, valid = _unit_slices(images), _slice_valid(images)
    single = ImageFeatures(slices.flatten(0, 1), slices=slices.flatten(0, 1)[:, None])
    if images.tokens is not None and images.grid is not None:
        tokens = torch.where(valid[..., None, None], images.tokens.unflatten(1, (valid.shape[1], -1)), 0.0)
        single = single.replace(tokens=tokens.flatten(0, 1), grid=(1, *images.grid[-2:]))
    return single, valid


def _slice_cosines(images: ImageFeatures, texts: TextFeatures) -> Tensor:
    """(B, M, S), 0 on padding: a NaN there would come back through whatever the scores are multiplied with."""
    return wide(unit(texts.pooled) @ _unit_slices(images).transpose(1, 2))


def _unit_slices(images: ImageFeatures) -> Tensor:
    """(B, S, D) unit vectors, 0 on padding, whatever lies there."""
    return unit(torch.where(_slice_valid(images)[..., None], _slices(images), 0.0))


def _slices(images: ImageFeatures) -> Tensor:
    if images.slices is None:
        raise ValueError(
            "this image tower keeps no slices: slice scores need one that reads slices, such as modalities.ct.SlicePooledEncoder"
        )
    return images.slices


def _slice_valid(images: ImageFeatures) -> Tensor:
    slices = _slices(images)
    return slices.new_ones(slices.shape[:2], dtype=torch.bool) if images.slice_valid is None else images.slice_valid


def unit(x: Tensor) -> Tensor:
    """L2-normalised along the last axis, in float32 at least."""
    return F.normalize(wide(x), dim=-1)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def token_cosines(images: ImageFeatures, texts: TextFeatures, scale: Tensor | float = 1.0) -> Tensor:
    """(B, M, N) cosines of every token with every text, times ``scale``; -inf for tokens on padding.

    Under autocast the result has its type; scale and padding enter the one matrix product, so the large tensor is written once.

    Raises:
        ValueError: the image tower keeps no tokens.
    """
    if images.tokens is None:
        raise ValueError("this image tower keeps no tokens: token similarities and maps need ImageFeatures.tokens")
    tokens, words = unit(images.tokens), unit(texts.pooled) * scale
    words = words.expand(len(tokens), *words.shape)
    if images.token_valid is None:
        return words @ tokens.transpose(1, 2)
    padding = torch.zeros_like(images.token_valid, dtype=tokens.dtype).masked_fill(~images.token_valid, -torch.inf)
    return torch.baddbmm(padding[:, None], words, tokens.transpose(1, 2))


def lay_on_grid(scores: Tensor, images: ImageFeatures) -> Tensor:
    """(B, M, N) to (B, M, *grid), NaN where a token saw only padding."""
    if images.grid is None:
        raise ValueError("ImageFeatures.grid is missing: tokens cannot be laid out without it")
    if images.token_valid is not None:
        scores = scores.masked_fill(~images.token_valid[:, None], torch.nan)
    return scores.float().unflatten(-1, images.grid)
