"""lseg_export.py --download, killed while a stand-in for gdown writes slowly and while what came is exported.

The checkpoint is there whole, or the older one is, or none; the next run fetches it again.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import gdown
from checkpoints import write_tiny
from kills.export import Export
from kills.forked import in_child, rounds
from kills.rounds import Settings

import lseg_export
from lseg import errors
from lseg.onnx_file import IMAGE_ONNX, SIMILARITY_ONNX

CHUNKS = 50
FILES = (IMAGE_ONNX, SIMILARITY_ONNX)


class Download:
    two = True

    def __init__(self, settings: Settings):
        self.source = settings.folder / "source.safetensors"
        self.older = settings.folder / "older.safetensors"
        for path in (self.source, self.older):
            seed = settings.rng.randrange(2**31)
            in_child(lambda path=path, seed=seed: write_tiny(path, seed) and 0, settings.folder)
        whole = settings.folder / "whole"
        whole.mkdir()
        in_child(lambda: self.work(0, False), whole)
        self.expected = {name: Export.read(whole / "onnx", name) for name in FILES}

    def begin(self, folder: Path, kind: int) -> None:
        (folder / "models").mkdir()
        if kind:
            shutil.copy(self.older, folder / "models" / "demo_e200.ckpt")

    def work(self, kind: int, again: bool) -> None:
        gdown.download = self.fetch
        options = ["--download", "models/demo_e200.ckpt", "--output", "onnx", "--quiet"]
        errors.run(lambda: lseg_export.main(lseg_export.parse_args(options)))

    def fetch(self, id: str, output: str, quiet: bool) -> str:
        """As gdown does: to a file of its own beside, renamed at the end."""
        content, partial = self.source.read_bytes(), Path(f"{output}abc.part")
        with open(partial, "wb", buffering=0) as file:
            for start in range(0, len(content), len(content) // CHUNKS):
                file.write(content[start : start + len(content) // CHUNKS])
                time.sleep(0.02)
        partial.rename(output)
        return output

    def left(self, folder: Path, kind: int) -> list[str]:
        there, wrong = folder / "models" / "demo_e200.ckpt", []
        content = there.read_bytes() if there.exists() else None
        if content not in (self.source.read_bytes(), self.older.read_bytes() if kind else None):
            wrong.append("the checkpoint is not whole")
        for name in FILES:
            if (folder / "onnx" / name).exists() and Export.read(folder / "onnx", name) != self.expected[name]:
                wrong.append(f"{name} is not whole")
        return wrong

    def done(self, folder: Path, kind: int) -> list[str]:
        wrong = self.left(folder, kind)
        names = [[path.name for path in (folder / at).iterdir() if path.name[0] != "."] for at in ("models", "onnx")]
        if [sorted(found) for found in names] != [["demo_e200.ckpt"], sorted(FILES)]:
            wrong.append(f"there is more or less than the files: {names}")
        if (folder / "models" / "demo_e200.ckpt").read_bytes() != self.source.read_bytes():
            wrong.append("the checkpoint is the older one")
        return wrong


def run(settings: Settings) -> None:
    rounds(settings, Download(settings), kinds=2)
