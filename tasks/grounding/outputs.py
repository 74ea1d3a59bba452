"""What grounding leaves of an image: maps on its own pixels, pictures, token grids, and a record of what they say.

A folder holds, per query, SLUG.npy (float32, NaN where the model did not look), SLUG.png, of a volume SLUG.nii.gz with its affine;
grids.npz, the token grids of all queries (cosines in float16) with what lays them out again (:func:`load_grids`); and last maps.json, so
that a folder with maps.json is whole.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medvl.files import write_atomically
from medvl.geometry import GridTransform
from medvl.model import DualEncoder
from medvl.types import RESEARCH_USE, ImageSample
from tasks.grounding.grounder import Query
from tasks.grounding.maps import EXTERNAL, GridMaps, slug
from tasks.grounding.statements import FoundRegion, Levels, Statement, state
from tasks.grounding.thresholds import MapThresholds

RECORD, GRIDS = "maps.json", "grids.npz"
VALIDATION, DENIAL, NOTHING = "validation", "the map of the denial, not calibrated", "nowhere: maps made elsewhere are not calibrated"
"""Where a threshold comes from."""


@dataclass(frozen=True)
class Said:
    """A query's native map and what it says."""

    query: Query
    slug: str
    scores: NDArray[np.float32]
    statement: Statement
    levels_from: str


def slugs(names: Sequence[str]) -> list[str]:
    """File names of queries, all different."""
    taken: set[str] = set()
    found = []
    for name in names:
        base = slug(name)
        chosen = next(one for i in range(1, len(names) + 2) if (one := base if i == 1 else f"{base}_{i}") not in taken)
        taken.add(chosen)
        found.append(chosen)
    return found


def denial_of(query: Query) -> Query:
    """What a query is held against where nothing was calibrated."""
    return Query(query.name, query.negative, query.positive, query.kind)


def said_of(maps: GridMaps, queries: Sequence[Query], number: int, name: str, thresholds: MapThresholds | None) -> Said:
    """The statement of one query's map.

    Args:
        maps: of the queries, and without thresholds then of their denials, if there are any.
    """
    query, scores = queries[number], maps.native(number)
    if thresholds is None and maps.unit == EXTERNAL:
        return Said(query, name, scores, state(scores, maps.step_mm), NOTHING)
    if thresholds is None:
        denied = maps.scores[len(queries) + number]
        highest = float(denied[torch.isfinite(denied)].max()) if bool(torch.isfinite(denied).any()) else math.inf
        return Said(query, name, scores, state(scores, maps.step_mm, Levels(highest, highest)), DENIAL)
    score = float(np.nanmax(scores)) if np.isfinite(scores).any() else math.nan
    probability = thresholds.probability(query, score)
    return Said(query, name, scores, state(scores, maps.step_mm, thresholds.levels(query), probability), VALIDATION)


def write_image(
    folder: Path,
    file: Path,
    model: DualEncoder,
    sample: ImageSample,
    maps: GridMaps,
    queries: Sequence[Query],
    thresholds: MapThresholds | None,
    facts: dict[str, Any],
    dicom: str | None = None,
) -> list[dict[str, Any]]:
    """Write all of one image, a map at a time; returns what maps.json holds, a record for each query.

    Args:
        facts: taken over into every record.
        dicom: also as DICOM objects, which refer to the source, and which name the model so.
    Raises:
        OSError: the folder cannot be written to.
        ValueError: ``dicom`` of a source that is no DICOM.
    """
    from tasks.viewing import shown

    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    volume = None if sample.affine is None else model.reader.native(file).numpy()
    view = shown(model.reader, file) if volume is None else None
    records = []
    kept: list[Said] = []
    for number, name in enumerate(slugs([query.name for query in queries])):
        said = said_of(maps, queries, number, name, thresholds)
        records.append(_write_map(folder, file, sample, volume, view, said, maps, facts))
        if dicom:  # a segmentation and a report are of all of them, so all are held
            kept.append(said)
    if dicom:
        from tasks.grounding.dicom import write_dicom

        written = write_dicom(folder, file, sample, kept, maps.unit, facts, dicom, model.reader)
        for record, name in zip(records, written["maps"], strict=True):
            record["dicom"] = {"map": name, "segmentation": written["segmentation"], "report": written["report"]}
    save_grids(folder / GRIDS, maps, len(queries), [record["slug"] for record in records])
    write_atomically(folder / RECORD, (json.dumps(records, indent=2, allow_nan=False) + "\n").encode())
    return records


def _clear(folder: Path) -> None:
    """Remove what an earlier run left of this or other questions: whose maps these are, maps.json says."""
    try:
        for record in json.loads((folder / RECORD).read_text(encoding="utf-8")):
            told = [record.get(key) for key in ("npy", "png", "nifti")] + list((record.get("dicom") or {}).values())
            for name in told:
                if name and Path(name).name == name:
                    (folder / name).unlink(missing_ok=True)
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # nothing that can be told apart from files of someone else
    (folder / RECORD).unlink(missing_ok=True)


def _write_map(
    folder: Path,
    file: Path,
    sample: ImageSample,
    volume: NDArray[np.float32] | None,
    view: Any,
    said: Said,
    maps: GridMaps,
    facts: dict[str, Any],
) -> dict[str, Any]:
    from modalities.export import write_map
    from tasks.render import overlay
    from tasks.viewing import in_plane, shown_slice

    scores, statement = said.scores, said.statement
    seen = scores[np.isfinite(scores)]
    array = io.BytesIO()
    np.save(array, scores, allow_pickle=False)
    write_atomically(folder / f"{said.slug}.npy", array.getvalue())
    picture, region, at = scores, statement.mask, in_plane(statement.peak)
    of_volume: dict[str, Any] = {}
    if volume is not None and sample.affine is not None:
        view, picture, at, height = shown_slice(volume, scores, sample.affine, statement.peak)
        _, cut, _, _ = shown_slice(volume, statement.mask.astype(np.float32), sample.affine, statement.peak)
        region = cut > 0
        write_map(folder / f"{said.slug}.nii.gz", scores, sample.affine)
        of_volume = {
            "nifti": f"{said.slug}.nii.gz",
            "slices": scores.shape[0],
            "shown_slice_from_below": height,
            "peak_ras_mm": None if statement.peak is None else _world(sample.affine, statement.peak),
        }
    if seen.size:
        overlay(
            view.pixels,
            picture,
            said.query.name,
            folder / f"{said.slug}.png",
            region=region,
            peak=at,
            orientation=view.orientation,
            label=maps.unit,
            pixel_aspect=view.pixel_aspect,
            column_mm=view.column_mm,
        )
    levels = statement.levels
    return {
        "phrase": said.query.name,
        "kind": said.query.kind,
        "slug": said.slug,
        "npy": f"{said.slug}.npy",
        "png": f"{said.slug}.png" if seen.size else None,
        "rows": scores.shape[-2],
        "columns": scores.shape[-1],
        **of_volume,
        "peak": None if statement.peak is None else list(statement.peak),
        "min": float(seen.min()) if seen.size else None,
        "max": float(seen.max()) if seen.size else None,
        "finite_fraction": seen.size / scores.size,
        "unit": maps.unit,
        "step_mm": list(maps.step_mm),
        "step_mm_assumed": sample.affine is None and sample.spacing_mm is None,
        "score": None if math.isnan(statement.score) else statement.score,
        "probability": statement.probability,
        "threshold": levels.detect if levels is not None and math.isfinite(levels.detect) else None,
        "threshold_from": said.levels_from,
        "found": statement.found,
        "boxes": [_box(sample, region) for region in statement.regions],
        **facts,
        "path": str(file),
        "notice": RESEARCH_USE,
    }


def _box(sample: ImageSample, region: FoundRegion) -> dict[str, Any]:
    """A region for maps.json; of a volume with its middle in the world."""
    if sample.affine is None:
        return region.to_dict("mm2")
    middle = [(a + b) / 2 for a, b in zip(region.low, region.high, strict=True)]
    return region.to_dict("ml") | {"middle_ras_mm": _world(sample.affine, middle)}


def _world(affine: NDArray[np.float64], index: Sequence[float]) -> list[float]:
    """RAS mm of an index (s, h, w)."""
    found: list[float] = (affine @ [*index, 1])[:3].tolist()
    return found


def save_grids(path: Path, maps: GridMaps, count: int, names: Sequence[str]) -> None:
    """The first ``count`` token grids, cosines in float16, and the record that lays them out: a hundredth of the maps' bytes."""
    geometry = {
        "transform": maps.transform.to_dict(),
        "step_mm": list(maps.step_mm),
        "extent": None if maps.extent is None else list(maps.extent),
        "offset": None if maps.offset is None else list(maps.offset),
        "unit": maps.unit,
    }
    content = io.BytesIO()
    scores = maps.scores[:count].half() if maps.unit == "cosine" else maps.scores[:count].float()  # others may be of any size
    np.savez(content, scores=scores.numpy(), names=np.array(list(names)), geometry=np.array(json.dumps(geometry)))
    write_atomically(path, content.getvalue())


def load_grids(path: Path) -> tuple[GridMaps, tuple[str, ...]]:
    """The grids that :func:`save_grids` wrote, and the slug of each query.

    Raises:
        ValueError: no file of this form.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            scores, names, geometry = torch.from_numpy(file["scores"]), file["names"], json.loads(str(file["geometry"]))
        offset, extent = geometry["offset"], geometry["extent"]
        maps = GridMaps(
            scores,
            GridTransform.from_dict(geometry["transform"]),
            tuple(geometry["step_mm"]),
            None if extent is None else tuple(extent),
            None if offset is None else tuple(offset),
            geometry["unit"],
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no token grids that `medvl ground` wrote ({type(error).__name__})") from error
    return maps, tuple(map(str, names))
