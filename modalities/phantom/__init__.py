"""Thorax phantoms: parametric chests in HU with known findings, and their radiographs. Everything made here is synthetic."""

from modalities.phantom.anatomy import Anatomy, sample_anatomy
from modalities.phantom.chest import Phantom, sample_phantom
from modalities.phantom.findings import sample_findings
from modalities.phantom.radiograph import Geometry, Radiograph, line_integral, project, sample_geometry

__all__ = [
    "Anatomy",
    "Geometry",
    "Phantom",
    "Radiograph",
    "line_integral",
    "project",
    "sample_anatomy",
    "sample_findings",
    "sample_geometry",
    "sample_phantom",
]
