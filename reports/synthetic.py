"""Synthetic chest reports: facts of a study to a sectioned report with varied wording, negation, uncertainty and laterality.

The sentences are data (``synthetic.yaml``); this module chooses and fills them. Phrasings per finding and state are few (about ten), so
that the same sentence recurs across studies, and every sentence is true of the facts it was made from: present and uncertain facts are
stated each in a sentence of its own, absent findings are denied or left unmentioned, a side named is the side of the fact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medvl.types import FINDINGS, Fact, State

MENTION_ABSENT = 0.75
"""Chance that an absent finding is denied in the report. Real reports leave most findings unsaid; here unsaid is the minority so that
negative wording is learned from a few thousand studies."""

COMBINE_ABSENT = 0.35
"""Chance that a sentence denying several findings at once is used where it fits."""

_AMOUNT = {"mild": "small", "moderate": "moderate", "severe": "large"}
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class SyntheticReport:
    """A report in sections; ``findings`` and ``impression`` are sentences joined by spaces."""

    indication: str
    technique: str
    comparison: str
    findings: str
    impression: str

    @property
    def text(self) -> str:
        """The whole report with headings, a section a paragraph."""
        sections = ("indication", "technique", "comparison", "findings", "impression")
        return "\n\n".join(f"{name.upper()}: {getattr(self, name)}" for name in sections)


def write_report(facts: Sequence[Fact], rng: np.random.Generator) -> SyntheticReport:
    """Write a report about ``facts``.

    Args:
        facts: present and uncertain facts, several of one finding allowed; every other finding of ``FINDINGS`` is absent. A fact whose
            state is absent is denied for certain, unless another fact says that the finding is there.
        rng: the only source of chance: equal facts and an equal generator give an equal report.
    Raises:
        ValueError: a finding that no template knows.
    """
    known = templates()["findings"]
    unknown = sorted({f.finding for f in facts} - set(known))
    if unknown:
        raise ValueError(f"no sentences for finding {', '.join(unknown)}; known are {', '.join(known)}")
    stated = [f for f in facts if f.state != "absent"]
    positive = {f.finding for f in stated}
    denied = [n for n in FINDINGS if n not in positive and (_is_denied(n, facts) or rng.random() < MENTION_ABSENT)]

    sentences = _distinct([_sentence(f, "", rng) for f in stated]) + _deny(denied, rng)
    findings = " ".join(sentences[i] for i in rng.permutation(len(sentences)))
    summary = _distinct([_sentence(f, "impression", rng) for f in stated]) or [_pick(templates()["normal_impression"], rng)]
    return SyntheticReport(
        indication=_pick(templates()["indication"], rng),
        technique=_pick(templates()["technique"], rng),
        comparison=_pick(templates()["comparison"], rng),
        findings=findings,
        impression=" ".join(summary),
    )


def sentence_templates() -> tuple[str, ...]:
    """Every sentence of findings and impression that a report can hold, slots unfilled; what evaluation prompts must differ from."""
    found = list(templates()["normal_impression"]) + [c["text"] for c in templates()["combined_absent"]]
    for groups in templates()["findings"].values():
        for group, value in groups.items():
            kinds = value.values() if group == "kinds" else [{group: value}]
            found += [text for kind in kinds for texts in kind.values() for text in texts]
    return tuple(dict.fromkeys(found))


def labelled_sentences(facts: Sequence[Fact], group: str = "") -> dict[str, tuple[str, ...]]:
    """For each finding of ``facts``, every sentence that could state it; ``group`` "impression" for the summary's. For probes and tests."""
    found: dict[str, dict[str, None]] = {}
    for fact in facts:
        slots = _slots(fact, size=_sizes(fact)[0])
        found.setdefault(fact.finding, {}).update(dict.fromkeys(_fill(text, slots) for text in _candidates(fact, group, slots)))
    return {finding: tuple(texts) for finding, texts in found.items()}


@cache
def templates() -> Mapping[str, Any]:
    """The parsed ``synthetic.yaml``."""
    parsed: Mapping[str, Any] = yaml.safe_load(Path(__file__).with_name("synthetic.yaml").read_text(encoding="utf-8"))
    return parsed


def _is_denied(finding: str, facts: Sequence[Fact]) -> bool:
    return any(f.finding == finding and f.state == "absent" for f in facts)


def _deny(absent: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Sentences that deny every finding of ``absent`` once: combined where chance has it, single otherwise."""
    left, sentences = set(absent), []
    combined = templates()["combined_absent"]
    for i in rng.permutation(len(combined)):
        if left.issuperset(combined[i]["findings"]) and rng.random() < COMBINE_ABSENT:
            sentences.append(str(combined[i]["text"]))
            left -= set(combined[i]["findings"])
    return sentences + [_sentence(Fact(name, "absent"), "", rng) for name in absent if name in left]


def _sentence(fact: Fact, group: str, rng: np.random.Generator) -> str:
    slots = _slots(fact, size=_pick(_sizes(fact), rng))
    candidates = _candidates(fact, group, slots)
    weights = np.array([1.0 + len(_SLOT.findall(text)) for text in candidates])  # prefer sentences that say more
    return _fill(candidates[int(rng.choice(len(candidates), p=weights / weights.sum()))], slots)


def _candidates(fact: Fact, group: str, slots: Mapping[str, str]) -> list[str]:
    """Templates for a fact whose slots it can fill. A kind's own sentences count beside the finding's general ones."""
    groups = templates()["findings"][fact.finding]
    name = _group_name(group, fact.state)
    found = list(groups.get(f"{name}_bilateral" if fact.side == "bilateral" else name, groups[name]))
    found += groups.get("kinds", {}).get(fact.kind, {}).get(name, [])
    return [text for text in found if slots.keys() >= set(_SLOT.findall(text))]


def _group_name(group: str, state: State) -> str:
    if not group:
        return state
    return group if state == "present" else f"{group}_{state}"


def _slots(fact: Fact, size: str | None) -> dict[str, str]:
    adjectives = templates()["adjectives"]
    several_ribs = (fact.location or "").endswith("ribs")
    values = {
        "side": None if fact.side == "bilateral" else fact.side,
        "location": fact.location,
        "adjective": adjectives.get(fact.location, fact.location),
        "degree": fact.severity,
        "amount": _AMOUNT.get(fact.severity or ""),
        "size": size,
        "kind": fact.kind,
        "ribs": "ribs" if several_ribs else None,
        "rib": None if several_ribs else "rib",
    }
    return {name: value for name, value in values.items() if value}


def _sizes(fact: Fact) -> list[str | None]:
    if fact.size_mm is None:
        return [None]
    mm = f"{fact.size_mm:.0f} mm"
    return [mm, f"{fact.size_mm / 10:.1f} cm"] if fact.size_mm >= 10 else [mm]


def _fill(template: str, slots: Mapping[str, str]) -> str:
    text = template.format(**slots)
    return text[:1].upper() + text[1:]


def _pick(choices: Sequence[Any], rng: np.random.Generator) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _distinct(sentences: list[str]) -> list[str]:
    return list(dict.fromkeys(sentences))
