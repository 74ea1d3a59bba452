"""Minimal sentences as texts to train on."""

from __future__ import annotations

from collections.abc import Iterator

from medvl.types import TextSource
from reports.facts.statements import FactSource, described
from reports.providers.base import Provider
from reports.providers.minimal import minimal_sentences


class MinimalSentences(TextSource):
    """The minimal sentences of a study, for recipes.

    A provider gives what it knows of a study (:meth:`reports.providers.base.Provider.known`). A lexicon knows every text and is given the
    sections where there are any.

    Args:
        source: what knows the facts: a lexicon, or a provider of facts made elsewhere.
        uncertain: whether "There may be" is among them.
        absent: whether "There is no" is among them.
        otherwise: gives the texts of a study of which the source knows nothing or says nothing; without it there are none.
    """

    def __init__(self, source: FactSource, uncertain: bool = True, absent: bool = True, otherwise: TextSource | None = None) -> None:
        self.source, self.otherwise = source, otherwise
        self.uncertain, self.absent = uncertain, absent

    def texts(self, report: str | None, findings: str | None, impression: str | None) -> tuple[str, ...]:
        """The different minimal sentences in their order."""
        wanted = tuple(dict.fromkeys(sentence for sentence in self._made(report, findings, impression) if self._wanted(sentence)))
        return wanted or (self.otherwise.texts(report, findings, impression) if self.otherwise is not None else ())

    def _made(self, report: str | None, findings: str | None, impression: str | None) -> Iterator[str]:
        source: FactSource | None = self.source
        if isinstance(source, Provider):
            if known := source.known(report, findings, impression):
                for text, reading in known:
                    yield from reading.minimal_sentences(text)
                return
            source = source.fallback
        if source is not None:
            sections = [part for part in (findings, impression) if part and part.strip()]
            for text in sections or [part for part in (report,) if part and part.strip()]:
                yield from minimal_sentences(described(source.sentences(text)))

    def _wanted(self, sentence: str) -> bool:
        _, verb, word = sentence.casefold().split()[:3]  # "there", "is" and "no", or "may" and "be"
        return (self.uncertain or verb != "may") and (self.absent or word != "no")
