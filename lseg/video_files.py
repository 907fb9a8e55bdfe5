"""Videos to files: the overlaid video, and each frame's label map where it is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lseg.labels import palette, save_label_map
from lseg.photos import find_labels
from lseg.runner import Runner
from lseg.video import Video, segment_video
from lseg.vocabulary import Vocabulary


@dataclass(frozen=True)
class VideoFiles:
    """What is made of a video.

    Attributes:
        output: folder of the files: NAME_lseg.mp4, and NAME_labels/000000.png and on.
        inference: mode of `lseg.inference`.
        unknown: pixels whose best cosine is below it stay unlabelled; None labels all.
        labels: write each frame's label map.
        limit: end after so many frames; None goes on to the end.
        quiet: no progress bar.
    """

    output: Path
    inference: str = "whole"
    unknown: float | None = None
    labels: bool = False
    limit: int | None = None
    quiet: bool = False


def segment_to_files(
    video: Video,
    runner: Runner,
    text: np.ndarray,
    vocabulary: Vocabulary,
    wanted: VideoFiles,
    say: Callable[[str], object],
) -> Path:
    """Segments a video into files and tells of it; returns the overlaid video's path.

    Raises:
        UserError: a file cannot be written. What was segmented until then, or until Ctrl-C, stays and plays.
    """
    names = vocabulary.labels.names
    colours = palette(names)
    name = video.file.stem if video.file else re.sub(r"[^\w.-]+", "_", video.shown).strip("_") or "video"
    output = wanted.output / f"{name}_lseg.mp4"

    def segment(frame: np.ndarray) -> np.ndarray:
        return find_labels(runner, [frame], text, vocabulary, wanted.inference, wanted.unknown)[0][0]

    def keep(index: int, _: np.ndarray, labels: np.ndarray) -> None:
        path = wanted.output / f"{name}_labels" / f"{index:06}.png"
        save_label_map(path, labels, names, colours, durable=False)  # a slow disk would lose a camera's frames

    total = min((n for n in (video.frames, wanted.limit) if n), default=None)
    with tqdm(total=total, unit="frame", disable=True if wanted.quiet else None) as bar:
        summary = segment_video(
            video,
            segment,
            output,
            colours,
            limit=wanted.limit,
            on_frame=keep if wanted.labels else None,
            progress=lambda *_: bar.update(),
        )
    for note in summary.notes:
        say(f"note: {note}")
    say(f"{video.shown} -> {output}")
    say(f"{summary.frames} frames in {summary.seconds:.1f} s, {summary.fps:.2f} a second")
    return output
