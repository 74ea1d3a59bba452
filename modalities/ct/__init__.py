"""CT: volumes in HU with their affine, from DICOM series, NIfTI, MHA and NRRD. Nothing heavy is loaded until it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalities.ct.hu import HuVerdict as HuVerdict
    from modalities.ct.hu import hu_verdict as hu_verdict
    from modalities.ct.hu import rescale_from_metadata as rescale_from_metadata
    from modalities.ct.itk import read_itk as read_itk
    from modalities.ct.nifti import read_nifti as read_nifti
    from modalities.ct.read import read_ct as read_ct
    from modalities.ct.series import Series as Series
    from modalities.ct.series import find_series as find_series
    from modalities.ct.series import read_series as read_series
    from modalities.ct.volume import CtVolume as CtVolume
    from modalities.ct.volume import closest_ras as closest_ras
    from modalities.ct.volume import value_sha256 as value_sha256

_LAZY = {
    "CtVolume": "volume",
    "HuVerdict": "hu",
    "Series": "series",
    "closest_ras": "volume",
    "find_series": "series",
    "hu_verdict": "hu",
    "read_ct": "read",
    "read_itk": "itk",
    "read_nifti": "nifti",
    "read_series": "series",
    "rescale_from_metadata": "hu",
    "value_sha256": "volume",
}
__all__ = [
    "CtVolume",
    "HuVerdict",
    "Series",
    "closest_ras",
    "find_series",
    "hu_verdict",
    "read_ct",
    "read_itk",
    "read_nifti",
    "read_series",
    "rescale_from_metadata",
    "value_sha256",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
