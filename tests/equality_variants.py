"""What equality.py holds against the reference: the machine's variants, graphs of each form, and the stand-in GPU."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from equality_cases import BATCHES

from lseg.onnx_file import IMAGE_ONNX, read_metadata
from lseg.recipes import LABELS_A_PASS, Recipe
from lseg.runner import EngineOptions, Runner, Segmentation, Timings
from lseg.variants import EVERY, REFERENCE, open_variant, variants_here

FORMS = (("fp32", "4d"), ("fp32", "3d"), ("fp32", "2d"), ("fp16", "4d"), ("fp16", "2d"))
HALF_SUMS = "half-sums"  # PyTorch's float16 with sums in float16: see half_sums.py
SCORES = 1024  # images times labels a run of a graph: 1 MB each
Open = Callable[[], contextlib.AbstractContextManager[Runner]]


def world(args: argparse.Namespace) -> dict[str, tuple[str, Open]]:
    """Of each variant of this machine its precision, and what opens it."""
    found, here = {}, {variant.name: variant for variant in variants_here()}
    if "torch-fp16" in args.variants.split(",") and REFERENCE in here:  # on a CPU for its rounding, not its speed
        here["torch-fp16"] = next(variant for variant in EVERY if variant.name == "torch-fp16")
    for layers in ("all", "patches", "others"):
        name = HALF_SUMS if layers == "all" else f"{HALF_SUMS}-{layers}"
        if name not in args.variants.split(",") or REFERENCE not in here:
            continue

        @contextlib.contextmanager
        def with_half_sums(layers: str = layers) -> Iterator[Runner]:
            from half_sums import half_sums

            half = replace(next(variant for variant in EVERY if variant.name == "torch-fp16"), compiled=False)
            with open_variant(half, args.weights, args.onnx, args.engines) as runner, half_sums(layers):
                yield runner

        found[name] = (HALF_SUMS, with_half_sums)
    for variant in here.values():
        variant = replace(variant, compiled=False)  # to compile for each pair of shapes takes a minute
        opener = lambda variant=variant: open_variant(variant, args.weights, args.onnx, args.engines)  # noqa: E731
        found[variant.name] = (variant.precision, opener)
    for precision, matmul in FORMS:
        opener = lambda p=precision, m=matmul: contextlib.closing(GraphRunner(args.onnx, p, m))  # noqa: E731
        found[f"graph-{precision}-{matmul}"] = (precision, opener)
    return found


class GraphRunner:
    """What TensorRT's engines and `--label-map` files are made of, run by ONNX Runtime: whole photos only."""

    def __init__(self, folder: Path, precision: str, matmul: str):
        import onnxruntime

        recipe = Recipe(folder, read_metadata(folder / IMAGE_ONNX)["image_config"], precision, matmul)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # or each number of labels and images takes memory for good
        options.intra_op_num_threads = int(os.environ.get("LSEG_THREADS", 0))
        self.image, self.text = (
            onnxruntime.InferenceSession(recipe.prepare(name).SerializeToString(), options, ["CPUExecutionProvider"])
            for name in ("labels", "text")
        )
        self.image_size = recipe.config["image_size"]
        self.batch = 1 if matmul == "2d" else max(BATCHES)
        self.identity = f"ONNX Runtime {onnxruntime.__version__} (CPU), {precision}, {matmul} MatMuls"

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [self.text.run(None, {"tokens": tokens[i : i + 50]})[0] for i in range(0, len(tokens), 50)]
        )

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        parts = [self._label(pixels[i : i + self.batch], text) for i in range(0, len(pixels), self.batch)]
        labels, cosines = (np.concatenate(values) for values in zip(*parts, strict=True))
        return Segmentation(labels, cosines, Timings())

    def _label(self, pixels: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        step = min(LABELS_A_PASS, SCORES // len(pixels))
        labels, best = 0, np.float32(-2)  # below every cosine
        for start in range(0, len(text), step):
            inputs = {"pixels": pixels, "text": text[start : start + step]}
            more, cosines = self.image.run(["labels", "best"], inputs)
            labels = np.where(cosines > best, more.astype(np.int32) + start, labels)
            best = np.maximum(best, cosines)
        return labels, best

    def close(self) -> None:
        self.image = self.text = None


@contextlib.contextmanager
def stand_in_world(seed: int, names: list[str]) -> Iterator[tuple[str, Path, dict[str, tuple[str, Open]]]]:
    """Tiny random weights, exported, and the TensorRT runner on the stand-in GPU for the named variants."""
    import pytest
    from checkpoints import write_tiny
    from conftest import export_all

    from tests.gpu_stand_in import compile_kernels, stand_in

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        try:
            library = compile_kernels(folder)
        except pytest.skip.Exception as reason:
            print(f"the stand-in GPU is left out: {reason}", flush=True)
            yield "", folder, {}
            return
        weights = write_tiny(folder / "tiny.safetensors", seed).path
        exported = export_all(str(weights), folder / "onnx")
        stand_in(patch, library)
        openers = {}
        for variant in names:
            _, precision, matmul = variant.split("-")

            def opener(precision: str = precision, matmul: str = matmul) -> Runner:
                from lseg.run_tensorrt import TensorRTRunner

                return TensorRTRunner(*exported, EngineOptions(folder, precision, matmul))

            openers[variant] = (precision, opener)
        yield exported.weights, exported.folder, openers
