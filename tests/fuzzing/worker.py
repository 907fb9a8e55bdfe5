"""The process that reads hostile files, one after the other: what it is at is told before each, for it may not survive.

    python -m fuzzing.worker ROOT SEED        with [[target, first, count], ...] as JSON on its standard input

Lines of JSON go to its standard output: what a case began and ended as.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

DEEP = ("a", "b", "c")  # folders between the root and a case, so that names which lead upwards end below the root


def memory() -> tuple[int, int]:
    """Bytes that this process holds, and the most that it held since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return tuple(int(re.search(rf"{key}:\s+(\d+)", text)[1]) * 1024 for key in ("VmRSS", "VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def write_tree(folder: Path, tree: dict[str, bytes]) -> None:
    (folder / "out").mkdir(parents=True)
    for name, data in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def load_table(name: str) -> dict[str, Any]:
    """The targets of a module, by name."""
    return {target.name: target for target in importlib.import_module(name).TARGETS}


def main(root: Path, seed: int, table: str, work: list[tuple[str, int, int]]) -> None:
    from fuzzing import formats
    from fuzzing.targets import make_case
    from fuzzing.watch import Watch

    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(root / "noise.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)  # what libraries say there
    os.dup2(1, 2)

    def tell(**event: object) -> None:
        told.write(json.dumps(event) + "\n")

    inner = root / "box"
    outside, scratch = inner / "outside", root / "scratch"
    home = inner.joinpath(*DEEP)
    for folder in (outside, scratch, home):
        folder.mkdir(parents=True, exist_ok=True)
    formats.OUTSIDE = str(outside)
    os.environ["TMPDIR"] = str(scratch)
    os.chdir(home)
    warnings.simplefilter("ignore")
    targets, watch = load_table(table), Watch(inner)
    for name, first, count in work:
        target = targets[name]
        cases = target.seeds(scratch / name)
        hostile = target.hostile(scratch / name)
        for index, tree in enumerate(cases if target.warm else ()):  # what is imported when it is first needed, is now
            folder = home / f"warm-{name}-{index}"
            write_tree(folder, tree)
            watch.case(target.read, folder)
            shutil.rmtree(folder)
        tell(event="target", name=name, hostile=len(hostile), held=memory()[0])
        for index in range(first, first + count):
            rng = np.random.default_rng([seed, index, *name.encode()])
            tree = hostile[index] if index < len(hostile) else make_case(target, cases, rng)
            folder = home / f"{name}-{index}"
            write_tree(folder, tree)
            tell(event="start", name=name, index=index, folder=str(folder))
            before, start = memory()[0], time.perf_counter()
            forget_peak()
            verdict, words = watch.case(target.read, folder)
            seconds = time.perf_counter() - start
            grown = max(0, memory()[1] - before)
            tell(event="end", verdict=verdict, words=words, seconds=seconds, grown=grown)
            if verdict in ("accepted", "refused"):  # else the files are wanted
                shutil.rmtree(folder, ignore_errors=True)
    tell(event="done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.load(sys.stdin))
