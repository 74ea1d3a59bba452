"""Similarities against plain loops in float64."""

import math

import numpy as np
import pytest
import torch

from medvl.nn.similarity import PooledSimilarity, Temperature, TokenSimilarity
from medvl.types import ImageFeatures, TextFeatures

B, M, D, GRID = 3, 5, 8, (2, 3)


@pytest.fixture
def features():
    rng = torch.Generator().manual_seed(0)
    images = ImageFeatures(
        pooled=torch.randn(B, D, generator=rng),
        tokens=torch.randn(B, math.prod(GRID), D, generator=rng),
        grid=GRID,
        token_valid=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool),
    )
    return images, TextFeatures(torch.randn(M, D, generator=rng))


def cosine(a, b):
    a, b = a.double().tolist(), b.double().tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_pooled_part_is_the_cosine_over_the_temperature(features):
    images, texts = features
    logits = PooledSimilarity(temperature=0.1)(images, texts)
    expected = [[cosine(images.pooled[i], texts.pooled[j]) / 0.1 for j in range(M)] for i in range(B)]
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-5)


def test_token_part_is_the_log_mean_exp_of_valid_token_cosines(features):
    images, texts = features
    part = TokenSimilarity(temperature=0.1, sharpness=7.0).parts(images, texts)["tokens"]
    for i in range(B):
        for j in range(M):
            values = [cosine(t, texts.pooled[j]) for t, seen in zip(images.tokens[i], images.token_valid[i], strict=True) if seen]
            expected = math.log(sum(math.exp(7 * v) for v in values) / len(values)) / 7 / 0.1
            assert part[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_the_score_is_the_token_part(features):
    similarity = TokenSimilarity()
    parts = similarity.parts(*features)
    assert set(parts) == {"tokens", "pooled"}
    torch.testing.assert_close(similarity(*features), parts["tokens"], rtol=0, atol=0)


@pytest.mark.parametrize("similarity", [PooledSimilarity(), TokenSimilarity()])
def test_maps_are_token_cosines_and_nan_on_padding(features, similarity):
    images, texts = features
    maps = similarity.maps(images, texts)
    assert maps.shape == (B, M, *GRID)
    flat = maps.flatten(2)
    for i in range(B):
        for n in range(math.prod(GRID)):
            for j in range(M):
                expected = cosine(images.tokens[i, n], texts.pooled[j]) if images.token_valid[i, n] else math.nan
                assert flat[i, j, n].item() == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_what_lies_on_padding_does_not_move_the_score(features):
    images, texts = features
    similarity = TokenSimilarity()
    changed = images.replace(tokens=torch.where(images.token_valid[..., None], images.tokens, 1e3))
    torch.testing.assert_close(similarity(images, texts), similarity(changed, texts))


def test_one_token_per_image_makes_token_and_pooled_parts_equal():
    rng = torch.Generator().manual_seed(2)
    vectors = torch.randn(B, D, generator=rng)
    parts = TokenSimilarity().parts(ImageFeatures(vectors, vectors[:, None], (1, 1)), TextFeatures(torch.randn(M, D, generator=rng)))
    torch.testing.assert_close(parts["tokens"], parts["pooled"], rtol=1e-4, atol=1e-5)


def test_a_tower_without_tokens_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="keeps no tokens"):
        TokenSimilarity()(ImageFeatures(torch.ones(1, D)), TextFeatures(torch.ones(1, D)))


def test_temperature_is_clamped_and_still_gets_a_gradient_at_its_bound():
    temperature = Temperature(0.07, low=0.01, high=1.0)
    with torch.no_grad():
        temperature.log.fill_(math.log(1e-5))
    value = temperature()
    assert value.item() == pytest.approx(0.01)
    value.backward()
    assert temperature.log.grad.item() > 0
    with pytest.raises(ValueError, match=r"2.0 is not in \[0.01, 1.0\]"):
        Temperature(2.0)
