"""What a label map's time on the GPU goes to, kernel by kernel, under Nsight Compute; writes JSON.

    python tests/gpu/profile_kernels.py --weights demo --onnx onnx --engines engines --output log/gpu_profile.json

TensorRT's own profiler stops at its layers, and a library may make one layer of a whole ViT. So each call, from uint8
images in host memory to label maps there, is first timed as it is used, and then runs once more, without a CUDA graph,
in a process that Nsight Compute (`ncu`) holds: it runs one kernel after the other, at the GPU's own clocks and with
warm caches, and times each. Kernels are put together by what their names tell. Written too: what a call takes beyond
the sum of its kernels, which is copies, launches and waiting, less what ran side by side.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from lseg.benchmark import gpu, interleaved, machine, segment_call  # noqa: E402
from lseg.errors import UserError, run  # noqa: E402
from lseg.files import write_files  # noqa: E402
from lseg.measure import unit_vectors  # noqa: E402
from lseg.runner import EngineOptions  # noqa: E402
from testlseg import parse_cases  # noqa: E402

METRICS = ("gpu__time_duration.sum", "launch__grid_size")
# What a kernel's name tells of it; the first that fits counts. cut_windows and the like are this project's own.
KINDS = {
    "pixels to the network's input": "cut_windows",
    "lengths of embeddings": "inverse_length|^products_",
    "labels": "^label",
    "attention": "fmha|mha|flash|attention",
    "convolutions": "fprop|dgrad|conv|implicit|winograd",
    "matrix products": "gemm|cutlass|xmma|matmul",
    "resizing": "resize|interpol",
    "layouts and types": "copy|reformat|permut|transpose|cast|nchw|nhwc",
    "norms, softmax and elementwise": "myl|norm|softmax|pointwise|elementwise|generatedNative|reduce|__",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="demo")
    parser.add_argument("--onnx", type=Path, default=ROOT / "onnx")
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--matmul")
    parser.add_argument("--opt-level", type=int, default=3)
    parser.add_argument("--cases", default="1:8", help="batch:labels, separated by commas (default: 1:8)")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held", metavar="CASE", help=argparse.SUPPRESS)  # in the process that ncu holds
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.held:
        ((batch, labels),) = parse_cases(args.held)
        return once(args, batch, labels)
    ncu = shutil.which("ncu")
    if not ncu:
        raise UserError("Nsight Compute (ncu) is not on the path: install it with CUDA's toolkit")
    report: dict[str, object] = {"machine": machine(), "weights": Path(args.weights).stem, "runs": args.runs}
    for batch, labels in parse_cases(args.cases):
        case = f"{batch}:{labels}"
        report[case] = entry = usual(args, batch, labels)
        report["machine"] |= {"gpu": gpu()}
        entry |= summary(kernels(ncu, case))
        entry["total_less_kernels_ms"] = round(entry["total_ms"]["median"] - entry["kernels_ms"], 3)
        write_files({args.output: (json.dumps(report, indent=1) + "\n").encode()})
        print(json.dumps({key: value for key, value in entry.items() if key != "kernels"}, indent=1), flush=True)


def opened(args: argparse.Namespace, graphs: bool):
    from lseg.run_tensorrt import TensorRTRunner

    options = EngineOptions(args.engines, args.precision, args.matmul, args.opt_level)
    return TensorRTRunner(args.weights, args.onnx, options, cuda_graphs=graphs)


def random_pixels(size: int, batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def usual(args: argparse.Namespace, batch: int, labels: int) -> dict[str, object]:
    """Milliseconds of calls as they are used."""
    with opened(args, graphs=True) as runner:
        call = segment_call(runner, random_pixels(runner.image_size, batch), unit_vectors(labels, 512))
        found, errors = interleaved({"call": call}, 20, args.runs)
        if errors:
            raise UserError(errors["call"])
        total = found["call"]["total"]
        return {"backend": str(runner.identity), "build_seconds": runner.build_seconds, "total_ms": total}


def once(args: argparse.Namespace, batch: int, labels: int) -> None:
    """A call that the profiler sees, after three that it does not."""
    with opened(args, graphs=False) as runner:
        pixels, text = random_pixels(runner.image_size, batch), unit_vectors(labels, 512)
        for _ in range(3):
            runner.segment(pixels, text)
        with runner.device:
            runner.device.driver.start_profiler()
            runner.segment(pixels, text)
            runner.device.driver.stop_profiler()


def kernels(ncu: str, case: str) -> list[dict[str, str]]:
    """Each kernel of a call, in order, as Nsight Compute's table has it."""
    # The same command again, with whatever script this one runs under.
    command = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"]
    command += ["--metrics", ",".join(METRICS), "--csv", "--page", "raw", "--print-units", "base"]
    command += [sys.executable, *sys.orig_argv[1:], "--held", case]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    header = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None or done.returncode:
        raise UserError(f"ncu gave no table: {done.stdout[-600:]} {done.stderr[-600:]}")
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[header:]))))
    return [row for row in rows if row["ID"]]  # the row after the header holds units


def summary(rows: list[dict[str, str]]) -> dict[str, object]:
    """Microseconds by kind, and every kernel in order: its name, microseconds and blocks."""
    kinds: dict[str, list[float]] = {}
    order = []
    for row in rows:
        name, taken = row["Kernel Name"][:160], float(row[METRICS[0]].replace(",", "")) / 1e3
        kind = next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "other")
        kinds.setdefault(kind, []).append(taken)
        order.append([name, round(taken, 2), int(float(row[METRICS[1]].replace(",", "")))])

    total = sum(sum(each) for each in kinds.values()) / 1e3
    ordered = sorted(kinds.items(), key=lambda pair: -sum(pair[1]))
    table = {kind: {"kernels": len(each), "microseconds": round(sum(each), 1)} for kind, each in ordered}
    return {"kernels_ms": round(total, 3), "kinds": table, "kernels": order}


if __name__ == "__main__":
    run(lambda: main(parse_args()))
