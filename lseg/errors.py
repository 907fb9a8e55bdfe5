"""Errors that a user can mend, and how a script reports them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(Exception):
    """Bad input: one sentence that names the file or value and says what to do about it."""


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


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's main function and exits with its status: 2 after a UserError, 130 after Ctrl-C, 0 for None."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nerror: interrupted; what was finished before stays", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
