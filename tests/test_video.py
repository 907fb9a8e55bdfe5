"""Videos in and out: every frame in its order, runs that end early, live sources, and a sentence for each bad one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import lseg.video
from lseg.draw import overlay
from lseg.errors import UserError
from lseg.video import open_video, segment_video

WIDTH, HEIGHT, BLOCK = 128, 96, 16
COLOURS = np.array([[200, 40, 40], [40, 40, 200]], np.uint8)
CAPTURE = cv2.VideoCapture


def numbered(number: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [96, 128, 3]: eight black or white blocks, the number's bits, over a flat colour of chance."""
    frame = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    frame[:] = rng.integers(30, 220, 3)
    for bit in range(8):
        frame[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return frame


def number_of(frame: np.ndarray) -> int:
    blocks = [frame[4 : BLOCK - 4, bit * BLOCK + 4 : (bit + 1) * BLOCK - 4].mean() > 128 for bit in range(8)]
    return sum(1 << bit for bit, lit in enumerate(blocks) if lit)


def make(path: Path, frames: list[np.ndarray], fps: float = 25, codec: str = "mp4v") -> Path:
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def read(path: Path) -> list[np.ndarray]:
    capture = CAPTURE(str(path))
    frames = []
    while (found := capture.read())[0]:
        frames.append(found[1])
    return frames


def nothing(frame: np.ndarray) -> np.ndarray:
    """Labels under which the photo shows."""
    return np.full(frame.shape[:2], -1)


class Source:
    """What cv2.VideoCapture is taken for: numbered frames at a pace, without an end or up to `count`."""

    def __init__(self, rng: np.random.Generator, pace: float = 0.001, count: int = 10**9, fps: float = 30) -> None:
        self.rng, self.pace, self.count, self.fps = rng, pace, count, fps
        self.given, self.released = 0, False

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FPS: self.fps, cv2.CAP_PROP_FRAME_COUNT: -9.2e18}[what]

    def read(self) -> tuple[bool, np.ndarray | None]:
        assert not self.released
        time.sleep(self.pace)
        if self.given == self.count:
            return False, None
        self.given += 1
        return True, self.frame(self.given - 1)

    def frame(self, number: int) -> np.ndarray:
        return numbered(number % 256, self.rng)

    def release(self) -> None:
        self.released = True


def play(monkeypatch: pytest.MonkeyPatch, source: Source) -> lseg.video.Video:
    monkeypatch.setattr(cv2, "VideoCapture", lambda name, *rest: source if name == "rtsp://x/1" else CAPTURE(name))
    return open_video("rtsp://x/1")


@pytest.fixture
def rng(seed) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def clip(tmp_path, rng) -> Path:
    """A video of 20 to 40 numbered frames."""
    return make(tmp_path / "clip.mp4", [numbered(n, rng) for n in range(rng.integers(20, 40))], 29.97)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "results" / "out.mp4"


@pytest.fixture(autouse=True)
def nothing_is_left(out):
    """Whatever happens, no thread of the run goes on, and beside the output lies no other file."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
    assert not out.parent.exists() or set(os.listdir(out.parent)) <= {out.name}


class TestFiles:
    def test_what_is_told_of_a_file(self, clip):
        video = open_video(str(clip))
        assert (video.live, video.size, video.frames) == (False, (WIDTH, HEIGHT), len(read(clip)))
        assert video.fps == pytest.approx(29.97, abs=0.01) and video.shown == str(clip)

    def test_every_frame_in_order(self, clip, out):
        frames, seen, done, main = read(clip), [], [], threading.get_ident()

        def segment(frame: np.ndarray) -> np.ndarray:
            assert threading.get_ident() == main and frame.dtype == np.uint8
            seen.append(frame)
            return nothing(frame)

        summary = segment_video(
            open_video(str(clip)), segment, out, COLOURS, progress=lambda *values: done.append(values)
        )
        numbers = list(range(len(frames)))
        assert [number_of(frame) for frame in seen] == numbers
        assert all((a == b[..., ::-1]).all() for a, b in zip(seen, frames, strict=True))  # RGB
        assert [number_of(frame) for frame in read(out)] == numbers
        assert (summary.frames, summary.dropped, summary.notes) == (len(frames), 0, [])
        assert summary.fps == pytest.approx(summary.frames / summary.seconds) and summary.seconds > 0
        assert [values[:2] for values in done] == [(n + 1, len(frames)) for n in numbers]
        assert all(values[2] > 0 for values in done)
        result = open_video(str(out))
        assert (result.size, result.frames) == ((WIDTH, HEIGHT), len(frames))
        assert result.fps == pytest.approx(29.97, abs=0.01)

    def test_the_overlay_is_drawn(self, clip, out, rng):
        """Each frame's own labels, in colours whose channels are not swapped."""
        opacity = rng.uniform(0.3, 0.9)
        made = []

        def segment(frame: np.ndarray) -> np.ndarray:
            labels = np.full(frame.shape[:2], len(made) % 2)
            made.append(overlay(frame, labels, COLOURS, opacity)[BLOCK:].mean((0, 1)))
            return labels

        segment_video(open_video(str(clip)), segment, out, COLOURS, opacity=opacity)
        written = [frame[BLOCK:].mean((0, 1))[::-1] for frame in read(out)]
        assert np.abs(np.array(written) - made).max() < 8 and np.ptp(made, axis=0).max() > 30

    def test_on_frame_has_each_frame_once(self, clip, out, rng):
        got, count = [], len(read(clip))
        segment_video(
            open_video(str(clip)),
            lambda frame: np.full(frame.shape[:2], number_of(frame)),
            out,
            rng.integers(0, 256, (count, 3), np.uint8),
            on_frame=lambda index, frame, labels: got.append((index, number_of(frame), labels.min(), labels.max())),
        )
        assert got == [(n, n, n, n) for n in range(count)]

    def test_a_slow_consumer_loses_nothing_and_little_is_held(self, tmp_path, out, rng):
        """However slow the network is, only a few frames are decoded ahead, and all come."""
        source = Source(rng, pace=0, count=60)
        video = open_video(str(make(tmp_path / "a.mp4", [numbered(0, rng)])))
        video.capture, video.first = source, source.read()[1]
        ahead = []

        def segment(frame: np.ndarray) -> np.ndarray:
            time.sleep(0.005)
            ahead.append(source.given - number_of(frame))
            return nothing(frame)

        assert segment_video(video, segment, out, COLOURS).frames == 60 and 3 <= max(ahead) <= 8
        assert source.released

    def test_a_limit(self, clip, out, rng):
        limit = int(rng.integers(1, 15))
        totals = []
        summary = segment_video(
            open_video(str(clip)), nothing, out, COLOURS, limit=limit, progress=lambda *v: totals.append(v[1])
        )
        assert summary.frames == len(read(out)) == limit == totals[-1] and summary.notes == []

    @pytest.mark.parametrize("fps", [0.5, 23.976, 59.94, 119.88, 239.871, 333.333333])
    def test_speeds(self, clip, out, fps):
        video = open_video(str(clip))
        video.fps = fps
        segment_video(video, nothing, out, COLOURS)
        assert open_video(str(out)).fps == pytest.approx(fps, rel=1e-4)

    def test_odd_sizes_and_odd_names(self, tmp_path, out, rng):
        frames = [rng.integers(0, 256, (BLOCK * 3 + 1, BLOCK * 4 + 1, 3), np.uint8)] * 3
        video = open_video(str(make(tmp_path / "a.avi", frames, codec="MJPG")))
        video.first = np.pad(video.first, ((0, 1), (0, 1), (0, 0)))  # OpenCV itself writes even sizes only
        video.size = video.first.shape[1::-1]
        seen = []
        segment_video(video, lambda frame: seen.append(frame.shape) or nothing(frame), out, COLOURS)
        assert set(seen) == {(BLOCK * 3 + 1, BLOCK * 4 + 1, 3)} and len(read(out)) == 3
        assert read(out)[0].shape == (BLOCK * 3, BLOCK * 4, 3)

    def test_a_name_that_looks_like_a_protocol(self, clip, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        clip.rename("12:30.mp4")
        segment_video(open_video("12:30.mp4"), nothing, "1:2.mp4", COLOURS)
        assert len(read(tmp_path / "1:2.mp4")) == len(read(tmp_path / "12:30.mp4")) > 0

    def test_what_was_there_is_replaced(self, clip, out):
        out.parent.mkdir()
        out.write_bytes(b"old")
        segment_video(open_video(str(clip)), nothing, out, COLOURS)
        assert len(read(out)) == len(read(clip))

    def test_a_video_cut_short(self, tmp_path, out, rng):
        path = make(tmp_path / "a.avi", [rng.integers(0, 256, (96, 128, 3), np.uint8) for _ in range(40)], 25, "MJPG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
        video = open_video(str(path))
        assert video.frames == 40
        summary = segment_video(video, nothing, out, COLOURS)
        assert 10 < summary.frames < 30 and len(read(out)) == summary.frames
        assert summary.notes == [f"{path} ends early: {summary.frames} of 40 frames could be read"]


class TestLive:
    def test_the_newest_frames_are_used(self, monkeypatch, out, rng):
        """A slow network: what comes meanwhile is dropped, and each frame is fresh when its turn comes."""
        source = Source(rng)
        video = play(monkeypatch, source)
        assert video.live and video.frames is None and video.fps == 30
        seen, late = [], []

        def segment(frame: np.ndarray) -> np.ndarray:
            seen.append(number_of(frame))
            late.append((source.given - 1 - seen[-1]) % 256)
            time.sleep(0.02)
            return nothing(frame)

        summary = segment_video(video, segment, out, COLOURS, limit=10)
        steps = np.diff(seen)
        assert summary.frames == 10 and [number_of(frame) for frame in read(out)] == seen
        assert summary.dropped >= 50 and (steps[1:] > 3).all() and np.median(late) <= 5
        assert summary.dropped <= source.given - 10
        assert summary.notes == [
            f"{summary.dropped} of {summary.dropped + 10} frames were dropped to keep up, so that {out} plays faster "
            "than life"
        ]
        assert source.released

    def test_a_slow_source_loses_nothing(self, monkeypatch, out, rng):
        video = play(monkeypatch, Source(rng, pace=0.02, count=12))
        summary = segment_video(video, nothing, out, COLOURS)
        assert (summary.frames, summary.dropped) == (12, 0) and summary.notes == ["rtsp://x/1 gave no more frames"]
        assert [number_of(frame) for frame in read(out)] == list(range(12))

    def test_ctrl_c_ends_it(self, monkeypatch, out, rng):
        """Raised where it really is: in the calling thread, by a signal, while it waits for a frame that is slow."""
        # A shell's background job begins with the signal ignored, and so would this.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        source = Source(rng, pace=0.3)
        video = play(monkeypatch, source)
        timer = threading.Timer(0.15, lambda: os.kill(os.getpid(), 2))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            segment_video(video, nothing, out, COLOURS)
        timer.join()
        signal.signal(signal.SIGINT, before)
        assert len(read(out)) == 1 and source.released

    def test_frames_that_change_their_size(self, monkeypatch, out, rng):
        class Changing(Source):
            def frame(self, number: int) -> np.ndarray:
                frame = super().frame(number)
                return frame if number % 3 == 0 else np.repeat(np.repeat(frame, 2, 0), 1 + number % 3, 1)

        video = play(monkeypatch, Changing(rng, pace=0.02, count=9))
        summary = segment_video(video, nothing, out, COLOURS)
        assert [number_of(frame) for frame in read(out)] == list(range(9))
        assert summary.notes == [
            "rtsp://x/1 changes its size: frames are brought to the first one's",
            "rtsp://x/1 gave no more frames",
        ]

    @pytest.mark.parametrize("fps", [0, float("nan"), 90000, -1])
    def test_speeds_that_cannot_be(self, monkeypatch, rng, fps):
        assert play(monkeypatch, Source(rng, fps=fps)).fps == 25


class TestEarlyEnds:
    @pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
    def test_segment_raises(self, clip, out, rng, kind):
        """What was segmented until then is in the file."""
        last, seen = int(rng.integers(1, 15)), []

        def segment(frame: np.ndarray) -> np.ndarray:
            if len(seen) == last:
                raise kind("stop")
            seen.append(number_of(frame))
            return nothing(frame)

        with pytest.raises(kind, match="stop"):
            segment_video(open_video(str(clip)), segment, out, COLOURS)
        assert [number_of(frame) for frame in read(out)] == seen == list(range(last))

    def test_at_the_first_frame(self, clip, out):
        """No frame, no file; and what was there before stays."""

        def segment(frame: np.ndarray) -> np.ndarray:
            raise KeyboardInterrupt

        for before in (None, b"old"):
            if before:
                out.write_bytes(before)
            with pytest.raises(KeyboardInterrupt):
                segment_video(open_video(str(clip)), segment, out, COLOURS)
            assert (out.read_bytes() if out.exists() else None) == before

    @pytest.mark.parametrize("where", ["on_frame", "progress"])
    @pytest.mark.parametrize("live", [False, True])
    def test_the_writer_raises(self, clip, out, monkeypatch, rng, where, live):
        """The error comes back though the calling thread may wait for room, or for a frame."""
        called = []

        def fail(index: int, *_: object) -> None:
            called.append(index)
            if len(called) == 5:
                raise UserError("no room for label maps")

        video = play(monkeypatch, Source(rng)) if live else open_video(str(clip))
        with pytest.raises(UserError, match="^no room for label maps$"):
            segment_video(video, nothing, out, COLOURS, **{where: fail})
        first = 0 if where == "on_frame" else 1
        assert called == list(range(first, first + 5)) and len(read(out)) == 5

    def test_the_overlay_cannot_be_drawn(self, clip, out):
        with pytest.raises(IndexError):
            segment_video(open_video(str(clip)), lambda frame: nothing(frame) + 100, out, COLOURS)
        assert not out.exists()

    def test_the_reader_raises(self, monkeypatch, out, rng):
        class Failing(Source):
            def frame(self, number: int) -> np.ndarray:
                if number == 6:
                    raise RuntimeError("unplugged")
                return super().frame(number)

        with pytest.raises(RuntimeError, match="unplugged"):
            segment_video(play(monkeypatch, Failing(rng, pace=0.02)), nothing, out, COLOURS)
        assert [number_of(frame) for frame in read(out)] == list(range(6))

    def test_a_disk_that_is_full(self, tmp_path, out, rng):
        """OpenCV says nothing when it cannot write: a limit on the size of files stands in for the disk's."""
        video = open_video(
            str(make(tmp_path / "a.mp4", [rng.integers(0, 256, (240, 320, 3), np.uint8) for _ in range(30)]))
        )
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        try:
            with pytest.raises(UserError) as error:
                segment_video(video, nothing, out, COLOURS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert str(error.value) == f"{out} could not be written whole: free space on its disk or choose another folder"
        assert not out.exists()


class TestSentences:
    @pytest.mark.parametrize(
        "name, content, sentence",
        [
            ("none.mp4", None, "none.mp4 does not exist; check the name"),
            ("notes.mp4", b"no video", "notes.mp4 is not a video that OpenCV reads; give another"),
            ("empty.mp4", b"", "empty.mp4 is not a video that OpenCV reads; give another"),
            ("photo.JPG", b"", "photo.JPG is a photo; give a video file"),
            ("notes.mp4/a.mp4", None, "notes.mp4/a.mp4 does not exist; check the name"),
        ],
    )
    def test_files(self, tmp_path, name, content, sentence):
        (tmp_path / "notes.mp4").write_bytes(b"no video")
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            open_video(str(tmp_path / name))

    def test_folders_pipes_and_names(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.mp4")
        for name, sentence in (
            (tmp_path, f"{tmp_path} is a folder; give a video file"),
            ("", ". is a folder; give a video file"),
            (tmp_path / "pipe.mp4", f"{tmp_path}/pipe.mp4 is no regular file; give a video file"),
            ("a\udcff.mp4", "'a\\udcff.mp4' is no text in UTF-8, as OpenCV wants names of videos; rename it"),
        ):
            with pytest.raises(UserError) as error:
                open_video(str(name))
            assert str(error.value) == sentence

    def test_a_video_without_frames(self, tmp_path):
        """An AVI or MP4 of which only the beginning is there."""
        frames = [np.zeros((96, 128, 3), np.uint8)] * 5
        path = make(tmp_path / "a.avi", frames, codec="MJPG")
        path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"movi") + 4])
        with pytest.raises(UserError, match="a.avi gives no frame: copy or download it again"):
            open_video(str(path))
        path = make(tmp_path / "a.mp4", frames)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        with pytest.raises(UserError, match="a.mp4 is not a video that OpenCV reads"):
            open_video(str(path))

    def test_devices_and_urls(self, monkeypatch, rng):
        for source, sentence in (
            ("97", "camera 97 is not there: plug it in, or give the N of a /dev/videoN that exists"),
            ("/dev/video97", "camera 97 is not there: plug it in, or give the N of a /dev/videoN that exists"),
            ("http://me:secret@127.0.0.1:9/a.mp4", "http://127.0.0.1:9/a.mp4 does not open as a video: check the "),
            ("odd://x", "odd://x does not open as a video: check the address and the network"),
        ):
            with pytest.raises(UserError) as error:
                open_video(source)
            assert str(error.value).startswith(sentence)
        with pytest.raises(UserError, match="rtsp://x/1 gives no frame: check that nothing else uses it"):
            play(monkeypatch, Source(rng, count=0))

    def test_opencv_says_nothing_itself(self, tmp_path):
        """In a process of its own, for OpenCV settles how much FFmpeg says at its first video."""
        (tmp_path / "a.mp4").write_bytes(b"no video")
        code = (
            "import sys\nfrom lseg.errors import UserError\nfrom lseg.video import open_video\n"
            "for source in sys.argv[1:]:\n    try: open_video(source)\n    except UserError as error: print(error)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "a.mp4"), "97", "http://127.0.0.1:9/a.mp4"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert len(done.stdout.splitlines()) == 3 and done.stderr == ""

    def test_outputs(self, clip, tmp_path):
        (tmp_path / "folder.mp4").mkdir()
        (tmp_path / "link.mp4").symlink_to(clip)
        before = clip.read_bytes()
        for name, sentence in (
            ("out.avi", "out.avi: videos are written as MP4; give a name that ends in .mp4"),
            ("folder.mp4", "folder.mp4 is a folder; choose another output name"),
            ("clip.mp4", "clip.mp4 is the video that is read; choose another output name"),
            ("link.mp4", "link.mp4 is the video that is read; choose another output name"),
            ("clip.mp4/out.mp4", "clip.mp4 is a file, not a folder; choose another output folder"),
            ("\udcff.mp4", "is no text in UTF-8, as OpenCV wants names of videos; rename it"),
        ):
            with pytest.raises(UserError, match=sentence):
                segment_video(open_video(str(clip)), nothing, tmp_path / name, COLOURS)
        assert clip.read_bytes() == before
        assert sorted(os.listdir(tmp_path)) == ["clip.mp4", "folder.mp4", "link.mp4"]

    def test_sizes_that_mpeg4_does_not_take(self, clip, out):
        for size in ((9000, 96), (96, 1)):
            video = open_video(str(clip))
            video.size = size
            with pytest.raises(UserError, match="clip.mp4 has a side that MPEG-4 does not take; scale it to 2 to 8191"):
                segment_video(video, nothing, out, COLOURS)

    def test_no_encoder(self, clip, out, monkeypatch):
        monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *_: -2)
        with pytest.raises(UserError, match="out.mp4 cannot be written: this OpenCV writes no MPEG-4; install opencv"):
            segment_video(open_video(str(clip)), nothing, out, COLOURS)
