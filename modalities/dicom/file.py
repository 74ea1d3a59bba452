"""A DICOM file opened and its header parsed within bounds: no length, nesting or count in it costs more than it brings.

Only the elements of ``KEYWORDS`` are kept; the pixel data stay in the file until a frame is asked for. Letters: k a frame's index from 0.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import math
import os
import re
import stat
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from medvl.types import UnreadableImageError

MAX_FILE_BYTES = 2**31
"""Largest file that is opened; a cine run of an hour has fewer."""

ANY_SIZE = 2**62
"""Bytes of a file of which only the header is read."""

HELD_BYTES = 2**26
"""Files up to here are read at once, larger ones piece by piece."""

MAX_INFLATED_BYTES = 2**28
"""Largest dataset that a deflated file may unfold to: 500 slices of 512 x 512 in one."""

MAX_READS = 2**19
"""Reads that parsing one file may take, two or three seconds' worth; an enhanced header takes some 60 to 100 a frame."""

SMALL_READ = 2**12
"""Reads up to here may allocate what they ask for; there are many."""

MAX_ELEMENT_BYTES = 2**16
"""Longest value of a header element that is used; lookup tables may have two bytes for each of 2**16 entries, and sequences more."""

MAX_TABLE_BYTES = 2**18
MAX_SEQUENCE_BYTES = 2**26

UNDEFINED_LENGTH = 0xFFFFFFFF
PIXEL_TAGS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
DEFLATED = b"1.2.840.10008.1.2.1.99"

UID_FORM = re.compile(r"[0-9]+(\.[0-9]+)+")
"""What a UID looks like (PS3.5 9.1); longer ones and leading zeros occur and still tell studies apart."""

SEQUENCES = ("ModalityLUTSequence", "VOILUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TABLES = tuple(f"{prefix}{colour}PaletteColorLookupTableData" for prefix in ("", "Segmented") for colour in ("Red", "Green", "Blue"))
KEYWORDS = (
    *SEQUENCES,
    *TABLES,
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *("SpecificCharacterSet", "SOPClassUID", "StudyInstanceUID", "Modality", "BodyPartExamined", "PresentationIntentType", "Units"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "EstimatedRadiographicMagnificationFactor"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PatientOrientation", "ViewPosition", "PresentationLUTShape"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "VOILUTFunction"),
    *("SeriesInstanceUID", "FrameOfReferenceUID", "AcquisitionNumber", "FrameAcquisitionNumber", "ImageType", "FrameType"),
    *("TemporalPositionIndex", "TemporalPositionIdentifier", "ConvolutionKernel", "SliceThickness", "SpacingBetweenSlices"),
    *("FrameAcquisitionDateTime", "AcquisitionDateTime", "AcquisitionTime", "ContentTime", "LossyImageCompression"),
)


@functools.cache
def keyword_tags() -> dict[str, Any]:
    """The tags of ``KEYWORDS``: pydicom's own look-up of a keyword costs more than reading the element."""
    from pydicom.tag import Tag

    return {keyword: Tag(keyword) for keyword in KEYWORDS}


@dataclass
class Notes:
    """Where the file lies and what is to be told about it."""

    path: Path
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Keep a message once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def refuse(self, message: str) -> UnreadableImageError:
        """The error to raise."""
        return UnreadableImageError(f"{self.path}: {message}")


class BoundedReader:
    """``read``, ``seek`` and ``tell`` of a file or of bytes: never more than is left, and at most MAX_READS times."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.reads = file, size, 0

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, so that a length in a header allocates nothing that is not there."""
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError("too many elements")
        if 0 <= size <= SMALL_READ:
            return self.file.read(size)
        left = max(0, self.size - self.file.tell())
        return self.file.read(left if size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """As of a file."""
        return self.file.tell()


@dataclass(frozen=True)
class PixelElement:
    """Where the pixel data lie in the file."""

    keyword: str
    vr: str
    offset: int
    length: int | None  # None: undefined, so compressed


class Header:
    """Elements of one frame: those of its functional groups first, then those that all frames share, then those of the file."""

    def __init__(self, layers: list[Any], notes: Notes, little_endian: bool = True) -> None:
        self.layers, self.notes, self.little_endian = layers, notes, little_endian

    def get(self, keyword: str) -> Any:
        """The value as pydicom gives it; None where it is missing or empty.

        Raises:
            UnreadableImageError: the element cannot be converted to what its keyword means.
        """
        tag = keyword_tags()[keyword]
        for layer in self.layers:
            if tag in layer:
                try:
                    value = layer[tag].value
                except Exception:  # its text quotes the value
                    raise self.notes.refuse(f"its {keyword} cannot be read") from None
                if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
                    return value
        return None

    def texts(self, keyword: str) -> tuple[str, ...]:
        """All values as stripped upper case text; none where the element is missing."""
        value = self.get(keyword)
        many = value if value is not None and not isinstance(value, str) and hasattr(value, "__len__") else [value]
        return () if value is None else tuple(str(v).strip(" \0").upper() for v in many)

    def text(self, keyword: str) -> str:
        """The first value as stripped upper case text; empty where it is missing."""
        return next(iter(self.texts(keyword)), "")

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """All values as numbers, NaN for one that is none; empty where the element is missing."""
        value = self.get(keyword)
        if value is None:
            return ()
        many = value if hasattr(value, "__len__") and not isinstance(value, str | bytes) else [value]
        return tuple(_number(v) for v in many)

    def number(self, keyword: str) -> float | None:
        """The first value as a finite number, or None."""
        first = next(iter(self.numbers(keyword)), math.nan)
        return first if math.isfinite(first) else None

    def whole(self, keyword: str, default: int) -> int:
        """The value as an integer.

        Raises:
            UnreadableImageError: it is no single number.
        """
        numbers = self.numbers(keyword)
        if not numbers:
            return default
        if len(numbers) > 1 or not math.isfinite(numbers[0]):
            raise self.notes.refuse(f"its {keyword} is no single number")
        return int(numbers[0])

    def items(self, keyword: str) -> list[Any]:
        """Items of a sequence; empty where it is missing or no sequence."""
        value = self.get(keyword)
        return list(value) if value is not None and not isinstance(value, str | bytes) and hasattr(value, "__iter__") else []

    def frame(self, k: int) -> Header:
        """The header of frame ``k`` of an enhanced object; of others, the same."""
        return self._of(self.items("PerFrameFunctionalGroupsSequence")[k : k + 1], self.items("SharedFunctionalGroupsSequence")[:1])

    def frames(self) -> list[Header]:
        """The headers of all frames of an enhanced object; of others, none."""
        shared = self.items("SharedFunctionalGroupsSequence")[:1]
        return [self._of([own], shared) for own in self.items("PerFrameFunctionalGroupsSequence")]

    def _of(self, own: list[Any], shared: list[Any]) -> Header:
        """With the macros of functional groups before the file's elements (PS3.3 C.7.6.16.2); private ones may mean anything."""
        elements = [element for group in (*own, *shared) for element in group if element.VR == "SQ" and not element.tag.is_private]
        return Header([*(element.value[0] for element in elements if element.value), *self.layers], self.notes, self.little_endian)


@dataclass
class DicomFile:
    """A parsed file; ``source`` is open as long as :func:`opened` is."""

    header: Header
    syntax: Any  # pydicom UID that says how the pixels are coded
    syntax_name: str
    pixels: PixelElement | None
    source: BoundedReader
    notes: Notes
    fragments: list[tuple[int, int]] | None = None  # (offset, length) of those of compressed pixels, once they have been looked for


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor logs of the decoding libraries: they quote header values."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg")]

    def nothing(record: logging.LogRecord) -> bool:
        return False

    for logger in loggers:
        logger.addFilter(nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(nothing)


@contextmanager
def opened(path: Path, *, header_only: bool = False, largest: int = MAX_FILE_BYTES) -> Iterator[DicomFile]:
    """The file parsed, without a word from the libraries, and every error as one type.

    Args:
        path: the file.
        header_only: its pixels will not be asked for, so that nothing is read ahead.
        largest: bytes that the file may have.
    Raises:
        UnreadableImageError: no regular file, no DICOM, damaged or absurd; whatever is raised inside the ``with`` comes as this too.
    """
    notes = Notes(Path(path))
    with quiet():
        try:
            with _regular(notes.path) as file:
                yield _parse(_source(file, notes, 0 if header_only else HELD_BYTES, largest), notes)
        except UnreadableImageError:
            raise
        except OSError as error:
            raise notes.refuse(f"cannot be opened: {error.strerror or 'damaged'}") from None
        except Exception as error:  # hostile headers raise anything; their texts may quote header values, so only the type is named
            raise notes.refuse(f"not a readable DICOM image: {type(error).__name__} while reading its header or pixels") from None


def study_key(path: Path) -> str | None:
    """A hash of StudyInstanceUID, from the header alone; None where the file has none that can be read. Never raises.

    What is not numbers and dots is none: the placeholder that a de-identification leaves would join the studies of many patients.
    """
    try:
        with opened(path, header_only=True, largest=ANY_SIZE) as file:
            uid = str(file.header.get("StudyInstanceUID") or "").strip(" \0")
    except Exception:  # hostile headers and paths raise anything; reading the image is what tells of them
        return None
    return hashlib.blake2b(uid.encode(), digest_size=16).hexdigest() if UID_FORM.fullmatch(uid) else None


def modality_of(path: Path) -> str | None:
    """Modality (0008,0060) of a DICOM file, such as CT or DX; None for other files, unreadable headers and odd values. Never raises."""
    try:
        with opened(path, header_only=True, largest=ANY_SIZE) as file:
            found = file.header.text("Modality")
    except (UnreadableImageError, OSError):
        return None
    return found if re.fullmatch(r"[A-Z]{2,16}", found) else None


def has_dicom_magic(path: Path) -> bool:
    """True where the file has DICOM's 128-byte preamble and the letters DICM.

    Raises:
        OSError: no regular file, or it cannot be opened.
    """
    with _regular(Path(path)) as file:
        return file.read(132)[128:] == b"DICM"


def uid_name(uid: Any) -> str:
    """A UID's registered name; private ones are not quoted, since they can identify."""
    from pydicom.uid import UID

    if not uid:
        return "no SOP class or coding named"
    name = UID(str(uid)).name
    return name if not name[:1].isdigit() else "an unregistered class or coding"


@contextmanager
def _regular(path: Path) -> Iterator[IO[bytes]]:
    """A regular file open for reading; pipes and devices are neither waited for nor read, also behind a link."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(0, "expected a file, this is a folder, pipe or device")
    with os.fdopen(handle, "rb") as file:
        yield file


def _source(file: IO[bytes], notes: Notes, held: int, largest: int) -> BoundedReader:
    size = os.fstat(file.fileno()).st_size
    if size > largest:
        raise notes.refuse(f"{size} bytes; an image has fewer than {largest}")
    return BoundedReader(file, size) if size > held else BoundedReader(io.BytesIO(file.read(size)), size)


def _parse(source: BoundedReader, notes: Notes) -> DicomFile:
    """Header up to the pixel data, with or without file meta information."""
    from pydicom.filereader import read_partial
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    source, deflated = _inflated(source, notes)
    head = source.read(132)
    source.seek(0)
    magic = head[128:] == b"DICM"
    tags = _tag_keywords()
    found: list[PixelElement] = []

    def stop(tag: Any, vr: str | None, length: int) -> bool:
        keyword = PIXEL_TAGS.get(tag)
        if keyword is not None:
            found[:] = [PixelElement(keyword, vr or "OW", source.tell(), None if length == UNDEFINED_LENGTH else length)]
            return True
        if length > MAX_ELEMENT_BYTES and length != UNDEFINED_LENGTH and _longest(tags.get(tag)) < length:
            raise notes.refuse(f"its {tags[tag]} claims {length} bytes, more than the {_longest(tags[tag])} that are read")
        return False

    dataset = read_partial(source, stop_when=stop, force=not magic, specific_tags=list(tags))
    if not magic and not found and "Rows" not in dataset:
        raise notes.refuse("expected a DICOM file, but it has neither the DICM mark nor image attributes")
    if not magic:
        notes.warn("no DICOM preamble; read as a bare dataset")
    implicit, little = dataset.original_encoding
    syntax = (getattr(dataset, "file_meta", None) or {}).get("TransferSyntaxUID")
    if syntax is None:
        notes.warn("no transfer syntax in the file; taken from how its elements are written")
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        if found and found[0].length is None:
            raise notes.refuse("compressed pixels without a transfer syntax; expected file meta information that names it")
    syntax = UID(str(syntax))
    header = Header([dataset], notes, bool(little))
    name = "Deflated Explicit VR Little Endian" if deflated else uid_name(syntax)
    return DicomFile(header, syntax, name, found[0] if found else None, source, notes)


@functools.cache
def _tag_keywords() -> dict[int, str]:
    return {tag: keyword for keyword, tag in keyword_tags().items()}


def _longest(keyword: str | None) -> float:
    """Bytes that a value of this element may have; those that are not used are skipped, whatever they claim."""
    if keyword is None:
        return math.inf
    return MAX_SEQUENCE_BYTES if keyword in SEQUENCES else MAX_TABLE_BYTES if keyword in TABLES else MAX_ELEMENT_BYTES


def _inflated(source: BoundedReader, notes: Notes) -> tuple[BoundedReader, bool]:
    """A deflated file as an explicit little endian one, and True; any other as it is. pydicom itself would inflate without a bound."""
    head = source.read(2**16)
    source.seek(0)
    if DEFLATED not in head or head[128:132] != b"DICM":
        return source, False
    at, syntax = 132, b""
    while head[at : at + 2] == b"\x02\x00" and at + 12 <= len(head):
        long = head[at + 4 : at + 6] in (b"OB", b"UN", b"OW", b"UT", b"SQ")
        length = int.from_bytes(head[at + 8 : at + 12] if long else head[at + 6 : at + 8], "little")
        start = at + (12 if long else 8)
        if head[at + 2 : at + 4] == b"\x10\x00":
            syntax = head[start : start + length].rstrip(b"\0 ")
        at = start + length
    if syntax != DEFLATED:
        raise notes.refuse("names the deflated transfer syntax where it cannot be told whether it is used")
    source.seek(at)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = io.BytesIO()
    plain.write(head[:132] + b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0")
    while not inflater.eof and (chunk := inflater.unconsumed_tail or source.read(2**18)):
        plain.write(inflater.decompress(chunk, 2**20))
        if plain.tell() > MAX_INFLATED_BYTES:
            raise notes.refuse(f"its deflated dataset unfolds to more than {MAX_INFLATED_BYTES} bytes; it looks like a bomb")
    size = plain.tell()
    plain.seek(0)
    return BoundedReader(plain, size), True


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
