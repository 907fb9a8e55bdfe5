"""16-bit forms of the ONNX files. Precision lives in the graph, for engines are built strongly typed."""

from __future__ import annotations

import warnings

import onnx

PRECISIONS = ("fp32", "tf32", "fp16")
KEPT = ("LayerNormalization",)  # stays float32: it squares the residual stream


def to_float16(core: onnx.ModelProto) -> onnx.ModelProto:
    """Converts an encoder that ends with z (see `lseg.scoring.cut_head`) to float16.

    The input stays float32, z becomes float16; layer norms stay float32 between casts. Softmax goes to float16: engines
    and ONNX Runtime accumulate it in float32 whatever its type, and a float32 one would break the pattern that fused
    attention is recognised by. What follows z is added in the types that it needs.

    Source: ONNX Runtime's float16 converter.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    core = _own_constants(core)
    inputs = [value.name for value in core.graph.input]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights too small for float16, which become its smallest number
        half = convert_float_to_float16(core, keep_io_types=inputs, op_block_list=list(KEPT))
    result = OnnxModel(half)
    result.topological_sort()  # the converter appends its casts
    return result.model


def _own_constants(core: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which no two operations that stay float32 share a constant: the converter would cast it twice."""
    model = onnx.ModelProto()
    model.CopyFrom(core)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        if node.op_type in (*KEPT, "Resize"):  # the scales of a Resize are float32 always
            for position, name in enumerate(node.input):
                if name in tensors:
                    node.input[position] = f"{name}/float32_{index}"
                    model.graph.initializer.add().CopyFrom(tensors[name])
                    model.graph.initializer[-1].name = node.input[position]
    return model
