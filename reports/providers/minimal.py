"""Minimal sentences: "There is / may be / is no [finding] of [location]", one fact each, as texts to train on.

The form is that of the sentences that RadZero trains on, which a language model wrote; here they are written from checked facts, or come
from a record and are checked for their form. What two studies have in common then reads the same whoever dictated it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from medvl.types import Fact, State
from reports.facts.lexicon import load_lexicon
from reports.facts.statements import Statement
from reports.providers.spans import attributes

_OPENING: dict[State, str] = {"present": "There is", "uncertain": "There may be", "absent": "There is no"}
_MINIMAL = re.compile(r"There (?:is|are|may be|is no|are no) \w[^.?!\n]*(?:\.\d[^.?!\n]*)*\.?", re.IGNORECASE)
_ADJECTIVE = re.compile(r"[a-z]+(?:al|ar|ary|ic)")
_WORD = re.compile(r"\w+")


def minimal_sentence(fact: Fact) -> str:
    """One fact as a sentence: state, severity, side, finding and location; the size is left out.

    Fact("nodule", "uncertain", "left", "upper lobe") gives "There may be nodule of the left upper lobe."
    """
    noun = fact.kind or fact.finding.replace("_", " ")
    location = _location(fact, noun)
    before = [_OPENING[fact.state]]
    if fact.severity and fact.state != "absent":
        before.append(fact.severity)
    denied_on_both = fact.state == "absent" and fact.side == "bilateral"  # "no bilateral effusion" would leave one side open
    if fact.side and not denied_on_both and not _says(noun, fact.side):
        if not location or fact.side == "bilateral":
            before.append(fact.side)
        elif not _says(location, fact.side):
            location = f"{fact.side} {location}"
    if _ADJECTIVE.fullmatch(location):
        return " ".join([*before, location, noun]) + "."
    return " ".join([*before, noun, *(["of the", location] if location else [])]) + "."


def minimal_sentences(statements: Iterable[Statement]) -> tuple[str, ...]:
    """The sentences of the statements, each once, in order. A finding that has resolved is none."""
    made = (minimal_sentence(s.fact) for s in statements if not (s.change == "resolved" and s.fact.state != "absent"))
    return tuple(dict.fromkeys(made))


def is_minimal(sentence: str) -> bool:
    """Whether a text is one sentence of this form."""
    return _MINIMAL.fullmatch(sentence.strip()) is not None


def _location(fact: Fact, noun: str) -> str:
    """The location's words, a place for one adjective ("basilar": base); "" if the noun has them all, or the finding is always there."""
    words = " ".join((fact.location or "").split())
    if words == load_lexicon().locations.get(fact.finding):
        return ""
    if " " not in words and (place := next((one.place for one in attributes(words) if one.place), None)):
        words = place
    known = _stems(noun)
    return "" if _stems(words) <= known else re.sub(r"^the\s+", "", words, flags=re.IGNORECASE)


def _stems(words: str) -> set[str]:
    """The beginnings of the words, by which "aorta" is in "aortic aneurysm"."""
    return {word.casefold()[:4] for word in _WORD.findall(words)}


def _says(words: str, side: str) -> bool:
    return side in (word.casefold() for word in _WORD.findall(words))
