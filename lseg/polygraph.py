"""What polygraph.sh needs beside Polygraphy: real photos as inputs, graphs in other forms, and PyTorch's results.

    polygraphy run FILE --data-loader-script lseg/polygraph.py:images ...     for a graph that takes `image`
    python -m lseg.polygraph photos                                           whether every photo can be read
    python -m lseg.polygraph ranks FILE...                                    ranks of the MatMuls' operands
    python -m lseg.polygraph graph FILE --matmul 2d --precision fp16 OUTPUT   another form of an exported encoder
    python -m lseg.polygraph torch FILE --weights demo OUTPUT                 PyTorch's results, as Polygraphy has them

The environment variable LSEG_PHOTOS names the photos, separated by colons; the bundled one by default.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Polygraphy loads this file by its path

import numpy as np  # noqa: E402

from lseg.errors import Parser, run  # noqa: E402

SIZE = 480


def pixels() -> Iterator[np.ndarray]:
    """Each photo, uint8 [1, S, S, 3]."""
    from lseg.image import read_image, to_pixels

    size = int(os.environ.get("LSEG_SIZE", SIZE))
    for name in os.environ.get("LSEG_PHOTOS", str(ROOT / "image" / "temple.jpg")).split(":"):
        yield to_pixels(read_image(name), size)[None]


def images() -> Iterator[dict[str, np.ndarray]]:
    """Each photo as {"image": float32 [1, 3, S, S]}, normalised."""
    from lseg.image import normalise

    for photo in pixels():
        yield {"image": normalise(photo)}


def main(args: argparse.Namespace) -> None:
    args.action(args)


def print_ranks(args: argparse.Namespace) -> None:
    """For each file: inputs, outputs, and how many MatMuls have operands of which ranks."""
    from lseg.rewrite import matmul_ranks
    from lseg.scoring import load_encoder

    for file in args.files:
        model = load_encoder(file)
        print(f"{file}:")
        for title, values in (("input", model.graph.input), ("output", model.graph.output)):
            for value in values:
                kind = value.type.tensor_type
                shape = ", ".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
                print(f"  {title} {value.name}: {_dtype(kind.elem_type)} [{shape}]")
        ranks = matmul_ranks(model)
        shown = ", ".join(f"{count} of {a}-D x {b}-D" for (a, b), count in sorted(ranks.items())) or "none"
        print(f"  MatMuls: {shown}")


def _dtype(kind: int) -> str:
    import onnx

    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).name
    except (KeyError, TypeError, ValueError):  # none that NumPy has
        return f"type {kind}"


def check_photos(args: argparse.Namespace) -> None:
    """Reads every photo once, so that one that cannot be read is told before Polygraphy meets it."""
    for _ in pixels():
        pass


def write_graph(args: argparse.Namespace) -> None:
    """Another form of an exported image encoder; with a precision, its embeddings stay float32."""
    from lseg import scoring
    from lseg.onnx_file import write_onnx
    from lseg.precision import to_float16
    from lseg.rewrite import rewrite_matmuls

    model, batch = scoring.load_encoder(args.file), 1 if args.matmul == "2d" else None
    if args.precision:
        core = rewrite_matmuls(scoring.cut_head(model), args.matmul, batch=batch)
        model = scoring.embedding_graph(to_float16(core) if args.precision == "fp16" else core)
    else:
        model = rewrite_matmuls(model, args.matmul, batch=batch)
    write_onnx(model, args.output, {})


def write_torch_results(args: argparse.Namespace) -> None:
    """PyTorch's embeddings of the photos, as a file of Polygraphy's RunResults."""
    from polygraphy.comparator import IterationResult, RunResults

    from lseg.run_torch import TorchRunner

    with TorchRunner(args.weights, device="cpu") as runner:
        found = [IterationResult({"embeddings": runner.encode_image(photo)}, None, "torch") for photo in pixels()]
    results = RunResults()
    results.append(("torch", found))
    results.save(str(args.output))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    ranks = commands.add_parser("ranks")
    ranks.add_argument("files", nargs="+", type=Path)
    ranks.set_defaults(action=print_ranks)
    photos = commands.add_parser("photos")
    photos.set_defaults(action=check_photos)
    graph = commands.add_parser("graph")
    graph.add_argument("file", type=Path)
    graph.add_argument("output", type=Path)
    graph.add_argument("--matmul", choices=("4d", "3d", "2d"), default="4d")
    graph.add_argument("--precision", choices=("fp32", "fp16"))
    graph.set_defaults(action=write_graph)
    torch = commands.add_parser("torch")
    torch.add_argument("output", type=Path)
    torch.add_argument("--weights", default="demo")
    torch.set_defaults(action=write_torch_results)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(lambda: main(parse_args()))
