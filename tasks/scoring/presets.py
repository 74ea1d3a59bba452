"""Published rules by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from tasks.scoring.rules import Rule


def preset(name: str) -> Rule:
    """A rule by name.

    Raises:
        KeyError: no such preset; the message lists all.
    """
    if name not in _presets():
        raise KeyError(f"no scoring preset {name}; known are {', '.join(_presets())}")
    return _presets()[name]


def preset_names() -> tuple[str, ...]:
    """The presets that come with the package."""
    return tuple(_presets())


@cache
def _presets() -> Mapping[str, Rule]:
    content = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
    return {name: Rule(name, **entry) for name, entry in content["presets"].items()}
