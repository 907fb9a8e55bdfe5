"""A ViT's patch embedding, in an exported graph, as the matrix product that it is.

A convolution whose kernels do not overlap multiplies each patch of 16 x 16 x 3 numbers with one matrix. Kernels for
convolutions pad the 3 channels to 8, and compute as many times too much; a product of [B, 900, 768] and [768, 1024]
computes what is asked for.
"""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper

from lseg.scoring import Appender, drop_unused


def patches_as_product(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the graph of an exported image encoder without its patch convolution; another graph as it is."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    found = _patch_embedding(graph)
    if found is None:
        return result
    convolution, transpose = found
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weight, bias = (numpy_helper.to_array(tensors[name]) for name in convolution.input[1:3])
    width, channels, patch, _ = weight.shape
    side = graph.input[0].type.tensor_type.shape.dim[2].dim_value // patch
    build = Appender(onnx.GraphProto(), "patches")
    squares = build.ints(0, channels, side, patch, side, patch)  # 0: as it is
    x = build.op("Reshape", convolution.input[0], squares)  # [B, c, g, p, g, p]
    x = build.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])  # [B, g, g, c, p, p]
    x = build.op("Reshape", x, build.ints(0, side * side, channels * patch * patch))  # [B, g * g, c * p * p]
    x = build.op("MatMul", x, build.constant(weight.reshape(width, -1).T))  # [B, g * g, C]
    build.op("Add", x, build.constant(bias), output=transpose.output[0])
    nodes = [*build.graph.node, *(node for node in graph.node if node != transpose)]  # they need the input alone
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(build.graph.initializer)
    drop_unused(graph, [value.name for value in graph.output])
    return result


def _patch_embedding(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The convolution of the input whose stride is its kernel, with bias, and the Transpose behind its Reshape."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    first = [node for node in graph.node if graph.input[0].name in node.input]
    if len(first) != 1 or first[0].op_type != "Conv" or len(first[0].input) != 3:
        return None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in first[0].attribute}
    kernel = list(tensors[first[0].input[1]].dims[2:]) if first[0].input[1] in tensors else []
    if len(set(kernel)) != 1 or list(attributes.get("strides", [])) != kernel or any(attributes.get("pads", [])):
        return None
    chain = [first[0]]
    for kind in ("Reshape", "Transpose"):
        users = [node for node in graph.node if chain[-1].output[0] in node.input]
        if [node.op_type for node in users] != [kind]:
            return None
        chain.append(users[0])
    perm = [list(attribute.ints) for attribute in chain[2].attribute if attribute.name == "perm"]
    return (chain[0], chain[2]) if perm == [[0, 2, 1]] else None
