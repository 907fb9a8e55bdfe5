"""`enginerun.py --video`: from a file to an overlaid video and its label maps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_enginerun import ROOT, names, read_map

from lseg import Segmenter
from lseg.errors import UserError, short
from lseg.files import write_files
from lseg.video import open_video  # before OpenCV's first video: FFmpeg's remarks are off from here on
from lseg.vocabulary import parse_labels


def write_video(path: Path, seed: int, frames: int, size: tuple[int, int] = (96, 64)) -> Path:
    """Smooth random frames of (width, height)."""
    rng = np.random.default_rng(seed)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, size)
    for _ in range(frames):
        writer.write(cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), size, interpolation=cv2.INTER_CUBIC))
    writer.release()
    return path


def read_video(path: Path) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        there, frame = capture.read()
        if not there:
            return frames
        frames.append(frame[..., ::-1].copy())


def test_a_file(tiny, tmp_path, segment, seed):
    """As many frames as the source has, and each one's label map as the API has it."""
    video = write_video(tmp_path / "drive.mp4", seed, 5)
    words = "cat, dog, sky"
    code, lines, err = segment("--video", video, "--labels", words, "--save-labels")
    assert (code, err) == (0, [])
    assert lines[-2] == f"{video} -> {short(tmp_path / 'out' / 'drive_lseg.mp4')}" and lines[-1].startswith(
        "5 frames in "
    )
    assert names(tmp_path / "out") == ["drive_labels", "drive_lseg.mp4"]
    frames = read_video(video)
    overlaid = read_video(tmp_path / "out" / "drive_lseg.mp4")
    written = open_video(str(tmp_path / "out" / "drive_lseg.mp4"))
    assert (written.frames, written.fps, written.size) == (5, 10, (96, 64))
    assert len(frames) == len(overlaid) == 5 and overlaid[0].shape == frames[0].shape
    assert names(tmp_path / "out" / "drive_labels") == sorted(
        f"{index:06}.{end}" for index in range(5) for end in ("json", "png")
    )
    with Segmenter(tiny.weights, "onnxruntime", onnx=tiny.folder) as lseg:
        for index, frame in enumerate(frames):
            wanted = lseg.segment(frame, parse_labels(words).names).labels
            assert np.array_equal(read_map(tmp_path / "out" / "drive_labels" / f"{index:06}.png"), wanted)


def test_no_frame_waits_for_the_disk(tmp_path, segment, seed, monkeypatch):
    """A camera's next frames would be dropped meanwhile."""

    def refuse(_: int) -> None:
        raise OSError(5, "asked to wait")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="asked to wait"):
        write_files({tmp_path / "a": b"a"})
    code, _, err = segment("--video", write_video(tmp_path / "drive.mp4", seed, 2), "--save-labels")
    assert (code, err) == (0, [])
    assert len(names(tmp_path / "out" / "drive_labels")) == 4


def test_some_frames_and_unknown_pixels(tmp_path, segment, seed):
    video = write_video(tmp_path / "drive.mp4", seed, 6)
    code, lines, _ = segment("--video", video, "--frames", 2, "--unknown", 1, "--save-labels")
    assert code == 0 and lines[-1].startswith("2 frames in ")
    assert len(read_video(tmp_path / "out" / "drive_lseg.mp4")) == 2
    assert (read_map(tmp_path / "out" / "drive_labels" / "000001.png") == 255).all()


def test_ctrl_c_leaves_a_file_that_plays(tiny, tmp_path, seed):
    video = write_video(tmp_path / "long.mp4", seed, 600)
    options = ["--weights", tiny.weights, "--onnx", tiny.folder, "--output", tmp_path / "out", "--save-labels"]
    command = [sys.executable, ROOT / "enginerun.py", "--video", video, *options]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job begins with it ignored
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    maps = tmp_path / "out" / "long_labels"
    while process.poll() is None and not (maps / "000004.json").exists():
        pass
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    count = len(list(maps.glob("*.png")))
    assert 5 <= count < 600 and len(read_video(tmp_path / "out" / "long_lseg.mp4")) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "none.mp4"], "none.mp4"),
        (["--video", "text.mp4"], "text.mp4"),
        (["--video", "good.mp4", "--frames", "0"], "--frames 0 cannot be: give 1 or more"),
        (["--video", "good.mp4", "--jsonl", "x"], "--jsonl is for photos, not for --video: leave one out"),
        (["--video", "good.mp4", "--batch", "2"], "--batch is for photos, not for --video: leave one out"),
        (["--video", "good.mp4", "--save-scores"], "--save-scores is for photos, not for --video: leave one out"),
        (["--video", "good.mp4", "--points", "none"], "--points is for photos, not for --video: leave one out"),
        (["--video", "good.mp4", "--unknown", "2"], "--unknown 2.0 is no cosine"),
        (["photo.jpg", "--video", "good.mp4"], "photos are there beside --video: give one of the two"),
    ],
)
def test_what_cannot_be(tmp_path, segment, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "good.mp4", 0, 2)
    (tmp_path / "text.mp4").write_text("no video")
    code, lines, err = segment(*options)
    assert (code, lines) == (2, []) and err[0].startswith(f"error: {message}") and len(err) == 1
    assert names(tmp_path) == ["good.mp4", "text.mp4"]


def test_no_camera(tmp_path, segment):
    """It is opened when all else is ready: its frames come by the clock."""
    code, lines, err = segment("--video", "77")
    assert code == 2 and err[0].startswith("error: camera 77 is not there") and len(err) == 1
    assert lines[-1].startswith("ONNX Runtime") and names(tmp_path) == []
