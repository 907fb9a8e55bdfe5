"""Images a second of lseg_ray.py on one GPU, on two, and so on, up to all that the machine has; writes JSON.

    python tests/bench/ray_scaling.py PHOTOS log/ray_gpu.json --weights FILE --onnx DIR --engines DIR [--count 4096]
    python tests/bench/ray_scaling.py PHOTOS log/ray_cpu_no_network.json --no-network 0 --count 1024

The folder's photos are copied, under other names, until there are as many as asked for. First comes what one GPU does
alone: uint8 pixels in memory, eight a call, by as many threads as keep it busy, without Ray, decoding or writing;
engines are there already, or are built. Then a run on a few photos warms the disk, and each number of GPUs is measured
once; then again, up to `--runs` times, while `--seconds` last. The file is written after each of these.

Both label maps and parts are written. "images_a_second" are over all work, from the cluster's start on, with the
engines' loading; "steady" ones between the first and the last eighth of the parts, as the files' times tell, with what
was busy meanwhile and so what limits: GPUs or cores that are busy for 85 % of the time and more, or neither.
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
import time
from pathlib import Path

from model_options import add_model_options
from usage import Usage

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

LABELS = "car, road, sky, building, tree, person, sign, other"
FULL = 85  # per cent of the time


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240, help="no run begins that would end later (default: 240)")
    parser.add_argument("--gpus", default=None, help="numbers of GPUs, separated by commas (default: 1, 2, 4, .. all)")
    add_model_options(parser, backend="tensorrt")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--part", type=int, default=32)
    parser.add_argument("--no-label-maps", action="store_true", help="write parts alone")
    parser.add_argument(
        "--no-network", type=float, metavar="MS", help="images wait MS milliseconds instead, without a GPU: the rest"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from lseg.benchmark import machine
    from lseg.cuda import gpu_count

    start, available = time.perf_counter(), gpu_count()
    counts = [int(n) for n in args.gpus.split(",")] if args.gpus else [n for n in (1, 2, 4, 8) if n <= available] or [1]
    report = {"machine": machine(), "gpus": available, "ray": __import__("ray").__version__, "labels": 8}
    report |= {"weights": Path(args.weights).stem, "images": args.count, "part": args.part}
    report |= {"label_maps": not args.no_label_maps, "load_before": round(os.getloadavg()[0], 2), "rows": []}

    def keep(**more: object) -> None:
        report.update(more)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(more or report["rows"][-1], flush=True)

    if args.no_network is None:
        keep(alone=alone(args))
    else:
        keep(no_network_ms=args.no_network)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spread(args.photos, folder / "photos", args.count)
        spread(args.photos, folder / "few", min(128, args.count))
        bulk(args, folder / "few", folder / "warm", counts[-1])
        taken: dict[int, float] = {}
        for run in range(args.runs):
            for gpus in counts:
                if time.perf_counter() - start + taken.get(gpus, 0) > args.seconds and taken:
                    continue
                row, taken[gpus] = bulk(args, folder / "photos", folder / f"out_{gpus}_{run}", gpus)
                report["rows"].append(row)
                keep()
                shutil.rmtree(folder / f"out_{gpus}_{run}")
    keep(**scaling(report))


def scaling(report: dict) -> dict[str, object]:
    """The best steady rate of each number of GPUs, to that of one times their number, and to the network's alone."""
    best: dict[int, float] = {}
    for row in report["rows"]:
        rate = row.get("steady", row)["images_a_second"]  # a few parts have no middle
        best[row["gpus"]] = max(best.get(row["gpus"], 0), rate)
    one = best[min(best)] / min(best)
    found = {"efficiency": {n: round(rate / (one * n), 3) for n, rate in best.items()}}
    if "alone" in report:
        network = report["alone"]["images_a_second"]
        found["of_the_network_alone"] = {n: round(rate / (network * n), 3) for n, rate in best.items()}
    return found


def spread(photos: Path, folder: Path, count: int) -> None:
    files = sorted(path for path in photos.iterdir() if path.suffix == ".jpg")
    folder.mkdir(parents=True)
    for index in range(count):
        shutil.copy(files[index % len(files)], folder / f"{index:06d}.jpg")


def alone(args: argparse.Namespace) -> dict:
    """One GPU with pixels in memory."""
    import numpy as np

    from lseg.benchmark import throughput
    from lseg.measure import unit_vectors
    from lseg.runner import EngineOptions, open_runner

    engines = EngineOptions(args.engines, args.precision)
    with open_runner(args.backend, args.weights, args.onnx, engines=engines) as runner:
        size, batch = runner.image_size, 8
        pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        found = throughput(runner, pixels, unit_vectors(8, 512), calls=60, best=True)
        return {"backend": str(runner.identity), **found}


def bulk(args: argparse.Namespace, photos: Path, output: Path, gpus: int) -> tuple[dict, float]:
    """A run of the script: what was measured, and the seconds that it took."""
    script, backend = ROOT / "lseg_ray.py", args.backend
    if args.no_network is not None:
        script, backend = Path(__file__).with_name("no_network_lseg_ray.py"), "onnxruntime"
    command = [sys.executable, script, photos, "--output", output, "--actors", gpus, "--labels", LABELS]
    command += ["--backend", backend, "--precision", args.precision, "--weights", args.weights, "--part", args.part]
    command += ["--onnx", args.onnx, "--engines", args.engines, *([] if args.no_label_maps else ["--save-labels"])]
    environment = os.environ | {"LSEG_NETWORK_MS": str(args.no_network or 0)}
    usage, begun = Usage(), time.time()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    ended = time.time()
    usage.stop()
    if done.returncode:
        raise SystemExit(f"{script.name} ended with {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}")
    (found,) = re.findall(r"(\d+) images? in ([\d.]+) s,", done.stdout)
    row = {"gpus": gpus, "images": int(found[0]), "work_seconds": float(found[1])}
    row |= {"process_seconds": round(ended - begun, 1), "images_a_second": round(int(found[0]) / float(found[1]), 1)}
    times = sorted(part.stat().st_mtime for part in (output / "parts").iterdir())
    row |= {"first_part_after_seconds": round(times[0] - begun, 1), "whole_process": usage.between(begun, ended)}
    cut = len(times) // 8
    first, last = times[cut], times[-1 - cut]
    if last > first:
        steady = {"images_a_second": round((len(times) - 1 - 2 * cut) * args.part / (last - first), 1)}
        steady |= usage.between(first, last)
        row["steady"] = steady | {"limit": limit(steady, gpus)}
    return row, ended - begun


def limit(steady: dict, gpus: int) -> str:
    """What was busy all the time."""
    busy = sorted(steady.get("gpus_busy_percent", []))[-gpus:]
    cores, by = steady.get("busy_cores", 0), steady.get("busy_cores_by", {})
    if busy and sum(busy) / len(busy) >= FULL:
        return "GPUs"
    if cores >= FULL / 100 * len(os.sched_getaffinity(0)):
        return f"CPU cores, most of them for: {max(by, key=by.get)}"
    return "neither GPUs nor CPU cores: what lies between the stages, or the disk"


if __name__ == "__main__":
    main(parse_args())
