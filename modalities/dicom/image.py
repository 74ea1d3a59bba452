"""A radiograph in DICOM to the picture a person would be shown: float32 in 0..1, bright = dense.

The chain is PS3.4 N.2: stored values -> modality LUT or rescale -> VOI (LUT, else window, else the image's own range) -> inversion of
MONOCHROME1 -> 0..1. Overlays are not drawn. What was guessed or dropped on the way stands in ``warnings``. Nothing from a header that
could identify a patient leaves this module: messages name the given path, the SOP class, shapes and formats only.

Letters: H rows, W columns; v a value after the modality LUT; c and w centre and width of a window.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.types import UnreadableImageError

MAX_PIXELS = 2**28
"""Largest rows * columns that is decoded: over ten times the largest radiograph detectors (4300 x 4300)."""

MAX_FILE_BYTES = 2**31
"""Largest file that is opened: MAX_PIXELS at 16 bits four times over."""

RANGE_PERCENTILES = (0.1, 99.9)
"""What an image without a window is shown between: the tails hold hot pixels and burnt-in letters."""

UID = re.compile(r"[0-9]+(\.[0-9]+)+")
"""What a UID looks like (PS3.5 9.1); longer ones and leading zeros occur and still tell studies apart."""

PROJECTION_SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.1",  # computed radiography; digital X-ray, mammography and intra-oral lie under it
    "1.2.840.10008.5.1.4.1.1.12",  # X-ray angiography, radiofluoroscopy
    "1.2.840.10008.5.1.4.1.1.7",  # secondary capture
)
NOT_IMAGE_SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.66",  # segmentation, registration, fiducials
    "1.2.840.10008.5.1.4.1.1.30",  # parametric map
    "1.2.840.10008.5.1.4.1.1.481",  # radiotherapy dose, structures, plans
    "1.2.840.10008.5.1.4.1.1.11",  # presentation states
    "1.2.840.10008.5.1.4.1.1.88",  # structured reports
    "1.2.840.10008.5.1.4.1.1.104",  # encapsulated PDF, CDA, STL
)
LATERAL_VIEWS = frozenset({"LATERAL", "LAT", "LL", "RL", "LLAT", "RLAT", "LLD", "RLD", "L", "R"})


@dataclass(frozen=True)
class NativeRadiograph:
    """One radiograph in its own pixels, as shown."""

    pixels: NDArray[np.float32]  # (H, W) in 0..1, bright = dense
    spacing_mm: tuple[float, float] | None = None  # between rows, between columns; at the detector where the file has no other
    view: str | None = None  # PA, AP, lateral
    patient_orientation: tuple[str, str] | None = None  # where a row and a column run to, such as ("L", "F")
    photometric: str | None = None  # PhotometricInterpretation of the file
    transfer_syntax: str | None = None  # name
    warnings: tuple[str, ...] = ()


@dataclass
class _Notes:
    """Where the file lies and what is to be told about it."""

    path: Path
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def refuse(self, message: str) -> UnreadableImageError:
        return UnreadableImageError(f"{self.path}: {message}")


def read_radiograph(path: Path) -> NativeRadiograph:
    """Read one DICOM file that holds one image.

    Raises:
        UnreadableImageError: no DICOM, no image or several frames in it, truncated, absurdly large, or a coding that no installed
            decoder reads.
    """
    notes = _Notes(Path(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote header values
        try:
            dataset = _open(notes)
            _check(dataset, notes)
            return _chain(dataset, notes)
        except UnreadableImageError:
            raise
        except Exception as error:  # hostile headers raise anything; their texts may quote header values, so only the type is named
            raise notes.refuse(f"not a readable DICOM image: {type(error).__name__} while reading its header or pixels") from None


def study_key(path: Path) -> str | None:
    """A hash of StudyInstanceUID, from the header alone; None where the file has none that can be read. Never raises.

    What is not numbers and dots is none: the placeholder that a de-identification leaves would join the studies of many patients.
    """
    from pydicom import dcmread

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote header values
        try:
            if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
                return None
            force = not has_dicom_magic(path)
            dataset = dcmread(path, stop_before_pixels=True, specific_tags=["StudyInstanceUID"], force=force)
            uid = str(dataset.get("StudyInstanceUID") or "").strip(" \0")
        except Exception:  # hostile headers raise anything; reading the image is what tells of them
            return None
    return hashlib.blake2b(uid.encode(), digest_size=16).hexdigest() if UID.fullmatch(uid) else None


def has_dicom_magic(path: Path) -> bool:
    """True where the file has DICOM's 128-byte preamble and the letters DICM."""
    with Path(path).open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _open(notes: _Notes) -> Any:
    """The dataset of a file, with or without file meta information."""
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    try:
        size = notes.path.stat().st_size
        if not notes.path.is_file():
            raise notes.refuse("expected a file, this is a folder or device")
        magic = has_dicom_magic(notes.path)
    except OSError as error:
        raise notes.refuse(f"cannot be opened: {error.strerror}") from None
    if size > MAX_FILE_BYTES:
        raise notes.refuse(f"{size} bytes; a radiograph has fewer than {MAX_FILE_BYTES}")
    dataset = dcmread(notes.path, force=not magic)
    if "Rows" not in dataset and "PixelData" not in dataset and not magic:
        raise notes.refuse("expected a DICOM file, but it has neither the DICM mark nor image attributes")
    if not magic:
        notes.warn("no DICOM preamble; read as a bare dataset")
    meta = getattr(dataset, "file_meta", None)
    if meta is not None and "TransferSyntaxUID" in meta:
        return dataset
    implicit, little = dataset.original_encoding
    notes.warn("no transfer syntax in the file; taken from how its elements are written")
    plain = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        raise notes.refuse("compressed pixels without a transfer syntax; expected file meta information that names it")
    if meta is None:
        from pydicom.dataset import FileMetaDataset

        dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = plain
    return dataset


def _check(dataset: Any, notes: _Notes) -> None:
    """Refuse what is no single image before anything is decoded; warn of what is no radiograph."""
    sop = dataset.get("SOPClassUID")
    kind = _uid_name(sop)
    if sop is not None and _under(sop, NOT_IMAGE_SOP_CLASSES):
        raise notes.refuse(f"holds {kind}, expected a radiograph")
    if "PixelData" not in dataset:
        raise notes.refuse(f"has no pixel data ({kind}); expected an image, and the file may be cut short")
    rows, cols = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if rows < 1 or cols < 1:
        raise notes.refuse(f"declares {rows} rows and {cols} columns, expected at least 1 of each")
    if rows * cols > MAX_PIXELS:
        raise notes.refuse(f"declares {rows} x {cols} pixels, more than the {MAX_PIXELS} that are decoded")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise notes.refuse(f"holds {frames} frames, a radiograph is one image; export the frame that is meant")
    samples, bits = int(dataset.get("SamplesPerPixel") or 1), int(dataset.get("BitsAllocated") or 0)
    if bits not in (8, 16, 32) or samples not in (1, 3):
        raise notes.refuse(f"has {samples} samples of {bits} bits per pixel, expected 1 or 3 of 8, 16 or 32")
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        subsampled = dataset.get("PhotometricInterpretation") == "YBR_FULL_422"
        need = rows * cols * (2 if subsampled else samples) * bits // 8
        if len(dataset.PixelData) < need:
            raise notes.refuse(f"is cut short: {rows} x {cols} pixels need {need} bytes, it has {len(dataset.PixelData)}")
    else:
        coded = _coded_shape(dataset.PixelData)
        if coded is not None and coded[0] * coded[1] > rows * cols:
            raise notes.refuse(f"declares {rows} x {cols} pixels, its compressed image would unfold to {coded[0]} x {coded[1]}")
    if sop is not None and not _under(sop, PROJECTION_SOP_CLASSES):
        notes.warn(f"{kind} is no projection radiograph")
    if str(dataset.get("PresentationIntentType", "")).upper() == "FOR PROCESSING":
        notes.warn("raw image FOR PROCESSING: its contrast was not made for display")


def _coded_shape(encapsulated: bytes) -> tuple[int, int] | None:
    """(rows, cols) that a JPEG, JPEG-LS or JPEG 2000 image says of itself, read before a decoder allocates them; None if it does not.

    Source: SIZ of ITU-T T.800 A.5.1, SOF of T.81 B.2.2 and T.87 C.2.2.
    """
    from pydicom.encaps import generate_frames

    coded = next(generate_frames(encapsulated, number_of_frames=1), b"")
    start = coded.find(b"\xff\x4f\xff\x51", 0, 4096)  # JPEG 2000, bare or in a JP2 box
    if start >= 0 and len(coded) >= start + 24:
        cols, rows, left, top = (int.from_bytes(coded[start + at : start + at + 4], "big") for at in (8, 12, 16, 20))
        return rows - top, cols - left
    at = 2 if coded[:2] == b"\xff\xd8" else len(coded)
    while at + 9 <= len(coded) and coded[at] == 0xFF:
        marker = coded[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(coded[at + 5 : at + 7], "big"), int.from_bytes(coded[at + 7 : at + 9], "big")
        at += 2 + int.from_bytes(coded[at + 2 : at + 4], "big")
    return None


def _chain(dataset: Any, notes: _Notes) -> NativeRadiograph:
    """Decoded pixels through the LUTs, with what the header says of geometry."""
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    stored = _decode(dataset, notes)
    if stored.ndim == 3 or photometric == "PALETTE COLOR":
        pixels = _grey(dataset, stored, photometric, notes)
    elif photometric in ("MONOCHROME1", "MONOCHROME2"):
        pixels = _shown(dataset, stored, notes)
    else:
        raise notes.refuse(f"photometric interpretation {photometric or 'missing'}, expected MONOCHROME1, MONOCHROME2, RGB, YBR or PALETTE")
    spacing = _spacing(dataset)
    if spacing is not None and abs(spacing[0] / spacing[1] - 1) > 0.01:
        notes.warn(f"pixels are not square: {spacing[0]:.3f} mm between rows, {spacing[1]:.3f} mm between columns")
    orientation = _orientation(dataset)
    view = _view(dataset)
    if view in ("PA", "AP") and orientation is not None and orientation[0].startswith("R"):
        notes.warn("PatientOrientation says that the patient's right is at the right of the image: mirrored, or seen from behind")
    return NativeRadiograph(
        pixels=pixels,
        spacing_mm=spacing,
        view=view,
        patient_orientation=orientation,
        photometric=photometric,
        transfer_syntax=_uid_name(dataset.file_meta.TransferSyntaxUID),
        warnings=tuple(notes.warnings),
    )


def _decode(dataset: Any, notes: _Notes) -> NDArray[Any]:
    """(H, W) or (H, W, 3) stored values; pydicom clears the unused high bits, where old overlays lie, and extends the sign."""
    try:
        stored = dataset.pixel_array
    except Exception as error:
        syntax = _uid_name(dataset.file_meta.TransferSyntaxUID)
        raise notes.refuse(
            f"pixels in {syntax} could not be decoded ({type(error).__name__}); they are damaged or no installed decoder reads them"
        ) from None
    expected = (int(dataset.Rows), int(dataset.Columns))
    if stored.shape[:2] != expected:
        raise notes.refuse(f"declares {expected} pixels, but {stored.shape[:2]} were decoded")
    return stored


def _shown(dataset: Any, stored: NDArray[Any], notes: _Notes) -> NDArray[np.float32]:
    """Grey stored values (H, W) to 0..1 as shown."""
    padding = _padding(dataset, stored)
    values = _modality(dataset, stored, notes)
    pixels = _voi_lut(dataset, values, notes)
    if pixels is None:
        pixels = _window(dataset, values, notes)
    if pixels is not None and _is_flat(pixels) and not _is_flat(values):
        notes.warn("its window or VOI LUT shows nothing of the image; its own range was used instead")
        pixels = None
    if pixels is None:
        pixels = _own_range(dataset, values, padding)
    photometric, shape = dataset.PhotometricInterpretation, str(dataset.get("PresentationLUTShape", "")).upper()
    if shape and (shape == "INVERSE") != (photometric == "MONOCHROME1"):
        notes.warn(f"{photometric} with PresentationLUTShape {shape} contradict each other; the photometric interpretation was followed")
    if photometric == "MONOCHROME1":
        np.subtract(1, pixels, out=pixels)
    if padding is not None:
        pixels[padding] = 0
    return pixels


def _modality(dataset: Any, stored: NDArray[Any], notes: _Notes) -> NDArray[Any]:
    """Modality LUT or rescale (PS3.3 C.11.1): integers from a LUT, float32 from a rescale, else as stored."""
    if dataset.get("ModalityLUTSequence"):
        return _look_up(dataset, dataset.ModalityLUTSequence[0], stored)[0]
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if slope is None or intercept is None or (slope, intercept) == (1, 0):
        return stored
    if slope == 0:
        notes.warn("RescaleSlope is 0; not applied")
        return stored
    wide = stored.astype(np.float64 if stored.dtype.itemsize > 2 else np.float32)
    return wide * wide.dtype.type(slope) + wide.dtype.type(intercept)


def _voi_lut(dataset: Any, values: NDArray[Any], notes: _Notes) -> NDArray[np.float32] | None:
    """The first VOI LUT (PS3.3 C.11.2), its output range to 0..1; None if the file has none."""
    if not dataset.get("VOILUTSequence"):
        return None
    if not np.issubdtype(values.dtype, np.integer):
        values = np.rint(values)
    out, bits = _look_up(dataset, dataset.VOILUTSequence[0], values)
    top = 2**bits - 1
    if int(out.max()) > top:
        notes.warn(f"the VOI LUT declares {bits} bits but holds larger entries")
        top = int(out.max())
    return out.astype(np.float32) / np.float32(top)


def _look_up(dataset: Any, item: Any, values: NDArray[Any]) -> tuple[NDArray[np.uint16], int]:
    """Values through a LUT item; values before its first take the first entry, those past its last the last. And its bits."""
    count, first, bits = (int(v) for v in item.LUTDescriptor)
    count = count or 2**16
    if first >= 2**15 and values.min() < 0:
        first -= 2**16  # written as unsigned, meant as signed: PS3.3 C.11.1.1
    data = item.LUTData
    if isinstance(data, bytes | bytearray):
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        entries = np.frombuffer(data, dtype=np.uint8 if len(data) < 2 * count else f"{order}u2")
    else:
        entries = np.atleast_1d(np.asarray(data)).astype(np.uint16)
        if len(entries) * 2 == count + count % 2 and bits <= 8:
            entries = entries.view(np.uint8)  # two 8-bit entries packed in a word
    if len(entries) < count:
        raise ValueError("LUT shorter than its descriptor says")
    index = np.clip(values.astype(np.int64, copy=False) - first, 0, count - 1)
    return entries[:count].astype(np.uint16)[index], bits


def _window(dataset: Any, values: NDArray[Any], notes: _Notes) -> NDArray[np.float32] | None:
    """The first window (PS3.3 C.11.2.1.2 and C.11.2.1.3) to 0..1; None if there is none that can be used."""
    c, w = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if c is None or w is None:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        notes.warn("unknown VOI LUT function; the window was taken as LINEAR")
        function = "LINEAR"
    if w <= 0 or (function == "LINEAR" and w < 1):
        notes.warn("a window of no width; not applied")
        return None
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values.astype(np.float32) - np.float32(c)) / np.float32(w), -80, 80)
        return np.asarray(1 / (1 + np.exp(exponent)), dtype=np.float32)
    if function == "LINEAR":
        c, w = c - 0.5, w - 1
    if w == 0:
        return (values > c).astype(np.float32)
    low = c - w / 2
    return _scaled(values, low, low + w)


def _own_range(dataset: Any, values: NDArray[Any], padding: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """An image without a window between percentiles of its own values; one of 8 stored bits is a picture already: 0 to 255."""
    plain_byte = values.dtype == np.uint8 and dataset.get("BitsStored", 8) == 8 and not dataset.get("ModalityLUTSequence")
    if plain_byte:
        return _scaled(values, 0, 255)
    seen = values if padding is None else values[~padding]
    if seen.size == 0:
        seen = values
    return _scaled(values, *robust_range(seen))


def robust_range(values: NDArray[Any]) -> tuple[float, float]:
    """Low and high end that an image without a window is shown between: percentiles, or the extremes where those coincide."""
    flat = values.ravel()
    low, high = np.percentile(flat[:: max(1, flat.size // 2**18)], RANGE_PERCENTILES)
    if low == high:
        low, high = flat.min(), flat.max()
    return float(low), float(high)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """(values - low) / (high - low) held to 0..1, in float32; all 0 where high equals low."""
    wide = values.astype(np.float64 if values.dtype.itemsize > 2 and values.dtype != np.float32 else np.float32)
    if high > low:
        wide -= low
        wide *= 1 / (high - low)
    else:
        wide[...] = 0
    return np.clip(wide, 0, 1, out=wide).astype(np.float32, copy=False)


def _padding(dataset: Any, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """(H, W) bool, True on padding that reaches the border (PS3.3 C.7.5.1.1.2); None if the image has none.

    The same value inside the body is anatomy: detectors saturate at it.
    """
    value = _number(dataset, "PixelPaddingValue")
    if value is None:
        return None
    if stored.dtype.kind == "u" and value < 0:
        value += 2 ** (stored.dtype.itemsize * 8)  # written as signed, stored as unsigned
    limit = _number(dataset, "PixelPaddingRangeLimit")
    low, high = sorted((value, value if limit is None else limit))
    mask = np.asarray((stored >= low) & (stored <= high), dtype=np.bool_)
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    if not border.any():
        return None
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    touching = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, touching[touching > 0])


def _grey(dataset: Any, stored: NDArray[Any], photometric: str, notes: _Notes) -> NDArray[np.float32]:
    """Colour to luminance in 0..1."""
    if photometric == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        colour = apply_color_lut(stored, dataset)
        top = float(2 ** (colour.dtype.itemsize * 8) - 1)
    else:
        colour = stored  # pixel_array has turned YBR to RGB
        top = float(2 ** int(dataset.get("BitsStored") or stored.dtype.itemsize * 8) - 1)
    notes.warn(f"colour image ({photometric}) turned to grey; a secondary capture or a photograph may differ from the original")
    return luminance(colour[..., :3].astype(np.float32) / np.float32(top))


def luminance(colour: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W, 3) RGB in 0..1 to (H, W) grey, with the weights of ITU-R BT.601 that Pillow uses too."""
    return np.clip(colour @ np.array([0.299, 0.587, 0.114], dtype=np.float32), 0, 1)


def _number(dataset: Any, keyword: str) -> float | None:
    """The first value of an element as a finite number, or None."""
    value = dataset.get(keyword)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if hasattr(value, "__len__") and not isinstance(value, str | bytes):
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _spacing(dataset: Any) -> tuple[float, float] | None:
    """(between rows, between columns) in mm: calibrated, else at the detector, else as scanned."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value = dataset.get(keyword)
        if value is None or not hasattr(value, "__len__") or len(value) != 2:
            continue
        rows, cols = float(value[0]), float(value[1])
        if math.isfinite(rows) and math.isfinite(cols) and rows > 0 and cols > 0:
            return rows, cols
    return None


def _view(dataset: Any) -> str | None:
    position = str(dataset.get("ViewPosition") or "").strip().upper()
    if position in ("PA", "AP"):
        return position
    return "lateral" if position in LATERAL_VIEWS else None


def _orientation(dataset: Any) -> tuple[str, str] | None:
    """PatientOrientation where it holds two directions made of the letters DICOM allows."""
    value = dataset.get("PatientOrientation")
    if value is None or isinstance(value, str) or len(value) != 2:
        return None
    row, col = str(value[0]), str(value[1])
    return (row, col) if row and col and set(row + col) <= set("LRAPHF") else None


def _is_flat(values: NDArray[Any]) -> bool:
    return bool(values.min() == values.max())


def _under(uid: Any, roots: tuple[str, ...]) -> bool:
    return any(str(uid) == root or str(uid).startswith(root + ".") for root in roots)


def _uid_name(uid: Any) -> str:
    """A UID's registered name; private ones are not quoted, since they can identify."""
    from pydicom.uid import UID

    if not uid:
        return "no SOP class or coding named"
    name = UID(str(uid)).name
    return name if not name[:1].isdigit() else "an unregistered class or coding"
