"""MHA, MHD, NRRD and NHDR as SimpleITK writes them, and headers that point elsewhere or promise too much."""

import sys
import zlib

import numpy as np
import pytest
import SimpleITK

from medvl.types import UnreadableImageError
from modalities.ct import closest_ras, read_ct
from modalities.ct.itk import read_itk
from modalities.phantom import sample_phantom


@pytest.fixture(scope="module")
def image():
    picture = SimpleITK.GetImageFromArray(sample_phantom(np.random.default_rng(2), 32).volume_hu)
    picture.SetSpacing((0.7, 0.8, 2.5))
    picture.SetOrigin((-11.5, 20, -300))
    picture.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    return picture


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_value_and_place_as_simpleitk(tmp_path, image, suffix, compressed):
    path = tmp_path / f"x{suffix}"
    SimpleITK.WriteImage(image, str(path), compressed)
    volume = read_ct(path)
    assert np.array_equal(volume.voxels, SimpleITK.GetArrayFromImage(image)) and volume.hu_verdict.state == "ok"
    assert volume.warnings == () and volume.voxels.dtype == np.int16
    for s, h, w in [(0, 0, 0), (3, 5, 7), (31, 15, 31)]:
        x, y, z = image.TransformIndexToPhysicalPoint((w, h, s))
        assert np.allclose(volume.affine @ [s, h, w, 1], [-x, -y, z, 1], atol=1e-6)
    expected = SimpleITK.DICOMOrient(image, "RAS")
    assert np.array_equal(closest_ras(volume)[0], SimpleITK.GetArrayFromImage(expected).transpose(2, 1, 0))


@pytest.mark.parametrize(
    "kind", [SimpleITK.sitkFloat64, SimpleITK.sitkUInt16, SimpleITK.sitkInt32, SimpleITK.sitkInt64, SimpleITK.sitkInt8]
)
def test_types(tmp_path, image, kind):
    cast = SimpleITK.Cast(SimpleITK.Clamp(image, SimpleITK.sitkInt16, 0, 100), kind)
    for suffix in (".mha", ".nrrd"):
        SimpleITK.WriteImage(cast, str(tmp_path / f"x{suffix}"))
        assert np.array_equal(read_itk(tmp_path / f"x{suffix}").voxels, SimpleITK.GetArrayFromImage(cast))


def refusal(path):
    with pytest.raises(UnreadableImageError) as caught:
        read_itk(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def header_edit(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_data_files_outside_the_folder_are_not_followed(tmp_path, image):
    inside = tmp_path / "in"
    inside.mkdir()
    for suffix, raw, key in ((".mhd", ".raw", b"ElementDataFile = "), (".nhdr", ".raw", b"data file: ")):
        path = inside / f"x{suffix}"
        SimpleITK.WriteImage(image, str(path))
        data = inside / f"x{raw}"
        content = path.read_bytes()
        (tmp_path / "out.raw").write_bytes(data.read_bytes())
        for name in (b"../out.raw", str(tmp_path / "out.raw").encode(), b"..\\out.raw", b"LIST", b"x%03d.raw 1 3 1"):
            path.write_bytes(content)
            header_edit(path, key + data.name.encode(), key + name)
            assert "data file" in refusal(path) or "several files" in refusal(path)
        path.write_bytes(content)
        data.unlink()
        data.symlink_to(tmp_path / "out.raw")
        assert "link out of its folder" in refusal(path)
        data.unlink()
        refusal(path)


def test_headers_that_promise_too_much(tmp_path, image):
    path = tmp_path / "x.mha"
    for old, new, compressed in (
        (b"DimSize = 32 16 32", b"DimSize = 32 16 33", False),
        (b"DimSize = 32 16 32", b"DimSize = 99999 99999 9", False),
        (b"DimSize = 32 16 32", b"DimSize = 3200 1600 32", True),
        (b"DimSize = 32 16 32", b"DimSize = 32 16", False),
        (b"DimSize = 32 16 32", b"DimSize = -1 16 32", False),
        (b"ElementType = MET_SHORT", b"ElementType = MET_OTHER", False),
        (b"ElementSpacing = ", b"ElementSpacing = 0 0 0 ", False),
        (b"ElementDataFile", b"NoDataFile", False),
    ):
        SimpleITK.WriteImage(image, str(path), compressed)
        header_edit(path, old, new)
        refusal(path)
    path = tmp_path / "x.nrrd"
    for old, new in (
        (b"sizes: 32 16 32", b"sizes: 32 16 33"),
        (b"sizes: 32 16 32", b"sizes: 99999 99999 9"),
        (b"encoding: raw", b"encoding: bzip2"),
        (b"type: short", b"type: block"),
    ):
        SimpleITK.WriteImage(image, str(path))
        header_edit(path, old, new)
        refusal(path)
    (tmp_path / "x.txt").write_text("nothing")
    refusal(tmp_path / "x.txt")
    refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_damaged_compressed_values_are_refused(tmp_path, image, suffix):
    """MetaIO prints "Uncompress failed" and hands over what its memory held."""
    path = tmp_path / f"x{suffix}"
    SimpleITK.WriteImage(image, str(path), True)
    data = next((p for p in tmp_path.iterdir() if p != path), path)
    content = data.read_bytes()
    start = 0 if data != path else content.index({".mha": b"LOCAL\n", ".nrrd": b"\n\n"}[suffix]) + (6 if suffix == ".mha" else 2)
    first = 10 if "n" in suffix else 0  # the head of a gzip stream holds a name and a time
    stream = zlib.decompressobj(zlib.MAX_WBITS + 32)
    stream.decompress(content[start:])
    refused = 0
    for at in np.linspace(start + first, len(content) - len(stream.unused_data) - 1, 40).astype(int):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        data.write_bytes(damaged)
        try:  # another reference back to the same values is whole, too
            assert np.array_equal(read_itk(path).voxels, SimpleITK.GetArrayFromImage(image))
        except UnreadableImageError as error:
            assert "compressed values" in str(error)
            refused += 1
        data.write_bytes(content[:at])
        refusal(path)
    assert refused >= 35
    data.write_bytes(content)
    assert np.array_equal(read_itk(path).voxels, SimpleITK.GetArrayFromImage(image))


def test_colour_and_several_volumes(tmp_path, image):
    SimpleITK.WriteImage(SimpleITK.Compose([image, image]), str(tmp_path / "x.mha"))
    refusal(tmp_path / "x.mha")
    SimpleITK.WriteImage(SimpleITK.JoinSeries([image, image]), str(tmp_path / "y.mha"))
    assert "4 dimensions" in refusal(tmp_path / "y.mha")


def test_without_simpleitk_the_error_names_the_extra(tmp_path, image, monkeypatch):
    SimpleITK.WriteImage(image, str(tmp_path / "x.mha"))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    assert "medvl[itk]" in refusal(tmp_path / "x.mha")
