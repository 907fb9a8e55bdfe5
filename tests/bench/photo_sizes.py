"""Times photos of growing size, seen whole and in windows, with their peak memory, and writes JSON.

    python tests/bench/photo_sizes.py log/sizes_cpu_demo.json

The bundled photo, enlarged, with 150 labels and the demo weights, from pixels in host memory to the label map at the
photo's size. Each pair of size and mode runs in a process of its own: one warm-up, then RUNS.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

SIZES = ((480, 480), (1000, 1000), (2000, 1500), (4000, 3000), (4000, 4000))  # width, height
MODES = ("whole", "window")
LABELS, RUNS = 150, 3


def measure(mode: str, width: int, height: int, backend: str) -> dict:
    import cv2

    from lseg import Segmenter
    from lseg.benchmark import summarise
    from lseg.image import read_image

    photo = cv2.resize(read_image(ROOT / "image" / "temple.jpg"), (width, height), interpolation=cv2.INTER_CUBIC)
    taken = []
    with Segmenter(backend=backend) as lseg:
        text = lseg.embed([f"thing number {index}" for index in range(LABELS)])
        for turn in range(RUNS + 1):
            start = time.perf_counter()
            lseg.segment(photo, text, mode)
            if turn:
                taken.append((time.perf_counter() - start) * 1e3)
        identity = str(lseg.runner.identity)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    found = {"mode": mode, "width": width, "height": height, "labels": LABELS, "milliseconds": summarise(taken)}
    return {**found, "peak_host_mib": peak, "made_by": identity}


def main(output: Path, backend: str = "auto") -> None:
    from lseg.benchmark import machine

    rows, about = [], machine()
    for mode in MODES:
        for width, height in SIZES:
            command = [sys.executable, __file__, "--one", mode, str(width), str(height), backend]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            rows.append(json.loads(line))
            median = rows[-1]["milliseconds"]["median"]
            print(f"{mode} {width} x {height}: {median:.0f} ms, {rows[-1]['peak_host_mib']} MiB", flush=True)
            output.write_text(json.dumps({"weights": "demo", "machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
