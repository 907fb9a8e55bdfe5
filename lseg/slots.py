"""What a call needs for itself alone: while the GPU works on one call's images, another fills and reads its own."""

from __future__ import annotations

import queue
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
        begun, done: events around the call's work on the stream.
    """

    def __init__(self, stages: Stages, index: int):
        self.index, self._stages = index, stages
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

    def milliseconds(self) -> float:
        """From when the GPU began the call to its end, which is waited for."""
        self.done.synchronize()
        return self.done.time_since(self.begun)

    def close(self) -> None:
        """Forgets its events, which end with the last that knows them."""
        self.begun = self.done = None


class Slots:
    """The slots of one runner. Use with the device current."""

    def __init__(self, stages: Stages):
        self._free: queue.LifoQueue[Slot] = queue.LifoQueue()  # a lone caller has the same one each time
        for index in reversed(range(AT_ONCE)):
            self._free.put(Slot(stages, index))

    @contextmanager
    def take(self) -> Iterator[Slot]:
        """A slot for one call; waits until one is free."""
        slot = self._free.get()
        try:
            yield slot
        finally:
            self._free.put(slot)

    @contextmanager
    def all(self) -> Iterator[list[Slot]]:
        """Every slot: no call is under way then."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.take()) for _ in range(AT_ONCE)]
