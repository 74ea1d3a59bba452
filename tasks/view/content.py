"""A study as the page shows it: its pixels as NIfTI, its findings with scores, and the map of a phrase with the score of every slice.

Shapes: (S, H, W) slices, rows, columns of a volume; a radiograph is a volume of one slice. Volumes keep their own affine, to RAS mm. A
radiograph lies in a plane of the page: x to the right, y up, in mm where the file tells its pixels' size, else in pixels; nothing is
flipped, and which side of the patient is where stands in ``orientation``. A map comes on a grid of its own, about as fine as the tower
sees, with its own affine; NaN where the tower did not look.
"""

from __future__ import annotations

import base64
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvl.geometry import GridTransform
from medvl.metrics import peak
from medvl.model import DualEncoder
from medvl.nn.similarity import slice_logits
from medvl.types import ImageFeatures, ImageReader, ImageSample, TextFeatures, UnreadableImageError
from modalities.ct.read import read_ct
from modalities.ct.reader import CtReader, turn_to_tower
from modalities.ct.volume import CtVolume
from modalities.dicom import Window, has_dicom_magic, read_dicom, read_radiograph
from modalities.export import nifti_bytes
from modalities.joint import JointReader
from tasks.decisions import Decisions
from tasks.evaluation import finding_maps
from tasks.familiarity import Familiar
from tasks.zero_shot import (
    Diagnosis,
    Encoded,
    PromptBank,
    appearance,
    encode,
    modality_of_sample,
    score,
    slice_scores,
    slices_of_images,
)

Kind = Literal["phrase", "finding"]
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

LONGEST_SIDE = 2048
"""Texels along an axis of a 3D texture that every browser on a desktop has."""
MOST_VOXELS = 2**27
"""Shown of a volume, 512 slices of 512 x 512; the graphics card needs 8 bytes for each."""
MOST_IN_MAP = 2**20
FINEST_MAP_MM = 2.0
MAP_PIXELS = 512  # longest side of a radiograph's map
MAP_STEPS = 2**12
"""At least so many steps lie between the lowest and the highest value of a map that is sent: 16 for each of the page's colours, at half the
bytes."""
GREY_LEVELS = 4095  # of a radiograph, as most detectors have
AIR_HU = -1024
CT_WINDOWS = (
    ("Lung", -1350.0, 150.0),
    ("Mediastinum", -160.0, 240.0),
    ("Bone", -450.0, 1050.0),
    ("Soft tissue", -125.0, 225.0),
)
"""Name, low and high in HU: -600/1500, 40/400, 300/1500 as :mod:`modalities.ct.reader` has them, and 50/350."""
STUDIES_KEPT, MAPS_KEPT, PHRASES_KEPT = 2, 24, 256


class NoMapError(ValueError):
    """A model that cannot make a map; its message is safe to show."""


@dataclass(frozen=True)
class ViewModel:
    """A model, and what its scores are made with."""

    name: str
    encoder: DualEncoder
    bank: PromptBank
    familiar: Familiar
    decisions: Decisions | None = None


@dataclass(frozen=True)
class Shown:
    """One study as the page shows it."""

    kind: Literal["xray", "ct"]
    nifti: bytes = field(repr=False)  # gzipped; int16 HU, or 0 .. GREY_LEVELS
    native_shape: tuple[int, ...]  # (S, H, W) or (H, W)
    affine: NDArray[np.float64]  # 4 x 4, native (s, h, w) to the page's mm; s is 0 for a radiograph
    windows: tuple[tuple[str, float, float], ...]  # name, low, high
    orientation: tuple[str, str] | None = None  # of a radiograph: where a row and a column run to
    unit: str = "mm"
    notes: tuple[str, ...] = ()
    volume: CtVolume | None = field(default=None, repr=False)  # what a CT model reads it from
    reader: int = 0  # which of several models' readers could read it

    def to_dict(self) -> dict[str, Any]:
        """What the page is told, JSON-ready."""
        return {
            "kind": self.kind,
            "shape": list(self.native_shape),
            "windows": [{"name": name, "low": low, "high": high} for name, low, high in self.windows],
            "orientation": None if self.orientation is None else list(self.orientation),
            "unit": self.unit,
            "notes": list(self.notes),
            "model": self.reader,
        }


@dataclass(frozen=True)
class Seen:
    """What one model made of one study."""

    features: ImageFeatures
    transform: GridTransform
    valid_slices: tuple[int, ...]  # of the tower's grid, empty for a radiograph
    notes: tuple[str, ...]
    modality: str


@dataclass(frozen=True)
class LaidMap:
    """A map on a grid of its own."""

    scores: NDArray[np.float32]  # (S, H, W)
    affine: NDArray[np.float64]  # 4 x 4, its (s, h, w) to the page's mm


# --- the image ---------------------------------------------------------------------------------------------------------------------------


def show(reader: ImageReader, path: Path) -> Shown:
    """Read a study for showing.

    Raises:
        UnreadableImageError: the file cannot be read.
    """
    own = reader.reader_of(path) if isinstance(reader, JointReader) else reader
    if isinstance(own, CtReader):
        return show_volume(read_ct(path, own.series), file_windows(path))
    return show_radiograph(own, path)


def show_by_any(readers: Sequence[ImageReader], path: Path) -> Shown:
    """Read a study with the first reader that can.

    Raises:
        UnreadableImageError: none can; the reason is the first's.
    """
    first, *others = readers
    try:
        return show(first, path)
    except UnreadableImageError as error:
        if not others:
            raise
        try:
            found = show_by_any(others, path)
            return replace(found, reader=found.reader + 1)
        except UnreadableImageError:
            raise error from None


def show_volume(volume: CtVolume, windows: Sequence[tuple[str, float, float]] = ()) -> Shown:
    """A CT volume in its own voxels, or in fewer where a browser could not hold them."""
    record = shown_grid(volume.shape)
    notes = [*volume.warnings, *volume.repairs]
    voxels: NDArray[Any] = volume.voxels
    if record.steps:
        voxels = record.apply(voxels[None], fill=AIR_HU)[0].numpy()
        notes.append(f"shown at {_sizes(record.shape)} of its {_sizes(volume.shape)} voxels")
    if voxels.dtype != np.int16:
        voxels = np.nan_to_num(np.rint(voxels), nan=AIR_HU).clip(-32768, 32767).astype(np.int16)
    content = nifti_bytes(voxels, volume.affine @ record.matrix())
    return Shown("ct", content, volume.shape, volume.affine, (*CT_WINDOWS, *windows), notes=tuple(notes), volume=volume)


def show_radiograph(reader: ImageReader, path: Path) -> Shown:
    """A radiograph as the file says it is to be shown, its pixels' aspect kept."""
    orientation, spacing, unit, notes = None, None, "pixels", list[str]()
    if path.is_file() and has_dicom_magic(path):
        film = read_radiograph(path, sections=False)
        pixels, orientation, spacing = film.pixels, film.patient_orientation, film.spacing_mm
        if spacing is not None:
            unit = "mm at the detector" if film.spacing_source == "ImagerPixelSpacing" else "mm"
    else:
        pixels = reader.native(path).numpy()
    rows, columns = pixels.shape
    affine = plane_affine(rows, spacing or (1.0, 1.0))
    record = shown_grid((rows, columns))
    if record.steps:
        pixels = record.apply(pixels[None])[0].numpy()
        notes.append(f"shown at {_sizes(record.shape)} of its {_sizes((rows, columns))} pixels")
    grey = np.rint(pixels * GREY_LEVELS).clip(0, GREY_LEVELS).astype(np.int16)[None]
    low, high = (float(value) for value in np.percentile(grey[:, :: max(1, rows // 512), :: max(1, columns // 512)], (2, 98)))
    windows = [("As the file says", 0.0, float(GREY_LEVELS)), ("More contrast", low, max(high, low + 1))]
    content = nifti_bytes(grey, affine @ in_volume(record.matrix()))
    return Shown("xray", content, (rows, columns), affine, tuple(windows), orientation, unit, tuple(notes))


def shown_grid(shape: Sequence[int]) -> GridTransform:
    """The file's grid, or the finest of equal extent that a browser holds."""
    record = GridTransform(tuple(shape))
    shrink = max(1.0, (math.prod(shape) / MOST_VOXELS) ** (1 / len(shape)), max(shape) / LONGEST_SIDE)
    return record if shrink == 1 else record.resize([max(1, int(n / shrink)) for n in shape])


def plane_affine(rows: int, spacing_mm: tuple[float, float]) -> NDArray[np.float64]:
    """4 x 4, (s, h, w) of a radiograph to the page: x along a row, y against the columns, so that it looks as it lies in the file."""
    down, across = spacing_mm
    return np.array([[0, 0, across, 0], [0, -down, 0, down * (rows - 1)], [min(down, across), 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)


def in_volume(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """A 3 x 3 matrix of (h, w) as a 4 x 4 one of (s, h, w); a 4 x 4 one stays."""
    if matrix.shape == (4, 4):
        return matrix
    found = np.eye(4)
    found[1:, 1:] = matrix
    return found


def file_windows(path: Path) -> tuple[tuple[str, float, float], ...]:
    """The windows in the header of a DICOM file, or of the first in a folder, in HU; their own names may be anything and are left out."""
    try:
        files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
        first = next((one for one in files if has_dicom_magic(one)), None)
        vois = () if first is None else read_dicom(first).vois
    except (OSError, ValueError):
        return ()
    windows = [voi for voi in vois if isinstance(voi, Window) and voi.usable]
    return tuple(
        (f"From the file ({one.center:g}/{one.width:g})", one.center - one.width / 2, one.center + one.width / 2) for one in windows
    )


# --- what a model makes of it -----------------------------------------------------------------------------------------------------------


def see(model: DualEncoder, path: Path, shown: Shown) -> Seen:
    """Encode a study; a CT that has been read is not read again.

    Raises:
        UnreadableImageError: the model does not read it.
    """
    reader = model.reader.reader_of(path) if isinstance(model.reader, JointReader) else model.reader
    sample = reader.sample(shown.volume) if isinstance(reader, CtReader) and shown.volume is not None else model.read(path)
    return seen_of(model, sample)


def seen_of(model: DualEncoder, sample: ImageSample) -> Seen:
    """Features of one image and the record that leads back to its voxels."""
    modality = modality_of_sample(sample)
    slices = tuple(sample.valid.nonzero().flatten().tolist()) if modality == "ct" else ()
    return Seen(encode(model, [[sample]]), sample.transform, slices, sample.warnings, modality)


def scores_of(model: ViewModel, seen: Seen, path: Path) -> dict[str, Any]:
    """Findings with their scores, or with probabilities and calls where the model folder has decisions; JSON-ready."""
    values = score(model.encoder, seen.features, model.bank)[0].tolist()
    findings = dict(zip(model.bank.findings, values, strict=True))
    vector = appearance(seen.features)[0].cpu()
    looked = Diagnosis((str(path),), True, findings=findings, encoded=(Encoded((str(path),), seen.modality, vector),))
    called: dict[str, Any] = {}
    if model.decisions is not None:
        findings = model.decisions.probabilities(findings)
        called = model.decisions.decide(findings)
    rows = [{"finding": name, "score": value, "set": called[name]["set"] if called else None} for name, value in findings.items()]
    return {
        "findings": rows,
        "calibrated": model.decisions is not None,
        "unfamiliar": list(dict.fromkeys(reason for _, reason in model.familiar.reasons(looked))),
        "notes": list(seen.notes),
    }


def map_grid(record: GridTransform, affine: NDArray[np.float64]) -> GridTransform:
    """The tower's grid made coarser or finer, so that a map on it is small and still smooth; ``affine`` of the native grid."""
    steps = np.linalg.norm((affine @ in_volume(record.matrix()))[:3, :3], axis=0)[-len(record.shape) :]
    sizes = [n * step for n, step in zip(record.shape, steps, strict=True)]
    if len(sizes) == 2:
        step = max(sizes) / min(MAP_PIXELS, max(record.native_shape))
    else:
        step = max(FINEST_MAP_MM, (math.prod(sizes) / MOST_IN_MAP) ** (1 / 3))
    return record.resize([max(1, math.floor(size / step)) for size in sizes])


def laid(grid: Tensor, seen: Seen, affine: NDArray[np.float64], offset: Sequence[float] | None = None) -> LaidMap:
    """Scores of tokens, (*tokens), on the grid of :func:`map_grid`: linear between tokens, NaN where the tower did not look.

    Args:
        offset: where tokens look, as :attr:`medvl.model.DualEncoder.token_offset` has it.
    """
    record = map_grid(seen.transform, affine)
    axes = len(record.shape)
    tokens = grid.reshape(grid.shape[-axes:])  # of one image, whether or not the tower lays views out before it
    fine = GridTransform(record.shape).resize(seen.transform.shape).map_to_native(tokens.cpu(), seen.features.extent, offset)
    scores = torch.where(record.valid(), fine, torch.nan).numpy()
    return LaidMap(scores if axes == 3 else scores[None], affine @ in_volume(record.matrix()))


@torch.inference_mode()
def found_map(model: ViewModel, seen: Seen, shown: Shown, kind: Kind, what: str, texts: TextFeatures) -> dict[str, Any]:
    """The map of a phrase or finding, with its peak in words and the score of every slice; JSON-ready.

    Args:
        texts: the phrase, encoded; of no use for a finding.
    Raises:
        NoMapError: a tower that keeps no tokens.
    """
    encoder, features = model.encoder, seen.features
    if features.tokens is None or features.grid is None:
        raise NoMapError("this model keeps no tokens, so it has no map")
    at = model.bank.findings.index(what) if kind == "finding" else 0
    grids = finding_maps(encoder, features, model.bank) if kind == "finding" else encoder.similarity.maps(features, texts)
    found = laid(grids[0, at], seen, shown.affine, encoder.token_offset.get(len(seen.transform.shape)))
    by_slice: list[float] = []
    if features.slices is not None:
        per = slice_scores(encoder, features, model.bank) if kind == "finding" else slice_logits(encoder.similarity, features, texts)
        by_slice = slices_of_images(per, features)[0, 0, at].cpu()[list(seen.valid_slices)].tolist()
    known = found.scores[np.isfinite(found.scores)]
    top = peak(found.scores)
    return {
        "kind": kind,
        "what": what,
        "min": float(known.min()) if known.size else None,
        "max": float(known.max()) if known.size else None,
        "peak": None if top is None else _place(found, top, shown),
        "slices": slice_bar(found, seen, by_slice) if shown.kind == "ct" else None,
        "nifti": base64.b64encode(nifti_bytes(in_steps(found.scores), found.affine)).decode(),
    }


def in_steps(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to a power of 2, so that they pack well: see ``MAP_STEPS``. A map of one value, or of none, stays."""
    known = scores[np.isfinite(scores)]
    span = float(np.ptp(known)) if known.size else 0.0
    if span == 0:
        return scores
    step = np.float32(2.0 ** math.floor(math.log2(span / MAP_STEPS)))
    return np.asarray(np.round(scores / step) * step, dtype=np.float32)


def slice_bar(found: LaidMap, seen: Seen, by_slice: Sequence[float]) -> dict[str, Any]:
    """How strongly each slice speaks for it, from the feet to the head, and where in it the map is highest.

    Args:
        by_slice: scores of the tower's valid slices; empty: the highest value of the map in each of its own slices stands for them.
    """
    count = len(found.scores)
    kept = [s for s in range(count) if np.isfinite(found.scores[s]).any()]
    values = [float(np.nanmax(found.scores[s])) for s in kept]
    of = "highest value of the map in each slice"
    if by_slice and kept:
        middle = (np.array(seen.valid_slices) + 0.5) * count / seen.transform.shape[0] - 0.5
        nearest = np.abs(np.array(kept) - middle[:, None]).argmin(1)
        kept, values, of = [kept[i] for i in nearest], list(by_slice), "score of each slice as if it were the whole study"
    points = []
    for s in kept:
        row, column = np.unravel_index(np.nanargmax(found.scores[s]), found.scores[s].shape)
        points.append(_mm(found.affine, (s, int(row), int(column))))
    return {"values": values, "points": points, "of": of}


# --- places in words ----------------------------------------------------------------------------------------------------------------------


def _place(found: LaidMap, at: tuple[int, ...], shown: Shown) -> dict[str, Any]:
    mm = _mm(found.affine, at)
    native = (np.linalg.inv(shown.affine) @ [*mm, 1])[:3]
    words = volume_words(mm, native, shown) if shown.kind == "ct" else plane_words(native, shown)
    return {"mm": mm, "words": words, "value": float(found.scores[at])}


def volume_words(mm: Sequence[float], native: NDArray[np.float64], shown: Shown) -> str:
    """Where a point of a volume is: its slice, and its way from the volume's middle in the patient's directions."""
    middle = (shown.affine @ [*((n - 1) / 2 for n in shown.native_shape), 1])[:3]
    right, front, up = (float(a - b) for a, b in zip(mm, middle, strict=True))
    axes, flipped = turn_to_tower(shown.affine)
    count = shown.native_shape[axes[0]]
    index = min(max(round(float(native[axes[0]])), 0), count - 1)
    from_below = count - index if flipped[0] else index + 1
    ways = (
        f"{abs(right):.0f} mm to the patient's {'right' if right > 0 else 'left'}",
        f"{abs(front):.0f} mm to the {'front' if front > 0 else 'back'}",
        f"{abs(up):.0f} mm {'up' if up > 0 else 'down'}",
    )
    return f"slice {from_below} of {count} from below; from the middle of the volume {', '.join(ways)}"


def plane_words(native: NDArray[np.float64], shown: Shown) -> str:
    """Where a point of a radiograph is: thirds of the picture, the patient's side where the file tells it, and its way from the edges."""
    rows, columns = shown.native_shape
    row, column = float(native[1]), float(native[2])
    height = ("upper", "middle", "lower")[min(2, max(0, int(3 * (row + 0.5) / rows)))]
    right_half = column > (columns - 1) / 2
    side = "right half of the picture" if right_half else "left half of the picture"
    ends = dict(zip("LR", ("left", "right"), strict=True))
    runs_to = shown.orientation[0] if shown.orientation else ""
    if runs_to in ends:
        opposite = {"L": "R", "R": "L"}[runs_to]
        side = f"{side}, the patient's {ends[runs_to if right_half else opposite]}"
    words = f"{height} third, {side}; row {max(0, round(row)) + 1} of {rows}, column {max(0, round(column)) + 1} of {columns}"
    if shown.unit == "pixels":
        return words
    step = np.linalg.norm(shown.affine[:3, :3], axis=0)
    return f"{words}; {row * step[1]:.0f} {shown.unit} from the top, {column * step[2]:.0f} from the left"


def _mm(affine: NDArray[np.float64], at: Sequence[int]) -> list[float]:
    return [round(float(value), 3) for value in (affine @ [*at, 1])[:3]]


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


# --- what is kept -------------------------------------------------------------------------------------------------------------------------


class Recent(OrderedDict[Key, Value]):
    """The ``size`` values that were asked for last, made on demand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def get_or_make(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not there."""
        if key not in self:
            made = make()  # an error keeps nothing
            self[key] = made
            while len(self) > self.size:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


class Viewer:
    """Studies as they are looked at: each read once, encoded once by each model, and each phrase encoded once, as long as they are recent.

    One request is worked on at a time.

    Raises:
        ValueError: no model.
    """

    def __init__(self, models: Sequence[ViewModel]) -> None:
        if not models:
            raise ValueError("a viewer needs at least one model")
        self.models = tuple(models)
        self._lock = threading.Lock()
        self._shown: Recent[Path, Shown] = Recent(STUDIES_KEPT)
        self._seen: Recent[tuple[Path, int], Seen] = Recent(STUDIES_KEPT * len(models))
        self._texts: Recent[tuple[int, str], TextFeatures] = Recent(PHRASES_KEPT)
        self._maps: Recent[tuple[Path, int, Kind, str], dict[str, Any]] = Recent(MAPS_KEPT)

    def show(self, path: Path) -> Shown:
        """The study for showing, by the first model whose reader reads it.

        Raises:
            UnreadableImageError: no model reads it; the reason is the first's.
        """
        with self._lock:
            return self._show(path)

    def scores(self, path: Path, model: int) -> dict[str, Any]:
        """See :func:`scores_of`."""
        with self._lock:
            return scores_of(self.models[model], self._see(path, model), path)

    def map(self, path: Path, model: int, kind: Kind, what: str) -> dict[str, Any]:
        """See :func:`found_map`."""
        with self._lock:
            return self._maps.get_or_make((path, model, kind, what), lambda: self._map(path, model, kind, what))

    def _show(self, path: Path) -> Shown:
        return self._shown.get_or_make(path, lambda: show_by_any([model.encoder.reader for model in self.models], path))

    def _see(self, path: Path, model: int) -> Seen:
        return self._seen.get_or_make((path, model), lambda: see(self.models[model].encoder, path, self._show(path)))

    def _map(self, path: Path, model: int, kind: Kind, what: str) -> dict[str, Any]:
        own = self.models[model]
        texts = own.bank.features
        if kind == "phrase":
            texts = self._texts.get_or_make((model, what), lambda: own.encoder.encode_text([what]))
        return found_map(own, self._see(path, model), self._show(path), kind, what, texts)
