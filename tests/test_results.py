"""Confidence, unknown pixels, scores and lines of JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco
from test_enginerun import LABELS, names, read_map, save

from lseg.errors import UserError
from lseg.image import labels_to_photo, normalise, read_image, to_pixels
from lseg.inference import label_photo
from lseg.results import JsonLines, describe, encode_rle, mark_unknown, photos_in
from lseg.run_onnxruntime import OnnxRuntimeRunner
from lseg.run_torch import TorchRunner
from lseg.tokenizer import Tokenizer


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def photo(tmp_path, seed) -> Path:
    return save(tmp_path / "photo.jpg", seed)


class TestNumbers:
    def test_describe(self, seed):
        rng = np.random.default_rng(seed)
        labels, cosines = rng.integers(-1, 5, (31, 17)), rng.random((31, 17), np.float32)
        words = [f"thing {index}" for index in range(7)]  # two are not found
        found = describe("x.jpg", labels, cosines, words)
        assert (found["photo"], found["size"]) == ("x.jpg", [17, 31])
        assert found["unlabelled"] == pytest.approx((labels == -1).mean(), abs=1e-6)
        order = [entry["share"] for entry in found["labels"]]
        assert order == sorted(order, reverse=True) and {entry["index"] for entry in found["labels"]} == set(range(5))
        for entry in found["labels"]:
            here = labels == entry["index"]
            assert entry["name"] == words[entry["index"]]
            assert entry["share"] == pytest.approx(here.mean(), abs=1e-6)
            assert entry["confidence"] == pytest.approx(cosines[here].astype(np.float64).mean(), abs=1e-5)

    def test_masks_are_cocos(self, seed):
        labels = np.random.default_rng(seed).integers(-1, 3, (40, 23)).repeat(3, axis=0)
        found = json.loads(json.dumps(describe("x", labels, np.zeros(labels.shape), ["a", "b", "c"], rle=True)))
        for entry in found["labels"]:
            assert np.array_equal(coco.decode(entry["rle"]), labels == entry["index"])
        assert coco.area(encode_rle(np.zeros((3, 4), bool))) == 0

    def test_unknown(self):
        marked = mark_unknown(np.array([[3, 200]], np.uint8), np.array([[0.5, 0.4]], np.float32), 0.45)
        assert marked.tolist() == [[3, -1]]
        assert mark_unknown(np.array([[3]]), np.array([[0.45]], np.float32), 0.45).tolist() == [[3]]


class TestCosines:
    @pytest.mark.parametrize("mode", ["whole", "window", "multiscale"])
    def test_of_every_mode(self, tiny, photo, mode):
        """One label alone is every pixel's, so its cosine is the mean of its scores; more labels can only raise it."""
        image = read_image(photo)
        with OnnxRuntimeRunner(*tiny) as runner, TorchRunner(tiny.weights) as torch:
            text = runner.encode_text(Tokenizer()(LABELS))
            labels, best = label_photo(runner, image, text, mode)
            alone = np.stack([label_photo(runner, image, text[i : i + 1], mode)[1] for i in range(len(text))])
            assert best.shape == labels.shape == image.shape[:2] and best.dtype == np.float32
            assert np.abs(alone.max(axis=0) - best).max() < 1e-5
            agree = alone.argmax(axis=0) == labels
            assert agree.mean() > 0.999
            other, cosines = label_photo(torch, image, text, mode)
            assert np.abs(cosines - best).max() < 1e-4 and (other == labels).mean() > 0.999
            if mode == "whole":
                scores = torch.scores(normalise(to_pixels(image, 64)[None]), text)[0].max(axis=0)
                assert np.abs(labels_to_photo(scores, 90, 70) - best).max() < 1e-4
            assert label_photo(runner, image, text, mode, best=False)[1] is None


class TestLines:
    def test_what_was_there_stays(self, tmp_path):
        path = tmp_path / "new" / "x.jsonl"
        for number, again in enumerate((None, (), ("none",))):
            with JsonLines(path, again) as file:
                file.write({"photo": "straße", "n": number})
        assert lines(path) == [{"photo": "straße", "n": number} for number in range(3)]
        with JsonLines(path):  # nothing is written
            pass
        assert len(lines(path)) == 3
        with JsonLines(path, ["straße"]) as file:  # its lines come anew
            file.write({"photo": "straße", "n": 9})
        assert lines(path) == [{"photo": "straße", "n": 9}]
        with open(path, "a") as file:
            file.write('{"photo": "cut of')  # as a killed run leaves it
        assert photos_in(path) == {"straße"}
        with JsonLines(path, again=["b"]) as file:
            file.write({"photo": "b"})
        assert [entry["photo"] for entry in lines(path)] == ["straße", "b"]
        with JsonLines(path) as file:
            file.write({"photo": "c"})
        assert photos_in(path) == {"c"} and photos_in(tmp_path / "none") == set()

    def test_a_full_disk(self, tmp_path):
        if not os.path.exists("/dev/full"):
            pytest.skip("there is no /dev/full")
        with JsonLines(Path("/dev/full")) as file, pytest.raises(UserError, match="No space left.*another --jsonl"):
            file.write({"photo": "a"})

    def test_what_cannot_be(self, tmp_path):
        for text in ("not\njson\n", "a note without an end", "[" * 100_000 + "\n", '{"a": 1}\n'):
            (tmp_path / "x").write_text(text)
            with pytest.raises(UserError, match="something other than photos' lines"):
                photos_in(tmp_path / "x")
        with pytest.raises(UserError, match="cannot be written"):
            JsonLines(tmp_path / "x" / "y").write({"photo": "a"})
        with pytest.raises(UserError, match="cannot be read"):
            photos_in(tmp_path)


class TestScript:
    def test_a_line_a_photo(self, tmp_path, segment, seed):
        photos = [save(tmp_path / "in" / f"{name}.png", seed + index) for index, name in enumerate("abc")]
        (tmp_path / "in" / "bad.png").write_bytes(b"no image")
        path = tmp_path / "found.jsonl"
        code, _, err = segment(tmp_path / "in", "--jsonl", path, "--rle", "--save-labels")
        assert code == 2 and len(err) == 2
        found = {os.path.abspath(entry["photo"]): entry for entry in lines(path)}
        assert sorted(found) == [str(file) for file in photos]
        for file in photos:
            entry = found[str(file)]
            labels = read_map(tmp_path / "out" / f"{file.stem}_labels.png")
            assert os.path.abspath(entry["picture"]) == str(tmp_path / "out" / f"{file.stem}_lseg.png")
            assert sum(part["share"] for part in entry["labels"]) == pytest.approx(1, abs=1e-4)
            for part in entry["labels"]:
                assert -1 <= part["confidence"] <= 1
                assert np.array_equal(coco.decode(part["rle"]), labels == part["index"])

    def test_resume(self, tmp_path, segment, seed):
        """A photo is done when its files and its line are there."""
        for index, name in enumerate("abc"):
            save(tmp_path / "in" / f"{name}.png", seed + index)
        path, options = tmp_path / "found.jsonl", (tmp_path / "in", "--jsonl", tmp_path / "found.jsonl", "--resume")
        assert segment(*options)[0] == 0 and len(lines(path)) == 3
        first = path.read_text().splitlines()[0]
        path.write_text(first + "\n" + '{"photo": "cut')
        code, out, _ = segment(*options)
        assert code == 0 and out[0] == "note: 1 of 3 photos are done already" and len(lines(path)) == 3
        (tmp_path / "out" / "b_lseg.png").unlink()  # the line is there, and comes anew
        assert segment(*options)[1][0] == "note: 2 of 3 photos are done already" and len(lines(path)) == 3
        assert segment(*options)[1] == ["note: 3 of 3 photos are done already"]

    def test_unknown_pixels(self, photo, tmp_path, segment):
        path = tmp_path / "x.jsonl"
        segment(photo, "--jsonl", path)
        middle = float(np.median([part["confidence"] for part in lines(path)[0]["labels"]]))
        code, _, err = segment(photo, "--jsonl", path, "--unknown", middle, "--save-labels")
        assert (code, err) == (0, [])
        (entry,), labels = lines(path), read_map(tmp_path / "out" / "photo_labels.png")
        assert entry["unlabelled"] == pytest.approx((labels == 255).mean(), abs=1e-6)
        assert 0 < entry["unlabelled"] < 1 and all(part["confidence"] >= middle - 1e-5 for part in entry["labels"])

    def test_scores(self, tiny, photo, tmp_path, segment):
        (tmp_path / "words.json").write_text('{"cat": ["kitten", "puss"], "dog": [], "sky": ["blue"]}')
        code, _, err = segment(photo, "--save-scores", "--labels-file", tmp_path / "words.json")
        assert (code, err) == (0, [])
        scores = np.load(tmp_path / "out" / "photo_scores.npy")
        assert (scores.shape, scores.dtype) == ((3, 64, 64), np.float16)
        with TorchRunner(tiny.weights) as runner:
            text = runner.encode_text(Tokenizer()(["cat", "kitten", "puss", "dog", "sky", "blue"]))
            wanted = runner.scores(normalise(to_pixels(read_image(photo), 64)[None]), text)[0]
        wanted = np.stack([wanted[:3].max(axis=0), wanted[3], wanted[4:].max(axis=0)])
        assert np.abs(scores - wanted).max() < 2e-3
        assert names(tmp_path / "out") == ["photo_lseg.png", "photo_scores.npy"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--unknown", "1.5"], "error: --unknown 1.5 is no cosine: give a number from -1 to 1, such as 0.2"),
            (["--unknown", "nan"], "error: --unknown nan is no cosine: give a number from -1 to 1, such as 0.2"),
            (["--rle"], "error: --rle adds masks to the lines of --jsonl: name that file too"),
            (
                ["--save-scores", "--inference", "window"],
                "error: --save-scores is for photos seen whole, not --inference window: leave one out",
            ),
            (["--jsonl", "."], "error: --jsonl .: name a file that ends in .jsonl"),
            (["--jsonl", "photo.jpg"], "error: --jsonl photo.jpg: name a file that ends in .jsonl"),
            (["--stride", "2"], "error: --stride is for --features: name that too"),
        ],
    )
    def test_what_cannot_be(self, photo, segment, tmp_path, options, message):
        before = photo.read_bytes()
        assert segment(photo, *options) == (2, [], [message])
        assert not (tmp_path / "out").exists() and photo.read_bytes() == before

    def test_a_run_that_fails_leaves_the_older_lines(self, tmp_path, segment):
        (tmp_path / "bad.jpg").write_bytes(b"nothing")
        (tmp_path / "x.jsonl").write_text('{"photo": "a"}\n')
        assert segment(tmp_path / "bad.jpg", "--jsonl", tmp_path / "x.jsonl")[0] == 2
        assert (tmp_path / "x.jsonl").read_text() == '{"photo": "a"}\n'
