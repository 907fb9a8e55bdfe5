"""Named tensors out of a file, without running any code that the file carries.

Reads what torch.save writes (its zip archive, and the plain stream before PyTorch 1.6), TorchScript archives and
safetensors. Pickles are read by `lseg.inert_pickle`, and only the tensors of a state dict are made. They are views of
the file, mapped into memory: what nobody reads (an optimiser's state) costs nothing.

Nothing at the top of this module imports torch.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lseg.errors import UserError
from lseg.inert_pickle import DTYPES, Inert, TensorInfo, unpickle

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_PICKLE = 1 << 26  # bytes of an archive's pickle, which holds names and no numbers
MOST_MODULES, LONGEST_NAME = 100_000, 1000  # of a TorchScript archive
STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in a file of torch.save's older format


class TensorFile(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # safetensors' own; empty for other formats


def read(path: Path, remedy: str) -> TensorFile:
    """Reads the tensors of a file's state dict, as they are named there, on the CPU.

    Args:
        path: a file in one of the formats above; its first bytes decide which, not its name.
        remedy: what the user should do if the file is no good: the end of the error's sentence.

    Raises:
        UserError: no file, empty, a web page, not a checkpoint, cut short or damaged, without a state dict.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        if not head:
            raise UserError(f"{path} is empty: {remedy}")
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
            raise UserError(f"{path} is a web page, which Google Drive sends when it withholds a file: {remedy}")
        if head.startswith(b"PK\x03\x04"):
            return TensorFile(_read_archive(path, remedy), {})
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return TensorFile(_read_stream(path, remedy), {})
        if head[8:9] == b"{":
            return _read_safetensors(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {remedy}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error
    except Exception as error:  # a broken pickle can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is cut short or damaged ({reason}): {remedy}") from error
    raise UserError(f"{path} is not a checkpoint (neither torch.save's format nor safetensors): {remedy}")


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal; UserError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its name and permissions") from None
    return digest.hexdigest()


def sha256_once(path: Path) -> str:
    """`sha256` of a file of gigabytes, kept for as long as the file stays the same by its size, inode and times."""
    try:
        about = os.stat(path)
    except OSError:
        return sha256(path)  # which tells
    return _kept_sha256(path, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@lru_cache(maxsize=16)
def _kept_sha256(path: Path, *_: int) -> str:
    return sha256(path)


def listing(names: Iterable[str], limit: int) -> str:
    """The first names, and how many more there are."""
    names = [name if len(name) <= 100 else f"{name[:99]}…" for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read_archive(path: Path, remedy: str) -> dict[str, Tensor]:
    """Reads a zip archive of torch.save or torch.jit.save: data.pkl, and each storage as a file of its own."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is cut short (the end of its archive is missing): {remedy}") from error
    with archive, open(path, "rb") as file:
        records = {record.filename: record for record in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")), None)
        if root is None:
            raise UserError(
                f"{path} is a zip archive that torch.save did not write (it holds {listing(records, 3)}): "
                "unpack it, if the checkpoint is inside, and give that file"
            )
        for name in (f"{root}byteorder", f"{root}data.pkl"):
            if name in records and records[name].file_size > MOST_PICKLE:  # a compressed one would swell in memory
                raise ValueError("its pickle is too large")
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        tree, _ = unpickle(io.BytesIO(archive.read(f"{root}data.pkl")))
        if f"{root}constants.pkl" in records:
            infos = dict(_script_tensors(tree))
        else:
            infos = _state_dict(tree, path, remedy)
        spans = {}
        for key in {info.storage.key for info in infos.values()}:
            record = records[f"{root}data/{key}"]
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its tensors are compressed")
            file.seek(record.header_offset)
            *_, name_length, extra_length = struct.unpack("<4s5H3I2H", file.read(30))
            spans[key] = (record.header_offset + 30 + name_length + extra_length, record.file_size)
    return _tensors(path, infos, spans)


def _read_stream(path: Path, remedy: str) -> dict[str, Tensor]:
    """Reads torch.save's older format: pickles one after the other, then each storage with its length before it."""
    with open(path, "rb") as file:
        if unpickle(file)[0] != STREAM_MAGIC:
            raise UserError(f"{path} is a pickle that torch.save did not write, without tensors to read: {remedy}")
        _version = unpickle(file)
        system = unpickle(file)[0]
        if not system["little_endian"]:
            raise ValueError("its numbers are big-endian")
        tree, storages = unpickle(file)
        infos = _state_dict(tree, path, remedy)
        spans = {}
        for key in unpickle(file)[0]:
            if not isinstance(key, str):
                raise ValueError("a storage's name is none")
            (count,) = struct.unpack("<q", file.read(8))
            length = count * _dtype(storages[key].dtype).itemsize
            spans[key] = (file.tell(), length)
            file.seek(length, io.SEEK_CUR)
    return _tensors(path, infos, spans)


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return TensorFile({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})


def _state_dict(tree: Any, path: Path, remedy: str) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint's state dict, or of one that stands alone."""
    if isinstance(tree, dict) and "state_dict" in tree:
        tree = tree["state_dict"]
    entries = tree.items() if isinstance(tree, dict) else ()
    infos = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, TensorInfo)}
    if not infos:
        raise UserError(f"{path} holds no state_dict with tensors: {remedy}")
    return infos


def _script_tensors(tree: Any) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors of a TorchScript archive, named as in its module's state dict. Its code is never looked at."""
    modules = [("", tree)]
    for prefix, module in modules:
        state = module.state if isinstance(module, Inert) else None
        for name, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, TensorInfo):
                yield f"{prefix}{name}", value
            elif isinstance(value, Inert) and isinstance(name, str):
                modules.append((f"{prefix}{name}.", value))
        if len(modules) > MOST_MODULES or len(prefix) > LONGEST_NAME:  # some hold each other
            raise ValueError("its modules have no end")


def _tensors(path: Path, infos: dict[str, TensorInfo], spans: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Makes tensors that view the file: spans gives each storage's first byte in it and its length in bytes."""
    import torch

    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writing to a tensor leaves the file as it is

    storages = {}
    for dtype_name, key, count in {info.storage for info in infos.values()}:
        start, length = spans[key]
        dtype = _dtype(dtype_name)
        size = count * dtype.itemsize
        if not 0 <= size <= length or start + size > len(content):
            raise ValueError("a tensor's numbers are missing")
        if count == 0:
            storages[key] = torch.empty(0, dtype=dtype)
        elif start % dtype.itemsize:  # torch's kernels expect numbers at multiples of their size
            storages[key] = torch.frombuffer(bytearray(content[start : start + size]), dtype=dtype)
        else:
            storages[key] = torch.frombuffer(content, dtype=dtype, count=count, offset=start)
    for info in infos.values():
        if math.prod(info.shape) > info.storage.length:  # steps of 0 make any size of one number
            raise ValueError("a tensor is larger than its numbers")
    return {
        name: torch.as_strided(storages[info.storage.key], info.shape, info.strides, info.offset)
        for name, info in infos.items()
    }


def _dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES.values():  # the pickle chose it
        raise ValueError("a tensor's number type is unknown")
    return getattr(torch, name)
