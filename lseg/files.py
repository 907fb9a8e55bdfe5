"""Files written whole or not at all, and one process at a time."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lseg.errors import UserError


def writable_folder(path: Path) -> None:
    """Makes the folder and proves that a file can be made in it; raises UserError before any work is done in vain."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        raise UserError(f"{path} is a file, not a folder; choose another output folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another output folder") from None


def write_files(files: Mapping[Path, bytes]) -> None:
    """Writes files that belong together: each under a temporary name beside its own, and renamed when all are written.

    Raises:
        UserError: a folder cannot be made or written to, or the disk is full. What was there before stays.
    """
    temporary = {path: path.with_name(f".{os.urandom(6).hex()}{path.suffix}") for path in files}
    try:
        for path in files:
            if path.is_dir():
                raise UserError(f"{path} is a folder; choose another output name")
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_bytes(data)
        for path in files:
            os.replace(temporary[path], path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another output folder") from None
    finally:
        for name in temporary.values():
            with suppress(OSError):
                name.unlink()


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds a folder that exists, so that two processes do not rename and remove in it at once; leaves no file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, remedy: str) -> Iterator[None]:
    """Holds a lock file, so that two processes do not do the same work at once. The system drops it at exit.

    Raises:
        UserError: its folder cannot be made or written to; the sentence ends with `remedy`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error.strerror}): {remedy}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
