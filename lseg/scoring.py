"""The graphs around an exported image encoder: cut off at z for engines, or with labels for its end.

An exported image encoder ends with z, the head's output at 120 x 120 [B, D, h, h], which is upsampled, divided by its
length and given out. A label map needs less: the scores' numerators are linear in z, t . up(z) = up(t . z), so N
channels are upsampled instead of D, and of up(z) only its length is needed, which is never written out by channel.
TensorRT's engines end with z and with t . z; what follows are the kernels of kernels.cu. `label_graph` is all of it in
ONNX, for other runtimes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lseg.errors import UserError


class Appender:
    """Appends nodes to an ONNX graph, naming what they give."""

    def __init__(self, graph: onnx.GraphProto, prefix: str):
        self.graph, self.prefix, self.count = graph, prefix, 0

    def constant(self, value: np.ndarray) -> str:
        name = self._name("constant")
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def floats(self, value: np.ndarray | float) -> str:
        return self.constant(np.asarray(value, np.float32))

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        output = output or self._name(kind)
        self.graph.node.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def top(self, x: str) -> tuple[str, str]:
        """The largest along axis 1, and the first index that has it: one layer in TensorRT, as ArgMax alone is."""
        values, indices = self._name("best"), self._name("index")
        node = helper.make_node("TopK", [x, self.ints(1)], [values, indices], name=values, axis=1)
        self.graph.node.append(node)
        return values, indices

    def _name(self, kind: str) -> str:
        self.count += 1
        return f"{self.prefix}/{kind}_{self.count}"


def cut_head(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Cuts upsampling and normalisation off an exported image encoder.

    Returns:
        The model that ends with z: float32 [B, D, h, h], the head's output.

    Raises:
        UserError: the model does not end as an exported image encoder does.
    """
    model = onnx.ModelProto()
    model.CopyFrom(encoder)
    graph = model.graph
    maker = {output: node for node in graph.node for output in node.output}
    divide = maker.get(graph.output[0].name) if len(graph.output) == len(graph.input) == 1 else None
    inputs = [maker.get(name) for name in divide.input] if divide is not None and divide.op_type == "Div" else []
    names = [node.op_type if node is not None else "" for node in inputs]
    ends = [*graph.input, *graph.output]
    if names != ["Resize", "ReduceL2"] or not all(len(_dims(v)) == 4 and all(_sizes(v)[1:]) for v in ends):
        raise UserError("the ONNX file does not end as lseg_export.py's image encoder does: export it again")
    batch, dimension, side, _ = _dims(graph.output[0])
    z = inputs[0].input[0]
    drop_unused(graph, [z])
    del graph.output[:], graph.value_info[:]
    graph.output.append(helper.make_tensor_value_info(z, TensorProto.FLOAT, [batch, dimension, side // 2, side // 2]))
    return model


def label_graph(core: onnx.ModelProto) -> onnx.ModelProto:
    """The label-map graph around an encoder that ends with z, float32 or float16 (see `cut_head`).

    The result takes `pixels` uint8 [B, S, S, 3], RGB, and `text` float32 [N, D], unit length, and gives `labels` uint8
    [B, S, S], at most 256 texts, and `best` float32 [B, S, S], their cosines. B is as free as in the encoder, N is
    free. Large products are computed in z's type, what follows them in float32.
    """
    model, z = _with_pixels(core)
    build = Appender(model.graph, "labels")
    batch, _, side, _ = _dims(z)
    for name, kind in (("labels", TensorProto.UINT8), ("best", TensorProto.FLOAT)):
        model.graph.output.append(helper.make_tensor_value_info(name, kind, [batch, 4 * side, 4 * side]))
    best, labels = build.top(_double(build, _cosines(build, z)))  # each [B, 1, 4h, 4h]
    build.op("Squeeze", best, build.ints(1), output="best")
    labels = build.op("Cast", build.op("Squeeze", labels, build.ints(1)), to=TensorProto.FLOAT)
    build.op("Cast", labels, to=TensorProto.UINT8, output="labels")  # some versions make uint8 of float32 only
    return model


def _cosines(build: Appender, z: onnx.ValueInfoProto) -> str:
    """Adds the input `text` float32 [N, D] and what gives its cosines with the pixels, float32 [B, N, 2h, 2h]."""
    _, dimension, side, _ = _dims(z)
    build.graph.input.append(helper.make_tensor_value_info("text", TensorProto.FLOAT, ["N", dimension]))
    text = build.op("Cast", "text", to=z.type.tensor_type.elem_type)
    flat = build.op("Reshape", z.name, build.ints(0, dimension, side * side))  # [B, D, h*h]
    dot = build.op("MatMul", text, flat)  # [B, N, h*h]
    dot = build.op("Reshape", dot, build.ints(0, -1, side, side))  # [B, N, h, h]
    dot = _double(build, build.op("Cast", dot, to=TensorProto.FLOAT))  # [B, N, 2h, 2h]
    wide = build.op("Cast", _double(build, z.name), to=TensorProto.FLOAT)  # the engine fuses the cast into the sum
    length = build.op("ReduceL2", wide, axes=[1], keepdims=1)  # [B, 1, 2h, 2h]
    return build.op("Div", dot, length)


def embedding_graph(core: onnx.ModelProto) -> onnx.ModelProto:
    """The encoder with its end again, in float32 whatever z is: `image` to `embeddings` [B, D, 2h, 2h]."""
    model = onnx.ModelProto()
    model.CopyFrom(core)
    z = core.graph.output[0]
    batch, dimension, side, _ = _dims(z)
    shape = [batch, dimension, 2 * side, 2 * side]
    del model.graph.output[:], model.graph.value_info[:]  # a rewriting may have left its types behind
    model.graph.output.append(helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, shape))
    build = Appender(model.graph, "embeddings")
    wide = _double(build, build.op("Cast", z.name, to=TensorProto.FLOAT))
    build.op("Div", wide, build.op("ReduceL2", wide, axes=[1], keepdims=1), output="embeddings")
    return model


def dot_graph(kind: int, dimension: int, side: int, opset: int = 17) -> onnx.ModelProto:
    """Dot products of texts with z: `z` [B, D, h, h] of type `kind`, `text` float32 [N, D] to `dots` [B, N, h * h]."""
    graph = onnx.GraphProto(name="dots")
    graph.input.extend(
        [
            helper.make_tensor_value_info("z", kind, ["B", dimension, side, side]),
            helper.make_tensor_value_info("text", TensorProto.FLOAT, ["N", dimension]),
        ]
    )
    graph.output.append(helper.make_tensor_value_info("dots", kind, ["B", "N", side * side]))
    build = Appender(graph, "dots")
    flat = build.op("Reshape", "z", build.ints(0, dimension, side * side))
    build.op("MatMul", build.op("Cast", "text", to=kind), flat, output="dots")
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def fix_batch(core: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The encoder for exactly `batch` images, `image` to `z`: builders tune fixed shapes better than ranges."""
    model = onnx.ModelProto()
    model.CopyFrom(core)
    graph = model.graph
    del graph.value_info[:]  # a rewriting may have left types with the free batch behind
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = ["z" if name == graph.output[0].name else name for name in names]
    graph.output[0].name = "z"
    return model


def _with_pixels(core: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ValueInfoProto]:
    """The core with `pixels` uint8 [B, S, S, 3] for its input, and no output yet; and what its output was."""
    model = onnx.ModelProto()
    model.CopyFrom(core)
    graph = model.graph
    image, z = graph.input[0], graph.output[0]
    batch, _, height, width = _dims(image)
    first = Appender(onnx.GraphProto(), "pixels")
    x = first.op("Cast", "pixels", to=TensorProto.FLOAT)  # [B, S, S, 3]
    x = first.op("Transpose", x, perm=[0, 3, 1, 2])  # [B, 3, S, S]
    x = first.op("Mul", x, first.floats(2 / 255))
    first.op("Sub", x, first.floats(1.0), output=image.name)
    nodes = [*first.graph.node, *graph.node]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, [batch, height, width, 3])
    result = helper.make_graph(nodes, "lseg", [pixels], [], [*graph.initializer, *first.graph.initializer])
    graph.CopyFrom(result)
    return model, z


def drop_unused(graph: onnx.GraphProto, outputs: list[str]) -> None:
    """Removes nodes and initializers that none of `outputs` needs."""
    needed, kept = set(outputs), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _dims(value: onnx.ValueInfoProto) -> list[str | int]:
    """A tensor's shape; the name of an axis that is free."""
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    """A tensor's sizes; 0 where an axis is free or none that a tensor can have."""
    return [max(0, d.dim_value) for d in value.type.tensor_type.shape.dim]


def _double(build: Appender, x: str) -> str:
    scales = build.floats(np.array([1, 1, 2, 2]))
    how = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    return build.op("Resize", x, "", scales, **how)


def load_encoder(path: Path) -> onnx.ModelProto:
    """Reads an exported file; raises UserError where it is missing or damaged."""
    try:
        return onnx.load(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: export it with 'python lseg_export.py'") from None
    except Exception as error:  # protobuf has its own errors
        raise UserError(f"{path} is damaged or cut short: export it again with 'python lseg_export.py'") from error
