"""What a machine may do to a run: a full disk, folders that cannot be written, no home, no locale, a clock that jumps.

A full disk and a read-only one are real ones: a small file system in memory, which only root may mount.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from checkpoints import tiny_recipe
from test_enginerun import save

import clip_onnx_export
import enginerun
import lseg_export
from lseg import engine, files, logfile
from lseg.bulk_output import Output
from lseg.errors import UserError, run
from lseg.files import HELD, UNFINISHED, write_files
from lseg.text_cache import FILE, TextCache

ROOT = Path(enginerun.__file__).parent
DEVICE = SimpleNamespace(name="a GPU", compute_capability="8.9")
DISK = 1 << 20  # bytes of the small disk
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
LABELS = ("--labels", "sky, tree, road")


class Disk:
    """A small file system."""

    def __init__(self, path: Path):
        self.path = path

    def leave(self, size: int) -> None:
        """Fills it up to so many bytes."""
        filler = self.path / ".filler"
        filler.unlink(missing_ok=True)
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize
        filler.write_bytes(bytes(max(0, free - size)))

    def grow(self) -> None:
        subprocess.run(["mount", "-o", f"remount,size={16 * DISK}", str(self.path)], check=True)

    def read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)

    def files(self) -> dict[str, bytes]:
        found = (path for path in self.path.rglob("*") if path.is_file() and path.name != ".filler")
        return {path.relative_to(self.path).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "none", str(path)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here: that needs root, and a container that lets it")
    yield Disk(path)
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def photos(tmp_path, seed) -> Path:
    for index in range(3):
        save(tmp_path / "photos" / f"p{index}.png", seed + index, (60 + 10 * index, 50))
    return tmp_path / "photos"


@pytest.fixture
def enginerun_with(tiny, capfd) -> Callable[..., tuple[int, list[str]]]:
    """Runs enginerun with the tiny weights and no other options than these: exit status, and lines on stderr."""

    def call(*arguments: object) -> tuple[int, list[str]]:
        options = ["--weights", tiny.weights, "--onnx", str(tiny.folder), *map(str, arguments)]
        with pytest.raises(SystemExit) as end:
            run(lambda: enginerun.main(enginerun.parse_args(options)))
        return end.value.code, capfd.readouterr().err.splitlines()

    return call


def film(path: Path, seed: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for frame in np.random.default_rng(seed).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8):
        writer.write(frame)
    writer.release()
    return path


def plain(name: str, data: bytes) -> object:
    """What a file says: the header of .safetensors has no order of its own."""
    if not name.endswith(".safetensors"):
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def scripts_of(tiny) -> dict[str, Callable[[Path], object]]:
    weights = ["--weights", tiny.weights, "--quiet"]
    return {
        "image": lambda folder: lseg_export.main(lseg_export.parse_args([*weights, "--output", str(folder)])),
        "text": lambda folder: clip_onnx_export.main(clip_onnx_export.parse_args([*weights, "--output", str(folder)])),
    }


class TestFullDisk:
    """One sentence, exit status 2, and of each file what an undisturbed run writes, or nothing."""

    @pytest.mark.parametrize("kind", ["pictures", "features", "triton"])
    def test_enginerun(self, enginerun_with, photos, disk, tmp_path, seed, kind):
        def options(out: Path) -> list[object]:
            if kind == "triton":
                return ["--export-triton", out]
            if kind == "features":
                return [photos, "--features", out, "--stride", 2]
            return [photos, *LABELS, "--save-labels", "--save-scores", "--jsonl", out / "l.jsonl", "--output", out]

        code, err = enginerun_with(*options(tmp_path / "whole"))
        assert (code, err) == (0, [])
        whole = {
            p.relative_to(tmp_path / "whole").as_posix(): p.read_bytes() for p in (tmp_path / "whole").rglob("*.*")
        }
        need = sum(map(len, whole.values()))
        rng = random.Random(seed)
        for size in (0, *(rng.randrange(4096, max(8192, min(need, DISK))) for _ in range(3))):
            disk.leave(size)
            out = disk.path / "out"
            code, err = enginerun_with(*options(out))
            found = {name.removeprefix("out/"): data for name, data in disk.files().items()}
            assert code in (0, 2)
            if code:
                assert len(err) == 1 and "(No space left on device)" in err[0], err
            else:
                assert found.keys() == whole.keys()
            for name, data in found.items():
                if name == "l.jsonl":
                    lines = [line.replace(str(out), str(tmp_path / "whole")) for line in data.decode().splitlines()]
                    assert data[-1:] in (b"", b"\n") and set(lines) <= set(whole[name].decode().splitlines())
                else:
                    assert plain(name, data) == plain(name, whole[name]), f"{name} is not whole, with {size} bytes free"
            shutil.rmtree(out, ignore_errors=True)

    def test_a_video(self, segment, disk, tmp_path, seed):
        source = film(tmp_path / "film.mp4", seed)
        for size in (0, 4096, 16384):
            disk.leave(size)
            code, _, err = segment("--video", source, *LABELS, "--save-labels", output=disk.path / "out")
            assert code == 2 and len(err) == 1 and "disk" in err[0] or "No space left" in err[0], err
            for path in (disk.path / "out").rglob("*.png"):
                assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape == (48, 64)
            shutil.rmtree(disk.path / "out", ignore_errors=True)

    @pytest.mark.parametrize("kind", ["image", "text"])
    def test_exports(self, tiny, disk, capfd, kind):
        disk.leave(65536)
        with pytest.raises(SystemExit) as end:
            run(lambda: scripts_of(tiny)[kind](disk.path / "onnx"))
        err = capfd.readouterr().err.splitlines()
        assert end.value.code == 2 and len(err) == 1 and "No space left on device" in err[0]
        assert disk.files() == {}

    def test_kept_texts(self, disk, seed):
        """They are done without, and what is kept already is found again."""
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 1000, (300, 77), dtype=np.int32)
        vectors = rng.standard_normal((300, 512)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        cache = TextCache(disk.path / FILE, "an encoder")
        assert np.array_equal(cache.get(tokens[:5], lambda places: vectors[places]), vectors[:5])
        disk.leave(8192)
        assert np.array_equal(cache.get(tokens, lambda places: vectors[places]), vectors)
        assert np.array_equal(cache.get(tokens[:5], lambda places: vectors[places]), vectors[:5]) and cache.found == 5

    def test_parts_and_logs(self, disk, monkeypatch):
        output = Output(str(disk.path))
        output.prepare()
        output.take_over()
        output.write({"parts/part-a.parquet": b"a" * 100})
        disk.leave(4096)
        for content in ({"parts/part-a.parquet": bytes(9000)}, {"b_labels.png": b"b", "b_labels.json": bytes(9000)}):
            with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
                output.write(content)
        (disk.path / ".run.lock").unlink()
        disk.leave(0)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            Output(str(disk.path)).take_over()
        monkeypatch.setattr(logfile, "FOLDER", disk.path / "log")
        logfile.append("a.log", "b" * 9000)
        found = disk.files()
        assert found.pop("parts/part-a.parquet") == b"a" * 100
        assert set(found) <= {".run.lock", "log/a.log"}


class TestReadOnly:
    def test_outputs(self, enginerun_with, photos, disk, tmp_path):
        disk.read_only()
        out = disk.path / "out"
        lines = [photos, "--output", tmp_path / "out", "--jsonl", out / "l.jsonl"]
        for options in ([photos, "--output", out], [photos, "--features", out], ["--export-triton", out], lines):
            code, err = enginerun_with(*options)
            assert code == 2 and len(err) == 1 and "cannot be written (Read-only file system)" in err[0]
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
            Output(str(disk.path)).prepare()

    def test_onnx(self, segment, tiny, photos, disk, capfd):
        """What is there is used, and texts are not kept; what is missing is told, and so is what cannot be replaced."""
        disk.grow()
        for path in tiny.folder.glob("*.onnx"):
            shutil.copy(path, disk.path)
        disk.read_only()
        code, _, err = segment(photos, *LABELS, "--onnx", disk.path)
        assert (code, err) == (0, [])
        for options in (["--onnx", disk.path, "--re-export"], ["--onnx", disk.path / "none"]):
            code, _, err = segment(photos, *options)
            assert code == 2 and len(err) == 1 and "cannot be written (Read-only file system)" in err[0], err
        for script in scripts_of(tiny).values():
            with pytest.raises(SystemExit) as end:
                run(lambda script=script: script(disk.path))
            err = capfd.readouterr().err.splitlines()
            assert end.value.code == 2 and len(err) == 1 and "Read-only file system" in err[0]

    def test_logs(self, disk, monkeypatch):
        disk.read_only()
        monkeypatch.setattr(logfile, "FOLDER", disk.path / "log")
        logfile.append("a.log", "nothing is written, and nothing stops")
        assert disk.files() == {}


class TestNoHomeAndNoLocale:
    @pytest.mark.parametrize("home", [{}, {"HOME": "/nonexistent"}])
    def test_enginerun(self, tiny, tmp_path, seed, home):
        """Names and labels beyond ASCII, as bytes that Python would take for none: read, drawn and written."""
        photo = save(tmp_path / "straße" / "日本.png", seed)
        out = tmp_path / "größe"
        command = [sys.executable, str(ROOT / "enginerun.py"), str(photo.parent), "--labels", "Straße, 空, sky"]
        command += ["--output", str(out), "--save-labels", "--jsonl", str(out / "l.jsonl"), "--backend", "onnxruntime"]
        command += ["--weights", tiny.weights, "--onnx", str(tiny.folder)]
        environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **ASCII, **home}
        result = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path, timeout=120)
        assert (result.returncode, result.stderr) == (0, b"")
        assert result.stdout.isascii() and rb"\u65e5\u672c.png" in result.stdout
        names = {name for name in os.listdir(out)}
        assert names == {"日本_lseg.png", "日本_labels.png", "日本_labels.json", "l.jsonl"}
        meaning = json.loads((out / "日本_labels.json").read_text("utf-8"))
        assert [label["name"] for label in meaning["labels"]] == ["Straße", "空", "sky"]
        assert json.loads((out / "l.jsonl").read_text("utf-8"))["photo"].endswith("straße/日本.png")

    @pytest.mark.parametrize("how", ["-c", "-m", "-", "embedded"])
    def test_however_it_is_started(self, tmp_path, how):
        """Once, with its status and options; anew in UTF-8 where there is a program to start."""
        program = "import sys; from lseg.errors import run; run(lambda: print(sys.flags.utf8_mode, *sys.argv[1:]) or 7)"
        (tmp_path / "program.py").write_text(program)
        options = {"-c": ["-c", program], "-m": ["-m", "program"], "-": ["-"]}
        options["embedded"] = ["-c", f"import sys; sys.executable = ''; {program}"]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), **ASCII}
        command = [sys.executable, *options[how], "a", "b"]
        result = subprocess.run(command, env=environment, input=program.encode(), capture_output=True, timeout=60)
        utf8 = 1 if how in ("-c", "-m") else 0
        assert (result.returncode, result.stdout, result.stderr) == (7, f"{utf8} a b\n".encode(), b"")

    def test_a_folder_whose_name_is_no_text(self, tiny, tmp_path, capfd):
        """torch cannot open it: a sentence."""
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
        for script in scripts_of(tiny).values():
            with pytest.raises(SystemExit) as end:
                run(lambda script=script: script(folder))
            err = capfd.readouterr().err.splitlines()
            assert end.value.code == 2 and len(err) == 1
            assert err[0].endswith("its name is not valid UTF-8, which ONNX needs: choose another folder")
        assert not folder.exists()


class TestClock:
    def test_durations_do_not_follow_it(self, segment, photos, monkeypatch, seed):
        """A clock that jumps by days, back and forth, between any two looks at it."""
        rng = random.Random(seed)
        monkeypatch.setattr(time, "time", lambda: rng.uniform(-1e9, 4e9))
        monkeypatch.setattr(time, "time_ns", lambda: rng.randrange(4 * 10**18))
        code, out, err = segment(photos, *LABELS)
        assert (code, err) == (0, [])
        found = [float(number) for line in out[-2:] for number in re.findall(r"\d+\.\d+", line)]
        assert len(found) >= 7 and all(0 <= number < 600_000 for number in found)

    def test_nothing_asks_for_the_time_of_day(self):
        """But for the lines of a log: what is compared or subtracted comes from a monotonic clock, or from contents."""
        asked = re.compile(r"\btime\.time\b|\btime_ns\(|datetime\.|getmtime|st_mtime\b|st_ctime\b|utime\(")
        for path in (*ROOT.glob("*.py"), *ROOT.glob("lseg/*.py"), *ROOT.glob("demo/*.py")):
            lines = [line for line in path.read_text("utf-8").splitlines() if asked.search(line)]
            assert not lines, f"{path.name}: {lines}"

    @pytest.mark.parametrize("when", [0, 1, 4_000_000_000])
    def test_leftovers_of_any_age(self, tmp_path, monkeypatch, when):
        """Nobody holds it, so it goes, be it from the future; a live one stays, be it from 1970."""
        monkeypatch.setattr(files, "_swept", set())
        left = tmp_path / f"{UNFINISHED}left"
        left.mkdir()
        (left / HELD).touch()
        with files.unfinished(tmp_path) as live:
            left.mkdir(exist_ok=True)
            (left / HELD).touch()
            for path in (left, left / HELD, live, live / HELD):
                os.utime(path, (when, when))
            files._swept.clear()
            write_files({tmp_path / "a": b"a"})
            assert not left.exists() and live.is_dir()
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_what_was_made_in_the_future(self, segment, tiny, photos, tmp_path):
        """Exported files, kept texts and results count by what they hold."""
        folder = shutil.copytree(tiny.folder, tmp_path / "onnx")
        for when in (4_000_000_000, 0):
            for path in (*folder.iterdir(), Path(tiny.weights)):
                os.utime(path, (when, when))
            code, out, err = segment(photos, *LABELS, "--onnx", folder, "--resume")
            assert (code, err) == (0, []) and not any("wrote" in line for line in out)
            for path in (tmp_path / "out").iterdir():
                os.utime(path, (when, when))
        assert out == ["note: 3 of 3 photos are done already"]


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_engines(tiny, disk, monkeypatch, state):
    """What cannot be kept is told, and leaves nothing that counts as an engine; one that is there is taken."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.0", Builder=None))
    monkeypatch.setattr(engine, "build", lambda *_: bytes(300_000))
    spec = tiny_recipe(tiny.folder).spec("dots")
    folder = disk.path / "engines"

    def get(spec: engine.EngineSpec) -> bytes:
        return engine.get_engine(spec, lambda: None, folder, DEVICE, lambda _: None)

    assert get(spec) == bytes(300_000)
    before = disk.files()
    assert len([name for name in before if not name.endswith(".lock")]) == 2
    disk.leave(100_000) if state == "full" else disk.read_only()
    assert get(spec) == bytes(300_000)
    reason = "No space left on device" if state == "full" else "Read-only file system"
    with pytest.raises(UserError, match=rf"cannot be written \({reason}\)"):
        get(replace(spec, optimization_level=spec.optimization_level + 1))
    assert {name: data for name, data in disk.files().items() if data} == {n: d for n, d in before.items() if d}
