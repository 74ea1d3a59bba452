"""Other readings of the last attention against blocks run by hand, for towers of several libraries; what has none is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvl.nn.activations import caught, early_affinity, gradient_maps, on_grid
from medvl.nn.dense import with_reading


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, pretrained=False).eval()


def by_hand(vit: Any, pixels: Tensor, reading: str) -> Tensor:
    """Blocks of a timm ViT, the last with another attention."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
    early = []
    for i, block in enumerate(vit.blocks):
        attention, y = block.attn, block.norm1(x)
        b, n, _ = y.shape
        q, k, v = attention.qkv(y).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        weights = (q @ k.transpose(-2, -1) * scale).softmax(-1)
        if i == len(vit.blocks) - 1:
            if reading == "values":
                weights = torch.eye(n).expand_as(weights)
            elif reading == "value_similarity":
                weights = (v @ v.transpose(-2, -1) * scale).softmax(-1)
            else:
                weights = torch.stack(early).mean(0)
        early.append(weights.mean(1, keepdim=True))
        x = x + attention.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x)


@pytest.mark.parametrize("reading", ["values", "value_similarity", "early_attention"])
def test_a_reading_is_the_last_block_by_hand(vit: Any, reading: Any) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = vit.forward_features(pixels)
        found = with_reading(lambda: vit.forward_features(pixels), reading)
        torch.testing.assert_close(found, by_hand(vit, pixels, reading), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-3)
        torch.testing.assert_close(vit.forward_features(pixels), plain)  # for one pass alone


def test_pytorch_s_own_layers_and_those_of_transformers_are_read_too(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    clip = CLIPVisionModel(config).eval()
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    pixels, words = torch.randn(1, 3, 32, 32), torch.randn(1, 7, 16)
    for run in (lambda: clip(pixel_values=pixels).last_hidden_state, lambda: layer(words)):
        with torch.inference_mode():
            assert not torch.allclose(with_reading(run, "values"), run(), atol=1e-4)
    moved = words.clone()
    moved[0, 3] += 1.0  # a token that keeps its own value in every layer does not see what changes elsewhere
    with torch.inference_mode():
        first, second = (with_reading(lambda given=given: layer(given), "values", layers=2) for given in (words, moved))
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3], second[:, 3])


def test_a_tower_without_attention_is_refused(vit: Any) -> None:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(ValueError, match="0 self-attentions"):
        with_reading(lambda: conv(torch.zeros(1, 1, 8, 8)), "values")
    with pytest.raises(ValueError, match="3 self-attentions"):
        with_reading(lambda: vit.forward_features(torch.zeros(1, 3, 64, 64)), "early_attention", layers=3)
    with pytest.raises(ValueError, match="expected one of values"):
        with_reading(lambda: None, "keys")  # type: ignore[arg-type]


class Small(nn.Module):
    """Two convolutions and a head of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 3, 4, 4), nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh().mean((2, 3)))


def test_grad_cam_is_the_formula_on_the_last_convolution() -> None:
    torch.manual_seed(0)
    net, x = Small(), torch.randn(2, 1, 16, 16)
    found = gradient_maps(lambda: net(x.requires_grad_(True)), net, 2)
    activation = net.second(net.first(x).tanh()).detach().requires_grad_(True)
    scores = net.head(activation.tanh().mean((2, 3)))
    for j in range(2):
        (gradient,) = torch.autograd.grad(scores[:, j].sum(), activation, retain_graph=True)
        for b in range(2):
            expected = sum(gradient[b, c].mean() * activation[b, c] for c in range(5)).relu()  # type: ignore[union-attr]
            torch.testing.assert_close(found[b, j], expected.detach(), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="no layer of Linear"):
        gradient_maps(lambda: nn.Linear(2, 2)(torch.zeros(1, 2, requires_grad=True)), nn.Linear(2, 2), 1)


def test_early_affinity_is_the_softmax_of_cosines_of_the_first_layer() -> None:
    torch.manual_seed(0)
    net, x = Small(), torch.randn(2, 1, 16, 16)
    affinity = early_affinity(lambda: net(x), net, 2, (4, 4), temperature=0.1)
    cells = net.first(x).flatten(2).transpose(1, 2)
    expected = F.cosine_similarity(cells[:, :, None], cells[:, None], dim=-1).div(0.1).softmax(-1)
    torch.testing.assert_close(affinity, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="no layer of Small"):
        early_affinity(lambda: net(x), net, 2, (3, 3))


def test_activations_are_averaged_over_cells_and_lose_class_tokens() -> None:
    values = torch.arange(32.0).view(1, 2, 4, 4)
    torch.testing.assert_close(on_grid(values, (2, 2))[0, 0], torch.tensor([2.5, 18.5]))  # type: ignore[index]
    tokens = torch.arange(10.0).view(1, 5, 2)
    torch.testing.assert_close(on_grid(tokens, (2, 2)), tokens[:, 1:])
    assert on_grid(values, (3, 3)) is None and on_grid(tokens, (3, 3)) is None
    with caught(nn.Sequential(nn.Conv2d(1, 1, 1)), 2) as found:
        pass
    assert found == []
