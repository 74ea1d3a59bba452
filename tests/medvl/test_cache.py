"""The cache of preprocessed images: bit for bit what reading gives, a new entry for whatever changes it, and never a damaged one."""

from __future__ import annotations

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from medvl.data import cache as module
from medvl.data.cache import CachedReader, SampleCache
from medvl.geometry import GridTransform
from medvl.types import ImageReader, ImageSample, UnreadableImageError
from modalities.ct.reader import CtReader
from modalities.xray.reader import XrayReader

XRAY = {"size": 32}
CT = {"spacing_mm": (4.0, 2.5, 2.5), "shape": (None, 24, 24), "windows_hu": ((-1000, 400), (-160, 240)), "crop": "none"}


class Given(ImageReader):
    """Gives out one sample, and counts how often it is asked to."""

    def __init__(self, name: str = "a") -> None:
        self.sample, self.reads = None, 0

    def read(self, path: Path) -> ImageSample:
        self.reads += 1
        if self.sample is None:
            mean = float(sum(sum(file.read_bytes()) for file in self.sources(path)))
            return ImageSample(torch.full((1, 8, 8), mean), torch.ones(8, 8, dtype=torch.bool), GridTransform((8, 8)))
        return self.sample

    def read_array(self, array):
        raise NotImplementedError

    def native(self, path):
        raise NotImplementedError

    def collate(self, samples):
        raise NotImplementedError


@pytest.fixture
def settled(monkeypatch):
    """Files count as unchanged for long enough at once."""
    monkeypatch.setattr(module, "SETTLED_NS", -(10**15))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, Path]:
    """A picture, a DICOM film with a patient's name and a warning, and an oblique NIfTI volume."""
    import nibabel

    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 4000, (37, 29)).astype(np.uint16)).save(folder / "film.png")
    affine = np.array([[-1.1, 0.1, 0.02, 50.3], [0.1, 1.2, 0.1, -20.7], [0, -0.1, 2.3, 1 / 3], [0, 0, 0, 1]])
    hu = (rng.normal(-300, 400, (20, 22, 9))).clip(-1024, 2000).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(hu, affine), folder / "volume.nii.gz")
    write_film(folder / "film.dcm", rng.integers(0, 4096, (41, 33)))
    return {"png": folder / "film.png", "dcm": folder / "film.dcm", "nii": folder / "volume.nii.gz"}


def write_film(path: Path, stored: np.ndarray) -> None:
    from pydicom.dataset import Dataset as Header
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    ds = Header()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["film"])
    ds.PatientName, ds.PatientID, ds.StudyInstanceUID = "Secret^Name", "SECRET-ID", "1.2.826.0.1.3680043.8.498.77"
    ds.ViewPosition, ds.PresentationIntentType = "PA", "FOR PROCESSING"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *stored.shape, 1, "MONOCHROME1"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelData = stored.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.save_as(path, enforce_file_format=True)


def reader_of(kind: str) -> ImageReader:
    return CtReader(**CT) if kind == "nii" else XrayReader(**XRAY)


def bits(values: torch.Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()


def assert_same(one: ImageSample, other: ImageSample) -> None:
    """Every field, bit for bit."""
    for field in dataclasses.fields(ImageSample):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b)), field.name
        elif isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        else:
            assert type(a) is type(b), field.name
            assert a == b, field.name


def entries(cache: SampleCache) -> list[Path]:
    return sorted((cache.folder / "samples").glob("*/*.safetensors"))


@pytest.mark.parametrize("kind", ["png", "dcm", "nii"])
def test_a_hit_is_bit_for_bit_what_reading_gives(tmp_path, images, kind, settled, monkeypatch):
    reader, cache = reader_of(kind), SampleCache(tmp_path / "cache")
    fresh, first = reader.read(images[kind]), cache.read(reader, images[kind])
    monkeypatch.setattr(type(reader), "read", lambda *_: pytest.fail("the file was read again"))
    monkeypatch.setattr(module, "_hash_file", lambda *_: pytest.fail("the file was hashed again"))
    for got in (first, cache.read(reader, images[kind]), SampleCache(tmp_path / "cache").read(reader, images[kind])):
        assert_same(got, fresh)
        assert got.pixels.dtype == torch.float32
        points = np.random.default_rng(1).uniform(-5, 40, (50, got.pixels.ndim - 1))
        assert got.transform.to_native(points).tobytes() == fresh.transform.to_native(points).tobytes()
    assert bool(fresh.warnings) and (fresh.view == "PA") == (kind == "dcm") and (fresh.affine is not None) == (kind == "nii")
    (entry,) = entries(cache)
    np.testing.assert_array_equal(safetensors.numpy.load_file(entry)["pixels"], fresh.pixels.numpy())


def test_a_real_volume_and_real_films_come_back_as_they_were(tmp_path, shared_data):
    cache = SampleCache(tmp_path)
    films = [*sorted((shared_data / "cxr/images").glob("*.png"))[:2], shared_data / "dicom_zoo/RG3_J2KI.dcm"]
    volumes = [shared_data / "ct/ge_series"]
    for reader, paths in ((XrayReader(64), films), (CtReader((5.0, 4.0, 4.0), (None, 48, 48)), volumes)):
        for path in paths:
            fresh = reader.read(path)
            cache.read(reader, path)
            assert_same(cache.read(reader, path), fresh)
    assert cache.usage().entries == len(films) + len(volumes)


numbers = st.floats(width=64, allow_nan=False, allow_infinity=False)
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=3)


@st.composite
def samples(draw) -> ImageSample:
    """Samples of any content, NaN payloads and negative zeros too."""
    shape = tuple(draw(shapes))
    record = GridTransform(shape)
    if draw(st.booleans()):
        record = record.reorient(draw(st.permutations(range(len(shape)))), [draw(st.booleans()) for _ in shape])
    record = record.resample([draw(st.floats(0.1, 7)) for _ in shape]).fit([draw(st.integers(1, 9)) for _ in shape])
    pixels = draw(hnp.arrays(np.uint32, (draw(st.integers(1, 3)), *record.shape))).view(np.float32)
    return ImageSample(
        pixels=torch.from_numpy(pixels),
        valid=torch.from_numpy(draw(hnp.arrays(np.bool_, record.shape))),
        transform=record,
        view=draw(st.none() | st.text(max_size=5)),
        warnings=tuple(draw(st.lists(st.text(max_size=20), max_size=3))),
        affine=draw(st.none() | hnp.arrays(np.float64, (4, 4), elements=numbers)),
        spacing_mm=draw(st.none() | st.tuples(numbers, numbers, numbers)),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sample=samples())
def test_any_sample_comes_back(tmp_path, sample):
    reader = Given()
    reader.sample = sample
    (tmp_path / "image").write_bytes(b"x")
    cache = SampleCache(tmp_path / "cache")
    cache.clear()
    assert_same(cache.read(reader, tmp_path / "image"), sample)
    assert_same(cache.read(reader, tmp_path / "image"), sample)
    assert reader.reads == 1


def test_what_is_given_out_is_the_callers_own(tmp_path, images):
    reader, cache = XrayReader(**XRAY), SampleCache(tmp_path)
    fresh = reader.read(images["png"])
    for _ in range(3):
        got = cache.read(reader, images["png"])
        assert_same(got, fresh)
        got.pixels.mul_(-3).add_(torch.rand(()))
        got.valid.logical_not_()
    before = entries(cache)[0].read_bytes()
    held = cache.read(reader, images["png"])
    entries(cache)[0].write_bytes(bytes(len(before)))  # in place: a view of the map would show it
    assert_same(held, fresh)


def test_other_options_content_suffix_or_number_type_are_other_entries(tmp_path, images, settled):
    cache, path = SampleCache(tmp_path / "cache"), tmp_path / "a.png"
    path.write_bytes(images["png"].read_bytes())
    cache.read(XrayReader(**XRAY), path)
    for reader in (XrayReader(33), XrayReader(32, channels=3), XrayReader(32, mean=0.4), XrayReader(32, reduced_decoding=True)):
        before = len(entries(cache))
        assert_same(cache.read(reader, path), reader.read(path))
        assert len(entries(cache)) == before + 1
    before = len(entries(cache))
    cache.read(XrayReader(32), path)
    (tmp_path / "copy.png").write_bytes(path.read_bytes())
    cache.read(XrayReader(32), tmp_path / "copy.png")
    assert len(entries(cache)) == before, "the same content is the same entry"
    (tmp_path / "copy.PNG").write_bytes(path.read_bytes())
    cache.read(XrayReader(32), tmp_path / "copy.PNG")
    assert len(entries(cache)) == before
    SampleCache(tmp_path / "cache", "float16").read(XrayReader(32), path)
    (tmp_path / "copy.tif").write_bytes(path.read_bytes())
    cache.read(XrayReader(32), tmp_path / "copy.tif")
    assert len(entries(cache)) == before + 2


def test_content_of_the_same_size_and_time_is_told(tmp_path, settled):
    reader, cache, path = Given(), SampleCache(tmp_path / "cache"), tmp_path / "image"
    path.write_bytes(b"\x01\x02")
    assert cache.read(reader, path).pixels[0, 0, 0] == 3
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(b"\x05\x02")
    os.utime(path, ns=times)
    assert cache.read(reader, path).pixels[0, 0, 0] == 7
    path.touch()
    assert cache.read(reader, path).pixels[0, 0, 0] == 7
    assert reader.reads == 2


def test_a_file_that_has_just_changed_is_hashed_every_time(tmp_path, monkeypatch):
    cache, path = SampleCache(tmp_path / "cache"), tmp_path / "image"
    path.write_bytes(b"x")
    hashed = []
    real = module._hash_file
    monkeypatch.setattr(module, "_hash_file", lambda file: hashed.append(file) or real(file))
    for _ in range(3):
        cache.read(Given(), path)
    assert len(hashed) == 3
    assert not list((tmp_path / "cache/index").glob("*/*"))


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, settled):
    path = tmp_path / "image"
    path.write_bytes(b"\x01")

    class Late(Given):
        def read(self, path):
            if not self.reads:
                path.write_bytes(b"\x01\x01")
            return super().read(path)

    cache = SampleCache(tmp_path / "cache")
    assert cache.read(Late(), path).pixels[0, 0, 0] == 2
    assert entries(cache) == []
    path.write_bytes(b"\x01")
    assert cache.read(Given(), path).pixels[0, 0, 0] == 1


def test_of_a_folder_every_file_and_its_name_count(tmp_path, settled):
    folder = tmp_path / "series"
    (folder / "deep").mkdir(parents=True)
    for i in range(3):
        (folder / "deep" / f"{i}.dcm").write_bytes(bytes([i]))
    reader, cache = Given(), SampleCache(tmp_path / "cache")
    assert cache.read(reader, folder).pixels[0, 0, 0] == 3
    cache.read(reader, folder)
    assert reader.reads == 1
    (folder / "deep" / "1.dcm").write_bytes(b"\x07")
    assert cache.read(reader, folder).pixels[0, 0, 0] == 9
    (folder / "4.dcm").write_bytes(b"\x01")
    assert cache.read(reader, folder).pixels[0, 0, 0] == 10
    (folder / "4.dcm").rename(folder / "5.dcm")
    cache.read(reader, folder)
    assert reader.reads == 4
    (folder / "5.dcm").rename(folder / "4.dcm")
    cache.read(reader, folder)
    assert reader.reads == 4


@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
def test_values_beside_a_header_count(tmp_path, suffix, settled):
    sitk = pytest.importorskip("SimpleITK", reason="needs SimpleITK (extra itk)")
    path = tmp_path / f"volume.{suffix}"
    rng = np.random.default_rng(2)
    for seed in range(2):
        image = sitk.GetImageFromArray(rng.integers(-1000, 400, (6, 20, 20)).astype(np.int16))
        sitk.WriteImage(image, str(path), useCompression=False)
        if seed == 0:
            header = path.read_bytes()
    assert path.read_bytes() == header, "only the values differ"
    (values,) = (file for file in tmp_path.iterdir() if file != path)
    reader, cache = CtReader(**CT), SampleCache(tmp_path / "cache")
    first = cache.read(reader, path)
    values.write_bytes(values.read_bytes()[::-1])
    second = cache.read(reader, path)
    assert_same(second, reader.read(path))
    assert not torch.equal(first.pixels, second.pixels)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_entry_is_made_again_and_never_served(tmp_path, images, where, bit, cut):
    reader, cache = XrayReader(8), SampleCache(tmp_path / "cache")
    fresh = cache.read(reader, images["dcm"])
    (entry,) = entries(cache)
    whole = entry.read_bytes()
    at = int(where * len(whole))
    entry.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    assert_same(cache.read(reader, images["dcm"]), fresh)
    assert_same(cache.read(reader, images["dcm"]), fresh)
    entry.write_bytes(whole)


def test_damage_is_logged_without_the_images_name(tmp_path, images, caplog):
    reader, cache = XrayReader(8), SampleCache(tmp_path / "cache")
    cache.read(reader, images["dcm"])
    entries(cache)[0].write_bytes(b"")
    cache.read(reader, images["dcm"])
    assert "damaged" in caplog.text
    assert "film" not in caplog.text
    assert entries(cache)[0].stat().st_size > 300


@pytest.mark.parametrize("content", [b"", b"zz", b"\xff" * 64, b"0" * 63])
def test_a_damaged_index_only_costs_a_hash(tmp_path, images, content, settled):
    reader, cache = XrayReader(8), SampleCache(tmp_path / "cache")
    fresh = cache.read(reader, images["png"])
    (memo,) = (tmp_path / "cache/index").glob("*/*")
    whole = memo.read_bytes()
    memo.write_bytes(content)
    assert_same(cache.read(reader, images["png"]), fresh)
    assert memo.read_bytes() == whole


def test_what_cannot_be_read_is_not_kept_and_says_what_the_reader_says(tmp_path, settled):
    reader, cache = XrayReader(8), SampleCache(tmp_path / "cache")
    broken, pipe, folder = tmp_path / "broken.png", tmp_path / "pipe.dcm", tmp_path / "folder"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (broken, pipe, folder, tmp_path / "absent.png"):
        with pytest.raises(UnreadableImageError) as plain:
            reader.read(path)
        for _ in range(2):
            with pytest.raises(UnreadableImageError) as cached:
                cache.read(reader, path)
            assert str(cached.value) == str(plain.value)
    with pytest.raises(UnreadableImageError):
        cache.read(CtReader(), pipe)
    assert cache.usage() == module.Usage(0, 0)
    Image.fromarray(np.eye(9, dtype=np.uint8) * 255).save(broken)
    assert_same(cache.read(reader, broken), reader.read(broken))


def test_half_precision_rounds_at_the_first_reading_as_later(tmp_path, images):
    reader, cache = XrayReader(32), SampleCache(tmp_path, "float16")
    expected = reader.read(images["png"]).pixels.numpy().astype(np.float16).astype(np.float32)
    for _ in range(2):
        got = cache.read(reader, images["png"]).pixels
        assert got.dtype == torch.float32
        np.testing.assert_array_equal(got.numpy(), expected)
    exact = SampleCache(tmp_path / "exact")
    exact.read(reader, images["png"])
    assert cache.usage().size_bytes < 0.75 * exact.usage().size_bytes


def films(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i:02d}" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i, 1]))
    return paths


def test_those_used_longest_ago_go_first(tmp_path, settled, monkeypatch):
    paths = films(tmp_path, 12)
    probe = SampleCache(tmp_path / "probe")
    probe.read(Given(), paths[0])
    room = probe.usage().size_bytes
    cache = SampleCache(tmp_path / "cache", max_bytes=room * 6)
    clock = iter(range(1, 1000))
    touched = os.utime
    monkeypatch.setattr(module, "_touch", lambda entry: touched(entry, (next(clock) + 10**9,) * 2))
    for path in paths[:6]:
        cache.read(Given(), path)
        cache.read(Given(), path)  # sets the time of use
    cache.read(Given(), paths[0])
    (tmp_path / "cache/samples/ours.txt").write_text("not of the cache")
    abandoned = entries(cache)[0].parent / f".{'0' * 32}.tmp"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (1, 1))
    for path in paths[6:8]:
        cache.read(Given(), path)
    assert cache.usage().size_bytes <= room * 6
    assert not abandoned.exists()
    reader = Given()
    for path in (paths[0], *paths[4:8]):
        cache.read(reader, path)
    assert reader.reads == 0, "used lately"
    cache.read(reader, paths[1])
    assert reader.reads == 1
    assert len(list((tmp_path / "cache/index").glob("*/*"))) <= 7
    cache.clear()
    assert cache.usage() == module.Usage(0, 0)
    assert not list((tmp_path / "cache/index").glob("*/*"))
    assert (tmp_path / "cache/samples/ours.txt").exists()
    assert_same(cache.read(Given(), paths[3]), Given().read(paths[3]))


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path):
    (path,) = films(tmp_path, 1)
    cache = SampleCache(tmp_path / "cache", max_bytes=100)
    assert cache.read(Given(), path).pixels[0, 0, 0] == 1
    assert cache.usage().entries == 0


def test_a_cache_that_cannot_be_written_to_costs_nothing_but_itself(tmp_path, settled, caplog):
    paths = films(tmp_path, 3)
    cache = SampleCache(tmp_path / "cache")
    for part in ("samples", "index"):
        (tmp_path / "cache" / part).rmdir()
        (tmp_path / "cache" / part).write_text("in the way")
    for i, path in enumerate(paths):
        assert cache.read(Given(), path).pixels[0, 0, 0] == i + 1
    assert caplog.text.count("cannot be written to") == 1


@pytest.mark.parametrize(("arguments", "said"), [({"dtype": "int8"}, "float32"), ({"max_bytes": 0}, "at least 1")])
def test_bad_arguments_are_refused(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        SampleCache(tmp_path, **arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made a folder"):
        SampleCache(tmp_path / "file")


def test_nothing_that_identifies_is_stored(tmp_path, images, settled):
    named = tmp_path / "Secret_Name"
    named.mkdir()
    path = named / "SECRET-ID.dcm"
    path.write_bytes(images["dcm"].read_bytes())
    cache = SampleCache(tmp_path / "cache")
    cache.read(XrayReader(8), path)
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert len(files) == 2
    stored = b"".join(file.read_bytes() + str(file.relative_to(tmp_path)).encode() for file in files)
    for secret in (b"ecret", b"SECRET", b"3680043"):
        assert secret not in stored


def test_two_that_write_the_same_entry_at_once_are_both_served(tmp_path, settled):
    (path,) = films(tmp_path, 1)
    barrier = threading.Barrier(4, timeout=30)

    class Together(Given):
        def read(self, path):
            barrier.wait()
            return super().read(path)

    caches = [SampleCache(tmp_path / "cache") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda cache: cache.read(Together(), path), caches))
    for sample in found:
        assert_same(sample, Given().read(path))
    assert len(entries(caches[0])) == 1
    assert not list((tmp_path / "cache").rglob(".*"))


class Films(Dataset):
    """Pixels of images through a reader."""

    def __init__(self, reader: ImageReader, paths: list[Path]) -> None:
        self.reader, self.paths = reader, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.reader.read(self.paths[index]).pixels


def test_loader_processes_share_it_in_any_order(tmp_path, settled):
    rng = np.random.default_rng(3)
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (20, 16), dtype=np.uint8)).save(path)
    reader = XrayReader(16)
    cached = CachedReader(reader, SampleCache(tmp_path / "cache"))
    order = rng.permutation(np.tile(np.arange(12), 3)).tolist()
    expected = torch.stack([reader.read(paths[i]).pixels for i in order])
    for _ in range(2):  # filled by two processes at once, then read
        loader = DataLoader(Films(cached, paths), batch_size=4, sampler=order, num_workers=2, multiprocessing_context="fork")
        assert torch.equal(torch.cat(list(loader)), expected)
    assert cached.cache.usage().entries == 12


def test_a_cached_reader_is_its_reader_in_all_else(tmp_path, images):
    reader = XrayReader(16, channels=3)
    cached = CachedReader(reader, SampleCache(tmp_path))
    assert cached.spec() == reader.spec()
    assert cached.describe() == reader.describe()
    assert (cached.suffixes, cached.files()) == (reader.suffixes, {})
    assert cached.study_key(images["dcm"]) == reader.study_key(images["dcm"]) is not None
    assert cached.find_images(images["dcm"].parent) == reader.find_images(images["dcm"].parent)
    assert torch.equal(cached.native(images["png"]), reader.native(images["png"]))
    array = np.random.default_rng(0).random((9, 8))
    assert torch.equal(cached.collate([cached.read_array(array)]).pixels, reader.collate([reader.read_array(array)]).pixels)
    own = {name for name in vars(ImageReader) if not name.startswith("_") and callable(getattr(ImageReader, name))}
    assert own <= set(vars(CachedReader)), "whatever a reader may do otherwise than its base class must be handed on"
