"""lseg_ray.py on a local cluster: the same results as enginerun.py, whatever dies in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_enginerun import names, save
from test_sources import pack

import lseg_ray
from lseg.bulk import ROOT, Stages, interpreter
from lseg.bulk_stages import Network, Part, Wanted, decode, write
from lseg.errors import UserError, run
from lseg.features import Features
from lseg.image import decode_image, read_image, to_pixels
from lseg.run_onnxruntime import OnnxRuntimeRunner

ray = pytest.importorskip("ray", reason="Ray is not installed: ./requirements.sh --dev installs it")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: ./requirements.sh --dev installs it")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: ./requirements.sh --dev installs it")
LABELS = "sky, building, tree, road"


def start_cluster(**resources: int) -> None:
    """A cluster as lseg_ray.py starts it on two cores, and the workers find the tests' stages."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    ray.init(
        "local",
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}} | interpreter(),
        **resources,
    )


@pytest.fixture(scope="class")
def two_cores() -> Iterator[None]:
    """One cluster for all tests of a class."""
    start_cluster()
    yield
    ray.shutdown()


@pytest.fixture(scope="class")
def two_gpus() -> Iterator[None]:
    """The same, and Ray is told of GPUs: it counts them, and nothing here uses one."""
    start_cluster(num_gpus=2)
    yield
    ray.shutdown()


Call = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def bulk(tiny, tmp_path, capfd) -> Call:
    """Runs lseg_ray with the tiny weights on the cluster, to tmp_path / "out": exit status, lines on stdout, stderr."""

    def call(*arguments: object, stages: Stages | None = None, output: object = None) -> tuple[int, list, list]:
        options = ["--weights", tiny.weights, "--onnx", tiny.folder, "--backend", "onnxruntime", "--part", 3]
        options += ["--output", output or tmp_path / "out"]
        if "--labels-file" not in arguments and "--features" not in arguments:
            options += ["--labels", LABELS]
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run(lambda: lseg_ray.main(lseg_ray.parse_args([*map(str, arguments), *map(str, options)]), stages))
        out, err = capfd.readouterr()
        return end.value.code, out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def photos(tmp_path, seed) -> Path:
    """Eleven photos of different sizes, some in a folder below."""
    for index in range(11):
        size = (40 + 7 * index, 90 - 5 * index)
        save(tmp_path / "photos" / ("below" if index % 3 == 0 else "") / f"p{index:02d}.jpg", seed + index, size)
    return tmp_path / "photos"


def rows_in(folder: Path) -> list[dict]:
    """Of all parts, by name; a name that stands there twice is there twice."""
    rows = [row for file in sorted((folder / "parts").iterdir()) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["name"])


def lines_of(segment: Call, *arguments: object, folder: Path) -> list[dict]:
    """What enginerun.py says of the same photos; its label maps go to folder / "single"."""
    options = ["--labels", LABELS, "--backend", "onnxruntime", "--jsonl", folder / "lines.jsonl", "--save-labels"]
    code, _, _ = segment(*arguments, *options, output=folder / "single")
    assert code == 0
    lines = [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]
    for line in lines:  # enginerun.py names photos from the current directory where that is shorter
        line["photo"] = os.path.abspath(line["photo"])
    return sorted(lines, key=lambda line: line["photo"])


def assert_same(rows: list[dict], lines: list[dict]) -> None:
    """The same photos, each once, with the same labels and numbers."""
    assert sorted(row["photo"] for row in rows) == [line["photo"] for line in lines]
    for row, line in zip(sorted(rows, key=lambda row: row["photo"]), lines, strict=True):
        line.pop("picture")
        assert {key: row[key] for key in line} == line


def once(path: Path) -> bool:
    """True the first time, on whatever worker."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


class Dies(Network):
    """An actor that is killed when it has its third part done and not handed on, once."""

    def __call__(self, part: Part) -> Part:
        result = super().__call__(part)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3 and once(Path(self.wanted.output.where, "killed-actor")):
            os.kill(os.getpid(), signal.SIGKILL)
        return result


class TellsItsGpu(Network):
    """An actor that writes down which GPU is its own."""

    def __call__(self, part: Part) -> Part:
        result = super().__call__(part)
        folder = Path(self.wanted.output.where, "gpus")
        folder.mkdir(exist_ok=True)
        (folder / f"{os.environ['CUDA_VISIBLE_DEVICES']}-{os.getpid()}").touch()
        return result


def dies_reading(part: Part, wanted: Wanted) -> Part:
    if once(Path(wanted.output.where, "killed-reader")):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(part, wanted)


def dies_having_written(part: Part, wanted: Wanted) -> Part:
    """The part is written; nobody hears of it."""
    result = write(part, wanted)
    if once(Path(wanted.output.where, "killed-writer")):
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def always_dies(part: Part, wanted: Wanted) -> Part:
    with open(Path(wanted.output.where, "tries"), "a") as file:
        file.write(".")
    os.kill(os.getpid(), signal.SIGKILL)
    return part


def full_disk(part: Part, wanted: Wanted) -> Part:
    """The second part that is written finds the disk full."""
    if once(Path(wanted.output.where, "first")):
        return write(part, wanted)
    raise UserError(f"{wanted.output.where} cannot be written (No space left on device); choose another output folder")


@pytest.mark.usefixtures("two_cores")
class TestRuns:
    def test_as_enginerun(self, bulk, segment, photos, tmp_path):
        code, out, err = bulk(photos, "--save-labels")
        assert (code, err) == (0, [])
        assert out[0] == "11 images in 4 parts, by 1 network on a CPU" and out[1].startswith("11 images in ")
        lines = lines_of(segment, photos, folder=tmp_path)
        assert_same(rows_in(tmp_path / "out"), lines)
        for line in lines:
            name = Path(line["photo"]).relative_to(photos).with_suffix("").as_posix()
            for end in ("_labels.png", "_labels.json"):
                made, expected = (tmp_path / folder / f"{name}{end}" for folder in ("out", "single"))
                assert made.read_bytes() == expected.read_bytes()

    def test_workers_are_killed(self, bulk, segment, photos, tmp_path):
        """One of each stage, at work: nothing is lost and nothing is there twice."""
        code, _, err = bulk(photos, stages=Stages(dies_reading, Dies, dies_having_written))
        assert (code, err) == (0, [])
        for kind in ("reader", "actor", "writer"):
            assert (tmp_path / "out" / f"killed-{kind}").exists()
        assert len(names(tmp_path / "out" / "parts")) == 4
        assert_same(rows_in(tmp_path / "out"), lines_of(segment, photos, folder=tmp_path))

    def test_full_disk_then_resume(self, bulk, segment, photos, tmp_path):
        code, _, err = bulk(photos, stages=Stages(write=full_disk))
        assert (code, len(err)) == (2, 1)
        assert err[0].endswith("out cannot be written (No space left on device); choose another output folder")
        before = len(rows_in(tmp_path / "out"))
        assert 0 < before < 11
        code, out, err = bulk(photos, "--resume")
        assert (code, err, out[0]) == (0, [], f"note: {before} of 11 images are done already")
        assert_same(rows_in(tmp_path / "out"), lines_of(segment, photos, folder=tmp_path))
        code, out, _ = bulk(photos, "--resume")
        assert (code, out) == (0, ["note: 11 of 11 images are done already"])
        refused(bulk, photos, tmp_path)

    @pytest.mark.slow
    def test_what_kills_its_worker_does_not_hang(self, bulk, photos, tmp_path):
        code, _, err = bulk(sorted(photos.glob("*.jpg"))[0], stages=Stages(decode=always_dies))
        assert code == 2 and len(err) == 1
        assert err[0].startswith("error: Ray gave up (") and "go on with --resume" in err[0]
        assert (tmp_path / "out" / "tries").read_text() == "." * 6

    def test_unreadable_and_rle(self, bulk, segment, photos, tmp_path):
        """What can be read is done; the other is told, and tried again when it is mended."""
        (photos / "p01.jpg").rename(tmp_path / "good.jpg")
        (photos / "p01.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:200])
        code, _, err = bulk(photos, "--rle", "--unknown", 0.05)
        assert code == 2
        assert err == [
            f"error: {photos}/p01.jpg is cut short: it is a JPEG without its end; copy or download it again",
            "error: 1 of 11 images could not be read and are left out: see above",
        ]
        (tmp_path / "good.jpg").replace(photos / "p01.jpg")
        code, out, _ = bulk(photos, "--rle", "--unknown", 0.05, "--resume")
        assert code == 0 and out[0] == "note: 10 of 11 images are done already"
        lines = lines_of(segment, photos, "--rle", "--unknown", 0.05, folder=tmp_path)
        assert any("rle" in entry for line in lines for entry in line["labels"])
        assert_same(rows_in(tmp_path / "out"), lines)

    def test_tar_and_parquet_by_uri(self, bulk, segment, photos, tmp_path):
        """The same images from a tar set and from Parquet, read and written through pyarrow's file systems."""
        expected = lines_of(segment, photos, folder=tmp_path)
        store = tmp_path / "store"
        pack_all(photos, store)
        code, _, err = bulk(f"file://{store}", "--name-column", "key", output=f"file://{tmp_path}/sent")
        assert (code, err) == (0, [])
        found = {row["name"]: row for row in rows_in(tmp_path / "sent")}
        assert len(found) == len(rows_in(tmp_path / "sent")) == 11
        for line in expected:
            name = Path(line["photo"]).relative_to(photos).with_suffix("").as_posix()
            assert found[name]["labels"] == line["labels"] and found[name]["size"] == line["size"]
        code, out, err = bulk(str(store), "--name-column", "key", "--resume", output=tmp_path / "local")
        assert (code, err) == (0, []) and len(rows_in(tmp_path / "local")) == 11
        assert [row["labels"] for row in rows_in(tmp_path / "local")] == [
            found[row["name"]]["labels"] for row in rows_in(tmp_path / "local")
        ]

    def test_features_by_two_actors(self, bulk, tiny, photos, tmp_path):
        code, _, err = bulk(photos, "--features", 9, "--actors", 3)
        assert code == 2 and err == [
            "error: 3 actors would leave no CPU slot of the cluster's 3 for reading and writing: give --actors 2 or "
            "fewer, or a larger cluster"
        ]
        code, out, err = bulk(photos, "--features", 9, "--actors", 2)  # what was refused has begun nothing
        assert (code, err, out[0]) == (0, [], "11 images in 4 parts, by 2 networks on a CPU")
        found = rows_in(tmp_path / "out")
        assert len(found) == 11
        with OnnxRuntimeRunner(tiny.weights, tiny.folder) as runner:
            for row in found:
                photo = read_image(row["photo"])
                grid = runner.encode_image(to_pixels(photo, 64)[None])[0]
                expected = Features(grid, 64, *photo.shape[:2]).strided(9)
                assert row["shape"] == list(expected.shape) and row["stride"] == 9
                assert np.array_equal(np.array(row["features"], np.float16).reshape(expected.shape), expected)


@pytest.mark.usefixtures("two_gpus")
class TestClusterWithGpus:
    def test_an_actor_a_gpu(self, bulk, segment, photos, tmp_path):
        code, out, err = bulk(photos, "--save-labels", stages=Stages(network=TellsItsGpu))
        assert (code, err, out[0]) == (0, [], "11 images in 4 parts, by 2 networks on a GPU")
        assert_same(rows_in(tmp_path / "out"), lines_of(segment, photos, folder=tmp_path))
        found = [path.name.split("-") for path in (tmp_path / "out" / "gpus").iterdir()]
        assert {gpu for gpu, _ in found} <= {"0", "1"} and len({actor for _, actor in found}) == len(found)

    def test_more_actors_than_gpus(self, bulk, photos):
        code, _, err = bulk(photos, "--actors", 3)
        assert code == 2
        assert err == ["error: --actors 3 are more than the cluster's 2 GPUs: give at most one a GPU"]


@pytest.mark.slow
def test_the_whole_run_is_killed(tiny, segment, tmp_path, seed):
    """As a user runs it, a cluster of its own: killed while it works, and resumed."""
    for index in range(60):
        save(tmp_path / "photos" / f"p{index:02d}.jpg", seed + index, (1500, 1200))
    command = [sys.executable, str(ROOT / "lseg_ray.py"), str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    command += ["--weights", tiny.weights, "--onnx", str(tiny.folder), "--labels", LABELS, "--part", "2"]
    command += ["--backend", "onnxruntime"]
    parts = tmp_path / "out" / "parts"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not parts.is_dir() or len(names(parts)) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(rows_in(tmp_path / "out")) < 60
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert_same(rows_in(tmp_path / "out"), lines_of(segment, tmp_path / "photos", folder=tmp_path))


def refused(bulk: Call, photos: Path, tmp_path: Path) -> None:
    """What a job that is done does not take, each in a sentence, before anything is started or written."""
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    words = tmp_path / "words.txt"
    words.write_text("sky\nbuilding\ntree\ncar\n")
    other = 'was begun with other labels ([["sky"], ["building"], ["tree"], ["road"'
    cases = {
        (photos,): "out holds a job already: add --resume to go on, or choose another --output",
        (photos, "--resume", "--labels-file", words): other,
        (photos, "--resume", "--unknown", 0.1): "was begun with other --unknown (null, now 0.1): resume it with what",
        (photos, "--resume", "--rle"): "was begun with other --rle (false, now true): resume it with what it was begun",
    }
    for arguments, sentence in cases.items():
        code, _, err = bulk(*arguments)
        assert code == 2 and len(err) == 1 and sentence in err[0]
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def pack_all(photos: Path, store: Path) -> None:
    """Three photos loose, four in a tar, four in Parquet."""
    files = sorted(photos.rglob("*.jpg"))
    store.mkdir()
    for file in files[:3]:
        target = store / file.relative_to(photos)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    pack(store / "set.tar", {file.relative_to(photos).as_posix(): file.read_bytes() for file in files[3:7]})
    keys = [file.relative_to(photos).as_posix() for file in files[7:]]
    table = pa.table({"key": keys, "image": [file.read_bytes() for file in files[7:]]})
    pq.write_table(table, store / "rest.parquet", row_group_size=3)
    assert decode_image(table["image"][0].as_py(), "rest").ndim == 3
