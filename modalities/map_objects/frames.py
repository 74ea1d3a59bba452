"""Multi-frame objects on the planes of a source: Parametric Map (PS3.3 A.75) and binary Segmentation (A.51), by pydicom alone.

highdicom (0.28) cannot make a parametric map of an image without ImagePositionPatient, as radiographs are, so both are made here and read
back by it. The map of a film has a Frame of Reference of its own, as the IOD calls for one and a film has no place in the patient: origin
at the first pixel, axes as Patient Orientation names them, so that viewers label the sides as they do for the film. Where that is not known
no side is made up: the items for plane position and orientation, which only ORIGINAL frames have to fill (C.7.6.16.2.3), are empty.
Segmentations of
films have no Frame of Reference; each pixel lies on that of the image they name (A.51.5.1).

Pixels that the tower did not look at are NaN, as in the array, and Float Pixel Padding Value and its limit say that NaN is padding: any
IEEE 754 value will do there, NaN too (C.7.6.24.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from medvl.types import RESEARCH_USE
from modalities.export import uid
from modalities.map_objects.findings import Algorithm, MapFinding, tracking_uid
from modalities.map_objects.sources import MapSource, Plane
from modalities.structured_report import (
    NO_UNITS,
    PATIENT_AND_STUDY,
    SERIES_NUMBER,
    Concept,
    date_and_time,
    one_line,
    private,
    private_scheme,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PARAMETRIC_MAP, SEGMENTATION = "1.2.840.10008.5.1.4.1.1.30", "1.2.840.10008.5.1.4.1.1.66.4"
NOTICE = RESEARCH_USE
COSINE = private("map_cosine", "Cosine similarity of image and phrase")
PROBABILITY = private("map_probability", "Calibrated probability")
RANGES = {COSINE: (-1.0, 1.0), PROBABILITY: (0.0, 1.0)}
QUANTITY = Concept("246205007", "SCT", "Quantity")
SOURCE_IMAGE = Concept("121322", "DCM", "Source image for image processing operation")
CALCULATED, SEGMENTED = Concept("112187", "DCM", "Unspecified method of calculation"), Concept("113076", "DCM", "Segmentation")
ARTIFICIAL_INTELLIGENCE = Concept("123109", "DCM", "Artificial Intelligence")
THORAX, BODY = Concept("816094009", "SCT", "Thorax"), Concept("38266002", "SCT", "Entire body")
ABNORMAL = Concept("49755003", "SCT", "Morphologically Abnormal Structure")
SPATIAL = Concept("309825002", "SCT", "Spatial and Relational Concept")
LONGEST_SHORT_TEXT = 1024
POSITION, SEGMENT, IN_STACK = (0x00200032, 0x00209113), (0x0062000B, 0x0062000A), (0x00209057, 0x00209111)
"""Dimension Index Pointer and Functional Group Pointer."""


def parametric_map(
    source: MapSource, finding: MapFinding, number: int, measure: Concept, algorithm: Algorithm, date: datetime, key: str
) -> Dataset:
    """The map of one phrase, without its :func:`float_pixels`; ``number`` of the instance in its series, from 1."""
    ds = _object(source, PARAMETRIC_MAP, "OT", "similarity maps", number, algorithm, date, key, finding.slug)
    ds.ImageType = ["DERIVED", "PRIMARY", "STATIC" if source.film else "VOLUME", "QUANTITY"]
    ds.SeriesNumber = SERIES_NUMBER + 1
    ds.ContentQualification, ds.ContentLabel = "RESEARCH", "SIMILARITY_MAP"
    ds.ContentDescription, ds.ContentCreatorName = one_line(finding.phrase), ""
    ds.AcquisitionContextSequence = []
    ds.BurnedInAnnotation, ds.RecognizableVisualFeatures = "NO", "NO"
    ds.PixelPresentation = "MONOCHROME"
    ds.BitsAllocated = 32
    ds.FloatPixelPaddingValue = ds.FloatPixelPaddingRangeLimit = float("nan")
    planes = [(plane,) for plane in source.planes]
    shared = _functional_groups(ds, source, planes, [POSITION if source.orientation else IN_STACK], CALCULATED)
    shared.FrameAnatomySequence = [_dataset(FrameLaterality="U", AnatomicRegionSequence=[_code(THORAX if source.chest else BODY)])]
    shared.PixelValueTransformationSequence = [_dataset(RescaleIntercept=0, RescaleSlope=1, RescaleType="US")]
    known = finding.scores[np.isfinite(finding.scores)]
    low, high = (float(known.min()), float(known.max())) if known.size else RANGES[measure]
    window = _dataset(WindowCenter=_decimal((low + high) / 2), WindowWidth=_decimal(max(high - low, 1e-6)), VOILUTFunction="LINEAR_EXACT")
    shared.FrameVOILUTSequence = [window]
    quantity = _dataset(ValueType="CODE", ConceptNameCodeSequence=[_code(QUANTITY)], ConceptCodeSequence=[_code(measure)])
    mapping = _dataset(
        RealWorldValueSlope=1.0,
        RealWorldValueIntercept=0.0,
        DoubleFloatRealWorldValueFirstValueMapped=min(low, RANGES[measure][0]),
        DoubleFloatRealWorldValueLastValueMapped=max(high, RANGES[measure][1]),
        LUTLabel=measure.code.removeprefix("map_"),
        LUTExplanation=measure.meaning,
        MeasurementUnitsCodeSequence=[_code(NO_UNITS)],
        QuantityDefinitionSequence=[quantity],
    )
    shared.RealWorldValueMappingSequence = [mapping]
    shared.ParametricMapFrameTypeSequence = [_dataset(FrameType=list(ds.ImageType))]
    return ds


def float_pixels(finding: MapFinding) -> bytes:
    """Float Pixel Data of a map, plane by plane."""
    return np.ascontiguousarray(finding.scores, dtype="<f4").tobytes()


def segmentation(source: MapSource, findings: Sequence[MapFinding], algorithm: Algorithm, date: datetime, key: str) -> Dataset:
    """The masks of phrases, none of them empty, a segment each; planes where a segment has no pixel are left out."""
    ds = _object(source, SEGMENTATION, "SEG", "segmentation", 1, algorithm, date, key, "segmentation")
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.SeriesNumber = SERIES_NUMBER + 2
    ds.ContentLabel, ds.ContentDescription, ds.ContentCreatorName = "SEGMENTATION", "Parts above the thresholds of phrases", ""
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, 1, 0, 0
    ds.SegmentationType = "BINARY"
    masks = [finding.mask.reshape(len(source.planes), *source.shape) for finding in findings]
    ds.SegmentsOverlap = "YES" if len(masks) > 1 and (np.sum(masks, axis=0, dtype=np.uint16) > 1).any() else "NO"
    ds.SegmentSequence = [_segment(i, finding, algorithm, key) for i, finding in enumerate(findings, start=1)]
    kept = [(i, k) for i, mask in enumerate(masks) for k in np.flatnonzero(mask.any(axis=(1, 2))).tolist()]
    planes = [(source.planes[k], i + 1) for i, k in kept]
    _functional_groups(ds, source, planes, [SEGMENT, *([] if source.film else [POSITION])], SEGMENTED)
    if source.film and source.aspect is not None and source.spacing is None:  # not beside Pixel Measures, which maps must have
        ds.PixelAspectRatio = list(source.aspect)
    for item, (_, number) in zip(ds.PerFrameFunctionalGroupsSequence, planes, strict=True):
        item.SegmentIdentificationSequence = [_dataset(ReferencedSegmentNumber=number)]
    bits = np.packbits(np.concatenate([masks[i][k].ravel() for i, k in kept]), bitorder="little").tobytes()
    ds.PixelData = bits + b"\0" * (len(bits) % 2)
    return ds


def _segment(number: int, finding: MapFinding, algorithm: Algorithm, key: str) -> Dataset:
    """Of the Segment Sequence (PS3.3 C.8.20.2)."""
    settings = [f"weights sha256 {algorithm.weights}", *([] if finding.threshold is None else [f"threshold {finding.threshold:.9g}"])]
    identification = _dataset(
        AlgorithmFamilyCodeSequence=[_code(ARTIFICIAL_INTELLIGENCE)],
        AlgorithmName=one_line(f"{algorithm.device.name}, model {algorithm.model}"),
        AlgorithmVersion=one_line(algorithm.version),
        AlgorithmParameters="; ".join(settings),
        AlgorithmSource=algorithm.device.name,
    )
    return _dataset(
        SegmentNumber=number,
        SegmentLabel=one_line(finding.phrase),
        SegmentDescription=one_line(finding.phrase, LONGEST_SHORT_TEXT),
        SegmentAlgorithmType="AUTOMATIC",
        SegmentAlgorithmName=one_line(f"{algorithm.device.name}, model {algorithm.model}"),
        SegmentationAlgorithmIdentificationSequence=[identification],
        SegmentedPropertyCategoryCodeSequence=[_code(SPATIAL if finding.term.scheme != "SCT" else ABNORMAL)],
        SegmentedPropertyTypeCodeSequence=[_code(finding.term)],
        TrackingID=_printable(finding.phrase),
        TrackingUID=tracking_uid(key, finding),
    )


def _object(
    source: MapSource,
    sop_class: str,
    modality: str,
    what: str,
    number: int,
    algorithm: Algorithm,
    date: datetime,
    key: str,
    name: str,
) -> Dataset:
    """Patient, study, series, equipment, frame of reference and SOP modules, and the attributes of an image that both objects share."""
    device, image = algorithm.device, source.planes[0].image
    ds = _dataset(SpecificCharacterSet="ISO_IR 192", SOPClassUID=sop_class, SOPInstanceUID=uid(key, what, name))
    for keyword in PATIENT_AND_STUDY:
        if keyword in image:
            ds[keyword] = image[keyword]
    ds.Modality, ds.SeriesInstanceUID, ds.InstanceNumber = modality, uid(key, what, "series"), number
    ds.SeriesDescription = f"medvl {what}: {NOTICE}"
    ds.Manufacturer, ds.ManufacturerModelName = device.name, one_line(device.model)
    ds.SoftwareVersions = ds.DeviceSerialNumber = one_line(device.version)
    ds.ContentDate, ds.ContentTime = ds.InstanceCreationDate, ds.InstanceCreationTime = date_and_time(date)
    if source.film:
        ds.PatientOrientation = source.patient_orientation.split("\\") if source.patient_orientation else ""
    ds.DerivationDescription = one_line(
        f"medvl {device.version}, model {device.model}, weights sha256 {algorithm.weights}; {NOTICE}", LONGEST_SHORT_TEXT
    )
    ds.ImageComments = NOTICE
    for keyword, value in source.lossy.items():
        setattr(ds, keyword, value)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PresentationLUTShape = 1, "MONOCHROME2", "IDENTITY"
    ds.Rows, ds.Columns = source.shape
    ds.CodingSchemeIdentificationSequence = [private_scheme(device)]
    instances = [_dataset(ReferencedSOPClassUID=one.SOPClassUID, ReferencedSOPInstanceUID=one.SOPInstanceUID) for one in source.images]
    ds.ReferencedSeriesSequence = [_dataset(SeriesInstanceUID=image.SeriesInstanceUID, ReferencedInstanceSequence=instances)]
    return ds


def _functional_groups(
    ds: Dataset, source: MapSource, frames: Sequence[tuple[Any, ...]], dimensions: Sequence[tuple[int, int]], derivation: Concept
) -> Dataset:
    """Dimensions, shared and per-frame functional groups; the shared ones are returned.

    Args:
        ds: what they are of.
        source: the planes.
        frames: (plane, segment number if any) of each frame, in order.
        dimensions: pointers; a frame's place among the positions, among the segments, or in the stack.
        derivation: how a frame came of its plane.
    """
    organization = uid(str(ds.SOPInstanceUID), "dimensions")
    ds.DimensionOrganizationSequence = [_dataset(DimensionOrganizationUID=organization)]
    ds.DimensionIndexSequence = [
        _dataset(DimensionOrganizationUID=organization, DimensionIndexPointer=pointer, FunctionalGroupPointer=group)
        for pointer, group in dimensions
    ]
    ds.NumberOfFrames = len(frames)
    placed = not source.film or ds.SOPClassUID == PARAMETRIC_MAP
    shared = _dataset()
    if placed:
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = source.frame_of_reference, ""
        shared.PixelMeasuresSequence = [_measures(source)]
        orientation = {} if source.orientation is None else {"ImageOrientationPatient": [_decimal(part) for part in source.orientation]}
        shared.PlaneOrientationSequence = [_dataset(**orientation)]
    used = {id(plane) for plane, *_ in frames}
    place = {id(plane): i for i, plane in enumerate((plane for plane in source.planes if id(plane) in used), start=1)}
    groups = []
    for plane, *segment in frames:
        index = [segment[0] if pointer == SEGMENT else place[id(plane)] for pointer in dimensions]
        content = _dataset(DimensionIndexValues=index, StackID="1", InStackPositionNumber=place[id(plane)])
        group = _dataset(FrameContentSequence=[content], DerivationImageSequence=[_derivation(plane, derivation)])
        if placed:
            position = {} if plane.position is None else {"ImagePositionPatient": [_decimal(part) for part in plane.position]}
            group.PlanePositionSequence = [_dataset(**position)]
        groups.append(group)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], groups
    return shared


def _measures(source: MapSource) -> Dataset:
    """Of the Pixel Measures Sequence (PS3.3 C.7.6.16.2.1); without a spacing where nobody knows it."""
    measures = _dataset()
    if source.spacing is not None:
        measures.PixelSpacing = [_decimal(step) for step in source.spacing]
    if source.thickness is not None:
        measures.SliceThickness = _decimal(source.thickness)
    if source.between is not None:
        measures.SpacingBetweenSlices = _decimal(source.between)
    return measures


def _derivation(plane: Plane, how: Concept) -> Dataset:
    """The pixels of a frame lie exactly on those of its plane."""
    image = _dataset(
        ReferencedSOPClassUID=plane.image.SOPClassUID,
        ReferencedSOPInstanceUID=plane.image.SOPInstanceUID,
        SpatialLocationsPreserved="YES",
        PurposeOfReferenceCodeSequence=[_code(SOURCE_IMAGE)],
    )
    if plane.frame is not None:
        image.ReferencedFrameNumber = plane.frame
    return _dataset(SourceImageSequence=[image], DerivationCodeSequence=[_code(how)])


def _dataset(**elements: Any) -> Dataset:
    from pydicom.dataset import Dataset

    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def _code(term: Concept) -> Dataset:
    """A code sequence item; a value of more than 16 characters is a long one (PS3.3 8.8)."""
    value = {"CodeValue" if len(term.code) <= 16 else "LongCodeValue": term.code}
    return _dataset(**value, CodingSchemeDesignator=term.scheme, CodeMeaning=term.meaning)


def _decimal(value: float) -> str:
    """A decimal string with as many digits as it holds."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value))


def _printable(text: str) -> str:
    """On one line, of any length."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
