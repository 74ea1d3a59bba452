"""Means and variances on the token grid against those of the map that is laid out, whatever was turned, cropped, padded or not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.geometry import GridMoments, GridTransform, letterbox


def made(rng: np.random.Generator, axes: int) -> tuple[GridTransform, tuple[int, ...], tuple[int, ...] | None]:
    """A record of random steps, a token grid and perhaps an extent beyond the tower's grid."""
    native = tuple(int(n) for n in rng.integers(5, 40 if axes == 2 else 16, axes))
    transform = GridTransform(native)
    if rng.random() < 0.5:
        transform = transform.reorient([int(a) for a in rng.permutation(axes)], [bool(f) for f in rng.random(axes) < 0.5])
    transform = transform.resize([int(n) for n in rng.integers(4, 30 if axes == 2 else 14, axes)])
    transform = transform.fit([int(n) for n in rng.integers(4, 30 if axes == 2 else 14, axes)])
    tokens = tuple(int(n) for n in rng.integers(1, 9, axes))
    extent = tuple(n + int(rng.integers(0, 4)) for n in transform.shape) if rng.random() < 0.3 else None
    return transform, tokens, extent


def laid_out(transform: GridTransform, grids: torch.Tensor, extent: tuple[int, ...] | None) -> np.ndarray:
    return transform.map_to_native(grids.double(), extent).double().numpy()


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), axes=st.sampled_from([2, 3]), unseen=st.sampled_from(["none", "rows", "any"]))
def test_sums_over_boxes_and_masks_are_those_of_the_map(seed: int, axes: int, unseen: str) -> None:
    rng = np.random.default_rng(seed)
    transform, tokens, extent = made(rng, axes)
    known = np.ones(tokens, dtype=bool)
    if unseen == "rows" and tokens[0] > 1:
        known[: int(rng.integers(0, tokens[0]))] = False
    if unseen == "any":
        known = rng.random(tokens) < 0.7
    grids = torch.from_numpy(rng.normal(size=(3, *tokens)))
    grids[:, ~torch.from_numpy(known)] = torch.nan
    maps = laid_out(transform, grids, extent)
    moments = GridMoments(transform, tokens, extent, torch.from_numpy(known))

    corners = np.sort(rng.integers(-2, np.array(transform.native_shape) + 3, (6, 2, axes)), axis=1) - 0.5
    of_boxes = moments.of_boxes(grids, corners)
    torch.testing.assert_close(moments.box_means(grids, corners), of_boxes.mean, equal_nan=True)
    for r, (low, high) in enumerate(corners):
        inside = tuple(slice(max(int(a + 0.5), 0), max(int(b + 0.5), 0)) for a, b in zip(low, high, strict=True))
        check(of_boxes, r, maps[(slice(None), *inside)])

    mask = rng.random(transform.native_shape) < 0.3
    of_mask, whole = moments.of_mask(grids, mask), moments.whole(grids)
    check(of_mask, 0, maps[:, mask])
    check(whole, 0, maps.reshape(3, -1))
    check(whole.less(of_mask), 0, maps[:, ~mask])


def check(found: object, r: int, values: np.ndarray) -> None:
    values = values.reshape(len(values), -1)
    seen = ~np.isnan(values[0])
    assert found.count[r] == pytest.approx(seen.sum())  # type: ignore[attr-defined]
    if not seen.any():
        assert torch.isnan(found.mean[:, r]).all()  # type: ignore[attr-defined]
        return
    np.testing.assert_allclose(found.mean[:, r].numpy(), values[:, seen].mean(1), atol=1e-6)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found.variance[:, r].numpy(), values[:, seen].var(1), atol=1e-5)  # type: ignore[attr-defined]


def test_the_variance_is_the_maps_and_not_the_tokens() -> None:
    transform = letterbox((64, 64), 64)
    grid = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None]
    found = GridMoments(transform, (2, 2)).whole(grid)
    assert found.variance.item() == pytest.approx(float(transform.map_to_native(grid)[0].double().numpy().var()), abs=1e-7)
    assert found.variance.item() < 0.5 * grid.numpy().var()


def test_float16_grids_lose_no_more_than_their_own_rounding() -> None:
    rng = np.random.default_rng(4)
    transform = letterbox((300, 200), 128)
    grid = torch.from_numpy(rng.normal(size=(5, 16, 16)).astype(np.float16))
    box = np.array([[[20.5, 30.5], [180.5, 120.5]]])
    found = GridMoments(transform, (16, 16)).of_boxes(grid, box)
    maps = transform.map_to_native(grid.float()).double().numpy()[:, 21:181, 31:121]
    np.testing.assert_allclose(found.mean[:, 0].numpy(), maps.reshape(5, -1).mean(1), atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    moments = GridMoments(letterbox((8, 8), 8), (2, 2))
    with pytest.raises(ValueError, match="as many axes"):
        GridMoments(letterbox((8, 8), 8), (2, 2, 2))
    with pytest.raises(ValueError, match="expected \\(Q, 2, 2\\)"):
        moments.whole(torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="the image \\(8, 8\\)"):
        moments.of_mask(torch.zeros(1, 2, 2), np.ones((4, 4), dtype=bool))
    assert moments.of_boxes(torch.zeros(1, 2, 2), np.zeros((0, 2, 2))).mean.shape == (1, 0)
