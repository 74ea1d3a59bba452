"""What whole reports state: the facts of their sentences, each sentence read once, joined to what a report says of each finding.

Shapes: R reports, F findings. A facts matrix is as :mod:`medvl.metrics.facts` has it: 1 present, 0 absent, -1 uncertain, -2 not mentioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.facts import NOT_MENTIONED
from medvl.types import Fact
from reports.facts import FactSource, LexiconFacts
from reports.facts.ontology import Ontology


class ReportFacts:
    """The facts of reports that come as sentences; reports share sentences, and each is read once.

    Args:
        source: what states something.
        ontology: of its findings.
    """

    def __init__(self, source: FactSource, ontology: Ontology) -> None:
        self._source, self._ancestors = source, {name: ontology.ancestors(name) for name in ontology.findings}
        self.stated = lru_cache(2**16)(self._stated)

    def _stated(self, sentence: str) -> tuple[Fact, ...]:
        return tuple(statement.fact for statement in self._source.facts(sentence))

    def facts(self, sentences: Iterable[str]) -> tuple[Fact, ...]:
        """All facts of a report, in the order of its sentences."""
        return tuple(fact for sentence in sentences for fact in self.stated(sentence))

    def said(self, facts: Iterable[Fact]) -> dict[str, int]:
        """:func:`said_of` with the ontology's ancestors."""
        return said_of(facts, self._ancestors)

    def matrix(self, reports: Sequence[Sequence[Fact]]) -> tuple[tuple[str, ...], NDArray[np.int8]]:
        """The findings that some report names, in the order of their names, and (R, F) what each says of them.

        Groups that no report names ("lung abnormality") are no column, though every report of one of their kinds implies them: nearly all
        reports would agree on these.
        """
        names = tuple(sorted({fact.finding for facts in reports for fact in facts}))
        said = [self.said(facts) for facts in reports]
        cells = [[one.get(name, NOT_MENTIONED) for name in names] for one in said]
        return names, np.array(cells, dtype=np.int8).reshape(len(reports), len(names))

    def spec(self) -> dict[str, Any]:
        """What reads the sentences, as ``Configurable.spec`` gives it."""
        return self._source.spec()


@cache
def lexicon_facts() -> ReportFacts:
    """Facts by the lexicon that comes with the package, the same object every time, so that no sentence is read twice."""
    source = LexiconFacts()
    return ReportFacts(source, source.lexicon.ontology)


def said_of(facts: Iterable[Fact], ancestors: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """Finding -> 1, -1 or 0: one fact that is present outweighs any that are uncertain, and these any that are absent.

    What is present or uncertain counts for all that it is a kind of; what is absent for itself alone.

    Args:
        facts: of the whole report.
        ancestors: finding -> what it is a kind of.
    """
    rank = {"absent": 0, "uncertain": 1, "present": 2}
    found: dict[str, int] = {}
    for fact in facts:
        names = (fact.finding, *(() if fact.state == "absent" else ancestors.get(fact.finding, ())))
        for name in names:
            found[name] = max(found.get(name, 0), rank[fact.state])
    return {name: {0: 0, 1: -1, 2: 1}[value] for name, value in found.items()}
