"""Kills the project at random moments, many times, and checks what is left and what the next run makes of it.

    python tests/faults.py --kills 200 --output log/faults_cpu.json                 every target that needs no GPU
    python tests/faults.py --kills 200 --seed 5 --target export --output log/faults_cpu.json
    python tests/faults.py --target engine-gpu --onnx onnx --output log/faults_gpu.json --jobs 5 [--through SCRIPT]

Each round starts the work in a process group of its own, kills the group (SIGKILL) after a delay drawn over the length
of an undisturbed run, looks at what is left, and lets the work run again to its end: the exit status must be 0, and the
outputs those of the undisturbed run. The report keeps other targets' entries in --output. The exit status is 1 where a
round found a fault. --jobs shares the kills out to processes with seeds of their own, SEED, SEED + 1 and so on,
and the report is written when all have ended.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # children that are killed and their parents share few cores
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kills.rounds import Report, Settings  # noqa: E402

from lseg.benchmark import machine  # noqa: E402
from lseg.files import write_files  # noqa: E402

TARGETS = {  # and the modules that kill them
    "export": "export",
    "engine": "engine",
    "folder": "folder",
    "download": "download",
    "ray": "bulk",
    "engine-gpu": "engine_gpu",
}
NEEDS_GPU = ("engine-gpu",)
FEW = 20  # kills of a target whose rounds take a minute


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be given again (default: all on a CPU)")
    parser.add_argument("--kills", type=int, help=f"of each target (default: 200; {FEW} for engine-gpu)")
    parser.add_argument("--seed", type=int, help="of the delays and inputs (default: a fresh one)")
    parser.add_argument("--minutes", type=float, help="of each target: no round begins later (default: no limit)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share a target's kills (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="the report, JSON: written after each round")
    parser.add_argument("--folder", type=Path, help="where the rounds' files go (default: a temporary folder)")
    gpu = parser.add_argument_group("engine-gpu")
    gpu.add_argument("--onnx", type=Path, default=ROOT / "onnx", help="folder of the exported files")
    gpu.add_argument("--weights", default="demo")
    gpu.add_argument("--precision", default="fp16")
    gpu.add_argument("--opt-level", type=int, default=3, help="the builder's effort")
    gpu.add_argument("--photo", type=Path, default=ROOT / "image" / "temple.jpg")
    gpu.add_argument("--through", type=Path, help="script that runs enginerun.py: tests/gpu/typed_tensorrt8.py")
    args = parser.parse_args()
    for name in ("output", "folder", "onnx", "photo", "through"):  # the rounds have another current directory
        if getattr(args, name):
            setattr(args, name, getattr(args, name).absolute())
    return args


def main(args: argparse.Namespace) -> int:
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**31)
    faults = 0
    for name in args.target or [name for name in TARGETS if name not in NEEDS_GPU]:
        kills = args.kills or (FEW if name in NEEDS_GPU else 200)
        print(f"{name}: {kills} kills, seed {seed}", flush=True)
        keep = partial(save, args.output, name)
        if args.jobs > 1:
            with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
                count = min(args.jobs, kills)
                shares = [(kills + index) // count for index in range(count)]
                entry = merged(list(pool.map(partial(rounds, args, name), shares, range(seed, seed + count))))
            keep(entry)
        else:
            entry = rounds(args, name, kills, seed, keep)
        faults += len(entry["faults"])
    return 1 if faults else 0


def rounds(
    args: argparse.Namespace, name: str, kills: int, seed: int, keep: Callable[[dict], object] = lambda entry: None
) -> dict:
    """So many kills of a target, one after the other: its entry, which `keep` is given after each round."""
    report = Report(keep, seed, kills)
    with tempfile.TemporaryDirectory(prefix="lseg-faults-", dir=args.folder) as folder:
        end = time.monotonic() + args.minutes * 60 if args.minutes else None
        settings = Settings(Path(folder), random.Random(f"{seed} {name}"), seed, kills, end, report, args)
        importlib.import_module(f"kills.{TARGETS[name]}").run(settings)
    report.finish()
    print(f"{name}: {report.summary()}", flush=True)
    return report.entry


def merged(entries: list[dict]) -> dict:
    """Entries of one target as one: numbers of kills and counts summed, lists one after the other."""
    whole = {**entries[0], "jobs": len(entries), "seed": [entry["seed"] for entry in entries]}
    for key in ("kills_wanted", "kills", "ended_before_the_kill", "faults", "rounds"):
        if key in whole:  # numbers, or lists
            whole[key] = sum((entry[key] for entry in entries), type(whole[key])())
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update(entry["counts"])
    return whole | {"counts": dict(sorted(counts.items())), "seconds": max(entry["seconds"] for entry in entries)}


def save(path: Path, name: str, entry: dict) -> None:
    """Puts a target's entry into the report."""
    report = json.loads(path.read_text()) if path.is_file() else {}
    report["machine"] = machine()
    report.setdefault("targets", {})[name] = entry
    write_files({path: (json.dumps(report, indent=1) + "\n").encode()})


if __name__ == "__main__":
    sys.exit(main(parse_args()))
