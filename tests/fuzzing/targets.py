"""Every kind of file that the project reads: what it begins as, how it is changed, and what reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzzing import arrays, formats, hostile, readers, seeds
from fuzzing.formats import pickle_ops, png_chunks, safetensors_header, zip_archive
from fuzzing.mutate import Rng, chance, json_file, mixed, mutate_bytes, pick, text_file
from fuzzing.seeds import Tree

Change = Callable[[bytes, Rng, Sequence[bytes]], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        name: what it is called.
        read: takes a case's folder.
        seeds: valid cases, made with the help of a folder.
        change: mutates the case's first file.
        hostile: cases made by hand.
        warm: read the seeds once, unwatched, before the cases.
        share: of all cases, in comparison with the others': more for what takes less time.
    """

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[Path], list[Tree]]
    change: Change = mutate_bytes
    hostile: Callable[[Path], list[Tree]] = lambda folder: []
    share: float = 1.0
    warm: bool = True


def _checkpoint(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    if data.startswith(b"PK"):
        change: Change = zip_archive
    else:
        change = pickle_ops if data.startswith(b"\x80") else safetensors_header
    return change(data, rng, others)


def _points(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    return (arrays.npy_header if data.startswith(b"\x93NUMPY") else text_file)(data, rng, others)


def _features(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    if data.startswith(b"\x93NUMPY"):
        return arrays.npy_header(data, rng, others)
    return (json_file if data.startswith(b"{") else safetensors_header)(data, rng, others)


def _mask(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    return (arrays.npy_header if data.startswith(b"\x93NUMPY") else png_chunks)(data, rng, others)


def _picture(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    return (png_chunks if data.startswith(b"\x89PNG") else mutate_bytes)(data, rng, others)


def _set(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    return (_picture if data[:1] in b"\x89\xff" else text_file)(data, rng, others)


def _part(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    return (mutate_bytes if data.startswith(b"PAR1") else json_file)(data, rng, others)


def _list(data: bytes, rng: Rng, others: Sequence[bytes] = ()) -> bytes:
    from fuzzing.mutate import odd_name

    if chance(rng, 0.5):
        names = ["a.png", "deep/b.png", *(odd_name(rng, formats.OUTSIDE) for _ in range(3))]
        return "\n".join(pick(rng, names) for _ in range(3)).encode("utf-8", "replace")
    return text_file(data, rng, others)


def with_bytes(change: Change, share: float = 0.4) -> Change:
    return mixed((1 - share, change), (share, mutate_bytes))


_tar = mixed((0.4, formats.tar_members), (0.35, formats.tar_header), (0.25, mutate_bytes))
_onnx = with_bytes(arrays.onnx_fields, 0.3)

TARGETS = (
    Target("checkpoint", readers.checkpoint, seeds.checkpoints, with_bytes(_checkpoint), hostile.checkpoints, 2),
    Target("clip", readers.clip, seeds.clip_files, with_bytes(_checkpoint), hostile.checkpoints, 1.5),
    Target("model", readers.model, seeds.safetensors, with_bytes(safetensors_header, 0.2), hostile.models, 0.05),
    Target("onnx", readers.onnx_file, seeds.exported, _onnx, hostile.onnx_files, 0.1),
    Target("onnxruntime", readers.backend, seeds.exported, _onnx, hostile.onnx_files, 0.04),
    Target("text_onnx", readers.text_onnx, lambda f: [dict(list(t.items())[:1]) for t in seeds.exported(f)
           if next(iter(t)) == "clip_textual.onnx"], _onnx, hostile.onnx_files, 0.15),
    Target("triton", readers.triton, seeds.exported, _onnx, hostile.onnx_files, 0.01),
    Target("engine", readers.engine, seeds.sidecars, json_file, hostile.sidecar_trees, 10),
    Target("labels", readers.labels, seeds.label_files, mixed((1, json_file), (1, text_file)),
           lambda _: hostile.long_texts("labels.txt") + hostile.json_trees("labels.txt", {}), 5),
    Target("texts", readers.texts, seeds.texts, text_file, lambda _: hostile.long_texts("t.txt"), 6),
    Target("templates", readers.templates, seeds.templates, text_file, lambda _: hostile.long_texts("t.txt"), 2),
    Target("points", readers.points, seeds.points, with_bytes(_points), share=12),
    Target("regions", readers.regions, seeds.masks, with_bytes(_mask), share=12),
    Target("features", readers.features, seeds.features, with_bytes(_features), share=10),
    Target("list", readers.photos, seeds.path_lists, _list, hostile.path_lists, 0.1),
    Target("image", readers.image, seeds.pictures, with_bytes(_picture), hostile.images, 14),
    Target("page", readers.page, seeds.pictures, with_bytes(_picture), hostile.images, 5),
    Target("tar", readers.photos, seeds.tars, _tar, hostile.tars, 0.06),
    Target("bulk_tar", readers.bulk, seeds.tars, _tar, hostile.tars, 1.2),
    Target("bulk_parquet", readers.bulk, seeds.parquets, with_bytes(arrays.parquet_table), hostile.parquets, 1.2),
    Target("video", readers.video, seeds.videos, with_bytes(formats.atoms, 0.6), hostile.videos, 0.06),
    Target("dataset", readers.data_set, seeds.data_sets, with_bytes(_set), share=8),
    Target("report", readers.report, seeds.reports, json_file, hostile.report_trees, 6),
    Target("reference", readers.reference, seeds.references, mixed((1, zip_archive), (1, mutate_bytes)),
           hostile.references, 2),
    Target("text_cache", readers.text_cache, seeds.caches, mutate_bytes, hostile.caches, 0.3),
    Target("job", readers.job, seeds.jobs, with_bytes(_part), hostile.job_trees, 2),
    Target("json_lines", readers.json_lines, seeds.lines, mixed((2, text_file), (1, mutate_bytes)), share=8),
)  # fmt: skip


def make_case(target: Target, cases: list[Tree], rng: Rng) -> Tree:
    """A seed with its first file changed; a few seeds stay as they are."""
    tree = dict(pick(rng, cases))
    if chance(rng, 0.02):
        return tree
    name = next(iter(tree))
    others = [next(iter(case.values())) for case in cases]
    try:
        tree[name] = target.change(tree[name], rng, others)
    except Exception:  # a way of changing it that leads nowhere, such as a number that a format cannot hold
        tree[name] = mutate_bytes(tree[name], rng, others)
    return tree
