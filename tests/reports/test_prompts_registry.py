"""The registry: made sentences against plain loops, the hierarchy, label sets, every fault at once, files and back."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medvl.types import FINDINGS
from reports.facts import LexiconFacts
from reports.facts.label_sets import load_label_set
from reports.facts.ontology import load_ontology
from reports.prompts import BUILT_IN, Noun, PromptSet, Templates, dump_prompts, kinds_of, load_prompts, prompt_faults, roll_up

FOLDER = Path(load_prompts.__code__.co_filename).parent
SETS = ["chest_xray", "chest_ct"]


def raw(name: str) -> dict[str, Any]:
    content = yaml.safe_load((FOLDER / BUILT_IN[name]).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def bare(phrase: str) -> str:
    return re.sub(r"^(?:an?|some) ", "", phrase)


def write(folder: Path, content: object) -> Path:
    file = folder / "mine.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def test_importing_prompts_loads_nothing_heavy() -> None:
    code = "import sys, reports.prompts; reports.prompts.load_prompts(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- built-in sets


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets_have_no_fault(name: str) -> None:
    assert prompt_faults(load_prompts(name), load_ontology().findings) == ()


@pytest.mark.parametrize(
    ("name", "version", "sha256"),
    [("phantom", "3", "29082630c8a8"), ("chest_xray", "1", "649090e0d962"), ("chest_ct", "1", "ed6cfc4446fb")],
)
def test_a_change_of_content_changes_the_version(name: str, version: str, sha256: str) -> None:
    """Results name both. Where this fails, raise ``version`` in the file, then write both here."""
    prompts = load_prompts(name)
    assert (prompts.version, prompts.sha256[:12]) == (version, sha256)


@pytest.mark.parametrize("name", ["chexpert_14", "chestxray_14", "ct_rate_18"])
def test_label_sets_are_those_of_the_data_sets(name: str) -> None:
    prompts, published = load_prompts(name), load_label_set(name)
    labels = prompts.label_set(name)
    assert tuple(labels) == published.names
    for label, finding in labels.items():
        if label == published.no_finding:
            assert prompts.words[finding].normal
        else:
            assert published.covers[label] & {finding, *load_ontology().descendants(finding)}
    assert prompts.labels == tuple(labels.values())
    with pytest.raises(KeyError, match="no label set merlin"):
        prompts.label_set("merlin")


@pytest.mark.parametrize("name", SETS)
def test_every_label_has_all_kinds_of_prompts(name: str) -> None:
    prompts = load_prompts(name)
    for finding in prompts.labels:
        pair = prompts.pair(finding)
        assert len(pair.positive) >= 2 and len(pair.negative) >= 2 and pair.phrase and prompts.uncertain(finding)
        if not prompts.words[finding].normal:
            assert 5 <= len(prompts.descriptors(finding)) <= 7
            assert len(prompts.expand(finding)) >= 6
    assert sum(bool(prompts.children(finding)) for finding in prompts.labels) >= 14


def test_the_findings_of_the_phantoms_are_all_in_the_radiograph_set() -> None:
    prompts = load_prompts("chest_xray")
    assert set(FINDINGS) <= set(prompts.findings)
    assert all(prompts.descriptors(finding) and prompts.expand(finding, 3) for finding in FINDINGS)


@pytest.mark.parametrize("name", SETS)
def test_no_sentence_is_positive_of_one_finding_and_negative_of_another(name: str) -> None:
    """The rule of ``prompt_faults``, again by plain loops over raw strings."""
    by_state: dict[str, set[str]] = {"present": set(), "absent": set(), "uncertain": set(), "phrase": set()}
    for _, state, text in load_prompts(name).sentences():
        by_state[state].add(text.lower().rstrip("."))
    assert not by_state["present"] & by_state["absent"]
    assert not by_state["uncertain"] & (by_state["present"] | by_state["absent"])


@pytest.mark.parametrize("name", SETS)
def test_the_lexicon_reads_each_prompt_in_the_state_that_it_stands_for(name: str) -> None:
    prompts, lexicon, ontology = load_prompts(name), LexiconFacts(), load_ontology()
    right, unread, wrong = 0, 0, []
    for finding in set(prompts.findings) & set(ontology.findings):
        family = {finding, *ontology.descendants(finding), *ontology.ancestors(finding)}
        pair = prompts.pair(finding)
        for state, texts in (("present", pair.positive), ("absent", pair.negative), ("uncertain", prompts.uncertain(finding))):
            for text in texts:
                states = {s.fact.state for one in lexicon.sentences(text) for s in one.statements if s.fact.finding in family}
                right, unread = right + (states == {state}), unread + (not states)
                wrong += [text] if states - {state} else []
    assert right > 200 and right > 0.85 * (right + unread)
    assert len(wrong) <= 0.03 * right, wrong  # the lexicon's own mistakes


# ---------------------------------------------------------------- made sentences


@pytest.mark.parametrize("name", SETS)
def test_expansion_is_every_severity_by_subtype_by_location(name: str) -> None:
    prompts, content = load_prompts(name), raw(name)
    checked = 0
    for finding, entry in content["findings"].items():
        if entry.get("normal"):
            assert prompts.expand(finding) == () == prompts.phrases(finding)
            continue
        expected = [
            " ".join(part for part in (severity, bare(kind), location) if part)
            for severity in ["", *entry.get("severities", [])]
            for kind in entry.get("subtypes", [entry["name"]])
            for location in ["", *entry.get("locations", [])]
        ]
        assert list(prompts.phrases(finding)) == expected
        assert [re.sub(r"^There (?:is|are) (?:an? )?|\.$", "", text) for text in prompts.expand(finding)] == expected
        checked += len(expected)
    assert checked > 1000


def test_a_draw_is_stable_nested_and_depends_on_the_seed() -> None:
    prompts = load_prompts("chest_xray")
    everything = prompts.expand("consolidation")
    drawn = {n: prompts.expand("consolidation", n, seed=3) for n in (0, 1, 5, 20, len(everything), 10**6)}
    assert [len(texts) for texts in drawn.values()] == [0, 1, 5, 20, len(everything), len(everything)]
    for small, large in zip(list(drawn.values()), list(drawn.values())[1:], strict=False):
        assert set(small) <= set(large)
        assert sorted(small, key=everything.index) == list(small)
    assert len({prompts.expand("consolidation", 5, seed=seed) for seed in range(20)}) > 15
    assert prompts.expand("pneumothorax", 2) == (  # the same on every machine
        "There is a basal pneumothorax on the right side.",
        "There is a moderate basal pneumothorax.",
    )
    with pytest.raises(ValueError, match="n is -1"):
        prompts.expand("consolidation", -1)


def test_descriptors_are_said_and_denied() -> None:
    prompts = load_prompts("chest_xray")
    found = {one.descriptor: one for one in prompts.descriptors("consolidation")}
    one = found["air bronchograms"]
    assert one.positive == "There are air bronchograms indicating a consolidation."
    assert one.negative == "There are no air bronchograms indicating a consolidation."
    assert prompts.descriptors("no_finding") == () == prompts.descriptors("unheard_of")


def test_a_finding_that_the_set_does_not_have_gets_the_templates() -> None:
    for prompts in (load_prompts(), load_prompts("chest_xray")):
        assert prompts.name("hiatus_of_time") == Noun("hiatus of time")
        assert prompts.uncertain("hiatus_of_time")[0] == "There may be hiatus of time."
        assert prompts.expand("hiatus_of_time") == ("There is hiatus of time.",)
        assert prompts.children("hiatus_of_time") == () == prompts.parents("hiatus_of_time")


# ---------------------------------------------------------------- hierarchy


def test_children_and_subsets() -> None:
    prompts = load_prompts("chest_xray")
    assert prompts.children("fracture") == ("rib_fracture", "clavicle_fracture", "vertebral_fracture")
    assert prompts.parents("hydropneumothorax") == ("pneumothorax", "pleural_effusion")
    part = prompts.subset(["fracture", "lung_opacity"], with_children=True)
    assert tuple(part.findings)[:2] == ("fracture", "lung_opacity")
    assert {"rib_fracture", "pneumonia", "lobar_pneumonia", "linear_atelectasis"} <= set(part.findings)
    assert "lung_nodule" not in part.findings and not part.label_sets
    alone = prompts.subset(["rib_fracture"])
    assert alone.parents("rib_fracture") == () and prompt_faults(alone) == ()
    with pytest.raises(KeyError, match="no prompts for gout, mumps"):
        prompts.subset(["edema", "gout", "mumps"])


def test_roll_up_is_the_best_kind_weighted_by_its_label() -> None:
    prompts = load_prompts("chexpert_14")
    labels = ["lung_opacity", "fracture", "cardiomegaly", "lobar_collapse"]
    kinds, mask = kinds_of(prompts, labels)
    assert mask.shape == (4, len(kinds)) and mask[3].sum() == 0 and mask[1].sum() == 3
    assert {"consolidation", "lobar_consolidation"} <= {k for k, inside in zip(kinds, mask[0], strict=True) if inside}
    rng = np.random.default_rng(0)
    own, below = rng.random((5, 4)), rng.random((5, len(kinds)))
    weighted, plain = roll_up(own, below, mask), roll_up(own, below, mask, reweight=False)
    for study in range(5):
        for f in range(4):
            best = own[study, f]
            for k in range(len(kinds)):
                if mask[f, k]:
                    best = max(best, below[study, k])
            assert plain[study, f] == best
            assert weighted[study, f] == pytest.approx(own[study, f] * best)
    assert roll_up(own[0], below[0], mask).shape == (4,)
    nothing = roll_up(own, np.zeros((5, 0)), np.zeros((4, 0), dtype=bool))
    assert nothing == pytest.approx(own**2)
    assert np.isnan(roll_up(np.array([np.nan, 0.5]), np.zeros(0), np.zeros((2, 0), dtype=bool))).tolist() == [True, False]


def test_roll_up_refuses_what_is_no_score() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        roll_up(np.zeros((2, 3)), np.zeros((2, 4)), np.zeros((4, 3), dtype=bool))
    with pytest.raises(ValueError, match=r"kind has the score 1\.5"):
        roll_up(np.zeros(1), np.array([1.5]), np.ones((1, 1), dtype=bool))


# ---------------------------------------------------------------- faults

GOOD: dict[str, Any] = {
    "format": 2,
    "version": "1",
    "findings": {"edema": {"name": "pulmonary edema"}, "cyst": {"name": "a cyst", "parents": ["edema"]}},
}


def with_finding(**entry: object) -> dict[str, Any]:
    return {**GOOD, "findings": {**GOOD["findings"], "x": {"name": "a shadow", **entry}}}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (
            with_finding(positive=["A shadow is there."], negative=["a SHADOW, is there"]),
            ["finding x: the same sentence stands in positive"],
        ),
        (with_finding(positive=["There is no pulmonary edema."]), ["is positive of x and negative of edema", "has a word that denies"]),
        (with_finding(uncertain=["There is a shadow."]), ["stands in positive and uncertain", "no word that leaves it open"]),
        (with_finding(positive=["Lungs without air."]), ["the positive sentence 'Lungs without air.' has a word that denies"]),
        (with_finding(positive=["A shadow may be seen."]), ["has a word that leaves it open"]),
        (with_finding(negative=["A shadow is gone."]), ["the negative sentence 'A shadow is gone.' has no word that denies"]),
        (with_finding(descriptors=["absent markings"]), ["'There is absent markings indicating a shadow.' has a word that denies"]),
        (with_finding(descriptors=["a veil", "a line", "A  veil"]), ["finding x: 'veil' stands in descriptors twice"]),
        (with_finding(positive=["A {kind} shadow."]), ["a slot is not filled in 'A {kind} shadow.'"]),
        (with_finding(name="a {kind} shadow"), ["a slot is not filled"]),
        (with_finding(parents=["gout"]), ["finding x: its parent gout is no finding of the set"]),
        (with_finding(parents=["y"], severities=["faint"], subtypes=["a faint veil"]), ["has the severity faint in it", "parent y"]),
        (with_finding(subtypes=["a bilateral veil"], locations=["in the left lung"]), ["names a side"]),
        (with_finding(normal=True), ["finding x: it has no positive sentence", "finding x: it has no negative sentence"]),
        (with_finding(name="a shadow."), ["finding x: name is not right (expected a noun phrase without a stop"]),
        (with_finding(synonyms=[True]), ["finding x: synonyms 0 is not right (expected a noun phrase; quote words such as no and yes)"]),
        (with_finding(colour="grey"), ["finding x: colour is an unknown key"]),
        ({**GOOD, "format": 3}, ["format is not right", "expected 2, or no such key"]),
        ({**GOOD, "label_sets": {"mine": {"Gout": "gout"}}}, ["label set mine: Gout stands for gout, which is no finding of the set"]),
        (
            {**GOOD, "templates": {"positive": ["There is {a_thing}."]}},
            ["templates positive: nothing fills {a_thing}; known are {a_finding}"],
        ),
        ({**GOOD, "templates": {"positive": ["It is {finding."]}}, ["a brace that nothing closes"]),
        ({**GOOD, "templates": {"negative": ["It is not there."]}}, ["has no slot, so that it says the same of every finding"]),
        ({**GOOD, "templates": {"positive": ["There is {finding!z}."]}}, ["nothing fills {finding!}"]),
        ({**GOOD, "findings": {n: {"parents": [p]} for n, p in ("ab", "bc", "ca")}}, ["a circle", "a of"]),
        ({**GOOD, "findings": {"a": {"parents": ["a"]}}}, ["a circle: a of a"]),
    ],
)
def test_every_fault_of_a_file_is_named(tmp_path: Path, content: dict[str, Any], messages: list[str]) -> None:
    file = write(tmp_path, content)
    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        load_prompts(file)
    for message in messages:
        assert message in str(caught.value)


def test_faults_of_several_kinds_come_in_one_message(tmp_path: Path) -> None:
    content = with_finding(positive=["Lungs without air."], negative=["It is gone."], parents=["gout"], descriptors=["a veil", "a veil"])
    with pytest.raises(ValueError, match=r"parent gout.*|twice") as caught:
        load_prompts(write(tmp_path, content))
    text = str(caught.value)
    assert all(part in text for part in ("a word that denies", "no word that denies", "parent gout", "descriptors twice"))


def test_a_sentence_that_a_person_has_checked_is_no_fault(tmp_path: Path) -> None:
    content = with_finding(negative=["A shadow is gone."]) | {"exceptions": ["A shadow is gone."]}
    assert load_prompts(write(tmp_path, content)).pair("x").negative == ("A shadow is gone.",)


def test_a_sentence_may_count_for_several_findings_in_one_state(tmp_path: Path) -> None:
    content = with_finding(negative=["The lungs are clear."])
    content["findings"]["edema"] = {"name": "pulmonary edema", "negative": ["The lungs are clear."]}
    assert prompt_faults(load_prompts(write(tmp_path, content))) == ()


def test_ids_are_checked_against_an_ontology() -> None:
    known = set(load_ontology().findings)
    prompts = load_prompts("chest_xray")
    assert "tension_pneumothorax" not in known  # a kind of what is known
    assert prompt_faults(prompts, known) == ()
    lost = prompt_faults(prompts, known - {"pneumothorax", "pleural_effusion", "hydropneumothorax", "loculated_pleural_effusion"})
    assert {re.search(r"finding (\w+):", fault)[1] for fault in lost} == {  # type: ignore[index]
        *("pneumothorax", "tension_pneumothorax", "apical_pneumothorax", "hydropneumothorax"),
        *("pleural_effusion", "loculated_pleural_effusion", "subpulmonic_pleural_effusion"),
    }


def test_a_file_of_the_first_format_needs_no_words_that_deny_but_may_not_contradict_itself(tmp_path: Path) -> None:
    old = {"version": 2, "findings": {"x": {"positive": ["It is there."], "negative": ["It is gone."]}}}
    prompts = load_prompts(write(tmp_path, old))
    assert len(prompt_faults(prompts)) == 1 and not prompt_faults(prompts, wording=False)
    old["findings"] = {**old["findings"], "y": {"positive": ["It is gone."], "negative": ["It is there.", "It is there"]}}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="positive of x and negative of y") as caught:
        load_prompts(write(tmp_path, old))
    assert "positive of y and negative of x" in str(caught.value) and "'it is there' stands in negative twice" in str(caught.value)


# ---------------------------------------------------------------- files, hashes


def test_a_built_in_name_is_no_file_and_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_prompts("phantom") == load_prompts() == load_prompts(Path("phantom"))
    (tmp_path / "chest_ct").write_text(yaml.safe_dump(GOOD), encoding="utf-8")
    assert tuple(load_prompts("chest_ct").findings) == ("cyst", "edema")
    with pytest.raises(FileNotFoundError, match="chest_xray, chest_ct, chexpert_14"):
        load_prompts("chest_mri")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_set_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    prompts = load_prompts(name)
    again = load_prompts(write(tmp_path, dump_prompts(prompts)))
    assert again == prompts and again.sha256 == prompts.sha256


def test_a_set_of_whole_sentences_that_got_descriptors_comes_back(tmp_path: Path) -> None:
    prompts = load_prompts().with_descriptors({"edema": ["some short lines at the edge of the lung"]})
    again = load_prompts(write(tmp_path, dump_prompts(prompts)))
    assert again == prompts and again.sha256 == prompts.sha256 != load_prompts().sha256
    assert again.descriptors("edema")[0].positive == "There are short lines at the edge of the lung indicating edema."


def test_the_hash_follows_everything_that_makes_a_sentence() -> None:
    prompts = load_prompts("chest_xray")
    words = prompts.words["edema"]
    changes: list[PromptSet] = [
        replace(prompts, version="x"),
        replace(prompts, templates=replace(prompts.templates, uncertain=("Perhaps {a_finding}.",))),
        replace(prompts, label_sets={"chexpert_14": {"Edema": "edema"}}),
        prompts.with_descriptors({"edema": ["a veil of fluid"]}),
        *(
            replace(prompts, words={**prompts.words, "edema": replace(words, **change)})
            for change in (
                {"names": words.names[::-1]},
                {"uncertain": ("There might be edema.",)},
                {"severities": words.severities[::-1]},
                {"subtypes": words.subtypes[:1]},
                {"locations": ()},
                {"descriptors": words.descriptors[:2]},
                {"parents": ()},
                {"normal": True},
            )
        ),
    ]
    assert len({one.sha256 for one in [prompts, *changes]}) == 1 + len(changes)


def test_descriptors_are_added_once() -> None:
    prompts = load_prompts("chest_xray")
    more = prompts.with_descriptors({"edema": ["a veil of fluid", "Fluid in the fissures", "A veil of fluid"]})
    assert [d.descriptor for d in more.descriptors("edema")] == [d.descriptor for d in prompts.descriptors("edema")] + ["veil of fluid"]
    with pytest.raises(KeyError, match="no prompts for gout"):
        prompts.with_descriptors({"gout": ["a tophus"]})


# ---------------------------------------------------------------- whatever the file

LETTERS = st.text("abcdefgh", min_size=1, max_size=6)
PHRASES = st.builds(
    lambda mark, words: mark + " ".join(words), st.sampled_from(["a ", "some ", ""]), st.lists(LETTERS, min_size=2, max_size=3)
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "name": PHRASES,
        "synonyms": st.lists(PHRASES, max_size=2),
        "severities": st.lists(LETTERS, max_size=2),
        "subtypes": st.lists(PHRASES, max_size=2),
        "locations": st.lists(LETTERS.map("in the {}".format), max_size=2),
        "descriptors": st.lists(PHRASES, max_size=2),
        "phrase": LETTERS,
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["version", "findings", "format", "positive", "x"]), inner),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(findings=st.dictionaries(LETTERS, ENTRIES, min_size=1, max_size=3))
def test_made_sets_come_back_or_say_why_not(tmp_path: Path, findings: dict[str, Any]) -> None:
    try:
        prompts = load_prompts(write(tmp_path, {"format": 2, "version": "1", "findings": findings}))
    except ValueError as error:
        assert re.search(r"twice|same sentence|severity", str(error))
        return
    assert load_prompts(write(tmp_path, dump_prompts(prompts))) == prompts
    assert prompts.templates == Templates() and tuple(prompts.findings) == tuple(findings)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=JSON)
def test_nonsense_is_a_value_error(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        load_prompts(write(tmp_path, yaml.safe_dump(content)))


@pytest.mark.parametrize("text", ["? [a, b]\n: c", "[" * 3000, "a: &a [*a]", "\x00", "{" * 50])
def test_odd_yaml_is_a_value_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        load_prompts(write(tmp_path, text))
