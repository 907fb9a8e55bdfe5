"""LSeg on TensorRT through PyCUDA: uint8 pixels in, labels out, everything between on the GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from lseg.cuda import Buffer, Device, Graph, gpu_count
from lseg.device_array import DeviceArray
from lseg.engine import import_tensorrt
from lseg.errors import UserError
from lseg.gpu_windows import label_windows
from lseg.loaded_engine import to_float32
from lseg.onnx_file import checked_image, checked_text
from lseg.recipes import LABELS_A_PASS, MAX_BATCH, Recipe
from lseg.runner import EngineOptions, Identity, Segmentation, Timings
from lseg.slots import AT_ONCE, Slot, Slots
from lseg.stages import Stages
from lseg.windows import Inference

# In 2-D, with two heads a product, four blocks of ViT-L/16 took 1.34 times as long as in 4-D on an H200 (TensorRT 8.6,
# float32, batch 1), and longer still with one head or four.
DEFAULT_MATMUL = {"fp32": "4d", "tf32": "4d", "fp16": "4d", "bf16": "4d"}
PLACES = 2**14  # whose embeddings are brought to the host at once: 16 MiB
GRAPHS = 16 * AT_ONCE  # captured graphs that are kept


class TensorRTRunner:
    """See `lseg.runner.Runner`. Threads may share one.

    Their calls take turns on the GPU. Of photos seen whole, with up to 256 labels, one call's copies overlap with
    another's turn; other calls have the runner to themselves.

    Args:
        weights: as `--weights`.
        folder: of the exported ONNX files.
        options: the engines' folder, precision ("fp32", "tf32", "fp16"), form of MatMul ("4d", "3d", "2d", or None for
            the precision's default), optimisation level, where a line goes when an engine is built, and images a run.
        text_onnx: another CLIP text encoder, run by ONNX Runtime.
        cuda_graphs: capture each pair of shapes once and launch it as a whole.

    Raises:
        UserError: no GPU, no TensorRT, no PyCUDA, or ONNX files that are missing or of other weights.
    """

    callers = AT_ONCE + 1  # one works on its results meanwhile

    def __init__(
        self,
        weights: str,
        folder: Path,
        options: EngineOptions,
        text_onnx: Path | None = None,
        cuda_graphs: bool = True,
    ):
        if not gpu_count():
            raise UserError("no GPU is there, or its driver does not answer: choose --backend onnxruntime or torch")
        trt = import_tensorrt()
        precision, matmul = options.precision, options.matmul or DEFAULT_MATMUL[options.precision]
        self.use_graphs = cuda_graphs
        digest, metadata = checked_image(folder, weights)
        recipe = Recipe(
            folder, metadata["image_config"], precision, matmul, options.optimization_level, batch=options.batch
        )
        self.image_size: int = recipe.config["image_size"]
        self.text_session = self.text_encoder = None
        if text_onnx:
            from lseg.run_onnxruntime import TextSession

            self.text_session = TextSession(text_onnx, recipe.config["embedding"])
        else:
            text_metadata = checked_text(folder, weights, digest, metadata)
            self.text_encoder = f"{text_metadata['weights_sha256']} {recipe.text_precision}".removesuffix(" fp32")
        self.device = Device()
        self.identity = Identity(f"TensorRT {trt.__version__}", self.device.name, precision, matmul)
        self._lock = threading.RLock()
        self._graphs: dict[tuple[int, int, int, bool], Graph] = {}
        try:
            with self.device:
                self.stages = Stages(self.device, recipe, options.folder, options.say, self.forget_graphs)
                try:
                    self._slots = Slots(self.stages)
                except BaseException:
                    self.stages.close()
                    raise
        except BaseException:
            self.device.close()
            raise

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        if self.text_session:
            return self.text_session(tokens)
        with self._lock, self.device:
            groups = (tokens[start : start + LABELS_A_PASS] for start in range(0, len(tokens), LABELS_A_PASS))
            return np.concatenate([self.stages.text(group) for group in groups])

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        with self._lock, self.device:
            buffer, shape = self._embed(pixels)
            return to_float32(buffer.read(self.stages.stream, int(np.prod(shape)))).reshape(shape)

    def features_at(self, pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
        self._check(pixels)
        if len(pixels) > 1:
            raise UserError(f"{len(pixels)} images are more than the one whose pixels are picked: give one")
        if len(places) and not (0 <= places.min() and places.max() < self.image_size):
            raise UserError(f"places from {places.min()} to {places.max()} do not fit: give 0 to {self.image_size - 1}")
        stages, dimension = self.stages, self.stages.dimension
        result = np.empty((len(places), dimension), np.float16)
        with self._lock, self.device:
            source = stages.buffer("pixels", pixels.size, np.uint8, host=True)
            where = stages.buffer("places", 2 * PLACES, np.int32, host=True)
            found = stages.buffer("picked", PLACES * dimension, np.float16, host=True)
            source.write(stages.stream, pixels)
            self._encode(source, slice(0, 1))
            for start in range(0, len(places), PLACES):
                part = places[start : start + PLACES]
                where.write(stages.stream, part)
                stages.pick(where.address, len(part), found.address)
                found.download(stages.stream, len(part) * dimension)
                stages.stream.synchronize()
                result[start : start + PLACES] = found.host[: len(part) * dimension].reshape(-1, dimension)
            stages.stream.synchronize()
        return result

    def embed(self, pixels: np.ndarray) -> DeviceArray:
        if self.stages.dtype == np.uint16:
            raise UserError("bfloat16 embeddings are not handed out: choose --precision fp16")
        with self._lock, self.device:
            buffer, shape = self._embed(pixels)
            return DeviceArray(buffer.address, shape, buffer.dtype, self)

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        self._check(pixels)
        self._check_text(text)
        timings = Timings()
        # The scores are part of the work on the GPU: their time counts to encode_image.
        with self._slots.take() as slot, self.device:
            work = self._segment if len(text) <= LABELS_A_PASS else self._segment_in_passes
            labels, cosines = work(slot, pixels, text, best, timings)
        timings.milliseconds.update({"preprocess": 0.0, "similarity": 0.0})
        return Segmentation(labels, cosines, timings)

    def label_windows(
        self, photo: np.ndarray, text: np.ndarray, how: Inference, best: bool, timings: Timings
    ) -> tuple[np.ndarray, np.ndarray | None]:
        self._check_text(text)
        with self._lock, self.device:
            return label_windows(self.stages, photo, text, how, best, timings)

    def scores(self, images: np.ndarray, text: np.ndarray) -> np.ndarray:
        size, stages = self.image_size, self.stages
        self._check_text(text)
        if images.shape[1:] != (3, size, size):
            raise UserError(f"images of shape {list(images.shape)} do not fit: give float32 [B, 3, {size}, {size}]")
        result = np.empty((len(images), len(text), size, size), np.float32)
        with self._slots.take() as slot, self._lock, self.device:
            covered = (stages.whole_shares, stages.whole_shares)
            scores = stages.buffer("scores", min(len(text), LABELS_A_PASS) * size**2)
            for index, image in enumerate(images):
                stages.load(image[None])
                stages.encode(1)
                for start in range(0, len(text), LABELS_A_PASS):
                    group = text[start : start + LABELS_A_PASS]
                    address = slot.upload_text(group)
                    scores.zero(stages.stream, len(group) * size**2)
                    stages.add_scores(
                        1, address, len(group), stages.whole_places, covered, (size, size), scores.address
                    )
                    found = result[index, start : start + len(group)]
                    found[...] = scores.read(stages.stream, found.size).reshape(found.shape)
        return result

    def forget_graphs(self) -> None:
        """Captured graphs hold addresses: they go when a buffer moves."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _check(self, pixels: np.ndarray) -> None:
        size = self.image_size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
            raise UserError(f"images of shape {list(pixels.shape)} do not fit: give uint8 [B, {size}, {size}, 3]")
        if len(pixels) == 0:
            raise UserError("no image is given: give at least one")
        if len(pixels) > MAX_BATCH:
            raise UserError(f"{len(pixels)} images are more than the {MAX_BATCH} that one call takes: split the batch")

    def _check_text(self, text: np.ndarray) -> None:
        dimension = self.stages.dimension
        if len(text) == 0 or text.shape[1:] != (dimension,):
            raise UserError(
                f"texts of shape {list(text.shape)} do not fit: give float32 [N, {dimension}], N at least 1"
            )

    def _encode(self, pixels: Buffer, part: slice) -> int:
        """Encodes some of the photos in a buffer, and returns how many."""
        side, batch = self.image_size, part.stop - part.start
        address = pixels.address + part.start * 3 * side**2
        self.stages.cut(address, (side, side), (side, side), self.stages.whole_places, batch)
        self.stages.encode(batch)
        return batch

    def _embed(self, pixels: np.ndarray) -> tuple[Buffer, tuple[int, ...]]:
        """Unit embeddings of at most eight images in a buffer on the GPU, complete, and their shape."""
        self._check(pixels)
        stages = self.stages
        each = stages.dimension * stages.wide**2
        result = stages.buffer("embeddings", len(pixels) * each, stages.dtype)
        source = stages.buffer("pixels", pixels.size, np.uint8, host=True)
        source.write(stages.stream, pixels)
        for part in stages.batches(len(pixels)):
            batch = self._encode(source, part)
            stages.embeddings(batch, result.address + part.start * each * stages.dtype.itemsize)
        stages.stream.synchronize()
        return result, (len(pixels), stages.dimension, stages.wide, stages.wide)

    def _segment(
        self, slot: Slot, pixels: np.ndarray, text: np.ndarray, best: bool, timings: Timings
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Up to 256 labels, one copy in, one copy out: uint8 [B, S, S]; cosines where they are asked for."""
        stages, shape = self.stages, pixels.shape[:3]
        count = int(np.prod(shape))
        with self._lock:
            source = slot.buffer("pixels", pixels.size, np.uint8)
            labels = slot.buffer("labels", count, np.uint8)
            cosines = slot.buffer("best", count, np.float32)
        timings.measure("encode_image", lambda: np.copyto(source.host[: pixels.size], pixels.reshape(-1)))
        with self._lock:
            address = slot.upload_text(text)

            def work() -> None:
                source.upload(stages.stream, pixels.size)
                for part in stages.batches(len(pixels)):
                    batch, at = self._encode(source, part), part.start * self.image_size**2
                    stages.label(batch, address, len(text), labels.address + at, cosines.address + 4 * at)
                labels.download(stages.stream, count)
                if best:
                    cosines.download(stages.stream, count)

            start = time.perf_counter()
            slot.begun.record(stages.stream)
            self._launch((slot.index, len(pixels), len(text), best), work, slot)
        # Others may enqueue their work while this call waits for its own, and copies.
        timings.milliseconds["encode_image"] += slot.wait(start)
        read = [labels, cosines] if best else [labels]
        found = timings.measure("encode_image", lambda: [each.host[:count].reshape(shape).copy() for each in read])
        return found[0], found[1] if best else None

    def _launch(self, key: tuple[int, int, int, bool], work: Callable[[], None], slot: Slot) -> None:
        """Enqueues the work of a slot and the event of its end; from its second time on as a captured graph."""
        stages = self.stages
        if key in self._graphs:
            self._graphs[key].launch()
            slot.done.record(stages.stream)
            return
        work()  # the first run of a shape allocates, which a capture forbids
        slot.done.record(stages.stream)
        if not self.use_graphs:
            return
        stages.stream.synchronize()
        while len(self._graphs) >= GRAPHS:
            self._graphs.pop(next(iter(self._graphs))).close()
        try:
            self._graphs[key] = Graph(stages.stream, work)
        except (RuntimeError, UserError, self.device.driver.Error):
            pass  # others' work in the context can forbid it; what is wanted has run already

    def _segment_in_passes(
        self, slot: Slot, pixels: np.ndarray, text: np.ndarray, best: bool, timings: Timings
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Any number of labels: z stays, groups of labels keep a running maximum; int32 [B, S, S]."""
        stages, shape = self.stages, pixels.shape[:3]
        count = int(np.prod(shape))

        def work() -> list[np.ndarray]:
            source = stages.buffer("pixels", pixels.size, np.uint8, host=True)
            labels, cosines = stages.buffer("many_labels", count, np.int32), stages.buffer("best", count)
            source.write(stages.stream, pixels)
            for part in stages.batches(len(pixels)):
                batch, at = self._encode(source, part), 4 * part.start * self.image_size**2
                for start in range(0, len(text), LABELS_A_PASS):
                    group = text[start : start + LABELS_A_PASS]
                    stages.stream.synchronize()  # the host's copy of the last group is still being read
                    address = slot.upload_text(group)
                    stages.label(batch, address, len(group), labels.address + at, cosines.address + at, offset=start)
            read = [labels, cosines] if best else [labels]
            return [each.read(stages.stream, count).reshape(shape) for each in read]

        with self._lock:
            found = timings.measure("encode_image", work)
        return found[0], found[1] if best else None

    @property
    def build_seconds(self) -> float:
        """How long the engines in use took to build, whenever that was."""
        return self.stages.build_seconds

    def close(self) -> None:
        with self._slots.all() as slots, self._lock:
            if self.device.closed:
                return
            with self.device:
                with suppress(self.device.driver.Error):  # a GPU that failed is closed as well
                    self.stages.stream.synchronize()  # a call that failed may have left work behind
                self.forget_graphs()
                for slot in slots:
                    slot.close()
                self.stages.close()
            self.device.close()

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
