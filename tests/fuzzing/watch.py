"""What a reader must not do, seen from within its process: code from a file, files elsewhere, more than one line."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable
from pathlib import Path

from lseg.errors import run

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CODE = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")
CHANGES = ("os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
MINE = ("lseg.", "pathlib", "numpy", "collections")  # what this project's own pickles, from one stage to the next, name
ALLOWED_STARTS = ("error: ", "note: ")


class Watch:
    """Watches one case at a time.

    Args:
        root: a folder of which only the case's own may change.
    """

    def __init__(self, root: Path):
        self.root, self.allowed, self.on = root, (), False
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in CODE:
            self.seen.append(("code", f"{event} {args[:2]!r}"[:200]))
        elif event == "pickle.find_class" and not str(args[0]).startswith(MINE):
            self.seen.append(("code", f"a pickle names {args[0]}.{args[1]}"[:200]))
        elif event == "ctypes.dlopen" and str(args[0]).startswith(str(self.root)):
            self.seen.append(("code", f"loads {args[0]}"))
        elif event == "socket.connect":
            self.seen.append(("code", f"connects to {args[1]!r}"[:200]))
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            self._writes(args[0])
        elif event in ("os.remove", "os.rmdir"):  # shutil.rmtree names what it removes below an open folder
            self._writes(args[0] if args[1] < 0 else os.path.join(f"/proc/self/fd/{args[1]}", os.fsdecode(args[0])))
        elif event in CHANGES:
            self._writes(args[0])
            if event in ("os.rename", "os.link"):
                self._writes(args[1])

    def _writes(self, path: object) -> None:
        if isinstance(path, int) or str(path) == os.devnull:
            return
        full = os.path.realpath(os.fsdecode(path))
        if not any(full == folder or full.startswith(f"{folder}/") for folder in self.allowed):
            self.seen.append(("outside", f"writes {full}"[:300]))

    def case(self, read: Callable[[Path], object], folder: Path) -> tuple[str, str]:
        """Runs a reader on a case as a script would: "accepted", "refused" or a kind of failure; and words on it."""
        self.allowed = (os.path.realpath(folder / "out"),)
        before, inside = self._outside(folder), set(os.listdir(folder))
        stdout, stderr, self.seen, found = io.StringIO(), io.StringIO(), [], ("accepted", "")
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                self.on = True
                try:
                    run(lambda: read(folder) and None)
                finally:
                    self.on = False
        except SystemExit as end:
            if end.code:
                found = "refused", ""
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)
            places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(where[-4:]))
            found = "exception", f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({places})"
        found = self._lines(stdout.getvalue(), stderr.getvalue(), found)
        if self.seen:
            found = self.seen[0]
        new = (self._outside(folder) - before) | (set(os.listdir(folder)) - inside - {"out"})
        if new:
            found = "outside", f"{sorted(new)[:3]} appeared"
        return found

    def _outside(self, folder: Path) -> set[str]:
        """All that lies in the folders above the case's own, up to the root."""
        found, here = set(), folder
        while here != self.root:
            here = here.parent
            found |= {f"{here}/{name}" for name in os.listdir(here)}
        return found

    def _lines(self, out: str, err: str, found: tuple[str, str]) -> tuple[str, str]:
        """What a refusal says is one line, with words in it and nothing that moves a terminal's cursor."""
        if found[0] == "exception":
            return found
        lines = err.split("\n")[:-1] + out.split("\n")[:-1]
        for line in lines:
            odd = next((c for c in line if unicodedata.category(c) in ("Cc", "Zl", "Zp")), None)
            if odd:
                return "message", f"has the character {odd!r}: {line[:200]!r}"
            if not line.startswith(ALLOWED_STARTS) and " -> " not in line:
                return "message", f"is no sentence of its own: {line[:200]!r}"
            if len(line.removeprefix("error: ").strip()) < 8:
                return "message", f"says nothing: {line!r}"
        errors = [line for line in lines if line.startswith("error: ")]
        if found[0] == "refused" and not errors:
            return "message", "it is refused without a word"
        return found[0], errors[-1][:300] if errors else ""
