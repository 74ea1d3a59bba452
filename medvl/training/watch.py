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
    samples_per_second      images, of all processes, while training: without validation, with checkpoints inside an epoch
    data_share              of that time, waiting for the loader; on an accelerator, which works on meanwhile, at most so much
    memory_mb               most so far: of the accelerator where there is one, else of the process
    ======================  ==========================================================================================

    It stands last among the callbacks, so that what they do after a step (checkpoints, averaged weights) belongs to the step and is no
    waiting. What a step saw is let go of at its end: images on an accelerator are not held through the next step.
    """

    def __init__(self) -> None:
        self._last = self._ready = 0.0
        self._waited = self._worked = 0.0
        self._samples = 0
        self._logged = -1  # step
        self._places: dict[int, int] | None = None  # manifest row -> index in the training set

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, for a run that goes on inside an epoch."""
        self._last = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; what comes between epochs does not count."""
        self._last = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how long the batch was waited for."""
        self._ready = time.perf_counter()
        self._waited += self._ready - self._last

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note how long the step took; log if it is time."""
        assert isinstance(pl_module, AlignmentModule)
        self._worked += time.perf_counter() - self._ready
        seen, pl_module.observed = pl_module.observed, None
        if seen is not None:
            self._samples += len(seen.batch.positives)
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            step = trainer.global_step
            if step and step != self._logged and every and step % every == 0:  # of accumulated batches the one that steps
                self._logged = step
                self._log(trainer, pl_module, seen)
        self._last = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Let go of what the step saw."""
        assert isinstance(pl_module, AlignmentModule)
        pl_module.observed = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation inside an epoch does not count either."""
        self._last = time.perf_counter()

    def _log(self, trainer: L.Trainer, module: AlignmentModule, seen: Observed) -> None:
        total = self._waited + self._worked
        values = {
            **temperatures(module),
            **of_step(seen),
            "false_negative_share": self._false_negatives(trainer, seen),
            "samples_per_second": self._samples / total,
            "data_share": self._waited / total,
            "memory_mb": memory_mb(module.device),
        }
        module.log_dict({f"watch/{name}": float(value) for name, value in values.items()}, batch_size=len(seen.batch.positives))
        self._waited, self._worked, self._samples = 0.0, 0.0, 0

    def _false_negatives(self, trainer: L.Trainer, seen: Observed) -> float:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, StudyDataModule):
            return float("nan")
        train = data.sets["train"]
        if self._places is None:
            self._places = {image.row: i for i, image in enumerate(train.images)}
        said = {row: frozenset(one.text for one in train.sourced[self._places[row]]) for row in seen.batch.rows if row in self._places}
        return false_negative_share(seen, said)


def temperatures(module: AlignmentModule) -> dict[str, Tensor]:
    """Every learned temperature of the similarity by its name."""
    return {name: part().detach() for name, part in module.similarity.named_modules() if isinstance(part, Temperature)}


@torch.no_grad()
def of_step(seen: Observed) -> dict[str, float]:
    """What vectors and pairs of a step tell; vectors of the images that this process has, the null image left out."""
    b, m = len(seen.batch.rows), seen.pairs.shape[1]
    share = seen.batch.share
    here = b if share is None else share.items[share.rank]
    images, texts = (F.normalize(x.float(), dim=-1) for x in (seen.images[:here], seen.texts))
    positive, _, _ = seen.pairs.of_here()
    positive = positive[positive[:, 0] < here]
    rows, used, true = _counts(seen)
    return {
        "alignment": float(alignment(images, texts, positive).mean()) if len(positive) else float("nan"),
        "uniformity_images": float(uniformity(images[:LARGEST])),
        "uniformity_texts": float(uniformity(texts[:LARGEST])),
        "gap": float((images.mean(0) - texts.mean(0)).norm()),
        "positives_per_image": true / max(1, rows),
        "texts": float(m),
        "ignored_share": 1 - used / max(1, b * m),
    }


def _counts(seen: Observed) -> tuple[int, int, int]:
    """Images in use, the pairs of theirs that the loss sees, and the positive ones of these; without the null image."""
    b, pairs = len(seen.batch.rows), seen.pairs
    rows, columns = int(pairs.used_rows[:b].sum()), int(pairs.used_columns.sum())
    true, ignored = (int((found[:, 0] < b).sum()) for found in (pairs.positive, pairs.ignored))
    return rows, rows * columns - ignored, true


def false_negative_share(seen: Observed, said: dict[int, frozenset[str]]) -> float:
    """Of the pairs counted negative, those whose text is one of the study's own.

    Args:
        said: manifest row of an item's first image -> all texts of its report.
    """
    texts, pairs = seen.batch.texts.texts, seen.pairs
    column = {text: j for j, text in enumerate(texts)}
    found = [(i, column[text]) for i, row in enumerate(seen.batch.rows) for text in said.get(row, frozenset()) & column.keys()]
    own = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
    own = own[pairs.used_rows.cpu()[own[:, 0]] & pairs.used_columns.cpu()[own[:, 1]]]
    known = torch.cat([pairs.positive, pairs.ignored]).cpu()
    wrong = int((~torch.isin(own[:, 0] * len(texts) + own[:, 1], known[:, 0] * len(texts) + known[:, 1])).sum())
    _, used, true = _counts(seen)
    return wrong / (used - true) if used > true else 0.0


def memory_mb(device: torch.device) -> float:
    """The most memory that was in use so far, in MiB: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)
