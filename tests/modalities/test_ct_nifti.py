"""NIfTI against nibabel and SimpleITK: types, byte order, scaling, forms, dimensions, and what is refused."""

import gzip
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK

from medvl.types import UnreadableImageError
from modalities.ct import closest_ras, read_ct, read_nifti, rescale_from_metadata
from modalities.phantom import sample_phantom

AFFINE = np.array([[-0.7, 0.05, 0, 90], [0.05, 0.7, 0.1, -80], [0, -0.1, 2.5, -300], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def hu():
    """(X, Y, Z) of a chest phantom."""
    return np.ascontiguousarray(sample_phantom(np.random.default_rng(2), 32).volume_hu.transpose(2, 1, 0))


def save(path, data, affine=AFFINE, kind=nibabel.Nifti1Image, **header):
    image = kind(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1, strip_shears=True)
    slope, inter = header.pop("slope", None), header.pop("inter", None)
    for name, value in header.items():
        image.header[name] = value
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
    nibabel.save(image, path)
    return path


def same_as_nibabel(path, volume):
    expected = nibabel.load(path)
    assert np.array_equal(volume.voxels, expected.get_fdata().astype(np.float32).reshape(expected.shape[:3]).transpose(2, 1, 0))
    assert np.allclose(volume.affine[:, [2, 1, 0, 3]], expected.affine, atol=1e-6)
    canonical = nibabel.as_closest_canonical(expected)
    values, affine = closest_ras(volume)
    assert np.array_equal(values, canonical.get_fdata().astype(np.float32).reshape(canonical.shape[:3]))
    assert np.allclose(affine, canonical.affine, atol=1e-4)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "i1", "u1", "<i4", ">i4", "<i8", "<u4", "<f4", ">f4", "<f8"])
def test_types_and_byte_orders(tmp_path, hu, dtype, suffix):
    data = hu.clip(*((np.iinfo(dtype).min, np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else (-2000, 4000)))
    data = (data + (0.25 if "f" in dtype else 0)).astype(dtype)
    header = nibabel.Nifti1Header(endianness=dtype[0] if dtype[0] in "<>" else "<")
    header.set_data_dtype(dtype)
    image = nibabel.Nifti1Image(data, AFFINE, header)
    path = tmp_path / f"x{suffix}"
    nibabel.save(image, path)
    volume = read_nifti(path)
    same_as_nibabel(path, volume)
    assert volume.voxels.dtype == (np.float32 if "f" in dtype else np.int16) and volume.voxels.dtype.isnative


def test_plain_int16_is_a_memory_map(tmp_path, hu):
    volume = read_nifti(save(tmp_path / "x.nii", hu))
    base = volume.voxels
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) and volume.voxels.flags.c_contiguous and not volume.voxels.flags.writeable


def test_nifti2(tmp_path, hu):
    for suffix in (".nii", ".nii.gz"):
        path = save(tmp_path / f"x{suffix}", hu, kind=nibabel.Nifti2Image)
        same_as_nibabel(path, read_nifti(path))


@pytest.mark.parametrize(
    ("slope", "inter", "dtype"), [(1, -1024, np.int16), (2, 10, np.int16), (0.5, -1024, np.float32), (1, 0.5, np.float32)]
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_scaling_of_the_file_is_applied_once(tmp_path, hu, suffix, slope, inter, dtype):
    path = tmp_path / f"x{suffix}"
    image = nibabel.Nifti1Image(((hu + 1024) // 2).astype(np.int16), AFFINE)
    image.header.set_slope_inter(slope, inter)
    raw = bytearray(image.to_bytes())  # nibabel rescales on saving; write the fields themselves
    raw[112:120] = struct.pack("<ff", slope, inter)
    path.write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
    volume = read_nifti(path)
    same_as_nibabel(path, volume)
    assert volume.voxels.dtype == dtype


@pytest.mark.parametrize("fields", [(0.0, 5.0), (float("nan"), 5.0), (float("inf"), 5.0)])
def test_a_slope_of_zero_or_nan_is_no_scaling(tmp_path, hu, fields):
    raw = bytearray(nibabel.Nifti1Image(hu, AFFINE).to_bytes())
    raw[112:120] = struct.pack("<ff", *fields)
    (tmp_path / "x.nii").write_bytes(raw)
    assert np.array_equal(read_nifti(tmp_path / "x.nii").voxels, hu.transpose(2, 1, 0))


def test_extensions_are_passed_over(tmp_path, hu):
    image = nibabel.Nifti1Image(hu, AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"SECRET^NAME" * 50))
    for suffix in (".nii", ".nii.gz"):
        nibabel.save(image, tmp_path / f"x{suffix}")
        same_as_nibabel(tmp_path / f"x{suffix}", read_nifti(tmp_path / f"x{suffix}"))


def test_four_dimensions(tmp_path, hu):
    one = read_nifti(save(tmp_path / "one.nii.gz", hu[..., None]))
    assert one.shape == hu.shape[::-1] and any("dimensions" in warning for warning in one.warnings)
    with pytest.raises(UnreadableImageError, match=r"holds 2 volumes of 32 x 16 x 32 voxels; expected one"):
        read_nifti(save(tmp_path / "two.nii.gz", np.stack([hu, hu], axis=-1)))
    with pytest.raises(UnreadableImageError, match="dimensions"):
        read_nifti(save(tmp_path / "flat.nii.gz", hu[..., 0]))


def test_forms(tmp_path, hu):
    path = tmp_path / "x.nii.gz"
    image = nibabel.Nifti1Image(hu, AFFINE)
    moved = np.diag([2.0, 2, 2, 1])
    image.set_sform(moved, 1)
    image.set_qform(np.diag([-2.0, 2, 2, 1]), 1)
    nibabel.save(image, path)
    volume = read_nifti(path)
    assert np.allclose(volume.affine[:, [2, 1, 0, 3]], moved)
    assert any("qform and sform disagree by up to 124" in warning for warning in volume.warnings)
    image.set_sform(moved, 0)
    image.set_qform(np.diag([-2.0, 2, 2, 1]), 1)
    nibabel.save(image, path)
    volume = read_nifti(path)
    assert volume.orientation == "LAS" and volume.warnings == ()
    same_as_nibabel(path, volume)
    raw = bytearray(image.to_bytes())
    raw[252:256] = b"\0\0\0\0"
    (tmp_path / "none.nii").write_bytes(raw)
    with pytest.raises(UnreadableImageError, match="has no orientation"):
        read_nifti(tmp_path / "none.nii")
    guessed = read_nifti(tmp_path / "none.nii", allow_no_orientation=True)
    same_as_nibabel(tmp_path / "none.nii", guessed)
    assert any("left and right are unknown" in warning for warning in guessed.warnings)


def test_pixdim_that_contradicts_the_sform_is_told(tmp_path, hu):
    image = nibabel.Nifti1Image(hu, AFFINE)
    raw = bytearray(image.to_bytes())
    raw[80:92] = struct.pack("<fff", 1, 1, 1)
    (tmp_path / "x.nii").write_bytes(raw)
    assert any("pixdim says" in warning for warning in read_nifti(tmp_path / "x.nii").warnings)


def test_a_sibling_of_the_other_suffix_is_not_read(tmp_path, hu):
    """SimpleITK reads x.nii when asked for x.nii.gz."""
    save(tmp_path / "x.nii", hu)
    save(tmp_path / "x.nii.gz", hu + 1)
    assert np.array_equal(read_ct(tmp_path / "x.nii.gz").voxels, (hu + 1).transpose(2, 1, 0))
    assert np.array_equal(read_ct(tmp_path / "x.nii").voxels, hu.transpose(2, 1, 0))


def test_simpleitk_agrees_on_place_and_value(tmp_path, hu):
    affine = nibabel.affines.from_matvec(np.diag([-0.7, 0.7, 2.5]) @ np.eye(3)[[0, 2, 1]], [90, -80, -300])
    path = save(tmp_path / "x.nii.gz", hu, affine)
    volume, image = read_nifti(path), SimpleITK.ReadImage(str(path))
    assert np.array_equal(volume.voxels, SimpleITK.GetArrayFromImage(image))
    for s, h, w in [(0, 0, 0), (3, 5, 7), (31, 15, 31)]:
        x, y, z = image.TransformIndexToPhysicalPoint((w, h, s))
        assert np.allclose(volume.affine @ [s, h, w, 1], [-x, -y, z, 1], atol=1e-4)


def test_suffixes_do_not_matter(tmp_path, hu):
    save(tmp_path / "x.nii", hu).rename(tmp_path / "plain.nii.gz")
    save(tmp_path / "y.nii.gz", hu).rename(tmp_path / "packed.nii")
    for name in ("plain.nii.gz", "packed.nii"):
        assert np.array_equal(read_ct(tmp_path / name).voxels, hu.transpose(2, 1, 0))


def test_ct_rate_first_and_second_release_come_out_alike(tmp_path, hu):
    """The first release holds stored values in a header without spacing, the second HU; the metadata row is the same."""
    true = np.diag([0.7, 0.7, 1.5, 1])
    first = save(tmp_path / "v1.nii.gz", (hu + 1024).astype(np.int16), np.eye(4))
    wide = save(tmp_path / "v1_8192.nii.gz", (hu + 8192).astype(np.int16), np.eye(4))
    second = save(tmp_path / "v2.nii.gz", hu, true)
    for path, intercept in ((first, -1024), (wide, -8192), (second, -1024)):
        volume = read_nifti(path, rescale=(1, intercept), spacing_mm=(1.5, 0.7, 0.7))
        assert np.array_equal(volume.voxels, hu.transpose(2, 1, 0)) and volume.voxels.dtype == np.int16
        assert volume.hu_verdict.state == "ok" and np.allclose(volume.spacing_mm, (1.5, 0.7, 0.7))
        assert len(volume.repairs) == (0 if path == second else 2)
        assert any("already in HU" in warning for warning in volume.warnings) == (path == second)
    assert read_nifti(first).hu_verdict.state == "not_rescaled"  # told, not repaired: there is no metadata
    assert np.array_equal(read_nifti(first).voxels, (hu + 1024).transpose(2, 1, 0))
    row = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    asked = read_ct(first, rescale=rescale_from_metadata(row), rescale_policy="apply")
    assert np.array_equal(asked.voxels, hu.transpose(2, 1, 0)) and "as asked" in asked.repairs[0]
    twice = read_nifti(second, rescale=(1, -1024), rescale_policy="apply")
    assert twice.hu_verdict.state == "rescaled_twice" and any("rescaled_twice" in warning for warning in twice.warnings)
    assert read_nifti(first, rescale=(1, -1024), rescale_policy="never").hu_verdict.state == "not_rescaled"
    with pytest.raises(UnreadableImageError, match="cannot tell whether"):
        read_nifti(save(tmp_path / "soft.nii.gz", np.full_like(hu, 40) + (hu % 3)), rescale=(1, -1024))


def refusal(path, **options):
    with pytest.raises(UnreadableImageError) as caught:
        read_nifti(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_truncated_and_damaged(tmp_path, hu):
    plain, packed = save(tmp_path / "x.nii", hu), save(tmp_path / "x.nii.gz", hu)
    content, deflated = plain.read_bytes(), packed.read_bytes()
    for keep in (0, 3, 200, 352, 1000, len(content) - 1):
        plain.write_bytes(content[:keep])
        refusal(plain)
    for keep in (0, 9, 100, len(deflated) // 2, len(deflated) - 1):
        packed.write_bytes(deflated[:keep])
        refusal(packed)
    flipped = bytearray(deflated)
    flipped[-6] ^= 1  # the checksum
    packed.write_bytes(flipped)
    refusal(packed)


def test_bombs_are_refused_before_they_are_inflated(tmp_path, hu):
    raw = bytearray(nibabel.Nifti1Image(hu, AFFINE).to_bytes())
    for dims, word in (((3, 32767, 32767, 32767), "more than"), ((3, 2000, 2000, 200), "can hold")):
        raw[40:48] = struct.pack("<4h", *dims)
        (tmp_path / "x.nii.gz").write_bytes(gzip.compress(raw))
        assert word in refusal(tmp_path / "x.nii.gz")
        (tmp_path / "x.nii").write_bytes(raw)
        refusal(tmp_path / "x.nii")


def test_inflating_stops_where_the_header_says(tmp_path, hu):
    raw = nibabel.Nifti1Image(hu, AFFINE).to_bytes()
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(raw + bytes(20_000_000), 1))
    volume = read_nifti(tmp_path / "x.nii.gz")
    assert np.array_equal(volume.voxels, hu.transpose(2, 1, 0)) and any("more than the header declares" in w for w in volume.warnings)


def test_other_content(tmp_path, hu):
    rgb = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, AFFINE), tmp_path / "rgb.nii")
    assert "colour" in refusal(tmp_path / "rgb.nii")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.complex64), AFFINE), tmp_path / "complex.nii")
    assert "complex" in refusal(tmp_path / "complex.nii")
    nibabel.save(nibabel.Nifti1Pair(hu, AFFINE), tmp_path / "pair.hdr")
    assert "two-file" in refusal(tmp_path / "pair.hdr")
    (tmp_path / "text.nii").write_text("no image at all " * 100)
    assert "expected a NIfTI file" in refusal(tmp_path / "text.nii")
    refusal(tmp_path)
    refusal(tmp_path / "absent.nii")
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([1.0, 1, 1, 1])), tmp_path / "flat.nii")
    raw = bytearray((tmp_path / "flat.nii").read_bytes())
    raw[280:328] = bytes(48)
    (tmp_path / "flat.nii").write_bytes(raw)
    assert "sform" in refusal(tmp_path / "flat.nii")
    nan = np.full((4, 4, 4), np.nan, np.float32)
    nibabel.save(nibabel.Nifti1Image(nan, AFFINE), tmp_path / "nan.nii")
    assert "no finite value" in refusal(tmp_path / "nan.nii")
    nan[0] = -1000
    nibabel.save(nibabel.Nifti1Image(nan, AFFINE), tmp_path / "nan.nii")
    assert any("not finite" in warning for warning in read_nifti(tmp_path / "nan.nii").warnings)


def test_links_to_files_are_followed(tmp_path, hu):
    save(tmp_path / "blob.nii.gz", hu)
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "blob.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "link.nii.gz").voxels, hu.transpose(2, 1, 0))
