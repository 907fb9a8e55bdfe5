"""LSeg for programs: photos and words in, label maps or pixel embeddings out, on whatever the machine has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lseg.errors import UserError
from lseg.features import Features
from lseg.image import read_image, to_pixels
from lseg.inference import label_photos
from lseg.labels import parse_labels
from lseg.opening import ROOT, Model, open_backend
from lseg.picking import features_of_points, features_of_stride
from lseg.recipes import MAX_BATCH
from lseg.runner import EngineOptions, Runner
from lseg.text_cache import FILE, TextCache
from lseg.tokenizer import Tokenizer
from lseg.vocabulary import embed_texts, load_templates

KEPT = 64  # lists of words whose embeddings stay in memory


class LabelMap(NamedTuple):
    """A photo's labels at its own size."""

    labels: np.ndarray  # integers [H, W], indices of the words
    cosines: np.ndarray  # float32 [H, W], of each pixel with its word


class Segmenter:
    """LSeg with one backend open. Use as a context manager, or close it; threads may share one.

        from lseg import Segmenter

        with Segmenter() as lseg:
            found = lseg.segment("street.jpg", ["car", "road", "sky", "other"])
            vectors = lseg.features("street.jpg").at([(320, 240)])

    Words' embeddings are kept, in memory and beside the exported files. What is missing of these is exported first.

    Args:
        weights: "demo", demo_e200.ckpt, or a state dict (.pt, .safetensors).
        backend: "auto" (TensorRT, ONNX Runtime, PyTorch: the first that the machine has), or one of them.
        onnx: folder of the exported files.
        engines: folder of TensorRT's engines.
        precision: of TensorRT: "fp32", "tf32", "fp16" or "bf16".
        matmul: TensorRT's form of attention's products: "4d", "3d" or "2d".
        text_onnx: another CLIP text encoder as ONNX.
        batch: photos that the network sees at once, 1 to 8. On TensorRT one engine is built for so many, and fewer take
            as long; by default there is one for single photos, and one for eight where there are as many.
        say: takes the lines that tell of exports and of engines that are built; none are told by default.

    Raises:
        UserError: what is missing or does not fit, in one sentence.
    """

    def __init__(
        self,
        weights: str = "demo",
        backend: str = "auto",
        *,
        onnx: str | Path = ROOT / "onnx",
        engines: str | Path = ROOT / "engines",
        precision: str = "fp16",
        matmul: str | None = None,
        text_onnx: str | Path | None = None,
        batch: int | None = None,
        say: Callable[[str], object] | None = None,
    ):
        model = Model(str(weights), Path(onnx), Path(text_onnx) if text_onnx else None, quiet=say is None)
        say = say or (lambda _: None)
        options = EngineOptions(Path(engines), precision, matmul, say=say, batch=batch)
        self._runner: Runner | None = open_backend(backend, model, options, say)
        self._batch = batch or MAX_BATCH
        self._cache = TextCache(Path(onnx) / FILE, self.runner.text_encoder)
        self._tokenize = Tokenizer()
        self._texts: dict[tuple[str, ...], np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def runner(self) -> Runner:
        """The open backend. UserError where it was closed."""
        if self._runner is None:
            raise UserError("the Segmenter was closed: open another")
        return self._runner

    def embed(self, words: Sequence[str], templates: str = "none") -> np.ndarray:
        """Words' unit embeddings, float32 [N, D].

        Args:
            words: N of them, each a word or a phrase.
            templates: prompts whose embeddings are averaged: "none", "clip", or a file with one a line.

        Raises:
            UserError: a word is too long for CLIP, or the templates cannot be read.
        """
        if isinstance(words, str):
            raise UserError(f"the words are one string: give a list, such as {list(parse_labels(words).names)!r}")
        words = tuple(words)
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{word!r} is no word: give strings that are not empty")
        if not words:
            raise UserError("no word is given: give at least one")
        key = (templates, *words)
        with self._lock:
            if key not in self._texts:
                while len(self._texts) >= KEPT:
                    del self._texts[next(iter(self._texts))]
                prompts, encode = load_templates(templates), self.runner.encode_text
                text = embed_texts(list(words), prompts, encode, self._cache, self._tokenize)
                text.setflags(write=False)  # it is kept, and handed out again
                self._texts[key] = text
            return self._texts[key]

    def segment(
        self, photo: str | Path | np.ndarray, words: Sequence[str] | np.ndarray, inference: str = "whole"
    ) -> LabelMap:
        """Each pixel's nearest word.

        Args:
            photo: a file, or uint8 [H, W, 3], RGB.
            words: N words, or their embeddings, float32 [N, D], unit length.
            inference: "whole", "window" or "multiscale": see the README.

        Raises:
            UserError: the photo cannot be read, or there is no such mode.
        """
        return self.segment_batch([photo], words, inference)[0]

    def segment_batch(
        self, photos: Sequence[str | Path | np.ndarray], words: Sequence[str] | np.ndarray, inference: str = "whole"
    ) -> list[LabelMap]:
        """`segment` of several photos, such as a robot's cameras at one moment: the network sees up to 8 at once.

        For a fixed number of cameras on TensorRT, open with `batch` set to it. Other backends take as many at once,
        which needs memory and, on a CPU, saves little time.

        Args:
            photos: any number of files, or uint8 [H, W, 3], RGB, each of its own size.

        Raises:
            UserError: a photo cannot be read, which gives up the others too, or there is no such mode.
        """
        if isinstance(photos, str | Path) or (isinstance(photos, np.ndarray) and photos.ndim == 3):
            raise UserError("the photos are one photo: give a list, or use segment")
        if not isinstance(photos, Sequence | np.ndarray):
            raise UserError(f"the photos are a {type(photos).__name__}: give a list")
        text = self._checked(words) if isinstance(words, np.ndarray) else self.embed(words)
        text = text.astype(np.float32, copy=False)
        found = []
        for start in range(0, len(photos), self._batch):
            pixels = [_one_of(photos, index) for index in range(start, min(start + self._batch, len(photos)))]
            found += [LabelMap(*each) for each in label_photos(self.runner, pixels, text, inference)]
        return found

    def features(self, photo: str | Path | np.ndarray) -> Features:
        """A photo's pixel embeddings, in host memory: see `lseg.features.Features` for what it gives.

        Args:
            photo: a file, or uint8 [H, W, 3], RGB.
        """
        pixels, height, width = self._squashed(photo)
        return Features(self.runner.encode_image(pixels)[0], self.runner.image_size, height, width)

    def features_at(self, photo: str | Path | np.ndarray, points: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        """`features(photo).at(points)`, apart from rounding, float16 [K, D]; on TensorRT only these are copied."""
        return features_of_points(self.runner, *self._squashed(photo), points)

    def features_strided(self, photo: str | Path | np.ndarray, stride: int) -> np.ndarray:
        """`features(photo).strided(stride)`, apart from rounding, float16 [rows, columns, D]; on TensorRT as above."""
        return features_of_stride(self.runner, *self._squashed(photo), stride)

    def _squashed(self, photo: str | Path | np.ndarray) -> tuple[np.ndarray, int, int]:
        """A photo as the network sees it, uint8 [1, S, S, 3], and its own height and width."""
        image = _pixels(photo)
        return to_pixels(image, self.runner.image_size)[None], *image.shape[:2]

    def features_on_device(self, photo: str | Path | np.ndarray) -> Any:
        """The same, [1, D, G, G], where the network left it: nothing is copied.

        It holds until the next call, which may overwrite or free it, and until `close`, which frees it: work on other
        streams must be done by then. Copy what is to stay.

        Returns:
            a PyTorch tensor, or an array that `torch.from_dlpack`, `cupy.asarray` and their like take; float32, or
            float16 from TensorRT in fp16.
        """
        return self.runner.embed(self._squashed(photo)[0])

    def _checked(self, text: np.ndarray) -> np.ndarray:
        dimension = self.embed(["other"]).shape[1]
        if text.ndim != 2 or len(text) == 0 or text.shape[1] != dimension:
            raise UserError(f"embeddings of shape {list(text.shape)} do not fit: give [N, {dimension}]")
        if not np.all(np.abs(np.linalg.norm(text.astype(np.float64), axis=1) - 1) < 1e-2):  # NaN is refused as well
            raise UserError("the embeddings are not of unit length: divide each by its length")
        return text

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _one_of(photos: Sequence[str | Path | np.ndarray], index: int) -> np.ndarray:
    """A photo's pixels; the error says which of several it was."""
    try:
        return _pixels(photos[index])
    except UserError as error:
        if len(photos) == 1:
            raise
        raise UserError(f"photo {index + 1} of {len(photos)}: {error}") from None


def _pixels(photo: str | Path | np.ndarray) -> np.ndarray:
    if isinstance(photo, str | Path):
        return read_image(photo)
    if not isinstance(photo, np.ndarray):  # None is what OpenCV reads from a camera that is gone
        raise UserError(f"a photo that is a {type(photo).__name__} does not fit: give a file, or uint8 [H, W, 3], RGB")
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or photo.size == 0:
        raise UserError(f"a photo of {photo.dtype} {list(photo.shape)} does not fit: give uint8 [H, W, 3], RGB")
    return photo
