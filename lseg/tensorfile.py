"""Named tensors out of a file, without running any code that the file carries.

Reads what torch.save writes (its zip archive, and the plain stream before PyTorch 1.6), TorchScript archives and
safetensors. A pickle is a program: unpickled as usual, it calls whatever it names. Here every name that it utters
becomes an inert stand-in, except those that describe a tensor, and only the tensors of its state dict are made. They
are views of the file, mapped into memory: what nobody reads (an optimiser's state) costs nothing.

Nothing at the top of this module imports torch.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from lseg.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in a file of torch.save's older format
DTYPES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
}


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
        reason = " ".join(str(error).split()) or type(error).__name__
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


def listing(names: Iterable[str], limit: int) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


class _Storage(NamedTuple):
    """A pickle's mention of a run of `length` numbers stored elsewhere in the file."""

    dtype: str
    key: str
    length: int


class _TensorInfo(NamedTuple):
    """A pickle's description of a tensor: offset and strides count elements of the storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Takes the place of whatever a pickle names: may be made, called and filled, and does nothing but keep its state.

    Each of the pickle machine's ways to touch an object is answered here; without the answer it would look further.
    """

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append


class _Unpickler(pickle.Unpickler):
    """Unpickles builtin containers, strings and numbers, and tensors as _TensorInfo; the rest is inert."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _TensorInfo(storage, offset, shape, strides)
        if (module, name) in (
            ("torch._utils", "_rebuild_parameter"),
            ("torch._utils", "_rebuild_parameter_with_state"),
        ):
            return lambda data, *_: data
        if module in ("torch", "torch.cuda", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        return type(
            "Unknown", (_Inert,), {}
        )  # a new one each time: nothing that a pickle does to it outlives the pickle

    def persistent_load(self, saved_id: Any) -> Any:
        kind, *values = saved_id
        if kind == "module":  # the older format's mention of a class with its source
            return values[0]
        if kind != "storage" or (len(values) > 4 and values[4] is not None):
            raise pickle.UnpicklingError(f"unknown reference {kind}")
        dtype, key, _device, length = values[:4]
        return self.storages.setdefault(key, _Storage(dtype, key, length))


def _unpickle(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """Reads one pickle from where the file stands; returns its object and the storages that it mentions."""
    start = file.tell()
    for opcode, _, _ in pickletools.genops(file):
        if opcode.name.startswith("EXT"):  # these look a callable up by number, past find_class
            raise pickle.UnpicklingError("the pickle uses an extension code")
    file.seek(start)
    unpickler = _Unpickler(file)
    return unpickler.load(), unpickler.storages


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
        if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        tree, _ = _unpickle(io.BytesIO(archive.read(f"{root}data.pkl")))
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
        if _unpickle(file)[0] != STREAM_MAGIC:
            raise UserError(f"{path} is a pickle that torch.save did not write, without tensors to read: {remedy}")
        _version = _unpickle(file)
        system = _unpickle(file)[0]
        if not system["little_endian"]:
            raise ValueError("its numbers are big-endian")
        tree, storages = _unpickle(file)
        infos = _state_dict(tree, path, remedy)
        spans = {}
        for key in _unpickle(file)[0]:
            (count,) = struct.unpack("<q", file.read(8))
            length = count * _dtype(storages[key].dtype).itemsize
            spans[key] = (file.tell(), length)
            file.seek(length, io.SEEK_CUR)
    return _tensors(path, infos, spans)


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return TensorFile({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})


def _state_dict(tree: Any, path: Path, remedy: str) -> dict[str, _TensorInfo]:
    """The tensors of a checkpoint's state dict, or of one that stands alone."""
    if isinstance(tree, dict) and "state_dict" in tree:
        tree = tree["state_dict"]
    entries = tree.items() if isinstance(tree, dict) else ()
    infos = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, _TensorInfo)}
    if not infos:
        raise UserError(f"{path} holds no state_dict with tensors: {remedy}")
    return infos


def _script_tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, _TensorInfo]]:
    """The tensors of a TorchScript archive, named as in its module's state dict. Its code is never looked at."""
    state = module.state if isinstance(module, _Inert) else None
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, _TensorInfo):
            yield prefix + name, value
        else:
            yield from _script_tensors(value, f"{prefix}{name}.")


def _tensors(path: Path, infos: dict[str, _TensorInfo], spans: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
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
    return {
        name: torch.as_strided(storages[info.storage.key], info.shape, info.strides, info.offset)
        for name, info in infos.items()
    }


def _dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES.values():  # the pickle chose it
        raise ValueError("a tensor's number type is unknown")
    return getattr(torch, name)
