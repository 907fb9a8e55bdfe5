"""Runs readers on hostile files in processes that may hang, swell or die, and tells which case was to blame."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 10.0  # that a case may take
GROWTH = 4 << 30  # bytes that a case may take
POLL = 0.02  # seconds between two looks at a process's memory
START = 120.0  # seconds that a process may take until its first case
FAILURES = ("exception", "message", "hang", "memory", "outside", "code", "crash")


@dataclass
class Failure:
    kind: str
    words: str
    case: int
    saved: str | None = None


@dataclass
class Tally:
    """What the cases of one target came to."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    slowest_case: int = -1
    largest_growth_mib: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    def add(self, case: int, verdict: str, words: str, seconds: float, grown: int) -> Failure | None:
        self.cases += 1
        self.seconds = round(self.seconds + seconds, 4)
        if seconds > self.slowest_seconds:
            self.slowest_seconds, self.slowest_case = round(seconds, 4), case
        self.largest_growth_mib = max(self.largest_growth_mib, grown >> 20)
        if verdict in ("accepted", "refused"):
            setattr(self, verdict, getattr(self, verdict) + 1)
            return None
        self.failures.append(Failure(verdict, words, case))
        return self.failures[-1]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Limits:
    seconds: float = SECONDS
    growth: int = GROWTH


def run_cases(
    work: Sequence[tuple[str, int, int]],
    seed: int,
    *,
    exported: Path | None = None,
    keep: Path | None = None,
    limits: Limits | None = None,
    table: str = "fuzzing.targets",
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Tally]:
    """Runs cases and returns what came of them, by target.

    Args:
        work: target, first case and number of cases.
        seed: decides the cases, with their target and number.
        exported: folder of the tiny weights' exported files, for the targets that read those.
        keep: folder to which the files of cases that fail are copied.
        limits: of a case.
        table: the module with the targets.
        progress: called after each case with its target's name.
    """
    tallies = {name: Tally() for name, _, _ in work}
    left, limits = [tuple(one) for one in work], limits or Limits()
    while left:
        with tempfile.TemporaryDirectory(prefix="lseg-fuzz-", ignore_cleanup_errors=True) as root:
            left = _one_process(left, seed, Path(root), exported, keep, limits, table, tallies, progress)
    return tallies


def _one_process(left, seed, root, exported, keep, limits, table, tallies, progress) -> list[tuple[str, int, int]]:
    """Runs a process until it is done, or a case has ended it; returns what is left to do."""
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment |= {"LSEG_FUZZ_EXPORTED": str(exported), "LSEG_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "fuzzing.worker", str(root), str(seed), table]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdin.write(json.dumps(left).encode())
    process.stdin.close()
    stream, current, held, began = _Lines(process.stdout.fileno()), None, 0, time.monotonic()
    verdict = None
    try:
        while verdict is None:
            for event in stream.read(POLL):
                if event["event"] == "done":
                    return []
                if event["event"] == "target":
                    held = event["held"]
                elif event["event"] == "start":
                    current, began = event, time.monotonic()
                    held = max(held, _held(process.pid))
                else:
                    name, case = current["name"], current["index"]
                    growth = event.pop("grown")
                    if growth > limits.growth:
                        event |= {"verdict": "memory", "words": f"took {growth >> 20} MiB"}
                    if event["seconds"] > limits.seconds:
                        event |= {"verdict": "hang", "words": f"took {event['seconds']:.1f} s"}
                    failure = tallies[name].add(case, event["verdict"], event["words"], event["seconds"], growth)
                    _keep(failure, name, seed, keep, Path(current["folder"]))
                    progress(name)
                    left = _after(left, name, case)
                    current, began = None, time.monotonic()
            took, grown = time.monotonic() - began, _held(process.pid) - held
            if current and took > limits.seconds:
                verdict = "hang", f"took more than {limits.seconds:g} s", took, grown
            elif current and grown > limits.growth:
                verdict = "memory", f"took more than {limits.growth >> 20} MiB", took, grown
            elif stream.ended or (not current and took > START):
                code, said = _last_words(process, root / "noise.txt")
                if not current:
                    raise RuntimeError(f"the process of {left[0]} ended between cases ({code}): {said}")
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                verdict = "crash", f"{name} {said}".strip(), took, 0
        name, case = current["name"], current["index"]
        os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
        failure = tallies[name].add(case, verdict[0], verdict[1], verdict[2], max(0, verdict[3]))
        _keep(failure, name, seed, keep, Path(current["folder"]))
        progress(name)
        return _after(left, name, case)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _last_words(process: subprocess.Popen, noise: Path) -> tuple[int, str]:
    """How a process ended, and what it said last."""
    try:
        code = process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    said = process.stderr.read()[-600:]
    if noise.is_file():
        text = noise.read_bytes()[-3000:]
        said += text[max(0, text.find(b"Fatal Python error")) :][-1500:]
    return code, " ".join(said.decode(errors="replace").split())[:800]


class _Lines:
    """JSON lines from a pipe, as far as they are there."""

    def __init__(self, handle: int):
        self.handle, self.rest, self.ended = handle, b"", False

    def read(self, timeout: float) -> list[dict]:
        if not select.select([self.handle], [], [], timeout)[0]:
            return []
        data = os.read(self.handle, 1 << 16)
        self.ended = not data
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def _held(process: int) -> int:
    """Bytes of memory that a process holds."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _after(left: list[tuple[str, int, int]], name: str, case: int) -> list[tuple[str, int, int]]:
    """The work without what is done up to this case."""
    while left[0][0] != name:
        left = left[1:]
    _, first, count = left[0]
    rest = first + count - case - 1
    return [(name, case + 1, rest), *left[1:]] if rest else left[1:]


def _keep(failure: Failure | None, name: str, seed: int, keep: Path | None, folder: Path) -> None:
    """Copies a failing case's files."""
    if failure is None or keep is None:
        return
    to = keep / f"{name}-{failure.case}-{failure.kind}"
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    failure.saved = str(to)
    with suppress(OSError, shutil.Error, RecursionError):  # what a reader made of it may be as strange as the case
        shutil.copytree(folder, to, dirs_exist_ok=True, symlinks=True)
    (to / "about.txt").write_text(f"{name} case {failure.case} seed {seed}: {failure.kind} {failure.words}\n")
