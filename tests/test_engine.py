"""Engines built on the CPU with TensorRT-RTX, which has TensorRT 10's API and needs no GPU to build."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from lseg import checkpoint, engine, recipes, specs
from lseg.engine import EngineSpec, engine_path, get_engine, mismatch, provenance
from lseg.errors import UserError
from lseg.export import export_onnx
from lseg.onnx_file import IMAGE_ONNX, TEXT_ONNX, read_metadata
from tests.checkpoints import export_tiny
from tests.checkpoints import tiny_recipe as recipe

ROOT = Path(__file__).resolve().parent.parent
DEVICE = SimpleNamespace(name="a GPU", compute_capability="8.9")


@pytest.fixture
def trt(monkeypatch):
    """TensorRT-RTX in TensorRT's place."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (see requirements-dev.txt)")
    monkeypatch.setitem(sys.modules, "tensorrt", rtx)
    return rtx


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    export_tiny(folder, seed=5)
    return folder


def ranks_of_products(trt, serialized_onnx: bytes) -> set[tuple[int, int]]:
    """Ranks of both operands of every matrix product in the network that the parser makes."""
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(serialized_onnx)
    layers = (network.get_layer(i) for i in range(network.num_layers))
    products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    return {tuple(len(layer.get_input(i).shape) for i in (0, 1)) for layer in products}


EVERY = ()
BUILDS = [(precision, matmul, EVERY) for precision in ("fp32", "fp16") for matmul in ("4d", "2d")] + [
    ("tf32", "4d", ("image", "text")),
    ("bf16", "4d", ("image", "images8", "dots")),
    ("bf16", "2d", ("image",)),
    ("fp16", "3d", ("image", "text")),
]


@pytest.mark.parametrize(
    "precision, matmul, engines", BUILDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_engine_builds(trt, exported, tmp_path, precision, matmul, engines):
    made = recipe(exported, precision, matmul)
    for name in engines or (*(recipes.IMAGE[batch] for batch in made.batches), "dots", "text"):
        spec = made.spec(name)
        assert get_engine(spec, lambda name=name: made.prepare(name), tmp_path, DEVICE, say=lambda _: None)
        path = engine_path(tmp_path, provenance(spec, DEVICE))
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert sidecar["tensorrt"] == trt.__version__
        assert sidecar["onnx_sha256"] == engine.sha256(exported / (TEXT_ONNX if name == "text" else IMAGE_ONNX))
        assert sidecar["precision"] == ("fp32" if name == "text" and precision != "tf32" else precision)
        assert (sidecar["gpu"], sidecar["compute_capability"]) == ("a GPU", "8.9")
        assert sidecar["profiles"] and sidecar["build_seconds"] >= 0
    assert not list(tmp_path.glob(".unfinished-*")) and not list(tmp_path.glob("*.onnx"))


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """The official sizes with random weights, exported (1.3 GB): two minutes."""
    import testlseg

    folder = tmp_path_factory.mktemp("full")
    weights = checkpoint.load(testlseg.random_weights(folder))
    export_onnx(specs.image_spec(weights), folder / IMAGE_ONNX)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("matmul", ["4d", "2d"])
def test_the_full_size_builds(trt, full_size, tmp_path, precision, matmul):
    """ViT-L/16 at 480 x 480: half a minute and 5 GB each."""
    made = recipe(full_size, precision, matmul)
    serialized = get_engine(made.spec("image"), lambda: made.prepare("image"), tmp_path, DEVICE)
    assert len(serialized) > 5e8
    assert fused_attentions(serialized) == (24 if (precision, matmul) == ("fp16", "4d") else 0)
    if (precision, matmul) == ("fp16", "4d"):
        found = accumulators(serialized)
        assert found[2] >= 4 * 24 and found[0] <= 9  # of the head's 1 x 1 convolutions


def recipe_of(demo, precision: str, matmul: str) -> recipes.Recipe:
    """The demo weights' recipe."""
    config = read_metadata(demo.folder / IMAGE_ONNX)["image_config"]
    return recipes.Recipe(demo.folder, config, precision, matmul)


def build(made: recipes.Recipe, name: str, folder: Path) -> bytes:
    """One of its engines."""
    return get_engine(made.spec(name), lambda: made.prepare(name), folder, DEVICE, lambda _: None)


def fused_attentions(serialized: bytes) -> int:
    """How many kernels of fused attention an engine of TensorRT-RTX names: it holds each kernel's source."""
    return len(re.findall(rb"device_flash_attention_nl(?:_tiled)?\b", serialized))


@pytest.mark.parametrize(
    "precision, matmul", [("fp16", "4d"), ("fp16", "3d"), ("fp16", "2d"), ("bf16", "4d"), ("fp32", "4d")]
)
def test_attention_is_fused(trt, demo, tmp_path, precision, matmul):
    """In 16 bits each block's attention becomes one kernel in the 4-D and 3-D forms; never in 2-D or in float32."""
    made = recipe_of(demo, precision, matmul)
    expected = 0 if precision == "fp32" or matmul == "2d" else made.config["depth"]
    for name in ("image", "images8") if (precision, matmul) == ("fp16", "4d") else ("image",):
        assert fused_attentions(build(made, name, tmp_path)) == expected, name


def test_norms_and_gelu_are_one_kernel_each(trt, demo, tmp_path):
    """What TensorRT 8.6 makes several of, with float32 passed between them: the graph has both as they are exported."""
    made = recipe_of(demo, "fp16", "4d")
    depth, serialized = made.config["depth"], build(made, "images8", tmp_path)
    kernels = re.findall(rb"__myl_([A-Za-z]+)(?![A-Za-z_0-9])", serialized)  # named after what they do, in order
    assert sum(b"MeanSubMulMeanAddSqrt" in name for name in kernels) == 2 * depth
    assert sum(name.startswith(b"Fc") and b"Erf" in name for name in kernels) >= depth
    assert not any(name.endswith((b"Mean", b"Erf")) for name in kernels)


def accumulators(serialized: bytes) -> Counter[int]:
    """How many linear layers of a TensorRT-RTX engine have which type of accumulator: 0 its own choice, 2 float32."""
    return Counter(int(found) for found in re.findall(rb"accumulation_type=(\d+)", serialized))


@pytest.mark.parametrize("matmul", ["4d", "3d", "2d"])
def test_linear_layers_accumulate_in_float32(trt, demo, tmp_path, monkeypatch, matmul):
    """With float16 weights all the same: the engine is no larger than with products as they were."""
    made, found = recipe_of(demo, "fp16", matmul), {}
    layers = 4 * made.config["depth"] + 1  # a block has four, q, k and v together; and the patch embedding
    for name, least in (("image", layers), ("dots", 1)):
        serialized = build(made, name, tmp_path)
        assert accumulators(serialized)[2] >= least and (matmul == "2d" or not accumulators(serialized)[0]), name
        found[name] = len(serialized)
    monkeypatch.setattr("lseg.precision.accumulate_in_float32", lambda model, every=False: model)
    plain = build(made, "image", tmp_path / "plain")
    assert not accumulators(plain)[2] and accumulators(plain)[0] >= layers
    assert abs(len(plain) / found["image"] - 1) < 0.02


@pytest.mark.parametrize(
    "precision, matmul", [("fp16", "4d"), ("fp16", "3d"), ("fp16", "2d"), ("bf16", "4d"), ("fp32", "4d")]
)
def test_tokens_are_padded_where_scores_lie_in_memory(demo, precision, matmul):
    """What is fused brings no mask, and in the 4-D form q, k and v have linear layers of their own."""
    made = recipe_of(demo, precision, matmul)
    nodes = made.prepare("image").graph.node
    softmaxes = sum(node.op_type == "Softmax" for node in nodes)
    fused = precision != "fp32" and matmul != "2d"
    assert sum("tokens/mask" in node.input for node in nodes) == (0 if fused or matmul == "2d" else softmaxes)
    layers = sum(node.op_type == "MatMul" and node.name.endswith("/k_product") for node in nodes)
    assert layers == (made.config["depth"] if fused and matmul == "4d" else 0)


def test_ranks_in_the_parsed_network(trt, exported):
    ranks = {
        form: ranks_of_products(trt, recipe(exported, "fp32", form).prepare("image").SerializeToString())
        for form in ("4d", "3d")
    }
    assert (4, 4) in ranks["4d"]
    assert max(max(pair) for pair in ranks["3d"]) == 3


def test_what_each_engine_takes(exported):
    """The image encoder one image or eight, in the 2-D form one; texts any number up to 256."""
    for matmul, batches in (("4d", [8, 1]), ("2d", [1])):
        made = recipe(exported, "fp16", matmul)
        assert [profile["z"][0][0] for profile in made.profiles("dots")] == list(made.batches) == batches
        assert all([shape[0] for shape in profile["text"]] == [1, 8, 256] for profile in made.profiles("dots"))
        for batch in batches:
            graph = made.prepare(recipes.IMAGE[batch]).graph
            (image,), (z,) = graph.input, graph.output
            assert (image.name, z.name) == ("image", "z")
            assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [batch, 3, 64, 64]
            assert [d.dim_value for d in z.type.tensor_type.shape.dim] == [batch, 24, 16, 16]


@pytest.fixture
def built(trt, exported, tmp_path):
    """A small engine on disk: its spec, path, and a function that asks for it and counts builds."""
    made = recipe(exported)
    spec, calls, lines = made.spec("dots"), [], []

    def get() -> bytes:
        def prepare():
            calls.append(1)
            return made.prepare("dots")

        return get_engine(spec, prepare, tmp_path, DEVICE, lines.append)

    first = get()
    return SimpleNamespace(
        spec=spec, path=engine_path(tmp_path, provenance(spec, DEVICE)), get=get, calls=calls, lines=lines, first=first
    )


def test_an_engine_is_built_once(built):
    assert built.get() == built.first and len(built.calls) == 1
    assert built.lines == [f"building {built.path.name} (there is none yet); this takes minutes at full size"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "its contents do not match its sidecar"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "its contents do not match its sidecar"),
        (lambda path: path.with_suffix(".json").unlink(), "its sidecar is missing or damaged"),
        (lambda path: path.with_suffix(".json").write_text("{"), "its sidecar is missing or damaged"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "its sidecar is damaged"),
        (lambda path: change(path, tensorrt="9.9"), "it was made with another tensorrt"),
        (lambda path: change(path, gpu="another GPU"), "it was made with another gpu"),
        (lambda path: change(path, onnx_sha256="0"), "it was made with another onnx_sha256"),
        (lambda path: change(path, profiles=[]), "it was made with another profiles"),
    ],
)
def test_a_doubtful_engine_is_built_again(built, damage, reason):
    damage(built.path)
    assert mismatch(built.path, provenance(built.spec, DEVICE)) == reason
    built.get()
    assert len(built.calls) == 2 and f"({reason})" in built.lines[-1]
    assert mismatch(built.path, provenance(built.spec, DEVICE)) is None


def change(path: Path, **values: object) -> None:
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | values))


def test_names_tell_engines_apart(trt, exported):
    made = recipe(exported)
    one = engine_path(Path(), provenance(made.spec("image"), DEVICE))
    other_gpu = engine_path(Path(), provenance(made.spec("image"), SimpleNamespace(name="x", compute_capability="8.9")))
    assert one != other_gpu and one.name.startswith("image_fp32_4d_sm89_trt")


def build_in_process(exported: Path, folder: Path, queue) -> None:
    import tensorrt_rtx

    sys.modules["tensorrt"] = tensorrt_rtx
    made, calls = recipe(exported), []

    def prepare():
        calls.append(1)
        return made.prepare("dots")

    get_engine(made.spec("dots"), prepare, folder, DEVICE, lambda _: None)
    queue.put(len(calls))


def test_two_processes_build_one_engine(trt, exported, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=build_in_process, args=(exported, tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    counts = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(counts) == [0, 1]
    made = provenance(recipe(exported).spec("dots"), DEVICE)
    assert mismatch(engine_path(tmp_path, made), made) is None


def test_a_rejected_graph_names_the_node(trt, exported, tmp_path):
    import onnx

    model = recipe(exported).prepare("dots")
    model.graph.node[0].op_type = "NoSuchOperation"
    spec = EngineSpec("dots", "0", "fp32", "4d", recipe(exported).profiles("dots"))
    with pytest.raises(UserError, match=r"rejects the dots graph at node 0 \(NoSuchOperation .*\): .*; export"):
        get_engine(
            spec, lambda: onnx.ModelProto.FromString(model.SerializeToString()), tmp_path, DEVICE, lambda _: None
        )
    assert not list(tmp_path.glob("*.engine"))


def test_a_build_without_memory_is_told(trt, exported, tmp_path, monkeypatch):
    """The builder's last error is often no more than what came of it."""
    loggers, make = [], engine.make_logger

    def fail(*_: object) -> None:
        for message in ("Requested size was 9, out of memory", "no implementation found for node x"):
            loggers[-1].log(trt.ILogger.Severity.ERROR, message)

    monkeypatch.setattr(engine, "make_logger", lambda library: loggers.append(make(library)) or loggers[-1])
    monkeypatch.setattr(trt.Builder, "build_serialized_network", fail)
    made = recipe(exported)
    with pytest.raises(UserError, match="no implementation found for node x.: free GPU memory"):
        get_engine(made.spec("dots"), lambda: made.prepare("dots"), tmp_path, DEVICE, lambda _: None)


def test_a_failed_build_leaves_nothing(trt, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda *_: None)
    made = recipe(exported)
    with pytest.raises(UserError, match="cannot build the dots engine"):
        get_engine(made.spec("dots"), lambda: made.prepare("dots"), tmp_path, DEVICE, lambda _: None)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_folder_that_cannot_be_written(trt, exported, tmp_path):
    (tmp_path / "file").write_text("")
    made = recipe(exported)
    with pytest.raises(UserError, match=r"file/engines cannot be written .*--engines"):
        get_engine(made.spec("dots"), lambda: made.prepare("dots"), tmp_path / "file" / "engines", DEVICE, print)


def test_an_old_tensorrt_is_named(trt, exported, tmp_path, monkeypatch):
    old = SimpleNamespace(__version__="8.6.1", NetworkDefinitionCreationFlag=SimpleNamespace(), ILogger=trt.ILogger)
    old.Builder = trt.Builder
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    made = recipe(exported)
    with pytest.raises(UserError, match=r"TensorRT 8\.6\.1 has no strongly typed networks: install 10 or later"):
        get_engine(made.spec("dots"), lambda: made.prepare("dots"), tmp_path, DEVICE, lambda _: None)


def test_without_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="TensorRT cannot be imported .*pip install tensorrt"):
        engine.import_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    with pytest.raises(UserError, match="without its libraries"):
        engine.import_tensorrt()


def test_calls_against_the_stubs_of_tensorrt_10():
    pytest.importorskip("pyright", reason="pyright is not installed (see requirements-dev.txt)")
    if not list(Path(sys.prefix).glob("lib/python3*/site-packages/tensorrt/__init__.pyi")):
        pytest.skip("tensorrt-stubs is not installed (./requirements.sh --dev installs it)")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "lseg/engine.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
