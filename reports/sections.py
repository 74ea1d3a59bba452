"""Sections of a radiology report: headings found, text between them assigned, nothing lost.

A report may have its headings on lines of their own, in the running text ("FINDINGS: ... IMPRESSION: ..."), in capitals or not, or none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

SectionName = Literal["exam", "indication", "technique", "comparison", "findings", "impression", "other"]

_HEADINGS: dict[SectionName, str] = {
    "exam": r"exam(?:ination)?|type of exam(?:ination)?|study|procedure",
    "indication": r"(?:clinical )?indications?|(?:clinical )?history|clinical (?:information|data|details|statement|question)"
    r"|reason for (?:the )?(?:exam(?:ination)?|study|this exam(?:ination)?)",
    "technique": r"techniques?|protocol",
    "comparison": r"comparisons?|comparison (?:study|studies|exams?|examinations?|date)|prior (?:study|studies|exams?)",
    "findings": r"findings?|findings? ?(?:and|&|/) ?impressions?|observations?|results?",
    "impression": r"impressions?|conclusions?|opinion|summary",
    "other": r"final report|wet read|addendum|recommendations?|notifications?|(?:electronically )?signed(?: by)?|attending(?: physician)?",
}
_ANY = "|".join(sorted((f"(?:{pattern})" for pattern in _HEADINGS.values()), key=len, reverse=True))
# A heading at the start of a line ends in a colon or is alone there; inside a line it has a colon, a capital, and a full stop (or the
# like) or nothing but capitals before the colon: "no prior study: ..." is running text.
_HEADING = re.compile(
    rf"(?:^|(?<=[\r\n]))[ \t]*[*#_]*(?P<line>(?i:{_ANY}))[*_]*[ \t]*(?::[*_]*|[ \t]*(?=\r|\n|\Z))"
    rf"|(?:(?<=[.?!;:)\]])|(?<=_))[ \t]+(?P<after>(?=[A-Z])(?i:{_ANY}))[ \t]*:"
    rf"|(?<=\s)(?P<capitals>(?=[A-Z][^a-z:]+:)(?i:{_ANY}))[ \t]*:",
)
_BLANK_LINE = re.compile(r"\n[ \t]*\r?\n")
_SHORT: frozenset[SectionName] = frozenset({"exam", "indication", "technique", "comparison"})


@dataclass(frozen=True)
class SectionSpan:
    """``text[start:body]`` is the heading (empty where none), ``text[body:end]`` what belongs to it. The spans of a report tile it."""

    name: SectionName
    start: int
    body: int
    end: int


@dataclass(frozen=True)
class Sections:
    """The text of each section, stripped at its ends, "" where absent; a section that comes twice is joined by a blank line."""

    exam: str = ""
    indication: str = ""
    technique: str = ""
    comparison: str = ""
    findings: str = ""
    impression: str = ""
    other: str = ""  # before the first heading, under a heading that is none of these, or headless after a short section

    @property
    def body(self) -> str:
        """What describes the image: findings and impression; where neither is headed, the text that has no heading."""
        return "\n\n".join(part for part in (self.findings, self.impression) if part) or self.other


def section_spans(text: str) -> tuple[SectionSpan, ...]:
    """Where each section of a report is.

    Indication, technique, comparison and exam end at a blank line: what follows without a heading is ``other`` (many reports put their
    findings there).
    """
    found: list[SectionSpan] = []
    headings = [(m.start(), m.end(), _section(m)) for m in _HEADING.finditer(text)]
    name: SectionName
    for (start, body, name), (end, *_) in zip([(0, 0, "other"), *headings], [*headings, (len(text), len(text), "other")], strict=True):
        content = body + len(text[body:end]) - len(text[body:end].lstrip())
        blank = _BLANK_LINE.search(text, content, end) if name in _SHORT else None
        if blank is not None:
            found += [SectionSpan(name, start, body, blank.start()), SectionSpan("other", blank.start(), blank.start(), end)]
        elif start < end:
            found.append(SectionSpan(name, start, body, end))
    return tuple(found)


def split_sections(report: str) -> Sections:
    """Split a report; never raises, whatever the text."""
    parts: dict[str, list[str]] = {}
    for span in section_spans(report):
        if part := report[span.body : span.end].strip():
            parts.setdefault(span.name, []).append(part)
    return Sections(**{name: "\n\n".join(texts) for name, texts in parts.items()})


def _section(match: re.Match[str]) -> SectionName:
    heading = (match["line"] or match["after"] or match["capitals"]).lower()
    return next(name for name, pattern in _HEADINGS.items() if re.fullmatch(pattern, heading))
