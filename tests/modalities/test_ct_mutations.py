"""Seeded mutations of NIfTI, DICOM, zip, MHA and NRRD files: each is read or refused with our error, quickly and in little memory.

Those that SimpleITK reads go through a process of their own, since a library in C++ may also crash; it has a limit of memory and of time.
"""

import gzip
import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from medvl.types import UnreadableImageError
from modalities.ct import read_ct
from modalities.export import write_ct_series

SECONDS_EACH = 5
GROWN_MIB = 1024
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="address space limits as Linux has them")
EXTREMES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\x01",
    b"\xff\xff",
    b"\xff\x7f",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\x80\x7f",
    b"\0\0\xc0\x7f",
)


def originals(folder):
    """Name to (suffix, bytes, whether the bytes are to be gzipped after the mutation)."""
    rng = np.random.default_rng(0)
    volume = rng.integers(-1000, 1000, (4, 12, 10)).astype(np.int16)
    affine = np.array([[0, 0, 0.7, -11], [0, 0.8, 0, -200], [2.5, 0, 0, 40], [0, 0, 0, 1.0]])
    write_ct_series(folder, volume, affine, patient_id="SECRET-ID", study_id="SECRET-study")
    paths = sorted(folder.glob("*.dcm"))
    packed = pydicom.dcmread(paths[1])
    packed.compress(pydicom.uid.RLELossless)
    buffer = io.BytesIO()
    packed.save_as(buffer)
    nifti = nibabel.Nifti1Image(volume.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]).to_bytes()
    second = nibabel.Nifti2Image(volume.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]).to_bytes()
    zips = []
    for names in ({f"{i}.dcm": path.read_bytes() for i, path in enumerate(paths)}, {"x.nii": nifti}):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, inside in names.items():
                archive.writestr(name, inside)
        zips.append(content.getvalue())
    return {
        "nii": (".nii", nifti, False),
        "nii inside gz": (".nii.gz", nifti, True),
        "nii.gz": (".nii.gz", gzip.compress(nifti), False),
        "nifti-2": (".nii", second, False),
        "dicom": (".dcm", paths[0].read_bytes(), False),
        "dicom rle": (".dcm", buffer.getvalue(), False),
        "zip of dicom": (".zip", zips[0], False),
        "zip of nifti": (".zip", zips[1], False),
    }


def itk_originals(folder):
    """As :func:`originals`."""
    folder.mkdir(exist_ok=True, parents=True)
    values = np.random.default_rng(0).integers(-1000, 1000, (4, 12, 10)).astype(np.int16)
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing((0.7, 0.8, 2.5))
    found = {}
    for suffix in (".mha", ".nrrd"):
        for packed in (False, True):
            path = folder / f"x{suffix}"
            SimpleITK.WriteImage(image, str(path), packed)
            found[f"{suffix[1:]}{' packed' * packed}"] = (suffix, path.read_bytes(), False)
    return found


def mutated(content, rng):
    """One to four changes; half of them in the first kilobyte, where the headers lie."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, min(len(data), 1024) if rng.random() < 0.5 else len(data)))
        kind = rng.integers(0, 6)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            extreme = EXTREMES[rng.integers(len(EXTREMES))]
            data[at : at + len(extreme)] = extreme
        elif kind == 2:
            data[at : at + 8] = rng.bytes(8)
        elif kind == 3:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 200))]
        elif rng.random() < 0.3:
            del data[at:]
        if not data:
            break
    return bytes(data)


def run(folder, count, seed, sources=originals):
    """How many of ``count`` mutants were read and refused, MiB that the process grew to in it, and the longest CPU time of one."""
    folder.mkdir(exist_ok=True)
    contents = list(sources(folder / "source").values())
    rng = np.random.default_rng(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = {"read": 0, "refused": 0}
    longest = 0.0
    for number in range(count):
        suffix, content, pack = contents[number % len(contents)]
        data = mutated(content, rng)
        path = folder / f"m{suffix}"
        path.write_bytes(gzip.compress(data, 1) if pack else data)
        start = time.process_time()
        try:
            volume = read_ct(path, "largest", fill_missing=True, allow_no_orientation=bool(number % 3))
            float(volume.voxels.astype(np.float64).sum())  # a memory map must hold what it promised
            outcome["read"] += 1
        except UnreadableImageError as error:
            assert "SECRET" not in str(error) and str(path) in str(error), number
            outcome["refused"] += 1
        longest = max(longest, time.process_time() - start)
        assert longest < SECONDS_EACH, number
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < GROWN_MIB
    return {**outcome, "grown_mib": grown, "longest_s": longest}


def run_apart(folder, count, seed):
    """:func:`run` of what SimpleITK reads, in a process with GROWN_MIB of address space above what it starts with."""
    code = (
        "import sys, json, resource; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import SimpleITK, modalities.ct.itk, test_ct_mutations as m\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + m.GROWN_MIB * 2**20,) * 2)\n"
        "print(json.dumps(m.run(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), m.itk_originals)))"
    )
    here = Path(__file__).resolve()
    command = [sys.executable, "-c", code, str(here.parent), str(folder), str(count), str(seed)]
    threads = {"ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {
        **os.environ,
        **threads,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(here.parents[2]), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_EACH * count, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]  # a signal shows as a negative code
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
def test_some_hundred_mutations(tmp_path):
    outcome = run(tmp_path, 320, seed=1)
    assert min(outcome["read"], outcome["refused"]) > 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_mutations_more(tmp_path):
    outcome = run(tmp_path, 2000, seed=2)
    assert min(outcome["read"], outcome["refused"]) > 200


@needs_linux
@pytest.mark.timeout(600)
def test_some_hundred_mutations_of_mha_and_nrrd(tmp_path):
    outcome = run_apart(tmp_path, 400, seed=3)
    assert min(outcome["read"], outcome["refused"]) > 40


@needs_linux
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eight_thousand_mutations_of_mha_and_nrrd(tmp_path):
    outcome = run_apart(tmp_path, 8000, seed=4)  # 2000 of each kind
    assert min(outcome["read"], outcome["refused"]) > 800


@pytest.mark.timeout(600)
def test_every_nifti_header_field_at_its_extremes(tmp_path):
    nifti = originals(tmp_path / "source")["nii"][1]
    path = tmp_path / "x.nii"
    for at in range(40, 348, 2):
        for extreme in (b"\xff\x7f", b"\xff\xff", b"\0\x80"):
            path.write_bytes(nifti[:at] + extreme + nifti[at + 2 :])
            try:
                read_ct(path)
            except UnreadableImageError as error:
                assert str(path) in str(error)


def test_a_deflated_dicom_bomb(tmp_path):
    import zlib

    originals(tmp_path / "source")
    plain = (tmp_path / "source" / "0001.dcm").read_bytes()
    length = struct.unpack("<I", plain[140:144])[0]
    head = bytearray(plain[: 144 + length])
    old, new = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"
    at = head.index(old)
    head[at - 2 : at + len(old)] = struct.pack("<H", len(new)) + new
    head[140:144] = struct.pack("<I", length + 2)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(plain[144 + length :])
    path = tmp_path / "x.dcm"
    path.write_bytes(head + body + deflate.flush())
    assert read_ct(path).transfer_syntax == "Deflated Explicit VR Little Endian"
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
    body = b"".join(deflate.compress(bytes(2**22)) for _ in range(70))
    path.write_bytes(head + body + deflate.flush())
    with pytest.raises(UnreadableImageError, match="looks like a bomb"):
        read_ct(path)
