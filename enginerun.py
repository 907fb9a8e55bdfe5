"""Segments photos by words.

    python enginerun.py                                            a bundled photo, the demo weights
    python enginerun.py PHOTO.jpg FOLDER --labels "car, road, sky, other"
    python enginerun.py PHOTO.jpg --weights demo_e200.ckpt         the official weights

For each photo, a picture of the photo, the overlay and the legend goes to image/, as NAME_lseg.png for a photo of that
name; of a folder's photos, or an archive's, in its tree. ONNX files and TensorRT engines that are missing are made
first. A photo that cannot be read is told and left out, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lseg.errors import Parser, UserError, run, short

if TYPE_CHECKING:
    import numpy as np

    from lseg.photos import Task, Wanted
    from lseg.runner import Runner, Timings
    from lseg.sources import Photo
    from lseg.tokenizer import Tokenizer
    from lseg.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent
PHOTO = ROOT / "image" / "temple.jpg"
LABELS = "sky, building, tree, road, pavement, person, car, other"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "photos",
        nargs="*",
        type=lambda text: str(short(text)) if text else text,
        default=[str(short(PHOTO))],
        metavar="PHOTO",
        help="images, folders (with all below them), quoted patterns, .txt lists of paths, .tar archives",
    )
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--labels", default=LABELS, help=f"words, separated by commas (default: {LABELS})")
    labels.add_argument(
        "--labels-file", type=short, metavar="FILE", help="labels, one a line; ADE20K's objectInfo150; or JSON"
    )
    parser.add_argument(
        "--templates",
        default="none",
        metavar="T",
        help="prompts whose embeddings are averaged: none (default: the bare word), clip (CLIP's 80), or a file",
    )
    parser.add_argument("--weights", default="demo", help="'demo', demo_e200.ckpt, or a state dict (.pt, .safetensors)")
    parser.add_argument("--backend", choices=("auto", "tensorrt", "onnxruntime", "torch"), default="auto")
    parser.add_argument(
        "--onnx", type=short, default=str(ROOT / "onnx"), metavar="DIR", help="folder of the exported files (onnx/)"
    )
    parser.add_argument("--text-onnx", type=short, metavar="FILE", help="a ready-made CLIP text encoder as ONNX")
    engine = parser.add_argument_group("TensorRT engines")
    engine.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"), default="fp16", help="default: fp16")
    engine.add_argument("--matmul", choices=("4d", "3d", "2d"), help="form of attention's products (default: 4d)")
    engine.add_argument("--opt-level", type=int, default=3, choices=range(6), help="the builder's effort (default: 3)")
    engine.add_argument(
        "--batch", type=int, choices=range(1, 9), metavar="N", help="photos, or windows, a run of the network, 1 to 8"
    )
    engine.add_argument(
        "--engines", type=short, default=str(ROOT / "engines"), metavar="DIR", help="folder of the engines (engines/)"
    )
    parser.add_argument(
        "--inference",
        choices=("whole", "window", "multiscale"),
        default="whole",
        help="the photo squashed whole (default); in windows, for detail; in windows of six scales and the mirror, as "
        "the official figures are taken",
    )
    parser.add_argument("--re-export", action="store_true", help="export the ONNX files again, whatever is there")
    parser.add_argument(
        "--output", type=short, default=str(ROOT / "image"), metavar="DIR", help="folder of the pictures (image/)"
    )
    more = parser.add_argument_group("more than pictures")
    more.add_argument("--save-labels", action="store_true", help="write each label map too (PNG of indices and JSON)")
    more.add_argument("--save-scores", action="store_true", help="write every label's cosines too (float16 .npy)")
    more.add_argument("--jsonl", type=short, metavar="FILE", help="write each photo's labels as a line of JSON")
    more.add_argument("--rle", action="store_true", help="with --jsonl: masks too, in COCO's run-length encoding")
    features = parser.add_argument_group("embeddings for mapping, in place of pictures")
    features.add_argument("--features", type=short, metavar="OUT", help="a folder, or an .npy or .safetensors file")
    features.add_argument("--stride", type=int, metavar="N", help="of every Nth pixel (default: the network's grid)")
    features.add_argument("--points", type=short, metavar="FILE", help="of these pixels: 'x y' a line, or an .npy")
    features.add_argument("--regions", type=short, metavar="FILE", help="averaged over a mask's regions: PNG of ids")
    video = parser.add_argument_group("videos, in place of photos")
    video.add_argument("--video", metavar="SOURCE", help="a file, a URL, or a camera's number")
    video.add_argument("--frames", type=int, metavar="N", help="end after N frames")
    serving = parser.add_argument_group("serving, in place of photos")
    serving.add_argument(
        "--export-triton", type=short, metavar="DIR", help="write a model repository for NVIDIA Triton"
    )
    parser.add_argument(
        "--unknown", type=float, metavar="T", help="leave pixels unlabelled whose best cosine is below T, -1 to 1"
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out photos whose files are there already, made with the same"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    from lseg.options import check_options

    check_options(args, parse_args([]))
    if args.export_triton:
        return export_triton(args)
    if args.video is not None:
        return segment_a_video(args)
    return write_features_of(args) if args.features else segment_the_photos(args)


def segment_the_photos(args: argparse.Namespace) -> int:
    from lseg.labels import label_dtype
    from lseg.photos import made_otherwise, open_tasks, segment_photos

    vocabulary, *prompts = read_texts(args)
    wanted = what_is_wanted(args, vocabulary, prompts[0])
    label_dtype(len(vocabulary.labels.names))  # says so now if a label map cannot hold that many
    photos, notes = find_photos(args)
    for note in (*vocabulary.labels.notes, *notes):
        speaker(args)(f"note: {note}")
    tasks = open_tasks(photos, wanted, vocabulary.labels.names)
    if wanted.resume and (others := made_otherwise(tasks, wanted)):
        speaker(args)(f"note: {others} pictures were made with other labels, weights or options, and are made anew")

    def work(tasks: list[Task], runner: Runner, timings: Timings) -> tuple[int, str]:
        text, kept = embed(args, vocabulary, *prompts, runner, timings)
        return segment_photos(tasks, runner, text, vocabulary, wanted, timings, speaker(args)), kept

    return run_photos(args, photos, tasks, args.output, work)


def write_features_of(args: argparse.Namespace) -> int:
    from lseg.photo_features import FILES, FeatureFiles, write_photo_features

    wanted = FeatureFiles(args.features, args.stride, args.points, args.regions, args.resume, args.weights)
    photos, notes = find_photos(args)
    tasks = wanted.tasks(photos)
    for note in notes:
        speaker(args)(f"note: {note}")
    if others := wanted.made_otherwise(tasks):
        speaker(args)(f"note: {others} files were made with something else, or do not tell, and are made anew")
    folder = args.features.parent if args.features.suffix.lower() in FILES else args.features

    def work(tasks: list[Task], runner: Runner, timings: Timings) -> tuple[int, str]:
        say = speaker(args)
        return write_photo_features(tasks, runner, wanted, timings, say, args.quiet), ""

    return run_photos(args, photos, tasks, folder, work)


def segment_a_video(args: argparse.Namespace) -> int:
    from lseg.labels import label_dtype
    from lseg.runner import Timings
    from lseg.video import is_live, open_video
    from lseg.video_files import VideoFiles, segment_to_files

    say = speaker(args)
    vocabulary, *prompts = read_texts(args)
    label_dtype(len(vocabulary.labels.names))
    for note in vocabulary.labels.notes:
        say(f"note: {note}")
    timings = Timings()
    video = None if is_live(args.video) else open_video(args.video)
    with output_folder(args.output), open_runner(args, []) as runner:
        video = video or open_video(args.video)  # frames that come by the clock are not to wait for the engines
        text, _ = embed(args, vocabulary, *prompts, runner, timings)
        files = VideoFiles(args.output, args.inference, args.unknown, args.save_labels, args.frames, args.quiet)
        segment_to_files(video, runner, text, vocabulary, files, say)
    return 0


def export_triton(args: argparse.Namespace) -> int:
    from lseg.opening import Model, check_before_export, export_missing
    from lseg.triton import write_repository

    model = Model(args.weights, args.onnx, None, args.re_export, args.quiet)
    check_before_export(model, [])
    export_missing(model)
    with output_folder(args.export_triton):
        for path in write_repository(args.export_triton, args.onnx, args.weights, args.precision):
            speaker(args)(f"wrote {path}")
    return 0


def speaker(args: argparse.Namespace) -> Callable[[str], object]:
    """What takes the lines for the user."""
    from lseg import errors

    return (lambda _: None) if args.quiet else errors.say


def read_texts(args: argparse.Namespace) -> tuple[Vocabulary, list[str], Tokenizer]:
    """The labels and the templates, each text of which CLIP takes, and CLIP's tokenizer, whose loading takes time."""
    from lseg.tokenizer import Tokenizer
    from lseg.vocabulary import load_templates

    vocabulary, templates = read_labels(args), load_templates(args.templates)
    tokenize, longest = Tokenizer(), max(templates, key=len)
    tokenize([longest.replace("{}", text) for text in vocabulary.texts])  # says so now if one is too long
    return vocabulary, templates, tokenize


def find_photos(args: argparse.Namespace) -> tuple[list[Photo], list[str]]:
    from lseg.sources import list_photos

    return list_photos(args.photos)


def embed(
    args: argparse.Namespace,
    vocabulary: Vocabulary,
    templates: list[str],
    tokenize: Tokenizer,
    runner: Runner,
    timings: Timings,
) -> tuple[np.ndarray, str]:
    """The texts' embeddings, float32 [T, D], and words on how many were kept from earlier runs."""
    from lseg.text_cache import FILE, TextCache
    from lseg.vocabulary import embed_texts

    texts, bar = vocabulary.texts, iter if args.quiet else progress
    cache = TextCache(args.onnx / FILE, runner.text_encoder)
    text = timings.measure(
        "encode_text", lambda: embed_texts(texts, templates, runner.encode_text, cache, tokenize, bar)
    )
    return text, f" ({cache.found} of {len(texts)} kept)" if cache.found else ""


@contextmanager
def open_runner(args: argparse.Namespace, photos: list[Photo]) -> Iterator[Runner]:
    """The backend, open, told of in a line; what is missing of its files is made first."""
    from lseg.opening import Model, check_before_export, open_backend
    from lseg.runner import EngineOptions, choose_backend

    say = speaker(args)
    model = Model(args.weights, args.onnx, args.text_onnx, args.re_export, args.quiet)
    if choose_backend(args.backend) != "torch":
        check_before_export(model, photos)
    engines = EngineOptions(args.engines, args.precision, args.matmul, args.opt_level, say, args.batch)
    with open_backend(args.backend, model, engines, say) as runner:
        about = "demo (they know street scenes; see the README for the official ones)"
        say(f"{runner.identity}; weights: {about if args.weights == 'demo' else args.weights}")
        yield runner


def run_photos(
    args: argparse.Namespace,
    photos: list[Photo],
    tasks: list[Task],
    folder: Path,
    work: Callable[[list[Task], Runner, Timings], tuple[int, str]],
) -> int:
    """Opens the backend, does the work, and tells how long it took; returns the exit status."""
    from lseg.runner import Timings

    say, timings = speaker(args), Timings()
    if len(tasks) < len(photos):
        say(f"note: {len(photos) - len(tasks)} of {len(photos)} photos are done already")
    if not tasks:
        return 0
    lines = output_folder(args.jsonl.parent) if args.jsonl else nullcontext()
    with output_folder(folder), lines, open_runner(args, photos) as runner:
        start = time.perf_counter()
        bad, kept = work(tasks, runner, timings)
        seconds = time.perf_counter() - start
    say(report(timings, len(tasks) - bad, kept))
    if len(tasks) > 1:
        say(f"{len(tasks) - bad} photos in {seconds:.1f} s, {(len(tasks) - bad) / seconds:.2f} a second")
    if bad:
        print(f"error: {bad} of {len(tasks)} photos could not be read and are left out: see above", file=sys.stderr)
    return 2 if bad else 0


def what_is_wanted(args: argparse.Namespace, vocabulary: Vocabulary, templates: list[str]) -> Wanted:
    """What to make of each photo."""
    from lseg.made_with import digest
    from lseg.photos import Wanted

    return Wanted(
        output=args.output,
        inference=args.inference,
        unknown=args.unknown,
        labels=args.save_labels,
        scores=args.save_scores,
        lines=args.jsonl,
        rle=args.rle,
        resume=args.resume,
        quiet=args.quiet,
        batch=args.batch or 1,
        made_with=digest(args.weights, args.text_onnx, vocabulary, templates, args.inference, args.unknown),
    )


def read_labels(args: argparse.Namespace) -> Vocabulary:
    """The labels of --labels or --labels-file, with the synonyms that the file has."""
    from lseg.labels import parse_labels, read_labels_file
    from lseg.vocabulary import Vocabulary, with_synonyms

    if args.labels_file:
        return with_synonyms(read_labels_file(args.labels_file))
    if "," not in args.labels and args.labels.endswith((".txt", ".json", ".csv")) and os.path.isfile(args.labels):
        raise UserError(f"{args.labels} is a file, not a label: give it with --labels-file")
    return Vocabulary.of(parse_labels(args.labels))


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Makes the folder, proves that it can be written, and takes it away again if an error leaves it empty."""
    from lseg.files import writable_folder

    missing = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    writable_folder(path)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first that is not empty ends it
            for folder in missing:
                folder.rmdir()
        raise


def progress(steps: Sequence) -> Iterator:
    """A progress bar for texts where there are many, on a terminal."""
    from tqdm import tqdm

    return tqdm(steps, desc="texts", disable=None if len(steps) > 3 else True, leave=False)


def report(timings: Timings, photos: int, kept: str = "") -> str:
    """One line with the milliseconds of each stage; `kept` says what was not encoded anew."""
    from lseg.runner import STAGES

    per = "" if photos == 1 else f" in all for {photos} photos"
    stages = {name: f"{name} {timings.milliseconds.get(name, 0):.1f}" for name in STAGES}
    stages["encode_text"] += kept
    return f"milliseconds{per}: {', '.join(stages.values())}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run(lambda: main(parse_args()))
