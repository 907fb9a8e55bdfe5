"""Videos: decoding ahead, segmenting in the calling thread, and writing the overlays, all at once."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from lseg.draw import overlay
from lseg.errors import UserError
from lseg.files import unfinished, writable_folder
from lseg.image import SUFFIXES

LISTS = (b"ffconcat", b"#EXTM3U", b"<?xml", b"<MPD", b"v=0")  # how playlists of FFmpeg's kinds begin
ROOM = 4  # frames that wait between two threads
DEVICE = re.compile(r"(?:/dev/video)?([0-9]{1,9})")
TIMEOUT = 10_000  # milliseconds for a URL to open, or to give its next frame
# FFmpeg's remarks about damaged frames come from any thread at any time. OpenCV reads this once, at the first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


@dataclass
class Video:
    """A video that is open, its first frame read."""

    shown: str  # what messages call it
    capture: cv2.VideoCapture  # `segment_video` reads it to its end and releases it
    first: np.ndarray  # uint8 [H, W, 3], BGR
    size: tuple[int, int]  # width and height, as seen: the rotation that phones note in a file is applied
    live: bool  # a device or a URL: frames come by the clock, and those not taken are lost
    fps: float
    frames: int | None  # as the container has it, if it is a file that does
    file: Path | None


@dataclass
class Summary:
    """What a run did. `seconds` and `fps` are by the clock; the notes are sentences for the user."""

    frames: int = 0
    dropped: int = 0
    seconds: float = 0.0
    fps: float = 0.0
    notes: list[str] = field(default_factory=list)


def is_live(source: str) -> bool:
    """Whether a source is a device or a URL, whose frames come by the clock."""
    return bool(DEVICE.fullmatch(source)) or "://" in source


def open_video(source: str) -> Video:
    """Opens a video file, a URL (it has "://" in it) or a device ("0" or "/dev/video0") and reads the first frame.

    UserError where it does not exist, does not open, is no video, or gives no frame.
    """
    _check_text(source)
    device = DEVICE.fullmatch(source)
    file, options = None, []
    if device:
        shown, wanted = f"camera {int(device[1])}", int(device[1])
        refused = "is not there: plug it in, or give the N of a /dev/videoN that exists"
    elif "://" in source:
        shown, wanted = re.sub(r"(?<=://)[^/]*@", "", source), source  # no passwords in messages
        options = [cv2.CAP_ANY, [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT]]
        refused = "does not open as a video: check the address and the network"
    else:
        file = Path(source)
        _check_file(file)
        shown, wanted = source, os.path.abspath(file)  # to FFmpeg a name such as "12:30.mp4" begins with a protocol
        refused = "is not a video that OpenCV reads; give another, such as an MP4, or copy or download it again"
    # OpenCV's log is off from here on: what it has to say follows as a sentence.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(wanted, *options)
    found, first = capture.read()
    if not found:
        empty = f"gives no frame: {'copy or download it again' if file else 'check that nothing else uses it'}"
        raise UserError(f"{shown} {empty if capture.isOpened() else refused}")
    fps, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    frames = int(count) if file and 1 <= count < 1e9 else None
    fps = fps if 0.01 <= fps <= 1000 else 25.0  # 0 and nan where the container does not say
    return Video(shown, capture, first, first.shape[1::-1], file is None, fps, frames, file)


def segment_video(
    video: Video,
    segment: Callable[[np.ndarray], np.ndarray],
    output: str | Path,
    colours: np.ndarray,
    *,
    opacity: float = 0.55,
    limit: int | None = None,
    on_frame: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    progress: Callable[[int, int | None, float], None] | None = None,
) -> Summary:
    """Segments a video frame by frame and writes the overlays as an MP4 (MPEG-4, without sound).

    One thread decodes ahead and one draws and writes. Of a live source only the newest frame waits. Whatever ends a run
    early (Ctrl-C, an error), the output plays and has the frames that were segmented until then; without any, nothing
    is written. MPEG-4 has even sides: an odd video loses its last column or row. Raises what `segment`, `on_frame` and
    `progress` raise, and UserError where the output cannot be written.

    Args:
        video: from `open_video`; it is used up.
        segment: called here with each frame, uint8 [H, W, 3], RGB; gives integers [H, W], negative for unlabelled.
        output: ends in .mp4.
        colours: uint8 [N, 3], RGB.
        limit: ends after so many frames.
        on_frame: called in the writing thread with each frame's index, the frame and its labels, in order.
        progress: called there with the frames done, all there are to do if known, and those per second of late.
    """
    start, taken, output, summary = time.perf_counter(), 0, Path(output), Summary()
    total = min((number for number in (limit, video.frames) if number is not None), default=None)
    frames, results = _Queue(1, drop=True) if video.live else _Queue(ROOM), _Queue(ROOM)

    def decode() -> None:
        found, frame = True, video.first
        try:
            while found:
                if frame.shape != video.first.shape:
                    summary.notes[:] = [f"{video.shown} changes its size: frames are brought to the first one's"]
                    frame = cv2.resize(frame, video.size, interpolation=cv2.INTER_AREA)
                if not frames.put(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)):
                    return
                found, frame = video.capture.read()
        finally:
            frames.end()
            video.capture.release()

    def write() -> None:
        times = deque([start], maxlen=31)
        try:
            while (result := results.get()) is not None:
                frame, labels = result
                writer.write(cv2.cvtColor(overlay(frame, labels, colours, opacity), cv2.COLOR_RGB2BGR))
                summary.frames += 1
                times.append(time.perf_counter())
                if on_frame:
                    on_frame(summary.frames - 1, frame, labels)
                if progress:
                    progress(summary.frames, total, (len(times) - 1) / (times[-1] - times[0]))
        finally:
            frames.end()
            results.end()
            _finish(writer, temporary, output, summary.frames)

    _check_output(video, output)
    with unfinished(Path(os.path.abspath(output)).parent) as folder:
        writer, temporary = _open_writer(video, output, folder)
        with ThreadPoolExecutor(2) as pool:  # Python waits for both even at its exit, after a second Ctrl-C
            jobs = [pool.submit(write), pool.submit(decode)]
            try:
                while (limit is None or taken < limit) and (frame := frames.get()) is not None:
                    if not results.put((frame, segment(frame))):
                        break
                    taken += 1
            finally:
                frames.end()
                results.end()
    _ = [job.result() for job in jobs]  # raises what they raised
    summary.dropped, summary.seconds = frames.dropped, time.perf_counter() - start
    summary.fps = summary.frames / summary.seconds
    # Containers without a count have it guessed from their length, so a little is no news.
    if video.frames and taken != limit and taken < video.frames - max(1, video.frames // 100):
        summary.notes.append(f"{video.shown} ends early: {taken} of {video.frames} frames could be read")
    if video.live and taken != limit:
        summary.notes.append(f"{video.shown} gave no more frames")
    if summary.dropped:
        came = f"{frames.dropped} of {frames.dropped + taken}"
        summary.notes.append(f"{came} frames were dropped to keep up, so that {output} plays faster than life")
    return summary


class _Queue:
    """Between two threads, either of which may end it: then `put` gives False, and `get` what is left, then None."""

    def __init__(self, room: int, drop: bool = False) -> None:  # where it drops, the oldest makes room for the newest
        self.room, self.drop, self.dropped, self.ended = room, drop, 0, False
        self.items: deque = deque(maxlen=room)
        self.change = threading.Condition()

    def put(self, item: object) -> bool:
        with self.change:
            self.change.wait_for(lambda: self.drop or self.ended or len(self.items) < self.room)
            if not self.ended:
                self.dropped += len(self.items) == self.room
                self.items.append(item)
                self.change.notify_all()
            return not self.ended

    def get(self) -> object | None:
        with self.change:
            self.change.wait_for(lambda: self.items or self.ended)
            self.change.notify_all()
            return self.items.popleft() if self.items else None

    def end(self) -> None:
        with self.change:
            self.ended = True
            self.change.notify_all()


def _check_output(video: Video, output: Path) -> None:
    """Makes the output's folder; UserError where the video cannot be written there."""
    if output.suffix.lower() != ".mp4":
        raise UserError(f"{output}: videos are written as MP4; give a name that ends in .mp4")
    _check_text(str(output))
    same = video.file and output.exists() and output.samefile(video.file)
    if same or output.is_dir():
        raise UserError(f"{output} is {'the video that is read' if same else 'a folder'}; choose another output name")
    if not 2 <= min(video.size) <= max(video.size) <= 8191:
        raise UserError(f"{video.shown} has a side that MPEG-4 does not take; scale it to 2 to 8191 pixels a side")
    writable_folder(output.parent)


def _open_writer(video: Video, output: Path, folder: Path) -> tuple[cv2.VideoWriter, Path]:
    """Opens a file in a temporary folder for the video's overlays."""
    temporary = folder / "video.mp4"
    for fps in (video.fps, round(video.fps, 2), max(round(video.fps), 1)):  # MPEG-4 does not take every fraction
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), fps, video.size)
        if writer.isOpened():
            return writer, temporary
    raise UserError(f"{output} cannot be written: this OpenCV writes no MPEG-4; install opencv-python-headless")


def _finish(writer: cv2.VideoWriter, temporary: Path, output: Path, frames: int) -> None:
    """Closes the file and gives it its name if it plays: OpenCV says nothing when a disk is full."""
    try:
        writer.release()
        if frames:
            if not cv2.VideoCapture(str(temporary)).read()[0]:
                raise UserError(f"{output} could not be written whole: free space on its disk or choose another folder")
            os.replace(temporary, output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another output folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def _check_text(name: str) -> None:
    if name != name.encode(errors="replace").decode():  # OpenCV would crash
        raise UserError(f"{ascii(name)} is no text in UTF-8, as OpenCV wants names of videos; rename it")


def _check_file(file: Path) -> None:
    try:
        if file.is_dir() or (file.exists() and not file.is_file()):  # a pipe would be waited for
            raise UserError(f"{file} is {'a folder' if file.is_dir() else 'no regular file'}; give a video file")
        with open(file, "rb") as opened:
            head = opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file} does not exist; check the name") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check its name and permissions") from None
    if head.startswith(LISTS):  # FFmpeg would open whatever they name
        raise UserError(f"{file} is a list of other files; give the video itself")
    if file.suffix.lower() in SUFFIXES:  # FFmpeg would take it for a video of one frame
        raise UserError(f"{file} is a photo; give a video file")
