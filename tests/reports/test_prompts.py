"""Prompt files: ours is disjoint from every training sentence, a user's is checked, the hash follows the content."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from medvl.types import FINDINGS, Fact
from reports.prompts import BUILT_IN, load_prompts, prompt_pair, scheme, scheme_names
from reports.sentences import report_sentences
from reports.synthetic import sentence_templates, write_report

SIDES = ["left", "right"]
LOBES = ["upper lobe", "middle lobe", "lingula", "lower lobe", "upper zone", "mid zone", "lower zone", "apex", "base"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]
SLOTS = {
    "side": SIDES,
    "location": [*LOBES, *(f"{where} {n} rib" for where in ("lateral", "posterior", "anterior") for n in ORDINALS), "lung", "rib"],
    "adjective": [*LOBES, "apical", "basal", "lingular"],
    "degree": ["mild", "moderate", "severe"],
    "amount": ["small", "moderate", "large"],
    "size": [f"{n} mm" for n in range(3, 41)] + [f"{n / 10:.1f} cm" for n in range(10, 41)],
    "kind": ["pacemaker", "central venous catheter", "endotracheal tube", "nasogastric tube", "chest tube"],
    "rib": ["rib"],
    "ribs": ["ribs"],
}


def normalised(sentence: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", sentence.lower()))


@pytest.fixture(scope="module")
def training() -> set[str]:
    """Every sentence that a phantom's report can hold, in normal form."""
    found: set[str] = set()
    for template in sentence_templates():
        slots = sorted(set(re.findall(r"\{(\w+)\}", template)))
        for values in itertools.product(*(SLOTS[s] for s in slots)):
            found.add(normalised(template.format(**dict(zip(slots, values, strict=True)))))
    rng = np.random.default_rng(0)
    for _ in range(300):
        study = [Fact(f, "present", "left", "upper lobe", "mild", 8.0, "chest tube") for f in FINDINGS if rng.random() < 0.3]
        found |= {normalised(s) for s in report_sentences(write_report(study, rng).text)}
    assert len(found) > 5000
    return found


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_prompt_equals_a_training_sentence(name: str, training: set[str]) -> None:
    prompts = load_prompts(name)
    words = {normalised(text) for _, _, text in prompts.sentences()}
    pairs = {normalised(s) for p in prompts.findings.values() for s in (*p.positive, *p.negative, p.phrase)}
    fewest = {"phantom": 9 * len(FINDINGS) - 5, "rsna": 50, "siim": 50}  # of one label and its kinds
    assert pairs <= words and len(words) >= fewest.get(name, 1000)
    assert not words & training


@pytest.mark.parametrize("name", scheme_names())
def test_a_scheme_whose_texts_are_training_sentences_says_so(name: str, training: set[str]) -> None:
    prompts, one = load_prompts("chest_xray"), scheme(name)
    classes = one.prompts(prompts, [f for f in FINDINGS if f in prompts.findings])
    texts = {normalised(text) for c in classes for group in c.groups for text in (*group.positive, *group.negative)}
    assert len(classes) == len(texts and classes) == len(FINDINGS)
    assert one.phantom_overlap == any(text in training for text in texts)


def test_ours_covers_every_finding_with_three_prompts_each_way() -> None:
    prompts = load_prompts()
    assert tuple(prompts.findings) == FINDINGS
    for pair in prompts.findings.values():
        assert 3 <= len(pair.positive) <= 6 and 3 <= len(pair.negative) <= 6 and pair.phrase


def test_the_hash_follows_content_not_layout(tmp_path: Path) -> None:
    built_in = Path(load_prompts.__code__.co_filename).with_name("prompts.yaml")
    assert load_prompts().version == "3"
    assert load_prompts().sha256 == "29082630c8a860c3f7a04646070bb7c350a31c0f9474e4513b736fc7af4e00d1"  # saved results name it
    content = yaml.safe_load(built_in.read_text(encoding="utf-8"))
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False, width=40), encoding="utf-8")
    assert load_prompts(file) == load_prompts() and load_prompts(file).sha256 == load_prompts().sha256
    content["findings"]["edema"]["positive"].append("Wet lungs.")
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    assert load_prompts(file).sha256 != load_prompts().sha256


def test_a_free_finding_name_gets_the_template() -> None:
    pair = prompt_pair("hiatal_hernia")
    assert (pair.positive, pair.negative, pair.phrase) == (("There is hiatal hernia.",), ("There is no hiatal hernia.",), "hiatal hernia")
    assert load_prompts().pair("hiatal_hernia") == pair
    assert load_prompts().pair("edema") == load_prompts().findings["edema"]
    with pytest.raises(ValueError, match="letters"):
        prompt_pair("__")


PAIR = "{positive: [It is there.], negative: [It is gone.]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "not readable YAML"),
        ("- a list", "the file is not a mapping (expected a mapping with the keys version and findings)"),
        ("version: '1'", "findings is missing or empty"),
        (f"findings: {{x: {PAIR}}}", "version is missing"),
        ("version: '1'\nfindings: {x: {positive: [a]}}", "finding x: negative is missing or empty"),
        ("version: '1'\nfindings: {x: {positive: [yes], negative: [b]}}", "quote words such as no and yes"),
        ("version: '1'\nfindings: {x: {positive: [a], negative: [A]}}", "same sentence"),
        (f"version: '1'\nfindings: {{Big Heart: {PAIR}}}", "snake_case"),
        (f"version: '1'\nfindings: {{x: {PAIR}, x: {PAIR}}}", "given twice"),
        (f"version: '1'\nprompts: 3\nfindings: {{x: {PAIR}}}", "prompts is an unknown key"),
        (
            "version: '1'\nfindings: {x: {positiv: [a], negative: [b]}}",
            "finding x: positive is missing or empty (expected a list of sentences); finding x: positiv is an unknown key",
        ),
        ("version: !!python/object/apply:os.system ['true']", "not readable YAML"),
    ],
)
def test_a_users_file_is_checked(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_prompts(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="omit it to use the built-in"):
        load_prompts(tmp_path / "none.yaml")


def test_a_finding_without_a_phrase_is_sought_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"version: 2\nfindings: {{hiatal_hernia: {PAIR}}}", encoding="utf-8")
    prompts = load_prompts(file)
    assert prompts.version == "2" and prompts.findings["hiatal_hernia"].phrase == "hiatal hernia"
