"""From a photo of any size to its label map: squashed whole, or in windows as the official evaluation does."""

from __future__ import annotations

import numpy as np

from lseg.errors import UserError
from lseg.image import labels_to_photo, to_pixels
from lseg.runner import Runner, Timings
from lseg.windows import MODES


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
) -> tuple[np.ndarray, np.ndarray | None]:
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
    if mode not in MODES:
        raise UserError(f"'{mode}' is no inference mode: choose {', '.join(MODES)}")
    timings = timings if timings is not None else Timings()
    height, width = photo.shape[:2]
    how = MODES[mode]
    if not how.scales:
        pixels = timings.measure("preprocess", lambda: to_pixels(photo, runner.image_size)[None])
        result = runner.segment(pixels, text, best)
        timings.add(result.timings)
        cosines = labels_to_photo(result.best[0], width, height) if best else None
        return labels_to_photo(result.labels[0], width, height), cosines
    labels, sums = runner.label_windows(photo, text, how, best, timings)
    return labels, sums / np.float32(len(how.scales) * (1 + how.mirror)) if best else None
