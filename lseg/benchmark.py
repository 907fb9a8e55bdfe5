"""Timing that can be believed: warmed up, interleaved, with its spread and what it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator

import numpy as np

PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "pycuda", "numpy")


def summarise(milliseconds: list[float]) -> dict[str, float]:
    """Median, p90 and p99 in milliseconds, the count, and the drift: last quarter's median over the first's."""
    values = np.asarray(milliseconds)
    quarter = max(1, len(values) // 4)
    return {
        "median": float(np.median(values)),
        "p90": float(np.percentile(values, 90)),
        "p99": float(np.percentile(values, 99)),
        "runs": len(values),
        "drift": float(np.median(values[-quarter:]) / np.median(values[:quarter])),
    }


def interleaved(
    candidates: dict[str, Callable[[], dict[str, float]]], warmup: int, runs: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Runs every candidate in turn, so that drift of the machine hits all alike.

    Each call returns milliseconds by stage and is synchronous. Yields (name, round, milliseconds), rounds below zero
    being warm-up; the wall time of the whole call is added as "total".
    """
    for turn in range(-warmup, runs):
        for name, call in candidates.items():
            start = time.perf_counter()
            stages = call()
            yield name, turn, {**stages, "total": (time.perf_counter() - start) * 1e3}


def machine() -> dict[str, object]:
    """What the figures were taken on: processor, threads, GPU, driver and library versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu_name(), "cores": cores, "gpu": gpu(), "python": platform.python_version(), "versions": versions}


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu() -> dict[str, str] | None:
    """Name, driver and clocks as nvidia-smi gives them; None where there is no GPU."""
    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))
