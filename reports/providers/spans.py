"""Where quoted words are in a report, whatever happened to its white space, and the sentences that they fall in.

A quote is matched without white space and without case: tokenisers part words from full stops, and line breaks wrap differently in every
copy of a report. Offsets are characters of the text that was given, end exclusive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from reports.facts.lexicon import Attribute, load_lexicon
from reports.facts.phrases import longest, words_of
from reports.facts.statements import StatedSentence, Statement
from reports.sections import section_spans
from reports.sentences import sentence_spans, split_sentences

_ONE_SIDED = {"left": "lingula", "right": "middle lobe"}
"""Places that have a side without the word."""


@dataclass(frozen=True)
class CompactText:
    """A text with its white space taken out, to look quotes up in."""

    text: str

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Offset in ``text`` of each character that is not white space."""
        return tuple(i for i, character in enumerate(self.text) if not character.isspace())

    @cached_property
    def compact(self) -> str:
        """``text`` without white space, in small letters; as long as ``places``."""
        return _small("".join(self.text.split()))

    @cached_property
    def _at(self) -> tuple[int, ...]:
        """For each offset of ``text`` and its end, how many characters before it are not white space."""
        counts, seen = [0], 0
        for character in self.text:
            seen += not character.isspace()
            counts.append(seen)
        return tuple(counts)

    @cached_property
    def sides(self) -> dict[str, int]:
        """Side -> offset in ``text`` where it is first named, by a word or by a place that only one side has."""
        words, found = words_of(self.text), dict[str, int]()
        one_sided = {place: side for side, place in _ONE_SIDED.items()}
        for match in load_lexicon().attributes.find(words.forms):
            for side in (match.value.side, one_sided.get(match.value.place or "")):
                if side:
                    found[side] = min(words.starts[match.first], found.get(side, len(self.text)))
        return found

    def span(self, first: int, last: int) -> tuple[int, int]:
        """(start, end) in ``text`` of the compact characters ``first`` to ``last``, both included."""
        return self.places[first], self.places[last] + 1

    def find(self, quote: str, start: int = 0, end: int | None = None) -> tuple[int, int] | None:
        """(start, end) of a quote's first occurrence between two offsets, as whole words; None if it is not there, or is blank."""
        words = _small("".join(quote.split()))
        low, high = self._at[start], self._at[len(self.text) if end is None else end]
        while words and (low := self.compact.find(words, low, high)) >= 0:
            begin, stop = self.span(low, low + len(words) - 1)
            if not (_inside_word(self.text, begin) or _inside_word(self.text, stop)):
                return begin, stop
            low += 1
        return None


def stated_sentences(text: str, statements: Iterable[Statement], comparisons: Sequence[tuple[int, int]] = ()) -> tuple[StatedSentence, ...]:
    """Every sentence of a text in order, each with the statements that begin in it.

    Args:
        text: a report or a section.
        statements: with offsets in ``text``. One that begins in a heading belongs to no sentence and is left out.
        comparisons: (start, end) of words that speak of change; a sentence that touches one ``compares``, as does one whose statements
            have a change.
    """
    ordered = sorted(statements, key=lambda s: (s.start, s.end))
    return tuple(
        StatedSentence(
            text=" ".join(split_sentences(text[start:end])) or " ".join(text[start:end].split()),
            start=start,
            end=end,
            section=section.name,
            statements=(inside := tuple(s for s in ordered if start <= s.start < end)),
            compares=any(s.change for s in inside) or any(begin < end and start < stop for begin, stop in comparisons),
        )
        for section in section_spans(text)
        for start, end in ((section.body + a, section.body + b) for a, b in sentence_spans(text[section.body : section.end]))
    )


def names_side(text: CompactText, side: str | None, end: int) -> bool:
    """Whether the text names a side before the offset ``end``, in a sentence or for a section; both sides are bilateral. True of None."""
    named = {one for one, first in text.sides.items() if first < end}
    return side is None or side in named or "bilateral" in named or (side == "bilateral" and {"left", "right"} <= named)


def names_other_side(words: str, side: str | None) -> bool:
    """Whether words that should say ``side`` name only the opposite one."""
    if side not in ("left", "right"):
        return False
    said = attributes(words)
    named = {one.side for one in said if one.side}
    return bool(named) and not named & {side, "bilateral"} and _ONE_SIDED[side] not in [one.place for one in said]


def attributes(words: str) -> tuple[Attribute, ...]:
    """What the words say of a finding beside its state, by the lexicon: sides, places, severity, change."""
    return tuple(match.value for match in longest(load_lexicon().attributes.find(words_of(words).forms)))


def gives_size(words: str, size_mm: float) -> bool:
    """Whether a number in the words is the size, in millimetres or centimetres, to the nearest tenth of a millimetre."""
    numbers = (float(n) for n in re.findall(r"\d+(?:\.\d+)?|\.\d+", words))
    return any(abs(factor * n - size_mm) < 0.05 for n in numbers for factor in (1, 10))


def _inside_word(text: str, cut: int) -> bool:
    return 0 < cut < len(text) and text[cut - 1].isalnum() and text[cut].isalnum()


def _small(text: str) -> str:
    """Small letters, one for each character."""
    if text.isascii():
        return text.lower()
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)
