"""Letterbox and world axes: round trips, planted points, torch's and ITK's own answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvl.geometry import LPS_TO_RAS, Letterbox, lps_to_ras

shapes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
small_shapes = st.tuples(st.integers(4, 90), st.integers(4, 90))


@given(shape=shapes, size=st.integers(1, 1024), at=st.tuples(st.floats(-0.5, 1), st.floats(-0.5, 1)))
def test_a_point_mapped_forth_and_back_stays(shape, size, at):
    box = Letterbox(shape, size)
    point = np.array([[at[0] * shape[0], at[1] * shape[1]], [0.0, 0.0], [shape[0] - 0.5, shape[1] - 0.5]])
    np.testing.assert_allclose(box.to_native(box.to_tower(point)), point, atol=0.01)
    np.testing.assert_allclose(box.to_tower(box.to_native(point)), point, atol=0.01)


@given(shape=shapes, size=st.integers(1, 1024))
def test_the_corners_of_the_image_are_the_corners_of_the_valid_square(shape, size):
    box = Letterbox(shape, size)
    rows, cols = np.nonzero(box.valid().numpy())
    corners = box.to_tower(np.array([[-0.5, -0.5], [shape[0] - 0.5, shape[1] - 0.5]]))
    np.testing.assert_allclose(corners, [[rows.min() - 0.5, cols.min() - 0.5], [rows.max() + 0.5, cols.max() + 0.5]], atol=1e-6)
    assert max(box.resized_shape) == size
    assert min(box.offset) >= 0
    before, after = np.array(box.offset), size - np.array(box.offset) - np.array(box.resized_shape)
    assert (np.abs(before - after) <= 1).all()  # centred


@given(shape=shapes, size=st.integers(16, 1024))
def test_the_aspect_is_kept_to_the_rounding_of_the_shorter_side(shape, size):
    box = Letterbox(shape, size)
    exact = np.array(shape) * size / max(shape)
    assert (np.abs(np.array(box.resized_shape) - np.maximum(exact, 1)) <= 0.5).all()


@given(shape=small_shapes, size=st.integers(8, 96), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_bright_pixel_is_found_where_it_was(shape, size, seed):
    """Planted natively, letterboxed, laid back through a grid of one token per tower pixel."""
    rng = np.random.default_rng(seed)
    at = np.array([rng.integers(0, shape[0]), rng.integers(0, shape[1])])
    image = torch.zeros(1, *shape)
    image[0, at[0], at[1]] = 1
    box = Letterbox(shape, size)
    grid = torch.where(box.valid(), box.apply(image)[0], torch.nan)
    back = box.map_to_native(grid).numpy()
    assert back.shape == shape
    assert np.isfinite(back).all()
    best = np.argwhere(back >= back.max() * (1 - 1e-4))
    token = np.maximum(1, 1 / np.array(box.scale))  # native pixels per token
    assert (np.abs(best - at) <= token).all(axis=1).any()
    if min(box.scale) >= 1:
        assert (best == at).all(axis=1).any()


@given(size=st.integers(1, 64), gh=st.integers(1, 80), gw=st.integers(1, 80), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_identity_letterbox_interpolates_as_torch_does(size, gh, gw, seed):
    grid = torch.randn(3, gh, gw, generator=torch.Generator().manual_seed(seed))
    got = Letterbox((size, size), size).map_to_native(grid)
    expected = F.interpolate(grid[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)  # torch interpolates in float32


@pytest.mark.parametrize(("shape", "size", "tokens"), [((50, 80), 64, 16), ((81, 33), 32, 8), ((2000, 1500), 224, 14), ((20, 30), 96, 24)])
def test_the_map_is_the_one_torch_makes_through_the_square(shape, size, tokens):
    """grid_sample at the native pixel centres knows the letterbox only as points."""
    grid = torch.randn(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(0))
    box = Letterbox(shape, size)
    rows, cols = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
    at = box.to_tower(np.stack([rows, cols], axis=-1).astype(float))
    normal = torch.from_numpy((at[..., ::-1] + 0.5) / size * 2 - 1).float()  # (x, y) in -1..1, edges at the ends
    expected = F.grid_sample(grid, normal[None], mode="bilinear", padding_mode="border", align_corners=False)[0, 0]
    torch.testing.assert_close(box.map_to_native(grid[0, 0]), expected, atol=1e-4, rtol=1e-4)


@given(seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_unseen_tokens_are_nan_and_never_bleed(seed):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(12, 12, generator=generator) + 1
    seen = torch.rand(12, 12, generator=generator) > 0.4
    box = Letterbox((60, 44), 48)
    full = box.map_to_native(torch.ones(12, 12))
    assert torch.isfinite(full).all()
    got = box.map_to_native(torch.where(seen, grid, torch.nan))
    finite = got[torch.isfinite(got)]
    assert ((finite > 1 - 1e-5) & (finite < 2 + 1e-5)).all()  # a mean of seen scores only: a 0 for unseen ones would pull below 1
    rows = box.to_tower(np.stack([np.arange(60.0), np.zeros(60)], -1))[:, 0]
    cols = box.to_tower(np.stack([np.zeros(44), np.arange(44.0)], -1))[:, 1]
    for i in range(0, 60, 7):
        for j in range(0, 44, 5):
            t, u = np.clip((rows[i] + 0.5) / 4 - 0.5, 0, 11), np.clip((cols[j] + 0.5) / 4 - 0.5, 0, 11)
            near = [(a, b) for a in {int(np.floor(t)), int(np.ceil(t))} for b in {int(np.floor(u)), int(np.ceil(u))}]
            assert bool(torch.isfinite(got[i, j])) == any(bool(seen[a, b]) for a, b in near)


def test_nothing_seen_is_all_nan():
    assert Letterbox((9, 5), 8).map_to_native(torch.full((4, 4), torch.nan)).isnan().all()


@given(shape=small_shapes, size=st.integers(4, 96))
@settings(max_examples=40, deadline=None)
def test_padding_is_the_fill_and_a_constant_stays(shape, size):
    box = Letterbox(shape, size)
    square = box.apply(torch.full((2, *shape), 3.0), fill=-7.0)
    assert square.shape == (2, size, size)
    torch.testing.assert_close(square[:, box.valid()], torch.full_like(square[:, box.valid()], 3.0))
    assert (square[:, ~box.valid()] == -7).all()


def test_a_ramp_keeps_its_positions():
    """A picture of its own row numbers tells where each tower pixel looks: the resize and the point map must agree."""
    shape = (120, 90)
    rows = torch.arange(120.0)[:, None].expand(shape)[None]
    cols = torch.arange(90.0)[None].expand(shape)[None]
    for size in (48, 64, 200):
        box = Letterbox(shape, size)
        inside = np.argwhere(box.valid().numpy())
        native = box.to_native(inside.astype(float))
        edge = 3 / np.array(box.scale) + 3  # the filter is cut at the border of the image
        middle = ((native > edge) & (native < np.array(shape) - 1 - edge)).all(axis=1)
        assert middle.sum() > 100
        for image, axis in ((rows, 0), (cols, 1)):
            seen = box.apply(image)[0].numpy()[tuple(inside.T)]
            np.testing.assert_allclose(seen[middle], native[middle, axis], atol=0.1)  # the sampled filter is not quite even


def test_thousand_pixels_alias_no_more_than_an_area_mean():
    """A fine checkerboard becomes even grey; without anti-aliasing it would not."""
    board = (torch.arange(1000)[:, None] + torch.arange(1000)[None]) % 2
    small = Letterbox((1000, 1000), 100).apply(board.float()[None])
    assert (small - 0.5).abs().max() < 0.02


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="cannot letterbox"):
        Letterbox((0, 5), 10)
    with pytest.raises(ValueError, match=r"\(4, 4\) pixels, this letterbox was made for \(5, 5\)"):
        Letterbox((5, 5), 10).apply(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"expected \(4, 4\)"):
        lps_to_ras(np.eye(3))


def test_the_record_makes_the_letterbox_again():
    import json

    box = Letterbox((7, 9), 5)
    again = json.loads(json.dumps(box.to_dict()))
    assert Letterbox(tuple(again["native_shape"]), again["size"]) == box


@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
)
@settings(max_examples=15, deadline=None)
def test_lps_to_ras_agrees_with_nibabel_reading_what_simpleitk_wrote(tmp_path_factory, angles, spacing, origin):
    """ITK's world is LPS, NIfTI's is RAS: the same file through both."""
    nib, sitk = pytest.importorskip("nibabel"), pytest.importorskip("SimpleITK")
    transform = sitk.Euler3DTransform()
    transform.SetRotation(*angles)
    direction = np.array(transform.GetMatrix()).reshape(3, 3)
    image = sitk.Image([3, 4, 5], sitk.sitkInt16)
    image.SetDirection(direction.ravel().tolist())
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    path = tmp_path_factory.mktemp("affine") / "image.nii"
    sitk.WriteImage(image, str(path))
    lps = np.eye(4)
    lps[:3, :3] = direction @ np.diag(spacing)
    lps[:3, 3] = origin
    ras = nib.load(path).affine
    np.testing.assert_allclose(lps_to_ras(lps), ras, atol=1e-3)
    np.testing.assert_allclose(lps_to_ras(ras), lps, atol=1e-3)
    np.testing.assert_array_equal(LPS_TO_RAS @ LPS_TO_RAS, np.eye(4))
