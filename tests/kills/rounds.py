"""What every target of tests/faults.py uses: processes that are killed with all that they started, and the report.

Nothing here needs torch, ONNX or a GPU.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LINES = 12  # of an output shown with a fault


@dataclass
class Report:
    """A target's entry: how many kills, where they fell, and what was wrong. Saved after each round."""

    save: Callable[[dict], object]
    seed: int
    wanted: int
    entry: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.entry = {"seed": self.seed, "kills_wanted": self.wanted, "kills": 0, "ended_before_the_kill": 0}
        self.entry |= {"faults": [], "counts": {}}
        self.counts: Counter[str] = Counter()

    def count(self, what: str, by: int = 1) -> None:
        self.counts[what] += by

    def fault(self, round_number: int, sentence: str, output: str = "") -> None:
        print(f"round {round_number}: {sentence}\n{output}".rstrip(), flush=True)
        self.entry["faults"].append({"round": round_number, "fault": sentence, "output": output[-2000:]})

    def finish(self) -> None:
        self.entry["counts"] = dict(sorted(self.counts.items()))
        self.entry["seconds"] = round(time.monotonic() - self.started, 1)
        self.save(self.entry)

    def summary(self) -> str:
        entry = self.entry
        return f"{entry['kills']} kills, {len(entry['faults'])} faults, {entry['counts']}, {entry['seconds']} s"


@dataclass
class Settings:
    """What a target's `run` is given.

    Attributes:
        folder: empty, for the rounds' files.
        rng: of delays and inputs.
        seed: the same, for what takes a number.
        kills: how many.
        end: monotonic time after which no round begins, or None.
        report: what is found.
        args: the command line.
    """

    folder: Path
    rng: random.Random
    seed: int
    kills: int
    end: float | None
    report: Report
    args: argparse.Namespace

    def more(self) -> bool:
        """Whether another round is to be done."""
        late = self.end is not None and time.monotonic() > self.end
        return self.report.entry["kills"] < self.kills and not late


class Command:
    """A command in a session of its own, its output in a file."""

    def __init__(self, command: Sequence[object], log: Path, **options: object):
        self.log, self.started = log, time.monotonic()
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdout=file, stderr=file, start_new_session=True, **options
            )

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status; None where it still runs after so many seconds from its start."""
        try:
            left = None if seconds is None else max(0.0, self.started + seconds - time.monotonic())
            return self.process.wait(left)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kills it with all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def output(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LINES:])


def hidden(folder: Path) -> list[str]:
    """Names of what runs leave beside outputs: temporary files and folders, not locks, which are kept for good."""
    found = (path for path in folder.rglob("*") if any(p.startswith(".") for p in path.relative_to(folder).parts))
    return sorted(str(path.relative_to(folder)) for path in found if not path.name.endswith(".lock"))
