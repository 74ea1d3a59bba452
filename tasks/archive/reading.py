"""From neighbours to an answer: what the reports of similar studies say of a new one, with provenance, abstaining where they differ.

Shapes: Q queries, K neighbours of one, F findings, P patients. w_i is the weight of neighbour i; all weights sum to 1. Of one finding p, a,
u and s are the shares of the weight that say present, absent, uncertain, and nothing; they sum to 1 too. Evidence lies in [0, 1] and is
NaN where nothing is said: silence is absence only where ``silent`` says so. A patient counts once, whatever the number of its studies.

Nothing here reads an image or a store: neighbours come from a search. What they answer is for research, not for diagnosis.

Sources: EchoPrime (arXiv:2410.09704) answers with the plain mean of the labels of the 50 nearest studies, those without one left out: here
``silent="ignored"`` without weights. CXR-RePaiR (Endo et al. 2021, PMLR 158) and X-REM (arXiv:2303.17579) answer with retrieved sentences
or reports; X-MoRe (arXiv:2308.15273) weighs image and retrieved text by how reliable each is. Abstention and one vote a patient are ours.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from medvl.files import write_atomically
from medvl.metrics import ABSTAIN, Interval, auroc, mean_intervals
from medvl.metrics.familiarity import choose_limit
from medvl.metrics.labels import known_rows, label_counts
from medvl.types import RESEARCH_USE, State

FORMAT = 1
Silent = Literal["absent", "ignored"]
Call = Literal["present", "absent", "abstain"]
Reason = Literal["far", "few", "disagree", "unproven"]
REASONS: Mapping[Reason, str] = {
    "far": "all neighbours are far away: the best score is below the floor",
    "few": "too few patients among the neighbours say anything of it",
    "disagree": "the neighbours disagree",
    "unproven": "validation showed no level at which this call is right often enough",
}
STATES: Mapping[State, int] = {"present": 1, "absent": 0, "uncertain": -1}
KS: tuple[int, ...] = (5, 10, 20, 50)
TEMPERATURES: tuple[float | None, ...] = (0.01, 0.03, 0.1, None)
SILENTS: tuple[Silent, ...] = ("ignored", "absent")
LEVELS: NDArray[np.float64] = np.round(np.arange(0.51, 1.005, 0.01), 2)
"""Shares of the evidence that a call may ask for: always a majority."""
Array = NDArray[np.float64]


class ReadingError(ValueError):
    """Settings that are damaged, or figures on the studies that settings were fitted to."""


class NeighbourSentence(NamedTuple):
    """A sentence of a neighbour's report and what it states; one of findings in two states is given once for each, with the same text."""

    text: str
    findings: tuple[str, ...]
    state: State


@dataclass(frozen=True)
class Neighbour:
    """A study that a search returned.

    Raises:
        ValueError: a score that is not finite, or a fact that is none of 1, 0 and -1.
    """

    study_id: str
    score: float  # cosine, or another similarity: higher is nearer
    facts: Mapping[str, int] = field(default_factory=dict)  # finding -> 1 present, 0 absent, -1 uncertain; no key: not mentioned
    sentences: tuple[NeighbourSentence, ...] = ()
    patient_id: str | None = None  # None: not known, so that the study stands alone

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise ValueError(f"study {self.study_id}: score {self.score}, expected a finite similarity")
        if odd := {name: fact for name, fact in self.facts.items() if fact not in STATES.values()}:
            raise ValueError(f"study {self.study_id}: facts {odd}, expected 1 present, 0 absent, -1 uncertain, and no key if not mentioned")
        if odd_states := {state for _, _, state in self.sentences} - set(STATES):
            raise ValueError(f"study {self.study_id}: sentences in state {sorted(odd_states)}, expected {', '.join(STATES)}")


@dataclass(frozen=True)
class Limits:
    """What a call needs, in (0.5, 1]: ``present`` of the evidence, ``absent`` of 1 - evidence; None: it is never called."""

    present: float | None = 0.75
    absent: float | None = 0.75

    def __post_init__(self) -> None:
        if not all(level is None or 0.5 < level <= 1 for level in (self.present, self.absent)):
            raise ValueError(f"limits must lie above 0.5, so that no call goes against the majority, and be at most 1; got {self}")


@dataclass(frozen=True)
class ReadingSettings:
    """How neighbours are read; as given here not fitted to anything, see :func:`fit_reading`.

    Args:
        k: patients that vote, the nearest ones; patients that tie with the last of them vote too.
        temperature: of the weights, on the scale of the scores; None: weights by distance. See :func:`weigh`.
        silent: a neighbour that does not mention a finding says that it is absent, or is ignored.
        floor: the best score must reach it; None: no floor.
        fewest: patients that must say something of a finding.
        limits: finding -> what a call needs.
        default: of the findings that are not among ``limits``.
        fitted_on: what they were fitted on, and what was measured there (better than it will be on others).
        seen: digests of the studies they were fitted on, sorted.
    Raises:
        ValueError: a value outside its range.
    """

    k: int = 20
    temperature: float | None = 0.03
    silent: Silent = "ignored"
    floor: float | None = None
    fewest: int = 3
    limits: Mapping[str, Limits] = field(default_factory=dict)
    default: Limits = field(default_factory=Limits)
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    seen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.k < 1 or self.fewest < 1:
            raise ValueError(f"k {self.k} and fewest {self.fewest}, expected at least 1 patient")
        _check_temperature(self.temperature)
        if self.silent not in get_args(Silent):
            raise ValueError(f"no rule silent={self.silent!r}; there are {', '.join(get_args(Silent))}")
        if self.floor is not None and not math.isfinite(self.floor):
            raise ValueError(f"floor {self.floor}, expected a finite score or None")

    def limits_of(self, finding: str) -> Limits:
        """The finding's own, or the default."""
        return self.limits.get(finding, self.default)

    def check_unseen(self, study_ids: Sequence[str]) -> None:
        """Pass if none of the studies was fitted on.

        Raises:
            ReadingError: some were, so that figures on them would flatter.
        """
        seen = set(self.seen)
        if known := [one for one in study_ids if _digest(one) in seen]:
            raise ReadingError(
                f"{len(known)} of {len(study_ids)} studies, {known[0]} among them, are those that the reading was fitted on; "
                "measure on studies of other patients"
            )

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON; back with :meth:`from_dict`."""
        return {"format": FORMAT, "notice": RESEARCH_USE, **asdict(self), "seen": list(self.seen)}

    def save(self, path: Path) -> None:
        """Write them whole or not at all; back with :func:`load_reading`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ReadingSettings:
        """The record that :meth:`to_dict` made.

        Raises:
            ReadingError: another format, or a record that is damaged.
        """
        try:
            if record["format"] != FORMAT:
                raise ReadingError(f"settings of a reading in format {record['format']}, expected {FORMAT}")
            given = {name: value for name, value in record.items() if name not in ("format", "notice")}
            limits = {name: Limits(**one) for name, one in given["limits"].items()}
            made = {"default": Limits(**given["default"]), "seen": tuple(given["seen"]), "fitted_on": dict(given["fitted_on"])}
            return cls(**{**given, "limits": limits, **made})
        except ReadingError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ReadingError(f"no settings of a reading ({type(error).__name__}: {error}); fit them again") from error


def load_reading(path: Path) -> ReadingSettings:
    """Settings of a file.

    Raises:
        ReadingError: it cannot be read, or is none that :meth:`ReadingSettings.save` wrote.
    """
    try:
        return ReadingSettings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ReadingError as error:
        raise ReadingError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise ReadingError(f"{path}: no settings that `medvl calibrate-reading` wrote ({type(error).__name__})") from error


@dataclass(frozen=True)
class Vote:
    """What the neighbours say of one finding."""

    finding: str
    call: Call
    reason: Reason | None  # why it abstains
    evidence: float  # see :func:`evidence_of`; NaN where nothing is said
    agreement: float  # share of the larger side among what is said, the uncertain with neither; NaN where nothing is said
    present: float  # share of the weight, like the next three, before the rule of ``silent``
    absent: float
    uncertain: float
    silent: float
    speaking: int  # patients with weight that say something
    effective: float  # of these, how many equal ones would tell as much: 1 / sum of squared shares; 0 where nothing is said

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: NaN becomes None."""
        return _strict(asdict(self))


@dataclass(frozen=True)
class Source:
    """Where a statement comes from."""

    study_id: str
    score: float
    weight: float  # share of the weight of all neighbours


@dataclass(frozen=True)
class ReadingStatement:
    """One line of a reading: what the vote accepts, and a sentence of a neighbour that says so, if there is one.

    It is what the reports of other patients say, not a claim about this one.
    """

    claims: Mapping[str, State]  # finding -> state, of everything that the sentence states; each as the vote has it
    text: str | None  # None: no neighbour has a sentence that states this and nothing that was not accepted
    support: float  # share of the weight whose facts agree with every claim
    sources: tuple[Source, ...]  # those with the sentence, or without one those that agree; the heaviest first

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reading:
    """Votes on every finding asked for, and the statements that they allow."""

    votes: tuple[Vote, ...]  # in the order of the findings
    statements: tuple[ReadingStatement, ...]  # present before absent
    neighbours: int  # with weight
    patients: int  # with weight
    effective: float  # how many patients of equal weight would tell as much; 0 without neighbours
    best_score: float  # NaN without neighbours
    notice: str = RESEARCH_USE

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: NaN becomes None."""
        lines = {"votes": [vote.to_dict() for vote in self.votes], "statements": [one.to_dict() for one in self.statements]}
        return _strict({"notice": self.notice, **asdict(self), **lines})


def weigh(scores: ArrayLike, patients: ArrayLike, k: int, temperature: float | None) -> Array:
    """Weights of neighbours: softmax or linear in the score, a patient's studies sharing the weight of its best.

    With P(i) the patient of neighbour i, b_P the best score of a patient, T the patients whose b_P is among the k highest, ties with the
    k-th included, and for neighbours of T (all others weigh 0)
        r_i = exp((s_i - max s) / temperature),  or without a temperature
        r_i = max(0, s_i - min_T b_P) / (max_T b_P - min_T b_P),  and 1 for those at the best score if that is 0 / 0:
        w_i = r_i / sum_{j: P(j) = P(i)} r_j * max_{j: P(j) = P(i)} r_j / sum_{P in T} max_{j: P(j) = P} r_j

    Softmax does not move when all scores shift, or when scores and temperature are scaled alike; weights by distance move by neither. They
    give the last of the patients nothing. A second study of a patient takes its share from the first and from no other patient.

    Args:
        scores: (K,), higher is nearer.
        patients: (K,) what tells patients apart.
        k: at least 1.
        temperature: above 0, or None.
    Returns:
        (K,), at least 0, summing to 1; empty for no neighbours.
    Raises:
        ValueError: lengths that differ, a score that is not finite, or a k or temperature outside its range.
    Source: softmax: Wu et al. 2018, arXiv:1805.01978, sec. 3.4; kNN-LM, arXiv:1911.00172, eq. 2; by distance: Dudani 1976,
        doi:10.1109/TSMC.1976.5408784, eq. 1. One weight a patient is ours.
    """
    given = np.asarray(scores, dtype=np.float64)
    names = np.asarray(patients)
    if given.ndim != 1 or names.shape != given.shape or not np.isfinite(given).all():
        raise ValueError(f"scores of shape {given.shape} and patients of shape {names.shape}: both must be (K,), the scores finite")
    _check_temperature(temperature)
    if k < 1:
        raise ValueError(f"k {k}, expected at least 1 patient")
    if not len(given):
        return given
    _, member = np.unique(names, return_inverse=True)
    best = _highest(given, member)
    last = np.sort(best)[::-1][min(k, len(best)) - 1]
    if temperature is not None:
        raw = np.exp((given - given.max()) / temperature)
    elif last < given.max():
        raw = np.maximum(0, given - last) / (given.max() - last)
    else:
        raw = (given >= last).astype(np.float64)
    raw = np.where(best[member] >= last, raw, 0.0)
    own, summed = _highest(raw, member), np.bincount(member, raw)
    within = np.divide(raw, summed[member], out=np.zeros_like(raw), where=summed[member] > 0)
    return np.asarray(within * own[member] / own.sum())


def evidence_of(present: ArrayLike, absent: ArrayLike, uncertain: ArrayLike, silent: ArrayLike, rule: Silent) -> Array:
    """Share that says present of what says anything, an uncertain neighbour being half for either; all (F,).

        evidence = (p + u / 2) / (p + a + u)              rule "ignored"
        evidence = (p + u / 2) / (p + a + s + u)          rule "absent"
    NaN where the divisor is 0.
    """
    p, a, u, s = (np.asarray(one, dtype=np.float64) for one in (present, absent, uncertain, silent))
    said = p + u + (a + s if rule == "absent" else a)
    return np.asarray(np.divide(p + u / 2, said, out=np.full(said.shape, math.nan), where=said > 0))


def vote(neighbours: Sequence[Neighbour], findings: Sequence[str], settings: ReadingSettings) -> tuple[Vote, ...]:
    """The vote on each finding; the order of the neighbours does not matter.

    A finding abstains, in this order: "far" where the best score is below the floor; "few" where fewer patients than ``fewest`` say
    something of it, as without any neighbour; "disagree" where neither side has the share that its limit asks for, as at a tie;
    "unproven" where the larger side has no limit.

    Raises:
        ValueError: a study twice among the neighbours, or a finding twice.
    """
    counted = _Ballot.of(neighbours, findings).count(settings.k, settings.temperature)
    return _votes(counted, findings, settings)


def read(neighbours: Sequence[Neighbour], findings: Sequence[str], settings: ReadingSettings) -> Reading:
    """Vote, and for each finding that is called the sentence to show.

    A sentence may be shown only if everything it states is what the vote accepted: none that contradicts it, that is uncertain, or that
    speaks of a finding on which the vote abstains or which was not asked for. Of these the one that most of the weight agrees with, by the
    facts of all neighbours and every claim of the sentence; then of the highest score; then that most of the weight has word for word; then
    by its words. Texts that differ only in case, spacing and the stop at the end are one. A sentence that is chosen for two findings is
    shown once.

    Raises:
        ValueError: a study twice among the neighbours, or a finding twice.
    """
    ballot = _Ballot.of(neighbours, findings)
    counted = ballot.count(settings.k, settings.temperature)
    votes = _votes(counted, findings, settings)
    accepted: dict[str, State] = {one.finding: one.call for one in votes if one.call != "abstain"}
    sentences = _sentences(ballot.neighbours, counted.weights)
    agreeing = {one.finding: ballot.agreeing(f, one.call, settings.silent) for f, one in enumerate(votes) if one.call != "abstain"}
    shown: dict[tuple[str | None, tuple[str, ...]], ReadingStatement] = {}
    for name in sorted(accepted, key=lambda one: accepted[one] == "absent"):
        statement = _statement(name, accepted, sentences, ballot.neighbours, counted.weights, agreeing)
        shown.setdefault((statement.text, tuple(statement.claims)), statement)
    heavy = counted.weights > 0
    return Reading(
        votes=votes,
        statements=tuple(shown.values()),
        neighbours=int(heavy.sum()),
        patients=len(set(ballot.patients[heavy].tolist())),
        effective=float(_effective(np.asarray(np.bincount(ballot.patients, counted.weights), dtype=np.float64)[:, None])[0]),
        best_score=ballot.best,
    )


def evidence_matrix(neighbours: Sequence[Sequence[Neighbour]], findings: Sequence[str], settings: ReadingSettings) -> Array:
    """(Q, F) evidence of each query and finding, NaN where nothing is said; for AUROC beside other scores.

    How sure a vote is does not depend on floor, ``fewest`` or limits, so that rows which abstain are here too.
    """
    ballots = [_Ballot.of(one, findings) for one in neighbours]
    return _matrix([one.count(settings.k, settings.temperature) for one in ballots], settings.silent, len(findings))


def call_matrix(readings: Sequence[Sequence[Vote]], findings: Sequence[str]) -> NDArray[np.int64]:
    """(Q, F) of 1 present, 0 absent and ``medvl.metrics.ABSTAIN``, from the votes of each query.

    Raises:
        ValueError: votes on other findings.
    """
    numbers: Mapping[Call, int] = {"present": 1, "absent": 0, "abstain": ABSTAIN}
    if any(tuple(one.finding for one in votes) != tuple(findings) for votes in readings):
        raise ValueError(f"votes are on other findings than {', '.join(findings)}, or in another order")
    return np.array([[numbers[one.call] for one in votes] for votes in readings], dtype=np.int64).reshape(len(readings), len(findings))


def auroc_with_silence(labels: ArrayLike, evidence: ArrayLike) -> float:
    """AUROC of (Q,) evidence, a row without any being told apart from others by chance alone: the pair counts half.

        c auroc(rows with evidence) + (1 - c) / 2,  c = positives with evidence * negatives with evidence / (positives * negatives)
    So that a rule which says nothing of hard studies gains nothing by it. NaN without both labels.

    Args:
        labels: (Q,) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        evidence: (Q,), may be NaN.
    Raises:
        ValueError: shapes that differ, or another label.
    """
    values = np.asarray(evidence, dtype=np.float64)
    silent = np.isnan(values)
    used, positive, _ = known_rows(labels, np.where(silent, 0.0, values))
    pairs = int(positive.sum()) * int((~positive).sum())
    if not pairs:
        return math.nan
    said = ~silent[used]
    share = int(positive[said].sum()) * int((~positive)[said].sum()) / pairs
    return share * auroc(positive[said], values[used][said]) + (1 - share) / 2 if share else 0.5


def certified_level(order: tuple[ArrayLike, ArrayLike], proof: tuple[ArrayLike, ArrayLike], error: float, delta: float) -> float | None:
    """The lowest of ``LEVELS`` at which calls are shown to be wrong at most ``error`` of the time; None if that is shown at none.

    At a level, n rows are at or above it and e of them are wrong; the chance of so few if calls were wrong more often is at most
        p = P(Binomial(n, error) <= e)
    Levels are tested on ``proof`` from where p is smallest on ``order`` downwards, each only if those before it had p <= delta. Then the
    level that is returned is wrong more often than ``error`` with chance at most ``delta``, over proofs of rows that are independent of
    each other and of ``order``, and of one kind with those to come: one row a patient, from the same place.

    Args:
        order, proof: (n,) strength of the side that is called, and (n,) bool, whether the call is wrong.
        error, delta: in (0, 1).
    Raises:
        ValueError: a value outside, or lengths that differ.
    Source: Learn then Test, arXiv:2110.01052, fixed-sequence testing with an order from other data; error among answered cases:
        Geifman & El-Yaniv 2017, arXiv:1705.08500.
    """
    if not (0 < error < 1 and 0 < delta < 1):
        raise ValueError(f"error {error} and delta {delta} must lie between 0 and 1")
    first, chance = _p_values(*order, error), _p_values(*proof, error)
    start = int(len(first) - 1 - np.argmin(first[::-1]))  # of equally good ones the highest
    passed = None
    for i in range(start, -1, -1):
        if chance[i] > delta:
            break
        passed = float(LEVELS[i])
    return passed


def fit_reading(
    neighbours: Sequence[Sequence[Neighbour]],
    labels: Array,
    findings: Sequence[str],
    study_ids: Sequence[str],
    patients: Sequence[str],
    *,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float | None] = TEMPERATURES,
    silents: Sequence[Silent] = SILENTS,
    error: float = 0.1,
    delta: float = 0.1,
    fewest: int = 3,
    far: float = 0.01,
    fitted_on: Mapping[str, Any] | None = None,
) -> ReadingSettings:
    """Choose k, temperature and the rule of silence, then a floor, then the limits of every finding, all on validation studies.

    Patients are dealt into two halves by a hash of their ids. On the first, the setting of the highest macro :func:`auroc_with_silence`
    over the findings that have both labels there (of equal ones the first in the order of ``ks``, ``temperatures``, ``silents``), and the
    floor, below which ``far`` of exchangeable queries lie. On the second, with all that fixed, for each finding and each side a
    :func:`certified_level` at ``delta`` / 2: so with a chance of at least 1 - ``delta`` for each finding, calls of present and calls of
    absent are each wrong at most ``error`` of the time, and so are both together. Not for all findings at once, and not where patients
    differ from these. Levels are of the first study of each patient. A side of which that cannot be shown is never called: a finding needs
    some ln(delta / 2) / ln(1 - error) right calls (29 at the default) for it.

    Args:
        neighbours: (Q,) neighbours of each validation study, as many as k asks for; none of the same patient.
        labels: (Q, F) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
        study_ids, patients: (Q,).
        error, delta: see above.
        fewest: see :class:`ReadingSettings`.
        far: share of queries that may be too far, in (0, 1).
        fitted_on: what else to record: split, manifest, the model that made the scores.
    Raises:
        ValueError: lengths that differ, a study twice, fewer than two patients, a neighbour that is of the query's study or patient, a k
            of which no query has as many patients, or no finding with both labels in the first half.
    """
    _check_queries(neighbours, labels, findings, study_ids, patients, ks)
    for values, name in ((ks, "ks"), (temperatures, "temperatures"), (silents, "silents")):
        if not len(values):
            raise ValueError(f"no {name} to choose from")
    ballots = [_Ballot.of(one, findings) for one in neighbours]
    chosen_on = _first_half(patients)
    earliest = {one: i for i, one in reversed(list(enumerate(patients)))}
    first = np.array([i == earliest[one] for i, one in enumerate(patients)])
    tuning = np.flatnonzero(chosen_on)
    best, settings = -math.inf, None
    for k, temperature in product(ks, temperatures):
        counted = [ballots[i].count(k, temperature) for i in tuning]
        for silent in silents:
            evidence = _matrix(counted, silent, len(findings))
            value = _macro(labels[tuning], evidence)
            if value > best + 1e-12:
                best, settings = value, ReadingSettings(k, temperature, silent, fewest=fewest)
    if settings is None:
        raise ValueError("no finding has both labels among the validation studies that settings are chosen on; validate on more")
    nearest = np.array([one.best for one in ballots])
    floor = -choose_limit(-nearest[chosen_on & first & np.isfinite(nearest)], 1 - far).distance
    settings = replace(settings, floor=floor)
    tallies = [one.count(settings.k, settings.temperature) for one in ballots]
    evidence = _matrix(tallies, settings.silent, len(findings))
    speaking = np.array([one.tally(settings.silent).speaking for one in tallies])
    open_to_call = (nearest >= floor)[:, None] & (speaking >= fewest) & first[:, None]
    limits, levels = {}, {}
    for f, name in enumerate(findings):
        limits[name], levels[name] = _limits(labels[:, f], evidence[:, f], open_to_call[:, f], chosen_on, error, delta / 2)
    record = {
        "studies": len(study_ids),
        "patients": int(first.sum()),
        "patients_chosen_on": int((first & chosen_on).sum()),
        "patients_proven_on": int((first & ~chosen_on).sum()),
        "study_ids_sha256": hashlib.sha256("\n".join(sorted(map(_digest, study_ids))).encode()).hexdigest(),
        "macro_auroc_chosen_on": best,
        "error": error,
        "delta": delta,
        "far": far,
        "limits": levels,
    }
    seen = tuple(sorted(map(_digest, study_ids)))
    never = Limits(None, None)
    return replace(settings, limits=limits, default=never, fitted_on={**record, **(fitted_on or {})}, seen=seen)


def answered_scores(
    votes: Sequence[Sequence[Vote]],
    labels: Array,
    findings: Sequence[str],
    study_ids: Sequence[str],
    patients: Sequence[str],
    settings: ReadingSettings,
    *,
    repeats: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Coverage and error at the abstention of the settings, of each finding and their mean (``MACRO``), with patient-level intervals.

    ``coverage`` is the share of the rows labelled 1 or 0 that are called; ``error`` the share of these calls that are wrong,
    ``error_present`` and ``error_absent`` of the calls of one side; NaN where nothing was called, and then left out of the mean.

    Args:
        votes: (Q,) of :func:`vote`, made with ``settings``.
        labels: (Q, F) of 1, 0, -1 uncertain and NaN not mentioned; the last two do not count.
    Raises:
        ReadingError: a study that the settings were fitted on.
        ValueError: shapes that differ, or other labels.
    """
    settings.check_unseen(study_ids)
    calls = call_matrix(votes, findings)
    _check_labels(labels, len(calls), findings)
    known = np.isin(labels, (0.0, 1.0))
    answered = known & (calls != ABSTAIN)
    wrong = (calls != labels).astype(np.float64)
    tables = {
        "coverage": np.where(known, answered, math.nan),
        "error": np.where(answered, wrong, math.nan),
        "error_present": np.where(answered & (calls == 1), wrong, math.nan),
        "error_absent": np.where(answered & (calls == 0), wrong, math.nan),
    }
    return {name: mean_intervals(table, findings, patients, repeats=repeats, seed=seed) for name, table in tables.items()}


@dataclass(frozen=True)
class _Ballot:
    """Neighbours of one query by falling score, then study; so their order when given moves no digit of an answer."""

    neighbours: tuple[Neighbour, ...]
    scores: Array  # (K,)
    patients: NDArray[np.int64]  # (K,) the nearest 0, the next 1, ...
    said: NDArray[np.bool_]  # (4, K, F) present, absent, uncertain, nothing

    @classmethod
    def of(cls, neighbours: Sequence[Neighbour], findings: Sequence[str]) -> _Ballot:
        ordered = tuple(sorted(neighbours, key=lambda one: (-one.score, one.study_id)))
        ids = [one.study_id for one in ordered]
        if len(set(ids)) != len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise ValueError(f"study {twice} is among the neighbours {ids.count(twice)} times; group the hits of a search by study first")
        if len(set(findings)) != len(findings):
            raise ValueError(f"findings must differ, got {list(findings)}")
        numbers: dict[tuple[bool, str], int] = {}
        patients = [numbers.setdefault(_patient_of(one), len(numbers)) for one in ordered]
        facts = [[one.facts.get(name, math.nan) for name in findings] for one in ordered]
        table = np.array(facts, dtype=np.float64).reshape(len(ordered), len(findings))
        said = np.stack([table == 1, table == 0, table == -1, np.isnan(table)])
        return cls(ordered, np.array([one.score for one in ordered], dtype=np.float64), np.array(patients, dtype=np.int64), said)

    @property
    def best(self) -> float:
        """The highest score, NaN without neighbours."""
        return float(self.scores[0]) if len(self.scores) else math.nan

    def count(self, k: int, temperature: float | None) -> _Count:
        return _Count(self, weigh(self.scores, self.patients, k, temperature))

    def agreeing(self, finding: int, call: Call, silent: Silent) -> NDArray[np.bool_]:
        """(K,) whether a neighbour's facts say what the vote says of a finding."""
        present, absent, _, nothing = self.said[:, :, finding]
        if call == "present":
            return present
        return absent | nothing if silent == "absent" else absent


@dataclass(frozen=True)
class _Tally:
    """What is said of each finding under a rule of silence."""

    evidence: Array  # (F,)
    agreement: Array  # (F,)
    speaking: NDArray[np.int64]  # (F,)
    effective: Array  # (F,)


@dataclass(frozen=True)
class _Count:
    """A ballot with its weights."""

    ballot: _Ballot
    weights: Array  # (K,)

    @property
    def best(self) -> float:
        return self.ballot.best

    @property
    def shares(self) -> Array:
        """(4, F)."""
        return np.asarray(self.weights @ self.ballot.said)

    def of_patients(self, kinds: int) -> Array:
        """(P, F) weight of each patient that says one of the first ``kinds`` of present, absent, uncertain, nothing."""
        found = np.zeros((int(self.ballot.patients.max(initial=-1)) + 1, self.ballot.said.shape[2]))
        np.add.at(found, self.ballot.patients, self.weights[:, None] * self.ballot.said[:kinds].any(axis=0))
        return found

    def evidence(self, silent: Silent) -> Array:
        """(F,)."""
        p, a, u, s = self.shares
        return evidence_of(p, a, u, s, silent)

    def tally(self, silent: Silent) -> _Tally:
        p, a, u, s = self.shares
        against = a + s if silent == "absent" else a
        said = p + u + against
        agreement = np.divide(np.maximum(p, against), said, out=np.full(said.shape, math.nan), where=said > 0)
        saying = self.of_patients(4 if silent == "absent" else 3)
        return _Tally(self.evidence(silent), agreement, (saying > 0).sum(axis=0), _effective(saying))


def _votes(counted: _Count, findings: Sequence[str], settings: ReadingSettings) -> tuple[Vote, ...]:
    tally, shares = counted.tally(settings.silent), counted.shares
    far = settings.floor is not None and counted.best < settings.floor
    found = []
    for f, name in enumerate(findings):
        evidence, speaking = float(tally.evidence[f]), int(tally.speaking[f])
        call, reason = _call(evidence, speaking, far, settings.limits_of(name), settings.fewest)
        p, a, u, s = map(float, shares[:, f])
        agreement, effective = float(tally.agreement[f]), float(tally.effective[f])
        found.append(Vote(name, call, reason, evidence, agreement, p, a, u, s, speaking, effective))
    return tuple(found)


def _call(evidence: float, speaking: int, far: bool, limits: Limits, fewest: int) -> tuple[Call, Reason | None]:
    if far:
        return "abstain", "far"
    if speaking < fewest:
        return "abstain", "few"
    if evidence == 0.5:
        return "abstain", "disagree"
    side: Call = "present" if evidence > 0.5 else "absent"
    level = limits.present if side == "present" else limits.absent
    if level is None:
        return "abstain", "unproven"
    return (side, None) if _strength(evidence, side) >= level else ("abstain", "disagree")


def _strength(evidence: Any, side: Call) -> Any:
    """Share of the evidence that is on a side."""
    return evidence if side == "present" else 1 - evidence


class _Told(NamedTuple):
    """A text of one or more neighbours."""

    text: str
    claims: frozenset[tuple[str, State]]
    rows: tuple[int, ...]  # of the neighbours that have it


def _sentences(neighbours: Sequence[Neighbour], weights: Array) -> tuple[_Told, ...]:
    """Every text of the neighbours with weight, once, with all that anyone says it states; as the nearest of them writes it."""
    found: dict[str, tuple[str, set[tuple[str, State]], dict[int, None]]] = {}
    for i in np.flatnonzero(weights > 0).tolist():
        for text, findings, state in neighbours[i].sentences:
            key = " ".join(text.split()).casefold().rstrip(" .!?")
            _, claims, rows = found.setdefault(key, (text, set(), {}))
            claims.update((name, state) for name in findings)
            rows[i] = None
    return tuple(_Told(text, frozenset(claims), tuple(rows)) for text, claims, rows in found.values())


def _statement(
    finding: str,
    accepted: Mapping[str, State],
    sentences: Sequence[_Told],
    neighbours: Sequence[Neighbour],
    weights: Array,
    agreeing: Mapping[str, NDArray[np.bool_]],
) -> ReadingStatement:
    """See :func:`read`. ``agreeing`` is (K,) of each accepted finding."""
    own = (finding, accepted[finding])

    def agrees(claims: frozenset[tuple[str, State]]) -> NDArray[np.bool_]:
        return np.logical_and.reduce([agreeing[name] for name, _ in sorted(claims)])

    def rank(told: _Told) -> tuple[float, float, float, str]:
        rows = list(told.rows)
        shares = (float(weights[chosen].sum()) for chosen in (agrees(told.claims), rows))
        by_facts, by_words = (round(share, 12) for share in shares)
        return -by_facts, -max(neighbours[i].score for i in rows), -by_words, told.text

    fit = [one for one in sentences if own in one.claims and all(accepted.get(name) == state for name, state in one.claims)]
    best = min(fit, key=rank, default=None)
    claims = frozenset({own}) if best is None else best.claims
    heavy = agrees(claims) & (weights > 0)
    rows = np.flatnonzero(heavy).tolist() if best is None else list(best.rows)
    sources = [Source(neighbours[i].study_id, neighbours[i].score, float(weights[i])) for i in rows]
    sources.sort(key=lambda one: (-one.weight, one.study_id))
    return ReadingStatement(dict(sorted(claims)), None if best is None else best.text, float(weights[heavy].sum()), tuple(sources))


def _limits(
    labels: Array, evidence: Array, open_to_call: NDArray[np.bool_], chosen_on: NDArray[np.bool_], error: float, delta: float
) -> tuple[Limits, dict[str, Any]]:
    """The limits of one finding, and of each side what was called at its level, and how much of it wrongly, in the half that proves it."""
    found: dict[str, float | None] = {}
    record: dict[str, Any] = {}
    known = open_to_call & np.isin(labels, (0.0, 1.0))
    sides: tuple[tuple[Call, float], ...] = (("present", 1.0), ("absent", 0.0))
    for side, label in sides:
        strength = np.asarray(_strength(evidence, side))
        rows = known & (strength > 0.5)
        order, proof = ((strength[rows & half], labels[rows & half] != label) for half in (chosen_on, ~chosen_on))
        found[side] = level = certified_level(order, proof, error, delta)
        called = proof[0] >= level if level is not None else np.zeros(len(proof[0]), dtype=bool)
        record[side] = {"level": level, "called": int(called.sum()), "wrong": int(proof[1][called].sum())}
    return Limits(found["present"], found["absent"]), record


def _p_values(strength: ArrayLike, wrong: ArrayLike, error: float) -> Array:
    """Of each level, see :func:`certified_level`; 1 where nothing is called."""
    values, faults = np.asarray(strength, dtype=np.float64), np.asarray(wrong, dtype=bool)
    if values.ndim != 1 or values.shape != faults.shape:
        raise ValueError(f"strengths have shape {values.shape}, faults {faults.shape}; both must be (n,)")
    called = values[:, None] >= LEVELS
    return np.asarray(binom.cdf((called & faults[:, None]).sum(axis=0), called.sum(axis=0), error))


def _macro(labels: Array, evidence: Array) -> float:
    """Mean over the findings with both labels; -inf of none."""
    both = [f for f in range(labels.shape[1]) if label_counts(labels[:, f]).has_both]
    return float(np.mean([auroc_with_silence(labels[:, f], evidence[:, f]) for f in both])) if both else -math.inf


def _matrix(counted: Sequence[_Count], silent: Silent, findings: int) -> Array:
    return np.array([one.evidence(silent) for one in counted], dtype=np.float64).reshape(len(counted), findings)


def _effective(weights: Array) -> Array:
    """(F,) of (P, F) weights: (sum w)^2 / sum w^2, 0 of nothing (Kish 1965)."""
    top, bottom = weights.sum(axis=0) ** 2, (weights**2).sum(axis=0)
    return np.asarray(np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0))


def _highest(values: Array, member: NDArray[np.int64]) -> Array:
    """(P,) the highest of (K,) values of each of the groups that ``member`` numbers."""
    found = np.full(int(member.max()) + 1, -math.inf)
    np.maximum.at(found, member, values)
    return found


def _first_half(patients: Sequence[str]) -> NDArray[np.bool_]:
    """(Q,) whether the patient is of the half that settings are chosen on; by a hash, so that no order and no generator moves it."""
    half = set(sorted(set(patients), key=_digest)[::2])
    return np.array([one in half for one in patients])


def _patient_of(neighbour: Neighbour) -> tuple[bool, str]:
    """What tells patients apart; a study whose patient is not known is one of its own."""
    return (False, neighbour.study_id) if neighbour.patient_id is None else (True, neighbour.patient_id)


def _digest(name: str) -> str:
    """64 bits of the SHA-256 of an id."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _strict(record: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.items()}


def _check_temperature(temperature: float | None) -> None:
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature}, expected above 0, or None for weights by distance")


def _check_labels(labels: Array, rows: int, findings: Sequence[str]) -> None:
    if labels.shape != (rows, len(findings)):
        raise ValueError(f"labels have shape {labels.shape}, expected ({rows}, {len(findings)}): a row per query, a column per finding")
    if not np.isin(labels[~np.isnan(labels)], (1, 0, -1)).all():
        raise ValueError("labels must be 1, 0, -1 (uncertain) or NaN (not mentioned)")


def _check_queries(
    neighbours: Sequence[Sequence[Neighbour]],
    labels: Array,
    findings: Sequence[str],
    study_ids: Sequence[str],
    patients: Sequence[str],
    ks: Sequence[int],
) -> None:
    if not len(neighbours) == len(study_ids) == len(patients):
        raise ValueError(f"{len(neighbours)} queries, {len(study_ids)} study ids and {len(patients)} patients, expected as many of each")
    _check_labels(labels, len(neighbours), findings)
    if len(set(study_ids)) != len(study_ids) or len(set(patients)) < 2:
        raise ValueError(
            f"{len(study_ids)} studies with {len(set(study_ids))} ids, of {len(set(patients))} patients; "
            "study ids must differ, and at least 2 patients are needed"
        )
    for near, study, patient in zip(neighbours, study_ids, patients, strict=True):
        if own := [one.study_id for one in near if one.study_id == study or one.patient_id == patient]:
            raise ValueError(f"study {study} has a neighbour of its own patient, {own[0]}; exclude the patient from the search")
    most = max((len({_patient_of(one) for one in near}) for near in neighbours), default=0)
    if ks and max(ks) > most:
        raise ValueError(
            f"k {max(ks)} cannot be tried: no query has neighbours of more than {most} patients; search for more, or ask for less"
        )
