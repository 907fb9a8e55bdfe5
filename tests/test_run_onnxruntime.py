"""ONNX Runtime's memory, which must not grow with the shapes that it has seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import enginerun

ROOT = Path(enginerun.__file__).parent
CODE = """
import json, sys
import numpy as np
from lseg.run_onnxruntime import OnnxRuntimeRunner

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024

found = []
with OnnxRuntimeRunner("demo", __import__("pathlib").Path(sys.argv[1]), device="cpu") as runner:
    rng = np.random.default_rng(int(sys.argv[2]))
    pixels = rng.integers(0, 256, (1, runner.image_size, runner.image_size, 3), dtype=np.uint8)
    for labels in (128, *rng.integers(2, 128, 3)):
        runner.segment(pixels, rng.standard_normal((int(labels), 512)).astype(np.float32))
        found.append(resident())
print(json.dumps(found))
"""


def test_memory_of_many_shapes(demo, seed):
    """After the largest shape, smaller ones take no more: measured, 21 MiB against 300 with a plan for each shape."""
    command = [sys.executable, "-c", CODE, str(demo.folder), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    first, *more = json.loads(done.stdout)
    assert max(more) < first + 100, (first, more)
