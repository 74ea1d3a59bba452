"""Map objects read back by highdicom, pydicom, SimpleITK and dciodvfy, and compared with numpy arrays and headers of their sources."""

import dataclasses
import datetime
import logging
import math
import re
import shutil
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvl.types import UnreadableImageError
from modalities.ct import CtReader, read_ct
from modalities.export import write_ct_series, write_nifti, write_radiograph_dicom
from modalities.map_objects import Algorithm, MapFinding, write_map_objects
from modalities.map_objects.report import box_corners, box_outline
from modalities.structured_report import Concept
from modalities.xray import XrayReader

highdicom = pytest.importorskip("highdicom", reason="needs highdicom (extra 'sr')")

ALGORITHM = Algorithm("demo tower", "ab12" * 16, "9.8.7")
EFFUSION = Concept("60046008", "SCT", "Pleural effusion")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING = (0.21, 0.34)
FILM = (24, 20)
PATIENT = {
    "PatientName": "Secret^Person",
    "PatientID": "SECRET-ID-7",
    "PatientBirthDate": "19500203",
    "StudyDate": "20110506",
    "StudyTime": "101112",
    "AccessionNumber": "SECRETACC",
    "ReferringPhysicianName": "Secret^Doctor",
}


def change(path, drop=(), **values):
    ds = pydicom.dcmread(path)
    for name in drop:
        delattr(ds, name)
    for name, value in values.items():
        setattr(ds, name, value)
    ds.save_as(path)
    return path


@pytest.fixture
def film(tmp_path):
    """A radiograph of unequal spacing."""
    path = tmp_path / "film.dcm"
    pixels = np.random.default_rng(0).integers(0, 4096, FILM).astype(np.uint16)
    write_radiograph_dicom(path, pixels, view="PA", spacing_mm=SPACING, patient_id="syn-p", study_id="syn-s")
    return change(path, **PATIENT)


def turned():
    """An affine (s, h, w) to RAS mm of slices that are oblique about two axes, unequally spaced."""
    a, b = 0.3, -0.2
    x = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    z = np.array([[math.cos(b), -math.sin(b), 0], [math.sin(b), math.cos(b), 0], [0, 0, 1]])
    axes = (z @ x) @ np.array([[0, 0, -0.7], [0, -0.9, 0], [2.5, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, (31.5, -12.25, 7.125)
    return affine


def sheared():
    """As a tilted gantry gives: the step from slice to slice is not at right angles to them."""
    return np.array([[0, 0, -0.7, 10.0], [0.4, -0.9, 0, 20.0], [2.5, 0, 0, -30.0], [0, 0, 0, 1]])


STRAIGHT = np.array([[0, 0, -0.7, 10.0], [0, -0.9, 0, 20.0], [2.5, 0, 0, -30.0], [0, 0, 0, 1]])
AFFINES = {
    "straight": STRAIGHT,
    "downwards": STRAIGHT @ np.array([[-1.0, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "oblique": turned(),
    "tilted": sheared(),
    "sagittal": np.array([[3.0, 0, 0, -5], [0, 0, -0.7, 0], [0, -0.9, 0, 60], [0, 0, 0, 1]]),
}
CT = (5, 9, 11)


def write_series(folder, affine, shape=CT):
    """A series with a date whose file names and numbers tell nothing of the order, beside a localizer and a shorter series."""
    write_ct_series(folder, np.zeros(shape, np.int16), affine, patient_id="syn-p", study_id="syn-s")
    order = np.random.default_rng(3).permutation(shape[0])
    for k, path in enumerate(sorted(folder.glob("*.dcm"))):
        change(path, **PATIENT, InstanceNumber=str(int(order[k]) + 1)).rename(folder / f"x{order[k]}.dcm")
    for k in range(2):
        path = shutil.copy(folder / "x0.dcm", folder / f"a{k}.dcm")
        position = [float(v) + 50 * k for v in pydicom.dcmread(path).ImagePositionPatient]
        change(path, SeriesInstanceUID="1.2.3.4", SOPInstanceUID=f"1.2.3.4.{k}", ImagePositionPatient=position)
    shutil.copy(folder / "x1.dcm", folder / "scout.dcm")
    change(folder / "scout.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SOPInstanceUID="1.2.3.5", SeriesInstanceUID="1.2.3")
    return folder


def finding(shape, slug, seed=0, found=True, **more):
    """Random scores with a margin that was not seen; a mask of two blocks and their boxes where found."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-1, 1, shape).astype(np.float32)
    scores[..., :3] = np.nan
    mask, boxes = np.zeros(shape, bool), []
    if found:
        for low, high in ((1, 3), (4, 5)):
            mask[(..., slice(low, high), slice(low + 2, high + 3))] = True
            start, end = [low] * len(shape), [high] * len(shape)
            boxes.append((tuple(v - 0.5 for v in start), tuple(v - 0.5 for v in end)))
        mask[0] = False
    peak = tuple(int(i) for i in np.unravel_index(np.nanargmax(scores), shape))
    values = {"score": 0.375, "threshold": 0.25, "found": found} | more
    return MapFinding(f"phrase of {slug}", slug, scores, mask, tuple(boxes), peak, **values)


def same(found, expected):
    """Bit for bit, NaN included."""
    return found.shape == expected.shape and np.asarray(found, "<f4").tobytes() == np.asarray(expected, "<f4").tobytes()


def raw(path):
    """(frames, rows, columns) of a parametric map by numpy on the bytes."""
    ds = pydicom.dcmread(path)
    return np.frombuffer(ds.FloatPixelData, "<f4").reshape(ds.NumberOfFrames, ds.Rows, ds.Columns)


def walk(item):
    for child in item.get("ContentSequence", []):
        yield child
        yield from walk(child)


def code(item):
    return item.get("CodeValue") or item.LongCodeValue


def named(group, name):
    return [item for item in group.ContentSequence if code(item.ConceptNameCodeSequence[0]) == name]


def groups(path):
    """Tracking identifier -> measurement group, by highdicom."""
    report = highdicom.sr.srread(path)
    return {group.tracking_identifier: group for group in report.content.get_image_measurement_groups()}


def validate(path, kind):
    """What dciodvfy finds wrong with a file."""
    validator = shutil.which("dciodvfy")
    if validator is None:
        pytest.skip("needs dciodvfy (package dicom3tools)")
    done = subprocess.run([validator, str(path)], capture_output=True, text=True, errors="replace", timeout=60)
    lines = (done.stdout + done.stderr).splitlines()
    assert kind in lines  # it has been recognised
    known = r"99MEDVL|<QUANTITY>|DICOMDIR|Retired Person Name"
    return [line for line in lines if "Error" in line or ("Warning" in line and not re.search(known, line))]


def check_valid(written, only="Error|Warning"):
    kinds = [(path, "ParametricMap") for path in written.maps] + [(written.report, "Comprehensive3DSR")]
    kinds += [] if written.segmentation is None else [(written.segmentation, "Segmentation")]
    for path, kind in kinds:
        assert [line for line in validate(path, kind) if re.match(only, line)] == []


# --- films ---------------------------------------------------------------------------------------------------------------------------


def test_a_film_has_maps_segments_and_findings_of_its_pixels(film, tmp_path):
    scores = (finding(FILM, "one", concept=EFFUSION, probability=0.75), finding(FILM, "two", 1, found=False), finding(FILM, "three", 2))
    assert XrayReader(32).native(film).shape == FILM
    written = write_map_objects(film, scores, tmp_path / "out", affine=None, algorithm=ALGORITHM)
    assert [path.name for path in written.maps] == ["one_map.dcm", "two_map.dcm", "three_map.dcm"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(path.name for path in written.maps), "segmentation.dcm", "findings.dcm"]
    )
    source = pydicom.dcmread(film)
    for one, path in zip(scores, written.maps, strict=True):
        read = highdicom.imread(path)
        assert same(read.get_frames(apply_real_world_transform=False, dtype=np.float32)[0], one.scores) and same(raw(path)[0], one.scores)
        mapped = read.get_frames(apply_real_world_transform=True)[0]
        assert np.array_equal(mapped, one.scores.astype(np.float64), equal_nan=True)
        assert math.isnan(read.FloatPixelPaddingValue) and math.isnan(read.FloatPixelPaddingRangeLimit)
        volume = read.get_volume(apply_real_world_transform=False)
        expected = np.array([[0, SPACING[1], 0], [0, 0, 0], [-SPACING[0], 0, 0]])  # L along a row, F down a column
        assert np.allclose(volume.affine[:3, [1, 2]], expected[:, [0, 1]]) and np.allclose(volume.affine[:3, 3], 0)
        mapping = read.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
        ends = mapping.DoubleFloatRealWorldValueFirstValueMapped, mapping.DoubleFloatRealWorldValueLastValueMapped
        assert ends == (-1, 1) and (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
        assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "1"
        assert code(mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]) == "map_cosine"
        assert (read.ContentQualification, read.ContentDescription) == ("RESEARCH", one.phrase)
        (image,) = read.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID and image.SpatialLocationsPreserved == "YES"
    segments = highdicom.seg.segread(written.segmentation)
    pixels = segments.get_pixels_by_source_instance([source.SOPInstanceUID])
    assert np.array_equal(pixels[0].astype(bool), np.stack([scores[0].mask, scores[2].mask], axis=-1))
    assert "FrameOfReferenceUID" not in segments
    first, second = (segments.get_segment_description(i) for i in segments.segment_numbers)
    assert (first.segment_label, first.segmented_property_type.value) == ("phrase of one", "60046008")
    assert second.segmented_property_type.scheme_designator == "99MEDVL"
    assert (
        first.algorithm_type.value == "AUTOMATIC" and "ab12ab12" in first.SegmentationAlgorithmIdentificationSequence[0].AlgorithmParameters
    )
    for path in (*written.maps, written.segmentation, written.report):
        ds = pydicom.dcmread(path)
        assert all(ds[name].value == source[name].value for name in (*PATIENT, "StudyInstanceUID"))
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID and "not for diagnosis" in ds.SeriesDescription
        assert ds.ContentDate == "20110506"
    check_valid(written)


def test_the_report_of_a_film_says_what_was_found_and_where(film, tmp_path):
    scores = (finding(FILM, "one", concept=EFFUSION, probability=0.75), finding(FILM, "two", 1, found=False), finding(FILM, "open", 2))
    scores = (*scores[:2], dataclasses.replace(scores[2], found=None, threshold=None, score=None, peak=None))
    written = write_map_objects(film, scores, tmp_path, affine=None, algorithm=ALGORITHM)
    source, read = pydicom.dcmread(film), groups(written.report)
    report = pydicom.dcmread(written.report)
    assert list(read) == [one.phrase for one in scores]
    assert (report.CompletionFlag, report.VerificationFlag) == ("PARTIAL", "UNVERIFIED")
    texts = [item.TextValue for item in walk(report) if item.ValueType == "TEXT"]
    assert "research use, not for diagnosis" in texts and ALGORITHM.model in texts and "ab12" * 4 in texts
    first, absent, undecided = read.values()
    values = {one.name.value: (one.value, one.unit.value) for one in first.get_measurements()}
    assert values == {"sr_map_score": (0.375, "1"), "sr_threshold": (0.25, "1"), "sr_map_prob": (0.75, "1")}
    assert first.finding_type.value == "60046008"
    told = [{one.name.value: one.value.meaning for one in group.get_qualitative_evaluations()} for group in read.values()]
    assert told == [{"sr_found": "Yes", "sr_presence": "Present"}, {"sr_found": "No", "sr_presence": "Absent"}, {}]
    regions = named(first[0], "111030")
    for item, (low, high) in zip(regions, scores[0].boxes, strict=True):
        # edges of native indices plus a half: columns first, the top left corner of the film at (0, 0)
        columns, rows = {v + 0.5 for v in (low[1], high[1])}, {v + 0.5 for v in (low[0], high[0])}
        assert item.GraphicType == "POLYLINE" and set(item.value[:, 0]) == columns and set(item.value[:, 1]) == rows
        assert len(item.value) == 5 and (item.value[0] == item.value[-1]).all()
        assert item.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    (peak,) = named(first[0], "sr_peak")
    row, column = np.argwhere(scores[0].scores == np.nanmax(scores[0].scores))[0]
    assert peak.GraphicType == "POINT" and peak.value.tolist() == [[column + 0.5, row + 0.5]]
    assert not named(absent[0], "111030") and named(absent[0], "sr_peak") and not named(absent[0], "121191")
    assert not named(undecided[0], "sr_peak") and undecided.get_measurements() == []
    segments = pydicom.dcmread(written.segmentation)
    for number, (group, path) in enumerate(((first, written.maps[0]), (undecided, written.maps[2])), start=1):
        (reference,) = (item.ReferencedSOPSequence[0] for item in named(group[0], "121191"))
        assert (reference.ReferencedSOPInstanceUID, reference.ReferencedSegmentNumber) == (segments.SOPInstanceUID, number)
        (reference,) = (item.ReferencedSOPSequence[0] for item in named(group[0], "sr_map"))
        assert reference.ReferencedSOPInstanceUID == pydicom.dcmread(path).SOPInstanceUID
        assert segments.SegmentSequence[number - 1].TrackingUID == group.tracking_uid
    check_valid(written)


def test_where_nothing_is_found_there_is_no_segmentation(film, tmp_path):
    write_map_objects(film, [finding(FILM, "one")], tmp_path, affine=None, algorithm=ALGORITHM)
    assert (tmp_path / "segmentation.dcm").exists()
    written = write_map_objects(film, [finding(FILM, "one", found=False)], tmp_path, affine=None, algorithm=ALGORITHM)
    assert written.segmentation is None and not (tmp_path / "segmentation.dcm").exists()
    check_valid(written)


def test_a_film_without_known_sides_gets_none(film, tmp_path):
    for letters in (["", ""], ["L", "R"], ["X", "F"]):
        change(film, PatientOrientation=letters)
        written = write_map_objects(film, [finding(FILM, "one")], tmp_path / "out", affine=None, algorithm=ALGORITHM)
        assert same(raw(written.maps[0])[0], finding(FILM, "one").scores)
        assert not any(words in str(pydicom.dcmread(written.maps[0])) for words in ("Image Position", "Image Orientation"))
        read = highdicom.imread(written.maps[0]).get_frames(apply_real_world_transform=False, dtype=np.float32)
        assert same(read, raw(written.maps[0]))
        check_valid(written)


def test_a_film_without_spacing_gets_none(film, tmp_path):
    change(film, drop=["PixelSpacing", "ImagerPixelSpacing"], PixelAspectRatio=["3", "4"])
    written = write_map_objects(film, [finding(FILM, "one")], tmp_path, affine=None, algorithm=ALGORITHM)
    for path in (written.maps[0], written.segmentation):
        assert "Pixel Spacing" not in str(pydicom.dcmread(path))
    assert list(pydicom.dcmread(written.segmentation).PixelAspectRatio) == [3, 4]
    check_valid(written)


# --- volumes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AFFINES)
def test_each_slice_of_a_map_lies_on_its_instance(tmp_path, name):
    folder = write_series(tmp_path / "ct", AFFINES[name])
    volume = read_ct(folder, "largest")
    assert volume.shape == CT and CtReader(crop="none").native(folder).shape == CT
    scores = (finding(CT, "one"), finding(CT, "two", 1, found=False))
    written = write_map_objects(folder, scores, tmp_path / "out", affine=volume.affine, algorithm=ALGORITHM)
    check_valid(written)
    lps = LPS @ volume.affine
    headers = [pydicom.dcmread(path) for path in folder.glob("x*.dcm")]
    near = [
        min(headers, key=lambda ds, k=k: np.linalg.norm(np.array(ds.ImagePositionPatient, float) - lps[:3, 3] - k * lps[:3, 0]))
        for k in range(5)
    ]
    assert len({ds.SOPInstanceUID for ds in near}) == 5  # the slice that lies where the affine has plane k
    for one, path in zip(scores, written.maps, strict=True):
        ds = pydicom.dcmread(path)
        assert same(raw(path), one.scores)
        for k, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
            (image,) = group.DerivationImageSequence[0].SourceImageSequence
            assert image.ReferencedSOPInstanceUID == near[k].SOPInstanceUID
            assert np.allclose(group.PlanePositionSequence[0].ImagePositionPatient, near[k].ImagePositionPatient, atol=1e-6)
        assert ds.FrameOfReferenceUID == near[0].FrameOfReferenceUID
        if name != "tilted":  # highdicom has no volumes whose slices are not above one another
            read = highdicom.imread(path).get_volume(apply_real_world_transform=False, dtype=np.float32)
            back = read.match_geometry(highdicom.VolumeGeometry(lps, CT, coordinate_system="PATIENT"))
            assert same(back.array, one.scores) and np.allclose(back.affine, lps, atol=1e-5)
    segments = highdicom.seg.segread(written.segmentation)
    assert segments.NumberOfFrames == 4  # the first slice has no pixel of it
    pixels = segments.get_pixels_by_source_instance([ds.SOPInstanceUID for ds in near], assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels[..., 0].astype(bool), scores[0].mask)
    group = groups(written.report)["phrase of one"]
    for item, (low, high) in zip(named(group[0], "sr_box"), scores[0].boxes, strict=True):
        corners = [lps @ [s, h, w, 1] for s in (low[0], high[0]) for h in (low[1], high[1]) for w in (low[2], high[2])]
        assert item.GraphicType == "MULTIPOINT" and np.allclose(item.value, np.array(corners)[:, :3], atol=1e-5)
        assert item.ReferencedFrameOfReferenceUID == near[0].FrameOfReferenceUID
    (peak,) = named(group[0], "sr_peak")
    s, h, w = np.argwhere(scores[0].scores == np.nanmax(scores[0].scores))[0]
    slice_header = near[s]  # by PS3.3 C.7.6.2.1.1, from the header of that instance
    row, column = (np.array(part, float) for part in np.split(np.array(slice_header.ImageOrientationPatient), 2))
    down, across = (float(step) for step in slice_header.PixelSpacing)
    expected = np.array(slice_header.ImagePositionPatient, float) + row * across * w + column * down * h
    assert np.allclose(peak.value[0], expected, atol=1e-4)
    (reference,) = (item.ReferencedSOPSequence[0] for item in named(group[0], "121191"))
    assert reference.ReferencedSOPInstanceUID == segments.SOPInstanceUID
    report = pydicom.dcmread(written.report)
    images = {item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for item in walk(report) if item.ValueType == "IMAGE"}
    assert images >= {ds.SOPInstanceUID for ds in near} and "1.2.3.4.0" not in images


def test_simpleitk_has_masks_and_places_as_they_are(tmp_path):
    """Of segmentations with a multiple of 8 pixels a frame, which its reader takes each to begin on a byte; float maps it cannot read."""
    sitk = pytest.importorskip("SimpleITK", reason="needs SimpleITK (extra 'itk')")
    shape = (5, 8, 11)
    folder = write_series(tmp_path / "ct", AFFINES["oblique"], shape)
    volume = read_ct(folder, "largest")
    one = finding(shape, "one")
    written = write_map_objects(folder, [one], tmp_path / "out", affine=volume.affine, algorithm=ALGORITHM)
    image = sitk.ReadImage(str(written.segmentation))
    assert np.array_equal(sitk.GetArrayFromImage(image) > 0, one.mask[1:])
    lps = LPS @ volume.affine
    for index in ((0, 0, 0), (3, 7, 10), (1, 4, 2)):
        place = image.TransformIndexToPhysicalPoint((index[2], index[1], index[0]))
        assert np.allclose(place, (lps @ [index[0] + 1, *index[1:], 1])[:3], atol=1e-4)


def test_folder_zip_and_series_number_give_the_same(tmp_path):
    folder = write_series(tmp_path / "ct", AFFINES["downwards"])
    with zipfile.ZipFile(tmp_path / "ct.zip", "w") as archive:
        for path in sorted(folder.iterdir(), reverse=True):
            archive.write(path, path.name)
    volume = read_ct(folder, "largest")
    one = finding(CT, "one")
    for k, (source, series) in enumerate(((folder, "largest"), (tmp_path / "ct.zip", "largest"), (folder, 1))):
        write_map_objects(source, [one], tmp_path / str(k), affine=volume.affine, algorithm=ALGORITHM, series=series)
    for name in ("one_map.dcm", "segmentation.dcm", "findings.dcm"):
        assert len({(tmp_path / str(k) / name).read_bytes() for k in range(3)}) == 1
    with pytest.raises(ValueError, match="ct: 2 x 9 x 11 voxels of DICOM cannot carry a map of 5 x 9 x 11"):
        write_map_objects(folder, [one], tmp_path / "out", affine=volume.affine, algorithm=ALGORITHM, series=0)


def test_objects_beside_their_source_are_no_source(tmp_path):
    folder = write_series(tmp_path / "ct", AFFINES["straight"])
    affine = read_ct(folder, "largest").affine
    written = write_map_objects(folder, [finding(CT, "one")], folder, affine=affine, algorithm=ALGORITHM)
    first = [path.read_bytes() for path in (*written.maps, written.segmentation, written.report)]
    assert np.array_equal(read_ct(folder, "largest").affine, affine)
    written = write_map_objects(folder, [finding(CT, "one")], folder, affine=affine, algorithm=ALGORITHM)
    assert first == [path.read_bytes() for path in (*written.maps, written.segmentation, written.report)]


def test_one_slice_is_a_volume_of_one(tmp_path):
    folder = tmp_path / "ct"
    write_ct_series(folder, np.zeros((1, 9, 11), np.int16), AFFINES["oblique"], patient_id="syn-p", study_id="syn-s")
    change(folder / "0001.dcm", drop=["FrameOfReferenceUID"])
    volume = read_ct(folder / "0001.dcm")
    one = finding(volume.shape, "one", found=None)
    one.mask[0, 2:4, 5:] = True
    written = write_map_objects(folder / "0001.dcm", [one], tmp_path / "out", affine=volume.affine, algorithm=ALGORITHM)
    assert same(raw(written.maps[0]), one.scores)
    headers = [pydicom.dcmread(path) for path in (*written.maps, written.segmentation)]
    (peak,) = named(groups(written.report)["phrase of one"][0], "sr_peak")
    assert len({ds.FrameOfReferenceUID for ds in headers} | {peak.ReferencedFrameOfReferenceUID}) == 1
    segments = highdicom.seg.segread(written.segmentation)
    pixels = segments.get_pixels_by_source_instance([pydicom.dcmread(folder / "0001.dcm").SOPInstanceUID])
    assert np.array_equal(pixels[..., 0].astype(bool), one.mask)
    check_valid(written)


def test_maps_that_do_not_lie_on_slices_are_refused(tmp_path):
    folder = write_series(tmp_path / "ct", AFFINES["oblique"])
    affine = read_ct(folder, "largest").affine

    def refuse(words, shape=CT, affine=affine):
        with pytest.raises(ValueError, match=words) as error:
            write_map_objects(folder, [finding(shape, "one")], tmp_path / "out", affine=affine, algorithm=ALGORITHM)
        assert "secret" not in str(error.value).lower() and not (tmp_path / "out").exists()

    shift, flip = np.eye(4), np.diag([-1.0, 1, 1, 1])
    shift[0, 3], flip[0, 3] = 0.1, 4
    refuse(r"slice 0 lies 10 mm from where", affine=affine @ flip)  # the slices backwards
    refuse(r"slice 0 lies 0.25 mm from where", affine=affine @ shift)
    refuse(r"pixel \(8, 0\) of slice 0 lies", affine=affine @ np.diag([1, 1.01, 1, 1]))
    refuse("5 x 9 x 11 voxels of DICOM cannot carry a map of 6 x 9 x 11", shape=(6, 9, 11))
    refuse("with one, got shape", affine=None)
    refuse("affine has shape", affine=np.eye(3))
    middle = sorted(folder.glob("x*.dcm"), key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))[2]
    middle.unlink()  # what is filled in for it is no instance
    refuse("4 x 9 x 11 voxels of DICOM cannot carry a map of 5 x 9 x 11: 1 slice missing in 1 place")


# --- both ----------------------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_boxes_are_drawn_where_numpy_has_their_pixels(data):
    rows, columns = data.draw(st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
    top, left = data.draw(st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1)))
    bottom, right = data.draw(st.tuples(st.integers(top, rows - 1), st.integers(left, columns - 1)))
    outline = box_outline(((top - 0.5, left - 0.5), (bottom + 0.5, right + 0.5))).astype(np.float32)
    mask = np.zeros((rows, columns), bool)
    mask[top : bottom + 1, left : right + 1] = True
    x, y = outline[:, 0], outline[:, 1]
    assert outline.min() >= 0 and x.max() <= columns and y.max() <= rows  # within the image, PS3.3 C.18.6.1.1
    area = abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1], dtype=np.float64)) / 2
    assert area == mask.sum()
    inside = [(c + 0.5, r + 0.5) for r, c in ((top, left), (bottom, right))]  # centres of its first and last pixel
    assert all(x.min() < c < x.max() and y.min() < r < y.max() for c, r in inside)


@given(
    st.lists(st.floats(-3, 3), min_size=9, max_size=9)
    .map(lambda v: np.array(v).reshape(3, 3))
    .filter(lambda m: abs(np.linalg.det(m)) > 0.1),
    st.tuples(*[st.floats(-500, 500)] * 3),
    st.tuples(*[st.tuples(st.integers(0, 50), st.integers(1, 50))] * 3),
)
def test_corners_in_space_are_those_of_the_voxels(matrix, origin, ends):
    low, high = tuple(a - 0.5 for a, _ in ends), tuple(a + n - 0.5 for a, n in ends)
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = matrix, origin
    corners = box_corners((low, high), lps)
    back = np.linalg.solve(matrix, (corners - np.array(origin)).T).T  # index coordinates again
    assert {tuple(v) for v in np.round(2 * back).astype(int).tolist()} == {
        (a, b, c) for a in (2 * low[0], 2 * high[0]) for b in (2 * low[1], 2 * high[1]) for c in (2 * low[2], 2 * high[2])
    }
    assert np.allclose(corners.mean(axis=0), matrix @ ((np.array(low) + high) / 2) + origin, atol=1e-6)


def test_equal_input_gives_equal_bytes_and_other_input_other_instances(film, tmp_path):
    one = finding(FILM, "one")

    def write(name, change=None, algorithm=ALGORITHM, **more):
        found = one if change is None else dataclasses.replace(one, **change)
        return write_map_objects(film, [found], tmp_path / name, affine=None, algorithm=algorithm, **more)

    first, again = write("first"), write("again")
    for name in ("one_map.dcm", "segmentation.dcm", "findings.dcm"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert first.report != again.report
    other = one.scores.copy()
    other[10, 10] += 1e-6
    others = [
        write("scores", {"scores": other}),
        write("mask", {"mask": one.mask | (one.scores > 0.5)}),
        write("boxes", {"boxes": one.boxes[:1]}),
        write("score", {"score": 0.25}),
        write("concept", {"concept": EFFUSION}),
        write("weights", algorithm=dataclasses.replace(ALGORITHM, weights_sha256="cd" * 32)),
        write("measure", measure="probability"),
        write("date", written=datetime.datetime(2020, 1, 2)),
    ]
    for part in ("maps", "segmentation", "report"):
        paths = [getattr(one, part) for one in (first, *others)]
        headers = [pydicom.dcmread(path[0] if isinstance(path, tuple) else path) for path in paths]
        assert len({ds.SOPInstanceUID for ds in headers}) == len({ds.SeriesInstanceUID for ds in headers}) == len(headers)
    quantity = pydicom.dcmread(others[6].maps[0]).SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert code(quantity.QuantityDefinitionSequence[0].ConceptCodeSequence[0]) == "map_probability"


def test_without_a_date_the_report_says_so(film, tmp_path):
    change(film, StudyDate="", StudyTime="")
    written = write_map_objects(film, [finding(FILM, "one")], tmp_path, affine=None, algorithm=ALGORITHM)
    assert any("not known" in item.TextValue for item in walk(pydicom.dcmread(written.report)) if item.ValueType == "TEXT")
    check_valid(written)


def test_phrases_are_free_text_and_labels_short(film, tmp_path):
    phrase = "Ein Erguß\nlinks \\ 左胸水 " + "very " * 40
    one = dataclasses.replace(finding(FILM, "one"), phrase=phrase)
    written = write_map_objects(film, [one], tmp_path, affine=None, algorithm=ALGORITHM)
    (segment,) = pydicom.dcmread(written.segmentation).SegmentSequence
    assert segment.SegmentLabel.startswith("Ein Erguß links / 左胸水 very") and 60 <= len(segment.SegmentLabel.encode()) <= 64
    assert segment.SegmentDescription == " ".join(phrase.replace("\\", "/").split())
    assert pydicom.dcmread(written.maps[0]).ContentDescription == segment.SegmentLabel
    check_valid(written)


def test_segments_that_share_pixels_say_so(film, tmp_path):
    one, two = finding(FILM, "one"), finding(FILM, "two")
    apart = dataclasses.replace(two, mask=np.roll(one.mask, 8, axis=0))
    for found, told in (([one, two], "YES"), ([one, apart], "NO"), ([one], "NO")):
        written = write_map_objects(film, found, tmp_path, affine=None, algorithm=ALGORITHM)
        assert pydicom.dcmread(written.segmentation).SegmentsOverlap == told
    assert not (one.mask & apart.mask).any()


def test_a_map_that_nothing_was_seen_of(film, tmp_path):
    one = dataclasses.replace(finding(FILM, "one", found=False), scores=np.full(FILM, np.nan, np.float32), peak=None)
    written = write_map_objects(film, [one], tmp_path, affine=None, algorithm=ALGORITHM)
    assert np.isnan(raw(written.maps[0])).all()
    check_valid(written)


def test_sources_that_are_no_dicom_are_refused(film, tmp_path):
    from PIL import Image

    Image.new("L", FILM[::-1]).save(tmp_path / "film.png")
    write_nifti(tmp_path / "volume.nii.gz", np.zeros(CT, np.int16), STRAIGHT)
    with zipfile.ZipFile(tmp_path / "volume.zip", "w") as archive:
        archive.write(tmp_path / "volume.nii.gz", "volume.nii.gz")
    (tmp_path / "empty").mkdir()
    for name, shape, affine in (
        ("film.png", FILM, None),
        ("volume.nii.gz", CT, STRAIGHT),
        ("volume.zip", CT, STRAIGHT),
        ("empty", CT, STRAIGHT),
        ("absent.dcm", CT, STRAIGHT),
        ("film.dcm", CT, STRAIGHT),  # no CT
    ):
        with pytest.raises(ValueError, match=rf"{name}: a map as DICOM \(--dicom\) needs DICOM sources"):
            write_map_objects(tmp_path / name, [finding(shape, "one")], tmp_path / "out", affine=affine, algorithm=ALGORITHM)
    for name, words in (("empty", "this is a folder"), ("absent.dcm", "this is not there")):
        with pytest.raises(ValueError, match=words):
            write_map_objects(tmp_path / name, [finding(FILM, "one")], tmp_path / "out", affine=None, algorithm=ALGORITHM)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_without_a_word_of_the_header(film, tmp_path):
    one = finding(FILM, "one")

    def refuse(words, *findings, algorithm=ALGORITHM):
        with pytest.raises(ValueError, match=words) as error:
            write_map_objects(film, findings, tmp_path / "out", affine=None, algorithm=algorithm)
        assert "secret" not in str(error.value).lower() and not (tmp_path / "out").exists()

    def but(**values):
        return dataclasses.replace(one, **values)

    refuse("at least one phrase")
    refuse("has 24 x 20 pixels, the map 20 x 24", finding((20, 24), "one"))
    refuse("file names that differ", one, one)
    refuse("file names that differ", but(slug="../one"))
    refuse("phrase is empty", but(phrase=" "))
    refuse("expected both", one, finding((20, 24), "two"))
    refuse("expected float32 and bool", but(scores=one.scores.astype(np.float64)))
    refuse("infinite", but(scores=np.full(FILM, np.inf, np.float32)))
    refuse("not found, but has a mask", but(found=False))
    refuse("no finite number", but(score=math.nan))
    refuse("expected 0 to 1", but(probability=1.5))
    refuse("no box of 2 axes", but(boxes=(((0.5, 0.5), (24.5, 3.5)),)))
    refuse("no box of 2 axes", but(boxes=(((2.5, 0.5), (2.5, 3.5)),)))
    refuse("no index", but(peak=(24, 0)))
    with pytest.raises(ValueError, match="without affine"):
        write_map_objects(film, [one], tmp_path / "out", affine=STRAIGHT, algorithm=ALGORITHM)
    refuse("weights_sha256 is empty", one, algorithm=dataclasses.replace(ALGORITHM, weights_sha256=" "))
    change(film, NumberOfFrames="2")
    refuse("holds 2 frames", one)
    change(film, drop=["NumberOfFrames"], StudyInstanceUID="removed")
    refuse("no usable StudyInstanceUID", one)


def test_nothing_of_a_header_is_logged(film, tmp_path, caplog):
    change(film, PatientName="Secret", PatientID="SECRET" * 20)
    caplog.clear()
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        write_map_objects(film, [finding(FILM, "one")], tmp_path / "out", affine=None, algorithm=ALGORITHM)
    assert "secret" not in caplog.text.lower()


def test_without_highdicom_the_extra_is_named(film, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom.sr", None)
    with pytest.raises(ImportError, match=r"medvl\[sr\]"):
        write_map_objects(film, [finding(FILM, "one")], tmp_path / "out", affine=None, algorithm=ALGORITHM)


def test_dciodvfy_would_find_an_error(film, tmp_path):
    written = write_map_objects(film, [finding(FILM, "one")], tmp_path, affine=None, algorithm=ALGORITHM)
    assert validate(change(written.maps[0], drop=["ContentLabel"]), "ParametricMap")
    assert validate(change(written.segmentation, drop=["SegmentSequence"]), "Segmentation")


# --- real images ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RG1_J2KI", "RG3_J2KI"])
def test_real_films(shared_data, tmp_path, name):
    path = shared_data / "dicom_zoo" / f"{name}.dcm"
    shape = tuple(XrayReader(32).native(path).shape)
    written = write_map_objects(path, [finding(shape, "one")], tmp_path, affine=None, algorithm=ALGORITHM)
    assert same(raw(written.maps[0])[0], finding(shape, "one").scores)
    ds = pydicom.dcmread(written.maps[0])
    assert (ds.LossyImageCompression, ds.LossyImageCompressionMethod) == ("01", "ISO_15444_1")
    check_valid(written)


def test_every_film_and_slice_of_the_zoo(shared_data, tmp_path):
    """Odd headers: what the readers read gets valid objects, or is refused for want of the UIDs that objects name it by."""
    written, refused = 0, []
    for path in sorted((shared_data / "dicom_zoo").glob("*.dcm")):
        for read in (
            lambda path: (tuple(XrayReader(32).native(path).shape), None),
            lambda path: (read_ct(path).shape, read_ct(path).affine),
        ):
            try:
                shape, affine = read(path)
            except UnreadableImageError:
                continue
            scores = np.random.default_rng(0).random(shape, dtype=np.float32)
            one = MapFinding("a", "a", scores, scores > 0.9, peak=(0,) * len(shape), score=0.5)
            try:
                found = write_map_objects(path, [one], tmp_path, affine=affine, algorithm=ALGORITHM)
            except ValueError as error:
                refused.append(str(error))
                continue
            assert same(raw(found.maps[0]).reshape(shape), scores)
            check_valid(found, only="Error")  # patients of size 0 are warned of
            written += 1
    assert written > 10 and all("no usable" in message for message in refused)


def test_a_real_series_of_a_tilted_gantry(shared_data, tmp_path):
    folder = shared_data / "ct" / "ge_series"
    volume = read_ct(folder, "largest")
    one = finding(volume.shape, "one")
    written = write_map_objects(folder, [one], tmp_path, affine=volume.affine, algorithm=ALGORITHM)
    assert same(raw(written.maps[0]), one.scores)
    headers = {ds.SOPInstanceUID: ds for ds in map(pydicom.dcmread, folder.glob("*.dcm"))}
    for k, group in enumerate(pydicom.dcmread(written.maps[0]).PerFrameFunctionalGroupsSequence):
        source = headers[group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert np.array_equal(source.pixel_array * float(source.RescaleSlope) + float(source.RescaleIntercept), volume.voxels[k])
        assert group.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    check_valid(written)


def test_frames_of_a_real_enhanced_ct_are_named_by_number(shared_data, tmp_path):
    path = shared_data / "dicom_zoo" / "eCT_Supplemental.dcm"
    volume = read_ct(path)
    one = finding(volume.shape, "one")
    one = dataclasses.replace(one, boxes=())
    written = write_map_objects(path, [one], tmp_path, affine=volume.affine, algorithm=ALGORITHM)
    source = pydicom.dcmread(path)
    for k, group in enumerate(pydicom.dcmread(written.maps[0]).PerFrameFunctionalGroupsSequence):
        (image,) = group.DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
        shared = source.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0]
        frame = source.pixel_array[image.ReferencedFrameNumber - 1] * float(shared.RescaleSlope) + float(shared.RescaleIntercept)
        assert np.array_equal(frame, volume.voxels[k])
    segments = highdicom.seg.segread(written.segmentation)
    pixels = segments.get_pixels_by_source_frame(source.SOPInstanceUID, [1, 2], assert_missing_frames_are_empty=True)
    order = [
        g.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber - 1
        for g in pydicom.dcmread(written.maps[0]).PerFrameFunctionalGroupsSequence
    ]
    assert np.array_equal(pixels[order][..., 0].astype(bool), one.mask)
    check_valid(written)
