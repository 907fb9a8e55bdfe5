"""Files made by hand to do harm: code in pickles, bombs of memory and time, names that lead elsewhere."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from fuzzing import formats
from fuzzing.mutate import DEEP, odd_names
from fuzzing.seeds import Tree, connection, data_sets, jobs, picture, reports, safetensors, sidecars


class Call:
    """Unpickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def canary() -> str:
    return f"{formats.OUTSIDE}/canary"


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, storage: bytes = bytes(64)) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/data/0", storage, zipfile.ZIP_STORED)
    return file.getvalue()


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], length: int = 16, offset: int = 0) -> bytes:
    """A pickled state dict with one tensor as it is told here."""
    ints = {n: f"I{n}\n".encode() for n in (*shape, *strides, length, offset)}
    tuples = [b"(" + b"".join(ints[n] for n in values) + b"t" for values in (shape, strides)]
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + ints[length] + b"tQ"
    names = [b"net.pretrained.model.pos_embed", b"net.scratch.head1.weight"]
    one = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + ints[offset] + b"".join(tuples) + b"\x89NtR"
    items = b"".join(b"X" + struct.pack("<I", len(name)) + name + one for name in names)
    return b"\x80\2}(" + items + b"u."


def checkpoints(folder: Path) -> list[Tree]:
    calls = [Call(os.system, f"touch {canary()}"), Call(open, canary(), "w"), Call(exec, f"open({canary()!r}, 'w')")]
    calls += [Call(eval, f"open({canary()!r}, 'w')"), Call(os.mkdir, canary()), Call(os.remove, canary())]
    pickles = [pickle.dumps({"state_dict": call}, protocol) for call in calls for protocol in (2, 4)]
    pickles += [b"\x80\2" + f"(S'touch {canary()}'\nios\nsystem\n.".encode()]  # INST, of the oldest protocol
    memo = [b"\x80\2}r" + struct.pack("<I", n) + b"." for n in (2**27, 2**29, 2**31 - 1)]
    memo += [b"\x80\2}p%d\n." % n for n in (2**29, 2**62)]
    twice = b"\x80\2)" + b"2\x86" * 60  # a pair of pairs of pairs: short to write, and endless to hash
    laughs = [b"\x80\2}" + twice[2:] + b"Ns.", b"\x80\2X\1\0\0\0a" + twice[2:] + b"\x86."]
    inert = b"cx\ny\n)\x81"  # an object, whose state names the one before twice: endless to walk through
    walk = (
        inert
        + b"}X\1\0\0\0aNsb"
        + b"".join(b"q%c" % n + inert + b"}(X\1\0\0\0ah%cX\1\0\0\0bh%cub" % (n, n) for n in range(60))
    )
    loop = inert + b"q\0}(X\1\0\0\0ah\0X\1\0\0\0bh\0ub."
    pickles += [*memo, *laughs]
    result = [{"w.ckpt": data} for data in pickles]
    result += [{"w.ckpt": zipped(data)} for data in pickles]
    for data in (b"\x80\2" + walk + b".", b"\x80\2" + loop):
        file = io.BytesIO(zipped(data))
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("w/constants.pkl", b"")
        result.append({"w.ckpt": file.getvalue()})
    shapes = [((2**20, 2**20), (0, 0)), ((2**40, 2**40), (0, 0)), ((2**62,), (1,)), ((1, 1 + 40000**2, 8), (0, 0, 0))]
    shapes += [
        ((1, 1 + 9000**2, 1024), (0, 0, 1)),
        ((4,), (-1,)),
        ((-4,), (1,)),
        ((2, 2), (2**62, 2**62)),
        ((4,), (1, 1)),
    ]
    result += [{"w.ckpt": zipped(tensor(*shape))} for shape in shapes]
    result += [{"w.ckpt": zipped(tensor((4,), (1,), length, offset))} for length, offset in ((2**61, 0), (16, 2**62))]
    result += [{"w.ckpt": zipped(tensor((4,), (1,), 16, offset))} for offset in (-1, -(2**40), 13)]
    bomb = zipped(b"\x80\2X" + struct.pack("<I", 2**31 - 8) + bytes(2**24), zipfile.ZIP_DEFLATED)
    blown = zipped(b"\x80\2" + b"}0" * 2**22 + b".", zipfile.ZIP_DEFLATED)  # 8 million steps in 8 KiB
    zeros = zipped(b"\x80\2" + bytes(2**27) + b".", zipfile.ZIP_DEFLATED)
    return [*result, {"w.ckpt": bomb}, {"w.ckpt": blown}, {"w.ckpt": zeros}]


def models(folder: Path) -> list[Tree]:
    """Sizes beyond all reason in a checkpoint's metadata."""
    data = next(iter(safetensors(folder)[0].values()))
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    result = []
    for part, values in (
        (
            "image_config",
            ({"depth": 10**9}, {"width": 10**12}, {"image_size": 10**9}, {"image_size": 2**20, "width": 4}),
        ),
        ("image_config", ({"patch_size": 0}, {"heads": 0}, {"depth": 1e300}, {"taps": [0, 1]}, {"features": -1})),
        ("image_config", ({"depth": 20000}, {"image_size": 16 * 9000}, {"patch_size": 1}, {"width": "32"})),
        ("text_config", ({"layers": 10**9}, {"context": 2**40}, {"heads": 0}, {"layers": -1}, {"context": 100_000})),
    ):
        for change in values:
            meta = header["__metadata__"]
            config = json.dumps({**json.loads(meta[part]), **change})
            text = json.dumps({**header, "__metadata__": {**meta, part: config}}).encode()
            result.append({"w.safetensors": struct.pack("<Q", len(text)) + text + data[8 + length :]})
    deep = json.dumps({**header, "__metadata__": {**header["__metadata__"], "image_config": DEEP.decode()}}).encode()
    result.append({"w.safetensors": struct.pack("<Q", len(deep)) + deep + data[8 + length :]})
    return [
        *result,
        {"w.safetensors": struct.pack("<Q", 2**63) + b"{}"},
        {"w.safetensors": struct.pack("<Q", 2**27) + b"{"},
    ]


def onnx_files(folder: Path) -> list[Tree]:
    import onnx
    from onnx import TensorProto, helper

    trees = []
    for notes in ("{", DEEP.decode(), '"\\ud800"', "[]", "9" * 5000):
        model = helper.make_model(helper.make_graph([], "g", [], []))
        model.metadata_props.add(key="lseg.kind", value=notes)
        trees.append({"clip_textual.onnx": model.SerializeToString()})
    for kind in ("lseg", "clip_textual", "similarity"):
        model = helper.make_model(helper.make_graph([], "g", [], []))
        model.metadata_props.add(key="lseg.kind", value=json.dumps(kind))
        model.metadata_props.add(key="lseg.format", value="1")
        trees.append({"clip_textual.onnx": model.SerializeToString()})
    for location in ("../../../../etc/hostname", "/etc/hostname", f"{formats.OUTSIDE}/absolute", "a\0b", "/dev/zero"):
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
        graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [weight])
        trees.append({"clip_textual.onnx": onnx.ModelProto(graph=graph, ir_version=8).SerializeToString()})
    return trees


def tars(folder: Path) -> list[Tree]:
    result = []
    for name in odd_names(formats.OUTSIDE):
        file = io.BytesIO()
        for full in (name, f"{name}.png", f"{name}/a.png"):
            member = tarfile.TarInfo(full)
            content = picture()
            member.size = len(content)
            try:
                file.write(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
            except UnicodeError:
                continue
            file.write(content + b"\0" * (-len(content) % 512))
        result.append({"set.tar": file.getvalue() + bytes(1024)})
    links = io.BytesIO()
    with tarfile.open(fileobj=links, mode="w") as archive:
        for name, kind, target in (("deep", tarfile.SYMTYPE, ".."), ("b.png", tarfile.SYMTYPE, "/etc/hostname")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        member = tarfile.TarInfo("deep/a.png")
        member.size = len(picture())
        archive.addfile(member, io.BytesIO(picture()))
    huge = tarfile.TarInfo("x")
    result.append({"set.tar": links.getvalue()})
    for kind in (b"x", b"g", b"L", b"K", b"S"):  # headers that say they are gigabytes long
        for size in (2**33 - 1, 2**31, 2**62, 3 << 29):
            huge.type, huge.size = kind, size
            result.append({"set.tar": huge.tobuf(tarfile.GNU_FORMAT) + bytes(2048)})
    return result


def parquets(folder: Path) -> list[Tree]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [name.encode("utf-8", "replace").decode() for name in odd_names(formats.OUTSIDE)]
    names = [name + end for name in names for end in ("", ".jpg", "/a.jpg")]
    result = []
    for start in range(0, len(names), 20):
        sink = io.BytesIO()
        part = names[start : start + 20]
        pq.write_table(pa.table({"image": [picture()] * len(part), "name": part}), sink)
        result.append({"set.parquet": sink.getvalue()})
    return result


def images(folder: Path) -> list[Tree]:
    """Small files that say they are large."""
    import zlib

    result = []
    for width, height, bits, kind in (
        (2**15, 2**15, 8, 0),
        (2**15, 2**15, 16, 2),
        (2**31 - 1, 2**31 - 1, 8, 2),
        (1, 2**30, 8, 6),
    ):
        head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(9))), (b"IEND", b"")]
        parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
        result.append({"a.jpg": b"\x89PNG\r\n\x1a\n" + b"".join(parts)})
    jpeg = picture(".jpg")
    at = jpeg.index(b"\xff\xc0")
    result += [
        {"a.jpg": jpeg[: at + 5] + struct.pack(">HH", *s) + jpeg[at + 9 :]}
        for s in ((65535, 65535), (0, 0), (65500, 1))
    ]
    bitmap = bytearray(picture(".bmp"))
    for size in ((2**15, 2**15), (-1, -1), (2**31 - 1, 1), (1, -(2**31))):
        bitmap[18:26] = struct.pack("<ii", *size)
        result.append({"a.jpg": bytes(bitmap)})
    result += [
        {"a.jpg": b"P6\n32768 32768\n255\n"},
        {"a.jpg": b"P5\n99999999999 1\n255\n"},
        {"a.jpg": b"P3\n3 3\n65536\n1 2"},
    ]
    return result


def videos(folder: Path) -> list[Tree]:
    """Playlists in a video's place, which name other files and addresses."""
    texts = [
        f"ffconcat version 1.0\nfile {formats.OUTSIDE}/absolute\n",
        "ffconcat version 1.0\nfile v.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='dynamic'></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ]
    return [{"v.mp4": text.encode()} for text in texts] + [{"v.mp4": b"RIFF" + bytes(4096)}, {"v.mp4": picture()}]


def json_trees(name: str, rest: Tree) -> list[Tree]:
    values = [
        DEEP,
        b"[]",
        b"{}",
        b"null",
        b"[[1, 2], [3]]",
        b"9" * 5000,
        b'{"a":' * 50_000,
        b"",
        b"\xff",
        b'"\\ud800"',
        b"[{}]",
    ]
    return [{name: value, **{k: v for k, v in rest.items() if k != name}} for value in values]


def caches(folder: Path) -> list[Tree]:
    """Tables of other kinds of values, and views in a table's place, one of them without an end."""
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n AS key, n AS vector FROM r"
    scripts = [
        f"CREATE VIEW embeddings AS {endless}",
        "CREATE VIEW embeddings AS SELECT x'00' AS key, zeroblob(900000000) AS vector",
        "CREATE TABLE embeddings (key, vector)",
        "CREATE TABLE embeddings (vector)",
        "CREATE VIRTUAL TABLE embeddings USING fts5(key, vector)",
    ]
    trees = [{"out/c.sqlite": connection(folder / "h.sqlite", script)} for script in scripts]
    import hashlib

    tokens = np.arange(308, dtype=np.int32).reshape(4, 77)
    keys = [hashlib.sha256(b"1 e  " + row.tobytes()).digest().hex() for row in tokens]
    for value in ("1", "'text'", "NULL", "x'0000803f'", "zeroblob(32)", "1.5", "x'00'"):
        rows = ", ".join(f"(x'{key}', {value})" for key in keys[:2])
        script = f"CREATE TABLE embeddings (key BLOB, vector); INSERT INTO embeddings VALUES {rows}"
        trees.append({"out/c.sqlite": connection(folder / "h.sqlite", script)})
    view = " UNION ALL ".join(f"SELECT x'{key}' AS key, x'00' AS vector" for key in keys)
    count = "(WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r)"
    slow = f"CREATE VIEW embeddings AS SELECT k.key, {count} AS vector FROM ({view}) k"
    return [*trees, {"out/c.sqlite": connection(folder / "h.sqlite", slow)}]


def path_lists(folder: Path) -> list[Tree]:
    lines = [
        "/dev/zero",
        "/dev/stdin",
        "..",
        "a\0b",
        "x" * 5000,
        "/proc/self/mem",
        "\x1b[2Jx",
        "é\x85y",
        "/",
        "~",
        "\u2028",
    ]
    return [{"l.txt": f"a.png\n{line}\n".encode(), "a.png": picture()} for line in lines]


def long_texts(name: str) -> list[Tree]:
    texts = [
        "a" * 10**6,
        "a b " * 10**6,
        "&amp;" * 10**5,
        "é" * 10**6,
        "\n".join(f"w{n}" for n in range(70_000)),
        "ſ" * 10**5,
    ]
    texts += ["{} " * 10**5, "’" * 10**5, "\u0345" * 10**5, ", ".join(f"{n}" for n in range(70_000)), "â€™" * 10**5]
    return [{name: text.encode()} for text in texts]


def references(folder: Path) -> list[Tree]:
    """The right words on what it was made from, and something else in the arrays."""
    photo, mask = data_sets(folder)[0].values()
    good = {
        "text": np.ones((2, 8), np.float32),
        "inputs": np.array("inputs"),
        "embeddings_0": np.ones((8, 1, 1), np.float32),
    }
    good |= {"photo_0": np.zeros((8, 8), np.uint16), "image_0": np.zeros(9, np.uint8)}
    changes = [{"image_0": np.zeros(0, np.uint8)}, {"text": np.array("x")}, {"embeddings_7": good["embeddings_0"]}]
    changes += [{"photo_0": np.zeros((2, 3))}, {"embeddings_0": np.array("x")}, {"text": np.ones((3, 8))}, {}]
    changes += [{"image_0": np.zeros((2, 2), complex)}, {"embeddings_x": np.ones(2)}, {"inputs": np.array([1, 2])}]
    trees = []
    for change in changes:
        file = io.BytesIO()
        np.savez_compressed(file, **{**good, **change})
        trees.append({"r.npz": file.getvalue(), "d/a.png": photo, "d/a.jpg": mask})
    return trees


def job_trees(folder: Path) -> list[Tree]:
    both = jobs(folder)[0]
    return [{**both, "job/job.json": tree["x"]} for tree in json_trees("x", {})]


def report_trees(folder: Path) -> list[Tree]:
    return json_trees("r.json", reports(folder)[0])


def sidecar_trees(folder: Path) -> list[Tree]:
    return json_trees("e.json", sidecars(folder)[0])
