"""Pages of tables and plots: one HTML file each that needs nothing else, all in one style."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvl.files import write_atomically
from medvl.types import RESEARCH_USE


def write_figures(path: Path, template: str, page: Mapping[str, Any]) -> Path:
    """Fill a template of this folder with ``page``, the notice and the style, everything escaped; whole or not at all."""
    from jinja2 import Environment, StrictUndefined

    here = Path(__file__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made = environment.from_string(here.with_name(template).read_text(encoding="utf-8"))
    style = here.with_name("figures.css").read_text(encoding="utf-8")
    notice = RESEARCH_USE[:1].upper() + RESEARCH_USE[1:]
    write_atomically(path, made.render(page={**page, "notice": notice}, style=style).encode())
    return path
