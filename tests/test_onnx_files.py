"""ONNX files on the disk: weights beside them, what a failed or interrupted export leaves, files over 2 GB."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import write_tiny
from torch import Tensor, nn

import clip_onnx_export
import lseg_export
from lseg import checkpoint, export, onnx_file, specs
from lseg.errors import UserError, short
from lseg.export import ExportSpec, export_and_report, export_onnx
from lseg.onnx_file import FORMAT, IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX, check_weights, parse_metadata, write_onnx

SMALL = 10_000  # bytes beyond which these tests keep weights beside a file


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": images})[0]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def images(seed) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)


class TestExternalData:
    def test_gives_the_same_numbers(self, tiny, tmp_path, images):
        path = tmp_path / "big.onnx"
        assert write_onnx(onnx.load(tiny.folder / IMAGE_ONNX), path, {"kind": "lseg", "n": 3}, limit=SMALL) == path
        data, model = names(tmp_path)[1], names(tmp_path)[0]
        assert (model, len(names(tmp_path))) == ("big.onnx", 2) and data.startswith("big.onnx.")
        assert path.stat().st_size < 100_000 < (tmp_path / data).stat().st_size
        assert data.endswith(".data")
        np.testing.assert_array_equal(run_onnx(path, images), run_onnx(tiny.folder / IMAGE_ONNX, images))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert parse_metadata(session.get_modelmeta().custom_metadata_map) == {"kind": "lseg", "n": 3, "format": FORMAT}

    def test_moves_with_its_folder(self, tiny, tmp_path, images):
        write_onnx(onnx.load(tiny.folder / IMAGE_ONNX), tmp_path / "one" / "big.onnx", {}, limit=SMALL)
        (tmp_path / "one").rename(tmp_path / "two")
        np.testing.assert_array_equal(
            run_onnx(tmp_path / "two" / "big.onnx", images), run_onnx(tiny.folder / IMAGE_ONNX, images)
        )

    def test_writing_again_leaves_one_pair(self, tiny, tmp_path, images):
        path = tmp_path / "big[1].onnx"  # a name with a pattern's characters
        other = tmp_path / "big[1].onnx.notes"
        other.touch()
        model = onnx.load(tiny.folder / IMAGE_ONNX)
        before = run_onnx(tiny.folder / IMAGE_ONNX, images)
        write_onnx(model, path, {}, limit=SMALL)
        first = set(names(tmp_path)) - {path.name, other.name}
        write_onnx(flipped(onnx.load(tiny.folder / IMAGE_ONNX)), path, {}, limit=SMALL)
        second = set(names(tmp_path)) - {path.name, other.name}
        assert len(first) == len(second) == 1 and first != second
        np.testing.assert_allclose(run_onnx(path, images), -before, atol=1e-5)
        write_onnx(onnx.load(tiny.folder / IMAGE_ONNX), path, {})  # small enough to stand alone
        assert names(tmp_path) == [path.name, other.name]
        np.testing.assert_array_equal(run_onnx(path, images), before)

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("at", [1, 2])
    def test_an_unfinished_write_keeps_the_old_pair(self, tiny, tmp_path, images, monkeypatch, error, at):
        """The data file is moved first, the model second; whichever fails, the older pair is whole and alone."""
        path = tmp_path / "big.onnx"
        write_onnx(onnx.load(tiny.folder / IMAGE_ONNX), path, {}, limit=SMALL)
        there, before = names(tmp_path), run_onnx(path, images)
        move, calls = os.replace, []

        def fail(*args):
            calls.append(args)
            if len(calls) == at:
                raise error
            move(*args)

        monkeypatch.setattr(onnx_file.os, "replace", fail)
        with pytest.raises((UserError, KeyboardInterrupt)) as raised:
            write_onnx(flipped(onnx.load(tiny.folder / IMAGE_ONNX)), path, {}, limit=SMALL)
        monkeypatch.undo()
        if isinstance(error, OSError):
            assert str(raised.value) == f"{path} cannot be written (No space left on device): choose another folder"
        assert names(tmp_path) == there
        np.testing.assert_array_equal(run_onnx(path, images), before)


def flipped(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same image encoder with all embeddings negated: the head's weight and bias change sign."""
    head = next(node for node in reversed(model.graph.node) if node.op_type == "Conv")
    for tensor in model.graph.initializer:
        if tensor.name in head.input[1:]:
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    return model


class Drifting(nn.Module):
    """Gives something else in each call, so that no exported file can agree with it."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * float(self.calls)


def drifting_spec() -> ExportSpec:
    return ExportSpec("drifting", Drifting(), {"x": torch.ones(2, 3)}, ("y",), {})


class TestFailures:
    @pytest.mark.parametrize("old", [None, b"old"])
    def test_a_file_that_differs_is_not_written(self, tmp_path, old):
        path = tmp_path / "a.onnx"
        if old:
            path.write_bytes(old)
        there = names(tmp_path)
        with pytest.raises(UserError) as error:
            export_onnx(drifting_spec(), path)
        message = str(error.value)
        assert message.startswith(f"{path} was not written: its output 'y' is ") and "\n" not in message
        assert message.endswith("off PyTorch's, more than 1e-04; try another --opset or report it")
        assert names(tmp_path) == there and (not old or path.read_bytes() == old)

    def test_the_scripts_hold_to_the_bound(self, tiny, tmp_path, monkeypatch):
        """With no difference allowed both scripts fail, and nothing is left."""
        monkeypatch.setattr(export, "TOLERANCE", 0.0)
        for script in (lseg_export, clip_onnx_export):
            with pytest.raises(UserError, match="was not written: its output '(embeddings|text)' is .* more than 0e"):
                script.main(script.parse_args(["--weights", tiny.weights, "--output", str(tmp_path), "--quiet"]))
        assert names(tmp_path) == []

    def test_not_a_number_is_a_difference(self, tmp_path):
        module = nn.Linear(3, 2)
        nn.init.constant_(module.weight, float("nan"))
        with pytest.raises(UserError, match="its output 'y' is inf off PyTorch's"):
            export_onnx(ExportSpec("linear", module, {"x": torch.ones(2, 3)}, ("y",), {}), tmp_path / "a.onnx")
        assert names(tmp_path) == []

    def test_checks_count_too(self, tmp_path):
        """A graph frozen at its example's size fails on the other inputs that its spec names."""
        spec = specs.similarity_spec(checkpoint.load(write_tiny(tmp_path / "tiny.safetensors", 1).path))

        class Frozen(nn.Module):
            def forward(self, embeddings: Tensor, text: Tensor) -> tuple[Tensor, ...]:
                first, *rest = spec.module(embeddings, text)
                return first + int(text[0, 0] * 1e6), *rest  # the number becomes a constant of the graph

        with pytest.raises(UserError, match="its output 'labels' is 1.0e.00 off"):
            export_onnx(replace(spec, module=Frozen()), tmp_path / "similarity.onnx")
        assert names(tmp_path) == ["tiny.safetensors"]

    @pytest.mark.parametrize("script", [lseg_export, clip_onnx_export])
    def test_an_output_folder_that_cannot_be(self, tiny, tmp_path, script):
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "onnx"
        with pytest.raises(UserError) as error:
            script.main(script.parse_args(["--weights", tiny.weights, "--output", str(folder), "--quiet"]))
        assert str(error.value) == f"{short(folder)} cannot be written (Not a directory): choose another folder"

    @pytest.mark.parametrize("name", [IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX])
    def test_a_folder_in_the_files_place(self, tiny, tmp_path, name):
        (tmp_path / name).mkdir()
        script = clip_onnx_export if name == TEXT_ONNX else lseg_export
        with pytest.raises(UserError, match=f"{name} cannot be written .Is a directory.: choose another folder"):
            script.main(script.parse_args(["--weights", tiny.weights, "--output", str(tmp_path), "--quiet"]))
        assert (tmp_path / name).is_dir() and not any(file.startswith(".") for file in names(tmp_path))

    def test_weights_that_are_not_there(self, tmp_path):
        missing = tmp_path / "none.ckpt"
        for script in (lseg_export, clip_onnx_export):
            with pytest.raises(
                UserError, match=f"{missing} does not exist: give a checkpoint's path or 'demo', or fetch"
            ):
                script.main(script.parse_args(["--weights", str(missing), "--output", str(tmp_path / "onnx")]))
        assert names(tmp_path) == []


class TestCheckWeights:
    def test_sentences(self):
        path = Path("a.onnx")
        metadata = {"kind": "lseg", "format": FORMAT, "weights": "demo", "weights_sha256": "1"}
        check_weights(path, metadata, "lseg", "1", "do this")
        for found, kind, sha256, sentence in (
            (metadata, "similarity", "1", "a.onnx holds 'lseg', not 'similarity': do this"),
            ({}, "lseg", "1", "a.onnx is another project's file: do this"),
            (metadata | {"format": 0}, "lseg", "1", "a.onnx was exported by another version of this project: do this"),
            (metadata, "lseg", "2", "a.onnx was exported from other weights (demo) than asked for: do this"),
        ):
            with pytest.raises(UserError) as error:
                check_weights(path, found, kind, sha256, "do this")
            assert str(error.value) == sentence

    def test_metadata_of_others_is_passed_over(self):
        assert parse_metadata({"author": "someone", "lseg.kind": '"lseg"', "lseg.opset": "17"}) == {
            "kind": "lseg",
            "opset": 17,
        }


def write_often(path: Path, source: Path, times: int) -> None:
    for _ in range(times):
        write_onnx(onnx.load(source), path, {"kind": "lseg"}, limit=SMALL)


def test_two_processes_write_the_same_file(tiny, tmp_path):
    """A model and its data file belong together whenever the folder is at rest."""
    path, source = tmp_path / "big.onnx", tiny.folder / IMAGE_ONNX
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(path, source, 15)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and len(names(tmp_path)) == 2
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


class Wide(nn.Module):
    """2.2 GB of weights and hardly any work: rows of two tables."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(17_000, 16_384) for _ in range(2))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([table(rows) for table in self.tables]).mean(dim=2)


@pytest.mark.slow
def test_a_file_over_2_gb(tmp_path, capsys):
    with torch.no_grad():
        spec = ExportSpec(
            "wide", Wide(), {"rows": torch.tensor([[3, 16_999]])}, ("y",), {"rows": {1: "N"}, "y": {1: "N"}}
        )
    export_and_report(spec, tmp_path / "wide.onnx")
    model, data = names(tmp_path)
    assert (model, data.startswith("wide.onnx.")) == ("wide.onnx", True)
    assert (tmp_path / model).stat().st_size < 2**20 and (tmp_path / data).stat().st_size > 2**31
    printed = capsys.readouterr().out
    print(printed)
    assert "2125.0 MiB" in printed
    (tmp_path / data).unlink()
