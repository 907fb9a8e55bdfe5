"""Visitors of the page as the server sees them: HTTP requests of a program, and of a browser with the page open."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

PATIENCE = 180  # seconds for an answer; longer is an error


class Refused(Exception):
    """The server said in a sentence that it will not do this."""


class Wrong(Exception):
    """An answer that is no answer: another status, an end in the middle, or a wrong result."""


class Server:
    """The page's HTTP interface; a connection a request, so threads may share it."""

    def __init__(self, address: str):
        parts = urlsplit(address)
        assert parts.hostname == "127.0.0.1" and parts.port, "nothing but this machine is to be loaded"
        self._place = parts.hostname, parts.port
        config = json.loads(self.fetch("GET", "/config"))
        self.parts = {part["id"]: part for part in config["components"]}
        self.calls = {tuple(target): call for call in config["dependencies"] for target in call["targets"]}

    def part(self, name: str) -> int:
        """The number of a part of the page by its HTML id."""
        return next(number for number, part in self.parts.items() if part["props"].get("elem_id") == name)

    def function(self, part: str, event: str) -> int:
        return self.calls[self.part(part), event]["id"]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self._place, timeout=PATIENCE)

    def fetch(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, {"content-type": kind} if body is not None else {})
            reply = connection.getresponse()
            data = reply.read()
        if reply.status != 200:
            text = data.decode(errors="replace")
            if reply.status == 503 and "Queue is full" in text:
                raise Refused("Queue is full")
            raise Wrong(f"{method} {path.split('?')[0]}: status {reply.status}: {text[:200]}")
        return data

    def post(self, path: str, content: Any) -> Any:
        return json.loads(self.fetch("POST", f"/gradio_api{path}", json.dumps(content).encode()))

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """Sends a file, and gives what stands for it in calls."""
        path = json.loads(self.fetch("POST", "/gradio_api/upload", *form(name, data)))[0]
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def upload_half(self, name: str, data: bytes) -> None:
        """Goes away in the middle of a file."""
        body, kind = form(name, data)
        with contextlib.closing(self.connect()) as connection:
            connection.putrequest("POST", "/gradio_api/upload")
            connection.putheader("content-type", kind)
            connection.putheader("content-length", str(len(body)))
            connection.endheaders(body[: len(body) // 2])

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[http.client.HTTPResponse]:
        """Events that the server sends, until the block ends."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path)
            reply = connection.getresponse()
            if reply.status != 200:
                raise Wrong(f"GET {path.split('?')[0]}: status {reply.status}")
            yield reply


def form(name: str, data: bytes) -> tuple[bytes, str]:
    """A file as a browser's form sends it: the body and its kind."""
    mark = secrets.token_hex(16)
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + data + f"\r\n--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


class How(NamedTuple):
    """The choices beside photo and words, as the server offers them."""

    inference: str
    weights: str
    backend: str


def ask_api(server: Server, file: dict | None, words: Sequence[str], how: How, leave: bool = False) -> tuple | None:
    """One call of /segment: its line and the label map's PNG; None for who leaves before the answer."""
    event = server.post("/call/segment", {"data": [file, list(words), *how]})["event_id"]
    with server.stream(f"/gradio_api/call/segment/{event}") as reply:
        if leave:
            return None
        kind = None
        for raw in reply:
            line = raw.decode().rstrip("\n")
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: ") and kind in ("complete", "error"):
                found = json.loads(line[6:])
                break
        else:
            raise Wrong("/call/segment: the stream ended without an answer")
    if kind == "error":
        raise Refused(sentence(found))
    result, label_map = found
    return result, server.fetch("GET", f"/gradio_api/file={quote(label_map['path'])}")


def sentence(found: Any) -> str:
    """What an error says; Wrong where it says nothing to a person."""
    text = found if isinstance(found, str) else found.get("error") if isinstance(found, dict) else None
    if not text or "Traceback" in text:
        raise Wrong(f"an error without a sentence: {found}")
    return text


class Tab:
    """The page, open in a browser: the life sign that browsers hold, calls through the queue, and the viewer's own."""

    def __init__(self, server: Server, how: How):
        self.server, self.how, self.session = server, how, secrets.token_hex(6)
        self.key = ""
        self._alive = contextlib.ExitStack()

    def __enter__(self) -> Tab:
        self._alive.enter_context(self.server.stream(f"/gradio_api/heartbeat/{self.session}"))
        return self

    def __exit__(self, *_: object) -> None:
        self._alive.close()

    def _call(self, part: str, event: str, data: list, leave: bool = False) -> list | None:
        ask = {"data": data, "fn_index": self.server.function(part, event), "session_hash": self.session}
        self.server.post("/queue/join", {**ask, "event_data": None, "trigger_id": self.server.part(part)})
        with self.server.stream(f"/gradio_api/queue/data?session_hash={self.session}") as reply:
            if leave:
                return None
            warning = None
            for raw in reply:
                if not raw.startswith(b"data: "):
                    continue
                message = json.loads(raw[6:])
                if message["msg"] == "log" and message["level"] == "warning":
                    warning = message["log"]
                elif message["msg"] == "process_completed":
                    if not message["success"]:
                        raise Refused(sentence(message["output"]))
                    if warning:
                        raise Refused(warning)
                    return message["output"]["data"]
                elif message["msg"] == "unexpected_error":
                    raise Wrong(f"the page's queue: {message}")
        raise Wrong("the page's queue: the stream ended without an answer")

    def open(self, file: dict, words: Sequence[str], leave: bool = False) -> dict | None:
        """Gives the page a photo: what the viewer shows; None for who leaves before the answer."""
        data = self._call("photo", "input", [file, None, list(words), *self.how], leave)
        return self._shown(data[3]) if data else None

    def change(self, words: Sequence[str]) -> dict:
        """Other words for the photo."""
        return self._shown(self._call("labels", "change", [None, list(words), *self.how])[1])

    def _shown(self, value: Any) -> dict:
        if not isinstance(value, dict) or "labels" not in value:
            raise Wrong(f"the page shows nothing: {str(value)[:200]}")
        self.key = value["key"]
        return value

    def viewer(self, function: str, **request: Any) -> dict:
        """Calls a function of the viewer for the photo that is open."""
        number = self.server.part("viewer")
        content = {"session_hash": self.session, "component_id": number, "fn_name": function}
        found = self.server.post("/component_server", {**content, "data": {"key": self.key, **request}})
        if "error" in found:
            raise Refused(found["error"])
        return found

    def label_map(self) -> bytes:
        """The PNG that the page gives to keep."""
        return base64.b64decode(self.viewer("download", kind="labels", opacity=0.5)["url"].split(",")[1])
