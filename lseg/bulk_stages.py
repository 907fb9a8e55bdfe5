"""What Ray's workers do with a part's images: read and squash them, label them, write the results.

A part travels as one row of bytes, so that it is never split: what is done again after a worker died is the same part.
Workers of the first and last stage have no GPU; the network's actors hold the engines and get pixels of its own size.
They count each label's pixels and cosines as the photo would show them, so that no cosines travel, and label maps only
where they are written.
"""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lseg.bulk_inputs import Columns, Row, read_row
from lseg.bulk_output import Output, feature_schema, label_schema, part_name, plain, table_bytes
from lseg.bulk_tables import Part
from lseg.errors import UserError
from lseg.image import decode_image, labels_to_photo, to_pixels
from lseg.labels import label_dtype, label_map_files, palette
from lseg.picking import features_of_stride
from lseg.recipes import MAX_BATCH
from lseg.results import describe_tally, is_unknown, with_masks
from lseg.sources import LABEL_MAP, MEANING
from lseg.tally import Tally, tally_at
from lseg.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lseg.runner import Runner

TAKING_TURNS = 4  # threads of an actor on TensorRT: two have calls under way, others count labels


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

    @property
    def maps(self) -> bool:
        """Whether writing needs the label maps themselves."""
        return self.pngs or self.rle


@dataclass(frozen=True)
class Engines:
    """How an actor opens its backend: see `lseg.runner.open_runner`.

    Attributes:
        batch: images at a time; None: eight on a GPU, and one on a CPU, where more gain nothing.
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

    def open(self, alone: bool = False) -> Runner:
        """`alone`: images will come one by one. Else TensorRT has one engine, which takes a rest of fewer as well."""
        from lseg.runner import EngineOptions, open_runner

        self._limit_threads()
        batch = 1 if alone else None if self.matmul == "2d" else self.batch or MAX_BATCH
        engines = EngineOptions(
            Path(self.folder), self.precision, self.matmul, self.optimization_level, lambda _: None, batch
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
    pixels = np.empty((len(rows), wanted.size, wanted.size, 3), np.uint8)
    kept, bad = [], []
    for row in rows:
        try:
            photo = decode_image(read_row(row, wanted.columns), row.shown)
        except UserError as error:
            bad.append(str(error))
            continue
        pixels[len(kept)] = to_pixels(photo, wanted.size)
        kept.append((row, photo.shape[:2]))
    found = {"rows": pickle.dumps(kept), "pixels": pixels[: len(kept)], "part": part_name(rows)}
    return found | {"bad": pickle.dumps(bad)}


class Network:
    """An actor: holds the engines and gives every image its labels, or its features. Threads may share it.

    Its own threads work on several batches: some count labels while another has the GPU.

    Args:
        engines: how to open them.
        wanted: what is made.
        text: the labels' embeddings, float32 [T, D]; None for features.
    """

    def __init__(self, engines: Engines, wanted: Wanted, text: np.ndarray | None):
        self.wanted, self.text = wanted, text
        self.runner = engines.open(alone=wanted.vocabulary is None)
        self.batch = engines.batch or (1 if self.runner.identity.device == "CPU" else MAX_BATCH)
        threads = TAKING_TURNS if self.runner.callers > 1 else 1
        self._callers = ThreadPoolExecutor(threads, thread_name_prefix="network")

    def __call__(self, part: Part) -> Part:
        """Adds "tallies", pickled, and "maps", where they are wanted; or "features", pickled; and "made_by".

        The maps are unsigned integers [n, S, S] of `label_dtype`, whose largest value stands for unlabelled.
        """
        wanted, size = self.wanted, self.wanted.size
        pixels = np.frombuffer(part["pixels"], np.uint8).reshape(-1, size, size, 3)
        sizes = [image_size for _, image_size in pickle.loads(part["rows"])]
        result = {key: part[key] for key in ("rows", "part", "bad")} | {"made_by": str(self.runner.identity)}
        if wanted.vocabulary is None:
            features = list(self._callers.map(self._features, pixels, sizes))
            return result | {"features": pickle.dumps(features)}
        maps = np.empty(pixels.shape[:3], label_dtype(len(wanted.vocabulary.labels.names)))
        batches = [slice(start, start + self.batch) for start in range(0, len(pixels), self.batch)]
        found = self._callers.map(lambda batch: self._label(pixels[batch], sizes[batch], maps[batch]), batches)
        result["tallies"] = pickle.dumps([one for tallies in found for one in tallies])
        return result | ({"maps": maps} if wanted.maps else {})

    def _label(self, pixels: np.ndarray, sizes: list[tuple[int, int]], maps: np.ndarray) -> list[Tally]:
        """Fills a batch's label maps, and counts them at their photos' (height, width)."""
        wanted, count = self.wanted, len(self.wanted.vocabulary.labels.names)
        found = self.runner.segment(pixels, self.text, best=True)
        maps[...] = wanted.vocabulary.to_labels(found.labels)
        if wanted.unknown is not None:
            maps[is_unknown(found.best, wanted.unknown)] = np.iinfo(maps.dtype).max
        each = zip(maps, found.best, sizes, strict=True)
        return [tally_at(labels, cosines, count, width, height) for labels, cosines, (height, width) in each]

    def _features(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """float16 [rows, columns, D]; the network's 118 MB an image never leave the actor."""
        return features_of_stride(self.runner, image[None], *size, self.wanted.stride)


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
        results = _label_rows(part, rows, wanted)
        wanted.output.write({part["part"]: table_bytes(results, label_schema(wanted.rle), part["made_by"])})
    return {"done": len(rows), "bad": part["bad"]}


def _label_rows(part: Part, rows: list, wanted: Wanted) -> list[dict[str, Any]]:
    """The part's rows; label maps are written on the way, all at once."""
    names, size = wanted.vocabulary.labels.names, wanted.size
    results, files = [], {}
    colours = palette(names) if wanted.pngs else None
    maps = repeat(None)
    if wanted.maps:
        maps = np.frombuffer(part["maps"], label_dtype(len(names))).reshape(-1, size, size)
    for (row, _), found, small in zip(rows, pickle.loads(part["tallies"]), maps, strict=wanted.maps):
        about = describe_tally(plain(row.shown), found, names)
        if wanted.maps:
            labels = labels_to_photo(small, *found.size)
            if wanted.rle:
                about = with_masks(about, labels)
            if wanted.pngs:
                shares = found.pixels / labels.size
                name = Path(f"{row.name}{LABEL_MAP}").name
                png, meaning = label_map_files(name, labels, names, colours, shares)
                files |= {f"{row.name}{LABEL_MAP}": png, f"{row.name}{MEANING}": meaning}
        results.append(_about(row) | about)
    if files:
        wanted.output.write(files)
    return results


def _feature_row(row: Row, size: tuple[int, int], features: np.ndarray, stride: int) -> dict[str, Any]:
    about = _about(row) | {"photo": plain(row.shown), "size": [size[1], size[0]], "stride": stride}
    return about | {"shape": list(features.shape), "features": features.ravel()}


def _about(row: Row) -> dict[str, str]:
    return {"name": plain(row.name), "source": plain(row.source)}
