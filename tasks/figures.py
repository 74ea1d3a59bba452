"""How figures stand in results.json: a bare number under its name, NaN as null, and its interval beside it."""

from __future__ import annotations

import math
from typing import Any

from medvl.metrics import Interval


def number(value: float) -> float | None:
    """A figure for JSON, null where it is not defined."""
    return float(value) if math.isfinite(value) else None


def interval_of(interval: Interval) -> dict[str, Any]:
    """Ends and n, and how many have the finding where that is told."""
    found: dict[str, Any] = {"ci_low": number(interval.ci_low), "ci_high": number(interval.ci_high), "n": interval.n}
    return found if interval.n_positive is None else {**found, "n_positive": interval.n_positive}


def estimate(name: str, interval: Interval, **more: float | None) -> dict[str, Any]:
    """The figure under ``name`` and its interval under ``name``_interval, with ``more`` figures such as chance; None is left out."""
    beside = {key: number(value) for key, value in more.items() if value is not None}
    return {name: number(interval.value), f"{name}_interval": {**interval_of(interval), **beside}}
