"""Facts of sentences: expectations written by hand, the probe of negation and uncertainty, coded real reports, and texts of any kind."""

import os
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medvl.types import FINDINGS, Fact
from reports.facts import LexiconFacts
from reports.facts.lexicon import load_lexicon
from reports.facts.ontology import Ontology, load_ontology
from reports.synthetic import labelled_sentences

PROBE = Path(__file__).with_name("data") / "negation_probe.yaml"


@pytest.fixture(scope="module")
def source():
    return LexiconFacts()


def told(source, text):
    """(finding, state, side, location, severity, size, change) of each statement."""
    return [
        (s.fact.finding, s.fact.state, s.fact.side, s.fact.location, s.fact.severity, s.fact.size_mm, s.change) for s in source.facts(text)
    ]


def states(source, text, finding):
    kinds = {finding, *load_ontology().descendants(finding)}
    return {s.fact.state for s in source.facts(text) if s.fact.finding in kinds}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Small left pleural effusion.", ("pleural_effusion", "present", "left", "pleura", "mild", None, None)),
        ("A 13 x 9.3 mm nodule in the RUL, unchanged.", ("lung_nodule", "present", "right", "upper lobe", None, 13.0, "unchanged")),
        ("1.2 cm nodule in the lingula.", ("lung_nodule", "present", None, "lingula", None, 12.0, None)),
        (
            "Moderate bilateral pleural effusions, increased since the prior study.",
            ("pleural_effusion", "present", "bilateral", "pleura", "moderate", None, "increased"),
        ),
        ("No pneumothorax.", ("pneumothorax", "absent", None, "pleura", None, None, None)),
        ("Possible mild cardiomegaly.", ("cardiomegaly", "uncertain", None, "heart", "mild", None, None)),
        ("The heart is not enlarged.", ("cardiomegaly", "absent", None, "heart", None, None, None)),
        ("New right lower lobe consolidation.", ("consolidation", "present", "right", "lower lobe", None, None, "new")),
        ("Left pneumothorax has resolved.", ("pneumothorax", "absent", "left", "pleura", None, None, "resolved")),
        ("Nodule of 4 mm and scar at the left apex.", ("lung_nodule", "present", None, "lung", None, 4.0, None)),
    ],
)
def test_one_finding_with_all_that_is_said_of_it(source, text, expected):
    assert expected in told(source, text)


@pytest.mark.parametrize(
    ("text", "left", "right"),
    [
        ("No effusion, small left nodule.", {"pleural_effusion": "absent"}, {"lung_nodule": "present"}),
        ("No focal consolidation, effusion or pneumothorax.", {"consolidation": "absent"}, {"pneumothorax": "absent"}),
        ("Pericardial effusion was not observed, and there are nodules.", {"pericardial_effusion": "absent"}, {"lung_nodule": "present"}),
        ("Atelectasis is seen; pneumonia cannot be excluded.", {"atelectasis": "present"}, {"pneumonia": "uncertain"}),
        ("Lungs are clear without effusion.", {"lung_opacity": "absent"}, {"pleural_effusion": "absent"}),
        ("Effusion is unchanged but no pneumothorax.", {"pleural_effusion": "present"}, {"pneumothorax": "absent"}),
    ],
)
def test_where_a_cue_stops(source, text, left, right):
    for finding, state in (left | right).items():
        assert states(source, text, finding) == {state}


@pytest.mark.parametrize(
    ("text", "finding", "state"),
    [
        ("Linear scarring or atelectasis at the left base.", "atelectasis", "uncertain"),
        ("Linear scarring or atelectasis at the left base.", "scar", "uncertain"),
        ("No scarring or atelectasis.", "scar", "absent"),
        ("There is pleural effusion or thickening on the left.", "pleural_thickening", "present"),
        ("No large pneumothorax, but a small one cannot be excluded.", "pneumothorax", "uncertain"),
        ("No large pneumothorax, but the effusion is small.", "pneumothorax", "absent"),
        ("The catheter, which was seen in the prior study, was removed.", "catheter", "absent"),
        ("No mass was seen, but the effusion, which was small, has increased.", "pleural_effusion", "present"),
        ("Exclusion of a small pneumothorax is not possible.", "pneumothorax", "uncertain"),
        ("Heart: No cardiomegaly.", "cardiomegaly", "absent"),
        ("Pleura: negative for effusion.", "pleural_effusion", "absent"),
        ("Pneumothorax: No evidence.", "pneumothorax", "absent"),
        ("Pleural effusion: No pleural effusion.", "pleural_effusion", "absent"),
        ("Effusion: none, nodule: 4 mm.", "lung_nodule", "present"),
        ("COPD with almost completely resolved pleural air.", "copd", "present"),
        ("COPD with almost completely resolved pleural air.", "pneumothorax", "present"),
        ("Left scar and resolved effusion.", "scar", "present"),
        ("Emphysema with suspected bullae.", "emphysema", "present"),
        ("Nodule, malignancy cannot be excluded.", "lung_nodule", "present"),
        ("Cardiomegaly and small effusion versus thickening.", "cardiomegaly", "present"),
        ("No consolidation (blunting may represent a small effusion).", "pleural_effusion", "uncertain"),
        ("No nodule (mass) or effusion.", "pleural_effusion", "absent"),
        ("Consolidations were not detected in the previous examination.", "consolidation", "present"),
        ("Effusion, atelectasis, scar, or pneumonia.", "atelectasis", "uncertain"),
    ],
)
def test_alternatives_reopened_denials_and_asides(source, text, finding, state):
    assert states(source, text, finding) == {state}


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("Calcific plaques are observed in the LAD.", {"coronary_calcification"}),
        ("Effusion of 5 mm was observed in the pericardial space.", {"pericardial_effusion"}),
        (
            "An effusion of 15 mm is seen in the left hemithorax and of 5 mm in the pericardial area.",
            {"pericardial_effusion", "pleural_effusion"},
        ),
        ("Mediastinal lymph node stations were examined.", set()),
        ("Dilatation of the aorta, plaques in the coronary arteries.", {"aortic_aneurysm", "coronary_calcification"}),
        ("Ground-glass areas along the peribronchial area.", {"ground_glass_opacity"}),
    ],
)
def test_what_a_phrase_names(source, text, findings):
    assert {s.fact.finding for s in source.facts(text)} == findings


def test_a_sentence_without_end_is_read_in_pieces(source):
    text = "no effusion and " * 1000
    sentences = source.sentences(text)
    assert max(s.end - s.start for s in sentences) <= 2000
    assert [text[s.start : s.end] for one in sentences for s in one.statements] == ["effusion"] * 1000
    assert {s.fact.state for s in source.facts(text)} == {"absent"}


def test_side_of_each_of_two_findings(source):
    sides = {s.fact.finding: s.fact.side for s in source.facts("Right pleural effusion and left basilar atelectasis.")}
    assert sides == {"pleural_effusion": "right", "atelectasis": "left"}


def test_an_explanation_is_where_the_finding_is(source):
    found = {s.fact.finding: s.fact for s in source.facts("Opacity at the left base, possibly pneumonia.")}
    assert found["pneumonia"].side == "left" and found["pneumonia"].location == "base"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("There is a 2 cm nodule in the right thyroid lobe.", "lung_nodule"),
        ("Subcutaneous emphysema.", "emphysema"),
        ("Pericardial effusion.", "pleural_effusion"),
        ("Soft tissue edema of the leg.", "edema"),
        ("Catheter fracture.", "fracture"),
        ("INDICATION: pneumothorax?", "pneumothorax"),
        ("Rule out pneumonia.", "pneumonia"),
    ],
)
def test_words_that_mean_something_else(source, text, finding):
    assert states(source, text, finding) == set()


def test_sentences_that_compare(source):
    text = "The effusion is unchanged. There is a nodule. Compared with the prior study, no change. Interval removal of the tube."
    assert [s.compares for s in source.sentences(text)] == [True, False, True, True]


def test_offsets_point_to_the_words(source):
    text = "FINDINGS:\n1. No  pleural\neffusion.\n2. Cardiomegaly.\n\nIMPRESSION: Nodule."
    words = {s.fact.finding: text[s.start : s.end] for s in source.facts(text)}
    assert words == {"pleural_effusion": "pleural\neffusion", "cardiomegaly": "Cardiomegaly", "lung_nodule": "Nodule"}


def test_sections_are_told_apart(source):
    sentences = source.sentences("INDICATION: Rib fracture.\n\nFINDINGS: Cardiomegaly.\n\nIMPRESSION: Edema.")
    assert [s.section for s in sentences] == ["indication", "findings", "impression"]
    assert sentences[0].statements  # kept for who asks
    assert {s.fact.finding for s in source.facts("INDICATION: Rib fracture.\n\nFINDINGS: Cardiomegaly.")} == {"cardiomegaly"}


PIECES = [
    "no",
    "effusion",
    ",",
    ".",
    ";",
    "left",
    "right",
    "3",
    "mm",
    "heart",
    "not",
    "enlarged",
    "IMPRESSION:",
    "\n",
    "(",
    ")",
    "-",
    "?",
    "/",
]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.lists(st.sampled_from(PIECES), max_size=40).map(" ".join))
@example("-")
@example("(-")
@example("no " * 500)
@example("0MM0ENLARGE0EFFUSION0HEART")
def test_any_text_is_read(source, text):
    end = 0
    for sentence in source.sentences(text):
        assert 0 <= sentence.start < sentence.end <= len(text) and sentence.start >= end
        end = sentence.end
        for statement in sentence.statements:
            assert sentence.start <= statement.start < statement.end <= sentence.end


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["pneumothorax", "pleural effusion", "cardiomegaly", "atelectasis", "lung nodule", "consolidation"]), st.data())
def test_other_sentences_change_nothing(source, name, data):
    finding = name.replace(" ", "_")
    around = data.draw(st.lists(st.sampled_from(["The bones are intact.", "Degenerative spine.", "No gallstones."]), max_size=3))
    at = data.draw(st.integers(0, len(around)))
    for sentence, state in ((f"No {name}.", "absent"), (f"There is {name}.", "present"), (f"Possible {name}.", "uncertain")):
        assert states(source, " ".join([*around[:at], sentence, *around[at:]]), finding) == {state}


SAID_OTHERWISE = {  # sentences of our phantoms whose finding is another one here, or whose state is read otherwise, and why
    "Heart size is at the upper limits of normal.": "upper limits of normal are normal (CheXpert)",
    "Questionable right pleural line, possibly a skin fold rather than pneumothorax.": "rather than denies (NegEx)",
    "Lung markings reach the chest wall on both sides.": "implied only",
}
NEAR = {  # findings of the phantoms that take in what is told apart here
    "consolidation": {"lung_opacity", "infiltrate", "pneumonia"},
    "lung_nodule": {"nodular_opacity"},
    "edema": {"heart_failure", "vascular_congestion", "interlobular_septal_thickening", "lung_opacity"},
    "atelectasis": {"volume_loss", "hypoinflation"},
    "rib_fracture": {"fracture"},
    "emphysema": {"hyperinflation", "copd", "diaphragm_elevation"},
    "support_device": {"surgical_material"},
}
FACTS = {
    "pleural_effusion": {"side": "right", "severity": "mild"},
    "consolidation": {"side": "right", "location": "lower lobe"},
    "pneumothorax": {"side": "right", "location": "apex"},
    "lung_nodule": {"side": "right", "location": "upper lobe", "size_mm": 8.0},
    "atelectasis": {"side": "right", "location": "lower lobe"},
    "rib_fracture": {"side": "right", "location": "lateral seventh rib"},
    "support_device": {"kind": "pacemaker"},
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_what_phantom_reports_say(source, finding):
    """The facts that a sentence was made from are read out of it: state always, and the side where the sentence names one."""
    known = load_ontology()
    wanted = {finding, *known.descendants(finding), *NEAR.get(finding, ())}
    for state in ("present", "absent", "uncertain"):
        fact = Fact(finding, state, **(FACTS.get(finding, {}) if state != "absent" else {}))
        for text in labelled_sentences([fact])[finding]:
            if text in SAID_OTHERWISE:
                continue
            said = [s.fact for s in source.facts(text) if s.fact.finding in wanted]
            assert state in {f.state for f in said}, text
            assert ("absent" in {f.state for f in said}) == (state == "absent"), text
            if fact.side and "right" in text.lower():
                assert "right" in {f.side for f in said}, text


@pytest.mark.parametrize("split", ["dev", "held_out", "more"])
def test_probe_of_negation_and_uncertainty(source, split):
    """Accuracy on sentences written apart from the lexicon (see the file's header for how they are scored).

    The bar is 0.95 on each.
    """
    known = load_ontology()
    every = yaml.safe_load(PROBE.read_text(encoding="utf-8"))["sentences"]
    more = yaml.safe_load(PROBE.with_name("negation_more.yaml").read_text(encoding="utf-8"))
    sentences = more if split == "more" else [s for s in every if s["split"] == split]
    assert len(sentences) == {"dev": 200, "held_out": 100, "more": 432}[split]
    wrong: Counter[str] = Counter()
    for one in sentences:
        kinds = {one["finding"], *known.descendants(one["finding"])}
        said = {s.fact.state for s in source.facts(one["text"]) if s.fact.finding in kinds}
        got = next((state for state in ("present", "uncertain", "absent") if state in said), "not_stated")
        wrong[one["why"]] += got != one["state"]
    mistakes, allowed = sum(wrong.values()), {"dev": 10, "held_out": 5, "more": 21}[split]
    del every, more, sentences, one  # a failure shows no held-out sentence
    assert mistakes <= allowed, {why: n for why, n in wrong.items() if n}


def edited(tmp_path, name, old, new):
    for file in load_lexicon_files():
        text = file.read_text(encoding="utf-8")
        if file.name == name:
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    return tmp_path


def load_lexicon_files():
    import reports

    folder = Path(reports.__file__).with_name("lexicon")
    return [folder / name for name in ("findings.yaml", "cues.yaml", "anatomy.yaml")]


def test_an_edited_lexicon_takes_its_place(tmp_path):
    folder = edited(tmp_path, "findings.yaml", "names: [gynecomast*", "names: [moobs, gynecomast*")
    mine = LexiconFacts(lexicon=folder)
    assert [s.fact.finding for s in mine.facts("Moobs are seen.")] == ["gynecomastia"]
    assert mine.lexicon.sha256 != load_lexicon().sha256 and mine.lexicon.version == load_lexicon().version
    assert mine.spec()["init_args"] == {"lexicon": str(folder)}


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("findings.yaml", "parents: [bone_abnormality]", "parents: [bony_abnormality]", "unknown parent bony_abnormality"),
        ("findings.yaml", "names: [gynecomast*", "names: [~3 gynecomast*", "must begin and end with a word"),
        ("findings.yaml", "denies: [cardiomegaly]", "denies: [cardiomegali]", "unknown findings cardiomegali"),
        ("findings.yaml", "abnormality: {}", "abnormality: {parents: [lung_nodule]}", "kinds of themselves"),
        ("findings.yaml", "gynecomastia: {parents", "gynecomastia: {parent", "unknown keys parent"),
        ("cues.yaml", "absent:", "absnt:", "'absent'"),
        ("anatomy.yaml", 'version: "1"', "", "version"),
    ],
)
def test_faults_of_a_lexicon_are_named(tmp_path, name, old, new, says):
    with pytest.raises(ValueError, match="lexicon") as error:
        load_lexicon(edited(tmp_path, name, old, new))
    assert says in str(error.value)


def test_a_missing_lexicon_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"findings\.yaml"):
        load_lexicon(tmp_path)


def test_ontology_relations():
    known = Ontology({"a": (), "b": ("a",), "c": ("b", "a"), "d": ("a",)})
    assert known.ancestors("c") == ("b", "a") and known.descendants("a") == ("b", "c", "d") and known.descendants("c") == ()
    assert known.depth("c") == 2 and known.depth("a") == 0
    with pytest.raises(ValueError, match="unknown parent z"):
        Ontology({"a": ("z",)})
    with pytest.raises(ValueError, match="kinds of themselves: a, b"):
        Ontology({"a": ("b",), "b": ("a",)})


def test_every_phantom_finding_is_in_the_ontology():
    assert set(FINDINGS) <= set(load_ontology().findings)
    assert all("abnormality" in (f, *load_ontology().ancestors(f)) for f in load_ontology().findings)


def test_no_import_of_heavy_libraries():
    import subprocess
    import sys

    code = "import sys, reports.facts; print('transformers' in sys.modules, 'sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.split() == ["False", "False"]
