"""A TensorRT engine in memory: a context for each of its profiles, and buffers as large as they allow."""

from __future__ import annotations

import numpy as np

from lseg.cuda import Buffer, Device
from lseg.engine import import_tensorrt, make_logger
from lseg.errors import UserError

TYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8}
TYPES["BF16"] = np.uint16  # NumPy has no bfloat16: the upper halves of float32 numbers


class Engine:
    """A loaded engine with a context and buffers for each of its profiles. Use with the device current.

    Inputs and outputs live in `buffers`, as large as the profiles allow; `bind` sets the shapes of the next run.
    """

    def __init__(self, device: Device, serialized: bytes, stream: object, shared: dict[str, Buffer] | None = None):
        trt = import_tensorrt()
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._runtime.deserialize_cuda_engine(serialized)
        if self.engine is None:
            raise EngineRefused(self._logger.last_error)
        self._trt, self._stream = trt, stream
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in self.names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.contexts = []
        for index in range(self.engine.num_optimization_profiles):
            context = self.engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(index, stream.handle):
                raise UserError(f"the GPU has no memory left to run the engine ({self._logger.last_error})")
            self.contexts.append(context)
        stream.synchronize()
        self.shared = shared or {}
        self.owned = {name: self._buffer(device, name) for name in self.names if name not in self.shared}
        self.buffers = {**self.owned, **self.shared}

    def _buffer(self, device: Device, name: str) -> Buffer:
        largest = 0
        for index, context in enumerate(self.contexts):
            for other in self.inputs:
                context.set_input_shape(other, self.engine.get_tensor_profile_shape(other, index)[2])
            largest = max(largest, int(np.prod(context.get_tensor_shape(name))))
        dtype = TYPES[self.engine.get_tensor_dtype(name).name]
        return Buffer(device, (largest,), dtype, host=name != "embeddings")

    def bind(self, shapes: dict[str, tuple[int, ...]]) -> object:
        """Chooses the profile that takes these input shapes, sets shapes and addresses, and returns its context."""
        for index, context in enumerate(self.contexts):
            ranges = {name: self.engine.get_tensor_profile_shape(name, index) for name in shapes}
            if all(_within(shape, ranges[name]) for name, shape in shapes.items()):
                for name, shape in shapes.items():
                    if not context.set_input_shape(name, shape):
                        raise UserError(f"the engine refuses {name} of shape {list(shape)}: {self._logger.last_error}")
                for name in self.names:
                    context.set_tensor_address(name, self.buffers[name].address)
                return context
        largest = self.engine.get_tensor_profile_shape(next(iter(shapes)), len(self.contexts) - 1)[2]
        raise UserError(f"the engine takes at most {list(largest)} at a time, not {list(next(iter(shapes.values())))}")

    def enqueue(self, context: object) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise UserError(f"the engine failed to run ({self._logger.last_error}): free GPU memory and try again")

    def close(self) -> None:
        for buffer in self.owned.values():
            buffer.free()
        self.contexts.clear()
        self.engine = self._runtime = None


def to_float32(values: np.ndarray) -> np.ndarray:
    """float16, float32 or bfloat16 (as uint16, see TYPES) to float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


class EngineRefused(Exception):
    """The library does not take a serialized engine that its sidecar vouches for."""


def _within(shape: tuple[int, ...], limits: tuple) -> bool:
    low, _, high = (tuple(limit) for limit in limits)
    return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
