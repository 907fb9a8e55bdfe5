"""Work in three steps, so that reading and writing overlap with the network."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
    work: Callable[[Item, Loaded], Made],
    store: Callable[[Item, Made], Stored],
    workers: int | None = None,
    callers: int = 1,
) -> Iterator[tuple[Item, Stored | UserError]]:
    """Runs every item through `load`, `work` and `store` in threads, a few items at a time.

    Args:
        items: in this order they are loaded and worked on.
        load: reads an item.
        work: uses the network.
        store: writes what it gave.
        workers: threads that load and store; by default one for each of the machine's cores, from 4 to 16.
        callers: threads that `work`; a single one is this thread. With two, one brings its results in order while the
            network serves the other.

    Yields:
        each item, in order of its end, with what `store` gave; or with the UserError of `load`: that item is skipped.

    Raises:
        whatever `work` or `store` raise. What was begun to be stored is finished first.
    """
    workers = workers or min(16, max(4, os.cpu_count() or 4))
    waiting: deque[tuple[Item, Future[Loaded]]] = deque()
    working: deque[tuple[Item, Future[Made]]] = deque()
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

    def begin(item: Item, loaded: Loaded) -> Future[Made]:
        if network:
            return network.submit(work, item, loaded)
        future: Future[Made] = Future()
        future.set_result(work(item, loaded))
        return future

    def hand_over() -> None:
        """The first item that is being worked on goes to be stored."""
        item, made = working.popleft()
        storing.append((item, pool.submit(store, item, made.result())))

    try:
        read_ahead()
        while waiting:
            item, future = waiting.popleft()
            read_ahead()
            try:
                loaded = future.result()
            except UserError as error:
                yield item, error
                continue
            working.append((item, begin(item, loaded)))
            while len(working) >= callers:
                hand_over()
            while storing and (len(storing) >= workers or storing[0][1].done()):
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
