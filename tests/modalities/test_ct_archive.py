"""Zips that were made to harm are refused before anything is written; what is unpacked is gone afterwards."""

import io
import stat
import struct
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medvl.types import UnreadableImageError
from modalities.ct import read_ct
from modalities.ct.archive import ArchiveLimits, list_members, unpacked


def make(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refusal(path, limits=None):
    with pytest.raises(UnreadableImageError) as caught:
        list_members(path, limits)
    with pytest.raises(UnreadableImageError), unpacked(path, limits=limits):
        pass
    assert str(path) in str(caught.value) and "SECRET" not in str(caught.value).replace(str(path), "")
    return str(caught.value)


def test_members_are_unpacked_under_our_names_and_removed(tmp_path):
    path = make(
        tmp_path / "a.zip",
        {"SECRET/a.DCM": b"one", "SECRET/b.nii.gz": b"two", "c.exe": b"three", "d/": b"", "__MACOSX/._a": b"x", ".hid": b"y"},
    )
    members = list_members(path)
    assert [(m.index, m.size, m.suffix) for m in members] == [(0, 3, ".dcm"), (1, 3, ".nii.gz"), (2, 5, "")]
    with unpacked(path, [1, 0]) as files:
        assert [file.read_bytes() for file in files] == [b"two", b"one"] and [file.name for file in files] == [
            "000001.nii.gz",
            "000000.dcm",
        ]
        folder = files[0].parent
    assert not folder.exists()
    with pytest.raises(RuntimeError), unpacked(path) as files:
        raise RuntimeError
    assert not files[0].parent.exists()
    with pytest.raises(UnreadableImageError, match="has changed"), unpacked(path, [7]):
        pass


@pytest.mark.parametrize("name", ["../SECRET", "/etc/SECRET", "a/../../SECRET", "C:/SECRET", "..\\SECRET", "a\\..\\..\\SECRET"])
def test_zip_slip(tmp_path, name):
    assert "leaves the folder" in refusal(make(tmp_path / "a.zip", {"fine.dcm": b"x", name: b"x"}))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_links_and_devices(tmp_path):
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        info = zipfile.ZipInfo("SECRET")
        info.external_attr = (kind | 0o777) << 16
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(info, "/etc/passwd")
        assert "is a link or a device" in refusal(tmp_path / "a.zip")


def test_bombs(tmp_path):
    path = make(tmp_path / "a.zip", {"x.dcm": bytes(3_000_000)})
    assert "decompression bomb" in refusal(path, ArchiveLimits(free_bytes=2**20))
    assert "would unpack to" in refusal(path, ArchiveLimits(total_bytes=2**20))
    many = make(tmp_path / "b.zip", {f"{i}": b"" for i in range(30)})
    assert "holds 30 members" in refusal(many, ArchiveLimits(members=20))
    assert "another method" in refusal(make(tmp_path / "c.zip", {"x": bytes(100)}, zipfile.ZIP_BZIP2))


def test_a_member_that_lies_about_its_size(tmp_path):
    content = bytearray(make(tmp_path / "a.zip", {"x.dcm": bytes(200_000)}).read_bytes())
    central = content.rindex(b"PK\x01\x02")
    for size in (10, 2**31):
        content[central + 24 : central + 28] = struct.pack("<I", size)
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(UnreadableImageError), unpacked(tmp_path / "a.zip"):
            pass


def test_encrypted_and_damaged(tmp_path):
    content = make(tmp_path / "a.zip", {"x.dcm": b"0123456789" * 50}, zipfile.ZIP_STORED).read_bytes()
    locked = bytearray(content)
    locked[locked.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(locked)
    assert "is encrypted" in refusal(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(content[:-30])
    assert "damaged or none" in refusal(tmp_path / "a.zip")
    flipped = bytearray(content)
    flipped[100] ^= 1
    (tmp_path / "a.zip").write_bytes(flipped)
    with pytest.raises(UnreadableImageError, match="damaged"), unpacked(tmp_path / "a.zip"):
        pass


def test_a_volume_in_a_zip(tmp_path):
    data = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    image = nibabel.Nifti1Image(data, np.diag([0.7, 0.7, 2, 1]))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("SECRET.nii", image.to_bytes())
    (tmp_path / "a.zip").write_bytes(packed.getvalue())
    volume = read_ct(tmp_path / "a.zip")
    assert np.array_equal(volume.voxels, data.transpose(2, 1, 0)) and volume.voxels.flags.owndata
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("SECRET2.nii", image.to_bytes())
    with pytest.raises(UnreadableImageError, match="holds 2 volume files"):
        read_ct(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("SECRET.nii", image.to_bytes()[:400])
    with pytest.raises(UnreadableImageError, match="member 1 is cut short") as caught:
        read_ct(tmp_path / "b.zip")
    assert "SECRET" not in str(caught.value) and "medvl-zip" not in str(caught.value)
    assert not list(Path(__import__("tempfile").gettempdir()).glob("medvl-zip-*"))
