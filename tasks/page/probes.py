"""The page of a model's probes: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvl.metrics import Interval
from tasks.page.figures import write_figures

if TYPE_CHECKING:
    from tasks.probes import Probe

WIDTH, HEIGHT, LEFT, BOTTOM = 260, 150, 36, 24


def write_probes(path: Path, probes: Sequence[Probe], facts: Mapping[str, Any]) -> Path:
    """Write the page whole or not at all.

    Args:
        facts: how it was made.
    """
    corrupted = [one for one in probes if one.probe == "corruption"]
    plain = next((one for one in corrupted if one.name == "none"), None)
    names = list(dict.fromkeys(one.name for one in corrupted if one.name != "none"))
    drawn = [value for one in corrupted for value in (one.figure.value, one.figure.ci_low) if math.isfinite(value)]
    lowest = 0.4 if min(drawn, default=0.4) >= 0.4 else 0.0  # of all curves alike
    curves = [] if plain is None else [_curve(name, plain, [one for one in corrupted if one.name == name], lowest) for name in names]
    page = {
        "negation": _table([one for one in probes if one.probe == "negation"]),
        "wording": _spread([one for one in probes if one.probe == "wording"]),
        "laterality": _table([one for one in probes if one.probe == "laterality"]),
        "severity": _table([one for one in probes if one.probe == "severity"]),
        "orientation": [(one.setting, _cell(one.figure)) for one in probes if one.probe == "orientation"],
        "curves": curves,
        "facts": dict(facts),
    }
    return write_figures(path, "probes.html", page)


def _table(probes: Sequence[Probe]) -> dict[str, Any]:
    """A line a finding, a column a setting."""
    settings = list(dict.fromkeys(one.setting for one in probes))
    names = list(dict.fromkeys(one.name for one in probes))
    cells = {(one.name, one.setting): _cell(one.figure) for one in probes}
    empty = {"value": "–", "interval": "", "n": ""}
    return {"settings": settings, "rows": [{"name": name, "cells": [cells.get((name, s), empty) for s in settings]} for name in names]}


def _spread(probes: Sequence[Probe]) -> list[dict[str, str]]:
    """Of each finding its worst and its best prompt."""
    found = []
    for name in dict.fromkeys(one.name for one in probes):
        values = [one.figure.value for one in probes if one.name == name]
        found.append({"name": name, "prompts": str(len(values)), "worst": _number(min(values)), "best": _number(max(values))})
    return found


def _cell(figure: Interval) -> dict[str, str]:
    known = math.isfinite(figure.value)
    ends = f"{_number(figure.ci_low)} to {_number(figure.ci_high)}" if known else ""
    return {"value": _number(figure.value), "interval": ends, "n": str(figure.n)}


def _curve(name: str, plain: Probe, probes: Sequence[Probe], lowest: float) -> dict[str, Any]:
    """AUROC over severity in pixels, from ``lowest`` to 1, with intervals; 0 is the untouched film."""

    def at(severity: int, value: float) -> tuple[float, float]:
        x = LEFT + severity * (WIDTH - LEFT - 10) / 5
        y = (HEIGHT - BOTTOM - 8) * (1 - (value - lowest) / (1 - lowest)) + 12  # room for the label of 1
        return round(x, 1), round(y, 1)

    points = [(0, plain.figure), *((int(one.setting), one.figure) for one in probes)]
    points = [(severity, one) for severity, one in points if math.isfinite(one.value)]
    dots = []
    for severity, one in points:
        x, y = at(severity, one.value)
        ends = [at(severity, end)[1] if math.isfinite(end) else y for end in (one.ci_low, one.ci_high)]
        dots.append({"x": x, "y": y, "low": ends[0], "high": ends[1], "title": f"severity {severity}: {_number(one.value)}"})
    grid = [{"y": at(0, value)[1], "label": f"{value:.1f}"} for value in ((0.5, 0.7, 0.9) if lowest else (0.0, 0.5, 1.0))]
    return {"name": name, "dots": dots, "line": " ".join(f"{dot['x']},{dot['y']}" for dot in dots), "grid": grid}


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
