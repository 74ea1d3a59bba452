"""Names of findings as others write them, turned into finding ids; and what the labels of a published set stand for as findings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from reports.facts import FactSource, LexiconFacts
from reports.facts.label_sets import LabelSet
from reports.facts.ontology import Ontology, load_ontology

_MOST_READ = 100_000
_NOT_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class FindingNames:
    """What another's names of findings mean: first the table, then the ids of the ontology ("Pleural Effusion"), then a lexicon.

    Args:
        table: name -> finding id, whatever the case, spaces, hyphens or underscores; None as a value: leave it out ("No Finding").
        lexicon: reads the finding out of a name as if it were a report ("effusion"). Where neither is given, that of the package does; with
            a table alone, a name that is neither in it nor an id is not known.
    Raises:
        ValueError: a name that is twice in the table.
    """

    table: Mapping[str, str | None] | None = None
    lexicon: FactSource | None = None
    _ids: Mapping[str, str | None] = field(init=False, repr=False, compare=False)
    _read: dict[str, str | None] = field(init=False, repr=False, compare=False, default_factory=dict)  # by the lexicon, so far

    def __post_init__(self) -> None:
        folded: dict[str, str | None] = {}
        for name, finding in (self.table or {}).items():
            if folded.setdefault(_fold(name), finding) != finding:
                raise ValueError(f"names of findings: {name!r} is there twice, in other letters, for different findings; keep one")
        known = {_fold(finding): finding for finding in load_ontology().findings}
        object.__setattr__(self, "_ids", {**known, **folded})
        if self.table is None and self.lexicon is None:
            object.__setattr__(self, "lexicon", LexiconFacts())

    def ignores(self, name: str) -> bool:
        """Whether the table says to leave this name out."""
        folded = _fold(name)
        return folded in self._ids and self._ids[folded] is None

    def finding(self, name: str) -> str | None:
        """The finding id, or None for a name that is not known or is left out."""
        folded = _fold(name)
        if folded in self._ids:
            return self._ids[folded]
        if self.lexicon is None:
            return None
        if folded not in self._read:
            if len(self._read) >= _MOST_READ:
                self._read.clear()
            stated = [s.fact for sentence in self.lexicon.sentences(folded) for s in sentence.statements]
            self._read[folded] = next((fact.finding for fact in stated if fact.state == "present"), None)
        return self._read[folded]


@dataclass(frozen=True)
class LabelMeaning:
    """What a label says as findings: ``present`` is there if it is 1 (may be, if -1); all of ``absent`` are not there if it is 0."""

    present: str | None
    absent: tuple[str, ...]


def label_meanings(label_set: LabelSet, ontology: Ontology | None = None) -> dict[str, LabelMeaning]:
    """Label -> what it says, without the label of no finding.

    A label that stands for several findings (Lung Lesion: nodule, mass, ...) says of none of them that it is there, so that its 1 is the
    nearest finding that they all are kinds of, and nothing if that is a kind of nothing else ("abnormality"). Its 0 denies each of them,
    except one with kinds that the label does not stand for: to deny a finding is to deny its kinds.
    """
    ontology = ontology or load_ontology()
    found = {}
    for label in label_set.names:
        if label != label_set.no_finding:
            covered = label_set.covers[label]
            above = [{name, *ontology.ancestors(name)} for name in covered]
            shared = sorted(name for name in set.intersection(*above) if ontology.parents[name]) if above else []
            whole = [name for name in ontology.findings if name in covered and covered.issuperset(ontology.descendants(name))]
            denied = tuple(name for name in whole if not set(whole) & set(ontology.ancestors(name)))
            found[label] = LabelMeaning(max(shared, key=ontology.depth, default=None), denied)
    return found


def _fold(name: str) -> str:
    return _NOT_WORD.sub(" ", name).strip().casefold()
