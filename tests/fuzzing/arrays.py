"""Mutations of arrays, graphs and tables: NumPy's, ONNX and Parquet files with other values in their fields."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence

import numpy as np

from fuzzing import formats
from fuzzing.mutate import NUMBERS, Rng, chance, mutate_bytes, mutate_json, odd_name, pick, times


def npy_header(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """An .npy with another type, shape or order."""
    length = struct.unpack("<H", data[8:10])[0]
    kinds = [
        "<i8",
        "<i4",
        "|u1",
        "<f4",
        ">i2",
        "|O",
        "|V7",
        "<U9",
        "|S3",
        "<c8",
        "|b1",
        "<M8[ns]",
        "<u8",
        "<f2",
        "<i8,<i8",
    ]
    shape = tuple(abs(pick(rng, NUMBERS)) for _ in range(int(rng.integers(5))))
    if chance(rng, 0.5):
        shape = tuple(int(n) for n in rng.integers(0, 5, int(rng.integers(4))))
    text = repr({"descr": pick(rng, kinds), "fortran_order": chance(rng, 0.5), "shape": shape})
    if chance(rng, 0.1):
        text = pick(
            rng, ["{", "__import__('os')", "[" * 3000, "{'descr': '<i8', 'fortran_order': 0, 'shape': (-1, 2)}"]
        )
    head = text.encode() + b"\n"
    version = pick(rng, [b"\1\0", b"\2\0", b"\3\0"])
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(head))
    return data[:6] + version + size + head + data[10 + length :]


def onnx_fields(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """An ONNX file with names, shapes, attributes and its maker's notes changed."""
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception:
        return mutate_bytes(data, rng, others)
    graph = model.graph
    for _ in times(rng, 5):
        kind = int(rng.integers(9))
        if kind <= 1 and model.metadata_props:
            entry = pick(rng, model.metadata_props)
            try:
                entry.value = json.dumps(mutate_json(json.loads(entry.value), rng))
            except ValueError:
                entry.value = "x"
            if chance(rng, 0.2):
                entry.value = pick(rng, ["", "{", "[" * 50_000, "nul", "9" * 5000])
        elif kind == 2 and graph.node:
            node = pick(rng, graph.node)
            node.op_type = pick(rng, ["Identity", "Loop", "If", "ConstantOfShape", "Resize", "", "NoSuch", "Div"])
        elif kind == 3 and graph.node:
            node = pick(rng, graph.node)
            if node.input:
                node.input[int(rng.integers(len(node.input)))] = pick(rng, pick(rng, graph.node).output or [""])
        elif kind == 4 and graph.initializer:
            tensor = pick(rng, graph.initializer)
            if chance(rng, 0.3):
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, value in (("location", odd_name(rng, formats.OUTSIDE)), ("offset", str(pick(rng, NUMBERS)))):
                    tensor.external_data.add(key=key, value=value.encode("utf-8", "replace").decode())
            elif tensor.dims:
                tensor.dims[int(rng.integers(len(tensor.dims)))] = pick(rng, NUMBERS) % 2**62
        elif kind == 5:
            value = pick(rng, [*graph.input, *graph.output] or [onnx.ValueInfoProto()])
            dims = value.type.tensor_type.shape.dim
            if dims and chance(rng, 0.6):
                pick(rng, dims).dim_value = pick(rng, NUMBERS) % 2**62
            else:
                value.type.tensor_type.elem_type = int(rng.integers(0, 30))
        elif kind == 6:
            del pick(rng, [graph.node, graph.input, graph.output, graph.initializer, model.metadata_props])[:1]
        elif kind == 7 and graph.node:
            graph.node.add().CopyFrom(pick(rng, graph.node))
        else:
            model.ir_version = int(rng.integers(0, 40))
    return model.SerializeToString()


def parquet_table(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    """A Parquet file written anew: strange names, missing values, columns of other types and names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pq.read_table(io.BytesIO(data))["image"].to_pylist()[0]
    count = int(rng.integers(0, 6))
    names = [odd_name(rng, formats.OUTSIDE).encode("utf-8", "replace").decode() for _ in range(count)]
    kinds = [names, [None] * count, [2**40] * count, [[n] for n in names], [b"\xff"] * count, [{"a": n} for n in names]]
    kinds += [[float("nan")] * count, [True] * count, names, names, names]
    images = [
        [image] * count,
        [image] * count,
        [None] * count,
        [b""] * count,
        [{"bytes": image}] * count,
        ["x"] * count,
    ]
    images += [[{"bytes": None}] * count, [{"path": "x"}] * count, [image[:9]] * count]
    columns = {
        pick(rng, ["image"] * 9 + ["a\nb"]): pick(rng, images),
        pick(rng, ["name"] * 9 + ["image2"]): pick(rng, kinds),
    }
    sink = io.BytesIO()
    try:
        table = pa.table(columns)
        if chance(rng, 0.2):
            table = table.cast(pa.schema([f.with_type(pa.large_string()) for f in table.schema]))
        pq.write_table(table, sink, row_group_size=int(rng.integers(1, 4)), compression=pick(rng, ["none", "zstd"]))
    except (pa.ArrowException, TypeError, ValueError):
        return mutate_bytes(data, rng, others)
    return sink.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()
