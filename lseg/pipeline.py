"""Work in three steps, so that reading and writing overlap with the network."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from lseg.errors import UserError

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Made = TypeVar("Made")
Stored = TypeVar("Stored")


def overlapped(
    items: Iterable[Item],
    load: Callable[[Item], Loaded],
    work: Callable[[list[tuple[Item, Loaded]]], Sequence[Made]],
    store: Callable[[Item, Made], Stored],
    workers: int | None = None,
    callers: int = 1,
    group: int = 1,
) -> Iterator[tuple[Item, Stored | UserError]]:
    """Runs every item through `load`, `work` and `store` in threads, a few items at a time.

    Args:
        items: in this order they are loaded and worked on.
        load: reads an item.
        work: uses the network, for a group of items; gives as many results.
        store: writes what it gave of an item.
        workers: threads that load and store; by default one for each of the machine's cores, from 4 to 16.
        callers: threads that `work`; a single one is this thread. Of several, some bring their results in order while
            the network serves another.
        group: items that are worked on at once; the last group may be of fewer.

    Yields:
        each item, in order of its end, with what `store` gave; or with the UserError of `load`: that item is skipped.

    Raises:
        whatever `work` or `store` raise. What was begun to be stored is finished first.
    """
    workers = workers or min(16, max(4, os.cpu_count() or 4))
    waiting: deque[tuple[Item, Future[Loaded]]] = deque()
    gathered: list[tuple[Item, Loaded]] = []
    working: deque[tuple[list[tuple[Item, Loaded]], Future[Sequence[Made]]]] = deque()
    storing: deque[tuple[Item, Future[Stored]]] = deque()
    source = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="photos")
    network = ThreadPoolExecutor(callers, thread_name_prefix="network") if callers > 1 else None

    def read_ahead() -> None:
        while len(waiting) < workers:
            try:
                item = next(source)
            except StopIteration:
                return
            waiting.append((item, pool.submit(load, item)))

    def begin(pairs: list[tuple[Item, Loaded]]) -> Future[Sequence[Made]]:
        if network:
            return network.submit(work, pairs)
        future: Future[Sequence[Made]] = Future()
        future.set_result(work(pairs))
        return future

    def hand_over() -> None:
        """The first group that is being worked on goes to be stored."""
        pairs, future = working.popleft()
        for (item, _), made in zip(pairs, future.result(), strict=True):
            storing.append((item, pool.submit(store, item, made)))

    try:
        read_ahead()
        while waiting:
            item, future = waiting.popleft()
            read_ahead()
            try:
                gathered.append((item, future.result()))
            except UserError as error:
                yield item, error
            if len(gathered) < (group if waiting else 1):  # the last group is what there is
                continue
            working.append((gathered, begin(gathered)))
            gathered = []
            while len(working) >= callers:
                hand_over()
            while storing and (len(storing) >= max(workers, group) or storing[0][1].done()):
                done, result = storing.popleft()
                yield done, result.result()
        while working:
            hand_over()
        for done, result in storing:
            yield done, result.result()
    finally:
        for _, future in (*waiting, *working):
            future.cancel()
        if network:
            network.shutdown(wait=True)
        pool.shutdown(wait=True)
