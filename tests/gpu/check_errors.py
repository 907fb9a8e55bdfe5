"""What the TensorRT backend says on a GPU when something is wrong, and that it goes on rightly; writes JSON.

    python tests/gpu/check_errors.py --onnx FOLDER --engines FOLDER --output log/gpu_errors.json

Engines of the demo weights are there already: they are copied and damaged. Each case runs enginerun.py in a process of
its own, or the function that meets the fault. The exit status is 1 where a case ends in anything but one sentence and
status 2 or, where the fault can be mended, the usual labels and a line that says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from little_memory import little_memory  # noqa: E402

from lseg.benchmark import machine  # noqa: E402
from lseg.errors import UserError  # noqa: E402
from lseg.files import UNFINISHED, write_files  # noqa: E402

FOR_NOTHING = 300  # MiB of the GPU: less than a context takes
LITTLE = (
    450,
    550,
    650,
    750,
    850,
    1000,
)  # MiB: where it ends, in the context, an engine or a buffer, is the GPU's affair


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


class Case:
    """One run of enginerun.py with engines of its own."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.onnx, self.engines, self.out = args.onnx, folder / "engines", folder / "out"
        shutil.copytree(args.engines, self.engines)

    def dots(self) -> Path:
        """The engine that is built the fastest."""
        return next(self.engines.glob("dots_fp16_4d_*.engine"))

    def sidecar(self, **changes: object) -> None:
        path = self.dots().with_suffix(".json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def run(self, *options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "tests" / "gpu" / "typed_tensorrt8.py", ROOT / "enginerun.py"]
        command += ["--backend", "tensorrt", "--onnx", self.onnx, "--output", self.out, "--save-labels"]
        engines = [] if "--engines" in options else ["--engines", self.engines]
        return subprocess.run([*map(str, [*command, *engines, *options])], capture_output=True, text=True, timeout=300)

    def left(self) -> list[str]:
        """What a run that was refused must not have written, and what none may leave."""
        files = [path for path in self.out.rglob("*") if path.is_file()] if self.out.exists() else []
        folders = [path for path in (self.out, self.engines) if path.exists()]
        return [str(path) for path in (*files, *(one for f in folders for one in f.rglob(f"{UNFINISHED}*")))]

    def labels(self) -> np.ndarray | None:
        path = self.out / "temple_labels.png"
        return cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.exists() else None


def zero_bytes(case: Case) -> None:
    case.dots().write_bytes(b"")


def cut_short(case: Case) -> None:
    case.dots().write_bytes(case.dots().read_bytes()[:1000])


def vouched_for(case: Case, data: bytes) -> None:
    """Damaged, with a sidecar that was made for it."""
    case.dots().write_bytes(data)
    case.sidecar(engine_sha256=hashlib.sha256(data).hexdigest())


def cut_and_vouched_for(case: Case) -> None:
    data = case.dots().read_bytes()
    vouched_for(case, data[: len(data) // 2])


def noise_and_vouched_for(case: Case) -> None:
    vouched_for(case, np.random.default_rng(0).bytes(100_000))


def of_another_gpu(case: Case) -> None:
    case.sidecar(gpu="another GPU")


def sidecar_gone(case: Case) -> None:
    case.dots().with_suffix(".json").unlink()


MENDED = (zero_bytes, cut_short, cut_and_vouched_for, noise_and_vouched_for, of_another_gpu, sidecar_gone)


def mended(args: argparse.Namespace, expected: np.ndarray, damage: Callable[[Case], None]) -> dict:
    """The engine is built again, a line says why, and the labels are the usual ones."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args, Path(folder))
        damage(case)
        done = case.run()
        lines = [line for line in done.stdout.splitlines() if line.startswith("building ")]
        equal = case.labels() is not None and np.array_equal(case.labels(), expected)
        holds = done.returncode == 0 and len(lines) == 1 and equal
        return {"status": done.returncode, "said": lines or done.stderr.splitlines()[-3:], "holds": bool(holds)}


def refused(args: argparse.Namespace, *options: object) -> dict:
    """One sentence, status 2, and nothing written."""
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args, Path(folder))
        done = case.run(*options)
        said = done.stderr.splitlines()
        one = len(said) == 1 and said[0].startswith("error: ")
        left = case.left()
        holds = done.returncode == 2 and one and not left
        return {"status": done.returncode, "said": said[-3:], "left": left, "holds": holds}


def does_or_tells(args: argparse.Namespace, expected: np.ndarray, mib: int, *options: object, build: bool) -> dict:
    """With so little memory either the usual labels, or one sentence and nothing written; good engines stay.

    An engine that is built then may be another than usual: 99.5 % of its labels must be equal, of all others all.
    """
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args, Path(folder))
        if build:
            case.dots().unlink()
        engines = {path: path.read_bytes() for path in case.engines.glob("*.engine")}
        with little_memory(mib):
            done = case.run(*options)
        said, labels = done.stderr.splitlines(), case.labels()
        kept = all(path.is_file() and path.read_bytes() == data for path, data in engines.items())
        row = {"mib": mib, "status": done.returncode, "said": said[-3:], "engines_kept": kept, "left": case.left()}
        if done.returncode == 0:
            row["equal_percent"] = 0.0 if labels is None else 100 * float(np.mean(labels == expected))
            return row | {"holds": kept and row["equal_percent"] >= (99.5 if build else 100)}
        one = len(said) == 1 and said[0].startswith("error: ")
        return row | {"holds": kept and done.returncode == 2 and one and not row["left"]}


def rejected_graph() -> dict:
    """A graph that the parser does not take: its first error with the node."""
    import onnx
    from onnx import TensorProto, helper

    from lseg.engine import EngineSpec, build

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("NoSuchThing", ["a"], ["y"], name="odd one")]
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [result]), ir_version=8)
    model.opset_import[0].version = 17
    assert isinstance(model, onnx.ModelProto)
    return told(lambda folder: build(EngineSpec("image", "0" * 64, "fp32", "4d", ()), model, Path(folder)), "odd one")


def beyond_the_profile(args: argparse.Namespace) -> dict:
    """Nine images in one call."""
    from lseg.run_tensorrt import TensorRTRunner
    from lseg.runner import EngineOptions

    def work(_: str) -> None:
        with TensorRTRunner("demo", args.onnx, EngineOptions(args.engines)) as runner:
            size = runner.image_size
            runner.segment(np.zeros((9, size, size, 3), np.uint8), np.eye(8, 512, dtype=np.float32))

    return told(work, "9 images are more than the 8")


def told(work: Callable[[str], object], words: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        try:
            work(folder)
        except UserError as error:
            return {"said": [str(error)], "holds": words in str(error) and "\n" not in str(error)}
        return {"said": [], "holds": False}


def main(args: argparse.Namespace) -> int:
    rows: dict[str, dict] = {}
    about = {"machine": machine(), "weights": "demo"}

    def add(name: str, work: Callable[[], dict]) -> None:
        try:
            rows[name] = row = work()
        except Exception as error:  # a run that hangs, above all: the other cases still count
            rows[name] = row = {"said": [f"{type(error).__name__}: {error}"[:300]], "holds": False}
        print("holds" if row["holds"] else "FAILS", name, row, flush=True)
        write_files({args.output: (json.dumps({**about, "cases": rows}, indent=1) + "\n").encode()})

    def usual(*options: object) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(args, Path(folder))
            done = case.run(*options)
            assert done.returncode == 0, done.stderr
            return case.labels()

    multiscale = ("--inference", "multiscale")
    expected, expected_multiscale = usual(), usual(*multiscale)
    for damage in MENDED:
        add(f"engine: {damage.__name__.replace('_', ' ')}", lambda d=damage: mended(args, expected, d))
    add("an engines' folder that cannot be written", lambda: refused(args, "--engines", "/proc/engines"))

    def no_context() -> dict:
        with little_memory(FOR_NOTHING):
            return refused(args)

    add("no memory for a context", no_context)
    for mib in LITTLE:
        add(f"run with {mib} MiB", lambda m=mib: does_or_tells(args, expected, m, build=False))
        add(
            f"run at six scales with {mib} MiB",
            lambda m=mib: does_or_tells(args, expected_multiscale, m, *multiscale, build=False),
        )
        add(f"build with {mib} MiB", lambda m=mib: does_or_tells(args, expected, m, build=True))
    add("a graph that the parser rejects", rejected_graph)
    add("nine images a call", lambda: beyond_the_profile(args))
    return 0 if all(row["holds"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(parse_args()))
