"""The GPU through PyCUDA: the primary context, buffers that free themselves, and captured graphs.

The primary context is the one that PyTorch, ONNX Runtime and the CUDA runtime use, so all of them share one process.
It is retained, pushed around each use and popped after it, never made current for good.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import TracebackType

import numpy as np

from lseg.errors import UserError

NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the work of others on the default stream neither waits nor is waited for
THREAD_LOCAL_CAPTURE = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating


def gpu_count() -> int:
    """GPUs that the driver offers; 0 where there is no driver. Imports nothing."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def gpu_name(index: int = 0) -> str:
    """A GPU's name, as the driver gives it; "GPU" where it does not. Imports nothing."""
    name = ctypes.create_string_buffer(256)
    if gpu_count() <= index:
        return "GPU"
    driver, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
    if driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetName(name, len(name), device):
        return "GPU"
    return name.value.decode(errors="replace")


class Device:
    """A GPU's primary context. `with device:` makes it current in this thread, as often as nested.

    Raises:
        UserError: there is no GPU, no driver, no memory for a context, or the driver is too old for PyCUDA's CUDA.
    """

    def __init__(self, index: int = 0):
        try:
            import pycuda.driver as driver
        except ImportError as error:
            raise UserError(f"PyCUDA cannot be imported ({error}): install it with 'pip install pycuda'") from error
        try:
            driver.init()
            if driver.Device.count() <= index:
                raise UserError("no GPU is there: choose --backend onnxruntime or torch")
            device = driver.Device(index)
            self._context = device.retain_primary_context()
        except driver.MemoryError as error:
            raise _no_memory(error) from error
        except driver.Error as error:
            raise UserError(f"the GPU cannot be used ({error}): check nvidia-smi and update the driver") from error
        self.driver = driver
        self.name: str = device.name()
        self.compute_capability: str = "{}.{}".format(*device.compute_capability())

    def stream(self) -> object:
        """A stream of its own. Use with the device current."""
        return self.driver.Stream(NON_BLOCKING)

    def __enter__(self) -> Device:
        if self._context is None:
            raise UserError("the GPU was closed: open the backend again")
        self._context.push()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.pop()
        if isinstance(error, self.driver.MemoryError):
            raise _no_memory(error) from error
        if isinstance(error, self.driver.Error):
            raise UserError(f"the GPU failed ({error}): run nvidia-smi, and try again") from error

    @property
    def closed(self) -> bool:
        return self._context is None

    def memory_used(self) -> int:
        """Bytes of the GPU's memory in use, by anyone."""
        with self:
            free, total = self.driver.mem_get_info()
        return total - free

    def close(self) -> None:
        if self._context is not None:
            self._context.detach()
            self._context = None


def _no_memory(error: BaseException) -> UserError:
    return UserError(f"the GPU has no memory left ({error}): close other programs")


class Buffer:
    """An array on the GPU with its page-locked twin on the host, both allocated once. Use with the device current.

    Raises:
        UserError: the GPU or the host has not enough memory.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: np.dtype | type, host: bool = True):
        self._driver = device.driver
        self.dtype, self.size = np.dtype(dtype), int(np.prod(shape))
        self.host: np.ndarray | None = None
        self._memory = None
        try:
            self._memory = device.driver.mem_alloc(max(1, self.size * self.dtype.itemsize))
            if host:
                self.host = device.driver.pagelocked_empty(self.size, self.dtype)
        except device.driver.MemoryError as error:
            self.free()
            mib = -(-self.size * self.dtype.itemsize // 2**20)
            raise UserError(f"the GPU, or the host for it, has no {mib} MiB left: close other programs") from error

    @property
    def address(self) -> int:
        return int(self._memory)

    def write(self, stream: object, values: np.ndarray) -> None:
        """Copies an array to the GPU by way of the host's twin, on the stream; the last such copy must be done."""
        self.host[: values.size] = values.ravel()
        self.upload(stream, values.size)

    def upload(self, stream: object, count: int) -> None:
        """Copies the first `count` elements from host to GPU, on the stream."""
        self._driver.memcpy_htod_async(self._memory, self.host[:count], stream)

    def download(self, stream: object, count: int) -> None:
        """Copies the first `count` elements from GPU to host, on the stream."""
        self._driver.memcpy_dtoh_async(self.host[:count], self._memory, stream)

    def zero(self, stream: object, count: int) -> None:
        """Sets the first `count` elements to zero, on the stream."""
        self._driver.memset_d8_async(self._memory, 0, count * self.dtype.itemsize, stream)

    def put(self, stream: object, values: np.ndarray) -> None:
        """Copies an array to the GPU, on the stream, and waits for it. Needs no twin on the host."""
        self._driver.memcpy_htod_async(self._memory, np.ascontiguousarray(values, self.dtype), stream)
        stream.synchronize()  # type: ignore[attr-defined]

    def read(self, stream: object, count: int) -> np.ndarray:
        """The first `count` elements, in an array of its own, after the stream's work."""
        values = np.empty(count, self.dtype)
        self._driver.memcpy_dtoh_async(values, self._memory, stream)
        stream.synchronize()  # type: ignore[attr-defined]
        return values

    def free(self) -> None:
        if self._memory is not None:
            self._memory.free()
            self._memory = None
        if self.host is not None:
            self.host.base.free()
            self.host = None


class Graph:
    """Work on a stream, captured once and launched as a whole. PyCUDA has no calls for this, so the driver is asked.

    Args:
        stream: a PyCUDA stream, not the default one.
        work: enqueues the work on it; allocates nothing and waits for nothing.

    Raises:
        RuntimeError: the work cannot be captured. What `work` raises is raised too, and the stream is as it was.
    """

    def __init__(self, stream: object, work: Callable[[], None]):
        self._library = ctypes.CDLL("libcuda.so.1")
        self._stream = ctypes.c_void_p(stream.handle)  # type: ignore[attr-defined]
        self._executable = ctypes.c_void_p()
        graph = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, ctypes.c_int(THREAD_LOCAL_CAPTURE))
        try:
            try:
                work()
            finally:
                self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            flags = ctypes.c_ulonglong(0)
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, flags)
        finally:
            if graph:
                self._library.cuGraphDestroy(graph)

    def launch(self) -> None:
        """Enqueues the work. UserError where the GPU fails: the first launch still takes memory."""
        try:
            self._call("cuGraphLaunch", self._executable, self._stream)
        except RuntimeError as error:
            remedy = "run nvidia-smi, close other programs, and try again"
            raise UserError(f"the GPU failed ({error}): {remedy}") from error

    def close(self) -> None:
        """Frees it. A GPU that failed refuses that as well, which tells nothing new."""
        if self._executable:
            self._library.cuGraphExecDestroy(self._executable)
            self._executable = ctypes.c_void_p()

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed with CUDA error {status}")
