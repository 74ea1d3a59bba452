"""Similarities against plain loops in float64."""

import math

import numpy as np
import pytest
import torch

from medvl.model import build
from medvl.nn.similarity import PooledSimilarity, SliceSimilarity, Temperature, TokenSimilarity, slice_logits, slice_scores
from medvl.types import ImageFeatures, Similarity, TextFeatures

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
    part = TokenSimilarity(temperature=0.1, sharpness=7.0).logits(images, texts)["tokens"]
    for i in range(B):
        for j in range(M):
            values = [cosine(t, texts.pooled[j]) for t, seen in zip(images.tokens[i], images.token_valid[i], strict=True) if seen]
            expected = math.log(sum(math.exp(7 * v) for v in values) / len(values)) / 7 / 0.1
            assert part[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_the_score_is_the_token_part(features):
    similarity = TokenSimilarity()
    parts = similarity.logits(*features)
    assert set(parts) == {"tokens", "pooled"}
    torch.testing.assert_close(similarity(*features), parts["tokens"], rtol=0, atol=0)


@pytest.mark.parametrize("similarity", [PooledSimilarity(), TokenSimilarity(), SliceSimilarity()])
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
    parts = TokenSimilarity().logits(ImageFeatures(vectors, vectors[:, None], (1, 1)), TextFeatures(torch.randn(M, D, generator=rng)))
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


SLICES_SEEN = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)


@pytest.fixture
def volumes(features):
    images, texts = features
    slices = torch.randn(B, 4, D, generator=torch.Generator().manual_seed(4))
    return images.replace(slices=slices, slice_valid=SLICES_SEEN), texts


def sliced_reference(slices, seen, texts, sharpness, temperature):
    """Logits and weights of text-conditioned pooling, one study and text at a time, in Python floats."""
    logits, weights = np.zeros((B, len(texts))), np.zeros((B, len(texts), slices.shape[1]))
    for i in range(B):
        at = [s for s in range(slices.shape[1]) if seen[i, s]]
        units = [[v / math.sqrt(sum(w * w for w in one)) for v in one] for one in slices[i].double()[at].tolist()]
        for j, text in enumerate(texts):
            exp = [math.exp(sharpness * cosine(torch.tensor(one, dtype=torch.float64), text)) for one in units]
            for s, e in zip(at, exp, strict=True):
                weights[i, j, s] = e / sum(exp)
            mixed = [sum(weights[i, j, s] * one[d] for s, one in zip(at, units, strict=True)) for d in range(D)]
            logits[i, j] = cosine(torch.tensor(mixed, dtype=torch.float64), text) / temperature
    return logits, weights


@pytest.mark.parametrize("sharpness", [1.0, 7.0, 60.0])
def test_a_text_chooses_its_slices(volumes, sharpness):
    images, texts = volumes
    similarity = SliceSimilarity(temperature=0.1, sharpness=sharpness)
    logits, weights = sliced_reference(images.slices, SLICES_SEEN, texts.pooled, sharpness, 0.1)
    parts = similarity.logits(images, texts)
    assert set(parts) == {"slices", "pooled"}
    np.testing.assert_allclose(parts["slices"].detach().numpy(), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(similarity.weights(images, texts).detach().numpy(), weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(similarity(images, texts), parts["slices"], rtol=0, atol=0)
    torch.testing.assert_close(parts["pooled"], PooledSimilarity(0.1)(images, texts))


def test_gradients_of_slice_similarity_are_those_of_the_loops(volumes):
    images, texts = volumes
    similarity = SliceSimilarity(temperature=0.1, sharpness=7.0).double()
    slices, text = images.slices.double().requires_grad_(), texts.pooled.double().requires_grad_()
    up = torch.randn(B, M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (similarity(images.replace(slices=slices), TextFeatures(text)) * up).sum().backward()
    rng, step = torch.Generator().manual_seed(2), 1e-5

    def value(moved, words, sharpness=7.0):
        return (sliced_reference(moved, SLICES_SEEN, words, sharpness, 0.1)[0] * up.numpy()).sum()

    own = slices.detach(), text.detach()
    for which, leaf in enumerate((slices, text)):
        direction = torch.randn(leaf.shape, generator=rng, dtype=torch.float64)
        there, back = (tuple(x + sign * step * direction if k == which else x for k, x in enumerate(own)) for sign in (1, -1))
        assert (leaf.grad * direction).sum().item() == pytest.approx((value(*there) - value(*back)) / (2 * step), rel=1e-4)
    expected = (value(*own, 7.0 * math.exp(step)) - value(*own, 7.0 * math.exp(-step))) / (2 * step)
    assert similarity.sharpness.log.grad.item() == pytest.approx(expected, rel=1e-3)
    assert (slices.grad[~SLICES_SEEN] == 0).all()


def test_slice_scores_are_cosines_and_nan_on_padding(volumes):
    images, texts = volumes
    scores = slice_scores(images, texts)
    assert scores.shape == (B, M, 4)
    for i in range(B):
        for j in range(M):
            for s in range(4):
                expected = cosine(images.slices[i, s], texts.pooled[j]) if SLICES_SEEN[i, s] else math.nan
                assert scores[i, j, s].item() == pytest.approx(expected, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("similarity", [PooledSimilarity(0.2), TokenSimilarity(0.1, 7.0), SliceSimilarity(0.1, 7.0)])
def test_slice_logits_are_what_a_study_of_that_slice_alone_would_get(volumes, similarity):
    """Against the formulas in Python floats: cosine over temperature, and for tokens the log-mean-exp over one slice's own tokens."""
    images, texts = volumes
    tokens = torch.randn(B, 4 * 6, D, generator=torch.Generator().manual_seed(5))
    images = images.replace(tokens=tokens, grid=(4, 2, 3), token_valid=SLICES_SEEN.repeat_interleave(6, dim=1))
    found = slice_logits(similarity, images, texts).detach()
    assert found.shape == (B, M, 4)
    for i in range(B):
        for j in range(M):
            for s in range(4):
                if isinstance(similarity, TokenSimilarity):
                    cosines = [cosine(tokens[i, 6 * s + n], texts.pooled[j]) for n in range(6)]
                    expected = math.log(sum(math.exp(7.0 * c) for c in cosines) / 6) / 7.0 / 0.1
                else:
                    temperature = 0.2 if isinstance(similarity, PooledSimilarity) else 0.1
                    expected = cosine(images.slices[i, s], texts.pooled[j]) / temperature
                assert found[i, j, s].item() == pytest.approx(expected if SLICES_SEEN[i, s] else math.nan, rel=1e-3, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("fill", [0.0, 1e3, math.nan])
def test_padded_slices_do_not_move_the_score(volumes, fill):
    images, texts = volumes
    similarity = SliceSimilarity()
    longer = torch.cat([torch.where(SLICES_SEEN[..., None], images.slices, fill), torch.full((B, 3, D), fill)], dim=1)
    slices = longer.requires_grad_()
    changed = images.replace(slices=slices, slice_valid=torch.cat([SLICES_SEEN, torch.zeros(B, 3, dtype=torch.bool)], dim=1))
    scores = similarity(changed, texts)
    assert (scores - similarity(images, texts)).abs().max() < 1e-5
    weights = similarity.weights(changed, texts)
    assert (weights.transpose(1, 2)[~changed.slice_valid] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, M))
    scores.sum().backward()
    assert torch.isfinite(slices.grad[changed.slice_valid]).all()
    assert (slices.grad[~changed.slice_valid] == 0).all()


def test_one_slice_is_the_whole_study(volumes):
    images, texts = volumes
    one = images.replace(slices=images.pooled[:, None], slice_valid=None)
    parts = SliceSimilarity().logits(one, texts)
    torch.testing.assert_close(parts["slices"], parts["pooled"], rtol=1e-4, atol=1e-5)


def test_a_tower_without_slices_is_refused_with_a_reason(features):
    with pytest.raises(ValueError, match=r"keeps no slices: .*SlicePooledEncoder"):
        SliceSimilarity()(*features)
    with pytest.raises(ValueError, match="keeps no slices"):
        slice_scores(*features)
    with pytest.raises(ValueError, match="keeps no slices"):
        slice_logits(PooledSimilarity(), *features)


def test_slice_similarity_is_rebuilt_from_its_spec():
    again = build(SliceSimilarity(0.05, sharpness=20.0).spec(), Similarity)
    assert isinstance(again, SliceSimilarity)
    assert again.sharpness().item() == pytest.approx(20.0)
    assert again.slice_temperature().item() == pytest.approx(0.05)
