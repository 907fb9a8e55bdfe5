"""16-bit forms of the ONNX files. Precision lives in the graph, for engines are built strongly typed."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

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
