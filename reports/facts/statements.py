"""The vocabulary of facts in text: a sentence with what it states, and the base class of everything that finds facts.

Offsets are characters (Python string indices) of the text that was given, end exclusive.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from medvl.types import Configurable, Fact
from reports.sections import SectionName

Change = Literal["new", "increased", "decreased", "unchanged", "resolved"]
CHANGES: tuple[Change, ...] = get_args(Change)


@dataclass(frozen=True)
class Statement:
    """One fact as a sentence states it. ``fact.location`` holds the anatomy in words; ``fact.size_mm`` is the largest diameter."""

    fact: Fact
    start: int  # of the words that name the finding, or deny it ("lungs are clear")
    end: int
    change: Change | None = None  # against a prior study; None if the sentence does not compare


@dataclass(frozen=True)
class StatedSentence:
    """A sentence and its facts. A sentence without statements says nothing that the source knows of."""

    text: str  # as split_sentences gives it: single spaces, no list marker
    start: int  # of the sentence in the whole text, list marker included
    end: int
    section: SectionName
    statements: tuple[Statement, ...] = ()
    compares: bool = False  # speaks of change to a prior study, or of none ("unchanged")

    @property
    def describes_image(self) -> bool:
        """Whether it stands in findings, impression, or no section: where a report says what the image shows."""
        return self.section in ("findings", "impression", "other")


class FactSource(Configurable, abc.ABC):
    """Base of what knows which facts a text states: a lexicon, a file made elsewhere, a callable."""

    @abc.abstractmethod
    def sentences(self, text: str) -> tuple[StatedSentence, ...]:
        """Every sentence of a report, or of one section, in order, with its facts. Never raises for odd text.

        Sentences of every section are returned; who wants what describes the image takes those of findings, impression and other.
        """

    def facts(self, text: str) -> Iterator[Statement]:
        """The statements of all sentences that describe the image."""
        return described(self.sentences(text))


def described(sentences: Iterable[StatedSentence]) -> Iterator[Statement]:
    """The statements of the sentences in findings, impression, or without a section: what a report says of the image."""
    for sentence in sentences:
        if sentence.describes_image:
            yield from sentence.statements
