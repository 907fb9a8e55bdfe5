"""Launches the kernels of kernels.cu: what stands around the image encoder on the GPU. See there what each computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lseg.cuda import Device
from lseg.errors import UserError

PTX = Path(__file__).with_name("kernels.ptx")
THREADS = 128  # a block
GROUPS = 8  # of channels, whose products are summed apart: enough threads for one image
PRODUCTS = 5  # of a place's vector and its neighbours'
CHANNELS_A_THREAD = 64  # of embeddings
STRIP = 256  # a photo's rows that are combined in one launch: a display's watchdog allows two seconds
SUFFIXES = {np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16", np.dtype(np.uint16): "bf16"}

Place = tuple[int, int, int, bool]  # a window's photo, top, left, and whether it is mirrored


class Kernels:
    """The kernels on one GPU. Arrays are addresses on it; launches go to `stream` and wait for nothing.

    Args:
        device: current in this thread.
        stream: a PyCUDA stream.
        dtype: of z: float32, float16, or bfloat16 as uint16.
        dimension: D, of an embedding.
        side: s, height and width of z.

    Raises:
        UserError: the driver does not take the kernels.
    """

    def __init__(self, device: Device, stream: object, dtype: np.dtype | type, dimension: int, side: int):
        self.dtype, self.dimension, self.side = np.dtype(dtype), dimension, side
        self._stream, self._suffix = stream, SUFFIXES[self.dtype]
        try:
            self._module = device.driver.module_from_buffer(PTX.read_bytes() + b"\0")
        except device.driver.MemoryError:
            raise  # the device tells of it
        except device.driver.Error as error:
            raise UserError(
                f"the GPU's driver does not take {PTX.name} ({error}): update it to CUDA 11.8's or later"
            ) from error

    def cut_windows(
        self, photos: int, photo_size: tuple[int, int], size: tuple[int, int], places: int, images: int, shape: tuple
    ) -> None:
        """Photos uint8 [.., H, W, 3], resized to `size`, to windows float32 [B, 3, S, S] at int32 places [B, 4]."""
        batch, _, side, _ = shape
        grid = (_blocks(side), side, batch)
        self._launch("cut_windows", grid, _address(photos), *_ints(*photo_size, *size), _address(places),
                     np.int32(side), _address(images))  # fmt: skip

    def inverse_lengths(self, z: int, sums: int, inverse: int, batch: int) -> None:
        """z [B, D, s, s] to one over its lengths, upsampled: float32 [B, 2s, 2s]; `sums` holds `sums_size` float32."""
        group = -(-self.dimension // GROUPS)
        grid = (_blocks(self.side**2), GROUPS, batch)
        numbers = _ints(self.dimension, self.side, group)
        self._launch(f"products_{self._suffix}", grid, _address(z), *numbers, _address(sums))
        grid = (_blocks(4 * self.side**2), batch, 1)
        self._launch("inverse_lengths", grid, _address(sums), *_ints(GROUPS, self.side), _address(inverse))

    def sums_size(self, batch: int) -> int:
        """How many numbers `inverse_lengths` lays down in between."""
        return GROUPS * PRODUCTS * batch * self.side**2

    def embeddings(self, z: int, inverse: int, result: int, batch: int) -> None:
        """z to unit embeddings [B, D, 2s, 2s] in its type."""
        grid = (_blocks(4 * self.side**2), -(-self.dimension // CHANNELS_A_THREAD), batch)
        numbers = _ints(self.dimension, self.side, CHANNELS_A_THREAD)
        self._launch(f"embeddings_{self._suffix}", grid, _address(z), _address(inverse), *numbers, _address(result))

    def pick(self, z: int, inverse: int, places: int, count: int, result: int) -> None:
        """One image's z to unit embeddings float16 [K, D] at K places, int32 [K, 2]: rows and columns below 4s."""
        numbers = _ints(self.dimension, self.side)
        self._launch(f"pick_{self._suffix}", (_blocks(count), 1, 1), _address(z), _address(inverse), *numbers,
                     _address(places), np.int32(count), _address(result))  # fmt: skip

    def label(
        self, dots: int, inverse: int, labels: int, best: int, batch: int, texts: int, offset: int | None = None
    ) -> None:
        """Dot products [B, N, s, s] in z's type to labels uint8 and cosines float32, both [B, 4s, 4s].

        With an offset the labels are int32, numbered from there, and those of an earlier, lower offset are kept where
        no cosine is larger.
        """
        full = 4 * self.side
        name = f"{'label' if offset is None else 'label_many'}_{self._suffix}"
        numbers = _ints(texts, self.side, offset or 0)
        self._launch(name, (_blocks(full), full // 2, batch), _address(dots), _address(inverse), *numbers,
                     _address(labels), _address(best))  # fmt: skip

    def add_scores(
        self, dots: int, inverse: int, texts: int, places: int, count: int, shares: tuple[int, int],
        size: tuple[int, int], scores: int,
    ) -> None:  # fmt: skip
        """Adds the cosines of `count` windows to a map float32 [N, h, w], times float32 shares [h] and [w]."""
        height, width = size
        rows, columns = shares
        self._launch(f"add_scores_{self._suffix}", (_blocks(width), height, 1), _address(dots), _address(inverse),
                     *_ints(texts, self.side), _address(places), np.int32(count), _address(rows), _address(columns),
                     *_ints(height, width), _address(scores))  # fmt: skip

    def combine(
        self, maps: int, scales: int, texts: int, size: tuple[int, int], offset: int, labels: int, best: int
    ) -> None:
        """Sums scales' maps, int64 [scales, 3] of address, h, w, at a photo's size: labels int32 and best [H, W]."""
        height, width = size
        for start in range(0, height, STRIP):
            grid = (_blocks(width), min(STRIP, height - start), 1)
            numbers = _ints(scales, texts, height, width, start, offset)
            self._launch("combine", grid, _address(maps), *numbers, _address(labels), _address(best))

    def _launch(self, name: str, grid: tuple[int, int, int], *arguments: np.generic) -> None:
        function = self._module.get_function(name)
        function(*arguments, block=(THREADS, 1, 1), grid=grid, stream=self._stream)


def _blocks(threads: int) -> int:
    return -(-threads // THREADS)


def _ints(*values: int) -> list[np.int32]:
    return [np.int32(value) for value in values]


def _address(value: int) -> np.uint64:
    return np.uint64(value)
