"""How many of a photo's pixels have each label, and the sum of their cosines, from maps of the network's size.

A photo's labels and cosines are the network's by nearest neighbour: each pixel of the network's square stands for a
whole number of the photo's, so they can be counted without being made.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lseg.image import labels_to_photo

STRIP = 2**18  # pixels counted at once: NumPy makes 25 bytes of each, and several photos are counted side by side


class Tally(NamedTuple):
    """A photo's labels in numbers, at its own size.

    Attributes:
        size: W and H, the photo's width and height in pixels.
        pixels: int64 [N], how many have each label; the rest of W H is unlabelled.
        sums: float64 [N], of these pixels' cosines.
    """

    size: tuple[int, int]
    pixels: np.ndarray
    sums: np.ndarray


def tally(labels: np.ndarray, cosines: np.ndarray, count: int) -> Tally:
    """Counts maps of the photo's size.

    Args:
        labels: integers [H, W], 0 to N - 1, or negative for unlabelled.
        cosines: float32 [H, W], of each pixel with its label.
        count: N.
    """
    height, width = labels.shape
    pixels, sums = np.zeros(count, np.int64), np.zeros(count)
    rows = max(1, STRIP // max(1, width))
    for strip in (slice(top, top + rows) for top in range(0, height, rows)):
        known = labels[strip] >= 0
        indices = labels[strip][known]
        pixels += np.bincount(indices, minlength=count)
        sums += np.bincount(indices, cosines[strip][known], minlength=count)
    return Tally((width, height), pixels, sums)


def tally_at(labels: np.ndarray, cosines: np.ndarray, count: int, width: int, height: int) -> Tally:
    """`tally` of what `labels_to_photo` would make of maps of the network's size.

    The numbers of pixels are the same. The sums, in float64, are added up in another order: as cosines are at most 1,
    two means differ by less than (W H + S²) / 2**52, which is 4e-9 for 16 megapixels.

    Args:
        labels: unsigned integers [S, S], 0 to N - 1, or more for unlabelled.
        cosines: float32 [S, S].
        count: N.
        width: W, the photo's width in pixels.
        height: H, the photo's height in pixels.
    """
    often, indices = pixels_shown(labels.shape, width, height), labels.ravel()
    pixels = np.bincount(indices, often.ravel(), minlength=count)[:count]
    sums = np.bincount(indices, (often * cosines).ravel(), minlength=count)[:count]
    return Tally((width, height), pixels.astype(np.int64), sums)


@lru_cache(maxsize=8)  # the photos of a folder are mostly of few sizes
def pixels_shown(shape: tuple[int, int], width: int, height: int) -> np.ndarray:
    """How many of a photo's pixels show each pixel of a smaller or larger map: whole numbers, float64 [S, S]."""
    rows, columns = (
        np.bincount(labels_to_photo(np.arange(side)[None], length, 1)[0], minlength=side)
        for side, length in zip(shape, (height, width), strict=True)
    )
    often = np.multiply.outer(rows, columns).astype(np.float64)
    often.setflags(write=False)
    return often
