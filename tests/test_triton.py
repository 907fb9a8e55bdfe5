"""The Triton repository: configurations by Triton's own protobuf, and the graphs behind them in ONNX Runtime.

The ensemble is followed step by step as the configuration says; `test_triton_server.py` runs a server.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from test_enginerun import ROOT, save

from lseg.errors import UserError
from lseg.image import read_image, to_pixels
from lseg.inference import label_photo
from lseg.onnx_file import IMAGE_ONNX
from lseg.run_onnxruntime import OnnxRuntimeRunner
from lseg.tokenizer import Tokenizer
from lseg.triton import ENSEMBLE, LABELS, TEXT, batched_label_graph, configurations, write_repository

pb = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed: ./requirements.sh --dev does it"
)
text_format = pytest.importorskip("google.protobuf.text_format", reason="protobuf is not installed")
TYPES = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)", "TYPE_INT32": "tensor(int32)"}


@pytest.fixture(scope="module")
def repository(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    write_repository(folder, tiny.folder, tiny.weights, "fp16")
    return folder


def config_of(repository: Path, name: str):
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), pb.ModelConfig())


def session_of(repository: Path, name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(repository / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])


def serve(repository: Path, name: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the server would do: a model by ONNX Runtime, an ensemble by its steps."""
    config = config_of(repository, name)
    check_tensors(config, config.input, tensors)
    if config.platform != "ensemble":
        names = [one.name for one in config.output]
        results = dict(zip(names, session_of(repository, name).run(names, tensors), strict=True))
    else:
        pool = dict(tensors)
        for step in config.ensemble_scheduling.step:
            made = serve(repository, step.model_name, {key: pool[value] for key, value in step.input_map.items()})
            pool |= {value: made[key] for key, value in step.output_map.items()}
        results = {one.name: pool[one.name] for one in config.output}
    check_tensors(config, config.output, results)
    return results


def check_tensors(config, described, tensors: dict[str, np.ndarray]) -> None:
    kinds = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32, "TYPE_INT32": np.int32}
    assert {one.name for one in described} == set(tensors)
    for one in described:
        array = tensors[one.name]
        assert array.dtype == kinds[pb.DataType.Name(one.data_type)]
        assert 1 <= array.shape[0] <= config.max_batch_size and array.ndim == len(one.dims) + 1
        assert all(dim in (-1, axis) for dim, axis in zip(one.dims, array.shape[1:], strict=True))


class TestConfigurations:
    @pytest.mark.parametrize("name", [TEXT, LABELS])
    def test_agree_with_the_files(self, repository, name):
        config, session = config_of(repository, name), session_of(repository, name)
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 8)
        for described, has in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert {one.name for one in described} == {one.name for one in has}
            for one in described:
                (value,) = (value for value in has if value.name == one.name)
                assert TYPES[pb.DataType.Name(one.data_type)] == value.type
                assert isinstance(value.shape[0], str)  # the batch
                for dim, axis in zip(one.dims, value.shape[1:], strict=True):
                    assert dim == axis or (dim == -1 and isinstance(axis, str))

    @pytest.mark.parametrize("name", [TEXT, LABELS])
    def test_batching_and_warm_up(self, repository, name):
        config = config_of(repository, name)
        assert list(config.dynamic_batching.preferred_batch_size) == [8]
        assert config.dynamic_batching.max_queue_delay_microseconds == 2000
        assert [(group.count, group.kind) for group in config.instance_group] == [(1, pb.ModelInstanceGroup.KIND_AUTO)]
        assert [warm.batch_size for warm in config.model_warmup] == [1, 8]
        session = session_of(repository, name)
        rng = np.random.default_rng(0)
        for warm in config.model_warmup:  # what the warm-up sends can be run
            assert set(warm.inputs) == {one.name for one in config.input}
            feed = {}
            for key, value in warm.inputs.items():
                kind = TYPES[pb.DataType.Name(value.data_type)]
                (described,) = (one for one in config.input if one.name == key)
                assert described.data_type == value.data_type
                shape = (warm.batch_size, *value.dims)
                feed[key] = {
                    "tensor(uint8)": lambda shape=shape: rng.integers(0, 256, shape, dtype=np.uint8),
                    "tensor(float)": lambda shape=shape: rng.standard_normal(shape).astype(np.float32),
                    "tensor(int32)": lambda shape=shape: np.zeros(shape, np.int32),
                }[kind]()
            assert all(len(array) == warm.batch_size for array in session.run(None, feed))

    def test_tensorrt_ranges_name_every_free_input(self, repository):
        for name in (TEXT, LABELS):
            (accelerator,) = config_of(repository, name).optimization.execution_accelerators.gpu_execution_accelerator
            assert accelerator.name == "tensorrt"
            assert accelerator.parameters["precision_mode"] == ("FP32" if name == TEXT else "FP16")
            shapes = {one.name: one.shape for one in session_of(repository, name).get_inputs()}
            for which in ("min", "opt", "max"):
                given = dict(
                    part.split(":") for part in accelerator.parameters[f"trt_profile_{which}_shapes"].split(",")
                )
                assert set(given) == set(shapes)
                for key, value in given.items():
                    axes = [int(axis) for axis in value.split("x")]
                    assert len(axes) == len(shapes[key])
                    assert all(
                        isinstance(want, str) or want == axis for want, axis in zip(shapes[key], axes, strict=True)
                    )

    def test_official_size(self):
        """The same at 480 x 480, and in float32 throughout."""
        for name, text in configurations(480, 512, "FP32").items():
            config = text_format.Parse(text, pb.ModelConfig())
            assert config.name == name
        assert list(config.input[0].dims) == [480, 480, 3]

    def test_protobuf_would_refuse_another_field(self):
        text = configurations(480, 512, "FP32")[TEXT]
        with pytest.raises(text_format.ParseError):
            text_format.Parse(text.replace("dynamic_batching", "dynamic_batches"), pb.ModelConfig())


class TestGraphs:
    def test_ensemble_gives_the_runners_labels(self, repository, tiny, tmp_path, seed):
        """Two photos with different words in one batch, each as the runner labels it alone."""
        photos = [read_image(save(tmp_path / f"{index}.jpg", seed + index)) for index in range(2)]
        words = [["sky", "road", "tree"], ["car", "a red wall", "dog"]]
        tokens = np.stack([Tokenizer()(row) for row in words])
        pixels = np.stack([to_pixels(photo, 64) for photo in photos])
        found = serve(repository, ENSEMBLE, {"pixels": pixels, "tokens": tokens})
        with OnnxRuntimeRunner(tiny.weights, tiny.folder) as runner:
            for index in range(2):
                expected = runner.segment(pixels[index : index + 1], runner.encode_text(tokens[index]), best=True)
                assert (found["labels"][index] == expected.labels[0]).mean() > 0.999
                assert np.abs(found["best"][index] - expected.best[0]).max() < 1e-4

    def test_client(self, repository, tiny, tmp_path, seed, monkeypatch):
        """The example's own requests, to ONNX Runtime in the server's place."""
        grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
        from demo import triton_client

        class Server:
            def infer(self, model, inputs, outputs):
                sent = {}
                for one in inputs:
                    dtype = {"UINT8": np.uint8, "INT32": np.int32, "FP32": np.float32}[one.datatype()]
                    sent[one.name()] = np.frombuffer(one._get_content(), dtype).reshape(one.shape())
                made = serve(repository, model, sent)

                class Answer:
                    as_numpy = staticmethod(made.__getitem__)

                return Answer

        assert hasattr(grpc, "InferenceServerClient")
        photo, words = read_image(save(tmp_path / "photo.jpg", seed)), ["sky", "road", "tree"]
        labels, cosines = triton_client.segment(Server(), photo, triton_client.embed(Server(), words), 64)
        with OnnxRuntimeRunner(tiny.weights, tiny.folder) as runner:
            expected = label_photo(runner, photo, runner.encode_text(Tokenizer()(words)))
        assert labels.shape == photo.shape[:2] and (labels == expected[0]).mean() > 0.999
        assert np.abs(cosines - expected[1]).max() < 1e-4
        with pytest.raises(UserError, match="257 labels are more"):
            triton_client.embed(Server(), ["word"] * 257)

    def test_no_server(self):
        command = [sys.executable, str(ROOT / "demo" / "triton_client.py"), "--url", "127.0.0.1:9"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("error: the server did not answer for lseg_text (")
        assert len(result.stderr.splitlines()) == 1


class TestErrors:
    def test_graphs_that_do_not_agree(self, tiny, tmp_path, monkeypatch):
        """A graph that gives other numbers than the exported files is found out, and does not stay."""
        import lseg.triton

        def negated(labels: onnx.ModelProto) -> onnx.ModelProto:
            model = batched_label_graph(labels)
            for node in model.graph.node:
                node.output[:] = ["triton/best" if name == "best" else name for name in node.output]
            model.graph.node.append(onnx.helper.make_node("Neg", ["triton/best"], ["best"]))
            return model

        monkeypatch.setattr(lseg.triton, "batched_label_graph", negated)
        with pytest.raises(UserError, match="lseg_labels is 2.0e.00 off the exported files"):
            write_repository(tmp_path / "models", tiny.folder, tiny.weights, "fp16")
        assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]

    def test_cut_short(self, tiny, tmp_path):
        shutil.copytree(tiny.folder, tmp_path / "onnx")
        file = tmp_path / "onnx" / IMAGE_ONNX
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(UserError, match="damaged or cut short"):
            write_repository(tmp_path / "models", tmp_path / "onnx", tiny.weights, "fp16")
        assert not (tmp_path / "models").exists()

    def test_other_weights(self, tiny, tmp_path):
        with pytest.raises(UserError, match="was exported from other weights"):
            write_repository(tmp_path / "models", tiny.folder, "demo", "fp16")

    def test_script(self, segment, tmp_path):
        code, out, err = segment("--export-triton", tmp_path / "models", output=tmp_path / "image")
        assert code == 2 and err == ["error: --output has no meaning beside --export-triton: leave one out"]
        assert not (tmp_path / "models").exists()

    def test_script_writes(self, tiny, tmp_path):
        command = [sys.executable, str(ROOT / "enginerun.py"), "--weights", tiny.weights, "--onnx", str(tiny.folder)]
        result = subprocess.run([*command, "--export-triton", str(tmp_path / "m")], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert len(result.stdout.splitlines()) == 5
        assert sorted(path.relative_to(tmp_path / "m").as_posix() for path in (tmp_path / "m").rglob("*.*")) == [
            "lseg/config.pbtxt",
            "lseg_labels/1/model.onnx",
            "lseg_labels/config.pbtxt",
            "lseg_text/1/model.onnx",
            "lseg_text/config.pbtxt",
        ]
