"""Whether what a sentence names is present, absent, uncertain or not stated: cues and how far they rule.

After NegEx ("A Simple Algorithm for Identifying Negated Findings and Diseases", Chapman et al. 2001) and ConText (Harkema et al. 2009),
with two departures for radiology. A list may end: in "no effusion, small nodule" the second noun is no longer denied, in "no effusion,
nodule or mass" it is. And a cue that looks back ("was not observed") looks no further than the verb before it.

A sentence is N words; positions are indices into them.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from medvl.types import State
from reports.facts.lexicon import Cue, CueKind
from reports.facts.phrases import Match, longest

Stated = State | Literal["unstated"]

_BETWEEN_TWO = frozenset({"versus", "vs"})
"""Words that put the nearest noun in doubt, not those that it stands beside: "low volumes with atelectasis versus scar"."""

_PLAIN = frozenset({"present", "noted", "unchanged", "stable"})
"""Verbs that affirm even after a denial: "no effusion, calcifications are present"; "no mass, nodule was detected" denies both."""

_AFTER_A_VERDICT = frozenset(
    {",", ";", ".", ")", "(", ":", "?", "and", "or", "but", "on", "in", "at", "by", "with", "within", "given", "due", "from", "as",
     "though", "although", "because", "since", "if"}
)  # fmt: skip
"""What may follow a word of doubt that closes what it says: "effusion possible, ...", "nodule suspected in the apex"."""

_CONCEDING = frozenset({"while", "although", "though", "despite"})
"""Openings of a clause that ends at the first comma."""

_RELATIVE = frozenset({"which", "who"})
"""Openings of a clause that may stand between two commas and part a noun from its verb."""

_STRENGTH: dict[CueKind, Stated] = {"unstated": "unstated", "reopened": "uncertain", "absent": "absent", "uncertain": "uncertain"}
"""Kinds of cues that decide a state, the strongest first."""


@dataclass(frozen=True)
class _Rule:
    """A cue with the positions that it rules: ``start`` <= position < ``end``."""

    kind: CueKind
    start: int
    end: int
    looks_back: bool

    def covers(self, first: int, last: int) -> bool:
        """Whether it rules a finding whose words stand from ``first`` to ``last``: by the end that is nearer to the cue."""
        return self.start <= (last if self.looks_back else first) < self.end


class Assertions:
    """The cues of one sentence, to be asked about each finding named in it.

    Args:
        forms: the words.
        cues: every cue found in them.
        named: for each finding named, the positions of its words; a cue wholly inside one is none ("non-calcified nodule").
        describing: positions of words that tell size, side or change: in a list they begin something new.
    """

    def __init__(
        self, forms: Sequence[str], cues: Sequence[Match[Cue]], named: Sequence[tuple[int, ...]], describing: frozenset[int]
    ) -> None:
        self._forms, self._named, self._describing = forms, named, describing
        self._firsts = {positions[0] for positions in named}
        self._others = {cue.last for cue in cues if cue.value.kind == "other"}
        inside = [set(positions) for positions in named]
        usable = [cue for cue in cues if forms[cue.first] != ":" or cue.value.direction == "before" or _is_answer(forms, cue, self._firsts)]
        outside = [c for c in longest(usable) if c.value.kind != "other" and not any(set(c.positions) <= words for words in inside)]
        kept = _apart([cue for cue in outside if cue.value.kind != "affirms"])
        taken = {position for cue in kept for position in cue.positions}
        self._affirming = [c for c in outside if c.value.kind == "affirms" and taken.isdisjoint(c.positions) and _is_verb(forms, c)]
        self._stops = [cue.first for cue in kept if cue.value.kind == "stop"]
        if forms and forms[0] in _CONCEDING and "," in forms:
            self._stops.append(forms.index(","))
        self._hedges = {cue.last for cue in kept if cue.value == Cue("uncertain", "before")}
        forward = {cue.positions for cue in kept if cue.value.direction == "before"}
        rules = [self._rule(cue, cue.positions in forward) for cue in kept if cue.value.kind in _STRENGTH]
        self._rules = [rule for rule in rules if rule is not None]
        self._rules += [_Rule("uncertain", first, last + 1, False) for first, last in _alternatives(forms, named, taken)]
        self._within = [(cue.value.kind, cue.positions) for cue in kept if cue.value.kind in ("absent", "uncertain")]

    def _rule(self, cue: Match[Cue], either_way: bool) -> _Rule | None:
        """What a cue rules; None for one that looks back and belongs to the noun after it.

        Args:
            either_way: the same words are a cue that looks forward too.
        """
        kind = cue.value.kind
        if cue.value.direction == "before":
            return _Rule(kind, cue.first + 1, self._end(cue), False)  # "no visible" may share a word with what it denies
        if either_way and self._forms[cue.first] not in _BETWEEN_TWO and _looks_forward(self._forms, cue, self._firsts):
            return None
        return _Rule(kind, self._start(cue), cue.first, True)

    def _end(self, cue: Match[Cue]) -> int:
        """Where the rule of a cue that looks forward ends."""
        end = min((stop for stop in self._stops if stop > cue.last), default=len(self._forms))
        if cue.value.kind != "absent":
            return end
        return _end_of_list(self._forms, cue.last, end, self._named, self._affirming, self._describing)

    def _start(self, cue: Match[Cue]) -> int:
        """Where the rule of a cue that looks back starts."""
        forms = self._forms
        if cue.first - 1 in self._others and not {"and", "or"} & set(forms[max(0, cue.first - 4) : cue.first]):
            return cue.first - 1
        answered = cue.first > 0 and forms[cue.first - 1] == ":"  # "Effusion: none"
        until = _before_aside(forms, cue.first - answered)
        borders = [stop for stop in self._stops if stop < until] + [verb.last for verb in self._affirming if verb.last < until]
        if forms[cue.first] in _BETWEEN_TWO:
            borders += [i for i in range(cue.first) if forms[i] in ("with", "and", ",") or i in self._hedges]
        return max((border + 1 for border in borders), default=0)

    def of(self, positions: tuple[int, ...]) -> Stated:
        """What is said of a finding whose words are at ``positions``, by the strongest cue that rules it.

        Not stated outweighs absent, and absent outweighs uncertain: "no suspicious opacity" is a denial. (Denials that leave a doubt,
        "cannot be excluded", are cues of their own.) A cue between the words of the finding rules it too: "the heart is not enlarged".
        """
        first, last, own = positions[0], positions[-1], set(positions)
        kinds: set[str] = {rule.kind for rule in self._rules if rule.covers(first, last)}
        between = [kind for kind, cue in self._within if own.isdisjoint(cue) and any(first < position < last for position in cue)]
        kinds.update(between)
        return next((stated for kind, stated in _STRENGTH.items() if kind in kinds), "present")


def _is_answer(forms: Sequence[str], cue: Match[Cue], firsts: Set[int]) -> bool:
    """Whether a cue after a colon answers what stands before it: "Effusion: not seen today", but not "Pleura: no effusion"."""
    end = next((i for i in range(cue.last + 1, len(forms)) if forms[i] in (",", ";", ".")), len(forms))
    return not any(cue.last < first < end for first in firsts)


def _looks_forward(forms: Sequence[str], cue: Match[Cue], firsts: Set[int]) -> bool:
    """Whether a word that may rule either way goes with the noun after it: "emphysema with suspected bulla", "scar and resolved effusion".

    One of doubt does unless what follows closes a clause ("bulla suspected on the left"), one of denial if a finding follows.
    """
    if len(cue.positions) > 1 or cue.last + 1 == len(forms):
        return False
    if cue.value.kind == "uncertain":
        return forms[cue.last + 1] not in _AFTER_A_VERDICT
    return any(i in firsts and "," not in forms[cue.last : i] for i in range(cue.last + 1, cue.last + 5))


def _before_aside(forms: Sequence[str], cue: int) -> int:
    """The cue, or where a clause between commas just before it begins: "the catheter, which was in place, was removed"."""
    if cue and forms[cue - 1] == ",":
        openings = [i for i in range(1, cue - 1) if forms[i] in _RELATIVE and forms[i - 1] == ","]
        return openings[-1] if openings else cue
    return cue


def _alternatives(forms: Sequence[str], named: Sequence[tuple[int, ...]], taken: Set[int]) -> list[tuple[int, int]]:
    """First and last position of findings that "or" joins as alternatives: "atelectasis, scar, or early pneumonia"."""
    found = []
    for i, form in enumerate(forms):
        if form != "or" or i in taken or any(p[0] <= i <= p[-1] for p in named):
            continue
        left = _named_before(i, 2, named)
        right = min((p for p in named if i < p[0] <= i + 4 and "," not in forms[i : p[0]]), default=None)
        if left and right:
            found += [(left[0], left[-1]), (right[0], right[-1])]
        while left and right and forms[i - 1] == ",":  # a list of three and more
            comma = max((k for k in range(max(0, left[0] - 3), left[0]) if forms[k] == ","), default=0)
            left = _named_before(comma, 1, named) if comma else None
            found += [(left[0], left[-1])] if left else []
    return found


def _named_before(at: int, near: int, named: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The finding that ends at most ``near`` words before a position, the last of them."""
    return max((p for p in named if at - near <= p[-1] < at), key=lambda p: p[-1], default=None)


def _is_verb(forms: Sequence[str], cue: Match[Cue]) -> bool:
    """Whether a participle stands for its clause ("effusion seen, ...") and not with a noun ("the effusion seen two days ago")."""
    return len(cue.positions) > 1 or cue.last + 1 == len(forms) or forms[cue.last + 1] in (",", ";", ".", "and", "but")


def _apart(cues: Sequence[Match[Cue]]) -> list[Match[Cue]]:
    """Cues that share no word: of two that do, the longer, or the first of equal length; those of the very same words all stay."""
    taken: dict[int, tuple[int, ...]] = {}
    kept = []
    for cue in sorted(cues, key=lambda c: (-len(c.positions), c.first)):
        if all(taken.get(position, cue.positions) == cue.positions for position in cue.positions):
            taken.update(dict.fromkeys(cue.positions, cue.positions))
            kept.append(cue)
    return sorted(kept, key=lambda c: c.first)


def _end_of_list(
    forms: Sequence[str],
    after: int,
    end: int,
    named: Sequence[tuple[int, ...]],
    affirming: Sequence[Match[Cue]],
    describing: frozenset[int],
) -> int:
    """Where what a negation denies ends: at ``end``, or, once a finding has been denied, at a comma or "and" where something new begins."""
    first_named = min((positions[-1] for positions in named if positions[-1] > after), default=end)
    for i in range(first_named + 1, end):
        new = _begins_new(forms, i + 1, end, describing)
        if forms[i] == "(" and (")" not in forms[i:end] or not any(p[0] > forms.index(")", i) for p in named)):
            return i
        if forms[i] in (",", "-"):
            affirmed = any(i < cue.first < end and forms[cue.last] in _PLAIN for cue in affirming)
            if (new or affirmed) and not any(form in ("or", "nor", "/") for form in forms[i + 1 : end]):
                return i
        elif (forms[i] == "and" and new) or (
            any(cue.first == i for cue in affirming) and any(form in (",", "and") for form in forms[i:end])
        ):
            return i
    return end


def _begins_new(forms: Sequence[str], at: int, end: int, describing: frozenset[int]) -> bool:
    """Whether an article, or a word that tells size, side or change, opens what follows."""
    while at < end and forms[at] in ("and", "with"):
        at += 1
    return at < end and (forms[at] in ("a", "an") or at in describing)
