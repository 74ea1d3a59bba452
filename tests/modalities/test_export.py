"""Files read back with pydicom, SimpleITK and nibabel, which share no code with the writer's geometry."""

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.pixels import apply_voi_lut

from modalities.export import uid, write_ct_series, write_nifti, write_radiograph_dicom
from modalities.phantom import project, sample_phantom

WHO = {"patient_id": "syn-p1", "study_id": "syn-s1"}


@pytest.fixture(scope="module")
def phantom():
    return sample_phantom(np.random.default_rng(11), 32, ["pleural_effusion"])


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 4096, (24, 20)).astype(np.uint16)


def write(path, picture, photometric, view="PA"):
    write_radiograph_dicom(
        path, picture, view=view, spacing_mm=(2.9, 2.9), photometric=photometric, window=(1800, 2500), sex="F", age=61, **WHO
    )
    return pydicom.dcmread(path)


def test_both_photometrics_show_the_same_picture(tmp_path, picture):
    plain, inverted = (write(tmp_path / f"{name}.dcm", picture, name) for name in ("MONOCHROME2", "MONOCHROME1"))
    assert np.array_equal(plain.pixel_array, picture)
    assert np.array_equal(inverted.pixel_array, 4095 - picture)
    shown = apply_voi_lut(plain.pixel_array, plain)
    turned = apply_voi_lut(inverted.pixel_array, inverted)
    assert np.allclose(shown, turned.max() + turned.min() - turned, atol=1.0)
    assert (plain.PresentationLUTShape, inverted.PresentationLUTShape) == ("IDENTITY", "INVERSE")


@pytest.mark.parametrize(
    ("view", "position", "orientation"), [("PA", "PA", ["L", "F"]), ("AP", "AP", ["L", "F"]), ("lateral", "LL", ["P", "F"])]
)
def test_radiograph_header_says_what_it_is(tmp_path, picture, view, position, orientation):
    ds = write(tmp_path / "x.dcm", picture, "MONOCHROME2", view)
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.1.1" and ds.Modality == "DX" and ds.PresentationIntentType == "FOR PRESENTATION"
    assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation) == (16, 12, 11, 0)
    assert ds.ViewPosition == position and list(ds.PatientOrientation) == orientation and ds.ImageLaterality == "U"
    assert [float(v) for v in ds.ImagerPixelSpacing] == [2.9, 2.9]
    assert "SYNTHETIC" in ds.ImageComments and "synthetic" in ds.Manufacturer
    assert (ds.PatientSex, ds.PatientAge, ds.StudyDate) == ("F", "061Y", "")
    image = SimpleITK.ReadImage(str(tmp_path / "x.dcm"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(image)[0], picture)


def test_equal_input_gives_equal_bytes_and_no_leftovers(tmp_path, picture, phantom):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.dcm", picture, "MONOCHROME1")
        write_nifti(tmp_path / name / "v.nii.gz", phantom.volume_hu, phantom.affine)
        write_ct_series(tmp_path / name / "ct", phantom.volume_hu, phantom.affine, **WHO)
    first = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(first) == 2 + 32 and not any(".part" in p.name for p in first)
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in first)


def test_wrong_pixels_are_refused(tmp_path, picture):
    for bad in (picture.astype(np.float32), picture[None], picture + 4096):
        with pytest.raises(ValueError, match=r"0\.\.4095"):
            write(tmp_path / "x.dcm", bad, "MONOCHROME2")


def test_nifti_has_the_values_and_the_place(tmp_path, phantom):
    path = tmp_path / "v.nii.gz"
    write_nifti(path, phantom.volume_hu, phantom.affine)
    image = nibabel.load(path)
    assert image.shape == phantom.volume_hu.shape[::-1] and image.get_data_dtype() == np.int16
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "I")
    data = np.asarray(image.dataobj)
    for s, h, w in [(0, 0, 0), (31, 15, 31), (20, 9, 5)]:
        assert data[w, h, s] == phantom.volume_hu[s, h, w]
        assert np.allclose(image.affine @ [w, h, s, 1], phantom.affine @ [s, h, w, 1])
    assert b"synthetic" in bytes(image.header["descrip"])


def test_nifti_puts_a_right_effusion_at_the_right(tmp_path):
    for seed in range(20):
        phantom = sample_phantom(np.random.default_rng(seed), 32, ["pleural_effusion"])
        if phantom.facts[0].side != "bilateral":
            write_nifti(tmp_path / f"{seed}.nii.gz", phantom.masks["pleural_effusion"], phantom.affine)
            image = SimpleITK.ReadImage(str(tmp_path / f"{seed}.nii.gz"))
            index = np.argwhere(SimpleITK.GetArrayFromImage(image) > 0).mean(axis=0)[::-1]
            left = image.TransformContinuousIndexToPhysicalPoint(index.tolist())[0]  # LPS
            assert (left < 0) == (phantom.facts[0].side == "right")
            return
    pytest.fail("no one-sided effusion in twenty phantoms")


def test_ct_series_is_the_volume_for_another_reader(tmp_path, phantom):
    write_ct_series(tmp_path / "ct", phantom.volume_hu, phantom.affine, **WHO)
    reader = SimpleITK.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(tmp_path / "ct"))
    assert len(names) == 32
    reader.SetFileNames(names)
    image = reader.Execute()
    array = SimpleITK.GetArrayFromImage(image)  # sorted by position, which runs from inferior to superior here
    for s, h, w in [(0, 0, 0), (31, 15, 31), (20, 9, 5), (7, 11, 30)]:
        world = (phantom.affine @ [s, h, w, 1])[:3] * [-1, -1, 1]
        at = image.TransformPhysicalPointToIndex(world.tolist())
        assert array[at[::-1]] == phantom.volume_hu[s, h, w]
        assert np.allclose(image.TransformIndexToPhysicalPoint(at), world, atol=1e-3)


def test_uids_hang_on_names_alone():
    assert uid("a", "b") == uid("a", "b") != uid("ab") and uid("a", "b") != uid("a", "c")
    assert pydicom.uid.UID(uid("x")).is_valid


@pytest.mark.parametrize("seed", range(3))
def test_a_projected_phantom_survives_the_file(tmp_path, seed):
    phantom = sample_phantom(np.random.default_rng(seed), 32)
    shot = project(phantom, "PA", np.random.default_rng(seed))
    write_radiograph_dicom(
        tmp_path / "x.dcm", shot.pixels, view=shot.view, spacing_mm=shot.spacing_mm, photometric=shot.photometric, window=shot.window, **WHO
    )
    ds = pydicom.dcmread(tmp_path / "x.dcm")
    pixels = ds.pixel_array if ds.PhotometricInterpretation == "MONOCHROME2" else 4095 - ds.pixel_array
    assert np.array_equal(pixels, shot.pixels)
