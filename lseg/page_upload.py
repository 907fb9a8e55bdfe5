"""A visitor's file: refused by its header where it is too large, and decoded."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lseg.errors import UserError
from lseg.image import decode_image
from lseg.runner import Timings

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # of damaged uploads there is a sentence


class Upload(NamedTuple):
    """A file that a visitor sent, in memory."""

    name: str
    data: bytes


def decode_upload(upload: Upload, megapixels: float, timings: Timings) -> tuple[str, np.ndarray]:
    """The file's name without folders and suffix, and the photo, uint8 [H, W, 3], RGB.

    Raises:
        UserError: the file is no photo, empty, or has more than so many megapixels.
    """
    name = Path(upload.name).name or "photo"
    _check_header(name, upload.data, megapixels)
    photo = timings.measure("decode", lambda: decode_image(upload.data, name))
    _refuse_large(name, photo.shape[1], photo.shape[0], megapixels)
    return Path(name).stem[:80] or "photo", photo


def _check_header(name: str, data: bytes, megapixels: float) -> None:
    """Refuses by the header, before gigabytes are decoded."""
    if not data:
        raise UserError(f"{name} is empty; copy or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise UserError(f"{name} is too large: scale it down to {megapixels:g} megapixels") from None
    except Exception:  # decoding has better words for what this is
        return
    _refuse_large(name, width, height, megapixels)


def _refuse_large(name: str, width: int, height: int, megapixels: float) -> None:
    if width * height > megapixels * 1e6:
        raise UserError(
            f"{name} has {width * height / 1e6:.0f} megapixels ({width} x {height}): scale it down to {megapixels:g}"
        )
