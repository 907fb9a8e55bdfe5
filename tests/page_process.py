"""app.py in a process of its own that cannot reach any other machine, for the tests of the page."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Page(NamedTuple):
    """A server: its address, its folder of temporary files, the file of connections that it tried, its process."""

    address: str
    temporary: Path
    attempts: Path
    process: subprocess.Popen

    def files(self) -> list[Path]:
        """What visitors' files are left."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serve(folder: Path, onnx: Path, *options: str) -> Iterator[Page]:
    """Runs app.py until the block ends, with its files in `folder`."""
    temporary, attempts, port = folder / "tmp", folder / "attempts.txt", free_port()
    temporary.mkdir(parents=True)
    attempts.touch()
    script = [str(ROOT / "tests" / "guarded.py"), str(attempts), str(ROOT / "app.py")]
    command = [sys.executable, *script, "--port", str(port), "--onnx", str(onnx), *options]
    process = subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_up(process, address)
        yield Page(address, temporary, attempts, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            process.kill()


def wait_until_up(process: subprocess.Popen, address: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"app.py ended: {process.stdout.read().decode()}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.2)
    raise AssertionError("app.py does not answer")
