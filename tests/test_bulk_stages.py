"""The network's stage of bulk work without Ray: what goes in and out of it, and how many threads it lets through."""

from __future__ import annotations

import io
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lseg.bulk_inputs import Columns, Row
from lseg.bulk_output import Output
from lseg.bulk_stages import TAKING_TURNS, Network, Wanted, write
from lseg.image import labels_to_photo
from lseg.results import describe
from lseg.runner import Identity, Segmentation, Timings
from lseg.vocabulary import Vocabulary, with_synonyms

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: ./requirements.sh --dev installs it")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: ./requirements.sh --dev installs it")
SIDE = 24


class Runner:
    """Labels and cosines that follow from the pixels; counts who is inside at once."""

    identity, callers = Identity("a stand-in", "CPU"), 2

    def __init__(self, alone: bool = False) -> None:
        self.lock, self.inside, self.most = threading.Lock(), 0, 0

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.01)
        with self.lock:
            self.inside -= 1
        return Segmentation(*labels_of(pixels, len(text)), Timings())


def labels_of(pixels: np.ndarray, texts: int) -> tuple[np.ndarray, np.ndarray]:
    return (pixels[..., 0] % texts).astype(np.int32), pixels[..., 1].astype(np.float32) / 300


def wanted_in(folder: Path, vocabulary: Vocabulary, **options: object) -> Wanted:
    chosen = {"unknown": None, "rle": False, "pngs": False} | options
    return Wanted(Output(str(folder)), Columns(), vocabulary, stride=0, size=SIDE, **chosen)


def a_part(rng: np.random.Generator, count: int, name: str) -> tuple[dict, np.ndarray, list[tuple[int, int]]]:
    """A part of random pixels, as it comes to the network; its pixels, and its photos' (height, width)."""
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    sizes = [(int(height), int(width)) for height, width in rng.integers(5, 90, (count, 2))]
    rows = [(Row(f"{name}{i}", f"{name}{i}.jpg", f"/from/{name}{i}"), size) for i, size in enumerate(sizes)]
    part = {"rows": pickle.dumps(rows), "pixels": pixels.tobytes(), "part": f"parts/part-{name}.parquet"}
    return part | {"bad": pickle.dumps([])}, pixels, sizes


@pytest.mark.parametrize("options", [{}, {"unknown": 0.3}, {"unknown": 0.3, "rle": True, "pngs": True}], ids=str)
def test_as_described_at_the_photos_size(options, tmp_path, seed):
    """Shares, confidences and masks of labels with synonyms; maps travel only where they are written."""
    rng = np.random.default_rng(seed)
    vocabulary = with_synonyms([("car", "van"), ("road", "street", "lane"), ("sky",)])
    wanted = wanted_in(tmp_path, vocabulary, **options)
    network = Network(SimpleNamespace(batch=None, open=Runner), wanted, np.zeros((6, 4), np.float32))
    part, pixels, sizes = a_part(rng, 5, "a")
    made = network(part)
    assert ("maps" in made) == ("rle" in options)
    assert write(made, wanted)["done"] == 5
    found = pq.read_table(io.BytesIO((tmp_path / "parts" / "part-a.parquet").read_bytes())).to_pylist()
    for row, image, (height, width) in zip(found, pixels, sizes, strict=True):
        labels, cosines = (labels_to_photo(each, width, height) for each in labels_of(image, 6))
        labels = vocabulary.owner[labels]
        if "unknown" in options:
            labels = np.where(cosines < 0.3, -1, labels)
        expected = describe(row["photo"], labels, cosines, vocabulary.labels.names, "rle" in options)
        for one, other in zip(row["labels"], expected["labels"], strict=True):
            assert abs(one.pop("confidence") - other.pop("confidence")) < 1.5e-5
        assert {key: row[key] for key in expected} == expected
        assert (tmp_path / f"{row['name']}_labels.png").exists() == ("pngs" in options)


@pytest.mark.parametrize("callers, most", [(1, 1), (2, TAKING_TURNS)])
def test_parts_at_once(tmp_path, seed, monkeypatch, callers, most):
    """Several parts go through one actor at a time, each whole; a backend that takes one caller gets no more."""
    monkeypatch.setattr(Runner, "callers", callers)
    rng = np.random.default_rng(seed)
    vocabulary = with_synonyms([("car",), ("road",), ("sky",)])
    network = Network(
        SimpleNamespace(batch=2, open=Runner), wanted_in(tmp_path, vocabulary, pngs=True), np.zeros((3, 4), np.float32)
    )
    parts = [a_part(rng, 7, name) for name in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda each: network(each[0]), parts))
    for made, (part, pixels, sizes) in zip(results, parts, strict=True):
        assert made["part"] == part["part"] and np.array_equal(made["maps"], labels_of(pixels, 3)[0])
        assert [each.size for each in pickle.loads(made["tallies"])] == [size[::-1] for size in sizes]
    assert network.runner.most == most


def test_tables_hold_what_they_are_given(seed):
    """Bytes, arrays, texts and numbers come back; arrays in the memory where they were."""
    from lseg.bulk_tables import OnTables, on_tables, to_parts, to_table

    rng = np.random.default_rng(seed)
    array, nothing = rng.integers(0, 65536, (3, 5, 7)).astype(np.uint16), np.empty((0, 4), np.uint8)
    (part,) = to_parts(to_table({"array": array, "nothing": nothing, "bytes": b"abc", "text": "x", "count": 3}))
    assert np.array_equal(np.frombuffer(part["array"], np.uint16).reshape(array.shape), array)
    assert part["array"].address == array.ctypes.data
    assert (len(part["nothing"]), bytes(part["bytes"]), part["text"], part["count"]) == (0, b"abc", "x", 3)
    assert to_parts(to_table(part)) == [part]  # what a stage hands on as it came

    two = pa.concat_tables([to_table({"count": 1}), to_table({"count": 2})])
    assert on_tables(lambda part, more: {"count": part["count"] + more})(two, more=5).to_pylist() == [
        {"count": 6},
        {"count": 7},
    ]
    assert OnTables(lambda more: lambda part: {"count": part["count"] * more}, more=5)(two).num_rows == 2
