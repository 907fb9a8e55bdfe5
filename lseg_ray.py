"""Segments very many images by words on Ray: on this machine, on all its GPUs, or on a cluster.

    python lseg_ray.py photos/ --labels "car, road, sky, other" --output results
    python lseg_ray.py "shards/*.tar" --output results_shards --save-labels --rle
    python lseg_ray.py s3://bucket/frames.parquet --output s3://bucket/labels --address auto
    python lseg_ray.py photos/ --labels "car, road, sky, other" --output results --resume

Results go to Parquet files in DIR/parts: of each image its labels with their shares and confidences; with --save-labels
to NAME_labels.png as well. What is written counts as done: --resume goes on after anything that ended a run. An image
that cannot be read is told and left out, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lseg.errors import Parser, UserError, counted, run, short

if TYPE_CHECKING:
    from lseg.bulk import Stages
    from lseg.bulk_inputs import Row
    from lseg.bulk_output import Output

ROOT = Path(__file__).resolve().parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from enginerun import LABELS

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, folders (with all below them), .tar archives, Parquet files, quoted patterns, .txt lists of "
        "paths; or such in object storage: s3://, gs://, hdfs://, file://",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the results, or a URI")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", default=LABELS, help=f"words, separated by commas (default: {LABELS})")
    labels.add_argument("--labels-file", type=short, metavar="FILE", help="as enginerun.py takes them")
    parser.add_argument("--templates", default="none", metavar="T", help="prompts: none (default), clip, or a file")
    parser.add_argument("--unknown", type=float, metavar="T", help="leave pixels unlabelled whose cosine is below T")
    parser.add_argument("--save-labels", action="store_true", help="write each label map too (PNG of indices and JSON)")
    parser.add_argument("--rle", action="store_true", help="add masks to the parts, in COCO's run-length encoding")
    parser.add_argument("--features", type=int, metavar="N", help="in place of labels: embeddings of every Nth pixel")
    parser.add_argument("--resume", action="store_true", help="leave out what is written; go on with the rest")
    parser.add_argument("--image-column", default="image", metavar="C", help="of Parquet files (default: image)")
    parser.add_argument("--name-column", metavar="C", help="of Parquet files (default: FILE-00000000, counted)")
    model = parser.add_argument_group("the model, as for enginerun.py; all machines find its files under these paths")
    model.add_argument("--weights", default="demo")
    model.add_argument("--backend", choices=("auto", "tensorrt", "onnxruntime", "torch"), default="auto")
    model.add_argument("--onnx", type=Path, default=ROOT / "onnx", metavar="DIR")
    model.add_argument("--text-onnx", type=Path, metavar="FILE")
    model.add_argument("--engines", type=Path, default=ROOT / "engines", metavar="DIR")
    model.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"), default="fp16")
    model.add_argument("--matmul", choices=("4d", "3d", "2d"))
    model.add_argument("--opt-level", type=int, default=3, choices=range(6))
    where = parser.add_argument_group("where it runs")
    where.add_argument("--address", metavar="A", help="a cluster: 'auto' on one of its machines, or HOST:PORT")
    where.add_argument("--actors", type=int, metavar="N", help="networks at once (default: one a GPU, else a machine)")
    where.add_argument("--batch", type=int, metavar="N", help="images a run, 1 to 8 (default: 8 on a GPU, 1 on a CPU)")
    where.add_argument("--part", type=int, metavar="N", help="images a part (default: 32; 8 with --features)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser.parse_args(argv)


def main(args: argparse.Namespace, stages: Stages | None = None) -> int:
    """The work; `stages` stand in for Ray's three, for tests."""
    check_options(args)
    from enginerun import read_texts, speaker
    from lseg.bulk import FEATURE_PART, PART, cluster, into_parts, places, run_parts
    from lseg.bulk_inputs import Columns, list_rows
    from lseg.bulk_output import Output, check_job, left_to_do
    from lseg.bulk_stages import Wanted
    from lseg.labels import label_dtype
    from lseg.opening import Model
    from lseg.text_side import open_text_side

    say, columns, output = speaker(args), Columns(args.image_column, args.name_column), Output(args.output)
    vocabulary, templates, tokenize = (None, None, None) if args.features else read_texts(args)
    notes = list(vocabulary.labels.notes) if vocabulary else []
    if vocabulary:
        label_dtype(len(vocabulary.labels.names))
    rows, more = list_rows(args.inputs, args.output, columns)
    for note in (*notes, *more):
        say(f"note: {note}")
    output.prepare()
    with output.held():
        job = check_job(output, describe_job(args, vocabulary, templates), args.resume)
        output.take_over()
        left = left_to_do(rows, output.done(), output.where)
        if len(left) < len(rows):
            say(f"note: {len(rows) - len(left)} of {len(rows)} images are done already")
        if not left:
            return 0
        model = Model(args.weights, absolute(args.onnx), args.text_onnx and absolute(args.text_onnx), quiet=args.quiet)
        with open_text_side(args.backend, model) as side:
            text, size = embed(side, vocabulary, templates, tokenize, model), side.image_size
        wanted = Wanted(output, columns, vocabulary, args.unknown, args.rle, args.save_labels, args.features or 0, size)
        with cluster(args.address):
            where = places(args.actors, args.backend)
            output.write(job)
            parts = into_parts(left, args.part or (FEATURE_PART if args.features else PART))
            what = "GPU" if where.gpus else "CPU"
            work = f"{counted(len(left), 'image')} in {counted(len(parts), 'part')}"
            say(f"{work}, by {counted(where.actors, 'network')} on a {what}")
            start, bad = time.perf_counter(), 0
            found = run_parts(parts, engines_of(args, model, where.threads), wanted, text, where, args.quiet, stages)
            for _, sentences in found:
                bad += len(sentences)
                for sentence in sentences:
                    print(f"error: {sentence}", file=sys.stderr, flush=True)
            seconds = time.perf_counter() - start
        return tell(output, left, bad, seconds, say)


def check_options(args: argparse.Namespace) -> None:
    """Refuses numbers that cannot be, and options that would have no effect."""
    from lseg.options import check_unknown
    from lseg.recipes import check_batch

    for name in ("features", "actors", "part"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} cannot be: give 1 or more")
    check_batch(args.batch)
    check_unknown(args.unknown)
    if args.features:
        for name in ("save_labels", "rle", "unknown", "labels_file", "batch"):
            if getattr(args, name) not in (None, False):
                raise UserError(f"--{name.replace('_', '-')} has no meaning beside --features: leave one out")


def describe_job(args: argparse.Namespace, vocabulary, templates) -> dict[str, object]:
    """What decides the results: a job that is resumed must have been begun with the same."""
    from lseg.tensorfile import sha256, sha256_once
    from lseg.weights import resolve

    about: dict[str, object] = {"weights": sha256_once(resolve(args.weights))}
    if vocabulary:
        owner = vocabulary.owner.tolist()
        groups = [[t for t, o in zip(vocabulary.texts, owner, strict=True) if o == i] for i in dict.fromkeys(owner)]
        about |= {"labels": groups, "templates": templates}
    about |= {"text encoder": sha256(args.text_onnx) if args.text_onnx else None}
    names = ("unknown", "rle", "save_labels", "features", "backend", "precision", "matmul")
    return about | {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}


def embed(side, vocabulary, templates, tokenize, model):
    """The labels' embeddings, float32 [T, D], once for all workers; None for features."""
    from lseg.text_cache import FILE, TextCache
    from lseg.vocabulary import embed_texts

    if not vocabulary:
        return None
    return embed_texts(
        vocabulary.texts, templates, side.encode_text, TextCache(model.onnx / FILE, side.text_encoder), tokenize
    )


def engines_of(args: argparse.Namespace, model, threads: int):
    from lseg.bulk_stages import Engines

    weights = args.weights if args.weights == "demo" else str(absolute(args.weights))
    text_onnx = str(model.text_onnx) if model.text_onnx else None
    folder, build = str(absolute(args.engines)), (args.precision, args.matmul, args.opt_level)
    return Engines(args.backend, weights, str(model.onnx), text_onnx, folder, *build, args.batch, threads)


def absolute(path: str | Path) -> Path:
    """Workers have a current directory of their own."""
    return Path(path).absolute()


def tell(output: Output, left: list[Row], bad: int, seconds: float, say) -> int:
    """Reads back what stands in the parts, and tells of it; returns the exit status."""
    from lseg.bulk_output import plain

    done = output.done()
    missing = [row.shown for row in left if plain(row.name) not in done]
    rate = (len(left) - len(missing)) / seconds
    say(f"{counted(len(left) - len(missing), 'image')} in {seconds:.1f} s, {rate:.2f} a second, in {output.where}")
    if len(missing) > bad:
        raise UserError(f"{missing[0]} and {len(missing) - bad - 1} more are in no part: go on with --resume")
    if bad:
        raise UserError(f"{bad} of {len(left)} images could not be read and are left out: see above")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run(lambda: main(parse_args()), interrupted="go on with --resume")
