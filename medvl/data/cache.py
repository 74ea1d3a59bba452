"""Preprocessed images on disk: what a reader made of a file is kept, so that reading it again costs a memory map, a copy and a checksum.

``FOLDER/samples`` holds one safetensors file per file read and way of reading: the pixels, the valid mask, and as JSON the grid record,
view, warnings, affine and spacing. It is named by the SHA-256 of the content (of a series, of all its files and their names) and by that
of everything else the pixels depend on: the reader's :meth:`~medvl.types.ImageReader.spec`, the file's suffix, the number type, and the
version of this format. So another option of the reader or a changed file is another entry.

``FOLDER/index`` remembers the content hash of a file under the hash of (absolute path, size, modification time, change time, inode), so
that a hit does not read the file (of a volume file no more than its beginning). This trusts that a file whose five are the same has the
same content. A file that changed less than two seconds ago is hashed every time: a second change could fall into the same tick of the
clock.

Nothing of a header is stored but what an :class:`~medvl.types.ImageSample` carries, no name and no path; but the pixels are those of
patients: protect the folder as the images are protected. Nothing is unpickled. The checksum finds damage, not malice.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medvl.geometry import GridTransform
from medvl.types import ImageBatch, ImageReader, ImageSample

FORMAT = 1
"""Whoever changes what is stored, or what a reader makes of a file under the same options, raises this: older entries are not read then."""

SETTLED_NS = 2 * 10**9  # the coarsest clock of a usual file system (FAT) ticks every 2 s
STALE_S = 3600.0  # a temporary file this old was left by a process that was killed
ABANDONED = re.compile(r"\.[0-9a-f]{32}\.tmp")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Usage:
    """What a cache holds."""

    entries: int
    size_bytes: int


class SampleStore(abc.ABC):
    """Base of what keeps preprocessed images."""

    @abc.abstractmethod
    def read(self, reader: ImageReader, path: Path) -> ImageSample:
        """What ``reader.read(path)`` gives.

        Raises:
            UnreadableImageError: it cannot be read.
        """

    def known(self, reader: ImageReader, path: Path) -> bool | None:
        """Whether the image is from the front (:attr:`medvl.data.studies.Item.frontal`), where that is known without reading it; else None.

        Raises:
            UnreadableImageError: it is known that it cannot be read.
        """
        return None


class SampleCache(SampleStore):
    """A folder of preprocessed images, bounded in size; any number of processes may use it at once.

    Entries are written beside their place and renamed into it, so a reader sees a whole entry or none, and of two writers of one entry
    the later wins with the same bytes. An entry that is cut short or damaged is told by its checksum, logged, and made again. Where the
    disk is full or cannot be written to, images are read as without a cache, and the log says so once.

    Args:
        folder: made if absent. It may be shared by models, readers and data sets.
        dtype: of the stored pixels. ``float32`` gives back the very bits; ``float16`` takes half the room and rounds, at the first
            reading as at every later one.
        max_bytes: of all entries; beyond it those used longest ago are deleted, down to nine tenths. Each process that writes looks at
            its first entry and then after every sixteenth of this, so that much per process may come on top for a while. A data set that
            is larger than this and read in turn finds nothing of itself.
    Raises:
        ValueError: another ``dtype``, ``max_bytes`` below 1, or a folder that cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: Literal["float32", "float16"] = "float32", max_bytes: int = 2**36) -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is {dtype!r}, expected 'float32' or 'float16'")
        if not str(folder).strip():
            raise ValueError("cache is an empty text; give the folder to keep images in, or false")
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}, expected at least 1")
        self.folder, self.dtype, self.max_bytes = Path(folder), dtype, max_bytes
        try:
            for part in ("samples", "index"):
                (self.folder / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cache {folder}: cannot be made a folder: {error.strerror}; name one that can be written to") from None
        self._written: int | None = None  # bytes since this process last looked at the whole; None: it never did
        self._unwritable = False

    def read(self, reader: ImageReader, path: Path) -> ImageSample:
        """What ``reader.read(path)`` gives, from the cache if it is there; the tensors are the caller's own and may be changed.

        Raises:
            UnreadableImageError: as of the reader; such a file is not kept, and is tried again the next time.
        """
        path = Path(path)
        seen = _look(reader, path)
        content = None if seen is None else self._content(seen)
        if content is None:  # not there, no regular file, or not to be told what it depends on: the reader says what is wrong
            return reader.read(path)
        entry = self.folder / "samples" / content[:2] / f"{content}.{self._settings(reader, path)}.safetensors"
        found = _load(entry)
        if found is None:
            fresh = reader.read(path)
            found = replace(fresh, pixels=fresh.pixels.to(getattr(torch, self.dtype)))
            if _look(reader, path) == seen:  # else it was changed between hashing and reading
                self._store(entry, found)
        else:
            _touch(entry)
        return replace(found, pixels=found.pixels.float())

    def usage(self) -> Usage:
        """Entries and bytes of all that is stored."""
        sizes = [size for _, size, _ in self._entries()]
        return Usage(len(sizes), sum(sizes))

    def clear(self) -> None:
        """Delete every entry; of the folder itself and of other files in it nothing."""
        self._trim(0)

    def _settings(self, reader: ImageReader, path: Path) -> str:
        """Hash of everything but the content that pixels depend on; the suffix is among it because formats are told by it too."""
        return settings_of(reader, dtype=self.dtype, suffix=path.suffix.lower())

    def _content(self, seen: _Seen) -> str | None:
        """Hash of the content, from the index if nothing of the files has changed; None if one cannot be read."""
        name = seen.digest()
        memo = self.folder / "index" / name[:2] / name
        try:
            known = memo.read_text("ascii")
        except (OSError, ValueError):
            known = ""
        if re.fullmatch(r"[0-9a-f]{64}", known):
            return known
        try:
            content = _hash_files(seen)
        except OSError:
            return None
        if seen.newest_ns() < time.time_ns() - SETTLED_NS:
            self._write(memo, lambda place: place.write_text(content, "ascii"))
        return content

    def _store(self, entry: Path, sample: ImageSample) -> None:
        from safetensors.torch import save_file

        tensors, metadata = _parts(sample)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > self.max_bytes:
            return
        self._write(entry, lambda place: save_file(tensors, place, metadata))
        if self._written is None or self._written + size > self.max_bytes // 16:
            self._trim(self.max_bytes)
            self._written = 0
        else:
            self._written += size

    def _write(self, target: Path, write: Callable[[Path], Any]) -> None:
        """Whole or not at all. Not flushed to the disk: what a crash leaves of an entry is found by its checksum."""
        if self._unwritable:
            return
        from safetensors import SafetensorError

        temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            target.parent.mkdir(exist_ok=True)
            write(temporary)
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            self._unwritable = True
            with contextlib.suppress(OSError):
                temporary.unlink()
            log.warning("cache %s: cannot be written to (%s); images are read without it", self.folder, type(error).__name__)

    def _entries(self) -> Iterator[tuple[Path, int, int]]:
        """(path, bytes, time of last use in ns) of every entry."""
        for path in (self.folder / "samples").glob("*/*.safetensors"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another process deleted it
                continue
            yield path, found.st_size, found.st_mtime_ns

    def _trim(self, limit: int) -> None:
        """Delete the entries used longest ago where all have more than ``limit`` bytes, and what the index says of files without one."""
        entries = sorted(self._entries(), key=lambda entry: entry[2])
        total = sum(size for _, size, _ in entries)
        if total <= limit and limit:
            return
        kept = len(entries)
        for path, size, _ in entries:
            if total <= limit * 9 // 10:
                break
            path.unlink(missing_ok=True)
            total, kept = total - size, kept - 1
        contents = {path.name.partition(".")[0] for path, _, _ in entries[len(entries) - kept :]}
        for memo in (self.folder / "index").glob("*/*"):
            with contextlib.suppress(OSError, ValueError):  # gone, or damaged and so written anew when it is asked for
                if not ABANDONED.fullmatch(memo.name) and memo.read_text("ascii") not in contents:
                    memo.unlink()
        for place in (*(self.folder / "samples").glob("*/.*.tmp"), *(self.folder / "index").glob("*/.*.tmp")):
            with contextlib.suppress(FileNotFoundError):
                if ABANDONED.fullmatch(place.name) and time.time() - place.stat().st_mtime > STALE_S:
                    place.unlink()


class CachedReader(ImageReader):
    """A reader whose :meth:`read` goes through a cache; in all else, and in a saved model, it is that reader.

    Args:
        reader: reads what is not there yet.
        cache: where it is kept.
    """

    def __init__(self, reader: ImageReader, cache: SampleStore) -> None:
        self.reader, self.cache = reader, cache
        self.suffixes = reader.suffixes  # type: ignore[misc]

    def spec(self) -> dict[str, Any]:
        """Of the reader."""
        return self.reader.spec()

    def files(self) -> dict[str, bytes]:
        """Of the reader."""
        return self.reader.files()

    def describe(self) -> dict[str, str]:
        """Of the reader."""
        return self.reader.describe()

    def enlarged(self, factor: int, path: Path | None = None) -> ImageReader:
        """Of the reader; what it reads is not kept."""
        return self.reader.enlarged(factor, path)

    def find_images(self, folder: Path) -> list[Path]:
        """As the reader does."""
        return self.reader.find_images(folder)

    def study_key(self, path: Path) -> str | None:
        """As the reader does."""
        return self.reader.study_key(path)

    def sources(self, path: Path) -> tuple[Path, ...] | None:
        """As the reader does."""
        return self.reader.sources(path)

    def read(self, path: Path) -> ImageSample:
        """One file to a sample, from the cache if it is there.

        Raises:
            UnreadableImageError: as of the reader.
        """
        return self.cache.read(self.reader, path)

    def read_array(self, array: Any) -> ImageSample:
        """As the reader does; arrays are not kept."""
        return self.reader.read_array(array)

    def native(self, path: Path) -> Tensor:
        """As the reader does; native pixels are not kept."""
        return self.reader.native(path)

    def collate(self, samples: Sequence[ImageSample]) -> ImageBatch:
        """As the reader does."""
        return self.reader.collate(samples)


@dataclass(frozen=True)
class _Seen:
    """The files that an image depends on, as they are at one moment."""

    place: str  # absolute path of the image
    files: tuple[Path, ...]
    stats: tuple[tuple[int, int, int, int], ...]  # size, modification and change time in ns, inode

    def names(self) -> list[str]:
        """Of the files, as seen from the image."""
        return [os.path.relpath(file, self.place) for file in self.files]

    def digest(self) -> str:
        return _sha256(_canonical([self.place, self.names(), self.stats]))

    def newest_ns(self) -> int:
        return max(max(modified, changed) for _, modified, changed, _ in self.stats)


def _look(reader: ImageReader, path: Path) -> _Seen | None:
    """None where there is nothing to hash, or a pipe or device that would be waited for."""
    try:
        files = reader.sources(path)
        stats = [] if files is None else [file.stat() for file in files]
    except (OSError, ValueError):  # a header may name a file by what is no name
        return None
    if not files or not all(file.is_file() for file in files):
        return None
    place = os.path.abspath(path)  # noqa: PTH100 (a link is a place of its own)
    return _Seen(place, files, tuple((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in stats))


def _hash_files(seen: _Seen) -> str:
    """SHA-256 of the one file, or of the names and hashes of several."""
    if len(seen.files) == 1 and not Path(seen.place).is_dir():
        return _hash_file(seen.files[0])
    return _sha256(_canonical(sorted((name, _hash_file(file)) for name, file in zip(seen.names(), seen.files, strict=True))))


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _record(sample: ImageSample) -> dict[str, Any]:
    """Everything of a sample but its tensors, and the shape and type of these; JSON writes a float so that it comes back exactly."""
    return {
        "pixels": [str(sample.pixels.dtype), *sample.pixels.shape],
        "valid": [str(sample.valid.dtype), *sample.valid.shape],
        "transform": sample.transform.to_dict(),
        "view": sample.view,
        "warnings": list(sample.warnings),
        "affine": None if sample.affine is None else sample.affine.tolist(),
        "spacing_mm": None if sample.spacing_mm is None else list(sample.spacing_mm),
    }


def settings_of(reader: ImageReader, **more: str) -> str:
    """Hash of the reader and all that it is made of, and of what more there is to it."""
    files = {name: hashlib.sha256(content).hexdigest() for name, content in reader.files().items()}
    return _sha256(_canonical({"format": FORMAT, **more, "reader": reader.spec(), "files": files}))


def packed_sample(sample: ImageSample) -> bytes:
    """A sample as the bytes of a safetensors file, with its record and checksum."""
    from safetensors.torch import save

    tensors, metadata = _parts(sample)
    return save(tensors, metadata)


def unpacked_sample(content: bytes) -> ImageSample:
    """What :func:`packed_sample` packed, in memory of its own.

    Raises:
        Exception: of any kind, where the bytes are damaged.
    """
    from safetensors.torch import load

    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    return _checked(load(content), metadata)


def _parts(sample: ImageSample) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a sample, and its record with the checksum of both."""
    tensors = {"pixels": sample.pixels.contiguous(), "valid": sample.valid.contiguous()}
    record = _canonical(_record(sample))
    return tensors, {"record": record, "crc32": f"{_checksum(record, tensors):08x}"}


def _checked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> ImageSample:
    """The sample of these parts.

    Raises:
        ValueError: they do not belong together.
    """
    if f"{_checksum(metadata['record'], tensors):08x}" != metadata["crc32"]:
        raise ValueError("another checksum")
    record = json.loads(metadata["record"])
    sample = ImageSample(
        pixels=tensors["pixels"],
        valid=tensors["valid"],
        transform=GridTransform.from_dict(record["transform"]),
        view=record["view"],
        warnings=tuple(record["warnings"]),
        affine=None if record["affine"] is None else np.array(record["affine"], dtype=np.float64),
        spacing_mm=None if record["spacing_mm"] is None else tuple(record["spacing_mm"]),
    )
    if _canonical(_record(sample)) != metadata["record"]:
        raise ValueError("another shape or type")
    return sample


def _load(entry: Path) -> ImageSample | None:
    """An entry in memory of its own; None where there is none, or none that is whole."""
    from safetensors import safe_open

    if not entry.is_file():
        return None
    try:
        with safe_open(entry, framework="pt") as file:  # maps the file into memory
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in ("pixels", "valid")}  # what is checked is what is served
        return _checked(tensors, metadata)
    except FileNotFoundError:  # deleted since
        return None
    except Exception as error:  # damaged files raise anything
        log.warning("cache entry %s is damaged (%s); made again", entry, type(error).__name__)
        return None


def _checksum(record: str, tensors: dict[str, Tensor]) -> int:
    """CRC-32 of the record and the bytes of the tensors."""
    from isal import isal_zlib

    value: int = isal_zlib.crc32(record.encode())
    for name in sorted(tensors):
        value = isal_zlib.crc32(tensors[name].numpy().data.cast("B"), value)
    return value


def _touch(entry: Path) -> None:
    """Note that an entry was used."""
    try:
        os.utime(entry)
    except OSError:  # gone, or a folder that may only be read
        log.debug("cache entry %s: time of use not noted", entry)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
