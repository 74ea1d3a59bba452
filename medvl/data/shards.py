"""Preprocessed images in shards, on a disk or in object storage, streamed while a model trains.

A folder of shards holds chunks of LitData (``chunk-*.bin``, ``index.json``), whose items are the bytes that :mod:`medvl.data.cache` keeps
of an image, and ``samples.json``: which item an image is, by its path relative to the manifest, with what reader it was made, and what
could not be read. The manifest itself stays a table in memory, so reports, patients and labels need no shard, and a batch is what it
always is: a function of seed, epoch and position. LitData fetches chunks, keeps so many of them, and gives any item of them; its own
shuffling and its own state are not used, for the sampler (:class:`medvl.data.sampling.ShardBatches`) has the order.

Nothing is unpickled: items are bytes, and a folder that says otherwise is refused. Pixels are those of patients: protect the folder as the
images are protected.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from medvl.data.cache import SampleStore, packed_sample, settings_of, unpacked_sample
from medvl.data.manifest import StudyImage
from medvl.data.studies import Skipped, generator
from medvl.types import ImageReader, ImageSample, UnreadableImageError

SAMPLES, FORMAT = "samples.json", 1
ASKED = "asked.json"
MIB = 2**20
PART_SHARDS = 16
"""Shards after which it is noted what they hold: what a stopped writing loses at most."""


class ShardStore(SampleStore):
    """Images of a folder of shards, for ``cache:`` of a recipe's data.

    Args:
        folder: where :func:`write_shards` wrote to; a path, or ``s3://``, ``gs://`` or ``azure://`` (as LitData takes it, with the
            credentials of the environment).
        max_cache: how much of fetched chunks is kept on the disk, such as ``"50GB"``; of a local folder nothing is copied.
        window: shards whose images are shuffled together: more mixes better, and wants as many chunks at once.
    Raises:
        ImportError: LitData is not installed.
        FileNotFoundError: no ``samples.json``, or none that can be read.
        ValueError: another format, or a ``window`` below 1.
    """

    def __init__(self, folder: str, max_cache: str = "50GB", window: int = 8) -> None:
        if window < 1:
            raise ValueError(f"window is {window}, expected at least 1")
        self.folder, self.max_cache, self.window = folder, max_cache, window
        found = json.loads(_text(folder, SAMPLES))
        index = json.loads(_text(folder, "index.json"))
        if found.get("format") != FORMAT or index["config"]["data_format"] != ["bytes"]:
            raise ValueError(f"{folder}: shards of another format than this version writes; write them again with `medvl shards`")
        self.settings: str = found["settings"]
        self.places: dict[str, int] = found["places"]
        self.frontal: dict[str, bool] = found["frontal"]
        self.rejected: dict[str, str] = found["rejected"]
        self.root: Path | None = None
        ends = np.cumsum([chunk["chunk_size"] for chunk in index["chunks"]])
        self._shards = np.searchsorted(ends, np.arange(ends[-1] if len(ends) else 0), side="right")
        self._cut = _cut_short(folder, index["chunks"])
        self._items: Any = None

    def under(self, root: Path) -> ShardStore:
        """The store for a manifest in the folder ``root``."""
        self.root = root
        return self

    def known(self, reader: ImageReader, path: Path) -> bool:
        """Whether an image is there, and from the front; without fetching it.

        Raises:
            UnreadableImageError: it is not among the shards, could not be read when they were written, or is in a shard of a local folder
                that is missing or cut short.
            ValueError: the shards were made by another reader.
        """
        self._check(reader)
        key = self._key(path)
        if key in self.rejected:
            raise UnreadableImageError(f"{path}: could not be read when the shards were written: {self.rejected[key]}")
        if key not in self.places:
            raise UnreadableImageError(f"{path}: not among the shards of {self.folder}; write them again with `medvl shards`")
        if (shard := int(self._shards[self.places[key]])) in self._cut:
            raise UnreadableImageError(f"{path}: shard {shard} of {self.folder} {self._cut[shard]}; write them again with `medvl shards`")
        return self.frontal[key]

    def order_of(self) -> str:
        """A hash of all that the order of a training depends on: which image is in which shard, and how many are shuffled together."""
        told = json.dumps([self.window, sorted((key, int(self._shards[place])) for key, place in self.places.items())])
        return hashlib.sha256(told.encode()).hexdigest()

    def shard(self, path: Path) -> int:
        """Number of the shard that an image is in."""
        return int(self._shards[self.places[self._key(path)]])

    def read(self, reader: ImageReader, path: Path) -> ImageSample:
        """The image, from its shard.

        Raises:
            UnreadableImageError: not there, damaged, or not to be had from where the shards are.
            OSError: the disk that fetched shards are kept on is full.
        """
        self.known(reader, path)
        place = self.places[self._key(path)]
        where = f"item {place} of shard {self.shard(path)} in {self.folder}"
        try:
            content = bytes(self._opened()[place])
        except Exception as error:  # storage and network raise anything, and so does a damaged table of a chunk
            if _is_full(error):
                raise
            why = f"could not be fetched ({type(error).__name__}): see that the storage can be reached; if it can, write the shards again"
            raise UnreadableImageError(f"{path}: {where} {why}") from None
        try:
            sample = unpacked_sample(content)
        except Exception as error:  # damaged bytes raise anything
            raise UnreadableImageError(f"{path}: {where} is damaged ({type(error).__name__}); write the shards again") from None
        return replace(sample, pixels=sample.pixels.float())

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: each loader process opens its own."""
        return {**self.__dict__, "_items": None}

    def _opened(self) -> Any:
        if self._items is None:
            self._items = _litdata().StreamingDataset(self.folder, shuffle=False, max_cache_size=self.max_cache)
        return self._items

    def _check(self, reader: ImageReader) -> None:
        if settings_of(reader) != self.settings:
            raise ValueError(f"{self.folder}: the shards were written with another reader than the recipe's; write them again")

    def _key(self, path: Path) -> str:
        if self.root is None:
            raise ValueError("shards are asked for by paths relative to a manifest; call under(its folder) first")
        return Path(path).relative_to(self.root).as_posix() if Path(path).is_relative_to(self.root) else str(path)


def write_shards(
    reader: ImageReader,
    images: Sequence[StudyImage],
    root: Path,
    out: Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    shard_mib: int = 64,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> list[Skipped]:
    """Read every image and write the shards, in an order that mixes patients; what could not be read.

    The folder is written beside its place, as ``.NAME-partial``, and renamed into it, so there are all shards or none, and shards that were
    there before stay until then (a run killed between the two renames leaves them in ``.NAME-before-*`` beside the place). What is stopped
    goes on when it is asked for again, of the same files with the same options: after every so many shards it is noted what they hold.

    Args:
        root: folder of the manifest, which paths are relative to.
        out: where to; replaced if it holds shards.
        dtype: of the stored pixels; ``float16`` takes half the room and rounds.
        shard_mib: size of a shard.
        seed: of the order.
        progress: called for each image, also for one that an earlier call has written.
    Raises:
        ImportError: LitData is not installed.
        OSError: the folder cannot be written to, or is another's, or the disk is full.
        ValueError: no image that can be read.
    """
    _litdata()
    from litdata.streaming.writer import BinaryWriter

    if out.exists() and any(out.iterdir()) and not (out / SAMPLES).is_file():
        raise FileExistsError(f"{out} is there and holds no shards; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}-partial"
    order = [images[int(i)] for i in generator(seed, "shards").permutation(len(images))]
    with _said_if_full(out):
        parts = _taken_up(partial, _asked(reader, order, dtype, shard_mib, seed))
        rejected = [Skipped(**one) for part in parts for one in part["rejected"]]
        places = {key: i for i, key in enumerate(key for part in parts for key in part["keys"])}
        frontal = {key: value for part in parts for key, value in zip(part["keys"], part["frontal"], strict=True)}
        at = sum(part["images"] for part in parts)
        for _ in range(at):
            progress()
        while at < len(order):
            shards = len(list(partial.glob("chunk-*.bin")))
            writer = BinaryWriter(str(partial), chunk_bytes=shard_mib * MIB, chunk_index=shards)
            part: dict[str, Any] = {"images": 0, "keys": [], "frontal": [], "rejected": []}
            held = 0
            while at < len(order) and (not part["images"] or held < PART_SHARDS * shard_mib * MIB):
                image = order[at]
                key = _relative(str(image.path), root)
                try:
                    sample = reader.read(image.path)
                except UnreadableImageError as error:
                    rejected.append(Skipped(image.row, image.study_id, str(image.path), str(error)))
                    part["rejected"].append(asdict(rejected[-1]))
                else:
                    if key not in places:
                        content = packed_sample(replace(sample, pixels=sample.pixels.to(getattr(torch, dtype))))
                        writer[len(part["keys"])] = content
                        held += len(content)
                        places[key] = len(places)
                        frontal[key] = sample.pixels.ndim == 4 or (sample.view or "").upper() in ("PA", "AP")
                        part["keys"].append(key)
                        part["frontal"].append(frontal[key])
                part["images"] += 1
                at += 1
                progress()
            if part["keys"]:
                writer.done()
                (partial / "0.index.json").replace(partial / f"{len(parts) + 1}.index.json")
            parts.append(part)
            _note(partial / f"part-{len(parts):05d}.json", part)
        if not places:
            shutil.rmtree(partial)
            raise ValueError(f"none of {len(images)} images could be read; first: {rejected[0].reason if rejected else 'there are none'}")
        BinaryWriter(str(partial), chunk_bytes=shard_mib * MIB).merge(sum(bool(part["keys"]) for part in parts))
        told = {"format": FORMAT, "settings": settings_of(reader), "places": places, "frontal": frontal}
        told["rejected"] = {_relative(one.path, root): one.reason for one in rejected}
        _note(partial / SAMPLES, told)
        for note in (partial / ASKED, *partial.glob("part-*.json")):
            note.unlink()
        _put(partial, out)
    return rejected


def _asked(reader: ImageReader, order: Sequence[StudyImage], dtype: str, shard_mib: int, seed: int) -> dict[str, Any]:
    """What must be the same for a stopped writing to go on; of the files their names, sizes and times."""
    seen = hashlib.sha256()
    for image in order:
        stat = image.path.stat() if image.path.exists() else None
        seen.update(f"{image.row}\0{image.path}\0{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return {"settings": settings_of(reader), "images": seen.hexdigest(), "dtype": dtype, "shard_mib": shard_mib, "seed": seed}


def _taken_up(partial: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier, stopped writing of just this has done, part by part; its folder, without what was not noted, or a new one."""
    if (partial / ASKED).is_file() and json.loads((partial / ASKED).read_text(encoding="utf-8")) == asked:
        parts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(partial.glob("part-*.json"))]
        indices = [partial / f"{number}.index.json" for number, part in enumerate(parts, 1) if part["keys"]]
        if all(index.is_file() for index in indices):  # else it was stopped in its last moment
            written = {chunk["filename"] for index in indices for chunk in json.loads(index.read_text(encoding="utf-8"))["chunks"]}
            for file in (*partial.glob("chunk-*.bin"), *partial.glob("*index.json")):
                if file.name not in written and file not in indices:
                    file.unlink()
            return parts
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _note(partial / ASKED, asked)
    return []


def _note(path: Path, told: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(told), encoding="utf-8")
    beside.replace(path)


def _put(made: Path, out: Path) -> None:
    """Rename a folder into its place; what was there is deleted once the new one is, and put back if it cannot be."""
    before = None
    if out.exists():
        before = Path(tempfile.mkdtemp(prefix=f".{out.name}-before-", dir=out.parent))
        out.replace(before)
    try:
        made.rename(out)
    except OSError:
        if before is not None:
            before.replace(out)
        raise
    if before is not None:
        shutil.rmtree(before)


@contextlib.contextmanager
def _said_if_full(out: Path) -> Iterator[None]:
    """Say of a full disk what became of the shards."""
    try:
        yield
    except OSError as error:
        if not _is_full(error):
            raise
        kept = "the shards that were there are as they were" if (out / SAMPLES).is_file() else "there are no shards"
        raise OSError(
            error.errno,
            f"{out}: the disk is full, {kept}; make room and ask again, which goes on where it stopped (.{out.name}-partial beside it "
            "holds what was made), or name a folder on another disk",
        ) from None


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_remote(folder: str) -> bool:
    return "://" in folder or folder.startswith("local:")


def _cut_short(folder: str, chunks: Sequence[dict[str, Any]]) -> dict[int, str]:
    """Shard -> what is wrong with its file, by size alone; of a remote folder nothing is known before it is fetched."""
    if _is_remote(folder):
        return {}
    wrong: dict[int, str] = {}
    for i, chunk in enumerate(chunks):
        file = Path(folder) / chunk["filename"]
        size = file.stat().st_size if file.is_file() else None
        if size != chunk["chunk_bytes"]:
            wrong[i] = "is missing" if size is None else f"has {size} bytes, expected {chunk['chunk_bytes']}"
    return wrong


def _relative(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def _text(folder: str, name: str) -> str:
    """A small file of a local or remote folder; this is fetched as LitData fetches chunks, with the same credentials.

    Raises:
        FileNotFoundError: none of that name.
    """
    place = f"{folder.rstrip('/')}/{name}"
    try:
        if not _is_remote(folder):
            return Path(place).read_text(encoding="utf-8")
        _litdata()
        from litdata.streaming.downloader import get_downloader

        with tempfile.TemporaryDirectory() as temporary:
            get_downloader(folder, temporary, []).download_file(place, f"{temporary}/{name}")
            return (Path(temporary) / name).read_text(encoding="utf-8")
    except ImportError:
        raise
    except Exception as error:  # each storage has errors of its own
        raise FileNotFoundError(f"{place} cannot be read ({type(error).__name__}); expected a folder that `medvl shards` wrote") from error


def _litdata() -> Any:
    try:
        import litdata
    except ImportError as error:
        raise ImportError("shards need LitData, which is not installed: pip install 'medvl[streaming]'") from error
    return litdata
