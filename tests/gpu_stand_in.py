"""A stand-in for the GPU that runs the TensorRT backend here: kernels.cu on the CPU, engines by ONNX Runtime.

What is real: the runner, the stages, the kernels' source, the recipes' graphs. What is not: PyCUDA, TensorRT, CUDA
graphs, and everything about time.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import lseg.kernels

SOURCE = Path(lseg.kernels.__file__).with_name("kernels.cu")

PRELUDE = """
#include <cmath>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif
struct Dim { unsigned int x, y, z; };
static Dim gridDim, blockDim, blockIdx, threadIdx;
#define __global__
#define __device__
#define EACH(axis) (int)(blockIdx.axis * blockDim.axis + threadIdx.axis)
template <class T> inline T min(T a, T b) { return a < b ? a : b; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
struct Half;
inline float value(Half x);
inline void put(Half *to, float x);
"""
ENDING = """
#if defined(__F16C__)
inline float value(Half x) { return _cvtsh_ss(x.bits); }
inline void put(Half *to, float x) { to->bits = _cvtss_sh(x, 0); }
#else
inline float value(Half x) { __fp16 half; std::memcpy(&half, &x, 2); return half; }
inline void put(Half *to, float x) { __fp16 half = x; std::memcpy(to, &half, 2); }
#endif
template <class... A, unsigned long... I>
void call(void (*kernel)(A...), void **arguments, std::integer_sequence<unsigned long, I...>) {
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
                for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x)
                    kernel(*(A *)arguments[I]...);
}
template <class... A>
int run(void (*kernel)(A...), void **arguments, int count) {
    if (count != sizeof...(A)) return 2;
    call(kernel, arguments, std::make_integer_sequence<unsigned long, sizeof...(A)>());
    return 0;
}
extern "C" int launch(const char *name, const unsigned int *grid, unsigned int threads, void **arguments, int count) {
    gridDim = Dim{grid[0], grid[1], grid[2]};
    blockDim = Dim{threads, 1, 1};
    threadIdx = Dim{0, 0, 0};
    %s
    return 1;
}
"""


def kernel_names() -> list[str]:
    """Of every kernel in kernels.cu."""
    source = SOURCE.read_text()
    plain = re.findall(r'extern "C" __global__ void (\w+)\(', source)
    suffixes = re.findall(r"^FOR_TYPE\(\w+, (\w+)\)", source, re.MULTILINE)
    typed = re.findall(r'extern "C" __global__ void (\w+)##suffix\(', source)
    return [name for name in plain if not name.endswith("_")] + [a + b for a in typed for b in suffixes]


def compile_kernels(folder: Path) -> ctypes.CDLL:
    """kernels.cu as a library for this CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: it compiles the kernels for the CPU")
    calls = "\n    ".join(f'if (!std::strcmp(name, "{n}")) return run({n}, arguments, count);' for n in kernel_names())
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(f'#include <utility>\n{PRELUDE}\n#include "{SOURCE}"\n{ENDING % calls}')
    machine = (
        ["-mf16c"] if "x86" in subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True).stdout else []
    )
    command = [compiler, "-std=c++14", "-O2", *machine, "-ffp-contract=off", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


class Driver(ModuleType):
    """pycuda.driver, as far as `lseg` uses it, with host memory for the GPU's. Counts what is allocated."""

    class Error(Exception): ...

    class MemoryError(Error): ...

    def __init__(self, kernels: ctypes.CDLL, limit: int = 1 << 40):
        super().__init__("pycuda.driver")
        self.kernels, self.limit, self.allocated, self.depth, self.retained = kernels, limit, 0, 0, 0
        self.launched: list[str] = []
        driver = self

        class Device:
            count = staticmethod(lambda: 1)

            def __init__(self, index: int): ...

            name = staticmethod(lambda: "a stand-in")
            compute_capability = staticmethod(lambda: (0, 0))

            def retain_primary_context(self) -> SimpleNamespace:
                def move(by: int) -> None:
                    driver.depth += by

                def detach() -> None:
                    driver.retained -= 1

                driver.retained += 1
                return SimpleNamespace(push=lambda: move(1), pop=lambda: move(-1), detach=detach)

        self.Device = Device
        self.Stream = lambda flags: SimpleNamespace(handle=0, synchronize=lambda: None)
        self.Event = Event

    def init(self) -> None: ...

    def mem_alloc(self, size: int) -> Allocation:
        if self.allocated + size > self.limit:
            raise self.MemoryError("out of memory")
        assert self.depth > 0, "no context is current"
        return Allocation(self, size)

    def pagelocked_empty(self, count: int, dtype: np.dtype) -> np.ndarray:
        return np.asarray(Pinned(np.empty(count, dtype)))

    def memcpy_htod(self, to: Allocation, values: np.ndarray) -> None:
        assert values.flags.c_contiguous and values.nbytes <= to.size
        ctypes.memmove(int(to), values.ctypes.data, values.nbytes)

    def memcpy_dtoh(self, to: np.ndarray, source: Allocation) -> None:
        assert to.nbytes <= source.size
        ctypes.memmove(to.ctypes.data, int(source), to.nbytes)

    def memcpy_htod_async(self, to: Allocation, values: np.ndarray, stream: object) -> None:
        self.memcpy_htod(to, values)

    def memcpy_dtoh_async(self, to: np.ndarray, source: Allocation, stream: object) -> None:
        self.memcpy_dtoh(to, source)

    def memset_d8_async(self, to: Allocation, value: int, count: int, stream: object) -> None:
        assert count <= to.size
        ctypes.memset(int(to), value, count)

    def mem_get_info(self) -> tuple[int, int]:
        return self.limit - self.allocated, self.limit

    def module_from_buffer(self, ptx: bytes) -> SimpleNamespace:
        def get_function(name: str):
            assert f".entry {name}(".encode() in ptx, f"kernels.ptx has no {name}"

            def launch(*arguments: np.generic, block: tuple, grid: tuple, stream: object) -> None:
                values = [np.array(argument) for argument in arguments]
                pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
                sizes = (ctypes.c_uint * 3)(*grid)
                status = self.kernels.launch(name.encode(), sizes, block[0], pointers, len(values))
                assert status == 0, (name, status)
                self.launched.append(name)

            return launch

        return SimpleNamespace(get_function=get_function)


class Event:
    """What is enqueued is done at once here."""

    recorded = False

    def record(self, stream: object) -> None:
        self.recorded = True

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self.recorded, "waited for an event that was not recorded"


class Allocation:
    """Device memory. Filled with NaN, or 255, so that what is read before it is written is seen."""

    def __init__(self, driver: Driver, size: int):
        self.driver, self.size = driver, size
        self.memory = (ctypes.c_ubyte * size)()
        ctypes.memset(self.memory, 255, size)
        driver.allocated += size

    def __int__(self) -> int:
        assert self.memory is not None, "used after it was freed"
        return ctypes.addressof(self.memory)

    def free(self) -> None:
        self.driver.allocated -= self.size
        self.memory = None


class Pinned:
    """What a page-locked array is based on."""

    def __init__(self, memory: np.ndarray):
        self.memory, self.__array_interface__ = memory, memory.__array_interface__

    def free(self) -> None: ...


class Engine:
    """An engine whose serialized form is its ONNX graph."""

    def __init__(self, serialized: bytes, stream: object):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.runs: list[dict[str, tuple[int, ...]]] = []

    def bind(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> tuple:
        for name, value in self.inputs.items():
            fixed = [(a, b) for a, b in zip(value.shape, shapes[name], strict=True) if isinstance(a, int)]
            assert all(a == b for a, b in fixed), (name, value.shape, shapes[name])
        return shapes, addresses

    def enqueue(self, context: tuple) -> None:
        shapes, addresses = context
        self.runs.append(shapes)
        inputs = {name: _view(addresses[name], shapes[name], value.type) for name, value in self.inputs.items()}
        for output, values in zip(self.session.get_outputs(), self.session.run(None, inputs), strict=True):
            _view(addresses[output.name], values.shape, output.type)[...] = values

    def close(self) -> None:
        self.session = None


def _view(address: int, shape: tuple[int, ...], kind: str) -> np.ndarray:
    dtype = np.dtype({"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}[kind])
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)


class Graph:
    """A captured graph: the work, done again."""

    def __init__(self, stream: object, work):
        self.work = work

    def launch(self) -> None:
        self.work()

    def close(self) -> None:
        self.work = None


def stand_in(monkeypatch: pytest.MonkeyPatch, kernels: ctypes.CDLL, limit: int = 1 << 40) -> Driver:
    """Puts the stand-in in the place of PyCUDA and TensorRT, and returns its driver."""
    driver = Driver(kernels, limit)
    package = ModuleType("pycuda")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    library = SimpleNamespace(__version__="stand-in")
    monkeypatch.setattr("lseg.run_tensorrt.import_tensorrt", lambda: library)
    monkeypatch.setattr("lseg.run_tensorrt.gpu_count", lambda: 1)
    monkeypatch.setattr("lseg.run_tensorrt.Graph", Graph)
    monkeypatch.setattr("lseg.stages.Engine", Engine)
    monkeypatch.setattr("lseg.stages.get_engine", lambda spec, prepare, *_: prepare().SerializeToString())
    return driver
