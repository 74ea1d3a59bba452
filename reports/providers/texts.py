"""Minimal sentences as texts to train on."""

from __future__ import annotations

from medvl.types import TextSource
from reports.facts.statements import FactSource, described
from reports.providers.base import Provider
from reports.providers.minimal import minimal_sentences


class MinimalSentences(TextSource):
    """The minimal sentences of a study, for recipes.

    A study's report, findings and impression are tried until the source knows one: the report, both sections with a blank line between,
    each section. A lexicon knows every text and is given the sections where there are any.

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
        sections = tuple(part for part in (findings, impression) if part and part.strip())
        whole = (report,) if report and report.strip() else ()
        made = (sentence for text in self._known(whole, sections) for sentence in self._minimal(text))
        wanted = tuple(dict.fromkeys(sentence for sentence in made if self._wanted(sentence)))
        return wanted or (self.otherwise.texts(report, findings, impression) if self.otherwise is not None else ())

    def _known(self, whole: tuple[str, ...], sections: tuple[str, ...]) -> tuple[str, ...]:
        if not isinstance(self.source, Provider):
            return sections or whole
        choices = (whole, ("\n\n".join(sections),), sections) if len(sections) > 1 else (whole, sections)
        for choice in choices:
            if known := tuple(text for text in choice if self.source.knows(text)):
                return known
        return () if self.source.fallback is None else sections or whole

    def _minimal(self, text: str) -> tuple[str, ...]:
        return self.source.minimal(text) if isinstance(self.source, Provider) else minimal_sentences(described(self.source.sentences(text)))

    def _wanted(self, sentence: str) -> bool:
        _, verb, word = sentence.casefold().split()[:3]  # "there", "is" and "no", or "may" and "be"
        return (self.uncertain or verb != "may") and (self.absent or word != "no")
