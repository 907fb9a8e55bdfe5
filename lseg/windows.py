"""Photos in windows, as the official evaluation sees them: scales, places, and scores averaged where they overlap.

Source of the protocol: the evaluation of Li et al., "Language-driven Semantic Segmentation", ICLR 2022, which resizes
bilinearly with the corners of both grids coinciding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lseg.runner import Timings, merge_passes

BASE = 520  # the long side at scale 1, for a network of 480 x 480
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
BLACK = np.float32(-1)  # what a window is padded with: black, normalised
STRIP = 2**24  # scores that are summed at the photo's size at a time: 64 MiB

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]  # `lseg.runner.Runner.scores`


@dataclass(frozen=True)
class Inference:
    """A way to bring a photo to the network: its scales, and whether the mirrored photo counts as well."""

    scales: tuple[float, ...] = ()  # none: the whole photo, squashed to the network's square
    mirror: bool = False


MODES = {"whole": Inference(), "window": Inference((1.0,)), "multiscale": Inference(SCALES, mirror=True)}


def label_windows(
    score: Score, size: int, photo: np.ndarray, text: np.ndarray, how: Inference, timings: Timings
) -> tuple[np.ndarray, np.ndarray]:
    """`lseg.runner.Runner.label_windows` in host memory, for any backend that scores windows of `size` x `size`."""

    def label(group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        maps = [_scale_scores(score, size, photo, group, scale, how.mirror, timings) for scale in how.scales]
        return timings.measure("similarity", lambda: _sum_and_argmax(maps, *photo.shape[:2]))

    return merge_passes(text, 1, label)


def _scale_scores(
    score: Score, size: int, photo: np.ndarray, text: np.ndarray, scale: float, mirror: bool, timings: Timings
) -> np.ndarray:
    """Scores of a photo at one scale: windows of the network's size, averaged where they overlap.

    Returns:
        float32 [N, h, w], h x w the photo's size at that scale; with `mirror` the sum of both directions.
    """
    height, width = scaled_size(*photo.shape[:2], scale, size)
    image = timings.measure("preprocess", lambda: _normalised(photo, height, width))
    total = np.zeros((len(text), height, width), np.float32)
    count = np.zeros((height, width), np.float32)
    for top, left in windows(height, width, size):
        piece = image[:, top : top + size, left : left + size]
        window = np.full((1, 3, size, size), BLACK)
        window[0, :, : piece.shape[1], : piece.shape[2]] = piece
        scores = timings.measure("encode_image", lambda window=window: score(window, text)[0])
        if mirror:
            window = np.ascontiguousarray(window[..., ::-1])
            flipped = timings.measure("encode_image", lambda window=window: score(window, text)[0])
            scores = scores + flipped[..., ::-1]
        here = np.s_[top : top + piece.shape[1], left : left + piece.shape[2]]
        total[(slice(None), *here)] += scores[:, : piece.shape[1], : piece.shape[2]]
        count[here] += 1
    total /= count
    return total


def scaled_size(height: int, width: int, scale: float, size: int = 480) -> tuple[int, int]:
    """Height and width of a photo at a scale: its long side becomes 520 x scale for a network of 480 x 480."""
    long = math.ceil(BASE * size / 480 * scale)
    short = max(1, math.floor(min(height, width) * long / max(height, width) + 0.5))
    return (long, short) if height > width else (short, long)


def windows(height: int, width: int, size: int) -> Iterator[tuple[int, int]]:
    """Top left corners of the windows that cover an image: a stride of two thirds, the last ones may reach beyond."""
    stride = size * 2 // 3

    def starts(length: int) -> range:
        return range(0, (math.ceil(max(0, length - size) / stride) + 1) * stride, stride)

    for top in starts(height):
        for left in starts(width):
            yield top, left


def _normalised(photo: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [3, height, width], -1 to 1."""
    image = resize_aligned(photo.transpose(2, 0, 1).astype(np.float32), height, width)
    return image * np.float32(2 / 255) - 1


def resize_aligned(maps: np.ndarray, height: int, width: int, rows: slice = slice(None)) -> np.ndarray:
    """Resizes maps bilinearly; the corners of both grids coincide (align_corners).

    Args:
        maps: float32 [N, h, w].
        height: of the result.
        width: of the result.
        rows: of the result to compute; all by default.

    Returns:
        float32 [N, rows, width].
    """
    top, bottom, down = (part[rows] for part in _taps(maps.shape[1], height))
    left, right, across = _taps(maps.shape[2], width)
    narrow = maps[:, top] + (maps[:, bottom] - maps[:, top]) * down[:, None]  # [N, rows, w]
    return narrow[..., left] + (narrow[..., right] - narrow[..., left]) * across


def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `target` places along an axis of `source`: the two neighbours and the second one's weight."""
    at = np.arange(target) * ((source - 1) / (target - 1) if target > 1 else 0.0)
    first = np.minimum(at.astype(np.int64), source - 1)
    return first, np.minimum(first + 1, source - 1), (at - first).astype(np.float32)


def _sum_and_argmax(maps: list[np.ndarray], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums score maps at the photo's size, strip by strip: the first of the largest, int32, and it, float32 [H, W]."""
    labels, best = np.empty((height, width), np.int32), np.empty((height, width), np.float32)
    step = max(1, STRIP // (len(maps[0]) * width))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        total = sum(resize_aligned(scores, height, width, rows) for scores in maps)
        labels[rows] = total.argmax(axis=0)
        best[rows] = total.max(axis=0)
    return labels, best
