"""One frame of a parsed file to stored values: (H, W), or (H, W, 3) RGB for colour.

What is declared is checked against what is there before anything is unfolded. Decoding goes down a ladder: uncompressed little endian
straight from the file; RLE, JPEG lossless, JPEG-LS and HTJ2K through imagecodecs where it is installed; all else, and whatever fails
there, through pydicom and its plug-ins. Every rung gives the same numbers, and ``exact`` takes only the last one.

Letters: H rows, W columns, k the frame's index, n halvings of a reduced decode.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.dicom.file import BoundedReader, DicomFile

MAX_SAMPLES = 2**26
"""Most rows * columns * samples that are decoded: twice a stitched film of both legs, three times a mammogram. A decoder of JPEG 2000
needs some ten bytes for each."""

NO_GEOMETRY = ("1.2.840.10008.1.2.4.10", "1.2.840.10008.1.2.8.1")
RLE = "1.2.840.10008.1.2.5"
DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
HTJ2K_LOSSLESS = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
HEADED = ("1.2.840.10008.1.2.4.5", "1.2.840.10008.1.2.4.7", "1.2.840.10008.1.2.4.8", "1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2.4.20")
"""Beginnings of the codings whose images say their own shape: JPEG, JPEG lossless, JPEG-LS, JPEG 2000, HTJ2K."""

REDUCED_BITS = 10
"""Fewest bits of a reduced decode: the reversible wavelet rounds at every halving, which at 8 bits moved a picture by a grey level."""


@dataclass(frozen=True)
class Layout:
    """What the header says of the pixels."""

    rows: int
    cols: int
    samples: int
    allocated: int  # bits
    stored: int  # bits
    high: int  # bit
    signed: bool
    photometric: str
    planar: int
    frames: int

    @property
    def frame_bits(self) -> int:
        """Bits of one uncompressed frame."""
        samples = 2 if self.photometric in ("YBR_FULL_422", "YBR_PARTIAL_422") else self.samples
        return self.rows * self.cols * samples * self.allocated

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored values of one sample."""
        return np.dtype(f"{'i' if self.signed else 'u'}{max(1, self.allocated // 8)}")


@dataclass(frozen=True)
class Coded:
    """What a compressed image says of itself."""

    rows: int
    cols: int
    samples: int
    precision: int  # bits
    signed: bool = False


def read_layout(file: DicomFile, kind: str) -> Layout:
    """Check what the header declares; ``kind`` names the object in messages.

    Raises:
        UnreadableImageError: no pixel data, absurd or contradictory numbers, or fewer bytes than the pixels need.
    """
    header, notes = file.header, file.notes
    if file.pixels is None:
        raise notes.refuse(f"has no pixel data ({kind}); expected an image, and the file may be cut short")
    rows, cols, frames = header.whole("Rows", 0), header.whole("Columns", 0), header.whole("NumberOfFrames", 1)
    samples, allocated = header.whole("SamplesPerPixel", 1), header.whole("BitsAllocated", 0)
    floats = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(file.pixels.keyword)
    if rows < 1 or cols < 1:
        raise notes.refuse(f"declares {rows} rows and {cols} columns, expected at least 1 of each")
    if rows * cols * samples > MAX_SAMPLES:
        raise notes.refuse(f"declares {rows} x {cols} pixels of {samples} samples, more than the {MAX_SAMPLES} that are decoded")
    if frames < 1:
        raise notes.refuse(f"declares {frames} frames, expected at least 1")
    if floats is None and (allocated not in (1, 8, 16, 32) or samples not in (1, 3) or (allocated == 1 and samples == 3)):
        raise notes.refuse(f"has {samples} samples of {allocated} bits per pixel, expected 1 of 1, or 1 or 3 of 8, 16 or 32")
    if floats is not None and (samples != 1 or allocated not in (0, floats)):
        raise notes.refuse(f"has {samples} samples of {allocated} bits per pixel in {file.pixels.keyword}, expected 1 of {floats}")
    allocated = allocated or floats or 0
    stored = header.whole("BitsStored", allocated)
    if not 1 <= stored <= allocated:
        raise notes.refuse(f"declares {stored} of {allocated} bits stored")
    layout = Layout(
        rows=rows,
        cols=cols,
        samples=samples,
        allocated=allocated,
        stored=stored,
        high=header.whole("HighBit", stored - 1),
        signed=header.whole("PixelRepresentation", 0) == 1,
        photometric=header.text("PhotometricInterpretation"),
        planar=header.whole("PlanarConfiguration", 0),
        frames=frames,
    )
    if file.pixels.length is None and not file.syntax.is_encapsulated:
        raise notes.refuse(f"its pixels are compressed, but it names {file.syntax_name}")
    if not file.syntax.is_encapsulated:
        _check_length(file, layout)
    return layout


def _check_length(file: DicomFile, layout: Layout) -> None:
    """Refuse uncompressed pixels that are fewer than declared."""
    assert file.pixels is not None
    assert file.pixels.length is not None
    there = min(file.pixels.length, max(0, file.source.size - file.pixels.offset))
    need = (layout.frame_bits * layout.frames + 7) // 8
    if there < need:
        frames = f"{layout.frames} frames of " if layout.frames > 1 else ""
        raise file.notes.refuse(f"is cut short: {frames}{layout.rows} x {layout.cols} pixels need {need} bytes, it has {there}")


def decode(file: DicomFile, layout: Layout, k: int, exact: bool = False, reduce: int = 0) -> tuple[NDArray[Any], int]:
    """Stored values of frame ``k``, unused high bits cleared and the sign extended, and the halvings that were really used.

    Args:
        file: as opened.
        layout: of its pixels.
        k: frame, from 0.
        exact: go through pydicom alone.
        reduce: decode JPEG 2000 of one sample at 1 / 2**reduce of its size (or as near as the file allows); others ignore it.
    Raises:
        UnreadableImageError: damaged, shorter or larger than declared, or a coding that no installed decoder reads.
    """
    assert file.pixels is not None
    if file.pixels.keyword != "PixelData":
        code = "f4" if file.pixels.keyword == "FloatPixelData" else "f8"
        return _plain(_native(file, layout, k), f"{'<' if file.header.little_endian else '>'}{code}", layout), 0
    if not file.syntax.is_encapsulated:
        stored = None if exact else _uncompressed(file, layout, k)
        return (_by_pydicom(file, layout, _native(file, layout, k)) if stored is None else stored), 0
    coded = _compressed(file, layout, k)
    info = parse_coded(coded)
    _check_coded(file, layout, info)
    if str(file.syntax) == DEFLATED_FRAMES:
        return _deflated(file, layout, coded), 0
    if reduce and not exact:
        for n in range(reduce, 0, -1):
            reduced = _reduced(coded, layout, info, n, str(file.syntax))
            if reduced is not None:
                return reduced, n
    stored = None if exact else _fast(coded, layout, info, str(file.syntax))
    return (_by_pydicom(file, layout, coded) if stored is None else stored), 0


def _native(file: DicomFile, layout: Layout, k: int) -> bytes:
    """The bytes of one uncompressed frame; of 1-bit pixels, those it lies in, shifted to begin at a byte."""
    assert file.pixels is not None
    first, last = k * layout.frame_bits, (k + 1) * layout.frame_bits
    file.source.seek(file.pixels.offset + first // 8)
    content = file.source.read(((last + 7) // 8 - first // 8 + 1) // 2 * 2)  # with the padding byte, which big endian words need
    if first % 8:
        bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")[first % 8 :]
        content = np.packbits(bits, bitorder="little").tobytes()
    return content


def _plain(content: bytes, dtype: str, layout: Layout) -> NDArray[Any]:
    values = np.frombuffer(content, dtype)[: layout.rows * layout.cols].reshape(layout.rows, layout.cols)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _uncompressed(file: DicomFile, layout: Layout, k: int) -> NDArray[Any] | None:
    """Grey values straight from the file; None for colour and for what pydicom had better sort out."""
    if layout.samples != 1 or (layout.allocated == 8 and not file.header.little_endian):
        return None
    content = _native(file, layout, k)
    if layout.allocated == 1:
        bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little", count=layout.rows * layout.cols)
        return bits.reshape(layout.rows, layout.cols)
    order = "<" if file.header.little_endian else ">"
    stored = _plain(content, f"{order}{layout.dtype.str[1:]}", layout)
    shift = layout.high - layout.stored + 1
    if 0 < shift <= layout.allocated - layout.stored:
        file.notes.warn(f"its values lie in bits {shift} to {layout.high}; shifted down")
        stored = stored.view(f"u{layout.allocated // 8}") >> shift
        stored = stored.view(layout.dtype)
    return _clean(stored, layout)


def _clean(stored: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Unused high bits cleared, where old overlays lie, or filled with the sign."""
    spare = layout.allocated - layout.stored
    if spare == 0:
        return stored
    top = 1 << (layout.stored - 1) if layout.signed else 1 << layout.stored
    if stored.max() < top and stored.min() >= (-top if layout.signed else 0):
        return stored
    return (stored << spare) >> spare


def _compressed(file: DicomFile, layout: Layout, k: int) -> bytes:
    """The compressed image of one frame."""
    from pydicom.encaps import get_frame

    assert file.pixels is not None
    source, start = file.source, file.pixels.offset
    if file.fragments is None:
        file.fragments = _fragments(file, source.size if file.pixels.length is None else start + file.pixels.length)
    fragments = file.fragments
    if len(fragments) < max(1, layout.frames):
        raise file.notes.refuse(f"declares {layout.frames} frames, its pixel data have {len(fragments)} fragments; damaged or cut short")
    at, length = fragments[k]
    if len(fragments) == layout.frames:  # every frame has at least one (PS3.5 A.4), so each has its own
        source.seek(at)
        return source.read(length)
    source.seek(start)
    last = fragments[-1]
    whole = BoundedReader(io.BytesIO(source.read(last[0] + last[1] - start)), last[0] + last[1] - start)
    try:
        coded = get_frame(whole, k, number_of_frames=layout.frames)
    except Exception as error:
        raise file.notes.refuse(
            f"its compressed pixels cannot be taken apart ({type(error).__name__}); the file is damaged or cut short"
        ) from None
    return bytes(coded)


def _fragments(file: DicomFile, end: int) -> list[tuple[int, int]]:
    """(offset, length) of the fragments that follow the offset table (PS3.5 A.4), all of them wholly in the file."""
    source, found = file.source, []
    assert file.pixels is not None
    source.seek(file.pixels.offset)
    while source.tell() + 8 <= end:
        head = source.read(8)
        if head[:4] == b"\xfe\xff\xdd\xe0":
            break
        length, at = int.from_bytes(head[4:], "little"), source.tell()
        if head[:4] != b"\xfe\xff\x00\xe0" or at + length > min(end, source.size):
            raise file.notes.refuse("is cut short or damaged: a fragment of its compressed pixels is not wholly there")
        found.append((at, length))
        source.seek(at + length)
    else:
        if file.pixels.length is None:
            raise file.notes.refuse("is cut short: its compressed pixels have no end mark")
    return found[1:]


def _check_coded(file: DicomFile, layout: Layout, info: Coded | None) -> None:
    """Refuse a compressed image of another shape than declared, before a decoder allocates it."""
    if info is None:
        if str(file.syntax).startswith(HEADED) and str(file.syntax) not in NO_GEOMETRY:
            raise file.notes.refuse(f"its compressed pixels do not begin like {file.syntax_name}; they are damaged or cut short")
        return
    if (info.rows, info.cols) != (layout.rows, layout.cols):
        raise file.notes.refuse(
            f"declares {layout.rows} x {layout.cols} pixels, its compressed image would unfold to {info.rows} x {info.cols}"
        )
    if info.samples > max(layout.samples, 4) or not 1 <= info.precision <= 32:
        raise file.notes.refuse(f"its compressed image claims {info.samples} samples of {info.precision} bits, expected {layout.samples}")


def parse_coded(coded: bytes) -> Coded | None:
    """What a JPEG, JPEG-LS or JPEG 2000 image says of itself; None if it is none of these.

    Source: SIZ of ITU-T T.800 A.5.1, SOF of T.81 B.2.2 and T.87 C.2.2.
    """
    start = coded.find(b"\xff\x4f\xff\x51", 0, 4096)  # JPEG 2000, bare or in a JP2 box
    if start >= 0 and len(coded) >= start + 43:
        cols, rows, left, top = (int.from_bytes(coded[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
        depth = coded[start + 42]
        samples = int.from_bytes(coded[start + 40 : start + 42], "big")
        return Coded(rows - top, cols - left, samples, (depth & 0x7F) + 1, bool(depth & 0x80))
    at = 2 if coded[:2] == b"\xff\xd8" else len(coded)
    while at + 10 <= len(coded) and coded[at] == 0xFF:
        marker = coded[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, cols = int.from_bytes(coded[at + 5 : at + 7], "big"), int.from_bytes(coded[at + 7 : at + 9], "big")
            return Coded(rows, cols, coded[at + 9], coded[at + 4])
        at += 2 + int.from_bytes(coded[at + 2 : at + 4], "big")
    return None


def _deflated(file: DicomFile, layout: Layout, coded: bytes) -> NDArray[Any]:
    """A frame deflated on its own (PS3.5 A.4.13), unfolded no further than it should."""
    need = (layout.frame_bits + 7) // 8
    content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(coded, need)
    if len(content) < need or layout.samples != 1:
        raise file.notes.refuse(f"a deflated frame has {len(content)} of {need} bytes, or more than one sample")
    if layout.allocated == 1:
        bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little", count=layout.rows * layout.cols)
        return bits.reshape(layout.rows, layout.cols)
    return _clean(_plain(content, f"<{layout.dtype.str[1:]}", layout), layout)


def _fast(coded: bytes, layout: Layout, info: Coded | None, syntax: str) -> NDArray[Any] | None:
    """Grey values through imagecodecs; None where it is missing, fails, or the image and its header say different things."""
    if layout.samples != 1 or layout.allocated not in (8, 16) or layout.high != layout.stored - 1:
        return None
    if syntax != RLE and (info is None or info.samples != 1 or info.precision < layout.stored):
        return None
    wider = info is not None and info.precision > layout.stored
    if wider and layout.signed:
        return None
    try:
        import imagecodecs
    except ImportError:
        return None
    shape = (layout.rows, layout.cols)
    try:
        if syntax == RLE:
            content = imagecodecs.dicomrle_decode(coded, dtype=layout.dtype.newbyteorder("<").str)
            if len(content) != layout.rows * layout.cols * layout.dtype.itemsize:
                return None
            return _clean(np.frombuffer(content, layout.dtype).reshape(shape), layout)
        if syntax in JPEG_LOSSLESS:
            stored = imagecodecs.jpeg8_decode(coded)
        elif syntax in JPEG_LS:
            stored = imagecodecs.jpegls_decode(coded)
        elif syntax in HTJ2K_LOSSLESS and info is not None and info.signed == layout.signed:
            stored = imagecodecs.htj2k_decode(coded)
        else:
            return None
    except Exception:  # whatever is wrong, pydicom tells
        return None
    if stored.shape != shape or stored.dtype.kind not in "ui":
        return None
    if wider and int(stored.max()) >= 2**layout.stored:
        return None
    stored = np.ascontiguousarray(stored)
    if stored.dtype.itemsize == layout.dtype.itemsize:
        return _clean(stored.view(layout.dtype), layout)
    return _clean(stored.astype(layout.dtype), layout) if stored.dtype.itemsize < layout.dtype.itemsize else None


def _reduced(coded: bytes, layout: Layout, info: Coded | None, n: int, syntax: str) -> NDArray[Any] | None:
    """An unsigned grey JPEG 2000 image from its low-pass bands after ``n`` halvings; None where that is not plain."""
    if syntax not in JPEG_2000 or info is None or info.samples != 1 or info.signed or layout.signed or layout.samples != 1:
        return None
    if info.precision != layout.stored or layout.stored < REDUCED_BITS:
        return None
    from PIL import Image

    try:
        with Image.open(io.BytesIO(coded), formats=("JPEG2000",)) as picture:
            if picture.mode not in ("L", "I;16"):
                return None
            picture.reduce = n
            picture.load()
            values = np.asarray(picture)
    except Exception:  # too few levels, or damaged: the full decode tells
        return None
    shift = values.dtype.itemsize * 8 - info.precision  # Pillow moves the samples to the top of the word
    expected = tuple(-(-side // 2**n) for side in (layout.rows, layout.cols))
    return (values >> shift).astype(layout.dtype) if values.shape == expected and shift >= 0 else None


def _by_pydicom(file: DicomFile, layout: Layout, content: bytes) -> NDArray[Any]:
    """One frame through pydicom and its plug-ins, as a dataset of its own."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    assert file.pixels is not None
    encapsulated = file.syntax.is_encapsulated
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = file.syntax
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = layout.rows, layout.cols, layout.samples
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = layout.allocated, layout.stored, layout.high
    dataset.PixelRepresentation, dataset.PhotometricInterpretation = int(layout.signed), layout.photometric
    if layout.samples > 1:
        dataset.PlanarConfiguration = layout.planar
    vr = "OB" if encapsulated else file.pixels.vr if file.pixels.vr in ("OB", "OW") else "OW"
    dataset.add_new(0x7FE00010, vr, encapsulate([content]) if encapsulated else content)
    dataset["PixelData"].is_undefined_length = encapsulated
    try:
        stored: NDArray[Any] = dataset.pixel_array
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # pylibjpeg-rle panics, which is no Exception
            raise
        raise file.notes.refuse(
            f"pixels in {file.syntax_name} could not be decoded ({type(error).__name__}); "
            "they are damaged or no installed decoder reads them"
        ) from None
    if stored.shape[:2] != (layout.rows, layout.cols):
        raise file.notes.refuse(f"declares {(layout.rows, layout.cols)} pixels, but {stored.shape[:2]} were decoded")
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    unsigned = layout.signed and layout.stored < layout.allocated and stored.ndim == 2 and stored.dtype.kind == "i" and stored.min() >= 0
    if unsigned and 2 ** (layout.stored - 1) <= int(stored.max()) < 2**layout.stored:
        return _clean(stored, layout)  # a codestream that knows of no sign left it in its place
    return stored
