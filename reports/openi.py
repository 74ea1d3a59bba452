"""Reports of the Open-i Indiana University chest X-ray collection: XML files, a folder of them, or the archive they come in.

An XML file holds one study: its id (``uId``), the sections as ``AbstractText`` elements with a ``Label``, the terms that people (``major``)
and a program (``automatic``) gave it under ``MeSH``, and a ``parentImage`` for each film. Files are read one after the other and never as
more than data: a document type, an entity or a file above a size limit is refused.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from reports.sections import Sections

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MAX_BYTES = 4 * 2**20
"""Largest file that is read; the collection's largest has 9 kB."""

_SECTIONS = frozenset(field.name for field in fields(Sections)) - {"last_paragraph"}
_ARCHIVES = (".tgz", ".tar.gz", ".tar", ".tar.bz2", ".tar.xz")


class UnreadableReportError(ValueError):
    """A file that is not a report of the collection; the message names the file and holds no text of it."""


@dataclass(frozen=True)
class OpeniImage:
    """A film that a report names."""

    id: str  # the name of the PNG or DICOM file without its suffix
    caption: str  # views and date, as far as they were kept


@dataclass(frozen=True)
class OpeniReport:
    """One study of the collection."""

    study_id: str
    sections: Sections  # indication, comparison, findings, impression; removed words are XXXX
    major: tuple[str, ...]  # MeSH terms by people, qualifiers after slashes: "Calcinosis/lung/hilum/left"; "normal" alone for none
    automatic: tuple[str, ...]  # terms found by a program
    images: tuple[OpeniImage, ...]

    @property
    def text(self) -> str:
        """The sections that are not empty under headings, a line each."""
        parts = ((field.name, getattr(self.sections, field.name)) for field in fields(Sections) if field.name in _SECTIONS)
        return "\n".join(f"{name.upper()}: {text}" for name, text in parts if text)


def parse_openi(xml: bytes, name: str) -> OpeniReport:
    """One report from the content of its file.

    Args:
        xml: the file's content.
        name: the file, for messages.
    Raises:
        UnreadableReportError: not XML, XML with a document type or entities, too large, or no report of the collection.
    """
    if len(xml) > MAX_BYTES:
        raise UnreadableReportError(f"{name}: more than {MAX_BYTES} bytes, expected one Open-i report. Split the file into one per study")
    try:
        root = fromstring(xml, forbid_dtd=True)
    except DefusedXmlException as error:
        kind = type(error).__name__
        raise UnreadableReportError(f"{name}: XML with a document type or entities ({kind}), which Open-i reports have not") from None
    except ParseError as error:
        line, column = error.position
        raise UnreadableReportError(f"{name}: no well-formed XML (line {line}, column {column}, code {error.code})") from None
    except (ValueError, LookupError):
        raise UnreadableReportError(f"{name}: XML in an encoding that cannot be read, expected UTF-8") from None
    return _report(root, name)


def read_openi(source: Path, on_error: Callable[[UnreadableReportError], None] | None = None) -> Iterator[OpeniReport]:
    """The reports of an XML file, a folder (its .xml files, sorted, subfolders too) or a tar archive (in its order), one after the other.

    Args:
        source: the file, folder or archive.
        on_error: called with what is wrong with a file, which is then left out. Without it the first such file raises.
    Raises:
        FileNotFoundError: no such file or folder.
        UnreadableReportError: a file that is no report, or an archive that breaks off, without ``on_error``; a source of another kind.
    """
    if not source.exists():
        raise FileNotFoundError(f"no Open-i reports at {source}: expected an XML file, a folder of them or the .tgz archive")
    for name, content in _contents(source):
        found = _parsed(content, name)
        if isinstance(found, OpeniReport):
            yield found
        elif on_error is None:
            raise found
        else:
            on_error(found)


def _parsed(content: bytes | UnreadableReportError, name: str) -> OpeniReport | UnreadableReportError:
    if isinstance(content, UnreadableReportError):
        return content
    try:
        return parse_openi(content, name)
    except UnreadableReportError as error:
        return error


def _contents(source: Path) -> Iterator[tuple[str, bytes | UnreadableReportError]]:
    """(name, content or what is wrong with it) of each file; one byte more than allowed of those too large."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.suffix.lower() == ".xml" and path.is_file()):
            yield str(path), _start(path)
    elif source.suffix.lower() == ".xml":
        yield str(source), _start(source)
    elif source.name.lower().endswith(_ARCHIVES):
        yield from _members(source)
    else:
        yield str(source), UnreadableReportError(f"{source}: expected .xml, a folder, or one of {', '.join(_ARCHIVES)}")


def _start(path: Path) -> bytes | UnreadableReportError:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        return UnreadableReportError(f"{path}: cannot be read ({error.strerror})")


def _members(source: Path) -> Iterator[tuple[str, bytes | UnreadableReportError]]:
    """Nothing is written: members are read in place, so that their names lead nowhere."""
    count = 0
    try:
        with tarfile.open(source, "r|*") as archive:
            for member in archive:
                if member.name.lower().endswith(".xml") and member.isfile() and (stream := archive.extractfile(member)) is not None:
                    content = stream.read(MAX_BYTES + 1)
                    count += 1
                    yield f"{source}:{member.name}", content
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        fault = UnreadableReportError(f"{source}: the archive breaks off after {count} reports ({type(error).__name__}). Fetch it again")
        yield str(source), fault


def _report(root: Element, name: str) -> OpeniReport:
    uid = root.find(".//uId")
    study_id = uid.get("id", "").strip() if uid is not None else ""
    texts = [(label.get("Label", "").strip().lower(), _text(label)) for label in root.iter("AbstractText")]
    if not study_id or not texts:
        raise UnreadableReportError(f"{name}: XML of another kind, expected an Open-i report (a uId with an id, and AbstractText elements)")
    parts: dict[str, list[str]] = {}
    for label, text in texts:
        if text:
            parts.setdefault(label if label in _SECTIONS else "other", []).append(text)
    return OpeniReport(
        study_id=study_id,
        sections=Sections(**{label: "\n\n".join(found) for label, found in parts.items()}),
        major=tuple(term for one in root.iterfind(".//MeSH/major") if (term := _text(one))),
        automatic=tuple(term for one in root.iterfind(".//MeSH/automatic") if (term := _text(one))),
        images=tuple(OpeniImage(one.get("id", "").strip(), _text(one.find("caption"))) for one in root.iter("parentImage")),
    )


def _text(element: Element | None) -> str:
    return "" if element is None else "".join(element.itertext()).strip()
