"""Captured graphs and engines where the driver, or the GPU's memory, fails. The libraries are stand-ins."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace

import pytest

from lseg import cuda, loaded_engine
from lseg.errors import UserError

Severity = IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")


class Logger:
    """What TensorRT's logger is made from."""

    Severity = Severity


class Library:
    """libcuda's calls for graphs: counts what is alive, and fails where it is told to."""

    def __init__(self, **failures: int):
        self.failures, self.graphs, self.executables, self.capturing = failures, 0, 0, False

    def cuStreamBeginCapture_v2(self, *_: object) -> int:
        self.capturing = True
        return self.failures.get("begin", 0)

    def cuStreamEndCapture(self, _: object, graph: object) -> int:
        self.capturing = False
        if "end" in self.failures:
            return self.failures["end"]
        graph._obj.value, self.graphs = 1, self.graphs + 1
        return 0

    def cuGraphInstantiateWithFlags(self, executable: object, *_: object) -> int:
        if "instantiate" in self.failures:
            return self.failures["instantiate"]
        executable._obj.value, self.executables = 2, self.executables + 1
        return 0

    def cuGraphDestroy(self, _: object) -> int:
        self.graphs -= 1
        return 0

    def cuGraphLaunch(self, *_: object) -> int:
        return self.failures.get("launch", 0)

    def cuGraphExecDestroy(self, _: object) -> int:
        self.executables -= 1
        return self.failures.get("destroy", 0)


def capture(monkeypatch: pytest.MonkeyPatch, library: Library, work=lambda: None) -> cuda.Graph:
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda _: library)
    return cuda.Graph(SimpleNamespace(handle=5), work)


def test_a_graph_lives_and_goes(monkeypatch):
    library, seen = Library(), []
    graph = capture(monkeypatch, library, lambda: seen.append(library.capturing))
    graph.launch()
    assert (seen, library.capturing, library.graphs, library.executables) == ([True], False, 0, 1)
    graph.close()
    graph.close()
    assert library.executables == 0


@pytest.mark.parametrize("step", ["end", "instantiate"])
def test_a_capture_that_the_driver_refuses(monkeypatch, step):
    library = Library(**{step: 901})
    with pytest.raises(RuntimeError, match="failed with CUDA error 901"):
        capture(monkeypatch, library)
    assert (library.capturing, library.graphs, library.executables) == (False, 0, 0)


def test_work_that_fails_while_it_is_captured(monkeypatch):
    """The capture ends, and what was captured of it goes."""

    def fail() -> None:
        raise UserError("the engine failed to run")

    library = Library()
    with pytest.raises(UserError, match="the engine failed to run"):
        capture(monkeypatch, library, fail)
    assert (library.capturing, library.graphs, library.executables) == (False, 0, 0)


def test_a_gpu_that_fails_at_a_graph_is_told(monkeypatch):
    """The launch in one sentence; that it cannot be freed either must not take that sentence's place."""
    graph = capture(monkeypatch, library := Library(launch=700, destroy=700))
    with pytest.raises(UserError, match="the GPU failed .cuGraphLaunch failed with CUDA error 700.: run nvidia-smi"):
        graph.launch()
    graph.close()
    assert library.executables == 0


@pytest.mark.parametrize(
    "errors, kind, words",
    [
        (["Cuda Runtime (out of memory)", "Engine deserialization failed."], UserError, "no memory left to load"),
        (["Serialization assertion magicTagRead failed."], loaded_engine.EngineRefused, "magicTagRead"),
    ],
)
def test_an_engine_that_does_not_load(monkeypatch, errors, kind, words):
    """Refused, it is built again: that must not happen to a good one because the GPU is full for the moment."""

    class Runtime:
        def __init__(self, logger: Logger):
            self.logger = logger

        def deserialize_cuda_engine(self, serialized: bytes) -> None:
            for error in errors:
                self.logger.log(Severity.ERROR, error)

    monkeypatch.setattr("lseg.logfile.append", lambda *_: None)
    monkeypatch.setattr(loaded_engine, "import_tensorrt", lambda: SimpleNamespace(ILogger=Logger, Runtime=Runtime))
    with pytest.raises(kind, match=words):
        loaded_engine.Engine(b"", SimpleNamespace(handle=0))
