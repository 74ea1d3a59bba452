"""Records of grids and world axes: round trips, planted points, torch's, scipy's, nibabel's and ITK's own answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvl.geometry import LPS_TO_RAS, GridTransform, letterbox, lps_to_ras, resample

shapes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
small_shapes = st.tuples(st.integers(4, 90), st.integers(4, 90))


@given(shape=shapes, size=st.integers(1, 1024), at=st.tuples(st.floats(-0.5, 1), st.floats(-0.5, 1)))
def test_a_point_mapped_forth_and_back_stays(shape, size, at):
    box = letterbox(shape, size)
    point = np.array([[at[0] * shape[0], at[1] * shape[1]], [0.0, 0.0], [shape[0] - 0.5, shape[1] - 0.5]])
    np.testing.assert_allclose(box.to_native(box.to_tower(point)), point, atol=0.01)
    np.testing.assert_allclose(box.to_tower(box.to_native(point)), point, atol=0.01)


@given(shape=shapes, size=st.integers(1, 1024))
def test_the_corners_of_the_image_are_the_corners_of_the_valid_square(shape, size):
    box = letterbox(shape, size)
    rows, cols = np.nonzero(box.valid().numpy())
    corners = box.to_tower(np.array([[-0.5, -0.5], [shape[0] - 0.5, shape[1] - 0.5]]))
    np.testing.assert_allclose(corners, [[rows.min() - 0.5, cols.min() - 0.5], [rows.max() + 0.5, cols.max() + 0.5]], atol=1e-6)
    assert box.shape == (size, size)
    before, after = np.array([rows.min(), cols.min()]), size - 1 - np.array([rows.max(), cols.max()])
    assert min(*before, *after) == 0
    assert (np.abs(before - after) <= 1).all()  # centred


@given(shape=shapes, size=st.integers(16, 1024))
def test_the_aspect_is_kept_to_the_rounding_of_the_shorter_side(shape, size):
    box = letterbox(shape, size)
    exact = np.array(shape) * size / max(shape)
    assert (np.abs(np.array(box.steps[0].shape) - np.maximum(exact, 1)) <= 0.5).all()


@given(shape=small_shapes, size=st.integers(8, 96), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_bright_pixel_is_found_where_it_was(shape, size, seed):
    """Planted natively, letterboxed, laid back through a grid of one token per tower pixel."""
    rng = np.random.default_rng(seed)
    at = np.array([rng.integers(0, shape[0]), rng.integers(0, shape[1])])
    image = torch.zeros(1, *shape)
    image[0, at[0], at[1]] = 1
    box = letterbox(shape, size)
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
    got = letterbox((size, size), size).map_to_native(grid)
    expected = F.interpolate(grid[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)  # torch interpolates in float32


@pytest.mark.parametrize(("shape", "size", "tokens"), [((50, 80), 64, 16), ((81, 33), 32, 8), ((2000, 1500), 224, 14), ((20, 30), 96, 24)])
def test_the_map_is_the_one_torch_makes_through_the_square(shape, size, tokens):
    """grid_sample at the native pixel centres knows the letterbox only as points."""
    grid = torch.randn(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(0))
    box = letterbox(shape, size)
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
    box = letterbox((60, 44), 48)
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
    assert letterbox((9, 5), 8).map_to_native(torch.full((4, 4), torch.nan)).isnan().all()


@given(shape=small_shapes, size=st.integers(4, 96))
@settings(max_examples=40, deadline=None)
def test_padding_is_the_fill_and_a_constant_stays(shape, size):
    box = letterbox(shape, size)
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
        box = letterbox(shape, size)
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
    small = letterbox((1000, 1000), 100).apply(board.float()[None])
    assert (small - 0.5).abs().max() < 0.02


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="cannot letterbox"):
        letterbox((0, 5), 10)
    with pytest.raises(ValueError, match=r"\(4, 4\) voxels, this record was made for \(5, 5\)"):
        letterbox((5, 5), 10).apply(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"expected \(4, 4\)"):
        lps_to_ras(np.eye(3))


def test_the_record_makes_the_transform_again():
    import json

    for record in (letterbox((7, 9), 5), _chain(np.random.default_rng(3), (9, 8, 7))):
        assert GridTransform.from_dict(json.loads(json.dumps(record.to_dict()))) == record


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


def _chain(rng, shape, most=6):
    """A random record: turns, resamplings, crops and paddings in any order; a step that would leave nothing of the image is not taken."""
    record = GridTransform(shape)
    for _ in range(rng.integers(1, most)):
        record = _with_step(record, rng)
    return record


def _with_step(record, rng):
    try:
        return _stepped(record, rng)
    except ValueError as error:
        assert "is left" in str(error)
        return record


def _stepped(record, rng):
    kind, n = rng.integers(5), len(record.shape)
    if kind == 0:
        return record.reorient(rng.permutation(n).tolist(), (rng.random(n) < 0.5).tolist())
    if kind == 1:
        return record.resize(rng.integers(3, 14, n).tolist())
    if kind == 2:
        return record.resample(rng.uniform(0.4, 2.2, n).tolist())
    if kind == 3:
        return record.pad(rng.integers(0, 4, n).tolist(), rng.integers(0, 4, n).tolist())
    size = np.array(record.shape)
    low, high = (np.clip(np.round(np.array(record.seen)[:, i]).astype(int), 0, size - 1) for i in (0, 1))
    start = rng.integers(np.maximum(low - 1, 0), np.maximum(low, 1))  # from before the image, so that something of it is left
    return record.crop(start.tolist(), (np.maximum(high, low + 1).clip(max=size - 1) - start + 1).tolist())


def _by_hand(record, points):
    """Native to tower one step at a time, from what each step says of itself."""
    for step in record.steps:
        points = (points[..., list(step.axes)] - np.array(step.shift)) / np.array(step.ratio)
    return points


grids = st.one_of(st.tuples(*[st.integers(3, 12)] * 2), st.tuples(*[st.integers(3, 12)] * 3))


@given(shape=grids, seed=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_any_record_maps_points_and_boxes_forth_and_back(shape, seed):
    rng = np.random.default_rng(seed)
    record = _chain(rng, shape)
    points = rng.uniform(-0.5, np.array(shape) - 0.5, (20, len(shape)))
    np.testing.assert_allclose(record.to_tower(points), _by_hand(record, points), atol=1e-9)
    np.testing.assert_allclose(record.to_native(record.to_tower(points)), points, atol=1e-6)
    homogeneous = np.concatenate([record.to_tower(points), np.ones((20, 1))], axis=1)
    np.testing.assert_allclose((record.matrix() @ homogeneous.T).T[:, :-1], points, atol=1e-6)
    boxes = np.sort(points[:10].reshape(5, 2, len(shape)), axis=1)
    moved = record.box_to_tower(boxes)
    assert (moved[:, 0] <= moved[:, 1]).all()
    np.testing.assert_allclose(record.box_to_native(moved), boxes, atol=1e-6)


@given(shape=grids, seed=st.integers(0, 10_000), world=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_affine_of_the_tower_puts_a_voxel_where_it_was_in_the_world(shape, seed, world):
    record = _chain(np.random.default_rng(seed), (5, *shape[:2]))
    affine = np.random.default_rng(world).normal(size=(4, 4))
    affine[3] = [0, 0, 0, 1]
    tower = affine @ record.matrix()
    for point in ([0, 0, 0], [4, 1, 2], [2.5, -0.5, 1]):
        at = record.to_tower(np.array(point, dtype=float))
        np.testing.assert_allclose(tower @ [*at, 1], affine @ [*point, 1], atol=1e-6)


@given(seed=st.integers(0, 10_000), axes=st.permutations([0, 1, 2]), flipped=st.tuples(*[st.booleans()] * 3))
@settings(max_examples=80, deadline=None)
def test_a_bright_voxel_is_found_where_it_was_in_every_orientation(seed, axes, flipped):
    """Planted natively, through orientation, resampling, crop and padding, laid back through one token per tower voxel."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(8, 17, 3).tolist())
    record = GridTransform(shape).reorient(axes, flipped).resample(rng.uniform(0.5, 1.0, 3).tolist()).pad([1, 2, 3], [3, 2, 1])
    record = record.fit(rng.integers(10, 24, 3).tolist())
    low, high = (np.round(c).astype(int) for c in record.box_to_native(np.array(record.seen).T))
    at = np.array([int(rng.integers(max(lo, 0), min(hi, n - 1) + 1)) for lo, hi, n in zip(low, high, shape, strict=True)])
    back = _planted(record, at)
    inside = (record.to_tower(at[None].astype(float))[0] > np.array(record.seen)[:, 0]).all() and (
        record.to_tower(at[None].astype(float))[0] < np.array(record.seen)[:, 1]
    ).all()
    if inside:
        assert tuple(np.unravel_index(np.nanargmax(back), shape)) == tuple(at)
    else:
        assert np.isnan(back[tuple(at)])


def _planted(record, at):
    """A single bright native voxel as it comes back."""
    image = np.zeros((1, *record.native_shape), dtype=np.int16)
    image[(0, *at)] = 1000
    tower = torch.where(record.valid(), record.apply(image)[0], torch.nan)
    assert tower.shape == record.shape
    return record.map_to_native(tower).numpy()


@given(shape=grids, seed=st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_native_voxels_the_tower_did_not_see_are_nan_and_no_others(shape, seed):
    record = _chain(np.random.default_rng(seed), shape)
    back = record.map_to_native(torch.ones(2, *[3] * len(shape))).numpy()
    assert back.shape == (2, *shape)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1).astype(float)
    inside = np.ones(shape, dtype=bool)
    doubtful = np.zeros(shape, dtype=bool)  # on an edge, where rounding decides
    points = index
    for step in record.steps:
        points = (points[..., list(step.axes)] - np.array(step.shift)) / np.array(step.ratio)
        outer = np.array(step.shape) - 0.5
        inside &= ((points > -0.5) & (points < outer)).all(axis=-1)
        doubtful |= ((np.abs(points + 0.5) < 1e-4) | (np.abs(points - outer) < 1e-4)).any(axis=-1)
    assert (np.isfinite(back[0]) == inside)[~doubtful].all()
    np.testing.assert_allclose(back[np.isfinite(back)], 1, rtol=1e-5)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_map_of_a_volume_is_what_scipy_interpolates(seed):
    from scipy.ndimage import map_coordinates

    rng = np.random.default_rng(seed)
    shape, tokens = tuple(rng.integers(4, 9, 3).tolist()), tuple(rng.integers(2, 6, 3).tolist())
    record = GridTransform(shape).reorient([2, 0, 1], [True, False, True]).resize([6, 5, 8])
    grid = rng.normal(size=tokens).astype(np.float32)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1).astype(float)
    at = (_by_hand(record, index) + 0.5) * np.array(tokens) / np.array(record.shape) - 0.5
    expected = map_coordinates(grid, np.moveaxis(at, -1, 0), order=1, mode="nearest")
    np.testing.assert_allclose(record.map_to_native(torch.from_numpy(grid)).numpy(), expected, atol=1e-5)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_linear_resampling_is_scipys(seed):
    from scipy.ndimage import map_coordinates

    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 4))
    before, after = rng.integers(3, 12, n), rng.integers(2, 15, n)
    ratio, shift = rng.uniform(0.3, 2.5, n), rng.uniform(-1, 1, n)
    values = rng.integers(-1000, 1000, before).astype(np.int16)
    at = np.stack(np.meshgrid(*[np.arange(m) * r + s for m, r, s in zip(after, ratio, shift, strict=True)], indexing="ij"))
    expected = map_coordinates(values.astype(np.float64), at, order=1, mode="nearest")
    got = resample(values, after.tolist(), ratio.tolist(), shift.tolist(), antialias=False)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-3)
    reversed_view = values[tuple([slice(None, None, -1)] * n)]  # negative strides, as a turned memory map has
    where = (after.tolist(), ratio.tolist(), shift.tolist(), False)
    np.testing.assert_array_equal(resample(reversed_view, *where).numpy(), resample(reversed_view.copy(), *where).numpy())


@given(seed=st.integers(0, 10_000), coarser=st.booleans())
@settings(max_examples=40, deadline=None)
def test_anti_aliased_resampling_is_torchs_where_edges_meet(seed, coarser):
    """Slice by slice torch's own filter; along the slices Pillow's, on a column."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    before = rng.integers(6, 14, 3)
    after = rng.integers(2, 6, 3) if coarser else rng.integers(14, 20, 3)
    values = rng.normal(size=before).astype(np.float32)
    ratio = before / after
    got = resample(values, after.tolist(), ratio.tolist(), (0.5 * ratio - 0.5).tolist())
    planes = F.interpolate(torch.from_numpy(values)[None], size=after[1:].tolist(), mode="bilinear", antialias=True, align_corners=False)[0]
    columns = Image.fromarray(planes.reshape(before[0], -1).numpy()).resize((int(after[1] * after[2]), int(after[0])), Image.BILINEAR)
    np.testing.assert_allclose(got.numpy(), np.asarray(columns).reshape(after), atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 6, 1), (5, 1, 6), (1, 5, 6), (1, 1, 1)])
def test_an_axis_of_one_may_run_backwards(shape):
    """Numpy keeps a negative stride there, which torch refuses."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    turned = values[::-1, ::-1, ::-1]
    record = GridTransform(shape).resample([1.0, 1.5, 0.5])
    np.testing.assert_allclose(record.apply(turned[None]), record.apply(turned.copy()[None]), atol=1e-6)
    np.testing.assert_allclose(GridTransform(shape).apply(turned[None])[0], turned.copy())


def test_anti_aliasing_takes_a_checkerboard_for_grey_in_three_dimensions():
    board = np.indices((40, 40, 40)).sum(0) % 2
    small = resample(board, (8, 8, 8), (4.9, 5.1, 5.0), (0.3, 0.2, 0.0))
    assert (small[1:-1, 1:-1, 1:-1] - 0.5).abs().max() < 0.05
    aliased = resample(board, (8, 8, 8), (4.9, 5.1, 5.0), (0.3, 0.2, 0.0), antialias=False)
    assert (aliased - 0.5).abs().max() > 0.2


def test_what_is_no_record_is_refused():
    with pytest.raises(ValueError, match="2 or 3 axes"):
        GridTransform((5,))
    with pytest.raises(ValueError, match="leaves the grid"):
        GridTransform((5, 5)).crop([3, 0], [3, 2])
    with pytest.raises(ValueError, match="nothing of the"):
        GridTransform((5, 5)).pad([4, 0], [0, 0]).crop([0, 0], [3, 5])
    with pytest.raises(ValueError, match="expected no negative number"):
        GridTransform((5, 5)).pad([-1, 0], [0, 0])
    with pytest.raises(ValueError, match="positive"):
        resample(np.zeros((3, 3)), (3, 3), (-1.0, 1.0), (2.0, 0.0))
