"""Label lists: reading them from text, a colour for each, and label maps as files."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import cv2
import numpy as np

from lseg.draw import shares
from lseg.errors import UserError
from lseg.files import write_files

OTHER = "other"


@dataclass(frozen=True)
class LabelSet:
    """The labels of a run, in order: a label's index is its place. The notes are sentences for the user."""

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def parse_labels(text: str | Sequence[str]) -> LabelSet:
    """Reads labels from comma- or newline-separated text, or from several such texts.

    White space around and inside labels is tidied and empty labels are left out. A repeat is dropped with a note; upper
    and lower case are one, for CLIP reads lower case. A label alone would be every pixel's, so "other" is added after
    it with a note. At least two labels come back.

    Raises:
        UserError: there is no label, "other" is the only one, or one is not valid text.
    """
    texts = [text] if isinstance(text, str) else text
    names: dict[str, str] = {}
    notes = []
    for part in re.split(r"[,\n\r]", "\n".join(texts)):
        name = _tidy(part)
        if not name:
            continue
        key = label_key(name)
        if key in names:
            notes.append(f'label "{name}" is dropped: it repeats "{names[key]}"')
        names.setdefault(key, name)
    if not names:
        raise UserError('no label is given: name at least one, for example "car, road, sky, other"')
    if list(names) == [OTHER]:
        raise UserError(f'"{OTHER}" is the only label: name at least one more, for example "car, {OTHER}"')
    if len(names) == 1:
        (name,) = names.values()
        names[OTHER] = OTHER
        notes.append(f'"{OTHER}" is added to the labels: "{name}" alone would be every pixel\'s')
    return LabelSet(tuple(names.values()), tuple(notes))


def read_labels_file(path: str | Path) -> list[tuple[str, ...]]:
    """Reads a file of labels: each label's words, the first of which names it, the others synonyms.

    Known layouts: one label a line; ADE20K's objectInfo150 (a header that begins with "Idx", then tab-separated with
    synonyms after commas, or comma-separated with synonyms after semicolons); JSON, a list of labels or of lists of
    synonyms, or an object of labels and their synonyms.

    Raises:
        UserError: the file cannot be read, is no text, is malformed, or holds no label.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file of labels") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: give a file of labels, one a line") from None
    if text.lstrip().startswith(("[", "{")):
        rows = _json_labels(path, text)
    elif text.lstrip()[:3].lower() == "idx":
        lines = [line for line in text.strip().splitlines()[1:] if line.strip()]
        rows = [
            line.split("\t")[-1].split(",") if "\t" in line else line.split(",", 5)[-1].split(";") for line in lines
        ]
    else:
        rows = [[word] for line in text.splitlines() for word in line.split(",")]
    labels = [tuple(word for word in map(_tidy, row) if word) for row in rows]
    labels = [words for words in labels if words]
    if not labels:
        raise UserError(f"{path} holds no label: write one a line")
    return labels


def _json_labels(path: Path, text: str) -> list[list[str]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is malformed JSON ({error}): mend it, or write one label a line") from None
    if isinstance(found, dict):
        found = [[name, *(words if isinstance(words, list) else [words])] for name, words in found.items()]
    rows = [row if isinstance(row, list) else [row] for row in found]
    if not all(isinstance(word, str) for row in rows for word in row):
        raise UserError(f"{path} holds something that is no word: give a list of labels, or labels with their synonyms")
    return rows


def label_dtype(number: int) -> type[np.uint8] | type[np.uint16]:
    """The type of a label map's file for so many labels; its largest value stands for unlabelled pixels.

    Raises:
        UserError: more than 65,535 labels.
    """
    if number > np.iinfo(np.uint16).max:
        raise UserError(f"{number} labels are more than a 16-bit label map holds: give at most 65535")
    return np.uint8 if number <= np.iinfo(np.uint8).max else np.uint16


def save_label_map(
    path: str | Path, labels: np.ndarray, names: Sequence[str], colours: np.ndarray, durable: bool = True
) -> None:
    """Writes a label map as a PNG of indices, and beside it a JSON of what they mean.

    Args:
        path: the PNG; the JSON has the same name with the suffix .json.
        labels: integers [H, W], 0 to N - 1, or -1 for unlabelled: 255 in an 8-bit PNG, 65535 in a 16-bit one.
        names: N labels.
        colours: uint8 [N, 3], RGB.
        durable: as `write_files` takes it.

    Raises:
        UserError: the path does not end in .png, its folder cannot be made or written to, or there are too many labels.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: a label map is a PNG; give a name that ends in .png")
    png, meaning = label_map_files(path.name, labels, names, colours)
    write_files({path: png, path.with_suffix(".json"): meaning}, durable)


def as_hex(colour: np.ndarray) -> str:
    """A colour uint8 [3] as the web has it."""
    return "#" + bytes(colour).hex()


def label_map_files(
    name: str, labels: np.ndarray, names: Sequence[str], colours: np.ndarray, fractions: np.ndarray | None = None
) -> tuple[bytes, bytes]:
    """What `save_label_map` writes, the PNG and the JSON, for a PNG of this name.

    `fractions` are the labels' shares, float64 [N], where they are known. The map may be in the PNG's own form, too.
    """
    dtype = label_dtype(len(names))
    unlabelled = int(np.iinfo(dtype).max)
    height, width = labels.shape
    if fractions is None:
        fractions = shares(labels, len(names))
    indices = labels
    if labels.dtype != dtype:
        indices = labels.astype(dtype)
        indices[labels < 0] = unlabelled
    meaning = {
        "image": name,
        "size": [width, height],
        "unlabelled": unlabelled,
        "labels": [
            {"index": index, "name": label, "colour": as_hex(colour), "share": round(float(share), 6)}
            for index, (label, colour, share) in enumerate(zip(names, colours, fractions, strict=True))
        ],
    }
    text = json.dumps(meaning, ensure_ascii=False, indent=1) + "\n"
    png = cv2.imencode(".png", indices)[1].tobytes()
    return png, text.encode("utf-8", "backslashreplace")


# Colours in RGB: the first 14 are for common words, the rest follow greedily, each as far as may be from all before it
# in CIELAB (lightness 42 to 75, chroma from 31, grey aside). The first 40 are at least 24 apart, all 120 at least 14.9.
COLOURS = """
808080 50a5f0 9655a5 c86946 2d9632 8cbe28 0087a5 3c55eb e41e4b f55ad7 e1b400 af8c55 7d821e 00b996 c300ff
ff5000 ff91b4 00d200 be2373 417346 fa912d c8a5dc 9b505f 2864c8 a0be82 9b2dc3 af82ff ff0aeb 6469a0 00c8d7
6437ff aa7800 be2d14 ff00a0 eba091 f591e6 00cd7d ff0a2d ff7378 0a877d cdb450 9ba0ff 4bcd4b b43746 ff7346
ff3782 af2896 f0a55f ff69b4 b95a00 aaaa00 37c3f5 be6496 e65fff 82c364 6e50be 915a1e 6e6428 9b55ff 41731e
28965a 0f78ff b95acd c800b9 e15a82 5f8c00 965541 0a73aa 0091fa 69c800 aabe50 875582 64a57d ff00c3 b987dc
d27378 7d8c50 a0b4f0 c30fdc ff504b 46a000 f587ff 5fc3b4 7869be 64c887 e1a537 ff9673 c80555 e66405 cd5fb4
7d6400 d791b9 f5a505 b9af69 7882f5 507dcd d75046 7d4bd7 aa3c64 d71900 e13ca5 739b46 a08c05 8c00ff c37832
9619e1 ff0a00 e1aa7d 9b78b4 b964f5 a53c82 be7d5f 00af00 23a0aa 05825f 1e4bff aa4619 009bd2 7873ff fa5073
"""
COMMON = {
    "other": 0, "sky": 1, "road": 2, "building": 3, "tree": 4, "grass": 5, "water": 6, "car": 7, "person": 8,
    "pavement": 9, "sign": 10, "fence": 11, "pole": 12, "bicycle": 13,
    "street": 2, "house": 3, "vegetation": 4, "pedestrian": 8, "sidewalk": 9, "bicyclist": 13,
}  # fmt: skip


def palette(names: Sequence[str]) -> np.ndarray:
    """A colour for each label, by its name alone unless another label of the list wants the same one.

    Common words have a colour of their own; any other word's hash picks one of 26 more. Where two want the same, the
    first has it (common words as listed, others by their hash, so the order of the labels plays no part) and the other
    gets the next that nobody wants. Up to 26 uncommon labels are at least 24 apart in CIELAB from each other and all
    others. Further ones take 80 colours at least 14.9 apart, then what common words leave, then shades of all these.

    Args:
        names: N labels.

    Returns:
        uint8 [N, 3]: RGB, all different for different labels (case aside), neither dark nor pale.
    """
    table = [tuple(bytes.fromhex(word)) for word in COLOURS.split()]
    keys = {label_key(name) for name in names}
    ranked = [*(key for key in COMMON if key in keys), *sorted(keys - COMMON.keys(), key=_hash)]
    chosen: dict[str, tuple[int, ...]] = {}
    used: set[tuple[int, ...]] = set()
    for wishes in (1, None):  # everyone's first wish comes before anyone's second
        for key in ranked:
            if key in chosen:
                continue
            colour = next((colour for colour in islice(_wishes(key, table), wishes) if colour not in used), None)
            if colour:
                chosen[key] = colour
                used.add(colour)
    return np.array([chosen[label_key(name)] for name in names], np.uint8).reshape(-1, 3)


def _wishes(key: str, table: list[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """The colours that a label would take, best first, without end."""
    if key in COMMON:
        yield table[COMMON[key]]
    common = max(COMMON.values()) + 1
    for tier in (table[common:40], table[40:], table[:common]):
        start = _hash(key) % len(tier)
        yield from tier[start:] + tier[:start]
    for attempt in count():
        digest = _hash(f"{key} {attempt}")
        base = table[digest % len(table)]
        shifts = (digest >> 16, digest >> 32, digest >> 48)
        yield tuple(min(max(value + shift % 41 - 20, 0), 255) for value, shift in zip(base, shifts, strict=True))


def _hash(text: str) -> int:
    """64 bits that are the same in every run and on every machine, which Python's hash() are not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def label_key(name: str) -> str:
    """What makes two labels the same: CLIP composes accents and lower-cases."""
    return unicodedata.normalize("NFC", " ".join(name.split())).lower()


def _tidy(part: str) -> str:
    """A label with its white space tidied and control characters removed; empty if nothing in it would show."""
    name = " ".join("".join(c for c in part if c.isspace() or unicodedata.category(c) != "Cc").split()).strip("\ufeff ")
    if any(unicodedata.category(c) == "Cs" for c in name):
        raise UserError(f"the label {ascii(name)} is not valid text: write it in UTF-8")
    return name if any(c.isprintable() and not c.isspace() for c in name) else ""
