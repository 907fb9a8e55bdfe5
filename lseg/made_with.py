"""What a run's files were made with, in the files: so that an earlier run's are not taken for this one's.

In a picture it stands in a text chunk of the PNG, right behind the header, where no viewer shows it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from lseg.tensorfile import sha256_once
from lseg.vocabulary import Vocabulary
from lseg.weights import resolve

KEY = b"LSeg made with\0"
HEADER = 33  # bytes of a PNG before its second chunk
LONGEST = 200  # characters


def digest(
    weights: str | Path, text_onnx: Path | None, vocabulary: Vocabulary, templates: Sequence[str], *options: object
) -> str:
    """What stands for all that decides a photo's labels but the backend: 32 characters.

    Args:
        weights: as `--weights` takes them; their bytes count, and not their name.
        text_onnx: a text encoder's file in their place; None for their own.
        vocabulary: the labels.
        templates: the prompts.
        options: others that decide, which JSON can hold.

    Raises:
        UserError: a file is not there or cannot be read.
    """
    there = text_onnx is not None and text_onnx.is_file()  # one that is not is told of where it is opened
    about: list[object] = [sha256_once(resolve(weights)), sha256_once(text_onnx) if there else None]
    about += [vocabulary.labels.names, vocabulary.texts]
    about += [vocabulary.owner.tolist(), list(templates), *options]
    return short_digest(about)


def short_digest(about: object) -> str:
    """32 characters that stand for a value that JSON can hold."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def stamped(png: bytes, made_with: str) -> bytes:
    """The PNG with a text in it, ASCII of at most `LONGEST` characters; its pixels stay what they are."""
    content = b"tEXt" + KEY + made_with.encode("ascii")
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return png[:HEADER] + chunk + png[HEADER:]


def made_with(path: Path) -> str | None:
    """The text in a picture; None where there is no picture, or it tells of none. OSError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(HEADER + 8 + len(KEY) + LONGEST)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    length, kind = start[HEADER : HEADER + 4], start[HEADER + 4 : HEADER + 8]
    if kind != b"tEXt":
        return None
    text = start[HEADER + 8 :][: int.from_bytes(length, "big")]
    return text[len(KEY) :].decode("ascii", "replace") if text.startswith(KEY) else None
