"""Photos in and pictures out: the one host-side path from a file to the network's input, for every backend."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import cv2
import numpy as np

from lseg.errors import UserError
from lseg.files import write_files

# How a photo is brought to the network's size. An axis that shrinks is averaged: bilinear sampling would skip pixels of
# a large photo, and noise would pass for detail. An axis that grows is bilinear: averaging would repeat pixels there.
SHRINK = cv2.INTER_AREA
ENLARGE = cv2.INTER_LINEAR

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")  # what counts as an image in a folder
MAX_PIXELS = 2**30  # OpenCV's limit
NO_MEMORY = -4  # OpenCV's StsNoMem
# The first bytes of image files, to tell a damaged one from something else.
JPEG = b"\xff\xd8\xff"
TIFF = (b"II*\0", b"MM\0*")
SIGNATURES = (JPEG, b"\x89PNG\r\n\x1a\n", b"BM", *TIFF, b"RIFF")


def read_image(path: str | Path) -> np.ndarray:
    """Reads a photo as it is meant to be seen.

    EXIF rotation is applied (to WebP by OpenCV 5 only). Grey, palette and CMYK become RGB; 16 bits become 8 by value /
    257, rounded. Transparency is dropped, as Pillow's convert("RGB") in the official code does: the colours under it
    show (in an 8-bit TIFF OpenCV has multiplied them by it). Of an animation or a file of many pages the first is read.

    Args:
        path: a JPEG, PNG, BMP, TIFF or WebP file, or another that the installed OpenCV decodes.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: the file is missing, a folder, empty, cut short, not an image, too large, or holds other values than
            8- or 16-bit integers.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: bytes, path: str | Path) -> np.ndarray:
    """`read_image` of a file's bytes; `path` names it in errors."""
    if data.startswith(JPEG) and not _jpeg_is_whole(data):
        raise UserError(f"{path} is cut short: it is a JPEG without its end; copy or download it again")
    image = decode(path, data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None and data.startswith(TIFF):  # perhaps of values that do not turn into colours
        image = decode(path, data, cv2.IMREAD_UNCHANGED)
    if image is None:
        if data.startswith(SIGNATURES):
            raise UserError(f"{path} is damaged or cut short; copy or download it again")
        if data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<head")):
            raise UserError(f"{path} is a web page, not an image; download the image itself")
        raise UserError(f"{path} is not an image that OpenCV reads; give a JPEG, PNG, BMP, TIFF or WebP file")
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path} holds {image.dtype} values; save it with 8 or 16 bits per channel")
    if image.dtype == np.uint16:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def to_pixels(image: np.ndarray, size: int = 480) -> np.ndarray:
    """Squashes a photo to the network's square: SHRINK along an axis that shrinks, ENLARGE along one that grows.

    Args:
        image: uint8 [H, W, 3].
        size: S, the side of the square in pixels.

    Returns:
        uint8 [S, S, 3].
    """
    height, width = image.shape[:2]
    small = cv2.resize(image, (min(width, size), min(height, size)), interpolation=SHRINK)
    return cv2.resize(small, (size, size), interpolation=ENLARGE)


def normalise(pixels: np.ndarray) -> np.ndarray:
    """Turns pixels into the network's input: (value / 255 - 0.5) / 0.5, channels first.

    Args:
        pixels: uint8 [B, S, S, 3], RGB.

    Returns:
        float32 [B, 3, S, S], contiguous, -1 to 1.
    """
    batch, height, width, channels = pixels.shape
    values = np.empty((batch, channels, height, width), np.float32)
    np.multiply(pixels.transpose(0, 3, 1, 2), np.float32(2 / 255), out=values, dtype=np.float32)
    values -= 1
    return values


def labels_to_photo(labels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Brings a label map to the photo's size by nearest neighbour: row floor((i + 1/2) S / H), columns alike.

    Args:
        labels: [S, S], of any type.
        width: W, the photo's width in pixels.
        height: H, the photo's height in pixels.

    Returns:
        [H, W], of the same type.
    """
    # In whole numbers, so that no rounding moves a border. Of OpenCV's own, INTER_NEAREST_EXACT rounds its scale, and
    # INTER_NEAREST takes floor(i S / H), up to half a pixel off.
    rows = (2 * np.arange(height) + 1) * labels.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * labels.shape[1] // (2 * width)
    return labels.take(columns, axis=1).take(rows, axis=0)


def write_image(path: str | Path, rgb: np.ndarray) -> None:
    """Writes a picture as PNG or JPEG by the path's suffix, whole or not at all, and makes its folder.

    Args:
        path: ends in .png, .jpg or .jpeg.
        rgb: uint8 [H, W, 3].

    Raises:
        UserError: another suffix, a JPEG of more than 65,535 pixels a side, or a folder that cannot be made or written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{path}: pictures are written as PNG or JPEG; give a name that ends in .png or .jpg")
    if suffix != ".png" and max(rgb.shape) > 65535:
        raise UserError(f"{path}: a JPEG holds at most 65535 pixels a side; give a name that ends in .png")
    write_files({path: encode_image(rgb, suffix)})


def encode_image(rgb: np.ndarray, suffix: str = ".png") -> bytes:
    """A picture's file: uint8 [H, W, 3] as PNG, or as JPEG at OpenCV's quality of 95."""
    return cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


def read_bytes(path: str | Path) -> bytes:
    """A file's bytes; UserError where it is missing, no regular file, empty, or cannot be read."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path} is a folder; give an image file")
        if not stat.S_ISREG(mode):  # a pipe would be waited for, a device might never end
            raise UserError(f"{path} is not a regular file; give an image file")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; check the name") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its name and permissions") from None
    if not data:
        raise UserError(f"{path} is empty; copy or download it again")
    return data


def decode(path: str | Path, data: bytes, flags: int) -> np.ndarray | None:
    """OpenCV's imdecode; None where it fails, and UserError where memory does. `path` names the file in errors."""
    if _png_is_cut(data):
        return None
    try:
        with silent_stderr:
            return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if error.code == NO_MEMORY or "MAX_IMAGE" in str(error):
            raise UserError(
                f"{path} is too large to decode; scale it down to at most {MAX_PIXELS:,} pixels, or what memory holds"
            ) from None
        return None


def _png_is_cut(data: bytes) -> bool:
    """Whether a part of a PNG reaches beyond the file's end. OpenCV would make room for it first, up to 2 GiB."""
    at = 8 if data.startswith(b"\x89PNG\r\n\x1a\n") else len(data)
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return at > len(data)


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether a JPEG has its end marker. Older OpenCV fills what is missing with grey and says nothing.

    The thumbnail inside the header has an end marker too, so the header's segments are skipped, by their lengths, up to
    the first scan. From there on the two bytes are nothing else: a byte ff of the picture is followed by 00.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # start of scan
            return data.find(b"\xff\xd9", at) >= 0
        # Fill bytes may stand before a marker; every other marker up to here has a length.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


class _SilentStderr:
    """Hides what C libraries write to file descriptor 2, such as libpng's remarks about colour profiles.

    The descriptor is the process's: other threads' words to stderr are lost meanwhile, so keep it short. Of threads
    that are inside at once, the first turns it off and the last turns it on again.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.saved = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            try:
                self.saved = os.dup(2)
            except OSError:  # stderr is closed: there is nothing to hide
                self.saved = -1
                return
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.saved >= 0:
                os.dup2(self.saved, 2)
                os.close(self.saved)
                self.saved = -1


silent_stderr = _SilentStderr()
