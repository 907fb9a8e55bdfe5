"""CLIP out of a checkpoint or a CLIP file, its image tower, and CLIP text encoders that others have exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
from checkpoints import halve_clip, write_lightning
from onnx import TensorProto, helper
from test_export import interface, reductions_with_axes_as_input, relative
from torch import Tensor, nn

import clip_onnx_export
from lseg import checkpoint
from lseg.clip import load_clip
from lseg.errors import UserError
from lseg.export import quiet_exporter
from lseg.onnx_file import TEXT_ONNX, parse_metadata
from lseg.run_onnxruntime import TEXT_REMEDY, OnnxRuntimeRunner, TextSession
from lseg.run_torch import TorchRunner
from lseg.tokenizer import Tokenizer

WORDS = ("car", "road", "a photo of a traffic light", "sky", "other")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[nn.Module, Path]:
    """open_clip's ViT-B-32-quickgelu with random weights that float16 holds, and its official-format checkpoint."""
    from conftest import fresh_seed

    torch.manual_seed(fresh_seed())
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None).eval().requires_grad_(False)
    state = {f"net.clip_pretrained.{name}": tensor for name, tensor in model.state_dict().items()}
    state = halve_clip(state)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16, torch.float32}
    model.load_state_dict({name.removeprefix("net.clip_pretrained."): tensor.float() for name, tensor in state.items()})
    path = tmp_path_factory.mktemp("clip") / "demo_e200.ckpt"
    write_lightning(path, state | {"net.scratch.head1.bias": torch.zeros(512)})
    yield model, path
    path.unlink()  # 350 MB


def unit(x: Tensor) -> np.ndarray:
    x = x.double()
    return (x / x.norm(dim=1, keepdim=True)).numpy()


class TestClip:
    @pytest.mark.slow  # ViT-B/32 with its visual tower at full size
    def test_both_towers_of_the_official_checkpoint(self, clip, tmp_path, seed):
        model, path = clip
        options = ["--weights", str(path), "--output", str(tmp_path), "--visual", "--quiet"]
        clip_onnx_export.main(clip_onnx_export.parse_args(options))
        sessions = {}
        for name in (TEXT_ONNX, "clip_visual.onnx"):
            found = onnx.load(tmp_path / name)
            assert reductions_with_axes_as_input(found) == [] and found.opset_import[0].version == 17
            sessions[name] = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
            metadata = parse_metadata(sessions[name].get_modelmeta().custom_metadata_map)
            assert metadata["kind"] == name.removesuffix(".onnx") and metadata["weights"] == "demo_e200"
            assert metadata["weights_sha256"] == checkpoint.tensorfile.sha256(path)
        assert metadata["visual_config"]["width"] == 768
        assert interface(found) == {"image": ("FLOAT", ["B", 3, 224, 224]), "embedding": ("FLOAT", ["B", 512])}

        tokens = Tokenizer()(WORDS)
        (text,) = sessions[TEXT_ONNX].run(["text"], {"tokens": tokens})
        assert relative(text, unit(model.encode_text(torch.from_numpy(tokens).long()))) < 1e-5
        images = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
        (visual,) = sessions["clip_visual.onnx"].run(["embedding"], {"image": images.numpy()})
        assert relative(visual, unit(model.encode_image(images))) < 1e-5
        for file in tmp_path.iterdir():
            file.unlink()

    def test_a_clip_file(self, clip, tmp_path, seed):
        model, _ = clip
        path = tmp_path / "ViT-B-32.pt"
        torch.save(model.state_dict(), path)
        found = load_clip(str(path), visual=True)
        assert found.metadata["weights"] == "ViT-B-32" and len(found.metadata["weights_sha256"]) == 64
        assert not found.text.training and not found.visual.training
        tokens = torch.from_numpy(Tokenizer()(WORDS))
        assert relative(found.text(tokens), unit(model.encode_text(tokens.long()))) < 1e-5
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))
        assert relative(found.visual(images), unit(model.encode_image(images))) < 1e-6
        assert load_clip(str(path)).visual is None
        path.unlink()

    def test_no_image_tower(self, tmp_path):
        options = ["--visual", "--output", str(tmp_path), "--quiet"]
        with pytest.raises(UserError) as error:
            clip_onnx_export.main(clip_onnx_export.parse_args(options))
        assert str(error.value) == "demo holds no CLIP image tower: leave --visual out, or give --weights openai"
        assert not list(tmp_path.iterdir())

    def test_another_image_tower(self, tiny):
        with pytest.raises(
            UserError, match=r"tiny.safetensors does not hold CLIP ViT-B/32's image tower \(Error"
        ) as error:
            load_clip(tiny.weights, visual=True)
        assert "\n" not in str(error.value)


class Plain(nn.Module):
    """The demo's text encoder as others export CLIP's: int64 tokens in, vectors of many lengths out."""

    def __init__(self):
        super().__init__()
        self.encoder = checkpoint.load_text_encoder(checkpoint.load("demo"))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens) * (tokens > 0).sum(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def ready_made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ready-made")
    tokens = torch.from_numpy(Tokenizer()(WORDS[:2])).long()
    axes = {"input": {0: "batch_size"}, "output": {0: "batch_size"}}
    for name, dynamic in (("clip.onnx", axes), ("single.onnx", None)):
        with quiet_exporter():
            torch.onnx.export(
                Plain(),
                (tokens if dynamic else tokens[:1],),
                str(folder / name),
                input_names=["input"],
                output_names=["output"],
                dynamic_axes=dynamic,
                opset_version=17,
                dynamo=False,
            )
    return folder


def constant_model(
    path: Path, value: np.ndarray, kind: int = TensorProto.INT64, shape=("N", 77), inputs: int = 1
) -> Path:
    """An ONNX file that takes inputs of one kind and shape, and gives each row of the first the same vector."""
    given = [helper.make_tensor_value_info(f"x{n}", kind, shape) for n in range(inputs)]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * value.ndim)
    tensors = {
        "value": value.astype(np.float32),
        "first": np.array([0]),
        "one": np.array([1]),
        "ones": np.array([1] * max(value.ndim - 1, 1)),
    }
    nodes = [
        helper.make_node("Shape", ["x0"], ["shape"]),
        helper.make_node("Slice", ["shape", "first", "one"], ["rows"]),
        helper.make_node("Concat", ["rows", "ones"], ["repeats"], axis=0),
        helper.make_node("Tile", ["value", "repeats"], ["y"]),
    ]
    initialisers = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "constant", given, [result], initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


class TestReadyMade:
    @pytest.mark.parametrize("name", ["clip.onnx", "single.onnx"])
    def test_is_normalised(self, ready_made, name):
        tokens = Tokenizer()(WORDS)
        raw = onnxruntime.InferenceSession(ready_made / name, providers=["CPUExecutionProvider"])
        lengths = [np.linalg.norm(raw.run(None, {"input": row[None].astype(np.int64)})[0]) for row in tokens]
        assert min(lengths) > 2 and max(lengths) > 2 * min(lengths)
        text = TextSession(ready_made / name, 512)(tokens)
        expected = checkpoint.load_text_encoder(checkpoint.load("demo"))(torch.from_numpy(tokens))
        assert text.shape == (5, 512) and text.dtype == np.float32
        assert np.abs(np.linalg.norm(text.astype(np.float64), axis=1) - 1).max() < 1e-6
        assert relative(text, expected) < 1e-5

    def test_serves_both_backends(self, demo, ready_made):
        tokens = Tokenizer()(WORDS)
        with OnnxRuntimeRunner("demo", demo.folder) as runner:
            own = runner.encode_text(tokens)
        with OnnxRuntimeRunner("demo", demo.folder, ready_made / "clip.onnx") as runner:
            assert relative(runner.encode_text(tokens), own) < 1e-5
        with TorchRunner("demo", ready_made / "clip.onnx") as runner:
            assert relative(runner.encode_text(tokens), own) < 1e-5

    def test_large_and_small_numbers(self, tmp_path, seed):
        value = np.random.default_rng(seed).standard_normal((1, 512)).astype(np.float32)
        for scale in (1e-30, 1e30):
            path = constant_model(tmp_path / "scaled.onnx", value * np.float32(scale))
            text = TextSession(path, 512)(Tokenizer()(WORDS))
            assert relative(text, np.repeat(value / np.linalg.norm(value), 5, axis=0)) < 1e-6

    REFUSED = {
        "float input": (
            dict(value=np.ones((1, 512)), kind=TensorProto.FLOAT),
            "takes tensor(float), not int32 or int64 tokens",
        ),
        "image encoder": (
            dict(value=np.ones((1, 512)), kind=TensorProto.FLOAT, shape=("B", 3, 224, 224)),
            "takes images, not tokens, so it is an image encoder",
        ),
        "two inputs": (dict(value=np.ones((1, 512)), inputs=2), "is no text encoder, which takes one input of tokens"),
        "short rows": (
            dict(value=np.ones((1, 512)), shape=("N", 64)),
            "takes rows of 64 tokens, and CLIP's have 77",
        ),
    }

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused_when_opened(self, tmp_path, name):
        arguments, sentence = self.REFUSED[name]
        path = constant_model(tmp_path / "other.onnx", **arguments)
        with pytest.raises(UserError) as error:
            TextSession(path, 512)
        assert str(error.value).startswith(f"{path} {sentence}") and str(error.value).endswith(f": {TEXT_REMEDY}")

    UNUSABLE = {
        "dimension": (np.ones((1, 768)), "gives vectors of shape [5, 768], not [5, 512]"),
        "vector per token": (np.ones((1, 77, 512)), "gives vectors of shape [5, 77, 512], not [5, 512]"),
        "too many rows": (np.ones((2, 512)), "gives vectors of shape [10, 512], not [5, 512]"),
        "zero": (np.zeros((1, 512)), "gives vectors that are zero or not finite"),
        "not a number": (np.full((1, 512), np.nan), "gives vectors that are zero or not finite"),
        "infinite": (np.full((1, 512), np.inf), "gives vectors that are zero or not finite"),
    }

    @pytest.mark.parametrize("name", UNUSABLE)
    def test_refused_when_run(self, tmp_path, name):
        value, sentence = self.UNUSABLE[name]
        text = TextSession(constant_model(tmp_path / "other.onnx", value), 512)
        with pytest.raises(UserError) as error:
            text(Tokenizer()(WORDS))
        assert str(error.value) == f"{text.path} {sentence}: {TEXT_REMEDY}"

    def test_rows_that_it_does_not_take(self, tmp_path):
        """A batch fixed at two serves neither one label nor five."""
        path = constant_model(tmp_path / "two.onnx", np.ones((1, 512), np.float32), shape=(2, 77))
        with pytest.raises(UserError, match=rf"two.onnx does not take CLIP's tokens \[5, 77\] \(.*\): {TEXT_REMEDY}"):
            TextSession(path, 512)(Tokenizer()(WORDS))

    @pytest.mark.parametrize("content", [b"", b"<html>sign in</html>", b"\x08\x08\x12"])
    def test_not_an_onnx_file(self, tmp_path, content):
        path = tmp_path / "clip.onnx"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"clip.onnx is damaged, cut short or no ONNX file \(.*\): give CLIP ViT"):
            TextSession(path, 512)
        with pytest.raises(UserError, match="none.onnx does not exist: give CLIP ViT-B/32's text encoder"):
            TextSession(tmp_path / "none.onnx", 512)
        with pytest.raises(UserError, match="is no file: give CLIP ViT-B/32's text encoder"):
            TextSession(tmp_path, 512)
