"""Local similarities against one image and one text at a time, in float64 and without shared code; what bounds their memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medvl.model import build
from medvl.nn import cross, local
from medvl.nn.cross import CrossAttentionSimilarity, MixtureSimilarity
from medvl.nn.local import ConceptSimilarity, SentenceAttentionSimilarity, TokenwiseSimilarity, WordRegionSimilarity
from medvl.types import ImageFeatures, Product, Similarity, TextFeatures

D, HEADS = 6, 2


@dataclass
class Case:
    """One image and one text, without their padding."""

    pooled: Tensor  # (D,)
    tokens: list[Tensor]
    text: Tensor  # (D,)
    words: list[Tensor]
    concepts: list[int]


Reference = Callable[[Any, Case], dict[str, Tensor]]


def direction(x: Tensor) -> Tensor:
    return x / (x * x).sum().sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (direction(a) * direction(b)).sum()


def log_sum_exp(values: list[Tensor]) -> Tensor:
    top = max(value.item() for value in values)
    return top + sum((value - top).exp() for value in values).log()


def shares(values: list[Tensor]) -> list[Tensor]:
    total = log_sum_exp(values)
    return [(value - total).exp() for value in values]


def mix(weights: list[Tensor], vectors: list[Tensor]) -> Tensor:
    return sum(w * v for w, v in zip(weights, vectors, strict=True))


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def largest(values: list[Tensor]) -> Tensor:
    """The largest; of equal ones the mean, so that each gets a share of the gradient."""
    top = max(value.item() for value in values)
    return mean([value for value in values if value.item() == top])


def positive(temperature: Any) -> Tensor:
    return temperature.log.exp()


def affine(layer: Any, x: Tensor) -> Tensor:
    return torch.stack([(row * x).sum() + offset for row, offset in zip(layer.weight, layer.bias, strict=True)])


def layer_norm(layer: Any, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / ((centred * centred).mean() + layer.eps).sqrt() * layer.weight + layer.bias


def multi_head(layer: Any, query: Tensor, seen: list[Tensor]) -> Tensor:
    """What torch.nn.MultiheadAttention gives for one query, head by head."""
    wide, heads = len(query), layer.num_heads
    d = wide // heads
    projected = [
        [(layer.in_proj_weight[k * wide : (k + 1) * wide] * x).sum(1) + layer.in_proj_bias[k * wide : (k + 1) * wide] for x in inputs]
        for k, inputs in enumerate(([query], seen, seen))
    ]
    (q,), keys, values = projected
    parts = []
    for h in range(heads):
        at = slice(h * d, (h + 1) * d)
        parts.append(mix(shares([(q[at] * k[at]).sum() / math.sqrt(d) for k in keys]), [v[at] for v in values]))
    return affine(layer.out_proj, torch.cat(parts))


def sentence_attention(similarity: SentenceAttentionSimilarity, case: Case) -> dict[str, Tensor]:
    norm = (lambda x: x) if similarity.norm is None else functools.partial(layer_norm, similarity.norm)
    text = norm(case.text)
    seen = [direction(norm(x)) for x in ([case.pooled] if similarity.with_pooled else []) + case.tokens]
    tau = positive(similarity.temperature)
    sharp = tau if similarity.attention_temperature is None else positive(similarity.attention_temperature)
    mixed = mix(shares([cosine(text, x) / sharp for x in seen]), seen)
    return {"attention": cosine(text, mixed) / tau}


def word_region(similarity: WordRegionSimilarity, case: Case) -> dict[str, Tensor]:
    attention, r = positive(similarity.attention_sharpness), positive(similarity.word_sharpness)
    seen = [direction(x) for x in case.tokens]
    agreements = []
    for word in case.words:
        found = mix(shares([attention * cosine(word, x) for x in seen]), seen)
        agreements.append(r * cosine(word, found))
    total = log_sum_exp(agreements) - (math.log(len(agreements)) if similarity.mean else 0.0)
    pooled = cosine(case.pooled, case.text) / positive(similarity.temperature)
    return {"words": total / (r * positive(similarity.word_temperature)), "pooled": pooled}


def tokenwise(similarity: TokenwiseSimilarity, case: Case) -> dict[str, Tensor]:
    table = [[cosine(x, word) for word in case.words] for x in case.tokens]
    tau = positive(similarity.temperature)
    return {
        "image": mean([largest(row) for row in table]) / tau,
        "text": mean([largest(list(column)) for column in zip(*table, strict=True)]) / tau,
    }


def concept(similarity: ConceptSimilarity, case: Case) -> dict[str, Tensor]:
    named = sorted(set(case.concepts) - {-1})
    groups = [[w for w, k in zip(case.words, case.concepts, strict=True) if k == number] for number in named] or [case.words]
    best = [largest([cosine(x, mean(group)) for x in case.tokens]) for group in groups]
    pooled = cosine(case.pooled, case.text) / positive(similarity.temperature)
    return {"concepts": mean(best) / positive(similarity.concept_temperature), "pooled": pooled}


def mixture(similarity: MixtureSimilarity, case: Case) -> dict[str, Tensor]:
    side = math.sqrt(D)
    text, tokens = direction(case.text) * side, [direction(x) * side for x in case.tokens]
    if similarity.mixtures is not None:
        tokens = [direction(multi_head(similarity.gather, query, tokens)) * side for query in similarity.mixtures]
    query = affine(similarity.query, text)
    keys, values = [affine(similarity.key, x) for x in tokens], [affine(similarity.value, x) for x in tokens]
    d, parts = D // similarity.heads, []
    for h in range(similarity.heads):
        at = slice(h * d, (h + 1) * d)
        scores = [(query[at] * k[at]).sum() / (math.sqrt(d) * similarity.attention_temperature) for k in keys]
        parts.append(mix(shares(scores), [v[at] for v in values]))
    return {"mixture": cosine(affine(similarity.out, torch.cat(parts)), case.text) / positive(similarity.temperature)}


def cross_attention(similarity: CrossAttentionSimilarity, case: Case) -> dict[str, Tensor]:
    def normed(x: Tensor) -> Tensor:
        return layer_norm(similarity.norm, direction(x) * math.sqrt(D))

    def score(asked: Tensor, seen: list[Tensor]) -> Tensor:
        x, memory = normed(asked), [normed(one) for one in seen]
        for layer in similarity.layers:
            x = x + multi_head(layer.attention, layer_norm(layer.norm1, x), memory)
            x = x + affine(layer.mlp[2], affine(layer.mlp[0], layer_norm(layer.norm2, x)).clamp_min(0))
        x = layer_norm(similarity.norm, x)
        *hidden, last = [layer for layer in similarity.scorer if isinstance(layer, torch.nn.Linear)]
        for layer in hidden:
            x = affine(layer, x).clamp_min(0)
        return affine(last, x)[0]

    return {
        "text_to_image": score(case.text, [case.pooled, *case.tokens]),
        "image_to_text": score(case.pooled, [case.text, *case.words]),
    }


KINDS: dict[str, tuple[Callable[[], Similarity], Reference]] = {
    "sentence": (SentenceAttentionSimilarity, sentence_attention),
    "sentence, own temperature and norm": (lambda: SentenceAttentionSimilarity(0.1, 0.3, norm_width=D), sentence_attention),
    "sentence, tokens alone": (lambda: SentenceAttentionSimilarity(with_pooled=False), sentence_attention),
    "words": (WordRegionSimilarity, word_region),
    "words, mean": (lambda: WordRegionSimilarity(mean=True), word_region),
    "tokenwise": (TokenwiseSimilarity, tokenwise),
    "concepts": (ConceptSimilarity, concept),
    "mixture": (lambda: MixtureSimilarity(D, HEADS, attention_temperature=0.5), mixture),
    "mixture of learned tokens": (lambda: MixtureSimilarity(D, HEADS, mixtures=9), mixture),
    "cross-attention": (lambda: CrossAttentionSimilarity(D, 2, HEADS, 8, (7, 5)), cross_attention),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, seed: int = 0) -> Similarity:
    """In float64; gains and offsets of norms are moved from 1 and 0, which would hide a mistake."""
    torch.manual_seed(seed)
    similarity = KINDS[kind][0]().double()
    with torch.no_grad():
        for name, parameter in similarity.named_parameters():
            if "norm" in name or "bias" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return similarity


@dataclass(frozen=True)
class Shape:
    images: int
    texts: int
    grid: tuple[int, ...]
    words: int
    seed: int
    padded: bool = True


shapes = st.builds(
    Shape,
    images=st.integers(1, 3),
    texts=st.integers(1, 4),
    grid=st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 1, 2), (3, 2)]),
    words=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    padded=st.booleans(),
)


def features(shape: Shape, fill: float = math.nan) -> tuple[ImageFeatures, TextFeatures]:
    """Features with leaves for gradients; ``fill`` lies on padding. Some texts have no word, some no concept."""
    rng = torch.Generator().manual_seed(shape.seed)
    n = math.prod(shape.grid)

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    def choice(rows: int, columns: int) -> Tensor:
        return torch.rand(rows, columns, generator=rng) < 0.6

    seen, real = choice(shape.images, n), choice(shape.texts, shape.words)
    seen[torch.arange(shape.images), torch.randint(n, (shape.images,), generator=rng)] = True
    if not shape.padded:
        seen, real = torch.ones_like(seen), torch.ones_like(real)
    tokens = numbers(shape.images, n, D).masked_fill(~seen[..., None], fill)
    words = numbers(shape.texts, shape.words, D).masked_fill(~real[..., None], fill)
    concepts = torch.randint(-1, 2, (shape.texts, shape.words), generator=rng).masked_fill(~real, 0 if fill == fill else -1)
    images = ImageFeatures(numbers(shape.images, D), tokens, shape.grid, seen if shape.padded else None)
    texts = TextFeatures(numbers(shape.texts, D), words, real if shape.padded else None, concepts)
    for leaf in leaves(images, texts):
        leaf.requires_grad_()
    return images, texts


def leaves(images: ImageFeatures, texts: TextFeatures) -> list[Tensor]:
    assert images.tokens is not None and texts.tokens is not None
    return [images.pooled, images.tokens, texts.pooled, texts.tokens]


def case(images: ImageFeatures, texts: TextFeatures, i: int, j: int) -> Case:
    """Image i and text j; a text without a word has one, its pooled vector."""
    assert images.tokens is not None and texts.tokens is not None and texts.concepts is not None
    seen = [n for n in range(images.tokens.shape[1]) if images.token_valid is None or images.token_valid[i, n]]
    real = [w for w in range(texts.tokens.shape[1]) if texts.token_valid is None or texts.token_valid[j, w]]
    words, concepts = [texts.tokens[j, w] for w in real], [int(texts.concepts[j, w]) for w in real]
    return Case(
        images.pooled[i], [images.tokens[i, n] for n in seen], texts.pooled[j], words or [texts.pooled[j]], concepts if words else [-1]
    )


def pair_by_pair(kind: str, similarity: Similarity, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor]:
    rows = [[KINDS[kind][1](similarity, case(images, texts, i, j)) for j in range(len(texts.pooled))] for i in range(len(images.pooled))]
    return {name: torch.stack([torch.stack([one[name] for one in row]) for row in rows]) for name in rows[0][0]}


def weighed(parts: dict[str, Tensor], seed: int) -> Tensor:
    """A number that every entry of every part moves by a weight of its own."""
    rng = torch.Generator().manual_seed(seed)
    return sum(
        (part * torch.randn(part.shape, generator=rng, dtype=torch.float64).to(part.dtype)).sum() for _, part in sorted(parts.items())
    )


def gradients(value: Tensor, similarity: Similarity, inputs: list[Tensor]) -> dict[str, Tensor]:
    named = {**{f"input {k}": x for k, x in enumerate(inputs)}, **dict(similarity.named_parameters())}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(named.items(), found, strict=True)}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-6) -> None:
    """Equal to ``rtol`` of the largest entry of each tensor."""
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        scale = max(tensor.abs().max().item(), 1e-3) if tensor.numel() else 1.0
        torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=rtol * scale, msg=lambda text, name=name: f"{name}: {text}")


@contextmanager
def budget(numbers: int) -> Iterator[None]:
    """Texts are taken some at a time where one tensor would be larger than this."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (local, cross):
            patch.setattr(module, "over_texts", functools.partial(local.over_texts, budget=numbers))
        yield


@kinds
@settings(max_examples=15, deadline=None)
@given(shape=shapes)
def test_parts_and_all_gradients_are_those_of_single_pairs(kind: str, shape: Shape) -> None:
    similarity = made(kind, shape.seed)
    images, texts = features(shape)
    parts, expected = similarity.logits(images, texts), pair_by_pair(kind, similarity, images, texts)
    assert_same(parts, expected)
    inputs = leaves(images, texts)
    assert_same(
        gradients(weighed(parts, 1), similarity, inputs),
        gradients(weighed(expected, 1), similarity, inputs),
    )
    torch.testing.assert_close(similarity(images, texts), sum(expected.values()) / len(expected), rtol=1e-6, atol=1e-6)


@kinds
@settings(max_examples=10, deadline=None)
@given(shape=shapes, texts_at_once=st.integers(1, 3))
def test_texts_taken_some_at_a_time_change_nothing(kind: str, shape: Shape, texts_at_once: int) -> None:
    similarity = made(kind, shape.seed)
    images, texts = features(shape)
    inputs = leaves(images, texts)
    whole = similarity.logits(images, texts)
    expected, maps = gradients(weighed(whole, 1), similarity, inputs), similarity.maps(images, texts)
    asked: list[int] = []
    over_texts = local.over_texts

    def some(of: Callable[[TextFeatures], Tensor], part: TextFeatures, numbers: int) -> Tensor:
        asked.append(numbers)
        return over_texts(of, part, numbers, budget=numbers * texts_at_once)

    with pytest.MonkeyPatch.context() as patch:
        for module in (local, cross):
            patch.setattr(module, "over_texts", some)
        parts = similarity.logits(images, texts)
        assert_same(parts, whole, rtol=1e-12)
        assert_same(gradients(weighed(parts, 1), similarity, inputs), expected, rtol=1e-10)
        torch.testing.assert_close(similarity.maps(images, texts), maps, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert asked


@kinds
@settings(max_examples=8, deadline=None)
@given(shape=shapes, fill=st.sampled_from([0.0, 1e4, math.nan, math.inf]), more=st.integers(0, 2))
def test_what_lies_on_padding_and_how_much_there_is_change_nothing(kind: str, shape: Shape, fill: float, more: int) -> None:
    similarity = made(kind, shape.seed)
    images, texts = features(shape, fill=-1.0)
    expected = similarity.logits(images, texts)
    wanted = gradients(weighed(expected, 1), similarity, leaves(images, texts))
    moved_images, moved_texts = features(shape, fill=fill)
    assert moved_texts.tokens is not None and moved_texts.concepts is not None
    m, length, _ = moved_texts.tokens.shape
    real = torch.ones(m, length, dtype=torch.bool) if moved_texts.token_valid is None else moved_texts.token_valid
    longer = TextFeatures(
        moved_texts.pooled,
        torch.cat([moved_texts.tokens, torch.full((m, more, D), fill, dtype=torch.float64)], 1),
        torch.cat([real, torch.zeros(m, more, dtype=torch.bool)], 1),
        torch.cat([moved_texts.concepts, torch.full((m, more), 5)], 1),
    )
    got = similarity.logits(moved_images, longer)
    assert_same(got, expected, rtol=1e-12)
    found = gradients(weighed(got, 1), similarity, leaves(moved_images, moved_texts))
    assert_same(found, wanted, rtol=1e-10)
    for name, valid in (("input 1", moved_images.token_valid), ("input 3", moved_texts.token_valid)):
        assert valid is None or (found[name][~valid] == 0).all()


@kinds
@settings(max_examples=8, deadline=None)
@given(shape=shapes, order=st.randoms(use_true_random=False))
def test_the_order_of_images_and_texts_and_texts_that_come_twice_change_nothing(kind: str, shape: Shape, order: Any) -> None:
    similarity = made(kind, shape.seed)
    images, texts = features(shape)
    rows, columns = list(range(shape.images)), [*range(shape.texts), *range(shape.texts)]
    order.shuffle(rows)
    order.shuffle(columns)
    valid = None if images.token_valid is None else images.token_valid[rows]
    shuffled = images.replace(pooled=images.pooled[rows], tokens=images.tokens[rows], token_valid=valid)
    named = {name: getattr(texts, name) for name in ("pooled", "tokens", "token_valid", "concepts")}
    twice = TextFeatures(**{name: None if value is None else value[columns] for name, value in named.items()})
    expected = {name: part[rows][:, columns] for name, part in similarity.logits(images, texts).items()}
    assert_same(similarity.logits(shuffled, twice), expected, rtol=1e-12)


@kinds
@pytest.mark.parametrize("value", [1e-3, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_temperature_gives_a_number_that_is_none(kind: str, value: float, dtype: torch.dtype) -> None:
    similarity = made(kind).to(dtype)
    with torch.no_grad():
        for name, parameter in similarity.named_parameters():
            if name.endswith(".log"):
                parameter.fill_(math.log(value))
    images, texts = features(Shape(3, 4, (2, 3), 4, 5))
    images = images.replace(pooled=images.pooled.to(dtype), tokens=images.tokens.to(dtype))
    texts = TextFeatures(texts.pooled.to(dtype), texts.tokens.to(dtype), texts.token_valid, texts.concepts)
    parts = similarity.logits(images, texts)
    found = gradients(weighed(parts, 1), similarity, leaves(images, texts))
    assert all(torch.isfinite(x).all() for x in [*parts.values(), *found.values()])


@kinds
def test_autocast_to_bfloat16_gives_wide_finite_logits_close_to_those_in_float32(kind: str) -> None:
    similarity = made(kind).float()
    images, texts = features(Shape(3, 4, (2, 3), 4, 5))
    images = images.replace(pooled=images.pooled.float(), tokens=images.tokens.float())
    texts = TextFeatures(texts.pooled.float(), texts.tokens.float(), texts.token_valid, texts.concepts)
    expected = similarity.logits(images, texts)
    wanted = gradients(weighed(expected, 1), similarity, leaves(images, texts))
    for numbers in (1, 2**24):
        with budget(numbers), torch.autocast("cpu", torch.bfloat16):
            parts = similarity.logits(images, texts)
            maps = similarity.maps(images, texts)
        assert all(part.dtype == torch.float32 for part in parts.values()) and maps.dtype == torch.float32
        for name, part in expected.items():
            assert (parts[name] - part).abs().max() < 0.05 * part.abs().max().clamp_min(1)
        found = gradients(weighed(parts, 1), similarity, leaves(images, texts))
        for name, gradient in wanted.items():
            assert torch.isfinite(found[name]).all(), name
            assert (found[name] - gradient).norm() <= 0.15 * gradient.norm() + 0.05, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@kinds
def test_cuda_gives_the_same_and_stays_finite_in_bfloat16(kind: str) -> None:
    similarity = made(kind).float()
    images, texts = features(Shape(3, 4, (2, 3), 4, 5))
    images = images.replace(pooled=images.pooled.float(), tokens=images.tokens.float())
    texts = TextFeatures(texts.pooled.float(), texts.tokens.float(), texts.token_valid, texts.concepts)
    expected = similarity.logits(images, texts)
    inputs = leaves(images, texts)
    wanted = gradients(sum(part.sum() for part in expected.values()), similarity, inputs)
    similarity.cuda()
    there = images.replace(pooled=images.pooled.cuda(), tokens=images.tokens.cuda(), token_valid=images.token_valid.cuda())
    asked = TextFeatures(texts.pooled.cuda(), texts.tokens.cuda(), texts.token_valid.cuda(), texts.concepts.cuda())
    for numbers in (1, 2**24):
        with budget(numbers):
            parts = similarity.logits(there, asked)
            found = gradients(sum(part.sum() for part in parts.values()), similarity, inputs)
            with torch.autocast("cuda", torch.bfloat16):
                rounded = similarity.logits(there, asked)
        assert_same({name: part.cpu() for name, part in parts.items()}, expected, rtol=1e-4)
        assert_same({name: gradient.cpu() for name, gradient in found.items()}, wanted, rtol=1e-3)
        assert all(part.dtype == torch.float32 and torch.isfinite(part).all() for part in rounded.values())


@kinds
@settings(max_examples=8, deadline=None)
@given(shape=shapes)
def test_maps_lie_on_the_grid_and_are_nan_on_padding_alone(kind: str, shape: Shape) -> None:
    similarity = made(kind, shape.seed)
    images, texts = features(shape)
    maps = similarity.maps(images, texts)
    assert maps.shape == (shape.images, shape.texts, *shape.grid)
    seen = torch.ones(shape.images, math.prod(shape.grid), dtype=torch.bool) if images.token_valid is None else images.token_valid
    expected = ~seen[:, None].expand(-1, shape.texts, -1).unflatten(-1, shape.grid)
    assert torch.equal(maps.isnan(), expected)
    inside = maps[~expected]
    assert inside.min() >= (0 if kind == "cross-attention" else -1 - 1e-6) and inside.max() <= 1 + 1e-6


def token_maps(similarity: Similarity, images: ImageFeatures, texts: TextFeatures) -> Callable[[int, int], list[Tensor]]:
    """The values of a map on the tokens that were seen, in the order of :func:`case`."""
    flat = similarity.maps(images, texts).flatten(2)
    return lambda i, j: [value.double() for value in flat[i, j] if not value.isnan()]


each_map = settings(max_examples=10, deadline=None)


@each_map
@given(shape=shapes)
def test_the_sentence_logit_is_made_of_its_map(shape: Shape) -> None:
    similarity = made("sentence, tokens alone", shape.seed)
    images, texts = features(shape)
    got, maps, tau = similarity(images, texts), token_maps(similarity, images, texts), positive(similarity.temperature)
    for i in range(shape.images):
        for j in range(shape.texts):
            cosines, tokens = maps(i, j), [direction(x) for x in case(images, texts, i, j).tokens]
            mixed = mix(shares([c / tau for c in cosines]), tokens)
            expected = sum(w * c for w, c in zip(shares([c / tau for c in cosines]), cosines, strict=True)) / mixed.norm() / tau
            assert got[i, j].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


@each_map
@given(shape=shapes)
def test_the_tokenwise_image_logit_is_the_mean_of_its_map(shape: Shape) -> None:
    similarity = made("tokenwise", shape.seed)
    images, texts = features(shape)
    got, maps = similarity.logits(images, texts)["image"], token_maps(similarity, images, texts)
    for i in range(shape.images):
        for j in range(shape.texts):
            assert got[i, j].item() == pytest.approx((mean(maps(i, j)) / positive(similarity.temperature)).item(), rel=1e-4, abs=1e-4)


@each_map
@given(shape=shapes)
def test_maps_of_words_and_concepts_are_cosines_with_them(shape: Shape) -> None:
    images, texts = features(shape)
    word_maps, concept_maps = (token_maps(made(kind), images, texts) for kind in ("words", "concepts"))
    for i in range(shape.images):
        for j in range(shape.texts):
            one = case(images, texts, i, j)
            named = sorted(set(one.concepts) - {-1})
            groups = [mean([w for w, k in zip(one.words, one.concepts, strict=True) if k == number]) for number in named]
            expected = [mean([cosine(x, word) for word in one.words]).item() for x in one.tokens]
            assert [value.item() for value in word_maps(i, j)] == pytest.approx(expected, abs=1e-5)
            expected = [max(cosine(x, k).item() for k in groups or [mean(one.words)]) for x in one.tokens]
            assert [value.item() for value in concept_maps(i, j)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["mixture", "mixture of learned tokens"])
def test_the_map_of_a_mixture_is_the_cosine_of_an_image_of_that_token_alone(kind: str) -> None:
    similarity = made(kind)
    images, texts = features(Shape(2, 3, (2, 2), 2, 3, padded=False))
    maps = similarity.maps(images, texts).flatten(2)
    for n in range(4):
        alone = images.replace(tokens=images.tokens[:, n : n + 1], grid=(1, 1))
        torch.testing.assert_close(
            maps[..., n], (similarity(alone, texts) * positive(similarity.temperature)).float(), rtol=1e-5, atol=1e-5
        )


def test_the_map_of_cross_attention_is_what_the_pooled_vector_leaves_to_the_tokens() -> None:
    """One layer, against the softmax of each head by hand."""
    torch.manual_seed(0)
    similarity = CrossAttentionSimilarity(D, 1, HEADS, 8, (7,)).double()
    images, texts = features(Shape(2, 2, (2, 3), 2, 4))
    maps, attention = token_maps(similarity, images, texts), similarity.layers[0].attention
    for i in range(2):
        for j in range(2):
            one = case(images, texts, i, j)
            x, *memory = (layer_norm(similarity.norm, direction(v) * math.sqrt(D)) for v in (one.text, one.pooled, *one.tokens))
            query = attention.in_proj_weight[:D] @ layer_norm(similarity.layers[0].norm1, x) + attention.in_proj_bias[:D]
            keys = [attention.in_proj_weight[D : 2 * D] @ v + attention.in_proj_bias[D : 2 * D] for v in memory]
            heads = [
                shares([(query[at] * k[at]).sum() / math.sqrt(D // HEADS) for k in keys])
                for at in (slice(h * D // HEADS, (h + 1) * D // HEADS) for h in range(HEADS))
            ]
            expected = [mean(list(column)).item() for column in zip(*heads, strict=True)][1:]
            assert [value.item() for value in maps(i, j)] == pytest.approx(expected, abs=1e-6)
            assert sum(expected) < 1


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had which was made while this was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


@kinds
def test_no_tensor_forward_or_backward_grows_with_images_times_texts_times_tokens(kind: str) -> None:
    """12 images of 16 tokens, 64 texts of 6 words: what is largest is the budget's, not that of all pairs; of maps it is the maps."""
    b, m, n, length, allowed = 12, 64, 16, 6, 2**12
    similarity = made(kind)
    images, texts = features(Shape(b, m, (4, 4), length, 0))

    def largest_of(numbers: int) -> tuple[int, int]:
        with budget(numbers), Largest() as training:
            gradients(weighed(similarity.logits(images, texts), 1), similarity, leaves(images, texts))
        with budget(numbers), torch.no_grad(), Largest() as mapping:
            similarity.maps(images, texts)
        return training.numbers, mapping.numbers

    inherent = max(2 * b * m, m * length * D, b * (n + 1) * 3 * D)  # two parts; the words; what is linear in the tokens
    training, mapping = largest_of(allowed)
    assert inherent < allowed and training <= allowed
    assert mapping <= b * m * (n + 1)  # cross-attention looks at the pooled vector too
    assert largest_of(2**40)[0] > 1.4 * allowed


@kinds
def test_what_is_kept_for_the_gradients_does_not_grow_with_the_pairs(kind: str) -> None:
    """192 texts more: the graph then holds their words twice at most (as they came and as units), not what they see in 12 images."""
    similarity = made(kind)

    def held(m: int, numbers: int) -> int:
        images, texts = features(Shape(12, m, (4, 4), 6, 0))
        storages: dict[int, Tensor] = {}

        def keep(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x
            return x

        with budget(numbers), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            parts = similarity.logits(images, texts)
        assert all(part.requires_grad for part in parts.values())
        return sum(x.untyped_storage().nbytes() // x.element_size() for x in storages.values())

    bound = 192 * 2 * 6 * D
    assert held(256, 2**12) - held(64, 2**12) <= bound
    assert held(256, 2**40) - held(64, 2**40) > 5 * bound


def test_a_text_without_a_word_counts_as_one_word_its_pooled_vector() -> None:
    images, _ = features(Shape(2, 1, (2, 2), 1, 0))
    pooled = torch.randn(3, D, dtype=torch.float64)
    none = torch.zeros(3, 2, dtype=torch.bool)
    unmarked = torch.full((3, 2), -1)
    bare = TextFeatures(pooled, torch.full((3, 2, D), math.nan, dtype=torch.float64), none, unmarked)
    worded = TextFeatures(pooled, pooled[:, None], None, unmarked[:, :1])
    for kind in KINDS:
        similarity = made(kind)
        assert_same(similarity.logits(images, bare), similarity.logits(images, worded), rtol=1e-12)


@kinds
def test_a_similarity_is_rebuilt_from_its_spec(kind: str) -> None:
    similarity = made(kind)
    again = build(similarity.spec(), Similarity).double()
    again.load_state_dict(similarity.state_dict())
    images, texts = features(Shape(2, 3, (2, 2), 3, 1))
    assert type(again) is type(similarity)
    assert_same(again.logits(images, texts), similarity.logits(images, texts), rtol=1e-12)


@kinds
def test_a_similarity_says_whether_it_reads_words(kind: str) -> None:
    similarity = made(kind)
    images, texts = features(Shape(2, 3, (2, 2), 3, 1))
    bare = TextFeatures(texts.pooled)
    if similarity.reads_words:
        with pytest.raises(ValueError, match="report tower keeps no tokens"):
            similarity.logits(images, bare)
    else:
        assert_same(similarity.logits(images, bare), similarity.logits(images, texts), rtol=1e-12)
        torch.testing.assert_close(similarity.maps(images, bare), similarity.maps(images, texts), equal_nan=True)


def test_pooled_parts_are_not_formed() -> None:
    images, texts = features(Shape(2, 3, (2, 2), 3, 1))
    for kind in ("words", "concepts"):
        assert isinstance(made(kind).parts(images, texts)["pooled"], Product)


@kinds
def test_a_tower_without_tokens_is_refused_with_a_reason(kind: str) -> None:
    similarity = made(kind)
    images, texts = features(Shape(2, 3, (2, 2), 3, 1))
    for use in (similarity.logits, similarity.maps):
        with pytest.raises(ValueError, match="image tower keeps no tokens"):
            use(ImageFeatures(images.pooled), texts)
    if similarity.reads_words:
        with pytest.raises(ValueError, match=r"report tower keeps no tokens: .*`tokens: words`"):
            similarity.logits(images, TextFeatures(texts.pooled))
    if kind == "concepts":
        with pytest.raises(ValueError, match=r"marks no concepts: .*ConceptReportEncoder"):
            similarity.logits(images, TextFeatures(texts.pooled, texts.tokens, texts.token_valid))


def test_sizes_that_do_not_fit_are_refused() -> None:
    for kind in (MixtureSimilarity, CrossAttentionSimilarity):
        with pytest.raises(ValueError, match=r"embed_dim 6 is not a multiple of 4 heads"):
            kind(6, heads=4)
    with pytest.raises(ValueError, match=r"attention_temperature is 0.0, expected more than 0"):
        MixtureSimilarity(6, 2, attention_temperature=0.0)
