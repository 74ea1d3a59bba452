"""The tower by studies against its backbone run image by image and a float64 loop over the formula; what must not move it does not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.model import build
from medvl.types import OTHER_VIEW, VIEWS, ImageBatch, ImageEncoder, ImageFeatures, view_index
from modalities.ct.pooling import AttentionAdapter
from modalities.pooling import GatedAttention, MaxPooling, MeanPooling, Pooling
from modalities.studies import places
from modalities.xray import ConvEncoder, TimmEncoder, ViewPooledEncoder

D, SIDE, GRID = 8, 16, 4
COUNTS = (2, 1, 3)
KINDS = (0, 2, 1, 2, OTHER_VIEW, 0)
POOLINGS = {"mean": MeanPooling, "max": MaxPooling, "gated": lambda: GatedAttention(D, hidden_dim=6)}


class InDouble(ConvEncoder):
    """The tower's own code turns pixels to float32; here they stay in float64, so that differences are not of rounding."""

    def _with_detail(self, batch):
        return self.scale(torch.cat([batch.pixels] * 3, dim=1)).clamp(-5.0, 5.0)


def conv(kind: type[ConvEncoder] = InDouble) -> ConvEncoder:
    return kind(embed_dim=D, widths=(8, 8, 8), blocks=(1, 1, 1), drop_rate=0.0)


def tower(pooling: Pooling | None = None, *, trained: bool = True, **options) -> ViewPooledEncoder:
    """In float64, every vector for a kind of view random if ``trained``."""
    torch.manual_seed(0)
    model = ViewPooledEncoder(conv(), pooling or GatedAttention(D, hidden_dim=6), **options).double().eval()
    if trained:
        with torch.no_grad():
            model.view_embedding.weight.normal_()
            for parameter in model.pooling.parameters():
                parameter.mul_(4)
    return model


def films(counts=COUNTS, kinds=KINDS, seed: int = 0) -> ImageBatch:
    rng = torch.Generator().manual_seed(seed)
    n = sum(counts)
    valid = torch.ones(n, SIDE, SIDE, dtype=torch.bool)
    valid[::2, 12:] = False
    pixels = torch.randn(n, 1, SIDE, SIDE, generator=rng, dtype=torch.float64)
    return ImageBatch(pixels, valid, view=torch.tensor(kinds[:n])).grouped(counts)


def numbers(module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def pooled_one(name: str, views: np.ndarray, p: dict[str, np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """A study's vector and the share of each view, one view at a time."""
    n, dim = views.shape
    if name == "mean":
        return sum(views) / n, [1 / n] * n
    if name == "max":
        at = [max(range(n), key=lambda v: views[v, d]) for d in range(dim)]
        return np.array([views[v, d] for d, v in enumerate(at)]), [at.count(v) / dim for v in range(n)]
    scores = []
    for x in views:
        content = [math.tanh(float(row @ x)) for row in p["pooling.content.weight"]]
        gate = [1 / (1 + math.exp(-float(row @ x))) for row in p["pooling.gate.weight"]]
        scores.append(sum(float(w) * c * g for w, c, g in zip(p["pooling.score.weight"][0], content, gate, strict=True)))
    shares = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
    return sum(share * x for share, x in zip(shares, views, strict=True)), shares


@pytest.mark.parametrize("name", POOLINGS)
def test_features_are_the_formula_over_the_backbone_image_by_image(name):
    model, batch = tower(POOLINGS[name]()), films()
    with torch.no_grad():
        out = model(batch)
        alone = [model.backbone(ImageBatch(batch.pixels[i][None], batch.valid[i][None])) for i in range(sum(COUNTS))]
    p, i = numbers(model), 0
    assert out.grid == (3, GRID, GRID)
    assert out.pooled.shape == (3, D)
    tokens = out.tokens.unflatten(1, out.grid)
    token_valid = out.token_valid.unflatten(1, out.grid)
    for study, count in enumerate(COUNTS):
        views = []
        for v in range(count):
            e = p["view_embedding.weight"][KINDS[i]]
            views.append(alone[i].pooled[0].numpy() + e)
            np.testing.assert_allclose(tokens[study, v].flatten(0, 1).numpy(), alone[i].tokens[0].numpy() + e, atol=1e-12)
            assert torch.equal(token_valid[study, v].flatten(), alone[i].token_valid[0])
            i += 1
        pooled, shares = pooled_one(name, np.array(views), p)
        np.testing.assert_allclose(out.views[study, :count].numpy(), views, atol=1e-12)
        np.testing.assert_allclose(out.pooled[study].numpy(), pooled, atol=1e-12)
        np.testing.assert_allclose(out.view_weights[study, :count].numpy(), shares, atol=1e-12)
        assert out.view_valid[study].tolist() == [True] * count + [False] * (3 - count)
        for part in (out.views, out.view_weights, tokens, token_valid):
            assert (part[study, count:] == 0).all()
    assert not out.token_valid.all()


@pytest.mark.parametrize("name", POOLINGS)
def test_gradients_are_those_of_the_formula(name):
    """To the vector of each kind and the pooling's weights, against central differences of the loop; through the backbone by torch."""
    model, batch, rng = tower(POOLINGS[name]()), films(), np.random.default_rng(1)
    up = rng.normal(size=(3, D))
    out = model(batch)
    (out.pooled * torch.from_numpy(up)).sum().backward()
    with torch.no_grad():
        plain = model.backbone(batch).pooled.numpy()
    own = numbers(model)

    def value(p):
        total, i = 0.0, 0
        for study, count in enumerate(COUNTS):
            views = np.array([plain[j] + p["view_embedding.weight"][KINDS[j]] for j in range(i, i + count)])
            total, i = total + float(pooled_one(name, views, p)[0] @ up[study]), i + count
        return total

    for key, parameter in model.named_parameters():
        if not key.startswith("backbone."):
            direction = rng.normal(size=parameter.shape)
            there, back = (own | {key: own[key] + sign * 1e-6 * direction} for sign in (1, -1))
            expected = (value(there) - value(back)) / 2e-6
            assert (parameter.grad.numpy() * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-8), key
    stem = model.backbone.stem[1][0].weight
    at = (0, 0, 1, 1)
    with torch.no_grad():
        ends = []
        for step in (1e-6, -1e-6):
            stem[at] += step
            ends.append((model(batch).pooled * torch.from_numpy(up)).sum().item())
            stem[at] -= step
    assert stem.grad[at].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-8)
    assert stem.grad.abs().max() > 0


def test_tokens_have_their_gradients():
    model, batch = tower(), films()
    model(batch).tokens.sum().backward()
    seen = torch.bincount(torch.tensor(KINDS), minlength=OTHER_VIEW + 1) * GRID * GRID
    torch.testing.assert_close(model.view_embedding.weight.grad, seen[:, None].expand(-1, D).double())


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("grouped", [True, False])
def test_a_study_of_one_view_starts_as_its_image(name, grouped):
    """At the start of training, whatever the kind: what the backbone gives, in its own form where images stand for themselves."""
    model, batch = tower(POOLINGS[name](), trained=False), films((1,) * 6)
    with torch.no_grad():
        out, plain = model(batch if grouped else replace(batch, study=None)), model.backbone(batch)
    assert torch.equal(out.pooled, plain.pooled)
    assert torch.equal(out.tokens, plain.tokens)
    assert torch.equal(out.token_valid, plain.token_valid)
    assert out.grid == ((1, *plain.grid) if grouped else plain.grid)
    assert (out.view_weights == 1).all()


@settings(max_examples=25, deadline=None)
@given(st.data(), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(sorted(POOLINGS)))
def test_other_studies_missing_views_and_the_order_do_not_move_a_study(data, counts, name):
    """Each study alone, with its views in another order, against all of them in one batch whose images come in any order."""
    kinds = data.draw(st.lists(st.integers(0, OTHER_VIEW), min_size=sum(counts), max_size=sum(counts)))
    model, batch = tower(POOLINGS[name]()), films(counts, kinds)
    mixed = torch.tensor(data.draw(st.permutations(range(sum(counts)))))
    with torch.no_grad():
        whole = model(batch)
        shuffled = model(ImageBatch(batch.pixels[mixed], batch.valid[mixed], None, batch.view[mixed], batch.study[mixed]))
        assert (whole.pooled - shuffled.pooled).abs().max() < 1e-10
        first = 0
        for i, count in enumerate(counts):
            own = torch.arange(first, first + count)
            turned = own[torch.tensor(data.draw(st.permutations(range(count))))]
            for rows in (own, turned):
                part = ImageBatch(batch.pixels[rows], batch.valid[rows], None, batch.view[rows]).grouped([count])
                alone = model(part)
                assert (alone.pooled[0] - whole.pooled[i]).abs().max() < 1e-10
                at = rows - first
                assert (alone.view_weights[0] - whole.view_weights[i, at]).abs().max() < 1e-10
                tokens = whole.tokens[i].unflatten(0, whole.grid)[at]
                assert (alone.tokens[0] - tokens.flatten(0, 2)).abs().max() < 1e-10
                assert torch.equal(alone.token_valid[0], whole.token_valid[i].unflatten(0, whole.grid)[at].flatten())
            first += count


def test_in_float32_too_company_does_not_move_a_study():
    torch.manual_seed(0)
    model, batch = ViewPooledEncoder(conv(ConvEncoder), GatedAttention(D)).eval(), films()
    batch = replace(batch, pixels=batch.pixels.float())
    with torch.no_grad():
        whole = model(batch)
        alone = model(ImageBatch(batch.pixels[:2], batch.valid[:2], None, batch.view[:2]).grouped([2]))
    assert (whole.pooled[:1] - alone.pooled).abs().max() < 1e-5
    assert (whole.tokens[:1, : alone.tokens.shape[1]] - alone.tokens).abs().max() < 1e-5


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_places_count_the_images_of_each_study(studies):
    names = sorted(set(studies))
    study = [names.index(one) for one in studies]
    slot, counts = places(torch.tensor(study))
    assert slot.tolist() == [study[:i].count(one) for i, one in enumerate(study)]
    assert counts.tolist() == [study.count(i) for i in range(len(names))]


def test_only_images_that_exist_are_encoded():
    model, seen = tower(), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0].pixels)))
    model(films())
    assert seen == [sum(COUNTS)]


def test_a_backbone_without_tokens_or_letterbox_is_taken():
    class Bare(ImageEncoder):
        embed_dim = D

        def __init__(self, tokens: bool) -> None:
            super().__init__()
            self.keep = tokens

        def forward(self, batch):
            pooled = batch.pixels.flatten(1)[:, :D]
            return ImageFeatures(pooled, *((pooled[:, None].expand(-1, 4, -1), (2, 2)) if self.keep else (None, None)))

    batch = replace(films(), valid=None)
    without = ViewPooledEncoder(Bare(False), MeanPooling())(batch)
    assert without.tokens is None
    assert without.grid is None
    assert without.views.shape == (3, 3, D)
    with_tokens = ViewPooledEncoder(Bare(True), MeanPooling())(batch)
    assert torch.equal(with_tokens.token_valid.unflatten(1, (3, 4)), without.view_valid[..., None].expand(3, 3, 4))


def test_a_hidden_kind_is_that_of_an_unknown_view_and_only_training_hides():
    model, batch = tower(unknown_rate=1.0), films()
    with torch.no_grad():
        known, unknown = model(batch).pooled, model(replace(batch, view=None)).pooled
        assert (known - unknown).abs().max() > 1e-3
        model.train()
        model.backbone.eval()
        torch.testing.assert_close(model(batch).pooled, unknown, rtol=0, atol=0)
        model.unknown_rate = 0.0
        torch.testing.assert_close(model(batch).pooled, known, rtol=0, atol=0)


def test_a_vision_transformer_trains_in_bf16_autocast():
    torch.manual_seed(0)
    backbone = TimmEncoder("vit_tiny_patch16_224", D, image_size=32)
    model = ViewPooledEncoder(backbone, GatedAttention(D))
    rng = torch.Generator().manual_seed(0)
    batch = ImageBatch(torch.randn(3, 1, 32, 32, generator=rng), view=torch.tensor([0, 2, 1])).grouped([2, 1])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
        (out.pooled.square().sum() + out.tokens.float().square().sum()).backward()
    assert out.pooled.dtype == out.view_weights.dtype == torch.float32
    assert out.tokens.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert (model.view_embedding.weight.grad[[0, 1, 2]] != 0).any(1).all()
    assert (model.view_embedding.weight.grad[OTHER_VIEW] == 0).all()


def test_it_is_rebuilt_from_its_spec_and_from_the_old_class_path():
    torch.manual_seed(0)
    model, batch = ViewPooledEncoder(conv(ConvEncoder), MaxPooling(), unknown_rate=0.2).eval(), films()
    again = build(model.spec(), ImageEncoder).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.unknown_rate == 0.2
    assert torch.equal(again(batch).pooled, model(batch).pooled)
    old = {"class_path": "modalities.ct.pooling.GatedAttention", "init_args": {"embed_dim": D}}
    assert type(build(old, Pooling)) is GatedAttention
    assert build(old, Pooling).spec()["class_path"] == "modalities.pooling.GatedAttention"


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="embeds in 8 dimensions, GatedAttention takes 4"):
        ViewPooledEncoder(conv(), GatedAttention(4))
    with pytest.raises(ValueError, match="AttentionAdapter needs the position of each slice"):
        ViewPooledEncoder(conv(), AttentionAdapter(D))
    with pytest.raises(ValueError, match="pools views already"):
        ViewPooledEncoder(tower(), MeanPooling())
    with pytest.raises(ValueError, match=r"unknown_rate is 1\.5"):
        ViewPooledEncoder(conv(), MeanPooling(), unknown_rate=1.5)
    model, batch = tower(), films()
    with pytest.raises(ValueError, match=r"studies \[0\] of the batch have no image"):
        model(replace(batch, study=batch.study + 1))
    with pytest.raises(ValueError, match=r"study is torch\.int64 of shape \(5,\), expected \(6,\)"):
        model(replace(batch, study=batch.study[1:]))
    with pytest.raises(ValueError, match=r"view is torch\.float32"):
        model(replace(batch, view=batch.view.float()))
    with pytest.raises(ValueError, match="view holds 4, expected 0 to 3"):
        model(replace(batch, view=batch.view + 1))
    for counts in ((6, 0), (2, 3)):
        with pytest.raises(ValueError, match="expected at least 1 of each and 6 together"):
            batch.grouped(counts)


def test_views_have_places_and_a_batch_moves_whole():
    assert [view_index(name) for name in ("PA", "AP", "lateral", "Lateral", "oblique", "", None)] == [0, 1, 2, 2, 3, 3, 3]
    assert VIEWS[2] == "lateral"
    moved = films().to("meta")
    assert {part.device.type for part in (moved.pixels, moved.valid, moved.view, moved.study)} == {"meta"}
    assert moved.position_mm is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpu_encodes_studies_as_the_cpu_does_and_learns_in_bf16():
    torch.manual_seed(0)
    model, batch = ViewPooledEncoder(conv(ConvEncoder), GatedAttention(D)).eval(), films()
    batch = replace(batch, pixels=batch.pixels.float())
    with torch.no_grad():
        here = model(batch)
        there = model.cuda()(batch.to("cuda"))
    torch.testing.assert_close(there.pooled.cpu(), here.pooled, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(there.view_weights.cpu(), here.view_weights, atol=2e-3, rtol=1e-2)
    assert torch.equal(there.token_valid.cpu(), here.token_valid)
    with torch.autocast("cuda", torch.bfloat16):
        out = model.train()(batch.to("cuda"))
        (out.pooled.sum() + out.tokens.float().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
