"""A camera at a URL: Motion JPEG over HTTP, served here on the loopback address and read by OpenCV itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_video import COLOURS, nothing, number_of, numbered, read

import lseg.video
from lseg.errors import UserError
from lseg.video import open_video, segment_video

FRAMES = 60


class Camera(BaseHTTPRequestHandler):
    """Sends numbered frames at the server's pace, as network cameras do; then ends, or falls silent."""

    def do_GET(self) -> None:  # noqa: N802
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        camera = self.server
        with contextlib.suppress(OSError):  # the reader may leave
            for number in range(FRAMES):
                jpeg = cv2.imencode(".jpg", numbered(number, camera.rng))[1].tobytes()
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg))
                self.wfile.write(jpeg + b"\r\n")
                self.wfile.flush()
                time.sleep(camera.pace)
            if camera.silent:
                camera.over.wait(30)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def camera(seed: int, pace: float, silent: bool = False) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Camera) as server:
        server.rng, server.pace, server.silent = np.random.default_rng(seed), pace, silent
        server.over, server.daemon_threads = threading.Event(), True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://someone:secret@127.0.0.1:{server.server_port}/street.mjpg"
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


def test_every_frame_where_there_is_time(seed, tmp_path):
    with camera(seed, 0.02) as url:
        summary = segment_video(open_video(url), nothing, tmp_path / "out.mp4", COLOURS)
    found = [number_of(frame) for frame in read(tmp_path / "out.mp4")]
    assert found == sorted(set(found)) and len(found) == summary.frames
    assert summary.frames + summary.dropped >= FRAMES - 2 and summary.frames > FRAMES // 2


def test_a_slow_network_sees_the_newest(seed, tmp_path):
    seen: list[tuple[int, float]] = []

    def slowly(frame: np.ndarray) -> np.ndarray:
        seen.append((number_of(frame), time.perf_counter()))
        time.sleep(0.15)
        return nothing(frame)

    with camera(seed, 0.03) as url:
        summary = segment_video(open_video(url), slowly, tmp_path / "out.mp4", COLOURS)
    numbers = [number for number, _ in seen]
    assert numbers == sorted(set(numbers)) and summary.dropped > FRAMES // 3
    assert any("dropped to keep up" in note for note in summary.notes)
    # In the middle of the run the frames that are seen go by at the camera's pace, not at the network's.
    first, last = seen[2], seen[-3]
    assert last[0] - first[0] > 1.5 * (len(seen) - 5)


def test_one_that_falls_silent_is_left(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(lseg.video, "TIMEOUT", 1500)
    start = time.perf_counter()
    with camera(seed, 0.005, silent=True) as url:
        summary = segment_video(open_video(url), nothing, tmp_path / "out.mp4", COLOURS)
    assert time.perf_counter() - start < 15
    assert summary.frames and any("gave no more frames" in note for note in summary.notes)
    assert len(read(tmp_path / "out.mp4")) == summary.frames


def test_through_the_script(segment, seed, tmp_path: Path):
    with camera(seed, 0.03) as url:
        status, out, err = segment("--video", url, "--labels", "cat, dog", "--save-labels")
    assert (status, err) == (0, [])
    assert not any("secret" in line for line in out)
    (video,) = (tmp_path / "out").glob("*_lseg.mp4")
    (maps,) = (tmp_path / "out").glob("*_labels")
    assert len(read(video)) == len(list(maps.glob("*.png"))) > 0


def test_nobody_answers(seed):
    with camera(seed, 0) as url:
        pass  # it is gone again
    with pytest.raises(UserError, match="127.0.0.1:.* does not open as a video: check the address") as error:
        open_video(url)
    assert "secret" not in str(error.value)
