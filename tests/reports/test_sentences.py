"""Sentence splitter: rules that radiology needs, no character lost, and real reports when they are there."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.sentences import has_content, report_sentences, sentence_spans, split_sentences

DATA = Path(__file__).resolve().parents[2] / "../shared/data"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5 cm nodule. Dr. Smith was told.", ["1.5 cm nodule.", "Dr. Smith was told."]),
        ("1. Clear lungs. 2. No effusion.", ["Clear lungs.", "No effusion."]),
        ("1. Nodules in both lungs 2. Old fracture", ["Nodules in both lungs", "Old fracture"]),
        ("Chest radiograph 1. No disease. 2. Old granuloma.", ["Chest radiograph", "No disease.", "Old granuloma."]),
        ("1.There is no edema. 2.No CHF.", ["There is no edema.", "No CHF."]),
        ("1) Clear.\n2) Normal.", ["Clear.", "Normal."]),
        ("- No effusion\n- Heart is\n  normal\n* Clear", ["No effusion", "Heart is normal", "Clear"]),
        ("Lungs clear bilaterally.There is no effusion.", ["Lungs clear bilaterally.", "There is no effusion."]),
        ("No pneumothorax. no effusion.", ["No pneumothorax.", "no effusion."]),
        ("Size 1.9 x 1.8 cm. in the left lobe vs. atelectasis.", ["Size 1.9 x 1.8 cm. in the left lobe vs. atelectasis."]),
        ("The nodule is ___ cm. ___ was told. XXXX clear.", ["The nodule is ___ cm.", "___ was told.", "XXXX clear."]),
        ("Possible pneumonia (pneumonitis?). Correlate.", ["Possible pneumonia (pneumonitis?).", "Correlate."]),
        ("Ratio of 16.2/24.7. Heart large..", ["Ratio of 16.2/24.7.", "Heart large."]),
        ("Fracture of T12. At level 7. Now stable.", ["Fracture of T12.", "At level 7.", "Now stable."]),
        ("Read at 3 p.m. on Monday. J. Smith agrees.", ["Read at 3 p.m. on Monday.", "J. Smith agrees."]),
        ("Infiltrates, esp. in the left lung.", ["Infiltrates, esp. in the left lung."]),
        ("The lungs\nare clear.\n\nHeart normal", ["The lungs are clear.", "Heart normal"]),
        ("2 images. 5 mm nodule.", ["2 images.", "5 mm nodule."]),
        ("NO PNEUMOTHORAX.  LUNGS ARE CLEAR", ["NO PNEUMOTHORAX.", "LUNGS ARE CLEAR"]),
        ("Pneumonia? Edema?", ["Pneumonia?", "Edema?"]),
        ("2., Mild deformity. #2 intact.", ["Mild deformity.", "#2 intact."]),
        ("Fracture at T7-8. Seen on CTA. No leak.", ["Fracture at T7-8.", "Seen on CTA.", "No leak."]),
        ("Cirrhosis from hepatitis C. The spleen is large.", ["Cirrhosis from hepatitis C.", "The spleen is large."]),
        ("Opacity in the rt. Lower lobe is new.", ["Opacity in the rt. Lower lobe is new."]),
        ("Nodule in the liver. (cyst?) Clear lungs.", ["Nodule in the liver. (cyst?)", "Clear lungs."]),
        ("LUNGS: Clear\nHEART AND VESSELS: Normal\n  in size\nBones: -", ["LUNGS: Clear", "HEART AND VESSELS: Normal in size", "Bones: -"]),
        ("Findings are\n-Clear lungs\n• Normal heart", ["Findings are", "Clear lungs", "Normal heart"]),
        ('Heights are kept. " Hiatal hernia " Clear lungs', ["Heights are kept.", "Hiatal hernia", "Clear lungs"]),
        (
            'Kept. "Hiatal hernia." Old fracture. "Clear lungs" Normal.',
            ["Kept.", "Hiatal hernia.", "Old fracture.", "Clear lungs", "Normal."],
        ),
        ('The so-called "halo sign" is seen. A "tree-in-bud" pattern.', ['The so-called "halo sign" is seen.', 'A "tree-in-bud" pattern.']),
        ("· Operated ca. · Stable (cyst?) lesion ·Clear", ["Operated ca.", "Stable (cyst?) lesion", "Clear"]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_rules(text: str, expected: list[str]) -> None:
    assert list(split_sentences(text)) == expected


fragments = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "1. ",
            "2) ",
            "Dr. ",
            "1.5 cm",
            ". ",
            "..",
            "\n\n",
            "\n- ",
            "XXXX",
            "___",
            "Clear",
            "no effusion",
            "? ",
            "(3) ",
            "\r\n",
            " ",
            '"',
            '" ',
            "“",
            "·",
            "(x?) ",
            "\nLUNGS: ",
        ]
    ),
)


@settings(max_examples=400)
@given(st.lists(fragments, max_size=25).map("".join))
def test_any_text_is_cut_without_loss(text: str) -> None:
    spans = sentence_spans(text)
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    assert edges == sorted(edges)
    assert all(text[edges[i] : edges[i + 1]].strip() == "" for i in range(0, len(edges), 2))  # gaps are white space
    assert all(text[start:end].strip() == text[start:end] != "" for start, end in spans)
    for sentence in report_sentences(text):
        assert sentence == " ".join(sentence.split()) and has_content(sentence)


plain = st.sampled_from(
    ["Lungs are clear.", "No effusion.", "5 mm nodule in the left lung.", "Is there edema?", "Dr. XXXX was told.", "Heart of 1.5 cm."]
)


@given(st.lists(plain, max_size=8), st.sampled_from([" ", "  ", "\n\n"]))
def test_sentences_that_were_joined_come_apart(sentences: list[str], gap: str) -> None:
    assert list(split_sentences(gap.join(sentences))) == sentences


def test_each_sentence_is_kept_once_in_order_without_empty_ones() -> None:
    got = report_sentences(None, "Clear lungs. XXXX XXXX. . No effusion. Left knee:", "1. No Effusion 2. Old fracture. ___.")
    assert got == ("Clear lungs.", "No effusion.", "Old fracture.")
    assert report_sentences() == report_sentences("", " ", None) == ()


def test_what_does_not_describe_the_image_is_left_out() -> None:
    report = "INDICATION: Cough.\nCOMPARISON: None.\nFINDINGS: Clear.\nIMPRESSION: Normal."
    assert report_sentences(report) == ("Clear.", "Normal.")
    assert report_sentences(report, findings="Edema.") == ("Edema.",)
    assert report_sentences(None, None, "COMPARISON: CT. IMPRESSION: Normal.") == ("Normal.",)
    assert report_sentences("Patient with cough. Opacity on the left.") == ("Patient with cough.", "Opacity on the left.")


@pytest.fixture(scope="module")
def openi() -> list[dict[str, str]]:
    archive = DATA / "reports/openi_reports.tgz"
    if not archive.is_file():
        pytest.skip("the Open-i reports are not on this machine")
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".xml") and (stream := tar.extractfile(member)) is not None:
                root = ElementTree.parse(io.BytesIO(stream.read())).getroot()
                found.append({e.get("Label", ""): e.text or "" for e in root.iter("AbstractText")})
    return found


def test_real_reports_come_apart_into_sentences(openi: list[dict[str, str]]) -> None:
    studies = [report_sentences(None, r["FINDINGS"], r["IMPRESSION"]) for r in openi]
    assert len(studies) == 3955
    assert 28 <= sum(not s for s in studies) <= 32  # 28 reports have neither section
    sentences = [s for study in studies for s in study]
    assert 5.0 < len(sentences) / len(studies) < 7.0
    assert len(set(sentences)) < 0.45 * len(sentences)  # they recur: one text, many studies
    words = [len(s.split()) for s in sentences]
    assert max(words) < 70 and sum(n > 40 for n in words) / len(words) < 0.005
    assert not [s for s in sentences if s[:3] in ("1. ", "2. ", "3. ")]
    glued = [s for s in sentences if ". The " in s or ". No " in s or ". There " in s]
    assert not glued


def test_no_word_of_a_real_report_is_lost(openi: list[dict[str, str]]) -> None:
    for report in openi:
        text = report["FINDINGS"]
        spans = sentence_spans(text)
        assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())


def test_notes_of_real_images_come_apart() -> None:
    table = DATA / "cxr/manifest.csv"
    if not table.is_file():
        pytest.skip("the chest radiographs are not on this machine")
    with table.open(encoding="utf-8", newline="") as stream:
        notes = [row["text"] for row in csv.DictReader(stream)]
    kept = [report_sentences(note) for note in notes]
    assert sum(not sentences for sentences in kept) == sum(not note.strip() for note in notes) == 4
    assert not [s for sentences in kept for s in sentences if s.endswith(("esp.", "Dr.", " 0.", "vs."))]


def test_items_of_real_ct_reports_come_apart() -> None:
    table = DATA / "reports/ct_reports_labelled.csv"
    if not table.is_file():
        pytest.skip("the CT reports are not on this machine")
    with table.open(encoding="utf-8", newline="") as stream:
        texts = [row["report_text"] for row in csv.DictReader(stream)]
    assert len(texts) == 800
    for text in texts:
        assert "".join("".join(text[a:b].split()) for a, b in sentence_spans(text)) == "".join(text.split())
    sentences = [s for text in texts for s in split_sentences(text)]
    assert 15 < len(sentences) / len(texts) < 25
    assert sum('"' in s for s in sentences) < 20  # 594 of the reports have items that a quotation mark opens
    assert sum(len(s) < 6 or s[0] in ").?" for s in sentences) < 10
    assert sum(len(s.split()) > 60 for s in sentences) < 0.01 * len(sentences)
