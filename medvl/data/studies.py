"""Studies as training batches: images, the different sentences of the whole batch, and which is true of which.

Shapes: B items (images, or studies with all their images), M different texts, C channels, H rows, W columns. Everything random is a pure
function of (seed, epoch, item), so a run that was killed goes on with the very batches it would have seen.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medvl.data.augment import Augment
from medvl.data.cache import CachedReader
from medvl.data.manifest import StudyImage
from medvl.types import (
    ImageBatch,
    ImageReader,
    ImageSample,
    KnownStudy,
    PairBuilder,
    PairStudy,
    SourcedText,
    StudyWords,
    TextBatch,
    TextPairs,
    TextSource,
    UnreadableImageError,
    equal_text_pairs,
)

Views = Literal["image", "study"]
ViewsOf = Views | dict[str, Views]
Links = Literal["none", "ignore", "positive"]
STAND_INS = 10
"""Items that are tried in the place of one that cannot be read, before the storage is taken to be gone."""


@dataclass(frozen=True)
class Share:
    """How the processes of a run divide one batch between them: each its part of the items and of the texts, in the order of ranks."""

    rank: int
    items: tuple[int, ...]  # of each process
    texts: tuple[int, ...]  # of each process, to encode; they may be none

    @property
    def here(self) -> tuple[int, int]:
        """First and one past the last item of this process."""
        first = sum(self.items[: self.rank])
        return first, first + self.items[self.rank]

    @property
    def texts_here(self) -> tuple[int, int]:
        """First and one past the last text that this process encodes."""
        first = sum(self.texts[: self.rank])
        return first, first + self.texts[self.rank]


@dataclass(frozen=True)
class Skipped:
    """An image left out of training, and why; safe to show."""

    row: int
    study_id: str
    path: str
    reason: str


@dataclass(frozen=True)
class StudyBatch:
    """B items with the M different texts of the batch. Of a batch shared between processes, ``images`` are those of this one alone."""

    images: ImageBatch  # its ``study`` says which item each image is of
    texts: TextBatch
    positives: Tensor  # (B, M) bool, or float weights
    rows: tuple[int, ...]  # manifest row of each item's first image
    sources: tuple[str, ...] = ()  # of each text: where it comes from
    ignore: Tensor | None = None  # (B, M) bool, see medvl.types.TextPairs for this and what follows
    false_texts: Tensor | None = None  # (M,) bool
    null_texts: Tensor | None = None  # (M,) bool
    share: Share | None = None  # None: one process has the whole batch
    again: ImageBatch | None = None  # the same images, changed by chance once more
    labels: Tensor | None = None  # (b, C) float of the items whose images are here: 1 present, 0 absent, NaN not known
    unread: tuple[Skipped, ...] = ()  # images of items here that could not be read
    missing: Tensor | None = None  # (B,) bool, not moved: items here with none that could be read, in whose place other images stand

    def without(self, missing: Tensor) -> StudyBatch:
        """The batch without the pairs and labels of some items, (B,) bool, and without the texts that are true of them alone."""
        missing = missing.to(self.positives.device)
        kept = ~missing[:, None]
        positives = self.positives * kept
        orphans = torch.stack(
            [((self.positives >= w) & (self.positives > 0)).any(0) & ~((positives >= w) & (positives > 0)).any(0) for w in (0, 1)]
        ).any(0)
        positives = positives * ~orphans  # also of what is true of others by a share alone
        ignore = ~kept | orphans if self.ignore is None else self.ignore | ~kept | orphans
        labels = self.labels
        if labels is not None:
            first, stop = (0, len(missing)) if self.share is None else self.share.here
            labels = labels.masked_fill(missing[first:stop, None], math.nan)
        return replace(self, positives=positives, ignore=ignore, labels=labels)

    def to(self, device: torch.device | str) -> StudyBatch:
        """The same batch on another device."""
        masks = {name: getattr(self, name) for name in ("ignore", "false_texts", "null_texts", "again", "labels")}
        moved = {name: mask.to(device) for name, mask in masks.items() if mask is not None}
        return replace(self, images=self.images.to(device), positives=self.positives.to(device), **moved)


@dataclass(frozen=True)
class Item:
    """One image, or the images of one study, with the sentences drawn for it."""

    samples: tuple[ImageSample, ...]  # none of an item that another process has
    sourced: tuple[SourcedText, ...]
    row: int  # of the manifest, of the first image
    epoch: int
    frontal: bool = False  # every image is a volume, or a radiograph from the front or the back: a flip turns it into the other side
    rank: int = 0  # of the process that has it
    patient: int = 0  # a number that items of one patient share
    labels: Mapping[str, int] = field(default_factory=dict)  # finding -> 1, 0 or -1, of all its images
    modality: str = "xray"
    unread: tuple[Skipped, ...] = ()  # images that could not be read
    missing: bool = False  # none of its images could be read; ``samples`` are another item's

    @property
    def texts(self) -> tuple[str, ...]:
        """The sentences without their provenance."""
        return tuple(one.text for one in self.sourced)


@dataclass(frozen=True)
class Draw:
    """What a sampler asks the data set for: item ``index`` as epoch ``epoch`` sees it."""

    epoch: int
    index: int
    rank: int = 0  # of the process that has it
    words_only: bool = False  # another process has its images


class StudyDataset(Dataset[Item]):
    """Images, or studies, of a manifest with sentences drawn from their reports. ``images`` and ``texts`` have an entry per image.

    Args:
        images: rows to serve; rows whose report yields no text are left out and listed in ``skipped``.
        reader: reads and preprocesses an image.
        source: turns a report into texts.
        sentences_per_image: how many sentences are drawn per item and epoch, without replacement; None takes all. Where a study has
            texts of several sources, each draw first takes one of the sources that have texts left, by their weights.
        seed: of the sentence draw.
        cache: keep what the reader made in memory, as float16 (32 KiB an image of 128 x 128,
            30 MB a CT at its reader's defaults). It may lie over a
            :class:`medvl.data.cache.CachedReader`, which keeps it on disk: then a file is preprocessed once, and loaded once a run.
        views: an item is an ``image`` (a film, or a series), or a ``study`` with all its images of a modality, whose texts are those of any
            of its rows; one for all modalities, or one for each (``{xray: study, ct: image}``).
        pairs: leaves out the texts that it does not keep.
    """

    def __init__(
        self,
        images: Sequence[StudyImage],
        reader: ImageReader,
        source: TextSource,
        sentences_per_image: int | None = None,
        seed: int = 0,
        cache: bool = False,
        views: ViewsOf = "image",
        pairs: PairBuilder | None = None,
    ) -> None:
        if sentences_per_image is not None and sentences_per_image < 1:
            raise ValueError(f"sentences_per_image is {sentences_per_image}, expected at least 1 or None for all")
        if not set(views.values() if isinstance(views, dict) else [views]) <= {"image", "study"}:
            raise ValueError(f"views is {views!r}, expected 'image' or 'study', or one of them for each modality")
        sourced = [source.sourced(words_of(image)) for image in images]
        if pairs is not None:
            sourced = [tuple(one for one in found if pairs.keeps(one.text)) for found in sourced]
        self.views = views
        sourced = _of_the_study(images, sourced, [self._pooled(image.modality) for image in images])
        self.images = [image for image, found in zip(images, sourced, strict=True) if found]
        self.sourced = [found for found in sourced if found]
        self.skipped = [
            Skipped(image.row, image.study_id, str(image.path), "the report has no sentence to train on")
            for image, found in zip(images, sourced, strict=True)
            if not found
        ]
        self.reader, self.sentences_per_image, self.seed = reader, sentences_per_image, seed
        self._cache: dict[int, ImageSample] | None = {} if cache else None
        self._frontal: dict[int, bool] = {}  # by image, as far as they have been read
        self.items = self._items()

    def __len__(self) -> int:
        return len(self.items)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The sentences of each image that may be drawn."""
        return [tuple(one.text for one in found) for found in self.sourced]

    def studies(self) -> list[KnownStudy]:
        """The items as a :class:`PairBuilder` is told of them."""
        return [
            KnownStudy(
                tuple(self.images[i].row for i in indices), tuple(words_of(self.images[i]) for i in indices), self.sourced[indices[0]]
            )
            for indices in self.items
        ]

    @property
    def findings(self) -> list[tuple[str, ...]]:
        """The findings that the manifest has as present in any image of each item."""
        present = [[name for name, value in image.labels.items() if value == 1] for image in self.images]
        return [tuple(dict.fromkeys(name for i in indices for name in present[i])) for indices in self.items]

    @property
    def modalities(self) -> list[str]:
        """Of each item."""
        return [self.images[indices[0]].modality for indices in self.items]

    def _items(self) -> list[list[int]]:
        """Indices of each item's images."""
        numbers: dict[str, int] = {}
        self.patients = [numbers.setdefault(image.patient_id, len(numbers)) for image in self.images]
        found = by_study(self.images).items()
        items = [part for (_, kind), group in found for part in ([group] if self._pooled(kind) else [[i] for i in group])]
        return items if any(map(self._pooled, {image.modality for image in self.images})) else sorted(items)

    def _pooled(self, modality: str) -> bool:
        """Whether an item is a study with all its images of a modality."""
        return views_of(self.views, modality) == "study"

    def drop_unreadable(self, progress: Callable[[], None] = lambda: None) -> None:
        """Read every image once, so that bad files are left out, and listed, before training and not in the middle of it.

        With ``cache`` this also fills the cache. Without, it costs one reading of the data.
        """
        kept_images: list[StudyImage] = []
        kept_texts: list[tuple[SourcedText, ...]] = []
        cache: dict[int, ImageSample] = {}
        self._frontal = {}
        for image, texts in zip(self.images, self.sourced, strict=True):
            try:
                frontal = self.reader.cache.known(self.reader.reader, image.path) if isinstance(self.reader, CachedReader) else None
                sample = self.reader.read(image.path) if frontal is None or self._cache is not None else None
            except UnreadableImageError as error:
                self.skipped.append(Skipped(image.row, image.study_id, str(image.path), str(error)))
            else:
                if self._cache is not None and sample is not None:
                    cache[len(kept_images)] = replace(sample, pixels=sample.pixels.half())
                if sample is not None:
                    frontal = _is_frontal(as_listed(sample, image))
                elif image.view is not None:
                    frontal = image.modality == "ct" or image.view.upper() in ("PA", "AP")
                self._frontal[len(kept_images)] = bool(frontal)
                kept_images.append(image)
                kept_texts.append(texts)
            progress()
        self.images, self.sourced = kept_images, kept_texts
        self.items = self._items()
        if self._cache is not None:
            self._cache = cache

    def leave_out(self, skipped: Sequence[Skipped]) -> None:
        """Leave out images, by their rows, that another process could not read."""
        why = {one.row: one for one in skipped}
        kept = [i for i, image in enumerate(self.images) if image.row not in why]
        self.skipped += [why[image.row] for image in self.images if image.row in why]
        self._frontal = {new: self._frontal[old] for new, old in enumerate(kept) if old in self._frontal}
        if self._cache is not None:
            self._cache = {new: self._cache[old] for new, old in enumerate(kept) if old in self._cache}
        self.images, self.sourced = [self.images[i] for i in kept], [self.sourced[i] for i in kept]
        self.items = self._items()

    def keep(self, items: Iterable[int]) -> None:
        """Serve these items alone, before any image was read."""
        kept = sorted({i for item in items for i in self.items[item]})
        self.images, self.sourced = [self.images[i] for i in kept], [self.sourced[i] for i in kept]
        self.items = self._items()

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
        texts, row = self.sourced[indices[0]], self.images[indices[0]].row
        if self.sentences_per_image is not None and len(texts) > self.sentences_per_image:
            texts = drawn(texts, self.sentences_per_image, generator(self.seed, "sentences", draw.epoch, row))
        first = self.images[indices[0]]
        whose = (self.patients[indices[0]], self.labels(indices), first.modality)
        known = all(i in self._frontal for i in indices)
        frontal = known and all(self._frontal[i] for i in indices)
        if draw.words_only and known:
            return Item((), texts, row, draw.epoch, frontal, draw.rank, *whose)
        samples, unread = self.read(indices)
        if not known:
            frontal = not unread and all(map(_is_frontal, samples))
        if draw.words_only:
            return Item((), texts, row, draw.epoch, frontal, draw.rank, *whose)
        found = samples or self._stand_in(draw.index, unread)
        return Item(found, texts, row, draw.epoch, frontal, draw.rank, *whose, unread, not samples)

    def labels(self, indices: Sequence[int]) -> Mapping[str, int]:
        """Finding -> label of some images of a study, of the first that has it."""
        return {name: label for i in reversed(indices) for name, label in self.images[i].labels.items()}

    def read(self, indices: Sequence[int]) -> tuple[tuple[ImageSample, ...], tuple[Skipped, ...]]:
        """Those of some images that can be read, and those that cannot."""
        samples: list[ImageSample] = []
        unread: list[Skipped] = []
        for i in indices:
            image = self.images[i]
            try:
                samples.append(as_listed(self.sample(i), image))
            except UnreadableImageError as error:
                unread.append(Skipped(image.row, image.study_id, str(image.path), str(error)))
        return tuple(samples), tuple(unread)

    def _stand_in(self, item: int, unread: Sequence[Skipped]) -> tuple[ImageSample, ...]:
        """The images of the next item of the modality that can be read, in the place of one that cannot.

        Raises:
            UnreadableImageError: neither can those that follow.
        """
        kinds = self.modalities
        after = (k % len(kinds) for k in range(item + 1, item + len(kinds)))
        others = list(islice((k for k in after if kinds[k] == kinds[item]), STAND_INS))
        for other in others:
            if samples := self.read(self.items[other])[0]:
                return samples
        raise UnreadableImageError(
            f"row {unread[0].row}: {unread[0].reason}; nor can any of the {len(others)} items after it be read: see that the storage can "
            "be reached, then go on with --resume true"
        )


class Collate:
    """Items to a batch: equal sentences become one text, true of every item that has it, or of every item that ``pairs`` says.

    Args:
        reader: stacks the images.
        augment: changes the images of a training batch; None leaves them.
        seed: of the augmentation, joined with the epoch and the rows of the batch.
        pairs: decides which texts are positives of which item; None: equal texts.
        flip: chance that an item is flipped left to right, its texts with it; needs ``pairs``, which writes them. An item is left as it is
            where a text of it cannot be written, and where an image of it is a radiograph not known to be frontal.
        training: whether ``pairs`` may leave anything to chance.
        links: what the texts of one study are to another study of the same patient, see :func:`linked`.
        second_view: change the images of a training batch by chance twice, for terms that compare the two; needs ``augment``.
        labels: findings of the manifest that come with the batch.
    Raises:
        ValueError: a ``flip`` that is no chance, or without ``pairs``.
    """

    def __init__(
        self,
        reader: ImageReader,
        augment: Augment | None = None,
        seed: int = 0,
        pairs: PairBuilder | None = None,
        flip: float = 0.0,
        training: bool = False,
        links: Links = "none",
        second_view: bool = False,
        labels: Sequence[str] = (),
    ) -> None:
        check_flip(flip, pairs, links, labels)
        if second_view and augment is None:
            raise ValueError("a second view of an image differs from the first by chance alone: give `augment`")
        self.links, self.second_view, self.labels = links, second_view, tuple(labels)
        self.reader, self.augment, self.seed = reader, augment, seed
        self.pairs, self.flip, self.training = pairs, flip, training

    def __call__(self, items: Sequence[Item]) -> StudyBatch:
        if all(item.samples for item in items):
            items = sorted(items, key=_kind)  # radiographs, then volumes
        here = [i for i, item in enumerate(items) if item.samples]
        assert all(_kind(items[i]) <= _kind(items[k]) for i, k in pairwise(here)), "a share must have radiographs before volumes"
        key = [f"{item.epoch}:{item.row}" for item in items]
        flipped = self._flipped(items, generator(self.seed, "flip", *key)) if self.flip else [False] * len(items)
        kinds = [[i for i in here if _kind(items[i]) == kind] for kind in sorted({_kind(items[i]) for i in here})]
        views = [self._views(items, kinds, flipped, key, name) for name in ("augment", "again")[: 2 if self.second_view else 1]]
        studies = [PairStudy(item.row, item.sourced, flip) for item, flip in zip(items, flipped, strict=True)]
        if self.pairs is None:
            made = equal_text_pairs(studies)
        else:
            made = self.pairs.pairs(studies, generator(self.seed, "pairs", *key) if self.training else None)
        made = linked(made, items, self.links)
        return StudyBatch(
            views[0],
            TextBatch(tuple(one.text for one in made.texts)),
            made.positives,
            tuple(item.row for item in items),
            tuple(one.source for one in made.texts),
            made.ignore,
            made.false_texts,
            made.null_texts,
            _share(items, here, len(made.texts)),
            views[1] if self.second_view else None,
            _label_table([items[i] for i in here], self.labels) if self.labels else None,
            tuple(one for item in items for one in item.unread),
            torch.tensor([item.missing for item in items]),
        )

    def _views(
        self, items: Sequence[Item], kinds: Sequence[Sequence[int]], flipped: Sequence[bool], key: Sequence[str], name: str
    ) -> ImageBatch:
        """The images of the items of each kind (indices), changed by the chance of that name."""
        found: ImageBatch | None = None
        for kind in reversed(kinds):
            images = self.reader.collate([sample for i in kind for sample in items[i].samples])
            images = images.grouped([len(items[i].samples) for i in kind])
            if any(flipped[i] for i in kind):
                assert images.study is not None
                images = mirrored(images, torch.tensor([flipped[i] for i in kind])[images.study])
            if self.augment is not None:
                images = self.augment(images, generator(self.seed, name, *(key[i] for i in kind)))
            found = images if found is None else replace(images, others=found)
        assert found is not None
        return found

    def _flipped(self, items: Sequence[Item], rng: np.random.Generator) -> list[bool]:
        assert self.pairs is not None
        chosen = rng.random(len(items)) < self.flip
        return [
            bool(wanted) and item.frontal and all(map(self._can_mirror, item.texts)) for wanted, item in zip(chosen, items, strict=True)
        ]

    def _can_mirror(self, text: str) -> bool:
        return self.pairs is not None and self.pairs.mirrored(text) is not None


def _share(items: Sequence[Item], here: Sequence[int], texts: int) -> Share | None:
    """How a batch is shared, by the items whose images are ``here``; None where all are."""
    if len(here) == len(items):
        return None
    world = max(item.rank for item in items) + 1
    sizes = [texts // world + (rank < texts % world) for rank in range(world)]
    return Share(items[here[0]].rank, tuple(sum(item.rank == rank for item in items) for rank in range(world)), tuple(sizes))


def _label_table(items: Sequence[Item], names: Sequence[str]) -> Tensor:
    """(b, C) 1 present, 0 absent, NaN uncertain or not mentioned."""
    values = {1: 1.0, 0: 0.0}
    return torch.tensor([[values.get(item.labels.get(name, -1), math.nan) for name in names] for item in items])


def _kind(item: Item) -> int:
    """2 of a radiograph, 3 of a volume."""
    return item.samples[0].pixels.ndim - 1


def linked(pairs: TextPairs, items: Sequence[Item], links: Links) -> TextPairs:
    """The pairs, with what the texts that are true of one study are to a study of the same patient in another modality.

    Args:
        links: ``none``: what ``pairs`` says; ``ignore``: where it says nothing they leave the loss, for a CT shows what a film of the same
            patient may show or not; ``positive``: they are true of it too, for studies known to be of one time.
    """
    if links == "none":
        return pairs
    patients, kinds = torch.tensor([[item.patient, item.modality == "ct"] for item in items]).T
    other = (patients[:, None] == patients) & (kinds[:, None] != kinds)
    positives = pairs.positives
    reached = (other.to(torch.float32) @ (positives > 0).to(torch.float32) > 0) & ~(positives > 0)
    stated = torch.zeros_like(reached)
    if pairs.false_texts is not None:  # made false of one study, and stated of the other: nobody knows
        stated = reached & pairs.false_texts
        reached &= ~pairs.false_texts
    if pairs.null_texts is not None:
        reached &= ~pairs.null_texts
    ignore = stated if pairs.ignore is None else pairs.ignore | stated
    if links == "ignore":
        return replace(pairs, ignore=ignore | reached)
    kept = ignore & ~reached
    positives = torch.where(reached, 1, positives).to(positives.dtype)
    return replace(pairs, positives=positives, ignore=kept if pairs.ignore is not None or kept.any() else None)


def drawn(texts: Sequence[SourcedText], count: int, rng: np.random.Generator) -> tuple[SourcedText, ...]:
    """``count`` of the texts without replacement, in their order: for each the source by its weight, then any text that it has left.

    Texts of one source are drawn alike. A source weighs what the first of its texts says.
    """
    sources: dict[str, list[int]] = {}
    for i, one in enumerate(texts):
        sources.setdefault(one.source, []).append(i)
    if len(sources) == 1:
        return tuple(texts[i] for i in np.sort(rng.choice(len(texts), count, replace=False)))
    weights = {name: texts[places[0]].weight for name, places in sources.items()}
    chosen: list[int] = []
    while len(chosen) < count:
        left = [name for name, places in sources.items() if places and weights[name] > 0] or [n for n, places in sources.items() if places]
        shares = np.array([weights[name] for name in left])
        shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(left), 1 / len(left))
        places = sources[left[int(rng.choice(len(left), p=shares))]]
        chosen.append(places.pop(int(rng.integers(len(places)))))
    return tuple(texts[i] for i in sorted(chosen))


def mirrored(images: ImageBatch, which: Tensor) -> ImageBatch:
    """The batch with the images that ``which`` (I,) bool names flipped along W, left to right: chests of a situs inversus."""
    at = which.view(-1, *[1] * (images.pixels.ndim - 1))
    pixels = torch.where(at, images.pixels.flip(-1), images.pixels)
    if images.valid is None or images.pixels.ndim == 5:  # of a volume whole slices are valid
        return replace(images, pixels=pixels)
    return replace(images, pixels=pixels, valid=torch.where(which.view(-1, 1, 1), images.valid.flip(-1), images.valid))


def check_flip(flip: float, pairs: PairBuilder | None, links: Links = "none", labels: Sequence[str] = ()) -> None:
    """Refuse a chance that is none, and flips that nobody could swap the sides of.

    Raises:
        ValueError: either; texts of one study that are true of another, which may be flipped when it is not; labels with a side.
    """
    if flip and links == "positive":
        raise ValueError(
            f"flip is {flip} with links: positive: a text of a flipped study would be true of one that is not; leave one of them out"
        )
    if flip and (sided := [name for name in labels if {"left", "right"} & set(re.split(r"[^a-z]+", name.lower()))]):
        raise ValueError(f"flip is {flip}, and nobody swaps the sides of the labels {', '.join(sided)}; leave one of them out")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip is {flip}, expected a chance from 0 to 1")
    if flip and pairs is None:
        raise ValueError(
            f"flip is {flip}, but without `pairs` nobody swaps left and right in the texts of a flipped image; give "
            "pairs: {class_path: reports.pairs.ReportPairs}, or leave flip at 0"
        )


def words_of(image: StudyImage) -> StudyWords:
    """What a manifest's row says of its study in words."""
    return StudyWords(image.study_id, image.report, image.findings, image.impression, image.labels)


def _is_frontal(sample: ImageSample) -> bool:
    """A volume, or a radiograph from the front or the back: what a flip turns into the other side."""
    return sample.pixels.ndim == 4 or (sample.view is not None and sample.view.upper() in ("PA", "AP"))


def by_study(images: Sequence[StudyImage]) -> dict[tuple[str, str], list[int]]:
    """Study id and modality -> indices of its images; studies and images in the order given."""
    found: dict[tuple[str, str], list[int]] = {}
    for i, image in enumerate(images):
        found.setdefault((image.study_id, image.modality), []).append(i)
    return found


def as_listed(sample: ImageSample, image: StudyImage) -> ImageSample:
    """The sample of a manifest's row, with the view that the table gives; where it gives none, that of the file."""
    return sample if image.view is None else replace(sample, view=image.view)


def views_of(views: ViewsOf, modality: str) -> Views:
    """What an item of a modality is."""
    return views.get(modality, "image") if isinstance(views, dict) else views


def _of_the_study(
    images: Sequence[StudyImage], texts: Sequence[tuple[SourcedText, ...]], pooled: Sequence[bool]
) -> list[tuple[SourcedText, ...]]:
    """For each image that is ``pooled`` the different texts of all images of its study; for each other its own."""
    shared = list(texts)
    for indices in by_study(images).values():
        if not pooled[indices[0]]:
            continue
        together: dict[str, SourcedText] = {}
        for one in (one for i in indices for one in texts[i]):
            together.setdefault(one.text, one)
        for i in indices:
            shared[i] = tuple(together.values())
    return shared


def generator(seed: int, *parts: int | str) -> np.random.Generator:
    """A generator that depends on the seed and on every part, and on nothing else."""
    digest = hashlib.blake2b("\0".join(map(str, (seed, *parts))).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
