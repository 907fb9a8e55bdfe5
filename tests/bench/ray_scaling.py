"""Images a second of lseg_ray.py on one GPU, on two, and so on, up to all that the machine has; writes JSON.

    python tests/bench/ray_scaling.py PHOTOS log/ray_gpu.json [--count 4000] [--weights FILE --onnx DIR --engines DIR]

The folder's photos are copied, under other names, until there are as many as asked for. For each number of GPUs the
script runs once on a few parts to warm the disk and then `--runs` times; both label maps and parts are written. Beside
it stands what one GPU does with uint8 pixels in memory, without Ray, decoding or writing: eight images a call. Engines
are there already, or the first run builds them. Busy cores and GPUs are means over the whole process, with Ray's start
and the engines' loading.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

LABELS = "car, road, sky, building, tree, person, sign, other"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--gpus", default=None, help="numbers of GPUs, separated by commas (default: 1, 2, 4, .. all)")
    parser.add_argument("--backend", default="tensorrt")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--weights", default="demo")
    parser.add_argument("--onnx", type=Path, default=ROOT / "onnx")
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--no-label-maps", action="store_true", help="write parts alone")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from lseg.benchmark import machine
    from lseg.cuda import gpu_count

    available = gpu_count()
    counts = [int(n) for n in args.gpus.split(",")] if args.gpus else [n for n in (1, 2, 4, 8) if n <= available]
    report = {"machine": machine(), "gpus": available, "ray": __import__("ray").__version__, "labels": 8}
    report |= {"weights": Path(args.weights).stem, "images": args.count, "label_maps": not args.no_label_maps}
    report |= {"alone": alone(args), "rows": []}
    print(report["alone"], flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spread(args.photos, folder / "photos", args.count)
        spread(args.photos, folder / "few", 128)
        for gpus in counts:
            bulk(args, folder / "few", folder / f"warm_{gpus}", gpus)
            for run in range(args.runs):
                row = bulk(args, folder / "photos", folder / f"out_{gpus}_{run}", gpus)
                report["rows"].append(row)
                print(row, flush=True)
                shutil.rmtree(folder / f"out_{gpus}_{run}")
                args.output.write_text(json.dumps(report, indent=1) + "\n")
    best = {n: max(row["images_a_second"] for row in report["rows"] if row["gpus"] == n) for n in counts}
    report["efficiency"] = {n: round(rate / (best[counts[0]] / counts[0] * n), 3) for n, rate in best.items()}
    print("efficiency", report["efficiency"], flush=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


def spread(photos: Path, folder: Path, count: int) -> None:
    files = sorted(path for path in photos.iterdir() if path.suffix == ".jpg")
    folder.mkdir(parents=True)
    for index in range(count):
        shutil.copy(files[index % len(files)], folder / f"{index:06d}.jpg")


def alone(args: argparse.Namespace) -> dict:
    """One GPU with pixels in memory."""
    import numpy as np

    from lseg.benchmark import summarise
    from lseg.measure import unit_vectors
    from lseg.runner import EngineOptions, open_runner

    engines = EngineOptions(args.engines, args.precision)
    with open_runner(args.backend, args.weights, args.onnx, engines=engines) as runner:
        size, batch = runner.image_size, 8
        pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        text, taken = unit_vectors(8, 512), []
        for turn in range(60):
            start = time.perf_counter()
            runner.segment(pixels, text, best=True)
            if turn >= 10:
                taken.append((time.perf_counter() - start) * 1e3)
        median = summarise(taken)["median"]
        return {"backend": str(runner.identity), "ms_of_eight": median, "images_a_second": round(8e3 / median, 1)}


def bulk(args: argparse.Namespace, photos: Path, output: Path, gpus: int) -> dict:
    command = [sys.executable, ROOT / "lseg_ray.py", photos, "--output", output, "--actors", gpus, "--labels", LABELS]
    command += ["--backend", args.backend, "--precision", args.precision, "--weights", args.weights]
    command += ["--onnx", args.onnx, "--engines", args.engines, *([] if args.no_label_maps else ["--save-labels"])]
    start, usage = time.perf_counter(), Usage()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    seconds, busy = time.perf_counter() - start, usage.stop()
    if done.returncode:
        raise SystemExit(f"lseg_ray.py ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}")
    (found,) = re.findall(r"(\d+) images in ([\d.]+) s,", done.stdout)
    row = {"gpus": gpus, "images": int(found[0]), "work_seconds": float(found[1]), "process_seconds": round(seconds, 1)}
    return row | {"images_a_second": round(int(found[0]) / float(found[1]), 1)} | busy


class Usage:
    """How many cores of the machine are busy, and each GPU's share of the time in which it is."""

    def __init__(self) -> None:
        self._gpus: list[list[float]] = []
        self._done, self._start, self._cpu = threading.Event(), time.perf_counter(), cpu_seconds()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self._done.wait(0.5):
            try:
                lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            except (OSError, subprocess.SubprocessError):
                return  # no GPU here
            self._gpus.append([float(line) for line in lines])

    def stop(self) -> dict[str, object]:
        self._done.set()
        self._watcher.join()
        seconds = time.perf_counter() - self._start
        gpus = [round(sum(each) / len(each), 1) for each in zip(*self._gpus, strict=True)]
        return {"busy_cores": round((cpu_seconds() - self._cpu) / seconds, 2), "gpus_busy_percent": gpus}


def cpu_seconds() -> float:
    """Of all cores, in any program."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main(parse_args())
