"""The studies that a user named or dropped on the page: which there are, what they are called, and which cannot be read.

The page knows a study by its number. A path is only ever one of these, and none leads out of the folder that was named.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from medvl.types import ImageReader, UnreadableImageError
from modalities.ct.reader import CtReader
from modalities.joint import JointReader
from modalities.xray.reader import XrayReader
from tasks.view.content import show_by_any

LONGEST_NAME = 100
MOST_FILES = 20_000  # of one drop; a long CT has some thousands of slices


class TooLargeError(ValueError):
    """What was dropped is more than is taken."""


@dataclass
class Study:
    """One file, or folder of a series."""

    path: Path
    name: str
    error: str | None = None
    checked: bool = False

    def to_dict(self, number: int) -> dict[str, Any]:
        """What the page is told; the path itself is not."""
        return {"id": number, "name": self.name, "error": self.error, "checked": self.checked}


def find_studies(readers: Sequence[ImageReader], path: Path) -> list[Study]:
    """A file as one study, a folder as the studies in it; of a folder without any, the folder, to be refused by name.

    A link that leads out of the folder is listed with that reason and never followed.
    """
    if not path.is_dir():
        return [Study(path, path.name)]
    films = [one for one in readers if isinstance(one, XrayReader)]
    volumes = [one for one in readers if isinstance(one, CtReader)]
    if films and volumes:  # told apart by what the files hold, so that slices are no films
        readers = [JointReader(films[0], volumes[0]), *(one for one in readers if one not in films + volumes)]
    found = sorted({one for reader in readers for one in reader.find_images(path)})
    root = path.resolve()
    studies = []
    for one in found or [path]:
        name = path.name or str(path) if one == path else str(one.relative_to(path))
        inside = one.resolve().is_relative_to(root)
        studies.append(Study(one, name, None if inside else f"{name}: a link that leads out of the folder", not inside))
    return studies


def safe_name(name: str) -> str:
    """A file name that a dropped file can be given: its last part, plain letters, no leading dot, its suffix kept."""
    last = re.split(r"[/\\]", name)[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", last).lstrip(".")[-LONGEST_NAME:].lstrip(".")
    return plain or "file"


class Studies:
    """All that can be looked at. As a context it holds the folder that dropped files go to, which is gone at its end."""

    def __init__(self, readers: Sequence[ImageReader], path: Path, max_upload: int) -> None:
        self.readers, self.max_upload = tuple(readers), max_upload
        self.all = find_studies(self.readers, path)
        self._drops: dict[int, Drop] = {}
        self._begun = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Studies:
        self._folder = tempfile.TemporaryDirectory(prefix="medvl-view-", ignore_cleanup_errors=True)
        self._checker = threading.Thread(target=self._check_all, daemon=True)
        if len(self.all) > 1:  # a single one is opened at once, and says itself what is wrong
            self._checker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._folder.cleanup()

    def __getitem__(self, number: int) -> Study:
        """The study of a number.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= number < len(self.all):
            raise IndexError(f"no study {number}; there are {len(self.all)}")
        return self.all[number]

    def to_list(self) -> list[dict[str, Any]]:
        """What the page is told of all."""
        return [one.to_dict(number) for number, one in enumerate(self.all)]

    def begin_drop(self) -> int:
        """Room for files that are dropped together; its number."""
        with self._lock:
            number = self._begun
            self._begun += 1
            folder = Path(self._folder.name, f"{number:04d}")
            folder.mkdir()
            self._drops[number] = Drop(folder, self.max_upload)
        return number

    def drop(self, number: int) -> Drop:
        """The drop of a number.

        Raises:
            IndexError: there is none, or it has ended.
        """
        if number not in self._drops:
            raise IndexError(f"no drop {number} that is under way")
        return self._drops[number]

    def end_drop(self, number: int) -> list[int]:
        """The numbers of the studies in what was dropped: a single file is one, of several those that the readers find."""
        drop = self.drop(number)
        files = sorted(drop.folder.iterdir())
        found = find_studies(self.readers, files[0] if len(files) == 1 else drop.folder)
        for one in found:
            one.name = f"dropped: {drop.label}" if one.path == drop.folder else f"dropped: {one.name}"
        with self._lock:
            del self._drops[number]
            first = len(self.all)
            self.all += found
        return list(range(first, first + len(found)))

    def _check_all(self) -> None:
        """Read every study once, so that the list says which are broken; what a study holds is not kept."""
        for one in list(self.all):
            if self._ended.is_set():
                return
            if not one.checked:
                try:
                    show_by_any(self.readers, one.path)
                except UnreadableImageError as error:
                    one.error = str(error).replace(str(one.path), one.name)
                except Exception as error:  # the page must not end because of one file
                    one.error = f"{one.name}: cannot be read ({type(error).__name__})"
                one.checked = True


class Drop:
    """Files that are dropped together, up to ``most`` bytes in all."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most, self.size, self.count, self.label = folder, most, 0, 0, "files"

    def new_file(self, name: str) -> Path:
        """Where a file of that name goes.

        Raises:
            TooLargeError: more files than are taken.
        """
        self.count += 1
        if self.count > MOST_FILES:
            raise TooLargeError(f"more than {MOST_FILES} files at once")
        plain = safe_name(name)
        if self.count == 1:
            self.label = plain
        path = self.folder / plain
        return path if not path.exists() else self.folder / f"{self.count:05d}_{plain}"

    def take(self, size: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            TooLargeError: more than are taken.
        """
        self.size += size
        if self.size > self.most:
            raise TooLargeError(f"more than {self.most} bytes at once; raise --max-upload, or name the file on the command line")
