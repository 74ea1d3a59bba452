"""Studies into a store: read, embedded and written some at a time, so that a run can be stopped anywhere and goes on where it was.

A study that is there as it is now, with the vectors of this model, is passed over. What cannot be read is listed with its reason; a study
keeps what of it can.

Shapes: D embedding width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from medvl.model import DualEncoder, batches
from medvl.nn.similarity import unit
from medvl.types import ImageSample, TextSource, UnreadableImageError
from tasks.archive.records import ArchivedStudy, ModelKey, StudyVectors
from tasks.archive.sources import Candidate, ReportReader
from tasks.archive.store import ArchiveError, ArchiveStore
from tasks.protocols import sha256_of

BATCH = 32
"""Studies of one transaction."""
IMAGES, VOLUMES = 16, 2
"""Images encoded at once."""
TEXTS = 256
"""Sentences encoded at once."""
REMEMBERED = 2**16
"""Sentences whose vectors are kept in memory: most are said again."""


@dataclass
class Ingested:
    """What became of the studies of a source."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (path or row, why)


def model_key(model: DualEncoder, weights_sha256: str, texts: TextSource) -> ModelKey:
    """What vectors of a model are told by."""
    return ModelKey(weights_sha256, sha256_of({"reader": model.reader.spec(), "texts": texts.spec()}), model.image.embed_dim)


def check_key(store: ArchiveStore, key: ModelKey) -> None:
    """Refuse what the store would take for another model, though only the split of texts differs.

    Raises:
        ArchiveError: the store has vectors of these weights with another preprocessing.
    """
    for known in store.models().values():
        if known.weights_sha256 == key.weights_sha256 and known != key:
            raise ArchiveError(
                f"{store.name}: has vectors of these weights with another preprocessing or --text-policy; take the same, or another --store"
            )


def ingest(
    store: ArchiveStore,
    studies: Iterable[Candidate],
    encoder: Encoder,
    reader: ReportReader,
    model: int,
    done: Ingested,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Read studies into a store.

    Args:
        store: where to.
        studies: from a source; gone through once.
        encoder: of their images and sentences.
        reader: of their reports.
        model: the number of the encoder's model in the store.
        done: is added to, so that what was done is known if this is stopped.
        advance: called with how many studies more are done, after they are safe on the disk.
    Raises:
        ArchiveError: a store that cannot be written to; what was written stays.
    """
    for part in _parts(studies, BATCH):
        records = {record.study_id: record for record in map(reader.archived, part)}
        write_new(store, list(records.values()), lambda wanted: embedded(encoder, wanted, done.rejected), model, done)
        advance(len(part))


def write_new(
    store: ArchiveStore,
    studies: Sequence[ArchivedStudy],
    vectors: Callable[[list[ArchivedStudy]], list[StudyVectors | None]],
    model: int,
    done: Ingested,
) -> None:
    """Write those of some studies that are new, changed, or without vectors of this model.

    Args:
        store: where to.
        studies: each once.
        vectors: of those that are to be written; None for one that has neither a sentence nor an image, and is not written.
        model: its number in the store.
        done: is added to.
    Raises:
        ArchiveError: a store that cannot be written to; nothing of these studies is there then.
    """
    kept = store.kept([study.study_id for study in studies])

    def is_there(study: ArchivedStudy) -> bool:
        there = kept.get(study.study_id)
        return there is not None and there.digest == study.digest() and model in there.models

    wanted = [study for study in studies if not is_there(study)]
    done.unchanged += len(studies) - len(wanted)
    found = zip(wanted, vectors(wanted), strict=True)
    batch = [(study, one) for study, one in found if one is not None]
    if batch:
        store.write(batch, model)
        new = sum(study.study_id not in kept for study, _ in batch)
        done.added += new
        done.changed += len(batch) - new


def embedded(encoder: Encoder, studies: Sequence[ArchivedStudy], rejected: list[tuple[str, str]]) -> list[StudyVectors | None]:
    """Vectors of each study; of one that has neither a sentence nor an image that could be read None, and it is added to ``rejected``."""
    found: list[StudyVectors | None] = []
    for study, vectors in zip(studies, encoder.vectors(studies, rejected), strict=True):
        if vectors.report is None and vectors.images is None:
            rejected.append((study.study_id, f"study {study.study_id}: has neither a sentence nor an image that could be read"))
            found.append(None)
        else:
            found.append(vectors)
    return found


class Encoder:
    """A model's vectors of studies.

    Args:
        model: the towers.
        with_images: encode the images too.
    """

    def __init__(self, model: DualEncoder, *, with_images: bool = True) -> None:
        self.model, self.with_images = model, with_images
        self._known: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def vectors(self, studies: Sequence[ArchivedStudy], rejected: list[tuple[str, str]]) -> list[StudyVectors]:
        """Of each study; images that cannot be read are added to ``rejected``."""
        self.sentences([one.text for study in studies for one in study.sentences])  # of all at once; below they are remembered
        images = self._images(studies, rejected) if self.with_images else [None] * len(studies)
        found = []
        for study, vectors in zip(studies, images, strict=True):
            sentences = self.sentences([one.text for one in study.sentences])
            found.append(StudyVectors(None if sentences is None else sentences.mean(0), sentences, vectors))
        return found

    def sentences(self, texts: Sequence[str]) -> NDArray[np.float32] | None:
        """(texts, D) unit vectors; None of no text."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        for part in batches(missing, TEXTS):
            found = as_array(unit(self.model.encode_text(part).pooled))
            self._known.update(zip(part, found, strict=True))
        rows = np.stack([self._known[text] for text in texts]) if texts else None
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return rows

    def _images(
        self, studies: Sequence[ArchivedStudy], rejected: list[tuple[str, str]]
    ) -> list[tuple[NDArray[np.float32] | None, ...] | None]:
        """Of each study the unit vectors of its images, None where one could not be read; a tower that pools views has all in the first."""
        found: list[list[NDArray[np.float32] | None]] = [[None] * len(study.images) for study in studies]
        read: dict[tuple[int, int], ImageSample] = {}
        for at, study in enumerate(studies):
            for place, image in enumerate(study.images):
                if (sample := self._read(image.path, rejected)) is not None:
                    read[at, place] = sample
            if len(read) >= IMAGES:
                self._encode(read, found)
        self._encode(read, found)
        return [tuple(one) if any(vector is not None for vector in one) else None for one in found]

    def _read(self, path: str, rejected: list[tuple[str, str]]) -> ImageSample | None:
        try:
            return self.model.read(Path(path))
        except UnreadableImageError as error:
            rejected.append((path, str(error)))
            return None

    def _encode(self, read: dict[tuple[int, int], ImageSample], found: list[list[NDArray[np.float32] | None]]) -> None:
        """Encode what was read, volumes and radiographs apart, and forget it."""
        for axes in sorted({sample.pixels.ndim for sample in read.values()}):
            where = [at for at, sample in read.items() if sample.pixels.ndim == axes]
            if self.model.image.pools_views:
                studies = [[read[at] for at in where if at[0] == study] for study in dict.fromkeys(at[0] for at in where)]
                firsts = [next(at for at in where if at[0] == study) for study in dict.fromkeys(at[0] for at in where)]
                vectors = self.model.encode_studies(studies, IMAGES).pooled
                where = firsts
            else:
                size = IMAGES if axes == 3 else VOLUMES
                vectors = torch.cat([self.model.encode_samples([read[at] for at in part]).pooled for part in batches(where, size)])
            for (study, place), vector in zip(where, as_array(unit(vectors)), strict=True):
                found[study][place] = vector
        read.clear()


def as_array(values: torch.Tensor) -> NDArray[np.float32]:
    """On the CPU, in float32."""
    return values.detach().float().cpu().numpy()


def _parts(studies: Iterable[Candidate], size: int) -> Iterator[list[Candidate]]:
    part: list[Candidate] = []
    for study in studies:
        part.append(study)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
