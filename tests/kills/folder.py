"""enginerun.py over a folder of photos with --save-labels --jsonl, killed, then with --resume.

Every photo has its files and its line once at the end, equal to the undisturbed run's byte for byte. Rounds of two
kinds: into an empty folder, photo by photo; and in groups of three, over the files of an earlier run with other labels,
which counts for nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import onnxruntime  # noqa: F401  # so that children need not import it
from checkpoints import write_tiny
from kills.export import export
from kills.forked import in_child, rounds
from kills.rounds import Settings

import enginerun
from lseg import errors, photos, run_onnxruntime, text_cache, tokenizer  # noqa: F401

PHOTOS = 10
LABELS = ("sky, building, tree, road", "wall, floor, cat")


class Folder:
    two = False  # one run at a time writes to a folder of pictures

    def __init__(self, settings: Settings):
        self.made = settings.folder / "made"
        (self.made / "photos" / "below").mkdir(parents=True)
        rng = np.random.default_rng(settings.seed)
        for number in range(PHOTOS):
            pixels = rng.integers(0, 256, (rng.integers(30, 90), rng.integers(30, 90), 3), dtype=np.uint8)
            path = self.made / "photos" / ("below" if number % 3 == 0 else "") / f"p{number}.png"
            path.write_bytes(cv2.imencode(".png", cv2.resize(pixels, None, fx=4, fy=4))[1].tobytes())
        self.weights = self.made / "tiny.safetensors"
        in_child(
            lambda: write_tiny(self.weights, settings.seed) and export(self.weights, self.made / "onnx", False),
            self.made,
        )
        self.expected = {}
        for name, labels in (("whole", LABELS[0]), ("older", LABELS[1])):
            folder = self.made / name
            folder.mkdir()
            self.lay_out(folder)
            in_child(lambda labels=labels: self.segment(labels, False), folder)
        self.expected = files_in(self.made / "whole" / "out")
        self.lines = lines_of(self.made / "whole" / "lines.jsonl")

    def lay_out(self, folder: Path) -> None:
        """Links to the photos and the exported files; the texts that are kept beside these are the folder's own."""
        (folder / "photos").symlink_to(self.made / "photos")
        (folder / "onnx").mkdir()
        for file in (self.made / "onnx").glob("*.onnx"):
            (folder / "onnx" / file.name).symlink_to(file)

    def segment(self, labels: str, again: bool, batch: int = 1) -> None:
        options = [
            "photos",
            "--output",
            "out",
            "--jsonl",
            "lines.jsonl",
            "--save-labels",
            "--labels",
            labels,
            "--quiet",
        ]
        options += ["--weights", str(self.weights), "--onnx", "onnx", "--backend", "onnxruntime"]
        options += ["--batch", str(batch), *(["--resume"] if again else [])]
        errors.run(lambda: enginerun.main(enginerun.parse_args(options)))

    def begin(self, folder: Path, kind: int) -> None:
        self.lay_out(folder)
        if kind:
            shutil.copytree(self.made / "older" / "out", folder / "out")
            shutil.copy(self.made / "older" / "lines.jsonl", folder)

    def work(self, kind: int, again: bool) -> None:
        self.segment(LABELS[0], again, 3 if kind else 1)

    def left(self, folder: Path, kind: int) -> list[str]:
        """Every file is one that a whole run wrote; a photo that has a line has all its files."""
        found = files_in(folder / "out")
        older = files_in(self.made / "older" / "out") if kind else {}
        wrong = [
            f"{name} is not whole"
            for name, data in found.items()
            if data not in (self.expected.get(name), older.get(name))
        ]
        for line in whole_lines(folder / "lines.jsonl"):
            if line in self.lines:
                start = line["picture"].removeprefix("out/").removesuffix("_lseg.png")
                ends = ("_lseg.png", "_labels.png", "_labels.json")
                if any(found.get(f"{start}{end}") != self.expected[f"{start}{end}"] for end in ends):
                    wrong.append(f"{line['photo']} has its line and not its files")
            elif kind == 0:
                wrong.append(f"the lines have another one: {line}")
        return wrong

    def done(self, folder: Path, kind: int) -> list[str]:
        wrong, found = [], files_in(folder / "out")
        for name in sorted(found.keys() | self.expected.keys()):
            if found.get(name) != self.expected.get(name):
                wrong.append(f"{name} is not as in the undisturbed run")
        lines = lines_of(folder / "lines.jsonl")
        if lines != self.lines:
            wrong.append(f"the lines are not the undisturbed run's: {len(lines)} for {len(self.lines)} photos")
        return wrong


def files_in(folder: Path) -> dict[str, bytes]:
    """By relative name, temporary ones left out."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = path.read_bytes()
    return found


def whole_lines(path: Path) -> list[dict]:
    """The lines that have an end."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def lines_of(path: Path) -> list[dict]:
    return sorted(whole_lines(path), key=lambda line: line["photo"])


def run(settings: Settings) -> None:
    rounds(settings, Folder(settings), kinds=2)
