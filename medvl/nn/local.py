"""Local similarities: logits of single image tokens and single words, and the maps that they are made of.

Shapes: B images, M texts, N image tokens, L words, K concepts of a text, D embedding width. Words are the tokens of a text
(:class:`medvl.types.TextFeatures`); a text that has none counts as one word, its pooled vector. Nothing on padding counts.

No published system is a class here: each is one of these under an objective, as its recipe says. A matrix of all tokens with all words is
never held: texts are taken some at a time, and again for the gradients (:func:`over_texts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medvl.nn.similarity import Temperature, lay_on_grid, pooled_logits, token_cosines, unit, wide
from medvl.types import ImageFeatures, Product, Similarity, TextFeatures

BUDGET = 2**24
"""Numbers of one intermediate tensor (64 MiB in float32) above which the texts of a batch are taken some at a time."""


class SentenceAttentionSimilarity(Similarity):
    """A text attends to the tokens of an image, and its logit is its cosine with what they mix to.

    With V_n the unit tokens (and the unit pooled vector, as if it were a token more) of image i, t the unit vector of text j:
        a = softmax_n(cos(t, V_n) / tau_a),   g = sum_n a_n V_n,   l_ij = cos(t, g) / tau
    The map is the cosines that the attention is made of.

    Args:
        temperature: tau to start with, learned and clamped.
        attention_temperature: tau_a to start with, learned by itself; None: tau.
        with_pooled: the pooled vector is attended to, so that it is trained too; it is no part of a map.
        norm_width: D, for one layer norm that texts and tokens share; None: none.
    Source: "RadZero", arXiv:2504.07416 (there tau_a = tau, 12 x 12 patches and the class token, a shared layer norm). Departures:
        temperatures are clamped, sums are log-sum-exps, and all texts are scored at once.
    """

    reads_words = False

    def __init__(
        self,
        temperature: float = 0.07,
        attention_temperature: float | None = None,
        with_pooled: bool = True,
        norm_width: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        self.attention_temperature = None if attention_temperature is None else Temperature(attention_temperature)
        self.with_pooled = with_pooled
        self.norm = None if norm_width is None else nn.LayerNorm(norm_width)

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """One part, ``attention``."""
        images, texts = self._normed(images, texts)
        tokens, valid = image_tokens(images)
        if self.with_pooled:
            tokens = torch.cat([unit(images.pooled)[:, None], tokens], 1)
            valid = F.pad(valid, (1, 0), value=True)
        temperature = self.temperature()
        sharp = temperature if self.attention_temperature is None else self.attention_temperature()

        def logits(part: TextFeatures) -> Tensor:
            query = unit(part.pooled)
            weights = masked_softmax(query @ tokens.transpose(1, 2) / sharp, valid[:, None])  # (B, m, N)
            return (unit(weights @ tokens) * query).sum(-1) / temperature

        return {"attention": over_texts(logits, texts, tokens.shape[0] * (tokens.shape[1] + tokens.shape[2]))}

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Cosine of every token with the text."""
        images, texts = self._normed(images, texts)
        return lay_on_grid(token_cosines(images, texts), images)

    def _normed(self, images: ImageFeatures, texts: TextFeatures) -> tuple[ImageFeatures, TextFeatures]:
        if self.norm is None:
            return images, texts
        tokens = self.norm(seen_tokens(images))
        return images.replace(pooled=self.norm(images.pooled), tokens=tokens), TextFeatures(self.norm(texts.pooled))


class WordRegionSimilarity(Similarity):
    """Each word attends to the tokens of an image; the logit of a text is a soft sum of how well each word agrees with what it found.

    With w the unit words of text j, V_n the unit tokens of image i, r_a and r learned sharpnesses:
        c_w = sum_n softmax_n(r_a cos(w, V_n)) V_n,   l_ij = 1/(r tau) log sum_w exp(r cos(w, c_w))
    The pooled cosine is a part beside it, and the score is the mean of both. A map is the mean over words of their token cosines.

    Args:
        temperature: of the pooled part.
        word_temperature: tau to start with.
        attention_sharpness, word_sharpness: r_a and r to start with.
        mean: divide the sum over words by their number, so that a long text is not likelier for its length.
    Source: "GLoRIA", ICCV 2021, eqs. 2 to 5; its code has r_a = 4, r = 5, and 10 for 1/(r tau). Departures: cosines in the attention,
        where the paper has inner products, and its code these after a softmax over the words; padding takes no part.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        word_temperature: float = 0.02,
        attention_sharpness: float = 4.0,
        word_sharpness: float = 5.0,
        mean: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)
        self.word_temperature = Temperature(word_temperature)
        self.attention_sharpness = Temperature(attention_sharpness, low=1.0, high=100.0)
        self.word_sharpness = Temperature(word_sharpness, low=1.0, high=100.0)
        self.mean = mean

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """Parts ``words`` and ``pooled``."""
        tokens, valid = image_tokens(images)
        attention, sharpness, temperature = self.attention_sharpness(), self.word_sharpness(), self.word_temperature()

        def logits(part: TextFeatures) -> Tensor:
            words, real = text_words(part)
            cosines = torch.einsum("mld,bnd->bmln", words, tokens)
            weights = masked_softmax(cosines * attention, valid[:, None, None])
            found = unit(torch.einsum("bmln,bnd->bmld", weights.to(tokens.dtype), tokens))
            agreement = wide((found * words).sum(-1) * sharpness)  # (B, m, L)
            total = agreement.masked_fill(~real, -torch.inf).logsumexp(-1)
            if self.mean:
                total = total - real.sum(-1).to(total.dtype).log()
            return total / (sharpness * temperature)

        b, n, d = tokens.shape
        return {
            "words": over_texts(logits, texts, b * words_of(texts).shape[1] * (n + d)),
            "pooled": pooled_logits(images, texts, self.temperature()),
        }

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Mean over words of the cosine of every token with the word."""
        return lay_on_grid(_word_token_maps(images, texts, largest=False), images)


class TokenwiseSimilarity(Similarity):
    """Every token with its best word, and every word with its best token: two matrices, one for each direction of a loss.

        l_image = 1/(N tau) sum_n max_w cos(V_n, w),   l_text = 1/(L tau) sum_w max_n cos(V_n, w)
    As published, ``direction: {image: image, text: text}`` of the objective takes each in its own direction alone; without, both are
    trained in both. The score is their mean. A map is each token's cosine with its best word.

    Source: "FILIP", arXiv:2111.07783, eqs. 3 to 5. Departures: padding has no share; tokens are not dropped before the maxima.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = Temperature(temperature)

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """Parts ``image`` and ``text``."""
        tokens, valid = image_tokens(images)
        temperature = self.temperature()

        def logits(part: TextFeatures) -> Tensor:
            words, real = text_words(part)
            cosines = torch.einsum("mld,bnd->bmln", words, tokens)
            return torch.stack([_mean_of_best(cosines.transpose(2, 3), valid[:, None], real), _best_tokens(cosines, valid, real)], -1)

        found = over_texts(logits, texts, tokens.shape[0] * tokens.shape[1] * words_of(texts).shape[1]) / temperature
        return {"image": found[..., 0], "text": found[..., 1]}

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Cosine of every token with that word of the text that it resembles most."""
        return lay_on_grid(_word_token_maps(images, texts, largest=True), images)


class ConceptSimilarity(Similarity):
    """The concepts of a text, each at the token of the image that it resembles most.

    With e_k the unit mean of the words of concept k of text j (:attr:`medvl.types.TextFeatures.concepts`):
        l_ij = 1/(K tau) sum_k max_n cos(V_n, e_k)
    A text in which no concept was found counts as one concept, all its words. The pooled cosine is a part beside it, and the score is the
    mean of both. A map is each token's cosine with the concept it resembles most.

    Source: "ConceptCLIP", arXiv:2501.15579, region-concept alignment, there with a bias and the sigmoid loss
        (:class:`medvl.losses.MultiPositiveSigmoid`). Departure: a concept's words are found by their place, not by their word pieces.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature, self.concept_temperature = Temperature(temperature), Temperature(temperature)

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """Parts ``concepts`` and ``pooled``."""
        tokens, valid = image_tokens(images)
        grouped = with_concepts(texts)

        def logits(part: TextFeatures) -> Tensor:
            concepts, real = text_words(part)
            return _best_tokens(torch.einsum("mld,bnd->bmln", concepts, tokens), valid, real)

        found = over_texts(logits, grouped, tokens.shape[0] * tokens.shape[1] * words_of(grouped).shape[1])
        return {"concepts": found / self.concept_temperature(), "pooled": pooled_logits(images, texts, self.temperature())}

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Cosine of every token with that concept of the text that it resembles most."""
        return lay_on_grid(_word_token_maps(images, with_concepts(texts), largest=True), images)


def over_texts(of: Callable[[TextFeatures], Tensor], texts: TextFeatures, numbers: int, budget: int = BUDGET) -> Tensor:
    """``of(texts)``, (B, M, ...), from some texts at a time; what a part held is made again for its gradients.

    Args:
        of: of some texts (B, m, ...).
        numbers: size of the largest tensor that one text needs.
        budget: how large it may be for the texts taken at once.
    """
    count, size = len(texts.pooled), max(1, budget // max(1, numbers))
    if size >= count:
        return of(texts)
    parts = [texts.rows(start, min(start + size, count)) for start in range(0, count, size)]
    if not torch.is_grad_enabled():
        return torch.cat([of(part) for part in parts], 1)
    return torch.cat([checkpoint(of, part, use_reentrant=False) for part in parts], 1)


def image_tokens(images: ImageFeatures) -> tuple[Tensor, Tensor]:
    """(B, N, D) unit tokens, 0 on padding whatever lies there, and (B, N) bool, False on padding.

    Raises:
        ValueError: the image tower keeps no tokens.
    """
    tokens = seen_tokens(images)
    valid = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if images.token_valid is None else images.token_valid
    return unit(tokens), valid


def seen_tokens(images: ImageFeatures) -> Tensor:
    """(B, N, D) tokens, 0 on padding: a NaN there would reach the gradient of whatever they are multiplied with.

    Raises:
        ValueError: the image tower keeps no tokens.
    """
    if images.tokens is None:
        raise ValueError("this image tower keeps no tokens: local similarities and maps need ImageFeatures.tokens")
    return images.tokens if images.token_valid is None else images.tokens.masked_fill(~images.token_valid[..., None], 0.0)


def text_words(texts: TextFeatures) -> tuple[Tensor, Tensor]:
    """(M, L, D) unit words, 0 on padding, and (M, L) bool, False on padding; a text without a word has one, its pooled vector.

    Raises:
        ValueError: the report tower keeps no tokens.
    """
    words = words_of(texts)
    real = words.new_ones(words.shape[:2], dtype=torch.bool) if texts.token_valid is None else texts.token_valid
    bare = ~real.any(1)
    words = words.masked_fill(~real[..., None], 0.0)
    first = torch.where(bare[:, None], texts.pooled.to(words.dtype), words[:, 0])
    return unit(torch.cat([first[:, None], words[:, 1:]], 1)), torch.cat([(real[:, 0] | bare)[:, None], real[:, 1:]], 1)


def words_of(texts: TextFeatures) -> Tensor:
    """(M, L, D) tokens of the texts.

    Raises:
        ValueError: the report tower keeps no tokens.
    """
    if texts.tokens is None:
        raise ValueError("this report tower keeps no tokens: this similarity needs words; give the tower `tokens: words`")
    return texts.tokens


def with_concepts(texts: TextFeatures) -> TextFeatures:
    """The texts with a concept, the mean of its words, in the place of words; of a text without a concept the mean of all its words.

    Raises:
        ValueError: a report tower that keeps no tokens, or marks no concepts.
    """
    words = words_of(texts)
    if texts.concepts is None:
        raise ValueError("this report tower marks no concepts: wrap it in reports.towers.ConceptReportEncoder")
    m, length, width = words.shape
    valid = words.new_ones(m, length, dtype=torch.bool) if texts.token_valid is None else texts.token_valid
    marked = valid & (texts.concepts >= 0)
    inside = marked | (valid & ~marked.any(1, keepdim=True))
    number = torch.where(marked, texts.concepts, 0)
    count = int(number.max()) + 1 if number.numel() else 1
    place = (torch.arange(m, device=words.device)[:, None] * count + number)[inside]
    found = wide(words[inside])
    sums = found.new_zeros(m * count, width).index_add(0, place, found)
    sizes = torch.bincount(place, minlength=m * count)
    means = (sums / sizes.clamp_min(1)[:, None]).view(m, count, width)
    return TextFeatures(texts.pooled, means, (sizes > 0).view(m, count))


def masked_softmax(scores: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the last axis, in float32 at least, 0 where not valid."""
    return wide(scores).masked_fill(~valid, -torch.inf).softmax(-1)


def _mean_of_best(cosines: Tensor, valid: Tensor, real: Tensor) -> Tensor:
    """(B, m): of (B, m, P, Q) the largest over the Q that are ``real`` (m, Q), averaged over the P that are ``valid``."""
    best = wide(cosines).masked_fill(~real[:, None], -torch.inf).amax(-1).masked_fill(~valid, 0.0)
    return best.sum(-1) / valid.sum(-1)


def _best_tokens(cosines: Tensor, valid: Tensor, real: Tensor) -> Tensor:
    """(B, m): of (B, m, L, N) the largest over the ``valid`` tokens (B, N), averaged over the ``real`` words (m, L)."""
    best = wide(cosines).masked_fill(~valid[:, None, None], -torch.inf).amax(-1).masked_fill(~real, 0.0)
    return best.sum(-1) / real.sum(-1)


def _word_token_maps(images: ImageFeatures, texts: TextFeatures, largest: bool) -> Tensor:
    """(B, M, N) cosine of every token with each text's best word, or the mean over its words."""
    tokens, _ = image_tokens(images)

    def cosines(part: TextFeatures) -> Tensor:
        words, real = text_words(part)
        if not largest:
            mean = words.sum(1) / real.sum(1, keepdim=True)  # words on padding are 0
            return wide(mean @ tokens.transpose(1, 2))
        return wide(torch.einsum("mld,bnd->bmnl", words, tokens)).masked_fill(~real[:, None], -torch.inf).amax(-1)

    return over_texts(cosines, texts, math.prod(tokens.shape[:2]) * (words_of(texts).shape[1] if largest else 1))
