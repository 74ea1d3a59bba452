"""CT towers: by slices against the same 2D tower run slice by slice, as volumes against MONAI's and timm's own forward passes."""

from __future__ import annotations

import builtins
import math
import sys
import weakref
from dataclasses import replace

import jsonargparse
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medvl.model import DualEncoder, build, load
from medvl.nn.similarity import PooledSimilarity, SliceSimilarity, TokenSimilarity, slice_scores
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, TextFeatures
from modalities.ct.pooling import GatedAttention, MaxPooling, MeanPooling, TransformerPooling
from modalities.ct.slices import SlicePooledEncoder
from modalities.ct.volumes import InflatedEncoder, MonaiVitEncoder, ResNet3dEncoder, VolumeEncoder, inflate_kernel
from modalities.xray.conv import ConvEncoder
from modalities.xray.reader import XrayReader
from modalities.xray.towers import TimmEncoder

B, C, S, SIDE, D = 2, 2, 7, 32, 16
LENGTHS = (7, 4)


def conv(**options) -> ConvEncoder:
    return ConvEncoder(embed_dim=D, widths=(8, 8, 8), blocks=(1, 1, 1), in_chans=C, **{"drop_rate": 0.0} | options)


def tower(pooling=None, seed: int = 0, backbone=None, **options) -> SlicePooledEncoder:
    torch.manual_seed(seed)
    return SlicePooledEncoder(backbone or conv(), pooling or TransformerPooling(D), **{"chunk": 3} | options)


def volumes(seed: int = 0, slices: int = S, lengths=LENGTHS) -> ImageBatch:
    rng = torch.Generator().manual_seed(seed)
    valid = torch.arange(slices) < torch.tensor(lengths)[:, None]
    position = torch.arange(slices) * torch.tensor([[1.5], [4.0]])[: len(lengths)]
    return ImageBatch(torch.randn(len(lengths), C, slices, SIDE, SIDE, generator=rng), valid, position)


def worst(one: Tensor | None, other: Tensor | None) -> float:
    assert one is not None
    assert other is not None
    assert one.shape == other.shape
    assert one.numel() > 0
    return (one - other).abs().max().item()


def test_features_are_those_of_the_backbone_slice_by_slice():
    model, batch = tower().eval(), volumes()
    with torch.no_grad():
        out = model(batch)
        grid = SIDE // 4
        assert out.grid == (S, grid, grid)
        assert out.pooled.shape == (B, D)
        assert out.slices.shape == (B, S, D)
        tokens = out.tokens.unflatten(1, out.grid)
        for i, length in enumerate(LENGTHS):
            alone = [model.backbone(ImageBatch(batch.pixels[i, :, s][None])) for s in range(length)]
            slices = torch.cat([one.pooled for one in alone])
            assert worst(out.slices[i, :length], slices) < 1e-5
            assert worst(tokens[i, :length].flatten(1, 2), torch.cat([one.tokens for one in alone])) < 1e-5
            mixed = model.pooling(slices[None], None, batch.position_mm[i, :length][None])
            assert worst(out.pooled[i], mixed.pooled[0]) < 1e-5
            assert worst(out.slice_weights[i, :length], mixed.weights[0]) < 1e-5
    assert torch.equal(out.slice_valid, batch.valid)
    assert torch.equal(out.token_valid.unflatten(1, out.grid), batch.valid[..., None, None].expand(B, *out.grid))
    for part in (out.slices, out.slice_weights, tokens):
        assert (part[~batch.valid] == 0).all()


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunking_does_not_change_the_result(chunk):
    batch = volumes()
    with torch.no_grad():
        one, other = tower(chunk=100).eval()(batch), tower(chunk=chunk).eval()(batch)
    for name in ("pooled", "tokens", "slices", "slice_weights"):
        assert worst(getattr(one, name), getattr(other, name)) < 1e-5


@pytest.mark.parametrize("fill", [0.0, 1e4, math.nan])
def test_padding_its_amount_and_what_lies_on_it_do_not_matter(fill):
    model, batch = tower().eval(), volumes()
    pixels = torch.where(batch.valid[:, None, :, None, None], batch.pixels, fill)
    more = ImageBatch(
        torch.cat([pixels, torch.full((B, C, 5, SIDE, SIDE), fill)], dim=2),
        torch.cat([batch.valid, torch.zeros(B, 5, dtype=torch.bool)], dim=1),
        torch.cat([batch.position_mm, torch.full((B, 5), fill)], dim=1),
    )
    with torch.no_grad():
        one, other = model(batch), model(more)
        alone = model(ImageBatch(batch.pixels[1:, :, : LENGTHS[1]], None, batch.position_mm[1:, : LENGTHS[1]]))
        turned = model(ImageBatch(batch.pixels.flip(0), batch.valid.flip(0), batch.position_mm.flip(0)))
    assert worst(one.pooled, other.pooled) < 1e-5
    assert worst(one.slices, other.slices[:, :S]) < 1e-5
    assert worst(one.slice_weights, other.slice_weights[:, :S]) < 1e-5
    assert worst(one.tokens, other.tokens[:, : one.tokens.shape[1]]) < 1e-5
    assert worst(one.pooled[1:], alone.pooled) < 1e-5
    assert worst(one.pooled, turned.pooled.flip(0)) < 1e-5
    assert alone.token_valid is None
    assert alone.slice_valid is None


def test_padded_slices_are_not_encoded_and_chunks_are_bounded():
    model, seen = tower().eval(), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0].pixels)))
    model(volumes())
    assert sum(seen) == sum(LENGTHS)
    assert max(seen) <= 3
    assert max(seen) - min(seen) <= 1  # no sliver for batch normalisation to be taken over


def test_tokens_may_be_coarser_or_left_out():
    batch = volumes()
    with torch.no_grad():
        fine, coarse, none = (tower(**options).eval()(batch) for options in ({}, {"token_pool": 4}, {"tokens": False}))
    assert coarse.grid == (S, 2, 2)
    for at, expected in ((0, (0, 0)), (1, (0, 1)), (2, (1, 0)), (3, (1, 1))):
        rows, columns = (slice(4 * part, 4 * part + 4) for part in expected)
        block = fine.tokens.unflatten(1, fine.grid)[:, :, rows, columns].mean((2, 3))
        assert worst(coarse.tokens.unflatten(1, (S, 4))[:, :, at], block) < 1e-5
    assert coarse.token_valid.shape == coarse.tokens.shape[:2]
    assert none.tokens is None
    assert none.grid is None
    assert none.token_valid is None
    assert worst(none.pooled, fine.pooled) < 1e-6
    with pytest.raises(ValueError, match=r"token_pool 3 does not divide the backbone's token grid \(8, 8\)"):
        tower(token_pool=3)(batch)


def gradients(model: nn.Module, batch: ImageBatch, seed: int = 3) -> dict[str, Tensor]:
    """Of a loss that every part of the features enters."""
    torch.manual_seed(seed)  # dropout
    out = model(batch)
    rng = torch.Generator().manual_seed(1)
    loss = sum((part * torch.randn(part.shape, generator=rng)).sum() for part in (out.pooled, out.tokens, out.slices, out.slice_weights))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_encoding_again_gives_the_gradients_of_keeping_everything(mode):
    """With dropout and batch normalisation in training, and pixels that want a gradient."""
    kept, again = (tower(backbone=conv(drop_rate=0.5), pooling=TransformerPooling(D, drop_rate=0.2), recompute=r) for r in (False, True))
    again.load_state_dict(kept.state_dict())
    for model in (kept, again):
        model.train(mode == "train")
    batches = [replace(volumes(), pixels=volumes().pixels.requires_grad_()) for _ in range(2)]
    one, other = (gradients(model, batch) for model, batch in zip((kept, again), batches, strict=True))
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert max(float(g.abs().max()) for g in one.values()) > 0.1
    torch.testing.assert_close(batches[1].pixels.grad, batches[0].pixels.grad, rtol=1e-5, atol=1e-6)
    assert (batches[1].pixels.grad.transpose(1, 2)[~batches[1].valid] == 0).all()


def test_evaluation_gradients_are_those_of_one_plain_loop():
    model, batch = tower().eval(), volumes()
    got = gradients(model, batch)
    model.zero_grad()
    rng = torch.Generator().manual_seed(1)
    shapes = ((B, D), (B, S * 64, D), (B, S, D), (B, S))
    up = [torch.randn(shape, generator=rng) for shape in shapes]
    loss = torch.zeros(())
    for i, length in enumerate(LENGTHS):
        alone = [model.backbone(ImageBatch(batch.pixels[i, :, s][None])) for s in range(length)]
        mixed = model.pooling(torch.stack([one.pooled[0] for one in alone])[None], None, batch.position_mm[i, :length][None])
        loss = loss + (mixed.pooled[0] * up[0][i]).sum() + (mixed.weights[0] * up[3][i, :length]).sum()
        for s, one in enumerate(alone):
            loss = loss + (one.tokens[0] * up[1][i].view(S, 64, D)[s]).sum() + (one.pooled[0] * up[2][i, s]).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_encoding_again_does_not_update_running_statistics_again(momentum):
    def run(recompute: bool, backward: bool) -> dict[str, Tensor]:
        model = tower(recompute=recompute).train()
        norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        for layer in norms:
            layer.momentum = momentum
        loss = model(volumes()).tokens.square().sum()
        if backward:
            loss.backward(retain_graph=True)
            loss.backward()  # a graph may be gone through twice
        assert all(layer.momentum == momentum for layer in norms)
        return dict(model.backbone.named_buffers())

    expected, before, got = run(False, True), run(True, False), run(True, True)
    assert any("num_batches_tracked" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
        assert torch.equal(value, before[name]), name
        if "num_batches_tracked" in name:
            assert value.item() == math.ceil(sum(LENGTHS) / 3)
        if "running_mean" in name:
            assert value.abs().max() > 0


def test_a_backbone_in_evaluation_keeps_its_statistics_in_training():
    model = tower().train()
    model.backbone.eval()
    before = {name: value.clone() for name, value in model.backbone.named_buffers()}
    model(volumes()).pooled.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.named_buffers())
    assert not model.backbone.training


def test_a_frozen_backbone_trains_its_head_and_pooling():
    backbone = TimmEncoder("vit_tiny_patch16_224", embed_dim=D, image_size=SIDE, in_chans=C, freeze=True)
    model = SlicePooledEncoder(backbone, GatedAttention(D), recompute=False).train()
    out = model(volumes())
    assert out.grid == (S, 2, 2)
    out.pooled.sum().backward()
    assert backbone.project.weight.grad is not None
    assert all(p.grad is None for p in backbone.backbone.parameters())


def test_bf16_autocast_trains_on_the_cpu():
    model = tower().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(volumes())
        (out.pooled.sum() + out.tokens.float().sum()).backward()
    assert out.pooled.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_slice_scores_and_maps_say_where_a_bright_slice_is():
    """A similarity on features of the tower: shapes, and the slice that differs is the one that stands out."""
    batch = volumes()
    batch.pixels[:] = 0.1
    batch.pixels[0, :, 5] += torch.randn(C, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    model = tower(MaxPooling()).eval()
    with torch.no_grad():
        out = model(batch)
        texts = TextFeatures(out.slices[0, 5][None])
        scores, weights = slice_scores(out, texts), SliceSimilarity().weights(out, texts)
        maps = SliceSimilarity().maps(out, texts)
    assert scores.shape == (B, 1, S)
    assert scores[0, 0].argmax() == weights[0, 0].argmax() == 5
    assert scores[1, 0].isnan().tolist() == [False] * 4 + [True] * 3
    assert maps.shape == (B, 1, *out.grid)
    assert maps[1, 0].isnan().flatten(1).all(1).tolist() == [False] * 4 + [True] * 3


class PeakMemory(TorchDispatchMode):
    """Bytes of tensors alive at once, beyond what was alive before, as torch's operators make them; exact, unlike resident memory."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = self.now = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (key := id(storage := leaf.untyped_storage())) not in self.alive and key not in given:
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def stored(out: ImageFeatures) -> int:
    parts = (out.pooled, out.tokens, out.slices, out.slice_weights)
    return sum(part.untyped_storage().nbytes() for part in parts if part is not None)


def peak_beyond_embeddings(model: SlicePooledEncoder, slices: int, backward: bool) -> float:
    batch = ImageBatch(torch.zeros(1, C, slices, SIDE, SIDE), None, torch.arange(float(slices))[None])
    with torch.set_grad_enabled(backward):
        model(ImageBatch(batch.pixels[:, :, :8], None, batch.position_mm[:, :8]))  # what is made once
        with PeakMemory() as memory:
            out = model(batch)
            held = stored(out)
            if backward:
                (out.pooled.sum() + (0.0 if out.tokens is None else out.tokens.sum())).backward()
                held *= 2  # and their gradients
                model.zero_grad()
    return memory.peak - held


def test_the_memory_meter_sees_what_lives_together():
    with PeakMemory() as memory:
        kept = torch.zeros(1000)
        for _ in range(5):
            kept = kept + torch.ones(1000)
    assert memory.peak == 3 * 4000
    assert memory.now == 4000


@pytest.mark.parametrize("options", [{"tokens": False}, {}, {"token_pool": 4}])
def test_memory_of_600_slices_is_that_of_60_beyond_the_embeddings(options):
    """The bar is 1.3; at a size where one chunk's activations outweigh bookkeeping per slice, as they do at 224 pixels."""
    model = tower(GatedAttention(D, hidden_dim=8), backbone=conv(bands=()), chunk=8, **options).eval()
    few, many = (peak_beyond_embeddings(model, slices, backward=False) for slices in (60, 600))
    assert few > 1e5
    assert many < 1.3 * few


def test_memory_of_600_slices_is_that_of_60_in_training():
    model = tower(MeanPooling(), backbone=conv(bands=()), chunk=8, tokens=False).train()
    few, many = (peak_beyond_embeddings(model, slices, backward=True) for slices in (60, 600))
    assert few > 1e5
    assert many < 1.3 * few
    keeping = tower(MeanPooling(), backbone=conv(bands=()), chunk=8, tokens=False, recompute=False).train()
    assert peak_beyond_embeddings(keeping, 600, backward=True) > 5 * many


def test_forms_are_checked():
    with pytest.raises(ValueError, match="embeds in 16 dimensions, GatedAttention takes 8"):
        tower(GatedAttention(8))
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        tower(chunk=0)
    with pytest.raises(ValueError, match=r"takes volumes \(B, C, S, H, W\)"):
        tower()(ImageBatch(torch.zeros(1, C, SIDE, SIDE)))
    with pytest.raises(ValueError, match=r"nothing valid in studies \[1\]"):
        tower()(replace(volumes(), valid=torch.tensor([[True] * S, [False] * S])))
    with pytest.raises(ValueError, match="needs position_mm"):
        tower()(replace(volumes(), position_mm=None))


# --- volumes ---


@pytest.fixture(scope="module")
def monai_nets():
    pytest.importorskip("einops")
    return pytest.importorskip("monai.networks.nets")


def vit(**options) -> MonaiVitEncoder:
    torch.manual_seed(0)
    sizes = {"image_size": (16, SIDE, SIDE), "patch_size": (4, 16, 16), "width": 24, "depth": 2, "heads": 2, "mlp_dim": 32, "in_chans": C}
    return MonaiVitEncoder(D, **sizes | options)


def test_the_vision_transformer_is_monai_s(monai_nets):
    model = vit().eval()
    pixels = torch.randn(B, C, 16, SIDE, SIDE)
    network = monai_nets.ViT(
        in_channels=C, img_size=(16, SIDE, SIDE), patch_size=(4, 16, 16), hidden_size=24, mlp_dim=32, num_layers=2, num_heads=2
    ).eval()
    network.load_state_dict(model.network.state_dict())
    with torch.no_grad():
        out, (features, _) = model(ImageBatch(pixels)), network(pixels)
    assert out.grid == (4, 2, 2)
    assert worst(out.tokens, model.project(features)) < 1e-5
    assert worst(out.pooled, model.project(features.mean(1))) < 1e-5


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet50"])
def test_the_resnet_is_monai_s(monai_nets, name):
    torch.manual_seed(0)
    model = ResNet3dEncoder(D, depth=int(name[6:]), in_chans=C).eval()
    network = getattr(monai_nets, name)(n_input_channels=C, conv1_t_stride=2, feed_forward=False).eval()
    network.load_state_dict(model.network.state_dict())
    pixels = torch.randn(1, C, 33, 40, 64)
    with torch.no_grad():
        out = model(ImageBatch(pixels))
        assert worst(out.pooled, model.project(network(pixels))) < 1e-4
    assert out.grid == tuple(math.ceil(n / stride) for n, stride in zip((33, 40, 64), model.stride, strict=True)) == (2, 2, 2)


@pytest.mark.parametrize("name", ["resnet18", "resnet26d"])
def test_identical_slices_give_the_2d_network_s_features(name, tmp_path):
    """In every plane, those at the ends too, with statistics and scales of normalisation that are not those of the start."""
    torch.manual_seed(0)
    flat = timm.create_model(name, in_chans=C, num_classes=0).eval()
    with torch.no_grad():
        for layer in flat.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.2)
                layer.running_var.uniform_(0.5, 2.0)
                layer.bias.normal_(std=0.2)
    path = tmp_path / "flat.safetensors"
    save_file(flat.state_dict(), path)
    model = InflatedEncoder(name, D, checkpoint=path, in_chans=C).eval()
    picture = torch.randn(B, C, 64, 96)
    with torch.no_grad():
        expected = flat.forward_features(picture)
        got = model.features(picture[:, :, None].expand(-1, -1, 20, -1, -1))
        out = model(ImageBatch(picture[:, :, None].expand(-1, -1, 20, -1, -1)))
        assert got.shape == (B, expected.shape[1], 2, 2, 3)
        for plane in range(2):
            torch.testing.assert_close(got[:, :, plane], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        torch.testing.assert_close(out.pooled, model.project(flat(picture)), rtol=1e-4, atol=1e-4 * float(out.pooled.abs().max()))
    assert out.grid == (2, 2, 3)
    assert model.stride == (16, 32, 32)


def test_inflated_kernels_are_repeated_and_divided():
    weight = torch.randn(5, 3, 7, 7)
    inflated = inflate_kernel(weight, 3)
    assert inflated.shape == (5, 3, 3, 7, 7)
    for at in range(3):
        torch.testing.assert_close(inflated[:, :, at], weight / 3)


def test_what_has_no_3d_form_is_refused():
    with pytest.raises(ValueError, match="seresnet50 has a SEModule, which has no 3D form"):
        InflatedEncoder("seresnet50", D)
    with pytest.raises(ValueError, match="no ResNet of timm"):
        InflatedEncoder("resnext26ts", D)
    with pytest.raises(ValueError, match="must be odd, got 2"):
        InflatedEncoder("resnet18", D, kernel_depth=2)
    with pytest.raises(ValueError, match="no model named"):
        InflatedEncoder("resnet19", D)


def test_volume_forms_are_checked(monai_nets):
    with pytest.raises(ValueError, match=r"takes volumes \(B, 2, S, H, W\)"):
        vit()(ImageBatch(torch.zeros(1, 1, 16, SIDE, SIDE)))
    with pytest.raises(ValueError, match="at most 16 slices of"):
        vit()(ImageBatch(torch.zeros(1, C, 17, SIDE, SIDE)))
    with pytest.raises(ValueError, match="no multiple of patch_size"):
        vit(image_size=(15, SIDE, SIDE))
    with pytest.raises(ValueError, match=r"studies \[1\] of the batch have padding before a valid slice"):
        vit()(ImageBatch(torch.zeros(2, C, 3, SIDE, SIDE), torch.tensor([[True, True, False], [True, False, True]])))
    with pytest.raises(ValueError, match="MONAI has no ResNet of 19 layers"):
        ResNet3dEncoder(D, depth=19)


def test_without_monai_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("monai"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.startswith("monai")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    for make in (vit, lambda: ResNet3dEncoder(D)):
        with pytest.raises(ImportError, match=r"pip install 'medvl\[monai\]'"):
            make()


# --- one interface ---

SMALL_CONV = {
    "class_path": "modalities.xray.conv.ConvEncoder",
    "init_args": {"embed_dim": D, "widths": [8, 8, 8], "blocks": [1, 1, 1], "in_chans": C},
}
SMALL_VIT = {
    "class_path": "modalities.xray.towers.TimmEncoder",
    "init_args": {"name": "vit_tiny_patch16_224", "embed_dim": D, "image_size": SIDE, "in_chans": C},
}


def by_slices(backbone, pooling, **pooling_args):
    pooling = {"class_path": f"modalities.ct.pooling.{pooling}", "init_args": pooling_args}
    return {"class_path": "modalities.ct.slices.SlicePooledEncoder", "init_args": {"backbone": backbone, "pooling": pooling, "chunk": 3}}


RECIPES = {  # what stands under model.image
    "mean": by_slices(SMALL_CONV, "MeanPooling"),
    "max": by_slices(SMALL_VIT, "MaxPooling"),
    "gated": by_slices(SMALL_CONV, "GatedAttention", embed_dim=D),
    "adapter": by_slices(SMALL_VIT, "AttentionAdapter", embed_dim=D),
    "transformer": by_slices(SMALL_CONV, "TransformerPooling", embed_dim=D),
    "vit": {
        "class_path": "modalities.ct.volumes.MonaiVitEncoder",
        "init_args": {
            "embed_dim": D,
            "image_size": [16, SIDE, SIDE],
            "patch_size": [4, 16, 16],
            "width": 24,
            "depth": 1,
            "heads": 2,
            "mlp_dim": 32,
            "in_chans": C,
        },
    },
    "resnet": {"class_path": "modalities.ct.volumes.ResNet3dEncoder", "init_args": {"embed_dim": D, "depth": 10, "in_chans": C}},
    "inflated": {"class_path": "modalities.ct.volumes.InflatedEncoder", "init_args": {"name": "resnet18", "embed_dim": D, "in_chans": C}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_one_node_of_a_recipe_changes_the_tower(name):
    """Built as LightningCLI does, run, scored, rebuilt from its own spec, strictly; padding and batch order without effect."""
    if name in ("vit", "resnet"):
        pytest.importorskip("monai")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--image", type=ImageEncoder)
    torch.manual_seed(0)
    model = parser.instantiate_classes(parser.parse_object({"image": RECIPES[name]})).image.eval()
    batch = volumes()
    texts = TextFeatures(torch.randn(3, D))
    with torch.no_grad():
        out = model(batch)
        assert model.embed_dim == D
        assert out.pooled.shape == (B, D)
        assert out.tokens.shape == (B, math.prod(out.grid), D)
        assert len(out.grid) == 3
        assert out.token_valid.shape == out.tokens.shape[:2]
        for similarity in (PooledSimilarity(), TokenSimilarity()):
            assert torch.isfinite(similarity(out, texts)).all()
            assert similarity.maps(out, texts).shape == (B, 3, *out.grid)

        again = build(model.spec(), ImageEncoder).eval()
        again.load_state_dict(model.state_dict(), strict=True)
        assert again.spec() == model.spec()
        assert worst(again(batch).pooled, out.pooled) == 0

        more = ImageBatch(
            torch.cat([torch.where(batch.valid[:, None, :, None, None], batch.pixels, 1e3), torch.ones(B, C, 9, SIDE, SIDE)], dim=2),
            torch.cat([batch.valid, torch.zeros(B, 9, dtype=torch.bool)], dim=1),
            torch.cat([batch.position_mm, torch.zeros(B, 9)], dim=1),
        )
        padded = model(more)
        alone = model(ImageBatch(batch.pixels[1:, :, : LENGTHS[1]], None, batch.position_mm[1:, : LENGTHS[1]]))
        turned = model(ImageBatch(batch.pixels.flip(0), batch.valid.flip(0), batch.position_mm.flip(0)))
    scale = float(out.pooled.abs().max())
    assert worst(padded.pooled, out.pooled) < 1e-5 * max(scale, 1)
    assert worst(alone.pooled, out.pooled[1:]) < 1e-5 * max(scale, 1)
    assert worst(turned.pooled.flip(0), out.pooled) < 1e-5 * max(scale, 1)
    assert worst(padded.tokens[padded.token_valid], out.tokens[out.token_valid]) < 1e-4 * max(scale, 1)
    assert (out.tokens[~out.token_valid] == 0).all()


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_model_loads_with_nothing_but_its_folder(name, tmp_path):
    """Initial weights are not fetched again: the file that the inflated network was made from is gone."""
    from reports import MiniLmReportEncoder

    if name in ("vit", "resnet"):
        pytest.importorskip("monai")
    spec = RECIPES[name]
    initial = tmp_path / "initial.safetensors"
    if name == "inflated":
        save_file(timm.create_model("resnet18", in_chans=C, num_classes=0).state_dict(), initial)
        spec = {**spec, "init_args": {**spec["init_args"], "checkpoint": str(initial)}}
    torch.manual_seed(0)
    image = build(spec, ImageEncoder).eval()
    DualEncoder(image, MiniLmReportEncoder(D, hidden_dim=None), SliceSimilarity(), XrayReader(size=SIDE)).save(tmp_path / "model")
    initial.unlink(missing_ok=True)
    again = load(tmp_path / "model", device="cpu")
    assert type(again.image) is type(image)
    assert again.image.spec() == image.spec()
    with torch.no_grad():
        assert worst(again.image(volumes()).pooled, image(volumes()).pooled) == 0


@pytest.mark.parametrize("name", ["vit", "resnet", "inflated"])
def test_volume_towers_learn_and_leave_padding_alone(name):
    if name in ("vit", "resnet"):
        pytest.importorskip("monai")
    torch.manual_seed(0)
    model = build(RECIPES[name], ImageEncoder).train()
    assert isinstance(model, VolumeEncoder)
    batch = volumes(slices=36, lengths=(36, 20)) if name != "vit" else volumes(slices=16, lengths=(16, 9))
    batch = replace(batch, pixels=torch.randn(*batch.pixels.shape[:3], SIDE * (1 if name == "vit" else 2), SIDE).requires_grad_())
    out = model(batch)
    assert out.token_valid.view(B, out.grid[0], -1).all(2).sum(1).tolist() == ([4, 3] if name == "vit" else [out.grid[0], out.grid[0] - 1])
    (out.pooled.square().sum() + out.tokens.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    padding = batch.pixels.grad.transpose(1, 2)[~batch.valid]
    assert padding.numel() > 0
    assert (padding == 0).all()
    assert batch.pixels.grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", RECIPES)
def test_the_gpu_gives_what_the_cpu_gives_and_learns_in_bf16(name):
    if name in ("vit", "resnet"):
        pytest.importorskip("monai")
    torch.manual_seed(0)
    model, batch = build(RECIPES[name], ImageEncoder).eval(), volumes()
    with torch.no_grad():
        here = model(batch)
        there = model.cuda()(batch.to("cuda"))
        if isinstance(model, SlicePooledEncoder):
            model.chunk = 100
            whole = model(batch.to("cuda"))
            model.chunk = 3
            torch.testing.assert_close(whole.pooled, there.pooled, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(whole.tokens, there.tokens, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(there.pooled.cpu(), here.pooled, atol=5e-3, rtol=2e-2)
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        out = model(batch.to("cuda"))
        (out.pooled.float().square().sum() + out.tokens.float().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_memory_of_600_slices_is_that_of_60_in_training():
    model = tower(MeanPooling(), chunk=8, tokens=False).cuda().train()

    def beyond(slices: int) -> int:
        batch = ImageBatch(torch.zeros(1, C, slices, 128, 128, device="cuda"))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(batch).pooled.sum().backward()
        return torch.cuda.max_memory_allocated() - before

    beyond(16)  # what is made once
    assert beyond(600) < 1.3 * beyond(60)
