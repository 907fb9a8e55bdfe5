"""Pickles without what makes them dangerous: nothing is called, and no more is made than they are long.

A pickle is a program: unpickled as usual, it calls whatever it names. Here every name that it utters becomes an inert
stand-in, except those that describe a tensor.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

MOST_STEPS = 2_000_000  # some seconds' work; a tensor takes about thirty
MOST_IN_KEY = 100  # values in a dictionary's key
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


class Storage(NamedTuple):
    """A pickle's mention of a run of `length` numbers stored elsewhere in the file."""

    dtype: str
    key: str
    length: int


class TensorInfo(NamedTuple):
    """A pickle's description of a tensor: offset and strides count elements of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """Takes the place of whatever a pickle names: may be made, called and filled, and does nothing but keep its state.

    Each of the pickle machine's ways to touch an object is answered here; without the answer it would look further.
    """

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = append


class Unpickler(pickle._Unpickler):
    """Unpickles builtin containers, strings and numbers, and tensors as TensorInfo; the rest is inert.

    Python's own rather than C's, which makes room for whatever place in its memo a pickle names: a few bytes ask for
    gigabytes. And here keys can be looked at before they are hashed.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _ordered
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: TensorInfo(storage, offset, shape, strides)
        if (module, name) in (
            ("torch._utils", "_rebuild_parameter"),
            ("torch._utils", "_rebuild_parameter_with_state"),
        ):
            return lambda data, *_: data
        if module in ("torch", "torch.cuda", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        return type(
            "Unknown", (Inert,), {}
        )  # a new one each time: nothing that a pickle does to it outlives the pickle

    def persistent_load(self, saved_id: Any) -> Any:
        kind, *values = saved_id
        if kind == "module":  # the older format's mention of a class with its source
            return values[0]
        if kind != "storage" or (len(values) > 4 and values[4] is not None):
            raise pickle.UnpicklingError("a reference is of an unknown kind")
        dtype, key, _device, length = values[:4]
        if not isinstance(key, str) or not isinstance(length, int):
            raise pickle.UnpicklingError("a storage's name or length is none")
        return self.storages.setdefault(key, Storage(dtype if isinstance(dtype, str) else "unknown", key, length))

    def _load_dict(self) -> None:
        _check_keys(self.stack[0::2])
        super().load_dict()

    def _load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def _load_setitems(self) -> None:
        _check_keys(self.stack[0::2])
        super().load_setitems()

    def _load_members(self) -> None:
        _check_keys(self.stack)
        super().load_additems()

    def _load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.DICT[0]: _load_dict,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.ADDITEMS[0]: _load_members,
        pickle.FROZENSET[0]: _load_frozenset,
    }


def _ordered(items: Iterable[Any] = ()) -> OrderedDict:
    pairs = list(items)
    _check_keys(key for key, _ in pairs)
    return OrderedDict(pairs)


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuses keys that hold more than keys do. A pair of pairs of pairs takes ages to hash, and few bytes to write."""
    for key in keys:
        held, left = [key], MOST_IN_KEY
        while held and left:
            one, left = held.pop(), left - 1
            held += one[:left] if isinstance(one, tuple) else ()
        if held:
            raise pickle.UnpicklingError("a dictionary's key is too large")


def unpickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle from where the file stands; returns its object and the storages that it mentions."""
    start = file.tell()
    for count, (opcode, _, _) in enumerate(pickletools.genops(file)):
        if count > MOST_STEPS:
            raise pickle.UnpicklingError("the pickle has too many steps")
        if opcode.name.startswith("EXT"):  # these look a callable up by number, past find_class
            raise pickle.UnpicklingError("the pickle uses an extension code")
    file.seek(start)
    unpickler = Unpickler(file)
    return unpickler.load(), unpickler.storages
