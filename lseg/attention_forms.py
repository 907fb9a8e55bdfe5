"""Builds an attention anew in one of the forms that lseg/rewrite.py explains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lseg.attention import Attention
from lseg.graph_builder import Builder

if TYPE_CHECKING:
    import onnx_ir as ir


def attend(build: Builder, a: Attention, form: str, apart: bool = False) -> ir.Value:
    """The 4d and 3d forms: from [B, L, 3 C] to [B, L, C]; `apart` is of the 4d form."""
    batch = a.batch or -1
    if apart and form == "4d" and (layer := linear_layer(a.qkv)):
        q, k, v = parts_apart(build, a, *layer)
    else:
        q, k, v = parts(build, a, form)
    q = build("Mul", "q_scaled", q, build.constant(np.array(a.scale, a.qkv.dtype.numpy())))
    k = build("Transpose", "k_transposed", k, perm=[0, 1, 3, 2] if form == "4d" else [0, 2, 1])
    scores = build("MatMul", "scores", q, k)
    if a.mask is not None:
        mask = a.mask.const_value.numpy()
        scores = build("Add", "scores_masked", scores, build.constant(mask.reshape(mask.shape[-2:])))
    y = build("MatMul", "values", build("Softmax", "softmax", scores, axis=-1), v)
    if form == "3d":
        y = build.reshape("values_unfolded", y, batch, a.heads, a.length, a.size)
    return build.reshape("joined", build("Transpose", "tokens", y, perm=[0, 2, 1, 3]), batch, a.length, a.width)


def parts(build: Builder, a: Attention, form: str) -> list[ir.Value]:
    """q, k and v, each [B, h, L, d] or, in the 3d form, [B h, L, d], cut from one tensor."""
    heads = build.reshape("qkv_heads", a.qkv, a.batch or -1, a.length, 3, a.heads, a.size)
    heads = build("Transpose", "qkv", heads, perm=[2, 0, 3, 1, 4])  # [3, B, h, L, d]
    if form == "3d":
        heads = build.reshape("qkv_folded", heads, 3, -1, a.length, a.size)
    axis = build.constant(np.array([0]))
    cut = build.split("parts", heads, 0, 3, 1)
    return [build("Squeeze", name, part, axis) for name, part in zip("qkv", cut, strict=True)]


def parts_apart(
    build: Builder, a: Attention, x: ir.Value, weight: np.ndarray, bias: np.ndarray | None
) -> list[ir.Value]:
    """q, k and v, each [B, h, L, d], from x [B, L, K] by thirds of a linear layer's weight [K, 3 C] and bias [3 C]."""
    found = []
    for index, name in enumerate("qkv"):
        third = slice(index * a.width, (index + 1) * a.width)
        y = build("MatMul", f"{name}_product", x, build.weight(f"{name}_weight", weight[:, third]))
        if bias is not None:
            y = build("Add", f"{name}_sum", y, build.weight(f"{name}_bias", bias[third]))
        y = build.reshape(f"{name}_heads", y, a.batch or -1, a.length, a.heads, a.size)
        found.append(build("Transpose", name, y, perm=[0, 2, 1, 3]))
    return found


def linear_layer(y: ir.Value) -> tuple[ir.Value, np.ndarray, np.ndarray | None] | None:
    """x, weight and bias of the linear layer that made y: MatMul by a constant and perhaps Add of one; else None."""
    node, bias = y.producer(), None
    if node is not None and node.op_type == "Add":
        constants = [value for value in node.inputs if value.const_value is not None]
        others = [value for value in node.inputs if value.const_value is None]
        if len(constants) != 1:
            return None
        bias, node = constants[0].const_value.numpy(), others[0].producer()
        if bias.shape != tuple(y.shape[2:]):
            return None
    if node is None or node.op_type != "MatMul" or node.inputs[1].const_value is None:
        return None
    return node.inputs[0], node.inputs[1].const_value.numpy(), bias


def attend_2d(build: Builder, a: Attention, heads_per_product: int) -> ir.Value:
    """The 2d form: from [B, L, 3 C] to [B, L, C], with [L, C] an image at a time in between."""
    together = max(g for g in range(1, a.heads + 1) if a.heads % g == 0 and g <= heads_per_product)
    own = np.arange(a.width) // a.size % together == np.arange(together)[:, None]  # [g, C]: channels of its heads
    own = own.astype(a.qkv.dtype.numpy())
    spread = build.constant(own[:, None] * own.dtype.type(a.scale))  # [g, 1, C]
    groups, span = a.heads // together, together * a.size

    qkv = build.reshape("qkv", a.qkv, a.batch * a.length, 3 * a.width)
    images = []
    for image, rows in enumerate(build.split("images", qkv, 0, a.batch, a.length)):
        at = f"image{image}/"
        q, k, v = build.split(at + "parts", rows, 1, 3, a.width)  # each [L, C]
        # Each group's queries, scaled, once for each of its heads, zero outside that head's channels: [g L, C].
        q = build.reshape(at + "q_rows", build("Mul", at + "q_scaled", q, spread), together * a.length, a.width)
        parts = zip(*(build.split(at + n, x, 1, groups, span) for n, x in (("q", q), ("k", k), ("v", v))), strict=True)
        results = []
        for group, (q_group, k_group, v_group) in enumerate(parts):
            to = f"{at}group{group}/"
            scores = build("MatMul", to + "scores", q_group, build("Transpose", to + "k", k_group, perm=[1, 0]))
            results.append(build("MatMul", to + "values", build("Softmax", to + "softmax", scores, axis=-1), v_group))
        y = build.concat(at + "groups", results, 1)  # [g L, C]
        if together > 1:  # of row block i, the channels of each group's head i count
            blocks = build.split(at + "blocks", y, 0, together, a.length)
            y = build("Mul", at + "own0", blocks[0], build.constant(own[:1]))
            for i in range(1, together):
                y = build(
                    "Add", f"{at}sum{i}", y, build("Mul", f"{at}own{i}", blocks[i], build.constant(own[i : i + 1]))
                )
        images.append(y)
    return build.reshape("joined", build.concat("all_images", images, 0), a.batch, a.length, a.width)
