"""Phrases: the matcher against regular expressions made from the same phrase, normal forms, and what a phrase may not be."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.facts.phrases import Match, PhraseIndex, longest, normal_form, parse_phrase, words_of

WORDS = ("no", "heart", "cardiac", "size", "is", "normal", ",", "enlarged", "cardiomegaly", "but")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("Effusions", "effusion"),
        ("opacities", "opacity"),
        ("masses", "mass"),
        ("pneumothoraces", "pneumothorax"),
        ("atelectasis", "atelectasis"),
        ("thrombus", "thrombus"),
        ("oedema", "edema"),
        ("haemothorax", "hemothorax"),
        ("patient's", "patient"),
        ("can't", "cannot"),
        ("is", "is"),
    ],
)
def test_normal_form(word, expected):
    assert normal_form(word) == expected


def test_words_keep_their_characters():
    text = "Blunting of the costo-phrenic angle (-), 7mm nodule – T7."
    words = words_of(text, offset=10)
    assert words.forms == ("blunting", "of", "the", "costo", "phrenic", "angle", "negative", ",", "7", "mm", "nodule", "-", "t", "7", ".")
    for form, start, end in zip(words.forms, words.starts, words.ends, strict=True):
        original = text[start - 10 : end - 10]
        assert original and (form == "negative" or original.lower().replace("–", "-") == form)


def as_regex(phrase: str) -> re.Pattern[str]:
    """The phrase over words that are joined by single blanks, each followed by one; the gap takes words that are no stop."""
    parts = []
    for element in phrase.split():
        if element.startswith("~"):
            parts.append(rf"(?:(?!(?:but|\.|;|however|although) )\S+ ){{0,{element[1:]}}}?")
        else:
            optional = element.startswith("(")
            choices = [re.escape(c[:-1]) + r"\S*" if c.endswith("*") else re.escape(c) for c in element.strip("()").split("|")]
            parts.append(f"(?:(?:{'|'.join(choices)}) )" + ("?" if optional else ""))
    return re.compile("".join(parts))


ELEMENTS = st.lists(st.sampled_from(WORDS[:-1]), min_size=1, max_size=3, unique=True).map("|".join)
PHRASES = st.tuples(
    ELEMENTS, st.sampled_from(["", "~1", "~3", "(size)", "(heart|is)"]), st.one_of(ELEMENTS, st.just("cardi*"), st.just("e*"))
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(PHRASES, st.lists(st.sampled_from(WORDS), max_size=12))
def test_found_where_a_regular_expression_finds_it(phrase, words):
    index = PhraseIndex([(phrase, "x")])
    expected = {i for i in range(len(words)) if as_regex(phrase).match("".join(w + " " for w in words[i:]))}
    matches = index.find(words)
    assert {m.first for m in matches} == expected
    for match in matches:
        assert list(match.positions) == sorted(set(match.positions)) and match.value == "x"


def test_a_gap_stops_at_words_that_the_index_names():
    words = ["heart", "is", "not", "normal"]
    assert PhraseIndex([("heart ~3 normal", 1)]).find(words)
    assert not PhraseIndex([("heart ~3 normal", 1)], gap_stops=["not"]).find(words)


def test_longest_drops_what_is_inside_and_keeps_equals():
    inside, outside, equal, apart = Match((1,), "a"), Match((0, 1), "b"), Match((0, 1), "c"), Match((3,), "a")
    assert longest([inside, apart, outside, equal]) == [outside, equal, apart]
    gap = Match((0, 2), "d")  # the word at 1 is in its gap, not among its words
    assert longest([gap, inside]) == [gap, inside]


@pytest.mark.parametrize(
    "phrase", ["", "~2 heart", "heart ~2", "heart||cardiac", "lung|air-space", "[heart]", "(a) (b) (c) (d) (e) (f) (g) h"]
)
def test_what_is_no_phrase(phrase):
    with pytest.raises(ValueError, match="phrase"):
        PhraseIndex([(phrase, 1)])


def test_optional_words_and_hyphens():
    assert len(parse_phrase("(small) pleural-effusion")) == 2
    assert PhraseIndex([("air-space disease", 1)]).find(words_of("Air space disease").forms)
