"""DICOM images: one frame from file to values with a unit, and to the picture a person would be shown.

The chain is PS3.4 N.2: stored values -> modality LUT or rescale -> VOI (LUT, else window, else the image's own range) -> inversion of
MONOCHROME1 -> 0..1. Overlays are not drawn. What was guessed or dropped on the way stands in ``warnings``. Nothing from a header that
could identify a patient leaves this package: messages name the given path, the SOP class, shapes and formats only.

``file`` opens and parses within bounds, ``pixels`` decodes, ``luts`` holds the arithmetic, ``image`` puts them together.
"""

from modalities.dicom.file import has_dicom_magic, modality_of, study_key
from modalities.dicom.image import (
    DicomImage,
    FittedRadiograph,
    NativeRadiograph,
    fit_radiograph,
    read_dicom,
    read_radiograph,
    show,
)
from modalities.dicom.luts import Range, Voi, VoiLut, Window, luminance, robust_range
from modalities.dicom.stated import Stated, stated

__all__ = [
    "DicomImage",
    "FittedRadiograph",
    "NativeRadiograph",
    "Range",
    "Stated",
    "Voi",
    "VoiLut",
    "Window",
    "fit_radiograph",
    "has_dicom_magic",
    "luminance",
    "modality_of",
    "read_dicom",
    "read_radiograph",
    "robust_range",
    "show",
    "stated",
    "study_key",
]
