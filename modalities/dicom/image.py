"""The chain for one frame: file -> stored values -> values with a unit -> picture, with what the header says of geometry.

``read_dicom`` stops at the values and ``show`` makes the picture of them. ``read_radiograph`` goes from stored values to the picture in
one table look-up, and ``fit_radiograph`` resizes it; both give what the stages give one after the other.

Letters: H rows, W columns; h and w rows and columns after fitting; n halvings of a reduced decode.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.dicom.file import DicomFile, Header, Notes, opened, uid_name
from modalities.dicom.luts import (
    Pointwise,
    Range,
    Voi,
    VoiLut,
    Window,
    luminance,
    modality_function,
    palette,
    pointwise,
    read_vois,
    robust_range,
)
from modalities.dicom.pixels import Layout, decode, read_layout

PROJECTION_SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.1",  # computed radiography; digital X-ray, mammography and intra-oral lie under it
    "1.2.840.10008.5.1.4.1.1.12",  # X-ray angiography, radiofluoroscopy
    "1.2.840.10008.5.1.4.1.1.7",  # secondary capture
)
SECTION_SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2",  # CT
    "1.2.840.10008.5.1.4.1.1.3",  # ultrasound, several frames
    "1.2.840.10008.5.1.4.1.1.4",  # MR
    "1.2.840.10008.5.1.4.1.1.6",  # ultrasound
    "1.2.840.10008.5.1.4.1.1.13.1",  # volumes reconstructed from X-ray
    "1.2.840.10008.5.1.4.1.1.20",  # nuclear medicine
    "1.2.840.10008.5.1.4.1.1.128",  # PET
    "1.2.840.10008.5.1.4.1.1.130",  # PET, enhanced
)
PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
NOT_IMAGE_SOP_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.66",  # segmentation, registration, fiducials
    "1.2.840.10008.5.1.4.1.1.481",  # radiotherapy dose, structures, plans
    "1.2.840.10008.5.1.4.1.1.11",  # presentation states
    "1.2.840.10008.5.1.4.1.1.88",  # structured reports
    "1.2.840.10008.5.1.4.1.1.104",  # encapsulated PDF, CDA, STL
)
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_RCT", "YBR_ICT")
LATERAL_VIEWS = frozenset({"LATERAL", "LAT", "LL", "RL", "LLAT", "RLAT", "LLD", "RLD", "L", "R"})
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
MODALITIES = frozenset(
    [
        *("BI", "BMD", "CR", "CT", "DG", "DX", "ECG", "EPS", "ES", "GM", "HC", "IO", "IVOCT", "IVUS", "KER", "LEN", "LS", "MG", "MR", "NM"),
        *("OAM", "OCT", "OP", "OPM", "OPT", "OT", "PT", "PX", "RF", "RG", "RTIMAGE", "SEG", "SM", "SMR", "SRF", "TG", "US", "XA", "XC"),
    ]
)
"""Defined terms of PS3.3 C.7.3.1.1.1 that images have; other text may be anything and is not passed on."""

REDUCED_MARGIN = 1.2
"""A reduced decode keeps at least this many pixels for each of the fitted picture's."""


@dataclass(frozen=True)
class DicomImage:
    """One frame before windowing, and what its header says that no patient can be told by (explanations of windows aside)."""

    values: NDArray[Any]  # (H, W) after modality LUT or rescale: integers as stored or from a LUT, else float32 (float64 of 32 bits)
    unit: str | None  # of the values: HU, US (unspecified), OD, ...; None where the file names none
    modality: str | None  # CR, DX, CT, ...
    sop_class: str  # name
    photometric: str
    transfer_syntax: str  # name
    frames: int  # in the file
    frame: int  # which one this is, from 0
    spacing_mm: tuple[float, float] | None  # between rows, between columns
    spacing_source: (
        str | None
    )  # the element it comes from; PixelSpacing, ImagerPixelSpacing (at the detector) or NominalScannedPixelSpacing
    magnification: float | None  # detector over patient plane, as the header says or its two spacings tell
    view: str | None  # PA, AP, lateral
    patient_orientation: tuple[str, str] | None  # where a row and a column run to, such as ("L", "F")
    position_mm: tuple[float, float, float] | None  # ImagePositionPatient, LPS, centre of the first pixel
    orientation: tuple[float, ...] | None  # ImageOrientationPatient, LPS: direction along a row, direction down a column
    presentation_intent: str | None  # FOR PRESENTATION or FOR PROCESSING
    vois: tuple[Voi, ...]  # ways to show it: VOI LUTs, then windows
    picture_top: float | None  # where set, the values are grey levels from 0 to this already and need no window
    inverted: bool  # MONOCHROME1: low values are bright
    padding: NDArray[np.bool_] | None  # (H, W), True on padding that reaches the border
    warnings: tuple[str, ...] = ()
    path: Path | None = None

    @property
    def rows(self) -> int:
        """H."""
        return int(self.values.shape[0])

    @property
    def columns(self) -> int:
        """W."""
        return int(self.values.shape[1])

    @property
    def value_range(self) -> tuple[float, float]:
        """Lowest and highest value, padding included."""
        return float(self.values.min()), float(self.values.max())

    @property
    def sha256(self) -> str:
        """Of the values as little-endian float32 in C order: files of the same content agree, however they are coded."""
        return hashlib.sha256(np.ascontiguousarray(self.values, dtype="<f4").tobytes()).hexdigest()


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
    spacing_source: str | None = None
    magnification: float | None = None


@dataclass(frozen=True)
class FittedRadiograph:
    """One radiograph resized with its aspect kept, as shown."""

    pixels: NDArray[np.float32]  # (h, w) in 0..1, bright = dense; max(h, w) is the size that was asked for
    native_shape: tuple[int, int]  # (H, W)
    reduced: int  # halvings that the decoder left out: 0 unless reduced decoding was allowed and could be used
    spacing_mm: tuple[float, float] | None = None  # of the native pixels
    view: str | None = None
    patient_orientation: tuple[str, str] | None = None
    photometric: str | None = None
    transfer_syntax: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass
class _Loaded:
    """A decoded frame and how its stored values become a picture."""

    stored: NDArray[Any]  # (H, W); of colour, grey levels already
    modality: Pointwise | None
    unit: str | None
    vois: tuple[Voi, ...]
    picture_top: float | None
    inverted: bool
    padding: NDArray[np.bool_] | None
    layout: Layout
    header: Header  # of the frame
    syntax_name: str
    reduced: int
    notes: Notes
    tables: bool

    def values(self, stored: NDArray[Any]) -> NDArray[Any]:
        return stored if self.modality is None else self.modality(stored)


def read_dicom(path: Path, frame: int | None = None, exact: bool = False) -> DicomImage:
    """Read one frame of a DICOM image of any modality, up to and without windowing.

    Args:
        path: the file.
        frame: which one, from 0; None: the only one, or the first with a warning.
        exact: decode through pydicom alone and without tables; gives the same values, slower.
    Raises:
        UnreadableImageError: no DICOM, no image in it, no such frame, truncated, absurdly large, or a coding that no installed decoder
            reads. A segmentation, a dose or a presentation state is no image here.
    DICOM: PS3.3 C.7.6.3 (pixels), C.11.1 (modality LUT), C.7.6.16 (functional groups), C.10.7 and C.8.11.4 (spacing).
    """
    with opened(path) as file:
        _check_kind(file)
        layout = read_layout(file, uid_name(file.header.get("SOPClassUID")))
        if layout.frames > 1 and frame is None:
            file.notes.warn(f"holds {layout.frames} frames; the first was read")
        loaded = _load(file, layout, frame or 0, exact, 0)
        header, notes = loaded.header, loaded.notes
        values = pointwise(loaded.stored, loaded.modality, loaded.tables) if loaded.modality is not None else loaded.stored
        spacing, source = _spacing(header)
        view, orientation = _view(header), _orientation(header)
        magnification = _magnification(header, notes, source)
        _warn_of_geometry(spacing, view, orientation, notes)
        position, directions = header.numbers("ImagePositionPatient"), header.numbers("ImageOrientationPatient")
        return DicomImage(
            values=values,
            unit=loaded.unit,
            modality=_term(header.text("Modality"), MODALITIES),
            sop_class=uid_name(header.get("SOPClassUID")),
            photometric=layout.photometric,
            transfer_syntax=loaded.syntax_name,
            frames=layout.frames,
            frame=frame or 0,
            spacing_mm=spacing,
            spacing_source=source,
            magnification=magnification,
            view=view,
            patient_orientation=orientation,
            position_mm=(position[0], position[1], position[2]) if len(position) == 3 and all(map(math.isfinite, position)) else None,
            orientation=directions if len(directions) == 6 and all(map(math.isfinite, directions)) else None,
            presentation_intent=_term(header.text("PresentationIntentType"), frozenset({"FOR PRESENTATION", "FOR PROCESSING"})),
            vois=loaded.vois,
            picture_top=loaded.picture_top,
            inverted=loaded.inverted,
            padding=loaded.padding,
            warnings=tuple(notes.warnings),
            path=notes.path,
        )


def show(image: DicomImage, voi: int | str | Voi | None = None) -> NativeRadiograph:
    """The picture a person would be shown: VOI, then inversion of MONOCHROME1, 0..1; padding is 0.

    Args:
        image: as read.
        voi: index into ``image.vois``, its explanation (case does not matter), a :class:`Window` of your own; None: the first, or the
            image's own range where there is none.
    Raises:
        UnreadableImageError: no such VOI.
    """
    notes = Notes(image.path or Path("image"), list(image.warnings))
    chosen = _choose(image.vois, voi, notes)
    pixels = _picture(image.values, None, chosen, image.picture_top, image.inverted, image.padding, notes)
    return NativeRadiograph(
        pixels=pixels,
        spacing_mm=image.spacing_mm,
        view=image.view,
        patient_orientation=image.patient_orientation,
        photometric=image.photometric,
        transfer_syntax=image.transfer_syntax,
        warnings=tuple(notes.warnings),
        spacing_source=image.spacing_source,
        magnification=image.magnification,
    )


def read_radiograph(
    path: Path, *, frame: int | None = None, voi: int | str | Voi | None = None, exact: bool = False, sections: bool = True
) -> NativeRadiograph:
    """Read one radiograph, as shown, in its own pixels.

    Args:
        path: the file.
        frame: which one, from 0, of a file that holds several.
        voi: as of :func:`show`.
        exact: decode through pydicom alone and compute without tables; the same within rounding, slower.
        sections: take slices of CT, MR, PET and the like as pictures, with a warning; False refuses them.
    Raises:
        UnreadableImageError: no DICOM, no image or several frames in it and none chosen, truncated, absurdly large, or a coding that no
            installed decoder reads.
    DICOM: PS3.4 N.2 (the chain); PS3.3 C.11.1 (modality LUT), C.11.2 (VOI), C.7.6.3.1.2 (photometric interpretation).
    """
    with opened(path) as file:
        if not sections:
            _refuse_sections(file)
        loaded = _load_radiograph(file, frame, exact, None)
        spacing, source = _spacing(loaded.header)
        view, orientation = _view(loaded.header), _orientation(loaded.header)
        magnification = _magnification(loaded.header, loaded.notes, source)
        pixels = _shown(loaded, voi)
        _warn_of_geometry(spacing, view, orientation, loaded.notes)
        return NativeRadiograph(
            pixels=pixels,
            spacing_mm=spacing,
            view=view,
            patient_orientation=orientation,
            photometric=loaded.layout.photometric,
            transfer_syntax=loaded.syntax_name,
            warnings=tuple(loaded.notes.warnings),
            spacing_source=source,
            magnification=magnification,
        )


def fit_radiograph(
    path: Path,
    size: int,
    *,
    frame: int | None = None,
    voi: int | str | Voi | None = None,
    reduce: bool = False,
    exact: bool = False,
    sections: bool = True,
) -> FittedRadiograph:
    """Read one radiograph, as shown, resized so that its longer side has ``size`` pixels: anti-aliased bilinear, centres aligned.

    Args:
        path: the file.
        size: pixels of the longer side; the other is rounded to the nearest, and at least 1.
        frame: as of :func:`read_radiograph`.
        voi: likewise.
        reduce: decode JPEG 2000 at a half, a quarter, ... of its size where that still has 1.2 times the pixels asked for; on films the
            mean difference stays under half a grey level (0.08 to 0.41 on two real ones), at fine edges single pixels differ by up to 16.
            ``reduced`` tells what was done; it is left out for colour, signed values, fewer than 10 bits,
            padding and files without the levels.
        exact: as of :func:`read_radiograph`; never reduced.
        sections: as of :func:`read_radiograph`.
    Raises:
        UnreadableImageError: as :func:`read_radiograph`.
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")
    with opened(path) as file:
        if not sections:
            _refuse_sections(file)
        loaded = _load_radiograph(file, frame, exact, size if reduce and not exact else None)
        pixels = _shown(loaded, voi)
        if loaded.reduced:
            pixels = _centred(pixels, loaded.reduced)
        native = (loaded.layout.rows, loaded.layout.cols)
        rows, cols = (max(1, round(n * size / max(native))) for n in native)
        spacing, source = _spacing(loaded.header)
        view, orientation = _view(loaded.header), _orientation(loaded.header)
        _magnification(loaded.header, loaded.notes, source)
        _warn_of_geometry(spacing, view, orientation, loaded.notes)
        return FittedRadiograph(
            pixels=_resized(pixels, (rows, cols)),
            native_shape=native,
            reduced=loaded.reduced,
            spacing_mm=spacing,
            view=view,
            patient_orientation=orientation,
            photometric=loaded.layout.photometric,
            transfer_syntax=loaded.syntax_name,
            warnings=tuple(loaded.notes.warnings),
        )


def _resized(pixels: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    import torch
    from torch.nn import functional

    if pixels.shape == shape:
        return pixels
    tensor = torch.from_numpy(pixels)[None, None]
    resized = functional.interpolate(tensor, size=shape, mode="bilinear", antialias=True, align_corners=False)
    out: NDArray[np.float32] = resized[0, 0].numpy()
    return out


def _centred(pixels: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Low-pass samples of a wavelet stand at native pixel 2**n * i; those of an area average at 2**n * i + (2**n - 1) / 2: move there."""
    t = np.float32((2**n - 1) / 2 / 2**n)
    for axis in (0, 1):
        after = np.concatenate([np.take(pixels, range(1, pixels.shape[axis]), axis), np.take(pixels, [-1], axis)], axis)
        pixels = pixels * (1 - t) + after * t
    return pixels


def _halvings(layout: Layout, size: int) -> int:
    """How often the image may be halved and still have REDUCED_MARGIN times the pixels asked for."""
    longest, n = max(layout.rows, layout.cols), 0
    while longest / 2 ** (n + 1) >= REDUCED_MARGIN * size:
        n += 1
    return n


def _load_radiograph(file: DicomFile, frame: int | None, exact: bool, reduce_to: int | None) -> _Loaded:
    """Refuse what is no radiograph before anything is decoded, warn of what is a doubtful one, and load the frame."""
    notes, sop = file.notes, file.header.get("SOPClassUID")
    _check_kind(file)
    kind = uid_name(sop)
    if sop is not None and _under(sop, (PARAMETRIC_MAP,)):
        raise notes.refuse(f"holds {kind}, expected a radiograph")
    layout = read_layout(file, kind)
    if layout.frames > 1 and frame is None:
        raise notes.refuse(
            f"holds {layout.frames} frames, a radiograph is one image; choose with read_radiograph(path, frame=k), k from 0 to "
            f"{layout.frames - 1}, or export the frame that is meant"
        )
    if sop is not None and not _under(sop, PROJECTION_SOP_CLASSES):
        notes.warn(f"{kind} is no projection radiograph")
    if file.header.text("PresentationIntentType") == "FOR PROCESSING":
        notes.warn("raw image FOR PROCESSING: its contrast was not made for display")
    return _load(file, layout, frame or 0, exact, 0 if reduce_to is None else _halvings(layout, reduce_to))


def _refuse_sections(file: DicomFile) -> None:
    sop = file.header.get("SOPClassUID")
    if sop is not None and _under(sop, SECTION_SOP_CLASSES):
        raise file.notes.refuse(f"holds {uid_name(sop)}, expected a radiograph; a chest film's model has nothing to say of it")


def _check_kind(file: DicomFile) -> None:
    sop = file.header.get("SOPClassUID")
    if sop is not None and _under(sop, NOT_IMAGE_SOP_CLASSES):
        raise file.notes.refuse(f"holds {uid_name(sop)}, expected a radiograph or another image")


def _load(file: DicomFile, layout: Layout, k: int, exact: bool, reduce: int) -> _Loaded:
    """Decode frame ``k`` and read how its values are meant."""
    notes, photometric = file.notes, layout.photometric
    if not 0 <= k < layout.frames:
        raise notes.refuse(f"has no frame {k}; it holds {layout.frames}, counted from 0")
    grey = photometric in ("MONOCHROME1", "MONOCHROME2")
    colour = photometric in COLOURS and layout.samples == 3
    if not grey and not colour and not (photometric == "PALETTE COLOR" and layout.samples == 1):
        known = photometric if photometric in (*COLOURS, "PALETTE COLOR") else "unknown" if photometric else "missing"
        raise notes.refuse(
            f"photometric interpretation {known} of {layout.samples} samples, expected MONOCHROME1, MONOCHROME2, RGB, YBR or PALETTE COLOR"
        )
    if grey and layout.samples != 1:
        raise notes.refuse(f"photometric interpretation {photometric} of {layout.samples} samples, expected 1")
    header = file.header.frame(k)
    plain = grey and header.get("PixelPaddingValue") is None
    stored, reduced = decode(file, layout, k, exact, reduce if plain else 0)
    loaded = _Loaded(stored, None, None, (), None, False, None, layout, header, file.syntax_name, reduced, notes, not exact)
    if not grey:
        notes.warn(f"colour image ({photometric}) turned to grey; a secondary capture or a photograph may differ from the original")
        if colour:
            top = float(2**layout.stored - 1)
            loaded.stored, loaded.picture_top = _grey(stored, top, photometric), top
        else:
            loaded.modality, loaded.picture_top = palette(header, layout.signed)
        return loaded
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise notes.refuse("holds pixels that are NaN or infinite, expected numbers")
    loaded.inverted = photometric == "MONOCHROME1"
    loaded.padding = _padding(header, stored)
    loaded.modality, loaded.unit = modality_function(header, notes, stored.dtype.itemsize > 2, layout.signed)
    ends = loaded.values(np.array([[stored.min(), stored.max()]]))
    loaded.vois = read_vois(header, notes, bool(ends.min() < 0))
    if layout.stored in (1, 8) and loaded.modality is None and stored.dtype == np.uint8:
        loaded.picture_top = float(2**layout.stored - 1)
    shape = header.text("PresentationLUTShape")
    if shape in ("IDENTITY", "INVERSE") and (shape == "INVERSE") != loaded.inverted:
        notes.warn(f"{photometric} with PresentationLUTShape {shape} contradict each other; the photometric interpretation was followed")
    return loaded


def _grey(colour: NDArray[Any], top: float, photometric: str) -> NDArray[np.float32]:
    """(H, W, 3) colour to grey from 0 to ``top``; what pydicom decoded is RGB, but for partial ranges, of which the luma is taken."""

    def convert(block: NDArray[Any]) -> NDArray[np.float32]:
        if photometric.startswith("YBR_PARTIAL"):
            luma = (block[..., 0].astype(np.float32) - 16 / 255 * top) / np.float32(219 / 255)
            return np.clip(luma, 0, np.float32(top))
        return luminance(block[..., :3].astype(np.float32) / np.float32(top)) * np.float32(top)

    return pointwise(colour, convert, tables=False)


def _shown(loaded: _Loaded, voi: int | str | Voi | None) -> NDArray[np.float32]:
    chosen = _choose(loaded.vois, voi, loaded.notes)
    return _picture(
        loaded.stored,
        loaded.modality,
        chosen,
        loaded.picture_top,
        loaded.inverted,
        loaded.padding,
        loaded.notes,
        loaded.tables,
    )


def _choose(vois: tuple[Voi, ...], voi: int | str | Voi | None, notes: Notes) -> Voi | None:
    """The way of showing that was asked for; None where the file has none, or one that cannot be used."""
    if isinstance(voi, Window | VoiLut | Range):
        return voi
    chosen: Voi | None = next(iter(vois), None)
    if isinstance(voi, int):
        if not 0 <= voi < len(vois):
            raise notes.refuse(f"has no VOI {voi}; it holds {len(vois)}, counted from 0")
        chosen = vois[voi]
    elif voi is not None:
        named = [v for v in vois if isinstance(v, Window | VoiLut) and (v.explanation or "").casefold() == voi.strip().casefold()]
        if not named:
            raise notes.refuse(f"none of its {len(vois)} VOIs has that explanation")
        chosen = named[0]
    if isinstance(chosen, Window) and not chosen.usable:
        notes.warn("a window of no width; not applied")
        return None
    return chosen


def _picture(
    stored: NDArray[Any],
    modality: Pointwise | None,
    voi: Voi | None,
    top: float | None,
    inverted: bool,
    padding: NDArray[np.bool_] | None,
    notes: Notes,
    tables: bool = True,
) -> NDArray[np.float32]:
    """Modality, VOI and inversion as one function of the stored values, applied once."""

    def values_of(some: NDArray[Any]) -> NDArray[Any]:
        return some if modality is None else modality(some)

    def through(chosen: Voi) -> NDArray[np.float32]:
        def function(some: NDArray[Any]) -> NDArray[Any]:
            grey = chosen.apply(values_of(some))
            return 1 - grey if inverted else grey

        return pointwise(stored, function, tables)

    pixels = None if voi is None else through(voi)
    if pixels is not None and not isinstance(voi, Range) and _is_flat(pixels) and not _is_flat(stored):
        notes.warn("its window or VOI LUT shows nothing of the image; its own range was used instead")
        pixels = None
    if pixels is None:
        pixels = through(Range(0, top) if top is not None else _own_range(stored, values_of, padding))
    if padding is not None:
        pixels[padding] = 0
    return pixels


def _own_range(stored: NDArray[Any], values_of: Pointwise, padding: NDArray[np.bool_] | None) -> Range:
    """Percentiles of the image's own values without padding, or their extremes where those coincide."""
    seen = stored.ravel() if padding is None or padding.all() else stored[~padding]
    low, high = robust_range(values_of(seen[:: max(1, seen.size // 2**18)][None]))
    if low == high:
        everything = values_of(np.unique(seen)[None])
        low, high = float(everything.min()), float(everything.max())
    return Range(low, high)


def _padding(header: Header, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """(H, W) bool, True on padding that reaches the border (PS3.3 C.7.5.1.1.2); None if the image has none.

    The same value inside the body is anatomy: detectors saturate at it.
    """
    value = header.number("PixelPaddingValue")
    if value is None:
        return None
    limit = header.number("PixelPaddingRangeLimit")
    ends = [value, value if limit is None else limit]
    if stored.dtype.kind == "u":  # written as signed, stored as unsigned
        ends = [end + 2 ** (stored.dtype.itemsize * 8) if end < 0 else end for end in ends]
    low, high = sorted(ends)

    def inside(some: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray((some >= low) & (some <= high), dtype=np.bool_)

    if not any(inside(edge).any() for edge in (stored[0], stored[-1], stored[:, 0], stored[:, -1])):
        return None
    from scipy import ndimage

    labels, count = ndimage.label(inside(stored))
    touching = np.zeros(count + 1, dtype=bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touching[edge] = True
    touching[0] = False
    return pointwise(labels, lambda some: touching[some], tables=False)


def _spacing(header: Header) -> tuple[tuple[float, float] | None, str | None]:
    """(between rows, between columns) in mm and the element that says so: calibrated, else at the detector, else as scanned."""
    for keyword in SPACINGS:
        value = header.numbers(keyword)
        if len(value) == 2 and all(math.isfinite(v) and v > 0 for v in value):
            return (value[0], value[1]), keyword
    return None, None


def _magnification(header: Header, notes: Notes, source: str | None) -> float | None:
    """Detector over patient plane: the header's estimate, else ImagerPixelSpacing over a PixelSpacing that differs; None if unknown."""
    factor = header.number("EstimatedRadiographicMagnificationFactor")
    if factor is None or factor <= 0:
        detector, patient = header.numbers("ImagerPixelSpacing"), header.numbers("PixelSpacing")
        both = len(detector) == 2 and len(patient) == 2 and detector[0] > 0 and patient[0] > 0
        factor = detector[0] / patient[0] if both else None
    if factor is not None and not math.isfinite(factor):
        return None
    if factor is not None and source == "ImagerPixelSpacing" and abs(factor - 1) > 0.001:
        notes.warn(f"its spacing is that at the detector; the patient is magnified {factor:.3f} times")
    return factor


def _warn_of_geometry(spacing: tuple[float, float] | None, view: str | None, orientation: tuple[str, str] | None, notes: Notes) -> None:
    if spacing is not None and abs(spacing[0] / spacing[1] - 1) > 0.01:
        notes.warn(f"pixels are not square: {spacing[0]:.3f} mm between rows, {spacing[1]:.3f} mm between columns")
    if view in ("PA", "AP") and orientation is not None and orientation[0].startswith("R"):
        notes.warn("PatientOrientation says that the patient's right is at the right of the image: mirrored, or seen from behind")


def _view(header: Header) -> str | None:
    position = header.text("ViewPosition")
    if position in ("PA", "AP"):
        return position
    return "lateral" if position in LATERAL_VIEWS else None


def _orientation(header: Header) -> tuple[str, str] | None:
    """PatientOrientation where it holds two directions made of the letters DICOM allows."""
    value = header.get("PatientOrientation")
    if value is None or isinstance(value, str) or len(value) != 2:
        return None
    row, col = str(value[0]), str(value[1])
    return (row, col) if row and col and set(row + col) <= set("LRAPHF") else None


def _term(text: str, known: frozenset[str]) -> str | None:
    return text if text in known else None


def _is_flat(values: NDArray[Any]) -> bool:
    some = values[:: max(1, values.shape[0] // 32), :: max(1, values.shape[1] // 32)]
    return bool(some.min() == some.max()) and bool(values.min() == values.max())


def _under(uid: Any, roots: tuple[str, ...]) -> bool:
    return any(str(uid) == root or str(uid).startswith(root + ".") for root in roots)
