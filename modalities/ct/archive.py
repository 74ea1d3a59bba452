"""Zip files opened safely: every member is checked before anything is unpacked, and unpacked under a name of ours.

Member names never become paths, so nothing can be written outside the folder; names that try are refused all the same, since such a zip
was made to harm. They are not shown either: names in a zip of images are often those of patients. Only the methods stored and deflate
are read, because the others inflate by thousands in one step.
"""

from __future__ import annotations

import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medvl.types import UnreadableImageError
from modalities.ct.volume import check_file, refused

CHUNK_BYTES = 2**20
KEPT_SUFFIXES = frozenset({".dcm", ".ima", ".nii", ".nii.gz", ".mha", ".nrrd"})

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")


@dataclass(frozen=True)
class ArchiveLimits:
    """What a zip may hold. Deflate reaches a ratio of 1032; CT rarely reaches 20, an empty phantom 200."""

    members: int = 20_000
    total_bytes: int = 2**33
    ratio: float = 250.0
    free_bytes: int = 2**26
    """Up to this size unpacked the ratio does not matter."""


@dataclass(frozen=True)
class Member:
    """One file in a zip."""

    index: int  # in the zip's own list; how messages name it
    size: int  # unpacked bytes, as declared
    suffix: str  # of the known ones, else empty


def is_zip(path: Path) -> bool:
    """True for a regular file that starts as a zip does."""
    check_file(path)
    with path.open("rb") as file:
        return file.read(4) in ZIP_MAGIC


def list_members(path: Path, limits: ArchiveLimits | None = None) -> list[Member]:
    """The files in a zip, folders and hidden ones left out, all checked.

    Raises:
        UnreadableImageError: no zip, damaged, encrypted, over the limits, or with members that point outside, are links, or are coded
            by a method that is not read.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return [Member(index, info.file_size, _suffix(info.filename)) for index, info in _checked(path, archive, limits)]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, OverflowError) as error:
        raise _translated(path, error) from None


@contextmanager
def unpacked(path: Path, indices: Sequence[int] | None = None, limits: ArchiveLimits | None = None) -> Iterator[list[Path]]:
    """Members of a zip as files in a temporary folder that is removed afterwards, in the order of ``indices``.

    Args:
        path: the zip.
        indices: :attr:`Member.index` of those wanted; None for all.
        limits: None for the usual ones.
    Raises:
        UnreadableImageError: as :func:`list_members`, and a member that is damaged or longer than it says.
    """
    check_file(path)
    with tempfile.TemporaryDirectory(prefix="medvl-zip-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = dict(_checked(path, archive, limits))
                wanted = list(members) if indices is None else list(indices)
                if not set(wanted) <= set(members):
                    raise refused(path, "has changed since its members were listed; look for its series again")
                files = [_unpack(path, archive, members[index], index, Path(folder)) for index in wanted]
        except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
            raise _translated(path, error) from None
        yield files


def _translated(path: Path, error: Exception) -> UnreadableImageError:
    """What zipfile raised as our error; its texts quote member names, so only the type is named."""
    if isinstance(error, UnreadableImageError):
        return error
    return refused(path, f"expected a zip file, but it is damaged or none ({type(error).__name__}); copy or make it again")


def _checked(path: Path, archive: zipfile.ZipFile, limits: ArchiveLimits | None) -> list[tuple[int, zipfile.ZipInfo]]:
    """Index and entry of every file worth unpacking."""
    limits = limits or ArchiveLimits()
    entries = archive.infolist()
    if len(entries) > limits.members:
        raise refused(path, f"holds {len(entries)} members, more than the {limits.members} that are unpacked; split it")
    for index, info in enumerate(entries):
        problem = _problem(info)
        if problem:
            raise refused(path, f"member {index + 1} of {len(entries)} {problem}; this zip is not unpacked")
    total, packed = sum(info.file_size for info in entries), path.stat().st_size
    if total > limits.total_bytes:
        raise refused(path, f"would unpack to {total} bytes, more than the {limits.total_bytes} allowed; split it")
    if total > limits.free_bytes and total > limits.ratio * packed:
        raise refused(path, f"would unpack {packed} bytes to {total}, more than {limits.ratio:g} times; it looks like a decompression bomb")
    return [(index, info) for index, info in enumerate(entries) if not info.is_dir() and not _passed_over(info.filename)]


def _problem(info: zipfile.ZipInfo) -> str | None:
    """What makes a member dangerous or unreadable, or None."""
    name = info.filename.replace("\\", "/")
    mode = info.external_attr >> 16
    if name.startswith("/") or name[1:2] == ":" or ".." in PurePosixPath(name).parts or "\0" in name:
        return "has a path that leaves the folder"
    if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed by another method than deflate"
    return None


def _passed_over(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return any(part.startswith((".", "__MACOSX")) for part in parts) or parts[-1:] == ("DICOMDIR",)


def _suffix(name: str) -> str:
    low = name.lower()
    suffix = ".nii.gz" if low.endswith(".nii.gz") else PurePosixPath(low).suffix
    return suffix if suffix in KEPT_SUFFIXES else ""


def _unpack(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, index: int, folder: Path) -> Path:
    """Write one member, no more than it declares."""
    target = folder / f"{index:06d}{_suffix(info.filename)}"
    left = info.file_size
    with archive.open(info) as source, target.open("wb") as sink:
        while chunk := source.read(CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise refused(path, f"member {index + 1} is longer than it declares; this zip is not unpacked")
            sink.write(chunk)
    if left:
        raise refused(path, f"member {index + 1} ends {left} bytes early; copy the zip again")
    return target
