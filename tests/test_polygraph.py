"""polygraph.sh: what runs on any machine, its bound, its log, and a sentence for what it cannot do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lseg import polygraph
from lseg.cuda import gpu_count
from lseg.image import normalise, read_image, to_pixels
from lseg.onnx_file import IMAGE_ONNX

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def polygraph_sh(tiny, tmp_path):
    """Runs a copy of the script, which logs beside itself, on the tiny weights: exit status, stdout, stderr."""
    home = tmp_path / "a folder"
    home.mkdir()
    shutil.copy(ROOT / "polygraph.sh", home)
    (home / "lseg").symlink_to(ROOT / "lseg")
    (home / "image").symlink_to(ROOT / "image")

    def call(*words: object) -> tuple[int, str, str]:
        environment = os.environ | {"PYTHON": sys.executable, "LSEG_SIZE": "64"}
        command = ["bash", str(home / "polygraph.sh"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
        return done.returncode, done.stdout, done.stderr

    call.home = home
    call.options = ["--onnx", tiny.folder, "--weights", tiny.weights, "--engines", tmp_path / "engines"]
    return call


def test_inspect(polygraph_sh):
    status, out, _ = polygraph_sh("inspect", *polygraph_sh.options)
    assert status == 0
    for name in ("lseg.onnx", "similarity.onnx", "clip_textual.onnx"):
        assert f"{name}:\n" in out
    assert "input image: float32 [B, 3, 64, 64]" in out and "output labels: int32 [B, 64, 64]" in out
    assert "of 4-D x 4-D" in out and "MatMuls: 1 of 2-D x 3-D" in out
    log = (polygraph_sh.home / "log" / "polygraph_inspect.log").read_text()
    assert log.startswith("./polygraph.sh inspect --onnx ") and log.split("\n", 1)[1] == out.split("\n", 1)[1]


def test_rewrite(polygraph_sh, tmp_path):
    photos = []
    for name in ("one.jpg", "with space.jpg"):
        photos += ["--photo", shutil.copy(ROOT / "image" / "temple.jpg", tmp_path / name)]
    status, out, _ = polygraph_sh("rewrite", *polygraph_sh.options, *photos)
    assert status == 0 and "Passed: 2/2 iterations" in out
    four, two = out.split("4d.onnx:")[1].split("+ polygraphy")[0].split("2d.onnx:")
    assert "of 4-D x 4-D" in four and "3-D" not in two.split("MatMuls")[1] and "4-D" not in two.split("MatMuls")[1]


@pytest.mark.skipif(gpu_count() > 0, reason="with a GPU it compares with TensorRT, which the GPU checks do")
def test_compare_on_the_cpu(polygraph_sh):
    """Within the bound 0, beyond it 1, and the log tells."""
    status, out, _ = polygraph_sh("compare", *polygraph_sh.options)
    assert status == 0 and "ONNX Runtime against PyTorch" in out and "Pass Rate: 100.00%" in out
    status, out, _ = polygraph_sh("compare", *polygraph_sh.options, "--atol", "1e-12")
    assert status == 1 and "Pass Rate: 0.00%" in out
    assert "Pass Rate: 0.00%" in (polygraph_sh.home / "log" / "polygraph_compare.log").read_text()


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["compare", "--atol", "much"], "error: --atol much is no number: give one such as 1e-4"),
        (["compare", "--photo", "none.jpg"], "error: none.jpg does not exist: check the name"),
        (["compare", "--photo"], "error: --photo needs a value"),
        (["compare", "--what"], "error: unknown option --what: see ./polygraph.sh --help"),
        (["guess"], "error: 'guess' is no command: see ./polygraph.sh --help"),
        (
            ["inspect", "--onnx", "none"],
            "error: none/lseg.onnx does not exist: run 'python lseg_export.py', or name its ",
        ),
    ],
)
def test_bad_input(polygraph_sh, words, sentence):
    status, out, err = polygraph_sh(words[0], *polygraph_sh.options, *words[1:])
    assert (status, out) == (2, "") and err.startswith(sentence) and err.count("\n") == 1
    assert not (polygraph_sh.home / "log").exists()


def test_a_photo_that_is_none(polygraph_sh, tmp_path):
    (tmp_path / "bad.jpg").write_text("no photo")
    status, out, err = polygraph_sh("rewrite", *polygraph_sh.options, "--photo", tmp_path / "bad.jpg")
    assert (status, out) == (2, "") and err.startswith(f"error: {tmp_path / 'bad.jpg'} is not an image")
    assert err.count("\n") == 1


@pytest.mark.skipif(gpu_count() > 0, reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["capability", "precision", "layerwise"])
def test_what_needs_a_gpu_says_so(polygraph_sh, command):
    status, out, err = polygraph_sh(command, *polygraph_sh.options)
    assert (status, out) == (2, "")
    assert err == f"error: '{command}' needs TensorRT and a GPU, and here is none: run it where there is one\n"


def test_help(polygraph_sh):
    assert polygraph_sh("--help")[:2] == (0, polygraph_sh("compare", "--help")[1])
    status, out, err = polygraph_sh()
    assert (status, out) == (2, "") and err.startswith("usage: ./polygraph.sh COMMAND")


def test_photos_as_the_network_gets_them(tmp_path, monkeypatch):
    photo = ROOT / "image" / "temple.jpg"
    monkeypatch.setenv("LSEG_PHOTOS", f"{photo}:{photo}")
    (first, second), pixels = polygraph.images(), to_pixels(read_image(photo))[None]
    assert np.array_equal(first["image"], normalise(pixels)) and np.array_equal(second["image"], first["image"])
    assert np.array_equal(next(polygraph.pixels()), pixels)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_for_engines_give_the_encoders_numbers(tiny, tmp_path, precision, seed):
    import onnxruntime

    words = ["graph", str(tiny.folder / IMAGE_ONNX), str(tmp_path / "x.onnx"), "--precision", precision]
    polygraph.main(polygraph.parse_args(words))
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    cpu = ["CPUExecutionProvider"]
    (found,) = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=cpu).run(None, {"image": normalise(pixels)})
    encoder = onnxruntime.InferenceSession(tiny.folder / IMAGE_ONNX, providers=cpu)
    (expected,) = encoder.run(None, {"image": normalise(pixels)})
    bound = 1e-5 if precision == "fp32" else 1e-2
    assert np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected) < bound
