"""The graphs behind the TensorRT engines, run by ONNX Runtime and held against PyTorch in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from lseg import checkpoint, scoring, specs
from lseg.errors import UserError
from lseg.loaded_engine import to_float32
from lseg.onnx_file import IMAGE_ONNX, TEXT_ONNX
from lseg.padding import pad_tokens
from lseg.patches import patches_as_product
from lseg.precision import to_bfloat16
from lseg.recipes import IMAGE
from lseg.similarity import Similarity
from tests.checkpoints import export_tiny
from tests.checkpoints import tiny_recipe as recipe
from tests.gpu.typed_tensorrt8 import plain_products

FORMS = [(precision, matmul) for precision in ("fp32", "fp16") for matmul in ("4d", "3d", "2d")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with tiny exported encoders, and the weights."""
    folder = tmp_path_factory.mktemp("onnx")
    return folder, export_tiny(folder, seed=3)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def random_inputs(seed: int, weights, batch: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = weights.image_config.image_size
    text = rng.standard_normal((labels, weights.image_config.embedding)).astype(np.float32)
    pixels = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    return pixels, text / np.linalg.norm(text, axis=1, keepdims=True)


def reference(weights, pixels: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, labels and their cosines by PyTorch in float64."""
    encoder = checkpoint.load_image_encoder(weights).double()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255 * 2 - 1
    with torch.no_grad():
        embeddings = encoder(images)
        labels, best, _ = Similarity()(embeddings, torch.from_numpy(text).double())
    return embeddings.numpy(), labels.numpy(), best.numpy()


@pytest.mark.parametrize(("precision", "matmul"), FORMS)
def test_labels(exported, seed, precision, matmul):
    folder, weights = exported
    model = recipe(folder, precision, matmul).prepare("labels")
    for batch in (1,) if matmul == "2d" else (1, 3):
        for count in (1, 8, 32):
            pixels, text = random_inputs(seed + batch, weights, batch, count)
            labels, best = run(model, {"pixels": pixels, "text": text})
            assert (labels.dtype, best.dtype) == (np.uint8, np.float32)
            _, wanted, cosines = reference(weights, pixels, text)
            agreement = (labels == wanted).mean()
            assert agreement >= (0.999 if precision == "fp32" else 0.98), (batch, count, agreement)
            assert np.abs(best - cosines).max() <= (1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(("precision", "matmul"), FORMS)
def test_the_encoder_ends_with_z(exported, seed, precision, matmul):
    """The head's output, which upsampled and divided by its length is the embeddings."""
    folder, weights = exported
    made = recipe(folder, precision, matmul)
    for batch in made.batches:
        pixels, text = random_inputs(seed, weights, batch, 1)
        images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255 * 2 - 1
        (z,) = run(made.prepare(IMAGE[batch]), {"image": images})
        assert z.dtype == (np.float32 if precision == "fp32" else np.float16)
        wide = torch.nn.functional.interpolate(
            torch.from_numpy(z).double(), scale_factor=2, mode="bilinear", align_corners=True
        )
        found = (wide / wide.norm(dim=1, keepdim=True)).numpy()
        expected = reference(weights, pixels, text)[0]
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error <= (1e-5 if precision == "fp32" else 2e-2), error


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_dot_products(exported, seed, precision):
    rng, kind = np.random.default_rng(seed), {"fp32": np.float32, "fp16": np.float16}[precision]
    for batch, texts in ((1, 1), (1, 256), (8, 3)):
        z = rng.standard_normal((batch, 24, 16, 16)).astype(kind)
        text = rng.standard_normal((texts, 24)).astype(np.float32)
        (found,) = run(recipe(exported[0], precision).prepare("dots"), {"z": z, "text": text})
        expected = text.astype(np.float64) @ z.reshape(batch, 24, -1).astype(np.float64)
        assert found.dtype == kind
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) <= (1e-6 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize("matmul", ["4d", "3d"])
def test_text(exported, seed, matmul):
    folder, weights = exported
    torch.manual_seed(seed)
    tokens = specs.random_tokens(5)
    (found,) = run(recipe(folder, "fp16", matmul).prepare("text"), {"tokens": tokens.numpy()})
    with torch.no_grad():
        expected = checkpoint.load_text_encoder(weights).double()(tokens.long()).numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) <= 1e-5  # float32 whatever the image's precision


def test_padding_changes_no_number(exported, seed):
    folder, weights = exported
    model = scoring.load_encoder(folder / IMAGE_ONNX)
    size = weights.image_config.image_size
    image = np.random.default_rng(seed).uniform(-1, 1, (2, 3, size, size)).astype(np.float32)
    (expected,) = run(model, {"image": image})
    tokens = weights.image_config.grid**2 + 1
    for multiple in (8, 64):
        padded = pad_tokens(model, multiple)
        (found,) = run(padded, {"image": image})
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) <= 1e-6
        shapes = {
            d
            for t in padded.graph.initializer
            if t.data_type == onnx.TensorProto.INT64
            for d in onnx.numpy_helper.to_array(t).ravel().tolist()
        }
        assert -(-tokens // multiple) * multiple in shapes
    assert pad_tokens(model, 1).graph.node == model.graph.node


def test_padding_refuses_a_graph_without_a_vit():
    with pytest.raises(UserError, match="no ViT"):
        pad_tokens(scoring.dot_graph(onnx.TensorProto.FLOAT, 8, 4))


def test_only_an_image_encoder_has_a_head_to_cut(exported):
    folder, _ = exported
    with pytest.raises(UserError, match="does not end as"):
        scoring.cut_head(onnx.load(folder / TEXT_ONNX))
    with pytest.raises(UserError, match="does not exist"):
        scoring.load_encoder(folder / "none.onnx")
    (folder / "cut.onnx").write_bytes((folder / IMAGE_ONNX).read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged or cut short"):
        scoring.load_encoder(folder / "cut.onnx")


@pytest.mark.parametrize(("precision", "matmul"), FORMS)
def test_types_and_reductions(exported, precision, matmul):
    """Layer norms and lengths are float32 in every form, and no reduction takes its axes as an input."""
    folder, _ = exported
    for name in ("labels", "image", "dots"):
        model = onnx.shape_inference.infer_shapes(recipe(folder, precision, matmul).prepare(name))
        onnx.checker.check_model(model)
        types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        for node in model.graph.node:
            if node.op_type in ("LayerNormalization", "ReduceL2"):
                assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
            if node.op_type == "Softmax":
                assert types[node.output[0]] == (
                    onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT
                )
            if node.op_type.startswith("Reduce"):
                assert len(node.input) == 1, node.name


def test_bfloat16_weights_are_rounded_from_float32(exported, seed):
    """Not from float16: each weight is what PyTorch rounds the exported one to, and what must stay float32 is."""
    core = scoring.cut_head(scoring.load_encoder(exported[0] / IMAGE_ONNX))
    exact = {tensor.name: numpy_helper.to_array(tensor) for tensor in core.graph.initializer}
    model = to_bfloat16(core)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    checked = 0
    for tensor in model.graph.initializer:
        assert tensor.data_type != TensorProto.FLOAT16
        if tensor.data_type == TensorProto.BFLOAT16:
            found = to_float32(np.frombuffer(tensor.raw_data, "<u2")).reshape(tuple(tensor.dims))
            expected = torch.from_numpy(exact[tensor.name].copy()).bfloat16().float().numpy()
            np.testing.assert_array_equal(found, expected)
            checked += found.size
    assert checked > 0.5 * sum(values.size for values in exact.values())
    for node in model.graph.node:
        if node.op_type in ("LayerNormalization", "ConvTranspose"):
            assert all(kinds[name] == TensorProto.FLOAT for name in node.input if name in kinds)
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.BFLOAT16


@pytest.mark.parametrize("batch", [1, 3])
def test_patches_as_a_product(exported, seed, batch):
    """The same numbers as the convolution gives; the one that read the image is gone."""
    folder, weights = exported
    size = weights.image_config.image_size
    core = scoring.cut_head(scoring.load_encoder(folder / IMAGE_ONNX))
    changed = patches_as_product(core)
    kinds = [[node.op_type for node in model.graph.node] for model in (core, changed)]
    assert kinds[1].count("Conv") == kinds[0].count("Conv") - 1
    assert kinds[1].count("MatMul") == kinds[0].count("MatMul") + 1
    images = np.random.default_rng(seed).uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)
    (expected,), (found,) = (run(model, {"image": images}) for model in (core, changed))
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("matmul", ["4d", "3d", "2d"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_where_patches_are_a_product(exported, precision, matmul):
    """In 16 bits, in every form: a convolution may add up in float16. In float32 it stays one."""
    model = recipe(exported[0], precision, matmul).prepare("image")
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    embeds = [node for node in convolutions if weights[node.input[1]][1:] == [3, 16, 16]]
    assert len(embeds) == (1 if precision == "fp32" else 0)


@pytest.mark.parametrize("change", ["stride", "no bias", "two readers", "another transpose"])
def test_other_first_layers_stay(exported, change):
    core = scoring.cut_head(scoring.load_encoder(exported[0] / IMAGE_ONNX))
    convolution = next(node for node in core.graph.node if "image" in node.input)
    if change == "stride":
        next(attribute for attribute in convolution.attribute if attribute.name == "strides").ints[:] = [2, 2]
    elif change == "no bias":
        del convolution.input[2]
    elif change == "two readers":
        core.graph.node.append(onnx.helper.make_node("Identity", ["image"], ["other"]))
    else:
        reshape = next(node for node in core.graph.node if convolution.output[0] in node.input)
        transpose = next(node for node in core.graph.node if reshape.output[0] in node.input)
        transpose.attribute[0].ints[:] = [1, 0, 2]
    assert patches_as_product(core) == core


@pytest.mark.parametrize("matmul", ["4d", "3d", "2d"])
def test_accumulating_in_float32(exported, matmul):
    """Around linear layers alone; taken out again, as for TensorRT 8.6, the graph is what it was."""
    made = recipe(exported[0], "fp16", matmul)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lseg.precision.accumulate_in_float32", lambda model, every=False: model)
        plain = {name: made.prepare(name) for name in ("image", "dots")}
    weights = {tensor.name for tensor in plain["image"].graph.initializer}
    layers = {"dots": 1}
    layers["image"] = sum(n.op_type == "MatMul" and bool(weights & {*n.input}) for n in plain["image"].graph.node)
    for name, count in layers.items():
        model = made.prepare(name)
        nodes = model.graph.node
        assert sum(node.op_type == "MatMul" and node.output[0].endswith("/float32") for node in nodes) == count > 0
        casts = [sum(node.op_type == "Cast" for node in graph.graph.node) for graph in (model, plain[name])]
        assert casts[0] == casts[1] + 3 * count
        assert plain_products(model) and not plain_products(plain[name])
        assert list(model.graph.node) == list(plain[name].graph.node)
    nodes = made.prepare("labels").graph.node
    assert nodes and not any(node.output[0].endswith("/float32") for node in nodes)
