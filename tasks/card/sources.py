"""Does every figure of a card come from a file that a task wrote?

Tables of results and probes are made again from results.json and probes.json, and each line of the card's own must be among them, to the
letter. Text that a person wrote (what a card says of data, use and failures) may have any number but a share: a decimal fraction or a
percentage there is a claim about how well the model does, and must be a figure of one of the files, rounded as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

MEASURED = ("## Results", "## Probes")
"""Sections whose every line is made of files."""
_SHARE = re.compile(r"(?<![\w.])[-+]?(\d*\.\d+|\d+(?:\.\d+)?(?=\s?%))(?![\w]|\.\d)")
_IS_FIGURE = re.compile(r"\d")


class Unsourced(NamedTuple):
    """A figure that none of the files has."""

    line: int  # of the card, from 1
    text: str


def unsourced_lines(card: str, made: Iterable[str]) -> Iterator[Unsourced]:
    """Lines with a number, in the sections of ``MEASURED``, that are not among the lines made of the files."""
    known = {line.strip() for part in made for line in part.splitlines()}
    inside = False
    for number, line in enumerate(card.splitlines(), start=1):
        if line.startswith("## "):
            inside = line.strip() in MEASURED
        if inside and _IS_FIGURE.search(line) and line.strip() not in known:
            yield Unsourced(number, line.strip())


def unsourced_shares(text: str, sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Decimal fractions and percentages of a person's text that are no figure of the sources as it is rounded there."""
    figures = [value for source in sources for value in _numbers(source)]
    return [found[0].strip() for found in _SHARE.finditer(text) if not _is_one(found, figures)]


def _is_one(found: re.Match[str], figures: Sequence[float]) -> bool:
    digits = len(found[1].partition(".")[2])
    percent = found.string[found.end() :].lstrip().startswith("%")
    value = abs(float(found[1]))
    return any(f"{abs(figure) * (100 if percent else 1):.{digits}f}" == f"{value:.{digits}f}" for figure in figures)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)
