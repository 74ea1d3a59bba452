"""What the facts of one study say of a sentence of another: a table written by hand, and laws that any such reading keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.types import Fact
from reports.facts import LexiconFacts, Statement
from reports.facts.ontology import Ontology, load_ontology
from reports.pairs.truth import FALSE, TRUE, UNKNOWN, Claim, TruthTable, claim_of, claims_of, swap_sides, with_disputes

FACTS, ONTOLOGY = LexiconFacts(), load_ontology()
T, U, F = TRUE, UNKNOWN, FALSE


def claims(text: str) -> tuple[Claim, ...]:
    return claims_of(text, FACTS.facts(text), ONTOLOGY)


def judged(report: str, sentence: str, **options: str) -> int:
    table = TruthTable(ONTOLOGY, **options)  # type: ignore[arg-type]
    profile = table.profile(with_disputes(claims(report), ONTOLOGY))
    return int(table.of([claims(sentence)], profile[None])[0][0, 0])


@pytest.mark.parametrize(
    ("report", "sentence", "expected"),
    [
        ("No pneumothorax.", "There is no pneumothorax.", T),
        ("No pneumothorax.", "There is no left apical pneumothorax.", T),
        ("No apical pneumothorax.", "No pneumothorax.", U),
        ("No pneumothorax.", "Right pneumothorax.", F),
        ("No apical pneumothorax.", "Small pneumothorax.", U),
        ("No large effusion.", "Small left pleural effusion.", U),
        ("Left pleural effusion.", "Pleural effusion is present.", T),
        ("Pleural effusion is present.", "Left pleural effusion.", U),
        ("Bilateral pleural effusions.", "Left pleural effusion.", T),
        ("Left pleural effusion. Right pleural effusion.", "Bilateral pleural effusions.", T),
        ("Left pleural effusion.", "Bilateral pleural effusions.", U),
        ("Left pleural effusion.", "Right pleural effusion.", F),  # a report that gives a side gives every side
        ("Left pleural effusion. Pleural effusion.", "Right pleural effusion.", U),
        ("Left pleural effusion.", "No pleural effusion.", F),
        ("Left pleural effusion.", "No right pleural effusion.", U),
        ("Possible left pleural effusion.", "Left pleural effusion.", U),
        ("Possible left pleural effusion.", "No pleural effusion.", U),
        ("Possible left pleural effusion.", "Possible pleural effusion.", T),
        ("No pleural effusion.", "Possible left pleural effusion.", F),
        ("Left upper lobe consolidation.", "Consolidation in the left lung.", T),
        ("Left upper lobe consolidation.", "Left lower lobe consolidation.", F),
        ("Left upper lobe consolidation.", "There is a lung opacity.", T),  # consolidation is a kind of opacity
        ("There is a left lung opacity.", "Left lung consolidation.", U),
        ("No lung opacity.", "There is no consolidation.", T),
        ("No lung opacity.", "Consolidation in the left lung.", F),
        ("No consolidation.", "No lung opacity.", U),
        ("No pneumothorax. Left pneumothorax.", "No pneumothorax.", U),  # said both ways
        ("No pneumothorax.", "No pneumothorax or pleural effusion.", U),
        ("No pneumothorax. Left pleural effusion.", "No pneumothorax or pleural effusion.", F),
        ("No pneumothorax. No pleural effusion.", "No pleural effusion or pneumothorax.", T),
        ("Mild cardiomegaly.", "Severe cardiomegaly.", T),  # degrees are compared only with strictness "all"
        ("Left pleural effusion.", "Left pleural effusion has increased.", U),
        ("No pneumothorax.", "The patient is rotated.", U),
        ("Fracture of the left fifth rib.", "Fracture of the left lateral seventh rib.", U),
        ("Fracture of the left fifth rib.", "There is a left rib fracture.", T),
        ("Left lower lobe consolidation. No opacity.", "The lungs are clear bilaterally.", U),
        ("Left lower lobe consolidation.", "The lungs are clear bilaterally.", F),
    ],
)
def test_a_sentence_is_read_against_a_study(report: str, sentence: str, expected: int) -> None:
    assert judged(report, sentence) == expected


@pytest.mark.parametrize(
    ("strictness", "sentence", "expected"),
    [
        ("finding", "Right pleural effusion.", T),
        ("side", "Right pleural effusion.", F),
        ("side", "Large left pleural effusion.", T),
        ("location", "Large left pleural effusion.", T),
        ("all", "Large left pleural effusion.", F),
        ("all", "Small left pleural effusion.", T),
        ("finding", "No pleural effusion.", F),
    ],
)
def test_strictness_says_which_details_have_to_agree(strictness: str, sentence: str, expected: int) -> None:
    assert judged("Small left pleural effusion.", sentence, strictness=strictness) == expected


def test_what_a_report_does_not_mention_is_unknown_unless_told_otherwise() -> None:
    assert judged("No pneumothorax.", "Cardiomegaly.") == UNKNOWN
    assert judged("No pneumothorax.", "Cardiomegaly.", unmentioned="absent") == FALSE
    assert judged("No pneumothorax.", "No cardiomegaly.", unmentioned="absent") == TRUE
    assert judged("Possible cardiomegaly.", "Cardiomegaly.", unmentioned="absent") == UNKNOWN


def test_silence_is_told_from_doubt() -> None:
    table = TruthTable(ONTOLOGY)
    profile = table.profile(claims("Possible left pleural effusion. No pneumothorax."))[None]
    sentences = [claims(text) for text in ("Pleural effusion.", "Cardiomegaly.", "No pneumothorax.", "Pleural effusion and cardiomegaly.")]
    values, silent = table.of(sentences, profile)
    assert values[0].tolist() == [U, U, T, U]
    assert silent[0].tolist() == [False, True, True, False]


def test_words_that_are_none_are_refused() -> None:
    for options in ({"strictness": "exact"}, {"unmentioned": "false"}):
        with pytest.raises(ValueError, match="expected"):
            TruthTable(ONTOLOGY, **options)  # type: ignore[arg-type]


TREE = Ontology({"top": (), "a": ("top",), "b": ("top",), "a1": ("a",), "a2": ("a", "b")})
made_claims = st.builds(
    Claim,
    st.sampled_from(sorted(TREE.findings)),
    st.sampled_from(["present", "absent", "uncertain"]),
    st.sampled_from([None, "left", "right", "bilateral"]),
    st.frozensets(st.sampled_from(["upper lobe", "lower lobe", "apex"]), max_size=1),
    st.sampled_from([None, "mild", "severe"]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(made_claims, max_size=5), min_size=1, max_size=4), st.lists(st.lists(made_claims, max_size=3), max_size=5))
def test_the_laws_of_a_reading(studies: list[list[Claim]], sentences: list[list[Claim]]) -> None:
    table = TruthTable(TREE, "all")
    said = [with_disputes(study, TREE) for study in studies]
    profiles = np.stack([table.profile(study) for study in said])
    values, _ = table.of(sentences, profiles)
    for j, sentence in enumerate(sentences):  # a sentence is the weakest of its claims, and says nothing if it has none
        each, _ = table.of([[claim] for claim in sentence], profiles)
        np.testing.assert_array_equal(values[:, j], each.min(1) if sentence else np.zeros(len(studies)))
    mirrored = np.stack([table.profile(swap_sides(study)) for study in said])
    np.testing.assert_array_equal(table.of([swap_sides(s) for s in sentences], mirrored)[0], values)  # left and right are alike
    for i, study in enumerate(said):  # nothing that a study states is false of it
        if study:
            own, _ = table.of([[claim] for claim in study], profiles[i : i + 1])
            disputed = [any(d.disputed for d in said[i]) for _ in study]
            assert all(value != FALSE or any(disputed) for value in own[0])


@settings(deadline=None, max_examples=100)
@given(made_claims, st.lists(made_claims, max_size=4))
def test_a_present_finding_makes_its_ancestors_present_and_an_absent_one_its_kinds_absent(claim: Claim, others: list[Claim]) -> None:
    table = TruthTable(TREE, "finding")
    for finding in TREE.ancestors(claim.finding):
        shown = table.profile([Claim(claim.finding, "present")])[None]
        assert table.of([[Claim(finding, "present")]], shown)[0][0, 0] == TRUE
        denied = table.profile([Claim(finding, "absent")])[None]
        assert table.of([[Claim(claim.finding, "absent")]], denied)[0][0, 0] == TRUE
        assert table.of([[Claim(claim.finding, "present")]], denied)[0][0, 0] == FALSE


def test_what_has_resolved_is_absent_whatever_a_source_calls_it() -> None:
    said = Statement(Fact("pneumothorax", "present", "left"), 0, 10, change="resolved")
    assert claim_of(said).state == "absent"
