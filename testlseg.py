"""Measures speed and accuracy of the backends side by side, and writes them as JSON to log/.

    python testlseg.py                                     speed of every backend, the demo weights
    python testlseg.py --random-weights                    speed at the official model's size, with random weights
    python testlseg.py --dataset camvid/test               accuracy on images and masks, and agreement with PyTorch

A data set is a folder of NAME.jpg with masks NAME.png, whose values index --labels; other values count nowhere.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from lseg.errors import UserError, run

ROOT = Path(__file__).resolve().parent
CAMVID = "sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="demo", help="'demo', demo_e200.ckpt, or a state dict (.pt, .safetensors)")
    parser.add_argument("--random-weights", action="store_true", help="the official model's sizes, random weights")
    parser.add_argument("--backends", default="all", help="names separated by commas (default: all installed)")
    parser.add_argument("--onnx", type=Path, default=ROOT / "onnx", metavar="DIR", help="folder of the exported files")
    parser.add_argument("--photo", type=Path, default=ROOT / "image" / "temple.jpg", help="photo to time on")
    parser.add_argument("--labels", default=CAMVID, help=f"words, separated by commas (default: {CAMVID})")
    parser.add_argument("--batch", type=int, default=1, help="images a call")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="measure accuracy on this folder instead")
    parser.add_argument("--limit", type=int, help="use the first images of the data set only")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON (default: log/KIND_DATE.json)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from lseg.benchmark import machine
    from lseg.image import write_files
    from lseg.runner import available_backends

    if args.random_weights:
        args.weights, args.onnx = random_weights(args.onnx / "random"), args.onnx / "random"
    chosen = available_backends() if args.backends == "all" else [name.strip() for name in args.backends.split(",")]
    if any(name != "torch" for name in chosen):
        export_missing(args)
    report = {"machine": machine(), "weights": Path(args.weights).stem, "precision": "float32", "resolution": 480}
    report |= accuracy(args, chosen) if args.dataset else speed(args, chosen)
    kind = "accuracy" if args.dataset else "speed"
    path = args.output or ROOT / "log" / f"{kind}_{time.strftime('%Y%m%d_%H%M%S')}.json"
    write_files({path: (json.dumps(report, indent=1) + "\n").encode()})
    print(f"wrote {path}")


def random_weights(folder: Path) -> str:
    """A checkpoint of the official sizes with random weights (seed 0), written once."""
    path = folder / "lseg_random.safetensors"
    if not path.is_file():
        import torch

        from lseg.checkpoint import save_safetensors, to_official_names
        from lseg.model import LSegImageEncoder
        from lseg.text import CLIPTextEncoder

        torch.manual_seed(0)
        image, text = LSegImageEncoder(), CLIPTextEncoder()
        folder.mkdir(parents=True, exist_ok=True)
        tensors = to_official_names(image.state_dict(), text.state_dict())
        save_safetensors(path, tensors, image.config, text.config)
    return str(path)


def export_missing(args: argparse.Namespace) -> None:
    import enginerun

    enginerun.export_missing(enginerun.parse_args(["--weights", str(args.weights), "--onnx", str(args.onnx)]))


def speed(args: argparse.Namespace, backends: list[str]) -> dict:
    """Times each stage of each backend from the host's image to the host's label map, interleaved."""
    import contextlib

    import numpy as np

    from lseg.benchmark import interleaved, summarise
    from lseg.image import read_image, to_pixels
    from lseg.labels import parse_labels
    from lseg.runner import Timings, open_runner
    from lseg.tokenizer import Tokenizer

    tokens = Tokenizer()(parse_labels(args.labels).names)
    with contextlib.ExitStack() as stack:
        runners = {name: stack.enter_context(open_runner(name, args.weights, args.onnx)) for name in backends}
        pixels = to_pixels(read_image(args.photo), next(iter(runners.values())).image_size)
        pixels = np.stack([np.roll(pixels, 16 * i, axis=1) for i in range(args.batch)])

        def one(runner) -> dict[str, float]:
            timings = Timings()
            text = timings.measure("encode_text", lambda: runner.encode_text(tokens))
            timings.add(runner.segment(pixels, text).timings)
            return timings.milliseconds

        calls = {name: (lambda runner=runner: one(runner)) for name, runner in runners.items()}
        taken: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
        first: dict[str, float] = {}
        for name, turn, stages in interleaved(calls, args.warmup, args.runs):
            first.setdefault(name, stages["total"])
            if turn >= 0:
                for stage, value in stages.items():
                    taken[name].setdefault(stage, []).append(value)
        reference = runners[backends[-1]]
        text = reference.encode_text(tokens)
        embeddings, labels = reference.encode_image(pixels), reference.segment(pixels, text).labels
        rows = []
        for name, runner in runners.items():
            error = runner.encode_image(pixels) - embeddings
            row = {"backend": name, "description": runner.description, "first_call_ms": first[name]}
            row["compared_with"] = backends[-1]
            row["relative_difference"] = float(np.linalg.norm(error) / np.linalg.norm(embeddings))
            row["label_agreement_percent"] = float(np.mean(runner.segment(pixels, text).labels == labels) * 100)
            row["milliseconds"] = {stage: summarise(values) for stage, values in taken[name].items()}
            rows.append(row)
    print(f"median milliseconds (p99), batch {args.batch}, {len(tokens)} labels, weights: {Path(args.weights).stem}")
    for row in rows:
        stages = ", ".join(f"{k} {v['median']:.1f} ({v['p99']:.1f})" for k, v in row["milliseconds"].items())
        print(f"  {row['description']}: {stages}")
        agreement, error = row["label_agreement_percent"], row["relative_difference"]
        print(f"    against {backends[-1]}: labels {agreement:.3f} % equal, embeddings {error:.1e} off")
    return {"kind": "speed", "batch": args.batch, "labels": len(tokens), "rows": rows}


def accuracy(args: argparse.Namespace, backends: list[str]) -> dict:
    """Pixel accuracy, IoU per label and mIoU of each backend over whole photos, and agreement with the last of them."""
    import cv2
    import numpy as np
    from tqdm import tqdm

    from lseg.image import labels_to_photo, read_image, to_pixels
    from lseg.labels import parse_labels
    from lseg.metrics import class_iou, confusion, pixel_accuracy
    from lseg.runner import open_runner
    from lseg.tokenizer import Tokenizer

    pairs = find_pairs(args.dataset)[: args.limit]
    names = parse_labels(args.labels).names
    tokens = Tokenizer()(names)
    rows, maps = [], {}
    for backend in backends:
        with open_runner(backend, args.weights, args.onnx) as runner:
            text = runner.encode_text(tokens)
            total, maps[backend] = 0, []
            for photo, mask in tqdm(pairs, desc=backend, unit="image", disable=None):
                image, truth = read_image(photo), cv2.imread(str(mask), cv2.IMREAD_UNCHANGED)
                if truth is None or truth.shape[:2] != image.shape[:2] or truth.ndim != 2:
                    raise UserError(f"{mask} is not a mask of {photo}'s size with one value a pixel")
                labels = runner.segment(to_pixels(image, runner.image_size)[None], text).labels[0]
                maps[backend].append(labels.astype(np.uint16))
                total = total + confusion(labels_to_photo(labels, *image.shape[1::-1]), truth, len(names))
            iou = class_iou(total) * 100
            row = {"backend": backend, "description": runner.description, "images": len(pairs)}
            row |= {"pixel_accuracy": pixel_accuracy(total) * 100, "miou": float(np.nanmean(iou))}
            row |= {"iou": dict(zip(names, np.round(iou, 2).tolist(), strict=True))}
            rows.append(row)
        print(f"{runner.description}: mIoU {row['miou']:.2f}, pixel accuracy {row['pixel_accuracy']:.2f}")
        print("  " + ", ".join(f"{name} {value:.1f}" for name, value in row["iou"].items()))
    reference = backends[-1]
    for row in rows:
        same = np.mean([np.mean(a == b) for a, b in zip(maps[row["backend"]], maps[reference], strict=True)])
        row["label_agreement"] = {"with": reference, "percent": float(same * 100)}
    return {"kind": "accuracy", "dataset": args.dataset.name, "labels": list(names), "rows": rows}


def find_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Photos and their masks; raises UserError where there are none or a mask is missing."""
    photos = sorted(folder.glob("*.jpg"))
    if not photos:
        raise UserError(f"{folder} holds no NAME.jpg: give a folder of images with masks NAME.png")
    for photo in photos:
        if not photo.with_suffix(".png").is_file():
            raise UserError(f"{photo} has no mask {photo.stem}.png beside it")
    return [(photo, photo.with_suffix(".png")) for photo in photos]


if __name__ == "__main__":
    run(lambda: main(parse_args()))
