"""Studies as training batches: images, the different sentences of the whole batch, and which is true of which.

Shapes: B items (images, or studies with all their images), M different texts, C channels, H rows, W columns. Everything random is a pure
function of (seed, epoch, item), so a run that was killed goes on with the very batches it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from medvl.data.augment import Augment
from medvl.data.manifest import StudyImage
from medvl.types import ImageBatch, ImageReader, ImageSample, TextBatch, TextSource, UnreadableImageError

Views = Literal["image", "study"]


@dataclass(frozen=True)
class StudyBatch:
    """B items with the M different texts of the batch."""

    images: ImageBatch  # its ``study`` says which item each image is of
    texts: TextBatch
    positives: Tensor  # (B, M) bool
    rows: tuple[int, ...]  # manifest row of each item's first image

    def to(self, device: torch.device | str) -> StudyBatch:
        """The same batch on another device."""
        return replace(self, images=self.images.to(device), positives=self.positives.to(device))


@dataclass(frozen=True)
class Item:
    """One image, or the images of one study, with the sentences drawn for it."""

    samples: tuple[ImageSample, ...]
    texts: tuple[str, ...]
    row: int  # of the manifest, of the first image
    epoch: int


@dataclass(frozen=True)
class Draw:
    """What a sampler asks the data set for: item ``index`` as epoch ``epoch`` sees it."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Skipped:
    """An image left out of training, and why; safe to show."""

    row: int
    study_id: str
    path: str
    reason: str


class StudyDataset(Dataset[Item]):
    """Images, or studies, of a manifest with sentences drawn from their reports. ``images`` and ``texts`` have an entry per image.

    Args:
        images: rows to serve; rows whose report yields no text are left out and listed in ``skipped``.
        reader: reads and preprocesses an image.
        source: turns a report into texts.
        sentences_per_image: how many sentences are drawn per item and epoch, without replacement; None takes all.
        seed: of the sentence draw.
        cache: keep what the reader made in memory, as float16 (32 KiB an image of 128 x 128,
            30 MB a CT at its reader's defaults). It may lie over a
            :class:`medvl.data.cache.CachedReader`, which keeps it on disk: then a file is preprocessed once, and loaded once a run.
        views: an item is an ``image``, or a ``study`` with all its images, whose texts are those of any of its rows.
    """

    def __init__(
        self,
        images: Sequence[StudyImage],
        reader: ImageReader,
        source: TextSource,
        sentences_per_image: int | None = None,
        seed: int = 0,
        cache: bool = False,
        views: Views = "image",
    ) -> None:
        if sentences_per_image is not None and sentences_per_image < 1:
            raise ValueError(f"sentences_per_image is {sentences_per_image}, expected at least 1 or None for all")
        if views not in ("image", "study"):
            raise ValueError(f"views is {views!r}, expected 'image' or 'study'")
        texts = [source.texts(image.report, image.findings, image.impression) for image in images]
        if views == "study":
            texts = _of_the_study(images, texts)
        self.images = [image for image, found in zip(images, texts, strict=True) if found]
        self.texts = [found for found in texts if found]
        self.skipped = [
            Skipped(image.row, image.study_id, str(image.path), "the report has no sentence to train on")
            for image, found in zip(images, texts, strict=True)
            if not found
        ]
        self.reader, self.sentences_per_image, self.seed, self.views = reader, sentences_per_image, seed, views
        self._cache: dict[int, ImageSample] | None = {} if cache else None
        self.items = self._items()

    def __len__(self) -> int:
        return len(self.items)

    def _items(self) -> list[list[int]]:
        """Indices of each item's images."""
        if self.views == "study":
            return list(by_study(self.images).values())
        return [[i] for i in range(len(self.images))]

    def drop_unreadable(self, progress: Callable[[], None] = lambda: None) -> None:
        """Read every image once, so that bad files are left out, and listed, before training and not in the middle of it.

        With ``cache`` this also fills the cache. Without, it costs one reading of the data.
        """
        kept_images: list[StudyImage] = []
        kept_texts: list[tuple[str, ...]] = []
        cache: dict[int, ImageSample] = {}
        for image, texts in zip(self.images, self.texts, strict=True):
            try:
                sample = self.reader.read(image.path)
            except UnreadableImageError as error:
                self.skipped.append(Skipped(image.row, image.study_id, str(image.path), str(error)))
            else:
                if self._cache is not None:
                    cache[len(kept_images)] = replace(sample, pixels=sample.pixels.half())
                kept_images.append(image)
                kept_texts.append(texts)
            progress()
        self.images, self.texts = kept_images, kept_texts
        self.items = self._items()
        if self._cache is not None:
            self._cache = cache

    def sample(self, index: int) -> ImageSample:
        """Image ``index``, from the cache if there is one."""
        if self._cache is None:
            return self.reader.read(self.images[index].path)
        if index not in self._cache:
            sample = self.reader.read(self.images[index].path)
            self._cache[index] = replace(sample, pixels=sample.pixels.half())
        cached = self._cache[index]
        return replace(cached, pixels=cached.pixels.float())

    def __getitem__(self, draw: Draw | int) -> Item:
        if isinstance(draw, int):
            draw = Draw(0, draw)
        indices = self.items[draw.index]
        texts, row = self.texts[indices[0]], self.images[indices[0]].row
        if self.sentences_per_image is not None and len(texts) > self.sentences_per_image:
            rng = generator(self.seed, "sentences", draw.epoch, row)
            chosen = np.sort(rng.choice(len(texts), self.sentences_per_image, replace=False))
            texts = tuple(texts[i] for i in chosen)
        return Item(tuple(as_listed(self.sample(i), self.images[i]) for i in indices), texts, row, draw.epoch)


class Collate:
    """Items to a batch: equal sentences become one text, true of every item that has it.

    Args:
        reader: stacks the images.
        augment: changes the images of a training batch; None leaves them.
        seed: of the augmentation, joined with the epoch and the rows of the batch.
    """

    def __init__(self, reader: ImageReader, augment: Augment | None = None, seed: int = 0) -> None:
        self.reader, self.augment, self.seed = reader, augment, seed

    def __call__(self, items: Sequence[Item]) -> StudyBatch:
        images = self.reader.collate([sample for item in items for sample in item.samples]).grouped([len(item.samples) for item in items])
        texts = tuple(dict.fromkeys(text for item in items for text in item.texts))
        if self.augment is not None:
            rng = generator(self.seed, "augment", *(f"{item.epoch}:{item.row}" for item in items))
            images = self.augment(images, rng)
        column = {text: j for j, text in enumerate(texts)}
        positives = torch.zeros(len(items), len(texts), dtype=torch.bool)
        for i, item in enumerate(items):
            positives[i, [column[text] for text in item.texts]] = True
        return StudyBatch(images, TextBatch(texts), positives, tuple(item.row for item in items))


class EpochBatches(Sampler[list[Draw]]):
    """Shuffled batches that are a pure function of (seed, epoch); ``start`` skips what a resumed epoch has already seen.

    Args:
        count: items in the data set.
        batch_size: items per batch; the last, smaller batch of an epoch is dropped unless it is the only one.
        seed: of the shuffle.
        rank, world_size: this process's share of each epoch.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        if count < world_size:
            raise ValueError(f"{count} items cannot be shared between {world_size} processes")
        self.batch_size = min(batch_size, count // world_size)
        self.count, self.seed, self.rank, self.world_size = count, seed, rank, world_size
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration serves."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        order = generator(self.seed, "order", self.epoch).permutation(self.count)
        start, self.start = self.start, 0
        for batch in range(start, len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [Draw(self.epoch, int(i)) for i in order[first : first + self.batch_size]]


def by_study(images: Sequence[StudyImage]) -> dict[str, list[int]]:
    """Study id -> indices of its images; studies and images in the order given."""
    found: dict[str, list[int]] = {}
    for i, image in enumerate(images):
        found.setdefault(image.study_id, []).append(i)
    return found


def as_listed(sample: ImageSample, image: StudyImage) -> ImageSample:
    """The sample of a manifest's row, with the view that the table gives; where it gives none, that of the file."""
    return sample if image.view is None else replace(sample, view=image.view)


def _of_the_study(images: Sequence[StudyImage], texts: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """For each image the different texts of all images of its study."""
    shared = list(texts)
    for indices in by_study(images).values():
        together = tuple(dict.fromkeys(text for i in indices for text in texts[i]))
        for i in indices:
            shared[i] = together
    return shared


def generator(seed: int, *parts: int | str) -> np.random.Generator:
    """A generator that depends on the seed and on every part, and on nothing else."""
    digest = hashlib.blake2b("\0".join(map(str, (seed, *parts))).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
