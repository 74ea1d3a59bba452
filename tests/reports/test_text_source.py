"""Text policies: which part of a report each takes, in what dress, and that a run can say which it was."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.openi import read_openi
from reports.text_source import POLICIES, ReportSentences, ReportText

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
REPORT = """INDICATION: Cough.
COMPARISON: None.
FINDINGS: Clear lungs. Normal heart
IMPRESSION:
1. No acute disease.
2. XXXX pneumothorax. 3. clear lungs
ADDENDUM: Old fracture."""


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("impression", ("No acute disease. clear lungs",)),
        ("findings", ("Clear lungs. Normal heart",)),
        ("both", ("Clear lungs. Normal heart. No acute disease. clear lungs",)),
        ("longer", ("No acute disease. clear lungs",)),
        ("sentences", ("Clear lungs.", "Normal heart", "No acute disease.")),
    ],
)
def test_each_policy_takes_its_part(policy: Any, expected: tuple[str, ...]) -> None:
    source = ReportText(policy)
    assert source.texts(REPORT, None, None) == expected
    columns = ("Clear lungs. Normal heart", "1. No acute disease.\n2. XXXX pneumothorax. 3. clear lungs")
    assert source.texts("FINDINGS: another report", *columns) == expected


def test_options_change_what_they_say() -> None:
    assert ReportText("impression", doubtful="keep").texts(REPORT, None, None) == ("No acute disease. ___ pneumothorax. clear lungs",)
    assert ReportText("impression", doubtful="keep", placeholders=False).texts(REPORT, None, None)[0].count("XXXX") == 1
    assert ReportText("impression", addendum=True).texts(REPORT, None, None) == ("No acute disease. clear lungs. Old fracture.",)
    assert ReportText("findings", max_characters=8).texts(REPORT, None, None) == ("Clear",)
    assert ReportSentences().texts(REPORT, None, None)[-1] == "XXXX pneumothorax."


@pytest.mark.parametrize(
    ("policy", "report", "expected"),
    [
        ("impression", "FINDINGS: a b.", "a b."),
        ("findings", "IMPRESSION: a b.", "a b."),
        ("impression", "FINAL REPORT\nCOMPARISON: None.\n\nThe lungs are\nclear.", "The lungs are clear."),
        ("findings", "COMPARISON: None.\n\nThe lungs are clear.\nIMPRESSION: c.", "The lungs are clear."),
        ("both", "The lungs are clear.", "The lungs are clear."),
        ("longer", "COMPARISON: None.\n\nThe lungs are clear.\nIMPRESSION: c.", "The lungs are clear."),
    ],
)
def test_a_report_without_the_section_falls_back_to_the_last_paragraph(policy: Any, report: str, expected: str) -> None:
    assert ReportText(policy).texts(report, None, None) == (expected,)


def test_without_falling_back_a_missing_section_gives_no_text() -> None:
    assert ReportText("impression", fall_back=False).texts("FINDINGS: a.", None, None) == ()
    assert ReportText("findings", fall_back=False).texts(None, None, "Normal.") == ()
    assert ReportText("both", fall_back=False).texts("The lungs are clear.", None, None) == ()
    assert ReportText("findings", fall_back=False).texts("COMPARISON: x.\n\nClear lungs.", None, None) == ("Clear lungs.",)


def test_the_source_says_how_it_was_made() -> None:
    spec = ReportText("longer", addendum=True).spec()
    assert spec["class_path"] == "reports.text_source.ReportText"
    assert json.loads(json.dumps(spec))["init_args"] == {
        "policy": "longer",
        "fall_back": True,
        "addendum": True,
        "placeholders": True,
        "doubtful": "drop",
        "max_characters": 6000,
    }


@pytest.mark.parametrize("wrong", [{"policy": "all"}, {"doubtful": "maybe"}, {"max_characters": 0}])
def test_a_choice_that_is_not_known_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        ReportText(**wrong)


text = st.one_of(
    st.none(), st.lists(st.sampled_from(["FINDINGS: ", "IMPRESSION:", "XXXX ", "Clear. ", "\n\n", "1. ", "x", "ADDENDUM: "])).map("".join)
)


@settings(max_examples=300)
@given(text, text, text, st.sampled_from(POLICIES), st.booleans(), st.integers(1, 40))
def test_any_text_gives_clean_texts(report: str, findings: str, impression: str, policy: Any, fall_back: bool, room: int) -> None:
    got = ReportText(policy, fall_back=fall_back, max_characters=room).texts(report, findings, impression)
    assert all(one == " ".join(one.split()) and one and len(one) <= room for one in got)
    assert policy == "sentences" or len(got) <= 1


def test_policies_on_real_reports() -> None:
    archive = DATA / "reports/openi_reports.tgz"
    if not archive.is_file():
        pytest.skip("the Open-i reports are not on this machine")
    found, differ = dict.fromkeys(POLICIES, 0), 0
    sources = {policy: ReportText(policy, fall_back=False, doubtful="keep") for policy in POLICIES}
    reports = list(read_openi(archive))[::8]
    for report in reports:
        texts = {policy: source.texts(report.text, None, None) for policy, source in sources.items()}
        differ += texts["both"] != sources["both"].texts(None, report.sections.findings, report.sections.impression)
        assert not texts["both"] or texts["longer"][0] in texts["both"][0] + "."
        for policy in POLICIES:
            found[policy] += bool(texts[policy])
    assert differ <= 1  # headings within a section of the XML
    there = {name: sum(bool(getattr(report.sections, name)) for report in reports) for name in ("findings", "impression")}
    assert abs(found["findings"] - there["findings"]) <= 1 and there["impression"] - 3 <= found["impression"] <= there["impression"] + 1
    assert found["both"] == found["longer"] == found["sentences"] >= found["impression"]


def test_policies_on_notes_of_real_images() -> None:
    table = DATA / "cxr/manifest.csv"
    if not table.is_file():
        pytest.skip("the chest radiographs are not on this machine")
    with table.open(encoding="utf-8", newline="") as stream:
        notes = [row["text"] for row in csv.DictReader(stream)]
    for policy in POLICIES:
        assert sum(not ReportText(policy).texts(note, None, None) for note in notes) == sum(not note.strip() for note in notes)
