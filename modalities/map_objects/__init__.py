"""Maps of phrases as DICOM objects beside their images: parametric maps, a segmentation, and a report that refers to both.

They stand in the study of the images that they were made of, pixel on pixel, and name each of them. Nothing is rounded, resampled or
compressed; equal input gives equal bytes: UIDs come from a hash of all that is written, and no clock is read. A phrase that was not found
has a map and a group in the report that says so, but no segment; where none was found there is no segmentation at all, as a segment
without a pixel is nothing that viewers expect. Of headers only patient, study and geometry are taken over, and none of it reaches an error
or a log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from modalities.export import save_dicom
from modalities.map_objects.findings import Algorithm, Box, MapFinding, check_findings, identity
from modalities.map_objects.frames import COSINE, NOTICE, PROBABILITY, float_pixels, parametric_map, segmentation
from modalities.map_objects.report import findings_report
from modalities.map_objects.sources import WHAT, read_source
from modalities.structured_report import UNDATED, import_highdicom, latest, unheard

__all__ = ["NOTICE", "Algorithm", "Box", "MapFinding", "MapObjects", "write_map_objects"]

SEGMENTATION_NAME, REPORT_NAME, MAP_SUFFIX = "segmentation.dcm", "findings.dcm", "_map.dcm"
MEASURES = {"cosine": COSINE, "probability": PROBABILITY}


@dataclass(frozen=True)
class MapObjects:
    """The files that were written."""

    maps: tuple[Path, ...]  # one parametric map for each finding, in their order
    segmentation: Path | None  # None where nothing was found
    report: Path


def write_map_objects(
    source: Path,
    findings: Sequence[MapFinding],
    folder: Path,
    *,
    affine: NDArray[np.float64] | None,
    algorithm: Algorithm,
    measure: Literal["cosine", "probability"] = "cosine",
    series: int | Literal["largest"] | None = "largest",
    written: datetime | None = None,
) -> MapObjects:
    """Write maps as ``SLUG_map.dcm``, the masks of what was found as ``segmentation.dcm``, and ``findings.dcm``, the report.

    Args:
        source: the DICOM file, folder or zip that the model read.
        findings: of one image, all of one shape.
        folder: is made if need be; files there are replaced, and a segmentation of an earlier run is removed where there is none now.
        affine: of a volume, (s, h, w) to RAS mm as the reader gives it; None for a radiograph.
        algorithm: the model.
        measure: what the numbers of the maps are.
        series: which CT series of a folder or zip with several, as the reader was told.
        written: date and time of the objects, as local as those of the images; None: the latest of the source's own, or, where it has
            none, ``modalities.structured_report.UNDATED``, which the report then says.
    Raises:
        ImportError: highdicom is not installed (extra ``sr``).
        ValueError: a source that is no DICOM or not the grid of the maps, or findings that do not fit together. Nothing is written then.
    """
    import_highdicom()
    shape = check_findings(findings, algorithm)
    images = read_source(source, shape, affine, series)
    known = latest(images.images)
    date = written.replace(microsecond=0, tzinfo=None) if written else known or UNDATED
    places = [f"{plane.image.SOPInstanceUID}/{plane.frame}" for plane in images.planes]
    numbers = () if affine is None else tuple(np.asarray(affine, dtype=np.float64).ravel().tolist())
    key = identity(places, findings, algorithm, measure, date.isoformat(), repr(numbers))
    found = [finding for finding in findings if finding.mask.any()]
    paths = tuple(folder / f"{finding.slug}{MAP_SUFFIX}" for finding in findings)
    with unheard(Path(source), WHAT):
        segments = segmentation(images, found, algorithm, date, key) if found else None
        maps = [parametric_map(images, one, i, MEASURES[measure], algorithm, date, key) for i, one in enumerate(findings, start=1)]
        numbered = {finding.slug: i for i, finding in enumerate(found, start=1)}
        dated = written is not None or known is not None
        report = findings_report(images, findings, affine, algorithm, maps, numbered, segments, date, dated, key)
        folder.mkdir(parents=True, exist_ok=True)
        for finding, ds, path in zip(findings, maps, paths, strict=True):  # the pixels of one map at a time
            ds.FloatPixelData = float_pixels(finding)
            save_dicom(ds, path)
            del ds.FloatPixelData
        if segments is None:
            (folder / SEGMENTATION_NAME).unlink(missing_ok=True)
        else:
            save_dicom(segments, folder / SEGMENTATION_NAME)
        save_dicom(report, folder / REPORT_NAME)
    return MapObjects(paths, None if segments is None else folder / SEGMENTATION_NAME, folder / REPORT_NAME)
