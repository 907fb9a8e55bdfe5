"""Runs a script of this repository on TensorRT 8.6, typing each network as its ONNX file says.

    python tests/gpu/typed_tensorrt8.py testlseg.py --backends tensorrt ...

TensorRT 10's strongly typed networks take every tensor's type from the ONNX file; 8.6 has none and would run the same
graph in float32. Here each layer of an 8.6 network is given the types that ONNX's own inference finds in the file, and
the builder is told to prefer them. Figures taken so carry the version "8.6.0+typed". But 8.6 fuses attention only where
no layer has a type of its own: with LSEG_TYPES=free in the environment the builder chooses each layer's, float16 or
float32 ("8.6.0+free"). Products whose operands are cast to float32, which TensorRT 10 makes float16 kernels of that add
up in float32, would run in float32 here: the casts are taken out, and 8.6 adds up as it likes. With LSEG_TYPES=float32
they stay, and those products are slow but computed as TensorRT 10's are: "8.6.0+float32". Nothing else of 8.6 is
hidden; explicit batches and the progress monitor must be bridged elsewhere.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STRONGLY_TYPED = 30  # a bit that 8.6 does not know: removed before the library sees it


def onnx_types(path: str) -> dict[str, str]:
    """ "FLOAT" or "HALF" for each such tensor of an ONNX file; None for tensors of other types."""
    import onnx

    kinds = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF"}
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        inferred = os.path.join(folder, "typed.onnx")
        onnx.shape_inference.infer_shapes_path(path, inferred)
        graph = onnx.load(inferred, load_external_data=False).graph
    types = {tensor.name: kinds.get(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = kinds.get(value.type.tensor_type.elem_type)
    return types


def plain_products(model) -> bool:
    """Takes out of a graph what `lseg.precision.accumulate_in_float32` put around products; whether it had any."""
    nodes = model.graph.node
    makers = {name: node for node in nodes for name in node.output}
    casts = {node.input[0]: node for node in nodes if node.op_type == "Cast"}
    around = []
    for node in nodes:
        if node.op_type == "MatMul" and node.output[0].endswith("/float32"):
            back, operands = casts[node.output[0]], [makers[name] for name in node.input]
            around += [*operands, back]
            node.input[:], node.output[0] = [cast.input[0] for cast in operands], back.output[0]
    for cast in around:
        nodes.remove(cast)
    return bool(around)


def type_layers(trt, network, types: dict[str, str | None]) -> Counter:
    """Gives each arithmetic layer the type that its output has in `types`; returns how many got which."""
    names = "ACTIVATION CONVOLUTION DECONVOLUTION ELEMENTWISE MATRIX_MULTIPLY NORMALIZATION POOLING REDUCE RESIZE SCALE"
    arithmetic = {getattr(trt.LayerType, name) for name in f"{names} SELECT SOFTMAX TOPK UNARY".split()}
    floats = {"FLOAT": trt.float32, "HALF": trt.float16}
    count: Counter = Counter()
    for layer, kind in with_types(trt, network, types):
        if layer.type in arithmetic and kind and layer.get_output(0).dtype in floats.values():
            layer.precision = floats[kind]
            layer.set_output_type(0, floats[kind])
            count[kind] += 1
    return count


def with_types(trt, network, types: dict[str, str | None]):
    """Each layer and its output's type. The parser's own helpers are of their first input's, as far as it is known."""
    known = dict(types)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.num_outputs == 0:
            continue
        name = layer.get_output(0).name
        if name not in known and layer.type not in (trt.LayerType.SHAPE, trt.LayerType.CONSTANT):
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            known[name] = next((known[t.name] for t in inputs if t is not None and known.get(t.name)), None)
        yield layer, known.get(name)


def bridge(trt, kind: str) -> None:
    """Types the networks of the installed TensorRT as their files say, or lets its builder. One network at a time.

    `kind`: "typed", "free" or "float32", as LSEG_TYPES.
    """
    typed = kind != "free"
    create, build, parse = (
        trt.Builder.create_network,
        trt.Builder.build_serialized_network,
        trt.OnnxParser.parse_from_file,
    )
    types: dict[str, str | None] = {}  # of the file that was parsed last

    def create_network(self, flags: int = 0):
        return create(self, int(flags) & ~(1 << STRONGLY_TYPED))

    def parse_from_file(self, path: str) -> bool:
        import onnx

        model = onnx.load(path)
        if kind != "float32" and plain_products(model):
            onnx.save(model, path)  # a temporary file of the build's
        types.clear()
        types.update(onnx_types(path))
        return parse(self, path)

    def build_serialized_network(self, network, config):
        if "HALF" in types.values():
            config.set_flag(trt.BuilderFlag.FP16)
            config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
            if typed:
                print("layers by type:", dict(type_layers(trt, network, types)), flush=True)
        return build(self, network, config)

    trt.__version__ += f"+{kind}"  # in every figure, engine's name and sidecar
    trt.OnnxParser.parse_from_file = parse_from_file
    trt.Builder.create_network = create_network
    trt.Builder.build_serialized_network = build_serialized_network


if __name__ == "__main__":
    import tensorrt

    version = getattr(tensorrt, "__version__", "10")  # stubs have none
    if int(version.split(".")[0]) < 10 and "+" not in version:
        bridge(tensorrt, os.environ.get("LSEG_TYPES", "typed"))
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name="__main__")
