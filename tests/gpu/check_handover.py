"""Checks on a GPU that PyTorch and CuPy take a `DeviceArray` where it lies, without a copy.

    python tests/gpu/check_handover.py

Needs PyCUDA and PyTorch with CUDA; CuPy where it is there. What PyCUDA allocated in the primary context is handed over
by DLPack and by `__cuda_array_interface__`, read, written through, and must keep its owner alive.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from lseg.cuda import Device  # noqa: E402
from lseg.device_array import DeviceArray  # noqa: E402

SHAPE = (1, 8, 6, 5)


class Owner:
    """What a runner is to its arrays."""


def main() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print("seed", seed)
    for dtype in (np.float32, np.float16):
        values = np.random.default_rng(seed).standard_normal(SHAPE).astype(dtype)
        with Device() as device:
            memory = device.driver.mem_alloc(values.nbytes)
            device.driver.memcpy_htod(memory, values)
            owner = Owner()
            array, alive = DeviceArray(int(memory), SHAPE, dtype, owner), weakref.ref(owner)
            del owner
        takers = {
            "torch.from_dlpack": torch.from_dlpack,
            "torch.as_tensor": lambda array: torch.as_tensor(array, device="cuda"),
        }
        if importlib.util.find_spec("cupy"):
            import cupy

            takers |= {"cupy.from_dlpack": cupy.from_dlpack, "cupy.asarray": cupy.asarray}
        for name, take in takers.items():
            taken = take(array)
            pointer = taken.data_ptr() if isinstance(taken, torch.Tensor) else taken.data.ptr
            assert pointer == array.address, f"{name} copied"
            found = taken.cpu().numpy() if isinstance(taken, torch.Tensor) else taken.get()
            assert np.array_equal(found, values), f"{name} reads something else"
            taken *= 2
            torch.cuda.synchronize()
            back = np.empty_like(values)
            with Device() as device:
                device.driver.memcpy_dtoh(back, memory)
                device.driver.memcpy_htod(memory, values)
            assert np.array_equal(back, values * 2), f"{name} writes elsewhere"
            print(f"{name}: {np.dtype(dtype).name} {list(SHAPE)}, nothing copied")
            del taken
        kept = torch.from_dlpack(array)
        del array
        gc.collect()
        assert alive() is not None, "the owner is gone while a tensor is there"
        del kept
        gc.collect()
        assert alive() is None, "the owner stays for good"
        with Device():
            memory.free()


if __name__ == "__main__":
    main()
