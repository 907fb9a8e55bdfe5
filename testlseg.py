"""Measures every backend that the machine has, side by side: speed, and accuracy against PyTorch in float32.

    python testlseg.py                                     the demo weights
    python testlseg.py --random-weights                    the official model's size, with random weights
    python testlseg.py --dataset camvid/test               mIoU on images with masks as well
    python testlseg.py --quick                             a minute, on any machine: does every backend agree?
    python testlseg.py --report log/report_*.json          tables from earlier runs

Prints a table in Markdown, writes it with all figures as JSON to log/ and draws a plot in image/. The exit status is 1
when a backend fails or breaks its bound. Without torch, --reference takes what --save-reference wrote elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lseg.errors import Parser, UserError, counted, run, short

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parent
PHOTO = ROOT / "image" / "temple.jpg"
TEXT_COUNTS = (1, 8, 150)
TABLE_TEXT_COUNT = 8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="demo", help="'demo', demo_e200.ckpt, or a state dict (.pt, .safetensors)")
    parser.add_argument("--random-weights", action="store_true", help="the official model's sizes, random weights")
    parser.add_argument("--backends", default="all", help="'all', 'tensorrt', ... or single ones, separated by commas")
    parser.add_argument("--onnx", type=short, default=short(ROOT / "onnx"), metavar="DIR", help="the exported files")
    parser.add_argument("--engines", type=short, default=short(ROOT / "engines"), metavar="DIR", help="the engines")
    parser.add_argument("--photos", nargs="*", type=short, default=[short(PHOTO)], help="photos to time and compare on")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", help="words, separated by commas (default: CamVid's 11)")
    labels.add_argument(
        "--labels-file", type=short, metavar="FILE", help="labels, one a line, or ADE20K's objectInfo150"
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument("--cases", default="1:8,1:150,8:8", help="batch:labels pairs (default: 1:8,1:150,8:8)")
    speed.add_argument(
        "--batch", type=int, metavar="N", help="images a run of TensorRT's encoder (default: eight and one)"
    )
    speed.add_argument("--runs", type=int, default=30)
    speed.add_argument("--warmup", type=int, default=5)
    speed.add_argument("--no-speed", action="store_true", help="accuracy only")
    speed.add_argument("--quick", action="store_true", help="few runs of batch 1, no plot: for a look or for CI")
    data = parser.add_argument_group("accuracy")
    data.add_argument("--dataset", type=short, metavar="DIR", help="photos with masks: CamVid's or ADE20K's layout")
    data.add_argument("--limit", type=int, help="use the data set's first images only")
    data.add_argument(
        "--evaluation",
        choices=("whole", "window", "official"),
        default="whole",
        help="of the data set: photos squashed whole, in windows, or in windows of six scales and the mirror",
    )
    data.add_argument("--save-reference", type=short, metavar="FILE", help="write what PyTorch gave, for --reference")
    data.add_argument("--reference", type=short, metavar="FILE", help="compare with this instead of running PyTorch")
    parser.add_argument("--output", type=short, metavar="FILE", help="the JSON (default: log/test_DATE.json)")
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--report", nargs="+", type=short, metavar="FILE", help="print earlier runs' tables, merged")
    parser.add_argument(
        "--update-readme",
        nargs="?",
        const=short(ROOT / "README.md"),
        type=short,
        metavar="FILE",
        help="with --report: write them between FILE's markers too (default: README.md)",
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.cases, args.runs, args.warmup, args.no_plot = "1:8", 5, 1, True
    return args


def main(args: argparse.Namespace) -> int:
    from lseg import report as reports
    from lseg.files import writable_folder, write_files

    if args.report:
        return show_reports(args)
    if args.update_readme:
        raise UserError("--update-readme needs the reports: give them with --report")
    path = args.output or short(ROOT / "log" / f"test_{time.strftime('%Y%m%d_%H%M%S')}.json")
    for file in filter(None, (path, args.save_reference)):
        if file.is_dir():
            raise UserError(f"{file} is a folder: name a file in it")
        writable_folder(file.parent)
    report = measure(args)
    rows = report["rows"]
    write_files({path: (json.dumps(report, indent=1) + "\n").encode()})
    print(reports.markdown(report))
    print(f"\nwrote {path}")
    if not args.no_plot and any(row["speed"] for row in rows):
        picture = path.with_suffix(".png") if args.output else short(ROOT / "image" / f"{path.stem}.png")
        try:
            reports.plot(report, picture)
            print(f"wrote {picture}")
        except UserError as error:
            print(f"note: no plot ({error})")
    failed = [row["variant"] for row in rows if row["error"] or row["broken"]]
    agree = sum(not row["accuracy"].get("is_reference") for row in rows if row["accuracy"])
    if failed:
        print(f"error: {', '.join(failed)} failed or broke a bound: see above", file=sys.stderr)
    elif agree:
        print(f"{counted(agree, 'backend')} {'agrees' if agree == 1 else 'agree'} with {report['reference']}")
    return 1 if failed else 0


def show_reports(args: argparse.Namespace) -> int:
    from lseg import report as reports
    from lseg.files import write_files

    readme = args.update_readme
    if readme and (not readme.is_file() or readme.resolve().parent != ROOT):
        raise UserError(f"{readme} is no file of the repository's root: give README.md or MEASUREMENTS.md")
    print("\n\n".join(reports.markdown(report) for report in reports.load_reports(args.report)))
    if readme:
        outside = [file for file in args.report if not file.resolve().is_relative_to(ROOT)]
        if outside:
            raise UserError(f"{outside[0]} lies outside the repository: copy it to log/ before the README names it")
        names = [str(file.resolve().relative_to(ROOT)) for file in args.report]
        write_files({readme: reports.update_readme(readme, names)[1].encode()})
    return 0


def measure(args: argparse.Namespace) -> dict:
    """Checks all input, opens every backend, measures, and returns the report."""
    from lseg import variants
    from lseg.accuracy import Expected
    from lseg.benchmark import gpu, machine
    from lseg.dataset import CAMVID, find_dataset
    from lseg.image import read_image, to_pixels
    from lseg.labels import parse_labels, read_labels_file
    from lseg.measure import Bench, Plan
    from lseg.opening import Model, export_missing
    from lseg.recipes import check_batch
    from lseg.report import FORMAT
    from lseg.tensorfile import sha256, sha256_once
    from lseg.tokenizer import Tokenizer
    from lseg.weights import resolve

    check_batch(args.batch)
    chosen = variants.choose_variants(args.backends)
    if args.batch and not any(variant.backend == "tensorrt" for variant in chosen):
        raise UserError("--batch is of TensorRT's engines, and none are measured: leave it out, or see --backends")
    cases = parse_cases(args.cases)
    mode = {"official": "multiscale"}.get(args.evaluation, args.evaluation)
    for name, value, least in (("--runs", args.runs, 1), ("--warmup", args.warmup, 0), ("--limit", args.limit, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} {value} cannot be: give at least {least}")
    names = None
    if args.labels_file:
        names = [words[0] for words in read_labels_file(args.labels_file)]
    elif args.labels:
        names = list(parse_labels(args.labels).names)
    dataset = find_dataset(args.dataset, names, args.limit) if args.dataset else None
    names = list(dataset.labels) if dataset else names or list(CAMVID)
    tokens = Tokenizer()(names)
    photos = [read_image(photo) for photo in args.photos]
    if args.random_weights:
        args.weights, args.onnx = random_weights(args.onnx / "random"), args.onnx / "random"
    digest = sha256_once(resolve(args.weights))
    if any(variant.backend != "torch" for variant in chosen):
        export_missing(Model(args.weights, args.onnx))
    config = model_config(args, digest)
    pixels = [to_pixels(photo, config["image_size"]) for photo in photos]
    files = [sha256(file) for pair in dataset.pairs for file in pair] if dataset else []
    made_from = (digest, names, mode, files)
    inputs = hashlib.sha256(b"".join([repr(made_from).encode(), *(image.tobytes() for image in pixels)])).hexdigest()
    expected = Expected.load(args.reference, inputs) if args.reference else None
    report = {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "weights": {"name": Path(args.weights).stem, "sha256": digest, "random": args.random_weights},
        "image_size": config["image_size"],
        "labels": names,
        "photos": [photo.name for photo in args.photos],
        "reference": "PyTorch in float32",
        "settings": {"runs": args.runs, "warmup": args.warmup, "table_text_count": TABLE_TEXT_COUNT},
        "matrix_rate": {},
    }
    if args.batch:
        report["settings"]["batch"] = args.batch
    plan = Plan(
        weights=args.weights,
        random_weights=args.random_weights,
        onnx=args.onnx,
        engines=args.engines,
        config=config,
        photos=pixels,
        cases=cases,
        text_counts=(TABLE_TEXT_COUNT,) if args.quick else TEXT_COUNTS,
        runs=args.runs,
        warmup=args.warmup,
        batch=args.batch,
    )
    with Bench(plan, chosen) as bench:
        bench.open(time_first_calls=not args.no_speed)
        if not args.no_speed:
            report["matrix_rate"] = bench.measure_speed()
            report["machine"] |= {"gpu": gpu()}  # its clocks when it has been at work
        found = bench.measure_accuracy(tokens, dataset, mode, expected)
        if found is None:
            print("note: no torch here and no --reference, so accuracy is left out")
        elif args.save_reference:
            found.save(args.save_reference, inputs)
    return report | {"rows": list(bench.rows.values())}


def parse_cases(text: str) -> list[tuple[int, int]]:
    """ "1:8,8:8" to [(1, 8), (8, 8)]: images a call and labels."""
    cases = []
    for part in text.split(","):
        numbers = part.strip().split(":")
        if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise UserError(f"'{part}' is no batch:labels pair: write --cases 1:8,1:150,8:8")
        cases.append((int(numbers[0]), int(numbers[1])))
    return cases


def random_weights(folder: Path) -> str:
    """A checkpoint of the official sizes with random weights (seed 0), written once."""
    path = folder / "random_vit_l16.safetensors"
    if not path.is_file():
        if not importlib.util.find_spec("torch"):
            raise UserError("random weights are made with torch, which is not installed: run './requirements.sh'")
        import torch

        from lseg.checkpoint import save_safetensors, to_official_names
        from lseg.model import LSegImageEncoder
        from lseg.text import CLIPTextEncoder

        torch.manual_seed(0)
        image, text = vary(LSegImageEncoder()), vary(CLIPTextEncoder())
        folder.mkdir(parents=True, exist_ok=True)
        tensors = to_official_names(image.state_dict(), text.state_dict())
        save_safetensors(path, tensors, image.config, text.config)
    return str(path)


def vary(module: nn.Module) -> nn.Module:
    """Gives a new module's biases and norms some spread: what only adds 0 or multiplies by 1 an exporter leaves out."""
    import torch

    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
                tensor += 0.02 * torch.randn_like(tensor)
    return module


def model_config(args: argparse.Namespace, digest: str) -> dict:
    """The image encoder's sizes, from the exported file where there is one, else from the weights."""
    from lseg.onnx_file import IMAGE_ONNX, read_metadata, sizes

    if (args.onnx / IMAGE_ONNX).is_file():
        metadata = read_metadata(args.onnx / IMAGE_ONNX)
        if metadata.get("weights_sha256") == digest:
            return sizes(args.onnx / IMAGE_ONNX, metadata, "export it again")
    from lseg import checkpoint

    return checkpoint.load(args.weights).image_config.to_dict()


if __name__ == "__main__":
    run(lambda: main(parse_args()))
