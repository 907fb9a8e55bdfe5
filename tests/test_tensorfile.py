"""Reading tensors from files: every format, nothing executed, broken files named for what they are."""

from __future__ import annotations

import copyreg
import hashlib
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_lightning
from PIL import Image
from safetensors.torch import save_file

from lseg.errors import UserError
from lseg.tensorfile import read, sha256

FORMATS = {
    "zip": lambda path, state: torch.save(state, path),
    "legacy": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "protocol 4": lambda path, state: torch.save(state, path, pickle_protocol=4),
    "nested": lambda path, state: torch.save({"state_dict": OrderedDict(state), "epoch": 3}, path),
    "lightning": write_lightning,
    "legacy lightning": lambda path, state: write_lightning(path, state, legacy=True),
}


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, tmp_path, seed):
    torch.manual_seed(seed)
    base = torch.randn(6, 8)
    state = {
        "matrix": base,
        "transposed": base.T,
        "corner": base[2:5, 3:],
        "half": torch.randn(3, 5).half(),
        "bfloat": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2, 2).double(),
        "count": torch.tensor(17),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }
    path = tmp_path / "weights.bin"
    FORMATS[name](path, state)
    assert_same(read(path, "try again").tensors, state)


def test_safetensors_with_metadata_under_any_name(tmp_path, seed):
    torch.manual_seed(seed)
    state = {"a": torch.randn(3, 4), "b": torch.tensor(5)}
    path = tmp_path / "weights.ckpt"
    save_file(state, path, {"format": "lseg"})
    file = read(path, "try again")
    assert_same(dict(sorted(file.tensors.items())), state)
    assert file.metadata == {"format": "lseg"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_archive_without_its_code(tmp_path, seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    honest, path = tmp_path / "honest.pt", tmp_path / "model.pt"
    torch.jit.script(model).save(str(honest))
    with zipfile.ZipFile(honest) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"no program" if "/code/" in name else old.read(name))
    with pytest.raises(RuntimeError):
        torch.jit.load(str(path))
    found = read(path, "try again").tensors
    assert_same(dict(sorted(found.items())), dict(sorted(model.state_dict().items())))


def test_writing_to_a_tensor_leaves_the_file(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    before = sha256(path)
    read(path, "try again").tensors["a"].fill_(1)
    assert sha256(path) == before
    assert read(path, "try again").tensors["a"].sum() == 0


def text(value: str) -> bytes:
    """Pickle code that pushes a string."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def attacks(marker: Path) -> dict[str, bytes]:
    """Pickle code, one object each, that makes the file `marker` when unpickled as usual."""
    shell = text(f"touch {marker}")
    python = text(f"open({str(marker)!r}, 'w').close()")
    nested = b"\x80\x02cos\nsystem\n(" + shell + b"tR."
    return {
        "os.system": b"cos\nsystem\n(" + shell + b"tR",
        "posix.system": b"cposix\nsystem\n(" + shell + b"tR",
        "builtins.eval": b"cbuiltins\neval\n(" + python + b"tR",
        "builtins.exec": b"cbuiltins\nexec\n(" + python + b"tR",
        "subprocess": b"csubprocess\ngetoutput\n(" + shell + b"tR",
        "pickle.loads": b"c_pickle\nloads\n(B" + len(nested).to_bytes(4, "little") + nested + b"tR",
        "INST": b"(" + shell + b"ios\nsystem\n",
        "OBJ": b"(csubprocess\ncall\n(" + text("touch") + text(str(marker)) + b"lo",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93(" + shell + b"tR",
        "dotted name": text("os") + text("path.os.system") + b"\x93(" + shell + b"tR",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("system") + b"tR("
        + shell + b"tR",
        "BUILD then call": b"cfunctools\npartial\n(cbuiltins\nlen\ntR(cos\nsystem\n(" + shell + b"t}Ntb)R",
    }  # fmt: skip


def plant(source: Path, target: Path, attack: bytes) -> None:
    """Copies a torch archive with pickle code run before its own."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = b"\x80\x04" + attack + b"0" + content[2:]
            new.writestr(name, content)


def unpickle_as_usual(path: Path) -> None:
    torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", attacks(Path("marker")))
def test_a_pickle_runs_nothing(name, tmp_path, seed):
    torch.manual_seed(seed)
    state = {"a": torch.randn(5), "b": torch.randn(2, 3)}
    marker, honest, hostile = tmp_path / "marker", tmp_path / "honest.pt", tmp_path / "hostile.pt"
    torch.save(state, honest)
    plant(honest, hostile, attacks(marker)[name])

    assert_same(read(hostile, "try again").tensors, state)
    assert not marker.exists()
    unpickle_as_usual(hostile)  # the attack is a real one
    assert marker.exists()


def test_a_legacy_file_runs_nothing(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "hostile.pt"

    class Attack:
        def __reduce__(self):
            return eval, (f"open({str(marker)!r}, 'w').close()",)

    torch.save({"state_dict": {"a": torch.ones(3)}, "b": Attack()}, path, _use_new_zipfile_serialization=False)
    assert read(path, "try again").tensors["a"].sum() == 3
    assert not marker.exists()
    unpickle_as_usual(path)
    assert marker.exists()


def test_extension_codes_are_refused(tmp_path):
    marker, honest, hostile = tmp_path / "marker", tmp_path / "honest.pt", tmp_path / "hostile.pt"
    torch.save({"a": torch.ones(3)}, honest)
    copyreg.add_extension("os", "system", 201)
    try:
        plant(honest, hostile, b"\x82\xc9(" + text(f"touch {marker}") + b"tR")
        with pytest.raises(UserError, match="extension code"):
            read(hostile, "try again")
        assert not marker.exists()
        unpickle_as_usual(hostile)
        assert marker.exists()
    finally:
        copyreg.remove_extension("os", "system", 201)


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (1000,), (1,)),
        (3, (2,), (1,)),
        (0, (2, 2), (1, 4)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, 4, 1),
    ],
)
def test_a_tensor_stays_within_its_storage(offset, shape, strides, tmp_path):
    class Crafted:
        def __reduce__(self):
            data = torch.arange(4.0)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (data, offset, shape, strides, False, OrderedDict())

    path = tmp_path / "crafted.pt"
    torch.save({"a": Crafted()}, path)
    with pytest.raises(UserError, match="damaged"):
        read(path, "try again")


def state_file(path: Path, legacy: bool = False) -> bytes:
    write_lightning(path, {"a": torch.randn(5000), "b": torch.randn(300)}, legacy)
    return path.read_bytes()


def safetensors_file(path: Path) -> bytes:
    save_file({"a": torch.randn(500)}, path)
    return path.read_bytes()


def image_file(path: Path) -> bytes:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path, "JPEG")
    return path.read_bytes()


def zip_of_zip(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("demo_e200.ckpt", b"weights")
    return path.read_bytes()


def saved(path: Path, content) -> bytes:
    torch.save(content, path)
    return path.read_bytes()


BROKEN = {
    "empty": (lambda path: b"", "is empty"),
    "web page": (lambda path: b"\n <!DOCTYPE html><html><body>Google Drive</body></html>", "is a web page"),
    "web page after a mark": (lambda path: b"\xef\xbb\xbf<html lang=en>", "is a web page"),
    "zip cut at 90 %": (lambda path: state_file(path)[:-2500], "is cut short"),
    "zip cut at once": (lambda path: state_file(path)[:40], "is cut short"),
    "zip with a broken pickle": (lambda path: state_file(path).replace(b"state_dict", b"\xff" * 10), "damaged"),
    "legacy cut in its tensors": (lambda path: state_file(path, True)[:-1000], "is cut short or damaged"),
    "legacy cut in its pickle": (lambda path: state_file(path, True)[:400], "is cut short or damaged"),
    "safetensors cut in its tensors": (lambda path: safetensors_file(path)[:-8], "is cut short or damaged"),
    "safetensors cut in its header": (lambda path: safetensors_file(path)[:40], "is cut short or damaged"),
    "random": (lambda path: bytes(np.random.default_rng(0).integers(1, 50, 3000, np.uint8)), "is not a checkpoint"),
    "photo": (image_file, "is not a checkpoint"),
    "text": (lambda path: b"net.scratch.head1.weight", "is not a checkpoint"),
    "zip of a checkpoint": (zip_of_zip, r"zip archive that torch.save did not write \(it holds demo_e200.ckpt\)"),
    "plain pickle": (lambda path: pickle.dumps({"state_dict": [1, 2]}), "pickle that torch.save did not write"),
    "no state_dict": (lambda path: saved(path, {"epoch": 3, "hyper_parameters": {"lr": 1}}), "holds no state_dict"),
    "state_dict of something else": (lambda path: saved(path, {"state_dict": 3}), "holds no state_dict"),
    "whole model": (lambda path: saved(path, torch.nn.Linear(2, 2)), "holds no state_dict"),
    "one tensor": (lambda path: saved(path, torch.ones(3)), "holds no state_dict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name, tmp_path):
    make, sentence = BROKEN[name]
    content = make(tmp_path / "made")
    path = tmp_path / "demo_e200.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        read(path, "try again")
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert message.endswith("try again") or "unpack it" in message


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(UserError, match="does not exist: try again"):
        read(tmp_path / "none.ckpt", "try again")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\): try again"):
        read(tmp_path, "try again")


def test_sha256_is_the_common_one(tmp_path, seed):
    content = np.random.default_rng(seed).bytes(3_000_001)
    path = tmp_path / "bytes"
    path.write_bytes(content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()
