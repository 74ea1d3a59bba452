"""read_radiograph against pydicom's own LUT functions, SimpleITK and plain formulas; and what it must refuse."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from medvl.types import UnreadableImageError
from modalities.dicom import NativeRadiograph, has_dicom_magic, read_radiograph

ZOO = Path(__file__).resolve().parents[2] / "../shared/data/dicom_zoo"
BUNDLED = Path(pydicom.__file__).parent / "data/test_files"
DX = "1.2.840.10008.5.1.4.1.1.1.1"
GREY_LEVEL = 1 / 255
REFUSED = {
    "OBXXXX1A_rle_2frame.dcm",
    "SC_rgb_2frame.dcm",
    "eCT_Supplemental.dcm",
    "emri_small.dcm",
    "emri_small_big_endian.dcm",
    "emri_small_jpeg_2k_lossless_too_short.dcm",
    "liver.dcm",
    "liver_deflate.dcm",
    "liver_nonbyte_aligned.dcm",
    "liver_rle.dcm",
    "parametric_map_float.dcm",
}


def radiograph(stored: np.ndarray, *, bits: int = 12, syntax: str = ExplicitVRLittleEndian, **attributes: object) -> Dataset:
    """A DX dataset that holds these stored values."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = DX
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    ds.PatientName, ds.PatientID = "Secret^Name", "SECRET-ID"
    ds.Rows, ds.Columns = stored.shape[:2]
    ds.SamplesPerPixel = 1 if stored.ndim == 2 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if stored.ndim == 2 else "RGB"
    if stored.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.dtype.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    ds.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    ds["PixelData"].VR = "OW" if stored.dtype.itemsize > 1 else "OB"
    return ds


@pytest.fixture
def write(tmp_path):
    def _write(ds: Dataset, name: str = "image.dcm") -> Path:
        path = tmp_path / name
        ds.save_as(path, enforce_file_format=True)
        return path

    return _write


@pytest.fixture(scope="module")
def twelve_bits() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4096, (24, 17)).astype(np.uint16)


def lut_item(entries: np.ndarray, first: int, bits: int, vr: str = "US") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % 2**16, first, bits])
    item.add_new("LUTData", vr, entries.astype("<u2").tobytes() if vr == "OW" else entries.tolist())
    return item


def reference(ds: Dataset) -> np.ndarray:
    """Pydicom's own functions in float64, then the output range to 0..1, then the inversion."""
    values = apply_modality_lut(ds.pixel_array, ds)
    shown = apply_voi_lut(values, ds, prefer_lut=True).astype(np.float64)
    if ds.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif "WindowCenter" in ds:
        if ds.get("ModalityLUTSequence"):
            low, high = 0.0, 2.0 ** ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1
        else:
            low, high = (
                (0.0, 2.0**ds.BitsStored - 1)
                if not ds.PixelRepresentation
                else (-(2.0 ** (ds.BitsStored - 1)), 2.0 ** (ds.BitsStored - 1) - 1)
            )
            slope, intercept = float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))
            low, high = low * slope + intercept, high * slope + intercept
    elif ds.BitsStored == 8 and not ds.PixelRepresentation and "ModalityLUTSequence" not in ds:
        low, high = 0.0, 255.0
    else:
        low, high = np.percentile(shown.ravel()[:: max(1, shown.size // 2**18)], [0.1, 99.9])
    shown = np.clip((shown - low) / (high - low), 0, 1)
    return 1 - shown if ds.PhotometricInterpretation == "MONOCHROME1" else shown


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"WindowCenter": 2000, "WindowWidth": 1500},
        {"WindowCenter": [2000, 700], "WindowWidth": [1500, 100]},
        {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 2048, "WindowWidth": 1},
        {"WindowCenter": 100.5, "WindowWidth": 0.25, "VOILUTFunction": "LINEAR_EXACT", "RescaleSlope": "0.05", "RescaleIntercept": "-3.5"},
        {"WindowCenter": 500, "WindowWidth": 900, "RescaleSlope": "0.5", "RescaleIntercept": "-300"},
    ],
)
def test_windows_agree_with_pydicom(write, twelve_bits, photometric, attributes):
    path = write(radiograph(twelve_bits, PhotometricInterpretation=photometric, **attributes))
    got = read_radiograph(path)
    assert got.pixels.dtype == np.float32
    assert got.pixels.min() >= 0
    assert got.pixels.max() <= 1
    np.testing.assert_allclose(got.pixels, reference(pydicom.dcmread(path)), atol=1e-5)


def test_the_linear_window_is_the_formula_of_the_standard(write):
    """PS3.3 C.11.2.1.2.1, one pixel at a time: its example is c = 2048, w = 4096 for 0 to 4095 over the full range."""
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for c, w in ((2048, 4096), (2000, 100), (0, 10)):
        got = read_radiograph(write(radiograph(stored, WindowCenter=c, WindowWidth=w))).pixels.ravel()
        for x in (0, 3, 5, 1950, 1999, 2000, 2040, 2048, 4095):
            if x <= c - 0.5 - (w - 1) / 2:
                y = 0.0
            elif x > c - 0.5 + (w - 1) / 2:
                y = 1.0
            else:
                y = (x - (c - 0.5)) / (w - 1) + 0.5
            assert got[x] == pytest.approx(y, abs=2e-6)


def test_the_sigmoid_is_the_formula_of_the_standard(write):
    stored = np.arange(256, dtype=np.uint16).reshape(16, 16)
    got = read_radiograph(write(radiograph(stored, WindowCenter=100, WindowWidth=40, VOILUTFunction="SIGMOID"))).pixels.ravel()
    for x in (0, 50, 100, 130, 255):
        assert got[x] == pytest.approx(1 / (1 + math.exp(-4 * (x - 100) / 40)), abs=1e-6)


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_luts_agree_with_pydicom(write, twelve_bits, photometric, vr):
    rng = np.random.default_rng(1)
    modality = np.sort(rng.integers(0, 2**14, 3000))
    voi = np.sort(rng.integers(0, 2**12, 9000))
    ds = radiograph(twelve_bits, PhotometricInterpretation=photometric)
    ds.ModalityLUTSequence = [lut_item(modality, 200, 16, vr)]
    ds.ModalityLUTSequence[0].ModalityLUTType = "US"
    ds.VOILUTSequence = [lut_item(voi, 500, 12, vr), lut_item(voi[::-1], 0, 12, vr)]
    path = write(ds)
    np.testing.assert_allclose(read_radiograph(path).pixels, reference(pydicom.dcmread(path)), atol=1e-6)


def test_a_voi_lut_wins_over_a_window(write, twelve_bits):
    ds = radiograph(twelve_bits, WindowCenter=10, WindowWidth=10)
    ds.VOILUTSequence = [lut_item(np.arange(4096), 0, 12)]
    np.testing.assert_allclose(read_radiograph(write(ds)).pixels, twelve_bits / 4095, atol=1e-6)


def test_a_modality_lut_comes_before_the_window(write, twelve_bits):
    ds = radiograph(twelve_bits, WindowCenter=100, WindowWidth=101)
    ds.ModalityLUTSequence = [lut_item(np.arange(4096) // 20, 0, 16)]
    ds.ModalityLUTSequence[0].ModalityLUTType = "US"
    expected = np.clip((twelve_bits // 20 - 49.5) / 100, 0, 1)
    np.testing.assert_allclose(read_radiograph(write(ds)).pixels, expected, atol=1e-5)


def test_a_lut_of_eight_bits_takes_inputs_above_255(write, twelve_bits):
    """Pydicom 3.0 wraps the index to 8 bits here, so the formula of the standard is the reference."""
    entries = np.arange(4096) // 16
    ds = radiograph(twelve_bits)
    ds.VOILUTSequence = [lut_item(entries, 0, 8)]
    np.testing.assert_allclose(read_radiograph(write(ds)).pixels, entries[twelve_bits] / 255, atol=1e-6)


def test_a_lut_of_packed_bytes(write):
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    entries = np.arange(256, dtype=np.uint8)[::-1].copy()
    ds = radiograph(stored, bits=8)
    ds.VOILUTSequence = [lut_item(entries, 0, 8)]
    ds.VOILUTSequence[0].add_new("LUTData", "OW", entries.tobytes())
    np.testing.assert_allclose(read_radiograph(write(ds)).pixels, entries[stored] / 255, atol=1e-6)


@given(first=st.integers(-3000, 3000), count=st.integers(2, 5000), bits=st.integers(10, 16), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lut_is_held_at_its_ends(tmp_path, first, count, bits, seed):
    rng = np.random.default_rng(seed)
    stored = rng.integers(-2048, 2048, (9, 7)).astype(np.int16)
    entries = rng.integers(0, 2**bits, count)
    entries[-1] = 2**bits - 1 if entries[0] == entries[-1] else entries[-1]
    ds = radiograph(stored)
    ds.VOILUTSequence = [lut_item(entries, first, bits)]
    path = tmp_path / "lut.dcm"
    ds.save_as(path, enforce_file_format=True)
    got = read_radiograph(path)
    expected = [[entries[min(max(int(v) - first, 0), count - 1)] / (2**bits - 1) for v in row] for row in stored]
    if np.ptp(expected) > 0:  # else it shows nothing, and the image's own range is taken
        np.testing.assert_allclose(got.pixels, expected, atol=1e-6)
    else:
        assert any("shows nothing" in w for w in got.warnings)


def test_monochrome1_is_inverted_after_the_window(write, twelve_bits):
    window = {"WindowCenter": 1000, "WindowWidth": 500}
    plain = read_radiograph(write(radiograph(twelve_bits, **window), "a.dcm")).pixels
    inverted = read_radiograph(write(radiograph(twelve_bits, PhotometricInterpretation="MONOCHROME1", **window), "b.dcm")).pixels
    np.testing.assert_allclose(inverted, 1 - plain, atol=1e-6)


@pytest.mark.parametrize(
    ("photometric", "shape", "warned"),
    [
        ("MONOCHROME1", "INVERSE", False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME2", "INVERSE", True),
    ],
)
def test_presentation_lut_shape_is_not_a_second_inversion(write, twelve_bits, photometric, shape, warned):
    ds = radiograph(twelve_bits, PhotometricInterpretation=photometric, WindowCenter=2048, WindowWidth=4096)
    bare = read_radiograph(write(ds, "bare.dcm"))
    ds.PresentationLUTShape = shape
    got = read_radiograph(write(ds, "shape.dcm"))
    np.testing.assert_array_equal(got.pixels, bare.pixels)
    assert any("contradict" in w for w in got.warnings) == warned


def test_signed_pixels(write):
    stored = np.random.default_rng(2).integers(-2048, 2048, (20, 20)).astype(np.int16)
    path = write(radiograph(stored, WindowCenter=0, WindowWidth=1000))
    np.testing.assert_allclose(read_radiograph(path).pixels, np.clip((stored + 0.5) / 999 + 0.5, 0, 1), atol=1e-5)


def test_signed_pixels_without_sign_in_the_spare_bits(write):
    stored = np.random.default_rng(2).integers(-2048, 2048, (20, 20)).astype(np.int16)
    ds = radiograph(stored, WindowCenter=0, WindowWidth=1000)
    ds.PixelData = (stored.view(np.uint16) & 0x0FFF).tobytes()
    np.testing.assert_allclose(read_radiograph(write(ds)).pixels, np.clip((stored + 0.5) / 999 + 0.5, 0, 1), atol=1e-5)


def test_an_old_overlay_in_the_spare_bits_is_not_drawn(write, twelve_bits):
    ds = radiograph(twelve_bits, WindowCenter=2048, WindowWidth=4096)
    clean = read_radiograph(write(ds, "clean.dcm"))
    over = twelve_bits.copy()
    over[::3, ::2] |= 0x8000
    ds.PixelData = over.tobytes()
    got = read_radiograph(write(ds, "overlay.dcm"))
    np.testing.assert_array_equal(got.pixels, clean.pixels)


def test_padding_at_the_border_is_dark_and_leaves_the_range_alone(write):
    stored = np.random.default_rng(3).integers(1000, 2000, (40, 40)).astype(np.uint16)
    padded = np.zeros((60, 50), dtype=np.uint16)
    padded[10:50, 5:45] = stored
    padded[30, 30] = 0  # saturated metal inside the body: not padding
    for photometric, inside in (("MONOCHROME1", 1.0), ("MONOCHROME2", 0.0)):
        got = read_radiograph(write(radiograph(padded, PhotometricInterpretation=photometric, PixelPaddingValue=0))).pixels
        assert got[30, 30] == inside
        assert (got[:10] == 0).all()
        low, high = np.percentile(np.append(np.delete(stored.ravel(), 20 * 40 + 25), 0), [0.1, 99.9])
        expected = np.clip((stored.astype(float) - low) / (high - low), 0, 1)
        expected = 1 - expected if photometric == "MONOCHROME1" else expected
        mask = np.ones_like(stored, dtype=bool)
        mask[20, 25] = False
        np.testing.assert_allclose(got[10:50, 5:45][mask], expected[mask], atol=1e-5)


def test_a_padding_range(write):
    stored = np.full((8, 8), 500, dtype=np.uint16)
    stored[0], stored[1], stored[2:, 3] = 10, 14, 900
    got = read_radiograph(
        write(radiograph(stored, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=10, PixelPaddingRangeLimit=15))
    ).pixels
    assert (got[:2] == 0).all()
    assert got[3, 0] == 1


def test_eight_bits_without_a_window_are_taken_as_they_are(write):
    stored = np.random.default_rng(0).integers(30, 90, (9, 9)).astype(np.uint8)
    np.testing.assert_allclose(read_radiograph(write(radiograph(stored, bits=8))).pixels, stored / 255, atol=1e-6)


def test_a_hot_pixel_does_not_darken_an_image_without_a_window(write):
    stored = np.random.default_rng(0).integers(1000, 1200, (100, 100)).astype(np.uint16)
    stored[5, 5] = 4095
    assert read_radiograph(write(radiograph(stored))).pixels.std() > 0.2


@pytest.mark.parametrize("value", [0, 700])
def test_a_constant_image_is_finite(write, value):
    pixels = read_radiograph(write(radiograph(np.full((5, 6), value, np.uint16)))).pixels
    assert pixels.shape == (5, 6)
    assert np.isfinite(pixels).all()


@pytest.mark.parametrize(
    "attributes",
    [
        {"WindowCenter": 10, "WindowWidth": 0},
        {"WindowCenter": 10, "WindowWidth": -5},
        {"WindowCenter": 30000, "WindowWidth": 10},
        {"WindowCenter": 50, "WindowWidth": 10, "RescaleSlope": "0", "RescaleIntercept": "0"},
    ],
)
def test_a_useless_window_is_replaced_and_told(write, twelve_bits, attributes):
    got = read_radiograph(write(radiograph(twelve_bits, **attributes)))
    assert got.warnings
    assert got.pixels.std() > 0.1


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_every_plain_coding_gives_the_same_picture(write, twelve_bits, syntax):
    plain = read_radiograph(write(radiograph(twelve_bits, WindowCenter=2048, WindowWidth=3000), "plain.dcm"))
    ds = radiograph(twelve_bits, WindowCenter=2048, WindowWidth=3000, syntax=ExplicitVRLittleEndian if syntax == RLELossless else syntax)
    if syntax == RLELossless:
        ds.compress(RLELossless, generate_instance_uid=False)
    got = read_radiograph(write(ds, "coded.dcm"))
    np.testing.assert_array_equal(got.pixels, plain.pixels)
    assert got.transfer_syntax == pydicom.uid.UID(syntax).name


def test_colour_turns_to_grey_with_a_warning(write):
    stored = np.random.default_rng(0).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    got = read_radiograph(write(radiograph(stored, bits=8)))
    expected = (0.299 * stored[..., 0] + 0.587 * stored[..., 1] + 0.114 * stored[..., 2]) / 255
    np.testing.assert_allclose(got.pixels, expected, atol=1e-6)
    assert any("colour" in w for w in got.warnings)


def test_what_the_header_says_of_geometry(write, twelve_bits):
    ds = radiograph(twelve_bits, ViewPosition="PA", PatientOrientation=["L", "F"], ImagerPixelSpacing=["0.14", "0.14"])
    got = read_radiograph(write(ds))
    assert (got.spacing_mm, got.view, got.patient_orientation, got.photometric) == ((0.14, 0.14), "PA", ("L", "F"), "MONOCHROME2")
    ds.PixelSpacing, ds.ViewPosition, ds.PatientOrientation = ["0.2", "0.3"], "LL", ["A", "F"]
    got = read_radiograph(write(ds))
    assert (got.spacing_mm, got.view, got.patient_orientation) == ((0.2, 0.3), "lateral", ("A", "F"))
    assert any("not square" in w for w in got.warnings)
    ds.PixelSpacing, ds.ViewPosition, ds.PatientOrientation = ["0", "0"], "Secret^Name", ["Secret", "Name"]
    got = read_radiograph(write(ds))
    assert (got.spacing_mm, got.view, got.patient_orientation) == ((0.14, 0.14), None, None)


def test_a_mirrored_film_is_told_but_not_turned(write, twelve_bits):
    window = {"WindowCenter": 2048, "WindowWidth": 4096, "ViewPosition": "AP"}
    plain = read_radiograph(write(radiograph(twelve_bits, PatientOrientation=["L", "F"], **window), "plain.dcm"))
    got = read_radiograph(write(radiograph(twelve_bits, PatientOrientation=["R", "F"], **window), "mirrored.dcm"))
    np.testing.assert_array_equal(got.pixels, plain.pixels)
    assert any("mirrored" in w for w in got.warnings)
    assert not plain.warnings


def test_a_dataset_without_file_meta_is_read_with_a_warning(tmp_path, twelve_bits):
    ds = radiograph(twelve_bits, WindowCenter=2048, WindowWidth=4096)
    del ds.file_meta
    for implicit in (True, False):
        path = tmp_path / f"bare{implicit}.dcm"
        ds.save_as(path, implicit_vr=implicit, little_endian=True)
        assert not has_dicom_magic(path)
        got = read_radiograph(path)
        np.testing.assert_allclose(got.pixels, np.clip((twelve_bits - 2047.5) / 4095 + 0.5, 0, 1), atol=1e-6)
        assert len(got.warnings) >= 2


def _absurd(ds: Dataset) -> None:
    ds.Rows = ds.Columns = 65535


def _cut(ds: Dataset) -> None:
    ds.PixelData = ds.PixelData[:100]


def _frames(ds: Dataset) -> None:
    ds.NumberOfFrames = 7


def _seven_bits(ds: Dataset) -> None:
    ds.BitsAllocated = ds.BitsStored = 7


def _no_pixels(ds: Dataset) -> None:
    del ds.PixelData


def _no_rows(ds: Dataset) -> None:
    del ds.Rows


def _segmentation(ds: Dataset) -> None:
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"


def _photometric(ds: Dataset) -> None:
    ds.PhotometricInterpretation = "SECRET"[:4]


def _short_lut(ds: Dataset) -> None:
    ds.VOILUTSequence = [lut_item(np.arange(16), 0, 12)]
    ds.VOILUTSequence[0].LUTDescriptor = [5000, 0, 12]


@pytest.mark.parametrize("spoil", [_absurd, _cut, _frames, _seven_bits, _no_pixels, _no_rows, _segmentation, _photometric, _short_lut])
def test_what_is_no_radiograph_is_refused_by_path_alone(write, twelve_bits, spoil):
    ds = radiograph(twelve_bits)
    spoil(ds)
    path = write(ds)
    with pytest.raises(UnreadableImageError) as caught:
        read_radiograph(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "ecret" not in message.lower().replace(str(path).lower(), "")
    assert caught.value.__cause__ is None  # a traceback shows no underlying message either
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("form", "options", "uid"),
    [
        ("JPEG", {}, "1.2.840.10008.1.2.4.50"),
        ("JPEG2000", {"no_jp2": True}, JPEG2000Lossless),
        ("JPEG2000", {"no_jp2": False}, JPEG2000Lossless),
    ],
)
def test_a_compressed_image_larger_than_declared_is_refused_before_decoding(write, monkeypatch, form, options, uid):
    """A kilobyte of JPEG 2000 can unfold to gigabytes, whatever the header says."""
    coded = io.BytesIO()
    Image.fromarray(np.zeros((500, 300), np.uint8)).save(coded, format=form, **options)
    ds = radiograph(np.zeros((8, 8), np.uint8), bits=8)
    ds.file_meta.TransferSyntaxUID = uid
    ds.PixelData = encapsulate([coded.getvalue()])
    monkeypatch.setattr(Dataset, "pixel_array", property(lambda self: pytest.fail("was decoded")))
    with pytest.raises(UnreadableImageError, match="8 x 8 pixels, its compressed image would unfold to 500 x 300"):
        read_radiograph(write(ds))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 132, b"\x00" * 128 + b"DICM", b"a,b\n1,2\n" * 100, bytes(range(256)) * 20])
def test_files_that_are_no_dicom_are_refused(tmp_path, content):
    path = tmp_path / "file.dcm"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=str(path)):
        read_radiograph(path)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.dcm"):
        with pytest.raises(UnreadableImageError, match=str(path)):
            read_radiograph(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_loads_or_is_refused(tmp_path, data):
    stored = np.arange(64, dtype=np.uint16).reshape(8, 8)
    ds = radiograph(stored, WindowCenter=30, WindowWidth=60, RescaleSlope="1", RescaleIntercept="0", PixelPaddingValue=0)
    ds.VOILUTSequence = [lut_item(np.arange(64), 0, 12)]
    path = tmp_path / "damaged.dcm"
    ds.save_as(path, enforce_file_format=True)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(128, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(140, len(content)))])
    try:
        got = read_radiograph(path)
    except UnreadableImageError:
        return
    assert np.isfinite(got.pixels).all()
    assert got.pixels.min() >= 0
    assert got.pixels.max() <= 1


# real files


def zoo_files() -> list[Path]:
    return sorted(ZOO.glob("*.dcm"))


def open_forced(path: Path) -> Dataset:
    ds = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in ds.file_meta:
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if ds.original_encoding[0] else ExplicitVRLittleEndian
    return ds


def agrees(path: Path, got: NativeRadiograph) -> None:
    ds = open_forced(path)
    if ds.PhotometricInterpretation in ("MONOCHROME1", "MONOCHROME2"):
        expected = reference(ds)
        padding = ds.get("PixelPaddingValue")
        if padding is not None:
            seen = ds.pixel_array != padding
            expected, pixels = expected[seen], got.pixels[seen]
        else:
            pixels = got.pixels
    else:
        colour = apply_color_lut(ds.pixel_array, ds) if ds.PhotometricInterpretation == "PALETTE COLOR" else ds.pixel_array
        expected = (colour[..., :3].astype(np.float64) / (2.0 ** (8 * colour.dtype.itemsize) - 1)) @ [0.299, 0.587, 0.114]
        pixels = got.pixels
    np.testing.assert_allclose(pixels, expected, atol=GREY_LEVEL)


@pytest.mark.skipif(not ZOO.is_dir(), reason="shared data folder with the DICOM zoo is absent")
@pytest.mark.parametrize("path", zoo_files(), ids=lambda p: p.name)
@pytest.mark.filterwarnings("ignore")
def test_the_zoo_loads_equal_to_pydicom_or_is_refused(path):
    if path.name in REFUSED:
        with pytest.raises(UnreadableImageError, match=path.name):
            read_radiograph(path)
    else:
        agrees(path, read_radiograph(path))


@pytest.mark.skipif(not ZOO.is_dir(), reason="shared data folder with the DICOM zoo is absent")
@pytest.mark.parametrize("name", ["RG1_J2KI", "RG3_J2KI", "693_UNCR", "MR2_J2KI", "JPEG-LL", "bad_sequence", "explicit_VR-UN"])
def test_decoded_values_agree_with_simpleitk(name):
    """SimpleITK decodes and rescales without pydicom; the window follows as plain arithmetic."""
    sitk = pytest.importorskip("SimpleITK")
    path = ZOO / f"{name}.dcm"
    if not path.exists():
        pytest.skip(f"{name}.dcm is not in the shared data folder")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    image = reader.Execute()
    values = sitk.GetArrayFromImage(image)[0].astype(np.float64)
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        values = 2**ds.BitsStored - 1 - values  # ITK turns MONOCHROME1 on reading; back to what is stored
    if "WindowCenter" in ds:
        c, w = (float(np.atleast_1d(ds[k].value)[0]) for k in ("WindowCenter", "WindowWidth"))
        expected = np.clip((values - (c - 0.5)) / (w - 1) + 0.5, 0, 1)
    else:
        low, high = np.percentile(values.ravel()[:: max(1, values.size // 2**18)], [0.1, 99.9])
        expected = np.clip((values - low) / (high - low), 0, 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        expected = 1 - expected
    np.testing.assert_allclose(read_radiograph(path).pixels, expected, atol=GREY_LEVEL)


def test_pydicom_s_own_files_load_in_range_or_are_refused():
    loaded = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what pydicom warns of quotes headers, so none may come through
        for path in sorted(p for p in BUNDLED.rglob("*") if p.is_file() and p.suffix in (".dcm", "")):
            try:
                got = read_radiograph(path)
            except UnreadableImageError as error:
                assert str(path) in str(error)
                continue
            assert got.pixels.ndim == 2
            assert 0 <= got.pixels.min() <= got.pixels.max() <= 1
            loaded += 1
    assert loaded > 50
