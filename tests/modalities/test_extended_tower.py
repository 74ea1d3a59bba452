"""ExtendedEncoder: the layers against transformers' DINOv2, padding without effect, what learns, and its life in a run and in a recipe."""

from __future__ import annotations

import itertools
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
import transformers as hf

import medvl
from medvl.model import DualEncoder, build
from medvl.nn.similarity import TokenSimilarity
from medvl.nn.transformer import TransformerBlock
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures
from modalities.ct import GatedAttention, SlicePooledEncoder
from modalities.pooling import MeanPooling
from modalities.xray import ConvEncoder, ExtendedEncoder, HuggingFaceEncoder, TimmEncoder, XrayReader
from modalities.xray.views import ViewPooledEncoder
from reports import MiniLmReportEncoder

W, D, SIZE = 16, 6, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 in the form of the hub."""
    torch.manual_seed(0)
    sizes = {"hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
    made = tmp_path_factory.mktemp("dinov2")
    hf.Dinov2Model(hf.Dinov2Config(**sizes, hidden_dropout_prob=0.5)).save_pretrained(made)
    return made


class Given(ImageEncoder):
    """A tower that answers with the features that it was given."""

    def __init__(self, embed_dim: int = W) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.features: ImageFeatures | None = None

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        assert self.features is not None
        return self.features


NOTHING = ImageBatch(torch.zeros(1, 1, 1, 1))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def extended(backbone: ImageEncoder, **options: object) -> ExtendedEncoder:
    torch.manual_seed(2)
    return ExtendedEncoder(backbone, **{"heads": 2, **options}).eval()


def test_a_layer_is_that_of_dinov2():
    config = hf.Dinov2Config(hidden_size=W, num_attention_heads=4, mlp_ratio=4, layer_norm_eps=1e-5, layerscale_value=0.3)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = hf.models.dinov2.modeling_dinov2.Dinov2Layer(config).double().eval()
    ours = TransformerBlock(W, 4, 4 * W, drop_rate=0.0, gain=0.3).double()
    state = theirs.state_dict()
    parts = [[state[f"attention.{name}_proj.{kind}"] for name in "qkv"] for kind in ("weight", "bias")]
    copied = {"attention.in_proj_weight": torch.cat(parts[0]), "attention.in_proj_bias": torch.cat(parts[1])}
    names = {"attention.o_proj": "attention.out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "norm1": "norm1", "norm2": "norm2"}
    for (here, there), kind in itertools.product(names.items(), ("weight", "bias")):
        copied[f"{there}.{kind}"] = state[f"{here}.{kind}"]
    copied |= {"gain1": state["layer_scale1.lambda1"], "gain2": state["layer_scale2.lambda1"]}
    ours.load_state_dict(copied, strict=True)
    x = random(2, 5, W).double().requires_grad_()
    y = x.detach().clone().requires_grad_()
    got, expected = ours(x), theirs(y)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    weights = random(2, 5, W, seed=1).double()
    for out in (got, expected):
        (out * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-12, rtol=1e-10)


def test_the_sequence_is_pooled_then_tokens():
    """Layer after layer by hand; the first of the sequence is the new pooled vector."""
    model = extended(Given(), layers=3, embed_dim=D)
    given = model.backbone.features = ImageFeatures(random(2, W), random(2, 6, W, seed=1), (2, 3))
    with torch.no_grad():
        out = model(NOTHING)
        x = torch.stack([torch.cat([p[None], t]) for p, t in zip(given.pooled, given.tokens, strict=True)])
        for layer in model.layers:
            x = layer(x)
        x = torch.nn.functional.layer_norm(x, (W,), model.norm.weight, model.norm.bias) @ model.project.weight.T
    assert model.embed_dim == D and out.grid == (2, 3) and out.token_valid is None
    torch.testing.assert_close(out.pooled, x[:, 0])
    torch.testing.assert_close(out.tokens, x[:, 1:])


@pytest.mark.parametrize("training", [False, True])
def test_neither_padding_nor_its_amount_moves_anything(training):
    model = extended(Given()).train(training)
    pooled, tokens = random(2, W).requires_grad_(), random(2, 6, W, seed=1).requires_grad_()
    alone = []
    for i in range(2):
        model.backbone.features = ImageFeatures(pooled[i : i + 1], tokens[i : i + 1, : (6, 4)[i]], (1, (6, 4)[i]))
        alone.append(model(NOTHING))
    for more, junk in ((0, 0.0), (5, 1e4), (11, float("nan"))):
        valid = torch.zeros(2, 6 + more, dtype=torch.bool)
        valid[0, :6] = valid[1, :4] = True
        padded = torch.where(valid[..., None], torch.nn.functional.pad(tokens, (0, 0, 0, more)), junk)
        model.backbone.features = ImageFeatures(pooled, padded, (1, 6 + more), valid)
        out = model(NOTHING)
        for i in range(2):
            torch.testing.assert_close(out.pooled[i], alone[i].pooled[0], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(out.tokens[i, : (6, 4)[i]], alone[i].tokens[0], atol=1e-6, rtol=1e-5)
        assert (out.tokens[~valid] == 0).all() and torch.equal(out.token_valid, valid)
        gradients = torch.autograd.grad(out.pooled.square().sum() + (out.tokens**3).sum(), (pooled, tokens))
        assert all(torch.isfinite(g).all() for g in gradients) and (gradients[1][1, 4:] == 0).all()
    model.backbone.features = ImageFeatures(pooled, tokens, (2, 3), torch.zeros(2, 6, dtype=torch.bool))
    assert torch.isfinite(model(NOTHING).pooled).all()  # a study of padding alone has its pooled vector still


BACKBONES = {
    "dinov2": lambda folder: HuggingFaceEncoder(str(folder), freeze=True),
    "dinov2, larger": lambda folder: HuggingFaceEncoder(str(folder), freeze=True, image_size=2 * SIZE),
    "dinov2, projected": lambda folder: HuggingFaceEncoder(str(folder), 8, freeze=True),
    "timm": lambda folder: TimmEncoder("test_vit", None, image_size=SIZE, freeze=True),
    "resnet": lambda folder: TimmEncoder("resnet18", None, image_size=SIZE, freeze=True, drop_rate=0.5),
    "conv": lambda folder: ConvEncoder(8, widths=(8, 8, 8), blocks=(1, 1, 1)),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_over_any_tower_and_only_what_is_not_frozen_learns(folder, name):
    model = extended(BACKBONES[name](folder)).train()
    size = 2 * SIZE if "larger" in name else SIZE
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[1, :, : size // 2] = False
    batch = ImageBatch(random(2, 1, size, size), valid)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
    assert out.grid == model.backbone(batch).grid and out.tokens.shape[1] == out.grid[0] * out.grid[1]
    assert out.tokens.shape[-1] == model.embed_dim == model.backbone.embed_dim and out.token_valid.shape == out.tokens.shape[:2]
    (out.pooled.float().square().sum() + out.tokens.float().sum()).backward()
    learns = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    below = {n for n in learns if n.startswith("backbone.")}
    assert {n for n in learns if not n.startswith("backbone.")} >= {"layers.0.gain1", "layers.1.mlp.0.weight", "norm.weight"}
    assert model.training and model.layers[0].training
    if name == "conv":
        assert below and model.backbone.training
        return
    assert below == ({"backbone.project.weight"} if name == "dinov2, projected" else set())
    assert not any(module.training for module in model.backbone.backbone.modules())
    before = {n: v.clone() for n, v in model.backbone.backbone.state_dict().items()}
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model(batch)
    assert all(torch.equal(v, before[n]) for n, v in model.backbone.backbone.state_dict().items())  # batch statistics too


def recipe(folder: Path) -> dict[str, object]:
    backbone = {"class_path": "modalities.xray.huggingface.HuggingFaceEncoder", "init_args": {"name": str(folder), "freeze": True}}
    return {"class_path": "modalities.xray.extended.ExtendedEncoder", "init_args": {"backbone": backbone, "heads": 2, "embed_dim": D}}


@pytest.mark.parametrize("ct", [False, True])
def test_in_a_recipe_and_in_a_run(folder, ct, tmp_path, monkeypatch):
    """Built as LightningCLI does, for radiographs or over the slices of a CT; loaded with nothing but the run's folder."""
    pooling = {"class_path": "modalities.ct.pooling.GatedAttention", "init_args": {"embed_dim": D}}
    spec = recipe(folder)
    if ct:
        spec["init_args"]["backbone"]["init_args"]["in_chans"] = 3
        spec = {"class_path": "modalities.ct.slices.SlicePooledEncoder", "init_args": {"backbone": spec, "pooling": pooling}}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--image", type=ImageEncoder)
    torch.manual_seed(0)
    image = parser.instantiate_classes(parser.parse_object({"image": spec})).image.eval()
    model = DualEncoder(image, MiniLmReportEncoder(D, hidden_dim=None), TokenSimilarity(), XrayReader(size=SIZE)).eval()
    run = model.save(tmp_path / "run").rename(tmp_path / "moved")
    inside = "backbone/backbone" if ct else "backbone"
    assert (run / "image" / inside / "config.json").is_file()
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were fetched"))
    again = medvl.load(run, device="cpu")
    assert again.spec() == model.spec()
    batch = (
        ImageBatch(random(2, 3, 5, SIZE, SIZE), torch.arange(5) < torch.tensor([[5], [3]])) if ct else ImageBatch(random(2, 1, SIZE, SIZE))
    )
    with torch.no_grad():
        got, expected = again.image(batch), model.image(batch)
    assert got.grid == ((5, 4, 4) if ct else (4, 4)) and got.pooled.shape == (2, D)
    assert torch.equal(got.pooled, expected.pooled) and torch.equal(got.tokens, expected.tokens)
    if not ct:
        picture = np.random.default_rng(0).random((40, 30), dtype=np.float32)
        assert torch.isfinite(again.encode_image(picture).tokens).all()


def test_over_slices_it_learns(folder):
    tower = SlicePooledEncoder(extended(HuggingFaceEncoder(str(folder), freeze=True, in_chans=3)), GatedAttention(W), chunk=2).train()
    out = tower(ImageBatch(random(1, 3, 5, SIZE, SIZE)))
    (out.pooled.square().sum() + out.tokens.sum()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in tower.parameters())


def test_forms_are_checked():
    for options in ({"layers": 0}, {"heads": 3}, {"heads": 0}):
        with pytest.raises(ValueError, match="over 16 dimensions: expected positive numbers, the width a multiple of heads"):
            extended(Given(), **options)
    model = extended(Given())
    model.backbone.features = ImageFeatures(random(2, W))
    with pytest.raises(ValueError, match="Given keeps no tokens"):
        model(NOTHING)
    model.backbone.features = ImageFeatures(random(2, W), tokens=random(2, 4, W), grid=(2, 2), slices=random(2, 3, W))
    with pytest.raises(ValueError, match="pools slices; put ExtendedEncoder below it"):
        model(NOTHING)
    with pytest.raises(ValueError, match="pools views; put ExtendedEncoder below it"):
        extended(ViewPooledEncoder(Given(), MeanPooling()))
    with pytest.raises(medvl.model.ConfigError, match="cannot be made"):
        build({"class_path": "modalities.xray.ExtendedEncoder", "init_args": {"backbone": 3}}, ImageEncoder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", BACKBONES)
def test_the_gpu_gives_what_the_cpu_gives_and_learns_in_bf16(folder, name, same_on_device):
    model, size = extended(BACKBONES[name](folder)), 2 * SIZE if "larger" in name else SIZE
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[1, :, : size // 2] = False
    batch = ImageBatch(random(2, 1, size, size), valid)
    same_on_device(model, batch)
