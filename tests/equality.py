"""Checks that every way to run LSeg gives the labels that PyTorch gives in float32, on random photos and labels.

    python tests/equality.py --images 200 --seed 7 --output log/equality_cpu.json
    python tests/equality.py --seed 7 --save-reference ref.npz --variants torch      # where torch is
    python tests/equality.py --seed 7 --reference ref.npz --variants tensorrt        # where it is not

A variant passes when its share of equal labels is within its precision's `LIMITS`, and no pixel differs whose two best
cosines are further apart in the reference than the same table allows: near-ties may fall either way, clear winners may
not. Beside the machine's variants (`lseg.variants`) the graphs of each form of matrix product run in
ONNX Runtime, and the TensorRT runner runs on the stand-in GPU with tiny random weights, where torch and g++ are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from equality_cases import (  # noqa: E402
    BATCHES,
    LABELS,
    STRIDE,
    WORDS,
    Expected,
    Group,
    Reference,
    draw_groups,
    expect,
    gap,
)

from lseg.benchmark import machine, one_line  # noqa: E402
from lseg.errors import Parser, UserError, run  # noqa: E402
from lseg.files import write_files  # noqa: E402
from lseg.image import read_image  # noqa: E402
from lseg.inference import label_photo  # noqa: E402
from lseg.onnx_file import IMAGE_ONNX, read_metadata  # noqa: E402
from lseg.recipes import Recipe  # noqa: E402
from lseg.runner import EngineOptions, Runner, Segmentation, Timings, merge_passes  # noqa: E402
from lseg.tokenizer import Tokenizer  # noqa: E402
from lseg.variants import BOUNDS, open_variant, variants_here  # noqa: E402
from lseg.windows import MODES  # noqa: E402


@dataclass(frozen=True)
class Limit:
    """What a precision must keep to on random photos."""

    mean: float  # percent of equal labels, the mean over photos
    worst: float  # percent of equal labels, of each photo
    gap: float  # of the reference's two best cosines where a label differs, at most


# The means are the bounds of `lseg.variants`. A photo of noise with hundreds of random labels is made of near-ties, of
# which 16 bits decide many otherwise: for these only the gap is held for each photo, and the worst share is told.
LIMITS = {
    "fp32": Limit(BOUNDS["fp32"].label_agreement, BOUNDS["fp32"].label_agreement, 2e-5),
    **{p: Limit(BOUNDS[p].label_agreement, 0.0, BOUNDS[p].relative_difference) for p in ("tf32", "fp16", "bf16")},
}
FORMS = (("fp32", "4d"), ("fp32", "3d"), ("fp32", "2d"), ("fp16", "4d"), ("fp16", "2d"))
Open = Callable[[], contextlib.AbstractContextManager[Runner]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="whole photos (default: 200)")
    parser.add_argument("--window", type=int, default=20, help="photos in windows (default: 20)")
    parser.add_argument("--multiscale", type=int, default=6, help="photos at six scales, mirrored (default: 6)")
    parser.add_argument("--modes", default=",".join(MODES), help="some of whole,window,multiscale (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", default="all", help="names, or their beginnings: tensorrt, graph, standin, ...")
    parser.add_argument("--weights", default="demo")
    parser.add_argument("--onnx", type=Path, default=ROOT / "onnx")
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
    parser.add_argument("--reference", type=Path, help="what --save-reference wrote elsewhere")
    parser.add_argument("--save-reference", type=Path, metavar="FILE.npz")
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    args = parser.parse_args(argv)
    args.modes = [mode.strip() for mode in args.modes.split(",")]
    for mode in args.modes:
        if mode not in MODES:
            parser.error(f"argument --modes: '{mode}' is none: choose some of {', '.join(MODES)}")
    if min(args.images, args.window, args.multiscale) < 0:
        parser.error("numbers of photos cannot be below 0")
    return args


def main(args: argparse.Namespace) -> int:
    report = {"seed": args.seed, "weights": Path(args.weights).stem, "machine": machine(), "batches": BATCHES,
              "labels_at_most": {mode: LABELS[mode] for mode in args.modes}, "cosines_at_every": STRIDE,
              "limits": {name: vars(limit) for name, limit in LIMITS.items()}, "variants": {}}  # fmt: skip
    own = world(args)
    chosen = [name for name in own if wanted(args, name)]
    tiny = [f"standin-{p}-{m}" for p, m in FORMS if wanted(args, f"standin-{p}-{m}")] if has_torch() else []
    known = [*own, *(f"standin-{p}-{m}" for p, m in FORMS)]
    for part in args.variants.split(","):
        if part != "all" and not any(f"{name}-".startswith(f"{part}-") for name in known):
            raise UserError(f"this machine cannot run '{part}': give 'all' or some of {', '.join(known)}")
    start = time.perf_counter()
    if chosen or args.save_reference:
        check_all(args, report, {name: own[name] for name in chosen}, args.weights, args.onnx)
    if tiny:
        with stand_in_world(args.seed, tiny) as (weights, folder, openers):
            check_all(args, report, openers, weights, folder, own=False)
    report["seconds"] = round(time.perf_counter() - start)
    save(args, report)
    failed = [name for name, entry in report["variants"].items() if entry.get("failures") or "error" in entry]
    print("failed: " + ", ".join(failed) if failed else "all within their limits", flush=True)
    return 1 if failed else 0


def wanted(args: argparse.Namespace, name: str) -> bool:
    """A name is chosen by itself, by "all", or by parts that it begins with."""
    return any(part == "all" or f"{name}-".startswith(f"{part}-") for part in args.variants.split(","))


def has_torch() -> bool:
    import importlib.util

    return importlib.util.find_spec("torch") is not None


def world(args: argparse.Namespace) -> dict[str, tuple[str, Open]]:
    """Of each variant of this machine its precision, and what opens it."""
    found = {}
    for variant in variants_here():
        opener = lambda variant=variant: open_variant(variant, args.weights, args.onnx, args.engines)  # noqa: E731
        found[variant.name] = (variant.precision, opener)
    for precision, matmul in FORMS:
        opener = lambda p=precision, m=matmul: contextlib.closing(GraphRunner(args.onnx, p, m))  # noqa: E731
        found[f"graph-{precision}-{matmul}"] = (precision, opener)
    return found


class GraphRunner:
    """What TensorRT's engines and `--label-map` files are made of, run by ONNX Runtime: whole photos only."""

    def __init__(self, folder: Path, precision: str, matmul: str):
        import onnxruntime

        recipe = Recipe(folder, read_metadata(folder / IMAGE_ONNX)["image_config"], precision, matmul)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.image, self.text = (
            onnxruntime.InferenceSession(recipe.prepare(name).SerializeToString(), options, ["CPUExecutionProvider"])
            for name in ("labels", "text")
        )
        self.image_size = recipe.config["image_size"]
        self.batch = 1 if matmul == "2d" else max(BATCHES)
        self.identity = f"ONNX Runtime {onnxruntime.__version__} (CPU), {precision}, {matmul} MatMuls"

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [self.text.run(None, {"tokens": tokens[i : i + 50]})[0] for i in range(0, len(tokens), 50)]
        )

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        found = []
        for start in range(0, len(pixels), self.batch):
            part = pixels[start : start + self.batch]

            def score(group: np.ndarray, part: np.ndarray = part) -> tuple[np.ndarray, np.ndarray]:
                labels, cosines = self.image.run(["labels", "best"], {"pixels": part, "text": group})
                return labels.astype(np.int32), cosines

            found.append(merge_passes(text, len(part), score))
        labels, cosines = (np.concatenate(values) for values in zip(*found, strict=True))
        return Segmentation(labels, cosines, Timings())

    def close(self) -> None:
        self.image = self.text = None


@contextlib.contextmanager
def stand_in_world(seed: int, names: list[str]) -> Iterator[tuple[str, Path, dict[str, tuple[str, Open]]]]:
    """Tiny random weights, exported, and the TensorRT runner on the stand-in GPU for the named variants."""
    import pytest
    from checkpoints import write_tiny
    from conftest import export_all

    from tests.gpu_stand_in import compile_kernels, stand_in

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        try:
            library = compile_kernels(folder)
        except pytest.skip.Exception as reason:
            print(f"the stand-in GPU is left out: {reason}", flush=True)
            yield "", folder, {}
            return
        weights = write_tiny(folder / "tiny.safetensors", seed).path
        exported = export_all(str(weights), folder / "onnx")
        stand_in(patch, library)
        openers = {}
        for variant in names:
            _, precision, matmul = variant.split("-")

            def opener(precision: str = precision, matmul: str = matmul) -> Runner:
                from lseg.run_tensorrt import TensorRTRunner

                return TensorRTRunner(*exported, EngineOptions(folder, precision, matmul))

            openers[variant] = (precision, opener)
        yield exported.weights, exported.folder, openers


def check_all(
    args: argparse.Namespace, report: dict, variants: dict[str, tuple[str, Open]], weights: str, onnx: Path,
    own: bool = True,
) -> None:  # fmt: skip
    """Runs the reference and the variants over the same groups, one after the other. `own`: not the tiny weights."""
    if not variants and not args.save_reference:
        return
    tokens, counts = Tokenizer()(WORDS), {"whole": args.images, "window": args.window, "multiscale": args.multiscale}
    counts = {mode: counts[mode] for mode in args.modes}
    metadata = read_metadata(onnx / IMAGE_ONNX)
    size, dimension = (metadata["image_config"][key] for key in ("image_size", "embedding"))
    about = f"seed {args.seed}, {counts}, weights {metadata['weights_sha256'][:12]}"
    if own and args.reference:
        reference = Reference.load(args.reference, about)
    elif not has_torch():
        raise UserError(
            "torch, which makes the reference, is not installed: give what --save-reference wrote elsewhere"
        )
    else:
        reference = Reference(about, read_image(ROOT / "image" / "temple.jpg"), np.empty(0), [], [])
    groups = [g for mode, n in counts.items() for g in draw_groups(args.seed, mode, n, reference.source, dimension)]
    digests = [group.digest(size) for group in groups]
    if reference.found:
        other = sum(len(g.photos) for g, a, b in zip(groups, digests, reference.digests, strict=True) if a != b)
        report["photos_prepared_otherwise"] = other  # than where the reference was made: another OpenCV or NumPy
    else:
        reference.digests = digests
        from lseg.run_torch import TorchRunner

        with TorchRunner(weights) as runner:
            reference.words = runner.encode_text(tokens)
            for group in progress(groups, "reference"):
                reference.found.append(expect(runner, group, group.text(reference.words)))
            if own:
                report["reference"] = str(runner.identity)
    if own and args.save_reference:
        reference.save(args.save_reference)
    for name, (precision, opener) in variants.items():
        entry = report["variants"][name] = {"weights": Path(weights).stem, "precision": precision}
        start = time.perf_counter()
        try:
            with opener() as runner:
                entry["identity"] = str(runner.identity)
                text = runner.encode_text(tokens)
                entry["largest_difference_of_words"] = float(np.abs(text - reference.words).max())
                entry |= compare(runner, name, groups, text, reference.found, LIMITS[precision])
        except Exception as error:  # whatever a backend throws is its result; the others still have theirs
            entry["error"] = one_line(error)
        entry["seconds"] = round(time.perf_counter() - start)
        print(f"{name}: {json.dumps({k: v for k, v in entry.items() if k != 'failures'})}", flush=True)
        for failure in entry.get("failures", ())[:5]:
            print(f"  {failure}", flush=True)
        save(args, report)


def compare(
    runner: Runner, name: str, groups: list[Group], words: np.ndarray, found: list[list[Expected]], limit: Limit
) -> dict:
    """One variant's figures by mode, and what broke its limits."""
    modes: dict[str, dict] = {}
    failures, shares = [], {}
    for index, (group, expected) in enumerate(progress(list(zip(groups, found, strict=True)), name)):
        if MODES[group.mode].scales and not hasattr(runner, "label_windows"):
            continue
        text = group.text(words)
        figures = modes.setdefault(
            group.mode, {"images": 0, "largest_cosine_difference": 0.0, "largest_gap": 0.0, "differing_pixels": 0}
        )
        if group.mode == "whole":
            result = runner.segment(group.inputs(runner.image_size), text, best=True)
            answers = list(zip(result.labels, result.best, strict=True))
        else:
            answers = [label_photo(runner, photo, text, group.mode) for photo in group.photos]
        for place, ((labels, best), wanted_) in enumerate(zip(answers, expected, strict=True)):
            differs = labels != wanted_.labels
            share = 100 * float(1 - differs.mean())
            off = float(np.abs(best[::STRIDE, ::STRIDE] - wanted_.best).max())
            widest = float(gap(wanted_.gaps[differs]).max()) if differs.any() else 0.0
            shares.setdefault(group.mode, []).append(share)
            figures["images"] += 1
            figures["differing_pixels"] += int(differs.sum())
            figures["largest_cosine_difference"] = max(figures["largest_cosine_difference"], off)
            figures["largest_gap"] = max(figures["largest_gap"], widest)
            where = f"{group.mode}, group {index}, photo {place} {group.photos[place].shape[:2]}, {len(text)} labels"
            if not widest <= limit.gap:
                failures.append(f"{where}: a pixel with a gap of {widest:.2e} has another label")
            if share < limit.worst:
                failures.append(f"{where}: {share:.3f} % of labels equal")
            if not off <= limit.gap:
                failures.append(f"{where}: a cosine is off by {off:.2e}")
    for mode, figures in modes.items():
        figures["mean_percent"], figures["worst_percent"] = float(np.mean(shares[mode])), min(shares[mode])
        if figures["mean_percent"] < limit.mean:
            failures.append(f"{mode}: {figures['mean_percent']:.3f} % of labels equal on average")
    return {"modes": modes, "failures": failures}


def progress(steps: list, title: str) -> Iterator:
    from tqdm import tqdm

    return tqdm(steps, desc=title, disable=None, leave=False)


def save(args: argparse.Namespace, report: dict) -> None:
    if args.output:
        write_files({args.output: (json.dumps(report, indent=1) + "\n").encode()})


if __name__ == "__main__":
    run(lambda: main(parse_args()))
