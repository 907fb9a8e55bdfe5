"""The backends: the same results and stages from each, which one runs, and what bad ONNX files are told."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from checkpoints import write_tiny
from onnx import TensorProto, helper

import clip_onnx_export
import enginerun
import lseg_export
from lseg import checkpoint, onnx_file, specs
from lseg.errors import UserError, short
from lseg.export import export_onnx
from lseg.image import read_image, to_pixels
from lseg.onnx_file import IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX, remedy_for
from lseg.run_onnxruntime import OnnxRuntimeRunner
from lseg.run_torch import TorchRunner
from lseg.runner import STAGES, Segmentation, Timings, available_backends, choose_backend, open_runner
from lseg.tokenizer import Tokenizer

ROOT = Path(enginerun.__file__).parent
FILES = (IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX)
WORDS = ("sky", "building", "tree", "road", "pavement", "person", "car", "other")


@pytest.fixture(scope="module")
def runners(demo):
    with open_runner("onnxruntime", "demo", demo.folder) as first, open_runner("torch", "demo", demo.folder) as second:
        assert (type(first), type(second)) == (OnnxRuntimeRunner, TorchRunner)
        yield {"onnxruntime": first, "torch": second}


@pytest.fixture(scope="module")
def tiny_runners(tiny):
    with open_runner("onnxruntime", *tiny) as first, open_runner("torch", *tiny) as second:
        yield {"onnxruntime": first, "torch": second}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


class TestAgreement:
    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_labels_of_photo_and_noise(self, runners, batch, seed):
        """The bundled photo first, then random images."""
        noise = np.random.default_rng(seed).integers(0, 256, (batch - 1, 480, 480, 3), dtype=np.uint8)
        pixels = np.concatenate([to_pixels(read_image(enginerun.PHOTO))[None], noise])
        tokens = Tokenizer()(WORDS)
        text = {name: runner.encode_text(tokens) for name, runner in runners.items()}
        assert relative(text["onnxruntime"], text["torch"]) < 1e-4
        results = {name: runner.segment(pixels, text[name]) for name, runner in runners.items()}
        for result in results.values():
            assert type(result) is Segmentation and list(result.timings.milliseconds) == [
                "preprocess",
                "encode_image",
                "similarity",
            ]
            assert all(value > 0 for value in result.timings.milliseconds.values())
            assert (result.labels.shape, result.labels.dtype) == ((batch, 480, 480), np.int32)
            assert (result.best.shape, result.best.dtype) == ((batch, 480, 480), np.float32)
        first, second = results.values()
        agreement = (first.labels == second.labels).mean(axis=(1, 2))
        print(f"agreement {agreement}, largest difference of cosines {np.abs(first.best - second.best).max():.1e}")
        assert agreement.min() >= 0.999
        assert np.abs(first.best - second.best).max() < 1e-4
        assert len(np.unique(first.labels[0])) > 3  # of the photo: the comparison means something

    def test_embeddings(self, tiny_runners, seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
        found = {name: runner.encode_image(pixels) for name, runner in tiny_runners.items()}
        for embeddings in found.values():
            assert embeddings.shape == (3, 24, 32, 32) and embeddings.dtype == np.float32
            assert np.abs(np.linalg.norm(embeddings, axis=1) - 1).max() < 1e-5
        assert relative(found["onnxruntime"], found["torch"]) < 1e-4

    @pytest.mark.parametrize("count", [1, 2, 300, 1000])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_segment_equals_its_parts(self, tiny_runners, batch, count, seed):
        """Each backend's labels are the argmax of its own embeddings' products with the texts, in float64."""
        from test_model import score_as_the_official_code

        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
        text = rng.standard_normal((count, 24)).astype(np.float32)
        text /= np.linalg.norm(text, axis=1, keepdims=True)
        for runner in tiny_runners.values():
            expected = score_as_the_official_code(runner.encode_image(pixels), text)
            result = runner.segment(pixels, text)
            chosen = np.take_along_axis(expected, result.labels[:, None].astype(int), axis=1)[:, 0]
            assert (expected.max(axis=1) - chosen).max() < 1e-5
            assert np.abs(result.best - chosen).max() < 1e-5

    def test_many_texts(self, tiny_runners, seed):
        words = [f"word {n} {chr(97 + n % 26)}" for n in range(600)]
        texts = [runner.encode_text(Tokenizer()(words)) for runner in tiny_runners.values()]
        assert all(text.shape == (600, 24) and text.dtype == np.float32 for text in texts)
        assert relative(*texts) < 1e-4

    def test_description(self, tiny_runners):
        import onnxruntime
        import torch

        described = [str(runner.identity) for runner in tiny_runners.values()]
        assert described[0].startswith(f"ONNX Runtime {onnxruntime.__version__} (")
        assert described[1].startswith(f"PyTorch {torch.__version__} (")
        assert all(text.endswith("), fp32") for text in described)
        assert all(runner.image_size == 64 for runner in tiny_runners.values())

    @pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
    def test_closes(self, tiny, backend):
        with pytest.raises(RuntimeError, match="stop"), open_runner(backend, *tiny) as runner:
            assert runner.image is not None
            raise RuntimeError("stop")
        assert runner.image is None


class TestWeightsWithoutClip:
    """A checkpoint of the image encoder alone goes with CLIP's own text encoder."""

    @pytest.fixture
    def files(self, tiny, tmp_path):
        weights = checkpoint.load(tiny.weights)
        text = checkpoint.load_text_encoder(weights)
        tensors = {n: t for n, t in weights.tensors.items() if not n.startswith(checkpoint.CLIP_PREFIX)}
        path, folder = tmp_path / "alone.safetensors", tmp_path / "onnx"
        checkpoint.save_safetensors(path, tensors, weights.image_config, None)
        options = ["--weights", str(path), "--output", str(folder), "--quiet"]
        lseg_export.main(lseg_export.parse_args(options))
        made_from = {"weights": "ViT-B-32", "weights_sha256": "7" * 64, "text_config": text.config.to_dict()}
        return str(path), folder, specs.text_spec(text, made_from)

    def test_clips_own_serves(self, tiny, files, seed):
        path, folder, spec = files
        spec.metadata["source"] = "clip"
        export_onnx(spec, folder / TEXT_ONNX)
        tokens = Tokenizer()(WORDS)
        with OnnxRuntimeRunner(path, folder) as runner, OnnxRuntimeRunner(*tiny) as whole:
            assert runner.text_encoder == "7" * 64
            assert relative(runner.encode_text(tokens), whole.encode_text(tokens)) < 1e-6

    def test_others_do_not(self, tiny, files, tmp_path):
        path, folder, spec = files
        export_onnx(spec, folder / TEXT_ONNX)
        remedy = r"run 'python .*clip_onnx_export.py --weights openai --output .*'$"
        with pytest.raises(UserError, match=f"was exported from other weights .ViT-B-32. than asked for: {remedy}"):
            OnnxRuntimeRunner(path, folder)
        with pytest.raises(UserError, match="holds no CLIP text encoder: .*--weights openai.*give it with --text-onnx"):
            TorchRunner(path)
        spec.metadata["source"] = "clip"
        own = Path(shutil.copytree(tiny.folder, tmp_path / "own"))
        export_onnx(spec, own / TEXT_ONNX)
        with pytest.raises(UserError, match="was exported from other weights .ViT-B-32. than asked for"):
            OnnxRuntimeRunner(tiny.weights, own)  # these weights hold a text encoder of their own


class TestTimings:
    def test_adds_up(self):
        one, two = Timings(), Timings()
        assert one.measure("decode", lambda: 5) == 5
        first = one.milliseconds["decode"]
        one.measure("decode", lambda: None)
        assert one.milliseconds["decode"] > first > 0
        two.milliseconds = {"decode": 2.0, "draw": 3.0}
        before = one.milliseconds["decode"]
        one.add(two)
        assert one.milliseconds == {"decode": before + 2.0, "draw": 3.0}
        assert enginerun.report(Timings(dict.fromkeys(STAGES, 1.5)), 1) == (
            "milliseconds: decode 1.5, preprocess 1.5, encode_text 1.5, encode_image 1.5, similarity 1.5, draw 1.5"
        )


class TestChoice:
    @pytest.mark.parametrize(
        "installed, chosen",
        [(("onnxruntime", "torch"), "onnxruntime"), (("torch",), "torch"), (("onnxruntime",), None)],
    )
    def test_auto(self, installed, chosen, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
        assert available_backends() == list(installed)
        assert choose_backend("auto") == (chosen or "onnxruntime")
        assert [choose_backend(name) for name in installed] == list(installed)

    def test_none(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"^neither onnxruntime nor torch is installed: run './requirements.sh'$"):
            choose_backend("auto")

    @pytest.mark.parametrize("backend, others", [("torch", "onnxruntime"), ("onnxruntime", "torch")])
    def test_not_installed(self, backend, others, monkeypatch, tiny):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == others else None)
        with pytest.raises(UserError) as error:
            open_runner(backend, *tiny)
        assert str(error.value) == (
            f"the backend '{backend}' is not installed: run './requirements.sh', or choose another"
        )

    def test_no_such_backend(self, tiny):
        with pytest.raises(
            UserError, match="^there is no backend 'abacus': choose auto, tensorrt, onnxruntime or torch$"
        ):
            open_runner("abacus", *tiny)

    def test_onnxruntime_imports_no_torch(self, demo, tmp_path):
        """With torch hidden as if it were not installed, a run from exported files goes through, from start to end."""
        code = """
import sys
sys.modules["torch"] = None  # import torch fails, and importlib.util.find_spec finds nothing
import enginerun
status = enginerun.main(enginerun.parse_args(sys.argv[1:]))
assert sys.modules["torch"] is None
others = ("torchvision", "timm", "open_clip", "onnx", "onnxslim", "safetensors")
print(status, sorted(set(others) & set(sys.modules)), any(name.startswith("torch.") for name in sys.modules))
"""
        options = ["--onnx", str(demo.folder), "--output", str(tmp_path), "--backend", "auto", "--save-labels"]
        result = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert lines[0].startswith("ONNX Runtime ") and lines[-1] == "0 [] False"
        assert (tmp_path / "temple_lseg.png").is_file()

    def test_exporting_needs_torch(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "onnxruntime" else None)
        args = enginerun.parse_args(["--onnx", str(tmp_path), "--output", str(tmp_path)])
        with pytest.raises(UserError) as error:
            enginerun.main(args)
        assert str(error.value) == (
            f"{short(tmp_path) / TEXT_ONNX} is to be exported, and torch is not installed: run './requirements.sh', "
            "or bring the ONNX files from where they were exported"
        )


class TestBadFiles:
    """Each sentence names the file and the command that mends it."""

    @pytest.fixture
    def folder(self, tiny, tmp_path) -> Path:
        return Path(shutil.copytree(tiny.folder, tmp_path / "onnx"))

    def message(self, weights: str, folder: Path) -> str:
        with pytest.raises(UserError) as error:
            OnnxRuntimeRunner(weights, folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    def remedy(self, name: str, weights: str, folder: Path) -> str:
        script = "clip_onnx_export.py" if name == TEXT_ONNX else "lseg_export.py"
        words = ["python", str(short(ROOT / script)), "--weights", weights, "--output", str(folder)]
        return f"run '{shlex.join(words)}'"

    @pytest.mark.parametrize("name", FILES)
    def test_missing(self, tiny, folder, name):
        (folder / name).unlink()
        expected = f"{folder / name} does not exist: {self.remedy(name, tiny.weights, folder)}"
        assert self.message(tiny.weights, folder) == expected

    @pytest.mark.parametrize("name", FILES)
    def test_cut_short(self, tiny, folder, name, seed):
        whole = (folder / name).read_bytes()
        lengths = [0, 1, 100, len(whole) // 2, len(whole) - 1]
        lengths += np.random.default_rng(seed).integers(1, len(whole), 5).tolist()
        for length in lengths:
            (folder / name).write_bytes(whole[:length])
            message = self.message(tiny.weights, folder)
            assert message.startswith(str(folder / name)), length
            assert message.endswith(f": {self.remedy(name, tiny.weights, folder)}"), length

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"PK\x03\x04 zip", bytes(range(256))], ids=repr)
    def test_not_an_onnx_file(self, tiny, folder, name, content):
        (folder / name).write_bytes(content)
        message = self.message(tiny.weights, folder)
        assert message.startswith(f"{folder / name} is damaged, cut short or no ONNX file (")
        assert message.endswith(f"): {self.remedy(name, tiny.weights, folder)}")

    @pytest.mark.parametrize("name", FILES)
    def test_another_projects_file(self, tiny, folder, name):
        x = helper.make_tensor_value_info("x", TensorProto.INT64, ["N", 77])
        y = helper.make_tensor_value_info("y", TensorProto.INT64, ["N", 77])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", [x], [y])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / name)
        expected = f"{folder / name} is another project's file: {self.remedy(name, tiny.weights, folder)}"
        assert self.message(tiny.weights, folder) == expected

    @pytest.mark.parametrize("name, other", [(IMAGE_ONNX, SIMILARITY_ONNX), (SIMILARITY_ONNX, TEXT_ONNX)])
    def test_another_kind(self, tiny, folder, name, other):
        shutil.copy(folder / other, folder / name)
        kind, found = (file.removesuffix(".onnx") for file in (name, other))
        expected = f"{folder / name} holds '{found}', not '{kind}': {self.remedy(name, tiny.weights, folder)}"
        assert self.message(tiny.weights, folder) == expected

    @pytest.mark.parametrize("name", FILES)
    def test_other_weights(self, tiny, demo, folder, name):
        shutil.copy(demo.folder / name, folder / name)
        reason = "was exported from other weights (demo) than asked for"
        expected = f"{folder / name} {reason}: {self.remedy(name, tiny.weights, folder)}"
        assert self.message(tiny.weights, folder) == expected

    def test_weights_that_are_no_checkpoint(self, tiny, tmp_path):
        """That the ONNX files are another checkpoint's is true too, but would send the user the wrong way."""
        path = tmp_path / "demo_e200.ckpt"
        path.write_text("<html>quota exceeded</html>")
        assert self.message(str(path), tiny.folder).startswith(f"{path} is a web page, which Google Drive sends")

    def test_a_fixed_batch(self, tiny, folder, seed):
        options = ["--weights", tiny.weights, "--output", str(folder), "--batch", "2", "--quiet"]
        lseg_export.main(lseg_export.parse_args(options))
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
        with OnnxRuntimeRunner(tiny.weights, folder) as runner:
            assert runner.segment(pixels[:2], np.ones((2, 24), np.float32)).labels.shape == (2, 64, 64)
            with pytest.raises(UserError) as error:
                runner.segment(pixels, np.ones((2, 24), np.float32))
        assert str(error.value) == (
            "the exported image encoder takes 2 image(s) at a time, not 3: "
            + self.remedy(IMAGE_ONNX, tiny.weights, folder)
        )


class TestRemedy:
    def test_default_folder(self, monkeypatch, tmp_path):
        monkeypatch.chdir(ROOT)
        assert remedy_for("lseg_export.py", "demo", Path("onnx")) == "run 'python lseg_export.py --weights demo'"
        assert remedy_for("lseg_export.py", "demo", ROOT / "onnx") == "run 'python lseg_export.py --weights demo'"
        monkeypatch.chdir(tmp_path)  # another folder named onnx is not the default
        expected = f"run 'python {shlex.quote(str(ROOT / 'lseg_export.py'))} --weights demo --output onnx'"
        assert remedy_for("lseg_export.py", "demo", Path("onnx")) == expected

    def test_the_command_does_what_it_says(self, tmp_path, monkeypatch, seed):
        """From another folder, and with a space in the names, what the message says makes the run work."""
        folder = tmp_path / "my files"
        folder.mkdir()
        write_tiny(folder / "a b.safetensors", seed)
        monkeypatch.chdir(tmp_path)
        weights, output = str(folder / "a b.safetensors"), folder / "onnx files"
        for _ in range(2):
            with pytest.raises(UserError) as error:
                OnnxRuntimeRunner(weights, output)
            command = str(error.value).partition(": run '")[2].removesuffix("'")
            words = [sys.executable, *shlex.split(command)[1:]]
            subprocess.run(words, check=True, capture_output=True)
        with OnnxRuntimeRunner(weights, output) as runner:
            assert runner.image_size == 64

    def test_scripts_are_there(self):
        for script in (lseg_export, clip_onnx_export):
            assert (onnx_file.ROOT / Path(script.__file__).name).is_file()
