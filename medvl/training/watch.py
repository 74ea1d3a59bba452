"""What a run tells of itself while it trains, beside its losses.

Shapes: B images, M texts.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from medvl.losses.terms import alignment, uniformity
from medvl.nn.similarity import Temperature
from medvl.training.data import StudyDataModule
from medvl.training.module import AlignmentModule, Observed

LARGEST = 512
"""Vectors that uniformity is taken of."""


class Watch(Callback):
    """Log, every ``log_every_n_steps`` of the trainer, under ``watch/``:

    ======================  ==========================================================================================
    temperatures            every learned temperature and sharpness of the similarity, by its name
    alignment               mean squared distance of positive pairs (arXiv:2005.10242)
    uniformity_images,      log mean exp(-2 |x - y|^2) over pairs (the same source), of at most 512
    uniformity_texts
    gap                     distance between the mean unit image and the mean unit text (arXiv:2203.02053)
    positives_per_image     positive texts of an image, on average
    texts                   different texts of the batch
    ignored_share           of all pairs, those left out of the loss
    false_negative_share    of the pairs counted negative, those whose text stands in the study's own report but was not drawn for it
    samples_per_second      images, of all processes
    data_share              of the time, waiting for the loader
    memory_mb               most so far: of the accelerator where there is one, else of the process
    ======================  ==========================================================================================
    """

    def __init__(self) -> None:
        self._last = self._ready = 0.0
        self._waited = self._worked = 0.0
        self._samples = 0
        self._said: dict[int, frozenset[str]] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how long the batch was waited for."""
        self._ready = time.perf_counter()
        self._waited += self._ready - self._last

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note how long the step took; log if it is time."""
        assert isinstance(pl_module, AlignmentModule)
        now = time.perf_counter()
        self._worked, self._last = self._worked + now - self._ready, now
        seen = pl_module.observed
        if seen is None:
            return
        self._samples += len(seen.batch.positives)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every and not trainer.is_last_batch:
            return
        total = self._waited + self._worked
        values = {
            **temperatures(pl_module),
            **of_step(seen),
            "false_negative_share": self._false_negatives(trainer, seen),
            "samples_per_second": self._samples / total,
            "data_share": self._waited / total,
            "memory_mb": memory_mb(pl_module.device),
        }
        pl_module.log_dict({f"watch/{name}": float(value) for name, value in values.items()}, batch_size=len(seen.batch.positives))
        self._waited, self._worked, self._samples = 0.0, 0.0, 0

    def _false_negatives(self, trainer: L.Trainer, seen: Observed) -> float:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, StudyDataModule):
            return float("nan")
        if self._said is None:
            train = data.sets["train"]
            self._said = {train.images[i].row: frozenset(train.texts[i]) for i in range(len(train.images))}
        return false_negative_share(seen, self._said)


def temperatures(module: AlignmentModule) -> dict[str, Tensor]:
    """Every learned temperature of the similarity by its name."""
    return {name: part().detach() for name, part in module.similarity.named_modules() if isinstance(part, Temperature)}


@torch.no_grad()
def of_step(seen: Observed) -> dict[str, float]:
    """What vectors and pairs of a step tell; vectors of the images that this process has."""
    images, texts = (F.normalize(x.float(), dim=-1) for x in (seen.images, seen.texts))
    positive, _, _ = seen.pairs.of_here()
    b, m = seen.pairs.shape
    return {
        "alignment": float(alignment(images, texts, positive).mean()) if len(positive) else float("nan"),
        "uniformity_images": float(uniformity(images[:LARGEST])),
        "uniformity_texts": float(uniformity(texts[:LARGEST])),
        "gap": float((images.mean(0) - texts.mean(0)).norm()),
        "positives_per_image": len(seen.pairs.positive) / max(1, b),
        "texts": float(m),
        "ignored_share": len(seen.pairs.ignored) / max(1, b * m),
    }


def false_negative_share(seen: Observed, said: dict[int, frozenset[str]]) -> float:
    """Of the pairs counted negative, those whose text is one of the study's own.

    Args:
        said: manifest row of an item's first image -> all texts of its report.
    """
    b, m = len(seen.batch.rows), len(seen.batch.texts.texts)
    counted = torch.zeros(max(b, seen.pairs.shape[0]), m, dtype=torch.bool)
    for pairs in (seen.pairs.positive, seen.pairs.ignored):
        counted[pairs[:, 0].cpu(), pairs[:, 1].cpu()] = True
    column = {text: j for j, text in enumerate(seen.batch.texts.texts)}
    wrong = 0
    for i, row in enumerate(seen.batch.rows):
        own = [column[text] for text in said.get(row, frozenset()) & column.keys()]
        wrong += int((~counted[i, own]).sum())
    negatives = int((~counted[:b]).sum())
    return wrong / negatives if negatives else 0.0


def memory_mb(device: torch.device) -> float:
    """The most memory that was in use so far, in MiB: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)
