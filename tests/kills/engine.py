"""Engines built, kept and asked for again with TensorRT-RTX, killed: none counts that is not whole.

What is killed is lseg.engine.get_engine, as lseg.stages calls it; the GPU's name is a stand-in's. Rounds of two kinds:
into an empty folder, and over engines whose sidecars do not vouch for them. Two builds of one engine may differ in some
bytes; its size and its beginning are the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx  # noqa: F401  # so that children need not import it
import tensorrt_rtx
from checkpoints import export_tiny, tiny_recipe
from kills.forked import in_child, rounds
from kills.rounds import Settings

from lseg import logfile
from lseg.engine import engine_path, get_engine, mismatch, provenance
from lseg.files import write_files

sys.modules["tensorrt"] = tensorrt_rtx
DEVICE = SimpleNamespace(name="a GPU", compute_capability="8.9")
NAMES = ("dots", "text")  # the image encoder takes three seconds, and no other path


class Engines:
    two = True

    def __init__(self, settings: Settings):
        self.exported = settings.folder / "onnx"
        self.exported.mkdir()
        seed = settings.rng.randrange(2**31)
        in_child(lambda: export_tiny(self.exported, seed) and 0, self.exported)
        self.recipe = tiny_recipe(self.exported)
        self.made_from = {name: provenance(self.recipe.spec(name), DEVICE) for name in NAMES}
        whole = settings.folder / "whole"
        whole.mkdir()
        in_child(lambda: self.work(0, False), whole)
        self.expected = {name: self.looks(whole, name) for name in NAMES}

    def begin(self, folder: Path, kind: int) -> None:
        """The older engines were made by another version of the library."""
        for made_from in self.made_from.values() if kind else ():
            path = engine_path(folder / "engines", made_from)
            sidecar = {**made_from, "tensorrt": "older", "engine_sha256": ""}
            write_files({path: b"an older engine", path.with_suffix(".json"): json.dumps(sidecar).encode()})

    def work(self, kind: int, again: bool) -> None:
        logfile.FOLDER = Path.cwd() / "log"
        for name in NAMES:
            spec = self.recipe.spec(name)
            found = get_engine(spec, lambda name=name: self.recipe.prepare(name), Path("engines"), DEVICE)
            if found != engine_path(Path("engines"), self.made_from[name]).read_bytes():
                raise AssertionError(f"the {name} engine is not what the folder holds")

    def left(self, folder: Path, kind: int) -> list[str]:
        """An engine that would be trusted is one."""
        return [f"the {name} engine is trusted and is none" for name in NAMES if self.is_wrong(folder, name)]

    def is_wrong(self, folder: Path, name: str) -> bool:
        path = engine_path(folder / "engines", self.made_from[name])
        return mismatch(path, self.made_from[name]) is None and self.looks(folder, name) != self.expected[name]

    def looks(self, folder: Path, name: str) -> tuple[int, bytes]:
        """What tells an engine from a part of one."""
        content = engine_path(folder / "engines", self.made_from[name]).read_bytes()
        return len(content), content[:64]

    def done(self, folder: Path, kind: int) -> list[str]:
        wrong = self.left(folder, kind)
        for name in NAMES:
            reason = mismatch(engine_path(folder / "engines", self.made_from[name]), self.made_from[name])
            if reason:
                wrong.append(f"the {name} engine is not trusted: {reason}")
        there = [path.suffix for path in (folder / "engines").iterdir() if not path.name.startswith(".")]
        if sorted(there) not in (sorted([".engine", ".json"] * len(NAMES) + cache) for cache in ([], [".cache"])):
            wrong.append(f"there is more or less than the engines: {sorted(there)}")
        return wrong


def run(settings: Settings) -> None:
    rounds(settings, Engines(settings), kinds=2)
