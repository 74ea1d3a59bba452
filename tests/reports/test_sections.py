"""Section splitter: known headings in any dress, nothing lost, never raises."""

from __future__ import annotations

import csv
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.sections import Sections, section_spans, split_sections
from reports.sentences import split_sentences

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
CXR = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PORTABLE AP)

 INDICATION:  ___ year old woman with cough  // evaluate for pneumonia

 TECHNIQUE:  Portable chest radiograph

 COMPARISON:  ___

 FINDINGS:

 The lungs are clear.  No prior study: none.
 Heart size is normal.

 IMPRESSION:

 1. No pneumonia.
 2. Stable.
"""


def test_a_report_in_the_manner_of_mimic() -> None:
    sections = split_sections(CXR)
    assert sections.exam == "CHEST (PORTABLE AP)"
    assert sections.indication == "___ year old woman with cough  // evaluate for pneumonia"
    assert sections.technique == "Portable chest radiograph" and sections.comparison == "___"
    assert sections.findings == "The lungs are clear.  No prior study: none.\n Heart size is normal."
    assert sections.impression == "1. No pneumonia.\n 2. Stable."
    assert sections.body == f"{sections.findings}\n\n{sections.impression}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Findings: Clear. Impression: Normal.", Sections(findings="Clear.", impression="Normal.")),
        ("findings:\nClear.\nimpression:\nNormal.", Sections(findings="Clear.", impression="Normal.")),
        ("FINDINGS\nClear.\nIMPRESSION\nNormal.", Sections(findings="Clear.", impression="Normal.")),
        ("HISTORY: Cough COMPARISON: None FINDINGS: Clear", Sections(indication="Cough", comparison="None", findings="Clear")),
        ("**Findings:** Clear.\n**Conclusion:** Normal.", Sections(findings="Clear.", impression="Normal.")),
        ("Reason for exam: cough.\r\nFindings: Clear.\r\n", Sections(indication="cough.", findings="Clear.")),
        (
            "COMPARISON: ___.\n\nThe lungs are clear.",
            Sections(comparison="___.", other="The lungs are clear.", last_paragraph="The lungs are clear."),
        ),
        ("The lungs are clear.", Sections(other="The lungs are clear.")),
        ("FINDINGS: One. IMPRESSION: Two. FINDINGS: Three.", Sections(findings="One.\n\nThree.", impression="Two.")),
        (
            "Comparison with the prior study: the findings are unchanged.",
            Sections(other="Comparison with the prior study: the findings are unchanged."),
        ),
        ("FINDINGS/IMPRESSION: Clear.", Sections(findings="Clear.")),
        ("", Sections()),
    ],
)
def test_headings(text: str, expected: Sections) -> None:
    assert split_sections(text) == expected


def test_without_findings_and_impression_the_body_is_the_headless_text() -> None:
    assert split_sections("INDICATION: Cough.\n\nThe lungs are clear.").body == "The lungs are clear."
    assert split_sections("INDICATION: Cough.").body == ""


MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with ?pleural effusion  // ?effusion

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  ___

 FINDINGS:

 Large left pleural effusion is new.  No findings of
 edema.

 IMPRESSION:

 Large left pleural effusion

 RECOMMENDATION(S):  Follow-up radiograph in two weeks.

 NOTIFICATION:  The findings were discussed with Dr. ___ by telephone.
"""
UNHEADED = """ WET READ: ___ 5:12 PM
 No pneumothorax.
 ______________________________________________________________________________
                                 FINAL REPORT
 HISTORY:  Shortness of breath.

 COMPARISONS:  ___.

 The lungs are clear.  There is no
 pleural effusion.

 CONCLUSION:  No acute process.
"""
CT = """CT CHEST WITH CONTRAST
CLINICAL HISTORY: Cough.
TECHNIQUE: Axial images.
FINDINGS:
LUNGS: 5 mm nodule.
MEDIASTINUM AND HILA: No lymphadenopathy.
UPPER ABDOMEN: Previous cholecystectomy.
BONES: Normal.
IMPRESSION:
1. Nodule. Recommendation: CT in 12 months.
2. No acute findings.
CHEST WALL: Lipoma.
"""


def test_a_report_as_mimic_has_it() -> None:
    got = split_sections(MIMIC)
    assert got == Sections(
        exam="CHEST (PA AND LAT)",
        indication="___ year old woman with ?pleural effusion  // ?effusion",
        technique="Chest PA and lateral",
        comparison="___",
        findings="Large left pleural effusion is new.  No findings of\n edema.",
        impression="Large left pleural effusion",
        recommendation="Follow-up radiograph in two weeks.",
        notification="The findings were discussed with Dr. ___ by telephone.",
    )
    assert "telephone" not in got.body and "weeks" not in got.body


def test_findings_without_a_heading_are_the_last_paragraph_and_part_of_the_body() -> None:
    got = split_sections(UNHEADED)
    assert (got.indication, got.comparison, got.findings, got.impression) == ("Shortness of breath.", "___.", "", "No acute process.")
    assert got.last_paragraph == "The lungs are clear.  There is no\n pleural effusion."
    assert got.body == f"{got.last_paragraph}\n\nNo acute process."
    assert "No pneumothorax." in got.other  # the wet read stays where facts are looked for, and out of the body


def test_regions_stay_in_their_section_and_a_recommendation_ends_with_its_item() -> None:
    got = split_sections(CT)
    assert got.findings.count("\n") == 3 and got.findings.startswith("LUNGS:") and got.findings.endswith("BONES: Normal.")
    assert got.recommendation == "CT in 12 months."
    assert got.impression == "1. Nodule.\n\n2. No acute findings.\nCHEST WALL: Lipoma."


def test_an_addendum_is_apart_from_what_it_corrects() -> None:
    report = "FINAL REPORT\nFINDINGS: Nodule on the right.\nIMPRESSION: Nodule.\n"
    text = f"ADDENDUM: The nodule is on the left.\n{report}Addendum 2: Dr. ___ was told."
    got = split_sections(text)
    assert got.addendum == "The nodule is on the left.\n\nDr. ___ was told."
    assert got.body == "Nodule on the right.\n\nNodule."
    assert split_sections("INDICATION: cough findings: The heart is large. ADDENDUM: None.").findings == "The heart is large."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FINDINGS AND IMPRESSION: a. RECOMMENDATIONS: b.", {"findings": "a.", "recommendation": "b."}),
        ("IMPRESSION/RECOMMENDATION: a.", {"impression": "a."}),
        ("INDICATION/COMPARISON: a / none. TECHNIQUE AND FINDINGS: b.", {"indication": "a / none.", "findings": "b."}),
        ("1. FINDINGS: a.\n2. IMPRESSION: b.", {"findings": "a.", "impression": "b."}),
        ("I. Findings\na.\nII. Impression\nb.", {"findings": "a.", "impression": "b."}),
        ("(1) findings: a at level 7 (2) impression: b", {"findings": "a at level 7", "impression": "b"}),
        (
            "Chest pain. Findings: Clear at level 7. Impression: b",
            {"other": "Chest pain.", "findings": "Clear at level 7.", "impression": "b"},
        ),
        ("## Findings\na.\n\n## Impression\nb.", {"findings": "a.", "impression": "b."}),
        ("__FINDINGS__:\n___ is clear.", {"findings": "___ is clear."}),
        ("FINDINGS - a.\nIMPRESSION - b.", {"findings": "a.", "impression": "b."}),
        ("INDICATION cough FINDINGS The heart is normal. IMPRESSION Normal", {"indication": "cough", "findings": "The heart is normal."}),
        ("INDICATION: cough findings: The heart is normal.", {"indication": "cough", "findings": "The heart is normal."}),
        ("IMPRSSION: a.\nFINDGINGS: b.", {"impression": "a.", "findings": "b."}),
        ("COMPARISON: ___.\nPA AND LATERAL CHEST RADIOGRAPHS:  Clear.", {"comparison": "___.", "findings": "Clear."}),
        ("Indication: a. Prior chest radiograph: b. Findings: c.", {"indication": "a.", "comparison": "b.", "findings": "c."}),
        ("IMPRESSION (PRELIMINARY): a.", {"impression": "a."}),
        ("Reason for exam: a\nNarrative: b\nImpression: c\nElectronically signed by: ___", {"indication": "a", "notification": "___"}),
    ],
)
def test_headings_in_other_dress(text: str, expected: dict[str, str]) -> None:
    got = split_sections(text)
    assert {name: getattr(got, name) for name in expected} == expected


@pytest.mark.parametrize(
    "text",
    [
        "Findings are stable. No prior study: none. History of asthma. Compared to prior: no change.",
        "In the opinion of the reader, normal. There is no impression: clear.",
        "NO ACUTE FINDINGS. IMPRESSION IS UNCHANGED. FINDINGS CONSISTENT WITH EDEMA. NO PRIOR STUDY: NONE.",
        "Technique is limited. Comparison is made with the prior study. Results were called. Indication of edema.",
        "LUNGS: Clear. HEART: Normal. BONES: No fracture. Note: motion.",
        "Findings\nconsistent with edema and these\nfindings: none of them new.",
        "Impression upon the left lung. Procedure note of the biopsy, exam under anaesthesia.",
    ],
)
def test_such_words_in_running_text_are_no_headings(text: str) -> None:
    assert split_sections(text) == Sections(other=text)
    inside = split_sections(f"FINDINGS: {text}\nIMPRESSION: Normal.")
    assert (inside.findings, inside.impression) == (text, "Normal.")


words = st.text(string.ascii_lowercase + " ,", min_size=1, max_size=30).map(str.strip).filter(bool)
HEADINGS = {
    "indication": "INDICATION",
    "technique": "Technique",
    "comparison": "COMPARISON",
    "findings": "Findings",
    "impression": "IMPRESSION",
}


@settings(max_examples=150)
@given(
    st.dictionaries(st.sampled_from(sorted(HEADINGS)), words, min_size=1),
    st.sampled_from(["\n", "\n\n", ".\n\n"]),
    st.sampled_from([": ", ":\n", " :  "]),
)
def test_a_report_made_of_sections_comes_apart_into_them(parts: dict[str, str], gap: str, colon: str) -> None:
    parts = {name: f"x {text} x" for name, text in parts.items()}  # no body that is itself a heading
    text = gap.join(HEADINGS[name] + colon + body for name, body in parts.items())
    got = split_sections(text)
    assert {name: getattr(got, name).rstrip(".") for name in HEADINGS if getattr(got, name)} == parts
    assert got.other == "" or gap == ".\n\n"


fragments = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["FINDINGS:", "Impression: ", "\n\n", "COMPARISON", "\r\n", ". ", "XXXX", "history:", "2. ", "**", "___", "İ", "Prior x:"]
    ),
)


@settings(max_examples=300)
@given(st.lists(fragments, max_size=15).map("".join))
def test_spans_tile_any_text(text: str) -> None:
    spans = section_spans(text)
    assert "".join(text[s.start : s.end] for s in spans) == text
    assert all(s.start <= s.body <= s.end for s in spans)
    for span in spans:
        assert text[span.body : span.end].strip() in getattr(split_sections(text), span.name)


def test_real_reports_without_headings_stay_whole() -> None:
    table = DATA / "reports/ct_reports_labelled.csv"
    if not table.is_file():
        pytest.skip("the CT reports are not on this machine")
    with table.open(encoding="utf-8", newline="") as stream:
        texts = [row["report_text"] for row in csv.DictReader(stream)]
    split = [text for text in texts if len(section_spans(text)) > 1]
    assert len(texts) == 800 and len(split) <= 3  # two have a conclusion under its heading


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "piece", ["Clinical and ", "FINDINGS: x ", "A. ", '. "A', "1. ", "XXXX ", "(", "**", "___", "[**", "\nPrior x: y", "\n"]
)
def test_time_grows_with_the_length_of_a_hostile_text(piece: str) -> None:
    text = piece * (60_000 // len(piece))
    assert split_sections(text) is not None
    split_sentences(text)
