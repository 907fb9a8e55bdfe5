"""The Python API: `from lseg import Segmenter`."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_enginerun import LABELS, save

from lseg import Segmenter, UserError
from lseg.device_array import DeviceArray, _exported
from lseg.image import labels_to_photo, read_image, to_pixels
from lseg.run_torch import TorchRunner
from lseg.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def photo(tmp_path, seed) -> Path:
    return save(tmp_path / "photo.jpg", seed)


@pytest.fixture(params=["onnxruntime", "torch"])
def lseg(request, tiny):
    with Segmenter(tiny.weights, request.param, onnx=tiny.folder) as segmenter:
        yield segmenter


class TestSegmenter:
    def test_label_map(self, lseg, tiny, photo):
        found = lseg.segment(photo, LABELS)
        image = read_image(photo)
        with TorchRunner(tiny.weights) as runner:
            result = runner.segment(to_pixels(image, 64)[None], runner.encode_text(Tokenizer()(LABELS)), best=True)
        assert (found.labels == labels_to_photo(result.labels[0], 90, 70)).mean() > 0.999
        assert np.abs(found.cosines - labels_to_photo(result.best[0], 90, 70)).max() < 1e-4
        again = lseg.segment(image, lseg.embed(LABELS))  # an array, and embeddings in place of words
        assert np.array_equal(again.labels, found.labels)
        assert lseg.segment(image, ["cat"]).labels.max() == 0  # nothing is added to what a program asks for
        assert lseg.segment(image, LABELS, "window").labels.shape == (70, 90)

    def test_words_are_embedded_once(self, lseg, monkeypatch):
        first = lseg.embed(LABELS)
        assert np.abs(np.linalg.norm(first, axis=1) - 1).max() < 1e-5
        monkeypatch.setattr(lseg.runner, "encode_text", None)  # calling it would fail
        assert lseg.embed(LABELS) is first
        assert np.abs(lseg.embed(["sky"]) - first[0]).max() < 1e-6  # kept on disk, by word

    def test_features(self, lseg, photo):
        """The stored map, asked with new words, gives the label map."""
        image, words = read_image(photo), ["cat", "dog", "sky"]
        stored = lseg.features(image).strided(1)
        assert (stored.shape, stored.dtype) == ((*image.shape[:2], lseg.embed(words).shape[1]), np.float16)
        asked = (stored.astype(np.float32) @ lseg.embed(words).T).argmax(axis=2)
        assert (asked == lseg.segment(image, words).labels).mean() > 0.98  # float16, and random weights
        assert np.array_equal(lseg.features(photo).at([(3, 5)])[0], stored[5, 3])

    def test_picked_features(self, lseg, tmp_path, seed):
        """They are the whole map's, bit for bit, of photos larger and smaller than the network."""
        rng = np.random.default_rng(seed)
        for width, height in ((90, 70), (31, 20), (64, 64), (200, 3)):
            photo = save(tmp_path / "photo.png", int(rng.integers(2**31)), (width, height))
            every = lseg.features(photo)
            points = rng.integers(0, [width, height], (50, 2))
            assert np.array_equal(lseg.features_at(photo, points), every.at(points))
            for stride in (1, 3, 17, 500):
                assert np.array_equal(lseg.features_strided(photo, stride), every.strided(stride))
        with pytest.raises(UserError, match="is outside the photo"):
            lseg.features_at(photo, [(200, 0)])
        with pytest.raises(UserError, match="a stride of 0 takes no steps"):
            lseg.features_strided(photo, 0)

    def test_without_a_copy(self, lseg, photo):
        array = lseg.features_on_device(photo)
        taken = torch.from_dlpack(array) if not isinstance(array, torch.Tensor) else array
        wanted = lseg.runner.encode_image(to_pixels(read_image(photo), 64)[None])
        assert taken.shape == wanted.shape and np.abs(taken.numpy() - wanted).max() < 1e-6
        if isinstance(array, DeviceArray):
            assert taken.data_ptr() == array.address
        weight = torch.ones(1, requires_grad=True)
        (taken * weight).sum().backward()  # others may train on it
        assert weight.grad is not None

    def test_threads_share_one(self, lseg, tmp_path, seed):
        images = [read_image(save(tmp_path / f"{i}.png", seed + i)) for i in range(4)]
        alone = [lseg.segment(image, LABELS).labels for image in images]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: lseg.segment(images[i % 4], LABELS).labels, range(40)))
        assert all(np.array_equal(found[i], alone[i % 4]) for i in range(40))

    def test_a_batch(self, lseg, tmp_path, seed):
        """Photos of several sizes at once, more than the network takes a call: each as it is alone."""
        sizes = [(90, 70), (40, 64), (64, 64)] * 3 + [(17, 31)]
        photos = [save(tmp_path / f"{i}.png", seed + i, size) for i, size in enumerate(sizes)]
        mixed = [photos[0], *(read_image(photo) for photo in photos[1:])]
        for inference in ("whole", "window"):
            found = lseg.segment_batch(mixed, LABELS, inference)
            assert len(found) == len(photos)
            for photo, each in zip(photos, found, strict=True):
                alone = lseg.segment(photo, LABELS, inference)
                assert each.labels.shape == each.cosines.shape == alone.labels.shape
                assert (each.labels == alone.labels).mean() > 0.999
                assert np.abs(each.cosines - alone.cosines).max() < 1e-5
        assert lseg.segment_batch([], LABELS) == []
        with pytest.raises(UserError, match="the photos are one photo: give a list, or use segment"):
            lseg.segment_batch(photos[0], LABELS)
        with pytest.raises(UserError, match="the photos are one photo"):
            lseg.segment_batch(mixed[1], LABELS)
        with pytest.raises(UserError, match="photo 2 of 2: none.jpg"):
            lseg.segment_batch([photos[0], "none.jpg"], LABELS)
        with pytest.raises(UserError, match="photo 1 of 2: a photo that is a NoneType does not fit: give a file"):
            lseg.segment_batch([None, photos[0]], LABELS)  # what OpenCV reads from a camera that is gone
        with pytest.raises(UserError, match="the photos are a NoneType: give a list"):
            lseg.segment_batch(None, LABELS)

    def test_what_cannot_be(self, lseg, photo):
        with pytest.raises(UserError, match=r"one string: give a list, such as \['cat', 'dog'\]"):
            lseg.segment(photo, "cat, dog")
        with pytest.raises(UserError, match=r"a photo of float64 \[3, 3, 3\] does not fit: give uint8"):
            lseg.segment(np.zeros((3, 3, 3)), LABELS)
        with pytest.raises(UserError, match="none.jpg"):
            lseg.features("none.jpg")
        with pytest.raises(UserError, match="'wide' is no inference mode"):
            lseg.segment(photo, LABELS, "wide")
        for shape in ((0, 32), (3, 31), (32,)):
            with pytest.raises(UserError, match=r"do not fit: give \[N, \d+\]"):
                lseg.segment(photo, np.zeros(shape, np.float32))
        text = lseg.embed(LABELS)
        for wrong in (2 * text, text * np.float32("nan")):
            with pytest.raises(UserError, match="not of unit length"):
                lseg.segment(photo, wrong)
        for words, message in (([], "no word is given"), ([3], "3 is no word"), (["a", " "], "' ' is no word")):
            with pytest.raises(UserError, match=message):
                lseg.segment(photo, words)
        with pytest.raises(UserError, match="a photo that is a list does not fit: give a file"):
            lseg.features([photo])
        with pytest.raises(ValueError):  # what is kept cannot be spoilt
            text *= 0
        assert np.array_equal(lseg.embed(word for word in LABELS), text)

    def test_the_import_is_light(self):
        """`import lseg` brings no library that the scripts' --help would wait for."""
        code = "import sys, lseg; print([m for m in ('numpy', 'cv2', 'torch', 'onnxruntime') if m in sys.modules])"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert result.stdout.strip() == "[]"


class TestDeviceArray:
    """On host memory, which NumPy takes by the same capsules as GPU memory."""

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8, np.int32])
    def test_what_takes_it(self, seed, dtype):
        values = np.random.default_rng(seed).integers(0, 200, (2, 3, 5)).astype(dtype)
        array = DeviceArray(values.ctypes.data, values.shape, dtype, values, gpu=None)
        before = len(_exported)
        for take in (np.from_dlpack, torch.from_dlpack):
            taken = take(array)
            assert np.array_equal(np.asarray(taken), values)
            values[0, 0, 0] += 1
            assert np.asarray(taken)[0, 0, 0] == values[0, 0, 0]  # the same memory
            assert len(_exported) == before + 1
            del taken
            gc.collect()
            assert len(_exported) == before
        capsule = array.__dlpack__()  # nobody takes it
        del capsule
        gc.collect()
        assert len(_exported) == before

    def test_the_owner_lives_as_long_as_the_consumer(self, seed):
        values = np.random.default_rng(seed).random((100, 100))
        wanted = values.astype(np.float32)
        owner = wanted.copy()
        taken = torch.from_dlpack(DeviceArray(owner.ctypes.data, owner.shape, owner.dtype, owner, gpu=None))
        del owner
        gc.collect()
        np.full((100, 100), -1, np.float32)  # would reuse freed memory
        assert np.array_equal(taken.numpy(), wanted)

    def test_the_cuda_interface(self):
        array = DeviceArray(4096, (1, 2, 3), np.float16, None, gpu=1)
        wanted = {"shape": (1, 2, 3), "typestr": "<f2", "data": (4096, False), "version": 3}
        assert array.__cuda_array_interface__ == wanted
        assert array.__dlpack_device__() == (2, 1) and array.nbytes == 12
        host = DeviceArray(4096, (1,), np.float16, None, gpu=None)
        assert not hasattr(host, "__cuda_array_interface__") and host.__dlpack_device__() == (1, 0)
        for options in ({"copy": True}, {"dl_device": (1, 0)}):
            with pytest.raises(BufferError, match="without a copy"):
                array.__dlpack__(**options)


def test_after_its_end(tiny, photo):
    with Segmenter(tiny.weights, "onnxruntime", onnx=tiny.folder) as lseg:
        lseg.segment(photo, LABELS)
    lseg.close()
    for work in (lambda: lseg.segment(photo, LABELS), lambda: lseg.features(photo), lambda: lseg.embed(["new"])):
        with pytest.raises(UserError, match="the Segmenter was closed: open another"):
            work()


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "torch"])
def test_a_batch_that_no_engine_takes(tmp_path, backend):
    """It is told before anything is exported, and whatever the machine has."""
    for batch in (9, 0, -1, "6", 2.0):
        with pytest.raises(UserError, match=f"^{batch!r} images a run cannot be: give 1 to 8"):
            Segmenter("demo", backend, onnx=tmp_path / "onnx", batch=batch)
    with pytest.raises(UserError, match="MatMuls in 2-D take one image a run, not 4"):
        Segmenter("demo", backend, onnx=tmp_path / "onnx", batch=4, matmul="2d")
    assert not (tmp_path / "onnx").exists()


def test_batches_follow_the_engine(tiny, seed, monkeypatch):
    """As many photos a call as a run of the engine takes."""
    photos = [np.random.default_rng(seed + i).integers(0, 256, (20, 30, 3), dtype=np.uint8) for i in range(7)]
    with Segmenter(tiny.weights, "onnxruntime", onnx=tiny.folder, batch=3) as lseg:
        counts, segment = [], lseg.runner.segment
        monkeypatch.setattr(
            lseg.runner, "segment", lambda pixels, *more: counts.append(len(pixels)) or segment(pixels, *more)
        )
        assert len(lseg.segment_batch(photos, LABELS)) == 7 and counts == [3, 3, 1]


def test_the_readmes_example(demo, monkeypatch):
    """Runs as it stands, but for the folder of the exported files."""
    text = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "with Segmenter() as lseg:" in text
    monkeypatch.chdir(ROOT)
    found: dict = {}
    exec(text.replace("Segmenter()", f"Segmenter(onnx={str(demo.folder)!r})"), found)
    height, width = read_image(ROOT / "image" / "temple.jpg").shape[:2]
    assert found["found"].labels.shape == (height, width)
    assert found["labels"].shape == found["stored"].shape[:2] == (-(-height // 8), -(-width // 8))
    assert set(np.unique(found["labels"])) <= {0, 1} and found["array"].shape == (1, 512, 240, 240)
