"""Low-rank adapters in image towers: what they compute, what trains, and runs that load without peft."""

import builtins
import copy

import pytest
import torch

import medvl
from medvl.model import DualEncoder
from medvl.nn.lora import Lora, linear_layers, merged
from medvl.nn.projector import ProjectedEncoder
from medvl.nn.similarity import PooledSimilarity
from medvl.types import ImageBatch
from modalities.xray import HuggingFaceEncoder, OpenClipEncoder, TimmEncoder, XrayReader
from reports import MiniLmReportEncoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A DINOv2 of Hugging Face and a ViT of open_clip, of two small layers."""
    import json

    import open_clip
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    root = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, num_channels=3)
    ).save_pretrained(root / "dino")
    vision = {"image_size": 28, "patch_size": 14, "width": 16, "layers": 2, "head_width": 8}
    (root / "clip").mkdir()
    (root / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": vision}}))
    tower = open_clip.model._build_vision_tower(8, vision)
    save_file({f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}, root / "clip" / "open_clip_model.safetensors")
    return root


def make(kind, folders, lora, embed_dim=6):
    torch.manual_seed(1)
    if kind == "timm":
        return TimmEncoder("vit_tiny_patch16_224", embed_dim, image_size=32, lora=lora)
    if kind == "dino":
        return HuggingFaceEncoder(str(folders / "dino"), embed_dim, lora=lora)
    return OpenClipEncoder(str(folders / "clip"), embed_dim, lora=lora)


def films(tower, count=3):
    return ImageBatch(torch.randn(count, 1, tower.image_size, tower.image_size, generator=torch.Generator().manual_seed(2)))


def shaken(tower):
    """Adapters that are no longer 0, as after training."""
    generator = torch.Generator().manual_seed(3)
    for name, p in tower.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    return tower


KINDS = ["timm", "dino", "clip"]


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_it_is_the_tower_and_only_adapters_and_projection_train(kind, folders):
    plain, adapted = make(kind, folders, None), make(kind, folders, Lora(rank=2))
    adapted.project.load_state_dict(plain.project.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(films(plain)).tokens, plain.eval()(films(plain)).tokens, atol=1e-5, rtol=1e-5)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name or name.startswith("project") for name in trained)
    base = {name: p.detach().clone() for name, p in adapted.named_parameters() if name not in trained}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is 0 at first, so A gets its gradient in the second step
        optimizer.zero_grad()
        out = adapted.train()(films(plain))
        (out.pooled.square().sum() + out.tokens.square().sum()).backward()
        optimizer.step()
    moved = dict(adapted.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in moved.items() if name in trained)
    assert all(torch.equal(moved[name], value) for name, value in base.items())
    with torch.no_grad():
        assert not torch.allclose(adapted.eval()(films(plain)).pooled, plain(films(plain)).pooled, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_run_loads_without_peft_and_computes_the_same(kind, folders, tmp_path, monkeypatch):
    tower = shaken(make(kind, folders, Lora(rank=2, alpha=5)))
    DualEncoder(tower, MiniLmReportEncoder(6), PooledSimilarity(), XrayReader(size=tower.image_size)).save(tmp_path)
    with torch.no_grad():
        expected = tower.eval()(films(tower))
    original = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    loaded = medvl.load(tmp_path, device="cpu")
    assert not any(".lora_" in name for name, _ in loaded.image.named_parameters())
    with torch.no_grad():
        got = loaded.image(films(tower))
    torch.testing.assert_close(got.pooled, expected.pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.tokens, expected.tokens, atol=1e-5, rtol=1e-4)
    loaded.save(tmp_path / "again")
    again = medvl.load(tmp_path / "again", device="cpu")
    with torch.no_grad():
        assert torch.equal(again.image(films(tower)).pooled, got.pooled)
    with pytest.raises(ImportError, match=r"pip install 'medvl\[lora\]'"):
        make(kind, folders, Lora(rank=2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_back_into_the_tower_with_adapters(kind, folders):
    tower = shaken(make(kind, folders, Lora(rank=2)))
    other = make(kind, folders, Lora(rank=2))
    other.load_state_dict(tower.state_dict())
    twin = copy.deepcopy(tower)
    with torch.no_grad():
        for one in (other, twin):
            assert torch.equal(one.eval()(films(tower)).pooled, tower.eval()(films(tower)).pooled)


def test_merging_is_the_formula_in_float64():
    torch.manual_seed(0)
    weight, down, up, x = torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 2), torch.randn(3, 4)
    state = {
        "a.base_layer.weight": weight,
        "a.base_layer.bias": torch.zeros(5),
        "a.lora_A.default.weight": down,
        "a.lora_B.default.weight": up,
        "b.weight": x,
    }
    found = merged(state, 1.5)
    assert found.keys() == {"a.weight", "a.bias", "b.weight"} and found["b.weight"] is x
    adapted = x.double() @ weight.double().T + 1.5 * (x.double() @ down.double().T) @ up.double().T
    torch.testing.assert_close(x.double() @ found["a.weight"].double().T, adapted, atol=1e-5, rtol=1e-5)
    assert torch.equal(state["a.base_layer.weight"], weight)


def test_adapters_inside_of_another_tower_are_merged_too(folders, tmp_path):
    tower = shaken(make("timm", folders, Lora(rank=2), embed_dim=None))
    wrapped = ProjectedEncoder(tower, 6)
    DualEncoder(wrapped, MiniLmReportEncoder(6), PooledSimilarity(), XrayReader(size=32)).save(tmp_path)
    loaded = medvl.load(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded.image(films(tower)).pooled, wrapped.eval()(films(tower)).pooled, atol=1e-5, rtol=1e-4)


def test_options_are_those_of_report_towers_and_what_would_do_nothing_is_refused(folders):
    from reports import Lora as OfReports

    assert OfReports is Lora
    tower = TimmEncoder("vit_tiny_patch16_224", 4, image_size=32, lora=Lora(rank=2, targets=["qkv"]))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, _ in tower.named_parameters() if ".lora_" in name} == {"qkv"}
    with pytest.raises(ValueError, match="leave out freeze: true, or lora"):
        TimmEncoder("vit_tiny_patch16_224", 4, image_size=32, freeze=True, lora=Lora())
    with pytest.raises(ValueError, match=r"without calling them \(first: blocks.0.attn.qkv\)"):
        TimmEncoder("beit_base_patch16_224", 4, image_size=32, lora=Lora(rank=2))
    with pytest.raises(ValueError, match="targets q_proj name no layer"):
        TimmEncoder("vit_tiny_patch16_224", 4, image_size=32, lora=Lora(targets=["q_proj"]))


def test_statistics_of_a_convolutional_backbone_stay_and_its_dropout_is_on():
    tower = TimmEncoder("mobilenetv3_small_050", 4, image_size=32, drop_rate=0.5, lora=Lora(rank=2, targets=["conv_head"])).train()
    before = {name: b.clone() for name, b in tower.named_buffers()}
    tower(films(tower))
    assert all(torch.equal(b, before[name]) for name, b in tower.named_buffers())


def test_matrices_of_attention_modules_get_adapters_of_their_own():
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(4, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))
    assert linear_layers(model) == ["1.0"]
    adapted = Lora(rank=1).into(copy.deepcopy(model))
    assert sorted(name for name, p in adapted.named_parameters() if p.requires_grad) == [
        "0.out_proj.parametrizations.weight.0.lora_A",
        "0.out_proj.parametrizations.weight.0.lora_B",
        "0.parametrizations.in_proj_weight.0.lora_A",
        "0.parametrizations.in_proj_weight.0.lora_B",
        "1.0.lora_A.default.weight",
        "1.0.lora_B.default.weight",
    ]
    alone = Lora(rank=1, targets=["in_proj"]).into(copy.deepcopy(model))
    assert {name.split(".0.lora_")[0] for name, p in alone.named_parameters() if p.requires_grad} == {"0.parametrizations.in_proj_weight"}
    with pytest.raises(ValueError, match=r"dropout is 0\.1, and 0\.in_proj_weight is used as a matrix"):
        Lora(rank=1, dropout=0.1).into(model)


def test_adapters_of_attention_are_the_formula_and_leave_the_weights():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    plain = copy.deepcopy(attention)
    adapted = Lora(rank=2, alpha=3).into(torch.nn.ModuleDict({"attn": attention}))["attn"]
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape)
    deltas = {name: p.detach().double() for name, p in adapted.named_parameters() if ".lora_" in name}
    for weight, place in (
        (plain.in_proj_weight, "parametrizations.in_proj_weight.0"),
        (plain.out_proj.weight, "out_proj.parametrizations.weight.0"),
    ):
        weight.data = (weight.double() + 1.5 * deltas[f"{place}.lora_B"] @ deltas[f"{place}.lora_A"]).float()
    x = torch.randn(2, 5, 8)
    for training in (True, False):
        expected, got = plain.train(training)(x, x, x)[0], adapted.train(training)(x, x, x)[0]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(adapted(x, x, x, need_weights=False)[0], expected, atol=1e-4, rtol=1e-4)
