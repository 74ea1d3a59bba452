"""The page of a comparison: one HTML file that needs nothing else, with the table, what its columns mean, and a plot of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvl.metrics import Interval
from tasks.page.figures import write_figures

if TYPE_CHECKING:
    from tasks.comparison import Line

TITLES = {
    "auroc": "AUROC",
    "pointing": "Pointing game",
    "cnr": "CNR",
    "recall_at_10": "Recall@10",
    "negation": "Negation",
}
LEFT, RIGHT, STEP = 160, 540, 24
BEST, OTHER = "#0a5bff", "#59626d"


def write_comparison(path: Path, lines: Sequence[Line], base: str, facts: Mapping[str, Any], synthetic: bool) -> Path:
    """Write the page whole or not at all.

    Args:
        lines: at least none.
        base: the recipe that differences are from, in ``lines`` or, if it failed, not.
        facts: how it was made.
        synthetic: the studies are phantoms, which the page then says.
    """
    from tasks.comparison import METRICS, SHOWN

    shown = [m for m in SHOWN if any(m in line.metrics for line in lines)]
    page = {
        "synthetic": synthetic,
        "base": base,
        "compared": any(line.name == base for line in lines),
        "chosen": any(line.best for line in lines),
        "metrics": [{"title": TITLES[m], "words": METRICS[m]} for m in shown],
        "absolute": METRICS["cnr_absolute"],
        "rows": [_row(line, shown) for line in lines],
        "plots": [plot(TITLES[m], [(line.name, line.metrics[m], line.best) for line in lines if m in line.metrics]) for m in shown],
        "facts": dict(facts),
    }
    return write_figures(path, "comparison.html", page)


def _row(line: Line, shown: Sequence[str]) -> dict[str, Any]:
    return {
        "name": line.name,
        "seeds": line.seeds,
        "best": line.best,
        "cells": [_cell(line.metrics.get(m), line.difference.get(m), line.metrics.get(f"{m}_absolute")) for m in shown],
        "choice": _figure(line.choice),
        "training": "–" if math.isnan(line.training_seconds_per_1000) else f"{line.training_seconds_per_1000:.1f}",
        "seconds": f"{line.cpu_seconds_per_1000:.1f}",
        "memory": f"{line.peak_mb:.0f}",
        "parameters": f"{line.parameters / 1e6:.2f}",
    }


def _cell(value: Interval | None, difference: Interval | None, absolute: Interval | None) -> dict[str, str]:
    if value is None:
        return {"value": "–", "interval": "", "difference": "", "sign": "", "absolute": ""}
    shown = {"value": _figure(value.value), "interval": f"{_figure(value.ci_low)} to {_figure(value.ci_high)}"}
    shown["absolute"] = "" if absolute is None else f"absolute {_figure(absolute.value)}"
    if difference is None:
        return {**shown, "difference": "", "sign": ""}
    sign = "better" if difference.ci_low > 0 else "worse" if difference.ci_high < 0 else ""
    return {**shown, "difference": f"{difference.value:+.3f} ({difference.ci_low:+.3f} to {difference.ci_high:+.3f})", "sign": sign}


def plot(title: str, values: Sequence[tuple[str, Interval, bool]]) -> dict[str, Any]:
    """A dot and its interval for each recipe, in pixels."""
    ends = [end for _, one, _ in values for end in (one.ci_low, one.ci_high, one.value) if math.isfinite(end)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = max(high - low, 0.01) * 0.05
    low, high = low - room, high + room

    def at(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 1) if math.isfinite(value) else LEFT

    dots = [
        {
            "name": name,
            "y": 18 + STEP * i,
            "x": at(one.value),
            "low": at(one.ci_low),
            "high": at(one.ci_high),
            "colour": BEST if best else OTHER,
        }
        for i, (name, one, best) in enumerate(values)
    ]
    ticks = [{"x": at(low + (high - low) * share), "label": f"{low + (high - low) * share:.2f}"} for share in (0.1, 0.5, 0.9)]
    return {"title": title, "dots": dots, "ticks": ticks, "height": 40 + STEP * len(dots)}


def _figure(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
