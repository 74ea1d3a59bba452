"""The lexicon: three YAML files that say which words name or deny a finding, which decide its state, and which tell where it is.

``reports/lexicon`` comes with the package; a copy of the folder, edited, can take its place. Everything is checked on loading.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import yaml

from medvl.types import Severity, Side
from reports.facts.ontology import Ontology
from reports.facts.phrases import PhraseIndex, parse_phrase
from reports.facts.statements import CHANGES, Change

FILES = ("findings.yaml", "cues.yaml", "anatomy.yaml")

Use = Literal["names", "denies", "leaves open", "none"]
CueKind = Literal["absent", "uncertain", "reopened", "unstated", "neither", "stop", "affirms", "other"]
Direction = Literal["before", "after", ""]

_FINDING_KEYS = {"parents", "names", "always", "uncertain", "except", "unless", "location", "fixed", "kinds"}
_SIDES: tuple[Side, ...] = ("left", "right", "bilateral")
_SEVERITIES: tuple[Severity, ...] = ("mild", "moderate", "severe")


@dataclass(frozen=True)
class Naming:
    """What a phrase of findings.yaml stands for."""

    findings: tuple[str, ...]
    use: Use
    always: bool = False  # whatever else stands in the clause


@dataclass(frozen=True)
class Cue:
    """What a phrase of cues.yaml does to the findings on one side of it."""

    kind: CueKind
    direction: Direction = ""


@dataclass(frozen=True)
class Attribute:
    """What a phrase says of a finding beside its state; one of the fields is set, or side and place."""

    side: Side | None = None
    place: str | None = None
    severity: Severity | None = None
    change: Change | None = None
    compares: bool = False
    kind: str | None = None
    links: bool = False  # tells of the finding before it what the finding after it is


@dataclass(frozen=True, eq=False)
class Lexicon:
    """A lexicon, ready to search with. ``sha256`` is of the content of its files, without comments and layout."""

    version: str
    sha256: str
    ontology: Ontology
    namings: PhraseIndex[Naming]
    denials: PhraseIndex[Naming]
    cues: PhraseIndex[Cue]
    attributes: PhraseIndex[Attribute]
    unless: Mapping[str, PhraseIndex[str]] = field(repr=False)
    locations: Mapping[str, str] = field(repr=False)  # finding -> where it is if the sentence does not say
    fixed: frozenset[str] = field(repr=False)  # findings that can be nowhere else


@cache
def load_lexicon(folder: Path | None = None) -> Lexicon:
    """Read a lexicon folder; without ``folder`` the one that comes with the package.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not YAML or not the format; the message names the file and every fault in it.
    """
    folder = folder or Path(__file__).parent.parent / "lexicon"
    contents = {name: _read(folder / name) for name in FILES}
    faults = _Faults(folder)
    findings, cues, anatomy = (contents[name] for name in FILES)
    with_names = faults.mapping("findings.yaml", findings, "findings")
    ontology = faults.attempt("findings.yaml", lambda: _ontology(with_names))
    namings = faults.index("findings.yaml", _namings(with_names))
    denials = faults.index("findings.yaml", _denials(findings, with_names, faults), ("no", "not", "without", ","))
    cue_index = faults.index("cues.yaml", _cues(cues))
    attributes = faults.index("anatomy.yaml or cues.yaml", _attributes(anatomy, cues, with_names))
    unless = {
        name: faults.index("findings.yaml", [(phrase, name) for phrase in entry["unless"]])
        for name, entry in with_names.items()
        if "unless" in entry
    }
    faults.raise_if_any()
    assert ontology is not None
    return Lexicon(
        version="+".join(str(content["version"]) for content in contents.values()),
        sha256=hashlib.sha256(json.dumps(list(contents.values()), sort_keys=True).encode()).hexdigest(),
        ontology=ontology,
        namings=namings,
        denials=denials,
        cues=cue_index,
        attributes=attributes,
        unless=unless,
        locations={name: str(_inherited(name, "location", with_names) or "") for name in with_names},
        fixed=frozenset(name for name in with_names if _inherited(name, "fixed", with_names)),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no lexicon file {path}; a lexicon folder holds {', '.join(FILES)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"lexicon file {path} is not readable YAML in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "version" not in content:
        raise ValueError(f"lexicon file {path}: expected a mapping with the key version")
    return content


class _Faults:
    """Collects what is wrong, so that a person who edits a lexicon sees all of it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, list[str]()

    def add(self, file: str, fault: str) -> None:
        self.found.append(f"{file}: {fault}")

    def mapping(self, file: str, content: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
        value = content.get(key)
        if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
            self.add(file, f"{key} must be a mapping of mappings")
            return {}
        for name, entry in value.items():
            if extra := sorted(set(entry) - _FINDING_KEYS):
                self.add(file, f"finding {name}: unknown keys {', '.join(extra)}")
        return value

    def attempt(self, file: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            self.add(file, str(error))
            return None

    def index(self, file: str, phrases: Iterable[tuple[str, Any]], gap_stops: Iterable[str] = ()) -> PhraseIndex[Any]:
        given: list[tuple[str, Any]] = self.attempt(file, lambda: list(phrases)) or []
        good = [(phrase, value) for phrase, value in given if self.attempt(file, partial(parse_phrase, phrase))]
        return PhraseIndex(good, gap_stops)

    def raise_if_any(self) -> None:
        if self.found:
            raise ValueError(f"lexicon {self.folder}: {'; '.join(self.found)}")


def _ontology(findings: Mapping[str, Mapping[str, Any]]) -> Ontology:
    return Ontology({name: tuple(entry.get("parents", ())) for name, entry in findings.items()})


def _namings(findings: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, Naming]]:
    for name, entry in findings.items():
        yield from ((phrase, Naming((name,), "names")) for phrase in entry.get("names", ()))
        yield from ((phrase, Naming((name,), "names", always=True)) for phrase in entry.get("always", ()))
        yield from ((phrase, Naming((name,), "leaves open")) for phrase in entry.get("uncertain", ()))
        yield from ((phrase, Naming((name,), "none")) for phrase in entry.get("except", ()))


def _denials(content: Mapping[str, Any], findings: Mapping[str, Any], faults: _Faults) -> Iterable[tuple[str, Naming]]:
    words = content.get("words", {})
    for denial in content.get("denials", ()):
        if unknown := [name for name in denial["denies"] if name not in findings]:
            faults.add("findings.yaml", f"denials of unknown findings {', '.join(unknown)}")
        yield from ((_spelled_out(phrase, words), Naming(tuple(denial["denies"]), "denies")) for phrase in denial["phrases"])


def _spelled_out(phrase: str, words: Mapping[str, str]) -> str:
    """``@normal`` as the alternatives that the file gives for it; KeyError for a word that it does not."""
    return re.sub(r"@(\w+)", lambda match: str(words[match[1]]), phrase)


def _cues(content: Mapping[str, Any]) -> Iterable[tuple[str, Cue]]:
    kinds: tuple[CueKind, ...] = ("absent", "uncertain", "unstated")
    directions: tuple[Direction, ...] = ("before", "after")
    for kind in kinds:
        for direction in directions:
            yield from ((phrase, Cue(kind, direction)) for phrase in content[kind][direction])
    yield from ((phrase, Cue("reopened", "after")) for phrase in content["reopened"])
    yield from ((phrase, Cue("neither")) for phrase in content["neither"])
    yield from ((phrase, Cue("stop")) for phrase in content["stops"])
    yield from ((phrase, Cue("affirms")) for phrase in content["affirms"])
    yield from ((phrase, Cue("other")) for phrase in content["others"])


def _attributes(
    anatomy: Mapping[str, Any], cues: Mapping[str, Any], findings: Mapping[str, Mapping[str, Any]]
) -> Iterable[tuple[str, Attribute]]:
    for side in _SIDES:
        yield from ((phrase, Attribute(side=side)) for phrase in anatomy["sides"][side])
    for place, phrases in anatomy["places"].items():
        yield from ((phrase, Attribute(place=place)) for phrase in phrases)
    for entry in anatomy["abbreviations"]:
        yield entry["phrase"], Attribute(side=entry["side"], place=entry["place"])
    for severity in _SEVERITIES:
        yield from ((phrase, Attribute(severity=severity)) for phrase in cues["severity"][severity])
    for change in CHANGES:
        yield from ((phrase, Attribute(change=change)) for phrase in cues["change"][change])
    yield from ((phrase, Attribute(compares=True)) for phrase in cues["compares"])
    yield from ((phrase, Attribute(links=True)) for phrase in cues["links"])
    for entry in findings.values():
        for kind, phrases in entry.get("kinds", {}).items():
            yield from ((phrase, Attribute(kind=kind)) for phrase in phrases)


def _inherited(name: str, key: str, findings: Mapping[str, Mapping[str, Any]]) -> Any:
    """What the finding's entry says under ``key``, or that of the nearest parent which has it; None if none has."""
    level = [name]
    while level:
        for one in level:
            if value := findings.get(one, {}).get(key):
                return value
        level = [parent for one in level for parent in findings.get(one, {}).get("parents", ())]
    return None
