"""Which items a batch has: shuffled, shard by shard, balanced by findings, of several modalities.

A sampler is a pure function of (seed, epoch): a run resumed from any step goes on with the very next batch. A batch is one for all
processes; each is given all its draws (:class:`medvl.data.studies.Draw`), those of others for their words alone.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from medvl.data.studies import Draw, generator


class EpochBatches(Sampler[list[Draw]]):
    """Shuffled batches that are a pure function of (seed, epoch); ``start`` skips what a resumed epoch has already seen.

    A batch is one for all processes: each is given all its draws, those of others for their words alone, so that it can be paired whole.

    Args:
        count: items in the data set.
        batch_size: items per batch and process.
        seed: of the shuffle.
        rank, world_size: which share of each batch is this process's.
        drop_last: leave out the last, smaller batch of an epoch unless it is the only one. Else it is shared out as evenly as can be; it is
            left out all the same where it has not an item for every process.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1, drop_last: bool = True) -> None:
        if count < world_size:
            raise ValueError(f"{count} items cannot be shared between {world_size} processes")
        self.batch_size = min(batch_size, count // world_size) * world_size
        self.count, self.seed, self.rank, self.world_size, self.drop_last = count, seed, rank, world_size, drop_last
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration serves."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (not self.drop_last and rest >= self.world_size)

    def order(self) -> NDArray[np.intp]:
        """The items of this epoch in the order they are served in."""
        return generator(self.seed, "order", self.epoch).permutation(self.count)

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self.order()
        start, self.start = self.start, 0
        for batch in range(start, len(self)):
            shares = np.array_split(order[batch * self.batch_size : (batch + 1) * self.batch_size], self.world_size)
            yield [Draw(self.epoch, int(i), rank, rank != self.rank) for rank, share in enumerate(shares) for i in share]


class ShardBatches(EpochBatches):
    """Batches of images in shards: shards are shuffled, and the images of so many shards at a time; otherwise as :class:`EpochBatches`.

    An epoch fetches each shard once, and holds ``window`` of them.

    Args:
        shards: of each item, the number of its shard.
        window: shards whose items are shuffled together.
        others: as there.
    """

    def __init__(
        self,
        shards: Sequence[int],
        window: int,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        super().__init__(len(shards), batch_size, seed, rank=rank, world_size=world_size, drop_last=drop_last)
        self.shards, self.window = np.asarray(shards), window

    def order(self) -> NDArray[np.intp]:
        """The items of this epoch in the order they are served in."""
        rng = generator(self.seed, "order", self.epoch)
        numbers = np.unique(self.shards)
        turn = np.zeros(int(numbers.max(initial=-1)) + 1, dtype=np.intp)
        turn[rng.permutation(numbers)] = np.arange(len(numbers)) // self.window
        order = rng.permutation(self.count)
        return order[np.argsort(turn[self.shards[order]], kind="stable")]


class BalancedBatches(EpochBatches):
    """Shuffled batches in which common findings are drawn less often, or no patient comes twice; otherwise as :class:`EpochBatches`.

    Args:
        chances: of each item, to be in an epoch, above 0 to 1 (:func:`capped`); an epoch has as many items as they add to, and each item is
            in it with just its chance. None: all items are.
        patients: of each item, a number; a batch (of all processes) then has no two of one, as long as there are others left. None: any.
        others: as there.
    """

    def __init__(
        self,
        chances: NDArray[np.float64] | None,
        patients: Sequence[int] | None,
        count: int,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        served = count if chances is None else int(np.floor(chances.sum() + 1e-9))
        super().__init__(served, batch_size, seed, rank=rank, world_size=world_size, drop_last=drop_last)
        self.items, self.chances, self.patients = count, chances, patients

    def order(self) -> NDArray[np.intp]:
        """The items of this epoch in the order they are served in."""
        rng = generator(self.seed, "order", self.epoch)
        order = rng.permutation(self.items)
        if self.chances is not None:  # systematic sampling: each item lies on a line with a length of its chance, and every 1 one is taken
            ends = np.cumsum(self.chances[order])
            taken = np.searchsorted(ends, rng.random() + np.arange(self.count), side="right")
            order = order[taken[taken < len(order)]]
            order = np.append(order, rng.choice(np.setdiff1d(np.arange(self.items), order), self.count - len(order), replace=False))
            order = rng.permutation(order)
        return order if self.patients is None else apart(order, self.patients, self.batch_size)


def capped(findings: Sequence[Sequence[str]], cap: int) -> NDArray[np.float64]:
    """Chance of each item to be in an epoch, so that a finding that more than ``cap`` items have is drawn about ``cap`` times by itself.

    With n_f the number of items with finding f (items without any have the finding "none"), each finding of an item keeps it with the
    chance min(1, cap / n_f): 1 - prod_f (1 - min(1, cap / n_f)).

    Raises:
        ValueError: a cap below 1.
    Source: "Demystifying CLIP Data" (MetaCLIP), arXiv:2309.16671, algorithm 1, with findings in the place of its queries.
    """
    if cap < 1:
        raise ValueError(f"cap is {cap}, expected at least 1")
    names = [found or ("none",) for found in findings]
    count = Counter(name for found in names for name in set(found))
    return np.array([1 - math.prod(1 - min(1.0, cap / count[name]) for name in set(found)) for found in names])


def apart(order: NDArray[np.intp], patients: Sequence[int], size: int) -> NDArray[np.intp]:
    """The items in about their order, so that of ``size`` that follow each other no two are of one patient while there are others left."""
    left = deque(order.tolist())
    found: list[int] = []
    while left:
        batch: list[int] = []
        passed: list[int] = []
        here: set[int] = set()
        while left and len(batch) < size:
            item = left.popleft()
            (passed if patients[item] in here else batch).append(item)
            here.add(patients[item])
        left.extendleft(reversed(passed))  # they come first in the next
        while left and len(batch) < size:  # no other patients are left
            batch.append(left.popleft())
        found += batch
    return np.array(found, dtype=order.dtype)


class MixedBatches(EpochBatches):
    """Batches with so many items of each group (radiographs, CT) in each process's share; otherwise as :class:`EpochBatches`.

    An epoch is over when the group that takes longest has been served once; the others are served again, in another order each time.

    Args:
        groups: of each item, which group it is of: 0, 1, ...
        sizes: items of each group in a batch and process.
        others: as there.
    Raises:
        ValueError: a group with fewer items than a batch takes.
    """

    def __init__(self, groups: Sequence[int], sizes: Sequence[int], seed: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(len(groups), sum(sizes), seed, rank=rank, world_size=world_size)
        self.sizes = tuple(sizes)
        self.members = [np.flatnonzero(np.asarray(groups) == group) for group in range(len(sizes))]
        for group, (members, size) in enumerate(zip(self.members, sizes, strict=True)):
            if len(members) < size * world_size:
                raise ValueError(f"group {group} has {len(members)} items, a batch takes {size} in each of {world_size} processes")

    def __len__(self) -> int:
        return max(len(members) // (size * self.world_size) for members, size in zip(self.members, self.sizes, strict=True))

    def __iter__(self) -> Iterator[list[Draw]]:
        start, self.start = self.start, 0
        steps = [size * self.world_size for size in self.sizes]
        orders = [self._served(group, len(self) * step) for group, step in enumerate(steps)]
        for batch in range(start, len(self)):
            chosen = [
                order[batch * step : (batch + 1) * step].reshape(self.world_size, -1) for order, step in zip(orders, steps, strict=True)
            ]
            ranks = range(self.world_size)
            yield [Draw(self.epoch, int(i), rank, rank != self.rank) for rank in ranks for part in chosen for i in part[rank]]

    def _served(self, group: int, count: int) -> NDArray[np.intp]:
        """So many items of a group, each pass over them in an order of its own."""
        members = self.members[group]
        passes = range(-(-count // len(members)))
        return np.concatenate([generator(self.seed, "order", self.epoch, group, k).permutation(members) for k in passes])[:count]
