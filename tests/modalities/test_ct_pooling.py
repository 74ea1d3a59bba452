"""Slice poolings against loops over their formulas in NumPy, which share no code with them; gradients by central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from medvl.model import build
from modalities.ct.pooling import (
    AttentionAdapter,
    GatedAttention,
    MaxPooling,
    MeanPooling,
    TransformerPooling,
    encode_position,
)
from modalities.pooling import Pooling

B, S, D = 3, 5, 8
VALID = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0]], dtype=bool)
MAKERS = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "gated": lambda: GatedAttention(D, hidden_dim=6),
    "adapter": lambda: AttentionAdapter(D, heads=2),
    "transformer": lambda: TransformerPooling(D, depth=2, heads=2, gain=0.7),
}


def made(name: str, seed: int = 0) -> Pooling:
    """In float64, every parameter random, so that identities and zeros of the start hide nothing."""
    pooling = MAKERS[name]().double().eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 0.4)
    return pooling


@pytest.fixture
def study():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, S, D)), np.cumsum(rng.uniform(0.7, 6.0, size=(B, S)), axis=1).astype(np.float32).astype(float)


def softmax(scores):
    exp = [math.exp(s - max(scores)) for s in scores]
    return [e / sum(exp) for e in exp]


def layer_norm(x, p, name):
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def wave(z, dim):
    """Sine and cosine at wavelengths from 4 mm to 2 m in equal ratios."""
    lengths = [4.0 * 500.0 ** (i / (dim // 2 - 1)) for i in range(dim // 2)]
    return np.array([math.sin(2 * math.pi * z / w) for w in lengths] + [math.cos(2 * math.pi * z / w) for w in lengths])


def heights(z):
    return [v - (min(z) + max(z)) / 2 for v in z]


def self_attention(queries, values, p, name, heads):
    """Outputs and head-mean weights (query, key), one pair at a time."""
    w, b, dim = p[f"{name}.in_proj_weight"], p[f"{name}.in_proj_bias"], len(queries[0])
    q = [w[:dim] @ x + b[:dim] for x in queries]
    k = [w[dim : 2 * dim] @ x + b[dim : 2 * dim] for x in queries]
    v = [w[2 * dim :] @ x + b[2 * dim :] for x in values]
    outputs, mean_weights = [], []
    for one in q:
        parts, total = [], np.zeros(len(k))
        for h in range(heads):
            at = slice(h * dim // heads, (h + 1) * dim // heads)
            weights = softmax([float(one[at] @ other[at]) / math.sqrt(dim / heads) for other in k])
            parts.append(sum(a * x[at] for a, x in zip(weights, v, strict=True)))
            total += np.array(weights) / heads
        outputs.append(p[f"{name}.out_proj.weight"] @ np.concatenate(parts) + p[f"{name}.out_proj.bias"])
        mean_weights.append(total)
    return outputs, mean_weights


def reference_one(name, x, z, p):
    """Pooled vector and weights of one study's valid slices."""
    n, dim = x.shape
    if name == "mean":
        return sum(x) / n, [1 / n] * n
    if name == "max":
        at = [max(range(n), key=lambda s: x[s, d]) for d in range(dim)]
        return np.array([x[s, d] for d, s in enumerate(at)]), [at.count(s) / dim for s in range(n)]
    if name == "gated":
        scores = [float(p["score.weight"][0] @ (np.tanh(p["content.weight"] @ one) / (1 + np.exp(-(p["gate.weight"] @ one))))) for one in x]
        a = softmax(scores)
        return sum(w * one for w, one in zip(a, x, strict=True)), a
    place = [wave(v, dim) for v in heights(z)]
    if name == "adapter":
        outputs, weights = self_attention(
            [layer_norm(one, p, "norm") + at for one, at in zip(x, place, strict=True)], list(x), p, "attention", 2
        )
        return sum(outputs) / n, sum(weights) / n
    stream = list(x)
    for i in range(2):
        normed = [layer_norm(one, p, f"blocks.{i}.norm1") for one in stream]
        mixed, _ = self_attention([one + at for one, at in zip(normed, place, strict=True)], normed, p, f"blocks.{i}.attention", 2)
        stream = [one + p[f"blocks.{i}.gain1"] * m for one, m in zip(stream, mixed, strict=True)]
        for s, one in enumerate(stream):
            hidden = p[f"blocks.{i}.mlp.0.weight"] @ layer_norm(one, p, f"blocks.{i}.norm2") + p[f"blocks.{i}.mlp.0.bias"]
            hidden = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in hidden])
            stream[s] = one + p[f"blocks.{i}.gain2"] * (p[f"blocks.{i}.mlp.2.weight"] @ hidden + p[f"blocks.{i}.mlp.2.bias"])
    keys = [p["key.weight"] @ (layer_norm(one, p, "norm") + at) + p["key.bias"] for one, at in zip(stream, place, strict=True)]
    weights = np.zeros(n)
    for h in range(2):
        at = slice(h * dim // 2, (h + 1) * dim // 2)
        weights += np.array(softmax([float(p["query"][at] @ k[at]) / math.sqrt(dim / 2) for k in keys])) / 2
    return sum(w * one for w, one in zip(weights, stream, strict=True)), weights


def reference(name, x, z, p):
    pooled, weights = np.zeros((B, D)), np.zeros((B, S))
    for i in range(B):
        at = np.flatnonzero(VALID[i])
        pooled[i], weights[i, at] = reference_one(name, x[i, at], z[i, at], p)
    return pooled, weights


def parameters(pooling):
    return {name: value.detach().numpy().copy() for name, value in pooling.state_dict().items()}


@pytest.mark.parametrize("name", MAKERS)
def test_pooling_is_its_formula(study, name):
    x, z = study
    pooling = made(name)
    out = pooling(torch.from_numpy(x), torch.from_numpy(VALID), torch.from_numpy(z))
    pooled, weights = reference(name, x, z, parameters(pooling))
    np.testing.assert_allclose(out.pooled.detach().numpy(), pooled, rtol=1e-6, atol=1e-6)  # positions are in float32
    np.testing.assert_allclose(out.weights.detach().numpy(), weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_the_formula(study, name):
    """Along random directions of the slices and of every parameter, against central differences of the loops."""
    x, z = study
    pooling, rng = made(name), np.random.default_rng(5)
    up, up_weights = rng.normal(size=(B, D)), rng.normal(size=(B, S))
    slices = torch.from_numpy(x).requires_grad_()
    out = pooling(slices, torch.from_numpy(VALID), torch.from_numpy(z))
    ((out.pooled * torch.from_numpy(up)).sum() + (out.weights * torch.from_numpy(up_weights)).sum()).backward()
    own = parameters(pooling)

    def value(moved, p):
        pooled, weights = reference(name, moved, z, p)
        return (pooled * up).sum() + (weights * up_weights).sum()

    step = 1e-5
    direction = rng.normal(size=x.shape)
    expected = (value(x + step * direction, own) - value(x - step * direction, own)) / (2 * step)
    assert (slices.grad.numpy() * direction).sum() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for key, parameter in pooling.named_parameters():
        direction = rng.normal(size=parameter.shape)
        there, back = (own | {key: own[key] + sign * step * direction} for sign in (1, -1))
        expected = (value(x, there) - value(x, back)) / (2 * step)
        assert parameter.grad is not None
        assert (parameter.grad.numpy() * direction).sum() == pytest.approx(expected, rel=1e-4, abs=1e-6), key


def test_the_adapter_s_attention_is_torch_s_functional(study):
    x, z = (torch.from_numpy(part) for part in study)
    pooling = made("adapter")
    out = pooling(x, None, z)
    centred = z - (z.amin(1, keepdim=True) + z.amax(1, keepdim=True)) / 2
    placed = nn.functional.layer_norm(x, (D,), pooling.norm.weight, pooling.norm.bias) + encode_position(centred, x)
    q, k, v = (
        nn.functional.linear(source, w, b).unflatten(-1, (2, -1)).transpose(1, 2)
        for source, w, b in zip(
            (placed, placed, x), pooling.attention.in_proj_weight.chunk(3), pooling.attention.in_proj_bias.chunk(3), strict=True
        )
    )
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = nn.functional.linear(mixed, pooling.attention.out_proj.weight, pooling.attention.out_proj.bias).mean(1)
    torch.testing.assert_close(out.pooled, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("fill", [0.0, 1e4, math.nan])
def test_padding_its_amount_and_what_lies_on_it_do_not_matter(study, name, fill):
    x, z = (torch.from_numpy(part).float() for part in study)
    pooling, valid = made(name).float(), torch.from_numpy(VALID)
    before = pooling(x, valid, z)
    longer = [torch.cat([torch.where(valid[..., None], x, fill), torch.full((B, 7, D), fill)], 1)]
    longer += [
        torch.cat([valid, torch.zeros(B, 7, dtype=torch.bool)], 1),
        torch.cat([torch.where(valid, z, fill), torch.full((B, 7), fill)], 1),
    ]
    after = pooling(*longer)
    assert (after.pooled - before.pooled).abs().max() < 1e-5
    assert (after.weights[:, :S] - before.weights).abs().max() < 1e-5
    assert (after.weights[~longer[1]] == 0).all()
    for i in range(B):  # each study alone, without its padding
        alone = pooling(x[i, VALID[i]][None], None, z[i, VALID[i]][None])
        assert (alone.pooled[0] - before.pooled[i]).abs().max() < 1e-5
        torch.testing.assert_close(alone.weights.sum(1), torch.ones(1))


@pytest.mark.parametrize("name", MAKERS)
def test_no_gradient_on_padding_and_none_is_nan(study, name):
    x, z = (torch.from_numpy(part).float() for part in study)
    x[~torch.from_numpy(VALID)] = math.nan
    pooling = made(name).float()
    x.requires_grad_()
    out = pooling(x, torch.from_numpy(VALID), z)
    (out.pooled.square().sum() + out.weights.square().sum()).backward()
    assert (x.grad[~torch.from_numpy(VALID)] == 0).all()
    assert all(torch.isfinite(p.grad).all() for p in [x, *pooling.parameters()])
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", MAKERS)
def test_order_of_studies_order_of_slices_and_origin_do_not_matter(study, name):
    x, z = (torch.from_numpy(part).float() for part in study)
    pooling, valid = made(name).float(), torch.from_numpy(VALID)
    out = pooling(x, valid, z)
    turned = pooling(x.flip(0), valid.flip(0), z.flip(0))
    torch.testing.assert_close(turned.pooled.flip(0), out.pooled, atol=1e-5, rtol=0)
    reversed_ = pooling(x.flip(1), valid.flip(1), z.flip(1) + 300.0)
    torch.testing.assert_close(reversed_.pooled, out.pooled, atol=1e-4, rtol=0)  # float32 holds 300 mm to 3e-5
    torch.testing.assert_close(reversed_.weights.flip(1), out.weights, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["adapter", "transformer"])
def test_the_height_of_a_slice_matters_where_it_should(study, name):
    x, z = (torch.from_numpy(part).float() for part in study)
    pooling = made(name).float()
    assert (pooling(x, None, z).pooled - pooling(x, None, z * 3).pooled).abs().max() > 1e-3
    with pytest.raises(ValueError, match="needs position_mm, the height of each slice in mm"):
        pooling(x)
    with pytest.raises(ValueError, match="not finite"):
        pooling(x, None, torch.full((B, S), math.nan))
    with pytest.raises(ValueError, match=r"position_mm has shape \(3, 4\), expected \(3, 5\)"):
        pooling(x, None, z[:, 1:])


def test_slices_that_hold_the_maximum_together_share_it():
    x = torch.tensor([[[1.0, 0.0], [1.0, 2.0], [0.5, 2.0], [9.0, 9.0]]], requires_grad=True)
    out = MaxPooling()(x, torch.tensor([[True, True, True, False]]))
    assert out.pooled.tolist() == [[1.0, 2.0]]
    assert out.weights.tolist() == [[0.25, 0.5, 0.25, 0.0]]
    out.pooled.sum().backward()
    assert x.grad.tolist() == [[[0.5, 0.0], [0.5, 0.5], [0.0, 0.5], [0.0, 0.0]]]


@pytest.mark.parametrize("name", ["adapter", "transformer"])
def test_training_starts_from_a_mixture_of_the_slices(name):
    """One phrase can be compared with the study and with its slices from the first step on."""
    torch.manual_seed(0)
    pooling = {"adapter": AttentionAdapter(32), "transformer": TransformerPooling(32)}[name].eval()
    x = torch.randn(4, 9, 32)
    out = pooling(x, None, torch.arange(9.0).expand(4, 9) * 5)
    mixture = (out.weights[..., None] * x).sum(1)
    assert torch.nn.functional.cosine_similarity(out.pooled, mixture).min() > (0.9 if name == "adapter" else 0.7)


@pytest.mark.parametrize("name", MAKERS)
def test_forms_are_checked(name):
    pooling, position = MAKERS[name](), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"nothing valid in studies \[1\]"):
        pooling(torch.zeros(2, 3, D), torch.tensor([[True, False, True], [False] * 3]), position)
    with pytest.raises(ValueError, match="expected bool of shape"):
        pooling(torch.zeros(2, 3, D), torch.ones(2, 4, dtype=torch.bool), position)
    with pytest.raises(ValueError, match="expected bool"):
        pooling(torch.zeros(2, 3, D), torch.ones(2, 3), position)
    with pytest.raises(ValueError, match=r"takes \(B, S, "):
        pooling(torch.zeros(3, D))


def test_widths_are_checked():
    with pytest.raises(ValueError, match="even and a multiple of 4 heads"):
        AttentionAdapter(18)
    with pytest.raises(ValueError, match=r"takes \(B, S, 8\)"):
        GatedAttention(8)(torch.zeros(1, 2, 9))


@pytest.mark.parametrize("name", MAKERS)
def test_a_pooling_is_rebuilt_from_its_spec(name):
    pooling = MAKERS[name]()
    again = build(pooling.spec(), Pooling)
    assert type(again) is type(pooling)
    again.load_state_dict(pooling.state_dict(), strict=True)
    x, z = torch.randn(2, 4, D), torch.arange(4.0).expand(2, 4)
    torch.testing.assert_close(again.eval()(x, None, z).pooled, pooling.eval()(x, None, z).pooled, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_autocast_keeps_weights_and_mixture_in_float32(name):
    pooling = made(name).float()
    x, z = torch.randn(2, 60, D).bfloat16(), torch.arange(60.0).expand(2, 60)
    with torch.autocast("cpu", torch.bfloat16):
        out = pooling(x, None, z)
    assert out.pooled.dtype == out.weights.dtype == torch.float32
    torch.testing.assert_close(out.weights.sum(1), torch.ones(2), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", MAKERS)
def test_the_gpu_pools_as_the_cpu_does_and_learns_in_bf16(study, name):
    x, z = (torch.from_numpy(part).float() for part in study)
    pooling, valid = made(name).float(), torch.from_numpy(VALID)
    here = pooling(x, valid, z)
    pooling.cuda()
    there = pooling(x.cuda(), valid.cuda(), z.cuda())
    torch.testing.assert_close(there.pooled.cpu(), here.pooled, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(there.weights.cpu(), here.weights, atol=2e-3, rtol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        slices = x.cuda().requires_grad_()
        pooling(slices, valid.cuda(), z.cuda()).pooled.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in [slices, *pooling.parameters()] if p.grad is not None)
