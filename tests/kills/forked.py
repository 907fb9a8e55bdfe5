"""Rounds whose work runs in children forked from a process that has imported everything: a tenth of a second each.

The parent loads the libraries and starts no thread and no session of them; what a child does is the scripts' own main
function, from the arguments to the exit status.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kills.rounds import LINES, Settings, hidden

from lseg import files

STUCK = 120  # seconds after which a run counts as hanging
AGAIN = 0.75  # share of rounds in which the run after the kill is killed as well
TWO = 0.15  # share of rounds in which two processes do the same at once, where a target allows that
BY_STEP = 0.5  # share of kills at a random file-system step; the others are at a random time
STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "sqlite3.connect")


class Forked:
    """A function in a child with a session of its own, its output in a file.

    Args:
        work: gives the exit status, or None for 0.
        folder: its current directory.
        log: the file.
        step: it kills itself at this file-system step, counted from 1.
    """

    def __init__(self, work: Callable[[], object], folder: Path, log: Path, step: int | None = None):
        self.log, self.started, self.status = log, time.monotonic(), None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            os.chdir(folder)
            files._swept.clear()  # a process of its own knows nothing of what this one did
            steps = count_steps(str(folder), step)
            try:
                status = work() or 0
            finally:
                log.with_suffix(".steps").write_text(str(len(steps)))
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def wait(self, seconds: float = STUCK) -> int | None:
        """The exit status; None where it still runs after so many seconds from its start."""
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - self.started > seconds:
                break
            else:
                time.sleep(0.0005)
        return self.status

    def kill(self) -> None:
        """Kills it with all that it started."""
        if self.status is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has no session of its own yet
                os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def output(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LINES:])


def count_steps(folder: str, last: int | None) -> list[str]:
    """What Python opens, makes, moves and removes in a folder from now on; at the last this process kills itself."""
    steps: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if event in STEPS and isinstance(args[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(args[0])
            if not os.path.isabs(path) or path.startswith(folder):
                steps.append(event)
                if len(steps) == last:
                    os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)
    return steps


class Target(Protocol):
    """What is killed. `two`: whether two processes may do it at once in one folder."""

    two: bool

    def begin(self, folder: Path, number: int) -> None:
        """Lays out a round's folder, the current directory of its runs."""

    def work(self, number: int, again: bool) -> object:
        """The run, in a child; `again` after another was killed."""

    def left(self, folder: Path, number: int) -> list[str]:
        """What is wrong with what a killed run left: sentences."""

    def done(self, folder: Path, number: int) -> list[str]:
        """What is wrong after a run that ended."""


def in_child(work: Callable[[], object], folder: Path) -> None:
    """Does something that this process must not do itself, since it would start threads."""
    child = Forked(work, folder, folder / "child.txt")
    if child.wait() != 0:
        raise SystemExit(f"error: {child.output()}")


def rounds(settings: Settings, target: Target, kinds: int = 1, undisturbed_runs: int = 2) -> None:
    """Kills until there were as many as asked for. A round's number modulo `kinds` decides what it begins with."""
    report, rng = settings.report, settings.rng
    whole = {}
    for kind in range(kinds):
        for _ in range(undisturbed_runs):  # a second one is not slowed by cold files
            whole[kind] = undisturbed(settings, target, kind)
    report.entry["undisturbed_seconds"] = [round(whole[kind][0], 3) for kind in range(kinds)]
    report.entry["undisturbed_steps"] = [whole[kind][1] for kind in range(kinds)]
    number = 0
    while settings.more():
        number += 1
        kind = number % kinds
        folder = settings.folder / "round"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        target.begin(folder, kind)
        again = False
        while True:
            pair = target.two and rng.random() < TWO
            kill = kill_two if pair else kill_one
            kill(settings, target, kind, again, folder, number, whole[kind])
            again = True
            if rng.random() >= AGAIN or not settings.more():
                break
        report.count("rounds with temporary files after the last kill", bool(temporary(folder)))
        last = start(target, kind, True, folder, settings)
        if last.wait() != 0:
            last.kill()
            report.fault(number, f"the run after the kills gave {last.status}", last.output())
        else:
            for sentence in target.done(folder, kind):
                report.fault(number, f"after a whole run that followed, {sentence}", last.output())
        kept = temporary(folder)
        report.count("temporary files after the run that followed", len(kept))
        if len(kept) > (4 if target.two else 2):  # what the last kills left, where nothing was left to write
            report.fault(number, f"temporary files stay: {kept}", last.output())
        report.finish()
    report.entry["rounds"] = number


def kill_one(
    settings: Settings, target: Target, kind: int, again: bool, folder: Path, number: int, whole: tuple[float, int]
) -> None:
    """One run, killed at a random time or at a random step."""
    report, rng = settings.report, settings.rng
    if rng.random() < BY_STEP:
        step = rng.randint(1, whole[1])
        when, run = f"step {step}", start(target, kind, again, folder, settings, step)
        run.wait()
    else:
        delay = rng.uniform(0, whole[0])
        when, run = f"{delay:.3f} s", start(target, kind, again, folder, settings)
        run.wait(delay)
    if run.status not in (None, -signal.SIGKILL):
        report.entry["ended_before_the_kill"] += 1
        if run.status:
            report.fault(number, f"a run before its kill gave {run.status}", run.output())
    else:
        report.count(f"kills at a random {'step' if run.status else 'time'}")
        report.entry["kills"] += 1
        run.kill()
    for sentence in target.left(folder, kind):
        report.fault(number, f"after the kill at {when}, {sentence}", run.output())


def kill_two(
    settings: Settings, target: Target, kind: int, again: bool, folder: Path, number: int, whole: tuple[float, int]
) -> None:
    """Two runs in one folder at once: one is killed, and the other goes on to its end, or is killed as well."""
    report, rng = settings.report, settings.rng
    runs = [start(target, kind, again, folder, settings) for _ in range(2)]
    report.count("pairs of processes")
    for run in runs[: rng.choice((1, 2))]:
        if run.wait(rng.uniform(0, 2 * whole[0])) is None:  # two at once take longer
            run.kill()
            report.count("kills beside another process")
            report.entry["kills"] += 1
        elif run.status:
            report.fault(number, f"one of two processes gave {run.status}", run.output())
        for sentence in target.left(folder, kind):
            report.fault(number, f"after a kill beside another process, {sentence}", run.output())
    for run in runs:
        if run.status is None and run.wait() != 0:
            report.fault(number, f"the other of two processes gave {run.status}", run.output())
            run.kill()


def temporary(folder: Path) -> list[str]:
    """Temporary files and folders; what lies in such a folder is not counted apart."""
    found = hidden(folder)
    return [name for name in found if not any(name.startswith(f"{other}/") for other in found)]


def start(target: Target, kind: int, again: bool, folder: Path, settings: Settings, step: int | None = None) -> Forked:
    log = settings.folder / f"log-{time.monotonic_ns()}.txt"
    return Forked(lambda: target.work(kind, again), folder, log, step)


def undisturbed(settings: Settings, target: Target, kind: int) -> tuple[float, int]:
    """A whole run of a kind, with what it gives checked: seconds, and file-system steps."""
    folder = settings.folder / f"undisturbed-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    target.begin(folder, kind)
    run = start(target, kind, False, folder, settings)
    status = run.wait()
    seconds = time.monotonic() - run.started
    wrong = target.done(folder, kind) if status == 0 else [f"it gave {status}"]
    if wrong or temporary(folder):
        raise SystemExit(f"error: the undisturbed run: {wrong}, {temporary(folder)}\n{run.output()}")
    return seconds, int(run.log.with_suffix(".steps").read_text())
