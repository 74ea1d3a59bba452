"""From an archive to neighbours: the studies that an image is nearest to, with what their reports say, for :mod:`tasks.archive.reading`.

Shapes: N studies of the archive; of one query m vectors, D embedding width.

The neighbours of a query are all studies of its k nearest patients, ties with the last of them included, among those that a filter leaves
and that are of no patient of the query: its own reports must not answer. A patient is as near as the nearest of its studies. Taken so, the
neighbours for a smaller k are among those for a larger one with all that they weigh, and nothing hangs on how many hits a search was cut
to. Scores are those of :mod:`tasks.archive.search`, rounded to DECIMALS as its order has them. Reports of the same words are not grouped:
each of their patients votes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from medvl.types import State
from reports.facts.ontology import Ontology
from tasks.archive.filters import NOT_MENTIONED, parse_filter
from tasks.archive.ingest import BATCH, Encoder
from tasks.archive.reading import STATES, Neighbour, NeighbourSentence, ReadingError, ReadingSettings
from tasks.archive.records import ArchivedImage, ArchivedStudy, ModelKey
from tasks.archive.search import DECIMALS, Archive, Mask, Question, VectorScores, first
from tasks.archive.store import ArchiveError
from tasks.report_facts import said_of

Over = Literal["report", "image"]
Voting = Literal["report", "label"]
Asked = tuple[str, Sequence[Path], Sequence[str]]
"""Study id, files, patients."""
REMEMBERED = 2**14
"""Studies whose sentences are kept in memory."""


@dataclass(frozen=True)
class Scope:
    """What neighbours hang on beside the archive: recorded with settings, since what holds for the one need not hold for another.

    Raises:
        ValueError: a value that there is not.
    """

    model: ModelKey
    over: Over = "report"  # an image's nearest reports, or its nearest images
    filter: str | None = None  # in the language of tasks.archive.filters
    voting: Voting = "report"  # what votes: what reports say, or the labels of the manifest

    def __post_init__(self) -> None:
        if self.over not in get_args(Over) or self.voting not in get_args(Voting) or not isinstance(self.filter, str | None):
            raise ValueError(
                f"neighbours over {self.over!r}, voting {self.voting!r}, filter {self.filter!r}; expected {' or '.join(get_args(Over))}, "
                f"{' or '.join(get_args(Voting))}, and a filter in words or None"
            )

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return asdict(self)

    def check(self, settings: ReadingSettings) -> None:
        """Pass if the settings were fitted to neighbours of this scope.

        Raises:
            ReadingError: they were not, or do not say.
        """
        known, own = settings.fitted_on.get("scope"), self.to_dict()
        if not isinstance(known, Mapping):
            raise ReadingError(
                "these settings do not say which model's neighbours they were fitted to; fit them with `medvl calibrate-reading`"
            )
        if known.get("model") != own["model"]:
            raise ReadingError(
                "these settings were fitted to neighbours of another model, preprocessing or --text-policy; run `medvl calibrate-reading`"
            )
        if odd := [name for name in ("over", "filter", "voting") if known.get(name) != own[name]]:
            told = ", ".join(f"{name} {known.get(name)!r} and not {own[name]!r}" for name in odd)
            raise ReadingError(f"these settings were fitted with {told}; take what they were fitted with, or run `medvl calibrate-reading`")


@dataclass(frozen=True)
class Query:
    """A study that asks."""

    study_id: str
    vectors: NDArray[np.floating] | None = field(repr=False)  # (m, D), one an image; None: none of its images could be read
    patients: tuple[str, ...] = field(default=(), repr=False)  # whose studies do not answer


def queries(encoder: Encoder, studies: Iterable[Asked], rejected: list[tuple[str, str]]) -> Iterator[Query]:
    """Studies as queries, in their order, some encoded at a time; their vectors are those that an archive keeps of images.

    Args:
        studies: gone through once.
        rejected: images that cannot be read are added, with the reason.
    """
    part: list[Asked] = []
    for study in studies:
        part.append(study)
        if len(part) == BATCH:
            yield from _encoded(encoder, part, rejected)
            part = []
    yield from _encoded(encoder, part, rejected)


def _encoded(encoder: Encoder, part: Sequence[Asked], rejected: list[tuple[str, str]]) -> Iterator[Query]:
    records = [ArchivedStudy(name, name, "", images=tuple(ArchivedImage(str(path)) for path in paths)) for name, paths, _ in part]
    for (name, _, patients), found in zip(part, encoder.vectors(records, rejected), strict=True):
        rows = [row for row in found.images or () if row is not None]
        yield Query(name, np.stack(rows) if rows else None, tuple(patients))


class NeighbourSearch:
    """An archive as it is now, asked for neighbours.

    Args:
        archive: holds vectors of the scope's model.
        scope: see there.
        ontology: of the findings of reports: what is present or uncertain counts for all that it is a kind of.
        findings: what is asked for, and the order of it; None: all that something that may vote says anything of.
    Raises:
        ArchiveError: no vectors of the model of this kind, or nothing that could vote.
        FilterError: a filter that is none.
    """

    def __init__(self, archive: Archive, scope: Scope, ontology: Ontology, findings: Sequence[str] | None = None) -> None:
        self.scope, self._store, self._derived = scope, archive.store, archive.derived
        number = archive.model(scope.model)
        if scope.over not in self._derived.kinds(number):
            other = " or ".join(kind for kind in ("report", "image") if kind in self._derived.kinds(number))
            raise ArchiveError(
                f"{self._store.name}: has no {scope.over} vectors of this model"
                + (f"; take --over {other}" if other else "; index studies")
            )
        self._gallery = self._derived.gallery(number, scope.over)
        self._columns = self._derived.columns
        voters = self._columns.facts if scope.voting == "report" else self._columns.labels
        known = [name for name in self._derived.findings if name in voters and bool((voters[name] != NOT_MENTIONED).any())]
        if not known:
            told = "keeps no report that says anything of a finding" if scope.voting == "report" else "keeps no labels"
            other = "; --voting label asks the labels of its manifest" if scope.voting == "report" else "; --voting report asks its reports"
            raise ArchiveError(f"{self._store.name}: {told}, so that nothing can vote{other}")
        self.findings = tuple(known if findings is None else findings)
        self.silent_findings = tuple(name for name in self.findings if name not in known)
        """Of the findings those that nothing says anything of."""
        self._voters = {name: voters[name] for name in self.findings if name in known}
        allowed = np.ones(len(self._derived.numbers), bool)
        if scope.filter is not None:
            allowed = parse_filter(scope.filter, self._derived.findings).mask(self._columns)
        self.allowed: Mask = allowed & (np.diff(self._gallery.starts) > 0)
        """(N,) studies that may answer some query."""
        self._patients = self._columns.text("patient_id")
        asked = set(self.findings)
        self._ancestors = {name: tuple(one for one in ontology.ancestors(name) if one in asked) for name in ontology.findings}
        self._sentences = lru_cache(REMEMBERED)(self._sentences_of)

    @property
    def patients(self) -> int:
        """How many patients may answer."""
        return len(np.unique(self._patients.codes[self.allowed]))

    def facts(self) -> dict[str, Any]:
        """Of the archive, to be recorded."""
        found = {"store": self._store.uid, "generation": self._derived.generation}
        return {**found, "studies": int(self.allowed.sum()), "patients": self.patients}

    def with_known_patients(self, studies: Sequence[Asked]) -> list[Asked]:
        """The same studies, each with the patients too that the archive has a file of it for. A copy elsewhere is not told."""
        names = {path: set(_names_of(path)) for _, paths, _ in studies for path in paths}
        there = self._store.patients_of(sorted({name for of_path in names.values() for name in of_path}))
        return [
            (study, paths, sorted({*patients, *(one for path in paths for name in names[path] for one in there.get(name, ()))}))
            for study, paths, patients in studies
        ]

    def own(self, query: Query) -> Mask:
        """(N,) the studies that do not answer a query: those of its patients, and itself."""
        studies = self._columns.text("study_id")
        themselves = studies.among(studies.places([query.study_id], any_case=False))
        return themselves | self._patients.among(self._patients.places(query.patients, any_case=False))

    def neighbours(self, query: Query, k: int, *, sentences: bool = True) -> tuple[Neighbour, ...]:
        """All studies of the k nearest patients, the nearest first; see the head of the module.

        Args:
            query: with vectors.
            k: at least 1.
            sentences: have them; votes alone do without.
        Raises:
            ArchiveError: a query without vectors or of another width, or a study that was removed meanwhile.
        """
        if query.vectors is None:
            raise ArchiveError(f"study {query.study_id}: none of its images could be read, so it has no neighbours")
        allowed = self.allowed & ~self.own(query)
        scores = VectorScores(self._gallery, Question(query.vectors, over=self.scope.over, allowed=allowed))
        places, values = _of_nearest_patients(scores, self._patients.codes, k)
        order = np.lexsort((places, -values))
        places, values = places[order], values[order]
        numbers = [int(one) for one in self._derived.numbers[places]]
        ids = self._store.ids(numbers)
        if len(ids) != len(numbers):
            raise ArchiveError(f"{self._store.name}: studies were removed meanwhile; ask again")
        said = {name: column[places].tolist() for name, column in self._voters.items()}
        return tuple(
            Neighbour(
                ids[i],
                float(values[i]),
                {name: column[i] for name, column in said.items() if column[i] != NOT_MENTIONED},
                self._sentences(number) if sentences else (),
                self._patients.vocabulary[int(self._patients.codes[places[i]])],
            )
            for i, number in enumerate(numbers)
        )

    def _sentences_of(self, number: int) -> tuple[NeighbourSentence, ...]:
        """The sentences of a study's report that state something, in their order; each as if it were a report of its own."""
        (study,) = self._store.found([number])
        facts = self._store.facts([text for text, _ in study.sentences])
        words: dict[int, State] = {value: state for state, value in STATES.items()}
        found = []
        for text, said in study.sentences:
            stated = said_of(facts[text], self._ancestors)
            for value in dict.fromkeys(stated.values()):
                names = tuple(name for name, one in stated.items() if one == value)
                found += [] if said is None else [NeighbourSentence(said, names, words[value])]
        return tuple(dict.fromkeys(found))


def _of_nearest_patients(scores: VectorScores, patients: NDArray[np.integer], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All studies that may answer of the k nearest patients and of those that tie with the last of them, and their scores."""
    if k < 1:
        raise ValueError(f"k {k}, expected at least 1 patient")
    usable, top = scores.usable, max(64, 4 * k)
    while True:
        found, given = first(scores, min(top, usable)) if usable else ([], [])
        places, values = np.array(found, np.int64), np.round(np.array(given, np.float64), DECIMALS)
        nearest = np.sort(np.unique(patients[places], return_index=True)[1])  # where each patient comes first
        if top >= usable or (len(nearest) >= k and values[-1] < values[nearest[k - 1]]):
            break
        top *= 4
    if len(nearest) > k:
        nearest = nearest[values[nearest] >= values[nearest[k - 1]]]
    members = np.flatnonzero(np.isin(patients, patients[places[nearest]]) & scores.allowed)
    return members, np.round(scores.exact(members), DECIMALS)


def _names_of(path: Path) -> Iterator[str]:
    """What an archive, which keeps texts, may call a file; nothing where its name is none."""
    for name in dict.fromkeys((str(path), os.path.abspath(path), os.path.realpath(path))):  # noqa: PTH100 (a link has a name of its own)
        if not any(0xD800 <= ord(one) < 0xE000 for one in name):  # bytes that are no UTF-8
            yield name
