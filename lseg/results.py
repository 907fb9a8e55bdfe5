"""What is known of a photo, as a line of JSON: each label's share and confidence, and its mask in COCO's RLE."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lseg.errors import UserError
from lseg.files import write_files
from lseg.tally import Tally, tally

BEGINNING = b'{"photo": '  # of every line


def mark_unknown(labels: np.ndarray, cosines: np.ndarray, threshold: float) -> np.ndarray:
    """The labels, integers [H, W], with -1 where the cosine, float32 [H, W], is below the threshold."""
    return np.where(is_unknown(cosines, threshold), np.int32(-1), labels.astype(np.int32))


def is_unknown(cosines: np.ndarray, threshold: float) -> np.ndarray:
    """Where a pixel is too far from its label to have it, of any shape."""
    return cosines < threshold


def describe(
    photo: str, labels: np.ndarray, cosines: np.ndarray, names: Sequence[str], rle: bool = False
) -> dict[str, Any]:
    """A photo's labels in numbers.

    Args:
        photo: what it is called.
        labels: integers [H, W], 0 to N - 1, or negative for unlabelled.
        cosines: float32 [H, W], of each pixel with its label.
        names: N labels.
        rle: adds each label's mask in COCO's compressed run-length encoding (pycocotools reads it).

    Returns:
        "photo", "size" [width, height], "unlabelled" (a share), and "labels": of each label found, the most frequent
        first, "index", "name", "share", "confidence" (the mean cosine of its pixels) and with `rle` "rle".

    Raises:
        UserError: pycocotools is not installed.
    """
    found = describe_tally(photo, tally(labels, cosines, len(names)), names)
    return with_masks(found, labels) if rle else found


def describe_tally(photo: str, counted: Tally, names: Sequence[str]) -> dict[str, Any]:
    """`describe` of a photo whose labels are counted already, without masks."""
    width, height = counted.size
    total = width * height
    found = []
    for index in np.argsort(-counted.pixels, kind="stable"):
        pixels = int(counted.pixels[index])
        if pixels == 0:
            break
        entry: dict[str, Any] = {"index": int(index), "name": names[index], "share": round(pixels / total, 6)}
        entry["confidence"] = round(float(counted.sums[index]) / pixels, 5)
        found.append(entry)
    unlabelled = round((total - int(counted.pixels.sum())) / total, 6)
    return {"photo": photo, "size": [width, height], "unlabelled": unlabelled, "labels": found}


def with_masks(found: dict[str, Any], labels: np.ndarray) -> dict[str, Any]:
    """What `describe_tally` gives, with each label's mask, from the photo's labels [H, W].

    Raises:
        UserError: pycocotools is not installed.
    """
    for entry in found["labels"]:
        entry["rle"] = encode_rle(labels == entry["index"])
    return found


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask, bool [H, W], in COCO's run-length encoding: "size" [H, W] and "counts", text."""
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise UserError("pycocotools, which writes COCO's masks, is not installed: run './requirements.sh'") from None
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def photos_in(path: Path, names: Sequence[str] = ()) -> set[str]:
    """What the photos of a file of such lines are called; none where there is no file.

    Args:
        path: the file.
        names: the labels: lines that tell of others do not count. None given, all count.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    known = set(enumerate(names))

    def fits(line: dict[str, Any]) -> bool:
        return not known or all((entry["index"], entry["name"]) in known for entry in line["labels"])

    try:
        lines = map(json.loads, _whole_lines(path))  # one after the other: masks make them large
        return {line["photo"] for line in lines if fits(line)}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): choose another --jsonl") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} holds something other than photos' lines: choose another --jsonl") from None


def _whole_lines(path: Path) -> list[bytes]:
    """The file's lines, less one that a killed run did not finish; ValueError where that is not what the end is."""
    *lines, rest = path.read_bytes().split(b"\n")
    if rest and not (rest.startswith(BEGINNING) or BEGINNING.startswith(rest)):
        raise ValueError(rest)
    return lines


class JsonLines:
    """A file of JSON lines that grows by whole lines: what is written stays, whatever comes after. A context manager.

    An older file stays until the first line is written.

    Args:
        path: the file; None takes the lines and drops them.
        again: to go on with a file that is there: the photos whose lines will come anew. None begins a new file.

    Raises:
        UserError: it cannot be written, also later, when the disk is full.
    """

    def __init__(self, path: Path | None, again: Collection[str] | None = None):
        self.path, self.again, self.file = path, again, None

    def write(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        start = None
        try:
            if self.file is None:
                self._open()
            start = self.file.seek(0, 2)
            if self.file.write(line) < len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            if start is not None:
                with suppress(OSError):
                    self.file.truncate(start)  # no half line
            raise self._refused(error) from None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.again is not None and self.path.exists():
            kept = [line for line in _whole_lines(self.path) if json.loads(line)["photo"] not in self.again]
            write_files({self.path: b"".join(line + b"\n" for line in kept)})
        self.file = open(self.path, "wb" if self.again is None else "ab", buffering=0)

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written ({error.strerror}): choose another --jsonl")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
