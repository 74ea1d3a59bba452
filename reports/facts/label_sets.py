"""Label sets as data sets publish them, and the labels of a report from its facts.

Values are those of CheXpert: 1 present, 0 absent, -1 uncertain, None not mentioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from medvl.types import Fact
from reports.facts.lexicon import load_lexicon
from reports.facts.ontology import Ontology

_STRENGTH = {"present": 1, "uncertain": -1, "absent": 0}


@dataclass(frozen=True, eq=False)
class LabelSet:
    """Labels with the findings that each stands for.

    ``covers`` holds for each label the findings that make it 1 (or -1, if only uncertain), kinds among them, and ``denied_by`` those whose
    absence makes it 0: what it stands for, and all that these are kinds of. ``no_finding`` is a label that is 1 if no other
    label but those in ``beside`` is 1 or -1; None if the set has none.
    """

    name: str
    names: tuple[str, ...]
    covers: Mapping[str, frozenset[str]]
    denied_by: Mapping[str, frozenset[str]]
    no_finding: str | None = None
    beside: frozenset[str] = frozenset()

    def values(self, facts: Iterable[Fact]) -> dict[str, int | None]:
        """Label -> 1, -1, 0 or None, in the published order.

        One fact that is present outweighs any that are uncertain, and these any that are absent.
        """
        states: dict[str, set[str]] = {"present": set(), "uncertain": set(), "absent": set()}
        for fact in facts:
            states[fact.state].add(fact.finding)
        found: dict[str, int | None] = {}
        for label in self.names:
            if label == self.no_finding:
                continue
            if states["present"] & self.covers[label]:
                found[label] = 1
            elif states["uncertain"] & self.covers[label]:
                found[label] = -1
            else:
                found[label] = 0 if states["absent"] & self.denied_by[label] else None
        if self.no_finding is not None:
            others = [value for label, value in found.items() if label not in self.beside]
            found[self.no_finding] = 0 if any(value in (1, -1) for value in others) else 1
        return {label: found[label] for label in self.names}


def label_set_names() -> tuple[str, ...]:
    """The label sets that come with the package."""
    return tuple(_content())


@cache
def load_label_set(name: str) -> LabelSet:
    """A label set of ``reports/lexicon/label_sets.yaml``.

    Raises:
        ValueError: no such label set, or a file that names unknown findings.
    """
    if name not in _content():
        raise ValueError(f"no label set {name!r}; known are {', '.join(_content())}")
    entry, ontology = _content()[name], load_lexicon().ontology
    labels: dict[str, list[str]] = entry["labels"]
    if unknown := sorted({f.removeprefix("=") for findings in labels.values() for f in findings} - set(ontology.findings)):
        raise ValueError(f"label set {name}: unknown findings {', '.join(unknown)}")
    return LabelSet(
        name,
        tuple(labels),
        {label: _with_kinds(findings, ontology) for label, findings in labels.items()},
        {label: _denying(findings, ontology) for label, findings in labels.items()},
        entry.get("no_finding"),
        frozenset(entry.get("beside", ())),
    )


@cache
def _content() -> dict[str, Any]:
    path = Path(__file__).parent.parent / "lexicon" / "label_sets.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["label_sets"]
    return content


def _with_kinds(findings: Iterable[str], ontology: Ontology) -> frozenset[str]:
    found: set[str] = set()
    for finding in findings:
        found.update([finding[1:]] if finding.startswith("=") else [finding, *ontology.descendants(finding)])
    return frozenset(found)


def _denying(findings: Iterable[str], ontology: Ontology) -> frozenset[str]:
    """Whose absence denies the label: what it stands for itself, and all that these are kinds of."""
    own = [finding.removeprefix("=") for finding in findings]
    return frozenset(name for finding in own for name in (finding, *ontology.ancestors(finding)))
