"""Timing that can be believed: warmed up, synchronised, interleaved, with its spread and what it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lseg.runner import Runner, Timings

PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "pycuda", "numpy")
STATIONARY = 0.1  # the last quarter's median may differ from the first's by so much
Call = Callable[[], dict[str, float]]


def summarise(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median, p90 and p99 in milliseconds, the count, and the drift: last quarter's median over the first's."""
    values = np.asarray(milliseconds)
    quarter = max(1, len(values) // 4)
    first, last = np.median(values[:quarter]), np.median(values[-quarter:])
    return {
        "median": float(np.median(values)),
        "p90": float(np.percentile(values, 90)),
        "p99": float(np.percentile(values, 99)),
        "runs": len(values),
        "drift": float(last / first) if first else 1.0,  # a stage that another one does takes no time
    }


def is_stationary(summary: dict[str, float]) -> bool:
    """Whether the machine was as fast at the end as at the start."""
    return abs(summary["drift"] - 1) <= STATIONARY


def segment_call(runner: Runner, pixels: np.ndarray, text: np.ndarray) -> Call:
    """From host images to host label maps: milliseconds by stage, and "total", the wall time."""

    def call() -> dict[str, float]:
        start = time.perf_counter()
        stages = runner.segment(pixels, text).timings.milliseconds
        return {**stages, "total": (time.perf_counter() - start) * 1e3}

    return call


def text_call(runner: Runner, tokens: np.ndarray) -> Call:
    """From tokens to embeddings, both on the host: milliseconds of "encode_text"."""
    return timed_call("encode_text", lambda: runner.encode_text(tokens))


def timed_call(stage: str, work: Callable[[], object]) -> Call:
    """Any work, as one stage."""

    def call() -> dict[str, float]:
        timings = Timings()
        timings.measure(stage, work)
        return timings.milliseconds

    return call


def throughput(
    runner: Runner, pixels: np.ndarray, text: np.ndarray, calls: int, best: bool = False
) -> dict[str, float]:
    """Images a second from host to host, in calls by as many threads as keep the backend busy.

    Args:
        pixels, text, best: as of `lseg.runner.Runner.segment`; every call has the same.
        calls: that are timed; a few come before them.

    Returns:
        "images_a_second", and the numbers of "callers" and "calls".
    """
    callers = runner.callers
    # A lone caller stays in this thread: PyTorch's CUDA graphs are a thread's own.
    pool = ThreadPoolExecutor(callers) if callers > 1 else None

    def run(count: int) -> float:
        start = time.perf_counter()
        if pool:
            for done in [pool.submit(runner.segment, pixels, text, best) for _ in range(count)]:
                done.result()
        else:
            for _ in range(count):
                runner.segment(pixels, text, best)
        return time.perf_counter() - start

    try:
        run(4 * callers)
        seconds = run(calls)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return {"images_a_second": len(pixels) * calls / seconds, "callers": callers, "calls": calls}


def interleaved(
    calls: dict[str, Call], warmup: int, runs: int, progress: Callable[[Sequence], Iterator] = iter
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, str]]:
    """Runs every call in turn, so that drift of the machine hits all alike. A call that fails is left out from then on.

    Returns:
        by name, each stage's summary; by name, the error of a call that failed.
    """
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    errors: dict[str, str] = {}
    for turn in progress(range(warmup + runs)):
        for name, call in calls.items():
            if name in errors:
                continue
            try:
                stages = call()
            except Exception as error:  # one backend's failure is a result; the others go on
                errors[name] = one_line(error)
                continue
            if turn >= warmup:
                for stage, value in stages.items():
                    taken[name].setdefault(stage, []).append(value)
    summaries = {
        name: {stage: summarise(values) for stage, values in stages.items()}
        for name, stages in taken.items()
        if name not in errors
    }
    return summaries, errors


def one_line(error: BaseException) -> str:
    """An error as one line for a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def matrix_rate(precision: str) -> dict[str, float | str] | None:
    """TFLOP/s of a large square matrix product in PyTorch, on the GPU where there is one; None without PyTorch.

    What a backend reaches is held against this, the rate that the device gives to the easiest work there is.
    """
    try:
        import torch
    except ImportError:
        return None
    gpu = torch.cuda.is_available()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    size = 8192 if gpu else 2048
    a, b = (torch.randn(size, size, device="cuda" if gpu else "cpu").to(dtype) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    taken = []
    try:
        for _ in range(12):
            start = time.perf_counter()
            torch.mm(a, b)
            if gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    tflops = 2 * size**3 / float(np.median(taken[2:])) / 1e12
    return {"tflops": tflops, "size": size, "library": torch.__version__, "device": "GPU" if gpu else "CPU"}


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
    return _nvidia_smi("name", "driver_version", "clocks.sm", "clocks.mem", "memory.total")


def gpu_memory_mib() -> float | None:
    """MiB of the GPU's memory in use, by anyone; None where there is no GPU."""
    found = _nvidia_smi("memory.used")
    return float(found["memory.used"].split()[0]) if found else None


def _nvidia_smi(*fields: str) -> dict[str, str] | None:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))
