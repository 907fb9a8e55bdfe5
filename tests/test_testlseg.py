"""testlseg.py: what it measures, how failures and broken bounds are told, reports, and the README's section."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dataset import pair
from torch.utils.flop_counter import FlopCounterMode

import testlseg
from lseg import accuracy, measure, report, variants
from lseg.accuracy import Expected, Score, broken_bounds, miou_difference
from lseg.benchmark import interleaved, is_stationary, matrix_rate, summarise
from lseg.errors import UserError, run, short
from lseg.flops import image_encoder_flops
from lseg.metrics import class_iou
from lseg.model import LSegConfig, LSegImageEncoder
from lseg.variants import BOUNDS, EVERY, choose_variants

ROOT = Path(testlseg.__file__).parent


@pytest.fixture
def bench(tiny, tmp_path, capsys):
    """Runs testlseg.py with the tiny weights: exit status, report (None where it wrote none), stdout and stderr."""

    def call(*options: object) -> tuple[int, dict | None, str, str]:
        output = tmp_path / "report.json"
        words = ["--weights", tiny.weights, "--onnx", tiny.folder, "--output", output, "--no-plot", "--runs", 3]
        words += ["--warmup", 1, "--cases", "1:3,2:5", *options]
        with pytest.raises(SystemExit) as end:
            run(lambda: testlseg.main(testlseg.parse_args(list(map(str, words)))))
        out, err = capsys.readouterr()
        return end.value.code, json.loads(output.read_text()) if output.is_file() else None, out, err

    return call


class TestRun:
    def test_both_backends(self, bench, tmp_path, seed):
        """Speed and accuracy of what every machine has, on the bundled photo and a data set of two images."""
        rng = np.random.default_rng(seed)
        for name in "ab":
            pair(tmp_path / "data" / f"{name}.jpg", tmp_path / "data" / f"{name}.png", rng.integers(0, 12, (40, 50)))
        status, found, out, err = bench("--dataset", tmp_path / "data", "--backends", "torch,onnxruntime")
        assert (status, err) == (0, "")
        rows = {row["variant"]: row for row in found["rows"]}
        assert list(rows) == ["torch", "onnxruntime"]
        for row in rows.values():
            assert row["error"] is None and row["broken"] == [] and row["first_call_ms"] > 0
            assert list(row["encode_text"]) == ["1", "8", "150"]
            assert [(case["batch"], case["labels"]) for case in row["speed"]] == [(1, 3), (2, 5)]
            for case in row["speed"]:
                assert set(case["stages"]) == {"preprocess", "encode_image", "similarity", "total"}
                assert all(s["runs"] == 3 and 0 < s["median"] <= s["p99"] for s in case["stages"].values())
                flops = image_encoder_flops(found_config(bench)) * case["batch"]
                assert case["tflops"] == pytest.approx(flops / case["stages"]["encode_image"]["median"] / 1e9)
        ours = rows["onnxruntime"]["accuracy"]
        assert ours["label_agreement"] >= 99.9 and 0 < ours["relative_difference"] < 1e-4
        assert ours["cosine_min"] > 0.9999
        assert 0 < ours["max_difference"] < 1e-3 and ours["text_cosine_min"] > 0.9999
        assert ours["dataset"]["images"] == 2 and ours["dataset"]["label_agreement"] >= 99.9
        assert abs(ours["dataset"]["miou"] - rows["torch"]["accuracy"]["dataset"]["miou"]) < 0.1
        assert found["weights"]["name"] == "tiny" and not found["weights"]["random"]
        table = [line for line in out.splitlines() if line.startswith("|")]
        assert len(table) == 2 + 4 and len({len(line) for line in table}) == 1
        assert report.markdown(found) in out

    @pytest.mark.parametrize("mode", ["window", "official"])
    def test_other_evaluations(self, bench, tmp_path, seed, mode):
        rng = np.random.default_rng(seed)
        pair(tmp_path / "data" / "a.jpg", tmp_path / "data" / "a.png", rng.integers(0, 12, (70, 90)))
        status, found, _, _ = bench("--dataset", tmp_path / "data", "--evaluation", mode, "--no-speed")
        assert status == 0 and all(not row["speed"] for row in found["rows"])
        used = {row["accuracy"]["dataset"]["evaluation"] for row in found["rows"] if row["accuracy"]}
        assert used == {"window" if mode == "window" else "multiscale"}

    def test_reference_from_elsewhere(self, bench, tmp_path, monkeypatch):
        """What one run saves, another compares with where there is no torch."""
        file = tmp_path / "reference.npz"
        assert bench("--backends", "torch", "--no-speed", "--save-reference", file)[::3] == (0, "")
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
        status, found, out, _ = bench("--backends", "onnxruntime", "--no-speed", "--reference", file)
        (row,) = found["rows"]
        assert status == 0 and not row["accuracy"]["is_reference"] and row["accuracy"]["relative_difference"] > 0
        status, found, out, _ = bench("--backends", "onnxruntime", "--no-speed")
        assert "accuracy is left out" in out and found["rows"][0]["accuracy"] is None
        status, _, _, err = bench("--backends", "onnxruntime", "--reference", file, "--labels", "cat, dog")
        assert (status, err) == (
            2,
            f"error: {short(file)} was made from other weights, photos, labels or data: make it again\n",
        )

    def test_a_backend_that_cannot_open(self, bench, monkeypatch):
        monkeypatch.setattr(measure, "open_variant", failing_open(variants.open_variant))
        status, found, out, err = bench("--no-speed")
        assert status == 1 and "onnxruntime failed or broke a bound" in err
        rows = {row["variant"]: row for row in found["rows"]}
        assert rows["onnxruntime"]["error"] == "RuntimeError: it broke" and rows["onnxruntime"]["accuracy"] is None
        assert rows["torch"]["error"] is None and "onnxruntime failed: RuntimeError: it broke." in out

    def test_a_backend_that_fails_in_mid_run(self, bench, monkeypatch):
        from lseg.run_onnxruntime import OnnxRuntimeRunner

        calls, segment = [], OnnxRuntimeRunner.segment

        def break_later(self, *arguments):
            calls.append(1)
            if len(calls) > 4:
                raise MemoryError("no more")
            return segment(self, *arguments)

        monkeypatch.setattr(OnnxRuntimeRunner, "segment", break_later)
        status, found, out, _ = bench()
        rows = {row["variant"]: row for row in found["rows"]}
        assert status == 1 and rows["onnxruntime"]["error"] == "MemoryError: no more"
        assert rows["onnxruntime"]["speed"] == [] and rows["onnxruntime"]["encode_text"] == {}
        assert len(rows["torch"]["speed"]) == 2
        (line,) = [line for line in out.splitlines() if line.startswith("| ONNX Runtime")]
        assert "failed" in line and not any(char.isdigit() for char in line.split("failed")[1])

    def test_a_broken_bound_fails_the_run(self, bench, monkeypatch):
        monkeypatch.setitem(BOUNDS, "fp32", variants.Bound(1e-12, 99.9))
        status, found, out, _ = bench("--no-speed")
        assert status == 1 and "onnxruntime breaks its bound: embeddings" in out

    @pytest.mark.parametrize(
        "options, sentence",
        [
            (["--backends", "tf"], "'tf' is no backend: give 'all' or some of torch, "),
            (["--backends", ","], "no backend is named"),
            (["--cases", "1"], "'1' is no batch:labels pair: write --cases 1:8,1:150,8:8"),
            (["--cases", "0:8"], "'0:8' is no batch:labels pair"),
            (["--runs", "0"], "--runs 0 cannot be: give at least 1"),
            (["--limit", "0"], "--limit 0 cannot be: give at least 1"),
            (["--batch", "9"], "9 images a run cannot be: give 1 to 8"),
            (["--batch", "6"], "--batch is of TensorRT's engines, and none are measured: leave it out, or see"),
            (["--dataset", "nowhere"], "nowhere is no folder: give the data set's"),
            (["--reference", "nowhere.npz"], "nowhere.npz cannot be read (No such file or directory): make it"),
            (["--update-readme"], "--update-readme needs the reports: give them with --report"),
            (["--report", "/etc/hostname", "--update-readme"], "/etc/hostname is no report of this version"),
            (
                ["--report", ROOT / "log/report_cpu_demo.json", "--update-readme", "none.md"],
                "none.md is no file of the repository's root: give",
            ),
            (["--save-reference", "."], ". is a folder: name a file in it"),
            (["--output", "."], ". is a folder: name a file in it"),
            (["--photos", "nowhere.jpg"], "nowhere.jpg does not exist; check the name"),
            (["--labels-file", "nowhere.txt"], "nowhere.txt cannot be read (No such file or directory)"),
            (["--output", f"{__file__}/x.json"], "is a file, not a folder; choose another output folder"),
        ],
    )
    def test_bad_input(self, bench, options, sentence):
        status, found, out, err = bench(*options)
        assert (status, found, out) == (2, None, "")
        assert err.startswith("error: ") and sentence in err and err.count("\n") == 1

    def test_a_reference_that_is_none(self, bench, tmp_path):
        (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 no")
        assert "x.npz is no reference, or damaged" in bench("--reference", tmp_path / "x.npz")[3]

    def test_quick_in_a_minute(self, demo, tmp_path):
        """The command as CI and newcomers run it, with the demo weights."""
        import time

        start = time.perf_counter()
        words = ["--quick", "--onnx", str(demo.folder), "--output", str(tmp_path / "quick.json")]
        done = subprocess.run(
            [sys.executable, str(ROOT / "testlseg.py"), *words], capture_output=True, text=True, timeout=170
        )
        assert done.returncode == 0, done.stderr
        print(f"{time.perf_counter() - start:.1f} s")
        found = json.loads((tmp_path / "quick.json").read_text())
        assert [row["variant"] for row in found["rows"]] == [v.name for v in variants.variants_here()]
        assert all(row["accuracy"] and row["speed"] for row in found["rows"])


def found_config(_) -> dict:
    from checkpoints import tiny_config

    return tiny_config()[0].to_dict()


def failing_open(real):
    def open_variant(variant, *arguments, **options):
        if variant.backend == "onnxruntime":
            raise RuntimeError("it\nbroke")
        return real(variant, *arguments, **options)

    return open_variant


class TestVariants:
    def test_names_and_bounds(self):
        assert len({variant.name for variant in EVERY}) == len(EVERY)
        assert all(variant.precision in BOUNDS for variant in EVERY)
        assert [v.name for v in choose_variants("onnxruntime, torch,torch")] == ["onnxruntime", "torch"]

    def test_what_the_machine_lacks(self, monkeypatch):
        monkeypatch.setattr(variants, "available_backends", lambda: ["torch"])
        with pytest.raises(UserError, match="this machine cannot run 'tensorrt', only torch"):
            choose_variants("tensorrt")


SMALL = LSegConfig(
    image_size=96,
    width=48,
    depth=5,
    heads=3,
    taps=(0, 1, 2, 4),
    reassemble=(8, 12, 16, 24),
    features=20,
    embedding=24,
)


@pytest.mark.parametrize("config", [LSegConfig(), SMALL])
def test_flops_equal_pytorchs_count(config):
    with torch.device("meta"):
        model, image = LSegImageEncoder(config).eval(), torch.zeros(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert image_encoder_flops(config.to_dict()) == counter.get_total_flops()


class TestTiming:
    def test_summary(self):
        found = summarise([4.0, 2.0, 1.0, 3.0, 8.0])
        assert (found["median"], found["runs"]) == (3.0, 5) and found["p90"] == pytest.approx(6.4)
        assert found["drift"] == 2.0 and not is_stationary(found)
        assert is_stationary(summarise([2.0] * 8)) and is_stationary(summarise([0.0] * 8))

    def test_interleaved(self):
        order = []

        def call(name: str, fail_at: int = 99):
            def once() -> dict[str, float]:
                order.append(name)
                if order.count(name) == fail_at:
                    raise ValueError("bad\nluck")
                return {"stage": float(order.count(name))}

            return once

        found, errors = interleaved({"a": call("a"), "b": call("b", fail_at=3)}, warmup=1, runs=3)
        assert order == ["a", "b", "a", "b", "a", "b", "a"]
        assert errors == {"b": "ValueError: bad luck"} and list(found) == ["a"]
        assert (found["a"]["stage"]["runs"], found["a"]["stage"]["median"]) == (3, 3.0)  # the warm-up does not count

    def test_matrix_rate(self):
        rate = matrix_rate("fp32")
        assert rate["library"] == torch.__version__ and 1e-3 < rate["tflops"] < 1e4


class TestScores:
    def score(self, rng: np.random.Generator, images: int, noise: float) -> Score:
        score = Score(4)
        for _ in range(images):
            truth = rng.integers(-1, 4, (20, 20))
            wrong = rng.random(truth.shape) < noise
            labels = np.where(wrong, rng.integers(0, 4, truth.shape), np.maximum(truth, 0))
            score.add(labels, truth, labels)
        return score

    def test_interval(self, seed):
        """The interval holds the difference, is wider for few images, and is zero for equal results."""
        rng = np.random.default_rng(seed)
        good, bad = self.score(rng, 40, 0.1), self.score(rng, 40, 0.5)
        found = miou_difference(bad, good)
        assert found["value"] == pytest.approx(bad.miou() - good.miou())
        assert found["low"] < found["value"] < found["high"] < 0
        assert miou_difference(good, good) == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert good.miou() == pytest.approx(np.nanmean(class_iou(good.total)) * 100)

    def test_bounds(self):
        fine = {"relative_difference": 1e-6, "label_agreement": 99.95}
        assert broken_bounds(fine, BOUNDS["fp32"], False) == []
        off = {"relative_difference": 2e-4, "label_agreement": 99.0, "dataset": {"label_agreement": 98.0}}
        off["dataset"]["miou_difference"] = {"value": -0.2}
        words = [text.split()[0] for text in broken_bounds(off, BOUNDS["fp32"], False)]
        assert words == ["embeddings", "labels", "labels", "mIoU"]
        nothing = {"relative_difference": float("nan")}
        assert len(broken_bounds(nothing, BOUNDS["fp16"], True)) == 1  # an engine that overflowed
        assert len(broken_bounds(off, BOUNDS["fp32"], True)) == 1  # with random weights labels are near ties

    def test_reference_file(self, tmp_path, seed):
        rng = np.random.default_rng(seed)
        saved = Expected(
            rng.random((3, 4), np.float32), [rng.random((4, 5, 5), np.float32)], [np.ones((5, 5), np.uint16)]
        )
        saved.labels = [rng.integers(0, 255, 40, dtype=np.uint8) for _ in range(12)]
        saved.save(tmp_path / "x.npz", "inputs")
        again = Expected.load(tmp_path / "x.npz", "inputs")
        assert len(again.labels) == 12 and all(map(np.array_equal, again.labels, saved.labels))
        assert np.array_equal(again.embeddings[0], saved.embeddings[0]) and again.photo_labels[0].dtype == np.uint16
        assert accuracy.STRIDE > 1


class TestReport:
    def two(self) -> tuple[dict, dict]:
        found = json.loads((ROOT / "log" / "report_cpu_demo.json").read_text())
        other = json.loads(json.dumps(found))
        return found, other

    def save(self, folder: Path, *contents: object) -> list[Path]:
        paths = [folder / f"{index}.json" for index in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return paths

    @pytest.mark.parametrize("name", ["README.md", "MEASUREMENTS.md"])
    def test_the_readme_agrees_with_the_reports(self, name):
        """The section between the markers is what the reports named there give, to the letter."""
        before, after = report.update_readme(ROOT / name)
        assert before == after

    def test_merges_the_same_machine_and_weights(self, tmp_path):
        found, other = self.two()
        for row in other["rows"]:
            row["variant"] += "-2"
        assert len(report.load_reports(self.save(tmp_path, found, other))) == 1
        other["settings"]["runs"] += 1  # its figures would stand under the other's claims
        assert len(report.load_reports(self.save(tmp_path, found, other))) == 2
        other["settings"]["runs"] -= 1
        other["weights"]["sha256"] = "0"
        assert len(report.load_reports(self.save(tmp_path, found, other))) == 2

    def test_sentences(self, tmp_path):
        found, other = self.two()
        for contents, sentence in (
            ([found, other], "1.json holds torch, as another report of the same weights and machine: give one"),
            (["{"], "0.json is no report of this version of testlseg.py: measure again"),
            ([{"format": "lseg-report-1"}], "0.json is no report of this version of testlseg.py: measure again"),
            (["[]"], "0.json is no report of this version of testlseg.py: measure again"),
        ):
            with pytest.raises(UserError, match=sentence):
                report.load_reports(self.save(tmp_path, *contents))
        with pytest.raises(UserError, match="none.json cannot be read"):
            report.load_reports([tmp_path / "none.json"])
        (tmp_path / "README.md").write_text("nothing")
        with pytest.raises(UserError, match="README.md has no section between"):
            report.update_readme(tmp_path / "README.md")

    def test_plot(self, tmp_path):
        from lseg.image import read_image

        report.plot(self.two()[0], tmp_path / "plot.png")
        assert read_image(tmp_path / "plot.png").std() > 5
