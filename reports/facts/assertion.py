"""Whether what a sentence names is present, absent, uncertain or not stated: cues and how far they rule.

After NegEx ("A Simple Algorithm for Identifying Negated Findings and Diseases", Chapman et al. 2001) and ConText (Harkema et al. 2009), with
two departures for radiology. A list may end: in "no effusion, small nodule" the second noun is no longer denied, in "no effusion, nodule or
mass" it is. And a cue that looks back ("was not observed") looks no further than the verb before it.

A sentence is N words; positions are indices into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medvl.types import State
from reports.facts.lexicon import Cue
from reports.facts.phrases import Match, longest

Stated = State | Literal["unstated"]

_LIST = frozenset({"or", "nor", "and", "/"})


@dataclass(frozen=True)
class _Rule:
    """A cue with the positions that it rules: ``start`` <= position < ``end``; ``near`` is its own end that faces them."""

    kind: Stated
    start: int
    end: int
    near: int


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
        inside = [set(positions) for positions in named]
        kept = [cue for cue in _apart(longest(cues)) if not any(set(cue.positions) <= words for words in inside)]
        self._stops = [cue.first for cue in kept if cue.value.kind == "stop"]
        affirming = [cue for cue in kept if cue.value.kind == "affirms"]
        self._rules: list[_Rule] = []
        for cue in kept:
            kind, direction = cue.value.kind, cue.value.direction
            if kind not in ("absent", "uncertain", "unstated"):
                continue
            if direction == "before":
                end = min((stop for stop in self._stops if stop > cue.last), default=len(forms))
                if kind == "absent":
                    end = _end_of_list(forms, cue.last, end, affirming, describing)
                self._rules.append(_Rule(kind, cue.last + 1, end, cue.last))
            else:
                start = max((stop + 1 for stop in self._stops if stop < cue.first), default=0)
                start = max([start, *(other.last + 1 for other in affirming if other.last < cue.first)])
                self._rules.append(_Rule(kind, start, cue.first, cue.first))

    def of(self, positions: tuple[int, ...]) -> Stated:
        """What is said of a finding whose words are at ``positions``: of the cues that rule it, the nearest of the strongest kind.

        Not stated outweighs uncertain; of absent and uncertain the nearer one wins ("no definite", "no possible").
        """
        first, last = positions[0], positions[-1]
        ruling = [r for r in self._rules if (r.start <= first and last < r.end) or first < r.near < last]
        if any(r.kind == "unstated" for r in ruling):
            return "unstated"
        nearest = min(ruling, key=lambda r: min(abs(r.near - first), abs(r.near - last)), default=None)
        return "present" if nearest is None else nearest.kind


def _apart(cues: Sequence[Match[Cue]]) -> list[Match[Cue]]:
    """Cues that share no word: of two that do, the longer, or the first of equal length; those of the very same words all stay."""
    taken: dict[int, tuple[int, ...]] = {}
    kept = []
    for cue in sorted(cues, key=lambda c: (-len(c.positions), c.first)):
        if all(taken.get(position, cue.positions) == cue.positions for position in cue.positions):
            taken.update(dict.fromkeys(cue.positions, cue.positions))
            kept.append(cue)
    return sorted(kept, key=lambda c: c.first)


def _end_of_list(forms: Sequence[str], after: int, end: int, affirming: Sequence[Match[Cue]], describing: frozenset[int]) -> int:
    """Where what a negation denies ends: at ``end``, or at a comma or "and" after which something new begins."""
    for i in range(after + 2, end):
        if forms[i] == ",":
            listed = any(form in _LIST for form in forms[i + 1 : end])
            affirmed = any(i < cue.first < end for cue in affirming)
            if not listed and (affirmed or i + 1 in describing):
                return i
        elif forms[i] == "and" and i + 1 in describing and i + 1 < end:
            return i
        elif any(cue.first == i for cue in affirming) and any(form in (",", "and") for form in forms[i:end]):
            return i
    return end
