"""How well an image tower and a report tower match before they are trained together, from paired studies.

Shapes: N studies, one of each patient; P and Q widths of the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from medvl.data.manifest import StudyImage
from medvl.metrics import bootstrap_interval, mean_statistic
from medvl.model import PARTS, DualEncoder, batches, build, load_part
from medvl.nn.match import (
    Chance,
    cka_by_chance,
    cka_interval,
    debiased_linear_cka,
    linear_cka,
    mutual_neighbours,
    mutual_neighbours_by_chance,
)
from medvl.types import (
    ImageBatch,
    ImageEncoder,
    ImageReader,
    ImageSample,
    ReportEncoder,
    TextBatch,
    TextSource,
    UnreadableImageError,
)
from modalities.xray.backbone import BackboneEncoder
from reports.towers.trunk import TrunkReportEncoder

Features = NDArray[np.float32]


@dataclass(frozen=True)
class Towers:
    """The two towers, and the functions that give what is compared."""

    reader: ImageReader
    image: Callable[[Sequence[ImageSample]], Tensor]  # (I, P)
    text: Callable[[Sequence[str]], Tensor]  # (M, Q)


@dataclass(frozen=True)
class Pairs:
    """Features of studies, row by row the image and the report of the same one, in random order."""

    image: Features  # (N, P)
    text: Features  # (N, Q)
    rejected: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # path, why


def trained_towers(model: DualEncoder) -> Towers:
    """The embeddings of a run, as its similarity takes them."""
    device = model.device
    return Towers(
        model.reader,
        lambda samples: model.image(model.reader.collate(samples).to(device)).pooled,
        lambda texts: model.report(TextBatch(tuple(texts))).pooled,
    )


def untrained_towers(recipe: Path, device: torch.device | str = "cpu") -> Towers:
    """The towers of a recipe before the layers that training would add: no projection at random stands between.

    Raises:
        FileNotFoundError: no such recipe, or weights that it names are absent.
        ValueError: a recipe without these parts, or one that cannot be made.
    """
    if not recipe.is_file():
        raise FileNotFoundError(f"recipe {recipe}: no such file")
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    try:
        model, reader = written["model"], written["data"]["init_args"]["reader"]
        image = cast("ImageEncoder", build(model["image"], PARTS["image"]))
        report = cast("ReportEncoder", build(model["report"], PARTS["report"]))
        made = cast("ImageReader", build(reader, PARTS["reader"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"recipe {recipe}: expected model.image, model.report and data.init_args.reader, lacks {error}") from error
    for name, part in (("image", image), ("report", report)):
        if folder := (model.get("start") or {}).get(name):
            load_part(part, name, Path(folder))
        part.to(device).eval()
    return Towers(made, lambda samples: image_trunk(image, made.collate(samples).to(device)), lambda texts: report_trunk(report, texts))


def image_trunk(tower: ImageEncoder, batch: ImageBatch) -> Tensor:
    """(I, P): pooled features of the tower inside, before projections and layers over it; of another tower its pooled vector."""
    while isinstance(inner := getattr(tower, "backbone", None), ImageEncoder):
        tower = inner
    return tower.features(batch.pixels)[0] if isinstance(tower, BackboneEncoder) else tower(batch).pooled


def report_trunk(tower: ReportEncoder, texts: Sequence[str]) -> Tensor:
    """(M, Q): what the text model gives before a head; of another tower its pooled vector."""
    if isinstance(tower, TrunkReportEncoder) and tower.attend is None:
        return tower.trunk_embeddings(texts)
    return tower(TextBatch(tuple(texts))).pooled


def chosen(rows: Sequence[StudyImage], source: TextSource, most: int, seed: int = 0) -> list[tuple[StudyImage, tuple[str, ...]]]:
    """At most ``most`` patients in random order, of each one image with the texts of its report; those without a text are left out."""
    patients: dict[str, list[tuple[StudyImage, tuple[str, ...]]]] = {}
    for row in rows:
        if texts := source.texts(row.report, row.findings, row.impression):
            patients.setdefault(row.patient_id, []).append((row, texts))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(patients))[:most]
    names = sorted(patients)
    return [patients[names[i]][int(rng.integers(len(patients[names[i]])))] for i in order]


@torch.inference_mode()
def paired_features(
    towers: Towers,
    studies: Sequence[tuple[StudyImage, tuple[str, ...]]],
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> Pairs:
    """Features of both sides. A report of several texts is the mean of their unit vectors. Images that cannot be read are left out."""
    kept: list[tuple[str, ...]] = []
    rejected: list[tuple[str, str]] = []
    found: list[Tensor] = []
    for part in batches(studies, batch_size):
        read: list[ImageSample] = []
        for row, texts in part:
            sample = _read(towers.reader, row.path)
            if isinstance(sample, str):
                rejected.append((str(row.path), sample))
            else:
                read.append(sample)
                kept.append(texts)
        if read:
            found.append(towers.image(read).float().cpu())
        progress(len(part))
    different = list(dict.fromkeys(text for texts in kept for text in texts))
    vectors = [towers.text(part).float().cpu() for part in batches(different, 8 * batch_size)]
    if not found:
        return Pairs(np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32), tuple(rejected))
    unit = torch.nn.functional.normalize(torch.cat(vectors), dim=-1)
    place = {text: i for i, text in enumerate(different)}
    means = torch.stack([unit[[place[text] for text in texts]].mean(0) for texts in kept])
    return Pairs(torch.cat(found).numpy(), means.numpy(), tuple(rejected))


def _read(reader: ImageReader, path: Path) -> ImageSample | str:
    """The image, or why it cannot be read."""
    try:
        return reader.read(path)
    except UnreadableImageError as error:
        return str(error)


def match(pairs: Pairs, k: int = 10, repeats: int = 200, seed: int = 0) -> dict[str, Any]:
    """Both measures with intervals and with what they are by chance, ready for strict JSON.

    Raises:
        ValueError: too few studies: fewer than 8, or than k + 1.
    """
    n = len(pairs.image)
    if n < max(8, k + 1):
        raise ValueError(f"{n} paired studies; expected at least {max(8, k + 1)} of as many patients (k is {k})")
    low, high = cka_interval(pairs.image, pairs.text)
    shared = mutual_neighbours(pairs.image, pairs.text, k)
    knn = bootstrap_interval(mean_statistic(shared), np.arange(n), repeats=1000, seed=seed)
    return {
        "n": n,
        "image_width": pairs.image.shape[1],
        "text_width": pairs.text.shape[1],
        "cka": {
            "value": _json(debiased_linear_cka(pairs.image, pairs.text)),
            "ci_low": _json(low),
            "ci_high": _json(high),
            "biased": _json(linear_cka(pairs.image, pairs.text)),
            "chance": _told(cka_by_chance(pairs.image, pairs.text, repeats, seed)),
        },
        "mutual_knn": {
            "value": knn.value,
            "ci_low": knn.ci_low,
            "ci_high": knn.ci_high,
            "k": k,
            "chance": _told(mutual_neighbours_by_chance(pairs.image, pairs.text, k, repeats, seed)),
        },
        "permutations": repeats,
    }


def _told(chance: Chance) -> dict[str, float | None]:
    return {name: _json(value) for name, value in asdict(chance).items()}


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value
