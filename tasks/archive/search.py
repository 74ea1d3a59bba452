"""Questions to an archive: by vectors, by words, or by both, of the studies that a filter leaves.

Shapes: N studies, in the order of their ids; D embedding width; m vectors of a question; a text of several sentences has one each.

What a study scores, with unit vectors q_j of the question and, of the study, r the mean of its sentences' vectors made of unit length, s_i
those of its sentences, v_i those of its images:
    over reports     mean_j q_j . r
    over sentences   mean_j max_i q_j . s_i     (late interaction of sentences, as ColBERT's of words, arXiv:2004.12832)
    over images      mean_j max_i q_j . v_i
Words are ranked by BM25 (:data:`tasks.archive.derived.BM25`) of their stems. The two lists are joined by reciprocal rank fusion with k = 60
(Cormack et al., SIGIR 2009), over the first DEPTH of each. Equal scores stand in the order of study ids. The filter decides before anything
is ranked. Reports of the same words are one hit, which names the others. Products may be corrected, see :mod:`tasks.archive.corrections`.

Scores are found in float32; what could be among the first is scored again in float64, so that neither the order nor a tie hangs on how a
matrix product was cut into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.archive import approximate
from tasks.archive.corrections import Corrected, Correction, corrected, moved_away, units
from tasks.archive.derived import Advance, Derived, Gallery, open_derived, words_of
from tasks.archive.records import ModelKey
from tasks.archive.sqlite import SqliteStore
from tasks.archive.store import ArchiveError, ArchiveStore, FoundStudy, VectorKind

Mode = Literal["hybrid", "vector", "text"]
Mask = NDArray[np.bool_]
DEPTH = 1000
"""Of each list that is fused."""
RRF_K = 60
MARGIN = 1e-5
"""Of float32 scores: what is nearer than this to the last hit is scored again."""
DECIMALS = 9
"""Scores that agree in so many are equal: vectors that differ may have the same cosine, which rounding must not order."""
EXACT = 20_000
"""So many studies are scored each, though there be an approximate index."""
GATHER = 0.3
"""A filter that leaves a smaller share has its rows copied out, instead of all being scored."""
BLOCK = 256
"""Rows copied out and scored at once: what a core keeps near itself."""


@dataclass(frozen=True)
class Question:
    """What is asked of an archive.

    Attributes:
        vectors: (m, D), of any length; None asks by words alone.
        words: ranked by BM25; None asks by vectors alone.
        over: which vectors of the studies answer.
        unlike: (n, D) vectors of what is not wanted: their mean is taken from each vector of the question, ``away`` times, both of unit
            length (Rocchio, 1971, the part of irrelevant examples).
        away: see there.
        correction: of the products, against hubs or the gap between images and texts.
        asked: the kind of vectors that the question's are like, which a correction is fitted on; None: of several.
        allowed: (N,) the studies that may answer; None: all.
        top: hits.
        group: reports of the same words are one hit.
    """

    vectors: NDArray[np.floating] | None = field(default=None, repr=False)
    words: str | None = field(default=None, repr=False)
    over: VectorKind = "report"
    unlike: NDArray[np.floating] | None = field(default=None, repr=False)
    away: float = 0.5
    correction: Correction | None = None
    asked: VectorKind | None = None
    allowed: Mask | None = field(default=None, repr=False)
    top: int = 10
    group: bool = True


@dataclass(frozen=True)
class MatchedSentence:
    """A sentence of a hit, and how well it fits the question: the largest cosine with its vectors, or of words the share it has of them.

    A hit names its best, and two more that fit at least half as well.
    """

    text: int
    words: str | None = field(repr=False)  # None where the store keeps no text
    score: float


@dataclass(frozen=True)
class ArchiveHit:
    """A study that answers."""

    rank: int  # 1 the first
    study: FoundStudy
    score: float  # cosine, BM25, or the sum of reciprocal ranks
    vector_score: float | None  # None: not among those ranked by vectors
    text_score: float | None
    sentences: tuple[MatchedSentence, ...]
    same_report: tuple[str, ...]  # other studies with the very words, among those that may answer


class Archive:
    """A store with what is derived of it, open for questions. What other processes add is seen at the next question.

    Args:
        store: the store, or the file of one.
        advance: as of :func:`tasks.archive.derived.open_derived`.
    Raises:
        ArchiveError: a store that cannot be opened.
    """

    def __init__(self, store: ArchiveStore | Path, advance: Advance | None = None) -> None:
        self.store = SqliteStore(store) if isinstance(store, Path) else store
        self._advance = advance
        self._derived = open_derived(self.store, advance)

    @property
    def derived(self) -> Derived:
        """Of the store as it is now."""
        if self.store.generation() != self._derived.generation:
            self._derived = open_derived(self.store, self._advance)
        return self._derived

    def model(self, key: ModelKey) -> int:
        """The number of a model.

        Raises:
            ArchiveError: the archive has no vectors of it; those of others are not compared with.
        """
        models = self.store.models()
        for number, known in models.items():
            if known == key:
                return number
        same = any(known.weights_sha256 == key.weights_sha256 for known in models.values())
        raise ArchiveError(
            f"{self.store.name}: has no vectors of this model{', but of its weights with another preprocessing' if same else ''} "
            f"({len(models)} others). Vectors of different models cannot be compared: add this one's with `medvl index add`"
        )

    def matching(self, expression: str) -> Mask:
        """(N,) which studies' reports fit an expression of the full-text index (:meth:`tasks.archive.store.ArchiveStore.matching`)."""
        derived = self.derived
        mask = np.zeros(len(derived.numbers), bool)
        mask[[derived.places[number] for number in self.store.matching(expression)]] = True
        return mask

    def vectors_of(self, study_id: str, model: int, kind: VectorKind) -> NDArray[np.float32] | None:
        """(rows, D) the vectors of a study that is in the archive; None where it has none of that kind.

        Raises:
            ArchiveError: no such study.
        """
        derived, number = self.derived, self.store.number(study_id)
        if number is None:
            raise ArchiveError(f"study {study_id}: is not in the archive")
        if kind not in derived.kinds(model):
            return None
        place, gallery = derived.places[number], derived.gallery(model, kind)
        rows = gallery.members[gallery.starts[place] : gallery.starts[place + 1]]
        return np.asarray(gallery.matrix[rows]) if len(rows) else None

    def search(self, question: Question, model: int | None = None) -> list[ArchiveHit]:
        """The studies that answer best, best first.

        Raises:
            ArchiveError: vectors without a model or of another width, or neither vectors nor words.
        """
        derived = self.derived
        found = ranking(derived, question, model)
        studies = self.store.found([int(derived.numbers[place]) for place in found.places])
        hits = []
        for rank, (place, study) in enumerate(zip(found.places, studies, strict=True)):
            same = found.same[rank]
            hits.append(
                ArchiveHit(
                    rank + 1,
                    study,
                    found.scores[rank],
                    found.vector_scores[rank],
                    found.text_scores[rank],
                    self._matched(derived, place, study, question, model),
                    tuple(self.store.ids([int(derived.numbers[other]) for other in same])),
                )
            )
        return hits

    def recall(self, question: Question, model: int | None = None) -> float | None:
        """Of the first 10 by vectors, what an approximate index was measured to find when it was made; None where all are scored."""
        if question.vectors is None or model is None or question.correction is not None:
            return None
        how = self.derived.approximate(model, question.over)
        if how is None or not VectorScores(self.derived.gallery(model, question.over), question).approximate:
            return None
        return float(how["recall"])

    def _matched(
        self, derived: Derived, place: int, study: FoundStudy, question: Question, model: int | None, most: int = 3
    ) -> tuple[MatchedSentence, ...]:
        words = dict(study.sentences)
        if question.vectors is not None and model is not None and "sentence" in derived.kinds(model):
            gallery = derived.gallery(model, "sentence")
            rows = gallery.members[gallery.starts[place] : gallery.starts[place + 1]]
            cosines = (np.asarray(gallery.matrix[rows], np.float64) @ units(question.vectors).T).max(1, initial=-1.0)
            scored = {int(gallery.owners[row]): float(score) for row, score in zip(rows, cosines, strict=True)}
        elif question.words is not None:
            asked = set(words_of(question.words))
            scored = {text: len(asked & set(words_of(said or ""))) / max(len(asked), 1) for text, said in study.sentences}
            scored = {text: share for text, share in scored.items() if share > 0}
        else:
            return ()
        best = sorted(scored, key=lambda text: -scored[text])[:most]
        best = [text for text in best if text == best[0] or scored[text] >= scored[best[0]] / 2 > 0]
        return tuple(MatchedSentence(text, words.get(text), scored[text]) for text in best)

    def close(self) -> None:
        """Let go of the store."""
        self.store.close()


@dataclass(frozen=True)
class Ranking:
    """The first of the studies, best first, by their places."""

    places: tuple[int, ...]
    scores: tuple[float, ...]
    vector_scores: tuple[float | None, ...]
    text_scores: tuple[float | None, ...]
    same: tuple[tuple[int, ...], ...]  # other studies of the same report


def ranking(derived: Derived, question: Question, model: int | None = None) -> Ranking:
    """The studies that answer best; the rule is that of the module.

    Raises:
        ArchiveError: vectors without a model or of another width, or neither vectors nor words.
    """
    if question.top < 1:
        raise ArchiveError(f"top is {question.top}, expected at least 1")
    by_vector = by_text = None
    if question.vectors is not None:
        if model is None:
            raise ArchiveError("a question by vectors needs the model that they are of")
        correct = question.correction and corrected(derived, model, question.over, question.asked, question.correction)
        by_vector = VectorScores(derived.gallery(model, question.over), question, correct)
    if question.words is not None:
        by_text = TextScores(derived, question)
    groups = derived.groups if question.group else None
    if by_vector is None and by_text is None:
        raise ArchiveError("nothing is asked: give vectors, words, or both")
    if by_vector is None or by_text is None:
        only: VectorScores | TextScores = by_vector or by_text  # type: ignore[assignment]
        places, scores = first(only, question.top, groups)
    else:
        places, scores = _fused(by_vector, by_text, question.top, groups)
    same: list[tuple[int, ...]] = []
    for place in places:
        alike = np.flatnonzero(derived.groups == derived.groups[place]) if question.group else np.zeros(0, np.int64)
        same.append(tuple(int(one) for one in alike if one != place and (question.allowed is None or question.allowed[one])))
    return Ranking(
        tuple(places),
        tuple(scores),
        tuple(None if by_vector is None else by_vector.one(place) for place in places),
        tuple(None if by_text is None else by_text.one(place) for place in places),
        tuple(same),
    )


class VectorScores:
    """What each study scores by vectors: roughly at once, exactly for those asked for.

    Raises:
        ArchiveError: no vectors, or of another width than the archive's.
    """

    def __init__(self, gallery: Gallery, question: Question, correct: Corrected | None = None) -> None:
        if question.vectors is None:
            raise ArchiveError("nothing is asked by vectors")
        self.gallery, self.queries = gallery, moved_away(units(question.vectors), question.unlike, question.away)
        if self.queries.shape[1] != gallery.matrix.shape[1]:
            raise ArchiveError(f"a question of {self.queries.shape[1]} numbers, expected {gallery.matrix.shape[1]}, the width of the model")
        if correct is not None:
            self.gallery, self.queries = correct.gallery, correct.moved(self.queries)
        self.allowed = gallery.has if question.allowed is None else gallery.has & question.allowed

    @property
    def usable(self) -> int:
        """Studies that may answer."""
        return int(np.count_nonzero(self.allowed))

    @property
    def approximate(self) -> bool:
        """Whether an approximate index says what is scored: of a large gallery, for one vector, where a filter leaves many."""
        gallery = self.gallery
        return gallery.approximate is not None and len(self.queries) == 1 and gallery.study_of is not None and self.usable > EXACT

    def candidates(self, count: int) -> NDArray[np.int64]:
        """The studies that may be among the ``count`` best: all of them, but for those that an approximate index misses."""
        gallery, studies = self.gallery, self.gallery.study_of
        if gallery.approximate is None or studies is None or not self.approximate:
            return largest(self.rough(), count)
        rows = None if self.usable == len(self.allowed) else self.allowed[studies]
        index, wanted = gallery.approximate, approximate.rows_for(count)
        found = approximate.search(index.index, self.queries[0].astype(np.float32), wanted, index.probes, rows)
        return np.unique(studies[found])

    def rough(self) -> NDArray[np.float32]:
        """(N,) float32 scores, -inf where a study may not answer."""
        gallery, queries = self.gallery, self.queries.astype(np.float32)
        scores = np.full(len(self.allowed), -np.inf, np.float32)
        if gallery.one_each or self.allowed.mean() < GATHER:
            places = np.flatnonzero(self.allowed)
            if gallery.one_each and len(places) >= GATHER * len(scores):
                found = gallery.matrix @ queries.mean(0)
                scores[places] = found[places]
                return scores
            starts, rows = _members(gallery, places)
            values = _products(gallery.matrix, rows, queries)
        else:
            places = np.flatnonzero(gallery.has)
            starts, rows = _members(gallery, places)
            values = _products(gallery.matrix, None, queries)[rows]
        if len(places):
            best = np.maximum.reduceat(values, starts, axis=0).mean(1)
            scores[places] = best
        scores[~self.allowed] = -np.inf
        return scores

    def exact(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """(len(places),) float64 scores; of equal vectors the very same."""
        starts, rows = _members(self.gallery, places)
        values = np.stack([(self.gallery.matrix[rows].astype(np.float64) * query).sum(1) for query in self.queries], axis=1)
        return np.maximum.reduceat(values, starts, axis=0).mean(1) if len(places) else np.zeros(0)

    def one(self, place: int) -> float | None:
        """The score of one study; None where it may not answer."""
        return float(self.exact(np.array([place]))[0]) if self.allowed[place] else None


class TextScores:
    """What each study scores by words: BM25, -inf where it has none of them."""

    def __init__(self, derived: Derived, question: Question) -> None:
        self.scores = np.full(len(derived.numbers), -np.inf, np.float64)
        index = derived.words
        if index is None:
            raise ArchiveError("the archive keeps no words to be looked for; ask by vectors (--mode vector)")
        asked = [word for word in words_of(question.words or "") if word in index.vocab_dict]
        if asked:
            found = index.get_scores(asked).astype(np.float64)
            places = derived.document_places
            self.scores[places] = np.where(found > 0, found, -np.inf)
        if question.allowed is not None:
            self.scores[~question.allowed] = -np.inf

    @property
    def usable(self) -> int:
        """Studies that have one of the words and may answer."""
        return int(np.isfinite(self.scores).sum())

    def candidates(self, count: int) -> NDArray[np.int64]:
        """The studies that may be among the ``count`` best."""
        return largest(self.scores, count)

    def exact(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Those of some."""
        return self.scores[places]

    def one(self, place: int) -> float | None:
        """The score of one study; None where none of the words is in it."""
        return float(self.scores[place]) if np.isfinite(self.scores[place]) else None


def first(scores: VectorScores | TextScores, top: int, groups: NDArray[np.int64] | None = None) -> tuple[list[int], list[float]]:
    """The ``top`` best studies and their scores, equal ones by place; of each group the best alone."""
    usable, wanted = scores.usable, top
    while True:
        places = scores.candidates(min(wanted, usable))
        exact = scores.exact(places)
        order = np.lexsort((places, -exact.round(DECIMALS)))
        places, exact = places[order], exact[order]
        if wanted < usable:  # beyond the last that was asked for, the margin's are incomplete
            places, exact = places[:wanted], exact[:wanted]
        if groups is not None:
            kept = np.sort(np.unique(groups[places], return_index=True)[1])
            places, exact = places[kept], exact[kept]
        if len(places) >= top or wanted >= usable:
            return [int(one) for one in places[:top]], [float(one) for one in exact[:top]]
        wanted *= 4


def largest(rough: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The places of the ``count`` largest and of all that could be among them but for rounding."""
    if count < 1:
        return np.zeros(0, np.int64)
    last = np.partition(rough, len(rough) - count)[len(rough) - count]
    return np.flatnonzero(rough >= last - MARGIN * max(1.0, abs(float(last))))


def _fused(by_vector: VectorScores, by_text: TextScores, top: int, groups: NDArray[np.int64] | None) -> tuple[list[int], list[float]]:
    """Reciprocal rank fusion of the first DEPTH of both lists; equal sums by place, of each group the best alone."""
    total: dict[int, float] = {}
    for scores in (by_vector, by_text):
        for rank, place in enumerate(first(scores, DEPTH)[0]):
            total[place] = total.get(place, 0.0) + 1 / (RRF_K + rank + 1)
    order = sorted(total, key=lambda place: (-total[place], place))
    if groups is not None:
        kept: dict[int, int] = {}
        for place in order:
            kept.setdefault(int(groups[place]), place)
        order = list(kept.values())
    return order[:top], [total[place] for place in order[:top]]


def _members(gallery: Gallery, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of studies that have some, and where each study's begin among them."""
    if gallery.one_each:
        return np.arange(len(places)), places
    counts = gallery.starts[places + 1] - gallery.starts[places]
    ends = np.cumsum(counts)
    starts = ends - counts
    at = np.repeat(gallery.starts[places] - starts, counts) + np.arange(int(counts.sum()))
    return starts, np.asarray(gallery.members[at])


def _products(matrix: NDArray[np.float32], rows: NDArray[np.int64] | None, queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows, m) products, some rows at a time; None: of all rows."""
    if rows is None:
        return np.asarray(matrix @ queries.T)
    parts = [matrix[rows[start : start + BLOCK]] @ queries.T for start in range(0, len(rows), BLOCK)]
    return np.concatenate(parts) if parts else np.zeros((0, len(queries)), np.float32)
