"""equality.py itself: what it must let pass, what it must not, and its reference's own arithmetic."""

from __future__ import annotations

import math
import runpy
import sys
from types import SimpleNamespace

import equality
import equality_cases as cases
import half_sums
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lseg.runner import Segmentation, Timings
from lseg.windows import resize_aligned

SIZE, TEXTS = 32, 5


def a_case(rng: np.random.Generator) -> tuple[list, np.ndarray]:
    """Two photos with random cosines, and what the reference makes of them; and the cosines, [2, N, S, S]."""
    scores = rng.uniform(-1, 1, (2, TEXTS, SIZE, SIZE)).astype(np.float32)
    vectors = rng.standard_normal((TEXTS, 8)).astype(np.float32)
    photos = [rng.integers(0, 256, (20, 30, 3), dtype=np.uint8) for _ in scores]
    group = cases.Group("whole", photos, None, vectors)
    expected = [cases._top_two(lambda a, b, s=s: torch.from_numpy(s[a:b]), TEXTS) for s in scores]
    return [(group, expected)], scores


def judged(pairs: list, labels: np.ndarray, best: np.ndarray) -> dict:
    runner = SimpleNamespace(image_size=SIZE, segment=lambda *_, **__: Segmentation(labels, best, Timings()))
    entry: dict = {}
    assert equality.compare(entry, iter(pairs), runner, np.empty(0), equality.LIMITS["fp32"]) == 1
    return entry


def test_what_passes_and_what_does_not(seed):
    rng = np.random.default_rng(seed)
    pairs, scores = a_case(rng)
    labels, best = scores.argmax(1).astype(np.int32), scores.max(1)
    entry = judged(pairs, labels, best)
    assert entry["failures"] == [] and entry["modes"]["whole"]["mean_percent"] == 100
    # A clear winner that loses is told with its photo, though it is one pixel of two thousand.
    second = np.sort(scores, 1)[:, -2]
    _, row, column = np.unravel_index((best - second)[1:].argmax(), (1, SIZE, SIZE))
    wrong = labels.copy()
    wrong[1, row, column] = (wrong[1, row, column] + 1) % TEXTS
    (failure,) = (f for f in judged(pairs, wrong, best)["failures"] if "gap" in f)
    assert "photo 1 (20, 30), 5 labels" in failure
    off = best.copy()
    off[0, 0, 0] += 1e-3
    (failure,) = judged(pairs, labels, off)["failures"]
    assert "a cosine is off by 1.00e-03" in failure
    off[0, 0, 0] = np.nan
    assert any("off by nan" in failure for failure in judged(pairs, labels, off)["failures"])


def test_a_near_tie_may_fall_either_way(seed):
    """Two texts that are 1e-6 apart at one pixel."""
    rng = np.random.default_rng(seed)
    pairs, scores = a_case(rng)
    scores[0, :, 3, 4] = (0.1, 0.5, 0.5 - 1e-6, 0, 0)
    pairs[0][1][0] = cases._top_two(lambda a, b: torch.from_numpy(scores[0, a:b]), TEXTS)
    labels = scores.argmax(1).astype(np.int32)
    labels[0, 3, 4] = 2
    entry = judged(pairs, labels, scores.max(1))
    assert entry["modes"]["whole"]["differing_pixels"] == 1
    assert not any("gap" in failure for failure in entry["failures"])


@pytest.mark.parametrize("texts", [1, 2, 63, 64, 65, 150])
def test_best_and_second(seed, texts):
    """In groups of 64, against all sorted at once. A stored gap is never less than it was, at most 9 % more."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-40, 40, (texts, 8, 12)).astype(np.float32) / 40  # with ties, of which the first counts
    found = cases._top_two(lambda a, b: torch.from_numpy(scores[a:b]), texts)
    np.testing.assert_array_equal(found.labels, scores.argmax(0))
    np.testing.assert_array_equal(found.best, scores.max(0)[:: cases.STRIDE, :: cases.STRIDE])
    if texts == 1:
        assert (found.gaps == 255).all()
        return
    gaps = np.maximum(np.diff(np.sort(scores, 0)[-2:], axis=0)[0], cases.SMALLEST)
    ratio = cases.gap(found.gaps) / gaps
    assert 1 - 1e-5 <= ratio.min() and ratio.max() <= 2 ** (1 / cases.STEPS) + 1e-5


@pytest.mark.parametrize("source, target", [(1, 5), (7, 1), (7, 7), (20, 33), (33, 20)])
def test_resizing_by_products(seed, source, target):
    """The reference's way of resizing against the runners' own."""
    maps = np.random.default_rng(seed).uniform(-1, 1, (3, source, 4)).astype(np.float32)
    hats = cases._hats(source, target, torch.device("cpu"))
    assert np.abs((hats @ torch.from_numpy(maps)).numpy() - resize_aligned(maps, target, 4)).max() <= 1e-6


def test_a_deadline_ends_it():
    assert list(equality.progress([1, 2], "x")) == [1, 2]
    assert list(equality.progress([1, 2], "x", deadline=-math.inf)) == []


def test_it_is_a_script(monkeypatch, capsys):
    """As what types networks for TensorRT 8 runs it."""
    monkeypatch.setattr(sys, "argv", ["equality.py", "--variants", "nonsense"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(equality.__file__, run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: this machine cannot run 'nonsense': give 'all' or some of ")


@pytest.mark.parametrize(
    "identity, precision, expected",
    [
        ("TensorRT 8.6.0+free (NVIDIA H100), fp16, 4d MatMuls", "fp16", True),
        ("TensorRT 8.6.0+typed (NVIDIA H100), fp16, 4d MatMuls", "fp16", True),
        ("TensorRT 8.6.0+float32 (NVIDIA H100), fp16, 4d MatMuls", "fp16", False),
        ("TensorRT 10.13.0 (NVIDIA H100), fp16, 4d MatMuls", "fp16", False),
        ("TensorRT 8.6.0+free (NVIDIA H100), fp32, 4d MatMuls", "fp32", False),
        ("PyTorch 2.14 (CPU), fp16", "fp16", False),
        ("PyTorch 2.14 (CPU), fp16", equality.HALF_SUMS, True),
    ],
)
def test_whose_sums_are_in_float16(identity, precision, expected):
    assert equality.adds_up_in_float16(identity, precision) == expected


class TestHalfSums:
    """What half_sums.py puts in the place of PyTorch's products."""

    def test_a_sum_is_rounded_every_sixteen_products(self, seed):
        rng = np.random.default_rng(seed)
        a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((7, 70), (70, 5)))
        total = np.zeros((7, 5), np.float16)
        for start in range(0, 70, 16):
            part = a[:, start : start + 16].astype(np.float64) @ b[start : start + 16].astype(np.float64)
            total = (total + part).astype(np.float16)
        found = half_sums.product(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        assert (
            np.abs(found - total.astype(np.float64)).max() <= 2**-7
        )  # a last place here and there, of numbers below 32

    @pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": (1, 2)}, {"dilation": 2}])
    def test_layers(self, seed, options):
        torch.manual_seed(seed)
        image, weight, bias = torch.randn(2, 6, 13, 15), torch.randn(5, 6, 3, 3), torch.randn(5)
        x, matrix = torch.randn(2, 3, 40), torch.randn(8, 40)
        own = F.linear(x.half(), matrix.half())
        wide = F.conv2d(image, weight, bias, **options)
        with half_sums.half_sums():
            assert torch.equal(F.conv2d(image, weight, bias, **options), wide)  # float32 is left alone
            found = F.conv2d(image.half(), weight.half(), bias.half(), **options)
            line = F.linear(x.half(), matrix.half())
        exact = F.conv2d(image.half().double(), weight.half().double(), bias.half().double(), **options)
        with half_sums.half_sums("patches"):
            assert not torch.equal(F.conv2d(image.half(), weight.half(), bias.half(), **options), found)
            assert torch.equal(F.linear(x.half(), matrix.half()), own)
        assert found.shape == exact.shape and 0 < (found - exact).abs().max() < 0.1
        assert 0 < (line - F.linear(x.half().double(), matrix.half().double())).abs().max() < 0.1

    def test_patches_and_others(self, seed):
        torch.manual_seed(seed)
        x, weight = torch.randn(1, 3, 32, 32).half(), torch.randn(4, 3, 8, 8).half()
        with half_sums.half_sums():
            wanted = F.conv2d(x, weight, stride=8)
        for layers, same in (("patches", True), ("others", False)):
            with half_sums.half_sums(layers):
                assert torch.equal(F.conv2d(x, weight, stride=8), wanted) == same
