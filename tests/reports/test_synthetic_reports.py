"""Synthetic reports: true of their facts, varied, and the same for the same seed."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvl.types import FINDINGS, Fact
from reports.sentences import report_sentences
from reports.synthetic import labelled_sentences, sentence_templates, templates, write_report

DENIAL = re.compile(
    r"\b(no|not|neither|without|negative|normal|clear|intact|sharp|unremarkable|free|expanded|reach|domed|preserved)\b", re.I
)
"""Words that a sentence about an absent finding cannot do without; written by hand, apart from the templates."""

LOCATIONS = {
    "consolidation": ["upper lobe", "middle lobe", "lingula", "lower lobe", None],
    "pneumothorax": ["apex", None],
    "lung_nodule": ["upper zone", "mid zone", "lower zone"],
    "atelectasis": ["upper lobe", "middle lobe", "lingula", "lower lobe"],
    "rib_fracture": ["lateral seventh rib", "posterior fourth to sixth ribs", "anterior fifth and sixth ribs"],
}
KINDS = ["pacemaker", "central venous catheter", "endotracheal tube", "nasogastric tube", "chest tube"]
SIDELESS = {"cardiomegaly", "edema", "emphysema"}


@st.composite
def facts(draw: st.DrawFn, sides: tuple[str, ...] = ("left", "right", "bilateral")) -> Fact:
    finding = draw(st.sampled_from(FINDINGS))
    side = None if finding in SIDELESS else draw(st.sampled_from(sides))
    location = draw(st.sampled_from(LOCATIONS.get(finding, [None])))
    return Fact(
        finding,
        draw(st.sampled_from(["present", "uncertain"])),
        side=None if finding == "support_device" and side == "bilateral" else side,
        location=None if side == "bilateral" else location,
        severity=draw(st.sampled_from(["mild", "moderate", "severe"])),
        size_mm=draw(st.floats(3, 40)) if finding == "lung_nodule" else None,
        kind=draw(st.sampled_from(KINDS)) if finding == "support_device" else None,
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(facts(), max_size=6), st.integers(0, 2**32 - 1))
def test_any_facts_make_a_whole_report_without_open_slots(study: list[Fact], seed: int) -> None:
    report = write_report(study, np.random.default_rng(seed))
    assert "{" not in report.text and "None" not in report.findings + report.impression and "  " not in report.findings
    assert all(sentence[0].isupper() or sentence[0].isdigit() for sentence in report_sentences(report.text))
    assert report == write_report(study, np.random.default_rng(seed))


@settings(max_examples=200, deadline=None)
@given(st.lists(facts(sides=("left",)), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_the_other_side_is_never_named(study: list[Fact], seed: int) -> None:
    report = write_report(study, np.random.default_rng(seed))
    assert not re.search(r"\bright\b", f"{report.findings} {report.impression}", re.I)


def test_each_fact_of_both_sides_is_said_of_its_side() -> None:
    study = [
        Fact("lung_nodule", "present", "left", "upper zone", size_mm=12.0),
        Fact("lung_nodule", "present", "right", "lower zone", size_mm=7),
    ]
    for seed in range(50):
        sentences = [s for s in report_sentences(write_report(study, np.random.default_rng(seed)).findings) if not DENIAL.search(s)]
        for sentence in sentences:
            assert not re.search(r"left lower zone|right upper zone|7 mm.*left|12 mm.*right", sentence, re.I)


def test_a_denial_denies_and_a_statement_does_not() -> None:
    for finding in FINDINGS:
        for group in ("absent",):
            assert all(DENIAL.search(text) for text in templates()["findings"][finding][group])
        stated = labelled_sentences([Fact(finding, "present", "left", "upper lobe", "mild", 8.0, "pacemaker")])[finding]
        assert len(stated) >= 8
        assert not [text for text in stated if DENIAL.search(text)]
    assert all(DENIAL.search(c["text"]) for c in templates()["combined_absent"])


def test_a_denied_finding_is_never_one_of_the_facts() -> None:
    """Sentences of a finding's absence, alone or combined, must not stand in a report that has the finding."""
    for finding in FINDINGS:
        denials = set(templates()["findings"][finding]["absent"])
        denials |= {c["text"] for c in templates()["combined_absent"] if finding in c["findings"]}
        study = [
            Fact(
                finding,
                "present",
                None if finding in SIDELESS else "right",
                (LOCATIONS.get(finding) or [None])[0],
                "severe",
                9.0,
                "pacemaker",
            )
        ]
        for seed in range(60):
            assert not denials & set(report_sentences(write_report(study, np.random.default_rng(seed)).text))


def test_most_but_not_all_absent_findings_are_denied_and_sentences_recur() -> None:
    reports = [write_report([], np.random.default_rng(seed)) for seed in range(400)]
    sentences = [report_sentences(r.findings) for r in reports]
    denials = {t: {n} for n in FINDINGS for t in templates()["findings"][n]["absent"]}
    denials |= {c["text"]: set(c["findings"]) for c in templates()["combined_absent"]}
    denied = [len(set().union(*(denials[s] for s in study))) for study in sentences]
    assert 0.65 < np.mean(denied) / len(FINDINGS) < 0.85
    assert min(denied) < len(FINDINGS) and len({r.findings for r in reports}) > 390
    assert np.median(list(Counter(chain(*sentences)).values())) >= 5
    assert all(r.impression in templates()["normal_impression"] for r in reports)


def test_an_absent_fact_is_denied_for_certain() -> None:
    for seed in range(40):
        text = write_report([Fact("edema", "absent")], np.random.default_rng(seed)).findings
        said = set(templates()["findings"]["edema"]["absent"]) | {
            c["text"] for c in templates()["combined_absent"] if "edema" in c["findings"]
        }
        assert any(sentence in text for sentence in said)


def test_findings_read_back_as_the_sentences_that_were_written() -> None:
    study = [
        Fact("rib_fracture", "present", "left", "lateral seventh rib"),
        Fact("pleural_effusion", "uncertain", "bilateral", severity="mild"),
    ]
    report = write_report(study, np.random.default_rng(5))
    assert report_sentences(report.text) == report_sentences(None, report.findings, report.impression)
    assert len(report_sentences(report.findings)) == report.findings.count(".")
    assert report.text.startswith("INDICATION: ") and "\n\nIMPRESSION: " in report.text


def test_several_ribs_are_not_one_rib() -> None:
    study = [Fact("rib_fracture", "present", "left", "lateral fifth to seventh ribs")]
    stated = labelled_sentences(study)["rib_fracture"]
    assert not [s for s in stated if re.search(r"left rib fracture|fractured rib\b|broken left rib\b", s, re.I)]


def test_every_group_can_be_written_of_a_bare_fact() -> None:
    for groups in templates()["findings"].values():
        for texts in (v for k, v in groups.items() if k != "kinds"):
            assert any("{" not in text for text in texts)


def test_unknown_findings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hernia.*known are cardiomegaly"):
        write_report([Fact("hernia", "present")], np.random.default_rng(0))


def test_every_template_is_reached() -> None:
    """A template whose slots no fact has would be dead text."""
    rng = np.random.default_rng(1)
    reached: set[str] = set()
    for finding in FINDINGS:
        for state in ("present", "absent", "uncertain"):
            for side in ("left", "bilateral") if finding not in SIDELESS else (None,):
                for location in LOCATIONS.get(finding, [None]):
                    for kind in KINDS if finding == "support_device" else [None]:
                        fact = Fact(finding, state, side, location, "mild", float(rng.integers(4, 9)), kind)  # type: ignore[arg-type]
                        reached |= {
                            t for g in ("", "impression") if state != "absent" or not g for t in labelled_sentences([fact], g)[finding]
                        }
    rigid = [t for t in sentence_templates() if "{" not in t]
    combined = {c["text"] for c in templates()["combined_absent"]} | set(templates()["normal_impression"])
    assert not set(rigid) - reached - combined
