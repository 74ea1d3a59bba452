"""Annotations that grounding is measured on, from the files of public data sets and from a table of one's own.

Each format has a reader, which says in its docstring what the files hold and where that is known from. All give the same: annotations,
a phrase of an image with its regions, and the rows that were left out with the reason. :func:`cases` makes of them what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from tasks.annotations.boxed import read_chestx_det10, read_chestxray_14, read_ms_cxr, read_padchest_gr, read_rsna, read_vindr_cxr
from tasks.annotations.cases import GroundingCase, agreed, cases
from tasks.annotations.files import FileMask, ImageFiles, find_images
from tasks.annotations.outlined import read_chexlocalize, read_object_cxr, read_siim
from tasks.annotations.plain import read_plain
from tasks.annotations.records import Annotation, AnnotationError, AnnotationSet, Rejected
from tasks.annotations.rexgrounding_ct import read_rexgrounding_ct

__all__ = [
    "FORMATS",
    "Annotation",
    "AnnotationError",
    "AnnotationSet",
    "FileMask",
    "GroundingCase",
    "ImageFiles",
    "Rejected",
    "agreed",
    "cases",
    "find_images",
    "read_annotations",
    "read_chestx_det10",
    "read_chestxray_14",
    "read_chexlocalize",
    "read_ms_cxr",
    "read_object_cxr",
    "read_padchest_gr",
    "read_plain",
    "read_rexgrounding_ct",
    "read_rsna",
    "read_siim",
    "read_vindr_cxr",
]

FORMATS: Mapping[str, Callable[[str | Path], AnnotationSet]] = MappingProxyType(
    {
        "plain": read_plain,
        "ms_cxr": read_ms_cxr,
        "chestx_det10": read_chestx_det10,
        "rsna": read_rsna,
        "vindr_cxr": read_vindr_cxr,
        "chestxray_14": read_chestxray_14,
        "padchest_gr": read_padchest_gr,
        "siim": read_siim,
        "object_cxr": read_object_cxr,
        "chexlocalize": read_chexlocalize,
        "rexgrounding_ct": read_rexgrounding_ct,
    }
)
"""Formats by name."""


def read_annotations(format: str, path: str | Path) -> AnnotationSet:  # noqa: A002 (the word of the field)
    """Read a file of annotations; bad rows are left out and listed.

    Raises:
        AnnotationError: no such format, or a file that cannot be read as it.
    """
    if format not in FORMATS:
        raise AnnotationError(f"no annotation format {format}; known are {', '.join(FORMATS)}")
    return FORMATS[format](path)
