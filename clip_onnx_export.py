"""Exports CLIP's text encoder (and, asked for, its image tower) to ONNX.

Writes onnx/clip_textual.onnx (tokens int32 [N, 77] -> unit vectors [N, 512]), compared with PyTorch in ONNX Runtime
before it is kept.

    python clip_onnx_export.py                             the demo weights' text encoder
    python clip_onnx_export.py --weights demo_e200.ckpt    the CLIP inside the official LSeg checkpoint
    python clip_onnx_export.py --weights openai            open_clip's ViT-B-32-quickgelu, fetched by open_clip
    python clip_onnx_export.py --weights ViT-B-32.pt       a CLIP file
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lseg.errors import Parser, run, short

ROOT = Path(__file__).resolve().parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="demo", help="'demo', 'openai', an LSeg checkpoint or a CLIP file")
    parser.add_argument(
        "--output", type=short, default=str(ROOT / "onnx"), metavar="DIR", help="folder of the ONNX files (onnx/)"
    )
    parser.add_argument("--visual", action="store_true", help="write the image tower to clip_visual.onnx as well")
    parser.add_argument("--opset", type=int, default=17, help="ONNX operator set (default 17)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    args = parser.parse_args(argv)
    if not 17 <= args.opset <= 20:
        parser.error(f"--opset {args.opset}: give 17 to 20")
    return args


def main(args: argparse.Namespace) -> None:
    from lseg import specs
    from lseg.clip import load_clip
    from lseg.export import export_and_report
    from lseg.onnx_file import TEXT_ONNX

    clip = load_clip(args.weights, visual=args.visual)
    export_and_report(specs.text_spec(clip.text, clip.metadata), args.output / TEXT_ONNX, args.opset, args.quiet)
    if args.visual:
        export_and_report(
            specs.visual_spec(clip.visual, clip.metadata), args.output / "clip_visual.onnx", args.opset, args.quiet
        )


if __name__ == "__main__":
    run(lambda: main(parse_args()))
