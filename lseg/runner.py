"""What every backend offers: the same arrays in, the same results and timing fields out."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from lseg.errors import UserError
from lseg.image import normalise
from lseg.recipes import check_batch

if TYPE_CHECKING:
    from lseg.windows import Inference

# Labels scored in one pass of a batch of one. The scores at 240 x 240 and at 480 x 480 take 1.15 MB a label: a pass
# stays under 150 MB, whatever the number of labels.
LABELS_A_PASS = 128
TEXTS_A_RUN = 64  # texts encoded at once: CLIP's text encoder takes 1.5 MB for each
STAGES = ("decode", "preprocess", "encode_text", "encode_image", "similarity", "draw")

T = TypeVar("T")


@dataclass
class Timings:
    """Milliseconds of each stage, added up over calls. A stage ends when its device is done."""

    milliseconds: dict[str, float] = field(default_factory=dict)

    def measure(self, stage: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + (time.perf_counter() - start) * 1e3
        return result

    def add(self, other: Timings) -> None:
        for stage, value in other.milliseconds.items():
            self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + value


@dataclass(frozen=True)
class Segmentation:
    """A batch's label maps: labels [B, S, S], indices of the texts; int32, or uint8 where one graph does it all.

    `best` holds their cosines, float32 [B, S, S], where they were asked for; some backends give them always.
    """

    labels: np.ndarray
    best: np.ndarray | None
    timings: Timings


@dataclass(frozen=True)
class Identity:
    """What runs: the library with its version, the device it runs on, and the arithmetic."""

    library: str  # "ONNX Runtime 1.31.1"
    device: str  # "CPU" or the GPU's name
    precision: str = "fp32"  # "fp32", "tf32", "fp16", "bf16"
    matmul: str | None = None  # TensorRT's form of attention's products: "4d", "3d" or "2d"

    def __str__(self) -> str:
        form = f", {self.matmul} MatMuls" if self.matmul else ""
        return f"{self.library} ({self.device}), {self.precision}{form}"


class Runner(Protocol):
    """One backend with LSeg loaded. Use as a context manager, or close it.

    Attributes:
        identity: the library, device and arithmetic; as a string for the user.
        image_size: S, the side of the network's square input.
        text_encoder: tells text encoders apart, for keeping their embeddings; None where they must not be kept.
        features_at: a photo uint8 [1, S, S, 3], RGB, and pixels of the network's input, integers [K, 2] (rows and
            columns below S), to their embeddings alone, float16 [K, D], unit length: see `lseg.picking`. None where the
            whole map is brought to the host first.
        callers: threads that it takes to keep it busy: several, where one waits for a GPU while others go on.
    """

    identity: Identity
    image_size: int
    text_encoder: str | None
    callers: int
    features_at: Callable[[np.ndarray, np.ndarray], np.ndarray] | None

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        """tokens int32 [N, 77] to unit vectors float32 [N, D]."""
        ...

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        """pixels uint8 [B, S, S, 3], RGB, to unit pixel embeddings float32 [B, D, S / 2, S / 2]."""
        ...

    def embed(self, pixels: np.ndarray) -> Any:
        """`encode_image` without a copy: an array that DLPack takes, float32 or float16, where the network left it.

        It holds until this runner's next call, which may overwrite or free it, and until `close`, which frees it.
        """
        ...

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        """pixels uint8 [B, S, S, 3], RGB, and texts float32 [N, D] to label maps; with `best` their cosines too."""
        ...

    def scores(self, images: np.ndarray, text: np.ndarray) -> np.ndarray:
        """images float32 [B, 3, S, S], normalised, and texts float32 [N, D] to cosines float32 [B, N, S, S]."""
        ...

    def label_windows(
        self, photo: np.ndarray, text: np.ndarray, how: Inference, best: bool, timings: Timings
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A photo uint8 [H, W, 3] in windows: labels int32 [H, W]; with `best` the sums of their cosines, float32.

        The sums are over `how`'s scales and directions. Each stage's milliseconds are added to `timings`.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def merge_passes(
    text: np.ndarray, batch: int, score: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores any number of labels in passes of bounded memory, keeping a running maximum.

    Args:
        text: float32 [N, D].
        batch: B, images scored at once.
        score: texts [n, D] to (labels int32 [B, S, S], best float32 [B, S, S]) among those n.

    Returns:
        labels and best over all N; of equal texts, and of equal scores, the first wins, as in a single pass.
    """
    # A product's columns are not all rounded alike, so equal texts could win by turns: each is scored once.
    firsts: dict[bytes, int] = {}
    for index, row in enumerate(text):
        firsts.setdefault(row.tobytes(), index)
    if len(firsts) < len(text):
        kept = np.array(list(firsts.values()), np.int32)
        labels, best = merge_passes(text[kept], batch, score)
        return kept[labels], best
    step = max(1, LABELS_A_PASS // batch)
    labels, best = score(text[:step])
    for start in range(step, len(text), step):
        more_labels, more_best = score(text[start : start + step])
        better = more_best > best
        labels = np.where(better, more_labels + np.int32(start), labels)
        best = np.where(better, more_best, best)
    return labels, best


E = TypeVar("E")


def segment_in_stages(
    pixels: np.ndarray,
    text: np.ndarray,
    embed: Callable[[np.ndarray], E],
    score: Callable[[E, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Segmentation:
    """`Runner.segment` for a backend whose image encoder and scoring are two calls.

    Args:
        pixels: uint8 [B, S, S, 3], RGB.
        text: float32 [N, D].
        embed: images float32 [B, 3, S, S] to the backend's own embeddings; returns when its device is done.
        score: those and texts [n, D] to (labels int32 [B, S, S], best float32 [B, S, S]).
    """
    timings = Timings()
    images = timings.measure("preprocess", lambda: normalise(pixels))
    embeddings = timings.measure("encode_image", lambda: embed(images))
    labels, best = timings.measure(
        "similarity", lambda: merge_passes(text, len(pixels), lambda part: score(embeddings, part))
    )
    return Segmentation(labels, best, timings)


BACKENDS = ("tensorrt", "onnxruntime", "torch")


def available_backends() -> list[str]:
    """Names of the backends that this machine can run, the preferred one first."""
    names = ["tensorrt"] if _has_tensorrt() else []
    return names + [name for name in ("onnxruntime", "torch") if importlib.util.find_spec(name)]


def _has_tensorrt() -> bool:
    """Whether TensorRT and PyCUDA are installed and the driver offers a GPU, found out without importing them."""
    from lseg.cuda import gpu_count

    specs = [importlib.util.find_spec(name) for name in ("tensorrt", "pycuda")]
    return all(spec is not None and spec.origin is not None for spec in specs) and gpu_count() > 0


def choose_backend(backend: str) -> str:
    """The backend that a name means: "auto" is the first available. Raises UserError where it is not installed."""
    available = available_backends()
    if backend == "auto":
        if not available:
            raise UserError("neither onnxruntime nor torch is installed: run './requirements.sh'")
        return available[0]
    if backend not in BACKENDS:
        raise UserError(f"there is no backend '{backend}': choose auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")
    # TensorRT's runner says itself what is missing: the library, PyCUDA, the driver or the GPU.
    if backend not in available and backend != "tensorrt":
        raise UserError(f"the backend '{backend}' is not installed: run './requirements.sh', or choose another")
    return backend


@dataclass(frozen=True)
class EngineOptions:
    """What only the TensorRT backend takes: see `lseg.run_tensorrt.TensorRTRunner`.

    Attributes:
        batch: images a run of the image encoder, for which one engine is built, 1 to 8; fewer take as long. None: an
            engine for eight where there are as many, and one for single images.
    """

    folder: Path = Path("engines")
    precision: str = "fp16"
    matmul: str | None = None
    optimization_level: int = 3
    say: Callable[[str], object] = print
    batch: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError where no engine is of so many images, also on a machine without what engines are for."""
        check_batch(self.batch, self.matmul)


def open_runner(
    backend: str,
    weights: str,
    onnx_folder: Path,
    text_onnx: Path | None = None,
    engines: EngineOptions | None = None,
) -> Runner:
    """Opens a backend.

    Args:
        backend: "auto" (the first available), "tensorrt", "onnxruntime" or "torch".
        weights: as `--weights`: "demo" or a path.
        onnx_folder: where the exported files are; the torch backend reads the checkpoint itself.
        text_onnx: another CLIP text encoder as ONNX, in place of the weights' own.
        engines: how TensorRT's engines are built and where they are kept.

    Raises:
        UserError: the backend is not installed, or its files are missing or do not belong to the weights.
    """
    chosen = choose_backend(backend)
    if chosen == "torch":
        from lseg.run_torch import TorchRunner

        return TorchRunner(weights, text_onnx)
    if chosen == "tensorrt":
        from lseg.run_tensorrt import TensorRTRunner

        return TensorRTRunner(weights, onnx_folder, engines or EngineOptions(), text_onnx)
    from lseg.run_onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(weights, onnx_folder, text_onnx)
