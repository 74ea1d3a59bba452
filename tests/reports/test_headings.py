"""Sections of flat reports whose headings were randomised: real reports where there are some, synthetic ones everywhere.

A section counts as found if its text, white space made single, is that of the source, and nothing else. Kinds of disturbance:

- case: capitals, title or small letters, each heading for itself, with a colon;
- synonyms: headings of MIMIC-CXR, MIMIC-III, the VA and RSNA templates, capitals or title;
- no colon: on a line of its own, or before the text in capitals or title;
- merged: "FINDINGS AND IMPRESSION", "INDICATION/COMPARISON": both texts stand in the section that the heading counts as;
- numbered, markdown: numbers and marks belong to no section;
- misspelt: headings as they stand in MIMIC-CXR, on lines of their own;
- headless findings: no heading after the blank line that ends what comes before: the text is ``last_paragraph``;
- none: no heading at all: the whole text is ``other`` and the body, whatever words it has;
- all: case, synonyms, no colon, numbered or merged, chosen for each heading;
- rare: names of sections in DICOM (CID 7001), LOINC and referral forms, every heading of a report one of them.

Layouts: a line a section, wrapped at 60 to 100 characters, headings on their own lines with blank lines, and one running line.
"""

from __future__ import annotations

import random
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from reports.openi import read_openi
from reports.sections import split_sections

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
ORDERS = (
    ("exam", "indication", "technique", "comparison", "findings", "impression", "recommendation"),
    ("exam", "comparison", "indication", "technique", "findings", "impression", "recommendation"),
)
SYNONYMS = {
    "exam": "examination|exam|type of examination|procedure|study",
    "indication": "reason for exam|reason for examination|reason for this examination|reason for study|clinical history|history"
    "|clinical information|clinical indication|clinical data|clinical statement|patient history|indications",
    "technique": "techniques|imaging technique|protocol|technical factors",
    "comparison": "comparisons|comparison(s)|comparison exam|comparison film|comparison study|reference exam|prior studies",
    "findings": "finding|observations|results|report|imaging findings|reference findings|radiographic findings",
    "impression": "conclusion|conclusions|opinion|summary|impressions|interpretation|assessment|final impression",
    "recommendation": "recommendations|recommendation(s)|follow-up recommendations",
}
RARE = {
    "exam": "study performed|examination date",
    "indication": "request|indications for procedure|patient presentation|clinical presentation|requested imaging studies information"
    "|radiology reason for study|history general|provided history|provided information|indication for study|working diagnosis"
    "|signs and symptoms|reason for CXR|clinical request|brief clinical history|presenting history|referral information",
    "technique": "scan protocol|acquisition parameters",
    "comparison": "prior procedure descriptions|prior imaging procedure descriptions|previous findings|comparison is made to|previous CXR"
    "|prior chest radiograph|old films|relevant prior imaging|prior|comparison radiographs|prior relevant studies|priors",
    "findings": "radiology study observation|procedure findings|CXR findings|frontal and lateral views of the chest|discussion|report text"
    "|body of report|findings on chest x-ray|description of findings|detailed findings",
    "impression": "document summary|study impression|imaging impression|diagnosis|final read|overall impression|impression and plan"
    "|conclusion/recommendation|radiologist impression|radiological diagnosis",
    "recommendation": "management recommendation|further recommendations",
}
MERGED = {
    ("indication", "comparison"): "indication/comparison|history and comparison|indication & comparison",
    ("findings", "impression"): "findings and impression|findings/impression|findings/ impression|impression and findings",
}
MISSPELT = {
    "indication": "ndication|idication|indicaton",
    "comparison": "comparision|comparsion|comparrison|comparisions",
    "findings": "findins|findindgs|findgings|findngs|findnings|finidngs",
    "impression": "impresson|imprression|imoression|impressoin|imprssion|impresion|imperssion|mpression|impession",
}
KINDS = ("case", "synonyms", "no colon", "merged", "numbered", "markdown", "misspelt", "headless findings", "none", "all")
LAYOUTS = ("lines", "wrapped", "own", "running")
SHORT = ("exam", "indication", "technique", "comparison")


def heading(words: str, kind: str, layout: str, number: int, rng: random.Random) -> str:
    """A heading in the dress of a kind, with what parts it from the text after it."""
    cases = (str.upper, str.capitalize, str.lower) if kind in ("case", "numbered") else (str.upper, str.capitalize)
    words = rng.choice(cases)(words)
    end = {"own": "\n", "running": " "}.get(layout, rng.choice((" ", "  ")))
    if kind == "no colon":
        return words + end
    if kind == "numbered":
        return rng.choice((f"{number}. ", f"{number}) ", f"({number}) ")) + words + ":" + end
    if kind == "markdown":
        marks = ["**{}:**", "**{}**:", "__{}:__"]
        marks += [] if layout == "running" else ["## {}:"]
        marks += ["## {}", "**{}**"] if layout == "own" else []
        return rng.choice(marks).format(words) + end
    return words + rng.choice((":", ":", " :")) + end


def disturbed(sections: dict[str, str], kind: str, layout: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    """A flat report and what its sections are."""
    order = [name for name in rng.choice(ORDERS) if sections.get(name)]
    if kind == "none":
        text = joined([("", sections[name]) for name in order], layout, rng)
        return text, {"other": text, "body": text}
    parts: list[tuple[str, str]] = []
    truth: dict[str, str] = {}
    names = iter(order)
    for number, name in enumerate(names, 1):
        one = rng.choice(("case", "synonyms", "no colon", "numbered", "merged")) if kind == "all" else kind
        pair = (name, *order[order.index(name) + 1 :][:1])
        if one == "headless findings" and name == "findings" and parts and order[number - 2] in SHORT:
            parts.append(("", sections[name]))
            truth["last_paragraph"] = sections[name]
        elif one == "misspelt" and name in MISSPELT:
            parts.append((rng.choice(MISSPELT[name].split("|")).upper() + ": ", sections[name]))
            truth[name] = sections[name]
        else:
            merges = one == "merged" and pair in MERGED
            options = MERGED[pair] if merges else {"synonyms": SYNONYMS, "rare": RARE}.get(one, {}).get(name, name)
            truth[name] = f"{sections[name]} {sections[next(names)]}" if merges else sections[name]
            parts.append((heading(rng.choice(options.split("|")), one, layout, number, rng), truth[name]))
    return joined(parts, layout, rng), truth


def joined(parts: list[tuple[str, str]], layout: str, rng: random.Random) -> str:
    texts = [head + body for head, body in parts]
    if layout == "wrapped":
        width = rng.randint(60, 100)
        texts = ["\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)) for text in texts]
    gaps = {"lines": "\n", "wrapped": rng.choice(("\n", "\n\n")), "own": "\n\n", "running": rng.choice((" ", "  "))}
    return gaps[layout].join(texts)


def layouts(kind: str) -> tuple[str, ...]:
    return {"misspelt": ("lines", "wrapped"), "headless findings": ("own",)}.get(kind, LAYOUTS)


def shares(reports: Iterable[dict[str, str]], kinds: tuple[str, ...] = KINDS, seed: int = 0) -> dict[str, float]:
    """Kind of disturbance -> share of sections found, and ``all together``; written out, per layout too."""
    found: Counter[tuple[str, str]] = Counter()
    asked: Counter[tuple[str, str]] = Counter()
    rng = random.Random(seed)
    for report in reports:
        for kind in kinds:
            layout = rng.choice(layouts(kind))
            text, truth = disturbed(report, kind, layout, rng)
            got = split_sections(text)
            asked[kind, layout] += len(truth)
            found[kind, layout] += sum(" ".join(getattr(got, name).split()) == " ".join(body.split()) for name, body in truth.items())
    result = {kind: sum(found[kind, one] for one in LAYOUTS) / sum(asked[kind, one] for one in LAYOUTS) for kind in kinds}
    result["all together"] = found.total() / asked.total()
    for key in sorted(asked):
        sys.stdout.write(f"{key[0]:<18} {key[1]:<8} {found[key] / asked[key]:8.2%} of {asked[key]}\n")
    sys.stdout.write("".join(f"{kind:<27} {share:8.2%}\n" for kind, share in result.items()))
    return result


@pytest.fixture(scope="module")
def openi() -> list[dict[str, str]]:
    archive = DATA / "reports/openi_reports.tgz"
    if not archive.is_file():
        pytest.skip("the Open-i reports are not on this machine")
    names = ("indication", "comparison", "findings", "impression")
    return [{name: getattr(report.sections, name) for name in names} for report in read_openi(archive)]


def check(found: dict[str, float]) -> None:
    assert found["all together"] >= 0.99
    assert {kind: share for kind, share in found.items() if share < 0.985} == {}


def test_sections_of_a_sample_of_real_reports_are_found_under_randomised_headings(openi: list[dict[str, str]]) -> None:
    check(shares(openi[::10]))


@pytest.mark.slow
def test_sections_of_all_real_reports_are_found_under_randomised_headings(openi: list[dict[str, str]]) -> None:
    assert len(openi) == 3955
    check(shares(openi))


@pytest.mark.slow
def test_most_sections_are_found_under_rare_headings(openi: list[dict[str, str]]) -> None:
    assert shares(openi, ("rare",))["rare"] >= 0.85


SENTENCES = {
    "exam": ("CHEST (PA AND LAT)", "CT of the chest with contrast", "Portable chest radiograph, ___"),
    "indication": ("Cough", "___ year old man with fever, rule out pneumonia", "History of lung cancer. Follow up.", "s/p fall"),
    "technique": ("PA and lateral views of the chest.", "Axial images were obtained after contrast.", "Single view"),
    "comparison": ("None", "___", "Chest radiograph dated XXXX, XXXX.", "CT of the chest from 2 weeks prior"),
    "findings": (
        "The heart is normal in size. No findings of edema.",
        "LUNGS: Clear. PLEURA: No effusion. HEART: Normal.",
        "In comparison with the prior study, the findings are unchanged. There is no pneumothorax.",
        "Low lung volumes. There is a history of surgery: clips overlie the mediastinum.",
        "A 1.5 cm nodule is seen at level 7. Results were called to Dr. XXXX.",
    ),
    "impression": (
        "1. No acute process. 2. Stable nodule.",
        "No acute findings.",
        "Cardiomegaly without edema. Comparison with prior films would help.",
        "Normal study",
    ),
    "recommendation": ("CT of the chest in 6 months.", "Clinical correlation"),
}


def synthetic(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    optional = ("exam", "indication", "technique", "comparison", "recommendation")
    return [
        {name: rng.choice(texts) for name, texts in SENTENCES.items() if name not in optional or rng.random() < 0.7} for _ in range(count)
    ]


def test_sections_of_synthetic_reports_are_found_under_randomised_headings() -> None:
    check(shares(synthetic(600, seed=1)))
