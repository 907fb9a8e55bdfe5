"""Words against pixel embeddings that are kept: label maps, one pixel's scores and heat maps without the network."""

from __future__ import annotations

import cv2
import numpy as np

from lseg.runner import merge_passes
from lseg.tally import pixels_shown
from lseg.windows import resize_aligned

STRIP = 2**16  # scores at a time, 256 KiB: they stay in the processor's cache


def label_grid(grid: np.ndarray, text: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What `Runner.segment` gives for the image that the embeddings are of, by NumPy.

    Args:
        grid: float32 [D, G, G], unit length over D.
        text: float32 [N, D], unit length.
        size: S, the side of the network's input.

    Returns:
        int32 [S, S], the nearest text of each pixel; float32 [S, S], their cosine.
    """
    flat, side = grid.reshape(len(grid), -1), grid.shape[1]

    def score(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        coarse = (part @ flat).reshape(-1, side, side)
        labels, best = np.empty((1, size, size), np.int32), np.empty((1, size, size), np.float32)
        step = max(1, STRIP // (len(part) * size))
        for start in range(0, size, step):
            rows = slice(start, min(start + step, size))
            scores = resize_aligned(coarse, size, size, rows)
            index = scores.argmax(axis=0)[None]
            labels[:, rows], best[:, rows] = index, np.take_along_axis(scores, index, 0)
        return labels, best

    labels, best = merge_passes(text, 1, score)
    return labels[0], best[0]


def scores_at(grid: np.ndarray, text: np.ndarray, size: int, row: int, column: int) -> np.ndarray:
    """Every text's cosine, float32 [N], at one pixel of the network's input: those that `label_grid` compares."""
    last, end = size - 1, grid.shape[1] - 1
    (top, down), (left, across) = divmod(row * end, last), divmod(column * end, last)
    corners = grid[:, [top, min(top + 1, end)]][:, :, [left, min(left + 1, end)]].astype(np.float32)  # [D, 2, 2]
    across_, down_ = np.float32(across / last), np.float32(down / last)
    line = corners[..., 0] + (corners[..., 1] - corners[..., 0]) * across_
    return text @ (line[:, 0] + (line[:, 1] - line[:, 0]) * down_)


def heat_map(grid: np.ndarray, word: np.ndarray, size: int) -> tuple[np.ndarray, float, float]:
    """One text's cosines as colours, dark to bright over their own range.

    Args:
        grid: float32 [D, G, G].
        word: float32 [D].
        size: S, the side of the picture.

    Returns:
        uint8 [S, S, 3], RGB; the smallest and the largest cosine.
    """
    side = grid.shape[1]
    scores = resize_aligned((word @ grid.reshape(len(grid), -1)).reshape(1, side, side), size, size)[0]
    low, high = float(scores.min()), float(scores.max())
    levels = ((scores - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB), low, high


def shares_in_photo(labels: np.ndarray, count: int, width: int, height: int) -> np.ndarray:
    """`lseg.draw.shares` of a label map [S, S] at the photo's size, float64 [count], without making it that large."""
    often = pixels_shown(labels.shape, width, height)
    return np.bincount(labels.ravel(), often.ravel(), minlength=count)[:count] / (width * height)
