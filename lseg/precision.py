"""16-bit forms of the ONNX files. Precision lives in the graph, for engines are built strongly typed."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
KEPT = ("LayerNormalization",)  # stays float32: it squares the residual stream
KEPT_BFLOAT16 = (*KEPT, "ConvTranspose")  # TensorRT has no transposed convolution in bfloat16


def to_float16(core: onnx.ModelProto, kept: tuple[str, ...] = KEPT) -> onnx.ModelProto:
    """Converts an encoder that ends with z (see `lseg.scoring.cut_head`) to float16.

    The input stays float32, z becomes float16; layer norms stay float32 between casts. Softmax goes to float16: engines
    and ONNX Runtime accumulate it in float32 whatever its type, and a float32 one would break the pattern that fused
    attention is recognised by. What follows z is added in the types that it needs.

    Args:
        core: the encoder, float32.
        kept: operations that stay float32.

    Source: ONNX Runtime's float16 converter.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    core = _own_constants(core, kept)
    inputs = [value.name for value in core.graph.input]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights too small for float16, which become its smallest number
        half = convert_float_to_float16(core, keep_io_types=inputs, op_block_list=list(kept))
    result = OnnxModel(half)
    result.topological_sort()  # the converter appends its casts
    return result.model


def accumulate_in_float32(model: onnx.ModelProto, every: bool = False) -> onnx.ModelProto:
    """Has a float16 graph's linear layers add up in float32, as PyTorch's do; their operands stay float16.

    TensorRT may add up a product of float16 matrices in float16, where that is faster. One whose operands are cast to
    float32 becomes the same single kernel from TensorRT 10 on, with float32 accumulators. Attention's own products are
    left as they are: its fused kernel accumulates in float32, and is found by its pattern. Of convolutions it is not
    documented, and in bfloat16 it is not needed.

    Args:
        model: in float16.
        every: take products of two inputs too, not those with a weight alone.

    Source: TensorRT's documentation, "Control of Computational Precision".
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, nodes = result.graph, []
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}

    def cast(source: str, target: str, kind: int) -> None:
        nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=kind))

    for node in [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]:
        if node.op_type != "MatMul" or not (every or halves & set(node.input)):
            nodes.append(node)
            continue
        name = node.output[0]
        for index, operand in enumerate(node.input):
            cast(operand, f"{name}/operand{index}", TensorProto.FLOAT)
            node.input[index] = f"{name}/operand{index}"
        node.output[0] = f"{name}/float32"
        nodes.append(node)
        cast(node.output[0], name, TensorProto.FLOAT16)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return result


def to_bfloat16(core: onnx.ModelProto) -> onnx.ModelProto:
    """The same in bfloat16: what `to_float16` makes float16 is bfloat16, with weights rounded from float32.

    ONNX defines convolutions in bfloat16 from opset 22 on; TensorRT takes them in older files too.
    """
    weights = {tensor.name: tensor for tensor in core.graph.initializer}
    model = to_float16(core, KEPT_BFLOAT16)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            exact = numpy_helper.to_array(weights[tensor.name]).astype(np.float32)
            kind, dims = TensorProto.BFLOAT16, list(tensor.dims)
            tensor.CopyFrom(
                TensorProto(name=tensor.name, data_type=kind, dims=dims, raw_data=_round_to_bfloat16(exact))
            )
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            elif attribute.t.data_type == TensorProto.FLOAT16:
                raise ValueError(f"the constant {node.name} stands in a node: its float32 value is gone")
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return model


def _round_to_bfloat16(values: np.ndarray) -> bytes:
    """The upper half of each float32, rounded to nearest even; little-endian, as ONNX stores it."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    bits += 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
    return (bits >> np.uint64(16)).astype("<u2").tobytes()


def _own_constants(core: onnx.ModelProto, kept: tuple[str, ...]) -> onnx.ModelProto:
    """A copy in which no two operations that stay float32 share a constant: the converter would cast it twice."""
    model = onnx.ModelProto()
    model.CopyFrom(core)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        if node.op_type in (*kept, "Resize"):  # the scales of a Resize are float32 always
            for position, name in enumerate(node.input):
                if name in tensors:
                    node.input[position] = f"{name}/float32_{index}"
                    model.graph.initializer.add().CopyFrom(tensors[name])
                    model.graph.initializer[-1].name = node.input[position]
    return model
