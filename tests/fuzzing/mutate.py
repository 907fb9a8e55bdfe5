"""Mutations of bytes, texts, JSON values and names: the blocks that every format's own mutations are made of."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Rng = np.random.Generator

NUMBERS = [-(2**63), -(2**31), -65536, -129, -1, 0, 1, 2, 7, 76, 77, 127, 128, 255, 256, 32767, 65535, 65536, 2**24]
NUMBERS += [2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**30]
WORDS = ["", " ", "\0", "\n", "a\nb", "\r", "\x1b[2J", "\x85", "\u2028", "\ufeff", "\u202e", "é", "e\u0301", "İ", "ß"]
WORDS += ["日本", "\U0001f600", "\ud800", "\x7f", "%s%n", "{}", "{0}", "${HOME}", "'", '"', "\\", "other", "a" * 300]
WORDS += [
    "&amp;" * 40,
    "&#x80;",
    "<|endoftext|>",
    "a," * 50,
    "NaN",
    "1e999",
    "-0",
    "None",
    "ſ" * 90,
    "ͅ" * 9,
    "a b " * 99,
]


def pick(rng: Rng, values: Sequence[T]) -> T:
    return values[int(rng.integers(len(values)))]


def chance(rng: Rng, share: float) -> bool:
    return bool(rng.random() < share)


def times(rng: Rng, most: int = 6) -> range:
    """One mutation mostly, and sometimes several."""
    return range(int(min(most, 1 + rng.geometric(0.5) - 1 if chance(rng, 0.8) else rng.integers(1, most + 1))) or 1)


def mutate_bytes(data: bytes, rng: Rng, others: Sequence[bytes] = (), most: int = 6) -> bytes:
    """Flips, sets, cuts, repeats and numbers in a file that knows nothing of its format."""
    result = bytearray(data)
    for _ in times(rng, most):
        _one_of_bytes(result, rng, others)
    return bytes(result)


def _one_of_bytes(data: bytearray, rng: Rng, others: Sequence[bytes]) -> None:
    size = len(data)
    # Headers decide most: half of all places lie in the first or last 64 bytes.
    place = int(rng.integers(size + 1))
    if chance(rng, 0.5):
        place = min(int(rng.integers(64)), size) if chance(rng, 0.7) else max(0, size - int(rng.integers(64)))
    kind = int(rng.integers(10))
    length = int(min(rng.geometric(0.05), max(1, size)))
    if kind == 0 and place < size:
        data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1 and place < size:
        data[place] = int(rng.integers(256))
    elif kind in (2, 3):
        code = pick(rng, ["<B", "<H", "<I", "<Q", ">H", ">I", ">Q"])
        number = pick(rng, NUMBERS) % (1 << 8 * struct.calcsize(code))
        packed = struct.pack(code, number)
        data[place : place + len(packed)] = packed
    elif kind == 4:
        del data[place : place + length]
    elif kind == 5:
        data[place:place] = rng.bytes(length)
    elif kind == 6:
        data[place:place] = data[place : place + length] * int(rng.integers(1, 5))
    elif kind == 7:
        del data[place:]
    elif kind == 8 and others:
        other = pick(rng, others)
        data[place:] = other[min(place, len(other)) :]
    else:
        _number_in_text(data, rng)


def _number_in_text(data: bytearray, rng: Rng) -> None:
    """Another number in place of one that is written out in digits."""
    found = list(re.finditer(rb"\d+", bytes(data[:4096])))
    if found:
        match = pick(rng, found)
        data[match.start() : match.end()] = str(pick(rng, NUMBERS)).encode()


def mutate_text(text: str, rng: Rng) -> str:
    """Lines and words that are moved, repeated, and replaced by strange ones."""
    for _ in times(rng):
        lines = text.split("\n")
        at = int(rng.integers(len(lines)))
        kind = int(rng.integers(8))
        if kind == 0:
            lines[at] = pick(rng, WORDS)
        elif kind == 1:
            lines.insert(at, pick(rng, WORDS))
        elif kind == 2:
            place = int(rng.integers(len(lines[at]) + 1))
            lines[at] = lines[at][:place] + pick(rng, WORDS) + lines[at][place:]
        elif kind == 3:
            lines = lines[:at] + lines[at:][: int(rng.integers(4))] * int(rng.integers(1, 30))
        elif kind == 4:
            lines[at] = re.sub(r"-?\d+", lambda _: str(pick(rng, NUMBERS)), lines[at], count=1)
        elif kind == 5:
            lines[at] *= int(rng.integers(0, 40))
        elif kind == 6:
            del lines[at]
        else:
            lines[at] = lines[at].replace(pick(rng, [" ", ",", "\t", "{}", ";", "/"]), pick(rng, WORDS))
        text = "\n".join(lines) or pick(rng, WORDS)
    return text


def text_file(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A text file: mostly as text, sometimes as bytes."""
    if chance(rng, 0.25):
        return mutate_bytes(data, rng, others)
    text = mutate_text(data.decode("utf-8", "replace"), rng)
    return text.encode(pick(rng, ["utf-8"] * 8 + ["utf-16", "utf-8-sig", "latin-1"]), "replace")


def odd_value(rng: Rng, depth: int = 0) -> Any:
    """A JSON value that was not expected."""
    kind = int(rng.integers(9))
    if kind == 0 and depth < 3:
        return [odd_value(rng, depth + 1) for _ in range(int(rng.integers(4)))]
    if kind == 1 and depth < 3:
        return {pick(rng, WORDS): odd_value(rng, depth + 1) for _ in range(int(rng.integers(4)))}
    if kind == 2:
        return pick(rng, NUMBERS)
    if kind == 3:
        return pick(rng, [float("nan"), float("inf"), -0.0, 1e308, 0.5, -1e-320])
    return pick(rng, [None, True, False, pick(rng, WORDS), [], {}])


def mutate_json(value: Any, rng: Rng) -> Any:
    """The same value with one place in it changed."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or chance(rng, 0.1):
        return odd_value(rng)
    key = pick(rng, keys)
    value = dict(value) if isinstance(value, dict) else list(value)
    kind = int(rng.integers(6))
    if kind <= 2:
        value[key] = mutate_json(value[key], rng)
    elif kind == 3:
        value[key] = odd_value(rng)
    elif kind == 4:
        del value[key]
    elif isinstance(value, dict):
        value[pick(rng, WORDS)] = value[key]
    else:
        value.insert(key, odd_value(rng))
    return value


DEEP = b"[" * 100_000 + b"]" * 100_000


def json_file(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A JSON file: mostly another value, sometimes other bytes, sometimes nested beyond any stack."""
    kind = rng.random()
    if kind < 0.2:
        return text_file(data, rng, others)
    if kind < 0.21:
        return pick(rng, [DEEP, b'{"a":' * 50_000, b"1" * 5000, b"[" + b"9" * 5000 + b"]", b"nul", b'"\\ud800"'])
    try:
        value = json.loads(data)
    except ValueError:
        return mutate_bytes(data, rng, others)
    for _ in times(rng, 4):
        value = mutate_json(value, rng)
    return json.dumps(value, ensure_ascii=chance(rng, 0.7)).encode("utf-8", "surrogatepass")


def odd_names(outside: str) -> list[str]:
    """Names of files that must not decide where anything is written. `outside` is an absolute folder."""
    names = [
        "../../x",
        "../../../../x",
        f"{outside}/absolute",
        f"//{outside}/twice",
        "a/../../../x",
        "..",
        ".",
        "/",
        "",
    ]
    names += [
        "a\0b",
        "a\nb",
        "\x1b]0;x\x07",
        "a" * 300,
        "a" * 5000,
        "d" * 300 + "/b",
        "/".join(["d"] * 3000),
        "é" * 200,
    ]
    names += [
        "/dev/null",
        "/dev/full",
        "/dev/zero",
        "CON",
        "a/",
        "a//b",
        "./a",
        "~/x",
        "$HOME/x",
        "..\\..\\x",
        "-rf",
        "*",
    ]
    names += [
        "a_lseg",
        "a",
        "a.jpg/b",
        "a_lseg.png/b",
        "a_labels",
        "\udcff",
        "\ud800",
        ".hidden",
        "...",
        "..a",
        " ",
        "\t",
    ]
    names += [
        "job.json",
        "parts/part-0.parquet",
        "a_labels.json/c",
        "\u202egnp.exe",
        "%2e%2e/x",
        "....//x",
        "..;/x",
        "|id",
    ]
    return names


def odd_name(rng: Rng, outside: str, suffixes: Sequence[str] = (".png", ".jpg", ".PNG", "", ".png.")) -> str:
    names = odd_names(outside)
    name = pick(rng, names)
    if chance(rng, 0.2):
        name = f"{name}/{pick(rng, names)}"
    return name + pick(rng, suffixes)


def mixed(*ways: tuple[float, Callable[[bytes, Rng, Sequence[bytes]], bytes]]):
    """Of several ways to mutate a file, one by its share."""
    shares = np.cumsum([share for share, _ in ways])

    def mutate(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
        way = ways[int(np.searchsorted(shares, rng.random() * shares[-1]))][1]
        return way(data, rng, others)

    return mutate
