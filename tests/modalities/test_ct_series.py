"""DICOM series against SimpleITK's reading of the same files, and every way in which slices can fail to make one volume."""

import zipfile

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medvl.types import UnreadableImageError
from modalities.ct import closest_ras, find_series, read_ct, read_series
from modalities.export import write_ct_series
from modalities.phantom import sample_phantom

SECRET = "SECRET"
LPS = np.diag([-1.0, -1, 1, 1])


@pytest.fixture(scope="module")
def phantom():
    return sample_phantom(np.random.default_rng(4), 32)


def write(folder, volume, affine=None, **changes):
    """A series; ``changes`` are attributes set in every file, or called with the slice's number."""
    affine = np.array([[0, 0, 0.7, -11], [0, 0.8, 0, -200], [2.5, 0, 0, 40], [0, 0, 0, 1.0]]) if affine is None else affine
    write_ct_series(folder, volume, affine, patient_id=f"{SECRET}-ID", study_id=f"{SECRET}-study")
    paths = sorted(folder.glob("*.dcm"))
    if changes:
        for number, path in enumerate(paths):
            edit(path, **{name: value(number) if callable(value) else value for name, value in changes.items()})
    return paths


def edit(path, **changes):
    dataset = pydicom.dcmread(path)
    for name, value in changes.items():
        if value is None:
            if name in dataset:
                delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


def noise(slices=6, shape=(9, 8), seed=0):
    return np.random.default_rng(seed).integers(-1000, 1500, (slices, *shape)).astype(np.int16)


def agrees_with_simpleitk(volume, slices, atol=1e-3):
    """Each slice's HU and pixel-to-mm map against SimpleITK's reading of its file alone."""
    rows, columns = volume.shape[1:]
    for s, item in enumerate(slices):
        image = SimpleITK.ReadImage(str(item.file))
        assert np.array_equal(volume.voxels[s], SimpleITK.GetArrayFromImage(image)[0])
        for h, w in [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)]:
            x, y, z = image.TransformIndexToPhysicalPoint((w, h, 0))
            assert np.allclose(volume.affine @ [s, h, w, 1], [-x, -y, z, 1], atol=atol)


def the_error(call):
    with pytest.raises(UnreadableImageError) as caught:
        call()
    assert SECRET not in str(caught.value).replace("SECRET-dir", "")
    return str(caught.value)


def test_phantom_comes_back(tmp_path, phantom):
    write(tmp_path / "a", phantom.volume_hu, phantom.affine)
    volume = read_ct(tmp_path / "a")
    assert volume.voxels.dtype == np.int16 and volume.warnings == () and volume.repairs == () and volume.hu_verdict.state == "ok"
    assert np.array_equal(volume.voxels, phantom.volume_hu[::-1])  # ascending along the normal, whatever the file's order
    assert np.allclose(volume.affine @ [31, 0, 0, 1], phantom.affine @ [0, 0, 0, 1])
    assert volume.photometric == "MONOCHROME2" and volume.transfer_syntax == "Explicit VR Little Endian"
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "a")))
    image = reader.Execute()
    expected = SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(image, "RAS")).transpose(2, 1, 0)
    values, affine = closest_ras(volume)
    assert np.array_equal(values, expected)
    assert np.allclose((LPS @ affine)[:3, 3], SimpleITK.DICOMOrient(image, "RAS").GetOrigin(), atol=1e-3)


def random_rotation(seed):
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return rotation


@pytest.mark.parametrize("seed", range(6))
def test_any_orientation_and_any_order_of_files(tmp_path, seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = (random_rotation(seed) if seed < 4 else np.eye(3)[rng.permutation(3)]) * [2.5, 0.8, 0.7]
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    order = rng.permutation(6)
    paths = write(tmp_path / "a", noise(seed=seed), affine, InstanceNumber=lambda i: int(order[i]) + 1)
    renamed = [path.rename(path.with_name(f"{order[i]}.dcm")) for i, path in enumerate(paths)]
    (series,) = find_series([renamed[i] for i in order])
    volume = read_series(series)
    assert volume.tilt_deg < 1e-3 and volume.shape == (6, 9, 8)
    agrees_with_simpleitk(volume, series.slices, atol=2e-3)


def test_real_head_is_split_with_its_tilt_and_equals_simpleitk(shared_data):
    folder = shared_data / "ct/ge_series"
    runs = find_series(folder)
    assert [len(run.slices) for run in runs] == [14, 14] and all(not run.problems for run in runs)
    for run, apart in zip(runs, (4.0, 7.0), strict=True):
        volume = read_series(run)
        assert volume.tilt_deg == pytest.approx(18.5, abs=0.01) and volume.spacing_mm[0] * np.cos(np.radians(18.5)) == pytest.approx(
            apart, abs=0.01
        )
        assert any("gantry tilt of 18.5 degrees" in w for w in volume.warnings) and any("not even" in w for w in volume.warnings)
        assert volume.padding_hu == (-1500, -1500) and volume.hu_verdict.state == "ok" and volume.is_oblique
        agrees_with_simpleitk(volume, run.slices)
    message = the_error(lambda: read_ct(folder))
    assert "holds 2 volumes" in message and "tilted by 18.5 degrees" in message
    single = read_ct(folder / "20.dcm")
    assert single.shape == (1, 512, 512) and single.spacing_mm[0] == pytest.approx(7)
    image = SimpleITK.ReadImage(str(folder / "20.dcm"))
    assert np.array_equal(single.voxels, SimpleITK.GetArrayFromImage(image))
    largest = read_ct(folder, "largest")
    assert any("largest of 2" in warning for warning in largest.warnings) and read_ct(folder, 1).spacing_mm[0] == pytest.approx(
        7.38, abs=1e-3
    )


def test_every_ct_of_the_zoo_equals_simpleitk_or_is_refused(shared_data):
    read = 0
    for path in sorted((shared_data / "dicom_zoo").glob("*.dcm")):
        try:
            volume = read_ct(path)
        except UnreadableImageError as error:
            assert str(path) in str(error)
            continue
        read += 1
        expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))  # frames in the order of the file
        assert any(np.array_equal(volume.voxels, frames) for frames in (expected, expected[::-1])), path.name
    assert read >= 5


def test_series_are_told_apart(tmp_path):
    write(tmp_path / "a", noise(), SeriesInstanceUID="1.2.3")
    for path in write(tmp_path / "b", noise(4, seed=1), SeriesInstanceUID="1.2.4", SOPInstanceUID=lambda i: f"1.2.4.{i}"):
        path.rename(tmp_path / "a" / f"b{path.name}")
    found = find_series(tmp_path / "a")
    assert sorted(len(series.slices) for series in found) == [4, 6] and {series.kind for series in found} == {"volume"}
    assert SECRET not in str([series.description for series in found])
    assert np.array_equal(read_ct(tmp_path / "a", "largest").voxels, noise())


def test_orientations_sizes_and_localizers_of_one_series_are_kept_apart(tmp_path):
    coronal = np.array([[0, 0, 0.7, 0], [3, 0, 0, 0], [0, -0.8, 0, 0], [0, 0, 0, 1.0]])
    same = {"SeriesInstanceUID": "1.2.3"}
    write(tmp_path / "a", noise(), **same)
    for name, volume, affine, more in (
        ("b", noise(4, seed=1), coronal, {}),
        ("c", noise(3, (5, 5), 2), None, {}),
        ("d", noise(2, seed=3), None, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
        ("e", noise(1, seed=4), None, {"Modality": "SR"}),
        ("f", noise(1, seed=5), None, {"ImagePositionPatient": None}),
    ):
        for path in write(
            tmp_path / name, volume, affine, SOPInstanceUID=lambda i, name=name: generate_uid(entropy_srcs=[name, str(i)]), **same, **more
        ):
            path.rename(tmp_path / "a" / f"{name}{path.name}")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.dcm").write_bytes(b"\0" * 200)
    (tmp_path / "a" / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 20)
    found = find_series(tmp_path / "a")
    kinds = [(series.kind, len(series.slices)) for series in found]
    assert kinds == [("volume", 6), ("volume", 4), ("volume", 3), ("localizer", 2), ("other", 1), ("other", 1), ("unreadable", 1)]
    assert any("several sizes" in warning for warning in found[0].warnings)
    assert read_series(found[1]).orientation == "LIP" or read_series(found[1]).orientation.count("I") == 1
    for series in found[3:]:
        the_error(lambda series=series: read_series(series))
    assert any("could not be read" in warning for warning in read_ct(tmp_path / "a", 0).warnings)


def test_identical_duplicates_are_left_out_and_told(tmp_path):
    paths = write(tmp_path / "a", noise())
    (tmp_path / "a" / "copy.dcm").write_bytes(paths[2].read_bytes())
    volume = read_ct(tmp_path / "a")
    assert volume.shape == (6, 9, 8) and any("1 duplicate" in warning for warning in volume.warnings)
    assert np.array_equal(volume.voxels, noise())


def test_different_images_at_one_place_are_refused(tmp_path):
    paths = write(tmp_path / "a", noise())
    dataset = pydicom.dcmread(paths[2])
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(tmp_path / "a" / "other.dcm")
    assert "2 different images lie at one place" in the_error(lambda: read_ct(tmp_path / "a"))


@pytest.mark.parametrize(
    "tags",
    [
        ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, {"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}),
        ({"ConvolutionKernel": "B31f"}, {"ConvolutionKernel": "B70f"}),
        ({"AcquisitionTime": lambda i: f"1000{i:02d}.5"}, {"AcquisitionTime": lambda i: f"1001{i:02d}"}),
    ],
)
def test_two_stacks_at_one_place_are_told_apart(tmp_path, tags):
    for name, seed, more in zip("ab", (0, 1), tags, strict=True):
        for path in write(
            tmp_path / name, noise(seed=seed), SOPInstanceUID=lambda i, name=name: generate_uid(entropy_srcs=[name, str(i)]), **more
        ):
            path.rename(tmp_path / f"{name}{path.name}")
    found = find_series(tmp_path)
    assert [series.kind for series in found] == ["volume", "volume"] and all("told apart by" in series.warnings[0] for series in found)
    for series, seed in zip(found, (0, 1), strict=True):
        assert np.array_equal(read_series(series).voxels, noise(seed=seed))


def test_missing_slices_are_refused_or_filled_and_recorded(tmp_path):
    full = noise(12)
    paths = write(tmp_path / "a", full)
    paths[4].unlink()
    message = the_error(lambda: read_ct(tmp_path / "a"))
    assert "1 slice missing in 1 place of a grid of 2.5 mm" in message and "fill_missing=True" in message
    volume = read_ct(tmp_path / "a", fill_missing=True)
    assert volume.shape == (12, 9, 8) and volume.valid_slices.tolist() == [i != 4 for i in range(12)]
    assert "1 missing slices interpolated" in volume.repairs[0]
    assert np.array_equal(volume.voxels[volume.valid_slices], np.delete(full, 4, axis=0))
    assert np.abs(volume.voxels[4] - (full[3].astype(float) + full[5]) / 2).max() <= 0.5
    assert [len(series.slices) for series in find_series(tmp_path / "a", split_gaps=True)] == [4, 7]


def place(step):
    """ImagePositionPatient by slice number, the z of each from ``step``."""
    return lambda i: [-11.0, 200.0, round(float(step(i)), 4)]


def test_uneven_spacing_is_never_silently_evened(tmp_path):
    rng = np.random.default_rng(0)
    jitter = rng.uniform(-0.2, 0.2, 12)
    write(tmp_path / "a", noise(12), ImagePositionPatient=place(lambda i: 2.5 * i + jitter[i]))
    message = the_error(lambda: read_ct(tmp_path / "a"))
    assert "slice spacing runs from" in message and "tolerance_mm" in message
    volume = read_ct(tmp_path / "a", tolerance_mm=0.5)
    assert volume.shape[0] == 12 and "from the even grid" in volume.repairs[0]
    write(tmp_path / "b", noise(12), ImagePositionPatient=place(lambda i: 2.5 * i + 0.004 * (-1) ** i))
    assert read_ct(tmp_path / "b").repairs == ()  # within a hundredth of a millimetre
    write(tmp_path / "c", noise(9), ImagePositionPatient=place(lambda i: i if i < 5 else 4 + 2.6 * (i - 4)))
    runs = find_series(tmp_path / "c")
    assert [len(run.slices) for run in runs] == [5, 4] and all("not even" in run.warnings[0] for run in runs)
    assert [round(read_series(run).spacing_mm[0], 3) for run in runs] == [1, 2.6]


def test_sideways_steps_are_not_evened(tmp_path):
    write(tmp_path / "a", noise(12), ImagePositionPatient=lambda i: [-11.0 + (i == 7) * 3, 200.0, 2.5 * i])
    found = find_series(tmp_path / "a")
    assert len(found) > 1 or found[0].problems


def test_gantry_tilt_is_a_shear(tmp_path):
    write(tmp_path / "a", noise(8), ImagePositionPatient=lambda i: [-11.0, round(200 + 2.5 * i * np.tan(np.radians(15)), 5), 2.5 * i])
    (series,) = find_series(tmp_path / "a")
    volume = read_series(series)
    assert volume.tilt_deg == pytest.approx(15, abs=0.01) and "gantry tilt of 15.0 degrees" in volume.warnings[0]
    agrees_with_simpleitk(volume, series.slices)


def test_each_slice_has_its_own_rescale(tmp_path):
    slopes, intercepts = [1, 2, 0.5, 1, 1, 1], [-1024, -1000, 0, -1024, -8192, 0]
    paths = write(tmp_path / "a", noise(), RescaleSlope=lambda i: str(slopes[i]), RescaleIntercept=lambda i: str(intercepts[i]))
    volume = read_ct(tmp_path / "a")
    assert volume.voxels.dtype == np.float32 and any("by its own" in warning for warning in volume.warnings)
    for s, path in enumerate(paths):
        assert np.array_equal(volume.voxels[s], pydicom.dcmread(path).pixel_array * slopes[s] + np.float32(intercepts[s]))


def test_values_beyond_int16_turn_the_volume_float(tmp_path):
    write(tmp_path / "a", noise(), RescaleSlope=lambda i: "40" if i == 3 else "1")
    volume = read_ct(tmp_path / "a")
    assert volume.voxels.dtype == np.float32 and np.array_equal(volume.voxels[:3], noise()[:3])
    assert np.array_equal(volume.voxels[3], (noise()[3].astype(np.float32) + 1024) * 40 - 1024)


def test_a_missing_or_zero_rescale_is_told(tmp_path, phantom):
    write(tmp_path / "a", phantom.volume_hu, RescaleSlope=None, RescaleIntercept=None)
    volume = read_ct(tmp_path / "a")
    assert volume.hu_verdict.state == "not_rescaled" and any("no usable rescale" in warning for warning in volume.warnings)
    write(tmp_path / "b", noise(), RescaleSlope="0")
    assert any("no usable rescale" in warning for warning in read_ct(tmp_path / "b").warnings)


def test_zip_and_list_equal_the_folder(tmp_path, phantom):
    paths = write(tmp_path / "SECRET-dir", phantom.volume_hu, phantom.affine)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in reversed(paths):
            archive.write(path, f"{SECRET}^NAME/{path.stem}")
        archive.writestr(f"{SECRET}^NAME/notes.txt", "none")
    expected = read_ct(tmp_path / "SECRET-dir")
    for volume in (read_ct(tmp_path / "a.zip"), read_series(find_series(paths)[0]), read_series(find_series([tmp_path / "a.zip"])[0])):
        assert np.array_equal(volume.voxels, expected.voxels) and np.allclose(volume.affine, expected.affine)
    damaged = pydicom.dcmread(paths[3])
    damaged.PixelData = damaged.PixelData[:100]
    damaged.save_as(paths[3])
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for path in paths:
            archive.write(path, f"{SECRET}^NAME/{path.stem}")
    assert "cut short" in the_error(lambda: read_ct(tmp_path / "b.zip"))
    assert "cut short" in the_error(lambda: read_ct(tmp_path / "SECRET-dir"))


def test_compressed_series(tmp_path, phantom):
    paths = write(tmp_path / "a", phantom.volume_hu, phantom.affine)
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.compress(pydicom.uid.RLELossless)
        dataset.save_as(path)
    volume = read_ct(tmp_path / "a")
    assert volume.transfer_syntax == "RLE Lossless" and np.array_equal(volume.voxels, phantom.volume_hu[::-1])


def test_nothing_there(tmp_path):
    assert "holds no DICOM file" in the_error(lambda: find_series(tmp_path))
    the_error(lambda: find_series([]))
    the_error(lambda: read_ct(tmp_path / "absent"))
    (tmp_path / "x.txt").write_text("words")
    the_error(lambda: read_ct(tmp_path / "x.txt"))
    with pytest.raises(ValueError, match="tolerance_mm"):
        find_series(tmp_path, tolerance_mm=0)


def enhanced(path, volume, positions, **per_frame):
    """An Enhanced CT file, frames in the order given; ``per_frame`` functions give slope and intercept by frame."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID, dataset.Modality = "1.2.3", "1.2.4", "CT"
    dataset.PatientName = f"{SECRET}^NAME"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = volume.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([Dataset()]), Sequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence[0].PixelSpacing, shared.PixelMeasuresSequence[0].SliceThickness = [0.8, 0.7], 2.5
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for i, z in enumerate(positions):
        frame = Dataset()
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Sequence([Dataset()]), Sequence([Dataset()])
        frame.PlanePositionSequence[0].ImagePositionPatient = [-11, 200, z]
        frame.PixelValueTransformationSequence[0].RescaleSlope = per_frame.get("slope", lambda i: 1)(i)
        frame.PixelValueTransformationSequence[0].RescaleIntercept = per_frame.get("intercept", lambda i: 0)(i)
        frame.PixelValueTransformationSequence[0].RescaleType = "HU"
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.PixelData = volume.astype("<i2").tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_enhanced_ct(tmp_path):
    order = np.random.default_rng(0).permutation(7)
    path = enhanced(tmp_path / "e.dcm", noise(7)[order], order * 2.5, intercept=lambda i: float(order[i]))
    volume = read_ct(path)
    assert np.array_equal(volume.voxels, noise(7) + np.arange(7)[:, None, None]) and volume.hu_verdict.state == "unknown"
    assert np.allclose(volume.affine, [[0, 0, -0.7, 11], [0, -0.8, 0, -200], [2.5, 0, 0, 0], [0, 0, 0, 1]])
    runs = find_series(enhanced(tmp_path / "u.dcm", noise(8), [0, 1, 2, 3, 10, 13.5, 17, 20.5]))
    assert [len(run.slices) for run in runs] == [4, 4] and runs[0].files == (tmp_path / "u.dcm",)
    assert np.array_equal(read_series(runs[1]).voxels, noise(8)[4:])
    twice = find_series(enhanced(tmp_path / "t.dcm", np.concatenate([noise(4), noise(4)]), [0, 1, 2, 3] * 2))
    assert any("4 duplicates" in warning for warning in twice[0].warnings)
    edit(path, NumberOfFrames=5)
    assert "declares 5 frames and describes 7" in the_error(lambda: read_ct(path))
    edit(path, NumberOfFrames=7, PerFrameFunctionalGroupsSequence=None)
    assert "7 frames without saying where" in the_error(lambda: read_ct(path))


@pytest.mark.parametrize("fragments", [1, 3])
def test_compressed_enhanced_ct(tmp_path, fragments):
    order = np.random.default_rng(1).permutation(7)
    path = enhanced(tmp_path / "e.dcm", noise(7)[order], order * 2.5)
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless)
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=7))
    dataset.PixelData = pydicom.encaps.encapsulate(frames, fragments_per_frame=fragments)
    dataset.save_as(path)
    volume = read_ct(path)
    assert volume.transfer_syntax == "RLE Lossless" and np.array_equal(volume.voxels, pydicom.dcmread(path).pixel_array[np.argsort(order)])


def test_private_functional_groups_place_no_frame(tmp_path):
    path = enhanced(tmp_path / "e.dcm", noise(4), [0, 2.5, 5, 7.5])
    dataset = pydicom.dcmread(path)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        elsewhere = Dataset()
        elsewhere.ImagePositionPatient, elsewhere.RescaleSlope, elsewhere.RescaleIntercept = [0, 0, 99], 7, 7
        frame.add_new(0x00090010, "LO", "VENDOR")
        frame.add_new(0x00091010, "SQ", Sequence([elsewhere]))
    dataset.save_as(path)
    volume = read_ct(path)
    assert np.array_equal(volume.voxels, noise(4)) and volume.spacing_mm[0] == pytest.approx(2.5)


def test_frames_of_two_types_at_one_place_are_told_apart(tmp_path):
    path = enhanced(tmp_path / "e.dcm", np.concatenate([noise(4), noise(4, seed=1)]), [0, 2.5, 5, 7.5] * 2)
    dataset = pydicom.dcmread(path)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "MIXED", "NONE"]
    for i, frame in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        frame.CTImageFrameTypeSequence = Sequence([Dataset()])
        frame.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE" if i < 4 else "ENERGY_PROP_WT"]
    dataset.save_as(path)
    found = find_series(path)
    assert [len(series.slices) for series in found] == [4, 4] and "told apart by image type" in found[0].warnings[0]
    for series, seed in zip(found, (0, 1), strict=True):
        assert np.array_equal(read_series(series).voxels, noise(4, seed=seed))


def test_unused_high_bits_are_no_value(tmp_path):
    """Old files keep overlays there; GDCM and this package clear them."""
    volume = noise(3) // 2
    paths = write(tmp_path / "a", volume, BitsStored=12, HighBit=11, PixelRepresentation=0)
    for path in paths:
        dataset = pydicom.dcmread(path)
        stored = dataset.pixel_array.astype(np.uint16) & 0xFFF
        dataset.PixelData = (stored | 0xA000).astype("<u2").tobytes()
        dataset.save_as(path)
    (series,) = find_series(tmp_path / "a")
    agrees_with_simpleitk(read_series(series), series.slices)


def test_absurd_headers(tmp_path):
    path = write(tmp_path / "a", noise(1))[0]
    for changes in (
        {"Rows": 65535, "Columns": 65535},
        {"Rows": 60000, "Columns": 10000},
        {"BitsAllocated": 12},
        {"PixelSpacing": ["0", "0"]},
        {"PixelSpacing": ["1e9", "1"]},
        {"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]},
        {"SOPClassUID": None, "Rows": None},
        {"PixelData": None},
    ):
        original = path.read_bytes()
        edit(path, **changes)
        the_error(lambda: read_ct(path))
        path.write_bytes(original)


def test_a_modality_lut_makes_hu_alone(tmp_path):
    """A file with a table and, wrongly, a rescale beside it: pydicom takes the table, and so does the 2D chain."""
    from pydicom.dataset import Dataset
    from pydicom.pixels import apply_modality_lut

    from modalities.dicom import read_dicom

    stored = np.random.default_rng(3).integers(0, 64, (3, 9, 8)).astype(np.int16)
    paths = write(tmp_path / "a", stored)
    item = Dataset()
    item.ModalityLUTType = "HU"
    item.add_new("LUTDescriptor", "US", [64, 0, 16])
    item.add_new("LUTData", "US", (np.arange(64) * 3 + 7).tolist())
    for path, plane in zip(paths, stored, strict=True):
        dataset = pydicom.dcmread(path)
        dataset.ModalityLUTSequence = [item]
        dataset.PixelRepresentation, dataset.PixelData = 0, plane.astype("<u2").tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.save_as(path)
    volume = read_ct(tmp_path / "a")
    by_file = {round(float(pydicom.dcmread(path).ImagePositionPatient[2]), 3): path for path in paths}
    for s in range(3):
        path = by_file[round(float((volume.affine @ [s, 0, 0, 1])[2]), 3)]
        dataset = pydicom.dcmread(path)
        np.testing.assert_array_equal(volume.voxels[s], apply_modality_lut(dataset.pixel_array, dataset))
        np.testing.assert_array_equal(volume.voxels[s], read_dicom(path).values)
