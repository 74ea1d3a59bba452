"""The trivial baseline that stands beside every result: logistic regression on a thumbnail, trained on the labels themselves.

Shapes: N training images, Q test images, T pixels of the thumbnail, F findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medvl.data.manifest import StudyImage
from medvl.metrics import MACRO, auroc_intervals
from medvl.model import DualEncoder
from medvl.types import UnreadableImageError
from tasks.evaluation import Predictions, by_unit

THUMBNAIL = 16
VOLUME_THUMBNAIL = (4, 8, 8)


@dataclass(frozen=True)
class Baseline:
    """What the thumbnail baseline says of the predicted images, and how well that does."""

    scores: NDArray[np.float64]  # (Q, F); NaN for images of the training split, unreadable ones, and findings it could not learn
    measured: dict[str, Any]  # JSON-ready: macro_auroc and per_finding, None where not defined, and how many images they rest on
    rejected: tuple[tuple[StudyImage, str], ...]  # training images that could not be read, and why


def learnable(train: Sequence[StudyImage], findings: Sequence[str]) -> tuple[str, ...]:
    """The findings that are present in one training image and absent in another."""
    return tuple(name for name in findings if {0, 1} <= {row.labels.get(name) for row in train})


def thumbnail_baseline(
    model: DualEncoder, train: Sequence[StudyImage], predictions: Predictions, *, repeats: int = 1000, seed: int = 0
) -> Baseline:
    """Train on the training images that can be read and score the predicted images, apart from those of the training split.

    Args:
        model: reads the images.
        train: rows to learn from; one that cannot be read is skipped and counted.
        predictions: whose rows and findings are scored; a unit has the mean score of its images.
        repeats, seed: of the bootstrap over patients.
    """
    small, read, rejected = _read_thumbnails(model, train)
    names = predictions.findings
    scores = np.full((len(predictions.rows), len(names)), np.nan)
    held_out = [i for i, row in enumerate(predictions.rows) if row.split != "train"]
    tested, found, _ = _read_thumbnails(model, [predictions.rows[i] for i in held_out])
    columns = [names.index(name) for name in learnable([train[i] for i in read], names)]
    if found and columns:
        labels = np.array([[train[i].labels.get(names[j], np.nan) for j in columns] for i in read], dtype=np.float64)
        scores[np.ix_([held_out[i] for i in found], columns)] = logistic_scores(small, labels, tested)
    scores = _mean_of_units(scores, by_unit(predictions.rows, predictions.unit))
    counted = predictions.counted()
    given, labels = scores[counted], predictions.labels[counted]
    truth = np.where(np.isnan(given), np.nan, labels)
    ids = [predictions.rows[i].patient_id for i in counted]
    areas = auroc_intervals(truth, np.nan_to_num(given), names, ids, repeats=repeats, seed=seed) if names else {}
    told = {name: one.to_dict() for name, one in areas.items()}
    macro = told.pop(MACRO, None) or next(iter(told.values()), {"value": None})
    per_finding = {name: one["value"] for name, one in told.items()}
    sides = VOLUME_THUMBNAIL if predictions.rows[0].modality == "ct" else (THUMBNAIL, THUMBNAIL)
    measured = {
        "what": f"logistic regression on a {' x '.join(map(str, sides))} thumbnail, trained on the labels of {len(read)} training images",
        "macro_auroc": macro["value"],
        "macro_auroc_interval": macro,
        "per_finding": per_finding,
        "per_finding_intervals": told,
        "images": len(found),
        "train_images": len(read),
        "train_rejected": len(rejected),
    }
    return Baseline(scores, measured, tuple(rejected))


def _mean_of_units(scores: NDArray[np.float64], units: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """(Q, F) scores of images to those of their units: the mean of those that there are, NaN where there are none."""
    found = np.full_like(scores, np.nan)
    for indices in map(list, units):
        own = scores[indices]
        there = ~np.isnan(own)
        found[indices] = np.where(there.any(0), np.where(there, own, 0.0).sum(0) / np.maximum(there.sum(0), 1), np.nan)
    return found


def _read_thumbnails(model: DualEncoder, rows: Sequence[StudyImage]) -> tuple[NDArray[np.float64], list[int], list[tuple[StudyImage, str]]]:
    """Thumbnails (N, T) of the rows that can be read, which rows these are, and the others with the reason."""
    small: list[NDArray[np.float64]] = []
    read: list[int] = []
    rejected: list[tuple[StudyImage, str]] = []
    for i, row in enumerate(rows):
        try:
            sample = model.read(row.path)
        except UnreadableImageError as error:  # noqa: PERF203
            rejected.append((row, str(error)))
        else:
            small.append(thumbnails(sample.pixels[None]))
            read.append(i)
    return (np.concatenate(small) if small else np.zeros((0, THUMBNAIL**2))), read, rejected


def thumbnails(pixels: Tensor) -> NDArray[np.float64]:
    """(N, C, H, W) or (N, C, S, H, W) to (N, 256): means over a grid of 16 x 16, of volumes ``VOLUME_THUMBNAIL``, of the first channel."""
    first = pixels[:, :1].float()
    small = F.adaptive_avg_pool2d(first, THUMBNAIL) if pixels.ndim == 4 else F.adaptive_avg_pool3d(first, VOLUME_THUMBNAIL)
    found: NDArray[np.float64] = small.flatten(1).double().numpy()
    return found


def logistic_scores(
    train: NDArray[np.float64], labels: NDArray[np.float64], test: NDArray[np.float64], penalty: float = 1.0, steps: int = 200
) -> NDArray[np.float64]:
    """(Q, F) scores of one logistic regression per finding, L2-penalised as scikit-learn's with C = 1 / ``penalty``.

    Args:
        train: (N, T), standardised here by its own mean and deviation.
        labels: (N, F) of 1 and 0; anything else (uncertain, not mentioned) does not count for its finding.
        test: (Q, T).
    """
    mean, deviation = train.mean(0), train.std(0) + 1e-8
    x, q = (torch.from_numpy((part - mean) / deviation) for part in (train, test))
    known = torch.from_numpy(np.isin(labels, (0, 1)))
    y = torch.from_numpy(np.where(known.numpy(), labels, 0.0))
    weight = torch.zeros(x.shape[1], labels.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(labels.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        per_image = F.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="none")
        loss = (per_image * known).sum() + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        scores: NDArray[np.float64] = (q @ weight + bias).sigmoid().numpy()
    return scores
