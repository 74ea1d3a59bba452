"""What the facts of one study say of a sentence of another: true, false, or not known.

A report is read as open: what it does not mention is not known, unless told otherwise (``unmentioned``). What it says of a finding it says
in full (``exhaustive``): if it names places of an effusion, there is none elsewhere. A finding that is present makes its ancestors
present; one that is absent makes its descendants absent. What is stated both ways is not known.

Shapes: B studies, M sentences, F findings of the ontology.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medvl.types import Severity, Side, State
from reports.facts.ontology import Ontology
from reports.facts.statements import Change, Statement

Strictness = Literal["finding", "side", "location", "all"]
STRICTNESSES: tuple[Strictness, ...] = get_args(Strictness)
TRUE, UNKNOWN, FALSE = 1, 0, -1

_WHOLE = frozenset(
    {"abdomen", "airways", "bones", "diaphragm", "heart", "lung", "mediastinum", "pleura", "rib", "ribs", "soft tissues", "spine", ""}
)
"""Places that are the whole of where a finding can be: no restriction of a denial, no detail of a finding."""
_HIGH, _LOW = frozenset({"upper lobe", "apex", "suprahilar region"}), frozenset({"lower lobe", "base", "infrahilar region"})
_MIDDLE = frozenset({"middle lobe", "lingula"})

_SHADOWS = frozenset({"lung_opacity", "lung_lesion"})
_LOOSE = _SHADOWS | {"nodular_opacity"}
"""Groups of what is seen as a shadow in the lung, and their words that may mean any kind of either."""
_ORDINAL = r"(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|\d{1,2}(?:st|nd|rd|th))"
_NUMBERED = re.compile(
    rf"(?:(?:lateral|anterior|posterior|anterolateral|posterolateral) )?"
    rf"{_ORDINAL}(?:(?:,| and| to| through|-| or)+ ?{_ORDINAL})*(?: ribs?)?"
    r"|\b[CTL]\d{1,2}(?:[-/ ]+[CTL]?\d{1,2})?\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Claim:
    """One fact as far as it is compared; ``places`` without those that say no more than the finding."""

    finding: str
    state: State
    side: Side | None = None
    places: frozenset[str] = frozenset()
    severity: Severity | None = None
    size_mm: float | None = None
    kind: str | None = None
    change: Change | None = None
    disputed: bool = False  # a denial of what the same study states: it is no reason to call anything false


def claim_of(statement: Statement) -> Claim:
    """The statement without its span; "left upper lobe and base" are two places. What is absent on both sides is absent on either.

    What has resolved is absent, also where a source calls it present.
    """
    fact = statement.fact
    if statement.change == "resolved":
        fact = replace(fact, state="absent")
    places = frozenset((fact.location or "").split(" and ")) - _WHOLE
    side = None if fact.state == "absent" and fact.side == "bilateral" else fact.side
    return Claim(fact.finding, fact.state, side, places, fact.severity, fact.size_mm, fact.kind, statement.change)


def claims_of(text: str, statements: Iterable[Statement], ontology: Ontology) -> tuple[Claim, ...]:
    """What a text claims, each once; bones that it names by number ("the lateral fifth to seventh ribs", "T8") are places as it has them.

    A lexicon knows that a rib is meant and not which.
    """
    numbered = frozenset(" ".join(match[0].lower().split()) for match in _NUMBERED.finditer(text))
    claims = dict.fromkeys(map(claim_of, statements))
    if not numbered:
        return tuple(claims)
    return tuple(replace(c, places=c.places | numbered) if "bone_abnormality" in _family(c.finding, ontology).above else c for c in claims)


def at_strictness(claim: Claim, strictness: Strictness) -> Claim:
    """The claim without the details that are not to be compared; a denial keeps its own, for "no large effusion" is no denial of one."""
    if claim.state == "absent" or strictness == "all":
        return claim
    level = STRICTNESSES.index(strictness)
    return replace(
        claim,
        side=claim.side if level >= 1 else None,
        places=claim.places if level >= 2 else frozenset(),
        severity=None,
        size_mm=None,
        kind=claim.kind if level >= 2 else None,
    )


def with_disputes(claims: Sequence[Claim], ontology: Ontology) -> tuple[Claim, ...]:
    """The claims of one study, each once, its denials marked that something else it states is within."""
    stated = [claim for claim in claims if claim.state != "absent"]

    def disputed(denial: Claim) -> bool:
        return any(claim.finding in _family(denial.finding, ontology).below and _denies(denial, claim) for claim in stated)

    marked = (replace(claim, disputed=True) if claim.state == "absent" and disputed(claim) else claim for claim in claims)
    return tuple(dict.fromkeys(marked))


def truth(claim: Claim, facts: Sequence[Claim], ontology: Ontology, *, exhaustive: bool = True) -> int:
    """TRUE, FALSE or UNKNOWN: what a study of which ``facts`` are stated makes of a claim.

    Args:
        facts: of the study; those of other families do not matter.
        exhaustive: a present finding of which every stated place, side, degree or kind is another makes the claim false.
    """
    family = _family(claim.finding, ontology)
    kinds = [f for f in facts if f.finding in family.below]
    denied = [f for f in facts if f.state == "absent" and f.finding in family.above and _denies(f, claim)]
    present = [f for f in kinds if f.state == "present"]
    if claim.state == "absent":
        for_it, against = bool(denied), any(_implies(f, replace(claim, change=None)) for f in present)
    else:
        for_it = _implied(claim, present if claim.state == "present" else [f for f in kinds if f.state == "uncertain"])
        against = any(not f.disputed for f in denied)
        if claim.state == "present" and exhaustive and present:
            near = [f for f in facts if f.state != "absent" and f.finding in family.bearing]
            against = against or all(_conflict(f, claim) for f in _without_summaries(near))
    if for_it == against:
        return UNKNOWN
    return TRUE if for_it else FALSE


def _without_summaries(facts: Sequence[Claim]) -> list[Claim]:
    """The facts without those that say the same with no degree: "Cardiomegaly." beside "Mild cardiomegaly." is one heart."""

    def bare(fact: Claim) -> Claim:
        return replace(fact, severity=None, size_mm=None, change=None)

    graded = {bare(fact) for fact in facts if fact.severity is not None}
    return [fact for fact in facts if fact.severity is not None or bare(fact) not in graded]


def _implied(claim: Claim, stated: Sequence[Claim]) -> bool:
    if any(_implies(f, claim) for f in stated):
        return True
    sides = {f.side for f in stated if _implies(replace(f, side=None), replace(claim, side=None))}
    return claim.side == "bilateral" and {"left", "right"} <= sides


def _implies(fact: Claim, claim: Claim) -> bool:
    """Whether a fact of the finding, present, has every detail of the claim."""
    return (
        (claim.side is None or claim.side == fact.side or (fact.side == "bilateral" and claim.side in ("left", "right")))
        and claim.places <= fact.places
        and claim.severity in (None, fact.severity)
        and claim.kind in (None, fact.kind)
        and claim.change in (None, fact.change)
        and (claim.size_mm is None or (fact.size_mm is not None and abs(fact.size_mm - claim.size_mm) <= 0.2 * claim.size_mm))
    )


def _denies(denial: Claim, claim: Claim) -> bool:
    """Whether what is denied takes in what is claimed: each restriction of the denial ("no apical ...") is one of the claim too."""
    return (
        (denial.side in (None, "bilateral") or denial.side == claim.side)
        and denial.places <= claim.places
        and denial.severity in (None, claim.severity)
        and denial.kind in (None, claim.kind)
        and denial.size_mm is None
        and denial.change in (None, "resolved", "unchanged")
    )


def _conflict(fact: Claim, claim: Claim) -> bool:
    """Whether a stated fact cannot be what the claim speaks of: another side, place, degree or kind."""
    sides = fact.side is not None and claim.side is not None and fact.side != claim.side and "bilateral" not in (fact.side, claim.side)
    places = bool(fact.places and claim.places) and all(_apart(a, b) for a in fact.places for b in claim.places)
    degrees = fact.severity is not None and claim.severity is not None and fact.severity != claim.severity
    same_place = fact.side == claim.side or fact.side == "bilateral"
    kinds = fact.kind is not None and claim.kind is not None and fact.kind != claim.kind
    return sides or places or kinds or (degrees and same_place)


def _apart(one: str, other: str) -> bool:
    """Whether two places have no lung in common; places that are not zones of a lung may overlap."""
    zones = [next((i for i, zone in enumerate((_HIGH, _MIDDLE, _LOW)) if place in zone), None) for place in (one, other)]
    return None not in zones and zones[0] != zones[1]


@dataclass(frozen=True)
class _Family:
    """Findings around one: ``below`` it and its kinds, ``above`` it and what it is a kind of, ``bearing`` all whose facts bear on it.

    What one reader calls a nodule is an opacity to another: the loose words for shadows in the lung bear on all of them, and they on those.
    """

    below: frozenset[str]
    above: frozenset[str]
    bearing: frozenset[str]


@cache
def _family(finding: str, ontology: Ontology) -> _Family:
    own = frozenset({finding})
    if finding not in ontology.parents:
        return _Family(own, own, own)
    below, above = own | frozenset(ontology.descendants(finding)), own | frozenset(ontology.ancestors(finding))
    shadows = frozenset(name for group in _SHADOWS & ontology.parents.keys() for name in (group, *ontology.descendants(group)))
    loose = shadows if finding in _LOOSE else _LOOSE & shadows if finding in shadows else frozenset()
    return _Family(below, above, below | above | loose)


class TruthTable:
    """Truth of many sentences for many studies, each question of one finding answered once.

    Args:
        ontology: which finding is a kind of which.
        strictness: which details of findings are compared.
        unmentioned: "absent" takes a finding that a study does not mention to be absent, with all its kinds.
        exhaustive: see :func:`truth`.
    """

    def __init__(
        self,
        ontology: Ontology,
        strictness: Strictness = "location",
        unmentioned: Literal["unknown", "absent"] = "unknown",
        exhaustive: bool = True,
    ) -> None:
        if strictness not in STRICTNESSES or unmentioned not in ("unknown", "absent"):
            raise ValueError(
                f"strictness is {strictness!r}, expected one of {', '.join(STRICTNESSES)}; unmentioned is {unmentioned!r}, expected "
                "'unknown' or 'absent'"
            )
        self.ontology, self.strictness, self.unmentioned, self.exhaustive = ontology, strictness, unmentioned, exhaustive
        self._index = {finding: i for i, finding in enumerate(ontology.findings)}
        self._bears_on: dict[str, list[str]] = {}  # finding -> those that its facts bear on
        for finding in ontology.findings:
            for name in _family(finding, ontology).bearing:
                self._bears_on.setdefault(name, []).append(finding)
        self._groups: list[tuple[Claim, ...]] = [()]  # sets of facts of one family; 0: nothing said
        self._group_ids: dict[frozenset[Claim], int] = {frozenset(): 0}
        self._answers: dict[tuple[Claim, int], int] = {}

    def profile(self, claims: Iterable[Claim]) -> NDArray[np.int32]:
        """(F,) of a study: for each finding the number of the set of its facts that bear on it."""
        bearing: dict[str, set[Claim]] = {}
        for claim in (at_strictness(claim, self.strictness) for claim in claims):
            for finding in self._bears_on.get(claim.finding, ()):
                bearing.setdefault(finding, set()).add(claim)
        ids = np.zeros(len(self._index), dtype=np.int32)
        for finding, facts in bearing.items():
            if finding in self._index:
                ids[self._index[finding]] = self._group(frozenset(facts))
        return ids

    def of(self, sentences: Sequence[Sequence[Claim]], profiles: NDArray[np.int32]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        """Truth of each sentence, which holds if all its claims do and fails if one fails, and whether the study is silent on it.

        Args:
            sentences: M, the claims of each; one without any is not known.
            profiles: (B, F), see :meth:`profile`.
        Returns:
            (B, M) TRUE, UNKNOWN or FALSE; (B, M) True where the study says nothing of any finding whose claim is not known.
        """
        b, m = len(profiles), len(sentences)
        values, silent = np.zeros((b, m), dtype=np.int8), np.ones((b, m), dtype=np.bool_)
        columns: dict[Claim, list[int]] = {}
        for j, claims in enumerate(sentences):
            for claim in {at_strictness(claim, self.strictness) for claim in claims}:
                columns.setdefault(claim, []).append(j)
            if claims:
                values[:, j] = TRUE
        for claim, at in columns.items():
            ids = profiles[:, self._index[claim.finding]] if claim.finding in self._index else np.zeros(b, dtype=np.int32)
            groups, place = np.unique(ids, return_inverse=True)
            answer = np.array([self._answer(claim, int(group)) for group in groups], dtype=np.int8)[place]
            values[:, at] = np.minimum(values[:, at], answer[:, None])
            silent[:, at] &= ((answer != UNKNOWN) | (ids == 0))[:, None]
        return values, silent

    def _group(self, facts: frozenset[Claim]) -> int:
        if facts not in self._group_ids:
            self._group_ids[facts] = len(self._groups)
            self._groups.append(tuple(facts))
        return self._group_ids[facts]

    def _answer(self, claim: Claim, group: int) -> int:
        key = (claim, group)
        if key not in self._answers:
            facts = self._groups[group]
            if not facts and self.unmentioned == "absent":
                self._answers[key] = TRUE if claim.state == "absent" else FALSE
            else:
                self._answers[key] = truth(claim, facts, self.ontology, exhaustive=self.exhaustive)
        return self._answers[key]


def swap_sides(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    """The claims of the image flipped left to right."""
    other: Mapping[Side | None, Side | None] = {"left": "right", "right": "left"}
    return tuple(replace(claim, side=other.get(claim.side, claim.side)) for claim in claims)
