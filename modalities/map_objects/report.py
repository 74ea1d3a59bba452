"""What was found of each phrase, as one Comprehensive 3D SR after TID 1500: a measurement group (TID 1501, extensible) for each phrase.

A group holds score, threshold, probability and whether the phrase was found; boxes and peak as coordinates; the map and the segment by
reference. Image coordinates are (column, row) with the top left corner of the top left pixel at (0, 0), so that its centre is (0.5, 0.5)
(PS3.3 C.18.6.1.1): a native index plus a half. Those in space are LPS mm: a voxel's centre, and of a box its eight corners, which hold
also where slices are tilted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvl.geometry import lps_to_ras
from modalities.map_objects.findings import Algorithm, Box, MapFinding, tracking_uid
from modalities.map_objects.frames import NOTICE
from modalities.map_objects.sources import MapSource, Plane
from modalities.structured_report import (
    NO,
    NO_DATE,
    NO_UNITS,
    YES,
    Concept,
    coded,
    private,
    report_content,
    report_document,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

DESCRIPTION = f"medvl phrase grounding: {NOTICE}"
SCORE = private("sr_map_score", "Score of the phrase in the image")
THRESHOLD = private("sr_threshold", "Threshold of the score")
PROBABILITY = private("sr_map_prob", "Calibrated probability of the phrase")
FOUND = private("sr_found", "Found above the threshold")
PRESENCE = private("sr_presence", "Presence by the threshold alone")
PRESENT, ABSENT = Concept("52101004", "SCT", "Present"), Concept("272519000", "SCT", "Absent")
"""PS3.16 CID 240."""
REGION = Concept("111030", "DCM", "Image Region")
PEAK = private("sr_peak", "Pixel of the highest similarity")
CORNERS = private("sr_box", "Corners of a box around a part above the threshold")
MAP = private("sr_map", "Similarity map")
SEGMENT = Concept("121191", "DCM", "Referenced Segment")
SOURCE = Concept("260753009", "SCT", "Source")
ITEMS = (
    ("model", private("sr_model", "Model")),
    ("weights", private("sr_weights", "Weights SHA-256, its beginning")),
    ("version", private("sr_version", "medvl version")),
)
"""Field of the algorithm -> what it is called in the report."""


def findings_report(
    source: MapSource,
    findings: Sequence[MapFinding],
    affine: NDArray[np.float64] | None,
    algorithm: Algorithm,
    maps: Sequence[Dataset],
    segments: Mapping[str, int],
    segmentation: Dataset | None,
    date: datetime,
    dated: bool,
    key: str,
) -> Dataset:
    """The report as a dataset.

    Args:
        source: the images.
        findings: a group each, in this order.
        affine: of a volume, (s, h, w) to RAS mm.
        algorithm: the observer.
        maps: of each finding its parametric map, of which UIDs are read.
        segments: slug -> number of its segment.
        segmentation: where those are.
        date: of the report.
        dated: False where no source has a date, which the report then says.
        key: of all that is written.
    """
    lps = None if affine is None else lps_to_ras(affine)
    groups = [
        _group(source, finding, lps, algorithm, one, segmentation if finding.slug in segments else None, segments.get(finding.slug), key)
        for finding, one in zip(findings, maps, strict=True)
    ]
    context: list[tuple[Concept, str | bool]] = [(term, getattr(algorithm, name)) for name, term in ITEMS]
    if not dated:
        context.append((NO_DATE, "not known: the source images name none"))
    content = report_content(source.images, groups, algorithm.device, context, NOTICE)
    evidence = [*source.images, *maps, *([] if segmentation is None else [segmentation])]
    report: Dataset = report_document(evidence, content, algorithm.device, DESCRIPTION, date, (key,))
    return report


def _group(
    source: MapSource,
    finding: MapFinding,
    lps: NDArray[np.float64] | None,
    algorithm: Algorithm,
    one: Dataset,
    segmentation: Dataset | None,
    segment: int | None,
    key: str,
) -> Any:
    """TID 1501 of one phrase, and behind its rows the regions, the peak and what is referred to."""
    from highdicom import sr

    numbers = ((SCORE, finding.score), (THRESHOLD, finding.threshold), (PROBABILITY, finding.probability))
    verdicts = ((FOUND, YES if finding.found else NO), (PRESENCE, PRESENT if finding.found else ABSENT))
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(tracking_uid(key, finding), finding.phrase),
        finding_type=coded(finding.term),
        algorithm_id=sr.AlgorithmIdentification(algorithm.model, algorithm.version, [f"weights sha256 {algorithm.weights}"]),
        measurements=[sr.Measurement(coded(name), float(number), coded(NO_UNITS)) for name, number in numbers if number is not None],
        qualitative_evaluations=None
        if finding.found is None
        else [sr.QualitativeEvaluation(coded(name), coded(value)) for name, value in verdicts],
    )
    items = group[0].ContentSequence
    if lps is None:
        items.extend(_on_film(source.planes[0], finding))
    else:
        items.extend(_in_space(source.frame_of_reference, finding, lps))
    items.append(_reference(MAP, one))
    if segmentation is not None:
        items.append(_reference(SEGMENT, segmentation, segment))
    return group


def _on_film(plane: Plane, finding: MapFinding) -> list[Any]:
    """Boxes as closed polylines, the peak as a point, both on the film."""
    shapes: list[tuple[Concept, str, NDArray[np.float64]]] = [(REGION, "POLYLINE", box_outline(box)) for box in finding.boxes]
    if finding.peak is not None:
        shapes.append((PEAK, "POINT", np.array([[finding.peak[1] + 0.5, finding.peak[0] + 0.5]])))
    return [_scoord(name, kind, points, plane) for name, kind, points in shapes]


def _scoord(name: Concept, kind: str, points: NDArray[np.float64], plane: Plane) -> Any:
    from highdicom.sr import ContentSequence, ImageContentItem, ScoordContentItem

    item = ScoordContentItem(coded(name), kind, points, relationship_type="CONTAINS")
    image = ImageContentItem(
        coded(SOURCE), plane.image.SOPClassUID, plane.image.SOPInstanceUID, plane.frame, relationship_type="SELECTED FROM"
    )
    item.ContentSequence = ContentSequence([image])
    return item


def _in_space(frame_of_reference: str, finding: MapFinding, lps: NDArray[np.float64]) -> list[Any]:
    """The corners of boxes and the peak in the patient."""
    from highdicom.sr import Scoord3DContentItem

    shapes = [(CORNERS, "MULTIPOINT", box_corners(box, lps)) for box in finding.boxes]
    if finding.peak is not None:
        shapes.append((PEAK, "POINT", (lps @ [*finding.peak, 1.0])[None, :3]))
    return [
        Scoord3DContentItem(coded(name), kind, points, frame_of_reference, relationship_type="CONTAINS") for name, kind, points in shapes
    ]


def box_outline(box: Box) -> NDArray[np.float64]:
    """(5, 2) column and row of the corners of a box on an image, from the top left clockwise and back to it."""
    (top, left), (bottom, right) = box
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return np.array(corners, dtype=np.float64) + 0.5


def box_corners(box: Box, lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """(8, 3) LPS mm of the corners of a box in a volume, the last axis changing fastest, low before high."""
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*zip(*box, strict=True))])
    found: NDArray[np.float64] = (corners @ lps.T)[:, :3]
    return found


def _reference(name: Concept, instance: Dataset, segment: int | None = None) -> Any:
    from highdicom.sr import ImageContentItem

    return ImageContentItem(
        coded(name),
        instance.SOPClassUID,
        instance.SOPInstanceUID,
        referenced_segment_numbers=segment,
        relationship_type="CONTAINS",
    )
