"""The small tower: shapes, where a token looks, what padding may not do."""

import numpy as np
import pytest
import torch

from medvl.types import ImageBatch
from modalities.xray import ConvEncoder


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return ConvEncoder(embed_dim=16, widths=(16, 16, 16), blocks=(1, 1, 1)).eval()


def test_shapes_and_grid(tower):
    features = tower(ImageBatch(torch.randn(2, 1, 64, 48)))
    assert features.pooled.shape == (2, 16)
    assert features.grid == (16, 12)
    assert features.tokens.shape == (2, 16 * 12, 16)
    assert features.token_valid is None


def test_sides_that_do_not_fit_are_refused(tower):
    with pytest.raises(ValueError, match=r"multiples of 16, got \(60, 64\)"):
        tower(ImageBatch(torch.zeros(1, 1, 60, 64)))
    with pytest.raises(ValueError, match="bands must be odd"):
        ConvEncoder(bands=(4,))
    with pytest.raises(ValueError, match="differ in length"):
        ConvEncoder(widths=(8, 8), blocks=(1, 1, 1))


def test_a_token_looks_at_its_own_cell():
    """The centroid of what moves a token, over many random towers' gradients, is the middle of its cell, not beside it."""
    offsets = []
    for seed in range(6):
        torch.manual_seed(seed)
        tower = ConvEncoder(embed_dim=16, widths=(16, 16, 16), blocks=(1, 1, 1)).eval()
        pixels = torch.randn(4, 1, 128, 128, requires_grad=True)
        row = column = 15  # of a 32 x 32 grid: its cell is pixels 60 to 63
        features = tower(ImageBatch(pixels))
        features.tokens.unflatten(1, features.grid)[:, row, column].square().sum().backward()
        energy = pixels.grad.square().sum((0, 1)).double().numpy()
        at = np.arange(128)
        offsets.append([(energy.sum(1) * at).sum() / energy.sum() - 61.5, (energy.sum(0) * at).sum() / energy.sum() - 61.5])
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.75


def test_detail_channels_are_the_image_less_its_surroundings(tower):
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(40, 36)).astype(np.float32)
    valid = np.zeros((40, 36), dtype=bool)
    valid[4:36] = True
    tower.scale.running_var.fill_(1.0)
    got = tower._with_detail(ImageBatch(torch.from_numpy(picture)[None, None] * 0.3, torch.from_numpy(valid)[None]))[0].numpy()
    assert got.shape == (3, 40, 36)
    for channel, band in zip(got[1:], tower.bands, strict=True):
        for r, c in ((4, 0), (10, 10), (35, 35), (20, 17)):
            half = band // 2
            window = np.s_[max(0, r - half) : r + half + 1, max(0, c - half) : c + half + 1]
            expected = 0.3 * (picture[r, c] - picture[window][valid[window]].mean())
            assert channel[r, c] == pytest.approx(expected, abs=2e-5)
    assert (got[:, ~valid] == 0).all()


def test_what_lies_on_padding_does_not_move_valid_tokens(tower):
    pixels = torch.randn(1, 1, 64, 64)
    valid = torch.ones(1, 64, 64, dtype=torch.bool)
    valid[:, :16] = False
    one, other = (tower(ImageBatch(torch.where(valid[:, None], pixels, fill), valid)) for fill in (0.0, 50.0))
    assert not one.token_valid.all()
    torch.testing.assert_close(one.tokens, other.tokens)
    torch.testing.assert_close(one.pooled, other.pooled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_forward_and_backward_in_bf16(tower):
    pixels = torch.randn(2, 1, 64, 64)
    expected = tower(ImageBatch(pixels)).pooled.detach()
    on_gpu = ConvEncoder(embed_dim=16, widths=(16, 16, 16), blocks=(1, 1, 1)).cuda().eval()
    on_gpu.load_state_dict(tower.state_dict())
    with torch.autocast("cuda", torch.bfloat16):
        features = on_gpu(ImageBatch(pixels.cuda()))
        (features.pooled.float().sum() + features.tokens.float().sum()).backward()
    torch.testing.assert_close(features.pooled.float().cpu(), expected, rtol=0.05, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in on_gpu.parameters() if p.grad is not None)
