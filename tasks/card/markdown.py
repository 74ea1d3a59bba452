"""Cells and tables of a card: whatever a file holds is shown as text, never taken as markup."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Table = list[tuple[str, ...]]


def as_figure(value: float | None) -> str:
    """A figure to three digits; a dash for one that is not defined."""
    return "–" if value is None else f"{value:.3f}"


def as_estimate(value: float | None, interval: Mapping[str, Any]) -> str:
    """A figure with the ends of its interval."""
    if value is None:
        return "–"
    ends = [interval.get(end) for end in ("ci_low", "ci_high")]
    return f"{value:.3f} ({' to '.join('?' if end is None else f'{end:.3f}' for end in ends)})"


def as_value(value: Any) -> str:
    """A value as JSON has it."""
    return as_code(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def as_fact(value: Any) -> str:
    """A value that a run or a result may have left out."""
    return "not stated" if value is None else as_value(value)


def as_code(text: Any) -> str:
    """As code, in which nothing is markup; what would end the cell or the code is replaced."""
    plain = " ".join(str(text).replace("`", "'").split())
    return f"`{plain}`".replace("|", "\\|") if plain else "``` ```"


def as_text(text: Any) -> str:
    """As text, with all that Markdown or HTML would take for markup escaped."""
    plain = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in plain)


def as_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
