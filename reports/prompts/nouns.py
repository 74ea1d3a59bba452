"""Grammar of a finding's name in a sentence: "a pleural effusion" is, "lung nodules" are, "edema" has no article."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Number = Literal["count", "mass", "plural"]

_MARKS: dict[str, Number] = {"a": "count", "an": "count", "some": "plural"}
_SOUNDS_LIKE_VOWEL = re.compile(r"(?!eu|uni(?!n|m)|us[eu]|ut[ei]|ur[ei]|one)[aeiou]|8|1[18]\b|hour|honest|honou?r|heir", re.IGNORECASE)
_INITIALS = re.compile(r"[A-Z][A-Z0-9]*\b")
_SPACE_BEFORE_STOP = re.compile(r"\s+(?=[.,])")


@dataclass(frozen=True)
class Noun:
    """A noun phrase without its article."""

    text: str
    number: Number = "mass"

    @classmethod
    def read(cls, phrase: str) -> Noun:
        """A phrase as prompt files write it: "a nodule" is one of several, "some nodules" is plural, "edema" cannot be counted.

        Raises:
            ValueError: a phrase without a letter besides the article, or one that ends in a stop.
        """
        words = phrase.split()
        number = _MARKS.get(words[0].lower()) if len(words) > 1 else None
        text = " ".join(words[1:] if number else words)
        if not any(c.isalpha() for c in text) or text[-1] in ".!?;:,":
            raise ValueError(f"expected a noun phrase without a stop, such as 'a pleural effusion' or 'edema', got {phrase!r}")
        return cls(text, number or "mass")

    @property
    def written(self) -> str:
        """The inverse of :meth:`read`."""
        return f"some {self.text}" if self.number == "plural" else self.indefinite

    @property
    def indefinite(self) -> str:
        """With the article that it takes: "an effusion", "edema", "lung nodules"."""
        return f"{article(self.text)} {self.text}" if self.number == "count" else self.text

    @property
    def verb(self) -> str:
        """Its verb: "is" or "are"."""
        return "are" if self.number == "plural" else "is"

    def described(self, adjective: str) -> Noun:
        """With an adjective before it; "" changes nothing."""
        return Noun(f"{adjective} {self.text}", self.number) if adjective else self


def article(text: str) -> str:
    """The article "a" or "an", by the sound that ``text`` begins with: an effusion, a unilateral shift, an NG tube, a PICC line."""
    if (initials := _INITIALS.match(text)) and len(initials[0]) > 1:
        return "an" if text[0] in "AEFHILMNORSX" else "a"
    return "an" if _SOUNDS_LIKE_VOWEL.match(text) else "a"


def sentence(template: str, **slots: str) -> str:
    """A template filled, its first letter a capital, spaces single.

    Raises:
        KeyError: the template has a slot that is not given.
    """
    text = _SPACE_BEFORE_STOP.sub("", " ".join(template.format(**slots).split()))
    return text[:1].upper() + text[1:]
