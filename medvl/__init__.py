"""medvl: image and report encoders for medical imaging, aligned under multi-positive contrastive losses.

Importing this package costs nothing heavy: what needs torch is loaded when it is first asked for. Research use, not for diagnosis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvl.model import DualEncoder as DualEncoder
    from medvl.model import load as load

__version__ = "0.1.0"
_LAZY = {"load": "medvl.model", "DualEncoder": "medvl.model"}
__all__ = ["DualEncoder", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'medvl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
