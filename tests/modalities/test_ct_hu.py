"""Units told by their peaks: phantoms, synthetic heads and abdomens, padding, noise; and the rescale applied exactly once."""

import numpy as np
import pytest

from modalities.ct import hu_verdict, rescale_from_metadata
from modalities.ct.hu import needs_rescale, spread_sample
from modalities.phantom import sample_phantom


def chest(seed=1, size=48):
    """A chest phantom with scanner noise, so that its air is no single value."""
    rng = np.random.default_rng(seed)
    hu = sample_phantom(rng, size).volume_hu
    return np.clip(hu + rng.normal(0, 15, hu.shape), -1024, 3071).astype(np.int16)


def ellipsoid(shell, inside, size=48, seed=0, noise=12):
    """Air around a shell (fat or bone) around soft tissue, blurred by one voxel, with noise."""
    from scipy.ndimage import gaussian_filter

    z, y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j, -1 : 1 : size * 1j]
    r = np.sqrt((x / 0.8) ** 2 + (y / 0.9) ** 2 + (z / 1.5) ** 2)
    uneven = shell + (250 if shell > 500 else 0) * np.random.default_rng(seed + 1).normal(size=r.shape)  # bone is no single value
    hu = np.where(r < 0.8, inside, np.where(r < 0.9, uneven, -1000.0))
    hu = gaussian_filter(np.where(r < 0.95, np.where(r > 0.9, -80.0, hu), hu), 0.7)
    return np.clip(hu + np.random.default_rng(seed).normal(0, noise, hu.shape), -1024, 3071).astype(np.int16)


BODIES = {
    "chest": chest(),
    "chest without noise": sample_phantom(np.random.default_rng(5), 32).volume_hu,
    "head": ellipsoid(1100, 35),
    "abdomen": ellipsoid(-100, 55, noise=25),
}


@pytest.mark.parametrize("body", BODIES)
def test_hu_is_ok(body):
    verdict = hu_verdict(BODIES[body])
    assert verdict.state == "ok" and "air peak" in verdict.evidence
    assert verdict.air == pytest.approx(-1000, abs=40) and -120 < verdict.tissue < 100


@pytest.mark.parametrize("offset", [1000, 1024, 8192, 32768])
@pytest.mark.parametrize("body", BODIES)
def test_stored_values_and_a_rescale_too_many_are_told(body, offset):
    assert hu_verdict(BODIES[body].astype(np.int32) + offset).state == "not_rescaled"
    if offset < 2000:
        assert hu_verdict(BODIES[body].astype(np.int32) - offset).state == "rescaled_twice"


@pytest.mark.parametrize("padding", [-1500, -2000, -2048, -3024, 3071])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("body", BODIES)
def test_padding_does_not_fool_it(body, told, padding):
    padded = BODIES[body].copy()
    edge = padded.shape[1] // 5
    padded[:, :edge], padded[:, -edge:] = padding, padding
    assert hu_verdict(padded, (padding, padding) if told else None).state == "ok"
    stored = np.where(padded == padding, padding, padded + 1024)
    assert hu_verdict(stored, (padding, padding) if told else None).state == "not_rescaled"


def test_fill_of_minus_1024_in_stored_values_is_not_taken_for_air():
    stored = BODIES["chest"].astype(np.int32) + 1024
    stored[:, : stored.shape[1] // 4] = -1024
    assert hu_verdict(stored).state in ("not_rescaled", "unknown")


def test_what_shows_no_air_or_no_tissue_is_unknown():
    rng = np.random.default_rng(0)
    for values in (
        rng.normal(1000, 200, 200_000),  # bone alone
        np.r_[rng.normal(-1000, 20, 190_000), np.full(90_000, -2000)],  # an empty scanner with padding
        rng.normal(50, 15, 200_000),  # soft tissue alone
        np.r_[rng.normal(50, 15, 100_000), rng.normal(-100, 15, 60_000), rng.normal(1050, 150, 60_000)],  # a crop of bone, no air
        rng.gamma(2, 150, 200_000),  # like MR
        rng.uniform(-1024, 1500, 200_000),
        np.r_[np.full(500, -1000), np.full(500, 40), np.linspace(-800, -200, 50)],  # too few voxels
    ):
        assert hu_verdict(values).state == "unknown"


def test_what_is_no_ct_is_told():
    rng = np.random.default_rng(0)
    assert hu_verdict(np.full((4, 4, 4), -1000)).state == "not_ct"
    assert hu_verdict(rng.integers(0, 90, (8, 8, 8))).state == "not_ct"
    assert hu_verdict(rng.uniform(-1, 1, (8, 8, 8))).state == "not_ct"
    assert hu_verdict(np.full((3, 3, 3), np.nan)).state == "not_ct"


def test_nan_and_order_do_not_matter():
    values = BODIES["chest"].astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(values.ravel())
    assert hu_verdict(shuffled).state == "ok"
    values[:5] = np.nan
    assert hu_verdict(values).state == "ok"


def test_sample_is_spread_over_the_volume():
    values = np.broadcast_to(np.arange(300, dtype=np.int16)[:, None, None], (300, 256, 256))
    sample = spread_sample(values)
    assert 2**18 < sample.size < 2**21 and len(np.unique(sample)) > 70 and abs(sample.mean() - 149.5) < 5


def test_rescale_is_applied_exactly_once_by_metadata():
    hu = BODIES["chest"].astype(np.int32)
    for intercept in (-1024, -1000, -8192):
        apply, note = needs_rescale(hu - intercept, (1, intercept), "auto")
        assert apply and "rescaled by slope 1" in note
        apply, note = needs_rescale(hu, (1, intercept), "auto")
        assert not apply and "already in HU" in note
    assert needs_rescale(hu * 2 + 2048, (0.5, -1024), "auto")[0]
    assert needs_rescale(hu, None, "auto") == (False, None)
    assert needs_rescale(hu, (1, -1024), "apply")[0] and not needs_rescale(hu + 1024, (1, -1024), "never")[0]


def test_it_does_not_guess():
    with pytest.raises(ValueError, match="cannot tell"):
        needs_rescale(np.random.default_rng(0).normal(50, 15, 20_000), (1, -1024), "auto")
    with pytest.raises(ValueError, match="needs rescale"):
        needs_rescale(BODIES["chest"], None, "apply")
    with pytest.raises(ValueError, match="slope not 0"):
        needs_rescale(BODIES["chest"], (0, -1024), "auto")


def test_metadata_row():
    assert rescale_from_metadata({"RescaleSlope": "1.0", "RescaleIntercept": " -8192"}) == (1.0, -8192.0)
    for row in (
        {},
        {"RescaleSlope": "x", "RescaleIntercept": "0"},
        {"RescaleSlope": "0", "RescaleIntercept": "0"},
        {"RescaleSlope": "nan"},
    ):
        with pytest.raises(ValueError, match="column Rescale"):
            rescale_from_metadata(row)


def test_real_volumes(shared_data):
    import nibabel
    import pydicom

    values = np.asarray(nibabel.load(shared_data / "ct/chest_volume/chest_ct.nii.gz").dataobj).astype(np.int32)
    head = np.stack([pydicom.dcmread(path).pixel_array for path in sorted((shared_data / "ct/ge_series").glob("*.dcm"))]).astype(np.int32)
    for real in (values, head, head[3:4], np.where(head == -1500, -2000, head), np.where(head == -1500, -3024, head)):
        assert [hu_verdict(real + o).state for o in (0, 1024, 8192, -1024)] == ["ok", "not_rescaled", "not_rescaled", "rescaled_twice"]
    mask = np.asarray(nibabel.load(shared_data / "ct/chest_volume/chest_ct_organs.nii.gz").dataobj)
    assert hu_verdict(mask).state == "not_ct"
