"""DicomImage and the picture made of it, against plain formulas; frames, functional groups, colour, floats, and the choice of a window."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, RLELossless

from medvl.types import UnreadableImageError
from modalities.dicom import Window, fit_radiograph, read_dicom, read_radiograph, show

DX, CT = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"


def dataset(stored: np.ndarray, *, bits: int | None = None, sop: str = DX, syntax: str = ExplicitVRLittleEndian, **attributes) -> Dataset:
    """One frame (H, W), several (K, H, W)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    if stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    allocated = stored.dtype.itemsize * 8
    ds.BitsAllocated, ds.BitsStored = allocated, bits or allocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(stored.dtype.kind == "i")
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    ds.PixelData = stored.astype(stored.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    ds.PixelData += b"\0" * (len(ds.PixelData) % 2)
    ds["PixelData"].VR = "OB" if allocated == 8 else "OW"
    return ds


@pytest.fixture
def write(tmp_path):
    def _write(ds: Dataset, name: str = "image.dcm") -> Path:
        ds.save_as(tmp_path / name, enforce_file_format=True)
        return tmp_path / name

    return _write


@pytest.fixture(scope="module")
def twelve_bits() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4096, (37, 23)).astype(np.uint16)


def test_values_are_rescaled_once_with_their_unit_and_place(write):
    stored = np.random.default_rng(1).integers(-1024, 3000, (20, 30)).astype(np.int16)
    path = write(
        dataset(
            stored,
            sop=CT,
            Modality="CT",
            RescaleSlope="2",
            RescaleIntercept="-1024.5",
            PixelSpacing=["0.7", "0.8"],
            ImagePositionPatient=["-10", "20.5", "3"],
            ImageOrientationPatient=["1", "0", "0", "0", "0.98", "0.2"],
        )
    )
    image = read_dicom(path)
    expected = (stored * 2.0 - 1024.5).astype(np.float32)
    np.testing.assert_array_equal(image.values, expected)
    assert image.values.dtype == np.float32
    assert (image.unit, image.modality, image.sop_class) == ("HU", "CT", "CT Image Storage")
    assert (image.rows, image.columns, image.frames) == (20, 30, 1)
    assert (image.position_mm, image.orientation) == ((-10, 20.5, 3), (1, 0, 0, 0, 0.98, 0.2))
    assert (image.spacing_mm, image.spacing_source) == ((0.7, 0.8), "PixelSpacing")
    assert image.value_range == (expected.min(), expected.max())
    assert image.sha256 == hashlib.sha256(expected.astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("attributes", "unit"),
    [
        ({"Modality": "CT"}, None),  # nothing says that a rescale took place
        ({"Modality": "CT", "RescaleSlope": "1", "RescaleIntercept": "0"}, "HU"),
        ({"Modality": "CT", "RescaleSlope": "1", "RescaleIntercept": "0", "RescaleType": "US"}, "US"),
        ({"Modality": "DX", "RescaleSlope": "1", "RescaleIntercept": "0", "RescaleType": "OD"}, "OD"),
        ({"Modality": "DX", "RescaleSlope": "1", "RescaleIntercept": "0", "RescaleType": "Secret Name"}, None),
        ({"Modality": "PT", "RescaleSlope": "2", "RescaleIntercept": "0", "Units": "BQML"}, "BQML"),
    ],
)
def test_units(write, twelve_bits, attributes, unit):
    assert read_dicom(write(dataset(twelve_bits, bits=12, **attributes))).unit == unit


def test_the_same_content_has_one_hash_in_every_coding(write, twelve_bits):
    plain = read_dicom(write(dataset(twelve_bits, bits=12), "a.dcm"))
    big = read_dicom(write(dataset(twelve_bits, bits=12, syntax=ExplicitVRBigEndian), "b.dcm"))
    ds = dataset(twelve_bits, bits=12)
    ds.compress(RLELossless, generate_instance_uid=False)
    rle = read_dicom(write(ds, "c.dcm"))
    halved = dataset(twelve_bits * 2, bits=13, RescaleSlope="0.5", RescaleIntercept="0")
    assert plain.sha256 == big.sha256 == rle.sha256 == read_dicom(write(halved, "d.dcm")).sha256


def test_a_window_is_chosen_by_index_explanation_or_given(write, twelve_bits):
    path = write(
        dataset(
            twelve_bits,
            bits=12,
            WindowCenter=[2000, 700, 5],
            WindowWidth=[1500, 101, 0],
            WindowCenterWidthExplanation=["NORMAL", "Harder", "SECRET"],
        )
    )
    image = read_dicom(path)
    assert [v.explanation for v in image.vois] == ["NORMAL", "Harder", "SECRET"]
    hard = np.clip((twelve_bits - 699.5) / 100 + 0.5, 0, 1)
    for got in (show(image, 1), show(image, "HARDER"), show(image, Window(700, 101)), read_radiograph(path, voi="harder")):
        np.testing.assert_allclose(got.pixels, hard, atol=1e-6)
    np.testing.assert_allclose(show(image).pixels, np.clip((twelve_bits - 1999.5) / 1499 + 0.5, 0, 1), atol=1e-6)
    assert any("no width" in w for w in show(image, 2).warnings)
    for voi, message in ((3, "has no VOI 3; it holds 3"), (-1, "has no VOI"), ("lung", "none of its 3 VOIs")):
        with pytest.raises(UnreadableImageError, match=message) as caught:
            show(image, voi)
        assert "SECRET" not in str(caught.value)


def test_a_lut_stands_before_the_windows(write, twelve_bits):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 12])
    item.add_new("LUTData", "US", np.arange(4096)[::-1].tolist())
    item.LUTExplanation = "NEGATIVE"
    image = read_dicom(write(dataset(twelve_bits, bits=12, WindowCenter=2048, WindowWidth=4096, VOILUTSequence=Sequence([item]))))
    np.testing.assert_allclose(show(image).pixels, 1 - twelve_bits / 4095, atol=1e-6)
    np.testing.assert_allclose(show(image, "negative").pixels, 1 - twelve_bits / 4095, atol=1e-6)
    np.testing.assert_allclose(show(image, 1).pixels, twelve_bits / 4095, atol=1e-6)


def test_spacing_names_its_source_and_magnification(write, twelve_bits):
    def read(**attributes):
        return read_dicom(write(dataset(twelve_bits, bits=12, **attributes)))

    image = read(ImagerPixelSpacing=["0.2", "0.2"], EstimatedRadiographicMagnificationFactor="1.25")
    assert (image.spacing_source, image.magnification) == ("ImagerPixelSpacing", 1.25)
    assert any("1.250 times" in w for w in image.warnings)
    image = read(ImagerPixelSpacing=["0.2", "0.2"], PixelSpacing=["0.16", "0.16"])
    assert image.spacing_source == "PixelSpacing"
    assert image.magnification == pytest.approx(1.25)
    assert not image.warnings
    image = read(NominalScannedPixelSpacing=["0.1", "0.1"])
    assert (image.spacing_mm, image.spacing_source, image.magnification) == ((0.1, 0.1), "NominalScannedPixelSpacing", None)
    assert (read().spacing_mm, read().spacing_source) == (None, None)


def test_the_presentation_intent_is_kept_and_raw_images_warned_of(write, twelve_bits):
    path = write(dataset(twelve_bits, bits=12, PresentationIntentType="FOR PROCESSING"))
    assert read_dicom(path).presentation_intent == "FOR PROCESSING"
    assert any("FOR PROCESSING" in w for w in read_radiograph(path).warnings)


@pytest.mark.parametrize("rle", [False, True])
def test_a_frame_is_chosen(write, rle):
    stored = np.random.default_rng(2).integers(0, 4096, (5, 12, 9)).astype(np.uint16)
    ds = dataset(stored, bits=12, WindowCenter=2048, WindowWidth=4096)
    if rle:
        ds.compress(RLELossless, generate_instance_uid=False)
    path = write(ds)
    for k in range(5):
        np.testing.assert_allclose(read_radiograph(path, frame=k).pixels, stored[k] / 4095, atol=1e-6)
        assert (read_dicom(path, frame=k).values == stored[k]).all()
    image = read_dicom(path)
    assert (image.frames, image.frame, image.rows) == (5, 0, 12)
    assert any("holds 5 frames" in w for w in image.warnings)
    with pytest.raises(UnreadableImageError, match=r"holds 5 frames.*frame=k.*0 to 4"):
        read_radiograph(path)
    for k in (5, -1):
        with pytest.raises(UnreadableImageError, match=f"has no frame {k}"):
            read_radiograph(path, frame=k)


@pytest.mark.parametrize("shape", [(16, 16), (7, 5)])
def test_one_bit_frames_are_unpacked_where_they_begin(write, shape):
    bits = np.random.default_rng(3).integers(0, 2, (3, *shape)).astype(np.uint8)
    ds = dataset(bits, sop="1.2.840.10008.5.1.4.1.1.7.1")
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 1, 0
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    ds.PixelData = packed + b"\0" * (len(packed) % 2)
    path = write(ds)
    for k in range(3):
        np.testing.assert_array_equal(read_dicom(path, frame=k).values, bits[k])
        np.testing.assert_array_equal(read_radiograph(path, frame=k).pixels, bits[k])


def test_functional_groups_rescale_and_place_each_frame(write):
    stored = np.random.default_rng(4).integers(0, 2000, (3, 8, 6)).astype(np.uint16)
    frames = []
    for k in range(3):
        rescale, window, position = Dataset(), Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = str(k + 1), "-1000", "HU"
        window.WindowCenter, window.WindowWidth = 40 + k, 400
        position.ImagePositionPatient = ["0", "0", str(5 * k)]
        group = Dataset()
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = Sequence([rescale]), Sequence([window])
        group.PlanePositionSequence = Sequence([position])
        frames.append(group)
    measures, shared = Dataset(), Dataset()
    measures.PixelSpacing = ["0.5", "0.6"]
    shared.PixelMeasuresSequence = Sequence([measures])
    path = write(
        dataset(
            stored,
            sop=ENHANCED_CT,
            Modality="CT",
            PerFrameFunctionalGroupsSequence=Sequence(frames),
            SharedFunctionalGroupsSequence=Sequence([shared]),
        )
    )
    for k in range(3):
        image = read_dicom(path, frame=k)
        np.testing.assert_array_equal(image.values, stored[k] * (k + 1.0) - 1000)
        assert (image.unit, image.position_mm, image.spacing_mm) == ("HU", (0, 0, 5 * k), (0.5, 0.6))
        np.testing.assert_allclose(show(image).pixels, np.clip((image.values - (39.5 + k)) / 399 + 0.5, 0, 1), atol=1e-6)


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_float_pixels(write, keyword, dtype):
    values = np.random.default_rng(5).normal(0, 100, (2, 9, 7)).astype(dtype)
    ds = dataset(np.zeros((2, 9, 7), np.uint16), sop="1.2.840.10008.5.1.4.1.1.30")
    del ds.PixelData, ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    ds.BitsAllocated = values.dtype.itemsize * 8
    setattr(ds, keyword, values.tobytes())
    path = write(ds)
    np.testing.assert_array_equal(read_dicom(path, frame=1).values, values[1])
    with pytest.raises(UnreadableImageError, match="Parametric Map"):
        read_radiograph(path, frame=1)
    values[1, 0, 0] = np.nan
    setattr(ds, keyword, values.tobytes())
    with pytest.raises(UnreadableImageError, match="NaN"):
        read_dicom(write(ds), frame=1)


@pytest.mark.parametrize("bits", [5, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_every_depth(write, bits, signed, photometric):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    dtype = np.dtype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")
    stored = np.random.default_rng(6).integers(low, high, (40, 30)).astype(dtype)
    window = {"WindowCenter": (low + high) / 2, "WindowWidth": 2**bits}
    expected = np.clip((stored.astype(float) - low) / (2**bits - 1), 0, 1)
    got = read_radiograph(write(dataset(stored, bits=bits, PhotometricInterpretation=photometric, **window))).pixels
    np.testing.assert_allclose(got, 1 - expected if photometric == "MONOCHROME1" else expected, atol=1e-6)


@pytest.mark.parametrize("signed", [False, True])
def test_thirty_two_bits_keep_their_precision(write, signed):
    base = 2**30 if not signed else -(2**30)
    stored = (base + np.arange(100).reshape(10, 10)).astype(np.int32 if signed else np.uint32)
    path = write(dataset(stored, WindowCenter=base + 50.5, WindowWidth=101))
    np.testing.assert_allclose(read_radiograph(path).pixels, np.arange(100).reshape(10, 10) / 100, atol=1e-6)


def test_values_in_the_high_bits_are_shifted_down(write, twelve_bits):
    ds = dataset(twelve_bits << 4, bits=12, HighBit=15)
    image = read_dicom(write(ds))
    np.testing.assert_array_equal(image.values, twelve_bits)
    assert any("bits 4 to 15" in w for w in image.warnings)


def test_padding_is_a_mask(write):
    stored = np.full((20, 20), 1000, np.int16)
    stored[:, :3] = -2000
    stored[10, 10] = -2000
    image = read_dicom(write(dataset(stored, sop=CT, PixelPaddingValue=-2000)))
    expected = np.zeros((20, 20), bool)
    expected[:, :3] = True
    np.testing.assert_array_equal(image.padding, expected)
    assert (show(image).pixels[:, :3] == 0).all()


def palette_dataset(stored: np.ndarray, entries: np.ndarray, bits: int, first: int = 0) -> Dataset:
    ds = dataset(stored, PhotometricInterpretation="PALETTE COLOR", sop="1.2.840.10008.5.1.4.1.1.7")
    for colour, channel in zip(("Red", "Green", "Blue"), entries, strict=True):
        ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [len(channel) % 2**16, first, bits])
        ds.add_new(f"{colour}PaletteColorLookupTableData", "OW", channel.astype("<u2" if bits == 16 else "u1").tobytes())
    return ds


@pytest.mark.parametrize(
    ("depth", "bits", "count", "first"), [(8, 8, 256, 0), (8, 16, 256, 0), (16, 16, 1000, 50), (16, 16, 65536, 0), (8, 8, 100, 7)]
)
def test_palettes_agree_with_pydicom(write, depth, bits, count, first):
    rng = np.random.default_rng(7)
    stored = rng.integers(0, 2**depth, (31, 17)).astype(f"u{depth // 8}")
    path = write(palette_dataset(stored, rng.integers(0, 2**bits, (3, count)), bits, first))
    colour = apply_color_lut(pydicom.dcmread(path).pixel_array, pydicom.dcmread(path)).astype(float)
    image = read_dicom(path)
    np.testing.assert_allclose(image.values, colour @ [0.299, 0.587, 0.114], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(show(image).pixels, colour @ [0.299, 0.587, 0.114] / (2**bits - 1), atol=1e-6)


def test_a_segmented_palette_is_unfolded_as_pydicom_does(write):
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    segments = [0, 2, 100, 60000, 1, 100, 200, 0, 4, 1, 2, 3, 4, 1, 148, 65535, 2, 1, 0, 0]
    ds = dataset(stored, PhotometricInterpretation="PALETTE COLOR", sop="1.2.840.10008.5.1.4.1.1.7")
    for colour in ("Red", "Green", "Blue"):
        ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        ds.add_new(f"Segmented{colour}PaletteColorLookupTableData", "OW", np.array(segments, "<u2").tobytes())
    path = write(ds)
    colour = apply_color_lut(pydicom.dcmread(path).pixel_array, pydicom.dcmread(path)).astype(float)
    np.testing.assert_allclose(read_dicom(path).values, colour[..., 0], atol=0.01)


def test_full_and_partial_ybr(write):
    """From the matrices of PS3.3 C.7.6.3.1.2: grey pixels, so that chroma is neutral."""
    grey = np.random.default_rng(8).integers(0, 256, (12, 16)).astype(np.uint8)
    ds = dataset(grey, sop="1.2.840.10008.5.1.4.1.1.7", SamplesPerPixel=3, PlanarConfiguration=0)
    neutral = np.full_like(grey, 128)
    for photometric, luma in (("YBR_FULL", grey), ("YBR_PARTIAL_420", np.rint(16 + grey.astype(float) * 219 / 255).astype(np.uint8))):
        ds.PhotometricInterpretation = photometric
        ds.PixelData = np.stack([luma, neutral, neutral], -1).tobytes()
        got = read_radiograph(write(ds))
        np.testing.assert_allclose(got.pixels * 255, grey, atol=0.6)
        assert any("colour" in w for w in got.warnings)


def test_icons_overlays_and_private_elements_are_passed_over(write, twelve_bits):
    icon = dataset(np.zeros((4, 4), np.uint8))
    ds = dataset(twelve_bits, bits=12)
    expected = read_dicom(write(ds, "plain.dcm")).sha256
    ds.IconImageSequence = Sequence([icon])
    ds.add_new(0x60000010, "US", 37)
    ds.add_new(0x60003000, "OW", bytes(200))
    ds.add_new(0x00091001, "UN", bytes(300000))
    assert read_dicom(write(ds, "full.dcm")).sha256 == expected


def test_nothing_is_logged_or_warned_of_by_the_libraries(write, twelve_bits, caplog, recwarn):
    ds = dataset(twelve_bits, bits=12, WindowCenter=2048, WindowWidth=4096)
    ds.add_new("PatientBirthDate", "DA", "Secret")
    path = write(ds)
    recwarn.clear()
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        read_radiograph(path)
    assert not recwarn.list
    assert "ecret" not in caplog.text


@pytest.mark.parametrize("shape", [(300, 200), (50, 333), (64, 64), (9, 400)])
def test_a_fitted_radiograph_is_the_shown_one_resized_with_its_aspect_kept(write, shape):
    torch = pytest.importorskip("torch")
    stored = np.random.default_rng(9).integers(0, 4096, shape).astype(np.uint16)
    path = write(dataset(stored, bits=12, WindowCenter=2048, WindowWidth=3000, PixelSpacing=["0.1", "0.1"]))
    fitted, native = fit_radiograph(path, 64), read_radiograph(path)
    rows, cols = (max(1, round(n * 64 / max(shape))) for n in shape)
    tensor = torch.from_numpy(native.pixels)[None, None]
    expected = torch.nn.functional.interpolate(tensor, size=(rows, cols), mode="bilinear", antialias=True, align_corners=False)
    np.testing.assert_allclose(fitted.pixels, expected[0, 0].numpy(), atol=1e-6)
    assert (fitted.native_shape, fitted.reduced, fitted.spacing_mm) == (shape, 0, (0.1, 0.1))
    with pytest.raises(ValueError, match="at least 1"):
        fit_radiograph(path, 0)


def test_fragments_of_one_frame_are_joined(write, twelve_bits):
    ds = dataset(twelve_bits, bits=12)
    expected = read_dicom(write(ds, "plain.dcm")).sha256
    ds.compress(RLELossless, generate_instance_uid=False)
    coded = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData = encapsulate([coded], fragments_per_frame=4)
    assert read_dicom(write(ds, "fragments.dcm")).sha256 == expected
