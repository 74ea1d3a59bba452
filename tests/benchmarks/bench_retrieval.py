"""How well an archive's ways of asking find what belongs to a question: modes and corrections beside each other, in the same run.

    python tests/benchmarks/bench_retrieval.py openi --openi ../shared/data/reports/openi_reports.tgz --work bench_retrieval
    python tests/benchmarks/bench_retrieval.py images --manifest phantoms/manifest.csv --model runs/xray --work bench_retrieval

``openi``: the findings section of a report asks for its impression, in a pool of all impressions; by the embedded sentence encoder as it
is, and by a model's report tower if one is given. ``images``: images of the test split ask for reports of test and validation; what
corrections are fitted on, images of the validation split, is of other patients. Impressions and reports of the same words are hits.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

KS = (1, 5, 10)
DEPTH = 100_000
"""All: of a hybrid question the first 1,000 of both lists are ranked, and the rest tie after them."""


@click.group()
def main() -> None:
    """See the module."""


def show(
    name: str, archive: Any, own: NDArray[np.int64], rankings: Sequence[Any], patients: Sequence[str], scored: NDArray[np.bool_]
) -> None:
    """A row of the table: recall, MRR, median rank, agreement of the first hit's facts, hubness."""
    from medvl.metrics.facts import fact_agreement, fact_relevance
    from medvl.metrics.hubness import hubness_of, k_occurrences
    from medvl.metrics.retrieval import ranking_metrics

    derived = archive.derived
    similarity = np.full((len(own), len(derived.numbers)), -1.0)
    for row, found in enumerate(rankings):
        similarity[row, list(found.places)] = found.scores
    similarity = similarity[:, scored]
    relevant = (derived.groups[own][:, None] == derived.groups[None, :])[:, scored]
    facts = np.stack([derived.columns.facts[name] for name in derived.findings], axis=1).astype(np.int64)
    first = np.array([found.places[0] for found in rankings])
    names = [name for name in derived.findings if np.isin(facts[own, derived.findings.index(name)], (0, 1)).any()]
    columns = [derived.findings.index(name) for name in names]
    grades = fact_relevance(facts[own][:, columns], facts[scored][:, columns])
    rule = "reports of the same words; nDCG by present facts"
    metrics = ranking_metrics(similarity, relevant, KS, patients, rule=rule, grades=grades, repeats=300).metrics
    agreement = fact_agreement(
        facts[own][:, columns], facts[first][:, columns], names, patients, gallery=facts[scored][:, columns], repeats=300
    )
    hubs = hubness_of(k_occurrences(similarity, 10), 10, len(own))
    cells = [interval(metrics[f"recall@{k}"]) for k in KS]
    cells += [f"{metrics['mrr'].value:.3f}", f"{metrics['ndcg@10'].value:.3f}", f"{np.median(ranks(similarity, relevant)):.0f}"]
    for state in ("present", "absent"):
        cells.append(f"{interval(agreement.micro[f'{state}_f1'])}, chance {agreement.chance[f'{state}_f1']:.3f}")
    click.echo(f"| {name} | {' | '.join(cells)} | {hubs.skewness:.1f} | {hubs.largest:.3f} |")


def header(title: str) -> None:
    """The table's head."""
    names = [
        title,
        *(f"recall@{k}" for k in KS),
        "MRR",
        "nDCG@10 by facts",
        "median rank",
        "facts present, F1 of the first hit",
        "facts absent, F1",
        "skew",
        "hub",
    ]
    click.echo(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|")


def interval(value: Any) -> str:
    """With its interval."""
    return f"{value.value:.3f} ({value.ci_low:.3f} to {value.ci_high:.3f})"


def ranks(similarity: NDArray[np.float64], relevant: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(Q,) places of the best relevant item, ties in the middle."""
    best = np.where(relevant, similarity, -np.inf).max(1, keepdims=True)
    return np.asarray((similarity > best).sum(1) + ((similarity == best).sum(1) + 1) / 2)


@main.command()
@click.option("--openi", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", type=click.Path(path_type=Path), help="A model whose report tower is asked too.")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--queries", default=1000, show_default=True)
def openi(openi: Path, model: Path | None, work: Path, queries: int) -> None:
    """Findings ask for the impression."""
    import torch

    import medvl
    from medvl.nn.similarity import unit
    from medvl.types import TextBatch
    from reports.openi import read_openi
    from reports.sentences import report_sentences, split_sentences
    from reports.towers import MiniLmReportEncoder
    from tasks.archive.ingest import as_array

    said = {}
    for report in read_openi(openi, lambda error: None):
        impression = report_sentences(None, None, report.sections.impression)
        if impression and report.sections.findings:
            said[report.study_id] = (report.sections.findings, report.sections.impression or "", impression)
    asked = [name for name in sorted(said) if split_sentences(said[name][0])]
    asked = [asked[i] for i in np.sort(np.random.default_rng(0).permutation(len(asked))[:queries])]
    towers: dict[str, Callable[[Sequence[str]], Any]] = {}
    plain = MiniLmReportEncoder(None).eval()
    towers["MiniLM as it is"] = lambda texts: unit(plain(TextBatch(tuple(texts))).pooled)
    if model is not None:
        loaded = medvl.load(model)
        towers["report tower of the model"] = lambda texts: unit(loaded.encode_text(list(texts)).pooled)
    click.echo(f"{len(said)} impressions, {len(asked)} findings ask; recall with patient-level intervals; chance@10 {10 / len(said):.4f}")
    work.mkdir(parents=True, exist_ok=True)
    for number, (title, encode) in enumerate(towers.items()):
        texts = sorted(
            {text for one in said.values() for text in one[2]} | {text for name in asked for text in split_sentences(said[name][0])}
        )
        with torch.inference_mode():
            parts = [as_array(encode(texts[start : start + 256])) for start in range(0, len(texts), 256)]
        vectors = dict(zip(texts, np.concatenate(parts), strict=True))
        archive, key = impressions(work / f"impressions{number}.db", said, vectors)
        places = {name: archive.derived.places[archive.store.number(name) or -1] for name in asked}
        own = np.array([places[name] for name in asked])
        everything = np.ones(len(archive.derived.numbers), bool)
        header(title)
        for name, question in questions(vectors, said, asked):
            found = [ranking_of(archive, key, one) for one in question]
            show(name, archive, own, found, asked, everything)


def ranking_of(archive: Any, model: int, question: Any) -> Any:
    """The first DEPTH."""
    from tasks.archive.search import ranking

    return ranking(archive.derived, question, model)


def questions(vectors: dict[str, Any], said: dict[str, Any], asked: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Each way of asking, and its questions."""
    from reports.sentences import split_sentences
    from tasks.archive.search import Question

    def made(name: str, over: str | None, words: bool, correction: str | None = None) -> Question:
        rows = np.stack([vectors[text] for text in split_sentences(said[name][0])])
        query = rows if over == "sentence" else rows.mean(0)
        return Question(
            vectors=None if over is None else query,
            words=said[name][0] if words else None,
            over=over or "report",  # type: ignore[arg-type]
            correction=correction,  # type: ignore[arg-type]
            asked="sentence" if over == "sentence" else "report",
            top=DEPTH,
            group=False,
        )

    ways: dict[str, tuple[str | None, bool, str | None]] = {
        "text (BM25)": (None, True, None),
        "vector, reports": ("report", False, None),
        "vector, sentences (late interaction)": ("sentence", False, None),
        "hybrid, reports": ("report", True, None),
        "hybrid, sentences": ("sentence", True, None),
        "vector, reports, centred": ("report", False, "centre"),
        "vector, reports, CSLS": ("report", False, "csls"),
        "vector, sentences, centred": ("sentence", False, "centre"),
        "vector, sentences, CSLS": ("sentence", False, "csls"),
    }
    for title, way in ways.items():
        yield title, [made(name, *way) for name in asked]


def impressions(path: Path, said: dict[str, Any], vectors: dict[str, Any]) -> tuple[Any, int]:
    """An archive of impressions alone, made anew."""
    from reports.facts import LexiconFacts
    from reports.facts.ontology import load_ontology
    from reports.text_source import ReportSentences
    from tasks.archive.records import ModelKey, StudyVectors
    from tasks.archive.search import Archive
    from tasks.archive.sources import Candidate, ReportReader
    from tasks.archive.sqlite import SqliteStore

    for old in path.parent.glob(f"{path.name}*"):
        if old.is_file():
            old.unlink()
    reader = ReportReader(ReportSentences(), LexiconFacts(), load_ontology())
    store = SqliteStore(path, create=True)
    key = store.model(ModelKey("0" * 64, "0" * 64, len(next(iter(vectors.values())))))
    batch = []
    for name, (_, impression, _) in said.items():
        study = reader.archived(Candidate(name, name, name, "xray", source="openi", impression=impression))
        rows = np.stack([vectors[one.text] for one in study.sentences])
        batch.append((study, StudyVectors(rows.mean(0), rows)))
    store.write(batch, key)
    store.close()
    return Archive(path), key


@main.command()
@click.option("--manifest", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--modality", type=click.Choice(["xray", "ct"]), default="xray", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--limit", type=int, help="Of the test split so many studies.")
def images(manifest: Path, model: Path, modality: str, work: Path, limit: int | None) -> None:
    """Images of the test split ask for reports."""
    import medvl
    from medvl.data.manifest import read_manifest
    from medvl.metrics.hubness import modality_gap
    from tasks.archive.ingest import Encoder
    from tasks.archive.records import ArchivedImage, ArchivedStudy
    from tasks.archive.search import Archive, Question

    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{modality}.db"
    if not path.exists():
        for verb, split, images in (("build", "val", ()), ("add", "test", ("--no-images",))):
            command = [sys.executable, "-m", "medvl", "index", verb, str(manifest), "--split", split, "--modality", modality]
            subprocess.run([*command, "--model", str(model), "--store", str(path), *images], check=True)
    archive, loaded = Archive(path), medvl.load(model)
    rows = {row.study_id: row for row in reversed(read_manifest(manifest).select(split="test", modality=modality).rows)}
    rows = {name: row for name, row in sorted(rows.items())[:limit] if archive.store.number(name) is not None}
    rejected: list[tuple[str, str]] = []
    encoder, vectors, names = Encoder(loaded), [], list(rows)
    for start in range(0, len(names), 16):
        part = [ArchivedStudy(n, n, modality, images=(ArchivedImage(str(rows[n].path)),)) for n in names[start : start + 16]]
        vectors += [one.images[0] for one in encoder.vectors(part, rejected) if one.images is not None]
    if rejected or any(one is None for one in vectors):
        raise click.ClickException(f"{len(rejected)} images cannot be read, the first: {rejected[0][1] if rejected else ''}")
    queries = np.stack(vectors)
    derived, key = archive.derived, 1
    own = np.array([derived.places[archive.store.number(name) or -1] for name in names])
    has = np.diff(derived.gallery(key, "report").starts) > 0
    reports = np.asarray(derived.gallery(key, "report").matrix)
    click.echo(
        f"{len(names)} {modality} images ask, pool {has.sum()} reports, {len(np.unique(derived.groups[has]))} different; gap of images and "
        f"reports {modality_gap(queries, reports):.3f}"
    )
    header("image to report, by pooled vectors")
    for correction in (None, "centre", "csls"):
        asked = [Question(vectors=q, correction=correction, asked="image", top=len(has), group=False) for q in queries]  # type: ignore[arg-type]
        found = [ranking_of(archive, key, one) for one in asked]
        show(correction or "plain", archive, own, found, [rows[name].patient_id for name in names], has)


if __name__ == "__main__":
    main()
