"""Exports LSeg's image encoder and its scoring to ONNX.

Writes onnx/lseg.onnx (image -> one CLIP embedding per pixel) and onnx/similarity.onnx (embeddings and texts -> label
map), each compared with PyTorch in ONNX Runtime before it is kept.

    python lseg_export.py                                  the demo weights
    python lseg_export.py --weights demo_e200.ckpt         the official weights
    python lseg_export.py --download                       fetch the official weights first
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lseg.errors import Parser, run, short

ROOT = Path(__file__).resolve().parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="demo", help="'demo', demo_e200.ckpt, or a state dict (.pt, .safetensors)")
    parser.add_argument(
        "--output", type=short, default=str(ROOT / "onnx"), metavar="DIR", help="folder of the ONNX files (onnx/)"
    )
    parser.add_argument("--batch", default="dynamic", help="images a call: a number, or 'dynamic' (default)")
    parser.add_argument(
        "--full-resolution",
        action="store_true",
        help="write lseg_full.onnx, the first port's output: times 1/0.07, upsampled to 512 x 480 x 480",
    )
    parser.add_argument(
        "--label-map",
        action="store_true",
        help="write lseg_labels.onnx too, pixels and text to labels in one graph: for trtexec and other runtimes",
    )
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of --label-map (default: fp32)")
    parser.add_argument("--matmul", choices=("4d", "3d", "2d"), default="4d", help="of --label-map (default: 4d)")
    parser.add_argument("--opset", type=int, default=17, help="ONNX operator set (default 17)")
    parser.add_argument(
        "--download",
        type=Path,
        nargs="?",
        const=Path("demo_e200.ckpt"),
        metavar="FILE",
        help="fetch the official checkpoint (2 GB, Google Drive) to FILE first, and export it",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    args = parser.parse_args(argv)
    if args.batch != "dynamic" and not (args.batch.isdecimal() and int(args.batch) > 0):
        parser.error(f"--batch {args.batch}: give a positive number or 'dynamic'")
    if not 17 <= args.opset <= 20:
        parser.error(f"--opset {args.opset}: give 17 to 20")
    return args


def main(args: argparse.Namespace) -> None:
    from lseg import checkpoint, specs
    from lseg.export import export_and_report
    from lseg.onnx_file import IMAGE_ONNX, SIMILARITY_ONNX

    if args.download:
        args.weights = checkpoint.download(args.download)
    weights = checkpoint.load(args.weights)
    batch = None if args.batch == "dynamic" else int(args.batch)
    if args.full_resolution:
        spec = specs.image_spec(weights, batch, full_resolution=True)
        export_and_report(spec, args.output / "lseg_full.onnx", args.opset, args.quiet)
        return
    export_and_report(specs.image_spec(weights, batch), args.output / IMAGE_ONNX, args.opset, args.quiet)
    export_and_report(specs.similarity_spec(weights), args.output / SIMILARITY_ONNX, args.opset, args.quiet)
    if args.label_map:
        from lseg.label_map_export import export_label_map

        export_label_map(weights, args.output / IMAGE_ONNX, args.precision, args.matmul, args.quiet)


if __name__ == "__main__":
    run(lambda: main(parse_args()))
