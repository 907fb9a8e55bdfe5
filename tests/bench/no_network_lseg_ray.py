"""lseg_ray.py with its options, and a network that takes a given time and no GPU: for what the rest of it can do.

    LSEG_NETWORK_MS=3.9 python tests/bench/no_network_lseg_ray.py PHOTOS --output DIR --save-labels

Every image waits its turn for LSEG_NETWORK_MS milliseconds (0 unless it is set), as on a GPU, which keeps no core busy.
Labels are bands of the photo's own brightness, so that label maps are about as hard to write as real ones.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import lseg_ray  # noqa: E402
from lseg.bulk import Stages  # noqa: E402
from lseg.bulk_stages import Engines, Network, Wanted  # noqa: E402
from lseg.errors import run  # noqa: E402
from lseg.runner import Identity, Segmentation, Timings  # noqa: E402

MILLISECONDS = float(os.environ.get("LSEG_NETWORK_MS", 0))


class Waiting:
    """A stand-in for a TensorRT runner: see `lseg.runner.Runner`."""

    identity, callers = Identity("no network", "none"), 3

    def __init__(self, alone: bool = False) -> None:
        self._lock = threading.Lock()

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        with self._lock:
            time.sleep(MILLISECONDS * len(pixels) / 1e3)
            labels = np.minimum(pixels[..., 1] >> 5, len(text) - 1)
            return Segmentation(labels, np.full(labels.shape, 0.25, np.float32) if best else None, Timings())


class NoNetwork(Network):
    def __init__(self, engines: Engines, wanted: Wanted, text: np.ndarray | None):
        object.__setattr__(engines, "open", Waiting)  # in place of what opens a backend
        super().__init__(engines, wanted, text)


if __name__ == "__main__":
    run(lambda: lseg_ray.main(lseg_ray.parse_args(), Stages(network=NoNetwork)))
