"""lseg_export.py and clip_onnx_export.py, killed: each file is the older one or the new one, never a mixture.

Rounds of four kinds: into an empty folder, and over files of other weights; with weights in the files, and with weights
in files beside them, as beyond 2 GB.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnxruntime  # noqa: F401  # so that children need not import it
import onnxslim  # noqa: F401
import torch  # noqa: F401
from checkpoints import write_tiny
from kills.forked import in_child, rounds
from kills.rounds import Settings

import clip_onnx_export
import lseg_export
from lseg import errors, label_map_export, onnx_file, specs  # noqa: F401
from lseg.onnx_file import IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX, data_files, write_onnx

FILES = (IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX)
SMALL = 10_000  # bytes beyond which weights go beside the file
KINDS = 4


def export(weights: Path, folder: Path, beside: bool) -> int:
    """Both scripts; their exit status."""
    if beside:
        write_onnx.__defaults__ = (SMALL,)
    options = ["--weights", str(weights), "--output", str(folder), "--quiet"]
    for script in (lseg_export, clip_onnx_export):
        try:
            errors.run(lambda script=script: script.main(script.parse_args(options)))
        except SystemExit as end:
            if end.code:
                return end.code
    return 0


class Export:
    two = True

    def __init__(self, settings: Settings):
        self.made = settings.folder / "made"
        for name in ("old", "new"):
            (self.made / name).mkdir(parents=True)
            seed = settings.rng.randrange(2**31)
            in_child(lambda name=name, seed=seed: self.prepare(name, seed), self.made)
        made = {age: self.made / age / "0" for age in ("old", "new")}
        self.expected = {age: {name: self.read(folder, name) for name in FILES} for age, folder in made.items()}

    def prepare(self, name: str, seed: int) -> int:
        weights = self.made / f"{name}.safetensors"
        write_tiny(weights, seed)
        return export(weights, self.made / name / "0", False) or export(weights, self.made / name / "1", True)

    def begin(self, folder: Path, kind: int) -> None:
        if kind >= 2:
            shutil.copytree(self.made / "old" / str(kind % 2), folder / "onnx")

    def work(self, kind: int, again: bool) -> int:
        return export(self.made / "new.safetensors", Path("onnx"), bool(kind % 2))

    def left(self, folder: Path, kind: int) -> list[str]:
        """Every file that stands is one that a whole run wrote."""
        wrong = []
        for name in FILES:
            if (folder / "onnx" / name).exists():
                found = self.read(folder / "onnx", name)
                if found not in [self.expected[age][name] for age in ("old", "new")]:
                    wrong.append(f"{name} is neither the older file nor the new one")
            elif kind >= 2:
                wrong.append(f"{name} is gone")
        return wrong

    def done(self, folder: Path, kind: int) -> list[str]:
        there = sorted(path.name for path in (folder / "onnx").iterdir() if not path.name.startswith("."))
        wrong = [f"{name} is not the undisturbed run's" for name in FILES if self.differs(folder, name)]
        beside = [name for name in FILES if data_files(folder / "onnx" / name)]
        count = sum(len(data_files(folder / "onnx" / name)) for name in FILES)
        if len(there) != len(FILES) + count or len(beside) != count:
            wrong.append(f"there is more or less than the files: {there}")
        return wrong

    def differs(self, folder: Path, name: str) -> bool:
        return self.read(folder / "onnx", name) != self.expected["new"][name]

    @staticmethod
    def read(folder: Path, name: str) -> bytes | str:
        """The model with its weights, wherever they lie; why it cannot be read."""
        try:
            model = onnx.load(folder / name)
            for tensor in model.graph.initializer:
                tensor.ClearField("data_location")  # where they lay before they were read
            return model.SerializeToString(deterministic=True)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def run(settings: Settings) -> None:
    rounds(settings, Export(settings), KINDS)
