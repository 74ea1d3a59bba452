"""Reading by retrieval against the formulas in plain Python: weights, votes, sentences, what validation chooses, and what is refused."""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from medvl.metrics import ABSTAIN
from medvl.types import State
from tasks.archive.reading import (
    LEVELS,
    Limits,
    Neighbour,
    NeighbourSentence,
    ReadingError,
    ReadingSettings,
    answered_scores,
    auroc_with_silence,
    call_matrix,
    certified_level,
    evidence_matrix,
    fit_reading,
    read,
    vote,
    weigh,
)

FINDINGS = ("edema", "effusion", "nodule")
Told = tuple[str, tuple[str, ...], State]
Cohort = tuple[list[list[Neighbour]], NDArray[np.float64], list[str], list[str]]
EXACT = settings(deadline=None, max_examples=60)


def reference_weights(neighbours: list[Neighbour], k: int, temperature: float | None) -> dict[str, float]:
    """Weight of each study, one patient at a time, in plain Python floats."""
    by_patient: dict[tuple[str, str], list[Neighbour]] = {}
    for one in neighbours:
        by_patient.setdefault(("study", one.study_id) if one.patient_id is None else ("patient", one.patient_id), []).append(one)
    best = {patient: max(one.score for one in own) for patient, own in by_patient.items()}
    last = sorted(best.values(), reverse=True)[: min(k, len(best))][-1]
    top = max(best.values())

    def raw(one: Neighbour) -> float:
        if temperature is not None:
            return math.exp((one.score - top) / temperature)
        if top == last:
            return 1.0 if one.score == top else 0.0
        return max(0.0, (one.score - last) / (top - last))

    voting = [patient for patient in by_patient if best[patient] >= last]
    total = sum(max(raw(one) for one in by_patient[patient]) for patient in voting)
    found = {one.study_id: 0.0 for one in neighbours}
    for patient in voting:
        own = by_patient[patient]
        for one in own:
            among = sum(raw(other) for other in own)
            found[one.study_id] = raw(one) / among * max(raw(other) for other in own) / total if among else 0.0
    return found


def reference_vote(neighbours: list[Neighbour], finding: str, given: ReadingSettings) -> tuple[Any, ...]:
    """Evidence, agreement, shares, patients that speak, effective number, call and reason of one finding."""
    weights = reference_weights(neighbours, given.k, given.temperature) if neighbours else {}
    share: dict[int | None, float] = {1: 0.0, 0: 0.0, -1: 0.0, None: 0.0}
    own: dict[Any, float] = {}
    for one in neighbours:
        fact, weight = one.facts.get(finding), weights[one.study_id]
        share[fact] += weight
        if weight and (fact is not None or given.silent == "absent"):
            patient = one.patient_id if one.patient_id is not None else ("alone", one.study_id)
            own[patient] = own.get(patient, 0.0) + weight
    against = share[0] + (share[None] if given.silent == "absent" else 0.0)
    said = share[1] + against + share[-1]
    evidence = (share[1] + share[-1] / 2) / said if said else math.nan
    agreement = max(share[1], against) / said if said else math.nan
    effective = sum(own.values()) ** 2 / sum(v * v for v in own.values()) if own else 0.0
    limits = given.limits.get(finding, given.default)
    if given.floor is not None and neighbours and max(one.score for one in neighbours) < given.floor:
        outcome: tuple[str, str | None] = ("abstain", "far")
    elif len(own) < given.fewest:
        outcome = ("abstain", "few")
    elif evidence == 0.5:
        outcome = ("abstain", "disagree")
    else:
        side, strength = ("present", evidence) if evidence > 0.5 else ("absent", 1 - evidence)
        level = getattr(limits, side)
        outcome = ("abstain", "unproven") if level is None else (side, None) if strength >= level else ("abstain", "disagree")
    return evidence, agreement, share, len(own), effective, outcome


@st.composite
def queries(draw: st.DrawFn, least: int = 0, most: int = 9) -> list[Neighbour]:
    """Neighbours on a coarse grid of scores, so that ties occur, some of one patient, some of no known patient."""
    found = []
    for i in range(draw(st.integers(least, most))):
        facts = {name: state for name in FINDINGS if (state := draw(st.sampled_from([1, 0, -1, None]))) is not None}
        patient = draw(st.sampled_from([None, "a", "b", "c", "d"]))
        words: dict[int, State] = {1: "present", 0: "absent", -1: "uncertain"}
        case = draw(st.sampled_from([str.lower, str.upper, str.title]))
        told = [NeighbourSentence(case(f"{name} {words[fact]}."), (name,), words[fact]) for name, fact in facts.items()]
        found.append(Neighbour(f"s{i}", draw(st.integers(-4, 8)) / 8, facts, tuple(told), patient))
    return found


RULES = st.builds(
    ReadingSettings,
    k=st.integers(1, 6),
    temperature=st.sampled_from([None, 0.05, 0.3, 2.0]),
    silent=st.sampled_from(["absent", "ignored"]),
    floor=st.sampled_from([None, 0.0, 0.5]),
    fewest=st.integers(1, 3),
    default=st.sampled_from([Limits(), Limits(0.51, 0.51), Limits(None, 0.9), Limits(1.0, None)]),
)


def as_number(value: float) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else pytest.approx(value, rel=1e-9, abs=1e-12)


@EXACT
@given(queries(), RULES)
def test_votes_match_the_formulas(neighbours: list[Neighbour], rules: ReadingSettings) -> None:
    for found in vote(neighbours, FINDINGS, rules):
        evidence, agreement, share, speaking, effective, outcome = reference_vote(neighbours, found.finding, rules)
        record = found.to_dict()
        assert record["evidence"] == as_number(evidence) and record["agreement"] == as_number(agreement)
        assert (found.present, found.absent, found.uncertain, found.silent) == pytest.approx(tuple(share.values()), abs=1e-12)
        assert (found.speaking, found.effective) == (speaking, pytest.approx(effective, rel=1e-9))
        limit = rules.default.present if evidence > 0.5 else rules.default.absent
        on_the_edge = not math.isnan(evidence) and min(abs(evidence - 0.5), abs(max(evidence, 1 - evidence) - (limit or 2))) < 1e-9
        if not on_the_edge:  # where the last digit decides
            assert (found.call, found.reason) == outcome
        assert (found.call == "abstain") == (found.reason is not None)


@EXACT
@given(queries(least=1), st.integers(1, 6), st.sampled_from([None, 0.05, 0.3, 2.0]))
def test_weights_match_the_formula_and_sum_to_one(neighbours: list[Neighbour], k: int, temperature: float | None) -> None:
    names = [str(one.patient_id or one.study_id) for one in neighbours]
    found = weigh([one.score for one in neighbours], names, k, temperature)
    wanted = reference_weights(neighbours, k, temperature)
    np.testing.assert_allclose(found, [wanted[one.study_id] for one in neighbours], rtol=1e-9, atol=1e-15)
    assert found.sum() == pytest.approx(1, rel=1e-12) and (found >= 0).all()


@EXACT
@given(queries(), RULES, st.randoms(use_true_random=False))
def test_order_of_neighbours_moves_no_digit(neighbours: list[Neighbour], rules: ReadingSettings, chance: random.Random) -> None:
    other = list(neighbours)
    chance.shuffle(other)
    assert json.dumps(read(neighbours, FINDINGS, rules).to_dict()) == json.dumps(read(other, FINDINGS, rules).to_dict())


@EXACT
@given(queries(least=1), RULES, st.integers(1, 3), st.data())
def test_a_patients_study_again_moves_no_other_patient(
    neighbours: list[Neighbour], rules: ReadingSettings, copies: int, data: st.DataObject
) -> None:
    """Of a patient with one study the whole answer stays; of one with several the weight of the patient does."""
    chosen = data.draw(st.sampled_from(neighbours))
    patient = chosen.patient_id or "e"
    before = [dataclasses.replace(one, patient_id=patient) if one is chosen else one for one in neighbours]
    again = [dataclasses.replace(chosen, study_id=f"copy{i}", patient_id=patient) for i in range(copies)]

    def by_patient(near: list[Neighbour]) -> dict[str, float]:
        weights = weigh([n.score for n in near], [n.patient_id or n.study_id for n in near], rules.k, rules.temperature)
        found: dict[str, float] = {}
        for one, weight in zip(near, weights.tolist(), strict=True):
            found[one.patient_id or one.study_id] = found.get(one.patient_id or one.study_id, 0) + weight
        return found

    assert by_patient([*before, *again]) == pytest.approx(by_patient(before), rel=1e-9, abs=1e-12)
    if sum(one.patient_id == patient for one in before) == 1:
        for one, two in zip(vote(before, FINDINGS, rules), vote([*before, *again], FINDINGS, rules), strict=True):
            for name in ("evidence", "agreement", "present", "absent", "uncertain", "silent", "effective"):
                assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-9, abs=1e-12, nan_ok=True)
            assert one.speaking == two.speaking


@EXACT
@given(
    queries(least=1), st.integers(1, 6), st.sampled_from([0.05, 0.3, 2.0]), st.sampled_from([0.1, 3.0, 40.0]), st.sampled_from([-5.0, 0.7])
)
def test_the_scale_of_scores_is_that_of_the_temperature_and_none_by_distance(
    neighbours: list[Neighbour], k: int, temperature: float, factor: float, shift: float
) -> None:
    scores, patients = np.array([one.score for one in neighbours]), [one.patient_id or one.study_id for one in neighbours]
    plain = weigh(scores, patients, k, temperature)
    np.testing.assert_allclose(weigh(scores * factor, patients, k, temperature * factor), plain, atol=1e-9)
    np.testing.assert_allclose(weigh(scores * factor + 2**-3, patients, k, temperature * factor), plain, atol=1e-9)
    np.testing.assert_allclose(weigh(scores + round(shift * 8) / 8, patients, k, temperature), plain, atol=1e-9)
    by_distance = weigh(scores, patients, k, None)
    np.testing.assert_allclose(weigh(scores * 4 + 0.5, patients, k, None), by_distance, atol=1e-9)


def of(score: float, name: str, patient: str | None = None, *sentences: Told, **facts: int) -> Neighbour:
    return Neighbour(name, score, facts, tuple(NeighbourSentence(*one) for one in sentences), patient)


def test_weights_by_hand() -> None:
    assert weigh([0.9, 0.5, 0.1], ["a", "b", "c"], 3, None).tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert weigh([0.5, 0.5, 0.5], ["a", "b", "c"], 2, None).tolist() == pytest.approx([1 / 3] * 3), "ties with the k-th vote"
    assert weigh([0.9, 0.5, 0.1], ["a", "b", "c"], 1, 0.1).tolist() == [1, 0, 0]
    assert weigh([0.5, 0.5, 0.5], ["a", "a", "b"], 2, 0.1).tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert weigh([1.0, -1.0], ["a", "b"], 2, 1e-4).tolist() == [1, 0], "exp(-20000) is 0"
    assert weigh([], [], 3, 0.1).shape == (0,)


def test_silence_is_ignored_or_says_absent() -> None:
    near = [of(0.5, "1", edema=1), of(0.5, "2"), of(0.5, "3"), of(0.5, "4")]
    ignored, absent = (vote(near, ("edema",), ReadingSettings(silent=rule, fewest=1))[0] for rule in ("ignored", "absent"))
    assert (ignored.evidence, ignored.call, ignored.speaking, ignored.effective) == (1, "present", 1, 1)
    assert (absent.evidence, absent.call, absent.speaking, absent.effective) == (0.25, "absent", 4, pytest.approx(4))
    assert ignored.silent == absent.silent == 0.75


def test_an_uncertain_neighbour_is_half_for_either_and_agrees_with_neither() -> None:
    near = [of(0.5, "1", edema=1), of(0.5, "2", edema=-1), of(0.5, "3", edema=-1), of(0.5, "4", edema=-1)]
    found = vote(near, ("edema",), ReadingSettings(fewest=1))[0]
    assert (found.evidence, found.agreement, found.call, found.reason) == (0.625, 0.25, "abstain", "disagree")


def test_why_a_finding_abstains() -> None:
    split = [of(0.5, "1", edema=1), of(0.5, "2", edema=0)]
    agreed = [of(0.5, str(i), edema=1) for i in range(4)]

    def reason(near: list[Neighbour], **more: Any) -> tuple[str, str | None]:
        found = vote(near, ("edema",), ReadingSettings(**{"fewest": 1, **more}))[0]
        return found.call, found.reason

    assert reason(split) == ("abstain", "disagree") == reason(split, default=Limits(0.51, 0.51)), "a tie is no majority"
    assert reason(split, default=Limits(None, None)) == ("abstain", "disagree")
    assert reason(agreed) == ("present", None)
    assert reason(agreed, fewest=5) == ("abstain", "few")
    assert reason(agreed, floor=0.6, fewest=5) == ("abstain", "far")
    assert reason(agreed, floor=0.5) == ("present", None)
    assert reason(agreed, default=Limits(None, 0.75)) == ("abstain", "unproven")
    assert reason(agreed, limits={"edema": Limits(1.0, None)}) == ("present", None)
    same = [of(0.5, str(i), "one", edema=1) for i in range(4)]
    assert reason(same, fewest=2) == ("abstain", "few"), "four studies of one patient are one patient"
    assert reason([]) == ("abstain", "few") == reason([], floor=0.0)
    nothing = vote([], ("edema",), ReadingSettings())[0]
    assert math.isnan(nothing.evidence) and (nothing.speaking, nothing.effective, nothing.silent) == (0, 0, 0)
    assert nothing.to_dict()["evidence"] is None
    empty = read([], ("edema",), ReadingSettings())
    assert (empty.statements, empty.neighbours, empty.patients, empty.effective) == ((), 0, 0, 0) and empty.to_dict()["best_score"] is None


@EXACT
@given(queries(least=1), RULES)
def test_what_is_shown_is_what_was_accepted(neighbours: list[Neighbour], rules: ReadingSettings) -> None:
    found = read(neighbours, FINDINGS, rules)
    accepted = {one.finding: one.call for one in found.votes if one.call != "abstain"}
    assert {name for one in found.statements for name in one.claims} == set(accepted)
    weights = reference_weights(neighbours, rules.k, rules.temperature)
    texts = {one.study_id: {told.text.lower() for told in one.sentences} for one in neighbours}
    for one in found.statements:
        assert all(accepted[name] == state for name, state in one.claims.items())
        numbers = {name: 1 if state == "present" else 0 for name, state in one.claims.items()}
        silence = 0 if rules.silent == "absent" else None
        agreeing = [near for near in neighbours if all(near.facts.get(name, silence) == fact for name, fact in numbers.items())]
        assert one.support == pytest.approx(sum(weights[near.study_id] for near in agreeing), abs=1e-12)
        assert one.sources and all(source.weight == pytest.approx(weights[source.study_id]) for source in one.sources)
        if one.text is not None:
            assert all(one.text.lower() in texts[source.study_id] for source in one.sources)
    shown = [one.text for one in found.statements if one.text is not None]
    assert len({text.lower() for text in shown}) == len(shown)
    assert found.patients == len({near.patient_id or near.study_id for near in neighbours if weights[near.study_id] > 0})
    assert found.notice == "research use, not for diagnosis" == found.to_dict()["notice"]


def test_a_sentence_that_says_more_than_was_accepted_is_never_shown() -> None:
    both: Told = ("Edema and effusion.", ("edema", "effusion"), "present")
    mixed: list[Told] = [("Edema, no effusion.", ("edema",), "present"), ("Edema, no effusion.", ("effusion",), "absent")]
    unasked: Told = ("Edema and hernia.", ("edema", "hernia"), "present")
    maybe: Told = ("Possible edema.", ("edema",), "uncertain")
    near = [of(0.9, "1", None, both, *mixed, unasked, maybe, edema=1, effusion=1), of(0.8, "2", None, edema=1, effusion=0)]
    near += [of(0.7, "3", None, ("Edema.", ("edema",), "present"), edema=1)]
    rules = ReadingSettings(temperature=1.0, fewest=1, default=Limits(0.9, 0.9))
    found = read(near, ("edema", "effusion"), rules)
    assert [one.reason for one in found.votes] == [None, "disagree"]
    assert [(one.text, dict(one.claims)) for one in found.statements] == [("Edema.", {"edema": "present"})], "though it is the furthest"
    agreed = [of(0.9, "1", None, *mixed, edema=1, effusion=0), of(0.8, "2", edema=1, effusion=0)]
    found = read(agreed, ("edema", "effusion"), rules)
    assert [(one.text, dict(one.claims)) for one in found.statements] == [
        ("Edema, no effusion.", {"edema": "present", "effusion": "absent"})
    ]
    torn: list[Told] = [("Effusion left, none right.", ("effusion",), "present"), ("Effusion left, none right.", ("effusion",), "absent")]
    found = read([of(0.9, "1", None, *torn, effusion=1)], ("effusion",), rules)
    assert [(one.text, dict(one.claims)) for one in found.statements] == [(None, {"effusion": "present"})]
    found = read([of(0.9, "1", None, unasked, maybe, edema=1)], ("edema",), rules)
    assert found.statements[0].text is None and [one.study_id for one in found.statements[0].sources] == ["1"]


def test_the_sentence_most_agree_with_then_the_nearest_then_the_commonest() -> None:
    two: Told = ("Edema with effusion.", ("edema", "effusion"), "present")
    near = [of(0.9, "1", None, two, edema=1, effusion=1), of(0.6, "2", None, ("Edema.", ("edema",), "present"), edema=1)]
    near += [of(0.5, "3", edema=1), of(0.4, "4", edema=1)]
    rules = ReadingSettings(temperature=1.0, fewest=1)
    by_name = {tuple(one.claims): one for one in read(near, ("edema", "effusion"), rules).statements}
    assert by_name["edema",].text == "Edema." and by_name["edema",].support == pytest.approx(1)
    assert by_name["edema", "effusion"].text == two[0], "all who speak of effusion agree, so it is called, and only this states it"
    near = [
        of(0.6, "1", None, ("Edema seen.", ("edema",), "present"), edema=1),
        of(0.5, "2", None, ("Edema.", ("edema",), "present"), edema=1),
    ]
    assert read(near, ("edema",), rules).statements[0].text == "Edema seen."
    near.append(of(0.5, "3", None, ("Edema.", ("edema",), "present"), edema=1))
    assert read(near, ("edema",), rules).statements[0].text == "Edema seen.", "the nearest, though more weight has the other"
    near = [of(0.5, "1", None, ("A edema.", ("edema",), "present"), edema=1)]
    near += [of(0.5, str(i), None, ("B  EDEMA" if i == 2 else "B edema.", ("edema",), "present"), edema=1) for i in (2, 3)]
    found = read(near, ("edema",), rules).statements
    assert [one.text for one in found] == ["B  EDEMA"] and [one.study_id for one in found[0].sources] == ["2", "3"]
    assert read(near[::-1], ("edema",), rules).statements == found, "of equally near ones the first by study"
    order = read([of(0.5, "1", edema=0, nodule=1)], ("edema", "nodule"), rules).statements
    assert [dict(one.claims) for one in order] == [{"nodule": "present"}, {"edema": "absent"}]


@EXACT
@given(st.lists(st.tuples(st.sampled_from([1.0, 0.0, -1.0, math.nan]), st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan])), max_size=12))
def test_auroc_with_silence_counts_pairs(rows: list[tuple[float, float]]) -> None:
    positives = [e for label, e in rows if label == 1]
    negatives = [e for label, e in rows if label == 0]
    pairs = [0.5 if math.isnan(p) or math.isnan(n) or p == n else float(p > n) for p in positives for n in negatives]
    found = auroc_with_silence([label for label, _ in rows], [e for _, e in rows])
    assert found == pytest.approx(sum(pairs) / len(pairs)) if pairs else math.isnan(found)


def tail(n: int, e: int, rate: float) -> float:
    """P(Binomial(n, rate) <= e), term by term."""
    return sum(math.comb(n, j) * rate**j * (1 - rate) ** (n - j) for j in range(e + 1))


@pytest.mark.parametrize("seed", range(20))
def test_levels_are_tested_from_the_best_of_the_other_half_downwards(seed: int) -> None:
    rng = np.random.default_rng(seed)
    halves = []
    for _ in range(2):
        strength = np.round(rng.uniform(0.5, 1, 300), 3)
        halves.append((strength, rng.random(300) > 0.5 + 0.5 * strength))
    (s, w), (ps, pw) = ((list(map(float, a)), list(map(bool, b))) for a, b in halves)

    def p_value(strength: list[float], wrong: list[bool], level: float) -> float:
        called = [bad for value, bad in zip(strength, wrong, strict=True) if value >= level]
        return tail(len(called), sum(called), 0.2)

    levels = sorted(LEVELS.tolist(), reverse=True)
    at = min(range(len(levels)), key=lambda i: (round(p_value(s, w, levels[i]), 15), i))
    expected = None
    while at < len(levels) and p_value(ps, pw, levels[at]) <= 0.05:
        expected, at = levels[at], at + 1
    assert certified_level(halves[0], halves[1], 0.2, 0.05) == expected
    assert certified_level(halves[0], (ps[:5], pw[:5]), 0.2, 0.05) is None, "five rows show nothing"
    assert certified_level(halves[0], ([], []), 0.2, 0.05) is None


def test_a_level_that_only_the_proof_finds_good_is_not_taken() -> None:
    order = np.full(200, 0.605), np.zeros(200, dtype=bool)
    proof = np.repeat([0.605, 0.955], 100), np.repeat([True, False], 100)
    assert certified_level(order, order, 0.1, 0.05) == 0.51
    assert certified_level(proof, proof, 0.1, 0.05) == 0.61
    assert certified_level(order, proof, 0.1, 0.05) is None


def test_a_certified_level_keeps_its_promise() -> None:
    """Calls at strength t are wrong with chance 1 - t: above level t on average (1 - t) / 2, so 0.8 and above is right for 0.1."""
    rng = np.random.default_rng(3)
    broken = answered = 0
    for _ in range(400):
        halves = [(strength, rng.random(150) > strength) for strength in rng.uniform(0.5, 1, (2, 150))]
        level = certified_level(halves[0], halves[1], 0.1, 0.1)
        answered += level is not None
        broken += level is not None and (1 - level) / 2 > 0.1 + 1e-12
    assert answered > 40 and broken / 400 <= 0.1


def validation(count: int = 400, seed: int = 0, per_query: int = 12, noise: float = 0.15, patients: list[str] | None = None) -> Cohort:
    """Queries with neighbours that share their findings, the nearer the likelier; the second is noise, the third never mentioned."""
    chance = random.Random(seed)
    neighbours, labels = [], []
    for q in range(count):
        truth = [float(chance.random() < 0.5), float(chance.random() < 0.5), float(chance.random() < 0.5)]
        near = []
        for j in range(per_query):
            score = 0.9 - 0.05 * j + chance.uniform(-0.01, 0.01)
            wrong = chance.random() < noise + 0.03 * j
            facts = {"edema": int(bool(truth[0]) != wrong), "effusion": int(chance.random() < 0.5)}
            near.append(Neighbour(f"{q}-{j}", score, facts, (), f"p{j}"))
        neighbours.append(near)
        labels.append(truth)
    names = [f"study{q}" for q in range(count)]
    return neighbours, np.array(labels), names, patients or [f"patient{q}" for q in range(count)]


GRID: dict[str, Any] = {"ks": (1, 5, 12), "temperatures": (0.01, 0.1, None)}


@pytest.mark.parametrize(("seed", "noise", "error"), [(0, 0.15, 0.1), (1, 0.25, 0.35), (2, 0.25, 0.35), (3, 0.25, 0.3)])
def test_fitting_takes_the_best_of_the_grid_on_one_half_and_proves_on_the_other(seed: int, noise: float, error: float) -> None:
    neighbours, labels, names, patients = validation(seed=seed, noise=noise)
    patients[1::4] = patients[::4]  # some have two studies, which choose a setting and do not prove a limit
    made = fit_reading(neighbours, labels, FINDINGS, names, patients, **GRID, error=error, fitted_on={"split": "val"})
    half = sorted(set(patients), key=lambda one: hashlib.sha256(one.encode()).hexdigest()[:16])[::2]
    rows = [i for i, one in enumerate(patients) if one in half]
    firsts = [i for i, one in enumerate(patients) if patients.index(one) == i]
    order, proof = ([i for i in firsts if (patients[i] in half) == first] for first in (True, False))
    best: list[tuple[float, int, tuple[Any, ...]]] = []
    for k in GRID["ks"]:
        for temperature in GRID["temperatures"]:
            for silent in ("ignored", "absent"):
                rule = ReadingSettings(k, temperature, silent)
                e = np.array([[reference_vote(neighbours[i], name, rule)[0] for name in FINDINGS] for i in rows])
                e = np.round(e, 12)
                value = np.mean([0.5 if np.isnan(e[:, f]).all() else roc_auc_score(labels[rows, f], e[:, f]) for f in range(3)])
                best.append((-round(value, 9), len(best), (k, temperature, silent)))
    assert (made.k, made.temperature, made.silent) == min(best)[2]
    assert made.fitted_on["macro_auroc_chosen_on"] == pytest.approx(-min(best)[0], abs=1e-8)
    nearest = sorted(max(one.score for one in neighbours[i]) for i in order)
    assert made.floor == nearest[len(order) - math.ceil(0.99 * (len(order) + 1))]
    assert made.fitted_on["split"] == "val" and made.fitted_on["patients_proven_on"] == len(proof)
    for name in FINDINGS:
        f = FINDINGS.index(name)
        for side, label in (("present", 1), ("absent", 0)):
            told = made.fitted_on["limits"][name][side]
            called = [i for i in proof if vote(neighbours[i], (name,), made)[0].call == side]
            assert told["level"] == getattr(made.limits[name], side)
            assert told["called"] == len(called) and told["wrong"] == sum(labels[i, f] != label for i in called)
            halves = []
            for part in (order, proof):
                rule = dataclasses.replace(made, limits={}, default=Limits(0.51, 0.51))
                votes = [vote(neighbours[i], (name,), rule)[0] for i in part]
                own = [(one.evidence, labels[i, f] != label) for i, one in zip(part, votes, strict=True) if one.call == side]
                halves.append(([e if label else 1 - e for e, _ in own], [wrong for _, wrong in own]))
            assert told["level"] == certified_level(halves[0], halves[1], error, 0.05)
            if told["level"] is not None:
                assert tail(told["called"], told["wrong"], error) <= 0.05
    assert made.limits["edema"] != Limits(None, None) == made.limits["effusion"] == made.limits["nodule"] == made.default
    assert vote(neighbours[0], ("edema", "effusion"), made)[1].reason == "unproven"


def test_a_finding_that_mirrors_another_has_its_limits_mirrored() -> None:
    neighbours, labels, names, patients = validation()
    both = [
        [dataclasses.replace(one, facts={"edema": (fact := one.facts["edema"]), "clear": 1 - fact}) for one in near] for near in neighbours
    ]
    made = fit_reading(both, np.stack([labels[:, 0], 1 - labels[:, 0]], axis=1), ("edema", "clear"), names, patients, **GRID)
    edema, clear = made.limits["edema"], made.limits["clear"]
    assert (edema.present, edema.absent) == (clear.absent, clear.present) != (None, None)


def test_the_order_of_validation_studies_does_not_matter_and_a_patient_proves_once() -> None:
    patients = [f"patient{q // 2}" for q in range(300)]
    neighbours, labels, names, _ = validation(300, seed=1)
    made = fit_reading(neighbours, labels, FINDINGS, names, patients, **GRID)
    order = [i + j for i in reversed(range(0, 300, 2)) for j in (0, 1)]  # the first of each patient stays the first
    again = fit_reading(
        [neighbours[i] for i in order], labels[order], FINDINGS, [names[i] for i in order], [patients[i] for i in order], **GRID
    )
    assert again == made and made.fitted_on["patients"] == 150
    assert sum(made.fitted_on["limits"]["edema"][side]["called"] for side in ("present", "absent")) <= 75


def test_coverage_and_error_on_other_studies_and_none_on_their_own() -> None:
    neighbours, labels, names, patients = validation()
    made = fit_reading(neighbours, labels, FINDINGS, names, patients, **GRID)
    other, truth, ids, people = validation(500, seed=9)
    ids, people = [f"test-{one}" for one in ids], [f"test-{one}" for one in people]
    truth[:40, 0] = math.nan
    truth[40:60, 0] = -1
    votes = [vote(near, FINDINGS, made) for near in other]
    found = answered_scores(votes, truth, FINDINGS, ids, people, made, repeats=20)
    calls = [one[0].call for one in votes]
    known = [i for i in range(500) if truth[i, 0] in (0, 1)]
    answered = [i for i in known if calls[i] != "abstain"]
    wrong = [i for i in answered if (calls[i] == "present") != (truth[i, 0] == 1)]
    assert found["coverage"]["edema"].value == pytest.approx(len(answered) / len(known)) and len(answered) > 100
    assert found["error"]["edema"].value == pytest.approx(len(wrong) / len(answered)) and len(wrong) / len(answered) < 0.13
    for side in ("present", "absent"):
        own = [i for i in answered if calls[i] == side]
        assert found[f"error_{side}"]["edema"].value == pytest.approx(sum(i in wrong for i in own) / len(own))
    assert found["coverage"]["effusion"].value == 0 and math.isnan(found["error"]["effusion"].value)
    assert found["coverage"]["macro"].value == pytest.approx(len(answered) / len(known) / 3)
    assert found["error"]["macro"].value == found["error"]["edema"].value
    with pytest.raises(ReadingError, match="1 of 500 studies, study7 among them"):
        answered_scores(votes, truth, FINDINGS, [*ids[:-1], "study7"], people, made)
    made.check_unseen(ids)
    evidence = evidence_matrix(other, FINDINGS, made)
    assert evidence.shape == (500, 3) and np.isnan(evidence[:, 2]).all() == (made.silent == "ignored")
    np.testing.assert_array_equal(evidence[:, 0], [one[0].evidence for one in votes])
    assert roc_auc_score(truth[60:, 0], evidence[60:, 0]) > 0.85


def test_matrices_of_calls_and_of_nothing() -> None:
    near = [of(0.5, "1", edema=1, effusion=0)]
    votes = [vote(near, FINDINGS, ReadingSettings(fewest=1)), vote([], FINDINGS, ReadingSettings(fewest=1))]
    assert call_matrix(votes, FINDINGS).tolist() == [[1, 0, ABSTAIN], [ABSTAIN] * 3]
    assert call_matrix([], FINDINGS).shape == (0, 3)
    np.testing.assert_array_equal(evidence_matrix([near, []], FINDINGS, ReadingSettings()), [[1, 0, math.nan], [math.nan] * 3])
    assert evidence_matrix([], FINDINGS, ReadingSettings()).shape == (0, 3)
    with pytest.raises(ValueError, match="votes are on other findings"):
        call_matrix(votes, FINDINGS[::-1])


def test_settings_come_back_from_json() -> None:
    neighbours, labels, names, patients = validation(120)
    for made in (ReadingSettings(), fit_reading(neighbours, labels, FINDINGS, names, patients, **GRID, error=0.3)):
        text = json.dumps(made.to_dict(), allow_nan=False)
        again = ReadingSettings.from_dict(json.loads(text))
        assert again == made and "research use" in text and not any(name in text for name in names)
        assert read(neighbours[0], FINDINGS, again).to_dict() == read(neighbours[0], FINDINGS, made).to_dict()
    with pytest.raises(ReadingError, match="format 9"):
        ReadingSettings.from_dict({**ReadingSettings().to_dict(), "format": 9})
    for damage in ({"k": 0}, {"limits": {"edema": {"present": 0.5, "absent": 1}}}, {"limits": None}, {"extra": 1}):
        with pytest.raises(ReadingError, match="no settings of a reading"):
            ReadingSettings.from_dict({**ReadingSettings().to_dict(), **damage})
    with pytest.raises(ReadingError, match="KeyError"):
        ReadingSettings.from_dict({})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neighbour("7", math.nan), "study 7: score nan"),
        (lambda: Neighbour("7", 0.5, {"edema": 2}), "study 7: facts"),
        (lambda: Neighbour("7", 0.5, {}, (NeighbourSentence("secret words", ("edema",), "maybe"),)), "study 7: sentences in state"),  # type: ignore[arg-type]
        (lambda: Limits(0.5, 0.9), "above 0.5"),
        (lambda: Limits(0.9, 1.1), "at most 1"),
        (lambda: ReadingSettings(k=0), "at least 1 patient"),
        (lambda: ReadingSettings(temperature=0.0), "temperature 0.0"),
        (lambda: ReadingSettings(silent="maybe"), "no rule silent='maybe'"),  # type: ignore[arg-type]
        (lambda: ReadingSettings(floor=math.inf), "floor inf"),
        (lambda: weigh([0.5], ["a", "b"], 1, 0.1), "both must be"),
        (lambda: weigh([math.inf], ["a"], 1, 0.1), "finite"),
        (lambda: weigh([0.5], ["a"], 0, 0.1), "at least 1 patient"),
        (lambda: vote([of(0.5, "7"), of(0.4, "7")], FINDINGS, ReadingSettings()), "study 7 is among the neighbours 2 times"),
        (lambda: read([of(0.5, "7")], ("edema", "edema"), ReadingSettings()), "findings must differ"),
        (lambda: certified_level(([0.9], [True]), ([0.9], [True]), 0, 0.1), "must lie between"),
        (lambda: certified_level(([0.9], []), ([0.9], [True]), 0.1, 0.1), "both must be"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "secret" not in str(caught.value)


def test_what_is_refused_in_fitting() -> None:
    neighbours, labels, names, patients = validation(40)

    def fails(message: str, near: Any = neighbours, truth: Any = labels, ids: Any = names, people: Any = patients, **more: Any) -> None:
        with pytest.raises(ValueError, match=message):
            fit_reading(near, truth, FINDINGS, ids, people, **{**GRID, **more})

    fails("40 queries, 39 study ids", ids=names[:-1])
    fails(r"expected \(40, 3\)", truth=labels[:, :2])
    fails("labels must be 1, 0, -1", truth=labels * 2)
    fails("40 studies with 39 ids", ids=[*names[:-1], names[0]])
    fails("of 1 patients", people=["one"] * 40)
    fails("study study3 has a neighbour of its own patient, 3-0", people=["p0" if i == 3 else one for i, one in enumerate(patients)])
    own = [[*near, Neighbour("study5", 0.1)] if i == 5 else near for i, near in enumerate(neighbours)]
    fails("study study5 has a neighbour of its own patient, study5", near=own)
    fails("k 13 cannot be tried: no query has neighbours of more than 12 patients", ks=(5, 13))
    fails("no ks to choose from", ks=())
    fails("no finding has both labels", truth=np.ones_like(labels))
    fails("must lie between 0 and 1", error=1.5)
    fails("quantile", far=1.0)
