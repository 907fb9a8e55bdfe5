"""Readers that do what readers must not, one for each kind of failure: the harness has to notice every one."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path

from fuzzing.targets import Target
from lseg.errors import UserError, say


def seeds(folder: Path) -> list[dict[str, bytes]]:
    return [{"a.txt": b"a seed"}]


def exception(folder: Path) -> None:
    raise KeyError((folder / "a.txt").read_bytes())


def message(folder: Path) -> None:
    raise UserError(" ")


def two_lines(folder: Path) -> None:
    print("note: one\nand another")


def silence(folder: Path) -> None:
    raise SystemExit(2)


def hang(folder: Path) -> None:
    time.sleep(60)


def memory(folder: Path) -> None:
    held = bytearray(b"\1" * (300 << 20))
    time.sleep(0.5)
    say(f"note: {len(held)} bytes")


def outside(folder: Path) -> None:
    (folder / ".." / "other.txt").write_text("x")


def native_outside(folder: Path) -> None:
    """As a library in C writes: Python's own hooks do not see it."""
    import sqlite3

    sqlite3.connect(folder.parent.parent / "other.sqlite").execute("CREATE TABLE t (a)")


def beside(folder: Path) -> None:
    (folder / "beside.txt").write_text("x")


class Run:
    def __reduce__(self):
        return os.getcwd, ()


def code(folder: Path) -> None:
    pickle.loads(pickle.dumps(Run()))


def crash(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


KINDS = {
    exception: "exception",
    message: "message",
    two_lines: "message",
    silence: "message",
    hang: "hang",
    memory: "memory",
    outside: "outside",
    native_outside: "outside",
    beside: "outside",
    code: "code",
    crash: "crash",
}


def fine(folder: Path) -> None:
    (folder / "out" / "x").write_text("x")
    if b"seed" not in (folder / "a.txt").read_bytes():
        raise UserError("a.txt is no seed: plant another")


TARGETS = [Target(read.__name__, read, seeds, warm=False) for read in (fine, *KINDS)]
