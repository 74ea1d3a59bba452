"""Phantoms measured from outside: volumes, ratios, sides and densities counted voxel by voxel against the facts that are claimed."""

import numpy as np
import pytest

from medvl.types import FINDINGS
from modalities.phantom import sample_anatomy, sample_findings, sample_phantom
from modalities.phantom.anatomy import build_chest
from modalities.phantom.findings import EFFUSION_ML
from modalities.phantom.grid import Grid, polyline, smooth_noise, splat

SIZE = 64


def draw(seed, findings, size=SIZE):
    return sample_phantom(np.random.default_rng(seed), size, findings)


def ras_centre(phantom, mask):
    index = np.argwhere(mask).mean(axis=0)
    return phantom.affine[:3, :3] @ index + phantom.affine[:3, 3]


def millilitres(phantom, mask):
    return mask.sum() * abs(np.linalg.det(phantom.affine[:3, :3])) / 1000


def test_equal_generators_give_equal_phantoms():
    one, two, other = draw(5, None), draw(5, None), draw(6, None)
    assert np.array_equal(one.volume_hu, two.volume_hu) and one.facts == two.facts
    assert all(np.array_equal(one.masks[k], two.masks[k]) for k in one.masks)
    assert not np.array_equal(one.volume_hu, other.volume_hu)


@pytest.mark.parametrize("seed", range(4))
def test_tissues_lie_in_their_ranges_of_hu(seed):
    phantom = draw(seed, [], size=96)
    hu, voxel_ml = phantom.volume_hu, abs(np.linalg.det(phantom.affine[:3, :3])) / 1000
    lungs = ((hu > -960) & (hu < -700)).sum() * voxel_ml
    assert 2500 < lungs < 8500  # total capacity of adults, mL
    assert phantom.facts == () and phantom.masks == {}
    assert hu[0, 0, 0] == -1000 and hu.min() >= -1024
    middle = np.median(hu[(hu > 0) & (hu < 100)])
    assert 30 <= middle <= 60  # muscle, blood
    assert 300 < hu.max() < 2500  # cortex, and no metal
    fat = hu[(hu > -120) & (hu < -80)]
    assert fat.size * voxel_ml > 500


@pytest.mark.parametrize("seed", range(6))
def test_heart_over_chest_is_the_ratio_asked_for(seed):
    anatomy = sample_anatomy(np.random.default_rng(seed))
    chest = build_chest(Grid(128), anatomy)
    columns = np.flatnonzero((chest.heart > 0.5).any(axis=(0, 1)))
    heart = (columns[-1] - columns[0] + 1) * chest.grid.spacing_mm[2]
    above_domes = chest.z.ravel() < max(anatomy.dome_z)
    inner = max((row > 0).any(axis=0).sum() for row in chest.wall_mm[above_domes]) * chest.grid.spacing_mm[2]
    assert heart / inner == pytest.approx(anatomy.cardiothoracic_ratio, abs=0.03)
    assert anatomy.cardiothoracic_ratio < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_cardiomegaly_passes_half_of_the_chest(seed):
    phantom = draw(seed, ["cardiomegaly"])
    columns = np.flatnonzero(phantom.masks["cardiomegaly"].any(axis=(0, 1)))
    heart = (columns[-1] - columns[0] + 1) * phantom.spacing_mm[2]
    assert heart / (2 * phantom.anatomy.half_width) > 0.48  # a voxel of 5.5 mm is 0.02 of the chest
    assert phantom.anatomy.cardiothoracic_ratio > 0.5


@pytest.mark.parametrize("seed", range(8))
def test_effusion_holds_the_volume_of_its_degree(seed):
    phantom = draw(seed, ["pleural_effusion"], size=96)
    (fact,) = phantom.facts
    sides = 2 if fact.side == "bilateral" else 1
    low, high = EFFUSION_ML[fact.severity]
    assert 0.85 * low <= millilitres(phantom, phantom.masks["pleural_effusion"]) / sides <= 1.1 * high
    assert -60 < np.median(phantom.volume_hu[phantom.masks["pleural_effusion"]]) < 30


@pytest.mark.parametrize("finding", ["pleural_effusion", "consolidation", "pneumothorax", "lung_nodule", "atelectasis", "rib_fracture"])
@pytest.mark.parametrize("seed", range(5))
def test_a_finding_lies_on_the_side_that_its_fact_says(finding, seed):
    phantom = draw(100 + seed, [finding])
    sides = {fact.side for fact in phantom.facts}
    if sides == {"right"} or sides == {"left"}:
        right = ras_centre(phantom, phantom.masks[finding])[0] > 0  # RAS: x grows to the patient's right
        assert right == (sides == {"right"})
    else:
        assert sides in ({"bilateral"}, {"left", "right"})


@pytest.mark.parametrize("finding", FINDINGS)
def test_every_finding_can_be_asked_for_and_changes_the_volume(finding):
    for seed in range(3):
        phantom, normal = draw(seed, [finding]), draw(seed, [])
        assert {fact.finding for fact in phantom.facts} == set(phantom.masks) == {finding}
        mask = phantom.masks[finding]
        assert mask.shape == phantom.volume_hu.shape and mask.any()
        assert np.abs(phantom.volume_hu.astype(int) - normal.volume_hu)[mask].mean() > 10


def test_densities_inside_the_masks():
    for seed in range(4):
        air, nodule, holes, solid, collapsed, device = (
            (p := draw(seed, [name], size=96)).volume_hu[p.masks[name]]
            for name in ("pneumothorax", "lung_nodule", "emphysema", "consolidation", "atelectasis", "support_device")
        )
        assert np.median(air) <= -985
        assert np.median(nodule) > -300
        assert np.percentile(holes, 25) < -950
        assert np.median(solid) > -250
        assert np.median(collapsed) > 0
        assert device.max() > 700


def test_nodule_is_as_large_as_its_fact_says():
    sizes = []
    for seed in range(8):
        phantom = draw(seed, ["lung_nodule"], size=128)
        if len(phantom.facts) == 1:
            volume = phantom.masks["lung_nodule"].sum() * np.prod(phantom.spacing_mm)
            sizes.append((phantom.facts[0].size_mm, (6 * volume / np.pi) ** (1 / 3)))
    assert len(sizes) >= 3
    for told, measured in sizes:
        assert measured == pytest.approx(told, rel=0.3, abs=2.5)


def test_edema_makes_lungs_denser_and_emphysema_lighter():
    def lung(phantom):
        hu = phantom.volume_hu[28:60, 12:40]
        return hu[(hu > -1000) & (hu < -300)].mean()

    for seed in range(3):
        assert lung(draw(seed, ["edema"])) > lung(draw(seed, [])) + 20 > lung(draw(seed, ["emphysema"])) + 40


def test_collapse_pulls_the_heart_over():
    for seed in range(6):
        collapsed, normal = draw(seed, ["atelectasis"]), draw(seed, [])
        sign = 1 if collapsed.facts[0].side == "left" else -1
        assert sign * (collapsed.anatomy.shift - normal.anatomy.shift) >= 2
        index = 0 if collapsed.facts[0].side == "right" else 1
        assert normal.anatomy.dome_z[index] - collapsed.anatomy.dome_z[index] >= 8


def test_findings_are_as_frequent_as_promised_and_go_together():
    rng = np.random.default_rng(0)
    drawn = [set(sample_findings(rng)) for _ in range(6000)]
    share = {name: np.mean([name in found for found in drawn]) for name in FINDINGS}
    assert 0.17 < np.mean([not found for found in drawn]) < 0.25  # about one in five has none
    assert all(0.10 < value < 0.30 for value in share.values()), share
    with_edema = [found for found in drawn if "edema" in found]
    assert np.mean(["pleural_effusion" in found for found in with_edema]) > 1.5 * share["pleural_effusion"]
    with_air = [found for found in drawn if "pneumothorax" in found]
    assert np.mean(["rib_fracture" in found for found in with_air]) > 1.5 * share["rib_fracture"]


def test_a_person_keeps_their_body_between_studies():
    anatomy = sample_anatomy(np.random.default_rng(3))
    one = sample_phantom(np.random.default_rng(1), SIZE, [], anatomy=anatomy)
    two = sample_phantom(np.random.default_rng(2), SIZE, [], anatomy=anatomy)
    assert np.array_equal(one.volume_hu, two.volume_hu)


def test_unknown_finding_and_odd_size_are_refused():
    with pytest.raises(ValueError, match="plague"):
        draw(0, ["plague"])
    for size in (16, 100, 4096):
        with pytest.raises(ValueError, match="multiple of 16"):
            draw(0, [], size=size)


def test_splat_keeps_volume_and_place():
    grid = Grid(64)
    path = np.array([[-20.0, 5.0, -40.0], [30.0, 5.0, 40.0]])
    box, share = splat(grid, *polyline(path, 2.0, rings=2))
    length = np.linalg.norm(path[1] - path[0])
    assert share.sum() * np.prod(grid.spacing_mm) == pytest.approx(np.pi * 4 * length, rel=0.02)
    index = np.argwhere(share > 0).mean(axis=0) + [b.start for b in box]
    where = (index + 0.5 - np.array(grid.shape) / 2) * grid.spacing_mm
    assert np.allclose(where, path.mean(axis=0), atol=3)


def test_smooth_noise_has_unit_variance():
    noise = smooth_noise(np.random.default_rng(0), (64, 48, 64), (24, 20, 24))
    assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.08)
