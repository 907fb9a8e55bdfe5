"""lseg_ray.py's stages with waits in them, so that kills fall into work and not into Ray's start.

Workers import this: it loads no more than the product's own stages do.
"""

from __future__ import annotations

import random
import time

from lseg.bulk import Stages
from lseg.bulk_stages import Network, Part, Wanted, decode, write

WAIT = 0.1  # seconds at most, in each stage of a part, before its work and after


def slow_decode(part: Part, wanted: Wanted) -> Part:
    wait()
    return decode(part, wanted)


class SlowNetwork(Network):
    def __call__(self, part: Part) -> Part:
        result = super().__call__(part)
        wait()
        return result


def slow_write(part: Part, wanted: Wanted) -> Part:
    """What is written stands for a while before anybody hears of it."""
    wait()
    result = write(part, wanted)
    wait()
    return result


def wait() -> None:
    time.sleep(random.uniform(0, WAIT))


STAGES = Stages(slow_decode, SlowNetwork, slow_write)
