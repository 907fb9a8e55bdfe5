"""The ways to run LSeg that are measured side by side, and what each must hold to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lseg.cuda import gpu_count
from lseg.errors import UserError
from lseg.runner import EngineOptions, Runner, available_backends

REFERENCE = "torch"  # PyTorch in float32


@dataclass(frozen=True)
class Bound:
    """What a precision must keep to, against PyTorch in float32."""

    relative_difference: float  # ||a - b|| / ||b|| of the pixel embeddings, at most
    label_agreement: float  # percent of pixels, at least
    miou: float = 0.1  # points, at most, either way


BOUNDS = {
    "fp32": Bound(1e-4, 99.9),
    "tf32": Bound(1e-2, 99.5),
    "fp16": Bound(1e-2, 99.5),
    "bf16": Bound(5e-2, 98.0, miou=0.5),
}


@dataclass(frozen=True)
class Variant:
    """One way to run LSeg."""

    name: str
    backend: str
    precision: str = "fp32"
    matmul: str | None = None
    device: str | None = None
    compiled: bool = False

    @property
    def bound(self) -> Bound:
        return BOUNDS[self.precision]


TENSORRT = tuple(
    Variant(f"tensorrt-{precision}-{matmul}", "tensorrt", precision, matmul)
    for precision in ("fp16", "tf32", "fp32")
    for matmul in ("4d", "2d")
) + (Variant("tensorrt-bf16-4d", "tensorrt", "bf16", "4d"),)
EVERY = (
    Variant(REFERENCE, "torch"),
    Variant("torch-fp16", "torch", "fp16", compiled=True),
    Variant("onnxruntime-cuda", "onnxruntime"),
    Variant("onnxruntime", "onnxruntime", device="cpu"),
    *TENSORRT,
)


def variants_here() -> list[Variant]:
    """The variants that this machine can run."""
    backends, gpu = available_backends(), gpu_count() > 0
    here = [variant for variant in EVERY if variant.backend in backends]
    if not gpu:
        here = [variant for variant in here if variant.name != "torch-fp16"]
    if not _onnxruntime_has_cuda():
        here = [variant for variant in here if variant.name != "onnxruntime-cuda"]
    return here


def choose_variants(text: str) -> list[Variant]:
    """The variants that a list of names means: "all" of this machine, a backend's, or single ones, without repeats.

    Raises:
        UserError: a name means nothing, or nothing that this machine can run.
    """
    here = variants_here()
    chosen: dict[str, Variant] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        found = [variant for variant in here if name in ("all", variant.name)]
        found = found or [variant for variant in here if variant.backend == name]
        if not found:
            known = ", ".join(variant.name for variant in EVERY)
            if any(name in (variant.name, variant.backend) for variant in EVERY):
                raise UserError(f"this machine cannot run '{name}', only {', '.join(v.name for v in here)}")
            raise UserError(f"'{name}' is no backend: give 'all' or some of {known}")
        chosen |= {variant.name: variant for variant in found}
    if not chosen:
        raise UserError("no backend is named: give 'all' or some, separated by commas")
    return list(chosen.values())


def open_variant(
    variant: Variant,
    weights: str,
    onnx_folder: Path,
    engines: Path,
    say: Callable[[str], object] = print,
    batch: int | None = None,
) -> Runner:
    """Opens it; see `lseg.runner.open_runner` and `EngineOptions` for the arguments and errors."""
    if variant.backend == "torch":
        from lseg.run_torch import TorchRunner

        return TorchRunner(weights, precision=variant.precision, compiled=variant.compiled)
    if variant.backend == "onnxruntime":
        from lseg.run_onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner(weights, onnx_folder, device=variant.device)
    from lseg.run_tensorrt import TensorRTRunner

    options = EngineOptions(engines, variant.precision, variant.matmul, say=say, batch=batch)
    return TensorRTRunner(weights, onnx_folder, options)


def _onnxruntime_has_cuda() -> bool:
    if not importlib.util.find_spec("onnxruntime"):
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
