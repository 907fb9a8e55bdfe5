"""Runs a script with a stand-in for the GPU: engines are built and kept by TensorRT-RTX, and run as ONNX graphs.

    python tests/faults.py --target engine-gpu --through tests/kills/stand_in.py ...

For trying the target where there is no GPU: building, keeping and trusting engines is the product's own code; what runs
them is not.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def main(script: str, *arguments: str) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import gpu_stand_in
    import tensorrt_rtx

    from lseg.engine import get_engine

    sys.modules["tensorrt"] = tensorrt_rtx

    def build_and_keep(spec, prepare, folder, device, say) -> bytes:
        get_engine(spec, prepare, folder, device, say)
        return prepare().SerializeToString()

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        gpu_stand_in.stand_in(patch, gpu_stand_in.compile_kernels(Path(folder)))
        patch.setattr("lseg.stages.get_engine", build_and_keep)
        for name in ("pycuda", "pycuda.driver"):
            sys.modules[name].__spec__ = ModuleSpec(name, None, origin="a stand-in")
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
