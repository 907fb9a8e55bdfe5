"""Features of points, and of every nth pixel, without the whole map: picked where the network left it, if it can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lseg.features import Features, check_points, check_stride, network_places

if TYPE_CHECKING:
    from lseg.runner import Runner


class Plan(NamedTuple):
    """Which pixels of the network's input are needed, and how their features become what is asked for."""

    places: np.ndarray  # int64 [K, 2]: rows and columns, each pixel once
    expand: Callable[[np.ndarray], np.ndarray]  # their features float16 [K, D] to the result


def plan_points(points: np.ndarray | Sequence[Sequence[int]], size: int, height: int, width: int) -> Plan:
    """For `Features.at` of a photo of this height and width that the network sees at S x S (`size`)."""
    points = np.asarray(points)
    check_points(points, width, height)
    columns, rows = network_places(size, height, width)
    key = rows[points[:, 1].astype(np.int64)] * size + columns[points[:, 0].astype(np.int64)]
    different, which = np.unique(key, return_inverse=True)
    return Plan(np.stack(np.divmod(different, size), axis=1), lambda found: found[which])


def plan_stride(stride: int, size: int, height: int, width: int) -> Plan:
    """For `Features.strided`."""
    check_stride(stride)
    columns, rows = (places[::stride] for places in network_places(size, height, width))
    (down, row), (across, column) = (np.unique(places, return_inverse=True) for places in (rows, columns))

    def expand(found: np.ndarray) -> np.ndarray:
        found = found.reshape(len(down), len(across), -1)
        if found.shape[:2] == (len(rows), len(columns)):
            return found  # no pixel is asked for twice
        return found[row[:, None], column]

    return Plan(np.stack(np.meshgrid(down, across, indexing="ij"), axis=-1).reshape(-1, 2), expand)


def features_of_points(
    runner: Runner, pixels: np.ndarray, height: int, width: int, points: np.ndarray | Sequence[Sequence[int]]
) -> np.ndarray:
    """`Features.at`, apart from rounding, float16 [K, D].

    Args:
        runner: the backend. With a `features_at` only what is asked for leaves it.
        pixels: the photo at the network's size, uint8 [1, S, S, 3], RGB.
        height, width: of the photo.
        points: see `Features.at`.
    """
    if runner.features_at is None:
        return Features(runner.encode_image(pixels)[0], runner.image_size, height, width).at(points)
    plan = plan_points(points, runner.image_size, height, width)
    return plan.expand(runner.features_at(pixels, plan.places))


def features_of_stride(runner: Runner, pixels: np.ndarray, height: int, width: int, stride: int) -> np.ndarray:
    """`Features.strided`, apart from rounding, float16 [rows, columns, D]: see `features_of_points`.

    Beyond the result, what was picked takes 2 D bytes for each of at most S x S pixels.
    """
    if runner.features_at is None:
        return Features(runner.encode_image(pixels)[0], runner.image_size, height, width).strided(stride)
    plan = plan_stride(stride, runner.image_size, height, width)
    return plan.expand(runner.features_at(pixels, plan.places))
