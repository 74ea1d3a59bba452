"""From what a person gives, texts, image files, studies of the archive, to a question of vectors and words.

Shapes: D embedding width, m vectors of a question.

Texts are cut into sentences, each a vector (late interaction). Images beside texts make one vector with them, the sum of their unit means
(composed query). A study that is asked with does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvl.model import DualEncoder
from medvl.nn.similarity import unit
from reports.sentences import split_sentences
from tasks.archive.corrections import Correction, units
from tasks.archive.ingest import as_array
from tasks.archive.search import Archive, Mask, Mode, Question
from tasks.archive.store import ArchiveError, VectorKind


@dataclass(frozen=True)
class Wanted:
    """What is looked for.

    Attributes:
        texts: in words.
        files: images.
        like: studies of the archive.
        unlike: texts, files and studies that are examples of what is not wanted.
        over: which vectors answer; None: sentences for texts, reports for the rest, images where an archive has no reports.
        mode: None: hybrid for texts where the archive keeps words, else vector.
        correction: against hubs, or the gap between images and texts; of questions of one kind.
        allowed: (N,) what a filter leaves.
    """

    texts: tuple[str, ...] = field(default=(), repr=False)
    files: tuple[Path, ...] = ()
    like: tuple[str, ...] = ()
    unlike: tuple[str | Path, ...] = field(default=(), repr=False)
    over: VectorKind | None = None
    mode: Mode | None = None
    correction: Correction | None = None
    allowed: Mask | None = field(default=None, repr=False)
    top: int = 10
    group: bool = True


def question_of(wanted: Wanted, archive: Archive, model: DualEncoder, number: int) -> Question:
    """The question.

    Args:
        number: of the model in the archive.
    Raises:
        ArchiveError: nothing is asked, words for which there is no index, or a study that is not there.
        UnreadableImageError: a file that cannot be read.
    """
    if not (wanted.texts or wanted.files or wanted.like):
        raise ArchiveError("nothing is asked: give a text, an image or a study")
    has_words = archive.derived.words is not None
    mode = wanted.mode or ("hybrid" if wanted.texts and has_words else "vector")
    if mode != "vector" and not wanted.texts:
        raise ArchiveError(f"--mode {mode} looks for words, and the query has none; give a text, or take --mode vector")
    kinds = archive.derived.kinds(number)
    over = wanted.over or _usual(wanted, kinds)
    return Question(
        vectors=None if mode == "text" else _vectors(wanted, archive, model, number, over),
        words=None if mode == "vector" else " ".join(wanted.texts),
        over=over,
        unlike=None if mode == "text" or not wanted.unlike else _examples(wanted.unlike, archive, model, number, over),
        correction=None if mode == "text" else wanted.correction,
        asked=_asked(wanted, archive, number, over),
        allowed=_without(wanted, archive),
        top=wanted.top,
        group=wanted.group,
    )


def _usual(wanted: Wanted, kinds: Sequence[VectorKind]) -> VectorKind:
    order: tuple[VectorKind, ...] = (
        ("sentence", "report", "image") if wanted.texts and not wanted.files else ("report", "image", "sentence")
    )
    return next((kind for kind in order if kind in kinds), "report")


def _asked(wanted: Wanted, archive: Archive, number: int, over: VectorKind) -> VectorKind | None:
    """The kind of vectors that the question's are like; None: of several."""
    kinds: set[VectorKind] = {kind_of_study(archive, study, number, over) for study in wanted.like}
    if wanted.texts:
        kinds.add("sentence")
    if wanted.files:
        kinds.add("image")
    return kinds.pop() if len(kinds) == 1 else None


def _vectors(wanted: Wanted, archive: Archive, model: DualEncoder, number: int, over: VectorKind) -> NDArray[np.float64]:
    texts = [of_text(model, text) for text in wanted.texts]
    images = [of_image(model, file) for file in wanted.files]
    studies = [of_study(archive, study, number, over) for study in wanted.like]
    parts = [np.concatenate(part) for part in (texts, images, studies) if part]
    if len(parts) == 1:
        return units(parts[0])
    return units(np.sum([units(units(part).mean(0))[0] for part in parts], axis=0))


def _examples(given: Sequence[str | Path], archive: Archive, model: DualEncoder, number: int, over: VectorKind) -> NDArray[np.float64]:
    """(n, D) a vector of each example: of a file, of a study of the archive, or of a text."""
    found = []
    for one in given:
        if isinstance(one, Path):
            rows = of_image(model, one)
        elif archive.store.number(one) is not None:
            rows = of_study(archive, one, number, over)
        else:
            rows = of_text(model, one)
        found.append(units(units(rows).mean(0))[0])
    return np.stack(found)


def of_text(model: DualEncoder, text: str) -> NDArray[np.float64]:
    """(m, D) of each sentence of a text."""
    return units(as_array(unit(model.encode_text(split_sentences(text) or (text,)).pooled)))


def of_image(model: DualEncoder, file: Path) -> NDArray[np.float64]:
    """(1, D).

    Raises:
        UnreadableImageError: it cannot be read.
    """
    pooled = model.encode_studies([[file]]).pooled if model.image.pools_views else model.encode_image(file).pooled
    return units(as_array(unit(pooled)))


def of_study(archive: Archive, study_id: str, number: int, over: VectorKind) -> NDArray[np.float64]:
    """(m, D) of a study of the archive: of its report, or of its images where these are asked for or it has no report."""
    rows = archive.vectors_of(study_id, number, kind_of_study(archive, study_id, number, over))
    if rows is None:
        raise ArchiveError(f"study {study_id}: the archive has no vectors of it by this model")
    return units(rows)


def kind_of_study(archive: Archive, study_id: str, number: int, over: VectorKind) -> VectorKind:
    """Of which kind :func:`of_study` are."""
    kinds: tuple[VectorKind, ...] = ("image", "report") if over == "image" else ("sentence" if over == "sentence" else "report", "image")
    for kind in kinds:
        if archive.vectors_of(study_id, number, kind) is not None:
            return kind
    raise ArchiveError(f"study {study_id}: the archive has no vectors of it by this model")


def _without(wanted: Wanted, archive: Archive) -> Mask | None:
    """What the filter leaves, less the studies that are asked with."""
    if not wanted.like:
        return wanted.allowed
    derived = archive.derived
    allowed = np.ones(len(derived.numbers), bool) if wanted.allowed is None else wanted.allowed.copy()
    for study in wanted.like:
        if (number := archive.store.number(study)) is not None:
            allowed[derived.places[number]] = False
    return allowed
