"""LSeg's steps on the GPU: TensorRT's engines and the kernels between them, enqueued on one stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from lseg.cuda import Buffer, Device
from lseg.engine import build_seconds, discard, engine_path, get_engine, provenance
from lseg.errors import UserError
from lseg.kernels import Kernels
from lseg.loaded_engine import Engine, EngineRefused
from lseg.recipes import IMAGE, LABELS_A_PASS, MAX_BATCH, Recipe

Z_TYPES = {"fp16": np.float16, "bf16": np.uint16}  # else float32


class Stages:
    """The engines, loaded when they are first needed, and the buffers that they work on, which grow with the need.

    Every step is enqueued on `stream` and waits for nothing, unless it loads an engine or a buffer grows.

    Args:
        device: current in this thread, also when the steps are called.
        recipe: of the engines.
        folder: where they are kept.
        say: takes the line that tells when one is built.
        moved: called before a buffer that grows is freed: what holds its address must forget it.
    """

    def __init__(
        self,
        device: Device,
        recipe: Recipe,
        folder: Path,
        say: Callable[[str], object],
        moved: Callable[[], object],
    ):
        self.device, self.recipe, self.folder, self._say, self._moved = device, recipe, folder, say, moved
        self.size: int = recipe.config["image_size"]
        self.dimension: int = recipe.config["embedding"]
        self.wide = 2 * recipe.side  # of the embeddings: 240
        self.dtype = np.dtype(Z_TYPES.get(recipe.precision, np.float32))
        self.stream = device.stream()
        self.kernels = Kernels(device, self.stream, self.dtype, self.dimension, recipe.side)
        self._engines: dict[str, Engine] = {}
        self._buffers: dict[str, Buffer] = {}
        places = np.zeros((MAX_BATCH, 4), np.int32)
        places[:, 0] = np.arange(MAX_BATCH)
        try:
            # Windows that are whole photos, one after the other, in which no pixel is covered twice.
            self.whole_places = self._constant("whole_places", places)
            self.whole_shares = self._constant("whole_shares", np.ones(self.size, np.float32))
        except BaseException:
            self.close()
            raise

    def batches(self, count: int) -> Iterator[slice]:
        """Images in the runs that the image encoder takes: as many full ones as there are, the largest first.

        The last may be less than full; by default it is not, as one image fills a run.
        """
        start = 0
        for batch in self.recipe.batches:
            while count - start >= batch:
                yield slice(start, start + batch)
                start += batch
        if start < count:
            yield slice(start, count)

    def image_engine(self, count: int) -> str:
        """The name of the engine that so many images, of one of the `batches`, go to."""
        return IMAGE[self._run(count)]

    def buffer(self, name: str, count: int, dtype: np.dtype | type = np.float32, host: bool = False) -> Buffer:
        """A buffer of at least `count` elements. One that is too small is replaced; what it held is lost."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < count:
            if buffer is not None:
                self.stream.synchronize()
                self._moved()
                self._buffers.pop(name).free()
            buffer = self._buffers[name] = Buffer(self.device, (count,), dtype, host)
        return buffer

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """tokens int32 [N, 77], N up to 256, to unit vectors float32 [N, D]. Waits for them."""
        engine = self.engine("text")
        source = self.buffer("tokens", LABELS_A_PASS * tokens.shape[1], np.int32, host=True)
        result = self.buffer("text_result", LABELS_A_PASS * self.dimension)
        source.write(self.stream, tokens.astype(np.int32))
        engine.enqueue(engine.bind({"tokens": tokens.shape}, {"tokens": source.address, "text": result.address}))
        return result.read(self.stream, len(tokens) * self.dimension).reshape(len(tokens), -1)

    def cut(self, photos: int, photo_size: tuple[int, int], size: tuple[int, int], places: int, batch: int) -> None:
        """Windows of photos (see `Kernels.cut_windows`) to the encoder's input."""
        images, shape = self._images(batch), (batch, 3, self.size, self.size)
        self.kernels.cut_windows(photos, photo_size, size, places, images.address, shape)

    def load(self, images: np.ndarray) -> None:
        """Normalised images, float32 [B, 3, S, S], to the encoder's input. The stream's work must be done."""
        self._images(len(images)).write(self.stream, images)

    def encode(self, batch: int) -> None:
        """The encoder's input to z and to one over the lengths of its embeddings.

        A run that is not full takes what lies behind its images for more of them.
        """
        images, z = self._images(batch), self._z(batch)
        engine = self.engine(self.image_engine(batch))
        shape = (self._run(batch), 3, self.size, self.size)
        engine.enqueue(engine.bind({"image": shape}, {"image": images.address, "z": z.address}))
        sums = self.buffer("sums", self.kernels.sums_size(batch))
        self.kernels.inverse_lengths(z.address, sums.address, self._inverse(batch).address, batch)

    def embeddings(self, batch: int, result: int) -> None:
        """z to unit embeddings [B, D, 2s, 2s] in its type, at an address."""
        self.kernels.embeddings(self._z(batch).address, self._inverse(batch).address, result, batch)

    def pick(self, places: int, count: int, result: int) -> None:
        """The first image's z to embeddings at places: see `Kernels.pick`."""
        self.kernels.pick(self._z(1).address, self._inverse(1).address, places, count, result)

    def dots(self, batch: int, text: int, texts: int) -> int:
        """z and texts float32 [N, D], N up to 256, at an address to their products, whose address is returned."""
        engine, side = self.engine("dots"), self.recipe.side
        run = self._run(batch)
        result = self.buffer("dots", run * LABELS_A_PASS * side**2, self.dtype)
        shapes = {"z": (run, self.dimension, side, side), "text": (texts, self.dimension)}
        addresses = {"z": self._z(batch).address, "text": text, "dots": result.address}
        engine.enqueue(engine.bind(shapes, addresses))
        return result.address

    def label(self, batch: int, text: int, texts: int, labels: int, best: int, offset: int | None = None) -> None:
        """z and texts to labels and cosines: see `Kernels.label`."""
        dots = self.dots(batch, text, texts)
        self.kernels.label(dots, self._inverse(batch).address, labels, best, batch, texts, offset)

    def add_scores(
        self,
        batch: int,
        text: int,
        texts: int,
        places: int,
        shares: tuple[int, int],
        size: tuple[int, int],
        scores: int,
    ) -> None:
        """z and texts to cosines, added to a map: see `Kernels.add_scores`."""
        dots = self.dots(batch, text, texts)
        inverse = self._inverse(batch).address
        self.kernels.add_scores(dots, inverse, texts, places, batch, shares, size, scores)

    def engine(self, name: str) -> Engine:
        """Loads an engine, or builds it.

        Raises:
            UserError: it cannot be built, or does not load.
        """
        if name not in self._engines:
            spec = self.recipe.spec(name)
            for attempt in (0, 1):
                serialized = get_engine(spec, lambda: self.recipe.prepare(name), self.folder, self.device, self._say)
                try:
                    self._engines[name] = Engine(serialized, self.stream)
                    break
                except EngineRefused as error:
                    if attempt:
                        raise UserError(f"TensorRT does not load the engine that it built ({error})") from error
                    self._say(f"the {name} engine does not load ({error}); it is built again")
                    discard(engine_path(self.folder, provenance(spec, self.device)))
        return self._engines[name]

    @property
    def build_seconds(self) -> float:
        """How long the engines in use took to build, whenever that was."""
        paths = [engine_path(self.folder, provenance(self.recipe.spec(name), self.device)) for name in self._engines]
        return sum(map(build_seconds, paths))

    def close(self) -> None:
        """Frees everything. The stream's work must be done."""
        for engine in self._engines.values():
            engine.close()
        for buffer in self._buffers.values():
            buffer.free()
        self._engines, self._buffers, self.kernels, self.stream = {}, {}, None, None

    def _constant(self, name: str, values: np.ndarray) -> int:
        """The address of values that never change."""
        buffer = self.buffer(name, values.size, values.dtype)
        buffer.put(self.stream, values)
        return buffer.address

    def _run(self, count: int) -> int:
        """The images of the smallest run that holds so many."""
        return min(batch for batch in self.recipe.batches if batch >= count)

    def _images(self, batch: int) -> Buffer:
        return self.buffer("images", self._run(batch) * 3 * self.size**2, host=True)

    def _z(self, batch: int) -> Buffer:
        return self.buffer("z", self._run(batch) * self.dimension * self.recipe.side**2, self.dtype)

    def _inverse(self, batch: int) -> Buffer:
        return self.buffer("inverse", batch * self.wide**2)
