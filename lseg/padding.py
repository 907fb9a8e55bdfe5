"""Pads a ViT's tokens, in an exported graph, to a number that GPU kernels like.

901 tokens make attention's score matrices [901, 901]: in 16 bits no row but the first starts on the 16-byte boundary
that the fast loads and stores need. With three zero tokens more, masked as keys and cut off where the decoder reads,
every other number stays what it was.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lseg.errors import UserError

MASKED = -1e4  # a masked score; its exponential is zero, also in 16 bits


def pad_tokens(model: onnx.ModelProto, multiple: int = 8) -> onnx.ModelProto:
    """Returns the graph of an exported image encoder with its token count rounded up to `multiple`.

    Raises:
        UserError: the graph has no position embeddings of a ViT, or no attention.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    embed = next((node for node in graph.node if node.op_type == "Add" and _positions(node, tensors)), None)
    attention = [node for node in graph.node if node.op_type == "Softmax"]
    if embed is None or not attention:
        raise UserError("the ONNX file has no ViT whose tokens could be padded: export it with 'python lseg_export.py'")
    _, tokens, width = tensors[_positions(embed, tensors)].dims
    padded = -(-tokens // multiple) * multiple
    if padded == tokens or tokens == width:  # with as many tokens as channels, shapes would not tell them apart
        return result

    for tensor in _shapes(graph, tensors):
        shape = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.where(shape == tokens, padded, shape), tensor.name))
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([0, 0, 0, 0, padded - tokens, 0], np.int64), "tokens/pads"),
            numpy_helper.from_array(np.array([tokens], np.int64), "tokens/end"),
            numpy_helper.from_array(np.where(np.arange(padded) < tokens, 0, MASKED).astype(np.float32), "tokens/mask"),
        ]
    )
    before = embed.output[0]
    embed.output[0] = "tokens/unpadded"
    nodes = []
    for node in graph.node:
        if node.op_type == "Softmax":
            masked = f"{node.input[0]}/masked"
            nodes.append(helper.make_node("Add", [node.input[0], "tokens/mask"], [masked], name=masked))
            node.input[0] = masked
        if node.op_type == "Slice" and _ends_open(node, tensors):
            node.input[2] = "tokens/end"
        nodes.append(node)
        if node is embed:
            nodes.append(helper.make_node("Pad", ["tokens/unpadded", "tokens/pads"], [before], name="tokens/pad"))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return result


def _positions(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> str | None:
    """The name of the position embeddings [1, L, C] that this node adds, if it does."""
    found = [name for name in node.input if name in tensors and len(tensors[name].dims) == 3]
    return found[0] if found and tensors[found[0]].dims[0] == 1 and tensors[found[0]].dims[1] > 1 else None


def _shapes(graph: onnx.GraphProto, tensors: dict[str, onnx.TensorProto]) -> list[onnx.TensorProto]:
    """The constants that give a Reshape its shape."""
    names = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    return [tensors[name] for name in names if name in tensors]


def _ends_open(node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto]) -> bool:
    """Whether a Slice takes all from the second token on: the patches of a tap."""
    if len(node.input) < 4 or not all(name in tensors for name in node.input[1:4]):
        return False
    start, end, axes = (numpy_helper.to_array(tensors[name]) for name in node.input[1:4])
    return axes.tolist() == [1] and start.tolist() == [1] and end[0] > 1 << 30
