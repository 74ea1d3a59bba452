"""Findings and what they are kinds of: a directed graph without cycles, from general ("lung_abnormality") to particular ("lung_nodule")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Ontology:
    """``parents`` holds every finding, in the order of the file, with what it is a kind of.

    Raises:
        ValueError: a parent that is no finding, or a finding among its own ancestors; all faults at once.
    """

    parents: Mapping[str, tuple[str, ...]] = field(hash=False)

    def __post_init__(self) -> None:
        unknown = [f"{name}: unknown parent {p}" for name, parents in self.parents.items() for p in parents if p not in self.parents]
        if unknown:
            raise ValueError("; ".join(unknown))
        if loops := [name for name in self.parents if name in self._above(name)]:
            raise ValueError(f"findings that are kinds of themselves: {', '.join(loops)}")

    @property
    def findings(self) -> tuple[str, ...]:
        """Every finding, groups included."""
        return tuple(self.parents)

    def ancestors(self, finding: str) -> tuple[str, ...]:
        """What the finding is a kind of, nearest first; KeyError for an unknown finding."""
        self.parents[finding]
        return self._above(finding)

    def descendants(self, finding: str) -> tuple[str, ...]:
        """Every kind of the finding, at any depth; KeyError for an unknown finding."""
        return self._below[finding]

    def depth(self, finding: str) -> int:
        """Steps from the finding to the farthest group above it."""
        return max((1 + self.depth(parent) for parent in self.parents[finding]), default=0)

    @cached_property
    def _below(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {name: [] for name in self.parents}
        for name in self.parents:
            for above in self._above(name):
                found[above].append(name)
        return {name: tuple(below) for name, below in found.items()}

    def _above(self, finding: str) -> tuple[str, ...]:
        found: dict[str, None] = {}
        level: Sequence[str] = self.parents[finding]
        while level:
            found.update(dict.fromkeys(level))
            level = [above for name in level for above in self.parents[name] if above not in found]
        return tuple(found)


def load_ontology(folder: Path | None = None) -> Ontology:
    """The ontology of a lexicon folder; without ``folder`` of the one that comes with the package.

    Raises:
        ValueError: as :func:`reports.facts.lexicon.load_lexicon`.
    """
    from reports.facts.lexicon import load_lexicon

    return load_lexicon(folder).ontology
