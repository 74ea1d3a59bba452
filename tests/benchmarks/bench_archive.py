"""What an archive's answers cost, beside faiss flat, LanceDB and a NumPy scan in the same run.

    python tests/benchmarks/bench_archive.py reports --openi ../shared/data/reports/openi_reports.tgz --work bench_archive
    python tests/benchmarks/bench_archive.py million --work bench_archive

``reports``: 100,000 reports whose texts are put together of the sentences of Open-i's and are all different, and 512 numbers each, of 300
overlapping clusters whose spectrum falls as a power law; a vector query with a filter, a hybrid query of three words, opening, memory.
``million``: the approximate index. One thread; encoding of queries is no part of it. Files stay in ``--work`` and are used again.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

WIDTH = 512
REPEATS = 40


def hard(count: int, width: int, seed: int) -> NDArray[np.float32]:
    """(count, width) unit vectors of 300 clusters that overlap, with a spectrum that falls as 1/sqrt(k)."""
    rng, clusters = np.random.default_rng(seed), np.random.default_rng(0)  # all that are made are of the same clusters
    spectrum = (1 / np.sqrt(1 + np.arange(width))).astype(np.float32)
    centres = clusters.standard_normal((300, width), dtype=np.float32) * spectrum
    found = np.empty((count, width), np.float32)
    for start in range(0, count, 50_000):
        part = slice(start, min(count, start + 50_000))
        size = part.stop - part.start
        found[part] = centres[rng.integers(300, size=size)] + 0.9 * rng.standard_normal((size, width), dtype=np.float32) * spectrum
        found[part] /= np.linalg.norm(found[part], axis=1, keepdims=True)
    return found


def milliseconds(work: Callable[[int], Any], repeats: int = REPEATS) -> tuple[float, float]:
    """Median and largest of CPU ms over repeats, after three to warm up."""
    times = []
    for i in range(repeats + 3):
        start = time.process_time()
        work(i)
        times.append((time.process_time() - start) * 1e3)
    return float(np.median(times[3:])), float(np.max(times[3:]))


def resident() -> float:
    """MB of this process."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


@click.group()
def main() -> None:
    """See the module."""


@main.command()
@click.option("--openi", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--count", default=100_000, show_default=True)
def reports(openi: Path, work: Path, count: int) -> None:
    """An archive of recombined reports."""
    work.mkdir(parents=True, exist_ok=True)
    store = work / f"reports_{count}.db"
    if not store.exists():
        _write_reports(openi, store, count)
    told = json.loads(subprocess.run([sys.executable, __file__, "ask", str(store)], check=True, capture_output=True, text=True).stdout)
    click.echo(json.dumps(told, indent=1))
    click.echo("\n| what | ms, median | ms, largest |\n|---|---|---|")
    for name, (median, largest) in told["ms"].items():
        click.echo(f"| {name} | {median:.1f} | {largest:.1f} |")


def _write_reports(openi: Path, path: Path, count: int) -> None:
    from medvl.types import Fact
    from reports.openi import read_openi
    from reports.sentences import report_sentences
    from tasks.archive.records import ArchivedStudy, ArchivedText, ModelKey, StudyVectors
    from tasks.archive.sqlite import SqliteStore

    said = [report_sentences(None, one.sections.findings, one.sections.impression) for one in read_openi(openi, lambda error: None)]
    sentences = sorted({text for one in said for text in one})
    lengths = [len(one) for one in said if one]
    rng = np.random.default_rng(0)
    vectors, of_sentence = hard(count, WIDTH, 1), hard(len(sentences), WIDTH, 2)
    store = SqliteStore(path.with_suffix(".part"), create=True)
    model = store.model(ModelKey("0" * 64, "0" * 64, WIDTH))
    seen: set[tuple[int, ...]] = set()
    names = ["edema", "pleural_effusion", "pneumothorax", "lung_nodule", "cardiomegaly"]
    start = time.process_time()
    for begin in range(0, count, 500):
        batch = []
        for i in range(begin, min(count, begin + 500)):
            chosen: tuple[int, ...] = ()
            while not chosen or chosen in seen:
                chosen = tuple(rng.choice(len(sentences), rng.choice(lengths), replace=False).tolist())
            seen.add(chosen)
            texts = [sentences[k] for k in chosen]
            study = ArchivedStudy(
                f"study-{i:07d}",
                f"patient-{i // 2:07d}",
                "xray" if rng.random() < 0.7 else "ct",
                source="recombined",
                view="PA" if rng.random() < 0.6 else "LATERAL",
                date=f"20{rng.integers(10, 25)}-{rng.integers(1, 13):02d}-{rng.integers(1, 28):02d}",
                sex="F" if rng.random() < 0.5 else "M",
                age=float(rng.integers(18, 95)),
                sections={"findings": " ".join(texts)},
                sentences=tuple(ArchivedText(text, (Fact(names[k % 5], "present"),)) for k, text in zip(chosen, texts, strict=True)),
                findings={name: int(rng.choice([1, 0])) for name in names if rng.random() < 0.5},
            )
            batch.append((study, StudyVectors(vectors[i], of_sentence[list(chosen)])))
        store.write(batch, model)
    store.close()
    path.with_suffix(".part").rename(path)
    click.echo(f"written in {time.process_time() - start:.0f} CPU s, {path.stat().st_size / 1e6:.0f} MB", err=True)


@main.command(hidden=True)
@click.argument("store", type=click.Path(path_type=Path))
def ask(store: Path) -> None:
    """In a process of its own: open, ask, measure."""
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    from tasks.archive.filters import parse_filter
    from tasks.archive.search import Archive, Question, ranking

    empty = resident()
    start = time.process_time()
    archive = Archive(store)
    archive.derived.gallery(1, "report")
    built = time.process_time() - start
    archive.close()
    opened = []
    for _ in range(5):
        start = time.perf_counter()
        archive = Archive(store)
        archive.search(Question(words="effusion", top=1))
        opened.append((time.perf_counter() - start) * 1e3)
    derived = archive.derived
    matrix = derived.gallery(1, "report").matrix
    queries = hard(REPEATS + 3, WIDTH, 9)
    where = parse_filter("modality = xray and age >= 60 and present(edema)", derived.findings)
    wide = parse_filter("age >= 30", derived.findings)
    words = ["large pleural effusion", "right lower lobe", "no acute disease", "calcified granuloma lung", "heart size normal"]
    for over in ("report", "sentence"):
        archive.search(Question(vectors=queries[0], words=words[0], over=over, top=10, allowed=where.mask(derived.columns)), 1)  # type: ignore[arg-type]
    used = resident() - empty
    scores = np.asarray(matrix) @ queries.T
    recall = []
    for i in range(20):
        allowed = where.mask(derived.columns)
        found = ranking(derived, Question(vectors=queries[i], top=10, allowed=allowed, group=False), 1)
        true = np.sort(np.where(allowed, scores[:, i], -np.inf))[::-1][9]
        recall.append(np.mean([scores[place, i] >= true - 1e-6 for place in found.places]))

    def vector(i: int, expression: Any) -> Any:
        return archive.search(Question(vectors=queries[i], top=10, allowed=expression.mask(derived.columns)), 1)

    ms = {
        "vector, filter leaves 8 %": milliseconds(lambda i: vector(i, where)),
        "vector, filter leaves 84 %": milliseconds(lambda i: vector(i, wide)),
        "vector, no filter": milliseconds(lambda i: archive.search(Question(vectors=queries[i], top=10), 1)),
        "sentences (late interaction, two)": milliseconds(
            lambda i: archive.search(Question(vectors=queries[i : i + 2], over="sentence", top=10), 1), 20
        ),
        "words, three": milliseconds(lambda i: archive.search(Question(words=words[i % 5], top=10))),
        "hybrid, three words": milliseconds(lambda i: archive.search(Question(vectors=queries[i], words=words[i % 5], top=10), 1)),
        "hybrid, three words, filter": milliseconds(
            lambda i: archive.search(Question(vectors=queries[i], words=words[i % 5], top=10, allowed=where.mask(derived.columns)), 1)
        ),
    }
    ms |= _peers(matrix, queries, where.mask(derived.columns), store.parent)
    told = {
        "studies": len(derived.numbers),
        "derived built in CPU s": round(built, 1),
        "open and first words, ms": [round(one, 1) for one in opened],
        "filter leaves": float(where.mask(derived.columns).mean()),
        "recall of the first 10, ties counted": float(np.mean(recall)),
        "matrix MB": matrix.nbytes / 1e6,
        "MB of the process beyond its imports, matrix and sentences mapped": round(used, 1),
        "derived MB": sum(path.stat().st_size for path in archive.store.derived.rglob("*") if path.is_file()) / 1e6,
        "ms": ms,
    }
    click.echo(json.dumps(told))


def _peers(
    matrix: NDArray[np.float32], queries: NDArray[np.float32], allowed: NDArray[np.bool_], work: Path
) -> dict[str, tuple[float, float]]:
    """The same first 10 by others, with and without the filter."""
    import faiss

    faiss.omp_set_num_threads(1)
    held = np.ascontiguousarray(matrix)
    found = {
        "NumPy scan, no filter": milliseconds(lambda i: np.argpartition(-(held @ queries[i]), 10)[:10], 20),
        "NumPy scan, filter": milliseconds(lambda i: np.argpartition(-np.where(allowed, held @ queries[i], -np.inf), 10)[:10], 20),
    }
    flat = faiss.IndexFlatIP(matrix.shape[1])
    flat.add(held)
    bits = np.packbits(allowed, bitorder="little")
    selected = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits)))
    found["faiss flat, no filter"] = milliseconds(lambda i: flat.search(queries[i : i + 1], 10), 20)
    found["faiss flat, filter"] = milliseconds(lambda i: flat.search(queries[i : i + 1], 10, params=selected), 20)
    try:
        import lancedb
        import pyarrow as pa
    except ImportError:
        return found
    place = work / "lance"
    db = lancedb.connect(place)
    rows = pa.table(
        {
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(held.reshape(-1)), matrix.shape[1]),
            "keep": pa.array(allowed),
        }
    )
    table = db.create_table("reports", rows, mode="overwrite")
    found["LanceDB, no index, no filter"] = milliseconds(lambda i: table.search(queries[i]).metric("dot").limit(10).to_arrow(), 8)
    found["LanceDB, no index, filter"] = milliseconds(
        lambda i: table.search(queries[i]).metric("dot").where("keep", prefilter=True).limit(10).to_arrow(), 8
    )
    return found


@main.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--count", default=1_000_000, show_default=True)
def million(work: Path, count: int) -> None:
    """The approximate index of an archive's matrix, and how it is searched."""
    import faiss

    from tasks.archive import approximate
    from tasks.archive.derived import Approximate, Gallery
    from tasks.archive.search import Question, VectorScores, first

    faiss.omp_set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    place = work / f"hard_{count}.npy"
    if not place.exists():
        np.save(place, hard(count, WIDTH, 3))
    matrix = np.load(place, mmap_mode="r")
    start = time.process_time()
    how = approximate.build(matrix, {}, work / "hard.faiss")
    built = time.process_time() - start
    ends = np.arange(count + 1, dtype=np.int64)
    index = Approximate(approximate.load(work / "hard.faiss"), how["probes"])
    gallery = Gallery(matrix, ends, ends[:-1], ends[:-1], index)
    exact = Gallery(matrix, ends, ends[:-1], ends[:-1])
    queries = hard(REPEATS + 3, WIDTH, 9)
    allowed = np.random.default_rng(4).random(count) < 0.3

    def places(of: Gallery, i: int, mask: NDArray[np.bool_] | None = None) -> list[int]:
        return first(VectorScores(of, Question(vectors=queries[i], allowed=mask)), 10)[0]

    table = {
        "IVF, SQ8, first rows exact": milliseconds(lambda i: places(gallery, i)),
        "the same, filter leaves 30 %": milliseconds(lambda i: places(gallery, i, allowed)),
        "exact scan": milliseconds(lambda i: places(exact, i), 5),
    }
    recall = [len(set(places(gallery, i)) & set(places(exact, i))) / 10 for i in range(20)]
    filtered = [len(set(places(gallery, i, allowed)) & set(places(exact, i, allowed))) / 10 for i in range(20)]
    click.echo(f"{count} x {WIDTH}: built in {built:.1f} CPU s, {how}")
    click.echo(f"recall of the first 10 on 20 new queries {np.mean(recall):.3f}, filtered {np.mean(filtered):.3f}")
    click.echo("\n| what | ms, median | ms, largest |\n|---|---|---|")
    for name, (median, largest) in table.items():
        click.echo(f"| {name} | {median:.2f} | {largest:.2f} |")


if __name__ == "__main__":
    main()
