"""Phrases of a lexicon and where a sentence holds them.

A phrase is words in order. An element may be alternatives (``heart|cardiac``), a beginning (``calcif*``), optional (``(small)``), or a gap
of at most n words (``~3``), which crosses commas but no stronger stop. Words are compared in a normal form: lower case, singular, American
spelling; hyphens separate words. A sentence is N words; positions are indices into them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Generic, TypeVar

T = TypeVar("T")

_WORD = re.compile(r"\b[Vv][Ss]\.|[^\W\d_]+(?:['’][^\W\d_]+)*|\d+(?:\.\d+)?|\(\s*[-–—+]\s*\)|[-–]ve\b|[,;:()/.?+=]|(?<=\s)[-–—]+(?=\s)")
_IRREGULAR = {
    "apices": "apex",
    "atelectases": "atelectasis",
    "bases": "base",
    "bronchi": "bronchus",
    "bullae": "bulla",
    "calculi": "calculus",
    "diagnoses": "diagnosis",
    "diverticula": "diverticulum",
    "foci": "focus",
    "granulomata": "granuloma",
    "hila": "hilum",
    "metastases": "metastasis",
    "pneumothoraces": "pneumothorax",
    "thoraces": "thorax",
    "vertebrae": "vertebra",
    "can't": "cannot",
}
_SPELLING = (("oedem", "edem"), ("haem", "hem"), ("oesoph", "esoph"), ("anaes", "anes"), ("tumour", "tumor"), ("fibre", "fiber"))
_ENDINGS = {"calibre": "caliber", "grey": "gray", "centre": "center", "colour": "color"}
_ELEMENT = re.compile(r"\((?P<optional>[^()\[\]\s]+)\)|~(?P<gap>\d+)|(?P<words>[^()\[\]{}~\s]+)")
_GAP_STOPS = frozenset({".", ";", "but", "however", "although"})


@lru_cache(maxsize=1 << 16)
def normal_form(word: str) -> str:
    """Lower case, singular, American spelling, without a possessive 's."""
    text = word.lower().replace("’", "'")
    text = _IRREGULAR.get(text, text).removesuffix("'s")
    for british, american in _SPELLING:
        text = text.replace(british, american)
    text = _ENDINGS.get(text, text)
    if len(text) > 4 and text.endswith("ies"):
        return text[:-3] + "y"
    if len(text) > 4 and text.endswith(("sses", "xes", "ches", "shes")):
        return text[:-2]
    if len(text) > 3 and text.endswith("s") and not text.endswith(("ss", "us", "is")):
        return text[:-1]
    return text


@dataclass(frozen=True)
class Words:
    """A sentence in words: normal forms and the characters they came from."""

    forms: tuple[str, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


def words_of(text: str, offset: int = 0) -> Words:
    """Words, numbers and stops of a text; ``offset`` is added to the character positions."""
    found = list(_WORD.finditer(text))
    return Words(
        tuple(_form(m[0]) for m in found),
        tuple(m.start() + offset for m in found),
        tuple(m.end() + offset for m in found),
    )


def _form(token: str) -> str:
    """Words in normal form; "(-)" and "(+)" are words too; a dash between spaces is "-"."""
    if token[0].isalpha():
        return normal_form(token.removesuffix("."))
    if len(token) > 1 and token[0] in "(-–" and not token.isdigit():
        return "positive" if "+" in token else "negative"
    return "-" if token[0] in "-–—" else token


@dataclass(frozen=True)
class Match(Generic[T]):
    """A phrase found: the positions of its words in order, those in gaps left out."""

    positions: tuple[int, ...]
    value: T

    @property
    def first(self) -> int:
        """Position of the first word."""
        return self.positions[0]

    @property
    def last(self) -> int:
        """Position of the last word."""
        return self.positions[-1]


@dataclass(frozen=True)
class _Element:
    """Words that an element takes, or (``gap`` > 0) how many words it passes over."""

    words: frozenset[str] = frozenset()
    beginnings: tuple[str, ...] = ()
    gap: int = 0

    def takes(self, word: str) -> bool:
        return word in self.words or (bool(self.beginnings) and word.startswith(self.beginnings))


class PhraseIndex(Generic[T]):
    """Phrases with what they stand for, found in sentences all at once.

    Raises:
        ValueError: a phrase that is not in the syntax above, starts with a gap, or has more than six optional words.
    """

    def __init__(self, phrases: Iterable[tuple[str, T]], gap_stops: Iterable[str] = ()) -> None:
        self._stops = _GAP_STOPS | frozenset(gap_stops)
        self._by_word: dict[str, list[tuple[tuple[_Element, ...], T]]] = {}
        self._by_beginning: list[tuple[str, tuple[_Element, ...], T]] = []
        self._candidates: dict[str, tuple[tuple[tuple[_Element, ...], T], ...]] = {}
        for phrase, value in phrases:
            for elements in parse_phrase(phrase):
                for word in elements[0].words:
                    self._by_word.setdefault(word, []).append((elements[1:], value))
                for beginning in elements[0].beginnings:
                    self._by_beginning.append((beginning, elements[1:], value))

    def find(self, forms: Sequence[str]) -> list[Match[T]]:
        """Every place where a phrase stands; of one phrase at one place the nearest reading. Overlaps are the caller's."""
        found = []
        for i, word in enumerate(forms):
            candidates = self._candidates.get(word)
            if candidates is None:
                candidates = self._starting_with(word)
            for rest, value in candidates:
                positions = self._read(forms, i + 1, rest) if rest else ()
                if positions is not None:
                    found.append(Match((i, *positions), value))
        return found

    def _starting_with(self, word: str) -> tuple[tuple[tuple[_Element, ...], T], ...]:
        beginning = ((rest, value) for start, rest, value in self._by_beginning if word.startswith(start))
        found = (*self._by_word.get(word, ()), *beginning)
        if len(self._candidates) < 1 << 16:  # a bound, for texts that are no language
            self._candidates[word] = found
        return found

    def _read(self, forms: Sequence[str], at: int, elements: tuple[_Element, ...]) -> tuple[int, ...] | None:
        """Positions of ``elements`` from ``at`` on, the shortest gaps first."""
        if not elements:
            return ()
        element = elements[0]
        if not element.gap:
            if at >= len(forms) or not element.takes(forms[at]):
                return None
            rest = self._read(forms, at + 1, elements[1:])
            return None if rest is None else (at, *rest)
        for skip in range(element.gap + 1):
            rest = self._read(forms, at + skip, elements[1:])
            if rest is not None:
                return rest
            if at + skip >= len(forms) or forms[at + skip] in self._stops:
                return None
        return None


def parse_phrase(phrase: str) -> list[tuple[_Element, ...]]:
    """A phrase as sequences of elements, one for each choice of its optional words.

    Raises:
        ValueError: see :class:`PhraseIndex`.
    """
    if _ELEMENT.sub("", phrase).strip():
        raise ValueError(f"phrase {phrase!r}: expected words, alternatives a|b, beginnings word*, optional (word) and gaps ~3")
    choices: list[list[tuple[_Element, ...]]] = []
    for match in _ELEMENT.finditer(phrase):
        if match["gap"]:
            choices.append([(_Element(gap=int(match["gap"])),)] if int(match["gap"]) else [()])
        elif match["optional"]:
            choices.append([(), _elements(match["optional"])])
        else:
            choices.append([_elements(match["words"])])
    if sum(len(choice) > 1 for choice in choices) > 6:
        raise ValueError(f"phrase {phrase!r}: more than six optional words")
    found = [tuple(element for part in parts for element in part) for parts in product(*choices)]
    if not all(elements and not elements[0].gap and not elements[-1].gap for elements in found):
        raise ValueError(f"phrase {phrase!r}: must begin and end with a word")
    return found


def _elements(text: str) -> tuple[_Element, ...]:
    """``heart|card*`` as one element; ``ground-glass`` as two."""
    if text != "-" and "|" not in text and "-" in text:
        return tuple(_elements(part)[0] for part in text.split("-"))
    parts = text.split("|")
    if not all(parts) or any(part != "-" and "-" in part for part in parts):
        raise ValueError(f"phrase element {text!r}: an alternative is empty or hyphenated (write its words apart)")
    return (
        _Element(
            frozenset(normal_form(part) for part in parts if not part.endswith("*")),
            tuple(part[:-1].lower() for part in parts if part.endswith("*")),
        ),
    )


def longest(matches: Iterable[Match[T]]) -> list[Match[T]]:
    """Matches that are not inside a longer one, in the order of their first words; equal ones of different values all stay.

    A match is inside another if all its words are words of the other, gaps not counted.
    """
    ordered = sorted(matches, key=lambda m: -len(m.positions))
    kept: list[Match[T]] = []
    for match in ordered:
        words = set(match.positions)
        if not any(len(other.positions) > len(words) and words <= set(other.positions) for other in kept):
            kept.append(match)
    return sorted(kept, key=lambda m: m.positions)
