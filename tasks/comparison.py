"""Recipes against each other: the same phantoms, the same number of images seen, several seeds, one table.

Shapes: N test images, F findings. Every run is a process of its own, so that its time and memory are its own; what is finished is kept,
and a comparison that was stopped goes on. Everything reported is of the test split; what is best is chosen on the validation split.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from medvl.data.manifest import read_manifest
from medvl.metrics import Interval, Statistic, auroc_statistic, bootstrap_intervals, combined, mean_statistic, recall_at_k
from medvl.model import load, write_atomically
from medvl.types import RESEARCH_USE, TextSource
from reports.prompts import load_prompts
from reports.text_source import ReportSentences, ReportText
from tasks.evaluation import FOCAL_FRACTION, Predictions, directions, predict

TABLE, RUNS, REJECTED, PAGE = "comparison.csv", "runs.csv", "rejected.csv", "comparison.html"
SCORES, NOTE, LOG = "scores.npz", "run.json", "log.txt"
RECALL = 10
METRICS = {
    "auroc": "zero-shot AUROC, mean over findings",
    "pointing": "pointing game, mean over focal findings",
    "cnr": "contrast-to-noise ratio of map and mask, signed, mean over focal findings",
    "recall_at_10": "own report among the first 10",
    "negation": "'X' against 'no X', mean of sensitivity and specificity, then over findings",
}
"""What is measured; more is better."""
CHOSEN_BY = ("auroc", "pointing", "recall_at_10")
"""Their mean on the validation split says which recipe is the best."""


@dataclass(frozen=True)
class Job:
    """One run: a recipe, a seed, a budget."""

    name: str
    recipe: Path
    seed: int
    folder: Path
    manifest: Path
    images: int  # to be seen in training
    options: tuple[str, ...] = ()
    threads: int = 1

    def key(self) -> dict[str, Any]:
        """What a finished run must have been asked for to be kept."""
        files = {"recipe_sha256": self.recipe, "manifest_sha256": self.manifest}
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        return {**hashes, "seed": self.seed, "images": self.images, "options": list(self.options)}


@dataclass(frozen=True)
class Scores:
    """What a model made of the studies of one split, one line a study or image."""

    findings: tuple[str, ...]
    patients: tuple[str, ...]  # numbers that stand for patients
    labels: NDArray[np.float64]  # (N, F)
    scores: NDArray[np.float64]  # (N, F), above 0.5 where "X" outdoes "no X"
    hits: NDArray[np.float64]  # (N, F), NaN without a mask
    contrast: NDArray[np.float64]  # (N, F), NaN without a mask
    focal: NDArray[np.bool_]  # (F,)
    recall: NDArray[np.float64]  # (N,) own report among the first 10; NaN without a report

    def statistics(self) -> dict[str, Statistic]:
        """Every metric that the split has what it needs for."""
        found: dict[str, Statistic | None] = {
            "auroc": _mean([auroc_statistic(self.labels[:, f], self.scores[:, f]) for f in self._both()]),
            "pointing": _mean([mean_statistic(self.hits[:, f]) for f in np.flatnonzero(self.focal)]),
            "cnr": _mean([mean_statistic(self.contrast[:, f]) for f in np.flatnonzero(self.focal)]),
            "recall_at_10": None if np.isnan(self.recall).all() else mean_statistic(self.recall),
            "negation": _mean([self._right(f, label) for f in self._both() for label in (0.0, 1.0)]),
        }
        return {name: one for name, one in found.items() if one is not None}

    def _both(self) -> list[int]:
        """Findings that are present and absent somewhere."""
        return [f for f in range(len(self.findings)) if {0.0, 1.0} <= set(self.labels[:, f].tolist())]

    def _right(self, finding: int, label: float) -> Statistic:
        right = (self.scores[:, finding] > 0.5) == (label == 1)
        return mean_statistic(np.where(self.labels[:, finding] == label, right, math.nan))


def _mean(statistics: Sequence[Statistic]) -> Statistic | None:
    return combined([(1 / len(statistics), one) for one in statistics]) if statistics else None


def scores_of(predictions: Predictions) -> Scores:
    """The lines of a prediction that comparisons need."""
    counted = predictions.counted()
    numbers: dict[str, str] = {}
    patients = tuple(numbers.setdefault(row.patient_id, str(len(numbers))) for row in predictions.rows)
    recall = np.full(len(predictions.rows), math.nan)
    if predictions.retrieval is not None:
        queries, _ = directions(predictions.retrieval, counted)
        ids = np.array(patients, dtype=object)[queries.images]
        recall[queries.images] = recall_at_k(queries.similarity, queries.own, (RECALL,), ids, repeats=0).hits[RECALL]
    columns = [column[~np.isnan(column)] for column in predictions.mask_fraction.T]
    focal = np.array([len(column) > 0 and float(np.median(column)) < FOCAL_FRACTION for column in columns])
    assert predictions.contrast is not None
    return Scores(
        predictions.findings,
        patients,
        predictions.labels,
        predictions.scores,
        predictions.hits,
        predictions.contrast,
        focal,
        recall,
    )


def jobs_of(
    recipes: Sequence[Path], seeds: int, out: Path, manifest: Path, images: int, options: Sequence[str] = (), threads: int = 1
) -> list[Job]:
    """A job for every recipe and seed, seeds outermost, so that a stopped comparison has all recipes.

    Raises:
        ValueError: two recipes of one name.
    """
    names = [recipe.stem for recipe in recipes]
    if len(set(names)) < len(names):
        raise ValueError(f"two recipes have one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}; rename one")
    folders = out / "runs"
    return [
        Job(name, recipe, seed, folders / f"{name}-{seed}", manifest, images, tuple(options), threads)
        for seed in range(seeds)
        for name, recipe in zip(names, recipes, strict=True)
    ]


def finished(job: Job) -> bool:
    """Whether the run was made already, as it is asked for now."""
    note = job.folder / NOTE
    return note.is_file() and json.loads(note.read_text()).get("key") == job.key() and (job.folder / SCORES).is_file()


def train_and_score(job: Job) -> None:
    """Train one run and leave ``run.json`` and ``scores.npz`` in its folder; what time and memory it took is of the whole process."""
    import torch

    from medvl.training.cli import run
    from medvl.training.module import trainable

    torch.set_num_threads(job.threads)
    batch = _batch_size(job)
    arguments = {
        "config": job.recipe,
        "seed_everything": job.seed,
        "out": job.folder / "model",
        "trainer.max_epochs": -1,
        "trainer.max_steps": max(1, round(job.images / batch)),
        "trainer.enable_progress_bar": "false",
        "data.init_args.manifest": job.manifest,
        "data.init_args.seed": job.seed,
        "model.seed": job.seed,
    }
    wall, cpu = time.perf_counter(), time.process_time()
    run("fit", [*(f"--{name}={value}" for name, value in arguments.items()), *job.options])
    taken = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "peak_mb": _peak_mb()}
    model, source = load(job.folder / "model"), _retrieved(job.recipe)
    found = {}
    for split in ("val", "test"):
        rows = read_manifest(job.manifest).select(split=split, modality=_modality(job.recipe)).rows
        found[split] = scores_of(predict(model, rows, load_prompts(), source))
    arrays = {f"{split}.{name}": np.asarray(value) for split, scores in found.items() for name, value in asdict(scores).items()}
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_atomically(job.folder / SCORES, content.getvalue())
    parameters = trainable(model)
    note = {"key": job.key(), "name": job.name, "seed": job.seed, "batch_size": batch, "parameters": parameters, **taken}
    write_atomically(job.folder / NOTE, json.dumps(note, indent=2).encode())


def read_scores(folder: Path, split: str) -> Scores:
    """What :func:`train_and_score` left of a split."""
    with np.load(folder / SCORES, allow_pickle=False) as file:
        arrays = {name.removeprefix(f"{split}."): file[name] for name in file.files if name.startswith(f"{split}.")}
    findings, patients = (tuple(arrays.pop(name).tolist()) for name in ("findings", "patients"))
    return Scores(findings=findings, patients=patients, **arrays)


def run_jobs(jobs: Sequence[Job], workers: int, console: Console) -> dict[str, str]:
    """Make every run that is not made yet; run -> why it failed, of those that did. A failed run costs only itself."""
    failed: dict[str, str] = {}
    waiting = [job for job in jobs if not finished(job)]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(waiting))
        with ThreadPoolExecutor(workers) as pool:
            futures = {pool.submit(_in_a_process, job): job for job in waiting}
            for future in as_completed(futures):
                job = futures[future]
                if (why := future.result()) is not None:
                    failed[f"{job.name}-{job.seed}"] = why
                    console.print(f"[red]{job.name}, seed {job.seed}: failed[/red]; see {REJECTED} and {job.folder / LOG}")
                progress.advance(task)
    return failed


def _in_a_process(job: Job) -> str | None:
    """Make a run in a new process; why it failed, or None."""
    job.folder.mkdir(parents=True, exist_ok=True)
    told = json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in asdict(job).items()})
    env = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    with (job.folder / LOG).open("w") as log:
        done = subprocess.run([sys.executable, "-m", "tasks.comparison", told], stdout=log, stderr=log, env=env, check=False)  # noqa: S603 (own words)
    if done.returncode == 0 and finished(job):
        return None
    lines = [line for line in (job.folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
    return f"exit {done.returncode}: {lines[-1].strip() if lines else 'no message'}"


@dataclass(frozen=True)
class Line:
    """A recipe in the table."""

    name: str
    seeds: int
    metrics: dict[str, Interval]  # mean over seeds, interval over patients
    spread: dict[str, tuple[float, float]]  # lowest and highest seed
    validation: dict[str, float]  # mean over seeds, on the validation split
    difference: dict[str, Interval]  # from the first recipe, paired by study and seed; empty for the first
    seconds_per_1000: float  # CPU seconds of training for 1000 images seen
    peak_mb: float
    parameters: int
    best: bool = False

    @property
    def choice(self) -> float:
        """What the best is chosen by."""
        return float(np.mean([self.validation.get(name, math.nan) for name in CHOSEN_BY]))


def lines_of(jobs: Sequence[Job], repeats: int = 1000) -> list[Line]:
    """The table: a line for each recipe that has a run, in the order given; differences are from the first over the seeds both have."""
    made = [job for job in jobs if finished(job)]
    names = list(dict.fromkeys(job.name for job in made))
    tests = {name: {job.seed: read_scores(job.folder, "test") for job in made if job.name == name} for name in names}
    lines = []
    for name in names:
        own = [job for job in made if job.name == name]
        notes = [json.loads((job.folder / NOTE).read_text()) for job in own]
        statistics = {seed: scores.statistics() for seed, scores in tests[name].items()}
        patients = next(iter(tests[name].values())).patients
        shared = [m for m in METRICS if all(m in of_seed for of_seed in statistics.values())]
        over_seeds = {m: combined([(1 / len(statistics), of_seed[m]) for of_seed in statistics.values()]) for m in shared}
        each = {m: [bootstrap_intervals({m: of_seed[m]}, patients, repeats=0)[m].value for of_seed in statistics.values()] for m in shared}
        validation = [_values(read_scores(job.folder, "val")) for job in own]
        lines.append(
            Line(
                name,
                len(own),
                _intervals(over_seeds, patients, repeats),
                {m: (min(values), max(values)) for m, values in each.items()},
                {m: float(np.mean([of[m] for of in validation])) for m in METRICS if all(m in of for of in validation)},
                {} if name == names[0] else _differences(tests[name], tests[names[0]], repeats),
                float(np.mean([1000 * note["cpu_seconds"] / job.images for note, job in zip(notes, own, strict=True)])),
                float(np.max([note["peak_mb"] for note in notes])),
                int(notes[0]["parameters"]),
            )
        )
    chosen = max(lines, key=lambda line: -math.inf if math.isnan(line.choice) else line.choice, default=None)
    return [line if line is not chosen else Line(**{**vars(line), "best": True}) for line in lines]


def _differences(mine: Mapping[int, Scores], others: Mapping[int, Scores], repeats: int) -> dict[str, Interval]:
    seeds = sorted(mine.keys() & others.keys())
    if not seeds or any(mine[seed].patients != others[seed].patients for seed in seeds):
        return {}
    one, other = ({seed: scores[seed].statistics() for seed in seeds} for scores in (mine, others))
    shared = [m for m in METRICS if all(m in of[seed] for of in (one, other) for seed in seeds)]
    signed = ((1 / len(seeds), one), (-1 / len(seeds), other))
    statistics = {m: combined([(factor, of[seed][m]) for factor, of in signed for seed in seeds]) for m in shared}
    return _intervals(statistics, mine[seeds[0]].patients, repeats)


def _intervals(statistics: Mapping[str, Statistic], patients: Sequence[str], repeats: int) -> dict[str, Interval]:
    return {m: bootstrap_intervals({m: one}, patients, repeats=repeats)[m] for m, one in statistics.items()}


def _values(scores: Scores) -> dict[str, float]:
    return {m: interval.value for m, interval in _intervals(scores.statistics(), scores.patients, 0).items()}


def write_tables(lines: Sequence[Line], jobs: Sequence[Job], failed: Mapping[str, str], out: Path) -> None:
    """``comparison.csv`` (a line a recipe), ``runs.csv`` (a line a run) and, if any failed, ``rejected.csv``."""
    ends = ("", "_low", "_high", "_n")
    header = ["recipe", "seeds", "best_on_validation", *(f"{m}{end}" for m in METRICS for end in (*ends, "_seed_min", "_seed_max"))]
    header += [f"{m}_difference{end}" for m in METRICS for end in ends[:3]] + [f"validation_{m}" for m in METRICS]
    header += ["cpu_seconds_per_1000_images", "peak_memory_mb", "parameters", "notice"]
    _write(out / TABLE, header, (_cells(line) for line in lines))
    notes = [json.loads((job.folder / NOTE).read_text()) for job in jobs if finished(job)]
    values = [(_values(read_scores(job.folder, "test")), _values(read_scores(job.folder, "val"))) for job in jobs if finished(job)]
    own = ["batch_size", "parameters", "seconds", "cpu_seconds", "peak_mb"]
    _write(
        out / RUNS,
        ["recipe", "seed", *METRICS, *(f"validation_{m}" for m in METRICS), *own],
        (
            [note["name"], note["seed"], *(_told(of.get(m)) for of in pair for m in METRICS), *(note[name] for name in own)]
            for note, pair in zip(notes, values, strict=True)
        ),
    )
    (out / REJECTED).unlink(missing_ok=True)
    if failed:
        _write(out / REJECTED, ["run", "reason"], ([name, why] for name, why in failed.items()))


def _cells(line: Line) -> list[Any]:
    cells: list[Any] = [line.name, line.seeds, line.best]
    for m in METRICS:
        one, spread = line.metrics.get(m), line.spread.get(m, (math.nan, math.nan))
        cells += ["", "", "", ""] if one is None else [_told(one.value), _told(one.ci_low), _told(one.ci_high), one.n]
        cells += [_told(v) for v in spread]
    for m in METRICS:
        one = line.difference.get(m)
        cells += ["", "", ""] if one is None else [_told(one.value), _told(one.ci_low), _told(one.ci_high)]
    cells += [_told(line.validation.get(m)) for m in METRICS]
    return [*cells, f"{line.seconds_per_1000:.2f}", f"{line.peak_mb:.0f}", line.parameters, RESEARCH_USE]


def _told(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _write(path: Path, header: Sequence[str], rows: Iterator[list[Any]] | Any) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(header)
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def _recipe(path: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def _modality(recipe: Path) -> str:
    modality = _recipe(recipe)["data"]["init_args"].get("modality", "xray")
    if not isinstance(modality, str):
        raise ValueError(f"{recipe.name} trains on several modalities; what is compared is of one")
    return modality


def _retrieved(recipe: Path) -> TextSource:
    """What stands for a report in retrieval: the whole text for a recipe that trains on whole texts, its sentences for all others."""
    spec = _recipe(recipe)["data"]["init_args"]["texts"]
    return ReportText(**spec.get("init_args", {})) if spec["class_path"].endswith(".ReportText") else ReportSentences()


def _batch_size(job: Job) -> int:
    asked = [option.split("=", 1)[1] for option in job.options if option.startswith("--data.init_args.batch_size=")]
    return int(asked[-1] if asked else _recipe(job.recipe)["data"]["init_args"].get("batch_size", 64))


def _peak_mb() -> float:
    """Largest resident memory of this process so far, or of the accelerator where there is one."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(
    recipes: Sequence[Path],
    seeds: int,
    out: Path,
    manifest: Path,
    images: int,
    workers: int = 1,
    options: Sequence[str] = (),
    console: Console | None = None,
    synthetic: bool = False,
) -> tuple[list[Line], dict[str, str]]:
    """Train, score, write the tables and the page; the lines, and run -> why it failed."""
    from tasks.page.comparison import write_comparison

    console = console or Console(stderr=True)
    jobs = jobs_of(recipes, seeds, out, manifest, images, options)
    failed = run_jobs(jobs, workers, console)
    lines = lines_of(jobs)
    write_tables(lines, jobs, failed, out)
    rows = read_manifest(manifest).rows
    splits = {f"{split} studies": len({row.study_id for row in rows if row.split == split}) for split in ("train", "val", "test")}
    write_comparison(out / PAGE, lines, {"images seen in training by each run": images, "seeds": seeds, **splits}, synthetic)
    return lines, failed


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    for place in ("recipe", "folder", "manifest"):
        given[place] = Path(given[place])
    train_and_score(Job(**{**given, "options": tuple(given["options"])}))
