"""What is done to vectors before they are compared: made of unit length, moved away from what is not wanted, and rid of what images and
texts, or an item and all questions, have in common.

    centre   cos(q - m_a, s - m_g): m_a the mean of the archive's vectors that are like the question's, m_g that of those that answer, so
             that the cones of images and of texts lie about one place (Liang et al. 2022, arXiv:2203.02053)
    csls     2 cos(q, s) - r(s): r(s) the mean cosine of s to the k = 10 nearest of the archive's vectors that are like the question's, high
             for a hub (Conneau et al. 2018, arXiv:1710.04087, eq. 3, less the term that is the same for all answers)

Both are fitted on the archive alone, never on what is asked. Their matrices are made at the first question, some seconds for 100,000 rows,
and stand among the derived files until the archive changes.

Shapes: m vectors of a question, D embedding width, G rows of a gallery.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medvl.files import replacing
from medvl.metrics.hubness import neighbour_similarity
from tasks.archive.derived import Derived, Gallery, still_current
from tasks.archive.store import ArchiveError, VectorKind

Correction = Literal["centre", "csls"]
K = 10
REFERENCE = 10_000
"""Vectors that stand for all questions, drawn from those of the archive where it has more."""
CHUNK = 16_384


def units(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """(m, D) float64 vectors of unit length, of (m, D) or (D,).

    Raises:
        ArchiveError: a vector that is 0 or not finite.
    """
    given = np.atleast_2d(np.asarray(vectors, np.float64))
    length = np.linalg.norm(given, axis=1, keepdims=True)
    if not np.isfinite(length).all() or (length == 0).any():
        raise ArchiveError("a question whose vector is 0 or not finite has no neighbours; is the image empty, or the model damaged?")
    return np.asarray(given / length)


def moved_away(queries: NDArray[np.float64], unlike: NDArray[np.floating] | None, away: float) -> NDArray[np.float64]:
    """Unit queries less ``away`` times the unit mean of what is not wanted, made of unit length again."""
    if unlike is None or not len(unlike):
        return queries
    return units(queries - away * units(units(unlike).mean(0)))


@dataclass(frozen=True)
class Corrected:
    """A gallery with a correction, and what it makes of a question: their products are the scores."""

    gallery: Gallery
    mean: NDArray[np.float64] | None = field(repr=False)  # (D,) of centring; None: CSLS, and the gallery has a column r

    def moved(self, queries: NDArray[np.float64]) -> NDArray[np.float64]:
        """(m, D) unit vectors as they are compared with the gallery."""
        if self.mean is not None:
            return units(queries - self.mean)
        return np.concatenate([2 * queries, np.full((len(queries), 1), -1.0)], axis=1)


def corrected(derived: Derived, model: int, over: VectorKind, asked: VectorKind | None, how: Correction) -> Corrected:
    """The gallery of a kind with a correction for questions that are like another, or the same, kind of the archive's vectors.

    Args:
        over: the kind that answers.
        asked: the kind that the question's vectors are like; None: they are like none.
    Raises:
        ArchiveError: a question that is like none, or an archive without vectors of its kind; a folder that cannot be written to.
    """
    if asked is None:
        raise ArchiveError("a correction is for questions of one kind: images, or texts, or studies; ask without --correct")
    if asked not in derived.kinds(model):
        raise ArchiveError(
            f"a correction is fitted on {asked} vectors like the question's, and the archive has none; ask without --correct"
        )
    plain, like = derived.gallery(model, over), derived.gallery(model, asked)
    mean = np.asarray(like.matrix).mean(axis=0, dtype=np.float64)
    name = f"{model}-{over}-{how}" + ("" if how == "centre" else f"-{asked}")
    path = derived.folder / f"{derived.current['prefix']}-{name}.npy"
    if not path.exists():
        try:
            _write(path, _centred(plain) if how == "centre" else _with_hubness(plain, like, over == asked))
        except OSError as error:
            raise ArchiveError(f"{path}: a correction cannot be written ({error.strerror}); ask without --correct") from error
        if not still_current(derived):
            path.unlink(missing_ok=True)  # the archive changed meanwhile, and what is of the old one has been taken away
            raise ArchiveError("the archive was changed while a correction was made; ask again")
    matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    return Corrected(replace(plain, matrix=matrix, approximate=None), mean if how == "centre" else None)


def _centred(gallery: Gallery) -> NDArray[np.float32]:
    """(G, D) rows without their mean, of unit length."""
    mean = np.asarray(gallery.matrix).mean(axis=0, dtype=np.float64)
    moved = np.empty(gallery.matrix.shape, np.float32)
    for start in range(0, len(moved), CHUNK):
        part = gallery.matrix[start : start + CHUNK] - mean
        moved[start : start + CHUNK] = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return moved


def _with_hubness(gallery: Gallery, like: Gallery, same: bool) -> NDArray[np.float32]:
    """(G, D + 1) rows, and beside each its mean cosine to the nearest vectors that are like a question's, itself left out."""
    drawn = np.arange(len(like.matrix))
    if len(drawn) > REFERENCE:
        drawn = np.sort(np.random.default_rng(0).choice(len(drawn), REFERENCE, replace=False))
    reference = np.asarray(like.matrix[drawn])
    reference = reference[np.linalg.norm(reference, axis=1) > 0]
    different, row = np.unique(gallery.matrix, axis=0, return_inverse=True)  # equal vectors get the very same number
    row = row.reshape(-1)
    inside = np.zeros(len(different), bool)
    if same:
        inside[row[drawn]] = True
    hubness = np.zeros(len(different))
    has = np.linalg.norm(different, axis=1) > 0
    k = min(K, len(reference))
    hubness[has & ~inside] = neighbour_similarity(different[has & ~inside], reference, k) if (has & ~inside).any() else 0.0
    if (has & inside).any() and (others := min(K, len(reference) - 1)):
        hubness[has & inside] = (neighbour_similarity(different[has & inside], reference, others + 1) * (others + 1) - 1) / others
    return np.concatenate([gallery.matrix, hubness[row, None].astype(np.float32)], axis=1)


def _write(path: Path, matrix: NDArray[np.float32]) -> None:
    with replacing(path) as file:
        np.save(file, matrix, allow_pickle=False)
