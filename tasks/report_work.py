"""What ``medvl reports`` makes of each report: sections and sentences, facts, labels, statistics, likely identifiers.

A piece of work is a function or a frozen dataclass that is called with a text: it travels to other processes as its few settings, and each
process reads the lexicon once. Offsets are characters of the text that was given, end exclusive.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from reports.sections import SectionName, section_spans, split_sections
from reports.sentences import sentence_spans, split_sentences

if TYPE_CHECKING:
    from reports.facts import FactSource, StatedSentence, Statement
    from reports.identifiers import IdentifierKind, IdentifierSource

SECTIONS: tuple[SectionName, ...] = get_args(SectionName)
_PSEUDONYMS = re.compile(
    r"(?:.*_)?(?:ids?|uids?|no|numbers?|index)|(?:accession|image|row|record)_?(?:no|number|index)?|.*path|.*file_?names?|file"
)
"""Names of columns, words parted by underscores, whose cells are numbers of rows and studies, or paths."""


def parse_report(text: str) -> dict[str, Any]:
    """``{"sections": {name: text}, "sentences": [{"text", "start", "end", "section"}]}``; sections that are empty are left out."""
    sections = split_sections(text)
    sentences = []
    for span in section_spans(text):
        for start, end in sentence_spans(text[span.body : span.end]):
            begin, stop = span.body + start, span.body + end
            words = " ".join(split_sentences(text[begin:stop]))
            sentences.append({"text": words, "start": begin, "end": stop, "section": span.name})
    return {"sections": {name: part for name in SECTIONS if (part := getattr(sections, name, ""))}, "sentences": sentences}


@cache
def lexicon_facts(lexicon: Path | None) -> FactSource:
    """The extractor of facts, read once a process.

    Raises:
        FileNotFoundError, ValueError: see :class:`reports.facts.LexiconFacts`.
    """
    from reports.facts import LexiconFacts

    return LexiconFacts(lexicon)


@dataclass(frozen=True)
class ExtractFacts:
    """A report to the sentences of a line of facts.

    Attributes:
        lexicon: folder of the lexicon; None: the one that comes with the package.
        with_text: give the words of each sentence too.
    """

    lexicon: Path | None = None
    with_text: bool = True

    def __call__(self, text: str) -> list[dict[str, Any]]:
        """Every sentence in order, as :func:`sentence_record` has it."""
        return [sentence_record(sentence, with_text=self.with_text) for sentence in lexicon_facts(self.lexicon).sentences(text)]


def sentence_record(sentence: StatedSentence, *, with_text: bool = True) -> dict[str, Any]:
    """A sentence as plain values: text, start, end, section, compares, facts."""
    record: dict[str, Any] = {"text": sentence.text} if with_text else {}
    place = {"start": sentence.start, "end": sentence.end, "section": sentence.section, "compares": sentence.compares}
    return {**record, **place, "facts": [_fact_record(statement) for statement in sentence.statements]}


def _fact_record(statement: Statement) -> dict[str, Any]:
    fact = {one.name: getattr(statement.fact, one.name) for one in fields(statement.fact)}
    return {**fact, "change": statement.change, "start": statement.start, "end": statement.end}


@dataclass(frozen=True)
class LabelReport:
    """A report to the values of a label set, in its order: 1, 0, -1 or None.

    Attributes:
        label_set: its name.
        lexicon: see :class:`ExtractFacts`.
    """

    label_set: str
    lexicon: Path | None = None

    def __call__(self, text: str) -> tuple[int | None, ...]:
        """What the sentences that describe the image say; all None for an empty report, though its label set may know "No Finding"."""
        from reports.facts.label_sets import load_label_set

        labels = load_label_set(self.label_set)
        if not text.strip():
            return (None,) * len(labels.names)
        values = labels.values(statement.fact for statement in lexicon_facts(self.lexicon).facts(text))
        return tuple(values[name] for name in labels.names)


@dataclass
class Statistics:
    """Counts over reports; those of several sets of reports add up.

    ``digests`` holds 64 bits of each sentence's words (small letters, no stop at the end): 8 bytes a sentence is all that grows.
    """

    reports: int = 0
    empty: int = 0
    sections: Counter[str] = field(default_factory=Counter)
    sentences_by_section: Counter[str] = field(default_factory=Counter)
    sentences_per_report: Counter[int] = field(default_factory=Counter)
    words_per_sentence: Counter[int] = field(default_factory=Counter)
    comparing: int = 0  # sentences that speak of change to a prior study
    with_facts: int = 0  # sentences that state something
    statements: Counter[tuple[str, str]] = field(default_factory=Counter)  # (finding, state)
    reports_with: Counter[tuple[str, str]] = field(default_factory=Counter)  # likewise, each once a report
    digests: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, other: Statistics) -> None:
        """Add the counts of other reports."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, array):
                mine.extend(theirs)
            else:
                setattr(self, one.name, mine + theirs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, shares in [0, 1]; a share or length of nothing is None."""
        sentences = sum(self.sentences_by_section.values())
        different = len(np.unique(np.frombuffer(self.digests, dtype=np.uint64))) if self.digests else 0
        findings = sorted({finding for finding, _ in self.statements}, key=lambda name: (-self._reports_of(name, "present"), name))
        return {
            "reports": self.reports,
            "empty_reports": self.empty,
            "reports_with_section": {name: self.sections[name] for name in SECTIONS},
            "sentences": sentences,
            "sentences_by_section": {name: self.sentences_by_section[name] for name in SECTIONS},
            "sentences_per_report": _spread(self.sentences_per_report),
            "words_per_sentence": _spread(self.words_per_sentence),
            "different_sentences": different,
            "duplicate_share": None if not sentences else 1 - different / sentences,
            "comparing_sentences": self.comparing,
            "comparing_share": None if not sentences else self.comparing / sentences,
            "sentences_with_facts": self.with_facts,
            "findings": {
                name: {
                    state: {"statements": self.statements[name, state], "reports": self._reports_of(name, state)}
                    for state in ("present", "absent", "uncertain")
                }
                for name in findings
            },
        }

    def _reports_of(self, finding: str, state: str) -> int:
        return self.reports_with[finding, state]


@dataclass(frozen=True)
class CountReport:
    """A report to its statistics. Facts are counted where they describe the image: findings, impression, no section.

    Attributes:
        lexicon: see :class:`ExtractFacts`.
    """

    lexicon: Path | None = None

    def __call__(self, text: str) -> Statistics:
        """The statistics of one report."""
        from reports.facts.statements import described

        sentences = lexicon_facts(self.lexicon).sentences(text)
        stated = [(statement.fact.finding, statement.fact.state) for statement in described(sentences)]
        sections = split_sections(text)
        return Statistics(
            reports=1,
            empty=int(not text.strip()),
            sections=Counter(name for name in SECTIONS if getattr(sections, name, "")),
            sentences_by_section=Counter(sentence.section for sentence in sentences),
            sentences_per_report=Counter([len(sentences)]),
            words_per_sentence=Counter(len(sentence.text.split()) for sentence in sentences),
            comparing=sum(sentence.compares for sentence in sentences),
            with_facts=sum(bool(sentence.statements) for sentence in sentences),
            statements=Counter(stated),
            reports_with=Counter(set(stated)),
            digests=array("Q", (_digest(sentence.text) for sentence in sentences)),
        )


def _digest(sentence: str) -> int:
    return int.from_bytes(blake2b(sentence.casefold().rstrip(" .!?").encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _spread(counts: Counter[int]) -> dict[str, float | int | None]:
    """Mean and nearest-rank quantiles of the values that were counted."""
    total = sum(counts.values())
    if not total:
        return dict.fromkeys(("mean", "min", "median", "p95", "max"))
    values = sorted(counts)
    behind = np.cumsum([counts[value] for value in values])
    at = {name: values[int(np.searchsorted(behind, np.ceil(share * total)))] for name, share in (("median", 0.5), ("p95", 0.95))}
    mean = sum(value * count for value, count in counts.items()) / total
    return {"mean": mean, "min": values[0], "median": at["median"], "p95": at["p95"], "max": values[-1]}


@cache
def identifier_source(model: str | None) -> IdentifierSource:
    """What finds identifiers, made once a process: the rules, or with a spaCy model presidio besides.

    Raises:
        ImportError, ValueError: see :class:`reports.identifiers.PresidioIdentifiers`.
    """
    from reports.identifiers import IdentifierRules, PresidioIdentifiers

    return IdentifierRules() if model is None else PresidioIdentifiers(model)


@dataclass(frozen=True)
class CheckRow:
    """The cells of a row to how many likely identifiers of which kind each holds.

    A column that is named after an identifier ("PatientName") counts one for every cell that holds more than placeholders. In columns of
    ids or paths numbers are not counted: whether they are pseudonyms the table does not tell.

    Attributes:
        columns: names of the cells' columns.
        model: see :func:`identifier_source`.
    """

    columns: tuple[str, ...]
    model: str | None = None

    def __call__(self, texts: tuple[str, ...]) -> tuple[Counter[IdentifierKind], ...]:
        """A count of kinds for each cell."""
        source = identifier_source(self.model)
        return tuple(_count(source, column, text) for column, text in zip(self.columns, texts, strict=True))


def is_pseudonym_column(column: str) -> bool:
    """Whether a column holds ids or paths by design: study_id, AccessionNo, image_path."""
    return _PSEUDONYMS.fullmatch(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column).casefold()) is not None


def _count(source: IdentifierSource, column: str, text: str) -> Counter[IdentifierKind]:
    from reports.identifiers import column_kind
    from reports.placeholders import PLACEHOLDER

    kind = column_kind(column)
    if kind is not None:
        filled = any(c.isalnum() for c in PLACEHOLDER.sub("", text))
        return Counter([kind] if filled else [])
    found = Counter(one.kind for one in source.identifiers(text))
    if is_pseudonym_column(column):
        del found["id"], found["phone"]
    return found
