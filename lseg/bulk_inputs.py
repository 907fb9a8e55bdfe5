"""Images for bulk work: folders, tar archives and Parquet files, on disks or in object storage, as rows that travel.

A row says where an image is and does not hold it: workers read it. Paths are pyarrow's: a local path, or a URI such as
s3://bucket/folder, gs://..., hdfs://... or file:///....
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from lseg.errors import UserError
from lseg.image import SUFFIXES, read_bytes
from lseg.sources import BROKEN, Photo, is_image, is_ours, list_photos, output_names, plain_parts, read_at

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs
    import pyarrow.parquet

URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
BUCKETS = ("s3", "gs", "gcs")  # in whose paths the bucket comes first
PARQUET, TAR = (".parquet", ".pq"), (".tar",)
WHOLE = -1  # a row's `offset` and `group` where the file itself is the image


class Row(NamedTuple):
    """One image: what it is called, and where its bytes are."""

    name: str  # what its results are called, without suffix
    shown: str  # its path, for messages and in results
    path: str  # of the file that holds it
    offset: int = WHOLE  # in a tar archive the byte, in a Parquet file the row of its row group
    size: int = 0  # bytes, in a tar archive
    group: int = WHOLE  # row group, in a Parquet file

    @property
    def source(self) -> str:
        """The same for the same image, from wherever the work is started."""
        return self.path if self.offset == WHOLE else f"{self.path}:{max(self.group, 0)}:{self.offset}"


class Columns(NamedTuple):
    """Of Parquet files: the column of images (bytes, or a struct with "bytes"), and that of names, if there is one."""

    image: str = "image"
    name: str | None = None


def list_rows(inputs: Sequence[str], output: str, columns: Columns) -> tuple[list[Row], list[str]]:
    """Every image that the user means, each once, and notes on what is left out.

    Args:
        inputs: images, folders (all images, archives and Parquet files below them), patterns, lists, or URIs.
        output: the folder of the results, a path or a URI: no result is given an image's own name.
        columns: of Parquet files.

    Raises:
        UserError: something does not exist or cannot be read, a Parquet file has no such column, or there is no image.
    """
    photos: dict[str, Photo] = {}
    rows: dict[str, Row] = {}
    notes: list[str] = []
    ours = f"{output if URI.match(output) else os.path.abspath(output)}/parts/"
    for text in inputs:
        for photo, row in _expand(text, columns, ours, notes):
            if photos.setdefault(photo.identity, photo) is not photo:
                notes.append(f"{photo.shown} is given more than once, and segmented once")
            else:
                rows[photo.identity] = row
    folder = Path("/") / output.partition("://")[2] if URI.match(output) else Path(output)
    names = output_names(list(photos.values()), folder)
    pairs = zip(rows.values(), names, strict=True)
    return [row._replace(name=name.as_posix()) for row, name in pairs], notes


def _expand(text: str, columns: Columns, ours: str, notes: list[str]) -> Iterable[tuple[Photo, Row]]:
    if URI.match(text):
        return _in_store(text, columns, ours, notes)
    path = Path(text)
    if path.is_dir():
        held = [
            str(file) for file in sorted(path.rglob("*")) if file.suffix.lower() in (*TAR, *PARQUET) and file.is_file()
        ]
        held = [file for file in held if not _hidden(Path(file).relative_to(path))]
        held = [file for file in held if not os.path.abspath(file).startswith(ours)]
        loose = any(is_image(name) for _, _, files in os.walk(path) for name in files)
        found = list(_local(list_photos([path]), notes)) if loose or not held else []
        return [*found, *(pair for file in held for pair in _expand(file, columns, ours, notes))]
    if not path.exists() and glob.has_magic(text):
        held = sorted(file for file in glob.glob(text, recursive=True) if file.lower().endswith((*TAR, *PARQUET)))
        if held:
            return [pair for file in held for pair in _expand(file, columns, ours, notes)]
    if path.suffix.lower() in PARQUET and path.is_file():
        return _in_parquet(str(path), columns)
    return _local(list_photos([text]), notes)


def _local(found: tuple[list[Photo], list[str]], notes: list[str]) -> Iterable[tuple[Photo, Row]]:
    photos, more = found
    notes += more
    for photo in photos:
        path, at, size = photo.place or (photo.file, WHOLE, 0)
        yield photo, Row("", photo.shown, os.path.abspath(path), at, size)


def _in_store(uri: str, columns: Columns, ours: str, notes: list[str]) -> Iterable[tuple[Photo, Row]]:
    """What a URI names: a folder with all below it, or one file."""
    import pyarrow.fs as pafs

    uri = uri.rstrip("/")
    files, base = open_store(uri)
    root = uri[: len(uri) - len(base)]
    try:
        info = files.get_file_info(base)
        if info.type == pafs.FileType.NotFound:
            raise UserError(f"{uri} does not exist; check the name")
        found = [info]
        if info.type == pafs.FileType.Directory:
            found = [one for one in files.get_file_info(pafs.FileSelector(base, recursive=True)) if one.is_file]
    except (OSError, ValueError) as error:
        raise UserError(f"{uri} cannot be read ({one_line(error)}); check its name and your permissions") from None
    pairs: list[tuple[Photo, Row]] = []
    for path in sorted(one.path for one in found):
        below = PurePosixPath(path).relative_to(base) if path != base else PurePosixPath(PurePosixPath(path).name)
        full, suffix = root + path, PurePosixPath(path).suffix.lower()
        if _hidden(below) or is_ours(path) or full.startswith(ours):
            continue
        if suffix in PARQUET:
            pairs += _in_parquet(full, columns)
        elif suffix in TAR:
            pairs += _in_remote_tar(full, notes)
        elif is_image(path):
            pairs.append(_pair(below.with_suffix(""), Row("", full, full)))
    if not pairs:
        raise UserError(f"{uri} holds no image; give {', '.join(SUFFIXES)}, .tar or .parquet files")
    return pairs


def _in_remote_tar(uri: str, notes: list[str]) -> list[tuple[Photo, Row]]:
    files, path = open_store(uri)
    pairs = []
    try:
        with files.open_input_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg() and is_image(member.name):
                    if "\0" in member.name or member.issparse():
                        notes.append(f"{uri}:{ascii(member.name)} is left out: pack it as a plain file of a plain name")
                        continue
                    row = Row("", f"{uri}:{member.name}", uri, member.offset_data, member.size)
                    pairs.append(_pair(plain_parts(member.name), row))
    except BROKEN as error:
        raise UserError(f"{uri} is no tar archive, or breaks off ({error}); pack it again") from None
    except OSError as error:
        raise UserError(f"{uri} cannot be read ({one_line(error)}); check its name and your permissions") from None
    return pairs


def _in_parquet(path: str, columns: Columns) -> list[tuple[Photo, Row]]:
    """The rows of a Parquet file; only its schema, its row counts and the column of names are read."""
    file = _open_parquet(path)
    _image_type(path, file.schema_arrow, columns.image)
    if columns.name and columns.name not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise UserError(f"{path} has no column '{columns.name}'; its columns are {names}: choose another --name-column")
    pairs, count = [], 0
    stem, full = PurePosixPath(path).stem, path if URI.match(path) else os.path.abspath(path)
    for group in range(file.num_row_groups):
        if columns.name:
            names = [str(name) for name in values(_column(path, file, group, columns.name), path, columns.name)]
        else:
            names = [f"{stem}-{count + index:08d}" for index in range(file.metadata.row_group(group).num_rows)]
        for index, name in enumerate(names):
            parts = plain_parts(name) if columns.name else PurePosixPath(name)
            shown = f"{path}:{name if columns.name else count + index}"
            pairs.append(_pair(parts, Row("", shown, full, index, 0, group)))
        count += len(names)
    return pairs


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _pair(name: PurePosixPath, row: Row) -> tuple[Photo, Row]:
    return Photo(row.shown, name, lambda: b"", row.source), row


def read_row(row: Row, columns: Columns) -> bytes:
    """An image's bytes, as stored; UserError where they cannot be read."""
    if row.group != WHOLE:
        group = _group(row.path, row.group, columns.image)
        if row.offset >= len(group):
            raise UserError(f"{row.path} is damaged, for it lacks rows that it counts; write it again")
        scalar = group[row.offset]
        value = (scalar["bytes"] if hasattr(scalar, "keys") else scalar).as_py()  # of a struct nothing else
        if not value:
            raise UserError(f"{row.shown} is empty; write it again")
        return value
    if not URI.match(row.path):
        return read_bytes(row.path) if row.offset == WHOLE else read_at(Path(row.path), row.shown, row.offset, row.size)
    files, path = open_store(row.path)
    try:
        with files.open_input_file(path) as file:
            if row.offset == WHOLE:
                data = file.read()
            else:
                whole = row.size >= 0 and row.offset + row.size <= file.size()
                file.seek(row.offset if whole else 0)
                data = file.read(row.size if whole else 0)
    except OSError as error:
        raise UserError(f"{row.shown} cannot be read ({one_line(error)}); check its name and permissions") from None
    if not 0 <= row.size <= len(data):
        raise UserError(f"{row.shown} is cut short, with its archive; copy or pack that again")
    if not data:
        raise UserError(f"{row.shown} is empty; copy it again")
    return data


@lru_cache(maxsize=1)
def _group(path: str, group: int, column: str) -> pa.ChunkedArray:
    """A row group's images: those of one part are read together, and mostly lie in one."""
    return _column(path, _open_parquet(path), group, column)


def _column(path: str, file: pyarrow.parquet.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
    import pyarrow as pa

    try:
        return file.read_row_group(group, [column])[column]
    except (OSError, pa.ArrowException, LookupError) as error:
        raise UserError(f"{path} is damaged in its column '{column}' ({one_line(error)}); write it again") from None


def values(column: pa.ChunkedArray, path: str, name: str) -> list:
    """A column's values; UserError where one is none that Python has, such as a text that is no UTF-8."""
    import pyarrow as pa

    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged in its column '{name}' ({one_line(error)}); write it again") from None


def _open_parquet(path: str) -> pyarrow.parquet.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if URI.match(path):
            files, inner = open_store(path)
            return pq.ParquetFile(inner, filesystem=files)
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is no Parquet file, or cannot be read ({one_line(error)}); write it again") from None


def _image_type(path: str, schema: pa.Schema, column: str) -> None:
    import pyarrow.types as types

    def is_bytes(kind: pa.DataType) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    names = ", ".join(schema.names)
    if column not in schema.names:
        raise UserError(
            f"{path} has no column '{column}' of images; its columns are {names}: name one with --image-column"
        )
    kind = schema.field(column).type
    inner = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not is_bytes(inner):
        raise UserError(
            f"{path}: its column '{column}' holds {kind}, not the bytes of image files; its columns are {names}: "
            "name another with --image-column"
        )


@lru_cache(maxsize=64)
def _store_of(root: str) -> pyarrow.fs.FileSystem:
    import pyarrow.fs as pafs

    return pafs.FileSystem.from_uri(root)[0]


def open_store(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A URI's file system and the path in it; UserError where it is of another kind, or does not answer."""
    import pyarrow as pa

    scheme, _, rest = uri.partition("://")
    if scheme not in (*BUCKETS, "hdfs", "file"):
        raise UserError(f"{uri} is of no kind known here: give s3://, gs://, hdfs:// or file://")
    host, _, path = rest.partition("/")
    try:
        return _store_of(f"{scheme}://{host}/"), rest if scheme in BUCKETS else f"/{path}"
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{uri} cannot be opened ({one_line(error)}); check its name and your permissions") from None


def one_line(error: BaseException) -> str:
    """An error of a library in one line, without its trace."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:160] or type(error).__name__
