"""lseg_ray.py in a cluster that has GPUs, as Ray sees them: it counts what it is told of, and nothing here uses one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_ray import Call, assert_same, bulk, lines_of, photos, ray, rows_in, start_cluster  # noqa: F401

from lseg.bulk import Stages
from lseg.bulk_stages import Network, Part


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    start_cluster(num_gpus=2)
    yield
    ray.shutdown()


class TellsItsGpu(Network):
    """An actor that writes down which GPU is its own."""

    def __call__(self, part: Part) -> Part:
        result = super().__call__(part)
        folder = Path(self.wanted.output.where, "gpus")
        folder.mkdir(exist_ok=True)
        (folder / f"{os.environ['CUDA_VISIBLE_DEVICES']}-{os.getpid()}").touch()
        return result


@pytest.mark.usefixtures("two_gpus")
def test_an_actor_a_gpu(bulk: Call, segment: Call, photos: Path, tmp_path: Path):  # noqa: F811
    code, out, err = bulk(photos, "--save-labels", stages=Stages(network=TellsItsGpu))
    assert (code, err, out[0]) == (0, [], "11 images in 4 parts, 2 on a GPU at a time")
    assert_same(rows_in(tmp_path / "out"), lines_of(segment, photos, folder=tmp_path))
    found = [path.name.split("-") for path in (tmp_path / "out" / "gpus").iterdir()]
    assert {gpu for gpu, _ in found} <= {"0", "1"} and len({actor for _, actor in found}) == len(found)


@pytest.mark.usefixtures("two_gpus")
def test_more_actors_than_gpus(bulk: Call, photos: Path):  # noqa: F811
    code, _, err = bulk(photos, "--actors", 3)
    assert code == 2
    assert err == ["error: --actors 3 are more than the cluster's 2 GPUs: give at most one a GPU"]
