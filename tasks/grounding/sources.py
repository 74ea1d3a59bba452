"""Where a map comes from: each source makes, of images and phrases, scores on the token grid.

Shapes: B images, M phrases, N tokens, S slices, D embedding width; a grid is (H, W) or (S, H, W). A source sees a batch once
(:meth:`MapSource.see`) and may then be asked for any number of phrases (:meth:`MapSource.scores`). Scores are NaN on padding.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from medvl.model import DualEncoder
from medvl.nn.activations import gradient_maps
from medvl.nn.cross import CrossAttentionSimilarity
from medvl.nn.dense import Reading, ReadingError, with_reading
from medvl.nn.local import SentenceAttentionSimilarity, image_tokens, masked_softmax, over_texts, text_words, words_of
from medvl.nn.similarity import SliceSimilarity, lay_on_grid, slice_scores, token_cosines, wide
from medvl.types import ImageBatch, ImageFeatures, TextFeatures


class SourceError(ValueError):
    """A model that a source cannot read, whatever the image; the message says what it needs."""


@dataclass(frozen=True)
class Seen:
    """A batch and what a source's reading of the tower made of it."""

    batch: ImageBatch
    features: ImageFeatures


class MapSource(abc.ABC):
    """Features and phrases in, scores on the token grid out."""

    name: ClassVar[str]
    words: ClassVar[str]  # what it does, for a person
    unit: ClassVar[str] = "cosine"  # of its scores, as it stands beside a colour bar

    def see(self, model: DualEncoder, batch: ImageBatch) -> Seen:
        """Encode a batch, once for all phrases."""
        with torch.inference_mode():
            return Seen(batch, model.image(batch))

    @abc.abstractmethod
    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """(B, M, *grid) float32, higher where a phrase fits better; NaN on padding.

        Raises:
            ValueError: a model that this source cannot read; says what it needs. :class:`Grounder` makes it a :class:`SourceError`.
        """


class ModelSource(MapSource):
    """What the model's own similarity says its logits are made of (:meth:`medvl.types.Similarity.maps`)."""

    name, words = "model", "the map that the model's own score is made of"

    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """As the base class has it."""
        with torch.inference_mode():
            return model.similarity.maps(seen.features, texts)


class CosineSource(MapSource):
    """Cosine of every token with the phrase's vector (BioViL, arXiv:2204.09817, without its smoothing), whatever the similarity is."""

    name, words = "cosine", "cosine of each token with the phrase"

    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """As the base class has it."""
        with torch.inference_mode():
            return lay_on_grid(token_cosines(seen.features, texts), seen.features)


class AttentionSource(MapSource):
    """RadZero's map, sigmoid(cos / tau), of the similarity's own normed vectors and attention temperature (arXiv:2504.07416)."""

    name, words, unit = "attention", "similarity-attention: sigmoid of the cosine over the learned temperature (RadZero)", "share"

    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """As the base class has it."""
        similarity = model.similarity
        if not isinstance(similarity, SentenceAttentionSimilarity):
            raise ValueError(f"{self._needs('SentenceAttentionSimilarity')}; this one has {type(similarity).__name__}")
        with torch.inference_mode():
            tau = similarity.temperature if similarity.attention_temperature is None else similarity.attention_temperature
            return (similarity.maps(seen.features, texts) / tau()).sigmoid()

    def _needs(self, kind: str) -> str:
        return f"source {self.name!r} reads a model whose similarity is {kind}"


class WordSource(MapSource):
    """Word attention: each word's softmax over tokens, a_w = softmax_n(r cos(w, V_n)), averaged over the words of the phrase.

    Scores are the attention times the number of tokens, so that 1 is an even share, whatever the grid.

    Source: GLoRIA, ICCV 2021, eq. 2, there with r = 4 and inner products.
    """

    name, words, unit = "words", "attention of each word to the tokens, averaged over the words (GLoRIA)", "times an even share"
    sharpness: ClassVar[float] = 4.0

    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """As the base class has it."""
        with torch.inference_mode():
            tokens, valid = image_tokens(seen.features)
            learned = getattr(model.similarity, "attention_sharpness", None)
            sharpness = self.sharpness if learned is None else learned()

            def attention(part: TextFeatures) -> Tensor:
                words, real = text_words(part)
                cosines = torch.einsum("mld,bnd->bmln", words, tokens)
                weights = masked_softmax(cosines * sharpness, valid[:, None, None])
                mean = (weights * real[..., None]).sum(2) / real.sum(1)[:, None]
                return mean * valid.sum(1)[:, None, None]

            found = over_texts(attention, texts, tokens.shape[0] * tokens.shape[1] * words_of(texts).shape[1])
            return lay_on_grid(found, seen.features)


class CrossAttentionSource(MapSource):
    """Cross-attention of the phrase to the tokens, averaged over layers and heads (CARZero, arXiv:2402.17417)."""

    name, words, unit = "cross_attention", "cross-attention of the phrase to the tokens (CARZero)", "share of attention"

    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """As the base class has it."""
        if not isinstance(model.similarity, CrossAttentionSimilarity):
            raise ValueError(
                f"source {self.name!r} reads a model whose similarity is CrossAttentionSimilarity; this one has "
                f"{type(model.similarity).__name__}"
            )
        with torch.inference_mode():
            return model.similarity.maps(seen.features, texts)


class DenseSource(MapSource):
    """Cosine with tokens of another reading of the tower's last self-attention (:mod:`medvl.nn.dense`)."""

    reading: ClassVar[Reading]

    def see(self, model: DualEncoder, batch: ImageBatch) -> Seen:
        """Encode a batch, with the last self-attention read otherwise."""
        try:
            with torch.inference_mode():
                return Seen(batch, with_reading(lambda: model.image(batch), self.reading))
        except ReadingError as error:
            raise SourceError(str(error)) from error

    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """As the base class has it."""
        return CosineSource().scores(model, seen, texts)


class ValueSource(DenseSource):
    """The value path (MaskCLIP); of an attention pool each token is read so already, as its tower's docstring says."""

    name, words, reading = "values", "cosine with the value of each token in the last attention (MaskCLIP)", "values"


class ValueSimilaritySource(DenseSource):
    """Values that gather their like (CLIP Surgery, AnoVL)."""

    name, words, reading = "value_similarity", "cosine with values that attend to their like (CLIP Surgery, AnoVL)", "value_similarity"


class EarlyAttentionSource(DenseSource):
    """Values that the averaged attention of the layers before gathers (CLIPer)."""

    name, words, reading = "early_attention", "cosine with values gathered by the attention of earlier layers (CLIPer)", "early_attention"


class GradientSource(MapSource):
    """Grad-CAM of the score on the tower's deepest spatial layer: for towers that keep no tokens."""

    name, words, unit = "gradient", "Grad-CAM of the score on the deepest spatial layer", "gradient"

    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """As the base class has it."""
        with torch.inference_mode(False), torch.enable_grad():
            features = texts.copied()
            batch = replace(seen.batch, pixels=seen.batch.pixels.clone().requires_grad_(True))
            return gradient_maps(lambda: model.similarity(model.image(batch), features), model.image, len(batch.pixels))


class SliceSource(MapSource):
    """For CT by slices: the slice's share in the study times the token's share in its slice, times the number of tokens (1: an even share).

        m_sn = S N a_s softmax_n(r cos(V_sn, t))

    where a is the phrase's own mixture of slices (:class:`SliceSimilarity`) or, of other models, what the tower pooled by. A tower
    without tokens gives the slice's cosine on a grid of (S, 1, 1).
    """

    name, words, unit = "slices", "tokens within a slice times the weight of the slice (CT by slices)", "times an even share"
    sharpness: ClassVar[float] = 30.0

    def scores(self, model: DualEncoder, seen: Seen, texts: TextFeatures) -> Tensor:
        """As the base class has it."""
        features = seen.features
        if features.slices is None or features.slice_weights is None:
            raise ValueError(f"source {self.name!r} reads towers of CT by slices; {type(model.image).__name__} keeps none")
        with torch.inference_mode():
            by_slice = slice_scores(features, texts)  # (B, M, S)
            if features.tokens is None or features.grid is None:
                return by_slice[..., None, None]
            if isinstance(model.similarity, SliceSimilarity):
                weights = model.similarity.weights(features, texts)
            else:
                weights = wide(features.slice_weights)[:, None].expand_as(by_slice)
            count = by_slice.shape[-1]
            cosines = token_cosines(features, texts).unflatten(-1, (count, -1))  # (B, M, S, N)
            learned = getattr(model.similarity, "sharpness", None)
            within = (cosines * (self.sharpness if learned is None else learned())).nan_to_num(neginf=-1e4).softmax(-1)
            valid = torch.isfinite(by_slice)
            shares = within * (weights.nan_to_num() * valid.sum(-1, keepdim=True))[..., None] * within.shape[-1]
            return lay_on_grid(shares.masked_fill(~valid[..., None], torch.nan).flatten(2), features)


SOURCES: Mapping[str, MapSource] = MappingProxyType(
    {
        one.name: one
        for one in (
            *(ModelSource(), CosineSource(), AttentionSource(), WordSource(), CrossAttentionSource()),
            *(ValueSource(), ValueSimilaritySource(), EarlyAttentionSource(), GradientSource(), SliceSource()),
        )
    }
)
"""By name, as ``--source`` takes them."""


def source(name: str) -> MapSource:
    """A source by its name.

    Raises:
        ValueError: none of ``SOURCES``.
    """
    if name not in SOURCES:
        raise ValueError(f"no source of maps is called {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]
