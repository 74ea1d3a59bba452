"""Statements of an image as DICOM objects that refer to it: a parametric map each, a segmentation of what was found, and an SR."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import medvl
from medvl.types import ImageReader, ImageSample
from modalities.map_objects import Algorithm, MapFinding, write_map_objects
from modalities.structured_report import Concept
from tasks.grounding.outputs import Said
from tasks.structured_report import finding_code

MEASURES: dict[str, Literal["cosine", "probability"]] = {"cosine": "cosine"}
"""Units of maps that have a coded quantity in DICOM."""


def write_dicom(
    folder: Path,
    file: Path,
    sample: ImageSample,
    said: Sequence[Said],
    unit: str,
    facts: dict[str, Any],
    model: str,
    reader: ImageReader,
) -> dict[str, Any]:
    """Write SLUG_map.dcm, segmentation.dcm where something was found, and findings.dcm; what maps.json says of them.

    Raises:
        ValueError: a source that is no DICOM, or whose pixels are not those of the maps; maps of a unit that has no code.
        ImportError: highdicom is not installed (extra ``sr``).
    """
    if unit not in MEASURES:
        raise ValueError(f"--dicom: maps of {unit} have no coded quantity in DICOM; take a source whose maps are cosines")
    algorithm = Algorithm(model, facts["weights_sha256"], medvl.__version__)
    written = write_map_objects(
        file,
        [_finding(one) for one in said],
        folder,
        affine=sample.affine,
        algorithm=algorithm,
        measure=MEASURES[unit],
        series=getattr(getattr(reader, "ct", reader), "series", "largest"),  # of a folder with several, the one that was read
    )
    segmentation = None if written.segmentation is None else written.segmentation.name
    return {"maps": [path.name for path in written.maps], "segmentation": segmentation, "report": written.report.name}


def _finding(said: Said) -> MapFinding:
    statement, levels = said.statement, said.statement.levels
    concept: Concept | None = finding_code(said.query.name) if said.query.kind == "finding" else None
    return MapFinding(
        phrase=said.query.name,
        slug=said.slug,
        scores=said.scores,
        mask=statement.mask,
        boxes=tuple((one.low, one.high) for one in statement.regions),
        peak=statement.peak,
        score=None if statement.peak is None else statement.score,
        threshold=None if levels is None or levels.detect == float("inf") else levels.detect,
        probability=statement.probability,
        found=statement.found,
        concept=concept,
    )
