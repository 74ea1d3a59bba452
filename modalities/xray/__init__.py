"""Radiographs: the reader and the towers. Nothing heavy is loaded until it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalities.xray.conv import ConvEncoder as ConvEncoder
    from modalities.xray.extended import ExtendedEncoder as ExtendedEncoder
    from modalities.xray.huggingface import HuggingFaceEncoder as HuggingFaceEncoder
    from modalities.xray.openclip import OpenClipEncoder as OpenClipEncoder
    from modalities.xray.reader import XrayReader as XrayReader
    from modalities.xray.towers import TimmEncoder as TimmEncoder
    from modalities.xray.views import ViewPooledEncoder as ViewPooledEncoder

_LAZY = {
    "ConvEncoder": "conv",
    "ExtendedEncoder": "extended",
    "HuggingFaceEncoder": "huggingface",
    "OpenClipEncoder": "openclip",
    "TimmEncoder": "towers",
    "ViewPooledEncoder": "views",
    "XrayReader": "reader",
}
__all__ = [
    "ConvEncoder",
    "ExtendedEncoder",
    "HuggingFaceEncoder",
    "OpenClipEncoder",
    "TimmEncoder",
    "ViewPooledEncoder",
    "XrayReader",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
