"""Pairs of a batch: what is positive, ignored, false or without content; sides in words; soft targets; mixed texts and captions."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medvl.losses import info_nce_of_logits
from medvl.types import KnownStudy, PairStudy, ReportEncoder, SourcedText, StudyWords, TextBatch, TextFeatures
from reports.facts import LexiconFacts
from reports.facts.ontology import load_ontology
from reports.facts.statements import FactSource, StatedSentence
from reports.pairs import HardNegatives, HierarchicalCaptions, LabelCaptions, MixedTexts, ReportPairs, RewrittenTexts, SoftTargets
from reports.pairs.captions import hierarchy, noun_phrase
from reports.pairs.laterality import swap_left_and_right
from reports.pairs.null import has_no_visual_content
from reports.pairs.soft import cwcl_weights, label_similarity, soften, softmax_weights, text_similarity
from reports.pairs.truth import Claim
from reports.providers.answers import CallableFacts, ProviderError
from reports.providers.files import JsonlFacts
from reports.sentences import report_sentences
from reports.synthetic import sentence_templates
from reports.text_source import ReportSentences

REPORTS = {
    0: "Small left pleural effusion. No pneumothorax. Comparison is made to the prior study.",
    1: "There is a left pleural effusion. Possible pneumothorax.",
    2: "No pleural effusion or pneumothorax. The lungs are clear.",
    3: "Bilateral pleural effusions. Findings were discussed with Dr. Smith.",
}


def batch(builder: ReportPairs, reports: dict[int, str] | None = None, rng: np.random.Generator | None = None, **chosen: Any) -> Any:
    """(the pairs, one row each as {text: weight}, one each as the set of texts ignored) of studies of one report each."""
    reports = REPORTS if reports is None else reports
    studies = {i: tuple(map(SourcedText, report_sentences(text))) for i, text in reports.items()}
    builder.prepare([KnownStudy((i,), (StudyWords(str(i), reports[i]),), texts) for i, texts in studies.items()])
    made = builder.pairs([PairStudy(i, texts, **chosen) for i, texts in studies.items()], rng)
    texts = [one.text for one in made.texts]
    positives = [{t: float(w) for t, w in zip(texts, row, strict=True) if w} for row in made.positives.tolist()]
    ignored = made.ignore if made.ignore is not None else torch.zeros(made.positives.shape, dtype=torch.bool)
    return made, positives, [{t for t, out in zip(texts, row, strict=True) if out} for row in ignored.tolist()]


def test_a_sentence_is_a_positive_of_every_study_that_entails_it() -> None:
    _, positives, ignored = batch(ReportPairs())
    left, none = "There is a left pleural effusion.", "No pleural effusion or pneumothorax."
    assert set(positives[0]) == {*report_sentences(REPORTS[0]), left}
    assert set(positives[1]) == {*report_sentences(REPORTS[1]), "Small left pleural effusion."}  # degrees are not compared
    assert set(positives[2]) == {*report_sentences(REPORTS[2]), "No pneumothorax."}
    assert set(positives[3]) == {*report_sentences(REPORTS[3]), "Small left pleural effusion.", left}
    assert none in positives[2] and ignored == [set()] * 4


def test_by_text_alone_only_equal_texts_are_positives() -> None:
    _, positives, _ = batch(ReportPairs(across="text"))
    assert [set(row) for row in positives] == [set(report_sentences(text)) for text in REPORTS.values()]


def test_strictness_decides_what_a_side_or_degree_costs() -> None:
    reports = {0: "Small left pleural effusion.", 1: "Large right pleural effusion."}
    shared = {name: len(batch(ReportPairs(strictness=name), reports)[1][0]) for name in ("finding", "side", "location", "all")}
    assert shared == {"finding": 2, "side": 1, "location": 1, "all": 1}
    reports = {0: "Small left pleural effusion.", 1: "Large left pleural effusion."}
    shared = {name: len(batch(ReportPairs(strictness=name), reports)[1][0]) for name in ("finding", "side", "location", "all")}
    assert shared == {"finding": 2, "side": 2, "location": 2, "all": 1}


def test_what_is_not_known_is_a_negative_or_left_out() -> None:
    _, _, related = batch(ReportPairs(unknown="ignore_related"))
    assert "No pneumothorax." in related[1]  # one is possible there
    assert "The lungs are clear." not in related[0]  # nothing said of the lungs
    _, positives, every = batch(ReportPairs(unknown="ignore"))
    assert "The lungs are clear." in every[0] and "Findings were discussed with Dr. Smith." in every[0]
    assert all(not set(row) & out for row, out in zip(positives, every, strict=True))
    _, closed, _ = batch(ReportPairs(unmentioned="absent"), {0: "Cardiomegaly.", 1: "No pneumothorax."})
    assert "No pneumothorax." in closed[0]


def test_texts_without_content_are_dropped_ignored_or_aimed_at_nothing() -> None:
    talk = "Findings were discussed with Dr. Smith."
    assert not ReportPairs(without_content="drop").keeps(talk)
    assert ReportPairs(without_content="drop").keeps("No pneumothorax.")
    assert ReportPairs().keeps(talk)
    made, positives, ignored = batch(ReportPairs(without_content="ignore"))
    assert all(talk in out for out in ignored) and all(talk not in row for row in positives)
    info_nce_of_logits(torch.zeros(made.positives.shape), made.positives, made.ignore)  # the loss takes it
    made, _, _ = batch(ReportPairs(without_content="target"))
    assert {one.text for one, null in zip(made.texts, made.null_texts, strict=True) if null} == {
        talk,
        "Comparison is made to the prior study.",
    }
    alone, _, ignored = batch(ReportPairs(without_content="ignore"), {0: talk, 1: "No pneumothorax."})
    assert ignored[0] == {talk, "No pneumothorax."} and alone.positives.any()


def test_a_text_that_was_not_drawn_is_a_positive_all_the_same() -> None:
    builder, captions = ReportPairs(across="text"), tuple(SourcedText(t, "captions") for t in ("Coarse words.", "Fine words."))
    builder.prepare([KnownStudy((i,), (StudyWords(str(i), "No pneumothorax."),), captions) for i in (0, 1)])
    made = builder.pairs([PairStudy(0, captions[:1]), PairStudy(1, captions[1:]), PairStudy(2, (SourcedText("Else."),))])
    assert made.positives.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    assert [one.source for one in made.texts] == ["captions", "captions", "report"]


def test_hard_negatives_are_columns_of_their_own() -> None:
    builder = ReportPairs(negatives=HardNegatives(rules=["side"]))
    made, positives, ignored = batch(builder, rng=np.random.default_rng(0))
    false = [one.text for one, is_false in zip(made.texts, made.false_texts, strict=True) if is_false]
    assert set(false) == {"Small right pleural effusion.", "There is a right pleural effusion."}
    assert all(not set(false) & set(row) for row in positives[:3])
    assert "There is a right pleural effusion." in positives[3]  # that study has effusions on both sides, of unknown size
    assert "Small right pleural effusion." in ignored[3]
    assert not set(false) & ignored[0]
    loss = info_nce_of_logits(torch.zeros(made.positives.shape), made.positives, made.ignore, made.false_texts)
    assert torch.isfinite(loss)
    again, _, _ = batch(builder, rng=np.random.default_rng(0))
    assert again.texts == made.texts
    without, _, _ = batch(builder)
    assert without.false_texts is None


def test_a_hard_negative_of_unknown_truth_for_another_study_is_left_out_there() -> None:
    builder = ReportPairs(negatives=HardNegatives(rules=["side"]))
    _, positives, ignored = batch(builder, {0: "Left pleural effusion.", 1: "Pleural effusion is present."}, np.random.default_rng(0))
    assert "Right pleural effusion." in ignored[1]
    assert "Right pleural effusion." not in positives[1] and "Right pleural effusion." not in ignored[0]


def test_the_texts_of_a_flipped_image_and_their_facts_change_sides() -> None:
    reports = {0: "Small left pleural effusion.", 1: "Right pleural effusion."}
    builder = ReportPairs()
    batch(builder, reports)
    made = builder.pairs([PairStudy(0, (SourcedText(reports[0]),), True), PairStudy(1, (SourcedText(reports[1]),))])
    assert [one.text for one in made.texts] == ["Small right pleural effusion.", "Right pleural effusion."]
    assert made.positives.tolist() == [[True, True], [True, True]]
    assert builder.mirrored("Left ventricle.") is None


def test_a_builder_goes_to_worker_processes_and_into_a_recipe() -> None:
    builder = ReportPairs(negatives=HardNegatives(), soft=SoftTargets("labels"))
    one, _, _ = batch(builder, rng=np.random.default_rng(1))
    other = pickle.loads(pickle.dumps(builder))
    two, _, _ = batch(other, rng=np.random.default_rng(1))
    assert one.texts == two.texts and torch.equal(one.positives, two.positives)
    assert json.loads(json.dumps(builder.spec()))["init_args"]["negatives"]["init_args"]["per_study"] == 1
    with pytest.raises(ValueError, match="across is 'labels', expected one of text, findings"):
        ReportPairs(across="labels")  # type: ignore[arg-type]


def test_facts_are_read_once_before_training() -> None:
    class Counted(FactSource):
        calls = 0

        def sentences(self, text: str) -> tuple[StatedSentence, ...]:
            Counted.calls += 1
            return ()

    builder = ReportPairs(facts=Counted())
    batch(builder)
    before = Counted.calls
    assert before == len({s for text in REPORTS.values() for s in report_sentences(text)})
    batch(builder)
    assert Counted.calls == before


def test_a_sentence_whose_sense_hangs_on_a_removed_word_claims_nothing() -> None:
    """What reads "XXXX pneumothorax" may have been "no pneumothorax"."""
    builder = ReportPairs(negatives=HardNegatives(), unknown="ignore")
    reports = {0: "XXXX pneumothorax.", 1: "There is a pneumothorax.", 2: "No pneumothorax."}
    made, positives, ignored = batch(builder, reports, np.random.default_rng(0))
    assert set(positives[0]) == {"XXXX pneumothorax."}
    assert {"There is a pneumothorax.", "No pneumothorax."} <= ignored[0] and "XXXX pneumothorax." in ignored[1] & ignored[2]
    false = [one.text for one, is_false in zip(made.texts, made.false_texts, strict=True) if is_false]
    assert false and not any("XXXX" in text for text in false)


def test_facts_made_elsewhere_are_found_by_whole_reports(tmp_path: Path) -> None:
    """The file says what no lexicon would: that the sentences of one report mean an effusion and no pneumothorax."""
    reports = {0: "Fluid layers here. Nothing else of note.", 1: "There is a pleural effusion."}
    facts = [
        {"text": "Fluid layers here.", "facts": [{"finding": "pleural_effusion", "state": "present", "quote": "Fluid layers"}]},
        {"text": "Nothing else of note.", "facts": [{"finding": "pneumothorax", "state": "absent", "quote": "Nothing else"}]},
    ]
    record = {"text_sha256": hashlib.sha256(reports[0].encode()).hexdigest(), "sentences": facts}
    (tmp_path / "facts.jsonl").write_text(json.dumps(record) + "\n")
    builder = ReportPairs(facts=JsonlFacts(tmp_path / "facts.jsonl", fallback=LexiconFacts()))
    assert builder.keeps("Fluid layers here.")
    _, positives, _ = batch(builder, reports)
    assert set(positives[0]) == {*report_sentences(reports[0]), reports[1]}
    assert set(positives[1]) == {reports[1], "Fluid layers here."}
    assert [c.finding for c in builder.claims("Nothing else of note.")] == ["pneumothorax"]


def answers(known: dict[str, list[tuple[str, str, str]]], calls: list[str]) -> CallableFacts:
    """A source that is asked: text -> (sentence, finding, state); of other texts no answer is to be had."""

    def function(text: str) -> dict[str, Any]:
        calls.append(text)
        if text not in known:
            raise RuntimeError
        said = [{"text": s, "facts": [{"finding": f, "state": state, "quote": s}]} for s, f, state in known[text]]
        return {"sentences": said}

    return CallableFacts(function, "mine", "1", fallback=LexiconFacts())


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
def test_a_sentence_that_leans_on_its_neighbours_means_nothing_alone(order: tuple[int, ...]) -> None:
    """That "It is unchanged." is an effusion in one report and a nodule in another is true of each, and of no third."""
    reports = {0: "Effusion. It is unchanged.", 1: "Nodule. It is unchanged.", 2: "Effusion and nodule."}
    known = {
        reports[0]: [("Effusion.", "pleural_effusion", "present"), ("It is unchanged.", "pleural_effusion", "present")],
        reports[1]: [("Nodule.", "lung_nodule", "present"), ("It is unchanged.", "lung_nodule", "present")],
        reports[2]: [("Effusion and nodule.", "pleural_effusion", "present")],
    }
    calls: list[str] = []
    builder = ReportPairs(facts=answers(known, calls), strictness="finding")
    _, positives, _ = batch(builder, {i: reports[i] for i in order})
    by_study = dict(zip(order, positives, strict=True))
    assert set(by_study[0]) == {"Effusion.", "It is unchanged.", "Effusion and nodule."}
    assert set(by_study[1]) == {"Nodule.", "It is unchanged."}
    assert set(by_study[2]) == {"Effusion and nodule.", "Effusion."}
    assert sorted(calls) == sorted(reports.values())  # each report once, its parts never


def test_a_source_that_gives_no_answer_is_listed_and_the_fallback_reads() -> None:
    reports = {0: "There is a pleural effusion.", 1: "No pneumothorax."}
    builder = ReportPairs(facts=answers({reports[0]: [(reports[0], "pleural_effusion", "present")]}, []))
    batch(builder, reports)
    assert list(builder.unread) == ["1"] and "RuntimeError" in builder.unread["1"] and "pneumothorax" not in builder.unread["1"]
    assert [(c.finding, c.state) for c in builder.claims(reports[1])] == [("pneumothorax", "absent")]


def test_an_answer_that_breaks_the_format_is_listed_and_ends_nothing() -> None:
    facts = CallableFacts(lambda text: {"Zebra": 1}, "mine", "1", fallback=LexiconFacts())
    builder = ReportPairs(facts=facts)
    batch(builder, {i: f"Effusion {i}." for i in range(20)})
    assert len(builder.unread) == 20 and "breaks the format" in builder.unread["7"] and "Zebra" not in builder.unread["7"]
    assert [c.finding for c in builder.claims("Effusion 3.")] == ["pleural_effusion"]


def test_a_source_that_never_answers_ends_the_preparation() -> None:
    calls: list[str] = []
    with pytest.raises(ProviderError):
        batch(ReportPairs(facts=answers({}, calls)), {i: f"Report {i}." for i in range(50)})
    assert len(calls) == 10


def test_a_batch_of_texts_without_content_alone_is_no_fault() -> None:
    made, positives, _ = batch(ReportPairs(without_content="ignore"), {0: "Comparison is made to the prior study.", 1: "None."})
    assert made.ignore is not None and made.ignore.all() and positives == [{}, {}]
    assert info_nce_of_logits(torch.zeros(made.positives.shape), made.positives, made.ignore) == 0


def test_captions_of_facts_made_elsewhere() -> None:
    report = "Fluid layers here. Nothing else."
    calls: list[str] = []
    captions = HierarchicalCaptions(answers({report: [("Fluid layers here.", "pleural_effusion", "present")]}, calls), levels=2)
    assert captions.texts(report, "Fluid layers here.", "Nothing else.") == HierarchicalCaptions(levels=2).texts("Effusion.", None, None)
    assert calls == [report]


# ------------------------------------------------------------------------------------------------------------ soft targets


class Frozen(ReportEncoder):
    """Embeddings by a table."""

    embed_dim = 3

    def __init__(self, vectors: dict[str, list[float]] | None = None) -> None:
        super().__init__()
        self.vectors, self.told = vectors or {}, []  # type: ignore[var-annotated]

    def precompute(self, texts: Sequence[str]) -> None:
        self.told += texts

    def trunk_embeddings(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self.vectors.get(text, [0.0, 0.0, 1.0]) for text in texts])

    def forward(self, batch: TextBatch) -> TextFeatures:
        raise NotImplementedError


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9), st.floats(0.05, 2))
def test_kernels_are_those_of_the_papers(cosines: list[float], temperature: float) -> None:
    s = torch.tensor(cosines, dtype=torch.float64)
    np.testing.assert_allclose(cwcl_weights(s).numpy(), [0.5 + c / 2 for c in cosines], rtol=1e-9)
    weights = softmax_weights(s, temperature).numpy()
    expected = np.exp(np.array(cosines) / temperature)
    np.testing.assert_allclose(weights / weights.sum(), expected / expected.sum(), rtol=1e-6)


def test_similarity_of_texts_is_that_with_the_likest_own_text() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((7, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = np.eye(3, 7, dtype=bool) | (rng.random((3, 7)) < 0.3)
    got = text_similarity(torch.from_numpy(vectors), torch.from_numpy(own)).numpy()
    for i in range(3):
        for j in range(7):
            assert got[i, j] == pytest.approx(max(float(vectors[j] @ vectors[k]) for k in range(7) if own[i, k]))


def test_similarity_of_labels_is_a_cosine_of_states() -> None:
    effusion, clear, maybe = (Claim("pleural_effusion", "present"), Claim("pneumothorax", "absent"), Claim("edema", "uncertain"))
    study, texts = [[effusion, clear, maybe]], [[effusion], [Claim("pneumothorax", "present")], [], [effusion, clear]]
    got = label_similarity(study, texts, load_ontology().findings)[0].tolist()
    length = math.sqrt(1 + 1 + 0.25)
    assert got == pytest.approx([1 / length, -1 / length, 0, 2 / math.sqrt(2) / length])


def test_softening_keeps_positives_first_and_what_is_false_out() -> None:
    positives = torch.tensor([[True, False, False, False]])
    weights = torch.tensor([[0.2, 0.9, 0.04, 0.9]])
    got = soften(positives, weights, 0.5, 0.05, torch.tensor([[False, False, False, True]]))
    assert got.tolist() == [[1.0, pytest.approx(0.45), 0.0, 0.0]]


def test_likeness_of_texts_gives_weights_but_none_to_what_is_false() -> None:
    near = [0.0, 0.6, 0.8]
    vectors = {"No pneumothorax.": [0.0, 1.0, 0.0], "Small left pneumothorax.": near, "Air leak.": near}
    encoder = Frozen(vectors)
    builder = ReportPairs(across="text", soft=SoftTargets("text", "cwcl", share=1.0, encoder=encoder))
    reports = {0: "No pneumothorax.", 1: "Small left pneumothorax.", 2: "Air leak."}
    made, positives, _ = batch(builder, reports)
    assert set(encoder.told) == set(reports.values())
    assert positives[0] == {"No pneumothorax.": 1.0, "Air leak.": pytest.approx(0.8)}
    assert positives[2]["Small left pneumothorax."] == pytest.approx(1.0)
    blind = SoftTargets("text", "cwcl", share=1.0, veto=False, encoder=encoder)
    _, positives, _ = batch(ReportPairs(across="text", soft=blind), reports)
    assert positives[0]["Small left pneumothorax."] == pytest.approx(0.8)
    assert torch.isfinite(info_nce_of_logits(torch.zeros(3, 3), made.positives, made.ignore))


def test_overlap_of_labels_gives_weights() -> None:
    reports = {0: "No pneumothorax. No pleural effusion.", 1: "No pneumothorax. No cardiomegaly."}
    _, positives, _ = batch(ReportPairs(soft=SoftTargets("labels", "softmax", temperature=1.0, share=0.5)), reports)
    assert positives[1]["No pleural effusion."] == pytest.approx(0.5 * math.exp(-1), rel=1e-5)
    assert positives[0]["No pneumothorax."] == 1.0


def test_options_of_soft_targets_are_checked() -> None:
    for options in ({"likeness": "sound"}, {"temperature": 0.0, "likeness": "labels"}, {"share": 0.0, "likeness": "labels"}):
        with pytest.raises(ValueError, match="expected"):
            SoftTargets(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need an encoder with a frozen trunk"):
        SoftTargets("text")


# ------------------------------------------------------------------------------------------------- sentences without content


@pytest.mark.parametrize(
    "sentence",
    [
        "None.", "Comparison is made to prior study.", "Findings were discussed with Dr. Smith at 3 pm.", "No prior study.",
        "No comparison studies available.", "Recommend CT for further evaluation.", "Clinical correlation is recommended.",
        "PA and lateral views of the chest were obtained.", "Follow-up radiograph in 6 weeks.", "See above.", "XXXX XXXX.", "___",
        "Dictated by the resident radiologist.", "The critical result was called to the ordering physician.", "Chest.", "12.",
        "There are no prior studies available for comparison.", "Single portable AP view of the chest.", "Comparison: XXXX.",
    ],
)  # fmt: skip
def test_sentences_without_visual_content_are_known(sentence: str) -> None:
    assert has_no_visual_content(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "The mediastinum is unremarkable.", "Normal chest.", "Heart size is stable.", "No acute disease.", "The trachea is midline.",
        "Two leads project over the heart.", "Prior sternotomy.", "Comparison with the right side shows asymmetry.",
    ],
)  # fmt: skip
def test_sentences_with_content_are_kept(sentence: str) -> None:
    assert not ReportPairs().is_null(sentence) or sentence.startswith("Comparison")


def test_no_sentence_of_the_templates_is_without_content() -> None:
    builder = ReportPairs()
    filled = [t.replace("{rib}", "rib").replace("{kind}", "chest tube").replace("{", "").replace("}", "") for t in sentence_templates()]
    assert [text for text in filled if builder.is_null(text)] == []


# --------------------------------------------------------------------------------------------------------------------- sides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Small left pleural effusion.", "Small right pleural effusion."),
        ("LEFT-SIDED chest tube, Right lung clear.", "RIGHT-SIDED chest tube, Left lung clear."),
        ("Rightward shift of the trachea.", "Leftward shift of the trachea."),
        ("RUL opacity; LLL collapse.", "LUL opacity; RLL collapse."),
        ("Mild dextroscoliosis of the thoracic spine.", "Mild levoscoliosis of the thoracic spine."),
        ("Lt. effusion, rt base clear.", "Rt. effusion, lt base clear."),
        ("Bilateral effusions, left greater than right.", "Bilateral effusions, right greater than left."),
        ("Clear lungs.", "Clear lungs."),
        ("Fracture at L1 and L2.", "Fracture at L1 and L2."),
        ("Nodule (R) is calcified.", "Nodule (L) is calcified."),
        ("Right IJ catheter.", "Left IJ catheter."),
        ("L-sided effusion, R-IJ line.", "R-sided effusion, L-IJ line."),
        ("LUE PICC, RSC port.", "RUE PICC, LSC port."),
        ("Effusions, L>R; L/R asymmetry.", "Effusions, R>L; R/L asymmetry."),
        ("Mild dextro-scoliosis.", "Mild levo-scoliosis."),
        ("Fusion of the L-spine, L-1 and LN seen.", "Fusion of the L-spine, L-1 and LN seen."),
    ],
)
def test_sides_are_swapped_in_words(text: str, expected: str) -> None:
    assert swap_left_and_right(text) == expected
    assert swap_left_and_right(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "The left ventricle is enlarged.", "Right middle lobe atelectasis.", "Consolidation in the lingula.", "RML opacity.",
        "Dextrocardia.", "Levocardia with situs inversus.", "The tip is in the right atrium.", "Enlarged left atrial appendage.",
        "Left main bronchus intubated.", "Fluid in the minor fissure.", "Azygos lobe.", "R/O pneumonia.", "The right heart border.",
        "LAD stent.", "The patient has left the department.", "Seen on L.", "Tip in the LMSB.", "Node of station 4R.", "Rotated R-wards.",
        "Tip in RBCV.", "Levo-version.", "R: clear.",
    ],
)  # fmt: skip
def test_what_cannot_be_said_of_the_flipped_image_is_refused(text: str) -> None:
    assert swap_left_and_right(text) is None


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["left", "Right", "RUL", "lll", "L", "(R)", "L5", "lobe", "dextroscoliosis", "effusion", ",", "of"])))
def test_a_swap_undoes_itself(words: list[str]) -> None:
    text = " ".join(words)
    once = swap_left_and_right(text)
    if once is not None:
        assert swap_left_and_right(once) == text
        assert len(once.split()) == len(words)


@given(st.text())
def test_any_text_is_taken(text: str) -> None:
    swap_left_and_right(text)
    has_no_visual_content(text)


def test_templates_change_sides_as_their_facts_do() -> None:
    """Every template filled with left, swapped, is the one filled with right."""
    for template in sentence_templates():
        if "{side}" in template:
            swapped = swap_left_and_right(template.replace("{side}", "left"))
            assert swapped == template.replace("{side}", "right")


# -------------------------------------------------------------------------------------------------------------- several texts


@pytest.mark.parametrize(
    "text", ["no prior" + " study" * 150 + " x", "discussed with " * 60, "at 1 " * 190 + "x", "no comparison " * 70 + "x"]
)
def test_no_words_take_long_to_be_found_without_content(text: str) -> None:
    """Among them some that a pattern could read in more ways than there are atoms: unless each is read in one, this never ends."""
    assert not has_no_visual_content(text + " y" * 5)
    assert not has_no_visual_content("None. " + text * 20)


@pytest.mark.parametrize(
    ("text", "null"),
    [
        ("The heart is considered normal.", False),
        ("CT may be considered.", True),
        ("Follow-up could be considered if symptoms persist.", True),
    ],
)
def test_considered_is_a_plan_or_a_judgement(text: str, null: bool) -> None:
    assert has_no_visual_content(text) is null


def test_sources_are_mixed_with_their_names(tmp_path: Path) -> None:
    file = tmp_path / "rewrites.jsonl"
    lines = ['{"study_id": "s1", "texts": ["Fluid on the  left.", "No pneumothorax."]}', "not json", '{"study_id": 3}', "", "\x00"]
    file.write_text("\n".join([*lines, '{"study_id": "s1", "texts": ["More."]}', '{"study_id": "s2", "texts": [" "]}', '["x"]']))
    rewrites = RewrittenTexts(str(file))
    assert [(one.line, one.reason) for one in rewrites.rejected] == [
        (2, "not JSON in UTF-8"), (3, "expected an object with the text study_id"), (5, "not JSON in UTF-8"), (7, "texts has no text"),
        (8, "expected an object with the text study_id"),
    ]  # fmt: skip
    mixed = MixedTexts(
        {"report": ReportSentences(), "rewrites": rewrites, "labels": LabelCaptions(), "captions": HierarchicalCaptions(levels=2)},
        {"rewrites": 0.5, "captions": 0.0},
    )
    study = StudyWords("s1", "Left pleural effusion. No pneumothorax.", labels={"edema": 0, "rib_fracture": 1, "cardiomegaly": -1})
    assert [(one.source, one.text, one.weight) for one in mixed.sourced(study)] == [
        ("report", "Left pleural effusion.", 1.0),
        ("report", "No pneumothorax.", 1.0),
        ("rewrites", "Fluid on the left.", 0.5),
        ("rewrites", "More.", 0.5),
        ("labels", "The image shows no edema.", 1.0),
        ("labels", "The image shows a rib fracture.", 1.0),
    ]
    assert mixed.texts("Left pleural effusion.", None, None) == ("Left pleural effusion.",)
    assert json.dumps(mixed.spec())


def test_a_file_of_rewrites_hides_text_in_what_it_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"study_id": "secret-id", "texts": "secret words"}\n')
    with pytest.raises(ValueError, match=r"first: line 1, expected texts to be a list") as caught:
        RewrittenTexts(str(file))
    assert "secret" not in str(caught.value).replace(str(file), "")
    with pytest.raises(FileNotFoundError):
        RewrittenTexts(str(tmp_path / "none"))
    file.write_text('{"study_id": "secret-id", "texts": ["secret words"]}\n{"study_id": "secret-id", "texts": [3]}\n')
    with caplog.at_level(logging.WARNING):
        RewrittenTexts(str(file))
    assert "1 lines left out (first: line 2" in caplog.text and "secret" not in caplog.text.replace(str(file), "")


def test_weights_of_sources_are_checked() -> None:
    for weights in ({"typo": 1.0}, {"report": -1.0}, {"report": 0.0}):
        with pytest.raises(ValueError, match="weights"):
            MixedTexts({"report": ReportSentences()}, weights)


def test_captions_go_from_coarse_to_fine() -> None:
    captions = HierarchicalCaptions().texts("Consolidation in the right upper lobe. No pneumothorax. Possible edema.", None, None)
    assert captions == (
        "The image shows an abnormality.", "The image shows a lung abnormality.", "The image shows a lung opacity.",
        "The image shows consolidation.", "The image shows consolidation on the right.",
        "The image shows consolidation in the right upper lobe.",
    )  # fmt: skip
    assert HierarchicalCaptions(levels=1).texts("Consolidation in the right upper lobe.", None, None) == captions[:1]
    assert HierarchicalCaptions().texts("No pneumothorax. Left pneumothorax.", None, None) == ()  # said both ways
    graded = hierarchy(Claim("pleural_effusion", "present", "left", severity="severe"), load_ontology())
    assert graded[-1] == "The image shows a large pleural effusion on the left."
    assert noun_phrase("edema", "mild") == "mild edema"


def test_no_caption_is_a_sentence_of_the_templates_or_the_prompts() -> None:
    """A score is not to be a look-up of what was trained on."""
    from reports.prompts import load_prompts

    prompts = {text for pair in load_prompts().findings.values() for text in (*pair.positive, *pair.negative)}
    ontology = load_ontology()
    made = {c for f in ontology.findings for side in (None, "left") for c in hierarchy(Claim(f, "present", side), ontology)}  # type: ignore[arg-type]
    made |= set(LabelCaptions().sourced(StudyWords("1", labels=dict.fromkeys(ontology.findings, 1))))  # type: ignore[arg-type]
    assert not made & prompts and not made & set(sentence_templates())


@pytest.mark.parametrize("unknown", ["ignore", "ignore_related"])
def test_soft_weights_without_veto_leave_ignored_pairs_alone(unknown: str) -> None:
    soft = SoftTargets(likeness="labels", kernel="softmax", temperature=0.5, floor=0.1, veto=False)
    reports = {0: "Mild cardiomegaly. Possible left effusion.", 1: "Cardiomegaly. Left effusion."}
    builder = ReportPairs(unknown=unknown, soft=soft)
    drawn = {i: tuple(map(SourcedText, report_sentences(text))) for i, text in reports.items()}
    builder.prepare([KnownStudy((i,), (StudyWords(str(i), reports[i]),), drawn[i]) for i in reports])
    made = builder.pairs([PairStudy(i, drawn[i]) for i in reports])
    assert made.ignore is not None and made.ignore.any()
    assert not (made.ignore & (made.positives > 0)).any()
