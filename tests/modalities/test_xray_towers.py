"""TimmEncoder over random small backbones: forms, shared space, freezing, weights; cell_valid against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from medvl.nn.tokens import cell_valid
from medvl.types import ImageBatch, ImageEncoder
from modalities.xray import TimmEncoder

BACKBONES = [  # name, image size, side of the grid
    ("vit_tiny_patch16_224", 64, 4),  # class token
    ("deit_tiny_distilled_patch16_224", 48, 3),  # two prefix tokens
    ("vit_small_patch16_dinov3", 48, 3),  # registers, mean pooling
    ("resnet18", 64, 2),
    ("convnext_atto", 64, 2),  # norm after pooling
    ("swin_tiny_patch4_window7_224", 64, 2),  # channels last
]


@pytest.fixture(scope="module")
def towers():
    torch.manual_seed(0)
    return {name: TimmEncoder(name, embed_dim=24, image_size=size).eval() for name, size, _ in BACKBONES}


def pixels(size: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "size", "side"), BACKBONES)
def test_forms(towers, name, size, side):
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[1, : size // 2] = False
    with torch.no_grad():
        out = towers[name](ImageBatch(pixels(size), valid))
        bare = towers[name](ImageBatch(pixels(size)))
    assert out.pooled.shape == (2, 24)
    assert out.grid == (side, side)
    assert out.tokens is not None
    assert out.tokens.shape == (2, side * side, 24)
    assert out.token_valid is not None
    assert out.token_valid.shape == (2, side * side)
    assert out.token_valid.dtype == torch.bool
    assert out.token_valid[0].all()
    assert not out.token_valid[1].all()
    assert out.token_valid[1].any()
    assert bare.token_valid is None
    torch.testing.assert_close(bare.pooled, out.pooled)
    assert torch.isfinite(out.tokens).all()


@pytest.mark.parametrize(("name", "size", "side"), BACKBONES)
def test_pooled_is_the_projection_of_timm_s_own_feature(towers, name, size, side):
    """``num_classes=0`` makes timm itself return its pooled feature."""
    tower = towers[name]
    with torch.no_grad():
        torch.testing.assert_close(tower(ImageBatch(pixels(size))).pooled, tower.project(tower.backbone(pixels(size))))


@pytest.mark.parametrize(("name", "size", "side"), BACKBONES)
def test_equal_tokens_pool_to_themselves(towers, name, size, side, monkeypatch):
    """Pooled and tokens share a space: where every feature is the same vector, so are both answers."""
    tower = towers[name]
    with torch.no_grad():
        shape = tower.backbone.forward_features(pixels(size)).shape
        width = tower.backbone.num_features
        vector = torch.randn(width, generator=torch.Generator().manual_seed(3))
        constant = (vector[:, None, None] if len(shape) == 4 and shape[1] == width else vector).expand(shape)
        monkeypatch.setattr(tower.backbone, "forward_features", lambda _: constant)
        out = tower(ImageBatch(pixels(size)))
    assert out.tokens is not None
    torch.testing.assert_close(out.tokens, out.pooled[:, None].expand_as(out.tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "side"), [("vit_tiny_patch16_224", 224, 14), ("convnext_atto", 224, 7), ("swin_tiny_patch4_window7_224", 224, 7)]
)
def test_tokens_look_at_their_own_cell(name, size, side):
    """The gradient of a token is centred on its cell, row-major (a transposed or shifted grid would not be)."""
    torch.manual_seed(0)
    tower = TimmEncoder(name, embed_dim=8, image_size=size).eval()
    cell = size / side
    off = []
    for row, col in ((side // 3, side // 2), (side // 2, side // 3)):
        x = pixels(size, batch=1).requires_grad_()
        out = tower(ImageBatch(x))
        assert out.tokens is not None
        (gradient,) = torch.autograd.grad(out.tokens[0, row * side + col].sum(), x)
        energy = gradient[0, 0] ** 2
        inside = energy[int(row * cell) : int((row + 1) * cell), int(col * cell) : int((col + 1) * cell)]
        assert inside.mean() > 3 * energy.mean()
        at = torch.arange(size)
        centre = torch.stack([(energy.sum(1) * at).sum(), (energy.sum(0) * at).sum()]) / energy.sum()
        off.append(centre - (torch.tensor([row, col]) + 0.5) * cell + 0.5)
    if name != "vit_tiny_patch16_224":  # attention sees the whole image from the first layer; its energy has a long tail
        assert (torch.stack(off).abs().mean(0) < 0.15 * cell).all()


@pytest.mark.parametrize(("name", "size", "side"), BACKBONES)
def test_a_token_of_an_image_does_not_depend_on_the_batch(towers, name, size, side):
    both = pixels(size, batch=3)
    with torch.no_grad():
        out, alone = towers[name](ImageBatch(both)), towers[name](ImageBatch(both[1:2]))
    torch.testing.assert_close(out.tokens[1:2], alone.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.pooled[1:2], alone.pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_gradients_reach_the_backbone_unless_it_is_frozen(name):
    for freeze in (False, True):
        tower = TimmEncoder(name, embed_dim=8, image_size=32, freeze=freeze, drop_rate=0.5).train()
        before = {k: v.clone() for k, v in tower.backbone.state_dict().items()}
        out = tower(ImageBatch(pixels(32)))
        assert out.tokens is not None
        (out.pooled.sum() + out.tokens.sum()).backward()
        assert tower.project.weight.grad is not None
        assert any(p.grad is not None for p in tower.backbone.parameters()) != freeze
        assert tower.training
        assert tower.backbone.training != freeze
        if freeze:
            assert all(torch.equal(v, before[k]) for k, v in tower.backbone.state_dict().items())  # batch statistics too
            torch.testing.assert_close(tower(ImageBatch(pixels(32))).pooled, out.pooled)  # no dropout


def test_channels():
    tower = TimmEncoder("resnet18", embed_dim=8, image_size=32, in_chans=3).eval()
    assert tower(ImageBatch(torch.zeros(1, 3, 32, 32))).pooled.shape == (1, 8)
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32\), this tower takes \(B, 3, 32, 32\)"):
        tower(ImageBatch(torch.zeros(1, 1, 32, 32)))


def test_another_size_is_refused(towers):
    with pytest.raises(ValueError, match=r"takes \(B, 1, 64, 64\)"):
        towers["vit_tiny_patch16_224"](ImageBatch(pixels(48)))


def test_an_unknown_name_is_refused_with_names_near_it():
    with pytest.raises(ValueError, match=r"no model named 'resnet19'"):
        TimmEncoder("resnet19", embed_dim=8)
    with pytest.raises(ValueError, match=r"near it: .*vit"):
        TimmEncoder("vit_mini", embed_dim=8)


def test_a_checkpoint_loads_strictly_and_without_its_classifier(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model("resnet18", in_chans=1, num_classes=5).eval()
    state = source.state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    tower = TimmEncoder("resnet18", embed_dim=8, image_size=32, checkpoint=path).eval()
    with torch.no_grad():
        torch.testing.assert_close(tower.backbone.forward_features(pixels(32)), source.forward_features(pixels(32)))

    save_file({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, path)
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.weight"):
        TimmEncoder("resnet18", embed_dim=8, image_size=32, checkpoint=path)
    save_file(state | {"stray.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"stray\.weight"):
        TimmEncoder("resnet18", embed_dim=8, image_size=32, checkpoint=path)


def by_pillow(grid: torch.Tensor, size: int) -> torch.Tensor:
    """(n * n, F) to (size * size, F), bicubic, one channel after the other."""
    n = round(len(grid) ** 0.5)
    channels = [Image.fromarray(np.ascontiguousarray(one.reshape(n, n))) for one in grid.numpy().T]
    resized = [np.asarray(one.resize((size, size), Image.Resampling.BICUBIC)).reshape(-1) for one in channels]
    return torch.from_numpy(np.stack(resized, axis=1))


@pytest.mark.parametrize(("name", "prefix"), [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)])
@pytest.mark.parametrize("size", [112, 32])
def test_positions_of_a_checkpoint_of_another_size_are_interpolated(tmp_path, name, prefix, size):
    torch.manual_seed(1)
    source = timm.create_model(name, img_size=64, in_chans=1, num_classes=5)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    same, other = (TimmEncoder(name, 8, checkpoint=path, image_size=side).backbone.state_dict() for side in (64, size))
    old = source.pos_embed.detach()[0]
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in same.items())
    torch.testing.assert_close(other["pos_embed"][0], torch.cat([old[:prefix], by_pillow(old[prefix:], size // 16)]), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in other.items() if key != "pos_embed")
    with pytest.raises(ValueError, match=r"(?s)does not hold the weights.*patch_embed\.proj\.weight"):
        TimmEncoder(name, 8, checkpoint=path, image_size=size, in_chans=3)


def test_relative_positions_of_a_checkpoint_of_another_size_are_interpolated(tmp_path):
    torch.manual_seed(1)
    source = timm.create_model("swin_tiny_patch4_window7_224", in_chans=1, num_classes=0)  # windows of 7, where 64 pixels have 2
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    tower = TimmEncoder("swin_tiny_patch4_window7_224", 8, checkpoint=tmp_path / "weights.safetensors", image_size=64)
    changed = [key for key, value in tower.backbone.state_dict().items() if value.shape != source.state_dict()[key].shape]
    assert changed and all(key.endswith("relative_position_bias_table") for key in changed)
    assert tower(ImageBatch(pixels(64))).grid == (2, 2)


def test_without_a_projection_the_features_are_the_backbone_s():
    torch.manual_seed(0)
    tower = TimmEncoder("vit_tiny_patch16_224", None, image_size=32).eval()
    assert tower.embed_dim == 192 and not list(tower.project.parameters())
    with torch.no_grad():
        out = tower(ImageBatch(pixels(32)))
        assert torch.equal(out.pooled, tower.backbone(pixels(32)))
        assert torch.equal(out.tokens, tower.backbone.forward_features(pixels(32))[:, 1:])


def test_a_tower_made_again_fetches_no_initial_weights(tmp_path, monkeypatch):
    save_file(timm.create_model("resnet18", in_chans=1, num_classes=0).state_dict(), tmp_path / "bb.safetensors")
    tower = TimmEncoder("resnet18", embed_dim=8, image_size=32, checkpoint=tmp_path / "bb.safetensors").eval()
    (tmp_path / "bb.safetensors").unlink()
    again = TimmEncoder.rebuild(tower.spec()["init_args"], tmp_path).eval()
    assert again.spec() == tower.spec()
    again.load_state_dict(tower.state_dict(), strict=True)
    assert torch.equal(again(ImageBatch(pixels(32))).pooled, tower(ImageBatch(pixels(32))).pooled)

    asked, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append(options["pretrained"]) or create(name, **options))
    made = TimmEncoder.rebuild({"name": "resnet18", "embed_dim": 8, "pretrained": True}, tmp_path)
    assert asked and not any(asked)
    assert made.spec()["init_args"]["pretrained"] is True


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    with pytest.raises(ValueError, match="safetensors"):
        TimmEncoder("resnet18", embed_dim=8, image_size=32, checkpoint=path)
    with pytest.raises(ValueError, match="not both"):
        TimmEncoder("resnet18", embed_dim=8, pretrained=True, checkpoint=path)


def test_the_tower_is_an_encoder_and_its_state_loads_again(towers):
    name, size, _ = BACKBONES[0]
    assert isinstance(towers[name], ImageEncoder)
    assert towers[name].embed_dim == 24
    again = TimmEncoder(name, embed_dim=24, image_size=size).eval()
    again.load_state_dict(towers[name].state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(again(ImageBatch(pixels(size))).pooled, towers[name](ImageBatch(pixels(size))).pooled)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24)),
    share=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_cell_valid_is_the_loop(shape, share, seed):
    grid = (min(share[0], shape[1]), min(share[1], shape[2]))
    valid = np.random.default_rng(seed).random(shape) > 0.9
    (b, h, w), (gh, gw) = shape, grid
    expected = [
        [valid[i, r * h // gh : -(-(r + 1) * h // gh), c * w // gw : -(-(c + 1) * w // gw)].any() for r in range(gh) for c in range(gw)]
        for i in range(b)
    ]
    np.testing.assert_array_equal(cell_valid(torch.from_numpy(valid), grid).numpy(), expected)


def test_cell_valid_refuses_other_forms():
    with pytest.raises(ValueError, match="expected"):
        cell_valid(torch.ones(4, 4, dtype=torch.bool), (2, 2))
    with pytest.raises(ValueError, match="at least 8 x 8"):
        cell_valid(torch.ones(1, 4, 4, dtype=torch.bool), (8, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("name", "size", "side"), BACKBONES)
def test_the_gpu_gives_what_the_cpu_gives(towers, name, size, side):
    batch = ImageBatch(pixels(size), torch.ones(2, size, size, dtype=torch.bool))
    with torch.no_grad():
        here = towers[name](batch)
        there = towers[name].to("cuda")(batch.to("cuda"))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            rough = towers[name](batch.to("cuda"))
        towers[name].to("cpu")
    torch.testing.assert_close(there.pooled.cpu(), here.pooled, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(there.tokens.cpu(), here.tokens, atol=2e-3, rtol=1e-2)
    assert torch.nn.functional.cosine_similarity(rough.pooled.float().cpu(), here.pooled).min() > 0.98
