"""The fast rungs of the decoder against the exact chain, over every coding that can be written here, and without the optional library."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from modalities.dicom import fit_radiograph, read_dicom, read_radiograph
from modalities.dicom import pixels as decoder

ZOO = Path(__file__).resolve().parents[2] / "../shared/data/dicom_zoo"
UID = {
    "uncompressed": "1.2.840.10008.1.2.1",
    "RLE": "1.2.840.10008.1.2.5",
    "JPEG lossless": "1.2.840.10008.1.2.4.57",
    "JPEG lossless SV1": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": "1.2.840.10008.1.2.4.80",
    "JPEG 2000": "1.2.840.10008.1.2.4.90",
    "HTJ2K": "1.2.840.10008.1.2.4.201",
}


def smooth(shape: tuple[int, int], bits: int, signed: bool, noise: float = 0.01, ends: bool = True) -> np.ndarray:
    """A film-like pattern with noise that uses the whole range."""
    rng = np.random.default_rng(bits)
    y, x = np.mgrid[: shape[0], : shape[1]]
    wave = 0.5 + 0.35 * np.sin(y / 40) * np.cos(x / 33) + rng.normal(0, noise, shape)
    stored = (wave * (2**bits - 1)).clip(0, 2**bits - 1).astype(np.int64)
    if ends:
        stored[0, :2] = 0, 2**bits - 1
    dtype = f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}"
    return (stored - (2 ** (bits - 1) if signed else 0)).astype(dtype)


def write(path: Path, coding: str, stored: np.ndarray, bits: int, **attributes: object) -> Path:
    signed = stored.dtype.kind == "i"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if coding == "RLE" else UID[coding]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *stored.shape, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.dtype.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(signed)
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    if coding in ("uncompressed", "RLE"):
        ds.PixelData = stored.tobytes()
    else:
        ds.PixelData = encapsulate([encoded(coding, stored, bits)])
    ds["PixelData"].VR = "OW" if coding in ("uncompressed", "RLE") and bits > 8 else "OB"
    if coding == "RLE":
        ds.compress(RLELossless, generate_instance_uid=False)
    ds.save_as(path, enforce_file_format=True)
    return path


def encoded(coding: str, stored: np.ndarray, bits: int) -> bytes:
    imagecodecs = pytest.importorskip("imagecodecs")
    unsigned = stored.view(f"u{stored.dtype.itemsize}") & np.array(2**bits - 1, f"u{stored.dtype.itemsize}")
    if coding.startswith("JPEG lossless"):
        return bytes(imagecodecs.ljpeg_encode(unsigned, bitspersample=bits))
    if coding == "JPEG-LS":
        return bytes(imagecodecs.jpegls_encode(unsigned))
    if coding == "JPEG 2000":
        return bytes(imagecodecs.jpeg2k_encode(stored, level=0, codecformat="j2k", reversible=True, bitspersample=bits))
    return bytes(imagecodecs.htj2k_encode(stored, reversible=True))


@pytest.mark.parametrize("coding", UID)
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (12, False), (16, False), (12, True), (16, True)])
def test_fast_and_exact_give_the_same_values_and_pictures(tmp_path, coding, bits, signed):
    stored = smooth((180, 150), bits, signed)
    middle = 0 if signed else 2 ** (bits - 1)
    path = write(tmp_path / "film.dcm", coding, stored, bits, WindowCenter=middle, WindowWidth=2 ** (bits - 1))
    fast, exact = read_dicom(path), read_dicom(path, exact=True)
    np.testing.assert_array_equal(fast.values, stored)
    np.testing.assert_array_equal(exact.values, stored)
    np.testing.assert_allclose(read_radiograph(path).pixels, read_radiograph(path, exact=True).pixels, atol=1e-7)
    np.testing.assert_allclose(fit_radiograph(path, 64).pixels, fit_radiograph(path, 64, exact=True).pixels, atol=1e-6)


@pytest.mark.parametrize("coding", ["RLE", "JPEG lossless SV1", "JPEG-LS", "HTJ2K"])
def test_the_fast_rung_is_really_taken(tmp_path, monkeypatch, coding):
    pytest.importorskip("imagecodecs")
    stored = smooth((90, 70), 16 if coding == "HTJ2K" else 12, False)
    path = write(tmp_path / "film.dcm", coding, stored, 16 if coding == "HTJ2K" else 12)
    monkeypatch.setattr(decoder, "_by_pydicom", lambda *_: pytest.fail("went to pydicom"))
    np.testing.assert_array_equal(read_dicom(path).values, stored)


@pytest.mark.parametrize("coding", UID)
def test_without_imagecodecs_the_values_are_the_same(tmp_path, monkeypatch, coding):
    stored = smooth((90, 70), 12, False)
    path = write(tmp_path / "film.dcm", coding, stored, 12)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    np.testing.assert_array_equal(read_dicom(path).values, stored)


@pytest.mark.parametrize(("bits", "size"), [(10, 100), (12, 100), (16, 100), (12, 250)])
def test_a_reduced_decode_is_close_and_recorded(tmp_path, bits, size):
    path = write(tmp_path / "film.dcm", "JPEG 2000", smooth((640, 500), bits, False, noise=0.003, ends=False), bits)
    exact, got = fit_radiograph(path, size, exact=True), fit_radiograph(path, size, reduce=True)
    assert got.reduced == (2 if size == 100 else 1)
    assert got.native_shape == exact.native_shape == (640, 500)
    assert np.abs(got.pixels - exact.pixels).mean() * 255 <= 0.5
    assert np.abs(got.pixels - exact.pixels).max() * 255 <= 5
    assert fit_radiograph(path, size).reduced == fit_radiograph(path, size, reduce=True, exact=True).reduced == 0


def test_a_reduced_decode_does_not_move_the_image(tmp_path):
    """The centre of mass of a bright disc stays within a hundredth of a fitted pixel or two."""
    y, x = np.mgrid[:640, :512]
    disc = (3000 * np.exp(-((y - 200.3) ** 2 + (x - 310.8) ** 2) / 2 / 40**2)).astype(np.uint16)
    path = write(tmp_path / "film.dcm", "JPEG 2000", disc, 12, WindowCenter=2048, WindowWidth=4096)
    places = []
    for reduce in (False, True):
        picture = fit_radiograph(path, 128, reduce=reduce).pixels.astype(np.float64)
        grid = np.mgrid[: picture.shape[0], : picture.shape[1]]
        places.append((grid * picture).sum((1, 2)) / picture.sum())
    np.testing.assert_allclose(places[0], places[1], atol=0.02)


@pytest.mark.parametrize(
    ("bits", "signed", "attributes"),
    [(12, True, {}), (8, False, {}), (12, False, {"PixelPaddingValue": 0}), (12, False, {"BitsStored": 13, "HighBit": 12})],
)
def test_what_is_unusual_is_never_reduced(tmp_path, bits, signed, attributes):
    path = write(tmp_path / "film.dcm", "JPEG 2000", smooth((640, 500), bits, signed), bits, **attributes)
    got = fit_radiograph(path, 100, reduce=True)
    assert got.reduced == 0
    np.testing.assert_allclose(got.pixels, fit_radiograph(path, 100, exact=True).pixels, atol=1e-6)


@pytest.mark.skipif(not ZOO.is_dir(), reason="shared data folder with the DICOM zoo is absent")
@pytest.mark.parametrize("name", ["RG1_J2KI", "RG3_J2KI"])
def test_real_films_reduced_stay_within_half_a_grey_level_in_the_mean(name):
    path = ZOO / f"{name}.dcm"
    exact = fit_radiograph(path, 512, exact=True)
    got = fit_radiograph(path, 512, reduce=True)
    assert got.reduced >= 1
    assert np.abs(got.pixels - exact.pixels).mean() * 255 <= 0.5
