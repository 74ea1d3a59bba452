"""Work spread over processes, with results in order and a bounded number of items under way."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

CHUNK = 32
"""Items that go to a process at a time."""
WAITING = 4
"""Chunks per process that are under way, so that a source is not read faster than it is worked on."""

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[tuple[S, T]], workers: int = 1) -> Iterator[tuple[S, R]]:
    """``(key, work(item))`` of each ``(key, item)``, in order; items are read only as far as there is room.

    Args:
        work: picklable if there are several processes, as its items and results. What it raises is raised here.
        items: keys stay in this process.
        workers: processes, started anew; with 1 the work is done in this one.
    """
    if workers == 1:
        for key, item in items:
            yield key, work(item)
        return
    from multiprocessing import get_context

    source = iter(items)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker) as pool:
        waiting: deque[tuple[list[S], Future[list[R]]]] = deque()
        try:
            while chunk := list(itertools.islice(source, CHUNK)):
                waiting.append(([key for key, _ in chunk], pool.submit(_each, work, [item for _, item in chunk])))
                if len(waiting) >= WAITING * workers:
                    yield from _first(waiting)
            while waiting:
                yield from _first(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _each(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [work(item) for item in items]


def _first(waiting: deque[tuple[list[S], Future[list[R]]]]) -> Iterator[tuple[S, R]]:
    keys, future = waiting.popleft()
    yield from zip(keys, future.result(), strict=True)


def _begin_worker() -> None:
    """End with the parent, however that ends; an interrupt is the parent's to handle."""
    import os
    import signal
    import threading
    from multiprocessing import connection, parent_process

    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()
