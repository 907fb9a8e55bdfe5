"""Labels counted at a photo's size without making it: as if each pixel had been there."""

from __future__ import annotations

import numpy as np
import pytest

from lseg.image import labels_to_photo
from lseg.results import describe, describe_tally
from lseg.tally import tally, tally_at


@pytest.mark.parametrize("count, dtype", [(7, np.uint8), (255, np.uint8), (300, np.uint16)])
def test_as_at_the_photos_size(seed, count, dtype):
    """Pixels are the same; means differ by less than what the docstring says, and by a last digit where rounded."""
    rng, unlabelled = np.random.default_rng(seed), int(np.iinfo(dtype).max)
    names = [f"thing {index}" for index in range(count)]
    for _ in range(6):
        side = int(rng.integers(1, 70))
        width, height = (int(value) for value in rng.integers(1, 300, 2))
        labels = rng.integers(0, count, (side, side)).astype(dtype)
        labels[rng.random(labels.shape) < 0.1] = unlabelled
        cosines = rng.uniform(-1, 1, labels.shape).astype(np.float32)
        large, shown = (labels_to_photo(each, width, height) for each in (labels, cosines))
        found = tally_at(labels, cosines, count, width, height)
        assert found.size == (width, height) and found.pixels.dtype == np.int64
        for index in range(count):
            here = large == index
            assert found.pixels[index] == here.sum()
            if here.any():
                mean = np.add.accumulate(shown[here].astype(np.float64))[-1] / here.sum()  # one after another
                assert abs(found.sums[index] / here.sum() - mean) < (width * height + side**2) / 2**52
        signed = large.astype(np.int32)
        signed[large == unlabelled] = -1
        ours, expected = describe_tally("x.jpg", found, names), describe("x.jpg", signed, shown, names)
        for one, other in zip(ours["labels"], expected["labels"], strict=True):
            assert abs(one.pop("confidence") - other.pop("confidence")) < 1.5e-5
        assert ours == expected


def test_strips_of_a_large_photo(seed, monkeypatch):
    """Counted a few rows at a time, as if at once: the last strip is shorter, and a row may be longer than a strip."""
    rng = np.random.default_rng(seed)
    for strip in (1, 100, 1000, 10**6):
        monkeypatch.setattr("lseg.tally.STRIP", strip)
        height, width, count = (int(value) for value in rng.integers((1, 1, 1), (60, 60, 9)))
        labels = rng.integers(-1, count, (height, width)).astype(np.int32)
        cosines = rng.uniform(-1, 1, labels.shape).astype(np.float32)
        found = tally(labels, cosines, count)
        assert found.size == (width, height) and found.pixels.dtype == np.int64
        for index in range(count):
            here = labels == index
            assert found.pixels[index] == here.sum()
            assert abs(found.sums[index] - cosines[here].sum(dtype=np.float64)) < 1e-9
