"""Files written whole or not at all, and one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lseg.errors import UserError

UNFINISHED = ".unfinished-"  # what the names of temporary folders begin with
HELD = ".held"  # the file in them that is locked while their process lives
MOST_SWEPT = 1000  # folders to remember: a server makes one for each answer
_swept: set[Path] = set()  # folders that this process has looked through


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


def write_files(files: Mapping[Path, bytes], durable: bool = True) -> None:
    """Writes files that belong together: each in a temporary folder beside it, and moved when all are written.

    Older files of all names but the first go before anything is moved: whoever is killed in between leaves the set
    without its end, and never a new file beside an old one.

    Args:
        files: paths and what is to stand there.
        durable: wait until the disk has each, so that a power cut after the move leaves no empty file of its name.

    Raises:
        UserError: a folder cannot be made or written to, or the disk is full. What was there before stays.
    """
    folders: dict[Path, Path] = {}
    with ExitStack() as stack:
        try:
            for path in files:
                if path.is_dir():
                    raise UserError(f"{path} is a folder; choose another output name")
            for path, data in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.parent not in folders:
                    folders[path.parent] = stack.enter_context(unfinished(path.parent))
                _write(folders[path.parent] / path.name, data, durable)
            for path in list(files)[1:]:
                path.unlink(missing_ok=True)
            for path in files:
                os.replace(folders[path.parent] / path.name, path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another output folder") from None


def _write(path: Path, data: bytes, durable: bool) -> None:
    with open(path, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        if not durable:
            return
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # file systems that know no such thing
                raise


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A temporary folder in one that exists, for what is to be moved out of it when it is whole. It goes at the end.

    Before the first in each folder, those that killed processes left there are removed: a live one is held by a lock,
    which the system drops with its process. OSError where none can be made.
    """
    resolved = folder.resolve()
    if resolved not in _swept:
        _sweep(resolved)
        if len(_swept) >= MOST_SWEPT:
            _swept.clear()
        _swept.add(resolved)
    path, handle = _held(folder)
    try:
        yield path
    finally:
        try:
            shutil.rmtree(path, ignore_errors=True)
        except BaseException:  # Ctrl-C while it is removed: what is left goes before that ends the run
            shutil.rmtree(path, ignore_errors=True)
            raise
        finally:
            os.close(handle)


def _held(folder: Path) -> tuple[Path, int]:
    """Makes a temporary folder and holds it: its path, and the handle whose closing ends that."""
    while True:
        path = folder / f"{UNFINISHED}{os.urandom(6).hex()}"
        path.mkdir(0o700)
        try:
            handle = _open_lock(path)
            _lock(handle, fcntl.LOCK_EX)
        except FileNotFoundError:  # another process removed it before it was held
            continue
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        if _is_file(handle, path / HELD):
            return path, handle
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Removes temporary folders that nobody holds any more. What cannot be removed stays."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(UNFINISHED) and not os.path.islink(folder / name):
                _remove_if_left(folder / name)


def _remove_if_left(path: Path) -> None:
    with suppress(OSError):
        handle = _open_lock(path)
        try:
            if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_file(handle, path / HELD):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _is_file(handle: int, path: Path) -> bool:
    """Whether a path still leads to an open file: others may have removed it, and made one of its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _open_lock(path: Path) -> int:
    return os.open(path / HELD, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _lock(handle: int, how: int) -> bool:
    """Locks an open file or folder. False where another has it, or the file system has no such lock (NFS: folders)."""
    try:
        fcntl.flock(handle, how)
    except OSError:
        return False
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Holds a folder that exists, so that two processes do not rename and remove in it at once; leaves no file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, fcntl.LOCK_EX)
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
