"""PyTorch modules to ONNX files, each run and compared before it counts as written."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lseg import __version__
from lseg.errors import UserError
from lseg.files import unfinished
from lseg.onnx_file import data_files, write_onnx

OPSET = 17
BLOCK = 2**22  # numbers compared at a time
TOLERANCE = 1e-4  # largest ||a - b|| / ||b|| between ONNX Runtime and PyTorch, both float32


@dataclass(frozen=True)
class ExportSpec:
    """What an exported file computes: example inputs give names, types and shapes.

    `dynamic` names the free axes of inputs and outputs; `checks` holds further inputs to compare on; `bounds` holds the
    largest difference of outputs for which it is not `TOLERANCE`.
    """

    kind: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]
    metadata: dict[str, object] = field(default_factory=dict)
    checks: tuple[dict[str, Tensor], ...] = ()
    bounds: dict[str, float] = field(default_factory=dict)


class FullResolution(nn.Module):
    """The first port's output: embeddings times 1 / 0.07, upsampled to the image's size, float32 [B, D, 480, 480]."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        from lseg.model import LOGIT_SCALE, upsample

        return upsample(self.encoder(images) * LOGIT_SCALE)


def export_onnx(spec: ExportSpec, path: Path, opset: int = OPSET) -> dict[str, float]:
    """Exports `spec` to `path`, after comparing it with PyTorch in ONNX Runtime on its example and check inputs.

    Returns:
        The largest relative difference ||onnx - torch|| / ||torch|| of each float output; for an integer output the
        share of elements that differ.

    Raises:
        UserError: a difference passes its bound (nothing is written then), or the file cannot be written.
    """
    import onnx
    import onnxslim

    with working_folder(path) as folder, disk_errors(path):
        raw = folder / "raw.onnx"
        with quiet_exporter(), torch.no_grad():
            torch.onnx.export(
                spec.module,
                tuple(spec.inputs.values()),
                str(raw),
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_axes=spec.dynamic,
                opset_version=opset,
                dynamo=False,  # the newer exporter writes opset 18 and later, whose reductions take their axes as input
            )
        model = onnx.load(raw)
        with quiet_exporter():
            model = onnxslim.slim(model)  # folds the shape arithmetic that dynamic axes leave behind
        trial = write_onnx(model, folder / "trial.onnx", {})
        differences = compare(spec, trial)
        for name, difference in differences.items():
            bound = spec.bounds.get(name, TOLERANCE)
            if not difference <= bound:
                raise UserError(
                    f"{path} was not written: its output '{name}' is {difference:.1e} off PyTorch's, "
                    f"more than {bound:.0e}; try another --opset or report it"
                )
        metadata = {"kind": spec.kind, **spec.metadata, "opset": opset, "versions": versions()}
        write_onnx(onnx.load(trial), path, metadata)
    return differences


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Says that `path` cannot be written where the disk is full or refuses, whichever library met it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): free space or choose another"
        ) from error


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, gone afterwards; UserError where none can be made or its name is none."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path.parent}: its name is not valid UTF-8, which ONNX needs: choose another folder"
        ) from None
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(unfinished(path.parent))
        except OSError as error:
            raise UserError(f"{path.parent} cannot be written ({error.strerror}): choose another folder") from error
        yield folder


def compare(spec: ExportSpec, path: Path) -> dict[str, float]:
    """Largest difference of each output between the file in ONNX Runtime (CPU) and the module in PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst = dict.fromkeys(spec.outputs, 0.0)
    for inputs in (spec.inputs, *spec.checks):
        with torch.no_grad():
            expected = spec.module(*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        found = session.run(list(spec.outputs), {name: tensor.numpy() for name, tensor in inputs.items()})
        for name, a, b in zip(spec.outputs, found, expected, strict=True):
            worst[name] = max(worst[name], difference(a, b.numpy()))
    return worst


def export_and_report(spec: ExportSpec, path: Path, opset: int = OPSET, quiet: bool = False) -> None:
    """export_onnx, with a line before and a line after for the user."""
    say = (lambda _: None) if quiet else print
    say(f"exporting {path} ...")
    start = time.perf_counter()
    differences = export_onnx(spec, path, opset)
    shown = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    seconds = time.perf_counter() - start
    mib = sum(file.stat().st_size for file in (path, *data_files(path))) / 2**20
    say(f"wrote {path}: {mib:.1f} MiB in {seconds:.1f} s; largest difference from PyTorch: {shown}")


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b|| for floats, the share of unequal elements for integers.

    Infinite where the shapes differ or a number is not finite.
    """
    if a.shape != b.shape:
        return float("inf")
    if np.issubdtype(b.dtype, np.integer):
        return float(np.mean(a != b))
    error = length = 0.0
    a, b = a.ravel(), b.ravel()
    for start in range(0, a.size, BLOCK):  # in float64, which would double the memory of a whole output
        x, y = (values[start : start + BLOCK].astype(np.float64) for values in (a, b))
        error, length = error + float(np.sum((x - y) ** 2)), length + float(np.sum(y**2))
    if not math.isfinite(error) or not math.isfinite(length):
        return math.inf
    return math.sqrt(error / max(length, 1e-60))


def versions() -> dict[str, str]:
    import onnx

    return {"lseg": __version__, "torch": torch.__version__, "onnx": onnx.__version__}


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keeps the exporter's and the simplifier's notes on their own workings off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
