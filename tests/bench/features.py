"""Milliseconds from a photo in memory to pixel embeddings on the host, by what is asked for; writes JSON.

    python tests/bench/features.py log/features_gpu.json [--backend tensorrt --weights FILE --onnx DIR --engines DIR]

Asked for are every 8th pixel of a photo and 10,000 points of it, each in two ways, which may differ by rounding: picked
where the network left them (`features_strided`, `features_at`), and from the whole map on the host (`features`). The
largest difference of the two is told beside the times; the exit status is 1 where it is too large.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from model_options import add_model_options  # noqa: E402

from lseg import Segmenter  # noqa: E402
from lseg.benchmark import interleaved, machine, timed_call  # noqa: E402
from lseg.image import read_image  # noqa: E402

STRIDE, POINTS = 8, 10_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--photo", type=Path, default=ROOT / "image" / "temple.jpg")
    add_model_options(parser)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=5)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    photo = read_image(args.photo)
    points = np.random.default_rng(0).integers(0, photo.shape[1::-1], (POINTS, 2))
    report = {"machine": machine(), "weights": Path(args.weights).stem, "photo": [*photo.shape[1::-1]]}
    files = {"onnx": args.onnx, "engines": args.engines, "precision": args.precision, "say": print}
    with Segmenter(args.weights, args.backend, **files) as lseg:
        report |= {"backend": str(lseg.runner.identity), "runs": args.runs}
        ways = {
            f"every {STRIDE}th, picked": lambda: lseg.features_strided(photo, STRIDE),
            f"every {STRIDE}th, from the whole": lambda: lseg.features(photo).strided(STRIDE),
            f"{POINTS} points, picked": lambda: lseg.features_at(photo, points),
            f"{POINTS} points, from the whole": lambda: lseg.features(photo).at(points),
        }
        picked, whole, picked_points, whole_points = (way().astype(np.float32) for way in ways.values())
        report["largest_difference"] = [
            float(np.abs(a - b).max()) for a, b in ((picked, whole), (picked_points, whole_points))
        ]
        calls = {name: timed_call("total", way) for name, way in ways.items()}
        found, errors = interleaved(calls, args.warmup, args.runs)
    if errors:
        raise SystemExit(f"error: {errors}")
    report["milliseconds"] = {name: stages["total"] for name, stages in found.items()}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    if not max(report["largest_difference"]) <= (2e-3 if "fp32" in report["backend"] else 1e-2):
        raise SystemExit(f"error: the two ways differ by {report['largest_difference']}")
    print(json.dumps(report["milliseconds"], indent=1), report["largest_difference"])


if __name__ == "__main__":
    main(parse_args())
