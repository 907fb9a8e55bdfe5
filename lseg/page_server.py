"""Serves the page from this machine alone: what the browser may load, where files lie meanwhile, and the end."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lseg.errors import UserError
from lseg.page_work import Desk

LARGEST_FILE = "100mb"
WAITING = 64  # visitors' calls that wait at most; more are told to come back
SESSIONS = 1000  # visitors whose last choices Gradio remembers
SWEEP = 60  # seconds between looks for photos that nobody asks for, and for old files
MMAP_THRESHOLD, ARENA_MAX = -3, -8  # of glibc's mallopt
FILES_AGE = 3600  # seconds that uploads and label maps of the API are kept: longer than a call waits in the queue
TOUCHES = 40  # threads for what does not wait in the queue: pixels, heat maps, downloads
# The browser itself refuses whatever is not from here, in case a part of Gradio names another server.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' data: blob:; "
    "font-src 'self' data:; worker-src 'self' blob:; object-src 'none'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}


class OwnHeaders:
    """ASGI middleware that adds HEADERS to every answer."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_more(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self.app(scope, receive, send_more)


def check_address(host: str, port: int) -> None:
    """UserError where nobody can listen there: before weights are loaded."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port} cannot be listened on ({reason}): choose another --host or --port") from None


def give_memory_back() -> None:
    """Tells glibc to return arrays of 128 KiB and more to the system once they are freed, as it would at first.

    With each that is freed it takes larger ones, up to 32 MiB, for such as are better kept among its own heaps, and
    each thread gets a heap of its own: photos that come and go by many threads leave holes in all of them.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 128 << 10)
        mallopt(ARENA_MAX, 2)


class OldFiles:
    """Removes what has lain in a folder for long.

    Gradio removes what it remembers: no file beside a label map, no folder, and no upload that did not come whole.

    Args:
        folder: where.
        age: seconds that a file, or an empty folder, is kept after it was first seen.
        clock: seconds, which never jump.
    """

    def __init__(self, folder: str, age: float, clock: Callable[[], float] = time.monotonic):
        self.folder, self.age, self.clock = folder, age, clock
        self._first_seen: dict[str, float] = {}

    def sweep(self) -> None:
        """Looks through the folder, and removes what was first seen so long ago."""
        now, before, self._first_seen = self.clock(), self._first_seen, {}
        for place, folders, files in os.walk(self.folder, topdown=False):
            for names, remove in ((files, os.unlink), (folders, os.rmdir)):
                for path in (os.path.join(place, name) for name in names):
                    self._first_seen[path] = before.get(path, now)
                    if now - self._first_seen[path] > self.age:
                        with suppress(OSError):  # gone meanwhile, or not empty
                            remove(path)


def serve(
    desk: Desk,
    host: str,
    port: int,
    words: Sequence[str],
    more_words: Sequence[str],
    example: Path,
    say: Callable[[str], object],
    ready: Callable[[], object] = lambda: None,
) -> None:
    """Serves until Ctrl-C or SIGTERM. Uploads lie in a folder of their own, which goes with the server.

    Args:
        desk: answers.
        host: address to listen on.
        port: of it.
        words: labels to begin with.
        more_words: labels to choose beside these.
        example: a photo to try.
        say: takes the line with the address.
        ready: called when the page can be opened.
    """
    give_memory_back()
    with tempfile.TemporaryDirectory(prefix="lseg-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # Gradio reads these two when it is imported
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from starlette.middleware import Middleware

        from lseg import page as layout

        layout.no_network()
        layout.own_uploads()
        layout.quiet_refusals()
        page = layout.build_page(desk, words, more_words, example)
        page.queue(max_size=WAITING)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=LARGEST_FILE,
                max_threads=TOUCHES,
                state_session_capacity=SESSIONS,
                footer_links=["api"],
                app_kwargs={"middleware": [Middleware(OwnHeaders)]},
                theme=layout.theme(),
                css=layout.CSS,
            )
            say(f"the page is at {address} (Ctrl-C ends it)")
            ready()
            ended = threading.Event()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: ended.set())  # what Docker and systemd send
            old = OldFiles(folder, FILES_AGE)
            while not ended.wait(SWEEP):
                desk.kept.forget_idle()
                old.sweep()
        finally:
            page.close(verbose=False)
