"""Where tokens look: a tower that looks beside its cells by a known number of pixels is found out, and its maps come back to the place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import medvl
from medvl.geometry import GridMoments, letterbox
from medvl.metrics import peak
from medvl.nn.offset import token_offsets
from medvl.nn.similarity import PooledSimilarity
from medvl.types import ImageBatch, ImageEncoder, ImageFeatures, TextFeatures


class Displaced(ImageEncoder):
    """Tokens of 4 pixels: mean brightness, seen ``down`` and ``right`` pixels beside the cell; in 2D and 3D."""

    def __init__(self, shift: tuple[int, ...]) -> None:
        super().__init__()
        self.embed_dim, self.shift = 2, shift

    def forward(self, batch: ImageBatch) -> ImageFeatures:
        axes = tuple(range(2, batch.pixels.ndim))
        moved = torch.roll(batch.pixels, tuple(-s for s in self.shift), axes)[:, :1]
        pool = nn.functional.avg_pool2d if len(axes) == 2 else nn.functional.avg_pool3d
        cells = pool(moved, 4)
        tokens = torch.cat([cells, torch.ones_like(cells)], 1).flatten(2).transpose(1, 2)
        return ImageFeatures(tokens.mean(1), tokens=tokens, grid=tuple(cells.shape[2:]))


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-4, 1), (2, 0, -3)])
def test_the_offset_of_a_displaced_tower_is_measured(shift: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    pixels = torch.zeros(3, 1, *[64] * len(shift))
    for image in pixels:
        at = tuple(slice(int(a), int(a) + 4) for a in rng.integers(24, 36, len(shift)))
        image[(0, *at)] = 5.0
    tower, texts = Displaced(shift), TextFeatures(torch.tensor([[1.0, 0.0], [0.9, 0.1]]))
    found = token_offsets(tower, PooledSimilarity(), ImageBatch(pixels), texts, torch.tensor([[True, True], [True, False], [False, True]]))
    assert found.shape == (4, len(shift))
    np.testing.assert_allclose(found.numpy(), np.broadcast_to(np.array(shift, dtype=float), found.shape), atol=1e-4)


def test_near_the_border_nothing_is_said_of_that_axis() -> None:
    pixels = torch.zeros(1, 1, 64, 64)
    pixels[0, 0, 2:6, 30:34] = 5.0
    texts = TextFeatures(torch.tensor([[1.0, 0.0]]))
    found = token_offsets(Displaced((0, 1)), PooledSimilarity(), ImageBatch(pixels), texts, torch.ones(1, 1, dtype=torch.bool))
    assert torch.isnan(found[0, 0]) and found[0, 1].item() == pytest.approx(1.0, abs=1e-4)


def test_a_map_with_its_offset_points_where_the_patch_is() -> None:
    pixels = torch.zeros(1, 1, 64, 64)
    pixels[0, 0, 30:34, 40:44] = 5.0
    tower, texts = Displaced((5, -3)), TextFeatures(torch.tensor([[1.0, 0.0]]))
    maps = PooledSimilarity().maps(tower(ImageBatch(pixels)), texts)[0]
    transform = letterbox((64, 64), 64)
    beside, there = (peak(transform.map_to_native(maps, offset=offset)[0].numpy()) for offset in (None, (5, -3)))
    assert beside is not None and there is not None
    assert abs(beside[0] - 31.5) > 3 and max(abs(there[0] - 31.5), abs(there[1] - 41.5)) <= 2


def test_moments_take_the_offset_as_the_map_does() -> None:
    rng = np.random.default_rng(1)
    transform, grid = letterbox((40, 30), 32), torch.from_numpy(rng.normal(size=(2, 8, 8)).astype(np.float32))
    maps = transform.map_to_native(grid, offset=(1.3, -2.2)).double().numpy()
    found = GridMoments(transform, (8, 8), offset=(1.3, -2.2)).of_boxes(grid, np.array([[[3.5, 4.5], [20.5, 25.5]]]))
    inside = maps[:, 4:21, 5:26].reshape(2, -1)
    np.testing.assert_allclose(found.mean[:, 0].numpy(), inside.mean(1), atol=1e-6)
    np.testing.assert_allclose(found.variance[:, 0].numpy(), inside.var(1), atol=1e-6)


def test_an_offset_leaves_no_part_of_a_letterboxed_film_unseen() -> None:
    transform = letterbox((224, 128), 224)  # 48 columns of padding at either side, three tokens of 16
    grid = torch.arange(14.0).expand(2, 14, 14).clone()
    grid[..., :3], grid[..., 11:] = torch.nan, torch.nan
    known = torch.isfinite(grid[0])
    for offset in ((0.0, 16.0), (-24.0, -30.0), (3.0, 40.0)):
        found = transform.map_to_native(grid, offset=offset)
        assert torch.isfinite(found).all()
        place = np.clip((np.arange(128) + 48 - offset[1] + 0.5) / 16 - 0.5, 3, 10)
        np.testing.assert_allclose(found[0, 0].numpy(), place, atol=1e-4)
        moments = GridMoments(transform, (14, 14), known=known, offset=offset).whole(grid)
        assert moments.count.item() == 224 * 128 and moments.mean[0, 0].item() == pytest.approx(place.mean(), abs=1e-5)


def test_a_tower_without_tokens_or_gradient_is_refused() -> None:
    class Deaf(Displaced):
        def forward(self, batch: ImageBatch) -> ImageFeatures:
            return super().forward(replace(batch, pixels=batch.pixels.detach()))

    pixels, texts, pairs = torch.rand(1, 1, 16, 16), TextFeatures(torch.ones(1, 2)), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="does not hang on the pixels"):
        token_offsets(Deaf((0, 0)), PooledSimilarity(), ImageBatch(pixels), texts, pairs)


def test_a_saved_model_keeps_its_offset_and_a_wrong_one_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = medvl.load(tiny.model, device="cpu")
    model.token_offset = {2: (-1.5, 0.25)}
    folder = model.save(tmp_path / "model")
    assert medvl.load(folder, device="cpu").token_offset == {2: (-1.5, 0.25)}
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("0.25", "1e300"))
    with pytest.raises(ValueError, match="token_offset"):
        medvl.load(folder, device="cpu")
