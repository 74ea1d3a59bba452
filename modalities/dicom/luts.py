"""Modality, VOI and palette tables as arithmetic on arrays: each a function of one value, so that it may be taken through a table.

Letters: v a value after the modality LUT, c and w centre and width of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modalities.dicom.file import Header, Notes

RANGE_PERCENTILES = (0.1, 99.9)
"""What an image without a window is shown between: the tails hold hot pixels and burnt-in letters."""

BLOCK = 2**18
"""Pixels worked on at once: their float64 copy stays in the processor's cache."""

WINDOW_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
UNITS = ("HU", "HU_MOD", "OD", "US", "MGML", "PCT", "Z_EFF", "ED", "EDW")
"""Defined terms of PS3.3 C.11.1.1.2; other text may be anything and is not passed on."""

PET_UNITS = ("BQML", "CNTS", "GML", "CPS", "NONE", "CM2", "PCNT")

Pointwise = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Window:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3."""

    center: float
    width: float
    function: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"] = "LINEAR"
    explanation: str | None = None  # header text

    @property
    def usable(self) -> bool:
        """False for a width that the standard forbids."""
        return self.width >= 1 or (self.width > 0 and self.function != "LINEAR")

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """0..1. LINEAR: (v - (c - 0.5)) / (w - 1) + 0.5; LINEAR_EXACT: (v - c) / w + 0.5; SIGMOID: 1 / (1 + exp(-4 (v - c) / w))."""
        c, w = self.center, self.width
        if self.function == "SIGMOID":
            exponent = np.clip(-4 * (values.astype(np.float64) - c) / w, -80, 80)
            return np.asarray(1 / (1 + np.exp(exponent)), dtype=np.float32)
        if self.function == "LINEAR":
            c, w = c - 0.5, w - 1
        if w == 0:
            return (values > c).astype(np.float32)
        low = c - w / 2
        return scaled(values, low, low + w)


@dataclass(frozen=True)
class VoiLut:
    """PS3.3 C.11.2.1.1: values before the first entry take the first, those past the last take the last; its bits to 0..1."""

    entries: NDArray[np.uint16]
    first: int
    bits: int
    explanation: str | None = None  # header text

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Values of no integer type go to the nearest entry."""
        if not np.issubdtype(values.dtype, np.integer):
            values = np.rint(values)
        top = max(2**self.bits - 1, int(self.entries.max()))
        return look_up(values, self.entries, self.first).astype(np.float32) / np.float32(top)


@dataclass(frozen=True)
class Range:
    """An image's own range to 0..1, where nothing says how to show it."""

    low: float
    high: float

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Held to 0..1."""
        return scaled(values, self.low, self.high)


Voi = Window | VoiLut | Range


def pointwise(values: NDArray[Any], function: Pointwise, tables: bool = True) -> NDArray[Any]:
    """``function`` of each of (H, W) values: through a table where the values have at most 16 bits, else block by block; never in place.

    ``function`` must map an array elementwise; a table then gives exactly what it gives itself.
    """
    kind = values.dtype.kind
    bits = values.dtype.itemsize * 8
    if tables and kind in "ui" and bits <= 16 and values.size > 2**bits // 4:
        index = np.ascontiguousarray(values).view(f"u{bits // 8}")
        count = int(index.max()) + 1
        table = function(np.arange(count, dtype=index.dtype).view(values.dtype))
        out = np.empty(values.shape, table.dtype)
        for rows in _blocks(values.shape):
            np.take(table, index[rows], out=out[rows], mode="clip")
        return out
    first = None
    for rows in _blocks(values.shape):
        block = function(values[rows])
        first = np.empty((*values.shape[:2], *block.shape[2:]), block.dtype) if first is None else first
        first[rows] = block
    assert first is not None
    return first


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    step = max(1, BLOCK // shape[1])
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def modality_function(header: Header, notes: Notes, wide: bool, signed: bool) -> tuple[Pointwise | None, str | None]:
    """Modality LUT or rescale (PS3.3 C.11.1) as a function of stored values, and the unit it leads to; None: as stored.

    A LUT gives uint16, a rescale float32 rounded from float64, or float64 where the stored values are ``wide`` (over 16 bits).
    """
    table = modality_lut(header, signed)
    if table is not None:
        return table, _unit(str(header.items("ModalityLUTSequence")[0].get("ModalityLUTType") or ""), UNITS)
    slope, intercept = header.number("RescaleSlope"), header.number("RescaleIntercept")
    if slope is None or intercept is None:
        return None, None
    unit = _unit(header.text("RescaleType"), UNITS)
    modality = header.text("Modality")
    if unit is None and modality == "CT":
        unit = "HU"
    if unit is None and modality == "PT":
        unit = _unit(header.text("Units"), PET_UNITS)
    if slope == 0:
        notes.warn("RescaleSlope is 0; not applied")
        return None, None
    if (slope, intercept) == (1, 0):
        return None, unit
    dtype = np.float64 if wide else np.float32
    return lambda stored: (stored.astype(np.float64) * slope + intercept).astype(dtype), unit


def modality_lut(header: Header, signed: bool) -> Pointwise | None:
    """The modality LUT as a function of stored values to uint16; None where there is none."""
    items = header.items("ModalityLUTSequence")
    if not items:
        return None
    entries, first, _ = read_lut(items[0], header.little_endian, signed)
    return lambda stored: look_up(stored, entries, first)


def _unit(text: str, known: tuple[str, ...]) -> str | None:
    text = text.strip().upper()
    return text if text in known else None


def read_vois(header: Header, notes: Notes, signed: bool) -> tuple[Voi, ...]:
    """VOI LUTs, then windows, in the header's order; ``signed`` where the values they take may be negative."""
    vois: list[Voi] = []
    for item in header.items("VOILUTSequence"):
        entries, first, bits = read_lut(item, header.little_endian, signed)
        if int(entries.max()) > 2**bits - 1:
            notes.warn(f"the VOI LUT declares {bits} bits but holds larger entries")
        vois.append(VoiLut(entries, first, bits, _explanation(item.get("LUTExplanation"), 0)))
    centers, widths = header.numbers("WindowCenter"), header.numbers("WindowWidth")
    function = header.text("VOILUTFunction") or "LINEAR"
    if centers and widths and function not in WINDOW_FUNCTIONS:
        notes.warn("unknown VOI LUT function; the window was taken as LINEAR")
        function = "LINEAR"
    for i, (center, width) in enumerate(zip(centers, widths, strict=False)):
        if np.isfinite(center) and np.isfinite(width):
            explanation = _explanation(header.get("WindowCenterWidthExplanation"), i)
            vois.append(Window(center, width, function, explanation))  # type: ignore[arg-type]
    return tuple(vois)


def _explanation(value: Any, i: int) -> str | None:
    many = [value] if isinstance(value, str) else list(value or ())
    return str(many[i]).strip() or None if i < len(many) else None


def read_lut(item: Any, little_endian: bool, signed: bool) -> tuple[NDArray[np.uint16], int, int]:
    """Entries, first value mapped and bits of a LUT item.

    Raises:
        ValueError: fewer entries than its descriptor says, or more bits than a table may have.
    """
    return lut_entries(item.LUTDescriptor, item.LUTData, little_endian, signed)


def lut_entries(descriptor: Any, data: Any, little_endian: bool, signed: bool) -> tuple[NDArray[np.uint16], int, int]:
    """As :func:`read_lut`, of a descriptor and its data."""
    count, first, bits = (int(v) for v in descriptor)
    count = count % 2**16 or 2**16
    if not 1 <= bits <= 16:
        raise ValueError("LUT of impossible bits")
    if first >= 2**15 and signed:
        first -= 2**16  # written as unsigned, meant as signed: PS3.3 C.11.1.1
    if isinstance(data, bytes | bytearray):
        entries = np.frombuffer(data[: len(data) // 2 * 2], np.dtype(np.uint16).newbyteorder("<" if little_endian else ">"))
        if len(data) < 2 * count:
            entries = np.frombuffer(data, dtype=np.uint8)
    else:
        entries = np.atleast_1d(np.asarray(data)).astype(np.uint16)
        if len(entries) * 2 == count + count % 2 and bits <= 8:
            entries = entries.view(np.uint8)  # two 8-bit entries packed in a word
    if len(entries) < count:
        raise ValueError("LUT shorter than its descriptor says")
    return entries[:count].astype(np.uint16), first, bits


def look_up(values: NDArray[Any], entries: NDArray[np.uint16], first: int) -> NDArray[np.uint16]:
    """Values through a table that begins at ``first``."""
    index = np.clip(values.astype(np.float64 if values.dtype.kind == "f" else np.int64, copy=False) - first, 0, len(entries) - 1)
    return entries[index.astype(np.int64, copy=False)]


def palette(header: Header, signed: bool) -> tuple[Pointwise, int]:
    """PALETTE COLOR (PS3.3 C.7.6.3.1.5 and C.7.9) as a function of stored values to grey from 0 to a top, and that top, 255 or 65535.

    Raises:
        ValueError: no palette, a short one, or segments that unfold to more than 2**16 entries.
    """
    channels: list[NDArray[np.float32]] = []
    first, top = 0, 255
    for colour in ("Red", "Green", "Blue"):
        descriptor = header.get(f"{colour}PaletteColorLookupTableDescriptor")
        data = header.get(f"{colour}PaletteColorLookupTableData")
        segmented = header.get(f"Segmented{colour}PaletteColorLookupTableData")
        if descriptor is None or (data is None and segmented is None):
            raise ValueError("no palette")
        count, first, bits = (int(v) for v in descriptor)
        count = count % 2**16 or 2**16
        if data is None:
            words = np.frombuffer(segmented[: len(segmented) // 2 * 2], np.uint16 if header.little_endian else ">u2")
            raw = np.frombuffer(segmented, np.uint8) if bits <= 8 else words
            entries, wide = unfold_segments(raw.tolist(), bits <= 8, header.little_endian), bits > 8
        else:
            wide = len(data) >= 2 * count
            entries = np.frombuffer(data[: len(data) // 2 * 2], np.uint16 if header.little_endian else ">u2") if wide else data
            entries = np.frombuffer(data, np.uint8) if not wide else entries
        if len(entries) < count:
            raise ValueError("palette shorter than its descriptor says")
        top = 65535 if wide else 255
        channels.append(entries[:count].astype(np.float32))
    if first >= 2**15 and signed:
        first -= 2**16
    if len({len(c) for c in channels}) != 1:
        raise ValueError("palettes of different lengths")
    grey = luminance(np.stack(channels, axis=-1) / np.float32(top)) * np.float32(top)

    def function(stored: NDArray[Any]) -> NDArray[np.float32]:
        return grey[np.clip(stored.astype(np.int64) - first, 0, len(grey) - 1)]

    return function, top


def unfold_segments(data: list[int], narrow: bool, little_endian: bool) -> NDArray[np.uint16]:
    """Entries of a segmented palette (PS3.3 C.7.9.2): discrete, linear and indirect segments, never more than 2**16 entries.

    Args:
        data: bytes where ``narrow``, else words.
        narrow: 8-bit entries.
        little_endian: how the bytes of an 8-bit palette's indirect offset are ordered.
    Raises:
        ValueError: unknown or truncated segments, indirect ones inside indirect ones, or too many entries.
    """
    out: list[int] = []

    def unfold(at: int, segments: int | None, nested: bool) -> None:
        done = 0
        while at + 1 < len(data) and (segments is None or done < segments):
            kind, length = data[at], data[at + 1]
            at += 2
            if kind == 0:
                out.extend(data[at : at + length])
                at += length
            elif kind == 1:
                if not out or at >= len(data) or length == 0:
                    raise ValueError("broken linear segment")
                out.extend(int(v) for v in np.rint(np.linspace(out[-1], data[at], length + 1)[1:]))
                at += 1
            elif kind == 2 and not nested and out:
                words = 4 if narrow else 2
                parts = data[at : at + words]
                if len(parts) < words:
                    raise ValueError("broken indirect segment")
                if narrow:  # two words, the low one first; bytes inside a word as the file has them
                    low, high = (parts[i] | parts[i + 1] << 8 if little_endian else parts[i] << 8 | parts[i + 1] for i in (0, 2))
                else:
                    low, high = parts
                offset = high << 16 | low
                unfold(offset if narrow else offset // 2, length, True)
                at += words
            else:
                raise ValueError("unknown segment")
            if len(out) > 2**16:
                raise ValueError("palette of too many entries")
            done += 1

    unfold(0, None, False)
    return np.array(out, dtype=np.uint16)


def luminance(colour: NDArray[np.float32]) -> NDArray[np.float32]:
    """(..., 3) RGB in 0..1 to grey, with the weights of ITU-R BT.601 that Pillow uses too."""
    return np.clip(colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32), 0, 1)


def robust_range(values: NDArray[Any]) -> tuple[float, float]:
    """Low and high end that an image without a window is shown between: percentiles, or the extremes where those coincide."""
    flat = values.ravel()
    low, high = np.percentile(flat[:: max(1, flat.size // 2**18)], RANGE_PERCENTILES)
    if low == high:
        low, high = flat.min(), flat.max()
    return float(low), float(high)


def scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """(values - low) / (high - low) held to 0..1, in float32; all 0 where high is not above low."""
    wide = values.astype(np.float64)
    if high > low:
        wide -= low
        wide *= 1 / (high - low)
    else:
        wide[...] = 0
    return np.clip(wide, 0, 1, out=wide).astype(np.float32)
