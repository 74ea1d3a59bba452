"""Facts from RadGraph's JSON: entities with tokens, and the relations between them, turned into findings with side and location.

An entry has ``text`` and ``entities``: id -> ``tokens``, ``label``, ``start_ix`` and ``end_ix`` (tokens of ``text.split()``, the last one
included) and ``relations``, a list of (modify | located_at | suggestive_of, id). Labels are those of RadGraph (OBS-DP, OBS-U, OBS-DA,
ANAT-DP) or of RadGraph-XL ("Observation::definitely present"). Source: Jain et al., "RadGraph", NeurIPS 2021 data sets;
Delbrouck et al., "RadGraph-XL", ACL Findings 2024.

An observation that modifies no other observation is a fact, present (DP), uncertain (U) or absent (DA). Its finding is looked up by its
words with those of its anatomy ("pleural effusion"), then with its modifiers, then alone; observations that name no finding are passed
over. ``suggestive_of`` is not used: what is suggested is an observation with a label of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medvl.types import Fact, State
from reports.facts.statements import Change, FactSource, Statement
from reports.providers.base import Provider, Reading
from reports.providers.files import warn_of_rejections
from reports.providers.keys import text_key
from reports.providers.names import FindingNames
from reports.providers.records import Rejection, faults
from reports.providers.spans import CompactText, attributes

_STATES: dict[str, State] = {
    "DP": "present",
    "U": "uncertain",
    "DA": "absent",
    "definitely present": "present",
    "uncertain": "uncertain",
    "definitely absent": "absent",
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)[\s-]*(mm|cm)", re.IGNORECASE)
_MILLIMETRES = {"mm": 1.0, "cm": 10.0}


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Entity(_Lenient):
    """A span of tokens with its label and relations."""

    tokens: str
    label: str
    start_ix: Annotated[int, Field(ge=0)]
    end_ix: Annotated[int, Field(ge=0)]
    relations: tuple[tuple[str, str], ...] = ()

    @property
    def observed(self) -> bool:
        """An observation, and not anatomy or a measurement."""
        return self.label.upper().startswith("OBS") and "measurement" not in self.label

    @property
    def state(self) -> State | None:
        """What the end of the label says."""
        return _STATES.get(self.label.rsplit("::", 1)[-1] if "::" in self.label else self.label.rsplit("-", 1)[-1])


class _Labelled(_Lenient):
    entities: dict[str, Entity]


class Entry(_Lenient):
    """A report. Test files have the entities of two readers instead of one; the first reader's are taken."""

    text: Annotated[str, Field(min_length=1)]
    entities: dict[str, Entity] | None = None
    labeler_1: _Labelled | None = None

    @property
    def graph(self) -> dict[str, Entity]:
        """The entities by id."""
        return self.entities if self.entities is not None else self.labeler_1.entities if self.labeler_1 is not None else {}


_FIELDS = frozenset(Entity.model_fields) | frozenset(Entry.model_fields)


class RadGraphFacts(Provider):
    """Facts of RadGraph's JSON, found by the text that it was run on (white space aside).

    Every entity is checked against its text: one whose tokens are not where it says is listed in ``rejections`` and passed over with its
    relations. Observations that name no finding are passed over; :meth:`unmapped_words` tells which.

    Args:
        path: the file, UTF-8: one object, name of the report -> entry. It is read whole once, to check it; what stays in memory is where
            each entry is.
        names: words -> finding id ("pleural effusion", "effusion", "enlarged heart"); None as an id leaves the words out.
        lexicon: reads findings out of words that are not in ``names``; see :class:`reports.providers.names.FindingNames`.
        fallback: see :class:`Provider`.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or no entry that can be used.
    """

    def __init__(
        self,
        path: Path,
        names: dict[str, str | None] | None = None,
        lexicon: FactSource | None = None,
        fallback: FactSource | None = None,
    ) -> None:
        super().__init__(fallback)
        self.path, self.names = Path(path), FindingNames(names, lexicon)
        places: dict[str, tuple[int, int, int]] = {}
        rejections: list[Rejection] = []
        for row, start, end, data in _entries(self.path, rejections):
            try:
                entry = Entry.model_validate_json(data)
            except ValidationError as error:
                rejections += [Rejection(row, place, reason) for place, reason in faults(error, _FIELDS)]
                continue
            rejections += _misplaced(entry, row)
            places.setdefault(text_key(entry.text), (row, start, end))
        self._places, self.rejections = places, tuple(rejections)
        warn_of_rejections(self.path, self.rejections, usable=bool(places))

    def reading(self, text: str) -> Reading | None:
        """The facts of the entry with this text, with offsets in it."""
        place = self._places.get(text_key(text))
        if place is None:
            return None
        entry = self._entry(place)
        compact, counts = CompactText(text), _token_ends(entry.text)
        made = []
        for entity, fact, change in _facts(_placed(entry), self.names):
            start, end = compact.span(counts[entity.start_ix], counts[entity.end_ix + 1] - 1)
            made.append(Statement(fact, start, end, change))
        return Reading(tuple(made), rejections=_misplaced(entry, place[0]))

    def unmapped_words(self) -> Iterator[str]:
        """The words of each observation that names no finding, repeats included; for completing ``names``. These are report words."""
        for place in self._places.values():
            yield from _unmapped(self._entry(place), self.names)

    def _entry(self, place: tuple[int, int, int]) -> Entry:
        row, start, end = place
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                entry = Entry.model_validate_json(file.read(end - start))
        except ValidationError:
            entry = None
        if entry is None or self._places.get(text_key(entry.text)) != place:
            raise ValueError(f"{self.path} has changed since it was read, at entry {row}; make the source anew")
        return entry


def _entries(path: Path, rejections: list[Rejection]) -> Iterator[tuple[int, int, int, bytes]]:
    """(number from 1, first byte, byte after the last, JSON) of each value of the file's one object.

    The object is read value by value, so that one that is no JSON loses what comes after it and not what came before.
    """
    data = path.read_bytes()
    text = data.decode("latin-1")  # a character for a byte; strings are read again as UTF-8
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")
    at = space.match(text, 3 if data.startswith(b"\xef\xbb\xbf") else 0).end()  # type: ignore[union-attr]
    if text[at : at + 1] != "{":
        raise ValueError(f"{path}: expected one JSON object of reports, as RadGraph writes it")
    row = 0
    at = space.match(text, at + 1).end()  # type: ignore[union-attr]
    while text[at : at + 1] == '"':
        row += 1
        try:
            _, at = decoder.raw_decode(text, at)
            colon = re.compile(r"\s*:\s*").match(text, at)
            start = colon.end() if colon else at
            _, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            rejections.append(Rejection(row, "", f"not JSON near byte {at}; this entry and those after it are lost"))
            return
        yield row, start, at, data[start:at]
        comma = re.compile(r"\s*,\s*").match(text, at)
        at = comma.end() if comma else at
    if text[at:].strip() != "}":
        rejections.append(Rejection(row + 1, "", f"expected another entry or the end of the object at byte {at}; what comes after is lost"))


def _facts(graph: Mapping[str, Entity], names: FindingNames) -> Iterator[tuple[Entity, Fact, Change | None]]:
    """Each observation that names a finding, as a fact."""
    modifiers = _modifiers(graph)
    for key, head in _heads(graph):
        own = _closure(key, modifiers)
        anatomy = _anatomy(graph, [key, *own], modifiers)
        finding = _finding(graph, head, own, anatomy, names)
        if finding is None or head.state is None:
            continue
        modified = attributes(" ".join(_words(graph, own)))
        sides = {one.side for one in attributes(" ".join(_words(graph, [*own, *anatomy]))) if one.side}
        location = " ".join(_without_sides(_words(graph, [one for one in anatomy if one not in own])))
        fact = Fact(
            finding,
            head.state,
            side=sides.pop() if len(sides) == 1 else "bilateral" if sides else None,
            location=location or None,
            severity=next((one.severity for one in modified if one.severity), None),
            size_mm=_size_mm(graph, own),
        )
        yield head, fact, next((one.change for one in modified if one.change), None)


def _unmapped(entry: Entry, names: FindingNames) -> Iterator[str]:
    graph = _placed(entry)
    modifiers = _modifiers(graph)
    for key, head in _heads(graph):
        own = _closure(key, modifiers)
        candidates = _candidates(graph, head, own, _anatomy(graph, [key, *own], modifiers))
        if all(names.finding(words) is None and not names.ignores(words) for words in candidates):
            yield candidates[0]


def _heads(graph: Mapping[str, Entity]) -> Iterator[tuple[str, Entity]]:
    """Observations that modify no other observation."""
    for key, entity in graph.items():
        targets = [graph[target] for kind, target in entity.relations if kind == "modify" and target in graph and target != key]
        if entity.observed and not any(target.observed for target in targets):
            yield key, entity


def _modifiers(graph: Mapping[str, Entity]) -> dict[str, list[str]]:
    """Id -> those that modify it."""
    found: dict[str, list[str]] = {}
    for key, entity in graph.items():
        for kind, target in entity.relations:
            if kind == "modify":
                found.setdefault(target, []).append(key)
    return found


def _closure(key: str, modifiers: Mapping[str, Sequence[str]]) -> list[str]:
    """What modifies an entity, and what modifies that."""
    found: dict[str, None] = {}
    waiting = list(modifiers.get(key, ()))
    while waiting:
        one = waiting.pop(0)
        if one != key and one not in found:
            found[one] = None
            waiting += modifiers.get(one, ())
    return list(found)


def _anatomy(graph: Mapping[str, Entity], keys: Sequence[str], modifiers: Mapping[str, Sequence[str]]) -> list[str]:
    """Where the entities are located, and what modifies that; observations among the modifiers are facts of their own."""
    places = [target for key in keys for kind, target in graph[key].relations if kind == "located_at" and target in graph]
    related = [one for place in places for one in [place, *_closure(place, modifiers)]]
    return [one for one in dict.fromkeys(related) if not graph[one].observed]


def _finding(graph: Mapping[str, Entity], head: Entity, own: Sequence[str], anatomy: Sequence[str], names: FindingNames) -> str | None:
    for words in _candidates(graph, head, own, anatomy):
        if names.ignores(words):
            return None
        if (finding := names.finding(words)) is not None:
            return finding
    return None


def _candidates(graph: Mapping[str, Entity], head: Entity, own: Sequence[str], anatomy: Sequence[str]) -> list[str]:
    """Names to look a finding up by, the fullest first, without sides."""
    noun = " ".join(head.tokens.lower().split())
    where, how = (" ".join(_without_sides(_words(graph, keys))) for keys in (anatomy, own))
    return list(dict.fromkeys(" ".join(words.split()) for words in (f"{where} {noun}", f"{noun} {where}", f"{how} {noun}", noun)))


def _words(graph: Mapping[str, Entity], keys: Sequence[str]) -> list[str]:
    """The words of entities in the order of the text, in small letters."""
    ordered = sorted((graph[key] for key in dict.fromkeys(keys)), key=lambda entity: entity.start_ix)
    return [word for entity in ordered for word in entity.tokens.lower().split()]


def _without_sides(words: Sequence[str]) -> list[str]:
    """The words but those that name a side and nothing else ("left", not "bibasilar", which is a place too)."""
    return [word for word in words if not any(one.side and not one.place for one in attributes(word))]


def _size_mm(graph: Mapping[str, Entity], own: Sequence[str]) -> float | None:
    sizes = [float(n) * _MILLIMETRES[unit.lower()] for n, unit in _SIZE.findall(" ".join(_words(graph, own)))]
    return max(sizes, default=None)


def _token_ends(text: str) -> list[int]:
    """How many characters that are not white space come before each token, and in all."""
    counts = [0]
    for token in text.split():
        counts.append(counts[-1] + len(token))
    return counts


def _is_placed(entity: Entity, tokens: Sequence[str]) -> bool:
    inside = entity.start_ix <= entity.end_ix < len(tokens)
    return inside and "".join(tokens[entity.start_ix : entity.end_ix + 1]) == "".join(entity.tokens.split())


def _placed(entry: Entry) -> dict[str, Entity]:
    """The entities whose tokens are where they say."""
    tokens = entry.text.split()
    return {key: entity for key, entity in entry.graph.items() if _is_placed(entity, tokens)}


def _misplaced(entry: Entry, row: int) -> tuple[Rejection, ...]:
    tokens = entry.text.split()
    return tuple(
        Rejection(row, f"entities[{i}]", "the tokens are not those of the text from start_ix to end_ix")
        for i, entity in enumerate(entry.graph.values())
        if not _is_placed(entity, tokens)
    )
