"""The TensorRT backend on a stand-in GPU (see gpu_stand_in.py), against PyTorch."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from lseg import gpu_windows, run_tensorrt
from lseg.errors import UserError
from lseg.features import Features
from lseg.inference import label_photo
from lseg.recipes import IMAGE
from lseg.run_tensorrt import TensorRTRunner
from lseg.runner import EngineOptions, Segmentation, Timings, open_runner
from lseg.slots import AT_ONCE
from lseg.windows import Inference
from tests.gpu_stand_in import Event, compile_kernels, stand_in

EXACT, HALF = 1e-5, 1e-2  # of cosines and embeddings, in float32 and float16


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def driver(library, monkeypatch):
    return stand_in(monkeypatch, library)


@pytest.fixture(scope="module")
def torch_runner(tiny):
    with open_runner("torch", *tiny) as runner:
        yield runner


@pytest.fixture
def opened(driver, tiny, tmp_path):
    """Opens the backend; afterwards, every byte that it took must be free."""
    runners = []

    def open_it(precision: str = "fp32", matmul: str = "4d", batch: int | None = None) -> TensorRTRunner:
        runners.append(TensorRTRunner(*tiny, EngineOptions(tmp_path, precision, matmul, batch=batch)))
        return runners[-1]

    yield open_it
    for runner in runners:
        runner.close()
    assert (driver.allocated, driver.depth, driver.retained) == (0, 0, 0)


def draw(rng: np.random.Generator, count: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    text = rng.standard_normal((labels, 24)).astype(np.float32)
    pixels = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return pixels, text / np.linalg.norm(text, axis=1, keepdims=True)


@pytest.mark.parametrize("precision, matmul", [("fp32", "4d"), ("fp32", "2d"), ("fp16", "4d"), ("fp16", "3d")])
def test_labels_of_every_batch(opened, torch_runner, seed, precision, matmul):
    """Each number of images and texts, the second time from a captured graph; other images after it."""
    rng, runner = np.random.default_rng(seed), opened(precision, matmul)
    bound = EXACT if precision == "fp32" else HALF
    for count, labels in ((1, 1), (1, 8), (2, 8), (3, 2), (5, 150), (8, 256), (8, 300), (1, 700), (1, 8)):
        for _ in range(2):
            pixels, text = draw(rng, count, labels)
            wanted = torch_runner.segment(pixels, text)
            found = runner.segment(pixels, text, best=True)
            assert found.labels.dtype == (np.uint8 if labels <= 256 else np.int32)
            assert np.abs(found.best - wanted.best).max() <= bound, (count, labels)
            assert (found.labels == wanted.labels).mean() >= (0.999 if precision == "fp32" else 0.9)
            again = runner.segment(pixels, text)
            assert again.best is None
            np.testing.assert_array_equal(again.labels, found.labels)


def test_eight_at_a_time_and_the_rest_alone(opened, seed):
    rng, runner = np.random.default_rng(seed), opened()
    for count in (8, 5):
        runner.segment(*draw(rng, count, 3))
    assert image_runs(runner) == {"images8": [8], "image": [1] * 5}
    with pytest.raises(UserError, match="9 images are more than the 8"):
        runner.segment(*draw(rng, 9, 3))
    with pytest.raises(UserError, match="do not fit"):
        runner.segment(np.zeros((1, 32, 64, 3), np.uint8), draw(rng, 1, 3)[1])


def image_runs(runner: TensorRTRunner) -> dict[str, list[int]]:
    """Of each image engine that was loaded, how many images it was given a run."""
    engines = runner.stages._engines
    return {name: [run["image"][0] for run in engines[name].runs] for name in IMAGE.values() if name in engines}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_a_batch_of_its_own(opened, torch_runner, seed, precision, batch):
    """One engine takes every number of images, of which the last run may have less than it holds."""
    rng, runner = np.random.default_rng(seed), opened(precision, batch=batch)
    bound, most = (EXACT, 0.999) if precision == "fp32" else (HALF, 0.9)
    for count, labels in ((batch, 8), (1, 8), (8, 3), (2, 300)):
        pixels, text = draw(rng, count, labels)
        wanted, found = torch_runner.segment(pixels, text), runner.segment(pixels, text, best=True)
        assert np.abs(found.best - wanted.best).max() <= bound
        assert (found.labels == wanted.labels).mean() >= most
        embeddings, vectors = torch_runner.encode_image(pixels), runner.encode_image(pixels)
        assert np.linalg.norm(vectors - embeddings) / np.linalg.norm(embeddings) <= bound
    photo = rng.integers(0, 256, (97, 140, 3), dtype=np.uint8)
    wanted, found = (label_photo(each, photo, text, "window", best=False)[0] for each in (torch_runner, runner))
    assert (found == wanted).mean() >= most
    assert set(sum(image_runs(runner).values(), [])) == {batch} and len(image_runs(runner)) == 1


def test_a_batch_that_cannot_be(opened):
    for batch in (0, 9, -1):
        with pytest.raises(UserError, match=f"{batch} images a run cannot be: give 1 to 8"):
            opened(batch=batch)
    with pytest.raises(UserError, match="in 2-D take one image a run, not 2: leave --batch out"):
        opened(matmul="2d", batch=2)


def test_graphs_survive_buffers_that_move(opened, torch_runner, seed):
    """A larger batch replaces the buffers that a captured graph writes to; old shapes are then captured again."""
    rng, runner = np.random.default_rng(seed), opened()
    for count, labels in ((1, 5), (1, 5), (8, 5), (1, 5), (1, 5), (8, 5), (8, 5)):
        pixels, text = draw(rng, count, labels)
        found = runner.segment(pixels, text).labels
        assert (found == torch_runner.segment(pixels, text).labels).mean() >= 0.999
    assert len(runner._graphs) == 2


def test_no_more_graphs_than_are_kept(opened, seed, monkeypatch):
    monkeypatch.setattr(run_tensorrt, "GRAPHS", 3)
    rng, runner = np.random.default_rng(seed), opened()
    for labels in range(1, 7):
        runner.segment(*draw(rng, 1, labels))
    assert [labels for _, _, labels, _ in runner._graphs] == [4, 5, 6]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_embeddings(opened, torch_runner, seed, precision):
    rng, runner = np.random.default_rng(seed), opened(precision)
    for count in (1, 3, 8):
        pixels, _ = draw(rng, count, 1)
        wanted, found = torch_runner.encode_image(pixels), runner.encode_image(pixels)
        assert found.dtype == np.float32
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) <= (EXACT if precision == "fp32" else HALF)
        array = runner.embed(pixels)
        assert (array.shape, array.dtype) == (wanted.shape, {"fp32": np.float32, "fp16": np.float16}[precision])
        np.testing.assert_array_equal(runner.encode_image(pixels), found)


@pytest.mark.parametrize("precision, batch", [("fp32", None), ("fp16", None), ("fp32", 3)])
def test_picked_embeddings(opened, torch_runner, seed, monkeypatch, precision, batch):
    """Alone they are what the whole grid gives, also in several rounds, and after a larger batch and labels."""
    rng, runner = np.random.default_rng(seed), opened(precision, batch=batch)
    bound = 1e-3 if precision == "fp32" else HALF  # the results are float16
    pixels, text = draw(rng, 8, 5)
    runner.segment(pixels, text)
    places = rng.integers(0, 64, (500, 2))
    wanted = Features(torch_runner.encode_image(pixels[:1])[0], 64, 64, 64).at(places[:, ::-1])
    found = runner.features_at(pixels[:1], places)
    assert (found.shape, found.dtype) == (wanted.shape, np.float16)
    assert np.abs(found.astype(np.float32) - wanted).max() <= bound
    monkeypatch.setattr(run_tensorrt, "PLACES", 128)
    np.testing.assert_array_equal(runner.features_at(pixels[:1], places), found)
    assert runner.features_at(pixels[:1], places[:0]).shape == (0, wanted.shape[1])
    with pytest.raises(UserError, match="no image is given"):
        runner.features_at(pixels[:0], places)
    with pytest.raises(UserError, match="8 images are more than the one whose pixels are picked"):
        runner.features_at(pixels, places)
    for wrong in (-1, 64, 2**32):
        with pytest.raises(UserError, match="do not fit: give 0 to 63"):
            runner.features_at(pixels[:1], np.array([[3, 4], [5, wrong]]))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("mode", ["window", "multiscale"])
@pytest.mark.parametrize("shape", [(97, 140), (150, 61), (7, 5)])
def test_windows(opened, torch_runner, seed, monkeypatch, precision, mode, shape):
    """The official protocol on the GPU against the same on the host, in one round of labels and in several."""
    rng, runner = np.random.default_rng(seed), opened(precision)
    photo = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    _, text = draw(rng, 1, 11)
    wanted, sums = label_photo(torch_runner, photo, text, mode)
    timings = Timings()
    found, cosines = label_photo(runner, photo, text, mode, timings)
    assert set(timings.milliseconds) == {"preprocess", "encode_image", "similarity"}
    assert (found == wanted).mean() >= (0.999 if precision == "fp32" else 0.9)
    assert np.abs(cosines - sums).max() <= (EXACT if precision == "fp32" else HALF)
    monkeypatch.setattr(gpu_windows, "MAP_BYTES", 1)  # one label a round
    labels, nothing = label_photo(runner, photo, text, mode, best=False)
    assert nothing is None
    np.testing.assert_array_equal(labels, found)


def test_memory_of_windows_is_given_back(opened, driver, seed):
    rng, runner = np.random.default_rng(seed), opened()
    _, text = draw(rng, 1, 4)
    held = []
    for shape in ((90, 120), (200, 150), (90, 120)):
        label_photo(runner, rng.integers(0, 256, (*shape, 3), dtype=np.uint8), text, "multiscale")
        held.append(driver.allocated)
    assert held[0] == held[1] == held[2]


def test_little_memory_means_more_rounds(library, monkeypatch, tiny, tmp_path, torch_runner, seed):
    """Maps take at most half of what is free: where that is little, labels go in rounds, and the result is the same."""
    rng = np.random.default_rng(seed)
    photo, text = rng.integers(0, 256, (120, 160, 3), dtype=np.uint8), draw(rng, 1, 40)[1]
    wanted = label_photo(torch_runner, photo, text, "multiscale")[0]
    rounds = []
    for limit in (1 << 30, 8_000_000):
        driver = stand_in(monkeypatch, library, limit)
        with TensorRTRunner(*tiny, EngineOptions(tmp_path, "fp32", "4d")) as runner:
            assert (label_photo(runner, photo, text, "multiscale")[0] == wanted).mean() >= 0.999
        rounds.append(driver.launched.count("combine"))
    assert rounds[0] == 1 < rounds[1]


def test_scores(opened, torch_runner, seed):
    rng, runner = np.random.default_rng(seed), opened()
    images = rng.uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
    for labels in (3, 300, 5):
        _, text = draw(rng, 1, labels)
        assert np.abs(runner.scores(images, text) - torch_runner.scores(images, text)).max() <= EXACT


def test_text(opened, torch_runner, seed):
    import torch

    from lseg import specs

    torch.manual_seed(seed)
    tokens = specs.random_tokens(300).numpy()
    assert np.abs(opened("fp16").encode_text(tokens) - torch_runner.encode_text(tokens)).max() <= EXACT


def test_texts_that_change_in_place(opened, torch_runner, seed):
    rng, runner = np.random.default_rng(seed), opened()
    pixels, text = draw(rng, 1, 6)
    runner.segment(pixels, text)
    text[...] = text[::-1].copy()
    assert (runner.segment(pixels, text).labels == torch_runner.segment(pixels, text).labels).mean() >= 0.999


def test_calls_overlap(opened, driver, seed, monkeypatch):
    """While one call waits for the GPU another's work is enqueued, which the first one waits for here."""
    rng, runner = np.random.default_rng(seed), opened()
    jobs = [draw(rng, 1, labels) for labels in (3, 5)]
    wanted = [runner.segment(*job, best=True) for job in jobs]
    both = threading.Barrier(2)
    monkeypatch.setattr(Event, "synchronize", lambda self: both.wait(timeout=60))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: runner.segment(*job, best=True), jobs))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.best, other.best)
        assert one.timings.milliseconds.keys() == other.timings.milliseconds.keys()


def test_threads_that_share_it(opened, seed):
    """Images, texts, and numbers of both that change from call to call, with embeddings, windows and many labels."""
    rng, runner = np.random.default_rng(seed), opened()
    jobs = [draw(rng, count, labels) for count in (1, 2, 8) for labels in (2, 9, 260)]
    works = [
        *(lambda job=job, best=best: runner.segment(*job, best=best) for job in jobs for best in (False, True)),
        lambda: runner.encode_image(jobs[0][0]),
        lambda: runner.features_at(jobs[0][0], np.argwhere(np.ones((64, 64)))),
        lambda: runner.scores(np.zeros((1, 3, 64, 64), np.float32), jobs[1][1]),
        lambda: label_photo(runner, np.tile(jobs[0][0][0], (2, 1, 1)), jobs[1][1], "window"),
    ]

    def arrays(result: object) -> list[np.ndarray]:
        parts = (result.labels, result.best) if isinstance(result, Segmentation) else result
        parts = parts if isinstance(parts, tuple) else (parts,)
        return [part for part in parts if part is not None]

    wanted = [arrays(work()) for work in works]
    order = rng.integers(0, len(works), 60)
    with ThreadPoolExecutor(4) as pool:
        for index, found in zip(order, pool.map(lambda index: arrays(works[index]()), order), strict=True):
            assert len(found) == len(wanted[index])
            for one, other in zip(found, wanted[index], strict=True):
                np.testing.assert_array_equal(one, other)


def test_closing_waits_for_calls_under_way(opened, seed, monkeypatch):
    rng, runner = np.random.default_rng(seed), opened()
    pixels, text = draw(rng, 1, 3)
    wanted = runner.segment(pixels, text).labels
    waiting, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def wait(_: Event) -> None:
        waiting.set()
        assert go_on.wait(60)

    monkeypatch.setattr(Event, "synchronize", wait)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(runner.segment, pixels, text)
        assert waiting.wait(60)
        closing = pool.submit(lambda: (runner.close(), closed.set()))
        assert not closed.wait(0.2)
        go_on.set()
        closing.result(60)
        np.testing.assert_array_equal(call.result(60).labels, wanted)
    with pytest.raises(UserError, match="the GPU was closed"):
        runner.segment(pixels, text)


def test_two_may_close_it(opened, seed):
    """At once, with calls under way: none waits for ever."""
    for turn in range(5):
        runner = opened()
        jobs = [draw(np.random.default_rng(seed + turn), 1, labels) for labels in (2, 3)]
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(runner.segment, *job) for job in jobs]
            for closing in [pool.submit(runner.close) for _ in range(2)]:
                closing.result(60)
        for call in calls:  # it came before the closing, or it is told
            assert call.exception() is None or "the GPU was closed" in str(call.exception())


def test_waiting_for_others_is_no_time_of_a_call(opened, seed, monkeypatch):
    runner, job = opened(), draw(np.random.default_rng(seed), 1, 3)
    runner.segment(*job)
    slot = runner._slots._slots[0]
    monkeypatch.setattr(Event, "query", lambda self: self is not slot.begun)
    monkeypatch.setattr(Event, "synchronize", lambda self: time.sleep(1.0 if self is slot.begun else 0.2))
    start = time.perf_counter()
    found = runner.segment(*job).timings.milliseconds["encode_image"]
    assert time.perf_counter() - start > 1.2 and 200 < found < 1000


def test_what_is_left_on_the_gpu_is_waited_for(opened, seed, monkeypatch):
    """A call fails when some of its work is enqueued: closing must not free what that work uses before its end."""
    runner, (pixels, text) = opened(), draw(np.random.default_rng(seed), 1, 3)
    events, stages = [], runner.stages
    monkeypatch.setattr(stages, "dots", lambda *_: (_ for _ in ()).throw(UserError("no memory")))
    with pytest.raises(UserError, match="no memory"):
        runner.segment(pixels, text)
    monkeypatch.setattr(stages, "stream", SimpleNamespace(handle=0, synchronize=lambda: events.append("waited")))
    monkeypatch.setattr(stages, "close", lambda close=stages.close: (events.append("closed"), close()))
    runner.close()
    assert events == ["waited", "closed"]


def test_a_call_that_fails_leaves_the_others_room(opened, driver, seed, monkeypatch):
    rng, runner = np.random.default_rng(seed), opened()
    pixels, text = draw(rng, 1, 3)
    wanted = runner.segment(pixels, text).labels

    def fail(_: Event) -> None:
        raise driver.Error("an illegal address")

    with monkeypatch.context() as patch:
        patch.setattr(Event, "synchronize", fail)
        for _ in range(2 * AT_ONCE):
            with pytest.raises(UserError, match="the GPU failed .an illegal address"):
                runner.segment(pixels, text)
    np.testing.assert_array_equal(runner.segment(pixels, text).labels, wanted)


def test_wrong_shapes_are_told(opened, seed):
    rng, runner = np.random.default_rng(seed), opened()
    pixels, text = draw(rng, 1, 4)
    for wrong in (text[:, :12], np.concatenate([text, text], axis=1), text[:0]):
        with pytest.raises(UserError, match="texts of shape .* do not fit"):
            runner.segment(pixels, wrong)
        with pytest.raises(UserError, match="texts of shape .* do not fit"):
            label_photo(runner, pixels[0], wrong, "window")
        with pytest.raises(UserError, match="texts of shape .* do not fit"):
            runner.scores(np.zeros((1, 3, 64, 64), np.float32), wrong)
    with pytest.raises(UserError, match="images of shape .* do not fit"):
        runner.scores(np.zeros((1, 3, 32, 32), np.float32), text)
    for work in (lambda: runner.segment(pixels[:0], text), lambda: runner.encode_image(pixels[:0])):
        with pytest.raises(UserError, match="no image is given"):
            work()
    with pytest.raises(UserError, match="9 scales are more than the 8"):
        runner.label_windows(pixels[0], text, Inference((1.0,) * 9), False, Timings())


@pytest.mark.parametrize("kind", [RuntimeError, UserError])
def test_a_graph_that_cannot_be_captured_is_done_without(opened, torch_runner, seed, monkeypatch, kind):
    """The driver ends the capture, or TensorRT does not enqueue in it: what was wanted has run before."""

    def refuse(*_: object) -> None:
        raise kind("cuStreamEndCapture failed with CUDA error 901")

    monkeypatch.setattr(run_tensorrt, "Graph", refuse)
    rng, runner = np.random.default_rng(seed), opened()
    for _ in range(2):
        pixels, text = draw(rng, 1, 4)
        assert (runner.segment(pixels, text).labels == torch_runner.segment(pixels, text).labels).mean() >= 0.999


def test_failures_of_the_gpu_are_told(opened, driver, seed):
    rng, runner = np.random.default_rng(seed), opened()
    pixels, text = draw(rng, 1, 4)
    for error, words in ((driver.MemoryError, "the GPU has no memory left"), (driver.Error, "the GPU failed")):

        def fail(*_: object, error: type = error) -> None:
            raise error("at a launch")

        runner.stages.kernels._launch, launch = fail, runner.stages.kernels._launch
        with pytest.raises(UserError, match=words):
            runner.encode_image(pixels)
        runner.stages.kernels._launch = launch
    runner.segment(pixels, text)
    runner.close()
    runner.close()
    with pytest.raises(UserError, match="the GPU was closed"):
        runner.segment(pixels, text)


def test_kernels_that_the_driver_refuses(library, monkeypatch, tiny, tmp_path):
    driver = stand_in(monkeypatch, library)

    def refuse(ptx: bytes) -> None:
        raise driver.Error("unsupported PTX version")

    monkeypatch.setattr(driver, "module_from_buffer", refuse, raising=False)
    with pytest.raises(UserError, match="does not take kernels.ptx .unsupported PTX version.: update"):
        TensorRTRunner(*tiny, EngineOptions(tmp_path, "fp32", "4d"))
    assert (driver.allocated, driver.depth, driver.retained) == (0, 0, 0)


def test_a_full_gpu_is_told(library, monkeypatch, tiny, tmp_path, seed):
    driver = stand_in(monkeypatch, library, limit=200_000)
    with TensorRTRunner(*tiny, EngineOptions(tmp_path, "fp32", "4d")) as runner:
        with pytest.raises(UserError, match="has no [1-9][0-9]* MiB left: close other programs"):
            runner.segment(*draw(np.random.default_rng(seed), 1, 3))
    assert (driver.allocated, driver.depth, driver.retained) == (0, 0, 0)


def test_a_gpu_without_memory_for_a_context_is_told(library, monkeypatch, tiny, tmp_path):
    driver = stand_in(monkeypatch, library)

    def refuse(*_: object) -> None:
        raise driver.MemoryError("cuDevicePrimaryCtxRetain failed: out of memory")

    monkeypatch.setattr(driver.Device, "retain_primary_context", refuse)
    with pytest.raises(UserError, match="the GPU has no memory left .cuDevice.*: close other programs"):
        TensorRTRunner(*tiny, EngineOptions(tmp_path, "fp32", "4d"))


def test_half_a_buffer_is_given_back(opened, driver, monkeypatch, seed):
    """There is memory on the GPU, and none on the host for its twin: afterwards `opened` asks for every byte."""
    rng, runner = np.random.default_rng(seed), opened()

    def refuse(*_: object) -> None:
        raise driver.MemoryError("cuMemHostAlloc failed: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "pagelocked_empty", refuse, raising=False)
        before = driver.allocated
        with pytest.raises(UserError, match="or the host for it, has no [1-9][0-9]* MiB left"):
            runner.segment(*draw(rng, 1, 3))
        assert driver.allocated == before
    runner.segment(*draw(rng, 1, 3))


def test_a_gpu_that_fills_up_while_it_is_opened(library, monkeypatch, tiny, tmp_path):
    """There is room for the first array, not for the second."""
    driver = stand_in(monkeypatch, library, limit=200)
    with pytest.raises(UserError, match="has no 1 MiB left"):
        TensorRTRunner(*tiny, EngineOptions(tmp_path, "fp32", "4d"))
    assert (driver.allocated, driver.depth, driver.retained) == (0, 0, 0)
