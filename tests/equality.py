"""Checks that every way to run LSeg gives the labels that PyTorch gives in float32, on random photos and labels.

    python tests/equality.py --images 200 --seed 7 --output log/equality_cpu.json
    python tests/equality.py --seed 7 --save-reference ref.npz --variants torch                      # where torch is
    python tests/equality.py --seed 7 --reference ref.npz --variants tensorrt-fp16-4d --minutes 2    # where it is not

A variant passes when its share of equal labels is within its precision's `LIMITS`, and no pixel differs whose two best
cosines are further apart in the reference than the same table allows: near-ties may fall either way, clear winners may
not. Beside the machine's variants (`lseg.variants`) the graphs of each form of matrix product, which are what
`lseg_labels.onnx` holds, run in ONNX Runtime, and the TensorRT runner runs on the stand-in GPU with tiny random
weights, where torch and g++ are. On a busy CPU one thread is the fastest: OMP_NUM_THREADS=1 LSEG_THREADS=1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import sys
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
from equality_variants import FORMS, HALF_SUMS, Open, stand_in_world, world  # noqa: E402

from lseg.benchmark import machine, one_line  # noqa: E402
from lseg.errors import Parser, UserError, run  # noqa: E402
from lseg.files import write_files  # noqa: E402
from lseg.image import read_image  # noqa: E402
from lseg.inference import label_photo  # noqa: E402
from lseg.onnx_file import IMAGE_ONNX, read_metadata  # noqa: E402
from lseg.runner import Runner  # noqa: E402
from lseg.tokenizer import Tokenizer  # noqa: E402
from lseg.variants import BOUNDS  # noqa: E402
from lseg.windows import MODES  # noqa: E402


@dataclass(frozen=True)
class Limit:
    """What a precision must keep to on random photos."""

    mean: float  # percent of equal labels, the mean over photos
    worst: float  # percent of equal labels, of each photo
    gap: float  # of the reference's two best cosines where a label differs, at most


# The means are the bounds of `lseg.variants`. A photo of noise with hundreds of random labels is made of near-ties, of
# which 16 bits decide many otherwise: for these only the gap is held for each photo, and the worst share is told.
# PyTorch's own float16 keeps to them (`--variants torch-fp16`, which a CPU runs when it is named). Products that are
# added up in float16, as TensorRT 8 does, have twice the gap: PyTorch made to add up so (`--variants half-sums`) is off
# by up to 0.0157 on 200 photos. TensorRT 8.6's engines are off by 0.017 to 0.022, each build by another number.
LIMITS = {
    "fp32": Limit(BOUNDS["fp32"].label_agreement, BOUNDS["fp32"].label_agreement, 2e-5),
    **{p: Limit(BOUNDS[p].label_agreement, 0.0, BOUNDS[p].relative_difference) for p in ("tf32", "fp16", "bf16")},
    HALF_SUMS: Limit(BOUNDS["fp16"].label_agreement, 0.0, 2 * BOUNDS["fp16"].relative_difference),
}

TELL = 30  # seconds between lines about how far it is


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
    parser.add_argument("--output", type=Path, help="JSON of all figures, kept up to date as it goes")
    parser.add_argument("--minutes", type=float, default=np.inf, help="where a variant is cut short, and what follows")
    args = parser.parse_args(argv)
    args.modes = [mode.strip() for mode in args.modes.split(",")]
    for mode in args.modes:
        if mode not in MODES:
            parser.error(f"argument --modes: '{mode}' is none: choose some of {', '.join(MODES)}")
    if min(args.images, args.window, args.multiscale) < 0:
        parser.error("numbers of photos cannot be below 0")
    return args


def main(args: argparse.Namespace) -> int:
    photos = {"whole": args.images, "window": args.window, "multiscale": args.multiscale}
    photos = {mode: photos[mode] for mode in args.modes}
    report = {"seed": args.seed, "photos": photos, "machine": machine(), "batches": BATCHES,
              "labels_at_most": {mode: LABELS[mode] for mode in args.modes}, "cosines_at_every": STRIDE,
              "limits": {name: vars(limit) for name, limit in LIMITS.items()}, "variants": {}}  # fmt: skip
    own = world(args)
    known = [*own, *(f"standin-{p}-{m}" for p, m in FORMS)]
    for part in args.variants.split(","):
        if part != "all" and not any(f"{name}-".startswith(f"{part}-") for name in known):
            raise UserError(f"this machine cannot run '{part}': give 'all' or some of {', '.join(known)}")
    chosen = [name for name in known if wanted(args, name, known)]
    tiny = [name for name in chosen if name not in own] if has_torch() else []
    chosen = [name for name in chosen if name in own]
    start = time.perf_counter()
    args.deadline = start + 60 * args.minutes
    if chosen or args.save_reference:
        check_all(args, report, {name: own[name] for name in chosen}, args.weights, args.onnx)
    if tiny:
        with stand_in_world(args.seed, tiny) as (weights, folder, openers):
            check_all(args, report, openers, weights, folder, own=False)
    report["seconds"] = round(time.perf_counter() - start)
    save(args, report)
    failed = [name for name, entry in report["variants"].items() if entry.get("failures") or "error" in entry]
    cut = [name for name, entry in report["variants"].items() if entry.get("cut_short")]
    print("failed: " + ", ".join(failed) if failed else "all within their limits", flush=True)
    if cut:
        print("cut short by --minutes: " + ", ".join(cut), flush=True)
    return 1 if failed or cut else 0


def wanted(args: argparse.Namespace, name: str, known: list[str]) -> bool:
    """A name is chosen by itself, by "all", or by a part that it begins with and that is no name itself."""
    parts = args.variants.split(",")
    return any(part in ("all", name) or (part not in known and name.startswith(f"{part}-")) for part in parts)


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def check_all(
    args: argparse.Namespace, report: dict, variants: dict[str, tuple[str, Open]], weights: str, onnx: Path,
    own: bool = True,
) -> None:  # fmt: skip
    """Runs the reference and the variants over the same groups, one after the other. `own`: not the tiny weights."""
    if not variants and not args.save_reference:
        return
    tokens, counts = Tokenizer()(WORDS), report["photos"]
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

        def keep(entry: dict = entry, start: float = start) -> None:
            entry["seconds"] = round(time.perf_counter() - start)
            entry["peak_mib_of_the_process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            save(args, report)

        try:
            with opener() as runner:
                entry["identity"] = str(runner.identity)
                kind = HALF_SUMS if adds_up_in_float16(entry["identity"], precision) else precision
                entry["limit"] = kind
                text = runner.encode_text(tokens)
                entry["largest_difference_of_words"] = float(np.abs(text - reference.words).max())
                pairs = progress(list(zip(groups, reference.found, strict=True)), name, args.deadline, keep)
                entry["cut_short"] = compare(entry, pairs, runner, text, LIMITS[kind]) < len(groups)
        except Exception as error:  # whatever a backend throws is its result; the others still have theirs
            entry["error"] = one_line(error)
        keep()
        print(f"{name}: {json.dumps({k: v for k, v in entry.items() if k != 'failures'})}", flush=True)
        for failure in entry.get("failures", ())[:5]:
            print(f"  {failure}", flush=True)


def adds_up_in_float16(identity: str, precision: str) -> bool:
    """Whether a backend's float16 products may have float16 sums: TensorRT 8's, unless a bridge keeps float32."""
    return precision == HALF_SUMS or (
        precision == "fp16" and bool(re.match(r"TensorRT 8\.[^ ]*(?<!\+float32) ", identity))
    )


def compare(
    entry: dict, pairs: Iterator[tuple[Group, list[Expected]]], runner: Runner, words: np.ndarray, limit: Limit
) -> int:
    """Fills in one variant's figures by mode, and what broke its limits; returns how many groups there were."""
    modes, failures, shares = entry.setdefault("modes", {}), entry.setdefault("failures", []), {}
    index = -1
    for index, (group, expected) in enumerate(pairs):
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
            figures["mean_percent"] = float(np.mean(shares[group.mode]))
            figures["worst_percent"] = min(shares[group.mode])
            where = f"{group.mode}, group {index}, photo {place} {group.photos[place].shape[:2]}, {len(text)} labels"
            if not widest <= limit.gap:
                failures.append(f"{where}: a pixel with a gap of {widest:.2e} has another label")
            if share < limit.worst:
                failures.append(f"{where}: {share:.3f} % of labels equal")
            if not off <= limit.gap:
                failures.append(f"{where}: a cosine is off by {off:.2e}")
    for mode, figures in modes.items():
        if figures["mean_percent"] < limit.mean:
            failures.append(f"{mode}: {figures['mean_percent']:.3f} % of labels equal on average")
    return index + 1


def progress(steps: list, title: str, deadline: float = np.inf, keep: Callable[[], object] = lambda: None) -> Iterator:
    """The steps before the deadline; in between tells how far it is, and calls `keep`."""
    start = told = time.perf_counter()
    for index, step in enumerate(steps):
        now = time.perf_counter()
        if now > deadline:
            return
        if now - told > TELL:
            print(f"{title}: {index} of {len(steps)} groups in {now - start:.0f} s", flush=True)
            keep()
            told = now
        yield step


def save(args: argparse.Namespace, report: dict) -> None:
    if args.output:
        write_files({args.output: (json.dumps(report, indent=1) + "\n").encode()})


if __name__ == "__main__":
    run(lambda: main(parse_args()))
