"""Names of findings as others write them, turned into finding ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from reports.facts.statements import FactSource

_MOST_READ = 100_000
_NOT_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class FindingNames:
    """What another's names of findings mean.

    Args:
        table: name -> finding id, whatever the case, spaces, hyphens or underscores; None as a value: leave it out ("No Finding").
        lexicon: reads the finding out of a name that the table lacks, as if it were a report.

    With neither, a name must itself be a finding id ("pleural_effusion", "Pleural Effusion") and no list of ids is consulted.
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
        object.__setattr__(self, "_ids", folded)

    def ignores(self, name: str) -> bool:
        """Whether the table says to leave this name out."""
        folded = _fold(name)
        return folded in self._ids and self._ids[folded] is None

    def finding(self, name: str) -> str | None:
        """The finding id, or None for a name that is not known or is left out."""
        folded = _fold(name)
        if folded in self._ids:
            return self._ids[folded]
        if self.lexicon is not None:
            if folded not in self._read:
                if len(self._read) >= _MOST_READ:
                    self._read.clear()
                stated = [s.fact for sentence in self.lexicon.sentences(folded) for s in sentence.statements]
                self._read[folded] = next((fact.finding for fact in stated if fact.state == "present"), None)
            return self._read[folded]
        if self.table is None and folded[:1].isalpha():
            return folded.replace(" ", "_")
        return None


def _fold(name: str) -> str:
    return _NOT_WORD.sub(" ", name).strip().casefold()
