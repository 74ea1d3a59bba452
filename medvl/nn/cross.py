"""Similarities with weights of their own: text-conditioned mixing of image tokens, and a cross-attention scorer.

Shapes: B images, M texts, N image tokens, L words, D embedding width, H heads. Both take the texts of a batch some at a time.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.nn.local import image_tokens, masked_softmax, over_texts, text_words, words_of
from medvl.nn.similarity import Temperature, lay_on_grid, unit, wide
from medvl.types import ImageFeatures, Product, Similarity, TextFeatures


class MixtureSimilarity(Similarity):
    """A text mixes the tokens of an image by a cross-attention of its own weights; its logit is its cosine with the mixture.

    With q, k, v linear in text j and in the tokens x of image i, all of length sqrt(D), in H heads of width d:
        z_ij = W_o concat_h sum_n softmax_n(q_jh . k_inh / (sqrt(d) tau_a)) v_inh,   l_ij = cos(z_ij, t_j) / tau
    A map is the logit, as a cosine, that the image would have if one token were all of it.

    Args:
        embed_dim: D, a multiple of ``heads``.
        heads: H.
        mixtures: visual tokens that are mixed: this many learned queries gather them from the tower's tokens first; None takes the tower's.
        attention_temperature: tau_a, fixed.
        temperature: tau to start with.
    Source: "Modeling Caption Diversity in Contrastive Vision-Language Pretraining" (Llip), arXiv:2405.00740, sec. 3, there with 64 learned
        tokens inside a vision transformer and the sigmoid loss. Departures: learned tokens gather above any tower, by one attention.
    """

    reads_words = False

    def __init__(
        self, embed_dim: int, heads: int = 8, mixtures: int | None = None, attention_temperature: float = 1.0, temperature: float = 0.1
    ) -> None:
        super().__init__()
        if embed_dim % heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of {heads} heads")
        if attention_temperature <= 0:
            raise ValueError(f"attention_temperature is {attention_temperature}, expected more than 0")
        self.heads, self.attention_temperature = heads, attention_temperature
        self.temperature = Temperature(temperature)
        self.query, self.key = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.value, self.out = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.mixtures = None if mixtures is None else nn.Parameter(torch.randn(mixtures, embed_dim))
        self.gather = None if mixtures is None else nn.MultiheadAttention(embed_dim, heads, batch_first=True)

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """One part, ``mixture``."""
        tokens, valid = self._gathered(*image_tokens(images))
        keys, values = (self._in_heads(layer(tokens)) for layer in (self.key, self.value))  # (B, H, N, d)
        temperature = self.temperature()

        def logits(part: TextFeatures) -> Tensor:
            text = unit(part.pooled)
            scores = self._in_heads(self.query(scaled(text))[None]) @ keys.transpose(2, 3)  # (B, H, m, N)
            weights = masked_softmax(scores / (keys.shape[-1] ** 0.5 * self.attention_temperature), valid[:, None, None])
            mixed = self.out((weights.to(values.dtype) @ values).transpose(1, 2).flatten(2))
            return (unit(mixed) * text).sum(-1) / temperature

        b, n, d = tokens.shape
        return {"mixture": over_texts(logits, texts, b * (self.heads * n + d))}

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Cosine with the text of what every token alone would be mixed to."""
        alone = scaled(image_tokens(images)[0])
        if self.gather is not None:
            alone = scaled(_of_one(self.gather, alone))
        found = unit(self.out(self.value(alone)))  # (B, N, D)
        return lay_on_grid(wide(unit(texts.pooled) @ found.transpose(1, 2)), images)

    def _gathered(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that are mixed, of length sqrt(D), and which of them count."""
        tokens = scaled(tokens)
        if self.mixtures is None or self.gather is None:
            return tokens, valid
        queries = self.mixtures.expand(len(tokens), -1, -1)
        found, _ = self.gather(queries, tokens, tokens, key_padding_mask=~valid, need_weights=False)
        return scaled(found), valid.new_ones(found.shape[:2])

    def _in_heads(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, H, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttentionSimilarity(Similarity):
    """A decoder looks from a text at the tokens of an image, and from an image at the words of a text; a small network scores each.

    Both ways the query is one vector, the pooled one, and what is looked at is the pooled vector of the other side and its tokens; the
    layers attend, they do not mix queries, so all texts are asked of an image in one pass. One layer norm serves what is asked, what is
    looked at and what comes out. The score is the mean of both parts, as the network gives it: there is no temperature. Maps are the
    attention to each token, from 0 to 1, averaged over layers and heads.

    Args:
        embed_dim: D, a multiple of ``heads``.
        layers, heads, feedforward: of the decoder.
        hidden: widths of the scorer's hidden layers.
    Source: "CARZero", arXiv:2402.17417 (4 layers, 4 heads, width 768, feedforward 1024, hidden 1024, 512, 256; one decoder for both ways;
        each matrix is trained in both directions). Departures: vectors are brought to length sqrt(D) before the norm, whose epsilon then
        counts for no tower; no dropout, so that a pair scores the same whichever texts are asked beside it.
    """

    def __init__(
        self, embed_dim: int, layers: int = 4, heads: int = 4, feedforward: int = 1024, hidden: tuple[int, ...] = (1024, 512, 256)
    ) -> None:
        super().__init__()
        if embed_dim % heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of {heads} heads")
        self.layers = nn.ModuleList(_DecoderLayer(embed_dim, heads, feedforward) for _ in range(layers))
        widths = [embed_dim, *hidden]
        steps = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.norm = nn.LayerNorm(embed_dim)
        self.scorer = nn.Sequential(*steps, nn.Linear(widths[-1], 1))
        self.heads, self.width = heads, embed_dim + feedforward + sum(hidden)

    def parts(self, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor | Product]:
        """Parts ``text_to_image`` and ``image_to_text``."""
        seen, hidden = self._image_memory(images)
        words = words_of(texts)

        def logits(part: TextFeatures) -> Tensor:
            text, image = self._normed(part.pooled), self._normed(images.pooled)
            forth = self._scores(text.expand(len(image), -1, -1), seen, hidden)
            word, real = text_words(part)
            memory = torch.cat([text[:, None], self._normed(word)], 1)
            back = self._scores(image.expand(len(text), -1, -1), memory, F.pad(~real, (1, 0), value=False)).T
            return torch.stack([forth, back], -1)

        found = over_texts(logits, texts, len(seen) * (self.heads * max(seen.shape[1], words.shape[1] + 1) + self.width))
        return {"text_to_image": found[..., 0], "image_to_text": found[..., 1]}

    def maps(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """Attention of the text to every token, from 0 to 1."""
        seen, hidden = self._image_memory(images)

        def attention(part: TextFeatures) -> Tensor:
            query = self._normed(part.pooled).expand(len(seen), -1, -1)
            found = []
            for layer in self.layers:
                query, weights = layer(query, seen, hidden, need_weights=True)
                found.append(wide(weights))
            return torch.stack(found).mean(0)[..., 1:]

        return lay_on_grid(over_texts(attention, texts, len(seen) * (self.heads * seen.shape[1] + self.width)), images)

    def _image_memory(self, images: ImageFeatures) -> tuple[Tensor, Tensor]:
        """(B, 1 + N, D) pooled vector and tokens, and (B, 1 + N) bool, True where not to be looked at."""
        tokens, valid = image_tokens(images)
        return torch.cat([self._normed(images.pooled)[:, None], self._normed(tokens)], 1), F.pad(~valid, (1, 0), value=False)

    def _scores(self, query: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        """(B, m) of queries (B, m, D)."""
        for layer in self.layers:
            query, _ = layer(query, memory, hidden, need_weights=False)
        return wide(self.scorer(self.norm(query))[..., 0])

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm(scaled(x))


class _DecoderLayer(nn.Module):
    """Pre-norm decoder layer without self-attention."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, feedforward), nn.ReLU(), nn.Linear(feedforward, width))

    def forward(self, query: Tensor, memory: Tensor, hidden: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.attention(self.norm1(query), memory, memory, key_padding_mask=hidden, need_weights=need_weights)
        query = query + mixed
        return query + self.mlp(self.norm2(query)), weights


def scaled(x: Tensor) -> Tensor:
    """Of length sqrt(D): numbers of size 1, which linear layers and attention are made for."""
    return unit(x) * x.shape[-1] ** 0.5


def _of_one(attention: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """(B, N, D) what any query gets that sees one token alone."""
    width = tokens.shape[-1]
    values = F.linear(tokens, attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    return attention.out_proj(values)
