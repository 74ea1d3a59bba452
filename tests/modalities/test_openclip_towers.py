"""OpenClipEncoder over tiny models in the form of open_clip's folders: its own encode_image, Pillow's bicubic, a run without its source."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import medvl
from medvl.model import ConfigError, DualEncoder
from medvl.nn.similarity import TokenSimilarity
from medvl.types import ImageBatch
from modalities.xray import OpenClipEncoder, XrayReader
from reports import MiniLmReportEncoder

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is in the extra 'open_clip'")

D, OWN = 6, 12
VIT = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
VISION = {  # vision_cfg of open_clip, quick_gelu, side of the grid
    "vit": (VIT, False, 4),
    "vit-mean": ({**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.1}, True, 4),
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, False, 2),
    "timm-class": ({"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}, False, 10),
    "timm-query": ({"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}, False, 10),
    "timm-conv": ({"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp", "image_size": 160}, False, 5),
}
KINDS = tuple(VISION)
WIDTHS = {"timm-query": 96}  # no projection: open_clip's embed_dim is the trunk's width


def size_of(kind: str) -> int:
    return VISION[kind][0]["image_size"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a kind, with the two files of a model of the hub; its text side is on the hub, as BiomedCLIP's is, and is not here."""
    root = tmp_path_factory.mktemp("openclip")
    for kind, (vision, quick_gelu, _) in VISION.items():
        folder = root / kind
        folder.mkdir()
        text = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
        config = {"embed_dim": WIDTHS.get(kind, OWN), "vision_cfg": vision, "quick_gelu": quick_gelu, "text_cfg": text}
        (folder / open_clip_config()).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        config["text_cfg"] = {"hf_model_name": "some-lab/never-downloaded", "hf_proj_type": "mlp"}
        (folder / open_clip_config()).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return {kind: root / kind for kind in VISION}


def open_clip_config() -> str:
    return "open_clip_config.json"


def theirs(folder: Path, tmp_path: Path, size: int | None = None) -> Any:
    """The whole model as open_clip itself loads it."""
    copy = tmp_path / f"theirs-{folder.name}"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config = json.loads((copy / open_clip_config()).read_text())
    config["model_cfg"]["text_cfg"] = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
    (copy / open_clip_config()).write_text(json.dumps(config))
    return open_clip.create_model(f"local-dir:{copy}", force_image_size=size).eval()


def tower(folder: Path, **options: Any) -> OpenClipEncoder:
    torch.manual_seed(1)
    return OpenClipEncoder(str(folder), **{"embed_dim": D, **options}).eval()


def pixels(size: int, batch: int = 2, channels: int = 1) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_pooled_is_open_clips_encode_image(folders, kind, tmp_path):
    size, side = size_of(kind), VISION[kind][2]
    x = pixels(size)
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[1, : size // 2] = False
    own = tower(folders[kind], embed_dim=None)
    with torch.no_grad():
        expected = theirs(folders[kind], tmp_path).encode_image(x.repeat(1, 3, 1, 1))
        out, colour = own(ImageBatch(x, valid)), tower(folders[kind], embed_dim=None, in_chans=3)(ImageBatch(x.repeat(1, 3, 1, 1)))
    assert torch.equal(out.pooled, expected) and torch.equal(colour.pooled, expected)
    assert own.embed_dim == WIDTHS.get(kind, OWN)
    assert out.grid == (side, side) and out.tokens.shape == (2, side * side, own.embed_dim)
    assert out.token_valid[0].all() and not out.token_valid[1].view(side, side)[: side // 2].any() and out.token_valid[1].any()
    assert torch.isfinite(out.tokens).all() and out.tokens.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_projection_takes_the_place_of_open_clips(folders, kind):
    """What its own projection made of the features is made of them again; a ModifiedResNet keeps its own before the new one."""
    own, new, x = tower(folders[kind], embed_dim=None), tower(folders[kind]), ImageBatch(pixels(size_of(kind)))
    with torch.no_grad():
        before, after = own(x), new(x)
        bare_pooled, bare_tokens, _ = new.features(x.pixels)
    assert after.pooled.shape == (2, D) and new.embed_dim == D
    torch.testing.assert_close(after.pooled, bare_pooled @ new.project.weight.T)
    visual = own.backbone
    project = {
        "vit": lambda f: f @ visual.proj,
        "vit-mean": lambda f: f @ visual.proj,
        "resnet": lambda f: f,
    }.get(kind, visual.head if kind.startswith("timm") else None)
    with torch.no_grad():
        torch.testing.assert_close(project(bare_pooled), before.pooled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(project(bare_tokens), before.tokens, atol=1e-5, rtol=1e-5)
    assert not any(p.shape == (16, OWN) for p in new.backbone.parameters())


@pytest.mark.parametrize("kind", ["vit", "vit-mean", "timm-class", "timm-query", "timm-conv"])
def test_equal_tokens_pool_to_themselves(folders, kind, monkeypatch):
    own, x = tower(folders[kind], embed_dim=None), ImageBatch(pixels(size_of(kind), batch=1))
    visual = own.backbone
    if kind.startswith("timm"):
        shape = visual.trunk.forward_features(torch.zeros(1, 3, size_of(kind), size_of(kind))).shape
        vector = torch.linspace(-1, 2, shape[1] if len(shape) == 4 else shape[2]).square()
        same = (vector[:, None, None] if len(shape) == 4 else vector).expand(shape)
        monkeypatch.setattr(visual.trunk, "forward_features", lambda _: same)
    else:
        vector = torch.linspace(-1, 2, 16).square().expand(1, 17, 16)
        monkeypatch.setattr(visual.transformer, "forward_intermediates", lambda *_, **__: (vector, [vector]))
    with torch.no_grad():
        out = own(x)
    assert out.pooled.std() > 0
    torch.testing.assert_close(out.tokens, out.pooled[:, None].expand_as(out.tokens), atol=1e-4, rtol=1e-4)


def test_a_token_of_the_attention_pooling_is_what_it_gives_of_that_token_alone(folders):
    """The formula of one query's attention in float64: with one key, whatever the query, the weight is 1."""
    own, x = tower(folders["resnet"], embed_dim=None), pixels(64, batch=1)
    visual = own.backbone
    with torch.no_grad():
        maps = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(x.repeat(1, 3, 1, 1)))))).double().numpy()
        out = own(ImageBatch(x))
    w = {name: value.double().numpy() for name, value in visual.attnpool.state_dict().items()}
    for row in range(2):
        for column in range(2):
            n = row * 2 + column
            value = (maps[0, :, row, column] + w["positional_embedding"][1 + n]) @ w["v_proj.weight"].T + w["v_proj.bias"]
            expected = value @ w["c_proj.weight"].T + w["c_proj.bias"]
            np.testing.assert_allclose(out.tokens[0, n].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "resnet"])
def test_a_token_answers_most_to_its_own_cell(folders, kind):
    own, side, size = tower(folders[kind]), VISION[kind][2], size_of(kind)
    for row, column in ((1, 2), (side - 1, 0)):
        x = pixels(size, batch=12).requires_grad_()
        weights = torch.randn(len(x), D, generator=torch.Generator().manual_seed(5))
        (gradient,) = torch.autograd.grad((own(ImageBatch(x)).tokens[:, row * side + column] * weights).sum(), x)
        energy = gradient.square().view(-1, side, size // side, side, size // side).sum((2, 4)).median(0).values
        assert energy.argmax().item() == row * side + column


def antialiased(grid: torch.Tensor, size: int) -> torch.Tensor:
    """(n * n, F) to (size * size, F) by Pillow's bicubic, one channel after the other."""
    n = round(len(grid) ** 0.5)
    channels = [Image.fromarray(np.ascontiguousarray(one.reshape(n, n))) for one in grid.numpy().T]
    resized = [np.asarray(one.resize((size, size), Image.Resampling.BICUBIC)).reshape(-1) for one in channels]
    return torch.from_numpy(np.stack(resized, axis=1))


POSITIONS = {"vit": "positional_embedding", "vit-mean": "positional_embedding", "resnet": "attnpool.positional_embedding"}


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("scale", [2, 0.5])
def test_positions_of_another_size_are_those_of_bicubic_interpolation(folders, kind, scale):
    name, size = POSITIONS[kind], int(size_of(kind) * scale)
    native, other = tower(folders[kind], embed_dim=None), tower(folders[kind], embed_dim=None, image_size=size)
    old, new = native.backbone.state_dict()[name], other.backbone.state_dict()[name]
    side = int(VISION[kind][2] * scale)
    torch.testing.assert_close(new, torch.cat([old[:1], antialiased(old[1:], side)]), atol=1e-5, rtol=1e-5)
    assert other(ImageBatch(pixels(size))).grid == (side, side)
    stored = load_file(folders[kind] / "open_clip_model.safetensors")
    assert torch.equal(old, stored[f"visual.{name}"])  # at its own size as published


@pytest.mark.parametrize(("kind", "size"), [("vit", 64), ("timm-class", 224), ("timm-query", 96), ("timm-conv", 96)])
def test_another_size_is_that_of_open_clips_force_image_size(folders, kind, size, tmp_path):
    with torch.no_grad():
        expected = theirs(folders[kind], tmp_path, size).encode_image(pixels(size).repeat(1, 3, 1, 1))
        got = tower(folders[kind], embed_dim=None, image_size=size)(ImageBatch(pixels(size)))
    assert torch.equal(got.pooled, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [True, False])
def test_gradients_reach_the_backbone_unless_it_is_frozen(folders, kind, own):
    for freeze in (False, True):
        model = tower(folders[kind], freeze=freeze, embed_dim=None if own else D).train()
        assert model.training and model.backbone.training != freeze
        with torch.autocast("cpu", torch.bfloat16):
            out = model(ImageBatch(pixels(size_of(kind))))
        assert torch.isfinite(out.tokens).all()
        if own and freeze:
            assert not out.pooled.requires_grad
            continue
        (out.pooled.float().square().sum() + out.tokens.float().sum()).backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert (set(trained) == {"project.weight"}) == freeze
        assert all(grad is not None and torch.isfinite(grad).all() for grad in trained.values())


@pytest.mark.parametrize(("kind", "embed_dim", "scale"), [(kind, *((None, 1), (D, 2))[i % 2]) for i, kind in enumerate(KINDS)])
def test_a_run_holds_all_of_its_tower(folders, kind, embed_dim, scale, tmp_path, monkeypatch):
    """The folder that the backbone came from is gone, the config names one on the hub, and no one is asked."""
    import huggingface_hub

    shutil.copytree(folders[kind], tmp_path / kind)
    size = size_of(kind) * scale
    image = tower(tmp_path / kind, embed_dim=embed_dim, image_size=size, freeze=True)
    report = MiniLmReportEncoder(image.embed_dim, hidden_dim=None)
    model = DualEncoder(image, report, TokenSimilarity(), XrayReader(size=size)).eval()
    run = model.save(tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / kind)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    config = json.loads((run / "config.json").read_text())
    config["model"]["image"]["init_args"]["name"] = "hf-hub:some-lab/some-model"
    (run / "config.json").write_text(json.dumps(config))
    again = medvl.load(run, device="cpu")
    picture = np.random.default_rng(0).random((40, 30), dtype=np.float32)
    assert torch.equal(again.encode_image(picture).tokens, model.encode_image(picture).tokens)
    assert torch.equal(again.encode_image(picture).pooled, model.encode_image(picture).pooled)
    assert again.image.files() == image.files() and set(image.files()) == {open_clip_config()}
    assert "text_cfg" not in image.files()[open_clip_config()].decode()


@pytest.mark.parametrize(
    ("vision", "why"),
    [
        ({"timm_model_name": "hf-hub:evil/model"}, "has no model named 'hf-hub:evil/model'"),
        ({"timm_model_name": "local-dir:/etc"}, "has no model named 'local-dir:/etc'"),
        ({**VIT, "width": 2**14}, "more memory than"),
        ({**VIT, "layers": 10**6}, "more memory than"),
        ({**VIT, "image_size": 2**20}, "more memory than"),
        ({**VIT, "patch_size": 0}, "OpenClipEncoder cannot be made"),
        ({**VIT, "depth": 3}, "cannot make its vision_cfg: .*depth"),
        ({**VIT, "attentional_pool": True}, "pools by queries"),
        ("wide", "has no vision_cfg"),
    ],
)
def test_a_configuration_from_elsewhere_is_refused(folders, vision, why, tmp_path):
    model = DualEncoder(tower(folders["vit"]), MiniLmReportEncoder(D, hidden_dim=None), TokenSimilarity(), XrayReader(size=32))
    run = model.save(tmp_path / "run")
    content = json.dumps({"model_cfg": {"embed_dim": OWN, "vision_cfg": vision}}).encode()
    (run / "image" / open_clip_config()).write_bytes(content)
    config = json.loads((run / "config.json").read_text())
    config["files"][f"image/{open_clip_config()}"] = hashlib.sha256(content).hexdigest()
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=why):
        medvl.load(run, device="cpu")


def test_weights_are_whole_safetensors_of_a_model_or_of_its_vision_side(folders, tmp_path):
    state = load_file(folders["vit"] / "open_clip_model.safetensors")
    vision = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    shutil.copytree(folders["vit"], tmp_path / "vit")
    (tmp_path / "vit" / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks weights \(open_clip_model\.safetensors or .*pickled weights"):
        tower(tmp_path / "vit")
    save_file(vision, tmp_path / "vision.safetensors")
    x = ImageBatch(pixels(32))
    with torch.no_grad():
        got = tower(tmp_path / "vit", embed_dim=None, checkpoint=tmp_path / "vision.safetensors")(x).pooled
        assert torch.equal(got, tower(folders["vit"], embed_dim=None)(x).pooled)
    save_file({key: value for key, value in vision.items() if key != "ln_post.weight"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not hold the weights of .*ln_post\.weight"):
        tower(tmp_path / "vit", checkpoint=tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        tower(tmp_path / "vit", checkpoint=tmp_path / "weights.pt")
    assert tower(tmp_path / "vit", initial_weights=False).embed_dim == D


def test_tokens_that_training_would_drop_stay(folders, tmp_path):
    folder = tmp_path / "dropping"
    shutil.copytree(folders["vit"], folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["patch_dropout"] = 0.5
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = tower(folder).train()
    assert model(ImageBatch(pixels(size_of("vit")))).tokens.shape[1] == math.prod(model.eval()(ImageBatch(pixels(size_of("vit")))).grid)


def test_names_of_open_clips_list(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", {"embed_dim": OWN, "vision_cfg": dict(VIT), "text_cfg": {}})
    assert OpenClipEncoder("ViT-tiny").embed_dim == OWN
    with pytest.raises(ValueError, match=r"has no model named 'ViT-B-17' and there is no such folder; near it: ViT-B"):
        OpenClipEncoder("ViT-B-17")
    for size, channels, why in ((36, 1, "no multiple of 8"), (32, 2, r"in_chans is 1 \(grey, repeated\) or 3, got 2")):
        with pytest.raises(ValueError, match=why):
            OpenClipEncoder("ViT-tiny", image_size=size, in_chans=channels)
    with pytest.raises(ValueError, match=r"this tower takes \(B, 1, 32, 32\)"):
        OpenClipEncoder("ViT-tiny")(ImageBatch(pixels(40)))


def test_a_model_of_the_hub_is_asked_for_two_files(folders, monkeypatch):
    import huggingface_hub

    asked: dict[str, Any] = {}

    def found(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folders["vit"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    OpenClipEncoder("hf-hub:some-lab/some-model")
    assert asked["name"] == "some-lab/some-model"
    assert asked["allow_patterns"][:2] == [open_clip_config(), "open_clip_model.safetensors"]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="image backbone 'some-lab/some-model' is no folder here and is not among"):
        OpenClipEncoder("hf-hub:some-lab/some-model", local_files_only=True)


def test_without_open_clip_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'medvl\[open_clip\]'"):
        OpenClipEncoder("ViT-B-16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_gives_what_the_cpu_gives_and_learns_in_bf16(folders, kind, same_on_device):
    model, batch = tower(folders[kind]), ImageBatch(pixels(size_of(kind)))
    same_on_device(model, batch)
