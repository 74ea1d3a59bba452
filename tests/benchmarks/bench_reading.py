"""Reading by neighbours beside zero-shot diagnosis, on held-out studies: AUROC, and how much is answered how rightly. Prints tables.

    medvl index build data/manifest.csv --split train --model MODEL --store archive.db
    python tests/benchmarks/bench_reading.py --store archive.db --model MODEL --val val/manifest.csv --held held/manifest.csv

Studies have one film each. Settings of reading, and calibration and limits of zero-shot, are fitted on ``--val`` alone, in halves and with
the same guarantee: calls of present and calls of absent each wrong at most ``--error`` of the time. Neighbours are asked twice, over
reports and over images. AUROC is of all held-out studies, those that are abstained on too; a study of which no neighbour says anything
counts half. Intervals and differences are paired, by patient.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from medvl.data.manifest import StudyImage, read_manifest
from medvl.metrics import ABSTAIN, MACRO, Comparison, Statistic, auroc_statistic, compare_models, mean_intervals
from medvl.model import DualEncoder, batches, load
from medvl.nn.similarity import unit
from reports.facts.ontology import load_ontology
from reports.prompts import load_prompts
from reports.text_source import ReportSentences
from tasks.archive.ingest import as_array, model_key
from tasks.archive.neighbours import NeighbourSearch, Over, Query, Scope
from tasks.archive.reading import KS, Neighbour, ReadingSettings, call_matrix, certified_level, evidence_matrix, fit_reading, vote
from tasks.archive.search import Archive
from tasks.commands.common import weights_sha256
from tasks.decisions import fit_decisions
from tasks.zero_shot import PromptBank, encode_prompts, score

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cohort:
    """Studies with labels, what zero-shot gives them and what asks an archive for them."""

    rows: tuple[StudyImage, ...]
    labels: Array  # (N, F)
    scores: Array  # (N, F)
    vectors: Array  # (N, D)

    @property
    def ids(self) -> list[str]:
        return [row.study_id for row in self.rows]

    @property
    def patients(self) -> list[str]:
        return [row.patient_id for row in self.rows]

    def neighbours(self, search: NeighbourSearch, k: int) -> list[tuple[Neighbour, ...]]:
        asking = zip(self.rows, self.vectors, strict=True)
        return [search.neighbours(Query(row.study_id, vector[None], (row.patient_id,)), k, sentences=False) for row, vector in asking]


def cohort(tables: Sequence[Path], split: str, model: DualEncoder, bank: PromptBank) -> Cohort:
    """Encode each film once, for both."""
    rows = tuple(row for table in tables for row in read_manifest(table).select(split=split, modality="xray").rows)
    if len({row.study_id for row in rows}) != len(rows):
        raise click.UsageError("a study of several films; expected one each")
    scores, vectors = [], []
    for part in batches(rows, 32):
        features = model.encode_samples([model.read(row.path) for row in part])
        scores.append(score(model, features, bank).double().cpu().numpy())
        vectors.append(as_array(unit(features.pooled)))
    labels = np.array([[row.labels.get(name, math.nan) for name in bank.findings] for row in rows])
    return Cohort(rows, labels, np.concatenate(scores), np.concatenate(vectors).astype(np.float64))


def with_silence(labels: Array, evidence: Array) -> Statistic:
    """:func:`tasks.archive.reading.auroc_with_silence` as a function of row weights."""
    known, said = np.isin(labels, (0.0, 1.0)), ~np.isnan(evidence)
    positive = labels == 1
    inner = auroc_statistic(np.where(said, labels, math.nan), np.where(said, evidence, 0.0))

    def of_weights(weights: Array) -> Array:
        def pairs(rows: NDArray[np.bool_]) -> Array:
            return (weights @ (rows & positive)) * (weights @ (rows & ~positive))

        share = np.divide(pairs(known & said), pairs(known), out=np.full(len(weights), math.nan), where=pairs(known) > 0)
        return share * np.where(share > 0, np.nan_to_num(inner.of_weights(weights)), 0.0) + (1 - share) / 2

    return Statistic(of_weights, known, int((known & positive).sum()))


def zero_shot_calls(val: Cohort, held: Cohort, findings: Sequence[str], error: float, delta: float) -> NDArray[np.int64]:
    """(N, F) calls of calibrated zero-shot scores at levels that validation proves, as reading has them: half calibrates, half proves."""
    order = sorted(range(len(val.rows)), key=lambda i: val.patients[i])
    half = np.zeros(len(val.rows), bool)
    half[[i for n, i in enumerate(order) if n % 2]] = True
    first = np.array([val.patients.index(patient) == i for i, patient in enumerate(val.patients)])
    some = [patient for patient, chosen in zip(val.patients, half, strict=True) if chosen]
    decisions = fit_decisions(val.scores[half], val.labels[half], some, findings, "bench", of_odds=True)
    calls = np.full(held.scores.shape, ABSTAIN)
    for f, name in enumerate(findings):
        if name not in decisions.findings:
            continue
        near, new = (np.array([decisions.probabilities({name: one})[name] for one in of.scores[:, f]]) for of in (val, held))
        for side in (1, 0):
            strength, wanted = (near, new) if side else (1 - near, 1 - new)
            used = first & np.isin(val.labels[:, f], (0.0, 1.0)) & (strength > 0.5)
            parts = [(strength[used & part], val.labels[used & part, f] != side) for part in (half, ~half)]
            level = certified_level(parts[0], parts[1], error, delta / 2)
            if level is not None:
                calls[wanted >= level, f] = side
    return calls


def answers(calls: NDArray[np.int64], held: Cohort, findings: Sequence[str]) -> dict[str, list[str]]:
    """Finding -> share answered, of the studies with it and of those without, and error among the answers.

    The mean error is of the findings with an answer; the last line is of all answers together.
    """
    known = np.isin(held.labels, (0.0, 1.0))
    answered = known & (calls != ABSTAIN)
    wrong = answered & (calls != held.labels)
    tables = [np.where(of, answered, math.nan) for of in (held.labels == 1, held.labels == 0)] + [np.where(answered, wrong, math.nan)]
    means = [mean_intervals(table, findings, held.patients) for table in tables]
    told = {name: ["-" if math.isnan(mean[name].value) else f"{mean[name].value:.3f}" for mean in means] for name in findings}
    told[MACRO] = [f"{mean[MACRO].value:.3f} [{mean[MACRO].ci_low:.3f}, {mean[MACRO].ci_high:.3f}]" for mean in means]
    sides = [held.labels == side for side in (1, 0)]
    told["together"] = [f"{(answered & of).sum()} of {of.sum()}" for of in sides] + [f"{wrong.sum()} of {answered.sum()}"]
    return told


def fitted(search: NeighbourSearch, val: Cohort, findings: Sequence[str], error: float) -> ReadingSettings:
    near = val.neighbours(search, max(KS))
    return fit_reading(near, val.labels, findings, val.ids, val.patients, error=error)


@click.command()
@click.option("--store", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--val", required=True, multiple=True, type=click.Path(path_type=Path, exists=True), help="Manifests with a split val.")
@click.option("--held", required=True, multiple=True, type=click.Path(path_type=Path, exists=True), help="Manifests with a split test.")
@click.option("--error", default=0.1, show_default=True)
def main(store: Path, folder: Path, val: tuple[Path, ...], held: tuple[Path, ...], error: float) -> None:
    """See the module."""
    torch.set_num_threads(1)
    model = load(folder, device="cpu")
    archive = Archive(store)
    key = model_key(model, weights_sha256(folder), ReportSentences())
    prompts = load_prompts(None)
    spoken = NeighbourSearch(archive, Scope(key), load_ontology()).findings
    findings = tuple(name for name in prompts.labels if name in spoken)
    bank = encode_prompts(model, prompts, findings)
    overs: tuple[Over, ...] = ("report", "image")
    searches = {over: NeighbourSearch(archive, Scope(key, over), load_ontology(), findings) for over in overs}
    start = time.process_time()
    fit_on, measured = cohort(val, "val", model, bank), cohort(held, "test", model, bank)
    click.echo(f"encoded in {time.process_time() - start:.0f} CPU s", err=True)
    if shared := set(fit_on.patients) & set(measured.patients):
        raise click.UsageError(f"{len(shared)} patients are in both --val and --held")
    zero = {name: auroc_statistic(measured.labels[:, f], measured.scores[:, f]) for f, name in enumerate(findings)}
    compared: dict[Over, dict[str, Comparison]] = {}
    told = {"zero-shot": answers(zero_shot_calls(fit_on, measured, findings, error, 0.1), measured, findings)}
    for over, search in searches.items():
        settings = fitted(search, fit_on, findings, error)
        near = measured.neighbours(search, settings.k)
        evidence = evidence_matrix(near, findings, settings)
        ours = {name: with_silence(measured.labels[:, f], evidence[:, f]) for f, name in enumerate(findings)}
        compared[over] = compare_models(ours, zero, measured.patients)
        votes = [vote(one, findings, settings) for one in near]
        reasons = {reason: sum(one.reason == reason for of in votes for one in of) for reason in ("far", "few", "disagree", "unproven")}
        told[over] = answers(call_matrix(votes, findings), measured, findings)
        note = {name: getattr(settings, name) for name in ("k", "temperature", "silent", "floor")}
        silent = float(np.isnan(evidence).mean())
        click.echo(f"over {over}s: {json.dumps(note)}; nothing said of {silent:.4f}; abstained: {json.dumps(reasons)}")
    click.echo(
        f"\n{searches['report'].facts()['studies']} archived, {len(fit_on.rows)} validation and {len(measured.rows)} held-out studies of "
        f"{len(set(measured.patients))} patients; calls wrong at most {error:g} each way.\n"
    )
    click.echo(
        "| AUROC | positives | zero-shot | over reports | less zero-shot | over images | less zero-shot |\n|---|---|---|---|---|---|---|"
    )
    for name in (*findings, MACRO):
        pair = [compared[over][name] for over in overs]
        positives = "" if name == MACRO else str(zero[name].n_positive)
        cells = [
            f"{one.first.value:.3f} | {one.difference.value:+.3f} [{one.difference.ci_low:+.3f}, {one.difference.ci_high:+.3f}]"
            for one in pair
        ]
        click.echo(f"| {name} | {positives} | {pair[0].second.value:.3f} | {cells[0]} | {cells[1]} |")
    ways = {"zero-shot": "zero-shot", "report": "over reports", "image": "over images"}
    heads = [f"{way}: of present | of absent | error" for way in ways.values()]
    click.echo("\n| answered, error | " + " | ".join(heads) + " |\n|" + "---|" * (1 + 3 * len(ways)))
    for name in (*findings, MACRO, "together"):
        click.echo(f"| {name} | " + " | ".join(" | ".join(told[way][name]) for way in ways) + " |")


if __name__ == "__main__":
    main()
