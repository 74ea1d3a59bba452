"""Positives across studies: false negatives among real reports, and what each variant of pair building brings on phantoms.

    python tests/benchmarks/bench_positives.py reports --data ../shared/data --out bench
    python tests/benchmarks/bench_positives.py phantoms --out bench --studies 1700 --epochs 4

`reports` puts all Open-i reports that have a sentence into shuffled batches of 256 with all their sentences, and looks at every pair of a
study and a sentence of the batch, a sentence that stands in several reports once for each. A pair is true if the study has the sentence, or
its facts entail it: the same findings in the same states, with side, or side and place, or these and degree. A false negative is a true
pair that a variant counts as a negative; a pair of no weight that is not left out of the loss is a negative. Facts are those that the
variants use too, so a variant has no false negatives by its own strictness. What people coded says more: a sentence that does nothing but
deny coded findings ("No pneumothorax or effusion.") is true of every study that is coded for none of them, whatever its report mentions.

`phantoms` trains one model per variant and seed with equal data, batches and steps, and evaluates it on the test studies.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_facts import MESH
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from medvl.types import KnownStudy, PairStudy, SourcedText, StudyWords, equal_text_pairs
from reports import MiniLmReportEncoder
from reports.facts import LexiconFacts
from reports.facts.statements import FactSource, StatedSentence
from reports.openi import read_openi
from reports.pairs import ReportPairs, SoftTargets
from reports.pairs.truth import TRUE, Claim, Strictness, TruthTable, with_disputes
from reports.sentences import report_sentences

METRICS = {
    "AUROC": ("zero_shot", "macro_auroc"),
    "pointing": ("grounding", "pointing_game_macro"),
    "Recall@10": ("retrieval", "image_to_report", "recall_at_10"),
}

BATCH = 256
JUDGES: tuple[Strictness, ...] = ("side", "location", "all")
P = "data.init_args.pairs"
OPTION = f"{P}.init_args"
BUILT = {P: "reports.pairs.ReportPairs"}
SOFT = {**BUILT, f"{OPTION}.soft": "reports.pairs.SoftTargets"}
MINILM = f"{OPTION}.soft.init_args.encoder"
LABELS: dict[str, Any] = {"likeness": "labels", "temperature": 0.5, "floor": 0.1}  # one finding of many: cosines of 0.2 to 0.5
VARIANTS: dict[str, dict[str, Any]] = {
    "equal text": {},
    "equal finding state": BUILT,
    "and related unknown left out": {**BUILT, f"{OPTION}.unknown": "ignore_related"},
    "and unmentioned absent": {**BUILT, f"{OPTION}.unmentioned": "absent"},
    "and hard negatives": {**BUILT, f"{OPTION}.negatives": "reports.pairs.HardNegatives"},
    "and soft by labels": {**SOFT, **{f"{OPTION}.soft.init_args.{name}": value for name, value in LABELS.items()}},
    "and soft by text": {**SOFT, MINILM: "reports.MiniLmReportEncoder", f"{MINILM}.init_args.embed_dim": 8},
}


def builders() -> dict[str, ReportPairs | None]:
    """The variants that are compared; None: a sentence is a positive of the one report that it was drawn from, as a column of its own."""
    minilm, facts = MiniLmReportEncoder(8), Kept()
    soft = {
        "labels": SoftTargets(**LABELS),
        "text": SoftTargets("text", encoder=minilm),
        "CWCL": SoftTargets("text", "cwcl", share=1.0, floor=0.0, veto=False, encoder=minilm),
    }
    return {
        "own sentences alone": None,
        "equal text": ReportPairs(across="text", facts=facts),
        "equal finding state, side": ReportPairs(strictness="side", facts=facts),
        "equal finding state, location": ReportPairs(strictness="location", facts=facts),
        "equal finding state, all": ReportPairs(strictness="all", facts=facts),
        "location, related unknown left out": ReportPairs(unknown="ignore_related", facts=facts),
        "location, unmentioned absent": ReportPairs(unmentioned="absent", facts=facts),
        **{f"equal text, soft by {name}": ReportPairs(across="text", soft=one, facts=facts) for name, one in soft.items()},
    }


def denies_coded(claims: Sequence[Claim]) -> frozenset[str]:
    """The coded findings that a sentence denies, if it does nothing else; empty if it does."""
    plain = all(c.state == "absent" and c.finding in MESH and c == Claim(c.finding, "absent") for c in claims)
    return frozenset(c.finding for c in claims) if plain else frozenset()


def count(
    builder: ReportPairs | None,
    batch: Sequence[PairStudy],
    truths: dict[str, NDArray[np.bool_]],
    denied: Sequence[frozenset[str]],
    coded: Sequence[frozenset[str]],
) -> dict[str, float]:
    """Sums over the pairs (study, drawn sentence) of one batch, but for each sentence with the report that it was drawn for.

    Args:
        truths: strictness -> (B, M) whether the different texts of the batch, in their order, are true.
        denied: of each text, see :func:`denies_coded`.
        coded: findings of each study.
    """
    made = equal_text_pairs(batch) if builder is None else builder.pairs(batch)
    column = {one.text: j for j, one in enumerate(made.texts)}
    owner = np.array([i for i, study in enumerate(batch) for _ in study.texts])
    at = np.array([column[one.text] for study in batch for one in study.texts])
    drawn_for = np.arange(len(batch))[:, None] == owner
    weight = drawn_for.astype(float) if builder is None else made.positives.double().numpy()[:, at]
    ignored = np.zeros(drawn_for.shape, dtype=bool) if made.ignore is None else made.ignore.numpy()[:, at]
    negative = ~drawn_for & (weight == 0) & ~ignored
    found = {"pairs": (~drawn_for).sum(), "negatives": negative.sum(), "left out": (~drawn_for & ignored).sum()}
    for strictness, truth in truths.items():
        true = truth[:, at] & ~drawn_for
        found[f"true, {strictness}"] = true.sum()
        found[f"false negatives, {strictness}"] = (negative & true).sum()
        found[f"weight on true, {strictness}"] = weight[true].sum()
    found["weight"] = weight[~drawn_for].sum()
    denials = ~drawn_for & np.array([bool(said) for said in denied])[at]
    clear = np.array([[not said & codes for said in denied] for codes in coded])[:, at]
    found["denials true by code"] = (denials & clear).sum()
    found["false negatives by code"] = (denials & clear & negative).sum()
    found["denials false by code"] = (denials & ~clear).sum()
    found["false positives by code"] = (denials & ~clear & (weight > 0)).sum()
    return {name: float(value) for name, value in found.items()}


def share(part: float, whole: float) -> float | None:
    """The share, None of nothing."""
    return part / whole if whole else None


class Kept(FactSource):
    """The lexicon's facts, each text read once for all variants."""

    def __init__(self) -> None:
        self.lexicon, self.known = LexiconFacts(), {}  # type: ignore[var-annotated]

    def sentences(self, text: str) -> tuple[StatedSentence, ...]:
        if text not in self.known:
            self.known[text] = self.lexicon.sentences(text)
        return self.known[text]


def reports(data: Path, out: Path, size: int, epochs: int) -> None:
    """Count, print and write ``positives_reports.json``."""
    listed, codes = [], {}
    for row, report in enumerate(read_openi(data / "reports" / "openi_reports.tgz")):
        words = StudyWords(report.study_id, None, report.sections.findings, report.sections.impression)
        if said := report_sentences(None, words.findings, words.impression):
            listed.append(KnownStudy((row,), (words,), tuple(map(SourcedText, said))))
            terms = {term.split("/")[0].strip() for term in report.major}
            codes[row] = frozenset(finding for finding, names in MESH.items() if terms & set(names))
    variants, seconds = builders(), {}
    for name, builder in track(variants.items(), "reading facts"):
        start = time.perf_counter()
        if builder is not None:
            builder.prepare(listed)
        seconds[name] = time.perf_counter() - start
    reader = ReportPairs()
    tables = {strictness: TruthTable(reader.ontology, strictness) for strictness in JUDGES}
    claims = {s.rows[0]: with_disputes([c for one in s.texts for c in reader.claims(one.text)], reader.ontology) for s in listed}
    profiles = {name: {row: table.profile(said) for row, said in claims.items()} for name, table in tables.items()}
    sums: dict[str, dict[str, float]] = {name: {} for name in variants}
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(listed)) for _ in range(epochs)]
    batches = [order[i : i + size] for order in orders for i in range(0, len(order) - size + 1, size)]
    for chosen in track(batches, "batches"):
        batch = [PairStudy(listed[i].rows[0], listed[i].texts) for i in chosen]
        own = equal_text_pairs(batch)
        said = [reader.claims(one.text) for one in own.texts]
        truths = {}
        for name, table in tables.items():
            values, _ = table.of(said, np.stack([profiles[name][study.row] for study in batch]))
            truths[name] = (values == TRUE) | own.positives.numpy()
        for name, builder in variants.items():
            start = time.perf_counter()
            found = count(builder, batch, truths, list(map(denies_coded, said)), [codes[study.row] for study in batch])
            for key, value in found.items():
                sums[name][key] = sums[name].get(key, 0.0) + value
            sums[name]["seconds"] = sums[name].get("seconds", 0.0) + time.perf_counter() - start
    rows = {}
    heads = [*(f"false neg., {judge} (% of true)" for judge in JUDGES), "(% of neg., all)", "left out %", "weight on true %"]
    heads += ["denials: false neg. by code %", "false pos. by code %"]
    table = Table("positives", *heads, title=f"{len(listed)} Open-i reports, {len(batches)} batches of {size}")
    for name, one in sums.items():
        of_true = {judge: share(one[f"false negatives, {judge}"], one[f"true, {judge}"]) for judge in JUDGES}
        of_negatives = {judge: share(one[f"false negatives, {judge}"], one["negatives"]) for judge in JUDGES}
        on_true = share(one["weight on true, location"], one["weight"])
        rows[name] = {
            **one,
            "false negatives of true": of_true,
            "false negatives of negatives": of_negatives,
            "weight on true of weight": on_true,
            "false negatives of denials true by code": share(one["false negatives by code"], one["denials true by code"]),
            "false positives of denials false by code": share(one["false positives by code"], one["denials false by code"]),
            "seconds to prepare": seconds[name],
            "ms a batch": 1000 * one["seconds"] / len(batches),
        }
        by_code = share(one["false negatives by code"], one["denials true by code"])
        wrong = share(one["false positives by code"], one["denials false by code"])
        cells = [*of_true.values(), of_negatives["all"], share(one["left out"], one["pairs"]), on_true, by_code, wrong]
        table.add_row(name, *("" if value is None else f"{100 * value:.2f}" for value in cells))
    out.mkdir(parents=True, exist_ok=True)
    (out / "positives_reports.json").write_text(json.dumps({"batch": size, "reports": len(listed), "variants": rows}, indent=2))
    Console(width=190).print(table)


def measure(cohort: Path, folder: Path, seed: int, epochs: int, options: dict[str, Any]) -> dict[str, float]:
    """Train one model and evaluate it on the cohort's test studies; metric -> value, and the seconds that training took."""
    from medvl import load
    from medvl.data.manifest import read_manifest
    from medvl.training.cli import run
    from reports.prompts import load_prompts
    from reports.text_source import ReportSentences
    from tasks.demo import RECIPES, fastest_precision, recipe_path
    from tasks.evaluation import predict, results

    arguments = {
        "config": recipe_path(RECIPES["xray"]),
        "seed_everything": seed,
        "out": folder,
        "trainer.max_epochs": epochs,
        "trainer.precision": fastest_precision(),
        "trainer.enable_progress_bar": "false",
        "data.init_args.manifest": cohort,
        "data.init_args.seed": seed,
        **options,
        "model.seed": seed,
        "keep_best": "false",
    }
    start = time.perf_counter()
    run("fit", [f"--{name}={value}" for name, value in arguments.items()])
    found = {"training s": time.perf_counter() - start}
    rows = read_manifest(cohort).select(split="test", modality="xray").rows
    measured = results(predict(load(folder), rows, load_prompts(), ReportSentences()), repeats=0)
    for name, keys in METRICS.items():
        value = measured
        for key in keys:
            value = value[key]
        found[name] = float(value)
    return found


def phantoms(out: Path, studies: int, epochs: int, seeds: int, chosen: Sequence[str]) -> None:
    """Make the cohort, train variants x seeds models, print and write ``positives_phantoms.json`` after each."""
    from tasks.phantoms import write_cohort

    test = max(20, studies // 6)
    counts = {"train": studies - test - test // 4, "val": test // 4, "test": test}
    cohort = write_cohort(out / "data", studies, 100, counts=counts)
    note = out / "positives_phantoms.json"
    found: dict[str, dict[str, dict[str, float]]] = json.loads(note.read_text()) if note.is_file() else {}
    for seed in range(seeds):
        for i, name in enumerate(VARIANTS):
            if name not in chosen or str(seed) in found.get(name, {}):
                continue
            found.setdefault(name, {})[str(seed)] = measure(cohort, out / f"run{i}-{seed}", seed, epochs, VARIANTS[name])
            note.write_text(json.dumps(found, indent=2))
    table = Table("positives", "seeds", *METRICS, "training s", title=f"{counts}, {epochs} epochs; mean (lowest to highest)")
    for name, runs in found.items():
        cells = []
        for metric in METRICS:
            values = [one[metric] for one in runs.values()]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        table.add_row(name, str(len(runs)), *cells, f"{np.mean([one['training s'] for one in runs.values()]):.0f}")
    base = found.get("equal text", {})
    for name, runs in found.items():
        if name != "equal text" and (both := sorted(base.keys() & runs.keys())):
            shifts = [np.mean([runs[seed][metric] - base[seed][metric] for seed in both]) for metric in METRICS]
            table.add_row(f"{name}: difference", str(len(both)), *(f"{shift:+.3f}" for shift in shifts), "")
    Console(width=150).print(table)


def main() -> None:
    """One of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    real = parts.add_parser("reports")
    real.add_argument("--data", type=Path, required=True)
    real.add_argument("--batch-size", type=int, default=BATCH)
    real.add_argument("--epochs", type=int, default=1)
    made = parts.add_parser("phantoms")
    made.add_argument("--studies", type=int, default=1700)
    made.add_argument("--epochs", type=int, default=4)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    for part in (real, made):
        part.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.part == "reports":
        reports(chosen.data, chosen.out, chosen.batch_size, chosen.epochs)
    else:
        phantoms(chosen.out, chosen.studies, chosen.epochs, chosen.seeds, chosen.variants)


if __name__ == "__main__":
    main()
