"""Finds attention in an exported graph by what it computes, not by what its nodes are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lseg.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir


# Nodes that may lie between a linear layer and q k^T: they move, scale or measure, and never mix elements.
BEFORE = {"Cast", "Concat", "Div", "Gather", "Identity", "Mul", "Reshape", "Shape", "Slice", "Split", "Sqrt", "Squeeze"}
BEFORE |= {"Transpose", "Unsqueeze"}
AFTER = {"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}  # and between the values' product and what follows


@dataclass(frozen=True)
class Attention:
    """One attention: softmax(scale q k^T + mask) v with q, k, v [B, heads, L, size] cut from `qkv` [B, L, 3 C]."""

    name: str
    qkv: ir.Value
    out: ir.Value  # [B, L, C], heads side by side
    mask: ir.Value | None  # a constant that is added to the scores
    products: tuple[ir.Node, ir.Node]
    heads: int
    scale: float

    @property
    def batch(self) -> int | None:
        """B, or None where it is free."""
        size = self.qkv.shape[0]
        return size if isinstance(size, int) else None

    @property
    def length(self) -> int:
        return self.qkv.shape[1]

    @property
    def width(self) -> int:
        """C."""
        return self.qkv.shape[2] // 3

    @property
    def size(self) -> int:
        """A head's channels, d."""
        return self.width // self.heads


def find_attentions(graph: ir.Graph, name: str) -> list[Attention]:
    """Every attention of the graph; UserError if there is none, or a MatMul neither in one nor a linear layer's."""
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    if not softmaxes:
        raise UserError(f"{name} has no attention to rewrite: give an encoder that lseg_export.py wrote")
    found = [match for node in softmaxes if (match := match_attention(graph, node))]
    inside = {product for attention in found for product in attention.products}
    for node in graph:
        if node.op_type == "MatMul" and node not in inside:
            if tuple(map(rank, node.inputs)) not in ((2, 2), (3, 2)):
                raise UserError(
                    f"{name} has a MatMul of unknown kind, '{node.name}': give an encoder that lseg_export.py wrote"
                )
    return found


def match_attention(graph: ir.Graph, softmax: ir.Node) -> Attention | None:
    """The attention around a Softmax, or None where what surrounds it does something else."""
    scores, mask = softmax.inputs[0].producer(), None
    if scores is not None and scores.op_type == "Add":
        constant = [value for value in scores.inputs if value.is_initializer()]
        if len(constant) != 1:
            return None
        mask = constant[0]
        scores = next(value for value in scores.inputs if value is not mask).producer()
    users = softmax.outputs[0].consumers()
    if scores is None or scores.op_type != "MatMul" or len(users) != 1 or users[0].op_type != "MatMul":
        return None
    product = users[0]
    if product.inputs[0] is not softmax.outputs[0] or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    sources, out = origins([*scores.inputs, product.inputs[1]]), destination(product.outputs[0])
    if len(sources) != 1 or out is None or out.is_graph_output():
        return None
    qkv = sources.pop()
    if rank(qkv) != 3 or not all(isinstance(size, int) for size in qkv.shape[1:]):
        return None
    if mask is not None and (list(mask.shape)[-2:] != [qkv.shape[1]] * 2 or mask.const_value.size != qkv.shape[1] ** 2):
        return None
    measured = probe(graph, qkv, (*scores.inputs, product.inputs[1]), product.outputs[0], out)
    if measured is None:
        return None
    return Attention(
        (softmax.name or "attention").rpartition("/")[0] or "attention", qkv, out, mask, (scores, product), *measured
    )


def origins(values: list[ir.Value]) -> set[ir.Value]:
    """What the values are made of: the nearest values behind them that no node of BEFORE makes, constants aside."""
    found, seen, stack = set(), set(), list(values)
    while stack:
        value = stack.pop()
        if value in seen or value.is_initializer():
            continue
        seen.add(value)
        node = value.producer()
        if node is not None and node.op_type in BEFORE:
            stack.extend(node.inputs)
        else:
            found.add(value)
    return found


def destination(value: ir.Value) -> ir.Value | None:
    """Where the value goes through nodes of AFTER: the one value before other nodes, or None if there are several."""
    found, stack = [], [value]
    while stack:
        value = stack.pop()
        for node in value.consumers():
            if node.op_type in AFTER and node.inputs[0] is value:
                stack.append(node.outputs[0])
            elif node.op_type != "Shape" and value not in found:
                found.append(value)
        if value.is_graph_output():
            found.append(value)
    return found[0] if len(found) == 1 else None


def probe(
    graph: ir.Graph, qkv: ir.Value, operands: tuple[ir.Value, ir.Value, ir.Value], product: ir.Value, out: ir.Value
) -> tuple[int, float] | None:
    """Heads and scale of an attention, measured; None if its nodes do not cut and join heads as expected."""
    random = np.random.default_rng(0)
    dtype = qkv.dtype.numpy()
    batch, length, width = (size if isinstance(size, int) else 2 for size in qkv.shape)
    x = random.standard_normal((batch, length, width)).astype(dtype)
    try:
        q, kt, v = run_piece(graph, qkv, operands, x)
        if q.ndim != 4 or width != 3 * q.shape[1] * q.shape[3]:
            return None
        heads, size = q.shape[1], q.shape[3]
        y = random.standard_normal(q.shape).astype(dtype)
        (joined,) = run_piece(graph, product, (out,), y)
    except Exception:  # a node that the reference evaluator lacks or refuses is not one of ours
        return None
    x_q, x_k, x_v = x.reshape(batch, length, 3, heads, size).transpose(2, 0, 3, 1, 4)
    scale = 1.0
    for found, expected in ((q, x_q), (kt.swapaxes(2, 3), x_k)):
        if found.shape != expected.shape:
            return None
        factor = float(np.vdot(found.astype(float), expected) / np.vdot(expected.astype(float), expected))
        if not close(found, factor * expected):
            return None
        scale *= factor
    if not close(v, x_v) or not close(joined, y.transpose(0, 2, 1, 3).reshape(batch, length, width // 3)):
        return None
    usual = size**-0.5  # PyTorch scales q and k by the root of it each: undo that rounding
    return heads, usual if abs(scale / usual - 1) < 1e-6 else scale


def run_piece(graph: ir.Graph, start: ir.Value, ends: tuple[ir.Value, ...], x: np.ndarray) -> list[np.ndarray]:
    """Values of the graph from one other, by ONNX's reference evaluator."""
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    piece = ir.convenience.extract(graph, [start], list(ends))
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(piece, ir_version=10)))
    return evaluator.run(None, {start.name: x})


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5 if a.dtype.itemsize > 2 else 1e-2, atol=1e-6)


def rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)
