"""Reads hostile files by the hundred thousand, with every reader of the project, and tells what went wrong.

    python tests/fuzz.py --cases 100000 --seed 1 --output log/fuzz_cpu.json
    python tests/fuzz.py --cases 5000 --target tar --target image --keep /tmp/found

Wrong is: an exception that is no sentence, a sentence of several lines, a case of more than 10 seconds or 4 GiB, a file
written outside the output folder, code run from a file, and a process that dies. The exit status is 1 when there
is any.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzzing.harness import GROWTH, SECONDS, Tally, run_cases  # noqa: E402
from tqdm import tqdm  # noqa: E402

from lseg.errors import Parser, UserError, run  # noqa: E402
from lseg.files import write_files  # noqa: E402

PACKAGES = ("numpy", "onnx", "onnxruntime", "opencv-python-headless", "pillow", "pyarrow", "safetensors", "torch")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="in all, spread over the targets (default: 100000)")
    parser.add_argument("--seed", type=int, help="decides all cases; a new one by default")
    parser.add_argument("--target", action="append", metavar="NAME", help="this one alone; may be given several times")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with each target's case N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the counts as JSON")
    parser.add_argument(
        "--again",
        type=Path,
        metavar="FILE",
        help="an earlier run's JSON: run --target's cases of it again, after a mend",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for the files of cases that failed")
    return parser.parse_args(argv)


def spread(cases: int, names: list[str] | None) -> dict[str, int]:
    """How many cases each target gets: by its share, and some in any case."""
    from fuzzing.targets import TARGETS

    known = [target.name for target in TARGETS]
    for name in names or ():
        if name not in known:
            raise UserError(f"--target {name} is none: choose {', '.join(known)}")
    chosen = [target for target in TARGETS if not names or target.name in names]
    whole = sum(target.share for target in chosen)
    return {target.name: max(1, cases // 700, round(cases * target.share / whole)) for target in chosen}


def export(folder: Path) -> Path:
    """The tiny weights' exported files, and beside their folder the weights."""
    from checkpoints import write_tiny
    from conftest import export_all

    write_tiny(folder / "tiny.safetensors", 1)
    return export_all(str(folder / "tiny.safetensors"), folder / "onnx").folder


def main(args: argparse.Namespace) -> int:
    if args.cases < 1:
        raise UserError(f"--cases {args.cases} cannot be: give 1 or more")
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(2**31)
    counts, earlier = spread(args.cases, args.target), None
    if args.again:
        earlier = json.loads(args.again.read_text())
        counts = {name: earlier["targets"][name]["cases"] for name in counts}
        seed, args.first = earlier["seed"], earlier["first"]
    print(f"{sum(counts.values())} cases, --seed {seed}")
    start, bad = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=sum(counts.values()), unit="case") as bar:
        exported = export(Path(folder))
        tallies: dict[str, Tally] = {}
        for name, count in counts.items():
            bar.set_postfix_str(name)
            work = [(name, args.first, count)]
            tallies |= run_cases(work, seed, exported=exported, keep=args.keep, progress=lambda _: bar.update())
            bad += len(tallies[name].failures)
    seconds = time.perf_counter() - start
    for name, tally in tallies.items():
        for failure in tally.failures:
            print(f"{name} case {failure.case}: {failure.kind}: {failure.words}")
    print(f"{sum(tally.cases for tally in tallies.values())} cases in {seconds:.0f} s, {bad} failures")
    if args.output:
        found = describe({name: tally.to_dict() for name, tally in tallies.items()}, seed, args.first, seconds)
        if earlier:
            targets = earlier["targets"] | {name: one | {"again": True} for name, one in found["targets"].items()}
            found = describe(targets, seed, args.first, earlier["seconds"] + seconds)
        text = json.dumps(found, indent=1) + "\n"
        write_files({args.output: text.encode()})
    return 1 if bad else 0


def describe(targets: dict[str, dict], seed: int, first: int, seconds: float) -> dict[str, object]:
    every = targets.values()
    return {
        "cases": sum(one["cases"] for one in every),
        "failures": sum(len(one["failures"]) for one in every),
        "refused": sum(one["refused"] for one in every),
        "accepted": sum(one["accepted"] for one in every),
        "seed": seed,
        "first": first,
        "seconds": round(seconds),
        "limits": {"seconds": SECONDS, "growth_mib": GROWTH >> 20},
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "packages": {name: version(name) for name in PACKAGES},
        "slowest_seconds": max(one["slowest_seconds"] for one in every),
        "largest_growth_mib": max(one["largest_growth_mib"] for one in every),
        "targets": targets,
    }


if __name__ == "__main__":
    run(lambda: main(parse_args()))
