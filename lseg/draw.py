"""Pictures of a segmentation: the overlay, and the panel of photo, overlay and legend."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

BACKGROUND = 255  # white
BORDER = 255  # between regions: white
BORDER_OPACITY = 0.75
INK = (32, 33, 36)
PALE_INK = (117, 122, 128)
ROWS_AT_ONCE = 512  # large pictures are worked through in strips, so that temporary arrays stay small
WEIGHT = 400  # of the text: regular
SHOWN = 24  # labels that a legend names
WIDE = 2.2  # photos of at least this width to height stand above each other


def shares(labels: np.ndarray, count: int) -> np.ndarray:
    """The part of all pixels that has each label.

    Args:
        labels: integers [H, W], 0 to N - 1, or negative for unlabelled.
        count: N.

    Returns:
        float64 [N]. The sum is 1, less the unlabelled part.
    """
    pixels = np.zeros(count + 1, np.int64)  # the last is for unlabelled pixels
    for top in range(0, len(labels), ROWS_AT_ONCE):
        strip = labels[top : top + ROWS_AT_ONCE]
        pixels += np.bincount(np.where(strip < 0, count, strip).ravel(), minlength=count + 1)
    return pixels[:count] / labels.size


def overlay(photo: np.ndarray, labels: np.ndarray, colours: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """Tints each region of a photo with its label's colour and draws a thin white border between regions.

    Args:
        photo: uint8 [H, W, 3], RGB.
        labels: integers [H, W], indices into the colours; where negative, the photo shows.
        colours: uint8 [N, 3], RGB.
        opacity: of the tint, 0 to 1. With 0 the photo comes back as it is.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = labels.shape
    if opacity == 0:
        return photo.copy()
    line = max(1, round(min(height, width) / 480))  # its width in pixels
    table = np.vstack([colours, np.zeros((1, 3))]).astype(np.uint8)  # a last row for -1, which is not seen
    result = np.empty_like(photo)
    for top in range(0, height, ROWS_AT_ONCE):
        end = min(top + ROWS_AT_ONCE, height)
        strip, under = labels[top:end], photo[top:end]
        tinted = cv2.addWeighted(table.take(strip, axis=0), opacity, under, 1 - opacity, 0)
        cv2.copyTo(under, (strip < 0).astype(np.uint8), tinted)
        # Borders reach a line's width into the strip from rows beside it.
        first, last = max(top - line, 0), min(end + line, height)
        border = _borders(labels[first:last], line)[top - first : end - first]
        lit = cv2.addWeighted(tinted, 1 - BORDER_OPACITY, np.full_like(tinted, BORDER), BORDER_OPACITY, 0)
        result[top:end] = cv2.copyTo(lit, border, tinted)
    return result


def panel(
    photo: np.ndarray,
    overlaid: np.ndarray,
    names: Sequence[str],
    colours: np.ndarray,
    shares: np.ndarray,
    max_side: int = 1280,
) -> np.ndarray:
    """Photo and overlay beside each other (wide ones above each other) over a legend of the labels found.

    The legend is sorted by share and names up to 24 labels; the others are summed up, and those that were not found
    are named in one line as far as it reaches.

    Args:
        photo: uint8 [H, W, 3], RGB.
        overlaid: uint8 [H, W, 3], RGB.
        names: N labels.
        colours: uint8 [N, 3], RGB.
        shares: [N], parts of the whole.
        max_side: the panel's longest side in pixels, at least 320.

    Returns:
        uint8 [panel height, panel width, 3], RGB.
    """
    size = max(10, round(max_side / 72))  # of the text
    margin, gap = 2 * size, size
    stacked = photo.shape[1] >= WIDE * photo.shape[0]
    across, down = (1, 2) if stacked else (2, 1)
    room = max_side - 2 * margin
    width, height = _fit(photo.shape, (room - gap * (across - 1)) // across, (room * 2 // 3 - gap * (down - 1)) // down)
    pictures_width = width * across + gap * (across - 1)
    pictures_height = height * down + gap * (down - 1)

    text = _Text(size)
    legend_width = max(pictures_width, min(room, 24 * size))
    legend = _legend(text, legend_width, names, colours, shares)

    left = margin + (legend_width - pictures_width) // 2
    top = 2 * margin + pictures_height - size // 2
    canvas = np.full((top + len(legend) + margin - size // 2, legend_width + 2 * margin, 3), BACKGROUND, np.uint8)
    for step, image in enumerate((photo, overlaid)):
        x = left + (0 if stacked else step * (width + gap))
        y = margin + (step * (height + gap) if stacked else 0)
        canvas[y : y + height, x : x + width] = _resize(image, (width, height))
    canvas[top : top + len(legend), margin : margin + legend_width] = legend
    return canvas


def _legend(text: _Text, width: int, names: Sequence[str], colours: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3]: swatch, name and share of each label found, in columns, then a line or two in grey."""
    size = text.size
    order = [index for index in np.argsort(-np.asarray(shares), kind="stable") if shares[index] > 0]
    shown, rest = order[:SHOWN], order[SHOWN:]
    absent = [name for name, share in zip(names, shares, strict=True) if not share > 0]
    remarks = []
    if rest:
        remarks.append(f"and {len(rest)} more, together {_percent(sum(shares[index] for index in rest))}")
    if absent:
        remarks.append(f"not found ({len(absent)}): {', '.join(absent)}")

    percents = [_percent(shares[index]) for index in shown]
    percent_width = max(map(text.width, percents), default=0)
    name_width = max((min(text.width(names[index]), 14 * size) for index in shown), default=0)
    entry_width = round(1.5 * size) + name_width + size + percent_width
    rows = -(-len(shown) // max(1, (width + 2 * size) // (entry_width + 2 * size)))
    columns = -(-len(shown) // max(1, rows))
    pitch = (
        entry_width + 2 * size
        if columns < 2
        else min((width - entry_width) // (columns - 1), max(entry_width + 2 * size, 20 * size))
    )
    row_height = round(1.75 * size)
    canvas = np.full(((rows + len(remarks)) * row_height, width, 3), BACKGROUND, np.uint8)
    for place, (index, percent) in enumerate(zip(shown, percents, strict=True)):
        column, row = divmod(place, rows)
        x, y = column * pitch, row * row_height + row_height // 2
        canvas[y - size // 2 : y - size // 2 + size, x : x + size] = colours[index]
        text.draw(canvas, text.shorten(names[index], name_width), x + round(1.5 * size), y, INK)
        text.draw(canvas, percent, x + entry_width - text.width(percent), y, PALE_INK)
    for place, remark in enumerate(remarks):
        text.draw(canvas, text.shorten(remark, width), 0, (rows + place) * row_height + row_height // 2, PALE_INK)
    return canvas


def _borders(labels: np.ndarray, line: int) -> np.ndarray:
    """uint8 [H, W], 1 on a line between regions: the last pixel before each change, widened to the line's width."""
    border = np.zeros(labels.shape, np.uint8)
    border[:-1] |= labels[:-1] != labels[1:]
    border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return cv2.dilate(border, np.ones((line, line), np.uint8)) if line > 1 else border


def _fit(shape: tuple[int, ...], width: int, height: int) -> tuple[int, int]:
    """The largest (width, height) of the shape's proportions in the room given, though no side under a tenth of it."""
    scale = min(width / shape[1], height / shape[0])
    return max(round(shape[1] * scale), width // 10), max(round(shape[0] * scale), height // 10)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    shrinks = size[0] < image.shape[1]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


class _Text:
    """Text of one size in pixels. OpenCV 5 has a font for most scripts; with OpenCV 4 Pillow's own serves, in ASCII."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._opencv = cv2.FontFace("uni") if hasattr(cv2, "FontFace") else None

    def width(self, text: str) -> int:
        if self._opencv:
            x, _, width, _ = cv2.getTextSize((0, 0), text, (0, 0), self._opencv, self.size, WEIGHT)
            return x + width
        return _pillow_width(text, self.size)

    def draw(self, canvas: np.ndarray, text: str, x: int, y: int, colour: tuple[int, int, int]) -> None:
        """Draws on the canvas, uint8 [H, W, 3], from x rightwards, the middle of capital letters at y."""
        if self._opencv:
            cv2.putText(canvas, text, (x, y + round(0.36 * self.size)), colour, self._opencv, self.size, WEIGHT)
            return
        tile = _pillow_text(text, self.size, colour)
        top = y - len(tile) // 2
        place = canvas[max(top, 0) : top + len(tile), x : x + tile.shape[1]]
        np.minimum(place, tile[max(-top, 0) :][: len(place), : place.shape[1]], out=place)

    def shorten(self, text: str, width: float) -> str:
        """As much of the text as fits into the width, with an ellipsis where it was cut."""
        if self.width(text) <= width:
            return text
        low, high = 0, len(text)
        while low < high:  # the longest beginning that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.width(text[:middle] + "...") <= width else (low, middle - 1)
        return text[:low].rstrip(", ") + "..."


@lru_cache(8)
def _pillow_font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


# Legends say the same words over and over, and Pillow keeps other threads waiting while it draws them.
@lru_cache(4096)
def _pillow_width(text: str, size: int) -> int:
    return round(_pillow_font(size).getlength(_plain(text)))


@lru_cache(4096)
def _pillow_text(text: str, size: int, colour: tuple[int, int, int]) -> np.ndarray:
    """Text on white, uint8 [height, width, 3], the middle of capital letters at half its height. Not to be changed."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (_pillow_width(text, size) + size, 4 * size), (BACKGROUND,) * 3)
    base = (0, 2 * size + round(0.36 * size))
    ImageDraw.Draw(picture).text(base, _plain(text), colour, _pillow_font(size), anchor="ls")
    return np.asarray(picture)


def _plain(text: str) -> str:
    """Text in ASCII: accents dropped, other letters as question marks."""
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letters).encode("ascii", "replace").decode()
