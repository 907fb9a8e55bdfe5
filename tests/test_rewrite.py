"""The matmul forms: the same numbers as the exported file and as PyTorch in float64, and the ranks they promise."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_tiny
from onnx import helper, numpy_helper

from lseg import specs
from lseg.checkpoint import load, load_image_encoder, load_text_encoder
from lseg.errors import UserError
from lseg.export import export_onnx
from lseg.onnx_file import write_onnx
from lseg.rewrite import FORMS, matmul_ranks, rewrite_matmuls

TOLERANCE = 1e-5  # relative, in float32


class Encoders:
    """Both encoders of one checkpoint as ONNX files, with their numbers in PyTorch float64."""

    def __init__(self, weights, folder: Path, note: str):
        self.weights, self.note = weights, note
        export_onnx(specs.image_spec(weights), folder / "image.onnx")
        text = load_text_encoder(weights)
        export_onnx(specs.text_spec(text, {}), folder / "text.onnx")
        self.image, self.text = onnx.load(folder / "image.onnx"), onnx.load(folder / "text.onnx")
        self.text64 = load_text_encoder(weights).double().eval()
        self.image64 = load_image_encoder(weights).double().eval()

    def images(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        size = self.weights.image_config.image_size
        return rng.uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)

    def expected(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.image64(torch.from_numpy(images).double()).numpy()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Encoders:
    folder, seed = tmp_path_factory.mktemp("tiny"), random.SystemRandom().randrange(2**31)
    return Encoders(write_tiny(folder / "tiny.safetensors", seed), folder, f"tiny weights of seed {seed}")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Encoders:
    return Encoders(load("demo"), tmp_path_factory.mktemp("demo"), "demo weights")


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {model.graph.input[0].name: x})
    return found


def off(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize("form, apart", [("4d", False), ("4d", True), ("3d", False)])
def test_free_batch_same_numbers_tiny(tiny, form, apart, seed):
    print(tiny.note)
    rng = np.random.default_rng(seed)
    model = rewrite_matmuls(tiny.image, form, apart=apart)
    for batch in (1, 2, 3, 5, 8):
        images = tiny.images(rng, batch)
        found = run(model, images)
        assert off(found, run(tiny.image, images)) <= TOLERANCE
        assert off(found, tiny.expected(images)) <= TOLERANCE


@pytest.mark.parametrize("form", ["4d", "3d"])
@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_text_same_numbers(which, form, seed, request):
    encoders = request.getfixturevalue(which)
    print(encoders.note)
    torch.manual_seed(seed)
    model = rewrite_matmuls(encoders.text, form)
    for count in (1, 2, 3, 5, 8):
        tokens = specs.random_tokens(count)
        found = run(model, tokens.numpy())
        assert off(found, run(encoders.text, tokens.numpy())) <= TOLERANCE
        with torch.no_grad():
            assert off(found, encoders.text64(tokens).numpy()) <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("together", [1, 2, 3, 4, 100])
def test_2d_same_numbers_tiny(tiny, batch, together, seed):
    print(tiny.note)
    images = tiny.images(np.random.default_rng(seed), batch)
    model = rewrite_matmuls(tiny.image, "2d", together, batch)
    found = run(model, images)
    assert off(found, run(tiny.image, images)) <= TOLERANCE
    assert off(found, tiny.expected(images)) <= TOLERANCE
    # Tiny has 6 blocks of 4 heads: the largest divisor of 4 up to what was asked for shares a product.
    groups = 4 // {1: 1, 2: 2, 3: 2, 4: 4, 100: 4}[together]
    assert len(nodes(model, "Softmax")) == 6 * batch * groups
    assert matmul_ranks(model) == {(2, 2): 6 * (4 + 2 * batch * groups) + 4 * 2}
    assert [d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim] == [batch, 24, 32, 32]


def test_demo_same_numbers(demo, seed):
    rng = np.random.default_rng(seed)
    for batch, forms in ((1, [("2d", 1), ("4d", 1)]), (2, [("2d", 3), ("3d", 1)])):
        images = demo.images(rng, batch)
        expected = run(demo.image, images)
        for form, together in forms:
            model = rewrite_matmuls(demo.image, form, together, batch if form == "2d" else None)
            assert off(run(model, images), expected) <= TOLERANCE, (form, together, batch)


def test_file_of_fixed_batch(tiny, tmp_path, seed):
    export_onnx(specs.image_spec(tiny.weights, batch=2), tmp_path / "fixed.onnx")
    model = onnx.load(tmp_path / "fixed.onnx")
    assert nodes(model, "Gemm")  # the simplifier makes them where the batch is fixed
    images = tiny.images(np.random.default_rng(seed), 2)
    for form in FORMS:
        for batch in (None, 2):
            rewritten = rewrite_matmuls(model, form, batch=batch)
            assert off(run(rewritten, images), tiny.expected(images)) <= TOLERANCE
            assert not nodes(rewritten, "Gemm")
            assert matmul_ranks(rewritten) == matmul_ranks(rewrite_matmuls(tiny.image, form, batch=2))
        with pytest.raises(UserError, match="^fixed.onnx has a fixed batch of 2, not 3: export it with a free batch$"):
            rewrite_matmuls(model, form, batch=3, name="fixed.onnx")


def test_ranks_of_each_form(tiny):
    # 6 blocks: 4 linear layers and 2 products each; 4 readouts of 2 linear layers.
    linear, products = 6 * 4 + 4 * 2, 6 * 2
    assert matmul_ranks(tiny.image) == {(3, 2): linear, (4, 4): products}
    assert matmul_ranks(rewrite_matmuls(tiny.image, "4d")) == {(3, 2): linear, (4, 4): products}
    assert matmul_ranks(rewrite_matmuls(tiny.image, "3d")) == {(3, 2): linear, (3, 3): products}
    # 2 blocks; the narrow token table's projection, and the final one on [N, C].
    text = {(3, 2): 2 * 4 + 1, (2, 2): 1}
    assert matmul_ranks(rewrite_matmuls(tiny.text, "4d")) == text | {(4, 4): 4}
    assert matmul_ranks(rewrite_matmuls(tiny.text, "3d")) == text | {(3, 3): 4}


def test_2d_keeps_tokens_flat_through_a_block(tiny):
    """Between the first linear layer and the last block's end, Reshapes stand only where maps are tapped."""
    model = rewrite_matmuls(tiny.image, "2d", 1, 1)
    names = [node.name for node in nodes(model, "Reshape")]
    assert not [name for name in names if "/mlp/" in name or "/norm2/" in name]
    shapes = {v.name: len(v.type.tensor_type.shape.dim) for v in model.graph.value_info}
    assert [shapes[node.input[0]] for node in nodes(model, "LayerNormalization")] == [3] + [2] * 11


@pytest.mark.parametrize("which", ["image", "text"])
def test_4d_is_the_pattern_that_engines_fuse(tiny, which):
    model = rewrite_matmuls(getattr(tiny, which), "4d")
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    softmaxes = nodes(model, "Softmax")
    assert len(softmaxes) == (6 if which == "image" else 2)
    for softmax in softmaxes:
        scores = makers[softmax.input[0]]
        if which == "text":
            assert scores.op_type == "Add" and scores.input[1] in constants
            scores = makers[scores.input[0]]
        q, k = (makers[name] for name in scores.input)
        assert (scores.op_type, q.op_type, k.op_type) == ("MatMul", "Mul", "Transpose")
        width = (32 if which == "image" else 16) // (4 if which == "image" else 2)
        assert numpy_helper.to_array(initializer(model, q.input[1])) == np.float32(width**-0.5)
        assert makers[k.input[0]].op_type == makers[q.input[0]].op_type == "Squeeze"  # nothing else scales
        (product,) = (node for node in model.graph.node if softmax.output[0] in node.input)
        assert product.op_type == "MatMul" and makers[product.input[1]].op_type == "Squeeze"


@pytest.mark.parametrize("form", FORMS)
def test_names_metadata_and_opset_stay(tiny, form):
    before = tiny.image.SerializeToString(deterministic=True)
    model = rewrite_matmuls(tiny.image, form, batch=1)
    assert tiny.image.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(model, full_check=True)
    for field in ("input", "output"):
        assert [v.name for v in getattr(model.graph, field)] == [v.name for v in getattr(tiny.image.graph, field)]
    metadata = {entry.key: entry.value for entry in tiny.image.metadata_props}
    assert metadata and {entry.key: entry.value for entry in model.metadata_props} == metadata
    assert model.ir_version == tiny.image.ir_version
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    reductions = [node for node in model.graph.node if node.op_type.startswith("Reduce")]
    assert reductions and all(len(node.input) == 1 for node in reductions)
    names = [node.name for node in model.graph.node]
    assert all(names) and len(set(names)) == len(names)
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used


def test_forms_of_forms(tiny, seed):
    """A rewritten file can be rewritten again."""
    images = tiny.images(np.random.default_rng(seed), 2)
    model = rewrite_matmuls(rewrite_matmuls(tiny.image, "4d"), "4d")
    for form in ("3d", "2d"):
        again = rewrite_matmuls(model, form, 2, 2)
        assert matmul_ranks(again) == matmul_ranks(rewrite_matmuls(tiny.image, form, 2, 2))
        assert off(run(again, images), tiny.expected(images)) <= TOLERANCE


def test_weights_in_a_file_beside(tiny, tmp_path, seed):
    path = write_onnx(onnx.load_from_string(tiny.image.SerializeToString()), tmp_path / "a.onnx", {}, limit=1000)
    assert list(tmp_path.glob("*.data"))
    images = tiny.images(np.random.default_rng(seed), 1)
    for form in FORMS:
        assert off(run(rewrite_matmuls(onnx.load(path), form, batch=1), images), tiny.expected(images)) <= TOLERANCE


def test_half_precision(tiny, seed):
    """A float16 file keeps its type, and the forms differ by its rounding only."""
    half = onnx.load_from_string(tiny.text.SerializeToString())
    for tensor in half.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for node in nodes(half, "Cast"):  # one counts positions of tokens, the others are the scale's
        node.attribute[0].i = onnx.TensorProto.FLOAT if node.input[0] == "tokens" else onnx.TensorProto.FLOAT16
    half.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del half.graph.value_info[:]
    torch.manual_seed(seed)
    tokens = specs.random_tokens(3).numpy()
    expected = run(half, tokens)
    assert expected.dtype == np.float16
    for form in ("4d", "3d"):
        assert off(run(rewrite_matmuls(half, form), tokens), expected) <= 5e-3


def test_unusual_scale_is_kept(tiny, seed):
    model = onnx.load_from_string(tiny.image.SerializeToString())
    softmax = nodes(model, "Softmax")[0]
    makers = {name: node for node in model.graph.node for name in node.output}
    scaled = makers[makers[softmax.input[0]].input[0]]
    initializer(model, scaled.input[1]).CopyFrom(numpy_helper.from_array(np.array(0.9, np.float32), scaled.input[1]))
    images = tiny.images(np.random.default_rng(seed), 1)
    expected = run(model, images)
    assert off(expected, run(tiny.image, images)) > 1e-3
    for form in FORMS:
        assert off(run(rewrite_matmuls(model, form, batch=1), images), expected) <= TOLERANCE


def swap_q_and_v(model: onnx.ModelProto) -> None:
    q, _, v = nodes(model, "Squeeze")[:3]
    q.input[0], v.input[0] = v.input[0], q.input[0]


def transpose_heads(model: onnx.ModelProto) -> None:
    """Cuts q, k and v from other channels than the usual; shapes stay."""
    cut = next(node for node in nodes(model, "Reshape") if len(shape_of(model, node.output[0])) == 5)
    name = "other_channels"
    model.graph.initializer.append(numpy_helper.from_array(np.roll(np.arange(96), 1), name))
    place = list(model.graph.node).index(cut)
    model.graph.node.insert(place, helper.make_node("Gather", [cut.input[0], name], ["moved"], name, axis=2))
    cut.input[0] = "moved"


def scale_v(model: onnx.ModelProto) -> None:
    product = next(n for n in nodes(model, "MatMul") if nodes(model, "Softmax")[0].output[0] in n.input)
    model.graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
    place = list(model.graph.node).index(product)
    model.graph.node.insert(place, helper.make_node("Mul", [product.input[1], "two"], ["doubled"], "double"))
    product.input[1] = "doubled"


def softmax_over_queries(model: onnx.ModelProto) -> None:
    softmax = nodes(model, "Softmax")[0]
    softmax.attribute[0].i = 2


def shape_of(model: onnx.ModelProto, name: str) -> list:
    return next(list(v.type.tensor_type.shape.dim) for v in model.graph.value_info if v.name == name)


@pytest.mark.parametrize("change", [swap_q_and_v, transpose_heads, scale_v, softmax_over_queries])
def test_other_attention_is_refused(tiny, change):
    model = onnx.load_from_string(tiny.image.SerializeToString())
    change(model)
    onnx.checker.check_model(model)
    for form in FORMS:
        with pytest.raises(UserError, match="^x.onnx has a MatMul of unknown kind, '/blocks.0/attn/MatMul.*'") as error:
            rewrite_matmuls(model, form, batch=1, name="x.onnx")
        assert str(error.value).endswith(": give an encoder that lseg_export.py wrote")


def test_refusals(tiny, tmp_path):
    def refusal(*arguments, **options) -> str:
        with pytest.raises(UserError) as error:
            rewrite_matmuls(*arguments, **options)
        return str(error.value)

    assert refusal(tiny.image, "5d") == "the matmul form '5d' is unknown: choose 4d, 3d or 2d"
    assert refusal(tiny.image, "2d") == (
        "the ONNX file has a free batch, and the 2d form needs a fixed one: give a batch, or choose 4d or 3d"
    )
    text = "t.onnx is a text encoder, and the 2d form is the image encoder's: choose 4d or 3d"
    assert refusal(tiny.text, "2d", name="t.onnx") == refusal(tiny.text, "2d", batch=4, name="t.onnx") == text
    assert refusal(tiny.image, "2d", 0, 1) == "heads per product cannot be 0: give 1 or more"
    assert refusal(tiny.image, "2d", 2, 0) == "batch cannot be 0: give 1 or more"

    export_onnx(specs.similarity_spec(tiny.weights), tmp_path / "similarity.onnx")
    similarity = onnx.load(tmp_path / "similarity.onnx")
    for form in FORMS:
        assert refusal(similarity, form, name="similarity.onnx") == (
            "similarity.onnx has no attention to rewrite: give an encoder that lseg_export.py wrote"
        )


def test_2d_refuses_what_it_cannot_flatten(tiny):
    """A linear layer whose 3-D result is an output of the file."""
    model = onnx.load_from_string(tiny.image.SerializeToString())
    last = [n for n in nodes(model, "MatMul") if "mlp/fc2" in n.name][-1]
    model.graph.output.append(helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, ["B", 17, 32]))
    with pytest.raises(UserError, match=f"^MatMul '{last.name}' of the ONNX file cannot be made 2-D: choose 4d or 3d$"):
        rewrite_matmuls(model, "2d", batch=1)


def test_ranks_that_cannot_be_told():
    node = helper.make_node("MatMul", ["a", "b"], ["y"], "product")
    a, b, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "aby")
    model = helper.make_model(helper.make_graph([node], "g", [a, b], [y]), opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(UserError, match="^the rank of an operand of MatMul 'product' cannot be told: export the file"):
        matmul_ranks(model)


def parsed_ranks(model: onnx.ModelProto) -> Counter[tuple[int, int]]:
    """What matmul_ranks counts, as TensorRT's ONNX parser sees it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, which parses on the CPU, is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
    layers = (network.get_layer(i) for i in range(network.num_layers))
    products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    return Counter(tuple(len(layer.get_input(i).shape) for i in range(2)) for layer in products)


@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_ranks_in_the_parsed_network(which, request):
    encoders = request.getfixturevalue(which)
    blocks, linear = encoders.weights.image_config.depth, encoders.weights.image_config.depth * 4 + 8
    # The parser gives a linear layer's weights a leading axis of 1.
    assert parsed_ranks(rewrite_matmuls(encoders.image, "4d")) == {(3, 3): linear, (4, 4): 2 * blocks}
    assert parsed_ranks(rewrite_matmuls(encoders.image, "3d")) == {(3, 3): linear + 2 * blocks}
    for together, batch in ((1, 1), (encoders.weights.image_config.heads, 2)):
        groups = encoders.weights.image_config.heads // together
        ranks = parsed_ranks(rewrite_matmuls(encoders.image, "2d", together, batch))
        assert ranks == {(2, 2): linear + 2 * blocks * groups * batch}
    text = parsed_ranks(rewrite_matmuls(encoders.text, "3d"))
    assert max(map(max, text)) == 3
    assert (4, 4) in parsed_ranks(rewrite_matmuls(encoders.text, "4d"))
