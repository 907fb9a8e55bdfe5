"""Photos in windows on the GPU: cut, encoded in batches and summed up there; only labels come back."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from lseg.cuda import Buffer
from lseg.errors import UserError
from lseg.kernels import Place
from lseg.recipes import LABELS_A_PASS
from lseg.runner import Timings
from lseg.stages import Stages
from lseg.windows import Inference, scaled_size, windows

# Of a round's score maps, at most 1.5 GiB and half of what is free; more labels go in rounds, each of which encodes the
# photo again.
MAP_BYTES = 3 << 29
MOST_SCALES = 8  # that the kernel sums up


def label_windows(
    stages: Stages, photo: np.ndarray, text: np.ndarray, how: Inference, best: bool, timings: Timings
) -> tuple[np.ndarray, np.ndarray | None]:
    """See `lseg.runner.Runner.label_windows`. Use with the device current.

    Raises:
        UserError: the GPU has not enough memory, or the scales are too many.
    """
    if len(how.scales) > MOST_SCALES:
        raise UserError(f"{len(how.scales)} scales are more than the {MOST_SCALES} that the GPU sums up: give fewer")
    photo_size = photo.shape[:2]
    area = photo_size[0] * photo_size[1]
    sizes = [scaled_size(*photo_size, scale, stages.size) for scale in how.scales]
    pixels = [height * width for height, width in sizes]
    plans = [plan(size, stages.size, how.mirror) for size in sizes]
    for name in {"dots"} | {
        stages.image_engine(part.stop - part.start) for places in plans for part in stages.batches(len(places))
    }:
        stages.engine(name)  # building one needs memory
    free = stages.device.driver.mem_get_info()[0] // 2
    step = max(1, min(LABELS_A_PASS, len(text), min(MAP_BYTES, free) // (4 * sum(pixels))))
    with ExitStack() as owned:

        def take(count: int, dtype: np.dtype | type) -> Buffer:
            """A buffer for this photo alone."""
            buffer = Buffer(stages.device, (count,), dtype, host=False)
            owned.callback(buffer.free)
            return buffer

        def send(values: np.ndarray) -> int:
            buffer = take(values.size, values.dtype)
            buffer.put(stages.stream, values)
            return buffer.address

        source = timings.measure("preprocess", lambda: send(photo))
        places = [send(np.array(places, np.int32)) for places in plans]
        shares = [tuple(map(send, cover(size, stages.size))) for size in sizes]
        maps = take(step * sum(pixels), np.float32)
        starts = [maps.address + 4 * step * sum(pixels[:index]) for index in range(len(sizes))]
        table = send(np.array([(start, *size) for start, size in zip(starts, sizes, strict=True)], np.int64))
        labels, cosines, texts = take(area, np.int32), take(area, np.float32), take(step * text.shape[1], np.float32)

        def score(group: np.ndarray) -> None:
            """Every scale's map of these texts."""
            texts.put(stages.stream, group)
            maps.zero(stages.stream, maps.size)
            for index, size in enumerate(sizes):
                for part in stages.batches(len(plans[index])):
                    batch, at = part.stop - part.start, places[index] + 16 * part.start  # four int32 a place
                    stages.cut(source, photo_size, size, at, batch)
                    stages.encode(batch)
                    stages.add_scores(batch, texts.address, len(group), at, shares[index], size, starts[index])
            stages.stream.synchronize()

        def combine(count: int, offset: int) -> None:
            stages.kernels.combine(table, len(sizes), count, photo_size, offset, labels.address, cosines.address)
            stages.stream.synchronize()

        for start in range(0, len(text), step):
            group = text[start : start + step]
            timings.measure("encode_image", lambda group=group: score(group))
            timings.measure("similarity", lambda group=group, start=start: combine(len(group), start))
        found = timings.measure("similarity", lambda: labels.read(stages.stream, area).reshape(photo_size))
        return found, cosines.read(stages.stream, area).reshape(photo_size) if best else None


def plan(size: tuple[int, int], side: int, mirror: bool) -> list[Place]:
    """The windows of `side` x `side` that cover a photo at a scale; with `mirror` each of them mirrored too."""
    corners = list(windows(*size, side))
    return [(0, *corner, mirrored) for mirrored in ((False, True) if mirror else (False,)) for corner in corners]


def cover(size: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """One over the number of windows that cover each row, and each column, of a photo at a scale: float32."""
    corners = list(windows(*size, side))
    shares = []
    for axis, length in enumerate(size):
        count = np.zeros(length, np.float32)
        for start in {corner[axis] for corner in corners}:
            count[start : start + side] += 1
        shares.append(1 / count)
    return shares[0], shares[1]
