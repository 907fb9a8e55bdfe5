"""From a photo of any size to its label map: squashed whole, or in windows as the official evaluation does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lseg.errors import UserError
from lseg.image import labels_to_photo, to_pixels
from lseg.runner import Runner, Timings
from lseg.windows import MODES

Labelled = tuple[np.ndarray, "np.ndarray | None"]  # integers [H, W] and, where they are wanted, cosines float32 [H, W]


def segment_photo(
    runner: Runner, photo: np.ndarray, text: np.ndarray, mode: str = "whole", timings: Timings | None = None
) -> np.ndarray:
    """`label_photo`'s labels alone."""
    return label_photo(runner, photo, text, mode, timings, best=False)[0]


def label_photo(
    runner: Runner,
    photo: np.ndarray,
    text: np.ndarray,
    mode: str = "whole",
    timings: Timings | None = None,
    best: bool = True,
) -> Labelled:
    """Labels a photo at its own size, and says how near each pixel is to its label.

    Args:
        runner: the backend.
        photo: uint8 [H, W, 3], RGB.
        text: float32 [N, D], unit length.
        mode: "whole", "window" (one scale) or "multiscale" (six scales and the mirror: the official figures).
        timings: to which each stage's milliseconds are added.
        best: whether the cosines are wanted; some backends would copy them from the GPU for nothing.

    Returns:
        integers [H, W], indices of the texts; float32 [H, W], the cosine of each pixel with its text (the mean over
        scales and directions, where there are several), or None.

    Raises:
        UserError: there is no such mode.
    """
    return label_photos(runner, [photo], text, mode, timings, best)[0]


def label_photos(
    runner: Runner,
    photos: Sequence[np.ndarray],
    text: np.ndarray,
    mode: str = "whole",
    timings: Timings | None = None,
    best: bool = True,
) -> list[Labelled]:
    """`label_photo` of several photos, each of its own size, which the network sees at once if it sees them whole.

    Args:
        photos: up to 8.

    Returns:
        labels and cosines of each photo.
    """
    if mode not in MODES:
        raise UserError(f"'{mode}' is no inference mode: choose {', '.join(MODES)}")
    timings = timings if timings is not None else Timings()
    how = MODES[mode]
    if how.scales:
        found = [runner.label_windows(photo, text, how, best, timings) for photo in photos]
        windows = np.float32(len(how.scales) * (1 + how.mirror))
        return [(labels, sums / windows if best else None) for labels, sums in found]
    size = runner.image_size
    pixels = timings.measure("preprocess", lambda: np.stack([to_pixels(photo, size) for photo in photos]))
    result = runner.segment(pixels, text, best)
    timings.add(result.timings)

    def at_its_size(index: int) -> Labelled:
        height, width = photos[index].shape[:2]
        cosines = labels_to_photo(result.best[index], width, height) if best else None
        return labels_to_photo(result.labels[index], width, height), cosines

    return [at_its_size(index) for index in range(len(photos))]
