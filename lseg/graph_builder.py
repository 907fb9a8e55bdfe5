"""Adds nodes and constants to an ONNX graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


class Builder:
    """Adds nodes and constants to a graph, in front of one node and under names that begin alike."""

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str, constants: dict[tuple, ir.Value]):
        self.graph, self.before, self.prefix, self.constants = graph, before, prefix, constants

    def nodes(self, op: str, name: str, inputs: list[ir.Value], count: int, **attributes: object) -> list[ir.Value]:
        """Adds a node of `count` outputs, named after it."""
        import onnx_ir as ir

        name = f"{self.prefix}/{name}"
        node = ir.node(op, inputs, attributes, num_outputs=count, name=name)
        for index, value in enumerate(node.outputs):
            value.name = name if count == 1 else f"{name}/{index}"
            value.type = inputs[0].type
        self.graph.insert_before(self.before, node)
        return list(node.outputs)

    def __call__(self, op: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        return self.nodes(op, name, list(inputs), 1, **attributes)[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initialiser, shared by all who ask for the same numbers before unused ones are next swept up."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            number = len(self.constants)
            while (name := f"matmul_form/constant_{number}") in self.graph.initializers:
                number += 1
            self.constants[key] = self.initializer(name, array)
        return self.constants[key]

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser of this name, unshared: for large arrays."""
        return self.initializer(f"{self.prefix}/{name}", np.ascontiguousarray(array))

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        import onnx_ir as ir

        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def reshape(self, name: str, x: ir.Value, *shape: int) -> ir.Value:
        return self("Reshape", name, x, self.constant(np.array(shape, np.int64)))

    def split(self, name: str, x: ir.Value, axis: int, count: int, size: int) -> list[ir.Value]:
        """`count` parts of `size` along an axis."""
        if count == 1:
            return [x]
        return self.nodes("Split", name, [x, self.constant(np.full(count, size))], count, axis=axis)

    def concat(self, name: str, parts: list[ir.Value], axis: int) -> ir.Value:
        return parts[0] if len(parts) == 1 else self("Concat", name, *parts, axis=axis)
