"""The CT reader: axes, windows, crops and the way back to the file's voxels, against nibabel, SimpleITK and planted voxels."""

from __future__ import annotations

import csv
import itertools
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from medvl.model import build
from medvl.types import ImageReader, UnreadableImageError
from modalities.ct.crop import body_box, thorax_box
from modalities.ct.reader import CtReader, turn_to_tower

SHAPE, SPACING = (24, 40, 44), (5.0, 3.0, 2.5)  # (z, y, x) of a chest of sorts, in mm


def chest(seed=0, shape=SHAPE, spacing=SPACING):
    """(z, y, x) HU on a grid that runs as the tower's: air, an ellipse of muscle, two lungs that stop below the apex and above the base."""
    rng = np.random.default_rng(seed)
    z, y, x = (((np.arange(n) - (n - 1) / 2) * step).reshape(-1, *[1] * k) for n, step, k in zip(shape, spacing, (2, 1, 0), strict=True))
    hu = np.full(shape, -1000.0)
    hu[np.broadcast_to((y / 45) ** 2 + (x / 46) ** 2 < 1, shape)] = 40
    for centre in (-20, 20):
        hu[(z / 35) ** 2 + (y / 28) ** 2 + ((x - centre) / 14) ** 2 < 1] = -850
    hu[:, -3:, :] = np.where(hu[:, -3:, :] < -900, 0, hu[:, -3:, :])  # a table
    return (hu + rng.normal(0, 15, shape)).astype(np.int16)


def tower_affine(spacing=SPACING):
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = spacing[0], -spacing[1], -spacing[2], 1
    return affine


def save(path, volume, affine):
    """Write (s, h, w) values as NIfTI, whose axes are (x, y, z) = (w, h, s)."""
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]), path)
    return path


def turned(volume, affine, axes, flips):
    """The same voxels under other axes."""
    found, record = volume.transpose(axes), affine[:, [*axes, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            record[:3, 3] += record[:3, axis] * (found.shape[axis] - 1)
            record[:3, axis] *= -1
            found = np.flip(found, axis)
    return np.ascontiguousarray(found), record


ORIENTATIONS = [(axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((False, True), repeat=3)]


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_every_orientation_of_a_file_gives_the_same_tower_grid(tmp_path, axes, flips):
    reader = CtReader(spacing_mm=(5.0, 3.0, 3.0), shape=(20, 32, 32), crop="body", antialias=True)
    expected = reader.read_array(chest(), tower_affine())
    sample = reader.read(save(tmp_path / "volume.nii", *turned(chest(), tower_affine(), axes, flips)))
    assert sample.pixels.shape == (3, 20, 32, 32)
    torch.testing.assert_close(sample.pixels, expected.pixels, atol=1e-4, rtol=1e-4)
    corners = np.array([[0, 0, 0, 1.0], [19, 31, 31, 1], [3, 30, 1, 1]]).T
    worlds = [s.affine @ s.transform.matrix() @ corners for s in (sample, expected)]
    np.testing.assert_allclose(*worlds, atol=1e-3)


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS[::5])
def test_a_bright_voxel_comes_back_to_its_own_voxel(tmp_path, axes, flips):
    rng = np.random.default_rng(sum(axes) + sum(flips))
    plain = np.full(SHAPE, -200, dtype=np.int16)
    at = np.array([rng.integers(4, n - 4) for n in SHAPE])
    plain[tuple(at)] = 3000
    volume, affine = turned(plain, tower_affine(), axes, flips)
    reader = CtReader(spacing_mm=(4.0, 2.5, 2.0), shape=(None, 52, 60), windows_hu=[(-200, 3000)], crop="none", antialias=False)
    sample = reader.read(save(tmp_path / "volume.nii.gz", volume, affine))
    back = sample.transform.map_to_native(sample.pixels[0]).numpy()
    assert back.shape == volume.shape
    assert np.unravel_index(np.nanargmax(back), back.shape) == np.unravel_index(volume.argmax(), volume.shape)


def test_slices_look_as_radiologists_see_them():
    """Row 0 is anterior and column 0 the patient's right, slice 0 the lowest; told by planted points in the world."""
    volume = np.full((9, 10, 11), -1000, dtype=np.int16)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])[:, [2, 1, 0, 3]]  # (s, h, w) to RAS: s up, h to anterior, w to the right
    volume[8, 9, 10] = 1000  # the highest, most anterior, rightmost voxel
    assert nib.aff2axcodes(affine[:, [2, 1, 0, 3]]) == ("R", "A", "S")
    reader = CtReader(spacing_mm=(None, None, None), shape=(None, None, None), windows_hu=[(-1000, 1000)], crop="none")
    shown = reader.read_array(volume, affine).pixels[0]
    assert np.unravel_index(int(shown.argmax()), shown.shape) == (8, 0, 0)
    assert turn_to_tower(tower_affine()) == ((0, 1, 2), (False, False, False))


def test_linear_resampling_agrees_with_simpleitk(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    path = save(tmp_path / "volume.nii", chest(), tower_affine())
    reader = CtReader(
        spacing_mm=(3.7, 2.1, 1.9), shape=(None, None, None), windows_hu=[(-1000, 1000)], crop="none", antialias=False, mean=0, std=1
    )
    sample = reader.read(path)
    image = sitk.DICOMOrient(sitk.ReadImage(str(path), sitk.sitkFloat32), "LPS")
    size = sample.pixels.shape[1:]
    expected = sitk.Resample(
        image, [size[2], size[1], size[0]], sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), [1.9, 2.1, 3.7], image.GetDirection()
    )
    windowed = np.clip((sitk.GetArrayFromImage(expected) + 1000) / 2000, 0, 1)
    inner = (slice(None), *[slice(2, -2)] * 3)
    np.testing.assert_allclose(sample.pixels[inner].numpy(), windowed[None][inner], atol=1e-4)


def test_windows_are_channels_and_air_is_what_is_padded():
    reader = CtReader(spacing_mm=(None, None, None), shape=(30, 50, 50), windows_hu=[(-1000, 0), (0, 100)], crop="none", mean=0, std=1)
    hu = np.full(SHAPE, 50, dtype=np.int16)
    sample = reader.read_array(hu, tower_affine())
    inside = sample.pixels[:, 15, 25, 25].tolist()
    assert inside == pytest.approx([1.0, 0.5])
    assert sample.pixels[:, 0, 0, 0].tolist() == [0, 0]
    assert sample.valid.sum() == SHAPE[0]
    assert not sample.valid[0] and not sample.valid[-1]


def test_a_batch_pads_slices_and_says_where_they_lie():
    reader = CtReader(spacing_mm=(5.0, 3.0, 3.0), shape=(None, 32, 32), crop="none")
    short, long = (reader.read_array(chest(shape=(n, 40, 44)), tower_affine()) for n in (10, 24))
    batch = reader.collate([short, long])
    assert batch.pixels.shape == (2, 3, 24, 32, 32)
    assert batch.valid.sum(1).tolist() == [10, 24]
    assert batch.position_mm[1, :3].tolist() == pytest.approx([0, 5, 10])
    with pytest.raises(ValueError, match="no samples"):
        reader.collate([])


def test_the_body_is_kept_whole_and_the_table_is_left_out():
    (low, top, left), (count, rows, cols) = body_box(chest(), SPACING, margin_mm=0)
    body = chest() > -300
    body[:, -3:, :] = False
    s, h, w = (np.flatnonzero(body.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    for start, length, inside, step in zip((low, top, left), (count, rows, cols), (s, h, w), SPACING, strict=True):
        slack = 8 / step + 2  # the coarse grid and its opening
        assert start <= inside[0] + slack and start + length >= inside[-1] + 1 - slack
    assert rows < SHAPE[1]


def test_the_thorax_box_keeps_white_lungs():
    """Consolidated below the hilum on both sides, and fully: nothing of the chest may be cut off."""
    tall = chest(shape=(80, 40, 44), spacing=(5.0, 3.0, 2.5))
    (low, *_), (count, *_) = thorax_box(tall, SPACING)
    lungs = np.flatnonzero((tall[:, 10:30, 10:34] < -500).any(axis=(1, 2)))
    assert low <= lungs[0] - 7 and low + count >= lungs[-1] + 7  # 35 mm at least beyond the last air
    assert count < 80
    half = tall.copy()
    half[:40][half[:40] < -500] = 30  # the lower half is as dense as muscle
    half[:, 0], half[:, :, 0], half[:, :, -1] = -1000, -1000, -1000
    (low_half, *_), (count_half, *_) = thorax_box(half, SPACING)
    assert low_half <= lungs[0] and low_half + count_half >= lungs[-1] + 7
    white = np.where((tall < -500) & (np.abs(np.arange(40)[None, :, None] - 19.5) < 10), 30, tall).astype(np.int16)
    assert thorax_box(white, SPACING)[1][0] == body_box(white, SPACING)[1][0]


def test_the_real_chest_keeps_every_organ_in_its_box(shared_data):
    folder = shared_data / "ct" / "chest_volume"
    reader = CtReader(spacing_mm=(3.0, 3.0, 3.0), shape=(None, 140, 140), crop="thorax")
    sample = reader.read(folder / "chest_ct.nii.gz")
    organs = np.asarray(nib.load(folder / "chest_ct_organs.nii.gz").dataobj).transpose(2, 1, 0)
    seen = np.isfinite(sample.transform.map_to_native(torch.zeros(2, 2, 2)).numpy())
    assert seen.shape == organs.shape
    with (folder / "structures.csv").open(newline="") as file:
        lungs = [int(row["id"]) for row in csv.DictReader(file) if "lung" in row["structure"] or "heart" in row["structure"]]
    assert len(lungs) > 3
    assert seen[np.isin(organs, lungs)].mean() == 1.0


def test_a_reader_comes_back_from_its_config():
    reader = CtReader(spacing_mm=(2.0, None, 1.0), shape=(None, 96, 96), windows_hu=[(-100, 100)], crop="thorax", max_slices=40)
    again = build(json.loads(json.dumps(reader.spec())), ImageReader)
    one, other = (r.read_array(chest(), tower_affine()) for r in (reader, again))
    assert torch.equal(one.pixels, other.pixels)
    assert one.pixels.shape[1] <= 40


@pytest.mark.parametrize(
    "wrong", [{"spacing_mm": (0, 1, 1)}, {"windows_hu": []}, {"windows_hu": [(5, 5)]}, {"crop": "lung"}, {"shape": (3, 3)}]
)
def test_arguments_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CtReader(**wrong)


def test_folders_of_slices_and_volume_files_are_found(tmp_path):
    from modalities.export import write_ct_series

    write_ct_series(tmp_path / "b" / "series", chest()[:3], tower_affine(), patient_id="p", study_id="s")
    save(tmp_path / "a.nii.gz", chest(), tower_affine())
    (tmp_path / "masks").mkdir()
    save(tmp_path / "masks" / "m.nii.gz", chest(), tower_affine())
    (tmp_path / "notes.csv").write_text("x")
    reader = CtReader(shape=(None, 32, 32))
    assert reader.find_images(tmp_path) == [tmp_path / "a.nii.gz", tmp_path / "b" / "series"]
    assert reader.read(tmp_path / "b" / "series").pixels.shape[0] == 3
    with pytest.raises(UnreadableImageError, match=r"nothing\.nii"):
        reader.read(tmp_path / "nothing.nii")


def test_windowing_leaves_the_volume_alone():
    """Where nothing is turned or resampled, the reader's values may be the volume's own memory."""
    values = chest().astype(np.float32)
    before = values.copy()
    reader = CtReader(spacing_mm=(None, None, None), shape=(None, None, None), windows_hu=[(-1000, 1000)], crop="none", mean=0, std=1)
    sample = reader.read_array(values, tower_affine())
    np.testing.assert_array_equal(values, before)
    np.testing.assert_allclose(sample.pixels[0].numpy(), np.clip((before + 1000) / 2000, 0, 1), atol=1e-6)
