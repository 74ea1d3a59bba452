"""The main job on data that needs no download: phantoms, training, evaluation on held-out patients, and a page to look at.

``OUT`` gets data/ (a phantom folder), model/ (what :func:`medvl.load` reads, with its card), results.json, predictions.csv,
retrieval.csv and report.html.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import medvl
from medvl.data.manifest import StudyImage, read_manifest
from medvl.model import CONFIG, WEIGHTS, DualEncoder, load, write_atomically
from reports.prompts import PromptSet, load_prompts
from reports.text_source import ReportSentences
from tasks.baseline import Baseline, thumbnail_baseline
from tasks.card import RESULTS, write_card
from tasks.evaluation import Predictions, predict, results, write

RECIPE = "xray_phantom.yaml"
TRAINING = "training.json"
"""What the model in the folder was, or is being, trained on; so that a second demo in one folder never tests a model on its own studies."""
TRAIN_STUDIES, VAL_STUDIES, TEST_STUDIES = 4000, 200, 500
EPOCHS = 13


@dataclass(frozen=True)
class DemoSize:
    """How much the demo makes and trains."""

    train: int = TRAIN_STUDIES
    val: int = VAL_STUDIES
    test: int = TEST_STUDIES
    epochs: int = EPOCHS
    pixels: int = 128


def recipe_path(name: str) -> Path:
    """A recipe that comes with the package."""
    return Path(str(importlib.resources.files("tasks") / "recipes" / name))


def run_demo(out: Path, seed: int = 0, size: DemoSize | None = None, console: Console | None = None) -> dict[str, Any]:
    """Make phantoms, train on them, evaluate on held-out patients, write the page; what is done already is kept, so a stopped demo goes on.

    Returns:
        What ``results.json`` holds.
    """
    size, console = size or DemoSize(), console or Console(stderr=True)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.monotonic()
        console.print(f"[bold]{name}[/bold]")
        value = work()
        seconds[name] = round(time.monotonic() - start, 1)
        return value

    table = timed("phantoms", lambda: _phantoms(out / "data", seed, size, console))
    timed("training", lambda: _train(table, out / "model", seed, size))
    model = load(out / "model")
    manifest = read_manifest(table)
    prompts = load_prompts()
    test = manifest.select(split="test", modality="xray").rows
    predictions: Predictions = timed("evaluation", lambda: _predict(model, test, prompts, console))
    train = manifest.select(split="train", modality="xray").rows
    baseline: Baseline = timed("baseline", lambda: thumbnail_baseline(model, train, predictions))
    predictions = replace(predictions, baseline=baseline.scores)
    config = json.loads((out / "model" / CONFIG).read_text())
    measured = {
        **results(predictions, seed=seed),
        "baseline": baseline.measured,
        "facts": {
            "data": "synthetic",
            "medvl": medvl.__version__,
            "seed": seed,
            "studies": {"train": size.train, "val": size.val, "test": size.test},
            "epochs": size.epochs,
            "prompts": {"version": prompts.version, "sha256": prompts.sha256},
            "manifest_sha256": manifest.sha256,
            "weights_sha256": config["weights_sha256"],
            "model": config["provenance"],
            "seconds": seconds,
        },
    }
    write(predictions, measured, out)
    timed("page", lambda: _page(out / "report.html", model, predictions, measured))
    write_atomically(out / RESULTS, (json.dumps(measured, indent=2, allow_nan=False) + "\n").encode())
    write_card(out / "model", out / RESULTS)
    return measured


def _phantoms(folder: Path, seed: int, size: DemoSize, console: Console) -> Path:
    from tasks.phantoms import write_cohort

    total = size.train + size.val + size.test
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("studies", total=total)
        return write_cohort(
            folder,
            total,
            seed,
            size=size.pixels,
            counts={"train": size.train, "val": size.val, "test": size.test},
            progress=lambda done: progress.advance(task, done),
        )


def _train(table: Path, folder: Path, seed: int, size: DemoSize) -> None:
    """Train, or go on with a training that was stopped; one that was of other data, another recipe or another length is thrown away."""
    from medvl.training.callbacks import RESUME
    from medvl.training.cli import run

    recipe = recipe_path(RECIPE)
    note = folder / TRAINING
    found = json.loads(note.read_text()) if note.is_file() else {}
    precision = found.get("precision") or fastest_precision()  # a training that goes on keeps its own
    asked = {
        "manifest_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
        "recipe_sha256": hashlib.sha256(recipe.read_bytes()).hexdigest(),
        "medvl": medvl.__version__,
        "seed": seed,
        "epochs": size.epochs,
        "precision": precision,
    }
    if found == {**asked, "finished": True}:
        return
    if found != {**asked, "finished": False}:
        for name in (RESUME, CONFIG, WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(note, json.dumps({**asked, "finished": False}).encode())
    arguments = {
        "config": recipe,
        "seed_everything": seed,
        "out": folder,
        "resume": "true",
        "trainer.max_epochs": size.epochs,
        "trainer.precision": precision,
        "data.init_args.manifest": table,
        "data.init_args.seed": seed,
        "model.seed": seed,
    }
    run("fit", [f"--{name}={value}" for name, value in arguments.items()])
    write_atomically(note, json.dumps({**asked, "finished": True}).encode())


def fastest_precision() -> str:
    """bf16 autocast where it trains faster than float32: on CUDA that has it; on a CPU a convolution like the recipe's tells in a moment.

    Flags do not tell: a processor that announces AVX-512 bf16 was seen to train 1.6 times slower with it.
    """
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return "32-true"
    return "bf16-mixed" if _seconds_of_convolution(True) < 0.9 * _seconds_of_convolution(False) else "32-true"


def _seconds_of_convolution(bf16: bool, repeats: int = 7) -> float:
    """Least time of a forward and backward pass through the middle of the recipe's trunk."""
    nn = torch.nn
    trunk = nn.Sequential(nn.Conv2d(48, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1))
    image = torch.zeros(16, 48, 32, 32).contiguous(memory_format=torch.channels_last)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = trunk(image)
        found.float().sum().backward()
        times.append(time.perf_counter() - start)
    return min(times)


def _predict(model: DualEncoder, rows: tuple[StudyImage, ...], prompts: PromptSet, console: Console) -> Predictions:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("test images", total=len(rows))
        return predict(model, rows, prompts, ReportSentences(), progress=lambda done: progress.advance(task, done))


def _page(path: Path, model: DualEncoder, predictions: Predictions, measured: dict[str, Any]) -> None:
    from tasks.page import build_demo_page

    build_demo_page(path, model=model, predictions=predictions, results=measured, baseline=measured["baseline"], facts=measured["facts"])
