"""Providers: sources of facts that were made elsewhere, each fact checked against the text before anyone sees it.

A provider gives a :class:`Reading` of a text; the sentences, the minimal sentences and the audit follow from it. A fact whose words are
not in the text is refused, as is one with a size that its sentence does not give, or a side that neither its sentence nor what stands
before it in the text names: language models make such things up.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from medvl.types import Fact
from reports.facts.statements import FactSource, StatedSentence, Statement, described
from reports.providers.minimal import is_minimal, minimal_sentences
from reports.providers.names import FindingNames
from reports.providers.records import FactRecord, Rejection, ReportRecord, SentenceRecord
from reports.providers.spans import CompactText, gives_size, names_other_side, names_side, stated_sentences


@dataclass(frozen=True)
class Reading:
    """What a provider says of one text, after checking. Offsets are of that text."""

    statements: tuple[Statement, ...] = ()
    minimal: tuple[str, ...] | None = None  # made elsewhere; None: to be made from the statements
    comparisons: tuple[tuple[int, int], ...] = ()  # sentences that speak of change
    rejections: tuple[Rejection, ...] = ()
    whole: bool = False  # the statements are of the text as a whole, and of no sentence in it

    def sentences(self, text: str) -> tuple[StatedSentence, ...]:
        """Every sentence of the text that was read, in order, with its facts."""
        if not self.whole:
            return stated_sentences(text, self.statements, self.comparisons)
        if not text.strip():
            return ()
        sections = {s.section for s in stated_sentences(text, ())}
        section = sections.pop() if len(sections) == 1 else "other"
        return (StatedSentence(" ".join(text.split()), 0, len(text), section, self.statements),)

    def image_sentences(self, text: str) -> tuple[StatedSentence, ...]:
        """Those of :meth:`sentences` that describe the image."""
        return tuple(sentence for sentence in self.sentences(text) if sentence.describes_image)

    def minimal_sentences(self, text: str) -> tuple[str, ...]:
        """The minimal sentences of the text that was read: those made elsewhere, else made from the facts; each once, in order."""
        if self.minimal is None:
            return minimal_sentences(described(self.sentences(text)))
        return tuple(dict.fromkeys(self.minimal))


class Provider(FactSource):
    """Base of providers.

    Args:
        fallback: asked for the sentences of a text that the provider does not know; without it, they state nothing.
    """

    asks = False
    """Whether a reading may cost a question to somebody."""

    def __init__(self, fallback: FactSource | None = None) -> None:
        self.fallback = fallback

    @abc.abstractmethod
    def reading(self, text: str) -> Reading | None:
        """What is known of a text; None if nothing is."""

    def knows(self, text: str) -> bool:
        """Whether there is a reading of the text."""
        return self.reading(text) is not None

    def sentences(self, text: str) -> tuple[StatedSentence, ...]:
        """Every sentence in order with its facts; those of an unknown text are the fallback's, or state nothing."""
        reading = self.reading(text)
        if reading is None:
            return self.fallback.sentences(text) if self.fallback is not None else stated_sentences(text, ())
        return reading.sentences(text)

    def known(self, report: str | None, findings: str | None, impression: str | None) -> tuple[tuple[str, Reading], ...]:
        """(text, reading) of what is known of a study: of its report, else of both sections with a blank line between, else of each.

        A provider that asks is asked for the first of these that there is, and for no other.
        """
        sections = tuple(part for part in (findings, impression) if part and part.strip())
        joined = ("\n\n".join(sections),) if len(sections) > 1 else ()
        for choice in ((report,) if report and report.strip() else (), joined, sections):
            found = tuple((text, reading) for text in choice if (reading := self.reading(text)) is not None)
            if found or (choice and self.asks):
                return found
        return ()

    def minimal(self, text: str) -> tuple[str, ...]:
        """The minimal sentences of a text: those made elsewhere, else made from the facts; each once, in order."""
        reading = self.reading(text)
        return minimal_sentences(self.facts(text)) if reading is None else reading.minimal_sentences(text)


@dataclass(frozen=True)
class Audit:
    """What checking found. A fact is refused if no text of its study bears it out."""

    studies: int
    known: int  # with a reading of at least one text
    statements: int
    rejections: tuple[Rejection, ...]


def audit(provider: Provider, studies: Iterable[Sequence[str]]) -> Audit:
    """Read every text and list what was refused; nothing is raised for a bad record.

    Args:
        provider: whose facts to check.
        studies: the texts of each study (report, or findings and impression).
    """
    count = known = statements = 0
    rejections: list[Rejection] = []
    for count, texts in enumerate(studies, 1):  # noqa: B007 (counts)
        readings = [reading for text in texts if (reading := provider.reading(text)) is not None]
        known += bool(readings)
        statements += sum(len(reading.statements) for reading in readings)
        refused = [dict.fromkeys(reading.rejections) for reading in readings]
        rejections += [one for one in (refused[0] if refused else ()) if all(one in others for others in refused)]
    return Audit(count, known, statements, tuple(rejections))


def read_record(record: ReportRecord, text: str, names: FindingNames, row: int | None = None) -> Reading:
    """Check a record against the text that it is of.

    Args:
        record: with the format right, and nothing else known of it.
        text: as it is read here; the record's sentences may be wrapped in other ways.
        names: what its names of findings mean.
        row: of the record, for the rejections.
    """
    compact = CompactText(text)
    statements: list[Statement] = []
    minimal: list[str] = []
    comparisons: list[tuple[int, int]] = []
    rejections: list[Rejection] = []
    after = 0
    for i, sentence in enumerate(record.sentences):
        place = f"sentences[{i}]"
        span = compact.find(sentence.text, after) or compact.find(sentence.text)
        if span is None:
            rejections.append(Rejection(row, place, "the sentence is not in the text"))
            continue
        after = span[1]
        if sentence.compares:
            comparisons.append(span)
        for j, fact in enumerate(sentence.facts):
            found = _check(fact, compact, span, names)
            if isinstance(found, str):
                rejections.append(Rejection(row, f"{place}.facts[{j}]", found))
            elif found is not None:
                statements.append(found)
        for j, made in enumerate(sentence.minimal):
            fault = _fault_of_minimal(made, sentence)
            if fault:
                rejections.append(Rejection(row, f"{place}.minimal[{j}]", fault))
            else:
                minimal.append(made)
    given = any(sentence.minimal for sentence in record.sentences)
    return Reading(tuple(statements), tuple(minimal) if given else None, tuple(comparisons), tuple(rejections))


def unknown_names(records: Iterable[ReportRecord], names: FindingNames) -> Iterator[str]:
    """The names of findings in records that ``names`` does not know, repeats included; for completing a table. These are report words."""
    for record in records:
        for fact in (fact for sentence in record.sentences for fact in sentence.facts):
            if names.finding(fact.finding) is None and not names.ignores(fact.finding):
                yield fact.finding


def _check(fact: FactRecord, text: CompactText, sentence: tuple[int, int], names: FindingNames) -> Statement | str | None:
    """The statement, the reason to refuse it, or None if its finding is left out on purpose."""
    if names.ignores(fact.finding):
        return None
    finding = names.finding(fact.finding)
    if finding is None:
        return "the finding is not in the table of names"
    span = _words(fact, text, sentence)
    if isinstance(span, str):
        return span
    words = text.text[sentence[0] : sentence[1]]
    if names_other_side(words, fact.side):
        return "the sentence names the other side only"
    if not names_side(text, fact.side, sentence[1]):
        return "neither the sentence nor the text before it names the side"
    if fact.size_mm is not None and not gives_size(words, fact.size_mm):
        return "the size is not in the sentence"
    made = Fact(finding, fact.state, fact.side, fact.location, fact.severity, fact.size_mm, fact.kind)
    return Statement(made, span[0], span[1], fact.change)


def _words(fact: FactRecord, text: CompactText, sentence: tuple[int, int]) -> tuple[int, int] | str:
    """(start, end) of the words of a fact, or why they are not those of its sentence."""
    if (fact.start is None) != (fact.end is None):
        return "expected both start and end, or neither"
    if fact.start is not None and fact.end is not None:
        inside = sentence[0] <= fact.start < fact.end <= sentence[1]
        if inside and text.find(fact.quote or text.text[fact.start : fact.end], fact.start, fact.end) == (fact.start, fact.end):
            return fact.start, fact.end
        if fact.quote is None:
            return "start and end are not those of words of the sentence"
    if fact.quote is None:
        return sentence
    return text.find(fact.quote, *sentence) or "the quoted words are not in the sentence"


def _fault_of_minimal(made: str, sentence: SentenceRecord) -> str | None:
    if not is_minimal(made):
        return 'a minimal sentence is "There is", "There may be" or "There is no" and a finding'
    if any(names_other_side(sentence.text, side) for side in ("left", "right") if side in made.casefold().split()):
        return "the sentence names the other side only"
    return None
