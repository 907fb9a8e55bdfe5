"""Arrays that other libraries take as they are: `__cuda_array_interface__` and DLPack, without a copy."""

from __future__ import annotations

import ctypes
from math import prod

import numpy as np

CPU, CUDA = 1, 2  # DLDeviceType
CODES = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode by NumPy's kind
NAME, USED_NAME = b"dltensor", b"used_dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # null: C order
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_exported: dict[int, tuple[object, ...]] = {}  # by address: what a consumer may still be using


@_Deleter
def _release(address: int) -> None:
    _exported.pop(address, None)


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _forget(capsule: int) -> None:
    """A capsule that nobody took is gone: so is what it held. Its consumer renames one that it took."""
    api = ctypes.pythonapi
    if api.PyCapsule_IsValid(ctypes.c_void_p(capsule), NAME):
        _exported.pop(api.PyCapsule_GetPointer(ctypes.c_void_p(capsule), NAME), None)


ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
ctypes.pythonapi.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
ctypes.pythonapi.PyCapsule_IsValid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)


class DeviceArray:
    """An array in C order that lies on a GPU (or, for `gpu` None, in host memory), and belongs to `owner`.

    PyTorch takes it with `torch.as_tensor` or `torch.from_dlpack`, CuPy with `cupy.asarray`, Numba and PyCUDA by its
    interface. It is complete when it is handed out: no stream has to wait.

    Args:
        address: of its first element.
        shape: its sizes.
        dtype: integers, float16 or float32.
        owner: the object kept alive as long as this is, and as long as what took it by DLPack. If it frees the memory
            earlier, as a runner does that is closed, the array must not be used any more.
        gpu: the GPU's number.
    """

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype | type, owner: object, gpu: int | None = 0
    ):
        self.address, self.shape, self.dtype = address, tuple(shape), np.dtype(dtype)
        self.owner, self.gpu = owner, gpu
        self.nbytes = prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        if self.gpu is None:
            raise AttributeError("this array lies in host memory")
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3}

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CPU, 0) if self.gpu is None else (CUDA, self.gpu)

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule, of the version without flags, which every consumer takes.

        Raises:
            BufferError: a copy or another device is asked for.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("this array is handed out where it lies, without a copy")
        kind, number = self.__dlpack_device__()
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        dtype = _Type(CODES[self.dtype.kind], 8 * self.dtype.itemsize, 1)
        tensor = _Tensor(self.address, _Device(kind, number), len(self.shape), dtype, shape, None, 0)
        managed = _Managed(tensor, None, _release)
        place = ctypes.addressof(managed)
        _exported[place] = (managed, shape, self.owner)
        return ctypes.pythonapi.PyCapsule_New(place, NAME, ctypes.cast(_forget, ctypes.c_void_p))

    def __repr__(self) -> str:
        where = "host memory" if self.gpu is None else f"GPU {self.gpu}"
        return f"DeviceArray({self.dtype.name} {list(self.shape)}, {where})"
