"""The exported files: their interfaces, their numbers against PyTorch, their metadata, and what a failure leaves."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from test_model import align_corners, score_as_the_official_code

import clip_onnx_export
import lseg_export
from lseg import checkpoint, runner, specs
from lseg.errors import UserError, short
from lseg.onnx_file import FORMAT, IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX, parse_metadata, read_metadata
from lseg.run_onnxruntime import OnnxRuntimeRunner
from lseg.weights import DEMO_WEIGHTS

ROOT = Path(lseg_export.__file__).parent
FILES = (IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def interface(model: onnx.ModelProto) -> dict[str, tuple[str, list[int | str]]]:
    """Each input's and output's type and shape; a free axis has a name."""
    values = {}
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
        values[value.name] = TensorProto.DataType.Name(tensor.elem_type), shape
    return values


def reductions_with_axes_as_input(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type.startswith("Reduce") and len(node.input) > 1]


def unit_rows(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    x = rng.standard_normal((count, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def run_script(script, *options: object) -> None:
    script.main(script.parse_args([str(option) for option in options]))


class TestInterface:
    def test_names_types_and_axes(self, demo):
        found = {name: interface(onnx.load(demo.folder / name)) for name in FILES}
        assert found == {
            IMAGE_ONNX: {
                "image": ("FLOAT", ["B", 3, 480, 480]),
                "embeddings": ("FLOAT", ["B", 512, 240, 240]),
            },
            SIMILARITY_ONNX: {
                "embeddings": ("FLOAT", ["B", 512, 240, 240]),
                "text": ("FLOAT", ["N", 512]),
                "labels": ("INT32", ["B", 480, 480]),
                "best": ("FLOAT", ["B", 480, 480]),
                "scores": ("FLOAT", ["B", "N", 480, 480]),
            },
            TEXT_ONNX: {"tokens": ("INT32", ["N", 77]), "text": ("FLOAT", ["N", 512])},
        }

    @pytest.mark.parametrize("name", FILES)
    def test_opset_and_reductions(self, demo, name):
        model = onnx.load(demo.folder / name)
        onnx.checker.check_model(model, full_check=True)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
        assert reductions_with_axes_as_input(model) == []
        assert not any(node.attribute and node.op_type in ("If", "Loop", "Scan") for node in model.graph.node)

    def test_the_check_of_reductions_sees_one(self):
        node = helper.make_node("ReduceSum", ["x", "axes"], ["y"])
        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
        axes = helper.make_tensor("axes", TensorProto.INT64, [1], [0])
        model = helper.make_model(helper.make_graph([node], "sum", [x], [y], [axes]))
        assert reductions_with_axes_as_input(model) == ["ReduceSum"]

    def test_metadata(self, demo):
        weights = checkpoint.load("demo")
        digest = hashlib.sha256(DEMO_WEIGHTS.read_bytes()).hexdigest()
        kinds = dict(zip(FILES, ("lseg", "similarity", "clip_textual"), strict=True))
        for name, kind in kinds.items():
            found = parse_metadata(session(demo.folder / name).get_modelmeta().custom_metadata_map)
            config = weights.text_config if kind == "clip_textual" else weights.image_config
            part = "text_config" if kind == "clip_textual" else "image_config"
            assert found.pop(part) == json.loads(json.dumps(config.to_dict()))
            if kind != "clip_textual":
                assert found.pop("text_config") == weights.text_config.to_dict()
            versions = found.pop("versions")
            assert versions["torch"] == torch.__version__ and versions["onnx"] == onnx.__version__
            assert found == {"kind": kind, "format": FORMAT, "weights": "demo", "weights_sha256": digest, "opset": 17}

    def test_only_the_files_are_there(self, demo, tiny):
        for folder in (demo.folder, tiny.folder):
            written = {file.name for file in folder.iterdir()} - {"text_embeddings.sqlite"}  # enginerun's, not ours
            assert written == set(FILES)

    @pytest.mark.parametrize("opset", [18, 20])
    def test_other_opsets(self, tiny, tmp_path, opset):
        for script in (lseg_export, clip_onnx_export):
            run_script(script, "--weights", tiny.weights, "--output", tmp_path, "--opset", opset, "--quiet")
        assert {onnx.load(tmp_path / name).opset_import[0].version for name in FILES} == {opset}

    @pytest.mark.parametrize("script", [lseg_export, clip_onnx_export])
    def test_the_default_folder_is_the_scripts_own(self, script, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert script.parse_args([]).output.resolve() == ROOT / "onnx"
        monkeypatch.chdir(ROOT)
        assert script.parse_args([]).output == Path("onnx")  # as short as can be in messages

    @pytest.mark.parametrize(
        "script, options, sentence",
        [
            (lseg_export, ["--batch", "0"], "--batch 0: give a positive number or 'dynamic'"),
            (lseg_export, ["--batch", "²"], "--batch ²: give a positive number or 'dynamic'"),
            (lseg_export, ["--batch", "two"], "--batch two: give a positive number or 'dynamic'"),
            (lseg_export, ["--opset", "16"], "--opset 16: give 17 to 20"),
            (clip_onnx_export, ["--opset", "21"], "--opset 21: give 17 to 20"),
        ],
    )
    def test_options_out_of_range(self, script, options, sentence, capsys):
        with pytest.raises(SystemExit, match="2"):
            script.parse_args(options)
        assert capsys.readouterr().err == f"error: {sentence}; see --help\n"

    def test_what_is_printed(self, tiny, tmp_path, capsys):
        run_script(lseg_export, "--weights", tiny.weights, "--output", tmp_path)
        lines = capsys.readouterr().out.splitlines()
        path = short(tmp_path) / IMAGE_ONNX
        assert lines[0] == f"exporting {path} ..." and len(lines) == 4
        assert lines[1].startswith(f"wrote {path}: ") and "difference from PyTorch: embeddings " in lines[1]
        assert "labels " in lines[3] and "best " in lines[3] and "scores " in lines[3]
        run_script(clip_onnx_export, "--weights", tiny.weights, "--output", tmp_path, "--quiet")
        assert capsys.readouterr().out == ""


class TestNumbers:
    """Against PyTorch in float64, whose own rounding is out of sight; both libraries in float32 differ less."""

    @pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
    def test_image_encoder(self, tiny, batch, seed):
        images = torch.empty(batch, 3, 64, 64).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
        encoder = checkpoint.load_image_encoder(checkpoint.load(tiny.weights)).double()
        (found,) = session(tiny.folder / IMAGE_ONNX).run(["embeddings"], {"image": images.numpy()})
        difference = relative(found, encoder(images.double()))
        print(f"relative difference {difference:.1e}")
        assert found.shape == (batch, 24, 32, 32) and found.dtype == np.float32
        assert difference < 1e-5

    def test_demo_image_encoder(self, demo, seed):
        images = torch.empty(2, 3, 480, 480).uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
        encoder = checkpoint.load_image_encoder(checkpoint.load("demo")).double()
        (found,) = session(demo.folder / IMAGE_ONNX).run(["embeddings"], {"image": images.numpy()})
        difference = relative(found, encoder(images.double()))
        print(f"relative difference {difference:.1e}")
        assert difference < 1e-5
        assert np.abs(np.linalg.norm(found.astype(np.float64), axis=1) - 1).max() < 1e-5

    @pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 150])
    def test_text_encoder(self, demo, count, seed):
        torch.manual_seed(seed)
        tokens = specs.random_tokens(count)
        encoder = checkpoint.load_text_encoder(checkpoint.load("demo")).double()
        (found,) = session(demo.folder / TEXT_ONNX).run(["text"], {"tokens": tokens.numpy()})
        assert found.shape == (count, 512)
        assert relative(found, encoder(tokens)) < 1e-5

    def test_random_tokens_are_rows_that_clip_could_get(self, seed):
        torch.manual_seed(seed)
        for row in specs.random_tokens(200).numpy():
            end = row.argmax()
            assert row[0] == 49406 and row[end] == 49407 and end > 0
            assert (row[1:end] > 0).all() and (row[1:end] < 49406).all() and not row[end + 1 :].any()

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("count", [1, 2, 8])
    def test_similarity(self, tiny, batch, count, seed):
        rng = np.random.default_rng(seed)
        embeddings = rng.standard_normal((batch, 24, 32, 32)).astype(np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        text = unit_rows(rng, count, 24)
        expected = score_as_the_official_code(embeddings, text)
        labels, best, scores = session(tiny.folder / SIMILARITY_ONNX).run(
            None, {"embeddings": embeddings, "text": text}
        )
        assert relative(scores, expected) < 1e-4 and relative(best, expected.max(axis=1)) < 1e-4
        chosen = np.take_along_axis(expected, labels[:, None].astype(int), axis=1)[:, 0]
        assert (expected.max(axis=1) - chosen).max() < 1e-4

    def test_a_fixed_batch(self, tiny, tmp_path, seed):
        run_script(lseg_export, "--weights", tiny.weights, "--output", tmp_path, "--batch", 2, "--quiet")
        model = onnx.load(tmp_path / IMAGE_ONNX)
        assert interface(model) == {"image": ("FLOAT", [2, 3, 64, 64]), "embeddings": ("FLOAT", [2, 24, 32, 32])}
        images = np.random.default_rng(seed).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
        fixed, free = (
            session(folder / IMAGE_ONNX).run(None, {"image": images})[0] for folder in (tmp_path, tiny.folder)
        )
        assert relative(fixed, free) < 1e-6

    def test_full_resolution(self, tiny, tmp_path, seed):
        run_script(lseg_export, "--weights", tiny.weights, "--output", tmp_path, "--full-resolution", "--quiet")
        assert [file.name for file in tmp_path.iterdir()] == ["lseg_full.onnx"]
        images = np.random.default_rng(seed).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
        (found,) = session(tmp_path / "lseg_full.onnx").run(["embeddings"], {"image": images})
        (small,) = session(tiny.folder / IMAGE_ONNX).run(["embeddings"], {"image": images})
        double = align_corners(32)
        expected = np.einsum("yi,xj,bdij->bdyx", double, double, small.astype(np.float64)) / 0.07
        assert found.shape == (2, 24, 64, 64)
        assert relative(found, expected) < 1e-5


class TestManyLabels:
    @pytest.mark.parametrize("count", [1, 2, 8, 150, 1000])
    def test_passes_equal_one_pass(self, tiny, count, seed):
        """Of the exported file's passes over 256 labels and one pass in float64: other labels only at ties."""
        rng = np.random.default_rng(seed)
        embeddings = rng.standard_normal((1, 24, 32, 32)).astype(np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        text = unit_rows(rng, count, 24)
        scoring = session(tiny.folder / SIMILARITY_ONNX)
        labels, best = runner.merge_passes(
            text, 1, lambda part: scoring.run(["labels", "best"], {"embeddings": embeddings, "text": part})
        )
        expected = score_as_the_official_code(embeddings, text)
        top = expected.max(axis=1)
        assert (labels.shape, labels.dtype, best.dtype) == ((1, 64, 64), np.int32, np.float32)
        assert np.abs(best - top).max() < 1e-5
        ties = top - second(expected) < 1e-5
        agree = labels == expected.argmax(axis=1)
        print(f"{(~agree).sum()} of {agree.size} differ, {ties.sum()} ties")
        assert agree[~ties].all() and agree.mean() > 0.99

    @pytest.mark.parametrize("batch, step", [(1, 5), (2, 2), (9, 1)])
    def test_running_maximum(self, batch, step, monkeypatch, seed):
        """Exactly, ties included: scores of few values, in passes of few labels."""
        monkeypatch.setattr(runner, "LABELS_A_PASS", 5)
        scores = np.random.default_rng(seed).integers(0, 4, (batch, 23, 6, 6)).astype(np.float32)
        text = np.arange(23, dtype=np.float32)[:, None]
        sizes = []

        def score(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            sizes.append(len(part))
            chosen = scores[:, part[:, 0].astype(int)]
            return chosen.argmax(axis=1).astype(np.int32), chosen.max(axis=1)

        labels, best = runner.merge_passes(text, batch, score)
        assert max(sizes) == step and sum(sizes) == 23
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, scores.argmax(axis=1))
        np.testing.assert_array_equal(best, scores.max(axis=1))

    @pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)])
    def test_memory_of_1000_labels(self, demo, backend):
        """The scoring alone, in a process that has not yet run the image encoder, whose own peak would hide it."""
        code = """
import sys
from pathlib import Path
import numpy as np
from lseg.runner import merge_passes, open_runner

def peak_mib():
    # Not getrusage's ru_maxrss, which starts from the parent's.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

backend, folder = sys.argv[1:]
rng = np.random.default_rng()
embeddings = rng.standard_normal((1, 512, 240, 240), np.float32)
text = rng.standard_normal((1000, 512), np.float32)
with open_runner(backend, "demo", Path(folder)) as runner:
    if backend == "torch":
        import torch
        embeddings = torch.from_numpy(embeddings)
        torch.set_grad_enabled(False)
    else:
        import onnxruntime
        embeddings = onnxruntime.OrtValue.ortvalue_from_numpy(embeddings)
    before = peak_mib()
    labels, best = merge_passes(text, 1, lambda part: runner._score(embeddings, part))
    after = peak_mib()
assert labels.max() > 900
print(after - before)
"""
        command = [sys.executable, "-c", code, backend, str(demo.folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        grown = float(result.stdout)
        print(f"{grown:.0f} MiB")
        assert 10 < grown < 512e6 / 2**20

    @pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)])
    def test_memory_of_a_whole_run(self, demo, backend):
        """Texts, image and scoring: a thousand labels against two."""
        code = """
import sys
from pathlib import Path
import numpy as np
from lseg.runner import open_runner
from lseg.tokenizer import Tokenizer

backend, folder, count = sys.argv[1:]
with open_runner(backend, "demo", Path(folder)) as runner:
    text = runner.encode_text(Tokenizer()([f"thing number {n}" for n in range(int(count))]))
    runner.segment(np.random.default_rng().integers(0, 256, (1, 480, 480, 3), dtype=np.uint8), text)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)
"""
        peaks = []
        for count in (2, 1000):
            command = [sys.executable, "-c", code, backend, str(demo.folder), str(count)]
            peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))
        print(f"{peaks[0]:.0f} MiB and {peaks[1]:.0f} MiB")
        assert peaks[1] - peaks[0] < 512e6 / 2**20


def second(scores: np.ndarray) -> np.ndarray:
    """The second-largest score over axis 1; minus infinity where there is one only."""
    if scores.shape[1] == 1:
        return np.full(scores[:, 0].shape, -np.inf)
    return np.partition(scores, -2, axis=1)[:, -2]


@pytest.mark.parametrize(("precision", "matmul"), [("fp32", "4d"), ("fp16", "4d"), ("fp32", "2d")])
def test_label_map(tiny, tmp_path, seed, precision, matmul):
    """One graph from pixels and texts to labels, equal to the two that it stands for; what made it is in it."""
    options = ["--weights", tiny.weights, "--output", str(tmp_path), "--quiet", "--label-map"]
    lseg_export.main(lseg_export.parse_args([*options, "--precision", precision, "--matmul", matmul]))
    name = "lseg_labels.onnx" if (precision, matmul) == ("fp32", "4d") else f"lseg_labels_{precision}_{matmul}.onnx"
    rng = np.random.default_rng(seed)
    with OnnxRuntimeRunner(*tiny) as ours:
        session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        for batch in (1,) if matmul == "2d" else (1, 3):
            pixels = rng.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
            text = rng.standard_normal((20, ours.image.get_outputs()[0].shape[1])).astype(np.float32)
            text /= np.linalg.norm(text, axis=1, keepdims=True)
            labels, best = session.run(["labels", "best"], {"pixels": pixels, "text": text})
            wanted = ours.segment(pixels, text)
            assert (labels == wanted.labels).mean() >= (0.999 if precision == "fp32" else 0.98)
            assert np.abs(best - wanted.best).max() <= (1e-5 if precision == "fp32" else 1e-2)
    metadata = read_metadata(tmp_path / name)
    assert (metadata["kind"], metadata["precision"], metadata["matmul"]) == ("labels", precision, matmul)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([IMAGE_ONNX, name, SIMILARITY_ONNX])


def test_a_label_map_that_is_off_is_not_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("lseg.label_map_export.BOUNDS", {"fp32": 0.0})
    options = ["--weights", tiny.weights, "--output", str(tmp_path), "--quiet", "--label-map"]
    with pytest.raises(UserError, match="lseg_labels.onnx was not written: its cosines are .* off PyTorch's"):
        lseg_export.main(lseg_export.parse_args(options))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([IMAGE_ONNX, SIMILARITY_ONNX])
