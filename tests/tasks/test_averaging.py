"""Averages of two models: the mean in float64, of one architecture alone, with the provenance of both."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import medvl
from medvl.model import DualEncoder
from medvl.nn.lora import Lora
from medvl.nn.similarity import PooledSimilarity, TokenSimilarity
from modalities.xray import ConvEncoder, TimmEncoder, XrayReader
from reports import MiniLmReportEncoder
from tasks.averaging import average_models, interpolated, save_average
from tasks.cli import cli


def saved(folder, seed, size=32, image=None, similarity=None, hidden_dim=None, **options):
    torch.manual_seed(seed)
    tower = ConvEncoder(embed_dim=8, widths=(4, 4), blocks=(1, 1), **options) if image is None else image
    report = MiniLmReportEncoder(8, hidden_dim=hidden_dim)
    return DualEncoder(tower, report, similarity or TokenSimilarity(), XrayReader(size=size)).save(
        folder, step=seed, recipe_sha256=f"r{seed}"
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_weights_are_the_mean_in_float64_and_both_models_are_told(tmp_path, alpha):
    start, end = saved(tmp_path / "start", 0), saved(tmp_path / "end", 1, drop_rate=0.5)
    told = CliRunner().invoke(cli, ["average", str(start), str(end), "--alpha", str(alpha), "--out", str(tmp_path / "out")])
    assert told.exit_code == 0, told.output
    first, last, mean = (load_file(folder / "model.safetensors") for folder in (start, end, tmp_path / "out"))
    assert mean.keys() == last.keys()
    for name, value in mean.items():
        if value.is_floating_point():
            expected = (1 - alpha) * first[name].numpy().astype(np.float64) + alpha * last[name].numpy().astype(np.float64)
            np.testing.assert_array_equal(value.numpy(), expected.astype(np.float32), err_msg=name)
        else:
            assert torch.equal(value, last[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["provenance"]
    assert config["averaged"]["alpha"] == alpha
    for name, folder in (("start", start), ("finetuned", end)):
        whole = json.loads((folder / "config.json").read_text())
        assert config["averaged"][name] == {key: whole[key] for key in ("weights_sha256", "medvl", "provenance")}
    assert medvl.load(tmp_path / "out", device="cpu").image.embed_dim == 8


@given(st.floats(0, 1), st.integers(0, 1000))
def test_two_equal_models_are_their_mean(alpha, seed):
    state = {"a": torch.randn(3, generator=torch.Generator().manual_seed(seed)), "n": torch.tensor(3)}
    found = interpolated(state, state, alpha)
    torch.testing.assert_close(found["a"], state["a"], rtol=1e-7, atol=0)
    assert torch.equal(found["n"], state["n"])


def test_models_that_differ_in_more_than_weights_are_refused(tmp_path):
    start = saved(tmp_path / "start", 0)
    others = {
        "reader for one: init_args.size is 32 and 64": saved(tmp_path / "a", 1, size=64),
        "similarity for one: class_path": saved(tmp_path / "b", 1, similarity=PooledSimilarity()),
        "report for one: init_args.hidden_dim is None and 9": saved(tmp_path / "c", 1, hidden_dim=9),
        r"image for one: init_args.bands is \[5, 17\] and \[3, 17\]": saved(tmp_path / "d", 1, bands=(3, 17)),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            average_models(start, other, 0.5)
    with pytest.raises(ValueError, match="is one of the two models"):
        save_average(start, saved(tmp_path / "e", 1), 0.5, start)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        average_models(start, start, 1.5)
    state = {"a": torch.zeros(2)}
    for other, message in (({"b": torch.zeros(2)}, "first: a"), ({"a": torch.zeros(3)}, "has shape"), ({}, "1 are in one alone")):
        with pytest.raises(ValueError, match=message):
            interpolated(state, other, 0.5)
    with pytest.raises(ValueError, match="has no mean"):
        interpolated({"hash": torch.tensor([1, 2])}, {"hash": torch.tensor([1, 3])}, 0.5)


def test_a_model_tuned_by_adapters_is_averaged_with_its_start(tmp_path):
    def tower(lora):
        torch.manual_seed(4)
        return TimmEncoder("vit_tiny_patch16_224", 8, image_size=32, lora=lora)

    start = saved(tmp_path / "start", 0, image=tower(None))
    tuned = tower(Lora(rank=2, alpha=2))
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.1)
    end = saved(tmp_path / "end", 1, image=tuned)
    mean = average_models(start, end, 0.25)
    name = "blocks.3.attn.qkv"
    layer = tuned.backbone.get_submodule(name)
    delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = layer.base_layer.weight.double() + 0.25 * delta
    torch.testing.assert_close(mean.image.backbone.get_submodule(name).weight.double(), expected, atol=1e-6, rtol=1e-5)
