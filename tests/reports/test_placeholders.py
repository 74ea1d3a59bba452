"""Marks of removed words: every collection's way, nothing else touched, doubtful sentences known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.placeholders import PLACEHOLDER, has_words, is_doubtful, normalize_placeholders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("XXXX year old with xxxx", "___ year old with ___"),
        ("Chest x-XXXX dated XXXX, XXXX.", "Chest x-ray dated ___."),
        ("[**2101-5-6**] and [**First Name8 (NamePattern2) **], seen", "___ and ___, seen"),
        ("___-year-old; ____ and __", "___-year-old; ___ and ___"),
        ("<NAME> was told by <PERSON_2> on <DATE>.", "___ was told by ___ on ___."),
        ("[DATE], [Patient 1] and {{name}} at [redacted]", "___ and ___ at ___"),
        ("**NAME[AAA, BBB] on **DATE[Mar 04 2009] at **INSTITUTION", "___ on ___ at ___"),
        ("XXXX XXXX and XXXX/XXXX", "___ and ___"),
        ("**Findings:** <5 mm, size > 3; [see below] T1 [sic] XX xx", "**Findings:** <5 mm, size > 3; [see below] T1 [sic] XX xx"),
        ("**FINDINGS:** and **IMPRESSION**", "**FINDINGS:** and **IMPRESSION**"),
        ("", ""),
    ],
)
def test_every_mark_becomes_one(text: str, expected: str) -> None:
    assert normalize_placeholders(text) == expected
    assert normalize_placeholders(expected) == expected


marks = st.sampled_from(["XXXX", "___", "[**Name**]", "<DATE>", "[NAME]", "x-XXXX", "**DATE[x]", ", ", " ", "/", "\n", "clear", "no", "."])


@given(st.lists(st.one_of(marks, st.text(max_size=5)), max_size=12).map("".join))
def test_done_twice_it_changes_nothing_more(text: str) -> None:
    once = normalize_placeholders(text)
    assert normalize_placeholders(once) == once
    assert all(match[0] == "___" for match in PLACEHOLDER.finditer(once))
    assert has_words(once) or not has_words(text)


def test_marks_are_no_words() -> None:
    assert not has_words("XXXX, ___ [**Name**] <DATE>. 12")
    assert has_words("XXXX lungs")


@pytest.mark.parametrize(
    "sentence",
    [
        "XXXX pneumothorax.",
        "There is XXXX pneumothorax.",
        "There are ___ opacities in the left base.",
        "Lungs are clear, ___ effusion.",
        "Normal heart and [**word**] consolidation.",
        "XXXX XXXX atelectasis.",
    ],
)
def test_a_removed_word_that_may_have_denied_makes_a_sentence_doubtful(sentence: str) -> None:
    assert is_doubtful(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "No XXXX pneumothorax.",
        "The XXXX are clear.",
        "XXXX are normal.",
        "Chest x-XXXX is normal.",
        "There are no XXXX of a pleural effusion.",
        "No enlarged lymph XXXX.",
        "XXXX, XXXX.",
        "No acute or XXXX pulmonary abnormality.",
        "Congestion without XXXX edema.",
        "Dr. ___ was told of a pneumothorax.",
        "There is a pneumothorax.",
        "The pulmonary XXXX and mediastinum are normal.",
    ],
)
def test_one_that_denies_nothing_does_not(sentence: str) -> None:
    assert not is_doubtful(sentence)
