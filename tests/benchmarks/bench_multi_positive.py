"""All sentences of a report as positives against one drawn at random per image and epoch: same towers, data, steps, three seeds.

    python tests/benchmarks/bench_multi_positive.py --out bench --studies 1700 --epochs 4

Prints one row per run and the paired difference. The two differ in `sentences_per_image` alone; images seen and steps are equal.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

METRICS = {
    "AUROC": ("zero_shot", "macro_auroc"),
    "pointing": ("grounding", "pointing_game_macro"),
    "Recall@10": ("retrieval", "image_to_report", "recall_at_10"),
}


def measure(cohort: Path, folder: Path, seed: int, epochs: int, sentences: int | None) -> dict[str, float]:
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
        "data.init_args.sentences_per_image": "null" if sentences is None else sentences,
        "model.seed": seed,
        "keep_best": "false",
    }
    start = time.perf_counter()
    run("fit", [f"--{name}={value}" for name, value in arguments.items()])
    seconds = time.perf_counter() - start
    rows = read_manifest(cohort).select(split="test", modality="xray").rows
    measured = results(predict(load(folder), rows, load_prompts(), ReportSentences()), repeats=0)
    found = {"training s": seconds}
    for name, keys in METRICS.items():
        value = measured
        for key in keys:
            value = value[key]
        found[name] = float(value)
    return found


def main() -> None:
    """Make the cohort, train 2 x seeds models, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--studies", type=int, default=1700)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    from tasks.phantoms import write_cohort

    test = max(20, chosen.studies // 6)
    counts = {"train": chosen.studies - test - test // 4, "val": test // 4, "test": test}
    cohort = write_cohort(chosen.out / "data", chosen.studies, 100, counts=counts)
    found: dict[str, list[dict[str, float]]] = {"all sentences": [], "one sentence": []}
    for seed in range(chosen.seeds):
        for name, sentences in (("all sentences", None), ("one sentence", 1)):
            found[name].append(measure(cohort, chosen.out / f"{name.split()[0]}{seed}", seed, chosen.epochs, sentences))
    (chosen.out / "table.json").write_text(json.dumps(found, indent=2))
    table = Table("positives", "seed", *METRICS, "training s", title=f"{counts}, {chosen.epochs} epochs")
    for name, runs in found.items():
        for seed, one in enumerate(runs):
            table.add_row(name, str(seed), *(f"{one[metric]:.3f}" for metric in METRICS), f"{one['training s']:.0f}")
    for metric in METRICS:
        difference = np.array([a[metric] - b[metric] for a, b in zip(*found.values(), strict=True)])
        table.add_row("difference", metric, *(f"{difference.mean():+.3f}" if metric == column else "" for column in METRICS), "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
