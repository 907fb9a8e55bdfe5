"""Options and fixtures that every test may use."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # beside another worker; before torch is imported, and for subprocesses as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes or gigabytes as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes or gigabytes: run with --slow"))


def fresh_seed() -> int:
    value = int(os.environ.get("LSEG_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"seed {value} (repeat with LSEG_TEST_SEED={value})")
    return value


@pytest.fixture
def seed() -> int:
    """A fresh seed for each test, printed so that a failure can be repeated with LSEG_TEST_SEED."""
    return fresh_seed()


Segment = Callable[..., tuple[int, list[str], list[str]]]


class Exported(NamedTuple):
    """A checkpoint ("demo" or a path) and the folder of its three ONNX files. Tests only read them."""

    weights: str
    folder: Path


def export_all(weights: str, folder: Path) -> Exported:
    import clip_onnx_export
    import lseg_export

    for script in (lseg_export, clip_onnx_export):
        script.main(script.parse_args(["--weights", weights, "--output", str(folder), "--quiet"]))
    return Exported(weights, folder)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo weights, exported by the scripts."""
    return export_all("demo", tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Random weights of tiny sizes (64 x 64 pixels), exported by the scripts: runs take milliseconds."""
    from checkpoints import write_tiny

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder / "tiny.safetensors", fresh_seed())
    return export_all(str(folder / "tiny.safetensors"), folder / "onnx")


@pytest.fixture(scope="session")
def camvid() -> Path:
    """The folder of CamVid's train, val and test, from the environment variable LSEG_CAMVID."""
    folder = os.environ.get("LSEG_CAMVID")
    if not folder:
        pytest.skip("LSEG_CAMVID is not set: it names the folder with CamVid's train, val and test")
    return Path(folder)


@pytest.fixture(scope="session")
def clip_names() -> Path:
    """The folder of CLIP's vectors of 1,612 names, from the environment variable LSEG_CLIP_NAMES."""
    folder = os.environ.get("LSEG_CLIP_NAMES")
    if not folder:
        pytest.skip("LSEG_CLIP_NAMES is not set: it names the folder with names.json and embeddings.npy")
    return Path(folder)


@pytest.fixture
def segment(tiny: Exported, tmp_path: Path, capfd: pytest.CaptureFixture) -> Segment:
    """Runs enginerun with the tiny weights, output to tmp_path / "out": exit status, and lines on stdout and stderr."""
    import enginerun
    from lseg.errors import run

    def call(*arguments: object, output: Path = tmp_path / "out") -> tuple[int, list[str], list[str]]:
        options = ["--weights", tiny.weights, "--onnx", str(tiny.folder), "--output", str(output)]
        with pytest.raises(SystemExit) as end:
            run(lambda: enginerun.main(enginerun.parse_args([*options, *map(str, arguments)])))
        out, err = capfd.readouterr()
        return end.value.code, out.splitlines(), err.splitlines()

    return call
