"""XrayReader on files written by pydicom and Pillow, against numpy and Pillow."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medvl.types import ImageReader, UnreadableImageError
from modalities.xray import XrayReader

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


@pytest.fixture
def grey() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (30, 20)).astype(np.uint8)


def save_dicom(path: Path, stored: np.ndarray, **attributes: object) -> Path:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    ds.Rows, ds.Columns = stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.WindowCenter, ds.WindowWidth, ds.ViewPosition = 2048, 4096, "PA"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    ds.PixelData = stored.astype("<u2").tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.PNG", "a.tiff"])
def test_an_eight_bit_picture_comes_as_it_is(tmp_path, grey, name):
    path = tmp_path / name
    Image.fromarray(grey).save(path)
    native = XrayReader(16).native(path)
    assert native.dtype == torch.float32
    np.testing.assert_allclose(native.numpy(), grey / 255, atol=1e-6)
    assert XrayReader(16).read(path).warnings == ()


def test_a_jpeg_is_what_pillow_decodes(tmp_path, grey):
    path = tmp_path / "a.jpg"
    Image.fromarray(grey).save(path, quality=80)
    np.testing.assert_allclose(XrayReader(16).native(path).numpy(), np.asarray(Image.open(path)) / 255, atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("top", "scale", "warned"), [(65535, 65535, False), (4000, 4095, True), (30000, 32767, True), (200, 255, True)])
def test_sixteen_bits_are_scaled_by_the_bits_in_use(tmp_path, suffix, top, scale, warned):
    stored = np.random.default_rng(0).integers(0, top, (9, 8)).astype(np.uint16)
    stored[0, 0] = top
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path)
    np.testing.assert_allclose(XrayReader(16).native(path).numpy(), stored / scale, atol=1e-6)
    assert bool(XrayReader(16).read(path).warnings) == warned


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_other_modes_turn_to_grey(tmp_path, grey, mode):
    colour = np.random.default_rng(1).integers(0, 256, (30, 20, 3)).astype(np.uint8)
    picture = Image.fromarray(colour).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(200)
    path = tmp_path / "a.tif"
    picture.save(path)
    again = Image.open(path)
    expected = np.asarray((again.convert("RGB") if mode != "LA" else again).convert("L")) / 255
    sample = XrayReader(16).read(path)
    np.testing.assert_allclose(XrayReader(16).native(path).numpy(), expected, atol=1e-6)
    assert any("colour" in w for w in sample.warnings) == (mode not in ("LA", "1"))
    assert any("transparency" in w for w in sample.warnings) == (mode in ("RGBA", "LA"))


def test_grey_stored_as_colour_needs_no_warning(tmp_path, grey):
    path = tmp_path / "a.png"
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(path)
    assert XrayReader(16).read(path).warnings == ()
    np.testing.assert_allclose(XrayReader(16).native(path).numpy(), grey / 255, atol=1e-6)


def test_exif_orientation_is_followed_and_told(tmp_path, grey):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(grey).save(path, exif=exif, quality=95)
    plain = np.asarray(Image.open(path)) / 255
    np.testing.assert_allclose(XrayReader(16).native(path).numpy(), np.rot90(plain, -1), atol=1e-6)
    assert any("EXIF" in w for w in XrayReader(16).read(path).warnings)


def test_a_tiff_with_a_second_page_gives_the_first(tmp_path, grey):
    path = tmp_path / "a.tif"
    Image.fromarray(grey).save(path, save_all=True, append_images=[Image.fromarray(255 - grey)])
    np.testing.assert_allclose(XrayReader(16).native(path).numpy(), grey / 255, atol=1e-6)
    assert any("2 images" in w for w in XrayReader(16).read(path).warnings)


def test_a_tiff_whose_white_is_zero_is_turned(tmp_path):
    stored = np.random.default_rng(0).integers(0, 65536, (9, 8)).astype(np.uint16)
    stored[0, 0] = 65535
    path = tmp_path / "a.tif"
    Image.fromarray(stored).save(path, tiffinfo={262: 0})
    np.testing.assert_allclose(XrayReader(16).native(path).numpy(), 1 - stored / 65535, atol=1e-6)


def test_a_dicom_goes_through_the_chain(tmp_path):
    stored = np.random.default_rng(0).integers(0, 4096, (40, 30)).astype(np.uint16)
    for name in ("a.dcm", "a.dicom", "A.DCM", "without_suffix", "1.2.840.113"):
        path = save_dicom(tmp_path / name, stored)
        sample = XrayReader(24).read(path)
        np.testing.assert_allclose(XrayReader(24).native(path).numpy(), np.clip((stored - 2047.5) / 4095 + 0.5, 0, 1), atol=1e-6)
        assert sample.view == "PA"
        assert sample.pixels.shape == (1, 24, 24)
        assert sample.transform.native_shape == (40, 30)


def test_content_counts_not_the_suffix(tmp_path, grey):
    path = tmp_path / "a.dcm"
    with path.open("wb") as file:
        Image.fromarray(grey).save(file, format="PNG")
    np.testing.assert_allclose(XrayReader(16).native(path).numpy(), grey / 255, atol=1e-6)


@pytest.mark.parametrize("normalise", ["image", "fixed"])
def test_padding_is_zero_and_marked(tmp_path, grey, normalise):
    path = tmp_path / "a.png"
    Image.fromarray(grey).save(path)
    sample = XrayReader(24, channels=3, normalise=normalise, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)).read(path)
    assert sample.pixels.shape == (3, 24, 24)
    assert sample.pixels.dtype == torch.float32
    assert (sample.pixels[:, ~sample.valid] == 0).all()
    assert sample.valid.sum() == 24 * 16
    assert not sample.valid[:, :4].any()


def test_fixed_normalisation_is_the_formula(grey):
    square = np.repeat(grey[:20], 1, axis=0)
    sample = XrayReader(20, channels=2, normalise="fixed", mean=(0.4, 0.5), std=(0.2, 0.25)).read_array(square)
    np.testing.assert_allclose(sample.pixels[0].numpy(), (square / 255 - 0.4) / 0.2, atol=1e-5)
    np.testing.assert_allclose(sample.pixels[1].numpy(), (square / 255 - 0.5) / 0.25, atol=1e-5)


def test_image_normalisation_is_the_formula_of_numpy(grey):
    square = grey[:20].astype(np.float64) / 255
    clipped = np.clip(square, *np.percentile(square, [1, 99]))
    got = XrayReader(20).read_array(grey[:20]).pixels[0].numpy()
    np.testing.assert_allclose(got, (clipped - clipped.mean()) / clipped.std(), atol=1e-4)


@given(gain=st.floats(0.2, 1), offset=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_image_normalisation_forgets_the_exposure(gain, offset):
    image = np.random.default_rng(0).random((20, 20))
    bright = gain * image + offset * (1 - gain)
    got = [XrayReader(32).read_array(x).pixels for x in (image, bright)]
    torch.testing.assert_close(got[0], got[1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image_is_all_zero(value):
    assert (XrayReader(8).read_array(np.full((5, 7), value, np.uint8)).pixels == 0).all()


@given(
    hnp.arrays(
        dtype=st.sampled_from([np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.float32, np.float64, np.bool_]),
        shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    )
)
@settings(max_examples=150, deadline=None)
def test_any_array_comes_out_finite_or_is_refused(array):
    reader = XrayReader(8)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        with pytest.raises(ValueError, match="NaN or infinite"):
            reader.read_array(array)
        return
    assert torch.isfinite(reader.read_array(array).pixels).all()


def test_arrays_keep_their_order_of_grey():
    """Whatever the scaling, brighter stays brighter."""
    base = np.random.default_rng(0).integers(0, 200, (16, 16))
    expected = np.argsort(base.ravel(), kind="stable")
    for array in (base.astype(np.uint8), base.astype(np.uint16) * 20, base.astype(np.int16) - 100, base / 199, base * 1e6):
        got = XrayReader(16, normalise="fixed").read_array(array).pixels[0].numpy().ravel()
        assert (np.diff(got[expected]) >= -1e-6).all()


def test_lists_and_tensors_are_arrays_too(grey):
    expected = XrayReader(16).read_array(grey).pixels
    torch.testing.assert_close(XrayReader(16).read_array(torch.from_numpy(grey)).pixels, expected)
    torch.testing.assert_close(XrayReader(16).read_array((grey / 255).tolist()).pixels, expected)


@pytest.mark.parametrize("array", [np.zeros((3, 4, 5)), np.zeros(4), np.zeros((0, 4)), np.zeros((2, 2), complex), np.array([["a", "b"]])])
def test_what_is_no_grey_array_is_refused(array):
    with pytest.raises(ValueError, match=r"expected real numbers of shape \(H, W\)"):
        XrayReader(8).read_array(array)


def test_collate_stacks(grey):
    reader = XrayReader(16)
    samples = [reader.read_array(grey), reader.read_array(grey.T)]
    batch = reader.collate(samples)
    assert batch.pixels.shape == (2, 1, 16, 16)
    assert batch.valid is not None
    assert batch.valid.shape == (2, 16, 16)
    torch.testing.assert_close(batch.pixels[1], samples[1].pixels)
    with pytest.raises(ValueError, match="no samples"):
        reader.collate([])
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), this reader makes \(1, 16, 16\)"):
        reader.collate([XrayReader(8).read_array(grey)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "at least 1"),
        ({"channels": 0}, "at least 1"),
        ({"std": 0.0}, "positive"),
        ({"mean": (0.1, 0.2)}, "2 numbers for 1 channels"),
        ({"normalise": "minmax"}, "expected 'image' or 'fixed'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        XrayReader(**arguments)


def png_bomb() -> bytes:
    """A PNG header that claims 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def truncated_png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50)).astype(np.uint8)).save(out, format="PNG")
    return out.getvalue()[:900]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bomb.png", png_bomb()),
        ("cut.png", truncated_png()),
        ("text.png", b"hello"),
        ("table.csv", b"a,b\n1,2\n"),
        ("empty.jpg", b""),
        ("gif.png", b"GIF89a" + bytes(100)),
        ("tiff.tif", b"II*\x00" + bytes(50)),
        ("jpeg.jpg", b"\xff\xd8\xff\xe0" + bytes(50)),
        ("noise", b"\x01\x02\x03" * 99),
    ],
)
def test_what_is_no_radiograph_is_refused_with_its_path(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    for call in (XrayReader(8).read, XrayReader(8).native):
        with pytest.raises(UnreadableImageError, match=name):
            call(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(UnreadableImageError, match="no such file"):
        XrayReader(8).read(tmp_path / "missing.png")
    with pytest.raises(UnreadableImageError, match="folder"):
        XrayReader(8).read(tmp_path)


def test_find_images_passes_over_tables_and_masks(tmp_path, grey):
    wanted = ["b/film.PNG", "a/film.dcm", "a/film.dicom", "z.jpg", "c/no_suffix", "c/1.2.3"]
    for name in [*wanted, "masks/film.png", "b/masks/film.png", ".hidden/film.png", "b/.film.png"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("c/"):
            save_dicom(path, np.zeros((4, 4), np.uint16))
        else:
            path.write_bytes(b"")
    for name in ("manifest.csv", "results.json", "notes.txt", "volume.nii.gz", "c/README", "a/DICOMDIR", "picture.gif"):
        (tmp_path / name).write_bytes(b"x" * 200)
    (tmp_path / "a/DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = XrayReader(8).find_images(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in found] == sorted(wanted)


def test_a_folder_named_masks_is_read_when_it_is_the_one_asked_for(tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/film.png").write_bytes(b"")
    assert len(XrayReader(8).find_images(tmp_path / "masks")) == 1


def test_a_planted_pixel_is_found_in_native_pixels(tmp_path):
    """Through a real file, the reader and the way back."""
    stored = np.zeros((90, 60), dtype=np.uint16)
    stored[70:73, 11:14] = 4000
    path = save_dicom(tmp_path / "film.dcm", stored)
    sample = XrayReader(45, normalise="fixed").read(path)
    grid = torch.where(sample.valid, sample.pixels[0], torch.nan)
    row, col = np.unravel_index(int(sample.transform.map_to_native(grid).argmax()), stored.shape)
    assert abs(row - 71) <= 1
    assert abs(col - 12) <= 1


def test_left_stays_left(tmp_path):
    stored = np.zeros((32, 32), dtype=np.uint16)
    stored[:, 24:] = 4000
    pixels = XrayReader(32).read(save_dicom(tmp_path / "film.dcm", stored, PatientOrientation=["R", "F"])).pixels[0]
    assert pixels[:, 24:].min() > pixels[:, :24].max()


def test_files_of_one_study_share_a_key_that_does_not_tell_the_uid(tmp_path):
    stored, reader = np.zeros((8, 8), np.uint16), XrayReader(8)
    uids = {"a.dcm": "1.2.33", "b": "1.2.33", "c.dcm": "1.2.34"}
    keys = {name: reader.study_key(save_dicom(tmp_path / name, stored, StudyInstanceUID=uid)) for name, uid in uids.items()}
    assert keys["a.dcm"] == keys["b"] != keys["c.dcm"]
    assert all(key is not None and "1.2.3" not in key for key in keys.values())
    bare, cut = tmp_path / "bare.dcm", tmp_path / "cut.dcm"
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    del dataset.file_meta
    dataset.save_as(bare, implicit_vr=False, little_endian=True, enforce_file_format=False)
    cut.write_bytes((tmp_path / "a.dcm").read_bytes()[:-40])
    assert reader.study_key(bare) == reader.study_key(cut) == keys["a.dcm"]


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("uid", [None, "", "REMOVED", ["1.2.3", "1.2.4"]])
def test_a_file_without_a_usable_uid_is_a_study_of_its_own(tmp_path, uid):
    attributes = {} if uid is None else {"StudyInstanceUID": uid}
    assert XrayReader(8).study_key(save_dicom(tmp_path / "a.dcm", np.zeros((8, 8), np.uint16), **attributes)) is None


def test_no_picture_or_unreadable_file_has_a_study_key(tmp_path, grey):
    Image.fromarray(grey).save(tmp_path / "a.png")
    (tmp_path / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"nothing of use")
    (tmp_path / "empty.dcm").write_bytes(b"")
    for name in ("a.png", "broken.dcm", "empty.dcm", "absent.dcm", ".", "x" * 400, "a\0b"):
        assert XrayReader(8).study_key(tmp_path / name) is None


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_the_study_key_of_any_bytes_is_a_key_or_none(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "hostile.dcm"
    path.write_bytes(bytes(128) + b"DICM" + content)
    key = XrayReader(8).study_key(path)
    assert key is None or len(key) == 32


def test_the_reader_is_a_reader():
    assert issubclass(XrayReader, ImageReader)
    assert ".dcm" in XrayReader.suffixes


def test_reading_does_not_load_trainers_or_plotters(tmp_path, grey):
    path = tmp_path / "a.png"
    Image.fromarray(grey).save(path)
    code = (
        "import sys; from pathlib import Path; from modalities.xray import XrayReader; "
        f"XrayReader(8).read(Path({str(path)!r})); "
        "print([m for m in ('monai', 'lightning', 'matplotlib', 'timm', 'transformers', 'pydicom') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(not (SHARED / "cxr").is_dir(), reason="shared data folder with chest X-rays is absent")
def test_real_chest_films_read_and_stand_as_pillow_has_them():
    reader = XrayReader(64)
    paths = reader.find_images(SHARED / "cxr")
    assert len(paths) == 130
    for path in paths[::10]:
        sample = reader.read(path)
        np.testing.assert_allclose(reader.native(path).numpy(), np.asarray(Image.open(path)) / 255, atol=1e-6)
        inside = sample.pixels[:, sample.valid]
        assert abs(float(inside.mean())) < 1e-3
        assert float(inside.std()) == pytest.approx(1, abs=1e-2)


@pytest.mark.skipif(not (SHARED / "dicom_zoo").is_dir(), reason="shared data folder with the DICOM zoo is absent")
def test_the_real_chest_radiograph_of_the_zoo():
    """RG1_J2KI: a chest PA with the lungs darker than mediastinum and abdomen, and corners of air."""
    path = SHARED / "dicom_zoo/RG1_J2KI.dcm"
    if not path.exists():
        pytest.skip("RG1_J2KI.dcm is not in the shared data folder")
    sample = XrayReader(128).read(path)
    image = XrayReader(128).native(path).numpy()
    assert image.shape == (1955, 1841)
    assert sample.view == "PA"
    lung, mediastinum, abdomen = image[500:700, 500:700].mean(), image[900:1100, 850:950].mean(), image[1600:1750, 300:500].mean()
    assert lung < mediastinum
    assert lung < abdomen


def test_a_slice_of_ct_is_no_radiograph(tmp_path):
    """A study's folder often holds both: its slices must not be averaged into the score of the film."""
    from modalities.export import write_ct_series

    affine = np.array([[0, 0, -2.0, 0], [0, -2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    write_ct_series(tmp_path, np.zeros((2, 8, 9), dtype=np.int16), affine, patient_id="p", study_id="s")
    with pytest.raises(UnreadableImageError, match="holds CT Image Storage, expected a radiograph"):
        XrayReader(size=32).read(tmp_path / "0001.dcm")
