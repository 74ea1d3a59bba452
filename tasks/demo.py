"""The main job on data that needs no download: phantoms, training, evaluation on held-out patients, and a page to look at.

``OUT`` gets data/ (a phantom folder), model/ (what :func:`medvl.load` reads, with its card), results.json, predictions.csv,
retrieval.csv and report.html.
Figures of CT stand in results.json under ``ct``. With both kinds of image, all but the page, results.json and the model that reads both
lies in OUT/xray and OUT/ct; the CT tower is trained against the report tower that came of the radiographs, which stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

import medvl
from medvl.data.manifest import Manifest, StudyImage, read_manifest
from medvl.files import write_atomically
from medvl.model import CONFIG, WEIGHTS, DualEncoder, load
from medvl.types import FINDINGS, RESEARCH_USE
from reports.prompts import PromptSet, load_prompts
from reports.text_source import ReportSentences
from tasks.baseline import Baseline, thumbnail_baseline
from tasks.card import RESULTS, write_card
from tasks.evaluation import Predictions, predict, results, write
from tasks.grounding import Grounder, finding_query
from tasks.grounding.calibration import calibrate_maps
from tasks.grounding.evaluation import of_manifest
from tasks.grounding.thresholds import place_of
from tasks.joint import join_models
from tasks.leaks import LeakCheck, Others, check_leaks, images_to_read
from tasks.page import DemoPage, Part, page_part, page_title, write_page
from tasks.protocols import EvaluationProtocol, ScoreProtocol
from tasks.scoring import preset

RESOLVED = "config.yaml"
TRAINING = "training.json"
"""What the model in the folder was, or is being, trained on; so that a second demo in one folder never tests a model on its own studies."""
SHARED = ["report", "similarity"]
"""Parts of the model that the second kind of image takes from the first."""
CT_SEED = 2**31
"""Added to the seed of the CT phantoms, so that no patient of theirs is one of the radiographs', in whatever split."""
BASELINE_STUDIES = {"ct": 300}
"""Of the training studies, how many the thumbnail baseline learns from where reading all of them again would take minutes."""

Modality = Literal["xray", "ct"]


@dataclass(frozen=True)
class DemoSize:
    """How much the demo makes and trains of one kind of image."""

    train: int
    val: int
    test: int
    epochs: int
    pixels: int = 128


SIZES: dict[Modality, DemoSize] = {
    "xray": DemoSize(train=4000, val=200, test=500, epochs=13),
    "ct": DemoSize(train=900, val=48, test=200, epochs=7, pixels=96),
}
RECIPES: dict[Modality, str] = {"xray": "xray_phantom.yaml", "ct": "ct_slices.yaml"}


@dataclass(frozen=True)
class _Half:
    """The demo of one kind of image."""

    modality: Modality
    folder: Path
    size: DemoSize
    seed: int
    seconds: dict[str, float]
    console: Console

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it and note how long it took."""
        start = time.monotonic()
        self.console.print(f"[bold]{self.modality}: {name}[/bold]")
        value = work()
        self.seconds[name] = round(time.monotonic() - start, 1)
        return value

    @property
    def model(self) -> Path:
        """Folder of the run."""
        return self.folder / "model"


def recipe_path(name: str) -> Path:
    """A recipe that comes with the package."""
    return Path(str(importlib.resources.files("tasks") / "recipes" / name))


def run_demo(
    out: Path,
    seed: int = 0,
    sizes: Mapping[Modality, DemoSize] | None = None,
    console: Console | None = None,
    modalities: tuple[Modality, ...] = ("xray",),
) -> dict[str, Any]:
    """Make phantoms, train on them, evaluate on held-out patients, write the page; what is done already is kept, so a stopped demo goes on.

    Returns:
        What ``results.json`` holds.
    """
    sizes, console = {**SIZES, **(sizes or {})}, console or Console(stderr=True)
    several = len(modalities) > 1
    halves = [_Half(name, out / name if several else out, sizes[name], seed, {}, console) for name in modalities]
    tables = [_prepare(half, halves[0].model if half is not halves[0] else None) for half in halves]
    model = join_models(*(load(half.model) for half in halves)) if several else load(out / "model")
    if several:
        for name in (TRAINING, RESOLVED):  # of a demo of one kind that was here before
            (out / "model" / name).unlink(missing_ok=True)
        model.save(out / "model", joined={half.modality: json.loads((half.model / CONFIG).read_text())["provenance"] for half in halves})
        model = load(out / "model")
    found = {half.modality: _measure(half, model, table, out / "model") for half, table in zip(halves, tables, strict=True)}
    write_page(out / "report.html", DemoPage(page_title(modalities), tuple(part for _, part in found.values())))
    measured = dict(found["xray"][0]) if "xray" in found else {"notice": RESEARCH_USE}
    measured |= {"ct": found["ct"][0]} if "ct" in found else {}
    write_atomically(out / RESULTS, (json.dumps(measured, indent=2, allow_nan=False) + "\n").encode())
    write_card(out / "model", out / RESULTS)
    return measured


def _prepare(half: _Half, base: Path | None) -> Path:
    """Phantoms, and a run trained on them; their manifest."""
    table: Path = half.timed("phantoms", lambda: _phantoms(half))
    half.timed("training", lambda: _train(half, table, base))
    return table


def _measure(half: _Half, model: DualEncoder, table: Path, folder: Path) -> tuple[dict[str, Any], Part]:
    """Evaluate the model of ``folder`` on the half's held-out studies: what results.json has of it, and its part of the page."""
    manifest = read_manifest(table)
    prompts = load_prompts()
    test = manifest.select(split="test", modality=half.modality).rows
    half.timed("thresholds of maps", lambda: _map_thresholds(half, model, manifest, prompts, folder))
    leaks: LeakCheck = half.timed("leak check", lambda: _leaks(half, model, manifest, test))
    predictions: Predictions = half.timed("evaluation", lambda: _predict(model, test, prompts, half.console))
    train = manifest.select(split="train", modality=half.modality).rows[: BASELINE_STUDIES.get(half.modality)]
    baseline: Baseline = half.timed("baseline", lambda: thumbnail_baseline(model, train, predictions, seed=half.seed))
    predictions = replace(predictions, baseline=baseline.scores)
    size, config = half.size, json.loads((folder / CONFIG).read_text())
    found = results(predictions, seed=half.seed)
    measured = {
        **found,
        "protocol": _protocol(half, model, config["weights_sha256"], prompts, predictions, manifest, found["interval"]["repeats"]),
        "baseline": baseline.measured,
        "leak_check": leaks.as_dict(),
        "facts": {
            "data": "synthetic",
            "medvl": medvl.__version__,
            "seed": half.seed,
            "studies": {"train": size.train, "val": size.val, "test": size.test},
            "epochs": size.epochs,
            "prompts": {"version": prompts.version, "sha256": prompts.sha256},
            "manifest_sha256": manifest.sha256,
            "weights_sha256": config["weights_sha256"],
            "model": config["provenance"],
            "seconds": half.seconds,
        },
    }
    write(predictions, measured, half.folder)
    part: Part = half.timed(
        "page",
        lambda: page_part(
            modality=half.modality,
            model=model,
            predictions=predictions,
            results=measured,
            baseline=measured["baseline"],
            facts=measured["facts"],
        ),
    )
    return measured, part


def _protocol(
    half: _Half, model: DualEncoder, weights: str, prompts: PromptSet, predictions: Predictions, manifest: Manifest, repeats: int
) -> dict[str, Any]:
    """That of the figures: what ``medvl evaluate --protocol phantom`` records of the same."""
    return EvaluationProtocol(
        score=ScoreProtocol.of(weights, model.reader, prompts, preset("medvl"), predictions.findings, None),
        findings=predictions.findings,
        manifest_sha256=manifest.sha256,
        split="test",
        split_source=manifest.split_source,
        modality=half.modality,
        unit=predictions.unit,
        texts=predictions.texts,
        decisions_sha256=None,
        repeats=repeats,
        seed=half.seed,
        name="phantom" if half.modality == "xray" else None,
    ).as_dict()


def _leaks(half: _Half, model: DualEncoder, manifest: Manifest, test: tuple[StudyImage, ...]) -> LeakCheck:
    """What the test studies share with those of training and validation. Volumes are not compared: reading all again takes minutes."""
    seen = Others.of("the demo's table", manifest, "test")
    images = half.modality == "xray"
    with Progress(console=half.console, transient=True) as progress:
        task = progress.add_task("images", total=images_to_read(test, [seen]) if images else None)
        found = check_leaks(
            *(test, [seen], model.reader), trained_on=manifest.sha256, images=images, progress=lambda done: progress.advance(task, done)
        )
    if refused := found.refused(()):
        raise ValueError(f"test phantoms share with those of training: {refused}; give another seed")
    return found


def _map_thresholds(half: _Half, model: DualEncoder, manifest: Manifest, prompts: PromptSet, folder: Path) -> None:
    """Levels of maps from the validation studies, beside the model, so that grounding says found or not found."""
    rows = manifest.select(split="val", modality=half.modality).rows
    names = [name for name in FINDINGS if name in prompts.findings]
    grounder = Grounder(model, [finding_query(name, prompts) for name in names])
    weights = json.loads((folder / CONFIG).read_text())["weights_sha256"]
    facts = {"split": "val", "manifest_sha256": manifest.sha256}
    try:
        fitted, _ = calibrate_maps(
            grounder, of_manifest(rows, names), weights, half.modality, fitted_on=facts, prompts_sha256=prompts.sha256
        )
    except ValueError as error:  # a look of a few studies, not a result
        half.console.print(f"no thresholds of maps: {error}")
        return
    fitted.save(place_of(folder, grounder.settings, half.modality))


def _phantoms(half: _Half) -> Path:
    from tasks.phantoms import write_cohort

    size = half.size
    total = size.train + size.val + size.test
    with Progress(console=half.console, transient=True) as progress:
        task = progress.add_task("studies", total=total)
        return write_cohort(
            half.folder / "data",
            total,
            half.seed + (CT_SEED if half.modality == "ct" else 0),
            size=size.pixels,
            ct=half.modality == "ct",
            xray=half.modality == "xray",
            counts={"train": size.train, "val": size.val, "test": size.test},
            progress=lambda done: progress.advance(task, done),
        )


def _train(half: _Half, table: Path, base: Path | None) -> None:
    """Train, or go on with a training that was stopped; one that was of other data, another recipe or another length is thrown away.

    Args:
        base: a run whose report tower and similarity are taken and kept as they are; None trains all parts.
    """
    from medvl.training.callbacks import RESUME
    from medvl.training.cli import run

    recipe, folder = recipe_path(RECIPES[half.modality]), half.model
    note = folder / TRAINING
    found = json.loads(note.read_text()) if note.is_file() else {}
    precision = found.get("precision") or fastest_precision()  # a training that goes on keeps its own
    asked = {
        "manifest_sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
        "recipe_sha256": hashlib.sha256(recipe.read_bytes()).hexdigest(),
        "medvl": medvl.__version__,
        "seed": half.seed,
        "epochs": half.size.epochs,
        "precision": precision,
        "base_sha256": None if base is None else hashlib.sha256((base / WEIGHTS).read_bytes()).hexdigest(),
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
        "seed_everything": half.seed,
        "out": folder,
        "resume": "true",
        "trainer.max_epochs": half.size.epochs,
        "trainer.precision": precision,
        "data.init_args.manifest": table,
        "data.init_args.seed": half.seed,
        "model.seed": half.seed,
    }
    if base is not None:
        specs = json.loads((base / CONFIG).read_text())["model"]
        arguments |= {f"model.{name}": json.dumps(specs[name]) for name in SHARED}
        arguments |= {"model.start": json.dumps({name: str(base) for name in SHARED}), "model.locked": json.dumps(SHARED)}
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
