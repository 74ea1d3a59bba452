"""Folders of shards into a store: shard by shard, so many studies in a transaction; the same again changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medvl.model import batches
from tasks.archive.ingest import BATCH, Ingested, check_key, write_new
from tasks.archive.records import ArchivedStudy, StudyVectors
from tasks.archive.shards import PLAN, Plan, ShardError, misfit, read_head, read_plan, read_shard, shard_path, shards_in
from tasks.archive.store import ArchiveStore

AGAIN = "the same `medvl index embed` command again makes what is missing"


@dataclass(frozen=True)
class ShardFolder:
    """What is in a folder of shards."""

    folder: Path
    plan: Plan | None
    shards: dict[int, Path] = field(repr=False)

    @classmethod
    def at(cls, folder: Path) -> ShardFolder:
        """The folder at a path.

        Raises:
            ShardError: no folder, none of shards, or a plan that cannot be read.
        """
        if not folder.is_dir():
            raise ShardError(f"{folder}: no such folder; expected the --out of `medvl index embed`")
        found = cls(folder, read_plan(folder), shards_in(folder))
        if found.plan is None and not found.shards:
            raise ShardError(f"{folder}: holds no shards; expected the --out of `medvl index embed`")
        return found

    def with_text(self) -> bool:
        """Whether the shards hold words; as the plan says, without one as the first that can be read does."""
        if self.plan is not None:
            return self.plan.with_text
        return next((kept for path in self.shards.values() if (kept := _with_text(path)) is not None), True)

    def missing(self) -> list[str]:
        """The names of shards that should be there."""
        count = 0 if self.plan is None or self.plan.shards is None else self.plan.shards
        return [shard_path(self.folder, number).name for number in range(count) if number not in self.shards]

    def incomplete(self) -> str | None:
        """What is missing, in words; None: nothing."""
        if missing := self.missing():
            count = self.plan.shards if self.plan is not None else 0
            return f"{self.folder}: {len(missing)} of {count} shards are missing: {', '.join(missing)}; {AGAIN}"
        if self.plan is None:
            return f"{self.folder}: has no {PLAN}, so that it cannot be told whether shards are missing; {AGAIN}, once it is restored"
        if self.plan.shards is None:
            return f"{self.folder}: has {len(self.shards)} shards, and the embedding did not come to the end of its source; {AGAIN}"
        return None


def _with_text(path: Path) -> bool | None:
    """Whether a shard holds words; None of one that cannot be read."""
    try:
        return read_head(path).with_text
    except ShardError:
        return None


def merge(store: ArchiveStore, found: ShardFolder, done: Ingested, advance: Callable[[int], None] = lambda count: None) -> list[str]:
    """Write the shards of a folder into a store.

    Args:
        store: where to.
        found: the folder.
        done: is added to; what the embedding rejected, and shards that cannot be used, are listed there.
        advance: called with how many shards more are done, after their studies are safe on the disk.
    Returns:
        The names of shards that cannot be used.
    Raises:
        ArchiveError: a store that cannot be written to, or is of the same weights with another preprocessing; what was written stays.
    """
    unusable = []
    plan = found.plan
    for number, path in found.shards.items():
        try:
            shard = read_shard(path)
            if plan is not None and (wrong := misfit(shard, plan, number)):
                raise ShardError(f"{path}: {wrong}; take it away, and {AGAIN}")
        except ShardError as error:
            unusable.append(path.name)
            done.rejected.append((str(path), str(error)))
        else:
            check_key(store, shard.model)
            model = store.model(shard.model)
            for part in batches(shard.studies, BATCH):
                _write(store, part, model, done)
            done.rejected.extend(shard.rejected)
        advance(1)
    return unusable


def _write(store: ArchiveStore, part: Sequence[tuple[ArchivedStudy, StudyVectors]], model: int, done: Ingested) -> None:
    vectors = {study.study_id: one for study, one in part}
    write_new(store, [study for study, _ in part], lambda wanted: [vectors[study.study_id] for study in wanted], model, done)
