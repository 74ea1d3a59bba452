"""Descriptors written by a language model, taken only where a table of knowledge supports them.

The idea is CKEPE's; the rule of what counts as support is our own.

The table has rows (finding, relation, attribute): "pleural_effusion, shows, blunted costophrenic angle". A candidate is accepted if at
least one attribute of its finding is in it, and every word with content comes from such attributes or from the finding's own names: what
the table does not know is not let in, however likely it sounds. Words are compared in lower case, singular and American spelling.
Nothing here calls a model or a network.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reports.facts.phrases import words_of
from reports.prompts.faults import denies
from reports.prompts.nouns import Noun, Number
from reports.prompts.registry import PromptSet

EXCLUDES = "excludes"
"""The relation of an attribute that speaks against the finding: a candidate with it is rejected."""

NEUTRAL_WORDS = frozenset(
    {
        "a",
        "an",
        "the",
        "some",
        "of",
        "in",
        "on",
        "at",
        "with",
        "within",
        "by",
        "for",
        "and",
        "as",
        "that",
        "which",
        "is",
        "are",
        "it",
        "its",
    }
    | {"be", "been", "there", "this", "these", "sign", "finding", "appearance", "pattern", "seen", "visible", "present", "noted", "shown"}
)
"""Words that say nothing of what is seen, so that the table need not know them."""

_COLUMNS = ("finding", "relation", "attribute")


class _Parsed(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True)


class _Row(_Parsed):
    finding: str = Field(min_length=1)
    relation: str = Field(min_length=1)
    attribute: str = Field(min_length=1)


class _Candidate(_Parsed):
    finding: str = Field(min_length=1)
    descriptor: str = Field(min_length=1)
    number: Number | None = None


@dataclass(frozen=True)
class KnowledgeRow:
    """One line of the table."""

    finding: str
    relation: str
    attribute: str
    line: int  # in the file, from 1; in YAML the number of the entry


@dataclass(frozen=True)
class AcceptedDescriptor:
    """A candidate that the table supports. ``descriptor`` is as a prompt file writes it."""

    line: int
    finding: str
    descriptor: str
    support: tuple[KnowledgeRow, ...]


@dataclass(frozen=True)
class RejectedDescriptor:
    """A candidate that is left out. ``finding`` and ``descriptor`` are None where the line could not be read."""

    line: int
    finding: str | None
    descriptor: str | None
    reason: str


@dataclass(frozen=True)
class FilteredDescriptors:
    """Every line of the candidates, once."""

    accepted: tuple[AcceptedDescriptor, ...]
    rejected: tuple[RejectedDescriptor, ...]

    @property
    def by_finding(self) -> dict[str, tuple[str, ...]]:
        """What :meth:`PromptSet.with_descriptors` takes."""
        found: dict[str, list[str]] = {}
        for one in self.accepted:
            found.setdefault(one.finding, []).append(one.descriptor)
        return {finding: tuple(texts) for finding, texts in found.items()}


def load_knowledge(path: Path, known: Container[str] | None = None) -> tuple[KnowledgeRow, ...]:
    """Read the table: CSV with the columns finding, relation, attribute, or YAML with a list of mappings of these keys.

    Args:
        known: finding ids (those of a prompt set or an ontology); None takes any.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a table; the message names every row that is wrong and why, without its text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no knowledge table {path}; expected CSV or YAML with finding, relation, attribute")
    rows, faults = [], []
    for line, content in _lines(path):
        try:
            row = _Row.model_validate(content)
        except ValidationError as error:
            faults.append(f"row {line}: {_reason(error)}")
            continue
        if known is not None and row.finding not in known:
            faults.append(f"row {line}: its finding is unknown")
        elif not _content(row.attribute):
            faults.append(f"row {line}: its attribute has no word with content")
        rows.append(KnowledgeRow(row.finding, row.relation, row.attribute, line))
    if faults or not rows:
        raise ValueError(f"knowledge table {path}: {'; '.join(faults) or 'it has no rows'}")
    return tuple(rows)


def filter_descriptors(
    path: Path, knowledge: Iterable[KnowledgeRow], prompts: PromptSet, neutral: Collection[str] = NEUTRAL_WORDS
) -> FilteredDescriptors:
    """Sort candidates into those that the table supports and those that it does not, each with the reason.

    Args:
        path: JSON lines, each with ``finding`` (an id of ``prompts``), ``descriptor`` (a noun phrase: "a meniscus", "some air
            bronchograms", "edema") and optionally ``number`` (count, plural or mass) in place of the article; other keys are passed over.
        knowledge: of :func:`load_knowledge`.
        prompts: the set to add to; what it has already is rejected as said twice.
        neutral: words that need no support.
    Raises:
        FileNotFoundError: no such file. A line that cannot be read raises nothing and is rejected.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no candidates {path}; expected JSON lines with finding and descriptor")
    table: dict[str, list[KnowledgeRow]] = {}
    for row in knowledge:
        table.setdefault(row.finding, []).append(row)
    seen = {(name, _content(one.descriptor, neutral)) for name in prompts.findings for one in prompts.descriptors(name)}
    accepted, rejected = [], []
    for line, text in enumerate(path.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        try:
            parsed = _Candidate.model_validate_json(text)
        except ValidationError as error:
            rejected.append(RejectedDescriptor(line, None, None, _reason(error)))
            continue
        outcome = _judge(line, parsed, table.get(parsed.finding, []), prompts, frozenset(neutral))
        key = (parsed.finding, _content(parsed.descriptor, neutral))
        if isinstance(outcome, AcceptedDescriptor) and key in seen:
            outcome = RejectedDescriptor(line, parsed.finding, parsed.descriptor, "it says what another descriptor of the finding says")
        if isinstance(outcome, AcceptedDescriptor):
            seen.add(key)
            accepted.append(outcome)
        else:
            rejected.append(outcome)
    return FilteredDescriptors(tuple(accepted), tuple(rejected))


def _judge(
    line: int, one: _Candidate, rows: list[KnowledgeRow], prompts: PromptSet, neutral: frozenset[str]
) -> AcceptedDescriptor | RejectedDescriptor:
    def rejected(reason: str) -> RejectedDescriptor:
        return RejectedDescriptor(line, one.finding, one.descriptor, reason)

    if one.finding not in prompts.findings:
        return rejected("its finding is not in the prompt set")
    try:
        noun = Noun.read(one.descriptor)
    except ValueError:
        return rejected("it is not a noun phrase without a stop")
    if one.number is not None:
        noun = Noun(noun.text, one.number)
    if "{" in noun.text or "}" in noun.text:
        return rejected("it has a brace in it")
    if denies(noun.text):
        return rejected("it denies, and a descriptor is what is seen")
    if not rows:
        return rejected("the table has no row for its finding")
    words = _content(noun.text, neutral)
    inside = [row for row in rows if _content(row.attribute, neutral) <= words]
    if against := [row for row in inside if row.relation == EXCLUDES]:
        return rejected(f"row {against[0].line} of the table says that this speaks against the finding")
    if not inside:
        return rejected("no attribute of its finding is in it")
    supported = frozenset[str]().union(*(_content(row.attribute, neutral) for row in inside), *_names(prompts, one.finding, neutral))
    if unsupported := sorted(words - supported):
        return rejected(f"the table does not support {', '.join(unsupported)}")
    return AcceptedDescriptor(line, one.finding, noun.written, tuple(inside))


def _names(prompts: PromptSet, finding: str, neutral: Collection[str]) -> list[frozenset[str]]:
    return [_content(noun.text, neutral) for noun in (prompts.name(finding), *prompts.synonyms(finding))]


def _content(text: str, neutral: Collection[str] = NEUTRAL_WORDS) -> frozenset[str]:
    """The words with content in their normal form."""
    return frozenset(word for word in words_of(text).forms if word[0].isalnum() and word not in neutral)


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, row) of a table; what is no table raises ValueError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".yaml", ".yml"):
            content = yaml.safe_load(text)
            if not isinstance(content, list):
                raise ValueError(f"knowledge table {path}: expected a list of mappings with {', '.join(_COLUMNS)}")
            yield from enumerate(content, start=1)
            return
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"knowledge table {path}: no column {', '.join(missing)}; expected {', '.join(_COLUMNS)}")
        for row in reader:
            yield reader.line_num, {name: row[name] for name in _COLUMNS if row[name] is not None}
    except (yaml.YAMLError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"knowledge table {path} is not readable in UTF-8: {type(error).__name__}") from error


def _reason(error: ValidationError) -> str:
    """What is wrong with a record, without its content."""
    wrong = {"missing": "is missing", "string_too_short": "is empty", "string_type": "is not text", "model_type": "it is not a mapping"}
    parts = []
    for one in error.errors(include_input=False, include_url=False, include_context=False):
        field = ".".join(map(str, one["loc"]))
        parts.append(f"{field} {wrong.get(one['type'], 'is not right')}" if field else wrong.get(one["type"], "it is not a JSON object"))
    return ", ".join(parts)
