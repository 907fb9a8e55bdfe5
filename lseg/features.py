"""CLIP features of a photo's pixels, points and regions, of unit length; their files; the texts nearest to them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lseg.errors import UserError
from lseg.files import write_files
from lseg.image import decode, labels_to_photo

PAIRS = 4096  # pairs of a network pixel and a region that are summed at once: 16 MiB at D = 512
SCORES = 2**22  # float32 values that `query` works with at a time: 16 MiB
POINT = re.compile(r"([+-]?\d{1,18})(?:\s*,\s*|\s+)([+-]?\d{1,18})", re.ASCII)
POINTS = "give integers [K, 2], an x and a y for each point"
MASK = "give integers [H, W], an id for each pixel, 0 for no region"
PNG = "save the ids as a PNG of one channel with 8 or 16 bits, or as an .npy of integers"


@dataclass(frozen=True)
class Features:
    """The pixel embeddings of one photo, and what they say of its pixels.

    A pixel's feature agrees with its label in the label map: it is taken at the same pixel of the network's input
    (`labels_to_photo`), bilinearly among the grid's neighbours (align_corners: the corners of both coincide), and
    normalised. The text nearest to it is the pixel's label, apart from rounding.

    The work goes by rows of the network's input. Beyond the result it takes at most 24 S D bytes (6 MB for S = 480 and
    D = 512) and 64 (H + W) of indices, whatever the photo's size and the stride.
    """

    grid: np.ndarray  # float32 or float16 [D, G, G], unit length over D, as `Runner.encode_image` gives it
    image_size: int  # S, the side of the network's square input, to which the whole photo was squashed
    height: int  # H, the photo's height in pixels
    width: int  # W, its width

    def at(self, points: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        """Features float16 [K, D] of pixels: points, integers [K, 2], are their (x, y) = (column, row) in the photo."""
        points = np.asarray(points)
        check_points(points, self.width, self.height)
        columns, rows = (places[points[:, axis].astype(np.int64)] for axis, places in enumerate(self._places()))
        result = np.empty((len(points), len(self.grid)), np.float16)
        order = np.argsort(rows, kind="stable")
        for run in _runs(rows[order]):
            chosen = order[run]
            different, which = np.unique(columns[chosen], return_inverse=True)
            result[chosen] = self._row(rows[chosen[0]], different).astype(np.float16)[which]
        return result

    def strided(self, stride: int) -> np.ndarray:
        """Features float16 [ceil(H / stride), ceil(W / stride), D] of every stride-th row and column, the first too."""
        check_stride(stride)
        columns, rows = (places[::stride] for places in self._places())
        different, which = np.unique(columns, return_inverse=True)
        result = np.empty((len(rows), len(columns), len(self.grid)), np.float16)
        for run in _runs(rows):
            values = self._row(rows[run.start], different).astype(np.float16)
            # No index needs clipping; but to raise errors, NumPy would first compute into a copy of the result.
            np.take(values, which, axis=0, out=result[run.start], mode="clip")
            result[run.start + 1 : run.stop] = result[run.start]
        return result

    def regions(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mean of the features of each region's pixels, normalised; mask: integers [H, W], ids of regions or 0.

        Returns ids int64 [K], ascending; vectors float16 [K, D]; pixels int64 [K], how many of the photo each has. It
        takes 16 (K + `PAIRS`) D bytes more, and 64 for each pixel of the H / S rows of the mask in one network row.
        """
        check_mask(mask, self.width, self.height)
        for value in (int(mask.min()), int(mask.max())):
            if not 0 <= value < 2**63:
                raise UserError(f"the mask has the value {value}: give 0 for no region and ids from 1 to 2^63 - 1")
        columns, rows = self._places()
        ids = np.unique(np.concatenate([np.unique(mask[strip][mask[strip] != 0]) for strip in _runs(rows)]))
        if not len(ids):
            raise UserError("the mask has no region, for it is 0 everywhere: give each region an id from 1 on")
        sums, pixels = np.zeros((len(ids), len(self.grid))), np.zeros(len(ids), np.int64)
        for strip in _runs(rows):
            values = mask[strip]
            inside = values != 0
            # Pixels of a region that share a network pixel share its feature, which counts as often as they are.
            index = np.searchsorted(ids, values[inside]) * self.image_size
            index += np.broadcast_to(columns, values.shape)[inside]
            index, counts = np.unique(index, return_counts=True)
            region, column = np.divmod(index, self.image_size)
            np.add.at(pixels, region, counts)
            different, which = np.unique(column, return_inverse=True)
            features = self._row(rows[strip.start], different)
            for start in range(0, len(index), PAIRS):
                part = slice(start, start + PAIRS)
                weighted = features[which[part]] * counts[part, None].astype(np.float64)
                starts = [run.start for run in _runs(region[part])]
                sums[region[part][starts]] += np.add.reduceat(weighted, starts, axis=0)
        return ids.astype(np.int64), _to_unit(sums).astype(np.float16), pixels

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        return network_places(self.image_size, self.height, self.width)

    def _row(self, row: int, columns: np.ndarray) -> np.ndarray:
        """Features float32 [n, D] of the network's input at one row and n columns."""
        last, end = self.image_size - 1, self.grid.shape[1] - 1
        (top, down), (left, across) = np.divmod(row * end, last), np.divmod(columns * end, last)
        line = self.grid[:, top].T.astype(np.float32, order="C")  # [G, D]
        line += (self.grid[:, min(top + 1, end)].T - line) * np.float32(down / last)
        values = line[left]
        values += (line[np.minimum(left + 1, end)] - values) * (across / last).astype(np.float32)[:, None]
        return _to_unit(values)


def network_places(size: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The network's columns for the photo's, int64 [W], and its rows, int64 [H]: by the label map's own rule."""
    places = np.arange(size)
    return labels_to_photo(places[None], width, 1)[0], labels_to_photo(places[:, None], 1, height)[:, 0]


def check_stride(stride: int) -> None:
    """UserError unless a stride takes steps."""
    if stride < 1:
        raise UserError(f"a stride of {stride} takes no steps: give 1 for every pixel, or more")


def check_points(points: np.ndarray, width: int, height: int) -> None:
    """UserError unless points are integers [K, 2] inside a photo of this size."""
    _check(points, "the array of points", POINTS, 2)
    inside = (points >= 0) & (points < [width, height])
    for x, y in points[~inside.all(axis=1)][:1]:
        size = f"{width} x {height} pixels"
        raise UserError(f"the point (x, y) = ({x}, {y}) is outside the photo of {size}: count from 0, top left")


def check_mask(mask: np.ndarray, width: int, height: int) -> None:
    """UserError unless a mask holds integers and is of a photo's size."""
    _check(mask, "the mask", MASK)
    if mask.shape != (height, width):
        sizes = f"{mask.shape[1]} x {mask.shape[0]} pixels and its photo {width} x {height}"
        raise UserError(f"the mask has {sizes}: give a mask of the photo's size")


def query(features: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The texts, float32 [N, D], nearest to features, float16 [..., D]: labels int32 [...] and cosine float32 [...].

    Of equal texts the first wins. Rounding to 16 bits has changed the features' lengths: they are normalised again.
    """
    if features.ndim < 1 or text.ndim != 2 or not len(text) or features.shape[-1] != text.shape[1]:
        shapes = f"features of the shape {list(features.shape)} and texts of {list(text.shape)}"
        raise UserError(f"{shapes} do not go together: give [..., D] and [N, D] of the same weights, N at least 1")
    flat = features.reshape(-1, text.shape[1])
    labels, cosine = np.empty(len(flat), np.int32), np.empty(len(flat), np.float32)
    step = max(1, SCORES // 2 // sum(text.shape))  # each chunk's scores meet those of the one before
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        scores = _to_unit(flat[part].astype(np.float32)) @ text.T  # [n, N]
        labels[part], cosine[part] = scores.argmax(axis=1), scores.max(axis=1)
    return labels.reshape(features.shape[:-1]), cosine.reshape(features.shape[:-1])


def write_features(path: str | Path, arrays: dict[str, np.ndarray], about: dict[str, object]) -> None:
    """Writes arrays with what is to be known about them (values that JSON holds), whole or not at all.

    NAME.npy takes one array, "features"; `about` goes into NAME.npy.json. NAME.safetensors takes any; `about` becomes
    its metadata, each value as JSON.
    """
    path = Path(path)
    if _suffix(path) == ".safetensors":
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_files({path: save(tensors, {key: json.dumps(value) for key, value in about.items()})})
        return
    if list(arrays) != ["features"]:
        raise UserError(f"{path} holds one array and not {', '.join(arrays)}: give a name that ends in .safetensors")
    file = io.BytesIO()
    np.save(file, arrays["features"], allow_pickle=False)
    text = json.dumps(about, ensure_ascii=False, indent=1) + "\n"
    write_files({path: file.getvalue(), _beside(path): text.encode("utf-8", "backslashreplace")})


def read_features(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """The arrays and `about` that `write_features` wrote."""
    path = Path(path)
    if _suffix(path) == ".npy":
        features, beside = _load(path), _beside(path)
        with _reading(beside, f"copy it along with {path.name}, or write both again"):
            return {"features": features}, {**json.loads(beside.read_bytes())}
    from safetensors import safe_open

    with _reading(path, "write it again"), open(path, "rb"), safe_open(path, "np") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
        return arrays, _metadata(file)


def read_about(path: str | Path, keys: Sequence[str]) -> dict[str, object]:
    """Some of `about`, whatever it holds besides; nothing where it or the arrays are missing or damaged."""
    from safetensors import safe_open

    path = Path(path)
    try:
        if _suffix(path) == ".npy":
            told = json.loads(_beside(path).read_bytes()) if path.is_file() else {}
            return {key: told[key] for key in keys if key in told}
        with open(path, "rb"), safe_open(path, "np") as file:
            return _metadata(file, keys)
    except Exception:  # a damaged file can fail in any way
        return {}


def read_points(path: str | Path) -> np.ndarray:
    """Points int64 [K, 2] from an .npy, or from text: "x y" or "x,y" a line, with comments after #."""
    path = Path(path)
    if path.suffix.lower() == ".npy":
        points, lines = list(_check(_load(path), path, POINTS, 2).astype(np.int64)), []
    else:
        points = []
        with _reading(path, "give a text file, or an .npy"):
            lines = path.read_text("utf-8-sig").splitlines()
    for number, line in enumerate(lines, 1):
        if words := line.partition("#")[0].strip():
            if not (point := POINT.fullmatch(words)):
                raise UserError(f"{path}, line {number}, is {words[:40]!r}: write whole numbers x and y, as in 120 45")
            points.append([int(value) for value in point.groups()])
    if not points:
        raise UserError(f"{path} holds no point: write x and y of one a line, as in 120 45")
    return np.array(points, np.int64)


def read_region_mask(path: str | Path) -> np.ndarray:
    """A mask [H, W] from an .npy of integers, as stored, or from a PNG of one channel, uint8 or uint16."""
    path = Path(path)
    if path.suffix.lower() == ".npy":
        return _check(_load(path), path, MASK)
    with _reading(path, PNG):
        data = path.read_bytes()
        mask = decode(path, data, cv2.IMREAD_UNCHANGED) if data else None
    # From 24 on: bits and kind. OpenCV would stretch fewer bits to 0..255 and turn a palette's indices to colours.
    if mask is None or mask.ndim != 2 or data[:4] != b"\x89PNG" or tuple(data[24:26]) not in ((8, 0), (16, 0)):
        raise UserError(f"{path} is damaged or no PNG of one channel with 8 or 16 bits: {PNG}")
    return mask


def _beside(path: Path) -> Path:
    """What is known of the array in an .npy."""
    return path.with_name(f"{path.name}.json")


def _metadata(file: Any, keys: Sequence[str] | None = None) -> dict[str, object]:
    told = file.metadata() or {}
    return {key: json.loads(value) for key, value in told.items() if keys is None or key in keys}


def _suffix(path: Path) -> str:
    if (suffix := path.suffix.lower()) not in (".npy", ".safetensors"):
        raise UserError(f"{path}: features are kept as NumPy or safetensors; give a name in .npy or .safetensors")
    return suffix


def _load(path: Path) -> np.ndarray:
    with _reading(path, "write it again"), open(path, "rb") as file:
        return np.lib.format.read_array(file, allow_pickle=False)  # np.load would open a zip archive as well


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from None
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or of another kind ({reason}): {remedy}") from None


def _check(array: np.ndarray, what: str | Path, remedy: str, columns: int | None = None) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind not in "iu" or columns not in (None, array.shape[1]):
        raise UserError(f"{what} holds {array.dtype} values of the shape {list(array.shape)}: {remedy}")
    return array


def _runs(values: np.ndarray) -> Iterator[slice]:
    return (slice(*ends) for ends in pairwise([*np.flatnonzero(np.diff(values, prepend=-1)), len(values)]))


def _to_unit(vectors: np.ndarray) -> np.ndarray:
    """Brings vectors [..., D] to unit length in place; zeros stay."""
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors
