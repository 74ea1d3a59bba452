"""Sections of flat reports whose headings were randomised: real reports where there are some, synthetic ones everywhere.

A section counts as found if its text, white space made single, is that of the source, and nothing else. Kinds of disturbance:

- case: capitals, title or small letters, each heading for itself, with a colon;
- synonyms: headings of MIMIC-CXR, MIMIC-III, the VA and RSNA templates, capitals or title;
- no colon: on a line of its own, or before the text in capitals or title;
- merged: "FINDINGS AND IMPRESSION", "INDICATION/COMPARISON": both texts stand in the section that the heading counts as;
- numbered, markdown: numbers and marks belong to no section;
- misspelt: headings as they stand in MIMIC-CXR, on lines of their own;
- headless findings: no heading after the blank line that ends the comparison: the text is ``last_paragraph``;
- none: no heading at all: the whole text is ``other`` and the body, whatever words it has;
- all: any of the first five, chosen for each heading.

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
ORDERS = (("indication", "comparison", "findings", "impression"), ("comparison", "indication", "findings", "impression"))
PLAIN = {"indication": "indication", "comparison": "comparison", "findings": "findings", "impression": "impression"}
SYNONYMS = {
    "indication": (
        "reason for exam",
        "reason for examination",
        "reason for this examination",
        "reason for study",
        "clinical history",
        "history",
        "clinical information",
        "clinical indication",
        "clinical data",
        "clinical statement",
        "patient history",
        "indications",
    ),
    "comparison": ("comparisons", "comparison(s)", "comparison exam", "comparison film", "comparison study", "reference exam", "prior studies"),
    "findings": ("finding", "observations", "results", "report", "imaging findings", "reference findings", "radiographic findings"),
    "impression": ("conclusion", "conclusions", "opinion", "summary", "impressions", "interpretation", "assessment", "final impression"),
}
MERGED = {
    ("indication", "comparison"): ("indication/comparison", "history and comparison", "indication & comparison"),
    ("findings", "impression"): ("findings and impression", "findings/impression", "findings/ impression", "impression and findings"),
}
MISSPELT = {
    "indication": ("ndication", "idication", "indicaton"),
    "comparison": ("comparision", "comparsion", "comparrison", "comparisions"),
    "findings": ("findins", "findindgs", "findgings", "findngs", "findnings", "finidngs"),
    "impression": ("impresson", "imprression", "imoression", "impressoin", "imprssion", "impresion", "imperssion", "mpression", "impession"),
}
KINDS = ("case", "synonyms", "no colon", "merged", "numbered", "markdown", "misspelt", "headless findings", "none", "all")
LAYOUTS = ("lines", "wrapped", "own", "running")


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
        marks = ("**{}:**", "**{}**:", "__{}:__") + (() if layout == "running" else ("## {}:",)) + (("## {}", "**{}**") if layout == "own" else ())
        return rng.choice(marks).format(words) + end
    return words + rng.choice((":", ":", " :")) + end


def disturbed(sections: dict[str, str], kind: str, layout: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    """A flat report and what its sections are."""
    order = [name for name in rng.choice(ORDERS) if sections[name]]
    if kind == "none":
        text = joined([("", sections[name]) for name in order], layout, rng)
        return text, {"other": text, "body": text}
    parts: list[tuple[str, str]] = []
    truth: dict[str, str] = {}
    names = iter(order)
    for number, name in enumerate(names, 1):
        one = rng.choice(("case", "synonyms", "no colon", "numbered", "merged")) if kind == "all" else kind
        pair = next((pair for pair in MERGED if pair[0] == name and pair[1] in order[order.index(name) + 1 :][:1]), None)
        body, counts_as = sections[name], name
        if one == "merged" and pair:
            words, body = rng.choice(MERGED[pair]), f"{body} {sections[next(names)]}"
        elif one == "synonyms":
            words = rng.choice(SYNONYMS[name])
        elif one == "misspelt":
            words = rng.choice(MISSPELT[name]).upper()
        else:
            words = PLAIN[name]
        if one == "headless findings" and name == "findings" and parts:
            parts.append(("", body))
            counts_as = "last_paragraph"
        elif one == "misspelt":
            parts.append((words + ": ", body))
        else:
            parts.append((heading(words, one, layout, number, rng), body))
        truth[counts_as] = body
    return joined(parts, layout, rng), truth


def joined(parts: list[tuple[str, str]], layout: str, rng: random.Random) -> str:
    texts = [head + body for head, body in parts]
    if layout == "wrapped":
        width = rng.randint(60, 100)
        texts = ["\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)) for text in texts]
    return {"lines": "\n", "wrapped": rng.choice(("\n", "\n\n")), "own": "\n\n", "running": rng.choice((" ", "  "))}[layout].join(texts)


def layouts(kind: str) -> tuple[str, ...]:
    return {"misspelt": ("lines", "wrapped"), "headless findings": ("own",)}.get(kind, LAYOUTS)


def shares(reports: Iterable[dict[str, str]], seed: int = 0) -> tuple[dict[tuple[str, str], float], Counter[tuple[str, str]]]:
    """(kind, layout) -> share of sections found, and how many there were."""
    found: Counter[tuple[str, str]] = Counter()
    asked: Counter[tuple[str, str]] = Counter()
    rng = random.Random(seed)
    for report in reports:
        for kind in KINDS:
            layout = rng.choice(layouts(kind))
            text, truth = disturbed(report, kind, layout, rng)
            got = split_sections(text)
            asked[kind, layout] += len(truth)
            found[kind, layout] += sum(" ".join(getattr(got, name).split()) == " ".join(body.split()) for name, body in truth.items())
    return {key: found[key] / asked[key] for key in sorted(asked)}, asked


def total(found: dict[tuple[str, str], float], asked: Counter[tuple[str, str]]) -> float:
    return sum(found[key] * asked[key] for key in asked) / asked.total()


@pytest.fixture(scope="module")
def openi() -> list[dict[str, str]]:
    archive = DATA / "reports/openi_reports.tgz"
    if not archive.is_file():
        pytest.skip("the Open-i reports are not on this machine")
    return [{name: getattr(report.sections, name) for name in PLAIN} for report in read_openi(archive)]


def test_sections_of_real_reports_are_found_under_randomised_headings(openi: list[dict[str, str]]) -> None:
    assert len(openi) == 3955
    found, asked = shares(openi)
    for key, share in found.items():
        sys.stdout.write(f"{key[0]:<18} {key[1]:<8} {share:8.2%} of {asked[key]}\n")
    sys.stdout.write(f"all {total(found, asked):.3%} of {asked.total()}\n")
    assert total(found, asked) >= 0.99
