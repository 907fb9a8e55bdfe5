"""What hostile files once did: each is told in a sentence now, at once, and nothing lands where it should not."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import struct
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import tiny_config, tiny_weights
from fuzzing.hostile import tensor, zipped
from fuzzing.seeds import picture

from lseg import report
from lseg.accuracy import Expected
from lseg.bulk_inputs import Columns, Row, list_rows, read_row
from lseg.bulk_output import Output, check_job
from lseg.checkpoint import load, save_safetensors
from lseg.dataset import Dataset
from lseg.engine import build_seconds, mismatch
from lseg.errors import UserError, say
from lseg.features import read_region_mask
from lseg.image import read_image
from lseg.onnx_file import IMAGE_ONNX, SIMILARITY_ONNX, read_metadata, sizes
from lseg.polygraph import main as polygraph
from lseg.polygraph import parse_args
from lseg.run_onnxruntime import OnnxRuntimeRunner
from lseg.sources import plain_parts
from lseg.tensorfile import read
from lseg.text_cache import FILE, TextCache
from lseg.tokenizer import Tokenizer
from lseg.video import open_video

DEEP = "[" * 100_000 + "]" * 100_000
PAIRS = b"2\x86" * 60  # a pair of the pair before, sixty times: endless to hash
OBJECT = b"cx\ny\n)\x81"


class TestPickles:
    @pytest.mark.parametrize("place", [2**28, 2**31 - 1])
    def test_a_place_far_out_in_the_memo(self, tmp_path, place):
        """A few bytes asked for gigabytes of room in front of it."""
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (tmp_path / "w.pt").write_bytes(zipped(b"\x80\2}r" + struct.pack("<I", place) + b"."))
        with pytest.raises(UserError, match="holds no state_dict"):
            read(tmp_path / "w.pt", "try again")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # kilobytes

    @pytest.mark.parametrize(
        "before, after, reason",
        [
            (b"}", b"Ns.", "a dictionary's key is too large"),
            (b"}(", b"Nu.", "a dictionary's key is too large"),
            (b"(", b"Nd.", "a dictionary's key is too large"),
            (b"ccollections\nOrderedDict\n(]", b"N\x86atR.", "a dictionary's key is too large"),
            (b"\x8f(", b"\x90.", "a dictionary's key is too large"),
            (b"(", b"\x91.", "a dictionary's key is too large"),
            (b"(", b"tQ.", "a reference is of an unknown kind"),
            (b"(X\7\0\0\0storagectorch\nFloatStorage\n", b"NNtQ.", "a storage's name or length is none"),
        ],
        ids=["item", "items", "dictionary", "ordered", "set", "frozen set", "reference", "storage"],
    )
    def test_keys_that_are_endless_to_hash(self, tmp_path, before, after, reason):
        """Or, of a reference, to write out."""
        (tmp_path / "w.pt").write_bytes(zipped(b"\x80\4" + before + b")" + PAIRS + after))
        with pytest.raises(UserError, match=rf"w.pt is cut short or damaged \({reason}\)"):
            read(tmp_path / "w.pt", "try again")

    @pytest.mark.parametrize("names", [b"a", b"ab"])
    def test_modules_that_hold_each_other(self, tmp_path, names):
        inside = b"".join(b"X\1\0\0\0" + bytes([name]) + b"h\0" for name in names)
        file = io.BytesIO(zipped(b"\x80\2" + OBJECT + b"q\0}(" + inside + b"ub."))
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("w/constants.pkl", b"")
        (tmp_path / "w.pt").write_bytes(file.getvalue())
        with pytest.raises(UserError, match="its modules have no end"):
            read(tmp_path / "w.pt", "try again")

    @pytest.mark.parametrize("shape", [(2**20, 2**20), (1, 1 + 40_000**2, 8)])
    def test_a_tensor_of_one_number_over_and_over(self, tmp_path, shape):
        (tmp_path / "w.pt").write_bytes(zipped(tensor(shape, (0,) * len(shape))))
        with pytest.raises(UserError, match="a tensor is larger than its numbers"):
            read(tmp_path / "w.pt", "try again")

    def test_a_pickle_that_swells(self, tmp_path):
        (tmp_path / "w.pt").write_bytes(zipped(bytes(2**26 + 1), zipfile.ZIP_DEFLATED))
        with pytest.raises(UserError, match="its pickle is too large"):
            read(tmp_path / "w.pt", "try again")

    def test_steps_without_an_end(self, tmp_path):
        """Millions of them in a few kilobytes."""
        (tmp_path / "w.pt").write_bytes(zipped(b"\x80\2" + b"}0" * 1_000_001 + b"}.", zipfile.ZIP_DEFLATED))
        with pytest.raises(UserError, match="the pickle has too many steps"):
            read(tmp_path / "w.pt", "try again")

    def test_a_long_name(self, tmp_path):
        (tmp_path / "w.pt").write_bytes(b"\x80\2(S'" + b"x" * 10**6 + b"'\nQ.")
        with pytest.raises(UserError) as error:
            read(tmp_path / "w.pt", "try again")
        assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "part, change",
    [
        ("image_config", {"depth": 10**9}),
        ("image_config", {"image_size": 16 * 20_000}),
        ("image_config", {"width": "32"}),
        ("text_config", {"layers": 10**9}),
        ("text_config", {"context": 2**40}),
    ],
)
def test_models_beyond_all_size(tmp_path, part, change, seed):
    image, text = tiny_config()
    path = tmp_path / "w.safetensors"
    save_safetensors(path, {"scratch.head1.weight": tiny_weights(seed)["scratch.head1.weight"]}, image, text)
    assert load(path).image_config == image
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][part] = json.dumps(json.loads(header["__metadata__"][part]) | change)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(UserError, match=f"describes its model wrongly \\({next(iter(change))} is"):
        load(path)


def test_one_line_whatever_names_hold(capsys):
    """A member of an archive may be called by a sequence that a terminal obeys."""
    name = "a\nerror: all is well\x1b[2J\u2028.jpg é日本"
    assert str(UserError(f"{name} is bad")) == r"a\nerror: all is well\x1b[2J\u2028.jpg é日本 is bad"
    say(f"{name} -> x")
    assert capsys.readouterr().out == "a\\nerror: all is well\\x1b[2J\\u2028.jpg é日本 -> x\n"


class TestOnnx:
    @pytest.mark.parametrize("value", ["{", DEEP, "9" * 5000])
    def test_notes_that_are_no_json(self, tiny, tmp_path, value):
        model = onnx.load(tiny.folder / IMAGE_ONNX)
        model.metadata_props[0].value = value
        onnx.save(model, tmp_path / IMAGE_ONNX)
        assert read_metadata(tmp_path / IMAGE_ONNX) == {}

    def test_an_image_encoder_without_its_sizes(self, tiny):
        metadata = read_metadata(tiny.folder / IMAGE_ONNX)
        assert sizes(Path("x.onnx"), metadata, "export it")["image_size"] == 64
        for config in (None, {}, {"image_size": "64", "patch_size": 16, "embedding": 24}, []):
            with pytest.raises(UserError, match="x.onnx does not tell the sizes of its model: export it"):
                sizes(Path("x.onnx"), metadata | {"image_config": config}, "export it")

    @pytest.mark.parametrize("name", [IMAGE_ONNX, SIMILARITY_ONNX])
    def test_the_right_notes_on_another_graph(self, tiny, tmp_path, name):
        for file in tiny.folder.glob("*.onnx"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        model = onnx.load(tmp_path / name)
        model.graph.output[0].name, model.graph.node[-1].output[0] = "other", "other"
        onnx.save(model, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is (no file that lseg_export.py wrote|damaged)"):
            OnnxRuntimeRunner(tiny.weights, tmp_path, device="cpu")

    def test_a_damaged_graph_under_polygraph(self, tiny, tmp_path):
        model = onnx.load(tiny.folder / IMAGE_ONNX)
        model.graph.node[0].input[0] = model.graph.node[-1].output[0]
        model.graph.input[0].type.tensor_type.elem_type = 29
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(UserError):
            polygraph(parse_args(["ranks", str(tmp_path / "x.onnx")]))


class TestTextCache:
    TOKENS = np.arange(154, dtype=np.int32).reshape(2, 77)

    def get(self, path: Path) -> np.ndarray:
        return TextCache(path, "e").get(self.TOKENS, lambda places: np.eye(2, 8, dtype=np.float32)[places])

    @pytest.mark.parametrize("value", ["1", "'text'", "NULL", "1.5", "x'0000803f'"])
    def test_values_of_other_kinds(self, tmp_path, value):
        self.get(tmp_path / FILE)
        with sqlite3.connect(tmp_path / FILE) as file:
            file.execute(f"UPDATE embeddings SET vector = {value} WHERE key = (SELECT min(key) FROM embeddings)")
        file.close()
        assert np.array_equal(self.get(tmp_path / FILE), np.eye(2, 8))

    def test_a_view_without_an_end(self, tmp_path):
        endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n AS key, n AS vector FROM r"
        with sqlite3.connect(tmp_path / FILE) as file:
            file.execute(f"CREATE VIEW embeddings AS {endless}")
        file.close()
        assert np.array_equal(self.get(tmp_path / FILE), np.eye(2, 8))

    def test_a_trigger_without_an_end(self, tmp_path):
        self.get(tmp_path / FILE)
        endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r"
        with sqlite3.connect(tmp_path / FILE) as file:
            file.execute("DELETE FROM embeddings")
            file.execute(f"CREATE TRIGGER t AFTER INSERT ON embeddings BEGIN {endless}; END")
        file.close()
        assert np.array_equal(self.get(tmp_path / FILE), np.eye(2, 8))


def test_deep_and_other_json(tmp_path):
    """Sidecars, reports and jobs that nest beyond the stack, or hold other kinds of values."""
    (tmp_path / "e.engine").write_bytes(b"x")
    for text in (DEEP, "[]", '{"build_seconds": "x"}', '{"build_seconds": 1e400}', "{}"):
        (tmp_path / "e.json").write_text(text)
        assert mismatch(tmp_path / "e.engine", {"name": "image"}) and build_seconds(tmp_path / "e.engine") == 0
    good = json.loads((Path(__file__).parent.parent / "log" / "report_cpu_demo.json").read_text())
    of_lists = {"machine": good["machine"] | {"cpu": []}}
    for change in (
        of_lists,
        {"rows": [{}]},
        {"rows": 1},
        {"machine": []},
        {"matrix_rate": None},
        {"rows": [{"variant": []}]},
    ):
        (tmp_path / "r.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match="r.json is no report of this version"):
            report.load_reports([tmp_path / "r.json"])
    for name, sentence in (("r.json", "is no report"), ("job.json", "job.json is damaged")):
        (tmp_path / name).write_text(DEEP)
        with pytest.raises(UserError, match=sentence):
            report.load_reports([tmp_path / name]) if name == "r.json" else check_job(Output(str(tmp_path)), {}, True)


@pytest.mark.parametrize(
    "change", [{"embeddings_7": np.ones((8, 1, 1), np.float32)}, {"text": np.array("x")}, {"image_0": np.zeros((2, 2))}]
)
def test_a_reference_of_other_arrays(tmp_path, change):
    path = tmp_path / "r.npz"
    good = Expected(
        np.ones((2, 8), np.float32), [np.ones((8, 1, 1))], [np.zeros((8, 8), np.uint16)], [np.zeros(9, "u1")]
    )
    good.save(path, "inputs")
    found = Expected.load(path, "inputs")
    found.check_fits(good, 1)
    for other, images in ((good, 2), (Expected(good.text), 1), (Expected(good.text[:1], *[good.embeddings] * 2), 1)):
        with pytest.raises(UserError, match="the reference has other sizes"):
            found.check_fits(other, images)
    with np.load(path) as file:
        np.savez_compressed(path, **{**file, **change})
    with pytest.raises(UserError, match="is no reference, or damaged"):
        Expected.load(path, "inputs")


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {other}\n",
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".m3u8"])
def test_a_video_that_names_others(tmp_path, kind, suffix):
    """FFmpeg would read the files that a playlist names, and perhaps ask other machines."""
    import socket

    writer = cv2.VideoWriter(str(tmp_path / "real.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (32, 16))
    writer.write(np.zeros((16, 32, 3), np.uint8))
    writer.release()
    open_video(str(tmp_path / "real.mp4")).capture.release()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        for other in ("real.mp4", f"http://127.0.0.1:{server.getsockname()[1]}/x.mp4"):
            (tmp_path / f"v{suffix}").write_text(PLAYLISTS[kind].format(other=other))
            with pytest.raises(UserError, match=f"v{suffix} is a list of other files; give the video itself"):
                open_video(str(tmp_path / f"v{suffix}"))
        with pytest.raises(TimeoutError):
            server.accept()


class TestNames:
    @pytest.mark.parametrize(
        "name, plain",
        [
            ("../../x.png", "x"),
            ("/etc/x.png", "etc/x"),
            ("..jpg", "photo"),
            ("a/...jpg", "a/photo"),
            ("a\0/b.png", "a/b"),
            ("job.json/a.png", "job.json_/a"),
            ("parts/part-1.parquet", "parts_/part-1"),
            ("a_lseg.png/b.png", "a_lseg.png_/b"),
            ("d" * 300 + "/b.png", "d" * 225 + "/b"),
        ],
    )
    def test_plain_parts(self, name, plain):
        assert str(plain_parts(name)) == plain

    def test_deep_folders(self):
        assert len(plain_parts("d/" * 3000 + "a.png").parts) == 65
        assert len(str(plain_parts(("é" * 100 + "/") * 90 + "a.png")).encode()) < 1600

    def test_of_parquet(self, tmp_path):
        """Names that are none, and a column that is damaged."""
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"image": [picture()] * 3, "name": ["..jpg", "", "../.."]}), path, compression="none")
        rows, _ = list_rows([str(path)], str(tmp_path / "out"), Columns("image", "name"))
        assert [row.name for row in rows] == ["photo", "photo_2", "photo_3"]
        assert read_row(rows[0], Columns()) == picture()
        data = bytearray(path.read_bytes())
        data[4:40] = b"\xff" * 36
        path = tmp_path / "y.parquet"
        path.write_bytes(data)
        with pytest.raises(UserError, match="y.parquet is damaged in its column 'image'"):
            read_row(rows[0]._replace(path=str(path)), Columns())


def test_a_png_that_says_it_is_long(tmp_path):
    """OpenCV made room for 2 GiB in front of a part of that length."""
    data = picture(channels=1)
    for length in (len(data), 2**31 - 1, 2**32 - 1):
        path = tmp_path / "x.png"
        path.write_bytes(data[:33] + struct.pack(">I", length) + data[37:])
        start = time.process_time()
        for reader in (read_image, read_region_mask, lambda file: Dataset("d", (), ("a", "b")).mask(file, (7, 9))):
            with pytest.raises(UserError, match="x.png (is damaged|cannot be read)"):
                reader(path)
        assert time.process_time() - start < 0.5
    path.write_bytes(data + bytes(9))  # what follows a whole one is nobody's
    read_region_mask(path)


def test_members_of_no_size(tmp_path):
    (tmp_path / "x.tar").write_bytes(bytes(2048))
    for path in (str(tmp_path / "x.tar"), f"file://{tmp_path}/x.tar"):
        for offset, size in ((512, -512), (512, 2**62), (1 << 40, 1)):
            with pytest.raises(UserError, match="x.tar:a.png is cut short"):
                read_row(Row("a", f"{path}:a.png", path, offset, size), Columns())


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("x.tar", "x.txt", "x.parquet", "x.png"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is not a regular file"):
            rows, _ = list_rows([str(tmp_path / name)], str(tmp_path / "out"), Columns())
            read_row(rows[0], Columns())
    (tmp_path / "y.png").write_bytes(picture())
    rows, _ = list_rows([str(tmp_path)], str(tmp_path / "out"), Columns())
    assert sorted(row.name for row in rows) == ["x", "y"]


def test_names_that_are_no_text(tmp_path):
    """In a table of images, and in a part of an earlier run."""
    text = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff"]).buffers()[1:]])
    image = pa.StructArray.from_arrays([pa.array([picture()]), text], ["bytes", "path"])
    path = tmp_path / "parts" / "part-1.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": image, "name": text, "source": ["x"]}), path)
    rows, _ = list_rows([str(path)], str(tmp_path / "out"), Columns())
    assert read_row(rows[0], Columns()) == picture()  # whose path nobody asks for
    with pytest.raises(UserError, match="part-1.parquet is damaged in its column 'name'"):
        list_rows([str(path)], str(tmp_path / "out"), Columns(name="name"))
    with pytest.raises(UserError, match="part-1.parquet is damaged in its column 'name'"):
        Output(str(tmp_path)).done()
    pq.write_table(pa.table({"name": [[1]], "source": ["x"]}), path)
    with pytest.raises(UserError, match="part-1.parquet is damaged"):
        Output(str(tmp_path)).done()


@pytest.mark.parametrize("word", ["a b " * 10**6, "ſ" * 10**5, "&amp;" * 10**5])
def test_a_label_of_megabytes(word):
    with pytest.raises(UserError, match="characters, and CLIP reads at most 77 tokens: shorten it"):
        Tokenizer()(word)
