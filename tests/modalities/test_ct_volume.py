"""Volumes turned to the closest RAS against nibabel and SimpleITK, in all 48 orientations and for random affines."""

import itertools

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.ct import CtVolume, closest_ras, read_nifti, value_sha256
from modalities.ct.hu import HuVerdict
from modalities.ct.volume import affine_problem, check_file, narrow

UNKNOWN = HuVerdict("unknown", "not asked")
ORIENTATIONS = [
    "".join(letters[i] for i in order) for order in itertools.permutations(range(3)) for letters in itertools.product("RL", "AP", "SI")
]  # all 48
FEW = ["RAS", "LPS", "LAS", "ASR", "SRP", "IPL", "PIR"]


def turned(image, code):
    """The image re-saved so that its axes run as ``code`` says, by nibabel alone."""
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(code))
    return image.as_reoriented(turn)


def volume_of(data_xyz, affine_xyz):
    return CtVolume(np.ascontiguousarray(data_xyz.transpose(2, 1, 0)), np.asarray(affine_xyz)[:, [2, 1, 0, 3]], UNKNOWN)


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(3)
    data = rng.integers(-1024, 1500, (5, 6, 7)).astype(np.int16)
    affine = np.array([[0, 0, 2.5, -20], [-0.7, 0, 0, 31], [0, 0.8, 0, -7], [0, 0, 0, 1.0]])
    return nibabel.Nifti1Image(data, affine)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_every_orientation_comes_to_the_same_ras_volume(small, code):
    saved = turned(small, code)
    volume = volume_of(np.asarray(saved.dataobj), saved.affine)
    values, affine = closest_ras(volume)
    expected = nibabel.as_closest_canonical(small)
    assert volume.orientation == code and not volume.is_oblique
    assert np.array_equal(values, np.asarray(expected.dataobj))
    assert np.allclose(affine, expected.affine, atol=1e-9)
    assert value_sha256(volume) == value_sha256(volume_of(np.asarray(small.dataobj), small.affine))


@pytest.mark.parametrize("code", FEW)
def test_simpleitk_turns_it_the_same_way(small, code):
    """DICOMOrient of the LPS image shares nothing with nibabel; its RAS image has axes that run to R, A, S: our closest RAS."""
    saved = turned(small, code)
    data, affine = np.asarray(saved.dataobj), np.diag([-1, -1, 1, 1]) @ saved.affine
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(steps.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / steps).ravel().tolist())
    expected = SimpleITK.DICOMOrient(image, "RAS")  # SimpleITK names where axes run to, as nibabel does
    values, ours = closest_ras(volume_of(data, saved.affine))
    assert np.array_equal(values, SimpleITK.GetArrayFromImage(expected).transpose(2, 1, 0))
    assert np.allclose((np.diag([-1, -1, 1, 1]) @ ours)[:3, 3], expected.GetOrigin(), atol=1e-6)


@st.composite
def affines(draw):
    """A rotation, spacing, a little shear and an origin."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    shear = np.eye(3)
    shear[1, 2] = draw(st.floats(-0.4, 0.4))
    affine = np.eye(4)
    affine[:3, :3] = rotation @ shear * rng.uniform(0.3, 7, 3)
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


@settings(max_examples=60, deadline=None)
@given(affines())
def test_random_affines_as_nibabel(affine):
    data = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    expected = nibabel.as_closest_canonical(nibabel.Nifti1Image(data, affine))
    volume = volume_of(data, affine)
    values, ours = closest_ras(volume)
    assert np.array_equal(values, np.asarray(expected.dataobj))
    assert np.allclose(ours, expected.affine, atol=1e-6)
    assert volume.orientation == "".join(nibabel.aff2axcodes(affine))
    assert np.allclose(volume.spacing_mm[::-1], np.linalg.norm(affine[:3, :3], axis=0))
    at = [1, 2, 0]  # a voxel is at the same place by either of its indices
    here = np.argwhere(values == data[tuple(at)])[0]
    assert np.allclose(ours @ [*here, 1], affine @ [*at, 1], atol=1e-6)
    assert np.allclose(volume.affine @ [*at[::-1], 1], affine @ [*at, 1], atol=1e-9)


def test_tilt_and_obliqueness():
    affine = np.diag([3.0, 1, 1, 1])[[2, 1, 0, 3]]
    straight = CtVolume(np.zeros((2, 2, 2), np.int16), affine, UNKNOWN)
    assert straight.tilt_deg == pytest.approx(0, abs=1e-6) and not straight.is_oblique
    tilted = affine.copy()
    tilted[1, 0] = 3 * np.tan(np.radians(20))
    sheared = CtVolume(np.zeros((2, 2, 2), np.int16), tilted, UNKNOWN)
    assert sheared.tilt_deg == pytest.approx(20) and sheared.is_oblique


def test_what_is_no_volume_is_an_error():
    with pytest.raises(ValueError, match="shape"):
        CtVolume(np.zeros((2, 2), np.int16), np.eye(4), UNKNOWN)
    with pytest.raises(ValueError, match="int16 or float32"):
        CtVolume(np.zeros((2, 2, 2), np.float64), np.eye(4), UNKNOWN)
    with pytest.raises(ValueError, match="one plane"):
        CtVolume(np.zeros((2, 2, 2), np.int16), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), UNKNOWN)
    assert "finite" in (affine_problem(np.full((4, 4), np.nan)) or "")
    assert "kilometre" in (affine_problem(np.diag([1, 1, 1, 1.0]) + np.array([[0, 0, 0, 2e6]] + [[0] * 4] * 3)) or "")


def test_narrow_keeps_values():
    for values in (
        np.array([-5, 3], np.int8),
        np.array([0, 40000], np.uint16),
        np.array([-3, 3000], np.int64),
        np.array([0.5], np.float64),
    ):
        kept = narrow(values)
        assert kept.dtype in (np.int16, np.float32) and np.array_equal(kept.astype(np.float64), values)
    big_endian = narrow(np.array([-1000, 40], dtype=">i2"))
    assert big_endian.dtype.isnative and big_endian.tolist() == [-1000, 40]


def test_only_regular_files_are_opened(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"folder, pipe or device|cannot be opened"):
            check_file(path)
    assert check_file(__import__("pathlib").Path(__file__)) > 0


def test_real_chest_volume_is_that_of_nibabel(shared_data):
    path = shared_data / "ct/chest_volume/chest_ct.nii.gz"
    expected = nibabel.as_closest_canonical(nibabel.load(path))
    volume = read_nifti(path)
    values, affine = closest_ras(volume)
    assert np.array_equal(values, np.asarray(expected.dataobj)) and np.allclose(affine, expected.affine, atol=1e-4)
    assert volume.hu_verdict.state == "ok" and volume.warnings == () and volume.repairs == ()


def test_real_chest_volume_in_all_orientations(shared_data, tmp_path):
    image = nibabel.load(shared_data / "ct/chest_volume/chest_ct.nii.gz").slicer[60:90, 50:90, 40:90]
    expected = nibabel.as_closest_canonical(image)
    for number, code in enumerate(ORIENTATIONS):
        path = tmp_path / f"{code}{'.nii' if number % 2 else '.nii.gz'}"
        nibabel.save(turned(image, code), path)
        values, affine = closest_ras(read_nifti(path))
        assert np.array_equal(values, np.asarray(expected.dataobj)), code
        assert np.allclose(affine, expected.affine, atol=1e-4), code
