"""Records: the JSON of facts made elsewhere, validated, and the list of what was refused.

A record holds the sentences of one report, each with its text, its facts and, if there are any, minimal sentences. The same format is a
line of a file, the result of a callable and the answer of an endpoint; ``response.json`` is its JSON schema for an endpoint.
A refusal names row, place and reason, and never a word of the record: what a model wrote of a report is report text.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medvl.types import Severity, Side, State
from reports.facts.statements import Change

_REASONS = 5  # of one record; a wrong record is often wrong in the same way everywhere
_Words = Annotated[str, Field(min_length=1, max_length=500)]
_Text = Annotated[str, Field(min_length=1, max_length=20_000)]


@dataclass(frozen=True)
class Rejection:
    """What was refused. ``row`` counts from 1: line of JSONL, entry of JSON, row of CSV under the header, text of a batch."""

    row: int | None  # None where one text was asked for by itself
    place: str  # in the record: "sentences[0].facts[1].side"; "" for the whole
    reason: str  # what was expected; no word of the record


class RecordError(ValueError):
    """A record that does not have the format. ``faults`` are (place, reason), free of the record's words."""

    def __init__(self, faults: Sequence[tuple[str, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(f"{place or 'record'}: {reason}" for place, reason in self.faults))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FactRecord(_Strict):
    """One fact. Its words are ``quote``, else the characters ``start`` to ``end`` of the report, else the whole sentence."""

    finding: _Words  # an id, or a word that the caller's table maps to one
    state: State
    side: Side | None = None
    location: _Words | None = None
    severity: Severity | None = None
    size_mm: Annotated[float, Field(gt=0, le=2000)] | None = None
    kind: _Words | None = None
    change: Change | None = None
    quote: _Words | None = None
    start: Annotated[int, Field(ge=0)] | None = None
    end: Annotated[int, Field(ge=0)] | None = None


class SentenceRecord(_Strict):
    """A sentence of the report, word for word, and what was made of it."""

    text: _Text
    facts: tuple[FactRecord, ...] = ()
    minimal: tuple[_Words, ...] = ()  # "There is (may be, is no) [finding] of [location]."
    compares: bool = False


class ReportRecord(_Strict):
    """The sentences of one report. Sentences that state nothing may be left out."""

    sentences: tuple[SentenceRecord, ...]


class LineRecord(ReportRecord):
    """A line of a JSONL file: a record and what it is of. Keys that are not ours (model, date) are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    study_id: Annotated[str, Field(min_length=1)] | int | None = None
    text_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


_FIELDS = frozenset(FactRecord.model_fields) | frozenset(SentenceRecord.model_fields) | frozenset(LineRecord.model_fields)


def parse_record(data: str | bytes | Mapping[str, Any]) -> ReportRecord:
    """A record from JSON or from what JSON gives.

    Raises:
        RecordError: not the format.
    """
    try:
        if isinstance(data, (str, bytes)):
            return ReportRecord.model_validate_json(data)
        return ReportRecord.model_validate_json(json.dumps(data))  # JSON's view of tuples and numbers, whichever way they came
    except ValidationError as error:
        raise RecordError(faults(error)) from None
    except (TypeError, ValueError, RecursionError):
        raise RecordError([("", "expected what JSON can hold")]) from None


def parse_line(data: bytes) -> LineRecord:
    """A line of a JSONL file.

    Raises:
        RecordError: not the format, or neither ``study_id`` nor ``text_sha256``.
    """
    try:
        line = LineRecord.model_validate_json(data)
    except ValidationError as error:
        raise RecordError(faults(error)) from None
    if line.study_id is None and line.text_sha256 is None:
        raise RecordError([("", "expected study_id or text_sha256")])
    return line


def faults(error: ValidationError, known: frozenset[str] = _FIELDS) -> list[tuple[str, str]]:
    """(place, reason) of the first faults that pydantic found. Keys that are not ``known`` become "*": they may be report text."""
    found = error.errors(include_input=False, include_context=False, include_url=False)
    return [(_place(one["loc"], known), _reason(one["type"], one["msg"])) for one in found[:_REASONS]]


def response_schema(findings: Sequence[str] | None = None) -> dict[str, Any]:
    """The JSON schema of an answer, within the subset that strict structured output takes: every key required, no other allowed.

    Args:
        findings: the only names of findings to allow; None allows any.
    """
    schema: dict[str, Any] = json.loads(Path(__file__).with_name("response.json").read_text(encoding="utf-8"))
    if findings is not None:
        schema["properties"]["sentences"]["items"]["properties"]["facts"]["items"]["properties"]["finding"]["enum"] = list(findings)
    return schema


def write_rejections(path: Path, rejections: Iterable[Rejection]) -> int:
    """Write a CSV with the columns row, place, reason; gives the number of rows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "place", "reason"])
        count = 0
        for count, one in enumerate(rejections, 1):  # noqa: B007 (counts)
            writer.writerow(["" if one.row is None else one.row, one.place, one.reason])
    return count


def count_reasons(rejections: Iterable[Rejection]) -> Counter[str]:
    """How often each reason was given."""
    return Counter(one.reason for one in rejections)


def _place(parts: tuple[int | str, ...], known: frozenset[str]) -> str:
    words = [f"[{part}]" if isinstance(part, int) else f".{part if part in known else '*'}" for part in parts]
    return "".join(words).lstrip(".")


def _reason(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "a key that the format does not have"
    if kind == "json_invalid":
        return "not JSON in UTF-8"
    return message[:1].lower() + message[1:]
