"""Times photos of growing size, seen whole and in windows, with their peak memory, and writes JSON.

    python tests/bench/photo_sizes.py log/sizes_cpu_demo.json

The bundled photo, enlarged, with 150 labels, from pixels in host memory to the label map at the photo's size. Each pair
of size and mode runs in a process of its own: one warm-up, then the runs. The GPU's memory is what is in use more than
before, by anyone, at its highest.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from model_options import add_model_options

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]

SIZES = "480x480,1000x1000,2000x1500,4000x3000,4000x4000"  # width and height
LABELS = 150


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    add_model_options(parser)
    parser.add_argument("--modes", default="whole,window")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--leave-mib", type=int, help="hold the GPU's memory but for so much, as a smaller GPU has it")
    parser.add_argument("--one", nargs=3, metavar=("MODE", "WIDTH", "HEIGHT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, mode: str, width: int, height: int) -> dict:
    import cv2
    import numpy as np

    from lseg import Segmenter
    from lseg.benchmark import gpu_memory_mib, summarise
    from lseg.image import read_image

    photo = cv2.resize(read_image(ROOT / "image" / "temple.jpg"), (width, height), interpolation=cv2.INTER_CUBIC)
    rng, taken, most, done = np.random.default_rng(0), [], [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], gpu_memory_mib() or 0.0)

    with ExitStack() as stack:
        if args.leave_mib is not None:
            from little_memory import little_memory

            stack.enter_context(little_memory(args.leave_mib))
        before = gpu_memory_mib()
        lseg = stack.enter_context(Segmenter(args.weights, args.backend, onnx=args.onnx, engines=args.engines))
        text = rng.standard_normal((LABELS, 512)).astype(np.float32)
        text /= np.linalg.norm(text, axis=1, keepdims=True)
        identity = str(lseg.runner.identity)
        for turn in range(args.runs + 1):
            start = time.perf_counter()
            lseg.segment(photo, text, mode)
            if turn:
                taken.append((time.perf_counter() - start) * 1e3)
        if before is not None:
            watcher = threading.Thread(target=watch)
            watcher.start()
            for _ in range(20):
                lseg.segment(photo, text, mode)
            done.set()
            watcher.join()
    found = {"mode": mode, "width": width, "height": height, "labels": LABELS, "milliseconds": summarise(taken)}
    found |= {"peak_host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, "made_by": identity}
    return found | ({} if before is None else {"peak_gpu_mib": round(most[0] - before)})


def main(args: argparse.Namespace) -> None:
    if args.one:
        print(json.dumps(measure(args, args.one[0], int(args.one[1]), int(args.one[2]))))
        return
    from lseg.benchmark import machine

    rows, about = [], machine()
    for mode in args.modes.split(","):
        for width, height in (size.split("x") for size in args.sizes.split(",")):
            # sys.orig_argv: what ran this script may have prepared the process.
            command = [*sys.orig_argv, "--one", mode, width, height]
            line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            rows.append(json.loads(line))
            print({key: rows[-1][key] for key in rows[-1] if key != "made_by"}, flush=True)
            report = {"weights": Path(args.weights).stem, "machine": about, "rows": rows}
            report |= {} if args.leave_mib is None else {"gpu_mib_left": args.leave_mib}
            args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args())
