"""What the readers' options do and may be: reduced decoding, bounds on what a config may ask for, and the readers' own words for it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from medvl.model import ConfigError, build
from medvl.types import ImageReader, UnreadableImageError
from modalities.ct.hu import hu_verdict
from modalities.ct.reader import CtReader
from modalities.ct.volume import CtVolume
from modalities.dicom import fit_radiograph
from modalities.xray.reader import XrayReader

ZOO = Path(__file__).resolve().parents[2] / "../shared/data/dicom_zoo"
JPEG_2000 = "1.2.840.10008.1.2.4.90"
PLAIN = {"normalise": "fixed", "mean": 0.0, "std": 1.0}  # pixels are grey in 0..1
REDUCED = re.compile(r"decoded at 1/(\d+) of its resolution")


def write_film(path: Path, keep: float = 1.0, **attributes: object) -> Path:
    """A 640 x 500 film of 12 bits in JPEG 2000; the codestream cut to a share of its bytes."""
    imagecodecs = pytest.importorskip("imagecodecs", reason="writes JPEG 2000 (extra fast)")
    rng = np.random.default_rng(12)
    y, x = np.mgrid[:640, :500]
    stored = (4095 * (0.5 + 0.35 * np.sin(y / 40) * np.cos(x / 33) + rng.normal(0, 0.003, (640, 500)))).clip(0, 4095).astype(np.uint16)
    coded = bytes(imagecodecs.jpeg2k_encode(stored, level=0, codecformat="j2k", reversible=True, bitspersample=12))
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = JPEG_2000
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *stored.shape, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.ViewPosition, ds.WindowCenter, ds.WindowWidth = "PA", 2048, 4096
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    ds.PixelData = encapsulate([coded[: int(keep * len(coded))]])
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize(("size", "halvings"), [(100, 2), (128, 2), (250, 1)])
def test_reduced_decoding_is_close_recorded_and_leaves_the_grid_alone(tmp_path, size, halvings):
    path = write_film(tmp_path / "film.dcm")
    whole, reduced = XrayReader(size, **PLAIN).read(path), XrayReader(size, **PLAIN, reduced_decoding=True).read(path)
    exact = fit_radiograph(path, size, exact=True).pixels
    seen = reduced.pixels[0][reduced.valid].numpy().reshape(exact.shape)
    assert np.abs(seen - exact).mean() * 255 <= 0.5
    assert np.abs(seen - exact).max() * 255 <= 5
    assert not torch.equal(whole.pixels, reduced.pixels)
    assert (reduced.transform, reduced.view, reduced.spacing_mm) == (whole.transform, whole.view, whole.spacing_mm)
    assert torch.equal(reduced.valid, whole.valid)
    assert bool((reduced.pixels[0][~reduced.valid] == 0).all())
    assert [REDUCED.match(note).group(1) for note in reduced.warnings[len(whole.warnings) :]] == [str(2**halvings)]
    assert reduced.warnings[: len(whole.warnings)] == whole.warnings


def test_reduced_decoding_is_off_unless_asked_and_never_used_for_native_pixels(tmp_path, monkeypatch):
    path = write_film(tmp_path / "film.dcm")
    assert XrayReader().spec()["init_args"]["reduced_decoding"] is False
    assert not any(REDUCED.match(note) for note in XrayReader(100).read(path).warnings)
    reader = build(XrayReader(100, reduced_decoding=True).spec(), XrayReader)
    assert any(REDUCED.match(note) for note in reader.read(path).warnings)
    assert torch.equal(reader.native(path), XrayReader(100).native(path))
    old = {"class_path": "modalities.xray.reader.XrayReader", "init_args": {"size": 100, "channels": 1}}
    assert build(old, XrayReader).reduced_decoding is False, "a config of before the option"


@pytest.mark.parametrize(
    ("size", "attributes"), [(300, {}), (100, {"PixelPaddingValue": 0}), (100, {"BitsStored": 13, "HighBit": 12})], ids=str
)
def test_what_is_unusual_is_decoded_whole(tmp_path, size, attributes):
    path = write_film(tmp_path / "film.dcm", **attributes)
    one, other = XrayReader(size).read(path), XrayReader(size, reduced_decoding=True).read(path)
    assert torch.equal(one.pixels, other.pixels)
    assert one.warnings == other.warnings


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_a_cut_codestream_is_refused_reduced_as_whole(tmp_path, keep):
    path = write_film(tmp_path / "film.dcm", keep=keep)
    for reduced in (False, True):
        with pytest.raises(UnreadableImageError, match="could not be decoded"):
            XrayReader(100, reduced_decoding=reduced).read(path)


def test_slices_of_other_modalities_are_refused_reduced_as_whole(tmp_path):
    path = write_film(tmp_path / "slice.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    for reduced in (False, True):
        with pytest.raises(UnreadableImageError, match="expected a radiograph"):
            XrayReader(100, reduced_decoding=reduced).read(path)


@pytest.mark.skipif(not ZOO.is_dir(), reason="shared data folder with the DICOM zoo is absent")
@pytest.mark.parametrize("size", [64, 512])
def test_every_film_of_the_zoo_is_read_within_a_grey_level_of_the_exact_chain(size):
    plain, reduced = XrayReader(size, **PLAIN), XrayReader(size, **PLAIN, reduced_decoding=True)
    read, shortened = 0, []
    for path in sorted(ZOO.glob("*.dcm")):
        try:
            sample = plain.read(path)
        except UnreadableImageError as error:
            with pytest.raises(UnreadableImageError, match=re.escape(str(error))):
                reduced.read(path)
            continue
        exact = fit_radiograph(path, size, exact=True).pixels
        assert np.abs(sample.pixels[0][sample.valid].numpy().reshape(exact.shape) - exact).max() * 255 <= 1, path.name
        other = reduced.read(path)
        assert other.transform == sample.transform
        if other.warnings == sample.warnings:
            assert torch.equal(other.pixels, sample.pixels), path.name
        else:
            shortened.append(path.stem)
            assert (other.pixels - sample.pixels).abs().mean() * 255 <= 1, path.name
        read += 1
    assert read >= 10
    assert shortened == ["RG1_J2KI", "RG3_J2KI"]


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (XrayReader, {"size": 2**20}, "8192 pixels a side"),
        (XrayReader, {"size": 8193}, "8192 pixels a side"),
        (XrayReader, {"size": 8192, "channels": 5}, "numbers in all"),
        (XrayReader, {"channels": 2**20}, "16 channels"),
        (XrayReader, {"size": 0}, "at least 1"),
        (XrayReader, {"std": float("nan")}, "finite"),
        (XrayReader, {"mean": float("inf")}, "finite"),
        (CtReader, {"shape": (None, 2**20, 224)}, "8192 voxels along an axis"),
        (CtReader, {"shape": (8192, 8192, 8192)}, "numbers in all"),
        (CtReader, {"max_slices": 2**20}, "8192 voxels along an axis"),
        (CtReader, {"windows_hu": [(0, 1 + i) for i in range(17)]}, "16 windows"),
        (CtReader, {"spacing_mm": (float("nan"), 1, 1)}, "finite"),
        (CtReader, {"windows_hu": [(float("-inf"), 0)]}, "finite"),
        (CtReader, {"mean": float("inf")}, "finite"),
    ],
)
def test_what_no_reader_should_make_is_refused_when_it_is_built(kind, arguments, said):
    with pytest.raises(ValueError, match=said):
        kind(**arguments)
    with pytest.raises(ConfigError):
        build({"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}, ImageReader)


def test_the_largest_allowed_readers_can_be_built():
    assert XrayReader(8192, channels=4).size == 8192
    assert CtReader(shape=(2048, 512, 512)).shape == (2048, 512, 512)


@pytest.mark.parametrize(
    ("voxel_mm", "options"),
    [
        ((1.0, 1.0, 1.0), {"spacing_mm": (1e-6, 1e-6, 1e-6), "shape": (8, 8, 8)}),
        ((1.0, 1.0, 1.0), {"spacing_mm": (1.0, 1e-4, 1.0)}),
        ((1.0, 1.0, 1.0), {"spacing_mm": (2.0**20, 1.0, 1.0)}),
        ((1e-3, 1e-3, 1e-3), {"spacing_mm": (100.0, 1.0, 1.0)}),
        ((900.0, 900.0, 900.0), {"spacing_mm": (1.0, 1.0, 1.0)}),
    ],
    ids=str,
)
def test_a_spacing_that_would_make_too_much_of_a_volume_is_refused(tmp_path, voxel_mm, options):
    import nibabel

    values = np.random.default_rng(0).integers(-1000, 500, (12, 12, 12)).astype(np.int16)
    affine = np.diag([*voxel_mm, 1.0])
    reader = CtReader(**options, crop="none")
    with pytest.raises(UnreadableImageError, match="at most 8192 along an axis"):
        reader.sample(CtVolume(values, affine, hu_verdict(values)))
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "v.nii")
    with pytest.raises(UnreadableImageError, match=r"v\.nii"):
        reader.read(tmp_path / "v.nii")


OTHER = {
    XrayReader: {"size": 337, "channels": 3, "normalise": "fixed", "mean": 0.4978, "std": 0.2449, "reduced_decoding": True},
    CtReader: {
        "spacing_mm": (1.25, None, 0.7),
        "shape": (77, None, 333),
        "windows_hu": ((-1001.5, 399.0), (-57.0, 211.0)),
        "crop": "thorax",
        "max_slices": 91,
        "antialias": False,
        "mean": 0.123456789,
        "std": 0.987654321,
        "series": 3,
    },
}


@pytest.mark.parametrize("kind", OTHER)
def test_a_reader_tells_of_every_option_it_has(kind):
    names = set(inspect.signature(kind).parameters)
    assert set(OTHER[kind]) == names
    plain = kind().describe()
    for name, value in OTHER[kind].items():
        told = kind(**{name: value}).describe()
        assert set(told) == set(plain)
        assert told != plain, f"{name} makes no difference to what is told"
        numbers = re.findall(r"[\d.]+", str(value))
        text = " ".join(told.values())
        assert all(re.search(rf"(?<![\d.]){re.escape(f'{float(number):.15g}')}(?!\d)", text) for number in numbers), (name, text)
    assert {"size", "spacing", "crop", "normalisation", "interpolation", "refused"} <= set(plain)
    everything = " ".join(kind(**OTHER[kind]).describe().values())
    assert ("mm" in everything and "HU" in everything) == (kind is CtReader) or kind is XrayReader
