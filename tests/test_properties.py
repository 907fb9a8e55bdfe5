"""What must hold of any photo and any labels, whatever the weights: on every backend, the stand-in GPU's among them.

Where sums are rounded in another order, two labels of nearly equal cosines may change places; nothing else may.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from gpu_stand_in import compile_kernels, stand_in

from lseg.features import Features, query
from lseg.inference import label_photo
from lseg.run_onnxruntime import OnnxRuntimeRunner
from lseg.run_tensorrt import TensorRTRunner
from lseg.run_torch import TorchRunner
from lseg.runner import EngineOptions, Runner, Timings
from lseg.windows import Inference, scaled_size

SIZE, DIMENSION = 64, 24  # of the tiny weights
BACKENDS = ("torch", "onnxruntime", "fp32-4d", "fp32-2d", "fp16-4d")  # the last three on the stand-in GPU
PHOTOS = [("window", (90, 130)), ("multiscale", (70, 45))]


class Backend(NamedTuple):
    runner: Runner
    tie: float  # cosines that are nearer than this may be rounded either way


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, tiny, tmp_path_factory) -> Iterator[Backend]:
    if request.param == "torch":
        with TorchRunner(tiny.weights) as runner:
            yield Backend(runner, 2e-6)
    elif request.param == "onnxruntime":
        with OnnxRuntimeRunner(*tiny) as runner:
            yield Backend(runner, 2e-6)
    else:
        precision, matmul = request.param.split("-")
        with pytest.MonkeyPatch.context() as patch:
            stand_in(patch, request.getfixturevalue("library"))
            with TensorRTRunner(*tiny, EngineOptions(tmp_path_factory.mktemp("engines"), precision, matmul)) as runner:
                yield Backend(runner, 2e-6 if precision == "fp32" else 2e-3)


def skip_slow(backend: Backend, mode: str) -> None:
    if mode == "multiscale" and isinstance(backend.runner, TorchRunner):
        pytest.skip("takes PyTorch seconds, and is the same code on the host as ONNX Runtime's")


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    text = rng.standard_normal((count, DIMENSION)).astype(np.float32)
    return text / np.linalg.norm(text, axis=1, keepdims=True)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)


def same(backend: Backend, pixels: np.ndarray, text: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Two label maps [B, S, S] of the same images differ in near-ties only, and seldom."""
    assert first.shape == second.shape
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(2 / 255) - 1
    scores = backend.runner.scores(np.ascontiguousarray(images), text)
    one, other = (np.take_along_axis(scores, labels[:, None].astype(int), 1)[:, 0] for labels in (first, second))
    assert np.abs(one - other).max() <= backend.tie
    assert (first == second).mean() >= (0.999 if backend.tie < 1e-4 else 0.98)


@pytest.mark.parametrize("count", [2, 9, 300])
def test_permuted_labels_permute_the_map(backend, count, seed):
    rng = np.random.default_rng(seed)
    pixels, order = noise(rng, 2, SIZE, SIZE), rng.permutation(count)
    for _ in range(100):  # until not all pixels have one label, or the order would not show
        text = unit(rng, count)
        found = backend.runner.segment(pixels, text).labels
        if len(np.unique(found)) > 1:
            break
    permuted = backend.runner.segment(pixels, text[order]).labels
    same(backend, pixels, text, order[permuted], found)
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize("count", [1, 5, 90, 150])
@pytest.mark.parametrize("batch", [1, 3])
def test_of_equal_labels_the_first_wins(backend, batch, count, seed):
    """Also where the repeated ones are scored in a later pass, and beside others in between."""
    rng = np.random.default_rng(seed)
    pixels, text = noise(rng, batch, SIZE, SIZE), unit(rng, count)
    found = backend.runner.segment(pixels, text).labels
    again = rng.integers(0, count, count + 7)
    repeated = backend.runner.segment(pixels, np.concatenate([text, text[again]])).labels
    assert repeated.max() < count
    same(backend, pixels, text, repeated, found)


@pytest.mark.parametrize("mode, shape", PHOTOS)
def test_of_equal_labels_the_first_wins_in_windows(backend, mode, shape, seed):
    skip_slow(backend, mode)
    rng = np.random.default_rng(seed)
    photo, text = noise(rng, *shape), unit(rng, 67)
    found, cosines = label_photo(backend.runner, photo, text, mode)
    repeated, others = label_photo(backend.runner, photo, np.concatenate([text, text[::-1]]), mode)
    assert repeated.max() < len(text)
    assert np.abs(cosines - others).max() <= backend.tie
    assert (repeated == found).mean() >= 0.999


@pytest.mark.parametrize("place", ["first", "between", "last"])
def test_a_label_that_never_wins_changes_nothing(backend, place, seed):
    rng = np.random.default_rng(seed)
    pixels, pool = noise(rng, 2, SIZE, SIZE), unit(rng, 200)
    text = pool[np.bincount(backend.runner.segment(pixels, pool).labels.ravel(), minlength=200).argsort()[-8:]]
    embeddings = backend.runner.encode_image(pixels).transpose(1, 0, 2, 3).reshape(DIMENSION, -1)
    leads = ((text @ embeddings).max(axis=0) - pool @ embeddings).min(axis=1)
    loser = pool[leads.argmax()]
    assert leads.max() > 0.01
    at = {"first": 0, "between": 4, "last": 8}[place]
    found = backend.runner.segment(pixels, text, best=True)
    more = backend.runner.segment(pixels, np.insert(text, at, loser, axis=0), best=True)
    assert (more.labels != at).all()
    same(backend, pixels, text, more.labels - (more.labels > at).astype(int), found.labels)
    assert np.abs(more.best - found.best).max() <= backend.tie


def test_labels_that_nobody_has_may_go(backend, seed):
    """Three hundred labels, in passes, and those of them that a pixel has, in one."""
    rng = np.random.default_rng(seed)
    pixels, text = noise(rng, 1, SIZE, SIZE), unit(rng, 300)
    found = backend.runner.segment(pixels, text).labels
    kept = np.unique(found)
    assert len(kept) < 250
    same(backend, pixels, text, kept[backend.runner.segment(pixels, text[kept]).labels], found)


def test_a_mirrored_photo_gives_the_mirrored_map(backend, seed):
    """With the mirror on and one window that holds the photo exactly, nothing tells left from right."""
    rng, how = np.random.default_rng(seed), Inference((480 / 520,), mirror=True)
    photo, text = noise(rng, SIZE, SIZE), unit(rng, 7)
    assert scaled_size(SIZE, SIZE, how.scales[0], SIZE) == (SIZE, SIZE)
    mirrored = np.ascontiguousarray(photo[:, ::-1])
    labels, sums = backend.runner.label_windows(photo, text, how, True, Timings())
    others, other_sums = backend.runner.label_windows(mirrored, text, how, True, Timings())
    assert np.abs(sums - other_sums[:, ::-1]).max() <= 2 * backend.tie
    assert (labels == others[:, ::-1]).mean() >= 0.999
    assert not np.array_equal(sums, sums[:, ::-1])  # or the mirror would not show


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_a_batch_equals_its_images(backend, batch, seed):
    rng = np.random.default_rng(seed)
    pixels, text = noise(rng, batch, SIZE, SIZE), unit(rng, int(rng.integers(2, 40)))
    together = backend.runner.segment(pixels, text, best=True)
    alone = [backend.runner.segment(pixels[i : i + 1], text, best=True) for i in range(batch)]
    same(backend, pixels, text, together.labels, np.concatenate([one.labels for one in alone]))
    assert np.abs(together.best - np.concatenate([one.best for one in alone])).max() <= backend.tie


def test_cosines_asked_for_change_no_label(backend, seed):
    rng = np.random.default_rng(seed)
    for batch, count in ((1, 3), (3, 3), (2, 300)):
        pixels, text = noise(rng, batch, SIZE, SIZE), unit(rng, count)
        found = [backend.runner.segment(pixels, text, best).labels for best in (True, False, True)]
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    for mode, shape in (("whole", (50, 33)), PHOTOS[0]):
        photo, text = noise(rng, *shape), unit(rng, 6)
        found = [label_photo(backend.runner, photo, text, mode, best=best) for best in (True, False)]
        assert np.array_equal(found[0][0], found[1][0]) and found[1][1] is None


@pytest.mark.parametrize("mode", ["whole", "window", "multiscale"])
def test_no_photo_leaves_a_trace(backend, mode, seed):
    """The same bytes come out whatever went in before: larger and smaller photos, batches, more and fewer labels."""
    skip_slow(backend, mode)
    rng = np.random.default_rng(seed)
    photo, text = noise(rng, 75, 52), unit(rng, 5)
    labels, cosines = label_photo(backend.runner, photo, text, mode)
    for _ in range(2):
        other, others = noise(rng, *rng.integers(1, 130, 2)), unit(rng, int(rng.choice([1, 4, 5, 6, 60, 300])))
        label_photo(backend.runner, other, others, rng.choice(["whole", "window"]))
        backend.runner.segment(noise(rng, int(rng.integers(1, 9)), SIZE, SIZE), others)
        backend.runner.encode_image(noise(rng, 2, SIZE, SIZE))
        again, more = label_photo(backend.runner, photo, text, mode)
        assert np.array_equal(again, labels) and np.array_equal(more, cosines)


def test_stored_features_agree_with_the_map(backend, seed):
    """Of a photo of the network's own size, asked with the same texts: 16 bits decide near-ties only."""
    rng = np.random.default_rng(seed)
    pixels, text = noise(rng, 1, SIZE, SIZE), unit(rng, 6)
    found = backend.runner.segment(pixels, text).labels
    labels, _ = query(Features(backend.runner.encode_image(pixels)[0], SIZE, SIZE, SIZE).strided(1), text)
    same(backend._replace(tie=max(2**-10, backend.tie)), pixels, text, labels[None], found)
