"""Valid files to begin from, small, and made by the project's own writers wherever it has them."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np

from fuzzing.arrays import npy

Tree = dict[str, bytes]  # a case: files by their names, the first of which is the one that is changed


def exported_folder() -> Path:
    """The tiny weights' exported files, beside whose folder the weights are; made before the readers' processes are."""
    return Path(os.environ["LSEG_FUZZ_EXPORTED"])


def files_below(folder: Path) -> Tree:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def picture(suffix: str = ".png", size: tuple[int, int] = (9, 7), kind: type = np.uint8, channels: int = 3) -> bytes:
    rng = np.random.default_rng(size[0])
    pixels = rng.integers(0, np.iinfo(kind).max, (size[1], size[0], channels)).astype(kind)
    done, data = cv2.imencode(suffix, pixels.squeeze())
    if not done:
        raise ValueError(f"this OpenCV writes no {suffix}")
    return data.tobytes()


def pictures(folder: Path) -> list[Tree]:
    plain = [(end, np.uint8, 3) for end in (".png", ".jpg", ".bmp", ".tif", ".webp")]
    kinds = [*plain, (".png", np.uint8, 4), (".png", np.uint16, 1), (".tif", np.uint16, 3), (".png", np.uint8, 1)]
    kinds += [(".ppm", np.uint8, 3), (".jp2", np.uint8, 3), (".gif", np.uint8, 3), (".jpg", np.uint8, 1)]
    trees = []
    for suffix, kind, channels in kinds:
        try:
            size = (40, 32) if suffix == ".jp2" else (9, 7)
            trees.append({"a.jpg": picture(suffix, size, kind, channels)})
        except (cv2.error, ValueError):  # a format that this OpenCV does not write
            continue
    trees.append({"a.jpg": cv2.imencode(".tif", np.ones((5, 6), np.float32))[1].tobytes()})
    trees.append(
        {"a.jpg": cv2.imencode(".jpg", np.ones((40, 30, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()}
    )
    return trees


def clip_files(folder: Path) -> list[Tree]:
    """A tiny text encoder as CLIP's files hold one, in both formats, and LSeg's checkpoints."""
    import torch

    from fuzzing.readers import clip_config
    from lseg.text import CLIPTextEncoder

    folder.mkdir(parents=True, exist_ok=True)
    trees = []
    for new in (True, False):
        torch.save(CLIPTextEncoder(clip_config()).state_dict(), folder / "c.ckpt", _use_new_zipfile_serialization=new)
        trees.append({"w.ckpt": (folder / "c.ckpt").read_bytes()})
    return trees * 3 + checkpoints(folder)


def checkpoints(folder: Path) -> list[Tree]:
    """Checkpoints of torch.save's two formats, PyTorch Lightning's, and TorchScript's, of a few numbers each."""
    import torch
    from checkpoints import write_lightning

    state = {
        "net.scratch.head1.weight": torch.randn(4, 3, 1, 1),
        "net.scratch.head1.bias": torch.randn(4).half(),
        "net.pretrained.model.pos_embed": torch.randn(1, 5, 3),
        "net.pretrained.model.norm.weight": torch.nn.Parameter(torch.randn(3)),
        "net.clip_pretrained.token_embedding.weight": torch.randn(6, 4),
        "net.clip_pretrained.logit_scale": torch.tensor(4.6),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "w.ckpt"
    trees = []
    for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}):
        torch.save(state, path, **options)
        trees.append({path.name: path.read_bytes()})
    for legacy in (False, True):
        write_lightning(path, state, legacy=legacy)
        trees.append({path.name: path.read_bytes()})
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.LayerNorm(2)))
    file = io.BytesIO()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), file)
    trees.append({path.name: file.getvalue()})
    return [*trees, *safetensors(folder)]


def safetensors(folder: Path) -> list[Tree]:
    """The project's own checkpoint, with a few words in the text encoder's table."""
    import checkpoints as own

    from lseg.checkpoint import save_safetensors

    image, text = own.tiny_config()
    tensors = own.tiny_weights(1)
    table = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[table] = tensors[table][:64]
    path = folder / "w.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, tensors, image, replace(text, vocabulary=64))
    return [{path.name: path.read_bytes()}]


def label_files(folder: Path) -> list[Tree]:
    ade = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n2\t0.1\t1\t1\t0\tbuilding, edifice\n"
    csv = "Idx,Ratio,Train,Val,Stuff,Name\n1,0.1,1,1,1,wall\n2,0.1,1,1,0,building;edifice\n"
    texts = ["car\nroad, sky\nother\n", ade, csv]
    values = [["car", "road"], [["car", "auto"], "sky"], {"car": ["auto", "vehicle"], "sky": "heaven", "road": []}]
    return [{"labels.txt": text.encode()} for text in (*texts, *map(json.dumps, values))]


def points(folder: Path) -> list[Tree]:
    array = npy(np.array([[1, 2], [30, 40]]))
    return [{"p.txt": b"# x y\n1 2\n30,40  # a corner\n+5\t6\n"}, {"p.npy": array}]


def masks(folder: Path) -> list[Tree]:
    one = [{"m.png": picture(kind=kind, channels=1)} for kind in (np.uint8, np.uint16)]
    return [*one, {"m.npy": npy(np.arange(63).reshape(7, 9))}, {"m.png": picture()}]


def features(folder: Path) -> list[Tree]:
    from lseg.features import write_features

    vectors = np.random.default_rng(1).standard_normal((3, 4, 16)).astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    write_features(folder / "f.npy", {"features": vectors}, {"stride": 2, "photo": "a"})
    write_features(folder / "g.safetensors", {"features": vectors, "ids": np.arange(3)}, {"regions": "m"})
    both = {name: (folder / name).read_bytes() for name in ("f.npy", "f.npy.json")}
    return [both, dict(reversed(both.items())), {"g.safetensors": (folder / "g.safetensors").read_bytes()}]


def tars(folder: Path) -> list[Tree]:
    trees = []
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name in ("a.png", "deep/b.jpg", "x" * 90 + ".png", "notes.txt"):
                member = tarfile.TarInfo(name)
                content = picture(".jpg" if name.endswith("jpg") else ".png")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.LNKTYPE, "a.png"
            archive.addfile(link)
        trees.append({"set.tar": file.getvalue()})
    return trees


def parquets(folder: Path) -> list[Tree]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    trees = []
    plain, struct = [picture()] * 3, [{"bytes": picture(), "path": "x"}] * 3
    for images, options in ((plain, {}), (struct, {"compression": "zstd"}), (plain, {"use_dictionary": False})):
        sink = io.BytesIO()
        table = pa.table({"image": images, "name": ["a.png", "b/c.png", "d"]})
        pq.write_table(table, sink, row_group_size=2, **options)
        trees.append({"set.parquet": sink.getvalue()})
    return trees


def videos(folder: Path) -> list[Tree]:
    trees = []
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    for suffix, codec in ((".mp4", "mp4v"), (".avi", "MJPG"), (".mkv", "mp4v"), (".avi", "FFV1")):
        path = folder / f"v{suffix}"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25, (32, 16))
        for _ in range(4):
            writer.write(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
        writer.release()
        if path.is_file():
            trees.append({"v.mp4": path.read_bytes()})
    return trees


def data_sets(folder: Path) -> list[Tree]:
    photo, mask = picture(".jpg"), cv2.imencode(".png", np.ones((7, 9), np.uint8))[1].tobytes()
    info = label_files(folder)[1]["labels.txt"]
    ade = {"d/annotations/validation/a.png": mask, "d/images/validation/a.jpg": photo, "d/objectInfo150.txt": info}
    bits = cv2.imencode(".png", np.ones((7, 9), np.uint8), [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes()
    one = {"d/a.png": mask, "d/a.jpg": photo}
    return [one, ade, {"d/objectInfo150.txt": info, **ade}, {"d/a.png": bits, "d/a.jpg": photo}]


def reports(folder: Path) -> list[Tree]:
    """The repository's own, cut to what decides its table."""
    log = Path(__file__).resolve().parents[2] / "log"
    files = sorted(log.glob("report_*.json"))
    return [{"r.json": file.read_bytes(), "s.json": files[0].read_bytes()} for file in files]


def references(folder: Path) -> list[Tree]:
    from lseg.accuracy import Expected

    rng = np.random.default_rng(4)
    text = rng.standard_normal((2, 8)).astype(np.float32)
    maps = [cv2.imencode(".png", np.ones((7, 9), np.uint16))[1]]
    folder.mkdir(parents=True, exist_ok=True)
    expected = Expected(text, [np.full((8, 1, 1), 8**-0.5, np.float32)], [np.zeros((8, 8), np.uint16)], maps)
    expected.save(folder / "r.npz", "inputs")
    photo, mask = data_sets(folder)[0].values()
    return [{"r.npz": (folder / "r.npz").read_bytes(), "d/a.png": photo, "d/a.jpg": mask}]


def caches(folder: Path) -> list[Tree]:
    from lseg.text_cache import TextCache

    path = folder / "c.sqlite"
    folder.mkdir(parents=True, exist_ok=True)
    vectors = np.eye(3, 8, dtype=np.float32)
    TextCache(path, "e").get(np.arange(231, dtype=np.int32).reshape(3, 77), lambda places: vectors[places])
    return [{"out/c.sqlite": path.read_bytes()}]


def jobs(folder: Path) -> list[Tree]:
    from lseg.bulk_output import label_schema, table_bytes

    entry = {"index": 0, "name": "car", "share": 1.0, "confidence": 0.5}
    row = {"name": "a", "source": "/x/a.png", "photo": "a.png", "size": [9, 7], "unlabelled": 0.0, "labels": [entry]}
    part = table_bytes([row, {**row, "name": "b"}], label_schema(False), "a test")
    job = json.dumps({"format": 1, "weights": "0" * 64, "labels": [["car"], ["sky"]], "--rle": False}).encode()
    both = {"job/job.json": job, "job/parts/part-1.parquet": part}
    return [both, dict(reversed(both.items()))]


def lines(folder: Path) -> list[Tree]:
    from lseg.results import describe

    labels = np.zeros((4, 5), np.int32)
    line = json.dumps(describe("a.png", labels, np.ones((4, 5), np.float32), ["car", "sky"])).encode() + b"\n"
    return [{"out/l.jsonl": line * 3}, {"out/l.jsonl": line + line[:20]}]


def sidecars(folder: Path) -> list[Tree]:
    import hashlib

    from lseg.engine import EngineSpec

    engine = b"an engine"
    profiles = ({"image": ((1, 3, 64, 64),) * 3},)
    spec = asdict(EngineSpec("image", "0" * 64, "fp16", "4d", profiles, {"recipe": 3}))
    made_by = {"tensorrt": "10.0", "gpu": "a GPU", "compute_capability": "8.9"}
    sidecar = {**spec, **made_by, "engine_sha256": hashlib.sha256(engine).hexdigest(), "build_seconds": 1.5}
    return [{"e.json": json.dumps(sidecar).encode(), "e.engine": engine}]


def exported(folder: Path) -> list[Tree]:
    """The tiny weights' exported files, each in its turn the one that is changed."""
    import lseg.checkpoint  # noqa: F401 - what the ONNX Runtime backend asks where it fails

    trees = files_below(exported_folder())
    trees = {name: data for name, data in trees.items() if name.endswith(".onnx")}
    return [{name: trees[name], **trees} for name in trees]


def texts(folder: Path) -> list[Tree]:
    words = [
        "car, road, sky",
        "a photo of a café, other",
        "1,2,3",
        "&lt;b&gt; it's \u201cquoted\u201d, x",
        "日本, \U0001f600",
    ]
    return [{"t.txt": word.encode()} for word in words]


def templates(folder: Path) -> list[Tree]:
    return [{"t.txt": b"a photo of a {}.\n\nthe {} and the {}\n"}]


def path_lists(folder: Path) -> list[Tree]:
    return [{"l.txt": b"a.png\n\ndeep/b.png\n./a.png\n", "a.png": picture(), "deep/b.png": picture()}]


def connection(path: Path, script: str) -> bytes:
    """A SQLite file that a script made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    file = sqlite3.connect(path)
    file.executescript(script)
    file.close()
    return path.read_bytes()
