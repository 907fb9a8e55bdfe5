"""Work in three steps, so that reading and writing overlap with the network."""

from __future__ import annotations

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
    workers: int = 4,
) -> Iterator[tuple[Item, Stored | UserError]]:
    """Runs every item through `load` and `store` in threads and `work` here, a few items at a time.

    Yields:
        each item, in order of its end, with what `store` gave; or with the UserError of `load`: that item is skipped.

    Raises:
        whatever `work` or `store` raise. What was begun to be stored is finished first.
    """
    waiting: deque[tuple[Item, Future[Loaded]]] = deque()
    storing: deque[tuple[Item, Future[Stored]]] = deque()
    source = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="photos")

    def read_ahead() -> None:
        while len(waiting) < workers:
            try:
                item = next(source)
            except StopIteration:
                return
            waiting.append((item, pool.submit(load, item)))

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
            storing.append((item, pool.submit(store, item, work(item, loaded))))
            while storing and (len(storing) >= workers or storing[0][1].done()):
                done, result = storing.popleft()
                yield done, result.result()
        for done, result in storing:
            yield done, result.result()
    finally:
        for _, future in waiting:
            future.cancel()
        pool.shutdown(wait=True)
