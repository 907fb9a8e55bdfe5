"""Attention's matrix products in an ONNX file, rewritten in one of three forms that compute the same numbers.

B images or texts, L tokens, h heads of d, C = h d. The exporter leaves q k^T and softmax(.) v as products of
[B, h, L, d] operands, and linear layers as [B, L, C] by [C, K]. What engines make of them differs, so:

- `4d` keeps these shapes, with the whole scale on q and k^T coming straight from a Transpose: the pattern
  MatMul, Add (a mask, if any), Softmax, MatMul that TensorRT 10 fuses into one kernel. With `apart`, q, k and v come
  from three linear layers in place of one whose result is cut: TensorRT 8.6 fuses attention only then.
- `3d` folds batch and heads into one leading axis: [B h, L, d].
- `2d` has no operand of rank above 2, linear layers included: tokens stay [B L, C] through a block. One product per
  head and image is slow, as each is small, so g heads share one: their queries are stacked into a block-diagonal
  [g L, g d] and multiplied with the g heads' keys side by side, [L, g d], transposed; row block i of the [g L, L]
  scores is head i's. After the softmax of each row, times the values [L, g d], head i's result is block (i, i) of
  [g L, g d]. There are g times fewer products, each g^2 times the work of one head's: g times the work in all.
  g = 1 is one product per head.

Whatever nodes the exporter puts between a linear layer and its attention (Split, Squeeze, Gather, shape arithmetic) is
not matched by name: those nodes are run on random numbers, and the attention is taken only if they do what is expected.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from lseg.attention import Attention, find_attentions, rank
from lseg.attention_forms import attend, attend_2d
from lseg.errors import UserError
from lseg.graph_builder import Builder

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

FORMS = ("4d", "3d", "2d")
HEADS_PER_PRODUCT = 2  # of the 2d form
# Nodes that do to [B L, C] what they do to [B, L, C], if their operands have one shape or are constants of rank <= 1.
ELEMENTWISE = {"Add", "Cast", "Div", "Erf", "Gelu", "Identity", "Mul", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh"}


def rewrite_matmuls(
    model: onnx.ModelProto,
    form: str,
    heads_per_product: int = HEADS_PER_PRODUCT,
    batch: int | None = None,
    name: str = "the ONNX file",
    apart: bool = False,
) -> onnx.ModelProto:
    """Rewrites the matrix products of an exported encoder; what it computes, its names and metadata stay.

    Args:
        model: the image or text encoder that lseg/export.py wrote, with float32 or float16 weights; not changed.
        form: one of FORMS, as the module's text explains them. `2d` takes the image encoder at a fixed batch only.
        heads_per_product: in the 2d form, at most how many heads share a product: the largest divisor of the number
            of heads up to it is taken, so that all products are of one size.
        batch: fixes a free batch to this number; None leaves it as it is.
        name: what messages call the file.
        apart: in the 4d form, q, k and v get linear layers of their own, where they came from one.

    Raises:
        UserError: an unknown form or number, a file without attention or with a product of unknown kind, or the 2d
            form asked for with a free batch, of the text encoder or of a graph that cannot have it.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

    if form not in FORMS:
        raise UserError(f"the matmul form '{form}' is unknown: choose {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    for what, number in (("heads per product", heads_per_product), ("batch", 1 if batch is None else batch)):
        if number < 1:
            raise UserError(f"{what} cannot be {number}: give 1 or more")
    rewritten = _from_proto(model)
    graph = rewritten.graph
    if batch is not None:
        fix_batch(graph, batch, name)
    infer_shapes(rewritten)
    unpack_gemms(graph)
    RemoveUnusedNodesPass()(rewritten)
    infer_shapes(rewritten)
    attentions = find_attentions(graph, name)
    if form == "2d":
        check_2d(attentions, name)
    constants: dict[tuple, ir.Value] = {}
    for attention in attentions:
        build = Builder(graph, attention.out.producer(), attention.name, constants)
        if form == "2d":
            y = attend_2d(build, attention, heads_per_product)
        else:
            y = attend(build, attention, form, apart)
        y.shape, y.type = attention.out.shape, attention.out.type
        ir.convenience.replace_all_uses_with(attention.out, y)
    RemoveUnusedNodesPass()(rewritten)
    if form == "2d":
        infer_shapes(rewritten)
        flatten_tokens(graph)
        RemoveUnusedNodesPass()(rewritten)
    NameFixPass()(rewritten)
    infer_shapes(rewritten)
    left = [n for n in graph if form == "2d" and n.op_type == "MatMul" and any(rank(v) != 2 for v in n.inputs)]
    if left:
        raise UserError(f"MatMul '{left[0].name}' of {name} cannot be made 2-D: choose 4d or 3d")
    return ir.to_proto(rewritten)


def matmul_ranks(model: onnx.ModelProto) -> Counter[tuple[int, int]]:
    """How many MatMuls have operands of which ranks, as ONNX's shape inference finds them.

    Raises:
        UserError: shape inference does not tell an operand's rank.
    """
    inferred = _from_proto(model)
    infer_shapes(inferred)
    nodes = [node for node in inferred.graph if node.op_type == "MatMul"]
    for node in nodes:
        if None in map(rank, node.inputs):
            raise UserError(f"the rank of an operand of MatMul '{node.name}' cannot be told: export the file anew")
    return Counter(tuple(map(rank, node.inputs)) for node in nodes)


def _from_proto(model: onnx.ModelProto) -> ir.Model:
    import onnx_ir as ir

    try:
        return ir.from_proto(model)
    except Exception as error:  # a damaged graph can fail in any way
        raise UserError(f"the ONNX file's graph is damaged ({type(error).__name__}): export it anew") from error


def infer_shapes(model: ir.Model) -> None:
    """Shapes of all values, as far as they follow from the inputs'; large weights are set aside meanwhile."""
    from onnx_ir.passes.common import ShapeInferencePass

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # what it could not tell is missed where it is needed
    ShapeInferencePass()(model)


def fix_batch(graph: ir.Graph, batch: int, name: str) -> None:
    """Sets the leading axis of the inputs, and what carries its name in inputs and outputs, to `batch`."""
    import onnx_ir as ir

    leading = {value.shape[0] for value in graph.inputs if rank(value)}
    for size in leading:
        if isinstance(size, int) and size != batch:
            raise UserError(f"{name} has a fixed batch of {size}, not {batch}: export it with a free batch")
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([batch if size in leading else size for size in value.shape])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # what the file says of it holds the free axis


def unpack_gemms(graph: ir.Graph) -> None:
    """Linear layers as MatMul and Add on [B, L, C]; at a fixed batch the simplifier makes them Gemm on [B L, C]."""
    import onnx_ir as ir

    constants: dict[tuple, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "Gemm"]:
        (x, weight, *bias), y = node.inputs, node.outputs[0]
        attributes = {key: attribute.value for key, attribute in node.attributes.items()}
        transposed = attributes.pop("transB", 0)
        plain = not attributes.pop("transA", 0) and set(attributes.values()) <= {1.0}  # alpha and beta
        before, users = x.producer(), y.consumers()
        apart = [user.outputs[0] for user in users if user.op_type == "Reshape" and rank(user.outputs[0]) == 3]
        static = y.shape is not None and y.shape.is_static()
        if not plain or not static or weight.const_value is None or y.is_graph_output():
            continue
        build = Builder(graph, node, node.name or y.name, constants)
        whole = before.inputs[0] if before is not None and before.op_type == "Reshape" else x
        if rank(whole) == 3 and whole.shape[2] == x.shape[1]:
            tokens = whole  # [B, L, C]
        elif apart:
            tokens = build.reshape("tokens", x, *apart[0].shape[:2], x.shape[1])
        else:
            continue
        batch, length = (apart[0] if apart else tokens).shape[:2]
        if transposed:
            weight = build.weight("weight", weight.const_value.numpy().T)
        result = build("MatMul", "product", tokens, weight)
        for value in bias:
            result = build("Add", "sum", result, value)
        for value in apart:
            if list(value.shape[:2]) == [batch, length] and not value.is_graph_output():
                ir.convenience.replace_all_uses_with(value, result)
        ir.convenience.replace_all_uses_with(y, build.reshape("flat", result, batch * length, y.shape[1]))
        graph.remove(node, safe=True)


def check_2d(attentions: list[Attention], name: str) -> None:
    if any(attention.mask is not None for attention in attentions):
        raise UserError(f"{name} is a text encoder, and the 2d form is the image encoder's: choose 4d or 3d")
    if any(attention.batch is None for attention in attentions):
        raise UserError(f"{name} has a free batch, and the 2d form needs a fixed one: give a batch, or choose 4d or 3d")


def flatten_tokens(graph: ir.Graph) -> None:
    """Linear layers, and what lies between them, on [B L, C] instead of [B, L, C].

    Every node that can be is moved to flat operands and followed by a Reshape back, which only those who cannot be
    moved read; the others are left for the caller to sweep up.
    """
    import onnx_ir as ir

    constants: dict[tuple, ir.Value] = {}
    flat: dict[ir.Value, ir.Value] = {}  # [B, L, C] -> [B L, C]
    for node in list(graph):
        y = node.outputs[0]
        if node.op_type == "Reshape":
            x = node.inputs[0]
            if x in flat and y.shape == flat[x].shape:
                ir.convenience.replace_all_uses_with(y, flat[x])
            elif rank(x) == 2 and rank(y) == 3 and x.shape[1] == y.shape[2]:
                flat[y] = x
            continue
        if not can_be_flat(node, flat):
            continue
        build = Builder(graph, node, y.name, constants)
        inputs = list(node.inputs)
        for index, value in enumerate(inputs):
            if rank(value) == 3:
                if value not in flat:
                    b, length, width = value.shape
                    flat[value] = build.reshape(f"flat{index}", value, b * length, width)
                    flat[value].shape = ir.Shape([b * length, width])
                inputs[index] = flat[value]
        b, length, width = y.shape
        flat_y = build(node.op_type, "flat", *inputs, **{key: attr.value for key, attr in node.attributes.items()})
        flat_y.producer().name, flat_y.type = node.name, y.type
        flat_y.shape = ir.Shape([b * length, width])
        back = build.reshape("tokens", flat_y, b, length, width)
        back.shape, back.type = y.shape, y.type
        flat[back] = flat_y
        ir.convenience.replace_all_uses_with(y, back)
        graph.remove(node, safe=True)


def can_be_flat(node: ir.Node, flat: dict[ir.Value, ir.Value]) -> bool:
    """Whether a node of a [B, L, C] output computes the same on [B L, C], and has reason to."""
    y = node.outputs[0]
    if rank(y) != 3 or not y.shape.is_static() or y.is_graph_output() or None in map(rank, filter(None, node.inputs)):
        return False
    if node.op_type == "MatMul":
        return [rank(value) for value in node.inputs] == [3, 2]
    if not any(value in flat for value in node.inputs):
        return False
    if node.op_type == "LayerNormalization":
        return node.attributes.get_int("axis", -1) == -1 and len(node.outputs) == 1
    return node.op_type in ELEMENTWISE and all(x.shape == y.shape or rank(x) <= 1 for x in node.inputs)
