"""What enginerun.py says of bad input and of Ctrl-C, and that it leaves nothing behind."""

from __future__ import annotations

import importlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_enginerun import ROOT, names, save

from lseg import errors
from lseg.image import read_image
from lseg.onnx_file import IMAGE_ONNX, TEXT_ONNX


def bad_photo(content: bytes | None):
    def make(folder: Path) -> list:
        if content is not None:
            (folder / "bad.jpg").write_bytes(content)
        return [folder / "bad.jpg"]

    return make


def empty_folder(folder: Path) -> list:
    (folder / "empty").mkdir()
    return [folder / "empty"]


def weights(content: bytes | None):
    def make(folder: Path) -> list:
        path = folder / "bad.ckpt"
        if content is not None:
            path.write_bytes(content)
        return [folder / "good.jpg", "--weights", path]

    return make


def bad_onnx(name: str, content: bytes):
    def make(folder: Path) -> list:
        shutil.copytree(folder / "tiny", folder / "onnx")
        (folder / "onnx" / name).write_bytes(content)
        return [folder / "good.jpg", "--onnx", folder / "onnx"]

    return make


def below_a_file(option: str):
    return lambda folder: [folder / "good.jpg", option, folder / "good.jpg" / "below"]


HTML = b"<!DOCTYPE html><html>quota exceeded</html>"
BAD = {
    "missing photo": (bad_photo(None), "bad.jpg does not exist; check the name"),
    "empty photo": (bad_photo(b""), "bad.jpg is empty; copy or download it again"),
    "photo cut short": (
        lambda folder: bad_photo((folder / "good.jpg").read_bytes()[:-200])(folder),
        "bad.jpg is cut short",
    ),
    "png cut short": (bad_photo(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "bad.jpg is damaged or cut short"),
    "not an image": (bad_photo(b"some text\n"), "bad.jpg is not an image that OpenCV reads"),
    "web page": (bad_photo(HTML), "bad.jpg is a web page, not an image"),
    "good, then missing": (lambda folder: [folder / "good.jpg", folder / "none.jpg"], "none.jpg does not exist"),
    "folder without images": (empty_folder, "empty holds no image; give one with .jpg, .jpeg"),
    "no labels": (lambda folder: [folder / "good.jpg", "--labels", ""], "no label is given: name at least one"),
    "blank labels": (lambda folder: [folder / "good.jpg", "--labels", " ,\t,\n, "], "no label is given"),
    "only other": (lambda folder: [folder / "good.jpg", "--labels", "other"], '"other" is the only label'),
    "long label": (
        lambda folder: [folder / "good.jpg", "--labels", "sky," + "car " * 76],
        "takes 78 tokens with its start and end, and CLIP reads at most 77: shorten it",
    ),
    "missing weights": (weights(None), "bad.ckpt does not exist: give a checkpoint's path or 'demo', or fetch"),
    "weights are a folder": (lambda folder: [folder / "good.jpg", "--weights", folder], "is a folder: give the check"),
    "weights are a web page": (weights(HTML), "bad.ckpt is a web page, which Google Drive sends"),
    "empty weights": (weights(b""), "bad.ckpt is empty: fetch the official file with"),
    "weights of another format": (weights(b"GGUF" * 100), "bad.ckpt is not a checkpoint"),
    "bad image ONNX": (bad_onnx(IMAGE_ONNX, HTML), "lseg.onnx is damaged, cut short or no ONNX file"),
    "bad text ONNX": (bad_onnx(TEXT_ONNX, b""), "clip_textual.onnx is "),
    "missing ready-made text ONNX": (
        lambda folder: [folder / "good.jpg", "--text-onnx", folder / "none.onnx"],
        "none.onnx does not exist: give CLIP ViT-B/32's text encoder",
    ),
    "ready-made text ONNX of an image encoder": (
        lambda folder: [folder / "good.jpg", "--text-onnx", folder / "tiny" / IMAGE_ONNX],
        "lseg.onnx takes images, not tokens",
    ),
    "output below a file": (below_a_file("--output"), "below cannot be written (Not a directory); choose another out"),
    "output is a file": (
        lambda folder: [folder / "good.jpg", "--output", folder / "good.jpg"],
        "good.jpg is a file, not a folder; choose another output folder",
    ),
    "ONNX folder below a file": (below_a_file("--onnx"), "below cannot be written (Not a directory): choose another"),
}


class TestBadInput:
    @pytest.mark.parametrize("name", [name for name in BAD if "ONNX" not in name and name != "good, then missing"])
    def test_before_anything_is_exported(self, tiny, tmp_path, segment, seed, name):
        """With no exported file there, it is still said at once, and none is written."""
        make, sentence = BAD[name]
        save(tmp_path / "good.jpg", seed)
        arguments = make(tmp_path)
        before = names(tmp_path)
        code, out, err = segment("--onnx", tmp_path / "onnx", *arguments)
        assert code == 2 and len(err) == 1 and sentence in err[0]
        assert not any("export" in line for line in out) and names(tmp_path) == before

    def test_other_weights_files_are_left_as_they_are(self, tiny, demo, tmp_path, segment, seed):
        """One file of other weights stops the run before the missing ones are exported from these."""
        folder = tmp_path / "onnx"
        folder.mkdir()
        shutil.copy(demo.folder / IMAGE_ONNX, folder)
        save(tmp_path / "good.jpg", seed)
        code, out, err = segment(tmp_path / "good.jpg", "--onnx", folder)
        assert code == 2 and not any("export" in line for line in out)
        assert "was exported from other weights (demo) than asked for" in err[0]
        assert names(folder) == [IMAGE_ONNX]

    @pytest.mark.parametrize(
        "name, backend",
        [(name, "onnxruntime") for name in BAD]
        + [(name, "torch") for name in BAD if "ONNX" not in name or "ready-made" in name],  # it reads no exported files
    )
    def test_one_sentence_and_nothing_written(self, tiny, tmp_path, segment, seed, name, backend):
        make, sentence = BAD[name]
        shutil.copytree(tiny.folder, tmp_path / "tiny")
        save(tmp_path / "good.jpg", seed)
        arguments = make(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        code, out, err = segment(*arguments, "--save-labels", "--backend", backend)
        assert code == 2
        assert len(err) == 1 and err[0].startswith("error: ") and sentence in err[0]
        assert not any(" -> " in line for line in out)
        assert sorted(tmp_path.rglob("*")) == before

    def test_an_unknown_backend(self, segment):
        code, _, err = segment("--backend", "abacus")
        assert code == 2 and "argument --backend: invalid choice: 'abacus'" in err[-1]

    def test_an_error_takes_away_only_the_folders_it_made(self, tmp_path, segment):
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"no image")
        (tmp_path / "there").mkdir()
        code, _, err = segment(bad, output=tmp_path / "there" / "new" / "newer")
        assert code == 2 and len(err) == 1
        assert names(tmp_path / "there") == []
        code, _, _ = segment(bad, output=tmp_path / "there")
        assert code == 2 and (tmp_path / "there").is_dir()

    def test_no_traceback_from_a_process_of_its_own(self, tmp_path, demo):
        command = [sys.executable, str(ROOT / "enginerun.py"), "none.jpg", "--onnx", str(demo.folder)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "error: none.jpg does not exist; check the name\n"


class TestInterrupt:
    def interrupt(self, command: list[str], ready: Callable[[], object], folder: Path) -> subprocess.CompletedProcess:
        """Ctrl-C as soon as `ready` gives something."""
        with subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests may run in background
        ) as process:
            while not ready() and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def test_in_the_middle_of_many_photos(self, tiny, tmp_path, seed):
        first = save(tmp_path / "photos" / "000.jpg", seed, (900, 700))
        photos = [Path(shutil.copy(first, first.with_name(f"{n:03}.jpg"))) for n in range(1, 150)]
        command = [str(ROOT / "enginerun.py"), "photos", "--weights", tiny.weights, "--onnx", str(tiny.folder)]
        result = self.interrupt(
            [*command, "--output", "out", "--save-labels"], (tmp_path / "out" / "002_lseg.png").exists, tmp_path
        )
        assert (result.returncode, result.stderr) == (130, "\nerror: interrupted; what was finished before stays\n")
        written = names(tmp_path / "out")
        assert 7 <= len(written) < 3 * len(photos)
        assert not any(name.startswith(".") for name in written)
        assert all(read_image(tmp_path / "out" / name).size for name in written if name.endswith(".png"))

    @pytest.mark.parametrize(
        "stage", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("", "/raw.onnx")), "/trial.onnx"]
    )
    def test_in_the_middle_of_an_export(self, tmp_path, stage):
        command = [str(ROOT / "enginerun.py"), "--onnx", "onnx", "--output", "out"]
        finished = tmp_path / "onnx" / "clip_textual.onnx"
        result = self.interrupt(
            command, lambda: finished.exists() and list(finished.parent.glob(f".unfinished-*{stage}")), tmp_path
        )
        assert (result.returncode, result.stderr) == (130, "\nerror: interrupted; what was finished before stays\n")
        assert names(tmp_path) == ["onnx"] and names(tmp_path / "onnx") == ["clip_textual.onnx"]  # which was finished


def test_a_missing_package_is_named(capsys):
    """With another Python than the environment's, say; a module of our own that is missing is a fault of ours."""
    with pytest.raises(SystemExit) as raised:
        errors.run(lambda: importlib.import_module("no_such_package.inner"))
    assert raised.value.code == 2
    assert capsys.readouterr().err == (
        f"error: the package no_such_package is not installed for {sys.executable}: use .venv/bin/python, put "
        "./requirements.sh in front, or see requirements*.txt\n"
    )
    with pytest.raises(ModuleNotFoundError):
        errors.run(lambda: importlib.import_module("lseg.no_such_module"))
