"""A GPU on which other programs have left little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lseg.cuda import Device


@contextmanager
def little_memory(mib: int) -> Iterator[None]:
    """Holds the GPU's free memory but for so many MiB, as another program might."""
    with Device() as device:
        held = device.driver.mem_alloc(device.driver.mem_get_info()[0] - (mib << 20))
    try:
        yield
    finally:
        with device:
            held.free()
        device.close()
