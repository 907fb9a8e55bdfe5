"""enginerun.py on TensorRT, killed while it builds engines, and run again. Needs a GPU and TensorRT, and no torch.

Two builds of an engine may choose other kernels, whose sums round in another order: labels of fp16 engines differ then
at a few pixels between whole runs, too. So each round's labels are held against the undisturbed run's with a bound, and
how many were equal to the byte is counted; a third run, which must take the engines as they are, gives the second's.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from kills.rounds import Command, Settings, hidden

from lseg.onnx_file import IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX
from lseg.tensorfile import sha256

ROOT = Path(__file__).resolve().parent.parent.parent
DIFFERENT = {"fp32": 0.001, "tf32": 0.01, "fp16": 0.01, "bf16": 0.05}  # share of pixels, between two builds


def run(settings: Settings) -> None:
    """Rounds until there were as many kills as asked for."""
    args, report, folder = settings.args, settings.report, settings.folder
    report.entry |= {"weights": Path(args.weights).stem, "precision": args.precision, "opt_level": args.opt_level}
    whole = Round(settings, folder / "undisturbed")
    begins, length = whole.undisturbed()
    about = json.loads(whole.engines()[0].with_suffix(".json").read_text())
    report.entry |= {"tensorrt": about["tensorrt"], "gpu": about["gpu"], "engines": len(whole.engines())}
    report.entry |= {"undisturbed_seconds": round(length, 1), "build_begins_after_seconds": round(begins, 1)}
    report.entry["rounds"] = []
    expected = whole.labels()
    number = 0
    while settings.more():
        number += 1
        one = Round(settings, folder / "round")
        delay = settings.rng.uniform(begins, length)
        command = one.start("killed")
        if command.wait(delay) is not None:
            report.entry["ended_before_the_kill"] += 1
        else:
            command.kill()
            report.entry["kills"] += 1
            check(one, number, delay, expected)
        shutil.rmtree(one.folder)
        report.finish()


def check(one: Round, number: int, delay: float, expected: np.ndarray) -> None:
    """What is left after a kill, then a run to the end, then one that builds nothing."""
    report = one.settings.report
    after_kill = len(one.engines())
    for name in one.half_engines():
        report.fault(number, f"{name} has a sidecar that vouches for other bytes")
    left = hidden(one.folder)
    second = one.start("second")
    if second.wait() != 0:
        report.fault(
            number, f"the run after the kill at {delay:.2f} s gave {second.process.returncode}", second.output()
        )
        return
    labels = one.labels()
    different = float(np.mean(labels != expected)) if labels.shape == expected.shape else 1.0
    report.count("labels equal to the byte" if different == 0 else "labels equal but for a few pixels")
    if different > DIFFERENT[one.settings.args.precision]:
        report.fault(number, f"{different:.4%} of the labels differ from the undisturbed run's", second.output())
    for name in one.half_engines():
        report.fault(number, f"after the next run, {name} is not what its sidecar says")
    third = one.start("third")
    if third.wait() != 0 or "building" in third.log.read_text(errors="replace"):
        report.fault(number, f"the third run gave {third.process.returncode} or built again", third.output())
    elif not np.array_equal(one.labels(), labels):
        report.fault(number, "the third run's labels are not the second's", third.output())
    kept = hidden(one.folder)
    report.count("rounds with temporary files after the kill", bool(left))
    report.count("temporary files after the next run", len(kept))
    report.entry["rounds"].append(
        {"delay": round(delay, 2), "engines_after_the_kill": after_kill, "labels_different": different, "left": left}
        | ({"kept": kept} if kept else {})
    )
    print(f"round {number}: killed after {delay:.1f} s with {after_kill} engines kept, {different:.4%} different")


class Round:
    """A folder with links to the exported files, so that each round begins without kept texts and engines."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder, args = settings, folder, settings.args
        (folder / "onnx").mkdir(parents=True)
        for name in (IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX):
            for file in args.onnx.glob(f"{name}*"):
                (folder / "onnx" / file.name).symlink_to(file.resolve())

    def start(self, name: str) -> Command:
        args = self.settings.args
        options = ["--backend", "tensorrt", "--weights", args.weights, "--precision", args.precision, "--save-labels"]
        options += ["--opt-level", args.opt_level, "--onnx", self.folder / "onnx", "--engines", self.folder / "engines"]
        script = [*([args.through] if args.through else []), ROOT / "enginerun.py"]
        command = [sys.executable, *script, args.photo, *options, "--output", self.folder / "out"]
        return Command(command, self.folder / f"{name}.txt", cwd=ROOT)

    def undisturbed(self) -> tuple[float, float]:
        """Runs once; seconds until the first engine is begun, and until the end."""
        command, begins = self.start("undisturbed"), None
        while (status := command.wait(time.monotonic() - command.started + 0.05)) is None:
            if begins is None and "building" in command.log.read_text(errors="replace"):
                begins = time.monotonic() - command.started
        if status != 0 or begins is None:
            raise SystemExit(f"error: the undisturbed run gave {status}:\n{command.output()}")
        return begins, time.monotonic() - command.started

    def labels(self) -> np.ndarray:
        """The label map, integers [H, W]."""
        path = self.folder / "out" / f"{self.settings.args.photo.stem}_labels.png"
        return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)

    def engines(self) -> list[Path]:
        """Those that have a sidecar, without which an engine counts for nothing."""
        found = (self.folder / "engines").glob("*.engine")
        return sorted(path for path in found if path.with_suffix(".json").is_file())

    def half_engines(self) -> list[str]:
        """Names of engines that their sidecars vouch for and that are something else."""
        bad = []
        for path in self.engines():
            try:
                about = json.loads(path.with_suffix(".json").read_text())
            except ValueError:
                about = {}
            if about.get("engine_sha256") != sha256(path):
                bad.append(path.name)
        return bad
