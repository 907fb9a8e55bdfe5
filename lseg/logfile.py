"""Lines for log/, where libraries' remarks go instead of the terminal."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "log"


def append(name: str, line: str) -> None:
    """Appends a time-stamped line to log/NAME; a log that cannot be written stops nothing."""
    with contextlib.suppress(OSError):
        FOLDER.mkdir(parents=True, exist_ok=True)
        with open(FOLDER / name, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
