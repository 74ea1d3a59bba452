"""Recipes against each other: the same phantoms, the same number of images seen, several seeds, one table.

Shapes: N test images, F findings. Every run is a process of its own, so that its time and memory are its own; what is finished is kept,
and a comparison that was stopped goes on. Everything reported is of the test split; what is best is chosen on the validation split.
Runs are validated after equal numbers of images, the last time after their last step: validation at the end of epochs alone would leave
out what a run of some epochs and a half learned in the half.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

import medvl
from medvl.data.manifest import Manifest, StudyImage, read_manifest
from medvl.files import write_atomically
from medvl.metrics import Interval, Statistic, auroc_statistic, bootstrap_intervals, combined, mean_statistic, recall_at_k
from medvl.model import ConfigError, build, commit, load
from medvl.types import RESEARCH_USE, ImageReader, TextSource
from reports.prompts import load_prompts
from reports.text_source import ReportSentences, ReportText
from tasks.evaluation import FOCAL_FRACTION, Predictions, predict
from tasks.retrieval_figures import directions

TABLE, RUNS, REJECTED, PAGE = "comparison.csv", "runs.csv", "rejected.csv", "comparison.html"
SCORES, NOTE, LOG, MODEL = "scores.npz", "run.json", "log.txt", "model"
RESOLVED, FIT_REJECTED, LOGGED = "config.yaml", "rejected.csv", Path("logs", "version_0", "metrics.csv")  # of a fit
RECALL = 10
METRICS = {
    "auroc": "zero-shot AUROC, mean over findings",
    "pointing": "pointing game, mean over focal findings",
    "cnr": "contrast-to-noise ratio of map and mask, signed, mean over focal findings",
    "cnr_absolute": "contrast-to-noise ratio without its sign, as published: a map that is darkest on the finding scores too",
    "recall_at_10": "own report among the first 10",
    "negation": "'X' against 'no X', mean of sensitivity and specificity, then over findings",
}
"""What is measured; more is better, but for the absolute ratio, which a map that is wrong throughout can win."""
SHOWN = tuple(m for m in METRICS if m != "cnr_absolute")
"""What has a column of its own on the page and the terminal."""
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
    checks: int = 1  # validations, equally apart, the last after the last step
    options: tuple[str, ...] = ()
    threads: int = 1

    def key(self) -> dict[str, Any]:
        """What a finished run must have been asked for to be kept."""
        files = {"recipe_sha256": self.recipe, "manifest_sha256": self.manifest}
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        return {
            "medvl": medvl.__version__,
            **hashes,
            "seed": self.seed,
            "images": self.images,
            "checks": self.checks,
            "options": list(self.options),
        }


@dataclass(frozen=True)
class Scores:
    """What a model made of the studies of one split, one line an image."""

    findings: tuple[str, ...]
    rows: NDArray[np.int64]  # (N,) of the manifest, ascending or not
    patients: tuple[str, ...]  # for each patient the first row of the manifest that is theirs
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
            "cnr_absolute": _mean([mean_statistic(np.abs(self.contrast[:, f])) for f in np.flatnonzero(self.focal)]),
            "recall_at_10": None if np.isnan(self.recall).all() else mean_statistic(self.recall),
            "negation": _mean([self._right(f, label) for f in self._both() for label in (0.0, 1.0)]),
        }
        return {name: one for name, one in found.items() if one is not None}

    def of(self, rows: NDArray[np.int64]) -> Scores:
        """The lines of these rows of the manifest, in their order."""
        at = {int(row): i for i, row in enumerate(self.rows)}
        chosen = np.array([at[int(row)] for row in rows], dtype=np.intp)
        arrays = {name: getattr(self, name)[chosen] for name in ("labels", "scores", "hits", "contrast", "recall")}
        return replace(self, rows=self.rows[chosen], patients=tuple(self.patients[i] for i in chosen), **arrays)

    def _both(self) -> list[int]:
        """Findings that are present and absent somewhere."""
        return [f for f in range(len(self.findings)) if {0.0, 1.0} <= set(self.labels[:, f].tolist())]

    def _right(self, finding: int, label: float) -> Statistic:
        right = (self.scores[:, finding] > 0.5) == (label == 1)
        return mean_statistic(np.where(self.labels[:, finding] == label, right, math.nan))


def _mean(statistics: Sequence[Statistic]) -> Statistic | None:
    return combined([(1 / len(statistics), one) for one in statistics]) if statistics else None


def on_shared_rows(scores: Sequence[Scores]) -> list[Scores]:
    """The scores on the rows of the manifest that all have, in one order: what one model could not read is compared for none.

    A row means the same image in all: a run is kept for the manifest that it was made with alone (:meth:`Job.key`).
    """
    shared = set.intersection(*(set(one.rows.tolist()) for one in scores))
    rows = np.array(sorted(shared), dtype=np.int64)
    return [one.of(rows) for one in scores]


def on_shared_figures(scores: Sequence[Scores]) -> list[Scores]:
    """The scores on the rows that all have, and there on what is a figure in all: what does not count for one counts for none.

    A study of two images whose label one tower has once and another twice counts once; a map without contrast, for none.
    """
    scores = on_shared_rows(scores)
    names = ("labels", "hits", "contrast", "recall")
    known = {name: np.logical_and.reduce([~np.isnan(getattr(one, name)) for one in scores]) for name in names}
    focal = np.logical_and.reduce([one.focal for one in scores])
    arrays: list[dict[str, Any]] = [{name: np.where(known[name], getattr(one, name), math.nan) for name in names} for one in scores]
    return [replace(one, focal=focal, **own) for one, own in zip(scores, arrays, strict=True)]


def scores_of(predictions: Predictions, table: Sequence[StudyImage] | None = None) -> Scores:
    """The lines of a prediction that comparisons need; labels of images that do not count, as their unit does already, are NaN.

    Args:
        table: all rows of the manifest, which number the patients; None: those of the prediction.
    """
    counted = predictions.counted()
    labels = np.full_like(predictions.labels, math.nan)
    labels[counted] = predictions.labels[counted]
    first: dict[str, str] = {}
    for row in predictions.rows if table is None else table:
        first.setdefault(row.patient_id, str(row.row))
    patients = tuple(first[row.patient_id] for row in predictions.rows)
    recall = np.full(len(predictions.rows), math.nan)
    if predictions.retrieval is not None:
        queries, _ = directions(predictions.retrieval, predictions.queries())
        ids = np.array(patients, dtype=object)[queries.images]
        recall[queries.images] = recall_at_k(queries.similarity, queries.own, (RECALL,), ids, repeats=0).hits[RECALL]
    columns = [column[~np.isnan(column)] for column in predictions.mask_fraction.T]
    focal = np.array([len(column) > 0 and float(np.median(column)) < FOCAL_FRACTION for column in columns])
    assert predictions.contrast is not None
    return Scores(
        predictions.findings,
        np.array([row.row for row in predictions.rows], dtype=np.int64),
        patients,
        labels,
        predictions.scores,
        predictions.hits,
        predictions.contrast,
        focal,
        recall,
    )


def names_of(recipes: Sequence[Path]) -> list[str]:
    """What recipes are called: the names of their files, numbered from the second of one name.

    Raises:
        ValueError: a recipe given twice.
    """
    files = [recipe.resolve() for recipe in recipes]
    if len(set(files)) < len(files):
        raise ValueError(f"{next(one.name for one in files if files.count(one) > 1)} was given twice; give every recipe once")
    names: list[str] = []
    taken = {file.stem for file in files}
    for file in files:
        free = (f"{file.stem}-{i}" for i in itertools.count(2))
        names.append(file.stem if file.stem not in names else next(name for name in free if name not in taken))
        taken.add(names[-1])
    return names


def budget(images: int, per_step: Sequence[int], epoch: int) -> tuple[int, int]:
    """Images that every run can see exactly, near what was asked for, and the number of validations: one per epoch, about.

    Args:
        images: asked for.
        per_step: images of a step of each recipe; both numbers of images, seen in all and between validations, are multiples of each.
        epoch: images of the training split.
    Raises:
        ValueError: the recipes' steps have no common multiple near ``images``.
    """
    unit = math.lcm(*per_step)
    if unit > 2 * images:
        raise ValueError(
            f"steps of {', '.join(map(str, sorted(set(per_step))))} images meet after {unit} images, more than twice the {images} "
            "that each run is to see; give more --images, or every recipe one batch size: --set data.init_args.batch_size=16"
        )
    checks = max(1, min(round(images / epoch), images // unit))
    return max(1, round(images / (checks * unit))) * unit * checks, checks


def jobs_of(
    recipes: Sequence[Path], seeds: Sequence[int], out: Path, manifest: Path, images: int, options: Sequence[str] = (), threads: int = 1
) -> list[Job]:
    """A job for every recipe and seed, seeds outermost, so that a stopped comparison has all recipes.

    Raises:
        ValueError: a recipe given twice, or no number of images near ``images`` that all can see.
    """
    table = read_manifest(manifest, strict=False)
    settled = [one for recipe in recipes if (one := _settings_if_any(recipe, options)) is not None]
    epochs = [_epoch(table, one.modality) for one in settled]
    steps = [min(one.per_step, epoch) for one, epoch in zip(settled, epochs, strict=True)]
    exact, checks = budget(images, steps, max(epochs)) if steps else (images, 1)
    named = list(zip(names_of(recipes), recipes, strict=True))
    folders = out / "runs"
    return [
        Job(name, recipe, seed, folders / f"{name}-{seed}", manifest, exact, checks, tuple(options), threads)
        for seed in seeds
        for name, recipe in named
    ]


def _epoch(manifest: Manifest, modality: str) -> int:
    """Images of the training split."""
    return max(1, len(manifest.select(split="train", modality=modality).rows))


def finished(job: Job) -> bool:
    """Whether the run was made already, as it is asked for now."""
    note = job.folder / NOTE
    return note.is_file() and json.loads(note.read_text()).get("key") == job.key() and (job.folder / SCORES).is_file()


LeftOut = dict[tuple[int, str, str, str], list[str]]
"""Row of the manifest, study, path and reason of an input that was left out or read in part -> the runs that did so."""


def left_out(jobs: Sequence[Job]) -> LeftOut:
    """What the runs left out, by row; of a run that failed what its fit had listed by then."""
    found: LeftOut = {}
    for job in jobs:
        done = finished(job)
        own = json.loads((job.folder / NOTE).read_text())["left_out"] if done else _left_out(job.folder / MODEL / FIT_REJECTED)
        for row, study, path, why in own:
            found.setdefault((row, study, path, why), []).append(f"{job.name}-{job.seed}")
    return dict(sorted(found.items()))


def train_and_score(job: Job) -> None:
    """Train one run and leave ``run.json`` and ``scores.npz`` in its folder.

    ``seconds``, ``cpu_seconds`` and ``peak_mb`` are of the whole fit, with reading and validation; ``training_seconds_per_1000`` is what
    the fit logged of its steps alone.

    Raises:
        ValueError: the fit was not what the budget was reckoned for.
    """
    import torch

    from medvl.training.cli import run
    from medvl.training.module import trainable

    torch.set_num_threads(job.threads)
    manifest, planned = read_manifest(job.manifest, strict=False), settings(job.recipe, job.options)
    per_step = min(planned.per_step, _epoch(manifest, planned.modality))
    steps = max(1, job.images // per_step)
    planned = replace(planned, manifest=str(job.manifest), max_steps=steps)
    arguments = {
        "config": job.recipe,
        "seed_everything": job.seed,
        "out": job.folder / MODEL,
        "trainer.max_epochs": -1,
        "trainer.max_steps": steps,
        "trainer.check_val_every_n_epoch": "null",  # but every so many batches
        "trainer.val_check_interval": max(1, steps // job.checks) * planned.accumulated,
        "trainer.enable_progress_bar": "false",
        "data.init_args.manifest": job.manifest,
        "data.init_args.seed": job.seed,
        "model.seed": job.seed,
    }
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run("fit", [*(f"--{name}={value}" for name, value in arguments.items()), *job.options])
    taken = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": _cpu_seconds() - cpu,
        "peak_mb": _peak_mb(),
        "training_seconds_per_1000": _training_seconds(job.folder / MODEL / LOGGED),
    }
    made = settings(job.folder / MODEL / RESOLVED)
    if made != planned:
        raise ValueError(f"{job.recipe.name} was trained as {made}, not as {planned}; leave out what sets it otherwise")
    model, source = load(job.folder / MODEL), _retrieved(job.folder / MODEL / RESOLVED)
    found, left_out = {}, _left_out(job.folder / MODEL / FIT_REJECTED)
    for split in ("val", "test"):
        rows = manifest.select(split=split, modality=made.modality).rows
        predictions = predict(model, rows, load_prompts(), source)
        found[split] = scores_of(predictions, manifest.rows)
        left_out += [(row.row, row.study_id, str(row.path), why) for row, why in predictions.rejected]
    arrays = {f"{split}.{name}": np.asarray(value) for split, scores in found.items() for name, value in asdict(scores).items()}
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    write_atomically(job.folder / SCORES, content.getvalue())
    parameters = trainable(model)
    seen = {"images": steps * per_step, "batch_size": made.batch_size}
    of_run = {"name": job.name, "seed": job.seed, "commit": commit(), "left_out": list(dict.fromkeys(left_out))}
    note = {"key": job.key(), **of_run, **seen, "parameters": parameters, **taken}
    write_atomically(job.folder / NOTE, json.dumps(note, indent=2).encode())


def _training_seconds(path: Path) -> float | None:
    """Seconds of training for 1000 images, as a fit logged them: of steps and of waiting for the loader, without validation.

    Every figure of the log is of as many images. None of a run with fewer steps than it logs at, or without that log.
    """
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rates = [float(rate) for line in csv.DictReader(file) if (rate := line.get("watch/samples_per_second"))]
    return float(np.mean([1000 / rate for rate in rates])) if rates else None


def _left_out(path: Path) -> list[tuple[int, str, str, str]]:
    """Row, study, path and reason of what a fit left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [(int(line["row"]), line["study_id"], line["path"], line["reason"]) for line in csv.DictReader(file)]


def read_scores(folder: Path, split: str) -> Scores:
    """What :func:`train_and_score` left of a split."""
    with np.load(folder / SCORES, allow_pickle=False) as file:
        arrays = {name.removeprefix(f"{split}."): file[name] for name in file.files if name.startswith(f"{split}.")}
    findings, patients = (tuple(arrays.pop(name).tolist()) for name in ("findings", "patients"))
    return Scores(findings=findings, patients=patients, **arrays)


def run_jobs(jobs: Sequence[Job], workers: int, console: Console) -> dict[str, str]:
    """Make every run that is not made yet; run -> why it failed, of those that did.

    A failed run costs only itself; an interrupt ends those that run and starts no other.
    """
    failed: dict[str, str] = {}
    running: dict[Path, subprocess.Popen[bytes]] = {}
    waiting = [job for job in jobs if not finished(job)]
    with Progress(console=console, transient=True) as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(waiting))
        try:
            futures = {pool.submit(_in_a_process, job, running): job for job in waiting}
            for future in as_completed(futures):
                job = futures[future]
                if (why := future.result()) is not None:
                    failed[f"{job.name}-{job.seed}"] = why
                    console.print(f"[red]{job.name}, seed {job.seed}: failed[/red]; see {REJECTED} and {job.folder / LOG}")
                progress.advance(task)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running.values()):
                process.kill()  # what is not finished is made anew
    return failed


def _in_a_process(job: Job, running: dict[Path, subprocess.Popen[bytes]]) -> str | None:
    """Make a run in a new process, which is in ``running`` for as long as it lives; why it failed, or None."""
    job.folder.mkdir(parents=True, exist_ok=True)
    for old in (NOTE, SCORES):  # of a run that was asked for otherwise; the note first, which says that there are scores
        (job.folder / old).unlink(missing_ok=True)
    if (job.folder / MODEL).exists():  # nor are its checkpoint gone on from, its logs read, and what it left out listed
        shutil.rmtree(job.folder / MODEL)
    told = json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in asdict(job).items()})
    env = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "tasks.comparison", told]
    with (job.folder / LOG).open("w") as log, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env) as process:  # noqa: S603 (own words)
        running[job.folder] = process
        code = process.wait()
        del running[job.folder]
    if code == 0 and finished(job):
        return None
    lines = [line for line in (job.folder / LOG).read_text(errors="replace").splitlines() if line.strip()]
    return f"exit {code}: {lines[-1].strip() if lines else 'no message'}"


def _end_with_parent() -> None:
    """End this process when standard input is closed, as it is when the process that holds its other end is gone, however it went."""
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()


@dataclass(frozen=True)
class Line:
    """A recipe in the table."""

    name: str
    seeds: int
    metrics: dict[str, Interval]  # mean over seeds, interval over patients
    spread: dict[str, tuple[float, float]]  # lowest and highest seed
    validation: dict[str, float]  # mean over seeds, on the validation split
    difference: dict[str, Interval]  # from the first recipe, paired by study and seed; empty for the first
    cpu_seconds_per_1000: float  # of the whole fit, reading and validation too, for 1000 images seen in training
    peak_mb: float  # of the whole fit
    parameters: int
    training_seconds_per_1000: float = math.nan  # of the steps alone; NaN if no run logged it
    best: bool = False
    choice: float = math.nan  # what the best is chosen by


def lines_of(jobs: Sequence[Job], repeats: int = 1000) -> list[Line]:
    """The table: a line for each recipe that has a run, in the order given.

    Differences are from the first recipe over the seeds both have; there are none if it has no run. The best is chosen by the mean of those
    of ``CHOSEN_BY`` that validation has for every recipe.
    """
    made = [job for job in jobs if finished(job)]
    names = list(dict.fromkeys(job.name for job in made))
    tests = {name: {job.seed: read_scores(job.folder, "test") for job in made if job.name == name} for name in names}
    tests = {name: dict(zip(of, on_shared_rows(list(of.values())), strict=True)) for name, of in tests.items()}
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
                {} if name == jobs[0].name else _differences(tests[name], tests.get(jobs[0].name, {}), repeats),
                float(np.mean([1000 * note["cpu_seconds"] / note["images"] for note in notes])),
                float(np.max([note["peak_mb"] for note in notes])),
                int(notes[0]["parameters"]),
                float(np.mean(logged)) if (logged := _logged_seconds(notes)) else math.nan,
            )
        )
    return _chosen(lines)


def _logged_seconds(notes: Sequence[Mapping[str, Any]]) -> list[float]:
    return [one for note in notes if (one := note.get("training_seconds_per_1000")) is not None]


def _chosen(lines: Sequence[Line]) -> list[Line]:
    """The lines with what they are chosen by, and the best marked; none is if validation has nothing to choose by."""
    shared = [m for m in CHOSEN_BY if all(math.isfinite(line.validation.get(m, math.nan)) for line in lines)]
    if not shared or not lines:
        return list(lines)
    judged = [replace(line, choice=float(np.mean([line.validation[m] for m in shared]))) for line in lines]
    best = max(judged, key=lambda line: line.choice)
    return [replace(line, best=line is best) for line in judged]


def _differences(mine: Mapping[int, Scores], others: Mapping[int, Scores], repeats: int) -> dict[str, Interval]:
    seeds = sorted(mine.keys() & others.keys())
    if not seeds:
        return {}
    alike = on_shared_figures([*(mine[seed] for seed in seeds), *(others[seed] for seed in seeds)])
    if not len(alike[0].rows):
        return {}
    mine, others = dict(zip(seeds, alike[: len(seeds)], strict=True)), dict(zip(seeds, alike[len(seeds) :], strict=True))
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
    """``comparison.csv`` (a line a recipe), ``runs.csv`` (a line a run) and, if any failed or left out inputs, ``rejected.csv``."""
    ends = ("", "_low", "_high", "_n")
    header = ["recipe", "seeds", "best_on_validation", *(f"{m}{end}" for m in METRICS for end in (*ends, "_seed_min", "_seed_max"))]
    header += [f"{m}_difference{end}" for m in METRICS for end in ends[:3]] + [f"validation_{m}" for m in METRICS]
    header += ["training_seconds_per_1000_images", "fit_cpu_seconds_per_1000_images", "fit_peak_memory_mb", "parameters", "notice"]
    _write(out / TABLE, header, (_cells(line) for line in lines))
    notes = [json.loads((job.folder / NOTE).read_text()) for job in jobs if finished(job)]
    values = [(_values(read_scores(job.folder, "test")), _values(read_scores(job.folder, "val"))) for job in jobs if finished(job)]
    own = {name: name for name in ("images", "batch_size", "parameters")} | {
        "training_seconds_per_1000_images": "training_seconds_per_1000"
    }
    own |= {f"fit_{name}": name for name in ("seconds", "cpu_seconds", "peak_mb")}
    _write(
        out / RUNS,
        ["recipe", "seed", *METRICS, *(f"validation_{m}" for m in METRICS), *own],
        (
            [note["name"], note["seed"], *(_told(of.get(m)) for of in pair for m in METRICS), *(note.get(name) for name in own.values())]
            for note, pair in zip(notes, values, strict=True)
        ),
    )
    (out / REJECTED).unlink(missing_ok=True)
    bad: list[list[Any]] = [[name, "", "", "", why] for name, why in failed.items()]
    bad += [[" ".join(runs), row, study, path, why] for (row, study, path, why), runs in left_out(jobs).items()]
    if bad:
        _write(out / REJECTED, ["runs", "row", "study_id", "path", "reason"], bad)


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
    cells += [_told(line.training_seconds_per_1000), f"{line.cpu_seconds_per_1000:.2f}", f"{line.peak_mb:.0f}"]
    return [*cells, line.parameters, RESEARCH_USE]


def _told(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _write(path: Path, header: Sequence[str], rows: Iterator[list[Any]] | Any) -> None:
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(header)
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode())


@dataclass(frozen=True)
class Settings:
    """What of a recipe a comparison goes by."""

    modality: str
    batch_size: int
    accumulated: int
    manifest: str | None
    max_steps: int | None

    @property
    def per_step(self) -> int:
        """Images of a step."""
        return self.batch_size * self.accumulated


def settings(recipe: Path, options: Sequence[str] = ()) -> Settings:
    """Those of a recipe with ``options`` set, or of the resolved recipe that a fit leaves.

    Raises:
        ValueError: a recipe of several modalities, or whose table is not read as that of a comparison is.
    """
    document = _set(_recipe(recipe), options)
    data, trainer = document["data"]["init_args"], document.get("trainer") or {}
    modality = data.get("modality", "xray")
    if not isinstance(modality, str):
        raise ValueError(f"{recipe.name} trains on several modalities; what is compared is of one")
    if given := [name for name in ("columns", "splits") if data.get(name) is not None]:
        raise ValueError(
            f"{recipe.name} has {' and '.join(given)} of its own, and a comparison reads the manifest as it is; rename its columns, and "
            f"leave {' and '.join(given)} out: {' '.join(f'--set data.init_args.{name}=null' for name in given)}"
        )
    sizes = {"batch_size": data.get("batch_size", 64), "accumulate_grad_batches": trainer.get("accumulate_grad_batches") or 1}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{recipe.name}: {name} is {size!r}, expected a number from 1")
    batch_size, accumulated = sizes.values()
    return Settings(modality, batch_size, accumulated, data.get("manifest"), trainer.get("max_steps"))


def _recipe(path: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def _set(document: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """The document with ``--key.key=value`` set in it in turn, as a fit does: a mapping adds, and ``init_args`` need not be said."""
    import yaml

    for option in options:
        name, _, value = option.removeprefix("--").partition("=")
        told: Any = yaml.safe_load(value)
        for key in reversed(name.split(".")):
            told = {key: told}
        document = _merged(document, told)
    return document


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if "class_path" in old and not new.keys() & {"class_path", "init_args", "dict_kwargs"}:
        new = {"init_args": new}
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _settings_if_any(recipe: Path, options: Sequence[str]) -> Settings | None:
    """None for what is no recipe: its run says so, and costs the others nothing."""
    import yaml

    try:
        return settings(recipe, options)
    except (OSError, UnicodeError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None


def check_modalities(recipes: Sequence[Path], options: Sequence[str], manifest: Manifest | None) -> None:
    """Refuse, before anything is made, recipes that the studies are not for.

    Args:
        manifest: of the studies; None: phantoms of radiographs.
    Raises:
        ValueError: a recipe of several modalities, of one that the studies are not of, or of another than the recipe before it.
    """
    found = {recipe: one.modality for recipe in recipes if (one := _settings_if_any(recipe, options)) is not None}
    for recipe, modality in found.items():
        if manifest is None and modality != "xray":
            raise ValueError(
                f"{recipe.name} is of {modality}, and the phantoms made here are radiographs; give a --manifest; `medvl "
                "phantom DIR --studies 400 --ct --no-xray` makes one of CT, DIR/manifest.csv"
            )
        if manifest is not None and not manifest.select(split="train", modality=modality).rows:
            raise ValueError(f"{recipe.name} is of {modality}, and the manifest has no training rows of it")
    if len(set(found.values())) > 1:
        told = ", ".join(f"{recipe.name} of {modality}" for recipe, modality in found.items())
        raise ValueError(f"recipes of one modality are compared, on the same studies; these are {told}")


def reader_of(recipes: Sequence[Path], options: Sequence[str] = ()) -> tuple[str, ImageReader] | None:
    """Modality and reader of the first recipe that has one; None if none has: their runs say so."""
    for recipe in recipes:
        if (found := _settings_if_any(recipe, options)) is not None:
            spec = _set(_recipe(recipe), options)["data"]["init_args"].get("reader")
            with suppress(ConfigError):
                return found.modality, build(spec, ImageReader)  # type: ignore[type-abstract]
    return None


def _retrieved(recipe: Path) -> TextSource:
    """What stands for a report in retrieval: the whole text for a recipe that trains on whole texts, its sentences for all others."""
    spec = _recipe(recipe)["data"]["init_args"]["texts"]
    return ReportText(**spec.get("init_args", {})) if spec["class_path"].endswith(".ReportText") else ReportSentences()


def _cpu_seconds() -> float:
    """Of this process and of the workers it has had."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _peak_mb() -> float:
    """Largest resident memory of this process so far, or of the accelerator where there is one."""
    import torch

    from medvl.training.watch import memory_mb

    status = Path("/proc/self/status")
    if torch.cuda.is_available() or not status.is_file():
        return memory_mb(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024  # getrusage has the comparison's own memory in it, which this process was started from


def compare(
    recipes: Sequence[Path],
    seeds: Sequence[int],
    out: Path,
    manifest: Path,
    images: int,
    workers: int = 1,
    options: Sequence[str] = (),
    console: Console | None = None,
    synthetic: bool = False,
    anew: bool = False,
) -> tuple[list[Line], dict[str, str], LeftOut]:
    """Train, score, write the tables and the page; the lines, run -> why it failed, and the inputs that runs left out.

    Args:
        seeds: of the runs of each recipe, ascending.
        images: to be seen in training by each run; see :func:`budget` for what they are rounded to.
        workers: runs at a time.
        options: for every fit, as ``--key=value``.
        synthetic: the studies are phantoms.
        anew: make finished runs again.
    """
    from tasks.page.comparison import write_comparison

    console = console or Console(stderr=True)
    jobs = jobs_of(recipes, seeds, out, manifest, images, options)
    for job in jobs if anew else ():
        (job.folder / NOTE).unlink(missing_ok=True)
    failed = run_jobs(jobs, workers, console)
    lines = lines_of(jobs)
    write_tables(lines, jobs, failed, out)
    rows = read_manifest(manifest, strict=False).rows
    splits = {f"{split} studies": len({row.study_id for row in rows if row.split == split}) for split in ("train", "val", "test")}
    facts = {
        "images seen in training by each run": jobs[0].images,
        "validations of each run": jobs[0].checks,
        "seeds": f"{seeds[0]} to {seeds[-1]}",
        **splits,
    }
    write_comparison(out / PAGE, lines, jobs[0].name, facts, synthetic)
    return lines, failed, left_out(jobs)


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    for place in ("recipe", "folder", "manifest"):
        given[place] = Path(given[place])
    _end_with_parent()
    train_and_score(Job(**{**given, "options": tuple(given["options"])}))
