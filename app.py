"""A page to segment photos by words, in the browser.

    python app.py                                      the demo weights, at http://127.0.0.1:7860
    python app.py --weights demo demo_e200.ckpt        visitors choose between these
    python app.py --host 0.0.0.0 --port 8080           for others in the network too

The page needs no network: nothing is fetched, counted or shared. Photos stay in memory and are forgotten after an hour.
ONNX files and TensorRT engines that are missing are made first. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from enginerun import LABELS, PHOTO
from lseg.errors import Parser, UserError, run, short

if TYPE_CHECKING:
    from lseg.segmenter import Segmenter

ROOT = Path(__file__).resolve().parent
MORE_LABELS = ("fence", "sign", "pole", "bicyclist", "pedestrian", "house", "truck", "bus", "grass", "water")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument(
        "--weights", nargs="+", default=["demo"], metavar="W", help="'demo', checkpoints: visitors choose among them"
    )
    parser.add_argument("--backend", choices=("auto", "tensorrt", "onnxruntime", "torch"), default="auto")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "fp16", "bf16"), default="fp16", help="of TensorRT (default: fp16)"
    )
    parser.add_argument(
        "--onnx",
        type=short,
        default=str(ROOT / "onnx"),
        metavar="DIR",
        help="folder of the exported files (onnx/); further weights get folders in it",
    )
    parser.add_argument(
        "--engines", type=short, default=str(ROOT / "engines"), metavar="DIR", help="folder of the engines (engines/)"
    )
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument("--max-megapixels", type=float, default=50, metavar="M", help="of a photo (default: 50)")
    bounds.add_argument("--max-labels", type=int, default=256, metavar="N", help="of a photo (default: 256)")
    bounds.add_argument(
        "--keep-mib", type=int, default=1024, metavar="M", help="memory for photos and embeddings (default: 1024)"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    import importlib.util

    from lseg import errors

    for name, least in (("max_megapixels", 0), ("max_labels", 1), ("keep_mib", 0), ("port", 0)):
        if not least < getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g} is too small: give more than {least}")
    if args.port > 65535:
        raise UserError(f"--port {args.port} is no port: give a number up to 65535")
    if not importlib.util.find_spec("gradio"):
        raise UserError("gradio, which makes the page, is not installed: run './requirements.sh'")
    from lseg.page_server import check_address, serve
    from lseg.page_work import Desk, Limits

    check_address(args.host, args.port)
    say = (lambda _: None) if args.quiet else errors.say
    limits = Limits(args.max_megapixels, args.max_labels, args.keep_mib << 20)
    folders = onnx_folders(args.weights, args.onnx)

    def open_segmenter(weights: str, backend: str) -> Segmenter:
        from lseg.segmenter import Segmenter

        more = {"engines": args.engines, "precision": args.precision, "say": None if args.quiet else say}
        return Segmenter(weights, backend, onnx=folders[weights], **more)

    with Desk(open_segmenter, args.weights, args.backend, limits) as desk:
        say(f"{desk.segmenter(desk.usual).runner.identity}; weights: {', '.join(args.weights)}")
        serve(desk, args.host, args.port, LABELS.split(", "), MORE_LABELS, PHOTO, say)
    return 0


def onnx_folders(weights: list[str], folder: Path) -> dict[str, Path]:
    """Where each weights' exported files lie: the first's in the folder, every other's in one of its own in it."""
    from lseg.weights import resolve

    folders: dict[str, Path] = {}
    for name in weights:
        path = resolve(name)  # says so now if it is not there
        if name not in folders:
            inner = folder / path.stem if folders else folder
            while inner in folders.values():
                inner = inner.with_name(f"{inner.name}_")
            folders[name] = inner
    return folders


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run(lambda: main(parse_args()))
