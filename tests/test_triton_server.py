"""The exported repository served by a real Triton, and the two files in demo/ that start it without a container.

LSEG_TRITON names the Python of an environment with nvidia-pytriton and onnxruntime, which wants another NumPy than
this one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
from test_enginerun import ROOT

from lseg.run_onnxruntime import OnnxRuntimeRunner
from lseg.tokenizer import Tokenizer
from lseg.triton import ENSEMBLE, LABELS, TEXT, write_repository

SCRIPT = ROOT / "demo" / "triton_server.py"
WORDS = [["sky", "road", "tree"], ["car", "a red wall", "dog"]]
READY = 120  # seconds


@pytest.fixture(scope="module")
def repository(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "models"
    write_repository(folder, tiny.folder, tiny.weights, "fp32")
    return folder


class Server(NamedTuple):
    process: subprocess.Popen
    client: Any
    log: Path
    temporary: Path  # where it keeps its backends


def free_ports(count: int) -> list[int]:
    holders = [socket.socket() for _ in range(count)]
    for holder in holders:
        holder.bind(("127.0.0.1", 0))
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory) -> Iterator[Server]:
    python = os.environ.get("LSEG_TRITON")
    if not python:
        pytest.skip("LSEG_TRITON is not set: it names the Python of an environment with nvidia-pytriton, onnxruntime")
    grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    folder = tmp_path_factory.mktemp("server")
    (folder / "tmp").mkdir()
    rpc, http, metrics = free_ports(3)
    command = [python, str(SCRIPT), str(repository), "--cache-config=local,size=16777216", f"--grpc-port={rpc}"]
    command += [f"--http-port={http}", f"--metrics-port={metrics}"]
    with (folder / "log").open("w") as log:
        environment = os.environ | {"TMPDIR": str(folder / "tmp")}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    client = grpc.InferenceServerClient(f"127.0.0.1:{rpc}")
    try:
        wait_for(client, process, folder / "log")
        yield Server(process, client, folder / "log", folder / "tmp")
    finally:
        client.close()
        process.terminate()
        process.wait(60)


def wait_for(client: Any, process: subprocess.Popen, log: Path) -> None:
    from tritonclient.utils import InferenceServerException

    end = time.monotonic() + READY
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.is_server_ready():
                return
        except InferenceServerException:
            pass  # it does not listen yet
        time.sleep(0.2)
    pytest.fail(f"the server is not ready:\n{log.read_text()[-3000:]}")


def ask(server: Server, model: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from demo.triton_client import ask

    outputs = ["text"] if model == TEXT else ["labels", "best"]
    return dict(zip(outputs, ask(server.client, model, tensors, outputs), strict=True))


def runs_of(server: Server, model: str) -> tuple[int, int]:
    """How many images the model has seen, and in how many runs."""
    counts = server.client.get_inference_statistics(model).model_stats[0]
    return counts.inference_count, counts.execution_count


def words_of(count: int) -> np.ndarray:
    """Tokens int32 [count, 3, 77]: the images take turns with the two sets of words."""
    tokenizer = Tokenizer()
    return np.stack([tokenizer(words) for words in WORDS])[np.arange(count) % 2]


def photos(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def expected(tiny, pixels: np.ndarray, tokens: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each photo with its own words, one at a time by the runner: labels and their cosines."""
    with OnnxRuntimeRunner(tiny.weights, tiny.folder, device="cpu") as runner:
        found = [
            runner.segment(pixels[i : i + 1], runner.encode_text(tokens[i]), best=True) for i in range(len(pixels))
        ]
    return [(one.labels[0], one.best[0]) for one in found]


class TestServed:
    def test_every_model_is_ready(self, server):
        """The configurations as they are, with batching, warm-up, cache and TensorRT's part, are Triton's own again."""
        for name in (TEXT, LABELS, ENSEMBLE):
            assert server.client.is_model_ready(name)
            assert server.client.get_model_config(name).config.max_batch_size == 8
        assert server.client.get_model_config(LABELS).config.dynamic_batching.max_queue_delay_microseconds == 2000

    @pytest.mark.parametrize("batch", [1, 2, 8])
    def test_labels_are_the_runners(self, server, tiny, batch, seed):
        """The ensemble, and its two models one after the other, with different words for the images of a batch."""
        pixels = photos(seed, batch)
        tokens = words_of(batch)
        whole = ask(server, ENSEMBLE, {"pixels": pixels, "tokens": tokens})
        steps = ask(server, LABELS, {"pixels": pixels, "text": ask(server, TEXT, {"tokens": tokens})["text"]})
        for found in (whole, steps):
            for index, (labels, best) in enumerate(expected(tiny, pixels, tokens)):
                assert (found["labels"][index] == labels).mean() > 0.999
                assert np.abs(found["best"][index] - best).max() < 1e-4

    def test_clients_at_once(self, server, tiny, seed):
        """Their requests go into common batches, and each client gets its own labels back."""
        pixels = photos(seed, 48)
        tokens = words_of(48)
        images, runs = runs_of(server, LABELS)

        def one(i: int) -> dict[str, np.ndarray]:
            return ask(server, ENSEMBLE, {"pixels": pixels[i : i + 1], "tokens": tokens[i : i + 1]})

        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(one, range(48)))
        for one, (labels, best) in zip(found, expected(tiny, pixels, tokens), strict=True):
            assert (one["labels"][0] == labels).mean() > 0.999
            assert np.abs(one["best"][0] - best).max() < 1e-4
        more_images, more_runs = runs_of(server, LABELS)
        assert more_images - images == 48 and more_runs - runs < 48

    def test_known_words_come_from_the_cache(self, server):
        tokens = Tokenizer()(["a word", "that no other test", "sends"])[None]
        first = ask(server, TEXT, {"tokens": tokens})["text"]
        before = runs_of(server, TEXT)
        assert (ask(server, TEXT, {"tokens": tokens})["text"] == first).all()
        assert runs_of(server, TEXT) == before

    def test_what_is_refused(self, server, tiny, seed):
        """A sentence for whoever asked, and the server goes on."""
        from lseg.errors import UserError

        pixels, tokens = photos(seed, 9), words_of(9)
        with pytest.raises(UserError, match="batch-size must be <= 8"):
            ask(server, ENSEMBLE, {"pixels": pixels, "tokens": tokens})
        with pytest.raises(UserError, match="unexpected shape for input 'pixels'"):
            ask(server, ENSEMBLE, {"pixels": pixels[:1, :32], "tokens": tokens[:1]})
        with pytest.raises(UserError, match="out of data bounds"):
            ask(server, ENSEMBLE, {"pixels": pixels[:1], "tokens": tokens[:1] + 100_000})
        found = ask(server, ENSEMBLE, {"pixels": pixels[:1], "tokens": tokens[:1]})
        assert (found["labels"][0] == expected(tiny, pixels[:1], tokens[:1])[0][0]).mean() > 0.999

    def test_it_ends_when_told(self, server):
        """Last: SIGTERM ends the server as well, which gives its folder back."""
        assert list(server.temporary.glob("lseg-triton-*"))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert not list(server.temporary.glob("lseg-triton-*"))
        assert "successfully unloaded 'lseg_labels'" in server.log.read_text()


class Tensor(NamedTuple):
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


class Response:
    def __init__(self, tensors: list[Tensor] | None = None, error: str | None = None) -> None:
        self.tensors, self.error = {one.name: one.array for one in tensors or []}, error


@pytest.fixture
def backend(repository, monkeypatch) -> Any:
    """The backend with Triton's module in Python, holding the label maps' model."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, Response, str
    module.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    spec = importlib.util.spec_from_file_location("model", ROOT / "demo" / "triton_backend.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    model = loaded.TritonPythonModel()
    config = {"input": [{"name": "pixels"}, {"name": "text"}], "output": [{"name": "labels"}, {"name": "best"}]}
    folder = {"model_repository": str(repository / LABELS), "model_version": "1"}
    model.initialize({"model_config": json.dumps(config), **folder})
    return model


class TestBackend:
    def test_responses_belong_to_their_requests(self, backend, repository, seed):
        """Requests of one to three images as one run, against each alone."""
        rng = np.random.default_rng(seed)
        session = onnxruntime.InferenceSession(
            repository / LABELS / "1" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        dimension = session.get_inputs()[1].shape[-1]
        requests = [
            {"pixels": photos(seed + n, n), "text": rng.standard_normal((n, 4, dimension)).astype(np.float32)}
            for n in (2, 1, 3)
        ]
        for request, response in zip(requests, backend.execute(requests), strict=True):
            labels, best = session.run(["labels", "best"], request)
            assert response.error is None and set(response.tensors) == {"labels", "best"}
            assert response.tensors["labels"].dtype == np.uint8 and response.tensors["labels"].shape == labels.shape
            assert (response.tensors["labels"] == labels).mean() > 0.999
            assert np.abs(response.tensors["best"] - best).max() < 1e-4

    def test_a_run_that_fails(self, backend, seed):
        requests = [{"pixels": photos(seed, 1), "text": np.zeros((1, 4, 7), np.float32)}] * 2
        responses = backend.execute(requests)
        assert len(responses) == 2 and all("text" in response.error for response in responses)


class TestErrors:
    def test_no_repository(self, tmp_path):
        result = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True)
        message = f"error: {tmp_path} is no model repository: write one by enginerun.py --export-triton DIR\n"
        assert (result.returncode, result.stderr) == (2, message)

    def test_no_pytriton(self, repository):
        if importlib.util.find_spec("pytriton"):
            pytest.skip("nvidia-pytriton is installed beside the tests")
        result = subprocess.run([sys.executable, str(SCRIPT), str(repository)], capture_output=True, text=True)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: pytriton is not installed beside ")

    @pytest.fixture
    def packages(self, tmp_path, monkeypatch) -> Path:
        """Folders as nvidia-pytriton has them, of nothing."""
        for name in ("pytriton", "onnxruntime"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").touch()
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path / "pytriton" / "tritonserver"

    def test_other_python(self, packages):
        from demo import triton_server
        from lseg.errors import UserError

        with pytest.raises(UserError, match="brings no server for Python 3"):
            triton_server.packaged()
        (packages / "python_backend_stubs" / triton_server.VERSION).mkdir(parents=True)
        assert triton_server.packaged() == packages

    def test_python_without_its_library(self, packages, monkeypatch, tmp_path):
        """Triton's process would not start, and the server would wait for it without an end."""
        from demo import triton_server
        from lseg.errors import UserError

        monkeypatch.setattr(triton_server.sysconfig, "get_config_var", lambda name: str(tmp_path))
        with pytest.raises(UserError, match=r"libpython3\.\d+\.so\.1\.0 is missing"):
            triton_server.environment(packages)
        (tmp_path / f"libpython{triton_server.VERSION}.so.1.0").touch()
        monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
        found = triton_server.environment(packages)["LD_LIBRARY_PATH"].split(":")
        assert found == [str(tmp_path / "nvidia_pytriton.libs"), str(tmp_path), "/before"]
