"""Inspection records: equal content gives equal hashes in any format and orientation, checked against nibabel, Pillow and pydicom."""

from __future__ import annotations

import hashlib
import json
import zipfile

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from modalities.export import write_ct_series, write_radiograph_dicom
from modalities.inspection import inspect_file, inspect_paths
from tasks.commands.inspect import inspect

AFFINE = np.array([[0, 0, -1.5, 40.0], [0, -2.0, 0, 30], [3.0, 0, 0, -20], [0, 0, 0, 1]])  # (s, h, w) to RAS
NAMES = ("Synthetic^secret", "secret")


@pytest.fixture(scope="module")
def volume():
    rng = np.random.default_rng(0)
    hu = rng.normal(40, 20, (6, 40, 44))
    hu[:, :8] = rng.normal(-1000, 8, (6, 8, 44))
    hu[:, 12:30, 8:30] = rng.normal(-850, 30, (6, 18, 22))
    return np.maximum(hu, -1020).astype(np.int16)  # the writer stores nothing below -1024


def ras_sha256(path):
    image = nib.as_closest_canonical(nib.load(path))
    return hashlib.sha256(np.ascontiguousarray(image.get_fdata(), dtype="<f4").tobytes()).hexdigest(), image


def test_a_series_a_zip_of_it_and_two_nifti_orientations_agree(tmp_path, volume):
    folder = tmp_path / "series"
    write_ct_series(folder, volume, AFFINE, patient_id="secret", study_id="secret")
    straight = tmp_path / "straight.nii.gz"
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), AFFINE[:, [2, 1, 0, 3]]), straight)
    other = tmp_path / "other.nii"
    turned = nib.load(straight).as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "R")))
    nib.save(turned, other)
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    records = [next(inspect_paths(path)) for path in (folder, straight, other, tmp_path / "series.zip")]
    expected, image = ras_sha256(straight)
    for record in records:
        assert record.ok, record.error
        assert (record.kind, record.modality, record.shape) == ("volume", "CT", (44, 40, 6))
        assert record.sha256 == expected
        np.testing.assert_allclose(record.affine, image.affine, atol=1e-4)
        np.testing.assert_allclose(record.spacing_mm, image.header.get_zooms(), atol=1e-4)
        assert record.value_range == (volume.min(), volume.max())
    assert records[0].files == 6


def test_each_file_of_a_series_is_its_own_record_in_order(tmp_path, volume):
    write_ct_series(tmp_path, volume, AFFINE, patient_id="secret", study_id="secret")
    paths = sorted(tmp_path.iterdir(), reverse=True)
    result = CliRunner().invoke(inspect, ["--json", *map(str, paths)])
    assert result.exit_code == 0
    records = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert [record["path"] for record in records] == [str(path) for path in paths]
    for record, plane in zip(records, volume[::-1], strict=True):
        assert record["shape"] == [40, 44]
        assert record["spacing_mm"] == [2.0, 1.5]
        assert record["sha256"] == hashlib.sha256(plane.astype("<f4").tobytes()).hexdigest()
    assert not any(name in result.stdout for name in NAMES)


def test_a_picture_and_a_dicom_of_the_same_values_agree(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 4096, (30, 20)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "film.png")
    write_radiograph_dicom(tmp_path / "film.dcm", pixels, view="PA", spacing_mm=(0.2, 0.2), patient_id="secret", study_id="secret")
    picture, film = (inspect_file(tmp_path / name) for name in ("film.png", "film.dcm"))
    assert picture.sha256 == film.sha256 == hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest()
    assert (film.modality, film.view, film.photometric) == ("DX", "PA", "MONOCHROME2")
    assert film.spacing_mm == (0.2, 0.2)
    assert picture.spacing_mm is None
    assert film.value_range == picture.value_range == (pixels.min(), pixels.max())


def test_what_cannot_be_read_is_one_record_with_the_reason_and_exit_code_1(tmp_path, volume):
    (tmp_path / "text.dcm").write_text("no image")
    (tmp_path / "short.nii").write_bytes(b"\x5c\x01\x00\x00" + b"\0" * 40)
    (tmp_path / "empty").mkdir()
    good = tmp_path / "good.nii"
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), AFFINE[:, [2, 1, 0, 3]]), good)
    paths = [tmp_path / "text.dcm", good, tmp_path / "missing.png", tmp_path / "short.nii", tmp_path / "empty"]
    result = CliRunner().invoke(inspect, ["--json", *map(str, paths)])
    assert result.exit_code == 1
    records = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
    assert [record["ok"] for record in records] == [False, True, False, False, False]
    assert all(record["path"] in record["error"] for record in records if not record["ok"])
    assert len({tuple(record) for record in records}) == 1  # the same keys in all
    shown = CliRunner().invoke(inspect, [str(good), str(paths[0])])
    assert shown.exit_code == 1
    assert "research use, not for diagnosis" in shown.stdout
    assert "text.dcm" in shown.stderr


def test_a_folder_is_grouped_into_series_and_other_images(tmp_path, volume):
    write_ct_series(tmp_path / "ct", volume, AFFINE, patient_id="secret", study_id="secret")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "film.png")
    nib.save(nib.Nifti1Image(volume.transpose(2, 1, 0), AFFINE[:, [2, 1, 0, 3]]), tmp_path / "v.nii.gz")
    records = list(inspect_paths(tmp_path))
    assert sorted((record.kind, record.files) for record in records) == [("image", 1), ("volume", 1), ("volume", 6)]
    assert len({record.sha256 for record in records}) == 2


def test_the_real_chest_agrees_with_nibabel(shared_data):
    path = shared_data / "ct" / "chest_volume" / "chest_ct.nii.gz"
    record = inspect_file(path)
    expected, image = ras_sha256(path)
    assert record.sha256 == expected
    np.testing.assert_allclose(record.affine, image.affine, atol=1e-4)
    assert (record.unit, record.hu_verdict) == ("HU", "ok")


def test_every_zoo_file_is_inspected_or_refused(shared_data):
    for path in sorted((shared_data / "dicom_zoo").glob("*.dcm")):
        record = inspect_file(path)
        assert record.ok == (record.error is None)
        json.dumps(record.to_dict(), allow_nan=False)
        if record.ok:
            assert record.shape is not None and record.sha256 is not None
