"""CT: volumes in HU with their affine from DICOM series, NIfTI, MHA and NRRD; the reader and the towers. Nothing heavy is loaded early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalities.ct.assembly import read_series as read_series
    from modalities.ct.hu import HuVerdict as HuVerdict
    from modalities.ct.hu import hu_verdict as hu_verdict
    from modalities.ct.hu import rescale_from_metadata as rescale_from_metadata
    from modalities.ct.itk import read_itk as read_itk
    from modalities.ct.mask import read_mask as read_mask
    from modalities.ct.nifti import read_nifti as read_nifti
    from modalities.ct.pooling import AttentionAdapter as AttentionAdapter
    from modalities.ct.pooling import GatedAttention as GatedAttention
    from modalities.ct.pooling import MaxPooling as MaxPooling
    from modalities.ct.pooling import MeanPooling as MeanPooling
    from modalities.ct.pooling import TransformerPooling as TransformerPooling
    from modalities.ct.read import read_ct as read_ct
    from modalities.ct.reader import CtReader as CtReader
    from modalities.ct.runs import Series as Series
    from modalities.ct.series import find_series as find_series
    from modalities.ct.slices import SlicePooledEncoder as SlicePooledEncoder
    from modalities.ct.studies import SeriesPooledEncoder as SeriesPooledEncoder
    from modalities.ct.volume import CtVolume as CtVolume
    from modalities.ct.volume import closest_ras as closest_ras
    from modalities.ct.volume import value_sha256 as value_sha256
    from modalities.ct.volumes import InflatedEncoder as InflatedEncoder
    from modalities.ct.volumes import MonaiVitEncoder as MonaiVitEncoder
    from modalities.ct.volumes import ResNet3dEncoder as ResNet3dEncoder

_LAZY = {
    "AttentionAdapter": "pooling",
    "CtReader": "reader",
    "CtVolume": "volume",
    "GatedAttention": "pooling",
    "HuVerdict": "hu",
    "InflatedEncoder": "volumes",
    "MaxPooling": "pooling",
    "MeanPooling": "pooling",
    "MonaiVitEncoder": "volumes",
    "ResNet3dEncoder": "volumes",
    "Series": "runs",
    "SeriesPooledEncoder": "studies",
    "SlicePooledEncoder": "slices",
    "TransformerPooling": "pooling",
    "closest_ras": "volume",
    "find_series": "series",
    "hu_verdict": "hu",
    "read_ct": "read",
    "read_itk": "itk",
    "read_mask": "mask",
    "read_nifti": "nifti",
    "read_series": "assembly",
    "rescale_from_metadata": "hu",
    "value_sha256": "volume",
}
__all__ = [
    "AttentionAdapter",
    "CtReader",
    "CtVolume",
    "GatedAttention",
    "HuVerdict",
    "InflatedEncoder",
    "MaxPooling",
    "MeanPooling",
    "MonaiVitEncoder",
    "ResNet3dEncoder",
    "Series",
    "SeriesPooledEncoder",
    "SlicePooledEncoder",
    "TransformerPooling",
    "closest_ras",
    "find_series",
    "hu_verdict",
    "read_ct",
    "read_itk",
    "read_mask",
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
