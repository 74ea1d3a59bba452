"""Facts of two studies held against each other: how much a retrieved study says what the query's own says.

Shapes: Q queries, G gallery studies, F findings. A facts matrix is an integer array with a row a study and a column a finding, of 1
present, 0 absent, -1 uncertain and -2 not mentioned. (The label metrics of this package have NaN for the last, which no integer holds.)

What a study does not mention it does not state: against "present" or "absent" it is as wrong as the opposite. A finding that is uncertain
in either of two studies says nothing of whether they agree: it does not count for that pair, and is counted where results are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medvl.metrics.bootstrap import Interval, PatientIds, Statistic, bootstrap_resamples, ratio_statistic

PRESENT, ABSENT, UNCERTAIN, NOT_MENTIONED = 1, 0, -1, -2
FactOverlap = Literal["f1", "jaccard", "count"]
Stated = Literal["present", "absent"]
Counts = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
_STATES: dict[Stated, int] = {"present": PRESENT, "absent": ABSENT}
_QUOTIENTS = ("precision", "recall", "f1")


@dataclass(frozen=True)
class FactAgreement:
    """Precision, recall and F1 of the facts that retrieved studies state, against those of the queries. See :func:`fact_agreement`."""

    micro: dict[str, Interval]  # "present_f1" and so on -> over all findings together
    macro: dict[str, Interval]  # -> mean over the findings for which it is defined
    per_finding: dict[str, dict[str, Interval]]  # finding -> the same names
    chance: dict[str, float]  # name -> micro of a study drawn from the gallery, NaN without one
    uncertain: int  # pairs of a query and a finding that do not count: uncertain on either side
    stated: dict[str, int]  # "present" and "absent" -> such facts of the queries that count

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "micro": {
                name: {**interval.to_dict(), "chance": None if math.isnan(self.chance[name]) else self.chance[name]}
                for name, interval in self.micro.items()
            },
            "macro": _to_dict(self.macro),
            "per_finding": {finding: _to_dict(values) for finding, values in self.per_finding.items()},
            "uncertain": self.uncertain,
            "stated": self.stated,
        }


def fact_relevance(query: NDArray[np.integer[Any]], gallery: NDArray[np.integer[Any]], overlap: FactOverlap = "f1") -> NDArray[np.float32]:
    """(Q, G) graded relevance of gallery studies by the findings they share with queries, in [0, 1], or for ``count`` their number.

    With P the present findings of either, over those that neither has as uncertain:
        count = |P_q & P_g|,  f1 = 2 |P_q & P_g| / (|P_q| + |P_g|),  jaccard = |P_q & P_g| / |P_q | P_g|
    Two studies of which neither has a present finding agree: f1 and jaccard are 1, count is 0. What is absent in both adds nothing, or any
    two chests would be alike by all that they lack. Three matrix products; no (Q, G, F) is formed.

    Args:
        query: (Q, F).
        gallery: (G, F).
        overlap: "f1" (as reports are held against each other with CheXbert), "jaccard" (CT-CLIP's volume to volume), "count".
    Raises:
        ValueError: shapes or values that are not facts, or another overlap.
    Source: Smit et al. 2020, arXiv:2004.09167 (F1 of the positives); scripts/volume_to_volume_new.py of CT-CLIP, arXiv:2403.17834.
    """
    if overlap not in get_args(FactOverlap):
        raise ValueError(f"overlap must be one of {', '.join(get_args(FactOverlap))}, got {overlap!r}")
    _check(query, gallery)
    has, theirs = (query == PRESENT).astype(np.float32), (gallery == PRESENT).astype(np.float32)
    both = has @ theirs.T  # whole numbers, exact in float32
    if overlap == "count":
        return both
    sizes = has @ (gallery != UNCERTAIN).astype(np.float32).T + (query != UNCERTAIN).astype(np.float32) @ theirs.T
    top, bottom = (2 * both, sizes) if overlap == "f1" else (both, sizes - both)
    return np.divide(top, bottom, out=np.ones_like(top), where=bottom > 0)


def same_present_facts(query: NDArray[np.integer[Any]], gallery: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """(Q, G) bool, True where both studies have the same findings as present, whatever else they say; with 0 and 1 alone, the same row.

    Args:
        query: (Q, F).
        gallery: (G, F).
    Raises:
        ValueError: shapes or values that are not facts.
    Source: eval/retrieval_ct_rate.py of SPECTRE, where volumes of an identical label vector are each other's hits.
    """
    _check(query, gallery)
    has, theirs = (query == PRESENT).astype(np.float32), (gallery == PRESENT).astype(np.float32)
    return has.sum(axis=1)[:, None] + theirs.sum(axis=1)[None, :] == 2 * (has @ theirs.T)


def fact_agreement(
    query: NDArray[np.integer[Any]],
    retrieved: NDArray[np.integer[Any]],
    names: Sequence[str],
    patient_ids: PatientIds,
    *,
    gallery: NDArray[np.integer[Any]] | None = None,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> FactAgreement:
    """Whether the study retrieved for each query says what the query's own report says, of present and of absent findings, with intervals.

    For a state such as present, over pairs of a query and a finding that neither side has as uncertain, with n(q), n(r), n(q & r) those
    that the query, the retrieved study and both have in that state:
        precision = n(q & r) / n(r),  recall = n(q & r) / n(q),  F1 = 2 n(q & r) / (n(q) + n(r))
    ``micro`` sums over all findings, ``macro`` is the mean of the findings' values, of those that are defined; a resample in which one of
    these is not defined does not count for it and is counted as skipped.

    Args:
        query: (Q, F), row i the facts of query i.
        retrieved: (Q, F), row i the facts of the study retrieved for it.
        names: (F,) of the findings.
        patient_ids: (Q,), the patient of each query.
        gallery: (G, F) facts of all that could be retrieved, for the chance level: n(q & r) and n(r) in their mean over a random one of
            them.
        repeats: as in :func:`bootstrap_intervals`, like ``seed`` and ``level``.
        seed: see there.
        level: see there.
    Raises:
        ValueError: shapes or values that are not facts, or names that do not fit or repeat.
    Source: Smit et al. 2020, arXiv:2004.09167, where a finding is scored as positive, as negative and as mentioned.
    """
    _check(query, retrieved)
    if query.shape != retrieved.shape:
        raise ValueError(f"facts of queries {query.shape} and of retrieved studies {retrieved.shape} must be of one shape")
    states = {value: (retrieved == value).astype(np.float64) for value in _STATES.values()}
    counts = (retrieved != UNCERTAIN).astype(np.float64)
    return _agreement(query, states, counts, names, patient_ids, gallery=gallery, repeats=repeats, seed=seed, level=level)


def expected_agreement(
    query: NDArray[np.integer[Any]],
    gallery: NDArray[np.integer[Any]],
    share: NDArray[np.floating[Any]],
    names: Sequence[str],
    patient_ids: PatientIds,
    *,
    repeats: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> FactAgreement:
    """:func:`fact_agreement` where what is retrieved for a query is not one study but any of some, with the chance of each.

    Every n(r) and n(q & r) is its mean over the gallery by ``share``: of studies that tie for the first place or, with 1 / G everywhere,
    of a study drawn at random, which gives the chance level an interval. With all of a row's share on one study it is ``fact_agreement``.
    Counts of pairs and of facts are rounded means.

    Args:
        query: (Q, F), row i the facts of query i.
        gallery: (G, F).
        share: (Q, G), 0 or more, rows that add to 1.
        names: (F,) of the findings.
        patient_ids: (Q,), the patient of each query.
        repeats: as in :func:`bootstrap_intervals`, like ``seed`` and ``level``.
        seed: see there.
        level: see there.
    Raises:
        ValueError: shapes or values that are not facts or shares, or names that do not fit or repeat.
    """
    _check(query, gallery)
    if share.shape != (len(query), len(gallery)) or (share < 0).any() or not np.allclose(share.sum(axis=1), 1):
        raise ValueError(f"shares {share.shape} must be ({len(query)}, {len(gallery)}), 0 or more, and add to 1 in every row")
    states = {value: share @ (gallery == value).astype(np.float64) for value in _STATES.values()}
    counts = share @ (gallery != UNCERTAIN).astype(np.float64)
    return _agreement(query, states, counts, names, patient_ids, gallery=gallery, repeats=repeats, seed=seed, level=level)


def _agreement(
    query: NDArray[np.integer[Any]],
    states: Mapping[int, NDArray[np.float64]],
    counts: NDArray[np.float64],
    names: Sequence[str],
    patient_ids: PatientIds,
    *,
    gallery: NDArray[np.integer[Any]] | None,
    repeats: int,
    seed: int,
    level: float,
) -> FactAgreement:
    """Of (Q, F) chances that what is retrieved has a finding in each state, and that it does not have it as uncertain."""
    if len(names) != query.shape[1] or len(set(names)) != len(names):
        raise ValueError(f"facts of {query.shape[1]} findings need as many names, each of its own, got {len(names)} names")
    statistics: dict[tuple[str | None, str], Statistic] = {}
    chance: dict[str, float] = {}
    for state, value in _STATES.items():
        parts = _counts(query, states[value], counts, value)
        for j, finding in enumerate(names):
            statistics |= {(finding, name): s for name, s in _quotients(state, *(part[:, j] for part in parts)).items()}
        statistics |= {(None, name): s for name, s in _quotients(state, *(part.sum(axis=1) for part in parts)).items()}
        chance |= _chance(query, gallery, state, value)
    numbers = {key: str(i) for i, key in enumerate(statistics)}
    drawn = bootstrap_resamples(
        {numbers[key]: statistic for key, statistic in statistics.items()}, patient_ids, repeats=repeats, seed=seed, level=level
    )
    kinds = [f"{state}_{name}" for state in _STATES for name in _QUOTIENTS]
    per_finding = {finding: {kind: drawn.interval(numbers[finding, kind]) for kind in kinds} for finding in names}
    counted = (query != UNCERTAIN) * counts
    return FactAgreement(
        micro={kind: drawn.interval(numbers[None, kind]) for kind in kinds},
        macro={
            kind: drawn.mean([numbers[finding, kind] for finding in names if not math.isnan(per_finding[finding][kind].value)])
            for kind in kinds
        },
        per_finding=per_finding,
        chance=chance,
        uncertain=round(query.size - float(counted.sum())),
        stated={state: round(float(counted[query == value].sum())) for state, value in _STATES.items()},
    )


def _counts(query: NDArray[np.integer[Any]], states: NDArray[np.float64], counts: NDArray[np.float64], value: int) -> Counts:
    """(Q, F) each: stated by both, by the query, by the other. ``states`` and ``counts`` are the other's, or its mean over a gallery."""
    own, counted = (query == value).astype(np.float64), (query != UNCERTAIN).astype(np.float64)
    return own * states, own * counts, counted * states


def _quotients(state: str, both: NDArray[np.float64], own: NDArray[np.float64], other: NDArray[np.float64]) -> dict[str, Statistic]:
    pairs = ((both, other), (both, own), (2 * both, own + other))
    return {f"{state}_{name}": ratio_statistic(top, bottom) for name, (top, bottom) in zip(_QUOTIENTS, pairs, strict=True)}


def _chance(query: NDArray[np.integer[Any]], gallery: NDArray[np.integer[Any]] | None, state: Stated, value: int) -> dict[str, float]:
    if gallery is None:
        return {f"{state}_{name}": math.nan for name in _QUOTIENTS}
    _check(query, gallery)
    counts = _counts(query, (gallery == value).mean(axis=0), (gallery != UNCERTAIN).mean(axis=0), value)
    return {name: statistic.value for name, statistic in _quotients(state, *(count.sum(axis=1) for count in counts)).items()}


def _check(first: NDArray[np.integer[Any]], second: NDArray[np.integer[Any]]) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not first.shape[1]:
        raise ValueError(f"facts have shapes {first.shape} and {second.shape}, expected (studies, findings) with the same findings")
    for facts in (first, second):
        if not np.issubdtype(facts.dtype, np.integer) or not np.isin(facts, (PRESENT, ABSENT, UNCERTAIN, NOT_MENTIONED)).all():
            raise ValueError(f"facts ({facts.dtype}) must be integers: 1 present, 0 absent, -1 uncertain, -2 not mentioned")


def _to_dict(intervals: Mapping[str, Interval]) -> dict[str, dict[str, Any]]:
    return {name: interval.to_dict() for name, interval in intervals.items()}
