"""HuggingFaceEncoder over tiny models saved in the hub's very format: transformers' outputs, float64 bicubic, a run alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import medvl
from medvl.model import ConfigError, DualEncoder
from medvl.nn.similarity import TokenSimilarity
from medvl.types import ImageBatch
from modalities.xray import HuggingFaceEncoder, XrayReader
from reports import MiniLmReportEncoder

D = 6
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PATCHES = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8}
STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 4}
CONV = {"hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32}


def made(kind: str) -> hf.PreTrainedModel:
    """A model with random weights, none of them at a value that would hide it."""
    torch.manual_seed(0)
    models = {
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**PATCHES)),
        "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**PATCHES)),
        "beit": lambda: hf.BeitModel(hf.BeitConfig(**PATCHES, use_relative_position_bias=True, use_mean_pooling=True)),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**PATCHES)),
        "registers": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**PATCHES, num_register_tokens=3)),
        "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**PATCHES, num_register_tokens=2)),
        "clip-vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**PATCHES)),
        "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=PATCHES, projection_dim=8)),
        "siglip-vision": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**PATCHES)),
        "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=PATCHES)),
        "swin": lambda: hf.SwinModel(hf.SwinConfig(**STAGES, use_absolute_embeddings=True)),
        "swinv2": lambda: hf.Swinv2Model(hf.Swinv2Config(**STAGES)),
        "convnext": lambda: hf.ConvNextModel(hf.ConvNextConfig(**CONV, num_stages=2)),
        "convnextv2": lambda: hf.ConvNextV2Model(hf.ConvNextV2Config(**CONV, num_stages=2)),
        "resnet": lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")),
    }
    model = models[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


SIDE = 4  # of every grid at 32 pixels
KINDS = (
    *("vit", "deit", "beit", "dinov2", "registers", "dinov3", "clip-vision", "clip", "siglip-vision", "siglip"),
    *("swin", "swinv2", "convnext", "convnextv2", "resnet"),
)
EXTRA = {"resnet": {"image_size": 32}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a kind: config.json and model.safetensors, as save_pretrained writes them."""
    root = tmp_path_factory.mktemp("hub")
    for kind in KINDS:
        made(kind).save_pretrained(root / kind)
        assert (root / kind / "model.safetensors").is_file()
    return {kind: root / kind for kind in KINDS}


def tower(folder: Path, **options: object) -> HuggingFaceEncoder:
    torch.manual_seed(1)
    return HuggingFaceEncoder(str(folder), **{"embed_dim": D, **EXTRA.get(folder.name, {}), **options}).eval()


def pixels(size: int = 32, batch: int = 2, channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(3))


def reference(kind: str, x: torch.Tensor, **options: object) -> torch.Tensor:
    """Transformers' own pooled vector."""
    model = made(kind)
    return getattr(model, "vision_model", model)(pixel_values=x, **options).pooler_output.flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_forms_and_transformers_own_pooled_vector(folders, kind):
    model, x = tower(folders[kind]), pixels()
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[1, :16] = False
    with torch.no_grad():
        out, bare = model(ImageBatch(x, valid)), tower(folders[kind], embed_dim=None)(ImageBatch(x))
        expected = reference(kind, x.repeat(1, 3, 1, 1))
    assert out.pooled.shape == (2, D) and out.grid == (SIDE, SIDE) and out.tokens.shape == (2, SIDE * SIDE, D)
    assert out.token_valid[0].all() and out.token_valid[1].view(SIDE, SIDE)[: SIDE // 2].sum() == 0 and bare.token_valid is None
    assert torch.equal(bare.pooled, expected)
    torch.testing.assert_close(out.pooled, expected @ model.project.weight.T)
    torch.testing.assert_close(out.tokens, bare.tokens @ model.project.weight.T, atol=1e-5, rtol=1e-4)
    assert bare.tokens.shape[-1] == bare.pooled.shape[-1] == tower(folders[kind], embed_dim=None).embed_dim
    assert torch.isfinite(out.tokens).all() and out.tokens.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokens_pool_to_themselves(folders, kind, monkeypatch):
    """Where everything that the pooled vector is made of is one vector, pooled and tokens are the same: they share a space."""
    model, x = tower(folders[kind], embed_dim=None), pixels(batch=1)
    network = model.backbone
    norms = {"clip": "encoder", "siglip": "post_layernorm", "conv": "encoder", "resn": "encoder"}
    last = next((name for start, name in norms.items() if kind.startswith(start)), "layernorm" if hasattr(network, "layernorm") else "norm")
    forward = getattr(network, last).forward

    def constant(*args, **kwargs):
        found = forward(*args, **kwargs)
        hidden = found if isinstance(found, torch.Tensor) else found.last_hidden_state
        axis = 1 if hidden.ndim == 4 else -1
        vector = torch.linspace(-1, 2, hidden.shape[axis]).square()
        same = (vector[:, None, None] if hidden.ndim == 4 else vector).expand(hidden.shape).contiguous()
        return same if isinstance(found, torch.Tensor) else hf.modeling_outputs.BaseModelOutput(last_hidden_state=same)

    monkeypatch.setattr(getattr(network, last), "forward", constant)
    with torch.no_grad():
        out = model(ImageBatch(x))
    assert out.pooled.std() > 0
    torch.testing.assert_close(out.tokens, out.pooled[:, None].expand_as(out.tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [(p, k) for p in ("head", "mean") for k in KINDS if k != "resnet" and (p, k) != ("mean", "beit")],
)  # a ResNet's convolutions look up and left; a BEiT has its norm in its head
def test_a_token_answers_most_to_its_own_cell(folders, pooling, kind):
    """Row-major and not transposed: the gradient of a token is strongest, by area, inside the cell where it is said to be."""
    model, side, cell = tower(folders[kind], pooling=pooling), SIDE, 32 // SIDE
    for row, column in ((1, 2), (side - 1, 0)):
        x = pixels(batch=12).requires_grad_()
        out = model(ImageBatch(x))
        weights = torch.randn(len(x), D, generator=torch.Generator().manual_seed(5))
        (gradient,) = torch.autograd.grad((out.tokens[:, row * side + column] * weights).sum(), x)
        energy = gradient.square().view(-1, side, cell, side, cell).sum((2, 4)).median(0).values
        assert energy.argmax().item() == row * side + column


@pytest.mark.parametrize("kind", ["vit", "deit", "beit", "dinov2", "registers", "dinov3", "clip"])
def test_class_token_and_mean_after_the_last_norm(folders, kind):
    x = pixels().repeat(1, 3, 1, 1)
    if kind == "beit":  # as transformers makes it, its one norm is in the head
        for pooling in ("cls", "mean"):
            with pytest.raises(ValueError, match="the only norm of this beit is in its head"):
                tower(folders[kind], embed_dim=None, pooling=pooling, in_chans=3)
        return
    network = made(kind)
    network = getattr(network, "vision_model", network)
    prefix = {"deit": 2, "registers": 4, "dinov3": 3}.get(kind, 1)
    with torch.no_grad():
        hidden = network(pixel_values=x).last_hidden_state
        hidden = network.post_layernorm(hidden) if kind == "clip" else hidden
        cls, mean = (tower(folders[kind], embed_dim=None, pooling=p, in_chans=3)(ImageBatch(x)) for p in ("cls", "mean"))
    torch.testing.assert_close(cls.pooled, hidden[:, 0])
    torch.testing.assert_close(mean.pooled, hidden[:, prefix:].mean(1))
    torch.testing.assert_close(mean.tokens, hidden[:, prefix:])
    with pytest.raises(ValueError, match="pooling is 'head', 'cls' or 'mean'"):
        tower(folders[kind], pooling="max")


def test_a_pooling_that_a_backbone_has_not_is_refused(folders):
    for kind in ("siglip", "swin", "convnext", "resnet"):
        with pytest.raises(ValueError, match="has no class token; take pooling 'head' or 'mean'"):
            tower(folders[kind], pooling="cls")


def keys_kernel(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Cubic convolution (Keys 1981, with PyTorch's a)."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic(grid: np.ndarray, size: int) -> np.ndarray:
    """(n, n, F) to (size, size, F): pixel centres at halves, borders repeated, no antialiasing; one axis after the other, in float64."""
    n = len(grid)
    matrix = np.zeros((size, n))
    for i in range(size):
        at = (i + 0.5) * n / size - 0.5
        for k in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            matrix[i, min(max(k, 0), n - 1)] += keys_kernel(np.array(at - k))
    return np.einsum("ai,bj,ijf->abf", matrix, matrix, grid.astype(np.float64))


def antialiased(grid: np.ndarray, size: int) -> np.ndarray:
    """Pillow's bicubic, one channel after the other."""
    channels = [
        Image.fromarray(np.ascontiguousarray(one)).resize((size, size), Image.Resampling.BICUBIC) for one in grid.transpose(2, 0, 1)
    ]
    return np.stack([np.asarray(one) for one in channels], axis=-1)


POSITIONS = {  # where the published embeddings are, tokens before the patches
    "vit": ("embeddings.position_embeddings", 1),
    "deit": ("embeddings.position_embeddings", 2),
    "dinov2": ("embeddings.position_embeddings", 1),
    "registers": ("embeddings.position_embeddings", 1),
    "clip": ("embeddings.position_embedding.weight", 1),
    "siglip": ("embeddings.position_embedding.weight", 0),
}


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("size", [56, 24])
def test_positions_of_another_size_are_those_of_bicubic_interpolation(folders, kind, size):
    """A backbone of the other size, whose embeddings were interpolated in float64, gives the same."""
    name, prefix = POSITIONS[kind]
    model, x = tower(folders[kind], embed_dim=None, image_size=size), pixels(size)
    old = model.backbone.state_dict()[name].numpy().reshape(-1, SMALL["hidden_size"])
    resize = antialiased if kind == "registers" else bicubic
    new = np.concatenate([old[:prefix], resize(old[prefix:].reshape(4, 4, -1), size // 8).reshape((size // 8) ** 2, -1)])
    config = type(model.backbone.config).from_dict({**model.backbone.config.to_dict(), "image_size": size})
    other = type(model.backbone)(config).eval()
    shape = (len(new), -1) if name.endswith("weight") else (1, len(new), -1)
    other.load_state_dict({**model.backbone.state_dict(), name: torch.from_numpy(new).float().view(shape)})
    with torch.no_grad():
        out, expected = model(ImageBatch(x)), other(pixel_values=x.repeat(1, 3, 1, 1))
    assert out.grid == (size // 8, size // 8)
    torch.testing.assert_close(out.pooled, expected.pooler_output, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(torch.from_numpy(new[prefix:][:9]).float(), torch.from_numpy(old[prefix:][:9]), atol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in POSITIONS])
def test_other_backbones_take_larger_images(folders, kind):
    with torch.no_grad():
        out = tower(folders[kind], image_size=64)(ImageBatch(pixels(64)))
    assert out.grid == (2 * SIDE, 2 * SIDE) and torch.isfinite(out.tokens).all()


def test_at_its_own_size_nothing_is_interpolated(folders, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "interpolate", lambda *_, **__: pytest.fail("interpolated"))
    for kind in POSITIONS:
        model = tower(folders[kind], embed_dim=None)
        with torch.no_grad():
            assert torch.equal(model(ImageBatch(pixels())).pooled, reference(kind, pixels().repeat(1, 3, 1, 1)))


@given(size=st.integers(1, 80), channels=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_sizes_and_channels_are_taken_or_refused_before_weights_are_read(folders, size, channels):
    make = lambda: HuggingFaceEncoder(str(folders["dinov2"]), image_size=size, in_chans=channels)  # noqa: E731
    if size % 8 or channels not in (1, 3):
        with pytest.raises(ValueError, match=r"no multiple of 8|in_chans is 1 \(grey, repeated\) or 3"):
            make()
    else:
        assert make()(ImageBatch(torch.zeros(1, channels, size, size))).grid == (size // 8, size // 8)


def test_wrong_pixels_are_refused(folders):
    with pytest.raises(ValueError, match=r"\(2, 1, 40, 40\), this tower takes \(B, 1, 32, 32\)"):
        tower(folders["vit"])(ImageBatch(pixels(40)))
    with pytest.raises(ValueError, match="states no image size; give image_size"):
        HuggingFaceEncoder(str(folders["resnet"]), 8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_backbone_unless_it_is_frozen(folders, kind):
    for freeze in (False, True):
        model = tower(folders[kind], freeze=freeze).train()
        before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
        assert model.training and model.backbone.training != freeze
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ImageBatch(pixels()))
        (out.pooled.float().square().sum() + out.tokens.float().sum()).backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert (set(trained) == {"project.weight"}) == freeze
        assert all(grad is not None and torch.isfinite(grad).all() for grad in trained.values())
        if freeze:
            assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())


def _outputs(model, picture):
    features = model.encode_image(picture)
    return features.pooled, features.tokens


@pytest.mark.parametrize(("kind", "pooling", "size"), [(kind, *(("head", 32), ("mean", 64))[i % 2]) for i, kind in enumerate(KINDS)])
def test_a_run_holds_all_of_its_tower(folders, kind, pooling, size, tmp_path, monkeypatch):
    """The folder that the backbone came from is gone, the config names one on the hub, and no one is asked."""
    import huggingface_hub

    shutil.copytree(folders[kind], tmp_path / kind)
    image = tower(tmp_path / kind, pooling=pooling, image_size=size, freeze=True)
    model = DualEncoder(image, MiniLmReportEncoder(D, hidden_dim=None), TokenSimilarity(), XrayReader(size=size)).eval()
    run = model.save(tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / kind)
    assert [file.name for file in (run / "image").iterdir()] == ["config.json"]
    assert str(tmp_path) not in (run / "image" / "config.json").read_text()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(hf.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were fetched"))
    config = json.loads((run / "config.json").read_text())
    config["model"]["image"]["init_args"]["name"] = "some-lab/some-model"
    (run / "config.json").write_text(json.dumps(config))
    again = medvl.load(run, device="cpu")
    picture = np.random.default_rng(0).random((40, 30), dtype=np.float32)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    for made, expected in zip(_outputs(again, picture), _outputs(model, picture), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)  # the last bit hangs on where in memory equal weights lie
    assert again.image.freeze and not any(p.requires_grad for p in again.image.backbone.parameters())
    assert again.image.files() == image.files()
    assert (
        again.save(tmp_path / "twice").is_dir()
        and (tmp_path / "twice" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"auto_map": {"AutoModel": "evil--code.Model"}}, "names code, weights or files elsewhere"),
        ({"attn_implementation": "some-lab/kernel"}, "names code, weights or files elsewhere"),
        ({"use_timm_backbone": True}, "names code, weights or files elsewhere"),
        ({"model_type": "timm_wrapper"}, "image: modalities.xray.huggingface.HuggingFaceEncoder cannot be made"),
        ({"model_type": "bert"}, "'bert' is none of beit, clip_vision_model"),
        ({"hidden_size": 2**18}, "more memory than"),
        ({"num_hidden_layers": 10**6}, "more memory than"),
        ({"image_size": 2**20}, "more memory than"),
        ({"patch_size": 0}, "HuggingFaceEncoder cannot be made"),
        ({"patch_size": 16}, "do not fit the config|no multiple"),
    ],
)
def test_a_configuration_from_elsewhere_is_refused(folders, extra, why, tmp_path):
    import hashlib

    model = DualEncoder(tower(folders["vit"]), MiniLmReportEncoder(D, hidden_dim=None), TokenSimilarity(), XrayReader(size=32))
    run = model.save(tmp_path / "run")
    file = run / "image" / "config.json"
    with pytest.raises(ConfigError, match=r"image/config\.json is not the file"):
        file.write_text(json.dumps({**json.loads(file.read_text()), **extra}))
        medvl.load(run, device="cpu")
    config = json.loads((run / "config.json").read_text())
    config["files"]["image/config.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=why):
        medvl.load(run, device="cpu")


def test_weights_are_whole_safetensors(folders, tmp_path):
    shutil.copytree(folders["vit"], tmp_path / "vit")
    weights = tmp_path / "vit" / "model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if not key.startswith("pooler")}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="published without a trained head: take pooling 'cls' or 'mean'"):
        tower(tmp_path / "vit")
    assert not [name for name, _ in tower(tmp_path / "vit", pooling="cls").named_parameters() if "pooler" in name]
    gone = next(key for key in state if key.endswith("layernorm_before.weight"))
    save_file({key: value for key, value in state.items() if key != gone}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"safetensors lack 1 of the weights, such as .*layernorm_before\.weight"):
        tower(tmp_path / "vit")
    fresh = tower(tmp_path / "vit", initial_weights=False)
    assert fresh.backbone.config.hidden_size == 16
    torch.save(state, tmp_path / "vit" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks weights \(model\*\.safetensors\).*pickled weights \(\.bin\) are not read"):
        tower(tmp_path / "vit")


def test_a_classifier_s_checkpoint_serves_without_its_classifier(tmp_path):
    """As most ViTs and ResNets of the hub are published: under a prefix, with a classifier, and the ViT without a pooler."""
    torch.manual_seed(0)
    source = hf.ViTForImageClassification(hf.ViTConfig(**PATCHES)).eval()
    source.save_pretrained(tmp_path / "classifier")
    with torch.no_grad():
        got = tower(tmp_path / "classifier", embed_dim=None, pooling="cls")(ImageBatch(pixels())).pooled
        torch.testing.assert_close(got, source.vit(pixels().repeat(1, 3, 1, 1)).last_hidden_state[:, 0])


def test_other_kinds_and_missing_models_are_said_so(folders, tmp_path, monkeypatch):
    import huggingface_hub

    hf.BertModel(hf.BertConfig(**SMALL, vocab_size=9)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"model_type 'bert' is none of beit, .*TimmEncoder"):
        tower(tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match="image backbone 'some-lab/never-downloaded' is no folder here and is not among"):
        HuggingFaceEncoder("some-lab/never-downloaded", 8, local_files_only=True)
    asked = {}

    def found(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folders["dinov2"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    HuggingFaceEncoder("some-lab/some-model", 8, revision="v2")
    assert asked["name"] == "some-lab/some-model" and asked["revision"] == "v2" and asked["local_files_only"] is False
    assert asked["allow_patterns"] == ["config.json", "model*.safetensors", "model*.safetensors.index.json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 64])
def test_the_gpu_gives_what_the_cpu_gives_and_learns_in_bf16(folders, kind, size, same_on_device):
    model, batch = tower(folders[kind], image_size=size), ImageBatch(pixels(size), torch.ones(2, size, size, dtype=torch.bool))
    same_on_device(model, batch)
