"""Errors that a user can mend, and how a script reports them."""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Bad input: one sentence that names the file or value and says what to do about it."""

    def __str__(self) -> str:
        return visible(super().__str__())


def visible(text: str) -> str:
    """A text as one line for a terminal: of control characters in it, as names of files may have, their escapes."""
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def short(path: str | Path) -> Path:
    """The same path as messages should show it: relative to the current directory where that is shorter."""
    path = Path(path)
    if not path.is_absolute() or ".." in path.parts:  # behind a link, ".." is not what the text alone says
        return path
    try:
        relative = os.path.relpath(path)
    except OSError:  # the current directory is gone
        return path
    return Path(relative) if len(relative) < len(str(path)) else path


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        hint = "; quote what holds spaces" if message.startswith("unrecognized arguments") else ""
        print(f"error: {message}{hint}; see --help", file=sys.stderr)
        sys.exit(2)


def say(line: object) -> None:
    """Prints one line. When nobody reads stdout any more, as behind `| head`, the work goes on in silence."""
    try:
        print(visible(str(line)), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # what is still in the old buffer must not fail at exit


def counted(count: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def run(main: Callable[[], int | None], interrupted: str = "") -> None:
    """Runs a script's main function and exits with its status: 2 after a UserError, 130 after Ctrl-C, 0 for None.

    `interrupted` says what to do after Ctrl-C, if there is something.

    What the operating system refuses somewhere unforeseen (a disk that is full, a name that is too long) is a UserError
    too, as far as it can say.
    """
    _read_names_as_utf8()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")
        status = 0
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == "lseg":
            raise
        print(
            f"error: the package {error.name} is not installed for {sys.executable}: use .venv/bin/python, put "
            "./requirements.sh in front, or see requirements*.txt",
            file=sys.stderr,
        )
        status = 2
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        reason = " ".join(str(error.strerror or error).split())  # some libraries add where in their source they are
        print(f"error: {visible(what + reason[:300])}; mend that and try again", file=sys.stderr)
        status = 2
    except MemoryError as error:
        reason = " ".join(str(error).split())[:120]
        print(f"error: not enough memory ({reason}); ask for less at a time", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        remedy = f": {interrupted}" if interrupted else ""
        print(f"\nerror: interrupted; what was finished before stays{remedy}", file=sys.stderr)
        status = 130
    sys.exit(status or 0)


def _read_names_as_utf8() -> None:
    """Starts Python again where a locale without UTF-8 would let no other name or label through than ASCII's.

    Not where that cannot be: an embedded Python has no program, and what came by stdin has been read.
    """
    if sys.getfilesystemencoding() != "utf-8" and sys.executable and sys.argv[0] not in ("", "-"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
