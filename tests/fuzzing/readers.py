"""The readers under test: each takes a case's folder and does with its files what a script does.

What a script would go on to do with what was read is part of it, as far as it takes no network. The stub runners stand
for the networks alone.
"""

from __future__ import annotations

from argparse import Namespace
from functools import cache
from pathlib import Path

import numpy as np

from lseg.errors import say

TEXT = np.eye(2, 8, dtype=np.float32)


def notes(lines: list[str] | tuple[str, ...]) -> None:
    for line in lines:
        say(f"note: {line}")


def only(folder: Path, *suffixes: str) -> Path:
    """The case's file that ends so."""
    return next(file for file in sorted(folder.iterdir()) if file.suffix in suffixes)


@cache
def tokenizer():
    from lseg.tokenizer import Tokenizer

    return Tokenizer()


class Stub:
    """A runner without a network: every pixel has the first label."""

    image_size, text_encoder, callers = 8, "stub", 1

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        return np.resize(TEXT, (len(tokens), 8))

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return np.full((len(pixels), 8, 4, 4), 8**-0.5, np.float32)

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False):
        from lseg.runner import Segmentation, Timings

        return Segmentation(
            np.zeros((len(pixels), 8, 8), np.uint8), np.ones((len(pixels), 8, 8), np.float32), Timings()
        )


def vocabulary():
    from lseg.labels import parse_labels
    from lseg.vocabulary import Vocabulary

    return Vocabulary.of(parse_labels("car, sky"))


def checkpoint(folder: Path) -> None:
    """Everything is read, each number of it too."""
    from lseg.checkpoint import load

    for tensor in load(only(folder, ".ckpt", ".safetensors")).tensors.values():
        tensor.clone()


def model(folder: Path) -> None:
    from lseg.checkpoint import load, load_image_encoder, load_text_encoder

    weights = load(only(folder, ".ckpt", ".safetensors"))
    load_image_encoder(weights)
    load_text_encoder(weights)


def clip_config():
    from lseg.text import TextConfig

    return TextConfig(vocabulary=6, width=4, layers=1, heads=1, embedding=4)


def clip(folder: Path) -> None:
    from lseg.checkpoint import clip_text_state_dict

    clip_text_state_dict(only(folder, ".ckpt", ".safetensors"), clip_config())


def onnx_file(folder: Path) -> None:
    """As recipes, testlseg.py and polygraph.sh read it: its notes, its end, its products."""
    from lseg.onnx_file import check_weights, read_metadata
    from lseg.polygraph import print_ranks
    from lseg.scoring import cut_head, label_graph, load_encoder

    for path in sorted(folder.glob("*.onnx"))[:1]:
        metadata = read_metadata(path)
        check_weights(path, metadata, str(metadata.get("kind")), str(metadata.get("weights_sha256")), "export it again")
        encoder = load_encoder(path)
        if metadata.get("kind") == "lseg":
            label_graph(cut_head(encoder))
    for path in sorted(folder.glob("*.onnx"))[:1]:
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()):
            print_ranks(Namespace(files=[path]))


def backend(folder: Path) -> None:
    """ONNX Runtime's, from opening to a label map."""
    from fuzzing.seeds import exported_folder
    from lseg.run_onnxruntime import OnnxRuntimeRunner

    with OnnxRuntimeRunner(str(exported_folder().parent / "tiny.safetensors"), folder, device="cpu") as runner:
        text = runner.encode_text(tokenizer()(["car", "sky"]))
        runner.segment(np.zeros((1, runner.image_size, runner.image_size, 3), np.uint8), text)


def text_onnx(folder: Path) -> None:
    from lseg.run_onnxruntime import TextSession

    TextSession(folder / "clip_textual.onnx")(tokenizer()(["car", "sky"]))


def triton(folder: Path) -> None:
    from fuzzing.seeds import exported_folder
    from lseg.triton import write_repository

    write_repository(folder / "out", folder, str(exported_folder().parent / "tiny.safetensors"), "fp16")


def engine(folder: Path) -> None:
    """The sidecar as it was made, and as it is now."""
    import json

    from fuzzing.seeds import sidecars
    from lseg.engine import build_seconds, engine_path, mismatch

    made_from = json.loads(sidecars(folder)[0]["e.json"])
    del made_from["engine_sha256"], made_from["build_seconds"]
    engine_path(folder, made_from)
    if mismatch(folder / "e.engine", made_from) is None:
        build_seconds(folder / "e.engine")


def labels(folder: Path) -> None:
    from lseg.labels import label_dtype, label_map_files, palette, read_labels_file
    from lseg.vocabulary import with_synonyms

    found = with_synonyms(read_labels_file(folder / "labels.txt"))
    notes(found.labels.notes)
    tokenizer()(found.texts)
    names = found.labels.names
    label_dtype(len(names))
    label_map_files("x.png", np.zeros((2, 2), np.int32), names, palette(names))


def texts(folder: Path) -> None:
    from lseg.labels import label_dtype, palette, parse_labels

    found = parse_labels((folder / "t.txt").read_bytes().decode("utf-8", "surrogateescape"))
    notes(found.notes)
    tokenizer()(found.names)
    label_dtype(len(found.names))
    palette(found.names)


def templates(folder: Path) -> None:
    from lseg.text_cache import TextCache
    from lseg.vocabulary import embed_texts, load_templates

    found = load_templates(str(folder / "t.txt"))
    embed_texts(["car", "sky"], found, Stub().encode_text, TextCache(folder / "none", None), tokenizer())


def points(folder: Path) -> None:
    from lseg.features import Features, read_points

    Features(Stub().encode_image(np.zeros(1))[0], 8, 50, 60).at(read_points(only(folder, ".txt", ".npy")))


def regions(folder: Path) -> None:
    from lseg.features import Features, read_region_mask

    mask = read_region_mask(only(folder, ".png", ".npy"))
    Features(Stub().encode_image(np.zeros(1))[0], 8, 7, 9).regions(mask)


def features(folder: Path) -> None:
    from lseg.features import query, read_features

    arrays, _ = read_features(only(folder, ".npy", ".safetensors"))
    if "features" in arrays:
        query(arrays["features"], np.eye(2, 16, dtype=np.float32))


def image(folder: Path) -> None:
    from lseg.image import read_image, to_pixels

    to_pixels(read_image(folder / "a.jpg"), 16)


def page(folder: Path) -> None:
    """As the page opens what was uploaded."""
    from lseg.page_work import Desk, Limits, Upload
    from lseg.runner import Timings

    work = Desk.__new__(Desk)
    work.limits = Limits()
    work._load(Upload("a.jpg", (folder / "a.jpg").read_bytes()), Timings())


def photos(folder: Path) -> None:
    """As enginerun.py does: found, named, decoded, labelled, and written below `out`."""
    from lseg.photos import Wanted, open_tasks, segment_photos
    from lseg.runner import Timings
    from lseg.sources import list_photos

    source = next(file for file in sorted(folder.iterdir()) if file.suffix in (".tar", ".txt"))
    found, told = list_photos([source])
    notes(told)
    wanted = Wanted(folder / "out", labels=True, lines=folder / "out" / "l.jsonl", quiet=True)
    segment_photos(open_tasks(found, wanted), Stub(), TEXT, vocabulary(), wanted, Timings(), say)


def bulk(folder: Path) -> None:
    """As lseg_ray.py does, without Ray: rows, parts, label maps below `out`, and what stands there afterwards."""
    import pickle

    from lseg.bulk import into_parts
    from lseg.bulk_inputs import Columns, list_rows
    from lseg.bulk_output import Output, check_job, left_to_do
    from lseg.bulk_stages import Wanted, decode, pack, write
    from lseg.tally import tally_at

    source = only(folder, ".tar", ".parquet")
    output, columns = Output(str(folder / "out")), Columns("image", "name" if len(str(folder)) % 3 else None)
    remote = source.suffix == ".tar"  # whose other reader is in lseg.sources
    rows, told = list_rows([f"file://{source}" if remote else str(source)], output.where, columns)
    notes(told)
    output.prepare()
    output.write(check_job(output, {"weights": "0"}, False))
    wanted = Wanted(output, columns, vocabulary(), None, False, True, 0, 8)
    for rows_of_part in into_parts(left_to_do(rows, output.done(), output.where), 4):
        part = decode(pack(rows_of_part), wanted)
        sizes, zeros = [size for _, size in pickle.loads(part["rows"])], np.zeros((8, 8))
        tallies = [tally_at(zeros.astype(np.uint8), zeros, len(wanted.vocabulary.labels.names), w, h) for h, w in sizes]
        made = {"tallies": pickle.dumps(tallies), "maps": bytes(len(sizes) * 64), "made_by": "a stub"}
        bad = pickle.loads(write({**part, **made}, wanted)["bad"])
        notes(bad)
    output.done()


def job(folder: Path) -> None:
    import json

    from fuzzing.seeds import jobs
    from lseg.bulk_inputs import Row
    from lseg.bulk_output import Output, check_job, left_to_do

    output = Output(str(folder / "job"))
    known = json.loads(jobs(folder)[0]["job/job.json"])
    del known["format"]
    check_job(output, known, True)
    left_to_do([Row("a", "a.png", "/x/a.png")], output.done(), output.where)


def video(folder: Path) -> None:
    from lseg.video import open_video, segment_video

    opened = open_video(str(folder / "v.mp4"))
    colours = np.zeros((2, 3), np.uint8)
    found = segment_video(opened, lambda f: np.zeros(f.shape[:2], int), folder / "out" / "v.mp4", colours, limit=6)
    notes(found.notes)


def data_set(folder: Path) -> None:
    from lseg.dataset import find_dataset
    from lseg.image import read_image

    found = find_dataset(folder / "d")
    tokenizer()(found.labels)
    for photo, mask in found.pairs:
        found.mask(mask, read_image(photo).shape)


def report(folder: Path) -> None:
    from lseg.report import load_reports, markdown

    for one in load_reports([folder / "r.json", folder / "s.json"]):
        markdown(one)


def reference(folder: Path) -> None:
    """What is read is compared with, as it was with what was written."""
    from lseg.accuracy import Expected, measure_accuracy
    from lseg.dataset import Dataset

    photo = np.zeros((8, 8, 3), np.uint8)
    pairs = ((folder / "d" / "a.jpg", folder / "d" / "a.png"),)
    expected = Expected.load(folder / "r.npz", "inputs")
    with np.errstate(all="ignore"):
        measure_accuracy(
            Stub(), np.zeros((2, 77), np.int32), [photo], Dataset("d", pairs, ("car", "sky")), "whole", expected
        )


def text_cache(folder: Path) -> None:
    from lseg.text_cache import TextCache

    tokens = np.arange(308, dtype=np.int32).reshape(4, 77)
    cache = TextCache(folder / "out" / "c.sqlite", "e")
    for _ in range(2):
        found = cache.get(tokens, lambda places: np.resize(np.eye(4, 8, dtype=np.float32)[places], (len(places), 8)))
        assert found.shape == (4, 8) and np.isfinite(found).all()


def json_lines(folder: Path) -> None:
    from lseg.results import JsonLines, photos_in

    path = folder / "out" / "l.jsonl"
    found = photos_in(path)
    with JsonLines(path, {name for name in found if name == "a.png"}) as file:
        file.write({"photo": "a.png"})
