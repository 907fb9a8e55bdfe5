"""Measures backends side by side: opens each, times them in turn, and holds them against PyTorch in float32."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lseg.accuracy import Expected, broken_bounds, measure_accuracy
from lseg.benchmark import gpu_memory_mib, interleaved, matrix_rate, one_line, segment_call, text_call, throughput
from lseg.dataset import Dataset
from lseg.errors import UserError
from lseg.flops import image_encoder_flops
from lseg.runner import Runner
from lseg.tokenizer import Tokenizer
from lseg.variants import EVERY, REFERENCE, Variant, open_variant


@dataclass(frozen=True)
class Plan:
    """What every backend is measured on."""

    weights: str
    random_weights: bool
    onnx: Path
    engines: Path
    config: dict  # the image encoder's sizes
    photos: list[np.ndarray]  # uint8 [S, S, 3] each
    cases: list[tuple[int, int]]  # images a call, and labels
    text_counts: tuple[int, ...]  # labels embedded at a time
    runs: int
    warmup: int
    batch: int | None = None  # of TensorRT's engines


class Bench:
    """Backends that are open, and a report's row for each. Use as a context manager.

    A backend that fails is reported with its error; the others go on, and none of its figures is kept.
    """

    def __init__(self, plan: Plan, variants: list[Variant]):
        self.plan, self.variants = plan, variants
        self.rows = {variant.name: empty_row(variant) for variant in variants}
        self.runners: dict[str, Runner] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open(self, time_first_calls: bool = True) -> None:
        """Opens every backend and, to be timed, runs each case once."""
        for variant in tqdm(self.variants, desc="opening", disable=None, leave=False):
            row, before = self.rows[variant.name], gpu_memory_mib()
            try:
                runner = self._open(variant)
                row |= {"library": runner.identity.library, "device": runner.identity.device}
                for batch, labels in self.plan.cases if time_first_calls else []:
                    start = time.perf_counter()
                    runner.segment(self._batch(batch), unit_vectors(labels, self.plan.config["embedding"]))
                    row["first_call_ms"] = row["first_call_ms"] or (time.perf_counter() - start) * 1e3
                row["build_seconds"] = getattr(runner, "build_seconds", None)
                if before is not None and runner.identity.device != "CPU":
                    taken = gpu_memory_mib() - before
                    row["device_memory_mib"] = taken if taken > 0 else None  # an earlier one may have given some back
            except Exception as error:  # its failure is a result
                row["error"] = str(error) if isinstance(error, UserError) else one_line(error)
                continue
            self.runners[variant.name] = runner

    def measure_speed(self) -> dict[str, dict]:
        """Times texts and cases; returns each precision's rate of a large matrix product."""
        precisions = dict.fromkeys(variant.precision for variant in self.variants)
        rates = {name: rate for name in precisions if (rate := matrix_rate(name))}
        flops = image_encoder_flops(self.plan.config)
        tokens = Tokenizer()([f"thing number {index}" for index in range(max(self.plan.text_counts))])
        for count in self.plan.text_counts:
            calls = {name: text_call(runner, tokens[:count]) for name, runner in self.runners.items()}
            for name, stages in self._interleaved(f"{count} texts", calls).items():
                self.rows[name]["encode_text"][str(count)] = stages["encode_text"]
        for batch, labels in self.plan.cases:
            text = unit_vectors(labels, self.plan.config["embedding"])
            calls = {name: segment_call(runner, self._batch(batch), text) for name, runner in self.runners.items()}
            for name, stages in self._interleaved(f"batch {batch}, {labels} labels", calls).items():
                tflops = flops * batch / stages["encode_image"]["median"] / 1e9
                case = {"batch": batch, "labels": labels, "stages": stages, "tflops": tflops}
                self.rows[name]["speed"].append(case)
            for name, runner in list(self.runners.items()):
                try:
                    found = throughput(runner, self._batch(batch), text, self.plan.runs)
                except Exception as error:  # its failure is a result
                    self._drop(name, one_line(error))
                else:
                    self.rows[name]["speed"][-1]["throughput"] = found
        return rates

    def measure_accuracy(
        self, tokens: np.ndarray, dataset: Dataset | None, mode: str, expected: Expected | None
    ) -> Expected | None:
        """Compares every backend with the reference, which runs first unless `expected` brings it.

        Args:
            tokens: int32 [N, 77], the labels.
            dataset: with those labels, or None.
            mode: of `lseg.inference`, for the data set.
            expected: what the reference gave elsewhere.

        Returns:
            what the reference gave; None where there is neither `expected` nor torch.
        """
        photos = self.plan.photos
        if expected is None:
            if not importlib.util.find_spec("torch"):
                return None
            try:
                runner = self.runners.get(REFERENCE) or self._open(EVERY[0])
                found = measure_accuracy(runner, tokens, photos, dataset, mode, None, bar("reference"))
            except UserError:
                raise  # the data set's fault, or that of the weights
            except Exception as error:
                if REFERENCE in self.runners:
                    self._drop(REFERENCE, one_line(error))
                return None
            figures, expected = found
            if REFERENCE in self.runners:
                self.rows[REFERENCE]["accuracy"] = figures
        for variant in self.variants:
            name = variant.name
            if name not in self.runners or self.rows[name]["accuracy"]:
                continue
            try:
                runner = self.runners[name]
                figures, _ = measure_accuracy(runner, tokens, photos, dataset, mode, expected, bar(name))
            except UserError:
                raise  # the data set's fault
            except Exception as error:
                self._drop(name, one_line(error))
                continue
            self.rows[name]["accuracy"] = figures
            self.rows[name]["broken"] = broken_bounds(figures, variant.bound, self.plan.random_weights)
        return expected

    def _open(self, variant: Variant) -> Runner:
        plan = self.plan
        return self._stack.enter_context(open_variant(variant, plan.weights, plan.onnx, plan.engines, batch=plan.batch))

    def _interleaved(self, title: str, calls: dict[str, Callable]) -> dict[str, dict]:
        found, errors = interleaved(calls, self.plan.warmup, self.plan.runs, bar(title))
        for name, error in errors.items():
            self._drop(name, error)
        return found

    def _drop(self, name: str, error: str) -> None:
        lost = ("first_call_ms", "build_seconds", "device_memory_mib", "accuracy")
        self.rows[name] |= {"error": error, "speed": [], "encode_text": {}, **dict.fromkeys(lost)}
        del self.runners[name]

    def _batch(self, count: int) -> np.ndarray:
        """uint8 [count, S, S, 3]: the photos, shifted so that no two are the same; noise where there is no photo."""
        size = self.plan.config["image_size"]
        photos = self.plan.photos or [np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)]
        return np.stack([np.roll(photos[i % len(photos)], 16 * i, axis=1) for i in range(count)])


def empty_row(variant: Variant) -> dict:
    """A report's row before anything is measured."""
    return {
        "variant": variant.name,
        "library": None,
        "device": None,
        "precision": variant.precision,
        "matmul": variant.matmul,
        "error": None,
        "first_call_ms": None,
        "build_seconds": None,
        "device_memory_mib": None,
        "encode_text": {},
        "speed": [],
        "accuracy": None,
        "broken": [],
    }


def unit_vectors(count: int, dimension: int) -> np.ndarray:
    """Random texts float32 [count, D]: scoring takes its time whatever the words are."""
    vectors = np.random.default_rng(count).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def bar(title: str) -> Callable:
    """Wraps steps in a progress bar, on a terminal."""
    return lambda steps: tqdm(steps, desc=title, disable=None, leave=False)
