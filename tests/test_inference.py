"""Windows, scales and the mirror, against the official protocol written out in PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lseg.runner
import lseg.windows
from lseg.errors import UserError
from lseg.inference import segment_photo
from lseg.runner import Timings, open_runner
from lseg.windows import MODES, Inference, resize_aligned, scaled_size, windows

SIZE = 64  # of the tiny weights' network


def official(model, photo: np.ndarray, text: np.ndarray, scales: tuple[float, ...], mirror: bool) -> torch.Tensor:
    """Scores [N, H, W] by the official evaluation's steps, in tensors of [1, C, h, w]; `model` gives [1, N, S, S]."""
    height, width = photo.shape[:2]
    image = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    base, crop = 520 * SIZE / 480, SIZE
    stride = int(crop * 2 / 3)
    total = torch.zeros(1, len(text), height, width)

    def resize(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
        return F.interpolate(x, (h, w), mode="bilinear", align_corners=True)

    def score(window: torch.Tensor) -> torch.Tensor:
        result = model(window)
        return result + model(window.flip(3)).flip(3) if mirror else result

    def pad(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, max(0, crop - x.shape[3]), 0, max(0, crop - x.shape[2])), value=-1.0)

    for scale in scales:
        long = math.ceil(base * scale)
        if height > width:
            h, w = long, int(width * long / height + 0.5)
        else:
            h, w = int(height * long / width + 0.5), long
        current = pad(resize(image, h, w))
        ph, pw = current.shape[2:]
        rows, columns = (math.ceil((side - crop) / stride) + 1 for side in (ph, pw))
        sums, count = torch.zeros(1, len(text), ph, pw), torch.zeros(1, 1, ph, pw)
        for row in range(rows):
            for column in range(columns):
                h0, w0 = row * stride, column * stride
                h1, w1 = min(h0 + crop, ph), min(w0 + crop, pw)
                found = score(pad(current[:, :, h0:h1, w0:w1]))
                sums[:, :, h0:h1, w0:w1] += found[:, :, : h1 - h0, : w1 - w0]
                count[:, :, h0:h1, w0:w1] += 1
        total += resize((sums / count)[:, :, :h, :w], height, width)
    return total[0]


@pytest.fixture(scope="module")
def runners(tiny):
    with open_runner("onnxruntime", *tiny) as first, open_runner("torch", *tiny) as second:
        yield {"onnxruntime": first, "torch": second}


def draw(seed: int, height: int, width: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((labels, 24)).astype(np.float32)
    photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return photo, text / np.linalg.norm(text, axis=1, keepdims=True)


@pytest.mark.parametrize("mode", ["window", "multiscale"])
@pytest.mark.parametrize("shape", [(97, 140), (150, 61), (80, 80), (40, 300), (7, 5)])
def test_equals_the_official_protocol(runners, mode, shape, seed):
    """An independent implementation, in PyTorch, over PyTorch's model; random photos, the hardest there are."""
    photo, text = draw(seed, *shape, labels=5)
    how = MODES[mode]

    def model(window: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(runners["torch"].scores(window.numpy(), text))

    expected = official(model, photo, text, how.scales, how.mirror).numpy()
    for runner in runners.values():
        labels = segment_photo(runner, photo, text, mode)
        assert labels.shape == shape
        chosen = np.take_along_axis(expected, labels[None].astype(int), axis=0)[0]
        assert (expected.max(axis=0) - chosen).max() < 1e-4
        assert (labels == expected.argmax(axis=0)).mean() >= 0.999


@pytest.mark.parametrize("mode", ["window", "multiscale"])
def test_many_labels_go_in_rounds(runners, mode, monkeypatch, seed):
    photo, text = draw(seed, 50, 90, labels=13)
    whole = segment_photo(runners["onnxruntime"], photo, text, mode)
    monkeypatch.setattr(lseg.runner, "LABELS_A_PASS", 7)
    monkeypatch.setattr(lseg.windows, "STRIP", 1000)
    assert np.array_equal(segment_photo(runners["onnxruntime"], photo, text, mode), whole)


def test_whole_is_one_call(runners, seed):
    from lseg.image import labels_to_photo, to_pixels

    photo, text = draw(seed, 70, 110, labels=6)
    timings = Timings()
    labels = segment_photo(runners["onnxruntime"], photo, text, "whole", timings)
    expected = runners["onnxruntime"].segment(to_pixels(photo, SIZE)[None], text).labels[0]
    assert np.array_equal(labels, labels_to_photo(expected, 110, 70))
    assert {"preprocess", "encode_image", "similarity"} == set(timings.milliseconds)


def test_the_mirrored_photo_gives_the_mirrored_map(runners, seed, monkeypatch):
    """With the mirror on and one window that holds the photo exactly, nothing tells left from right."""
    photo, text = draw(seed, SIZE, SIZE, labels=5)
    monkeypatch.setitem(MODES, "mirror", Inference((480 / 520,), mirror=True))
    labels = segment_photo(runners["torch"], photo, text, "mirror")
    mirrored = segment_photo(runners["torch"], np.ascontiguousarray(photo[:, ::-1]), text, "mirror")
    assert (labels[:, ::-1] == mirrored).mean() >= 0.999


@pytest.mark.parametrize(
    "height, width, scale, expected",
    [(360, 480, 1.0, (390, 520)), (480, 360, 1.0, (520, 390)), (360, 480, 1.75, (683, 910)), (1, 1000, 0.5, (1, 260))],
)
def test_scaled_size(height, width, scale, expected):
    assert scaled_size(height, width, scale) == expected


def test_windows_of_the_official_sizes():
    assert list(windows(390, 520, 480)) == [(0, 0), (0, 320)]
    assert list(windows(683, 910, 480)) == [(y, x) for y in (0, 320) for x in (0, 320, 640)]
    assert list(windows(480, 480, 480)) == [(0, 0)]


@pytest.mark.parametrize("shape", [(9, 14), (5, 3), (1, 1), (20, 20)])
def test_resize_equals_pytorch(shape, seed):
    maps = np.random.default_rng(seed).standard_normal((3, 6, 8)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(maps)[None], shape, mode="bilinear", align_corners=True)[0].numpy()
    np.testing.assert_allclose(resize_aligned(maps, *shape), expected, atol=1e-5)
    rows = slice(0, shape[0], 2)
    np.testing.assert_allclose(resize_aligned(maps, *shape, rows), expected[:, rows], atol=1e-5)


def test_an_unknown_mode(runners, seed):
    photo, text = draw(seed, 8, 8, labels=2)
    with pytest.raises(UserError, match="'tiles' is no inference mode: choose whole, window, multiscale"):
        segment_photo(runners["torch"], photo, text, "tiles")
