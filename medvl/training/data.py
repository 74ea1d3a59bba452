"""The Lightning data module over a study manifest.

A batch is a pure function of (seed, epoch, position), and the position is the trainer's step, so a run resumed from any step goes on
with the very next batch.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from medvl.data.augment import Augment
from medvl.data.cache import CachedReader, SampleCache, SampleStore
from medvl.data.manifest import ColumnMap, Manifest, SplitFractions, StudyImage, read_manifest
from medvl.data.sampling import BalancedBatches, EpochBatches, MixedBatches, ShardBatches, capped
from medvl.data.shards import ShardStore
from medvl.data.studies import (
    Collate,
    Item,
    Links,
    Skipped,
    StudyBatch,
    StudyDataset,
    ViewsOf,
    check_flip,
)
from medvl.files import write_atomically
from medvl.training.signals import ignore_sigterm
from medvl.types import ImageReader, PairBuilder, TextSource

REJECTED = "rejected.csv"
ORIGINAL = {"manifest", "images", "batch_size", "seed"}
"""What every checkpoint says; of anything else those that were written before it was said are taken at their word."""


class StudyLoader(DataLoader[Item]):
    """A loader that Lightning may treat as resumable: its position comes from the trainer's step, so it has no state of its own.

    Its processes outlive a SIGTERM, which is for the trainer.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"worker_init_fn": ignore_sigterm, **options})

    def state_dict(self) -> dict[str, Any]:
        """Nothing: see the class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see the class."""


class StudyDataModule(L.LightningDataModule):
    """Training, validation and test studies of one manifest.

    Args:
        manifest: CSV or Parquet, see :func:`medvl.data.manifest.read_manifest`.
        reader: reads and preprocesses an image; saved with the weights.
        texts: turns a report into the sentences that are true of its study.
        columns: how the table names its columns, if not as we do; the map itself or the path of a YAML file that holds it.
        splits: fractions to split by patient where the table has no split column.
        modality: which rows to use: ``xray``, ``ct``, or, for a reader and a tower of both, how many items of each a batch and process has
            (``{xray: 12, ct: 4}``, together ``batch_size``); the modality that takes longest makes the epoch.
        allow_outside: accept paths that leave the table's folder.
        batch_size: items per batch and process, all under one loss; the model's ``micro_batch`` says how many are encoded at once.
        sentences_per_image: drawn per item and epoch; None takes all.
        augment: changes training images; None leaves them.
        cache: true or ``memory`` keeps preprocessed images in memory, rounded to half precision; a folder, or a
            :class:`medvl.data.cache.SampleCache` that says how large it may grow, keeps them on disk, exactly, for later runs too; a
            :class:`medvl.data.shards.ShardStore` streams them from shards that were written before, without reading any file; false
            reads the files every time.
        workers: loader processes; with images in memory 0 is fastest.
        seed: of order, sentences and augmentation.
        views: an item is an ``image``, or a ``study`` with all its films, or all its series, for a tower that pools them; one for all
            modalities, or one for each (``{xray: study, ct: image}``).
        pairs: which texts of a batch are positives of which item (:class:`reports.pairs.ReportPairs`); None: an item's own and equal texts.
            Validation and test batches are paired by it too, without what it leaves to chance.
        flip: chance that a training item is flipped left to right together with the sides in its texts; needs ``pairs``. 0, for a flipped
            chest is that of a situs inversus: heart, aortic arch and stomach lie where next to no patient has them, and no text says so.
        drop_last: leave out the last, smaller batch of an epoch.
        links: what a text of one study is to a study of the same patient in another modality (:func:`medvl.data.studies.linked`).
        cap: draw each finding of the manifest about so many times an epoch (:func:`medvl.data.sampling.capped`); None: all items.
        one_per_patient: no two items of a patient in a batch, whose texts may be true of both, while there are others.
        second_view: give the images of training batches a second time, changed by chance anew, for terms that compare the two.
        labels: findings (columns of the manifest) that come with each batch, for terms that learn them.
    Raises:
        ValueError: a ``flip`` that is no chance, or without ``pairs``; modalities that do not add to the batch size.
    """

    def __init__(
        self,
        manifest: str,
        reader: ImageReader,
        texts: TextSource,
        columns: ColumnMap | str | None = None,
        splits: SplitFractions | None = None,
        modality: str | dict[str, int] = "xray",
        allow_outside: bool = False,
        batch_size: int = 64,
        sentences_per_image: int | None = None,
        augment: Augment | None = None,
        cache: bool | str | SampleStore = True,
        workers: int = 0,
        seed: int = 0,
        views: ViewsOf = "image",
        pairs: PairBuilder | None = None,
        flip: float = 0.0,
        drop_last: bool = True,
        links: Links = "none",
        cap: int | None = None,
        one_per_patient: bool = False,
        second_view: bool = False,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(modality, dict) and (min(modality.values(), default=0) < 1 or sum(modality.values()) != batch_size):
            raise ValueError(f"modality {modality}: expected 1 and more of each, together batch_size, {batch_size}")
        check_flip(flip, pairs, links, labels or ())
        if isinstance(modality, dict) and (cap is not None or one_per_patient):
            raise ValueError("batches of several modalities are neither capped nor kept to one item of a patient")
        if isinstance(modality, dict) and not drop_last:
            raise ValueError(
                "batches of several modalities have so many items of each, so there is no last, smaller one: leave out drop_last"
            )
        if isinstance(cache, ShardStore) and (isinstance(modality, dict) or cap is not None or one_per_patient):
            raise ValueError("shards are served shard by shard: with several modalities, cap or one_per_patient take another cache")
        self.cap, self.one_per_patient = cap, one_per_patient
        self.second_view, self.labels = second_view, labels or []
        self.manifest_path, self.reader, self.texts = Path(manifest), reader, texts
        self.columns = ColumnMap.load(columns) if isinstance(columns, str) else columns
        self.splits, self.modality, self.allow_outside = splits, modality, allow_outside
        self.batch_size, self.sentences_per_image, self.augment = batch_size, sentences_per_image, augment
        self.cache, self.workers, self.seed, self.views = cache, workers, seed, views
        self.pairs, self.flip, self.drop_last, self.links = pairs, flip, drop_last, links
        self.sets: dict[str, StudyDataset] = {}
        self.manifest: Manifest | None = None
        self.unread: dict[str, Skipped] = {}  # path -> an image that could not be read in the middle of the run
        self.elsewhere = 0  # images that another process could not read

    def setup(self, stage: str | None = None) -> None:
        """Read the manifest; rows that cannot be used are listed, never silently dropped. Of several processes all then serve the same."""
        if self.sets:
            self._agree()
            return
        self.manifest = read_manifest(
            self.manifest_path, columns=self.columns, splits=self.splits, allow_outside=self.allow_outside, strict=False
        )
        in_memory, reader = self.cache in (True, "memory"), self.reader
        if not in_memory and self.cache is not False:
            store = self.cache if isinstance(self.cache, SampleStore) else SampleCache(str(self.cache))
            if isinstance(store, ShardStore):
                store = store.under(Path(os.path.abspath(self.manifest_path)).parent)  # noqa: PTH100 (as the manifest does it)
            reader = CachedReader(reader, store)
        for split in ("train", "val", "test"):
            kinds = [self.modality] if isinstance(self.modality, str) else list(self.modality)
            chosen = [row for kind in kinds for row in self.manifest.select(split=split, modality=kind)]
            drawn = self.sentences_per_image if split == "train" else None
            self.sets[split] = StudyDataset(chosen, reader, self.texts, drawn, self.seed, in_memory, self.views, self.pairs)
        if self.pairs is not None:
            self.pairs.prepare([study for data in self.sets.values() for study in data.studies()])

    def _agree(self) -> None:
        """Leave out what any process could not read: else they would train on different batches, each without a sign of it."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        mine = {split: list(data.skipped) for split, data in self.sets.items()}
        found: list[dict[str, list[Skipped]]] = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        for split, data in self.sets.items():
            before = len(data.images)
            data.leave_out([one for of_rank in found for one in of_rank[split]])
            self.elsewhere += before - len(data.images)

    def read_images(self, splits: tuple[str, ...], progress: Callable[[], None] = lambda: None) -> None:
        """Read every image of the splits once, so that unreadable files are known, and listed, before training starts."""
        for split in splits:
            self.sets[split].drop_unreadable(progress)

    def skipped(self) -> list[Skipped]:
        """Everything that was left out or could be read in part alone, and why."""
        assert self.manifest is not None
        rejected = [Skipped(bad.row, bad.study_id, bad.path, "; ".join(bad.reasons)) for bad in self.manifest.rejected]
        left_out = rejected + [skip for data in self.sets.values() for skip in data.skipped] + list(self.unread.values())
        unread = {} if self.pairs is None else self.pairs.unread
        rows = [row for row in self.manifest.rows if row.study_id in unread]
        return left_out + [Skipped(row.row, row.study_id, str(row.path), unread[row.study_id]) for row in rows]

    def write_skipped(self, folder: Path) -> int:
        """Write ``rejected.csv`` if anything was left out, or read in part; how many rows."""
        skipped = self.skipped()
        if skipped:
            text = io.StringIO()
            table = csv.writer(text)
            table.writerow(["row", "study_id", "path", "reason"])
            table.writerows([s.row, s.study_id, s.path, s.reason] for s in skipped)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / REJECTED, text.getvalue().encode())
        return len(skipped)

    def all_texts(self) -> list[str]:
        """The different sentences of all splits."""
        return list(dict.fromkeys(text for data in self.sets.values() for found in data.texts for text in found))

    def images(self, split: str) -> list[StudyImage]:
        """The rows a split serves."""
        return self.sets[split].images

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's position means anything for: this table, in these batches."""
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint of other data.

        Raises:
            ValueError: another table, batch size or seed than the checkpoint was written with.
        """
        state_dict = {
            "views": "image",
            "pairs": None,
            "flip": 0.0,
            "drop_last": True,
            **state_dict,
        }  # all that there was before checkpoints said
        known = set(state_dict) | ORIGINAL
        differing = sorted(name for name, value in self._identity().items() if name in known and state_dict.get(name) != value)
        if differing:
            raise ValueError(
                f"{self.manifest_path}: the checkpoint was written with another {', '.join(differing)}; give the same, or start anew "
                "(another --out, or --resume false)"
            )

    def _identity(self) -> dict[str, Any]:
        assert self.manifest is not None
        counts = {"manifest": self.manifest.sha256, "images": len(self.sets["train"])}
        paired = {"flip": self.flip, "pairs": None if self.pairs is None else self.pairs.spec()}
        mixed = {"modality": self.modality, "links": self.links, "cap": self.cap, "one_per_patient": self.one_per_patient}
        drawn = {**mixed, "sentences_per_image": self.sentences_per_image, "views": self.views, "drop_last": self.drop_last, **paired}
        return {**counts, "batch_size": self.batch_size, "seed": self.seed, **drawn, **self._served()}

    def _served(self) -> dict[str, Any]:
        """What a step number means: how the run's processes and steps share out the batches, and the order of shards."""
        served: dict[str, Any] = {}
        if self.trainer is not None:
            served = {
                "trainer.devices x num_nodes": self.trainer.world_size,
                "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
                "trainer.limit_train_batches": self.trainer.limit_train_batches,
            }
        if isinstance(self.cache, ShardStore):
            served["shards"] = self.cache.order_of()
        return served

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Training batches of an epoch on each process.

        Raises:
            ValueError: no usable training image.
        """
        if not len(self.sets["train"]):
            left_out = self.skipped()
            why = f"; first of {len(left_out)} left out (all are in {REJECTED}): {left_out[0].reason}" if left_out else ""
            raise ValueError(f"{self.manifest_path}: no usable {self.modality} image in split 'train'{why}")
        return len(self._batches(0, world_size))

    def keep_batches(self, count: int) -> None:
        """Train on what is in the first batches alone, for a trial; what of it cannot be read is left out."""
        train = self.sets["train"]
        draws = itertools.islice(self._batches(0, 1), count)
        train.keep({draw.index for batch in draws for draw in batch})
        train.drop_unreadable()

    def _batches(self, rank: int, world_size: int) -> EpochBatches:
        if isinstance(self.modality, dict):
            kinds = sorted(self.modality, key=lambda kind: kind == "ct")  # a batch has radiographs first, whoever shares it
            groups = [kinds.index(kind) for kind in self.sets["train"].modalities]
            return MixedBatches(groups, [self.modality[kind] for kind in kinds], self.seed, rank=rank, world_size=world_size)
        data = self.sets["train"]
        sizes = (len(data), self.batch_size, self.seed)
        if isinstance(self.cache, ShardStore) and self.cap is None and not self.one_per_patient:
            shards = [self.cache.shard(data.images[indices[0]].path) for indices in data.items]
            of_run: Any = {"rank": rank, "world_size": world_size, "drop_last": self.drop_last}
            return ShardBatches(shards, self.cache.window, self.batch_size, self.seed, **of_run)
        if self.cap is not None or self.one_per_patient:
            chances, patients = None, None
            if self.cap is not None:
                if not any(data.findings):
                    raise ValueError(
                        f"{self.manifest_path}: cap {self.cap} is by findings, and no column of the table has any present; make columns "
                        "with `medvl reports labels`, or leave cap out"
                    )
                chances = capped(data.findings, self.cap)
            if self.one_per_patient:
                patients = [data.patients[indices[0]] for indices in data.items]
            return BalancedBatches(chances, patients, *sizes, rank=rank, world_size=world_size, drop_last=self.drop_last)
        return EpochBatches(*sizes, rank=rank, world_size=world_size, drop_last=self.drop_last)

    def train_dataloader(self) -> StudyLoader:
        """Batches of the epoch that the trainer is in, from the step that it is at; Lightning asks anew every epoch."""
        data = self.sets["train"]
        trainer = self.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        batches = self._batches(rank, world)
        if trainer is not None:
            limit, accumulated = trainer.limit_train_batches, trainer.accumulate_grad_batches
            served = min(len(batches), limit) if isinstance(limit, int) else int(len(batches) * limit)
            batches.epoch, step = divmod(trainer.global_step, max(1, -(-served // accumulated)))  # an epoch ends in a step
            batches.start = step * accumulated
        return StudyLoader(
            data,
            batch_sampler=batches,
            collate_fn=Collate(
                self.reader, self.augment, self.seed, self.pairs, self.flip, True, self.links, self.second_view, self.labels
            ),
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def val_dataloader(self) -> StudyLoader | list[StudyLoader]:
        """Validation studies in order, all their sentences."""
        return self._in_order("val")

    def test_dataloader(self) -> StudyLoader | list[StudyLoader]:
        """Test studies in order, all their sentences."""
        return self._in_order("test")

    def some_batches(self) -> Iterable[StudyBatch]:
        """Validation items in order, of a run without any those of training, as they are read: nothing is changed by chance."""
        loader = self._in_order("val" if len(self.sets["val"]) else "train")
        return loader if isinstance(loader, StudyLoader) else ()

    def _in_order(self, split: str) -> StudyLoader | list[StudyLoader]:
        data = self.sets[split]
        if not len(data):
            return []
        collate = Collate(self.reader, pairs=self.pairs, links=self.links, labels=self.labels)
        return StudyLoader(data, batch_size=self.batch_size, collate_fn=collate, num_workers=self.workers)
