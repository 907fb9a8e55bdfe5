"""What a call needs for itself alone: while the GPU works on one call's images, another fills and reads its own."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from lseg.cuda import Buffer
from lseg.recipes import LABELS_A_PASS
from lseg.stages import Stages

AT_ONCE = 2  # calls: one on the GPU, one queued behind it


class Slot:
    """A call's images, texts and results, each with a page-locked twin on the host, and its times on the GPU.

    Attributes:
        lock: held by the call.
        begun, done: events around the call's work on the stream.
    """

    def __init__(self, stages: Stages, index: int):
        self.index, self.lock, self._stages = index, threading.Lock(), stages
        # To wait for them keeps a core busy; events that block would leave it to others, and tell of the end later.
        self.begun, self.done = (stages.device.driver.Event() for _ in range(2))
        self._text: np.ndarray | None = None  # the texts that the GPU holds

    def buffer(self, name: str, count: int, dtype: np.dtype | type) -> Buffer:
        """See `Stages.buffer`."""
        return self._stages.buffer(f"{name} of call {self.index}", count, dtype, host=True)

    def upload_text(self, text: np.ndarray) -> int:
        """The address of texts float32 [N, D], N up to 256, where they stay until others come. Waits for nothing.

        Only after the slot's last call is done.
        """
        buffer = self.buffer("text", LABELS_A_PASS * self._stages.dimension, np.float32)
        if self._text is None or not np.array_equal(self._text, text):
            self._text = None  # whatever happens before they are on their way
            buffer.write(self._stages.stream, text)
            self._text = text.copy()
        return buffer.address

    def wait(self, start: float) -> float:
        """Waits for the end of a call; returns its milliseconds, without those of others' work before it.

        Args:
            start: when it began to be enqueued, by `time.perf_counter`.
        """
        if not self.begun.query():  # the GPU is at another call
            self.begun.synchronize()
            start = time.perf_counter()
        self.done.synchronize()
        return (time.perf_counter() - start) * 1e3

    def close(self) -> None:
        """Forgets its events, which end with the last that knows them."""
        self.begun = self.done = None


class Slots:
    """The slots of one runner. Use with the device current."""

    def __init__(self, stages: Stages):
        self._slots = [Slot(stages, index) for index in range(AT_ONCE)]
        self._turns = itertools.count()

    @contextmanager
    def take(self) -> Iterator[Slot]:
        """A slot for one call: the first that is free, which a lone caller gets each time; else one to wait for."""
        free = [slot for slot in self._slots if not slot.lock.locked()]
        slot = free[0] if free else self._slots[next(self._turns) % AT_ONCE]
        with slot.lock:
            yield slot

    @contextmanager
    def all(self) -> Iterator[list[Slot]]:
        """Every slot: no call is under way then."""
        with ExitStack() as stack:
            for slot in self._slots:  # in this order, always: two threads may want all
                stack.enter_context(slot.lock)
            yield self._slots
