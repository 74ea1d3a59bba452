"""The studies of a source into shards, over any number of processes, so that a run can be stopped anywhere and goes on where it was.

The source is parted in its own order, so many studies to a part, whoever embeds it; each process goes through the source, which is cheap,
and reads the images and states the facts of its own parts alone. A shard is a function of its part and the model: a process remembers
nothing from one to the next. A shard that is there, whole and of what the source has now is passed over; one that is damaged is made anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvl.model import DualEncoder, batches
from tasks.archive.ingest import BATCH, Encoder, embedded
from tasks.archive.records import ArchivedStudy, ModelKey, StudyVectors
from tasks.archive.shards import (
    PLAN,
    DamagedShardError,
    Plan,
    Shard,
    ShardError,
    made_of,
    misfit,
    read_plan,
    read_shard,
    shard_path,
    shards_in,
    wordless,
    write_plan,
    write_shard,
)
from tasks.archive.sources import Candidate, ReportReader, Source
from tasks.archive.store import ArchiveError, checked_vector

if TYPE_CHECKING:
    from medvl.training.ranks import Rank, Ranks

STUDIES = 512
"""Studies of a shard."""
NAMED = 10
"""Shards that a message names; the rest are counted."""

Progress = Callable[[str], AbstractContextManager[Callable[[int], None]]]
"""Shows how far something is: called with what is counted, gives what is called with how many more are done."""


@dataclass(frozen=True)
class Part:
    """Studies that follow each other in a source."""

    number: int
    studies: tuple[Candidate, ...] = field(repr=False)
    rejected: tuple[tuple[str, str], ...] = field(repr=False)
    """What could not be used on the way to the last of them."""


@dataclass(frozen=True)
class Told:
    """What became of a part."""

    number: int
    studies: int
    rejected: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    damaged: bool = False
    wrong: str | None = None
    """Why its shard is not to be passed over, nor to be made anew unasked."""


@dataclass(frozen=True)
class Embedded:
    """What there is at the end."""

    shards: int
    studies: int
    made: int
    """Shards of this run; the others were there."""
    damaged: int
    """Those among them that were there and had to be made anew."""
    rejected: list[tuple[str, str]] = field(repr=False)


def parted(source: Source, size: int) -> Iterator[Part]:
    """The parts of a source: ``size`` studies each, the last of what is left; it may hold rejects alone."""
    rejected: list[tuple[str, str]] = []
    studies: list[Candidate] = []
    number = 0
    for study in source(lambda place, reason: rejected.append((place, reason))):
        studies.append(study)
        if len(studies) == size:
            yield Part(number, tuple(studies), tuple(rejected))
            studies.clear()
            rejected.clear()
            number += 1
    if studies or rejected:
        yield Part(number, tuple(studies), tuple(rejected))


def planned(folder: Path, model: ModelKey, asked: Mapping[str, Any], *, with_text: bool) -> Plan:
    """The plan of a folder; a new one if it has none, which is not written yet.

    Args:
        folder: of the shards.
        model: that is to embed.
        asked: options that decide what is in the shards, by their names.
        with_text: keep words.
    Raises:
        ShardError: the shards that are there are of another model, or something else was asked of them.
    """
    plan = read_plan(folder)
    if plan is None:
        if shards_in(folder):
            raise ShardError(f"{folder}: holds shards without a plan ({PLAN}); restore it, or give another --out")
        return Plan(uuid.uuid4().hex, model, asked, None if with_text else os.urandom(32).hex())
    if differing := sorted(name for name in {*plan.asked, *asked} if plan.asked.get(name) != json.loads(json.dumps(asked.get(name)))):
        raise ShardError(f"{folder}: holds shards that were made with another {', '.join(differing)}; give the same, or another --out")
    if plan.model != model:
        raise ShardError(
            f"{folder}: holds shards of the model with weights {plan.model.weights_sha256[:12]}, this one has {model.weights_sha256[:12]} "
            "or reads images otherwise; give the same --model, or another --out"
        )
    return plan


class Embedding:
    """A source on its way into a folder of shards.

    Args:
        folder: of the shards; there already, and the same for all processes.
        plan: of it.
        source: of the studies.
        size: studies of a shard.
        model: the towers.
        reader: of reports.
        with_images: encode the images too.
    """

    def __init__(
        self, folder: Path, plan: Plan, source: Source, size: int, model: DualEncoder, reader: ReportReader, *, with_images: bool = True
    ) -> None:
        self.folder, self.plan, self.size = folder, plan, size
        self._source, self._model, self._reader, self._with_images = source, model, reader, with_images
        self._present: list[int] = []
        self._parts = 0

    def run(self, ranks: Ranks, progress: Progress) -> Embedded:
        """Embed what is missing; to be called in all processes, and the same comes back in all.

        Raises:
            ShardError: shards are there that are of something else; nothing is embedded then.
        """
        with progress("shards looked at") as advance:
            looked = ranks.run(self._there, lambda part: self._look(part, advance))
        wrong = {one.number: one.wrong for one in looked if one.wrong}
        if self._present:
            wrong |= {number: "the source has no such part" for number in self._present if number >= self._parts}
        if wrong:
            self._refuse(wrong)
        there = {one.number: one for one in looked if not one.damaged}
        with progress("studies" if ranks.world == 1 else f"studies of one of {ranks.world} processes") as advance:
            made = ranks.run(lambda rank: self._missing(rank, there), lambda part: self._make(part, advance))
        told = sorted([*there.values(), *made], key=lambda one: one.number)
        studies = sum(one.studies for one in told)
        if ranks.first:
            write_plan(self.folder, replace(self.plan, shards=self._parts, studies=studies))
        damaged = sum(one.damaged for one in looked)
        return Embedded(self._parts, studies, len(made), damaged, [one for part in told for one in part.rejected])

    def _refuse(self, wrong: Mapping[int, str]) -> None:
        first = [f"{shard_path(self.folder, number).name} ({why})" for number, why in sorted(wrong.items())[:NAMED]]
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise ShardError(
            f"{self.folder}: holds shards of something else: {', '.join(first)}{more}. Take these files away to have them made anew, "
            "or give another --out"
        )

    def _begin(self) -> tuple[Plan, list[int]]:
        """Write the plan, take away what a killed run left half, and see what is there."""
        for name in ("shard-*", PLAN):
            for path in self.folder.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)
        if read_plan(self.folder) is None:
            write_plan(self.folder, self.plan)
        return self.plan, list(shards_in(self.folder))

    def _scanned(self, wanted: Callable[[int], bool]) -> Iterator[Part]:
        """Parts of the source; how many there are is known at its end."""
        count = 0
        for part in parted(self._source, self.size):
            count += 1
            if wanted(part.number):
                yield part
        self._parts = count

    def _there(self, rank: Rank) -> Iterator[Part]:
        """The parts whose shards this process looks at."""
        self.plan, self._present = rank.of_first(self._begin)
        present = set(self._present)
        return self._scanned(lambda number: number in present and number % rank.world == rank.number) if present else iter(())

    def _missing(self, rank: Rank, there: Mapping[int, Told]) -> Iterator[Part]:
        """The parts that this process embeds: they go round, so that each has as many."""
        turn = -1

        def is_ours(number: int) -> bool:
            nonlocal turn
            turn += number not in there
            return number not in there and turn % rank.world == rank.number

        return self._scanned(is_ours)

    def _look(self, part: Part, advance: Callable[[int], None]) -> Told:
        """Whether a shard is whole and of what the source has now."""
        advance(1)
        try:
            shard = read_shard(shard_path(self.folder, part.number))
            wrong = misfit(shard, self.plan, part.number)
        except DamagedShardError:
            return Told(part.number, 0, damaged=True)
        except ShardError as error:
            return Told(part.number, 0, wrong=str(error))
        if wrong is None and shard.made_of != made_of([self._reader.archived(study) for study in part.studies]):
            wrong = "made of other studies, reports or images than the source has now"
        return Told(part.number, len(shard.studies), shard.rejected, wrong=wrong)

    def _make(self, part: Part, advance: Callable[[int], None]) -> Told:
        """Embed a part, and write its shard."""
        encoder = Encoder(self._model, with_images=self._with_images)
        records = [self._reader.archived(study) for study in part.studies]
        rejected = list(part.rejected)
        kept: list[tuple[ArchivedStudy, StudyVectors]] = []
        for some in batches(records, BATCH):
            sound = [study for study in some if _is_unicode(study, rejected)]
            for study, vectors in zip(sound, embedded(encoder, sound, rejected), strict=True):
                if vectors is not None and _is_finite(study, vectors, self.plan.model.width, rejected):
                    kept.append((study if self.plan.key is None else wordless(study, self.plan.key), vectors))
            advance(len(some))
        listed = tuple((_plain(place), _plain(reason)) for place, reason in rejected)
        shard = Shard(part.number, self.plan.set_id, self.plan.model, self.plan.with_text, made_of(records), listed, tuple(kept))
        write_shard(self.folder, shard)
        return Told(part.number, len(kept), listed)


def _is_unicode(study: ArchivedStudy, rejected: list[tuple[str, str]]) -> bool:
    """Whether all of a study can be written; a path may hold bytes that are no text."""
    try:
        json.dumps(dataclasses.asdict(study), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        rejected.append((study.study_id, f"study {study.study_id}: its id, a path or its report is no Unicode text; rename the file"))
        return False
    return True


def _is_finite(study: ArchivedStudy, vectors: StudyVectors, width: int, rejected: list[tuple[str, str]]) -> bool:
    """Whether a store takes the vectors of a study."""
    rows: Sequence[Any] = [vectors.report, *(() if vectors.sentences is None else vectors.sentences), *(vectors.images or ())]
    try:
        for row in rows:
            if row is not None:
                checked_vector(row, width, f"study {study.study_id}")
    except ArchiveError as error:
        rejected.append((study.study_id, str(error)))
        return False
    return True


def _plain(text: str) -> str:
    """What of a text is no Unicode spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
