"""A TensorRT engine in memory, with a context for each of its profiles."""

from __future__ import annotations

import numpy as np

from lseg.engine import import_tensorrt, make_logger
from lseg.errors import UserError


class Engine:
    """A loaded engine. Its inputs and outputs lie where `bind` is told. Use with the device current."""

    def __init__(self, serialized: bytes, stream: object):
        trt = import_tensorrt()
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._runtime.deserialize_cuda_engine(serialized)
        if self.engine is None:
            if self._logger.no_memory:
                raise UserError(f"the GPU has no memory left to load the engine ({self._logger.last_error})")
            raise EngineRefused(self._logger.last_error)
        self._stream = stream
        self.contexts = []
        for index in range(self.engine.num_optimization_profiles):
            context = self.engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(index, stream.handle):
                raise UserError(f"the GPU has no memory left to run the engine ({self._logger.last_error})")
            self.contexts.append(context)
        stream.synchronize()

    def bind(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> object:
        """Chooses the profile that takes these input shapes, sets shapes and addresses, and returns its context."""
        for index, context in enumerate(self.contexts):
            if all(_within(shape, self._limits(name, index)) for name, shape in shapes.items()):
                for name, shape in shapes.items():
                    if not context.set_input_shape(name, shape):
                        raise UserError(f"the engine refuses {name} of shape {list(shape)}: {self._logger.last_error}")
                for name, address in addresses.items():
                    context.set_tensor_address(name, address)
                return context
        fits = "; ".join(f"{name} of {list(self._limits(name, 0)[2])}" for name in shapes)
        given = "; ".join(f"{name} of {list(shape)}" for name, shape in shapes.items())
        raise UserError(f"the engine takes at most {fits}, not {given}")

    def _limits(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        """The smallest, usual and largest shape of an input."""
        fixed = tuple(self.engine.get_tensor_shape(name))
        if -1 not in fixed:
            return fixed, fixed, fixed
        return tuple(tuple(shape) for shape in self.engine.get_tensor_profile_shape(name, profile))

    def enqueue(self, context: object) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise UserError(f"the engine failed to run ({self._logger.last_error}): free GPU memory and try again")

    def close(self) -> None:
        self.contexts.clear()
        self.engine = self._runtime = None


def to_float32(values: np.ndarray) -> np.ndarray:
    """float16, float32 or bfloat16 to float32. NumPy has no bfloat16: here it is uint16, float32's upper half."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


class EngineRefused(Exception):
    """The library does not take a serialized engine that its sidecar vouches for."""


def _within(shape: tuple[int, ...], limits: tuple[tuple[int, ...], ...]) -> bool:
    low, _, high = limits
    return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
