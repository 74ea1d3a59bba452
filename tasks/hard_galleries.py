"""Harder galleries of retrieval: a query's own report among those that state the same finding on the other side, or with another severity.

Shapes: Q queries, G items of the pool, R reports, M galleries. A query has a gallery for each finding that its own report states as present
on one side alone (or in one severity alone). Wrong are the items whose report states the same finding on the other side alone (in one other
severity alone); a report that leaves open whether it is on both sides is in no gallery of that finding. A model may rank the own report
first for what else it says. So besides, the other reports that say the same of the finding are held against the wrong ones, which nothing
but the side (or the severity) sets apart on average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvl.metrics import Interval, gallery_metrics
from medvl.types import Fact
from tasks.figures import estimate

Attribute = Literal["side", "severity"]
ATTRIBUTES: dict[Attribute, tuple[str, ...]] = {"side": ("left", "right"), "severity": ("mild", "moderate", "severe")}
GALLERIES: dict[Attribute, str] = {"side": "other_side", "severity": "other_severity"}
RULES: dict[Attribute, str] = {
    "side": "the query's own report against all of the pool that state the same finding as present on the other side alone",
    "severity": "the query's own report against all of the pool that state the same finding as present in one other severity alone",
}
Stated = Mapping[str, str]
"""Finding -> the one side or severity that a report states it with."""


@dataclass(frozen=True)
class Gallery:
    """A query's gallery of one finding. Items are columns of the pool."""

    query: int
    finding: str
    own: NDArray[np.intp]
    others: NDArray[np.intp]  # that say the same of the finding
    wrong: NDArray[np.intp]


def stated_with(facts: Iterable[Fact], attribute: Attribute) -> dict[str, str]:
    """Findings that a report states as present with one value of the attribute, and that value.

    A report may name a finding several times, and not tell the side each time. It states one side if all that it does not deny and that
    has a side has the same, and any of these is present; both sides are no side.
    """
    told: dict[str, set[str]] = {}
    present: set[str] = set()
    for fact in facts:
        value = fact.side if attribute == "side" else fact.severity
        if fact.state == "absent" or value is None:
            continue
        told.setdefault(fact.finding, set()).add(value)
        if fact.state == "present":
            present.add(fact.finding)
    values = ATTRIBUTES[attribute]
    return {name: next(iter(found)) for name, found in told.items() if name in present and len(found) == 1 and found <= set(values)}


def galleries_of(queries: Sequence[Stated], items: Sequence[Stated], own: NDArray[np.bool_], attribute: Attribute) -> list[Gallery]:
    """The galleries of all queries, in their order and in that of the findings' names; none where nothing in the pool is wrong.

    Args:
        queries: (Q,) what the report of each query states, see :func:`stated_with`.
        items: (G,) the same of each item's report.
        own: (Q, G), the query's own items.
        attribute: as for ``stated_with``.
    """
    members: dict[tuple[str, str], list[int]] = {}
    for g, stated in enumerate(items):
        for finding, value in stated.items():
            members.setdefault((finding, value), []).append(g)
    held = {key: np.array(found, dtype=np.intp) for key, found in members.items()}
    nothing = np.zeros(0, dtype=np.intp)
    wrong = {
        (finding, value): np.concatenate([held.get((finding, other), nothing) for other in ATTRIBUTES[attribute] if other != value])
        for finding, value in held
    }
    found = []
    for q, stated in enumerate(queries):
        mine = np.flatnonzero(own[q])
        for finding, value in sorted(stated.items()):
            same, against = held.get((finding, value), nothing), wrong.get((finding, value), nothing)
            if len(mine) and len(against):
                found.append(Gallery(q, finding, mine, np.setdiff1d(same, mine), against))
    return found


def measure_galleries(
    similarity: NDArray[np.float64],
    queries: Sequence[Stated],
    items: Sequence[Stated],
    own: NDArray[np.bool_],
    patients: Sequence[str],
    attribute: Attribute,
    *,
    repeats: int,
    seed: int,
) -> dict[str, Any]:
    """Figures of all galleries of (Q, G) similarities, JSON-ready, NaN as null: the own report's, the others', and by finding."""
    found = galleries_of(queries, items, own, attribute)
    kinds, ids = [one.finding for one in found], [patients[one.query] for one in found]
    options: dict[str, Any] = {"repeats": repeats, "seed": seed}
    mine = gallery_metrics(((similarity[one.query, one.own], similarity[one.query, one.wrong]) for one in found), kinds, ids, **options)
    others = gallery_metrics(
        ((similarity[one.query, one.others], similarity[one.query, one.wrong]) for one in found), kinds, ids, **options
    )
    return {
        "rule": RULES[attribute],
        "pool": similarity.shape[1],
        "galleries": len(found),
        "queries": len({one.query for one in found}),
        "median_wrong": float(np.median(mine.wrong)) if found else None,
        **_figures(mine.metrics, others.metrics, mine.chance["recall@1"]),
        "per_finding": {
            finding: _figures(own, others.per_kind.get(finding), float(mine.by_chance[np.array(kinds) == finding].mean()))
            for finding, own in mine.per_kind.items()
        },
    }


def _figures(own: Mapping[str, Interval], rest: Mapping[str, Interval] | None, first: float) -> dict[str, Any]:
    """Of the own report and, where there are any, of the others; ``first`` is the chance of the own to stand first."""
    told = estimate("pairwise_accuracy", own["pairwise_accuracy"], chance=0.5) | estimate("recall_at_1", own["recall@1"], chance=first)
    return told if rest is None else told | estimate("others_pairwise_accuracy", rest["pairwise_accuracy"], chance=0.5)
