"""Runs the TensorRT backend for long on a GPU, in ways that would show a leak or a race, and writes JSON.

    python tests/gpu/endurance.py --output log/gpu_endurance.json [--onnx FOLDER --engines FOLDER]

Many images in a loop, four threads that share one `Segmenter`, and one opened and closed many times. Every result must
be the first run's, and memory, the process's and the GPU's, may move by one percent from an early sample to the last.
The GPU's memory is counted over all its programs: nothing else may run there meanwhile. The exit status is 1 where
something does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from lseg import Segmenter  # noqa: E402
from lseg.benchmark import machine  # noqa: E402
from lseg.cuda import Device  # noqa: E402
from lseg.image import read_image  # noqa: E402

WORDS = ["building", "tree", "sky", "road", "pavement", "person", "car", "other"]
DIFFERENT = 16  # photos that go round
FLAT = 0.01  # what memory may move by
SAMPLES = 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", default="demo")
    parser.add_argument("--onnx", type=Path, default=ROOT / "onnx")
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--backend", default="tensorrt")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--openings", type=int, default=200)
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    photo = read_image(ROOT / "image" / "temple.jpg")
    photos = [np.ascontiguousarray(np.roll(photo, 37 * i, axis=1)) for i in range(DIFFERENT)]

    def opened() -> Segmenter:
        return Segmenter(
            args.weights, args.backend, onnx=args.onnx, engines=args.engines, precision=args.precision, say=print
        )

    report: dict[str, object] = {"machine": machine(), "weights": Path(args.weights).stem}
    with opened() as lseg:
        report["backend"] = str(lseg.runner.identity)
        expected = [lseg.segment(photo, WORDS).labels for photo in photos]
        report["loop"] = loop(lseg, photos, expected, args.images)
        report["threads"] = threads(lseg, photos, expected, args.images // 40)
    report["openings"] = openings(opened, photos[0], expected[0], args.openings)
    failed = [name for name in ("loop", "threads", "openings") if not report[name]["holds"]]
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    for name in ("loop", "threads", "openings"):
        print(name, report[name], flush=True)
    return 1 if failed else 0


def loop(lseg: Segmenter, photos: list[np.ndarray], expected: list[np.ndarray], count: int) -> dict:
    """`count` images, one after the other."""
    wrong, samples, start = 0, [], time.perf_counter()
    for turn in tqdm(range(count), desc="images", disable=None):
        found = lseg.segment(photos[turn % len(photos)], WORDS).labels
        wrong += not np.array_equal(found, expected[turn % len(photos)])
        if turn % max(1, count // SAMPLES) == 0:
            samples.append(memory())
    samples.append(memory())
    seconds = time.perf_counter() - start
    return {"images": count, "seconds": round(seconds, 1), "wrong": wrong} | verdict(samples, wrong)


def threads(lseg: Segmenter, photos: list[np.ndarray], expected: list[np.ndarray], count: int, number: int = 4) -> dict:
    """Four times `count` images a thread, with words of its own each: texts and captured graphs change all the time."""
    words = [WORDS[: 8 - i] for i in range(number)]
    wanted = [[lseg.segment(photo, each).labels for photo in photos] for each in words]
    assert all(np.array_equal(a, b) for a, b in zip(wanted[0], expected, strict=True))
    wrong, samples = [0] * number, []

    def work(index: int) -> None:
        for turn in range(count):
            which = (turn + 5 * index) % len(photos)
            wrong[index] += not np.array_equal(lseg.segment(photos[which], words[index]).labels, wanted[index][which])

    for _ in range(4):  # new threads each time: what a thread leaves behind would add up
        workers = [threading.Thread(target=work, args=(i,)) for i in range(number)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        samples.append(memory())
    return {"threads": number, "images_a_thread": 4 * count, "wrong": sum(wrong)} | verdict(samples, sum(wrong))


def openings(opened, photo: np.ndarray, expected: np.ndarray, count: int) -> dict:
    """Opened, used and closed `count` times; memory is looked at when it is closed."""
    wrong, samples, start = 0, [], time.perf_counter()
    for turn in tqdm(range(count), desc="openings", disable=None):
        with opened() as lseg:
            wrong += not np.array_equal(lseg.segment(photo, WORDS).labels, expected)
        if turn % max(1, count // SAMPLES) == 0:
            samples.append(memory())
    samples.append(memory())
    seconds = time.perf_counter() - start
    return {"openings": count, "seconds": round(seconds, 1), "wrong": wrong} | verdict(samples, wrong)


def memory() -> tuple[int, int | None]:
    """Bytes of this process in memory, and of the GPU in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    try:
        device = Device()
    except Exception:  # no GPU: the loop can be tried without one
        return pages * os.sysconf("SC_PAGE_SIZE"), None
    try:
        return pages * os.sysconf("SC_PAGE_SIZE"), device.memory_used()
    finally:
        device.close()


def verdict(samples: list[tuple[int, int | None]], wrong: int) -> dict:
    """Memory in MiB, how far its last sample is from an early one, and whether all holds.

    The first samples warm up: libraries keep pools that fill in the first calls.
    """
    early = samples[len(samples) // 4]
    host = samples[-1][0] / early[0] - 1
    gpu = samples[-1][1] / early[1] - 1 if early[1] else 0.0
    return {
        "host_mib": [a >> 20 for a, _ in samples],
        "gpu_mib": [b and b >> 20 for _, b in samples],
        "host_moved": round(host, 4),
        "gpu_moved": round(gpu, 4),
        "holds": wrong == 0 and host <= FLAT and abs(gpu) <= FLAT,
    }


if __name__ == "__main__":
    sys.exit(main(parse_args()))
