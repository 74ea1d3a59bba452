"""Studies as training batches: images, the different sentences of the whole batch, and which is true of which.

Shapes: B images, M different texts, C channels, H rows, W columns. Everything random is a pure function of (seed, epoch, image), so a
run that was killed goes on with the very batches it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from medvl.data.augment import Augment
from medvl.data.manifest import StudyImage
from medvl.types import ImageBatch, ImageReader, ImageSample, TextBatch, TextSource, UnreadableImageError


@dataclass(frozen=True)
class StudyBatch:
    """B images with the M different texts of the batch."""

    images: ImageBatch
    texts: TextBatch
    positives: Tensor  # (B, M) bool
    rows: tuple[int, ...]  # manifest row of each image

    def to(self, device: torch.device | str) -> StudyBatch:
        """The same batch on another device."""
        return replace(self, images=self.images.to(device), positives=self.positives.to(device))


@dataclass(frozen=True)
class Item:
    """One image with the sentences drawn for it."""

    sample: ImageSample
    texts: tuple[str, ...]
    row: int
    epoch: int


@dataclass(frozen=True)
class Draw:
    """What a sampler asks the data set for: image ``index`` as epoch ``epoch`` sees it."""

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
    """Images of a manifest with sentences drawn from their reports.

    Args:
        images: rows to serve; rows whose report yields no text are left out and listed in ``skipped``.
        reader: reads and preprocesses an image.
        source: turns a report into texts.
        sentences_per_image: how many sentences are drawn per image and epoch, without replacement; None takes all.
        seed: of the sentence draw.
        cache: keep what the reader made in memory, as float16 (32 KiB an image of 128 x 128). It may lie over a
            :class:`medvl.data.cache.CachedReader`, which keeps it on disk: then a file is preprocessed once, and loaded once a run.
    """

    def __init__(
        self,
        images: Sequence[StudyImage],
        reader: ImageReader,
        source: TextSource,
        sentences_per_image: int | None = None,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        if sentences_per_image is not None and sentences_per_image < 1:
            raise ValueError(f"sentences_per_image is {sentences_per_image}, expected at least 1 or None for all")
        texts = [source.texts(image.report, image.findings, image.impression) for image in images]
        self.images = [image for image, found in zip(images, texts, strict=True) if found]
        self.texts = [found for found in texts if found]
        self.skipped = [
            Skipped(image.row, image.study_id, str(image.path), "the report has no sentence to train on")
            for image, found in zip(images, texts, strict=True)
            if not found
        ]
        self.reader, self.sentences_per_image, self.seed = reader, sentences_per_image, seed
        self._cache: dict[int, ImageSample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.images)

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
        texts = self.texts[draw.index]
        if self.sentences_per_image is not None and len(texts) > self.sentences_per_image:
            rng = generator(self.seed, "sentences", draw.epoch, self.images[draw.index].row)
            chosen = np.sort(rng.choice(len(texts), self.sentences_per_image, replace=False))
            texts = tuple(texts[i] for i in chosen)
        return Item(self.sample(draw.index), texts, self.images[draw.index].row, draw.epoch)


class Collate:
    """Items to a batch: equal sentences become one text, true of every image that has it.

    Args:
        reader: stacks the images.
        augment: changes the images of a training batch; None leaves them.
        seed: of the augmentation, joined with the epoch and the rows of the batch.
    """

    def __init__(self, reader: ImageReader, augment: Augment | None = None, seed: int = 0) -> None:
        self.reader, self.augment, self.seed = reader, augment, seed

    def __call__(self, items: Sequence[Item]) -> StudyBatch:
        images = self.reader.collate([item.sample for item in items])
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
        count: images in the data set.
        batch_size: images per batch; the last, smaller batch of an epoch is dropped unless it is the only one.
        seed: of the shuffle.
        rank, world_size: this process's share of each epoch.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        if count < world_size:
            raise ValueError(f"{count} images cannot be shared between {world_size} processes")
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


def generator(seed: int, *parts: int | str) -> np.random.Generator:
    """A generator that depends on the seed and on every part, and on nothing else."""
    digest = hashlib.blake2b("\0".join(map(str, (seed, *parts))).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
