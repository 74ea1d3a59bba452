"""Damaged, absurd and hostile DICOM files: read or refused with UnreadableImageError, in bounds, without a quoted header."""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from medvl.types import UnreadableImageError
from modalities.dicom import fit_radiograph, has_dicom_magic, read_dicom, read_radiograph, show, study_key

BUNDLED = Path(pydicom.__file__).parent / "data/test_files"
BASES = (
    "CT_small.dcm",
    "JPEG2000.dcm",
    "JPEGLSNearLossless_16.dcm",
    "JPGExtended.dcm",
    "MR_small_RLE.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "SC_rgb_rle_2frame.dcm",
    "SC_rgb_small_odd_jpeg.dcm",
    "image_dfl.dcm",
    "JPEGLSNearLossless_08.dcm",
)
SECONDS_EACH = 5.0


def film(**attributes: object) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.PatientName = "Secret^Name"
    ds.Rows = ds.Columns = 16
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.PixelData = np.arange(256, dtype="<u2").tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def saved(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def mutant(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four byte flips, a cut, a run of zeros or ones, a copied or dropped stretch; flips prefer the header."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        last = len(data) if rng.random() < 0.4 else min(len(data), 1500)
        at = int(rng.integers(0, max(1, last)))
        kind = rng.integers(0, 8)
        if kind < 4:
            data[at : at + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 4:
            data[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\xfe\xff\x00\xe0"][int(rng.integers(0, 4))]
        elif kind == 5:
            del data[at : at + int(rng.integers(1, 64))]
        elif kind == 6:
            data[at:at] = data[at : at + int(rng.integers(1, 64))]
        else:
            del data[max(140, at) :]
    return bytes(data)


def attack(count: int, folder: Path, seed: int) -> tuple[int, int, float]:
    """Read ``count`` mutants in every way; loaded, refused, and the longest CPU time of one (the machine may be busy)."""
    rng = np.random.default_rng(seed)
    contents = [(BUNDLED / name).read_bytes() for name in BASES]
    loaded = refused = 0
    longest = 0.0
    path = folder / "mutant.dcm"
    for i in range(count):
        path.write_bytes(mutant(contents[i % len(contents)], rng))
        start = time.process_time()
        study_key(path)
        try:
            image = read_dicom(path)
            pixels = show(image).pixels
            assert np.isfinite(pixels).all()
            assert 0 <= pixels.min() <= pixels.max() <= 1
            assert len(image.sha256) == 64
            loaded += 1
        except UnreadableImageError as error:
            assert str(error).startswith(str(path))
            assert error.__cause__ is None
            refused += 1
        with contextlib.suppress(UnreadableImageError):
            fit_radiograph(path, 24, reduce=i % 2 == 0)
        longest = max(longest, time.process_time() - start)
    return loaded, refused, longest


def test_three_hundred_mutants_load_or_are_refused(tmp_path):
    loaded, refused, longest = attack(300, tmp_path, 0)
    assert loaded > 30
    assert refused > 30
    assert longest < SECONDS_EACH


@pytest.mark.slow
def test_two_thousand_mutants_load_or_are_refused(tmp_path):
    loaded, refused, longest = attack(2000, tmp_path, 1)
    assert loaded + refused == 2000
    assert longest < SECONDS_EACH
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**21  # KiB: what the test process has loaded, and under 1 GB on top


def refusal(path: Path) -> str:
    """The message, the same from both readers; in time, and with nothing of the header."""
    start = time.process_time()
    messages = []
    for read in (read_dicom, read_radiograph):
        with pytest.raises(UnreadableImageError) as caught:
            read(path)
        messages.append(str(caught.value))
    assert time.process_time() - start < 2 * SECONDS_EACH
    assert all("ecret" not in m.lower() for m in messages)
    return messages[1]


def _long(tag: tuple[int, int], vr: bytes, length: int, value: bytes = b"") -> bytes:
    return struct.pack("<HH", *tag) + vr + b"\0\0" + struct.pack("<I", length) + value


def _replaced(ds: Dataset, path: Path, keyword: str, vr: bytes, length: int) -> Path:
    """The file with one element rewritten so that it claims ``length`` bytes that are not there."""
    saved(ds, path)
    content = path.read_bytes()
    at = content.index(struct.pack("<HH", pydicom.tag.Tag(keyword).group, pydicom.tag.Tag(keyword).element))
    path.write_bytes(content[:at] + _long((pydicom.tag.Tag(keyword).group, pydicom.tag.Tag(keyword).element), vr, length) + content[at:])
    return path


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"Rows": 65535, "Columns": 65535}, "65535 x 65535"),
        ({"Rows": 8000, "Columns": 8000}, "cut short"),
        ({"NumberOfFrames": 10**6}, "cut short"),
        ({"NumberOfFrames": -1}, "-1 frames"),
        ({"SamplesPerPixel": 60000}, "samples"),
        ({"BitsAllocated": 64, "BitsStored": 64}, "64 bits"),
        ({"BitsStored": 99}, "99 of 16 bits"),
        ({"Rows": 0}, "0 rows"),
        ({"Rows": [16, 16]}, "single number"),
        ({"PhotometricInterpretation": "SECRETS"}, "unknown"),
        ({"SamplesPerPixel": 3, "Rows": 8, "Columns": 8}, "of 3 samples"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_absurd_headers_are_refused(tmp_path, attributes, message):
    assert message in refusal(saved(film(**attributes), tmp_path / "film.dcm"))


def test_a_billion_rows_are_refused(tmp_path):
    """Rows has two bytes by its VR, so a billion is written as another VR."""
    path = saved(film(), tmp_path / "film.dcm")
    content = path.read_bytes()
    short = struct.pack("<HH2sHH", 0x0028, 0x0010, b"US", 2, 16)
    assert short in content
    path.write_bytes(content.replace(short, struct.pack("<HH2sHI", 0x0028, 0x0010, b"UL", 4, 10**9)))
    assert "1000000000" in refusal(path)


@pytest.mark.parametrize("length", [2**31, 2**32 - 2])
@pytest.mark.parametrize(
    ("keyword", "vr"), [("ModalityLUTSequence", b"SQ"), ("WindowCenter", b"UN"), ("RedPaletteColorLookupTableData", b"OW")]
)
def test_elements_that_claim_gigabytes_are_refused(tmp_path, keyword, vr, length):
    ds = film(WindowCenter=1, WindowWidth=1)
    ds.ModalityLUTSequence = Sequence([Dataset()])
    ds.RedPaletteColorLookupTableData = b"\0\0"
    assert "claims" in refusal(_replaced(ds, tmp_path / "film.dcm", keyword, vr, length))


@pytest.mark.parametrize(
    "descriptor",
    [[65535, 0, 16], [0, 65535, 16], [5, 0, 60000], [5, 0, 0], [2, 0, 16]],
)
def test_absurd_lut_descriptors_are_refused_or_read_in_bounds(tmp_path, descriptor):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    item.add_new("LUTData", "US", [0, 1, 2])
    path = saved(film(VOILUTSequence=Sequence([item])), tmp_path / "film.dcm")
    try:
        assert np.isfinite(read_radiograph(path).pixels).all()
    except UnreadableImageError:
        return
    assert descriptor == [2, 0, 16]


@pytest.mark.parametrize(
    "data",
    [
        [0, 1, 7] + [1, 65535, 9] * 20000,  # unfolds to a billion entries
        [0, 1, 7] + [2, 60000, 0, 0] * 100,  # indirect segments that repeat
        [2, 1, 0, 0],
        [1, 5, 9],
        [9, 9, 9],
    ],
)
def test_a_segmented_palette_unfolds_in_bounds(tmp_path, data):
    ds = film(PhotometricInterpretation="PALETTE COLOR")
    for colour in ("Red", "Green", "Blue"):
        ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [0, 0, 16])
        ds.add_new(f"Segmented{colour}PaletteColorLookupTableData", "OW", np.array(data, "<u2").tobytes())
    assert refusal(saved(ds, tmp_path / "film.dcm"))


@pytest.mark.parametrize("undefined", [True, False])
def test_deep_nesting_is_refused_or_read(tmp_path, undefined):
    depth = 20000
    path = saved(film(), tmp_path / "film.dcm")
    content = path.read_bytes()
    at = content.index(struct.pack("<HH", 0x0028, 0x0002))
    if undefined:
        nested = (_long((0x0008, 0x1140), b"SQ", 0xFFFFFFFF) + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * depth
    else:
        nested = b""
        for _ in range(2000):
            nested = _long((0x0008, 0x1140), b"SQ", len(nested) + 8, b"\xfe\xff\x00\xe0" + struct.pack("<I", len(nested)) + nested)
    path.write_bytes(content[:at] + nested + content[at:])
    if undefined:
        assert "RecursionError" in refusal(path)
    else:
        assert read_dicom(path).rows == 16  # a sequence that nothing asks for is not entered


def test_a_million_small_elements_are_refused_in_time(tmp_path):
    path = saved(film(), tmp_path / "film.dcm")
    content = path.read_bytes()
    at = content.index(struct.pack("<HH", 0x0028, 0x0002))
    path.write_bytes(content[:at] + struct.pack("<HH2sH", 0x0009, 0x0010, b"LO", 0) * 1_200_000 + content[at:])
    start = time.process_time()
    with pytest.raises(UnreadableImageError, match="while reading its header"):
        read_dicom(path)
    assert time.process_time() - start < SECONDS_EACH


def test_a_deflated_bomb_is_refused(tmp_path):
    ds = film()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = saved(ds, tmp_path / "film.dcm")
    assert read_dicom(path).transfer_syntax == "Deflated Explicit VR Little Endian"
    meta = path.read_bytes()
    end = 132 + 12 + int.from_bytes(meta[140:144], "little")
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(squeeze.compress(bytes(2**22)) for _ in range(100)) + squeeze.flush()
    path.write_bytes(meta[:end] + bomb)
    assert len(bomb) < 2**20
    assert "unfolds to more than" in refusal(path)


def test_a_deflated_file_of_any_size_costs_no_memory(tmp_path):
    """A file that names the deflated syntax and is a hole of a gigabyte: nothing of the hole may be held."""
    import tracemalloc

    ds = film()
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = saved(ds, tmp_path / "film.dcm")
    meta = path.read_bytes()
    path.write_bytes(meta[: 132 + 12 + int.from_bytes(meta[140:144], "little")])
    with path.open("r+b") as file:
        file.truncate(2**30)
    tracemalloc.start()
    try:
        assert refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "syntax", [JPEG2000Lossless, RLELossless, "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.50"]
)
@pytest.mark.parametrize("coded", [b"\0\0", b"\xff\xd8\xff\xd9", b"\xff\x4f\xff\x51" + bytes(60), bytes(range(256)), b"\xff" * 200])
def test_pixels_that_are_no_codestream_are_refused(tmp_path, syntax, coded):
    ds = film()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([coded])
    ds["PixelData"].is_undefined_length = True
    ds["PixelData"].VR = "OB"
    assert refusal(saved(ds, tmp_path / "film.dcm"))


def test_a_codestream_of_too_many_components_is_refused(tmp_path):
    content = bytearray((BUNDLED / "MR_small_jp2klossless.dcm").read_bytes())
    at = content.index(b"\xff\x4f\xff\x51")
    content[at + 40 : at + 42] = (16000).to_bytes(2, "big")
    (tmp_path / "film.dcm").write_bytes(content)
    assert "16000 samples" in refusal(tmp_path / "film.dcm")


def test_every_truncation_is_refused_or_whole(tmp_path):
    for name in ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "CT_small.dcm", "MR_small_jpeg_ls_lossless.dcm"):
        content = (BUNDLED / name).read_bytes()
        whole = read_dicom(BUNDLED / name).sha256
        path = tmp_path / name
        for length in np.linspace(0, len(content) - 1, 25).astype(int):
            path.write_bytes(content[:length])
            with contextlib.suppress(UnreadableImageError):
                assert read_dicom(path).sha256 == whole


def test_pipes_devices_folders_and_links_to_them_are_refused_without_waiting(tmp_path):
    pipe = tmp_path / "pipe.dcm"
    os.mkfifo(pipe)
    (tmp_path / "folder").mkdir()
    targets = {"pipe": pipe, "zero": Path("/dev/zero"), "null": Path("/dev/null"), "folder": tmp_path / "folder", "gone": tmp_path / "gone"}
    for name, target in targets.items():
        link = tmp_path / f"link_{name}.dcm"
        link.symlink_to(target)
        for path in (link, target):
            assert str(path) in refusal(path)
            assert study_key(path) is None
            with pytest.raises(OSError):
                has_dicom_magic(path)
    loop = tmp_path / "loop.dcm"
    loop.symlink_to(loop)
    assert "cannot be opened" in refusal(loop)


def test_a_sparse_file_of_gigabytes_is_refused(tmp_path):
    path = saved(film(), tmp_path / "film.dcm")
    os.truncate(path, 2**31 + 10)
    assert "bytes" in refusal(path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address space limits as Linux has them")
def test_absurd_claims_need_no_memory(tmp_path):
    """The largest claims that pass the header's checks, in a process that may not have 1.5 GB more than it starts with."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [0, 0, 16])
    item.add_new("LUTData", "US", [0] * 2**16)
    paths = [saved(film(Rows=8192, Columns=8192, VOILUTSequence=Sequence([item])), tmp_path / "large.dcm")]
    ds = film(Rows=8192, Columns=8192)
    ds.file_meta.TransferSyntaxUID = RLELossless
    ds.PixelData = encapsulate([struct.pack("<16I", 2, 64, 70, *[0] * 13) + bytes([129, 0] * 1000)])
    ds["PixelData"].VR = "OB"
    paths.append(saved(ds, tmp_path / "rle.dcm"))
    sparse = saved(film(Rows=8192, Columns=8192, NumberOfFrames=8), tmp_path / "sparse.dcm")
    with sparse.open("r+b") as file:
        content = sparse.read_bytes()
        file.seek(content.index(struct.pack("<HH2sH", 0x7FE0, 0x0010, b"OW", 0)) + 8)
        file.write(struct.pack("<I", 2**30))
    os.truncate(sparse, 2**30 + 2**12)
    paths.append(sparse)
    code = (
        "import resource, sys; from pathlib import Path; from modalities.dicom import read_dicom, show;"
        "from medvl.types import UnreadableImageError; import numpy, pydicom, scipy.ndimage\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for p in sys.argv[1:]:\n"
        "    try: show(read_dicom(Path(p)))\n"
        "    except UnreadableImageError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    assert int(out.stdout) < 10**6  # KiB
