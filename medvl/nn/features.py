"""Features of frozen towers, kept in memory and on disk, so that each image goes through such a tower once.

Shapes: N tokens, F width of the tower. What is kept are the features of patients' images: protect the folder as the images are protected.
Nothing is unpickled; the checksum finds damage, not malice.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key; raised when the same tower and image come to give other features, or a file another layout."""


@dataclass(frozen=True)
class Kept:
    """Features of one image, on the CPU."""

    pooled: Tensor  # (F,) float32
    tokens: Tensor | None = None  # (N, F) float16
    valid: Tensor | None = None  # (N,) bool
    grid: tuple[int, ...] | None = None

    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.numel() * t.element_size() for t in (self.pooled, self.tokens, self.valid) if t is not None)


class FeatureStore:
    """Features by key, in memory up to a limit and, with a folder, on disk.

    A file is written beside its place and renamed into it, so a reader sees a whole entry or none; one that is damaged is told by its
    checksum, logged, and made again. Where the disk cannot be written to, the log says so once and all goes on without it. The folder has
    no bound: an entry takes about 4 F bytes, with tokens 2 N F more; to start anew, delete it.

    Args:
        folder: made if absent; may be shared by towers and processes. None: memory alone.
        memory_bytes: of what is held in memory; what comes later is held on disk alone, or not at all.
    Raises:
        ValueError: a folder that cannot be made.
    """

    def __init__(self, folder: Path | None, memory_bytes: int) -> None:
        self.folder, self.memory_bytes = folder, memory_bytes
        self.held: dict[str, Kept] = {}
        self._used, self._unwritable = 0, False
        if folder is not None:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"features {folder}: cannot be made a folder: {error.strerror}; name one that can be written to") from None

    @property
    def keeps(self) -> bool:
        """Whether anything is kept at all."""
        return self.folder is not None or self.memory_bytes > 0

    def get(self, key: str) -> Kept | None:
        """The features under a key, if they are there."""
        if key in self.held:
            return self.held[key]
        found = None if self.folder is None else _load(self._place(self.folder, key))
        if found is not None:
            self._hold(key, found)
        return found

    def put(self, key: str, kept: Kept) -> None:
        """Keep features, in memory if there is room and on disk if there is a folder."""
        self._hold(key, kept)
        if self.folder is None or self._unwritable:
            return
        place = self._place(self.folder, key)
        try:
            place.parent.mkdir(exist_ok=True)
            _save(place, kept)
        except OSError as error:
            self._unwritable = True
            log.warning("features %s: cannot be written to (%s); those of other images are not kept there", self.folder, error.strerror)

    def _hold(self, key: str, kept: Kept) -> None:
        if self._used + kept.size_bytes() <= self.memory_bytes and key not in self.held:
            self.held[key] = kept
            self._used += kept.size_bytes()

    @staticmethod
    def _place(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.safetensors"


def module_sha256(module: nn.Module) -> str:
    """Hash of the names, types, shapes and values of a module's state dict."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor in row-major order, as a buffer."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _save(place: Path, kept: Kept) -> None:
    from safetensors.torch import save

    tensors = {"pooled": kept.pooled} | {name: t for name in ("tokens", "valid") if (t := getattr(kept, name)) is not None}
    metadata = {"grid": "" if kept.grid is None else " ".join(map(str, kept.grid))}
    content = save({name: t.contiguous() for name, t in tensors.items()}, metadata | {"crc32": f"{_checksum(tensors):08x}"})
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{place.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.replace(place)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _load(place: Path) -> Kept | None:
    from safetensors import safe_open

    if not place.is_file():
        return None
    try:
        with safe_open(place, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        if f"{_checksum(tensors):08x}" != metadata["crc32"]:
            raise ValueError("another checksum")
        grid = tuple(int(side) for side in metadata["grid"].split()) or None
        return Kept(tensors["pooled"], tensors.get("tokens"), tensors.get("valid"), grid)
    except Exception as error:  # damaged files raise anything
        log.warning("features %s are damaged (%s); made again", place, type(error).__name__)
        with contextlib.suppress(OSError):
            place.unlink()
        return None


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensor_bytes(tensors[name]), value)
    return value
