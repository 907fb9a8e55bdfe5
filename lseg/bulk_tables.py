"""Parts as Ray carries them: tables of one row, whose bytes are neither copied into one nor out of it.

Of rows Ray would make Python objects, and of those tables again: each step copies megabytes, while the GPU waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Part = dict[str, Any]  # names to bytes, buffers, arrays, texts or whole numbers


def to_table(part: Part) -> pa.Table:
    """One row; an array becomes the bytes that it holds, which the table keeps alive."""
    import pyarrow as pa

    return pa.table({name: _column(value) for name, value in part.items()})


def _column(value: object) -> pa.Array:
    import pyarrow as pa

    if isinstance(value, str | int):
        return pa.array([value])
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value)
    data = value if isinstance(value, pa.Buffer) else pa.py_buffer(value)
    ends = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])


def to_parts(table: pa.Table) -> list[Part]:
    """A part of each row; its bytes are buffers in the table's memory, which `numpy.frombuffer` takes."""
    return [{name: _value(row[name]) for name in table.column_names} for row in _rows(table)]


def _rows(table: pa.Table) -> Iterator[pa.Table]:
    return (table.slice(index, 1) for index in range(table.num_rows))


def _value(column: pa.ChunkedArray) -> object:
    """What a column of one row holds."""
    import pyarrow as pa

    if not pa.types.is_large_binary(column.type):
        return column[0].as_py()
    (array,) = (chunk for chunk in column.chunks if len(chunk))
    _, ends, data = array.buffers()
    start, end = np.frombuffer(ends, np.int64)[array.offset : array.offset + 2].tolist()
    if start == end:  # Arrow may keep no buffer for nothing
        return pa.py_buffer(b"")
    return data.slice(start, end - start)  # a scalar of the column would be a copy


def on_tables(stage: Callable[..., Part]) -> Callable[..., pa.Table]:
    """A stage that takes parts, for Ray, which hands it tables."""

    @wraps(stage)  # Ray shows its name
    def work(table: pa.Table, **arguments: Any) -> pa.Table:
        return _each(table, lambda part: stage(part, **arguments))

    return work


class OnTables:
    """The same of a class whose objects take parts: `kind`, made with the other arguments."""

    def __init__(self, kind: type, **arguments: Any):
        self.stage = kind(**arguments)

    def __call__(self, table: pa.Table) -> pa.Table:
        return _each(table, self.stage)


def _each(table: pa.Table, stage: Callable[[Part], Part]) -> pa.Table:
    import pyarrow as pa

    tables = [to_table(stage(part)) for part in to_parts(table)]
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables)
