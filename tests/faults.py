"""Kills the project at random moments, many times, and checks what is left and what the next run makes of it.

    python tests/faults.py --kills 200 --output log/faults_cpu.json                 every target that needs no GPU
    python tests/faults.py --kills 200 --seed 5 --target export --output log/faults_cpu.json
    python tests/faults.py --target engine-gpu --onnx onnx --output log/faults_gpu.json [--through SCRIPT]

Each round starts the work in a process group of its own, kills the group (SIGKILL) after a delay drawn over the length
of an undisturbed run, looks at what is left, and lets the work run again to its end: the exit status must be 0, and the
outputs those of the undisturbed run. The report keeps other targets' entries in --output. The exit status is 1 where a
round found a fault.
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
        report = Report(lambda entry, name=name: save(args.output, name, entry), seed, kills)
        with tempfile.TemporaryDirectory(prefix="lseg-faults-", dir=args.folder) as folder:
            end = time.monotonic() + args.minutes * 60 if args.minutes else None
            settings = Settings(Path(folder), random.Random(f"{seed} {name}"), seed, kills, end, report, args)
            importlib.import_module(f"kills.{TARGETS[name]}").run(settings)
        report.finish()
        faults += len(report.entry["faults"])
        print(f"{name}: {report.summary()}", flush=True)
    return 1 if faults else 0


def save(path: Path, name: str, entry: dict) -> None:
    """Puts a target's entry into the report."""
    report = json.loads(path.read_text()) if path.is_file() else {}
    report["machine"] = machine()
    report.setdefault("targets", {})[name] = entry
    write_files({path: (json.dumps(report, indent=1) + "\n").encode()})


if __name__ == "__main__":
    sys.exit(main(parse_args()))
