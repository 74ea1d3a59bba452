"""Facts of a report by lexicon: which finding each sentence names, in which state, where, how large, and whether it changed.

No model and no network: phrases, cues and rules that a person can read and edit (:mod:`reports.facts.lexicon`). On how far to trust it, see
``tests/benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from medvl.types import Fact, Side, State
from reports.facts.assertion import Assertions, Stated
from reports.facts.lexicon import Attribute, Naming, load_lexicon
from reports.facts.phrases import Match, Words, longest, words_of
from reports.facts.statements import Change, FactSource, StatedSentence, Statement
from reports.sections import SectionName, section_spans
from reports.sentences import sentence_spans, split_sentences

_SIZE = re.compile(
    r"(?<![\w.])(?P<first>\d+(?:[.,]\d+)?)(?P<more>(?:\s*(?:mm|cm)?\s*(?:x|×|by|-|to|and)\s*\d+(?:[.,]\d+)?){0,2})\s*-?(?P<unit>mm|cm|millimet|centimet)",
    re.IGNORECASE,
)
_CLAUSE_ENDS = frozenset({";", ".", "but", "however", "although"})
_JOINTS = frozenset({",", "-", "and", "or", "with", "without", "/", "(", ")"})
_LONGEST = 2000
"""Characters of a sentence: what goes on longer without a stop is read in pieces, for the time to read one grows with its square."""

T = TypeVar("T")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")


class LexiconFacts(FactSource):
    """Facts by the lexicon that comes with the package, or by an edited copy.

    Args:
        lexicon: folder with findings.yaml, cues.yaml and anatomy.yaml; None takes ``reports/lexicon``.
    Raises:
        FileNotFoundError, ValueError: see :func:`reports.facts.lexicon.load_lexicon`.
    """

    def __init__(self, lexicon: Path | None = None) -> None:
        self.lexicon = load_lexicon(None if lexicon is None else Path(lexicon))

    def sentences(self, text: str) -> tuple[StatedSentence, ...]:
        """Every sentence of every section with its facts."""
        found = []
        for section in section_spans(text):
            spans = sentence_spans(text[section.body : section.end])
            pieces = [piece for start, end in spans for piece in _pieces(text, section.body + start, section.body + end)]
            found += [self._sentence(text, start, end, section.name) for start, end in pieces]
        return tuple(found)

    def _sentence(self, text: str, start: int, end: int, section: SectionName) -> StatedSentence:
        raw = text[start:end]
        words = words_of(raw, start)
        attributes = longest(self.lexicon.attributes.find(words.forms))
        statements = self._statements(raw, start, words, attributes)
        compares = any(m.value.compares for m in attributes) or any(s.change for s in statements)
        return StatedSentence(" ".join(split_sentences(raw)), start, end, section, statements, compares)

    def _statements(self, raw: str, offset: int, words: Words, attributes: Sequence[Match[Attribute]]) -> tuple[Statement, ...]:
        namings = self._namings(words.forms)
        if not namings:
            return ()
        describing = frozenset(m.first for m in attributes if m.value.side or m.value.severity or m.value.change)
        assertions = Assertions(
            words.forms, self.lexicon.cues.find(words.forms), [m.positions for m in namings if m.value.use != "denies"], describing
        )
        sizes = _sizes(raw, offset)
        found = []
        regions = _regions(namings, words.forms)
        owned = [[m for m in attributes if region[0] <= m.first and m.last < region[1]] for region in regions]
        for i, (naming, region) in enumerate(zip(namings, regions, strict=True)):
            if i and naming.value.findings[0] not in self.lexicon.fixed and _is_linked(namings[i - 1], naming, attributes):
                owned[i] = _with_where(owned[i], owned[i - 1], naming)
            near, state = owned[i], _state(naming.value, assertions.of(naming.positions))
            if state is None or _heads(naming, namings[i + 1 :], words.forms):
                continue
            first, stop = region
            own = (words.starts[first], words.ends[stop - 1]) if first < stop else (0, 0)  # of namings that lie in each other
            size = max((mm for position, mm in sizes if own[0] <= position < own[1]), default=None)
            span = (words.starts[naming.first], words.ends[naming.last])
            change: Change | None = _nearest(near, naming, lambda a: a.change)
            found += [Statement(self._fact(f, state, naming, near, size), *span, change=change) for f in naming.value.findings]
        return tuple(found)

    def _fact(self, finding: str, state: State, naming: Match[Naming], near: Sequence[Match[Attribute]], size_mm: float | None) -> Fact:
        return Fact(
            finding,
            state,
            side=_side(near),
            location=self.lexicon.locations[finding]
            if finding in self.lexicon.fixed
            else _place(near) or self.lexicon.locations[finding] or None,
            severity=_nearest(near, naming, lambda a: a.severity),
            size_mm=size_mm,
            kind=_nearest(near, naming, lambda a: a.kind),
        )

    def _namings(self, forms: Sequence[str]) -> list[Match[Naming]]:
        found = self.lexicon.namings.find(forms) + self.lexicon.denials.find(forms)
        if not found:
            return []
        kept: list[Match[Naming]] = []
        for match in sorted((m for m in longest(found) if m.value.use != "none"), key=lambda m: -len(m.positions)):
            words = set(match.positions)
            said = any(m.value.findings == match.value.findings and not words.isdisjoint(m.positions) for m in kept)
            if not said and (match.value.use == "denies" or match.value.always or not self._excluded(match, forms)):
                kept.append(match)
        return sorted((m for m in kept if not self._is_more_general(m, kept)), key=lambda m: m.positions)

    def _is_more_general(self, match: Match[Naming], others: Sequence[Match[Naming]]) -> bool:
        """Whether the very same words name a kind of the finding too."""
        if match.value.use == "denies":
            return False
        kinds = self.lexicon.ontology.descendants(match.value.findings[0])
        return any(m.positions == match.positions and m.value.use == match.value.use and m.value.findings[0] in kinds for m in others)

    def _excluded(self, match: Match[Naming], forms: Sequence[str]) -> bool:
        index = self.lexicon.unless.get(match.value.findings[0])
        if index is None:
            return False
        start, end = _clause(forms, match)
        return bool(index.find(forms[start:end]))


def _pieces(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The span, or pieces of at most ``_LONGEST`` characters, ended at a space where there is one."""
    found = []
    while end - start > _LONGEST:
        space = text.rfind(" ", start + 1, start + _LONGEST)
        cut = space if space > start else start + _LONGEST
        found.append((start, cut))
        start = cut + (space > start)
    return [*found, (start, end)]


def _state(naming: Naming, stated: Stated) -> State | None:
    """The state of what a phrase names; None where nothing is stated."""
    if stated == "unstated":
        return None
    if naming.use == "denies":
        return "absent" if stated == "present" else None
    if naming.use == "leaves open":
        return "uncertain" if stated != "absent" else "absent"
    return stated


def _clause(forms: Sequence[str], match: Match[Naming]) -> tuple[int, int]:
    """First position and end of the part between stops that holds the match."""
    start, end = match.first, match.last + 1
    while start > 0 and forms[start - 1] not in _CLAUSE_ENDS:
        start -= 1
    while end < len(forms) and forms[end] not in _CLAUSE_ENDS:
        end += 1
    return start, end


def _regions(namings: Sequence[Match[Naming]], forms: Sequence[str]) -> list[tuple[int, int]]:
    """For each naming the positions whose attributes are its own: up to strong stops, and up to where the next naming begins.

    The second begins at the last comma, "and", "or" or "with" between them; without one, after the first, so that an adjective goes to the
    noun behind it.
    """
    strong = [i for i, form in enumerate(forms) if form in (";", ".", ":")]
    firsts = sorted({m.first for m in namings})
    found = []
    for naming in namings:
        start = max([0, *(i + 1 for i in strong if i < naming.first)])
        end = min([len(forms), *(i for i in strong if i > naming.last)])
        if earlier := [m for m in namings if m.first < naming.first]:
            start = max(start, _border(forms, max(m.last for m in earlier if m.first < naming.first), naming.first))
        if later := [first for first in firsts if first > naming.last]:
            end = min(end, _border(forms, naming.last, later[0]))
        found.append((start, end))
    return found


def _border(forms: Sequence[str], last: int, first: int) -> int:
    """Where what goes with the naming that ends at ``last`` gives way to what goes with the one that begins at ``first``."""
    between = range(last + 1, first)
    return next((i for i in reversed(between) if forms[i] in _JOINTS), last + 1)


def _heads(naming: Match[Naming], later: Sequence[Match[Naming]], forms: Sequence[str]) -> bool:
    """Whether a colon follows, and then what is said of the same finding: "Pleural effusion: no pleural effusion"."""
    return forms[naming.last + 1 : naming.last + 2] == (":",) and any(m.value.findings == naming.value.findings for m in later)


def _is_linked(before: Match[Naming], naming: Match[Naming], attributes: Sequence[Match[Attribute]]) -> bool:
    """Whether words between the two say that the second is what the first may be, or goes with it."""
    return any(m.value.links and before.last < m.first and m.last < naming.first for m in attributes)


def _with_where(own: list[Match[Attribute]], given: list[Match[Attribute]], naming: Match[Naming]) -> list[Match[Attribute]]:
    """``own``, with side and place of ``given`` if it has neither but in the words of the naming itself."""
    if any((m.value.side or m.value.place) and m.first not in naming.positions for m in own):
        return own
    return own + [m for m in given if m.value.side or m.value.place]


def _sizes(raw: str, offset: int) -> list[tuple[int, float]]:
    """(position in the text, largest diameter in mm) of every measure in the sentence."""
    found = []
    for match in _SIZE.finditer(raw):
        numbers = [float(n.replace(",", ".")) for n in _NUMBER.findall(match["first"] + " " + match["more"])]
        factor = 10.0 if match["unit"].lower().startswith("c") else 1.0
        found.append((match.start() + offset, max(numbers) * factor))
    return found


def _side(near: Sequence[Match[Attribute]]) -> Side | None:
    sides = {m.value.side for m in near if m.value.side}
    if len(sides) > 1 or "bilateral" in sides:
        return "bilateral"
    return next(iter(sides), None)


def _place(near: Sequence[Match[Attribute]]) -> str | None:
    places = list(dict.fromkeys(m.value.place for m in near if m.value.place))
    return " and ".join(p for p in places if p) or None


def _nearest(near: Sequence[Match[Attribute]], naming: Match[Naming], value: Callable[[Attribute], T | None]) -> T | None:
    """The value of the attribute that stands nearest to the naming, one before it rather than one as near after it."""
    given = [m for m in near if value(m.value) is not None]
    best = min(given, key=lambda m: naming.first - m.last if m.last < naming.first else max(0, m.first - naming.last) + 0.5, default=None)
    return None if best is None else value(best.value)
