"""Facts of real reports against what people coded: Open-i against its MeSH major terms, CT reports against their 18 labels.

    python tests/benchmarks/bench_facts.py --data ../shared/data/reports [--half held-out|development]

Reports are halved by the SHA-256 of their id: the lexicon was worked on with the development half, the table is of the other half. Beside
ours stands a baseline of ten lines: a keyword in a sentence without a negation word. Per label F1, errors of each kind, and a 95 %
interval of the macro F1 (bootstrap over reports, 1000 draws). Speed is that of one process, sections, sentences and facts together.

In Open-i a finding counts if it is stated as present: coders gave no term to most of what was only possible. Cardiomegaly, atelectasis and
scars count if uncertain too: of "scar or atelectasis" coders gave both terms, and "borderline" hearts their term. In the CT reports a label
counts if present or uncertain: those labels mark questioned findings too. All this was decided on the development half.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from reports.facts import LexiconFacts, Statement
from reports.facts.label_sets import load_label_set
from reports.facts.ontology import load_ontology
from reports.openi import read_openi
from reports.sentences import split_sentences

MESH = {  # finding -> major terms, before the first slash
    "cardiomegaly": ("Cardiomegaly",),
    "atelectasis": ("Pulmonary Atelectasis",),
    "pleural_effusion": ("Pleural Effusion",),
    "calcified_granuloma": ("Calcified Granuloma",),
    "scoliosis": ("Scoliosis",),
    "lung_nodule": ("Nodule",),
    "fracture": ("Fractures, Bone",),
    "scar": ("Cicatrix",),
    "atherosclerosis": ("Atherosclerosis",),
    "edema": ("Pulmonary Edema",),
    "pneumothorax": ("Pneumothorax", "Hydropneumothorax", "Hemopneumothorax"),
    "emphysema": ("Emphysema", "Pulmonary Emphysema", "Bullous Emphysema"),
}
IF_UNCERTAIN = frozenset({"cardiomegaly", "atelectasis", "scar"})
KEYWORDS = {
    "cardiomegaly": "cardiomegaly|enlarged heart|heart is enlarged",
    "atelectasis": "atelecta",
    "pleural_effusion": "effusion",
    "calcified_granuloma": "calcified granuloma",
    "scoliosis": "scoliosis",
    "lung_nodule": "nodule",
    "fracture": "fracture",
    "scar": "scar",
    "atherosclerosis": "atheroscl",
    "edema": "edema",
    "pneumothorax": "pneumothora",
    "emphysema": "emphysema",
    "Medical material": "catheter|tube|pacemaker|stent|suture|clip|prosthe|port",
    "Arterial wall calcification": "(calcif|atheroma|atheroscl).*(aort|arter)",
    "Cardiomegaly": "cardiomegaly|heart size increased|cardiothoracic (ratio|index) increased",
    "Pericardial effusion": "pericardial effusion",
    "Coronary artery wall calcification": "(calcif|atheroma|atheroscl).*coronary|coronary.*(calcif|atheroma|atheroscl)",
    "Hiatal hernia": "hiatal hernia",
    "Lymphadenopathy": "lymph node|lymphadenopathy|LAP",
    "Emphysema": "emphysem",
    "Atelectasis": "atelecta",
    "Lung nodule": "nodule",
    "Lung opacity": "ground.glass|opacit|densit",
    "Pulmonary fibrotic sequela": "sequel|fibro",
    "Pleural effusion": "pleural effusion|effusion",
    "Mosaic attenuation pattern": "mosaic",
    "Peribronchial thickening": "peribronchial",
    "Consolidation": "consolidation",
    "Bronchiectasis": "bronchiectas",
    "Interlobular septal thickening": "septal thick|interlobular sept",
}
NEGATION = re.compile(r"\b(no|not|without|negative|absent|free of|clear of|nor|none)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Report:
    """A report with what people say it holds."""

    id: str
    text: str
    coded: frozenset[str]

    @property
    def held_out(self) -> bool:
        """Whether it is of the half that the lexicon was not worked on with."""
        return hashlib.sha256(self.id.encode()).digest()[0] % 2 == 1


def openi(data: Path) -> list[Report]:
    """Open-i reports that were indexed."""
    found = []
    for report in read_openi(data / "openi_reports.tgz"):
        terms = {term.split("/")[0].strip() for term in report.major}
        if "No Indexing" not in terms:
            text = f"FINDINGS: {report.sections.findings}\n\nIMPRESSION: {report.sections.impression}"
            found.append(Report(report.study_id, text, frozenset(f for f, names in MESH.items() if terms & set(names))))
    return found


def ct(data: Path) -> list[Report]:
    """The labelled CT reports."""
    names = load_label_set("ct_rate_18").names
    with (data / "ct_reports_labelled.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Report(row["AccessionNo"], row["report_text"], frozenset(n for n in names if row[n] == "1")) for row in rows]


def keyword_baseline(text: str, labels: Iterable[str]) -> frozenset[str]:
    """A label whose keyword stands in a sentence without a negation word."""
    affirmed = [s for s in split_sentences(text) if not NEGATION.search(s)]
    return frozenset(label for label in labels if any(re.search(KEYWORDS[label], s, re.IGNORECASE) for s in affirmed))


def openi_labels(statements: Sequence[Statement]) -> frozenset[str]:
    """Findings stated as present, or also as uncertain, kinds counted as what they are kinds of."""
    ontology = load_ontology()
    present = {s.fact.finding for s in statements if s.fact.state == "present"}
    uncertain = {s.fact.finding for s in statements if s.fact.state == "uncertain"}
    return frozenset(f for f in MESH if (present | (uncertain if f in IF_UNCERTAIN else set())) & {f, *ontology.descendants(f)})


def ct_labels(statements: Sequence[Statement]) -> frozenset[str]:
    """Labels that are 1 or -1."""
    values = load_label_set("ct_rate_18").values(s.fact for s in statements)
    return frozenset(name for name, value in values.items() if value in (1, -1))


def counts(reports: Sequence[Report], found: Sequence[frozenset[str]], labels: Sequence[str]) -> np.ndarray:
    """(reports, labels, 3) int: true positive, false positive, false negative."""
    cells = [
        [(n in r.coded and n in f, n not in r.coded and n in f, n in r.coded and n not in f) for n in labels]
        for r, f in zip(reports, found, strict=True)
    ]
    return np.asarray(cells, dtype=int)


def f1(totals: np.ndarray) -> np.ndarray:
    """F1 of (..., 3) totals; 1 where there is nothing to find and nothing was found."""
    tp, fp, fn = np.moveaxis(totals, -1, 0)
    return np.where(tp + fp + fn == 0, 1.0, 2 * tp / np.maximum(2 * tp + fp + fn, 1))


def interval(cells: np.ndarray) -> tuple[float, float]:
    """95 % interval of the macro F1."""
    rng = np.random.default_rng(0)
    draws = [f1(cells[rng.integers(len(cells), size=len(cells))].sum(0)).mean() for _ in range(1000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def compare(
    name: str, reports: Sequence[Report], labels: Sequence[str], decide: Callable[[Sequence[Statement]], frozenset[str]], console: Console
) -> None:
    """Print the table of one collection."""
    source = LexiconFacts()
    start = time.process_time()
    statements = [tuple(source.facts(report.text)) for report in reports]
    seconds = time.process_time() - start
    ours = counts(reports, [decide(s) for s in statements], labels)
    theirs = counts(reports, [keyword_baseline(report.text, labels) for report in reports], labels)
    table = Table(title=f"{name}: {len(reports)} reports, {len(reports) / seconds:.0f} reports/s on one core")
    for column in ("label", "coded", "F1", "missed", "wrong", "baseline F1"):
        table.add_column(column, justify="left" if column == "label" else "right")
    for i, label in enumerate(labels):
        tp, fp, fn = ours[:, i].sum(0)
        table.add_row(label, str(tp + fn), f"{f1(ours[:, i].sum(0)):.3f}", str(fn), str(fp), f"{f1(theirs[:, i].sum(0)):.3f}")
    low, high = interval(ours)
    table.add_row(
        "macro", "", f"{f1(ours.sum(0)).mean():.3f} ({low:.3f} to {high:.3f})", "", "", f"{f1(theirs.sum(0)).mean():.3f}", style="bold"
    )
    console.print(table)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with openi_reports.tgz and ct_reports_labelled.csv")
    parser.add_argument("--half", choices=("held-out", "development"), default="held-out")
    options = parser.parse_args()
    console = Console(width=110)
    held_out = options.half == "held-out"
    pick = [report for report in openi(options.data) if report.held_out == held_out]
    compare(f"Open-i, {options.half} half", pick, tuple(MESH), openi_labels, console)
    pick = [report for report in ct(options.data) if report.held_out == held_out]
    compare(f"CT reports, {options.half} half", pick, load_label_set("ct_rate_18").names, ct_labels, console)


if __name__ == "__main__":
    main()
