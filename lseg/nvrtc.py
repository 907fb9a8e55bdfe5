"""Compiles kernels.cu to kernels.ptx, which is kept beside it: `python -m lseg.nvrtc` after a change.

PTX is compiled once more by the GPU's driver, for the GPU that it has, so users need neither nvcc nor NVRTC. CUDA
11.8's PTX is what every driver takes that TensorRT 10 runs on; compute capability 7.0 is the oldest that it knows.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

from lseg.files import write_files

SOURCE = Path(__file__).with_name("kernels.cu")
PTX = SOURCE.with_suffix(".ptx")
LIBRARY = "libnvrtc.so.11.2"  # the name that 11.2 to 11.8 share
ARCHITECTURE = "compute_70"


def library_path() -> Path | None:
    """NVRTC as the package nvidia-cuda-nvrtc-cu11 brings it; None where that is not installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    paths = [Path(folder) / "cuda_nvrtc" / "lib" / LIBRARY for folder in folders or ()]
    return next((path for path in paths if path.is_file()), None)


def compile_ptx(source: str, library: Path) -> str:
    """CUDA C++ to PTX; the same for the same source. Raises RuntimeError with the compiler's log.

    NVRTC leaves the thread with another locale: call this in a process of its own, as this module's command is.
    """
    nvrtc = ctypes.CDLL(str(library))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    options = [f"--gpu-architecture={ARCHITECTURE}".encode(), b"--std=c++14"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if status:
        _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.value.decode())
    _check(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)))
    ptx = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetPTX(program, ptx))
    _check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return ptx.value.decode()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC failed with status {status}")


def main(source: Path = SOURCE, output: Path = PTX) -> None:
    found = library_path()
    if found is None:
        raise SystemExit("NVRTC is missing: install it with 'pip install nvidia-cuda-nvrtc-cu11==11.8.89'")
    write_files({output: compile_ptx(source.read_text(), found).encode()})
    print(f"wrote {output}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
