"""Series of a CT study pooled: one series is itself, order and neighbours move nothing, tokens and slices stay whose they are."""

import pytest
import torch
from torch import nn

from medvl.model import join
from medvl.types import ImageBatch
from modalities.ct import SeriesPooledEncoder, SlicePooledEncoder
from modalities.ct.pooling import TransformerPooling
from modalities.ct.volumes import VolumeEncoder
from modalities.joint import JointEncoder
from modalities.pooling import GatedAttention, MeanPooling
from modalities.xray import ConvEncoder

D = 8


class Volumes(VolumeEncoder):
    """One convolution in three dimensions."""

    stride = (2, 8, 8)
    in_chans = 1

    def __init__(self) -> None:
        super().__init__(D, 4)
        self.network = nn.Conv3d(1, 4, self.stride, self.stride)

    def features(self, pixels):
        return self.network(pixels).tanh()


def by_slices():
    return SlicePooledEncoder(ConvEncoder(D, widths=(4, 4, 4), blocks=(1, 1, 1), bands=()), GatedAttention(D, 4), token_pool=2)


@pytest.fixture(params=[by_slices, Volumes], ids=["slices", "volumes"])
def tower(request):
    torch.manual_seed(0)
    return SeriesPooledEncoder(request.param(), GatedAttention(D, 4)).eval()


def batch(lengths, study=None, seed=0):
    """Series of so many slices, padded to the longest."""
    rng = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    pixels = torch.stack([torch.randn(1, longest, 16, 16, generator=rng) for _ in lengths]) * valid[:, None, :, None, None]
    return ImageBatch(
        pixels, valid, torch.arange(longest).expand(len(lengths), -1) * 2.0, study=None if study is None else torch.tensor(study)
    )


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_study_of_one_series_is_that_series(tower):
    given = batch([4, 6])
    plain, alone, grouped = tower.backbone(given), tower(given), tower(batch([4, 6], [0, 1]))
    for found in (alone, grouped):
        close(found.pooled, plain.pooled)
        close(found.tokens, plain.tokens)
        assert found.views.shape == (2, 1, D) and found.view_weights.tolist() == [[1.0], [1.0]]
    assert alone.grid == plain.grid and grouped.grid == (1, *plain.grid)
    if plain.slices is not None:
        close(grouped.slices, plain.slices)
        close(grouped.slice_weights, plain.slice_weights)


@torch.no_grad()
def test_series_are_laid_out_and_weighed_by_study(tower):
    given = batch([6, 4, 6, 2], [1, 0, 1, 1])
    found, plain = tower(given), tower.backbone(batch([6, 4, 6, 2]))
    assert found.pooled.shape == (2, D) and found.view_valid.tolist() == [[True, False, False], [True] * 3]
    close(found.view_weights.sum(1), torch.ones(2))
    close(found.pooled, (found.view_weights[..., None] * found.views).sum(1))
    close(found.views[1], plain.pooled[[0, 2, 3]])
    tokens = found.tokens.unflatten(1, (3, -1))
    close(tokens[1], plain.tokens[[0, 2, 3]])
    assert not found.token_valid.unflatten(1, (3, -1))[0, 1:].any()
    if plain.slices is not None:
        close(found.slice_weights.sum(1), torch.ones(2))
        shares = found.slice_weights.unflatten(1, (3, -1))
        close(shares[1], plain.slice_weights[[0, 2, 3]] * found.view_weights[1][:, None])
        close(found.slices.unflatten(1, (3, -1))[1], plain.slices[[0, 2, 3]])


@torch.no_grad()
def test_order_and_other_studies_move_nothing(tower):
    one = tower(batch([4, 4, 4], [0, 0, 1]))
    given = batch([4, 4, 4], [0, 0, 1])
    turned = ImageBatch(given.pixels[[1, 0]], given.valid[[1, 0]], given.position_mm[[1, 0]], study=torch.tensor([0, 0]))
    other = tower(turned)
    close(other.pooled[0], one.pooled[0])
    close(other.view_weights[0], one.view_weights[0].flip(0))
    close(other.tokens.unflatten(1, (2, -1))[0, 0], one.tokens.unflatten(1, (2, -1))[0, 1])


@torch.no_grad()
def test_batches_of_other_lengths_are_joined_as_one_batch_has_them(tower):
    whole = tower(batch([6, 4, 4, 2], [0, 0, 0, 1]))
    given = batch([6, 4, 4, 2])
    parts = [
        tower(ImageBatch(given.pixels[:3], given.valid[:3], given.position_mm[:3], study=torch.tensor([0, 0, 0]))),
        tower(ImageBatch(given.pixels[3:, :, :2], given.valid[3:, :2], given.position_mm[3:, :2], study=torch.tensor([0]))),
    ]
    joined = join(parts)
    assert joined.grid == whole.grid
    for name in ("pooled", "views", "view_weights", "view_valid", "token_valid", "slice_weights", "slice_valid"):
        one, other = getattr(joined, name), getattr(whole, name)
        assert (one is None) == (other is None), name
        if one is not None:
            close(one, other) if one.is_floating_point() else torch.testing.assert_close(one, other)
    close(joined.tokens * joined.token_valid[..., None], whole.tokens * whole.token_valid[..., None])


def test_gradients_reach_every_series(tower):
    tower.train()
    given = batch([4, 4, 4], [0, 0, 1])
    given.pixels.requires_grad_()
    tower(given).pooled.square().sum().backward()
    assert all(one.abs().sum() > 0 for one in given.pixels.grad)


def test_towers_that_cannot_be_pooled_are_refused(tower):
    with pytest.raises(ValueError, match="pools series already"):
        SeriesPooledEncoder(tower, MeanPooling())
    with pytest.raises(ValueError, match="takes 5"):
        SeriesPooledEncoder(tower.backbone, GatedAttention(5))
    with pytest.raises(ValueError, match="needs the position"):
        SeriesPooledEncoder(tower.backbone, TransformerPooling(D))


@torch.no_grad()
def test_beside_a_radiograph_tower_each_pools_its_own(tower):
    films = ConvEncoder(D, widths=(4, 4, 4), blocks=(1, 1, 1))
    joint = JointEncoder(films, tower).eval()
    assert joint.pools("ct") and not joint.pools("xray")
    close(joint(batch([4, 4], [0, 0])).pooled, tower(batch([4, 4], [0, 0])).pooled)
    plain = JointEncoder(films, tower.backbone)
    assert not plain.pools_views
    with pytest.raises(ValueError, match="one by one"):
        plain(batch([4, 4], [0, 0]))
