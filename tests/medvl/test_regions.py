"""Regions against loops over pixels, Pillow, scikit-image, and run lengths that the COCO API wrote."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage.draw import polygon2mask

from medvl.geometry.regions import Box, Ellipse, Mask, Polygon, Rle, overlap, union

sides = st.integers(1, 24)
corners = st.floats(0, 20, allow_nan=False).map(lambda value: round(value, 2))
bits = st.tuples(sides, sides).flatmap(
    lambda shape: st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape)).map(
        lambda values: np.array(values, dtype=bool).reshape(shape)
    )
)


# --- boxes ---------------------------------------------------------------------------------------------------------------------------


def test_a_box_in_whole_pixels_covers_just_these():
    box = Box.from_xywh(10, 3, 5, 2)
    assert (box.low, box.high) == ((2.5, 9.5), (4.5, 14.5))
    assert box == Box.from_xyxy(10, 3, 15, 5)
    rows, columns = np.nonzero(box.mask((20, 30)))
    assert sorted(set(rows)) == [3, 4]
    assert sorted(set(columns)) == [10, 11, 12, 13, 14]


def test_a_box_in_whole_pixels_is_what_pillow_fills():
    picture = Image.new("1", (30, 20))
    ImageDraw.Draw(picture).rectangle((10, 3, 14, 4), fill=1)  # Pillow's last column and row are inside
    np.testing.assert_array_equal(Box.from_xywh(10, 3, 5, 2).mask((20, 30)), np.asarray(picture))


@given(sides, sides, corners, corners, st.floats(0.05, 9).map(lambda v: round(v, 2)), st.floats(0.05, 9).map(lambda v: round(v, 2)))
def test_a_fractional_box_holds_the_pixels_whose_centres_it_holds(rows, columns, x, y, width, height):
    inside_rows, inside_columns = (y < rows and y + height <= rows + 1), (x < columns and x + width <= columns + 1)
    box = Box.from_xywh(x, y, width, height)
    if not (inside_rows and inside_columns):
        with pytest.raises(ValueError, match="leaves the image"):
            box.mask((rows, columns))
        return
    expected = [[y <= r + 0.5 < y + height and x <= c + 0.5 < x + width for c in range(columns)] for r in range(rows)]
    np.testing.assert_array_equal(box.mask((rows, columns)), expected)


def test_a_cuboid_covers_its_voxels():
    mask = Box((0.5, 1.5, -0.5), (2.5, 3.5, 0.5)).mask((4, 5, 6))
    assert sorted(map(tuple, np.argwhere(mask).tolist())) == [(1, 2, 0), (1, 3, 0), (2, 2, 0), (2, 3, 0)]


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        ((0.0, 0.0), (1.0, 0.0), "size above 0"),
        ((0.0, 3.0), (1.0, 2.0), "size above 0"),
        ((math.nan, 0.0), (1.0, 1.0), "finite"),
        ((0.0, 0.0), (1.0, math.inf), "finite"),
        ((0.0,), (1.0,), "axes"),
        ((0.0, 0.0), (1.0, 1.0, 1.0), "axes"),
    ],
)
def test_edges_that_make_no_box_are_refused(low, high, says):
    for kind in (Box, Ellipse):
        with pytest.raises(ValueError, match=says):
            kind(low, high)


def test_a_box_may_leave_the_image_by_a_rounded_pixel_and_no_more():
    assert Box.from_xywh(-1, 0, 3, 2).mask((4, 4)).sum() == 4  # cut
    for box in (Box.from_xywh(-1.5, 0, 3, 2), Box.from_xywh(0, 0, 2, 5.5), Box.from_xywh(4, 0, 1, 1), Box.from_xywh(100, 0, 1, 1)):
        with pytest.raises(ValueError, match="leaves the image"):
            box.mask((4, 4))
    with pytest.raises(ValueError, match="does not belong"):
        Box.from_xywh(0, 0, 1, 1).mask((4, 4, 4))
    for shape in ((0, 4), (4,), (2**16, 2**16)):
        with pytest.raises(ValueError, match="shape"):
            Box.from_xywh(0, 0, 1, 1).mask(shape)


@given(corners, corners, st.integers(1, 8), st.integers(1, 8))
def test_scaling_a_box_keeps_its_share_of_the_image(x, y, up, across):
    box = Box.from_xywh(x, y, 3.25, 2.5)
    scaled = box.scaled((40, 30), (40 * up, 30 * across))
    for axis, factor in enumerate((up, across)):
        assert scaled.low[axis] + 0.5 == pytest.approx((box.low[axis] + 0.5) * factor, abs=1e-9)
        assert scaled.high[axis] + 0.5 == pytest.approx((box.high[axis] + 0.5) * factor, abs=1e-9)
    back = scaled.scaled((40 * up, 30 * across), (40, 30))
    assert back.low == pytest.approx(box.low, abs=1e-9)


def test_a_whole_pixel_box_scaled_up_is_its_mask_scaled_up():
    box = Box.from_xywh(3, 1, 4, 2)
    grown = np.kron(box.mask((6, 10)), np.ones((3, 2), dtype=bool))
    np.testing.assert_array_equal(box.scaled((6, 10), (18, 20)).mask((18, 20)), grown)
    np.testing.assert_array_equal(Mask(box.mask((6, 10))).scaled((6, 10), (18, 20)).mask((18, 20)), grown)


def test_fractions_of_an_image_are_a_box_on_one_pixel():
    box = Box.from_xyxy(0.25, 0.5, 0.75, 1.0).scaled((1, 1), (100, 200))
    assert box == Box.from_xyxy(50, 50, 150, 100)


def test_overlap_of_boxes_is_that_of_their_masks():
    one, other = Box.from_xywh(2, 3, 6, 5), Box.from_xywh(5, 4, 6, 8)
    a, b = one.mask((20, 20)), other.mask((20, 20))
    assert overlap(one, other) == pytest.approx((a & b).sum() / (a | b).sum())
    assert overlap(one, one) == 1
    assert overlap(one, Box.from_xywh(8, 3, 2, 2)) == 0  # side by side


# --- ellipses and polygons -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 6))
def test_an_ellipse_is_the_pixels_of_its_equation(height, width, top, left):
    got = Ellipse((top - 0.5, left - 0.5), (top + height - 0.5, left + width - 0.5)).mask((16, 16))
    for row in range(16):
        for column in range(16):
            at = ((row + 0.5 - top - height / 2) / (height / 2)) ** 2 + ((column + 0.5 - left - width / 2) / (width / 2)) ** 2
            assert got[row, column] == (at <= 1) or at == pytest.approx(1, abs=1e-9)


def by_crossings(vertices, shape) -> NDArray[np.bool_]:
    """Even-odd, pixel by pixel: how many edges a ray to the left crosses."""
    mask = np.zeros(shape, dtype=bool)
    for row in range(shape[0]):
        for column in range(shape[1]):
            crossings = 0
            for (y1, x1), (y2, x2) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
                if (y1 <= row) != (y2 <= row) and x1 + (row - y1) * (x2 - x1) / (y2 - y1) <= column:
                    crossings += 1
            mask[row, column] = crossings % 2 == 1
    return mask


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 11), st.floats(0, 13)), min_size=3, max_size=8))
def test_a_polygon_is_inside_where_a_ray_crosses_it_an_odd_number_of_times(vertices):
    vertices = [(round(r, 1) + 0.013, round(c, 1) + 0.017) for r, c in vertices]  # off pixel centres, where rounding would decide
    got = Polygon(tuple(vertices)).mask((12, 14))
    expected = by_crossings(vertices, (12, 14))
    assert (got != expected).sum() == 0


@settings(max_examples=40)
@given(st.lists(st.floats(0.3, 1), min_size=5, max_size=12))
def test_a_star_is_what_scikit_image_fills(radii):
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii) + 0.1234
    vertices = [(20.03 + 17 * r * math.sin(a), 24.07 + 19 * r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]
    got = Polygon(tuple(vertices)).mask((41, 50))
    np.testing.assert_array_equal(got, polygon2mask((41, 50), np.array(vertices)))
    assert got.any()


def test_a_polygon_round_a_box_is_the_box_and_pillow_differs_on_its_rim_alone():
    x, y, w, h = 4, 2, 7, 5
    outline = Polygon.from_xy([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])
    np.testing.assert_array_equal(outline.mask((12, 16)), Box.from_xywh(x, y, w, h).mask((12, 16)))
    assert outline.boxes == (Box.from_xywh(x, y, w, h),)
    picture = Image.new("1", (60, 50))
    points = [(5.2, 7.9), (50.3, 12.1), (33.8, 44.4), (12.5, 30.2)]
    ImageDraw.Draw(picture).polygon([(px - 0.5, py - 0.5) for px, py in points], fill=1)
    filled, ours = np.asarray(picture), Polygon.from_xy(points).mask((50, 60))
    core = ours.copy()
    core[1:-1, 1:-1] &= ours[:-2, 1:-1] & ours[2:, 1:-1] & ours[1:-1, :-2] & ours[1:-1, 2:]
    assert filled[core].all()
    assert abs(int(filled.sum()) - int(ours.sum())) < 0.08 * ours.sum()


def test_what_a_polygon_goes_round_twice_is_outside():
    star = Polygon(((1.0, 10.0), (18.0, 16.0), (7.0, 0.9), (7.0, 19.1), (18.0, 4.0)))  # a pentagram
    mask = star.mask((20, 20))
    assert not mask[10, 10]
    assert mask[4, 10]


def test_polygons_that_share_an_edge_share_no_pixel_and_leave_none_out():
    left, right = (
        Polygon(((0.0, 0.0), (3.0, 7.0), (9.0, 5.0), (9.0, 0.0))),
        Polygon(((0.0, 0.0), (0.0, 9.0), (9.0, 9.0), (9.0, 5.0), (3.0, 7.0))),
    )
    a, b = left.mask((10, 10)), right.mask((10, 10))
    assert not (a & b).any()
    assert (a | b)[1:9, 0:9].all()


def test_outlines_that_are_none_are_refused():
    with pytest.raises(ValueError, match="3 vertices"):
        Polygon(((0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(ValueError, match="finite"):
        Polygon(((0.0, 0.0), (1.0, math.nan), (1.0, 0.0)))
    with pytest.raises(ValueError, match="leaves the image"):
        Polygon(((0.0, 0.0), (0.0, 40.0), (5.0, 0.0))).mask((10, 10))
    line = Polygon(((1.0, 1.0), (1.0, 5.0), (1.0, 3.0)))
    assert not line.mask((8, 8)).any()
    assert line.boxes == ()


# --- run lengths ---------------------------------------------------------------------------------------------------------------------


def counts_of(mask: NDArray[np.bool_]) -> list[int]:
    """Runs outside and inside by turns, one pixel at a time down the columns."""
    counts, inside = [0], False
    for column in range(mask.shape[1]):
        for row in range(mask.shape[0]):
            if bool(mask[row, column]) == inside:
                counts[-1] += 1
            else:
                inside = not inside
                counts.append(1)
    return counts


def packed(counts: list[int]) -> str:
    """The COCO API's string, from its description: differences from the fourth on, five bits a character."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            digit, value = value & 31, value >> 5
            done = value == (-1 if digit & 16 else 0)
            text += chr(48 + (digit if done else digit | 32))
            if done:
                break
    return text


def relative(mask: NDArray[np.bool_]) -> list[int]:
    """Start and length by turns, each start counted from the end of the run before."""
    counts = counts_of(mask)
    return counts[: len(counts) // 2 * 2]


@given(bits)
def test_run_lengths_of_every_kind_come_back_as_the_mask(mask):
    counts = counts_of(mask)
    for rle in (
        Rle.from_coco(mask.shape, counts),
        Rle.from_coco(mask.shape, packed(counts)),
        Rle.from_coco(mask.shape, packed(counts).encode()),
        Rle.from_relative(relative(mask), mask.shape),
    ):
        np.testing.assert_array_equal(rle.mask(mask.shape), mask)
    around = Rle.from_coco(mask.shape, counts).boxes
    assert bool(around) == bool(mask.any())
    if around:
        rows, columns = np.nonzero(mask)
        assert around[0] == Box((rows.min() - 0.5, columns.min() - 0.5), (rows.max() + 0.5, columns.max() + 0.5))


@pytest.mark.parametrize(
    ("shape", "down_the_columns", "counts"),
    [  # written by pycocotools 2.0.11
        ((7, 5), "00011101010101100000110110000001000", "331N00000140L05OM"),
        ((1, 9), "110011011", "0220O0"),
        ((6, 1), "000110", "321"),
        ((4, 4), "0000000000000000", "`0"),
        ((4, 4), "1111111111111111", "0`0"),
    ],
)
def test_packed_run_lengths_of_the_coco_api(shape, down_the_columns, counts):
    expected = np.array([bit == "1" for bit in down_the_columns]).reshape(shape[::-1]).T
    np.testing.assert_array_equal(Rle.from_coco(shape, counts).mask(shape), expected)


def test_packed_run_lengths_of_the_coco_api_on_a_larger_picture():
    text = (  # an ellipse in 300 x 200, written by pycocotools 2.0.11
        "SY6o0W8<E:H6I8I6J6K4K6K4L4L4L4M2M4L4M2M4M2N2M4M2N2N2N2N2M4N0O2N2N2N2N2N2O0O2N2N2O0O2O0O2N2O0O2O0O2O000O2O000O2"
        "O000O2O00000O2O0000000000000000000000000000000000000001N1000001N10001N10001N10001N101N101N2N101N101N2N2N101N2N"
        "2N2N2N2N102L3N2N2N2N2N3L3N2N3L3N3L4L3N3L4L4L4L5J5L5J6J7H7J8F;Dob;"
    )
    rows, columns = np.ogrid[:300, :200]
    expected = ((rows - 150) / 90) ** 2 + ((columns - 90) / 70) ** 2 < 1
    np.testing.assert_array_equal(Rle.from_coco((300, 200), text).mask((300, 200)), expected)


def test_relative_run_lengths_as_the_challenge_describes_them():
    mask = Rle.from_relative([1, 3, 10, 5], (6, 5)).mask((6, 5))
    assert np.flatnonzero(mask.T.ravel()).tolist() == [1, 2, 3, 14, 15, 16, 17, 18]
    from_one = Rle.from_relative([1, 3, 10, 5], (6, 5), first=1).mask((6, 5))
    assert np.flatnonzero(from_one.T.ravel()).tolist() == [0, 1, 2, 13, 14, 15, 16, 17]


@pytest.mark.parametrize(
    ("numbers", "says"),
    [([1, 3, 10], "pairs"), ([1, 0], "1 or more"), ([1, -3], "1 or more"), ([5, 3, -4, 2], "follow"), ([0, 31], "past the last")],
)
def test_relative_run_lengths_that_are_wrong_are_refused(numbers, says):
    with pytest.raises(ValueError, match=says):
        Rle.from_relative(numbers, (6, 5))


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([5, 5], "add to 10"),
        ([5, 30], "add to 35"),
        ([-5, 35], "negative"),
        ([1.5, 28.5], "whole"),
        ("x" * 40, "digits"),
        ("ß", "digits"),
        ("5o", "within a number"),
        ("o" * 100 + "0", "too long"),
        ("5" * 9, "past"),
        (packed([2**40, 2**50]), "past"),
        ("5", "add to 5"),
    ],
)
def test_coco_run_lengths_that_are_wrong_are_refused(counts, says):
    with pytest.raises(ValueError, match=says):
        Rle.from_coco((6, 5), counts)


def test_a_picture_too_large_is_refused_before_anything_is_made():
    for size in ((2**20, 2**20), (0, 5), (5,)):
        with pytest.raises(ValueError, match="shape"):
            Rle.from_coco(size, "5")


@given(bits, sides, sides)
def test_a_scaled_mask_takes_the_pixel_that_each_centre_falls_into(mask, rows, columns):
    got = Rle.from_coco(mask.shape, counts_of(mask)).scaled(mask.shape, (rows, columns)).mask((rows, columns))
    for r in range(rows):
        for c in range(columns):
            assert got[r, c] == mask[(2 * r + 1) * mask.shape[0] // (2 * rows), (2 * c + 1) * mask.shape[1] // (2 * columns)]


def test_masks_belong_to_images_of_their_own_shape():
    mask = Mask(np.zeros((3, 4), dtype=bool))
    assert mask.boxes == ()
    for region in (mask, Rle((12,), (3, 4))):
        with pytest.raises(ValueError, match="scale it first"):
            region.mask((4, 3))
    with pytest.raises(ValueError, match="bool"):
        Mask(np.zeros((3, 4)))  # type: ignore[arg-type]


def test_a_union_is_where_any_region_is():
    regions = [Box.from_xywh(0, 0, 2, 2), Ellipse((3.5, 3.5), (6.5, 8.5)), Rle.from_relative([9, 4], (10, 10))]
    expected = np.zeros((10, 10), dtype=bool)
    for region in regions:
        expected = expected | region.mask((10, 10))
    np.testing.assert_array_equal(union(regions, (10, 10)), expected)
    assert not union([], (3, 4)).any()
    assert union([], (3, 4)).shape == (3, 4)
    with pytest.raises(ValueError, match="leaves"):
        union([Box.from_xywh(9, 9, 5, 5)], (10, 10))


def test_every_region_scales_to_the_same_part_of_the_image():
    vertices = [(2.0, 1.0), (12.0, 4.0), (8.0, 9.0)]
    for region in (Polygon.from_xy(vertices), Ellipse((1.5, 2.5), (7.5, 11.5))):
        small, large = region.mask((12, 16)), region.scaled((12, 16), (120, 160)).mask((120, 160))
        assert large.mean() == pytest.approx(small.mean(), rel=0.1)
        rows, columns = (at.mean() for at in np.nonzero(large))
        assert ((rows + 0.5) / 10, (columns + 0.5) / 10) == pytest.approx(tuple(at.mean() + 0.5 for at in np.nonzero(small)), abs=0.3)
