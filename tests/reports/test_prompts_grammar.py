"""Grammar of made sentences: articles, verbs and capitals, in every sentence of the built-in sets."""

from __future__ import annotations

import re

import pytest

from reports.prompts import Noun, load_prompts
from reports.prompts.nouns import article, sentence

SETS = ["chest_xray", "chest_ct"]
IRREGULAR_PLURALS = {"bronchi", "septa", "hila", "apices", "plaques"}
_ENDS_HEAD = (
    r" (?:of|that|in|with|on|at|to|from|within|around|between|along|below|above|behind|beside|beyond|through|into|over|wider|more|less|than"
    r"|for|left|empty|near|by|after|apart|up|seen|or|indicating|across|away|toward|across|up)\b"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("effusion", "an"), ("pleural effusion", "a"), ("unilateral shift", "a"), ("unusual shadow", "an"), ("uninflated lobe", "an")),
        *(("unimpressive lung", "an"), ("upper lobe nodule", "an"), ("useful view", "a"), ("ureteral stent", "a"), ("one-sided veil", "a")),
        *(("hourglass shape", "an"), ("honeycomb cyst", "a"), ("NG tube", "an"), ("PICC line", "a"), ("ECG lead", "an"), ("CT", "a")),
        *(("apical cap", "an"), ("ill-defined opacity", "an"), ("8 mm nodule", "an"), ("18 mm nodule", "an"), ("5 mm nodule", "a")),
        *(("European stent", "a"), ("A line", "an"), ("B line", "a"), ("umbrella", "an"), ("unit", "a")),
    ],
)
def test_article_goes_by_sound(text: str, expected: str) -> None:
    assert article(text) == expected


@pytest.mark.parametrize(
    ("written", "indefinite", "verb"),
    [
        ("a pleural effusion", "a pleural effusion", "is"),
        ("an opacity", "an opacity", "is"),
        ("a opacity", "an opacity", "is"),
        ("some lung nodules", "lung nodules", "are"),
        ("edema", "edema", "is"),
        ("  pulmonary   edema ", "pulmonary edema", "is"),
    ],
)
def test_a_phrase_carries_its_number(written: str, indefinite: str, verb: str) -> None:
    noun = Noun.read(written)
    assert (noun.indefinite, noun.verb) == (indefinite, verb)
    assert Noun.read(noun.written) == noun


def test_an_adjective_changes_the_article() -> None:
    assert Noun.read("an effusion").described("small").indefinite == "a small effusion"
    assert Noun.read("a nodule").described("ill-defined").indefinite == "an ill-defined nodule"
    assert Noun.read("a nodule").described("") == Noun.read("a nodule")


@pytest.mark.parametrize("wrong", ["", "   ", "a", "12", "an effusion.", "some", "- -"])
def test_what_is_no_noun_phrase_is_refused(wrong: str) -> None:
    if wrong in ("a", "some"):  # a word by itself is a name, if a short one
        assert Noun.read(wrong).text == wrong
    else:
        with pytest.raises(ValueError, match="noun phrase"):
            Noun.read(wrong)


def test_a_sentence_is_tidy() -> None:
    assert sentence("{a} is seen {place}.", a="edema", place="") == "Edema is seen."
    assert sentence("{a} is seen {place}.", a="edema", place="in both lungs") == "Edema is seen in both lungs."


def head(phrase: str) -> str:
    """The last word before the first preposition: the noun that the verb goes by."""
    return re.split(_ENDS_HEAD, phrase, maxsplit=1)[0].split()[-1].strip(",")


def looks_plural(word: str) -> bool:
    return word in IRREGULAR_PLURALS or (word.endswith("s") and not word.endswith(("sis", "us", "ss")))


@pytest.mark.parametrize("name", SETS)
def test_verbs_and_articles_agree_in_every_sentence(name: str) -> None:
    seen = 0
    for _, _, text in load_prompts(name).sentences():
        if not (match := re.match(r"(There) (is|are) (no )?(an? )?(.+)\.\Z", text)):
            continue
        seen += 1
        _, verb, denied, a, phrase = match.groups()
        assert (verb == "are") == looks_plural(head(phrase)), text
        assert not (denied and a), text
        if a:
            assert verb == "is" and (a == "an ") == (phrase[0] in "aeiou"), text
    assert seen > 1500


@pytest.mark.parametrize("name", SETS)
def test_every_sentence_is_written_as_one(name: str) -> None:
    for _, state, text in load_prompts(name).sentences():
        if state == "phrase":
            assert text[0].islower() and not text.endswith(".")
        else:
            assert re.fullmatch(r"[A-Z][^.{}]*\.", text) and "  " not in text, text
            assert not re.search(r"\b(\w+) \1\b", text), text
            assert not re.search(r"\b(?:an? some|some an?|no an?|no some|an? an?)\b", text), text
