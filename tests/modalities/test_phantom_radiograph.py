"""Projection against loops over single rays in float64, and against the geometry of diverging rays."""

import math

import numpy as np
import pytest

from modalities.phantom import Geometry, line_integral, project, sample_phantom
from modalities.phantom.radiograph import BONE_STEEPNESS, MU_WATER_PER_MM, attenuation, pixel_mm

SPACING = (3.0, 5.0, 3.0)


def small_volume(rng):
    return rng.integers(-1024, 2500, (16, 8, 16)).astype(np.int16)


def mu(hu):
    """Attenuation per mm of one voxel, in plain floats."""
    return max(0.0, MU_WATER_PER_MM * (1000.0 + hu + (BONE_STEEPNESS - 1) * max(hu, 0.0)) / 1000.0)


@pytest.mark.parametrize(("view", "axis"), [("PA", 1), ("AP", 1), ("lateral", 2)])
def test_parallel_rays_follow_beer_and_lambert(view, axis):
    volume = small_volume(np.random.default_rng(0))
    got = np.exp(-line_integral(attenuation(volume), SPACING, Geometry(view)))
    for row in range(16):
        for column in range(16 if axis == 1 else 8):
            ray = volume[row, :, column] if axis == 1 else volume[row, column, :]
            expected = math.exp(-sum(mu(float(hu)) * SPACING[axis] for hu in ray))
            at = column
            if axis == 2:  # rows of 5 mm are drawn on pixels of 3 mm: compare where their centres meet
                position = (column + 0.5 - 4) * SPACING[1] / SPACING[0] + 8 - 0.5
                if abs(position - round(position)) > 1e-9:
                    continue
                at = round(position)
            assert got[row, at] == pytest.approx(expected, rel=2e-4, abs=1e-9)


def test_parallel_mask_is_any_along_the_ray():
    phantom = sample_phantom(np.random.default_rng(3), 64, ["pleural_effusion", "lung_nodule", "support_device"])
    for mask in phantom.masks.values():
        length = line_integral(mask, phantom.spacing_mm, Geometry("PA"))
        assert np.array_equal(length > 0.5 * phantom.spacing_mm[1], mask.any(axis=1))
        assert np.allclose(length, mask.sum(axis=1) * phantom.spacing_mm[1], atol=1e-3)


@pytest.mark.parametrize("view", ["PA", "AP"])
@pytest.mark.parametrize("depth", [2, 29])
def test_diverging_rays_magnify_by_source_over_source_minus_distance(view, depth):
    volume = np.zeros((64, 32, 64), dtype=np.float32)
    spacing, source, gap = (5.5, 9.6, 5.5), 1100.0, 30.0
    at = (12, 50)
    volume[at[0] - 1 : at[0] + 2, depth, at[1] - 1 : at[1] + 2] = 1.0
    geometry = Geometry(view, source, gap)
    image = line_integral(volume, spacing, geometry)
    pixel = pixel_mm(spacing, volume.shape, geometry)
    weights = np.clip(image, 0, None)
    centre = [(weights.sum(axis=1 - k) * np.arange(64)).sum() / weights.sum() for k in (0, 1)]
    slab = (depth // 4 * 4 + 2 - 16) * spacing[1]  # the middle of the four planes that share a magnification
    distance = 16 * spacing[1] + gap + (slab if view == "PA" else -slab)  # the front lies against the detector in PA
    m = source / (source - distance)
    for k in (0, 1):
        assert (centre[k] + 0.5 - 32) * pixel == pytest.approx((at[k] + 0.5 - 32) * 5.5 * m, abs=0.4)


def test_the_heart_is_larger_on_ap_than_on_pa():
    phantom = sample_phantom(np.random.default_rng(1), 64, ["cardiomegaly"])
    widths = {}
    for view, source in (("PA", 1800.0), ("AP", 1100.0)):
        geometry = Geometry(view, source, 30.0)
        shadow = line_integral(phantom.masks["cardiomegaly"], phantom.spacing_mm, geometry) > 2
        widths[view] = shadow.any(axis=0).sum() * pixel_mm(phantom.spacing_mm, phantom.volume_hu.shape, geometry)
    assert widths["AP"] > 1.03 * widths["PA"]


@pytest.mark.parametrize("view", ["PA", "AP"])
def test_the_patients_right_is_at_the_left_of_the_image(view):
    seen = set()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        phantom = sample_phantom(rng, 64, ["pleural_effusion"])
        side = phantom.facts[0].side
        if side == "bilateral":
            continue
        shot = project(phantom, view, rng)
        columns = np.argwhere(shot.masks["pleural_effusion"])[:, 1]
        middle = shot.pixels.shape[1] / 2
        assert (columns.mean() < middle) == (side == "right")
        outer = shot.pixels[:, : int(middle)] if side == "right" else shot.pixels[:, int(middle) :]
        assert outer.mean() > 0
        seen.add(side)
    assert seen == {"left", "right"}


@pytest.mark.parametrize("view", ["PA", "AP", "lateral"])
def test_images_are_twelve_bits_with_masks_of_the_same_shape(view):
    phantom = sample_phantom(np.random.default_rng(2), 64, ["lung_nodule", "pneumothorax"])
    shot = project(phantom, view, np.random.default_rng(0))
    again = project(phantom, view, np.random.default_rng(0))
    assert np.array_equal(shot.pixels, again.pixels)
    assert shot.pixels.dtype == np.uint16 and shot.pixels.max() <= 4095
    rows, columns = shot.pixels.shape
    assert max(rows, columns) == 64 and min(rows, columns) >= 0.8 * 64
    assert all(mask.shape == shot.pixels.shape and mask.any() for mask in shot.masks.values())
    assert set(shot.masks) == set(phantom.masks)
    low, high = shot.window[0] - shot.window[1] / 2, shot.window[0] + shot.window[1] / 2
    assert ((shot.pixels > low) & (shot.pixels < high)).mean() > 0.6


def test_bone_and_metal_are_bright_and_lungs_dark():
    phantom = sample_phantom(np.random.default_rng(7), 128, [])
    shot = project(phantom, "PA", np.random.default_rng(0), Geometry("PA", 1800.0, 30.0))
    rows, columns = shot.pixels.shape
    spine = shot.pixels[rows // 2 : rows * 3 // 4, columns // 2 - 4 : columns // 2 + 4]
    lung = shot.pixels[rows // 3 : rows // 2, columns * 13 // 64 : columns * 20 // 64]
    assert np.median(spine) > np.median(lung) + 600
