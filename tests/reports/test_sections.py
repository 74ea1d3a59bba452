"""Section splitter: known headings in any dress, nothing lost, never raises."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.sections import Sections, section_spans, split_sections

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
        ("COMPARISON: ___.\n\nThe lungs are clear.", Sections(comparison="___.", other="The lungs are clear.")),
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
    st.text(max_size=20), st.sampled_from(["FINDINGS:", "Impression: ", "\n\n", "COMPARISON", "\r\n", ". ", "XXXX", "history:"])
)


@settings(max_examples=300)
@given(st.lists(fragments, max_size=15).map("".join))
def test_spans_tile_any_text(text: str) -> None:
    spans = section_spans(text)
    assert "".join(text[s.start : s.end] for s in spans) == text
    assert all(s.start <= s.body <= s.end for s in spans)
    for span in spans:
        assert text[span.body : span.end].strip() in getattr(split_sections(text), span.name)
