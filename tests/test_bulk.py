"""What lseg_ray.py reads and writes: inputs of every kind, the output's parts, and a sentence for what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_enginerun import save
from test_sources import pack

import lseg_ray
from lseg import bulk_output
from lseg.bulk import in_a_sentence, into_parts
from lseg.bulk_inputs import Columns, Row, list_rows, open_store, read_row
from lseg.bulk_output import JOB, Output, check_job, left_to_do, part_name, table_bytes
from lseg.bulk_stages import Wanted, write
from lseg.errors import UserError, run
from lseg.labels import parse_labels
from lseg.onnx_file import TEXT_ONNX
from lseg.tally import tally_at
from lseg.vocabulary import Vocabulary

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: ./requirements.sh --dev installs it")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: ./requirements.sh --dev installs it")
VOCABULARY = Vocabulary.of(parse_labels("sky, tree"))
SCHEMA = [("name", pa.string()), ("source", pa.string())]


@pytest.fixture
def refused(tiny, tmp_path, capfd) -> Callable[..., str]:
    """Runs lseg_ray with what it must refuse before a cluster is started; the sentence."""

    def call(*arguments: object) -> str:
        options = ["--weights", tiny.weights, "--onnx", tiny.folder, "--backend", "onnxruntime"]
        options += [] if "--output" in arguments else ["--output", tmp_path / "out"]
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run(lambda: lseg_ray.main(lseg_ray.parse_args([*map(str, arguments), *map(str, options)])))
        err = capfd.readouterr().err.splitlines()
        assert end.value.code == 2 and len(err) == 1 and err[0].startswith("error: ")
        return err[0].removeprefix("error: ")

    return call


@pytest.fixture
def photo(tmp_path, seed) -> Path:
    return save(tmp_path / "photos" / "photo.jpg", seed)


def names_of(rows: list[Row]) -> list[str]:
    return [row.name for row in rows]


class TestInputs:
    @pytest.mark.parametrize("form", ["{}", "file://{}"])
    def test_every_kind(self, form, photo, tmp_path):
        data = photo.read_bytes()
        pack(tmp_path / "photos" / "set.tar", {"in/a.png": data + b"a", "../in/b.jpg": data + b"b", "c.txt": b""})
        table = pa.table({"image": [{"bytes": data + b"p", "path": "x"}, {"bytes": data + b"q", "path": "y"}]})
        pq.write_table(table, tmp_path / "photos" / "t.parquet")
        (tmp_path / "photos" / ".hidden.parquet").write_bytes(b"")
        (tmp_path / "photos" / "photo_labels.png").write_bytes(b"ours")
        rows, _ = list_rows([form.format(tmp_path / "photos")], str(tmp_path / "out"), Columns())
        assert sorted(names_of(rows)) == ["in/a", "in/b", "photo", "t-00000000", "t-00000001"]
        found = {row.name: read_row(row, Columns()).removeprefix(data) for row in rows}
        assert found == {"in/a": b"a", "in/b": b"b", "photo": b"", "t-00000000": b"p", "t-00000001": b"q"}
        assert len({row.source for row in rows}) == 5

    def test_tar_set_by_pattern(self, photo, tmp_path):
        for index in range(2):
            pack(tmp_path / f"s{index}.tar", {"x.jpg": photo.read_bytes()})
        rows, _ = list_rows([str(tmp_path / "s*.tar")], str(tmp_path / "out"), Columns())
        assert names_of(rows) == ["x", "x_2"]

    def test_one_name_twice_in_parquet(self, photo, tmp_path):
        """Two images never share a result."""
        pq.write_table(pa.table({"image": [photo.read_bytes()] * 2, "key": ["a.jpg", "a.jpg"]}), tmp_path / "t.parquet")
        rows, _ = list_rows([str(tmp_path / "t.parquet")], str(tmp_path / "out"), Columns(name="key"))
        assert names_of(rows) == ["a", "a_2"]

    def test_own_parts_are_no_input(self, photo, tmp_path):
        out = tmp_path / "photos" / "out"
        Output(str(out)).write({"parts/part-0.parquet": b"no image column here"})
        for form in ("{}", "file://{}"):
            rows, _ = list_rows([form.format(tmp_path / "photos")], form.format(out), Columns())
            assert names_of(rows) == ["photo"]

    def test_parts_follow_row_groups(self):
        rows = [Row(str(i), "", "f", i % 5, 0, i // 5) for i in range(12)] + [Row("x", "", "x"), Row("y", "", "y")]
        assert [names_of(part) for part in into_parts(rows, 3)] == [
            ["0", "1", "2"], ["3", "4"], ["5", "6", "7"], ["8", "9"], ["10", "11"], ["x", "y"],
        ]  # fmt: skip

    def test_cut_short_behind_a_uri(self, photo, tmp_path):
        tar = pack(tmp_path / "s.tar", {"x.jpg": photo.read_bytes()})
        (row,), _ = list_rows([f"file://{tar}"], str(tmp_path / "out"), Columns())
        os.truncate(tar, 600)
        with pytest.raises(UserError, match="x.jpg is cut short, with its archive"):
            read_row(row, Columns())


class TestRefused:
    def test_schema(self, refused, tmp_path):
        file = tmp_path / "t.parquet"
        pq.write_table(pa.table({"picture": [b"x"], "width": [1]}), file)
        assert refused(file) == (
            f"{file} has no column 'image' of images; its columns are picture, width: name one with --image-column"
        )
        assert "its column 'width' holds int64, not the bytes of image files" in refused(
            file, "--image-column", "width"
        )
        assert "has no column 'key'; its columns are picture, width: choose another --name-column" in refused(
            file, "--image-column", "picture", "--name-column", "key"
        )
        file.write_bytes(b"nothing")
        assert f"{file} is no Parquet file, or cannot be read (" in refused(file)
        assert not (tmp_path / "out").exists()

    def test_cluster(self, refused, photo, tmp_path):
        sentence = refused(photo, "--address", "127.0.0.1:9")
        assert sentence == (
            "the Ray cluster at 127.0.0.1:9 does not answer (Connection refused): check --address, or leave it out to "
            "run on this machine"
        )
        assert "is no address: give HOST:PORT" in refused(photo, "--address", "somewhere")
        assert not (tmp_path / "out" / JOB).exists()  # nothing is begun that would have to be resumed

    def test_paths(self, refused, photo, tmp_path):
        assert refused(tmp_path / "none") == f"{tmp_path / 'none'} does not exist; check the name"
        assert refused(f"file://{tmp_path}/none") == f"file://{tmp_path}/none does not exist; check the name"
        (tmp_path / "empty").mkdir()
        assert "holds no image; give .jpg" in refused(f"file://{tmp_path}/empty")
        assert (
            refused("abc://bucket/x")
            == "abc://bucket/x is of no kind known here: give s3://, gs://, hdfs:// or file://"
        )
        (tmp_path / "s.tar").write_bytes(b"x" * 2000)
        assert "is no tar archive" in refused(f"file://{tmp_path}/s.tar")
        assert "choose another output folder" in refused(photo, "--output", photo / "below")
        assert "cannot be written" in refused(photo, "--output", f"file://{photo}/below")

    def test_options(self, refused, photo):
        assert refused(photo, "--part", 0) == "--part 0 cannot be: give 1 or more"
        assert refused(photo, "--unknown", 2) == "--unknown 2.0 is no cosine: give a number from -1 to 1, such as 0.2"
        assert refused(photo, "--batch", 9) == "9 images a run cannot be: give 1 to 8"
        told = "--batch has no meaning beside --features: leave one out"
        assert refused(photo, "--features", 8, "--batch", 2) == told
        assert refused(photo, "--features", 8, "--rle") == "--rle has no meaning beside --features: leave one out"

    def test_without_ray(self, refused, photo, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "ray", None)
        sentence = refused(photo)
        assert sentence.startswith("Ray Data is not installed (")
        assert sentence.endswith("run 'pip install -r requirements-ray.txt'")

    def test_output_where_files_are_exported(self, tiny, photo, tmp_path):
        """An export holds its folder; the run, which holds its output, does not wait for itself."""
        out = tmp_path / "out"
        shutil.copytree(tiny.folder, out)
        (out / TEXT_ONNX).unlink()
        options = ["--weights", tiny.weights, "--backend", "onnxruntime", "--quiet", "--address", "127.0.0.1:9"]
        args = lseg_ray.parse_args([str(photo), "--output", str(out), "--onnx", str(out), *options])
        sentences = []

        def work() -> None:
            with pytest.raises(UserError) as error:
                lseg_ray.main(args)
            sentences.append(str(error.value))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(120)
        assert (out / TEXT_ONNX).is_file()
        assert len(sentences) == 1 and sentences[0].startswith("the Ray cluster at 127.0.0.1:9 does not answer")

    def test_second_run(self, refused, photo, tmp_path):
        (tmp_path / "out").mkdir()
        with Output(str(tmp_path / "out")).held():
            assert refused(photo).startswith(f"another run is writing to {tmp_path / 'out'}: wait for it")


@pytest.fixture(params=["{}", "file://{}"], ids=["path", "uri"])
def output(request, tmp_path) -> Output:
    output = Output(request.param.format(tmp_path / "out"))
    output.prepare()
    return output


def part_of(*names: str) -> bytes:
    return table_bytes([{"name": name, "source": f"/from/{name}"} for name in names], pa.schema(SCHEMA), "test")


class TestOutput:
    def test_whole_files(self, output, tmp_path):
        output.write({"a/b.txt": b"1"})
        output.write({"a/b.txt": b"2"})
        assert output.read("a/b.txt") == b"2" and output.read("a/c.txt") is None
        assert [path.name for path in (tmp_path / "out" / "a").iterdir()] == ["b.txt"]

    def test_full_disk(self, output, monkeypatch, tmp_path):
        output.write({"a.txt": b"before"})
        if output.local:
            monkeypatch.setattr("lseg.files._write", no_space)
        else:
            files, _ = open_store(output.where)
            monkeypatch.setattr(output, "_open", lambda: (FullDisk(files), str(tmp_path / "out")))
        with pytest.raises(UserError, match="cannot be written .*No space left on device.*; choose another"):
            output.write({"a.txt": b"after"})
        monkeypatch.undo()
        assert output.read("a.txt") == b"before"

    def test_done(self, output):
        output.write({"parts/part-1.parquet": part_of("a", "b"), "parts/part-2.parquet": part_of("c")})
        assert output.done() == {name: f"/from/{name}" for name in "abc"}
        rows = [Row(name, name, f"/from/{name}") for name in "abcd"]
        assert names_of(left_to_do(rows, output.done(), "out")) == ["d"]
        with pytest.raises(UserError, match="a in out was made from /from/a, and is /to/a now: give the images"):
            left_to_do([Row("a", "a", "/to/a")], output.done(), "out")
        output.write({"parts/part-3.parquet": part_of("b")})
        with pytest.raises(UserError, match="b stands in .*part-3.parquet and in another part as well"):
            output.done()
        output.write({"parts/part-3.parquet": b"PAR1"})
        with pytest.raises(UserError, match="part-3.parquet is damaged .*: delete it, and its images are done again"):
            output.done()

    def test_job(self, output):
        job = {"weights": "1234", "labels": [["a"], ["b", "c"]]}
        output.write(check_job(output, job, resume=False))
        assert json.loads(output.read(JOB))["labels"] == job["labels"]
        assert check_job(output, job, resume=True) == {}
        with pytest.raises(UserError, match=r'begun with other weights \("1234", now "5678"\): resume it with'):
            check_job(output, job | {"weights": "5678"}, resume=True)
        output.write({JOB: b"{"})
        with pytest.raises(UserError, match="job.json is damaged"):
            check_job(output, job, resume=True)

    def test_names_that_are_no_text(self):
        odd = os.fsdecode(b"\xff.jpg")
        row = Row(odd, odd, f"/from/{odd}")
        assert part_name([row]) != part_name([Row("x", "x", "x")])
        assert left_to_do([row], {"\\udcff.jpg": "/from/\\udcff.jpg"}, "out") == []


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


class FullDisk:
    """A file system that takes no bytes."""

    def __init__(self, files):
        self.create_dir, self.open_output_stream = files.create_dir, no_space


def test_an_error_in_a_worker_is_its_sentence():
    """However deep a worker's error is wrapped, and where only its text came through."""
    outer = RuntimeError("wrapped")
    outer.cause = UserError("the disk is full: mend that")
    assert str(in_a_sentence(outer)) == "the disk is full: mend that"
    text = "ActorDiedError: ...\n  File x\nlseg.errors.UserError: engines/x is missing: build it\n"
    assert str(in_a_sentence(RuntimeError(text))) == "engines/x is missing: build it"
    assert str(in_a_sentence(RuntimeError("a\nb"))) == (
        "Ray gave up (RuntimeError: b): what is written stays; mend that and go on with --resume"
    )


class TestTurns:
    """Who may write to a local folder, and what is done twice."""

    def test_a_killed_run_writes_no_more(self, tmp_path):
        """Its workers have a copy of its output; once the next run looks at what is done, theirs is refused."""
        first, second = Output(str(tmp_path)), Output(str(tmp_path))
        first.take_over()
        worker = pickle.loads(pickle.dumps(first))
        worker.write({"parts/part-a.parquet": b"a"})
        second.take_over()
        pickle.loads(pickle.dumps(second)).write({"parts/part-b.parquet": b"b"})
        with pytest.raises(UserError, match=f"another run has begun to write to {tmp_path}: this one ends"):
            worker.write({"parts/part-c.parquet": b"c"})
        assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["part-a.parquet", "part-b.parquet"]

    def test_a_machine_with_a_folder_of_its_own(self, tmp_path):
        """Of a cluster whose machines do not share the output: its parts would be nowhere, and nobody would know."""
        first = Output(str(tmp_path))
        first.take_over()
        (tmp_path / bulk_output.RUN).unlink()
        with pytest.raises(UserError, match=f"{tmp_path} is not, .*give an --output that all machines share"):
            pickle.loads(pickle.dumps(first)).write({"parts/a": b"a"})
        assert list(tmp_path.iterdir()) == []

    def test_the_next_run_waits_for_what_is_being_written(self, tmp_path, monkeypatch):
        """A part that a killed run's worker has begun to write is there when the next run looks, or never comes."""
        first, second, looked = Output(str(tmp_path)), Output(str(tmp_path)), []
        first.take_over()
        writing, go_on = threading.Event(), threading.Event()
        write = bulk_output.write_files

        def slowly(files: dict) -> None:
            writing.set()
            assert go_on.wait(10)
            write(files)

        def look() -> None:
            second.take_over()
            looked.append([path.name for path in (tmp_path / "parts").iterdir()])

        monkeypatch.setattr(bulk_output, "write_files", slowly)
        threads = [threading.Thread(target=first.write, args=({"parts/a": b"a"},)), threading.Thread(target=look)]
        threads[0].start()
        assert writing.wait(10)
        threads[1].start()
        threads[1].join(0.2)
        assert looked == []
        go_on.set()
        for thread in threads:
            thread.join(10)
        assert looked == [["a"]]

    def test_a_part_that_stands_is_left_alone(self, tmp_path):
        """Written by a worker that died before anybody heard of it: its images' files are not made anew either."""
        rows = [(Row("a", "a.png", "a.png"), (4, 6))]
        wanted = Wanted(Output(str(tmp_path)), Columns(), VOCABULARY, None, False, True, 0, 8)
        part = {"rows": pickle.dumps(rows), "part": part_name([row for row, _ in rows]), "bad": pickle.dumps([])}
        labels, cosines = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.float32)
        tally = tally_at(labels, cosines, len(VOCABULARY.labels.names), 6, 4)
        part |= {"tallies": pickle.dumps([tally]), "maps": labels, "made_by": "a test"}
        assert write(part, wanted)["done"] == 1
        before = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
        assert len(before) == 3
        assert write(part, wanted)["done"] == 1
        assert {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()} == before
