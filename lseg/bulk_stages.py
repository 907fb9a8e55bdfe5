"""What Ray's workers do with a part's images: read and squash them, label them, write the results.

A part travels as one row of bytes, so that it is never split: what is done again after a worker died is the same part.
Workers of the first and last stage have no GPU; the network's actors hold the engines and get pixels of its own size.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lseg.bulk_inputs import Columns, Row, read_row
from lseg.bulk_output import Output, feature_schema, label_schema, part_name, plain, table_bytes
from lseg.errors import UserError
from lseg.features import Features
from lseg.image import decode_image, labels_to_photo, to_pixels
from lseg.labels import label_map_files, palette
from lseg.results import describe, mark_unknown
from lseg.sources import LABEL_MAP, MEANING
from lseg.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lseg.runner import Runner

Part = dict[str, Any]  # a row of Ray's data set: names to bytes


@dataclass(frozen=True)
class Wanted:
    """What is made of each image.

    Attributes:
        output: where to.
        columns: of Parquet files that are read.
        vocabulary: the labels; None for features.
        unknown: pixels whose best cosine is below it stay unlabelled.
        rle: add masks to the parts.
        pngs: write label maps too.
        stride: pixels from one feature to the next.
        size: S, the side of the network's input.
    """

    output: Output
    columns: Columns
    vocabulary: Vocabulary | None
    unknown: float | None
    rle: bool
    pngs: bool
    stride: int
    size: int


@dataclass(frozen=True)
class Engines:
    """How an actor opens its backend: see `lseg.runner.open_runner`.

    Attributes:
        batch: images at a time; None: the engines' own on a GPU, and one on a CPU, where more gain nothing.
        threads: of ONNX Runtime or PyTorch on a CPU; 0: as many as there are cores.
    """

    backend: str
    weights: str
    onnx: str
    text_onnx: str | None
    folder: str
    precision: str
    matmul: str | None
    optimization_level: int
    batch: int | None
    threads: int

    def open(self) -> Runner:
        from lseg.runner import EngineOptions, open_runner

        self._limit_threads()
        engines = EngineOptions(
            Path(self.folder), self.precision, self.matmul, self.optimization_level, say=lambda _: None
        )
        text_onnx = Path(self.text_onnx) if self.text_onnx else None
        return open_runner(self.backend, self.weights, Path(self.onnx), text_onnx, engines)

    def _limit_threads(self) -> None:
        """Ray sets OMP_NUM_THREADS to a worker's CPU slots; an actor's share of the machine is told here."""
        import sys

        if not self.threads:
            return
        os.environ["LSEG_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(self.threads)
        if self.backend == "torch" or "torch" in sys.modules:
            import torch

            torch.set_num_threads(self.threads)


def pack(rows: list[Row]) -> Part:
    """A part to be done."""
    return {"rows": pickle.dumps(rows)}


def decode(part: Part, wanted: Wanted) -> Part:
    """Reads a part's images: those that cannot be read are named and left out.

    Returns:
        "rows", pickled, each with the image's (height, width); "pixels", uint8 [n, S, S, 3]; "part", its name; "bad",
        pickled sentences.
    """
    import cv2

    cv2.setNumThreads(1)  # each worker has a slot of its own
    rows: list[Row] = pickle.loads(part["rows"])
    kept, pixels, bad = [], [], []
    for row in rows:
        try:
            photo = decode_image(read_row(row, wanted.columns), row.shown)
        except UserError as error:
            bad.append(str(error))
            continue
        kept.append((row, photo.shape[:2]))
        pixels.append(to_pixels(photo, wanted.size))
    data = np.stack(pixels).tobytes() if pixels else b""
    return {"rows": pickle.dumps(kept), "pixels": data, "part": part_name(rows), "bad": pickle.dumps(bad)}


class Network:
    """An actor: holds the engines and gives every image its labels, or its features.

    Args:
        engines: how to open them.
        wanted: what is made.
        text: the labels' embeddings, float32 [T, D]; None for features.
    """

    def __init__(self, engines: Engines, wanted: Wanted, text: np.ndarray | None):
        self.wanted, self.text, self.runner = wanted, text, engines.open()
        identity = self.runner.identity
        self.batch = engines.batch or (1 if identity.device == "CPU" else 8)

    def __call__(self, part: Part) -> Part:
        """Adds "labels" [n, S, S] of the type "dtype" and "best", float32; or "features", pickled; and "made_by"."""
        size = self.wanted.size
        pixels = np.frombuffer(part["pixels"], np.uint8).reshape(-1, size, size, 3)
        result = {key: part[key] for key in ("rows", "part", "bad")} | {"made_by": str(self.runner.identity)}
        if self.wanted.vocabulary is None:
            return result | {"features": pickle.dumps(list(self._features(pixels, pickle.loads(part["rows"]))))}
        best = np.empty((len(pixels), size, size), np.float32)
        labels = np.empty((len(pixels), size, size), np.int32 if len(self.text) > 256 else np.uint8)
        for start in range(0, len(pixels), self.batch):
            part_of = slice(start, start + self.batch)
            found = self.runner.segment(pixels[part_of], self.text, best=True)
            labels[part_of], best[part_of] = found.labels, found.best
        return result | {"labels": labels.tobytes(), "dtype": labels.dtype.str, "best": best.tobytes()}

    def _features(self, pixels: np.ndarray, rows: list) -> Iterator[np.ndarray]:
        """Of each image float16 [rows, columns, D]; the network's 118 MB an image never leave the actor."""
        for image, (_, (height, width)) in zip(pixels, rows, strict=True):
            grid = self.runner.encode_image(image[None])[0]
            yield Features(grid, self.wanted.size, height, width).strided(self.wanted.stride)


def write(part: Part, wanted: Wanted) -> Part:
    """Writes a part's label maps, then the part.

    Returns:
        "done", how many images were written; "bad", pickled sentences on those that were not.
    """
    rows = pickle.loads(part["rows"])
    if rows and wanted.output.holds(part["part"]):  # by a worker that died before anybody heard of it
        return {"done": len(rows), "bad": part["bad"]}
    if rows and wanted.vocabulary is None:
        features = pickle.loads(part["features"])
        results = [_feature_row(*row, array, wanted.stride) for row, array in zip(rows, features, strict=True)]
        wanted.output.write({part["part"]: table_bytes(results, feature_schema(), part["made_by"])})
    elif rows:
        results = list(_label_rows(part, rows, wanted))
        wanted.output.write({part["part"]: table_bytes(results, label_schema(wanted.rle), part["made_by"])})
    return {"done": len(rows), "bad": part["bad"]}


def _label_rows(part: Part, rows: list, wanted: Wanted) -> Iterator[dict[str, Any]]:
    shape = (len(rows), wanted.size, wanted.size)
    labels = np.frombuffer(part["labels"], part["dtype"]).reshape(shape)
    best = np.frombuffer(part["best"], np.float32).reshape(shape)
    names = wanted.vocabulary.labels.names
    colours = palette(names) if wanted.pngs else None
    for (row, (height, width)), found, cosine in zip(rows, labels, best, strict=True):
        cosines = labels_to_photo(cosine, width, height)
        indices = wanted.vocabulary.to_labels(labels_to_photo(found, width, height))
        if wanted.unknown is not None:
            indices = mark_unknown(indices, cosines, wanted.unknown)
        if wanted.pngs:
            png, meaning = label_map_files(Path(f"{row.name}{LABEL_MAP}").name, indices, names, colours)
            wanted.output.write({f"{row.name}{LABEL_MAP}": png, f"{row.name}{MEANING}": meaning})
        yield _about(row) | describe(plain(row.shown), indices, cosines, names, wanted.rle)


def _feature_row(row: Row, size: tuple[int, int], features: np.ndarray, stride: int) -> dict[str, Any]:
    about = _about(row) | {"photo": plain(row.shown), "size": [size[1], size[0]], "stride": stride}
    return about | {"shape": list(features.shape), "features": features.ravel()}


def _about(row: Row) -> dict[str, str]:
    return {"name": plain(row.name), "source": plain(row.source)}
