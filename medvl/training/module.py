"""The Lightning module that aligns two towers, and nothing that inference needs.

Shapes: B images, M different texts of the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from medvl.data.studies import StudyBatch
from medvl.losses import FeatureMimic, Objective, Pairs, Term, TermContext, pairs_of
from medvl.losses.ranks import largest_over_ranks, texts_of_ranks
from medvl.model import DualEncoder, load, load_part
from medvl.training.data import StudyDataModule
from medvl.training.passes import encode_images, encode_texts
from medvl.training.sharding import apart, average_gradients, clip_norm, shard
from medvl.training.stages import layer_decay_groups
from medvl.types import ImageEncoder, ImageFeatures, ImageReader, ReportEncoder, Similarity, TextFeatures


@dataclass(frozen=True)
class Observed:
    """What the last step saw, for those who watch."""

    images: Tensor  # (b, D) vectors of the images here, without gradient
    texts: Tensor  # (M, D) of all texts
    pairs: Pairs
    batch: StudyBatch


class AlignmentModule(L.LightningModule):
    """Align an image tower with a report tower under a contrastive objective over a similarity.

    Args:
        image, report, similarity: the parts of the :class:`medvl.model.DualEncoder` that is trained.
        loss: the objective.
        learning_rate: peak of AdamW's rate, after linear warm-up, before a half cosine down to ``final_rate`` of it.
        weight_decay: on matrices only; biases, norms and temperatures are not decayed.
        warmup: fraction of all steps.
        final_rate: fraction of the peak that the cosine ends at.
        seed: of everything drawn inside a step (dropout), joined with the step and the rank, so that a resumed run draws the same.
        start: part (image, report, similarity) -> folder of the run whose weights a fit starts with; not asked for again when it is
            resumed, validated or tested.
        locked: parts that are not trained. An image tower trained against the locked report tower and similarity of another run comes
            to lie in that run's space (locked-text tuning, after LiT, arXiv:2111.07991, which locks the images).
        null_target: learn a null image beside the images of each batch: the one positive of texts without visual content
            (``null_texts`` of the batch), a negative of every other. It is no part of the model that is saved.
        micro_batch: studies encoded at once, where the batch under the loss is larger: its parts are encoded twice, the second time with
            gradients (:mod:`medvl.training.passes`). None: the whole batch at once.
        terms: name -> what is added to the objective in training, each with a weight of its own. They are no part of the model that is
            saved, and validation is by the objective alone.
        teacher: folder of a finished run whose features a :class:`medvl.losses.FeatureMimic` follows; it must take the same images.
        layer_decay: factor on the learning rate from a layer of a tower to the one below (:func:`medvl.training.stages.layer_rates`).
    Raises:
        ValueError: towers of different width, a name that is no part, a ``micro_batch`` below 1, a term named ``loss``, or a teacher that
            no term follows.
    """

    def __init__(
        self,
        image: ImageEncoder,
        report: ReportEncoder,
        similarity: Similarity,
        loss: Objective,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        final_rate: float = 0.01,
        seed: int = 0,
        start: dict[str, str] | None = None,
        locked: list[str] | None = None,
        null_target: bool = False,
        micro_batch: int | None = None,
        terms: dict[str, Term] | None = None,
        teacher: str | None = None,
        layer_decay: float | None = None,
    ) -> None:
        super().__init__()
        if image.embed_dim != report.embed_dim:
            raise ValueError(
                f"the image tower embeds in {image.embed_dim} dimensions, the report tower in {report.embed_dim}; give both one embed_dim"
            )
        self.image, self.report, self.similarity, self.loss = image, report, similarity, loss
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.warmup, self.final_rate, self.seed = warmup, final_rate, seed
        self.start = {name: (self._part(name, "start"), Path(folder)) for name, folder in (start or {}).items()}
        self.locked = self._lock(locked or ())
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}, expected at least 1, or null for the whole batch at once")
        self.micro_batch = micro_batch
        if "loss" in (terms or {}):
            raise ValueError("a term cannot be named 'loss'")
        self.terms = nn.ModuleDict(terms or {})
        if teacher is not None and not any(isinstance(term, FeatureMimic) for term in (terms or {}).values()):
            raise ValueError("a teacher is followed by a medvl.losses.FeatureMimic among the terms, and there is none")
        self.teacher, self.layer_decay = teacher, layer_decay
        self._batch = 0
        self.observed: Observed | None = None
        self.unread_somewhere = False  # whether any process could not read an image of the last batch
        self._taught: list[DualEncoder] = []  # in a list, so that its weights are none of ours
        self.null_image = nn.Parameter(torch.randn(image.embed_dim) * image.embed_dim**-0.5) if null_target else None

    @property
    def sharded(self) -> bool:
        """Whether the towers' weights are divided between processes."""
        return any(isinstance(p, DTensor) for p in self.parameters())

    def configure_model(self) -> None:
        """Divide the towers between processes, under the strategy ``fsdp2``; once."""
        if self.device_mesh is None or self.sharded:
            return
        towers = (self.image, self.report)
        in_towers = {id(p) for tower in towers for p in tower.parameters()}
        others = [p for p in self.parameters() if id(p) not in in_towers]
        shard(towers, others, self.device_mesh["data_parallel"], self.trainer.strategy.root_device)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Average what nobody else does."""
        if self.sharded:
            average_gradients(self.parameters())

    def take_start(self) -> None:
        """Take the weights of the parts that start from another run; for a fit that does not go on from a checkpoint.

        Raises:
            FileNotFoundError, ConfigError: a folder without weights, or of another architecture.
        """
        for name, (part, folder) in self.start.items():
            load_part(part, name, folder)

    def _lock(self, names: Sequence[str]) -> tuple[nn.Module, ...]:
        parts = tuple(self._part(name, "locked") for name in names)
        for part in parts:
            part.requires_grad_(False).eval()
        return parts

    def _part(self, name: str, argument: str) -> nn.Module:
        parts: dict[str, nn.Module] = {"image": self.image, "report": self.report, "similarity": self.similarity}
        if name not in parts:
            raise ValueError(f"{argument}: {name!r} is no part of the model; expected {', '.join(parts)}")
        return parts[name]

    def train(self, mode: bool = True) -> AlignmentModule:
        """Training mode for all but the locked parts."""
        super().train(mode)
        for part in self.locked:
            part.eval()
        return self

    def dual_encoder(self, reader: ImageReader) -> DualEncoder:
        """The trained towers with the reader that fed them, ready to be saved; shares the weights."""
        return DualEncoder(self.image, self.report, self.similarity, reader)

    def on_train_batch_start(self, batch: StudyBatch, batch_idx: int) -> None:
        """Make what is drawn for this batch a function of (seed, step, batch, rank)."""
        self._batch = batch_idx
        torch.manual_seed(self._number(self.global_rank))

    def _number(self, *parts: int) -> int:
        """A number that depends on the seed, the step, the batch (a step may take several) and what is given."""
        key = ":".join(map(str, (self.seed, self.global_step, self._batch, *parts)))
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")

    def training_step(self, batch: StudyBatch, batch_idx: int) -> Tensor:
        """Loss of one batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: StudyBatch, batch_idx: int) -> Tensor:
        """The same loss on validation studies."""
        return self._step(batch, "val")

    def test_step(self, batch: StudyBatch, batch_idx: int) -> Tensor:
        """The same loss on test studies."""
        return self._step(batch, "test")

    def _step(self, batch: StudyBatch, stage: str) -> Tensor:
        batch = self._without_missing(batch)
        images, texts = self._features(batch)
        positives, ignore = batch.positives, batch.ignore
        if self.null_image is not None:
            images = self._with_null(images, batch)
            positives, ignore = with_null_row(batch)
        elif batch.null_texts is not None and batch.null_texts.any():
            raise ValueError(
                "the batch has texts to be aligned with a null image, and the model has none: set model.null_target to true, or "
                "data.init_args.pairs.init_args.without_content to ignore or drop"
            )
        here = _here(batch, len(images.pooled))
        pairs = pairs_of(positives, (len(positives), len(texts.pooled)), ignore, batch.false_texts, here)
        losses = self.loss(self.similarity.parts(images, texts), pairs)
        if stage == "train" and len(self.terms):
            losses = self._with_terms(losses, batch, images, texts)
        if stage == "train" and batch.share is not None:  # DDP waits for a gradient of every weight, also of what this loss has no use for
            made = (images.pooled, images.tokens, texts.pooled, texts.tokens)
            losses = {**losses, "loss": losses["loss"] + sum(0 * one.nan_to_num().sum() for one in made if one is not None)}
        self.observed = Observed(images.pooled.detach(), texts.pooled.detach(), pairs, batch)
        count = batch.positives.shape[0]
        self.log_dict({f"{stage}/{name}": value.detach() for name, value in losses.items()}, batch_size=count, sync_dist=stage != "train")
        self.log(f"{stage}_loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=count, sync_dist=stage != "train")
        return losses["loss"]

    def _without_missing(self, batch: StudyBatch) -> StudyBatch:
        """The batch without what is said of items, of any process, whose images could not be read."""
        missing, self.unread_somewhere = batch.missing, bool(batch.unread)
        if missing is not None and batch.share is not None:
            flags = torch.cat([missing, torch.tensor([self.unread_somewhere])]).to(self.device, torch.uint8)
            *found, somewhere = largest_over_ranks(flags).tolist()
            missing, self.unread_somewhere = torch.tensor(found, dtype=torch.bool), bool(somewhere)
        return batch if missing is None or not missing.any() else batch.without(missing)

    def _with_terms(self, losses: dict[str, Tensor], batch: StudyBatch, images: ImageFeatures, texts: TextFeatures) -> dict[str, Tensor]:
        """The losses with those of the terms, and with what they add in ``loss``."""
        count = len(batch.positives) if batch.share is None else batch.share.items[batch.share.rank]
        if len(images.pooled) > count:  # without the null image
            images = ImageFeatures(images.pooled[:count])
        shape, here = (len(batch.positives), len(texts.pooled)), _here(batch, count)
        positives, ignore = batch.positives, batch.ignore
        if self.null_image is not None:  # what is the null image's is no study's here either
            positives, ignore = (one[:-1] for one in with_null_row(batch))
            ignore = ignore | (torch.zeros_like(ignore[0]) if batch.null_texts is None else batch.null_texts)
        context = TermContext(
            images,
            texts,
            pairs_of(positives, shape, ignore, batch.false_texts, here),
            None if batch.share is None else batch.share.items,
            None if batch.again is None else encode_images(self.image, batch.again, self.micro_batch, self._passes(batch)),
            batch.labels,
            *self._of_teacher(batch),
            torch.Generator().manual_seed(self._number()),  # alike in all processes
        )
        found = {name: term(context) for name, term in self.terms.items()}
        total = torch.stack([losses["loss"], *(term.weight * found[name] for name, term in self.terms.items())]).sum()
        return {**losses, **found, "loss": total}

    @torch.no_grad()
    def _of_teacher(self, batch: StudyBatch) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's vectors of the images here and of all texts."""
        if self.teacher is None:
            return None, None
        if not self._taught:
            self._taught.append(load(self.teacher, device=self.device))
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            if (theirs := self._taught[0].reader.spec()) != (ours := data.reader.spec()):
                raise ValueError(f"the teacher in {self.teacher} reads images by {theirs}, this run by {ours}: both must read them alike")
        teacher = self._taught[0]
        return encode_images(teacher.image, batch.images, self.micro_batch).pooled, teacher.report(batch.texts).pooled

    def _features(self, batch: StudyBatch) -> tuple[ImageFeatures, TextFeatures]:
        """Of the batch's images, and of all its texts: of a shared batch each process encodes some, and is given those of the others.

        The towers run before anything is exchanged, so that on the way back what is exchanged comes first, in the same order everywhere.
        """
        texts, share, passes = batch.texts.texts, batch.share, self._passes(batch)
        images = encode_images(self.image, batch.images, self.micro_batch, passes)
        parts = 1 if self.micro_batch is None else passes or -(-len(images.pooled) // self.micro_batch)
        if share is None:
            return images, encode_texts(self.report, texts, parts, self.device)
        first, stop = share.texts_here
        found = encode_texts(self.report, texts[first:stop] or texts[:1], parts, self.device)
        return images, texts_of_ranks(found.rows(0, stop - first), share.texts)

    def _passes(self, batch: StudyBatch) -> int:
        """How often each process runs a tower, if a batch is shared and encoded in parts; else 0, as often as it needs."""
        if self.micro_batch is None or batch.share is None or batch.images.others is not None:
            return 0
        return -(-max(batch.share.items) // self.micro_batch)

    def _with_null(self, images: ImageFeatures, batch: StudyBatch) -> ImageFeatures:
        """With the null image below the last of the batch, which the last process has."""
        assert self.null_image is not None
        if batch.share is None or batch.share.rank == len(batch.share.items) - 1:
            return with_null_image(images, self.null_image)
        return images.replace(pooled=images.pooled + 0 * self.null_image.sum())  # no weight may go without a gradient

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip without a gradient scaler too.

        Lightning refuses to clip for fused optimisers under autocast, as a scaler unscales inside their step; only float16 has one.
        """
        if self.trainer.precision == "16-mixed":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val:
            clip_norm(self.parameters(), gradient_clip_val)

    def total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Lightning's own estimate would make the training loader here, before the step that a resumed run is at has been restored.
        """
        trainer = self.trainer
        steps, epochs = trainer.max_steps, trainer.max_epochs
        if epochs is None or epochs < 0:
            if steps <= 0:
                raise ValueError("neither trainer.max_epochs nor trainer.max_steps is set: the learning rate falls with them to its end")
            return steps
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, StudyDataModule)
        batches, limit = data.batches_per_epoch(trainer.world_size), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        served = max(1, -(-batches // trainer.accumulate_grad_batches) * epochs)
        return min(served, steps) if steps > 0 else served

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine, stepped per batch."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]]
        if self.layer_decay is not None:
            groups = layer_decay_groups(self, self.layer_decay, self.learning_rate, self.weight_decay)
        else:
            groups = [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
        groups = [{**group, "params": part} for group in groups for part in apart(group["params"])]
        fused = self.trainer.precision != "16-mixed"  # see configure_gradient_clipping
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=fused)
        total = self.total_steps()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, total, self.warmup, self.final_rate))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _here(batch: StudyBatch, count: int) -> tuple[int, int] | None:
    """First and one past the last of the ``count`` images that a process has of a shared batch; None where it has all."""
    return None if batch.share is None else (batch.share.here[0], batch.share.here[0] + count)


def with_null_image(images: ImageFeatures, null: Tensor) -> ImageFeatures:
    """The features of B studies and, as row B, those of an image that is ``null`` (D,) in every vector it has."""
    row = null.to(images.pooled.dtype)
    changes: dict[str, Tensor] = {"pooled": torch.cat([images.pooled, row[None]])}
    for name in ("tokens", "slices", "views"):
        if (vectors := getattr(images, name)) is not None:
            changes[name] = torch.cat([vectors, row.to(vectors.dtype).expand(1, *vectors.shape[1:])])
    for name in ("token_valid", "slice_valid", "view_valid"):
        if (valid := getattr(images, name)) is not None:
            changes[name] = torch.cat([valid, torch.ones_like(valid[:1])])
    for name in ("slice_weights", "view_weights"):
        if (weights := getattr(images, name)) is not None:
            changes[name] = torch.cat([weights, torch.full_like(weights[:1], 1 / weights.shape[1])])
    return images.replace(**changes)


def with_null_row(batch: StudyBatch) -> tuple[Tensor, Tensor]:
    """(B + 1, M) positives and (B + 1, M) ignored pairs: the null image has the texts without visual content, and only they have it.

    In a batch without such texts the null image is ignored, and so is a study that has no other texts. What all studies ignore, it does.
    """
    b, m = batch.positives.shape
    none = torch.zeros(m, dtype=torch.bool, device=batch.positives.device)
    null = none if batch.null_texts is None else batch.null_texts
    positives = torch.cat([torch.where(null, 0, batch.positives).to(batch.positives.dtype), null[None].to(batch.positives.dtype)])
    ignore = torch.zeros(b, m, dtype=torch.bool, device=none.device) if batch.ignore is None else batch.ignore & ~null
    alone = ignore.all(0) & ~null
    ignore = ignore | ~(positives[:b] > 0).any(1, keepdim=True)
    return positives, torch.cat([ignore, (alone | ~null.any())[None]])


def warmup_cosine(step: int, total: int, warmup: float, final_rate: float) -> float:
    """Factor of the peak rate: linear to 1 over the first ``warmup`` of ``total`` steps, then half a cosine to ``final_rate``."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, total - rise))
    return final_rate + (1 - final_rate) * (1 + math.cos(math.pi * progress)) / 2


def trainable(module: nn.Module) -> int:
    """How many weights the optimiser moves."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
