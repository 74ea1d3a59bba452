"""Reports as text: sections, sentences, prompts, synthetic reports and report towers. Knows no pixels.

Importing this package costs nothing heavy: the towers and torch are loaded when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reports.towers import HuggingFaceReportEncoder as HuggingFaceReportEncoder
    from reports.towers import Lora as Lora
    from reports.towers import MiniLmReportEncoder as MiniLmReportEncoder
    from reports.towers import OpenClipReportEncoder as OpenClipReportEncoder

__all__ = ["HuggingFaceReportEncoder", "Lora", "MiniLmReportEncoder", "OpenClipReportEncoder"]
_LAZY = dict.fromkeys(__all__, "reports.towers")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'reports' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
