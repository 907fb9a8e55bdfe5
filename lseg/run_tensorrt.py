"""LSeg on TensorRT through PyCUDA: uint8 pixels in, labels out, everything between on the GPU."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np

from lseg.cuda import Buffer, Device, Graph, gpu_count
from lseg.device_array import DeviceArray
from lseg.engine import discard, engine_path, get_engine, import_tensorrt, provenance
from lseg.errors import UserError
from lseg.loaded_engine import Engine, EngineRefused, to_float32
from lseg.onnx_file import IMAGE_ONNX, TEXT_ONNX, check_text, check_weights, read_metadata, remedy_for
from lseg.recipes import LABELS_A_PASS, LABELS_IN_BATCH, MAX_BATCH, Recipe
from lseg.runner import EngineOptions, Identity, Segmentation, Timings
from lseg.tensorfile import sha256
from lseg.weights import resolve

# One 2-D product per head took 1.27 times as long as 4-D products on an H100 (TensorRT 8.6.0, float32, ViT-L/16).
DEFAULT_MATMUL = {"fp32": "4d", "tf32": "4d", "fp16": "4d", "bf16": "4d"}


class TensorRTRunner:
    """See `lseg.runner.Runner`. Threads may share one; their calls take turns.

    Args:
        weights: as `--weights`.
        folder: of the exported ONNX files.
        options: the engines' folder, precision ("fp32", "tf32", "fp16"), form of MatMul ("4d", "3d", "2d", or None for
            the precision's default), optimisation level, and where a line goes when an engine is built.
        text_onnx: another CLIP text encoder, run by ONNX Runtime.
        cuda_graphs: capture each pair of shapes once and launch it as a whole.

    Raises:
        UserError: no GPU, no TensorRT, no PyCUDA, or ONNX files that are missing or of other weights.
    """

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
        precision = options.precision
        self.matmul = options.matmul or DEFAULT_MATMUL[precision]
        self.engines, self.say, self.use_graphs = options.folder, options.say, cuda_graphs
        digest = sha256(resolve(weights))
        metadata = read_metadata(folder / IMAGE_ONNX)
        check_weights(folder / IMAGE_ONNX, metadata, "lseg", digest, remedy_for("lseg_export.py", weights, folder))
        self.config: dict = metadata["image_config"]
        self.image_size: int = self.config["image_size"]
        self.recipe = Recipe(folder, self.config, precision, self.matmul, options.optimization_level)
        self.side = 2 * self.recipe.side  # of the embeddings: 240
        self.text_session = self.text_encoder = None
        if text_onnx:
            from lseg.run_onnxruntime import TextSession

            self.text_session = TextSession(text_onnx, self.config["embedding"])
        else:
            remedy = remedy_for("clip_onnx_export.py", weights, folder)
            text_metadata = read_metadata(folder / TEXT_ONNX)
            check_text(folder / TEXT_ONNX, text_metadata, metadata, digest, remedy)
            self.text_encoder = f"{text_metadata['weights_sha256']} {self.recipe.text_precision}".removesuffix(" fp32")
        self.device = Device()
        self.identity = Identity(f"TensorRT {trt.__version__}", self.device.name, precision, self.matmul)
        self._lock = threading.RLock()
        self._loaded: dict[str, Engine] = {}
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._text: np.ndarray | None = None  # the texts that the labels engine's buffer holds
        with self.device:
            self.stream = self.device.driver.Stream()

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        if self.text_session:
            return self.text_session(tokens)
        parts = []
        with self._lock, self.device:
            engine = self._engine("text")
            for start in range(0, len(tokens), LABELS_A_PASS):
                rows = tokens[start : start + LABELS_A_PASS].astype(np.int32)
                context = engine.bind({"tokens": rows.shape})
                source, result = engine.buffers["tokens"], engine.buffers["text"]
                source.host[: rows.size] = rows.ravel()
                source.upload(self.stream, rows.size)
                engine.enqueue(context)
                size = len(rows) * self.config["embedding"]
                result.download(self.stream, size)
                self.stream.synchronize()
                parts.append(result.host[:size].reshape(len(rows), -1).copy())
        return np.concatenate(parts)

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self._check(pixels)
        parts = []
        with self._lock, self.device:
            for images in self._batches(pixels, 1):
                buffer, size = self._embed(images)
                found = np.empty(size, buffer.dtype)
                self.device.driver.memcpy_dtoh(found, buffer.address)
                side = self.side
                parts.append(to_float32(found).reshape(len(images), -1, side, side))
        return np.concatenate(parts)

    def embed(self, pixels: np.ndarray) -> DeviceArray:
        self._check(pixels)
        if len(self._batches(pixels, 1)) > 1:
            raise UserError("the 2-D form takes one image at a time: give one, or choose --matmul 4d")
        with self._lock, self.device:
            buffer, size = self._embed(pixels)
        if buffer.dtype == np.uint16:
            raise UserError("bfloat16 embeddings are not handed out: choose --precision fp16")
        side = self.side
        shape = (len(pixels), size // (len(pixels) * side * side), side, side)
        return DeviceArray(buffer.address, shape, buffer.dtype, self)

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        self._check(pixels)
        timings = Timings()
        with self._lock, self.device:
            work = self._segment if len(text) <= LABELS_A_PASS else self._segment_in_passes
            batches = self._batches(pixels, len(text))
            # The score is part of the engine: its time counts to encode_image.
            found = timings.measure("encode_image", lambda: [work(images, text, best) for images in batches])
        labels, cosines = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*found, strict=True))
        timings.milliseconds.update({"preprocess": 0.0, "similarity": 0.0})
        return Segmentation(labels, cosines if best else None, timings)

    def scores(self, images: np.ndarray, text: np.ndarray) -> np.ndarray:
        size = self.image_size
        result = np.empty((len(images), len(text), size, size), np.float32)
        with self._lock, self.device:
            engine = self._engine("scores")
            for index, image in enumerate(images):
                for start in range(0, len(text), LABELS_A_PASS):
                    group = text[start : start + LABELS_A_PASS]
                    context = engine.bind({"image": (1, *image.shape), "text": group.shape})
                    for name, values in (("image", image), ("text", group)):
                        engine.buffers[name].host[: values.size] = values.ravel()
                        engine.buffers[name].upload(self.stream, values.size)
                    engine.enqueue(context)
                    found = result[index, start : start + len(group)]
                    engine.buffers["scores"].download(self.stream, found.size)
                    self.stream.synchronize()
                    found[...] = engine.buffers["scores"].host[: found.size].reshape(found.shape)
        return result

    def _check(self, pixels: np.ndarray) -> None:
        size = self.image_size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
            raise UserError(f"images of shape {list(pixels.shape)} do not fit: give uint8 [B, {size}, {size}, 3]")
        if len(pixels) > MAX_BATCH:
            raise UserError(f"{len(pixels)} images are more than the {MAX_BATCH} that one call takes: split the batch")

    def _batches(self, pixels: np.ndarray, labels: int) -> list[np.ndarray]:
        """Images one by one where the 2-D form or many labels want it, else all at once."""
        single = self.matmul == "2d" or labels > LABELS_IN_BATCH
        return [pixels[i : i + 1] for i in range(len(pixels))] if single else [pixels]

    def _segment(self, pixels: np.ndarray, text: np.ndarray, best: bool) -> tuple[np.ndarray, np.ndarray]:
        """Up to 256 labels: one engine, one copy in, one copy out. uint8 [B, S, S]; cosines, empty if not asked for."""
        engine = self._engine("labels")
        if self._text is None or self._text.shape != text.shape or not np.array_equal(self._text, text):
            buffer = engine.buffers["text"]
            buffer.host[: text.size] = text.ravel()
            buffer.upload(self.stream, text.size)
            self._text = text.copy()
        source, result = engine.buffers["pixels"], engine.buffers["labels"]
        source.host[: pixels.size] = pixels.ravel()
        shape = (len(pixels), self.image_size, self.image_size)
        size = int(np.prod(shape))
        key = (len(pixels), len(text))

        def work() -> None:
            source.upload(self.stream, pixels.size)
            engine.enqueue(context)
            result.download(self.stream, size)

        if key in self._graphs:
            self._graphs[key].launch()
        else:
            context = engine.bind({"pixels": pixels.shape, "text": text.shape})
            work()  # the library's first run of a shape may allocate, which a capture forbids
            if self.use_graphs:
                self.stream.synchronize()
                while len(self._graphs) >= 16:
                    self._graphs.pop(next(iter(self._graphs))).close()
                self._graphs[key] = Graph(self.stream, work)
        cosines = self._download(engine.buffers["best"], shape, best)
        return result.host[:size].reshape(shape).copy(), cosines

    def _download(self, buffer: Buffer, shape: tuple[int, ...], wanted: bool) -> np.ndarray:
        """What a buffer holds on the GPU, or an empty array where it is not wanted. Waits for all work either way."""
        size = int(np.prod(shape)) if wanted else 0
        if size:
            buffer.download(self.stream, size)
        self.stream.synchronize()
        return buffer.host[:size].reshape(shape if wanted else (0,)).copy()

    def _segment_in_passes(self, pixels: np.ndarray, text: np.ndarray, best: bool) -> tuple[np.ndarray, np.ndarray]:
        """Any number of labels: embeddings stay on the GPU, groups of labels keep a running maximum; int32."""
        shape = (len(pixels), self.image_size, self.image_size)
        size = int(np.prod(shape))
        embeddings, _ = self._embed(pixels)
        engine = self._engine("pass")
        top, labels, offset = (engine.buffers[name] for name in ("best_before", "labels_before", "offset"))
        top.fill(self.stream, -2.0, size)  # below every cosine
        labels.fill(self.stream, 0.0, size)
        for start in range(0, len(text), LABELS_A_PASS):
            group = text[start : start + LABELS_A_PASS]
            side = self.side
            context = engine.bind(
                {
                    "embeddings": (len(pixels), self.config["embedding"], side, side),
                    "text": group.shape,
                    "offset": (1,),
                    "best_before": shape,
                    "labels_before": shape,
                }
            )
            context.set_tensor_address("embeddings", embeddings.address)
            self.stream.synchronize()  # the host's copies below are still being read
            engine.buffers["text"].host[: group.size] = group.ravel()
            engine.buffers["text"].upload(self.stream, group.size)
            offset.host[0] = start
            offset.upload(self.stream, 1)
            engine.enqueue(context)
            for name in ("best", "labels"):
                source, target = engine.buffers[name], engine.buffers[f"{name}_before"]
                self.device.driver.memcpy_dtod_async(target.address, source.address, size * 4, self.stream)
        cosines = self._download(top, shape, best)
        return self._download(labels, shape, True).astype(np.int32), cosines

    def _embed(self, pixels: np.ndarray) -> tuple[Buffer, int]:
        """Pixel embeddings in the engine's own buffer on the GPU, and how many numbers they are."""
        engine = self._engine("embeddings")
        context = engine.bind({"pixels": pixels.shape})
        source = engine.buffers["pixels"]
        source.host[: pixels.size] = pixels.ravel()
        source.upload(self.stream, pixels.size)
        engine.enqueue(context)
        self.stream.synchronize()
        return engine.buffers["embeddings"], len(pixels) * self.config["embedding"] * self.side**2

    def _engine(self, name: str) -> Engine:
        if name not in self._loaded:
            spec = self.recipe.spec(name)
            for attempt in (0, 1):
                serialized = get_engine(spec, lambda: self.recipe.prepare(name), self.engines, self.device, self.say)
                try:
                    self._loaded[name] = Engine(self.device, serialized, self.stream, self._shared(name))
                    break
                except EngineRefused as error:
                    if attempt:
                        raise UserError(f"TensorRT does not load the engine that it built ({error})") from error
                    self.say(f"the {name} engine does not load ({error}); it is built again")
                    discard(engine_path(self.engines, provenance(spec, self.device)))
        return self._loaded[name]

    def _shared(self, name: str) -> dict[str, Buffer]:
        """A pass reads the embeddings where the image engine wrote them."""
        return {"embeddings": self._engine("embeddings").buffers["embeddings"]} if name == "pass" else {}

    @property
    def build_seconds(self) -> float:
        """How long the engines in use took to build, whenever that was."""
        paths = [engine_path(self.engines, provenance(self.recipe.spec(name), self.device)) for name in self._loaded]
        return sum(json.loads(path.with_suffix(".json").read_text())["build_seconds"] for path in paths)

    def close(self) -> None:
        if self.device._context is None:
            return
        with self._lock, self.device:
            for graph in self._graphs.values():
                graph.close()
            for engine in reversed(self._loaded.values()):
                engine.close()
            self._graphs, self._loaded, self.stream = {}, {}, None
        self.device.close()

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
