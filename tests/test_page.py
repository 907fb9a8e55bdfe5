"""What the page does, without a browser: `lseg.page_work` and what it keeps."""

from __future__ import annotations

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from page_process import free_port
from PIL import Image
from test_enginerun import LABELS, save

import enginerun
from lseg import Segmenter, page_upload, page_work
from lseg.errors import UserError
from lseg.image import labels_to_photo, read_image, to_pixels
from lseg.kept_photos import How, KeptPhoto, KeptPhotos
from lseg.labels import palette
from lseg.page_work import Desk, Limits, Upload

ROOT = Path(enginerun.__file__).parent
TEMPLE = ROOT / "image" / "temple.jpg"


def read(path: Path) -> Upload:
    return Upload(path.name, path.read_bytes())


def open_desk(exported, **options) -> Desk:
    def open_segmenter(weights: str, backend: str) -> Segmenter:
        return Segmenter(weights, backend, onnx=exported.folder)

    return Desk(open_segmenter, [exported.weights], "onnxruntime", **options)


@pytest.fixture(scope="module")
def desk(tiny):
    with open_desk(tiny) as desk:
        yield desk


@pytest.fixture
def how(desk) -> How:
    return desk.usual


@pytest.fixture
def photo(tmp_path, seed) -> Upload:
    return read(save(tmp_path / "photo.png", seed))


@pytest.fixture
def only_words(desk, monkeypatch):
    """The network does not run from here on: calling it would fail."""

    def start() -> None:
        monkeypatch.setattr(desk.segmenter(desk.usual).runner, "encode_image", None)

    return start


def pixels_of(url: str) -> np.ndarray:
    """uint8 [H, W, 3], RGB, of a data URL."""
    import base64

    data = np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8)
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


class TestAgainstEnginerun:
    @pytest.mark.parametrize("inference", ["whole", "window"])
    def test_files(self, demo, tmp_path, inference):
        """The label map, its JSON and the API's line are what enginerun.py makes of the same photo and words."""
        options = ["--onnx", str(demo.folder), "--output", str(tmp_path), "--inference", inference, "--quiet"]
        lines = tmp_path / "lines.jsonl"
        asked = [*options, "--save-labels", "--jsonl", str(lines), "--backend", "onnxruntime", str(TEMPLE)]
        assert enginerun.main(enginerun.parse_args(asked)) == 0
        with open_desk(demo) as desk:
            how = desk.usual._replace(inference=inference)
            key, found = desk.open_photo(read(TEMPLE), LABELS, how)
            name, png = desk.download(key, "labels")
            assert name == "temple_labels.png"
            made, wanted = (
                cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
                for data in (png, (tmp_path / name).read_bytes())
            )
            assert np.array_equal(made, wanted)
            name, text = desk.download(key, "json")
            meaning = json.loads(text)
            assert meaning == json.loads((tmp_path / name).read_text())
            shown = {label["name"]: (label["share"], label["colour"]) for label in found["labels"]}
            assert shown == {label["name"]: (label["share"], label["colour"]) for label in meaning["labels"]}
            line, _ = desk.segment(read(TEMPLE), LABELS, how, tmp_path / "api")
        wanted = json.loads(lines.read_text())
        assert line["size"] == wanted["size"] and line["unlabelled"] == 0
        for label, other in zip(line["labels"], wanted["labels"], strict=True):
            assert label["confidence"] == pytest.approx(other["confidence"], abs=1e-4)
            assert label | {"confidence": 0} == other | {"confidence": 0}

    def test_picture(self, demo, tmp_path):
        options = ["--onnx", str(demo.folder), "--output", str(tmp_path), "--quiet", str(TEMPLE)]
        assert enginerun.main(enginerun.parse_args(options)) == 0
        with open_desk(demo) as desk:
            key, _ = desk.open_photo(read(TEMPLE), LABELS, desk.usual)
            name, png = desk.download(key, "picture")
            _, plain = desk.download(key, "picture", 0)
        made, wanted = (
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            for data in (png, (tmp_path / name).read_bytes())
        )
        assert name == "temple_lseg.png" and np.array_equal(made, wanted)  # but for what it says of its making
        assert plain != png


class TestWords:
    def test_a_change_needs_no_network(self, desk, how, photo, only_words):
        key, _ = desk.open_photo(photo, ["cat", "dog"], how)
        wanted = desk.segmenter(how).segment(self.image(photo), ["cat", "dog", "sky", "tree"]).labels
        only_words()
        found = desk.answer(key, ["cat", "dog", "sky", "tree"], how)
        assert found["kept"] and found["stages"]["encode_image"] == 0
        made = cv2.imdecode(np.frombuffer(desk.download(key, "labels")[1], np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(made, wanted)

    @staticmethod
    def image(photo: Upload) -> np.ndarray:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(photo.data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)

    def test_one_set_of_colours(self, desk, how, photo):
        """The legend, the map and the palette agree."""
        key, found = desk.open_photo(photo, LABELS, how)
        colours = palette(LABELS)
        assert [label["colour"] for label in found["labels"]] == ["#" + bytes(colour).hex() for colour in colours]
        labels = cv2.imdecode(np.frombuffer(desk.download(key, "labels")[1], np.uint8), cv2.IMREAD_UNCHANGED)
        shown = pixels_of(found["map"])
        assert np.array_equal(labels_to_photo(shown, 90, 70), colours[labels])
        assert sum(label["share"] for label in found["labels"]) == pytest.approx(1, abs=1e-5)

    def test_labels_are_read_as_everywhere(self, desk, how, photo):
        _, found = desk.open_photo(photo, ["cat, dog", " Cat ", "tree"], how)
        assert [label["name"] for label in found["labels"]] == ["cat", "dog", "tree"]
        assert found["notes"] == ['label "Cat" is dropped: it repeats "cat"']
        names, notes = desk.read_words(["a"] * 100 + ["b"])
        assert names == ("a", "b") and len(notes) == 4 and notes[-1] == "and 96 more notes of this kind"

    def test_an_answer_that_is_there(self, desk, how, photo):
        key, _ = desk.open_photo(photo, ["cat, dog"], how)
        assert desk.is_answered(key, ["cat", "dog"], how)
        assert not desk.is_answered(key, ["dog", "cat"], how)
        assert not desk.is_answered(key, ["cat", "dog"], how._replace(inference="window"))

    @pytest.mark.parametrize(
        "words, message",
        [
            ([], "no label is given"),
            (["", " , "], "no label is given"),
            (["other"], "is the only label"),
            ([f"thing {i}" for i in range(5000)], "5,000 labels are too many: give at most 256"),
            (["x" * 300_000], "longer than 200,000 characters"),
            (["dog", "very " * 90 + "long"], "CLIP reads at most 77: shorten it"),
        ],
    )
    def test_bad_labels(self, desk, how, photo, words, message):
        kept = len(desk.kept)
        with pytest.raises(UserError, match=message):
            desk.open_photo(photo, words, how)
        assert len(desk.kept) == kept
        key, _ = desk.open_photo(photo, ["cat", "dog"], how)
        before = desk.download(key, "labels")
        with pytest.raises(UserError, match=message):
            desk.answer(key, words, how)
        assert desk.download(key, "labels") == before  # what is shown still stands


class TestPixelsAndHeat:
    def test_a_pixels_scores(self, desk, how, photo, seed):
        """The first is the label map's, at its cosine, wherever one looks."""
        key, _ = desk.open_photo(photo, LABELS, how)
        answer, rng = desk.kept.get(key).answer, np.random.default_rng(seed)
        runner = desk.segmenter(how).runner
        result = runner.segment(to_pixels(TestWords.image(photo), runner.image_size)[None], answer.text)
        labels, cosines = labels_to_photo(result.labels[0], 90, 70), labels_to_photo(result.best[0], 90, 70)
        for x, y in [(0, 0), (89, 69), *zip(rng.integers(0, 90, 40), rng.integers(0, 70, 40), strict=True)]:
            scores = desk.pixel(key, int(x), int(y))["scores"]
            assert scores[0]["cosine"] == pytest.approx(cosines[y, x], abs=2e-4)
            near = [score["name"] for score in scores if score["cosine"] > scores[0]["cosine"] - 2e-4]
            assert LABELS[labels[y, x]] in near
            assert len(scores) == page_work.TOP
            assert [s["cosine"] for s in scores] == sorted((s["cosine"] for s in scores), reverse=True)

    def test_a_heat_map(self, desk, how, photo, monkeypatch):
        """Bright where the word is near."""
        key, _ = desk.open_photo(photo, LABELS, how)
        found = desk.heat(key, 2)
        bright = pixels_of(found["map"]).astype(int).sum(axis=2)
        side = len(bright)

        def cosine(place: int) -> float:
            row, column = np.unravel_index(place, bright.shape)
            x, y = (2 * column + 1) * 90 // (2 * side), (2 * row + 1) * 70 // (2 * side)
            scores = desk.pixel(key, int(x), int(y))["scores"]
            return next(score["cosine"] for score in scores if score["name"] == LABELS[2])

        monkeypatch.setattr(page_work, "TOP", 100)
        low, high = cosine(bright.argmin()), cosine(bright.argmax())
        spread = found["high"] - found["low"]
        assert spread > 0 and low - found["low"] < 0.2 * spread and found["high"] - high < 0.2 * spread

    def test_in_windows(self, desk, how, photo):
        """One label a pixel is known, and no heat map; switching back needs a run or what was kept."""
        key, _ = desk.open_photo(photo, LABELS, how)
        found = desk.answer(key, LABELS, how._replace(inference="window"))
        assert not found["whole"] and not found["kept"] and found["stages"]["encode_image"] > 0
        labels = cv2.imdecode(np.frombuffer(desk.download(key, "labels")[1], np.uint8), cv2.IMREAD_UNCHANGED)
        (score,) = desk.pixel(key, 17, 40)["scores"]
        assert score["name"] == LABELS[labels[40, 17]]
        with pytest.raises(UserError, match="^heat maps are for photos seen whole: choose that inference$"):
            desk.heat(key, 0)
        assert desk.answer(key, LABELS, how)["kept"]
        desk.kept.get(key).grid = None  # as where other photos need the room
        with pytest.raises(UserError, match="^this photo's embeddings made room for others': change its labels, and"):
            desk.heat(key, 0)
        assert not desk.answer(key, LABELS[:2], how)["kept"]
        assert desk.heat(key, 0)["map"]

    def test_what_is_not_there(self, desk, how, photo):
        key, _ = desk.open_photo(photo, LABELS, how)
        for call, message in (
            (lambda: desk.pixel(key, 90, 0), r"no pixel \(90, 0\) in a photo of 90 x 70"),
            (lambda: desk.pixel(key, 0, -1), "no pixel"),
            (lambda: desk.heat(key, 8), "no such label"),
            (lambda: desk.download(key, "../x"), "no file to download"),
            (lambda: desk.pixel("guess", 0, 0), "no longer kept"),
            (lambda: desk.answer("", LABELS, how), "no longer kept"),
            (lambda: desk.answer(key, LABELS, how._replace(weights="/etc/passwd")), "not offered here"),
            (lambda: desk.answer(key, LABELS, how._replace(backend="cuda")), "not offered here"),
            (lambda: desk.answer(key, LABELS, how._replace(inference="wide")), "is no inference mode"),
        ):
            with pytest.raises(UserError, match=message):
                call()


class TestPhotos:
    def test_another_backend(self, desk, how, photo):
        key, first = desk.open_photo(photo, LABELS, how)
        found = desk.answer(key, LABELS, how._replace(backend="torch"))
        assert found["ran"].startswith("PyTorch") and first["ran"].startswith("ONNX Runtime") and not found["kept"]
        for label, other in zip(found["labels"], first["labels"], strict=True):
            assert label["share"] == pytest.approx(other["share"], abs=5e-3)
        assert desk.answer(key, ["cat", "dog"], how._replace(backend="torch"))["kept"]

    def test_opening_a_backend_holds_up_nobody_else(self, tiny, photo):
        """Engines may take minutes. Two who want the same backend open it once."""
        go, opened = threading.Event(), []

        def open_segmenter(weights: str, backend: str) -> Segmenter:
            opened.append(backend)
            assert backend == "onnxruntime" or go.wait(30)
            return Segmenter(weights, backend, onnx=tiny.folder)

        with Desk(open_segmenter, [tiny.weights], "onnxruntime") as desk, ThreadPoolExecutor(2) as pool:
            key, _ = desk.open_photo(photo, LABELS, desk.usual)
            other = desk.usual._replace(backend="torch")
            runs = [pool.submit(desk.open_photo, photo, LABELS, other) for _ in range(2)]
            try:
                assert desk.answer(key, ["cat", "dog"], desk.usual)["kept"]
            finally:
                go.set()
            assert all(run.result()[1]["ran"].startswith("PyTorch") for run in runs)
        assert opened == ["onnxruntime", "torch"]

    @pytest.mark.parametrize(
        "name, data, message",
        [
            ("notes.jpg", b"these are notes", "notes.jpg is not an image"),
            ("page.jpg", b"<!DOCTYPE html><html>", "is a web page"),
            ("empty.png", b"", "is empty"),
        ],
    )
    def test_no_photo(self, desk, how, name, data, message):
        with pytest.raises(UserError, match=message):
            desk.open_photo(Upload(name, data), LABELS, how)

    def test_a_photo_cut_short(self, desk, how):
        with pytest.raises(UserError, match="temple.jpg is cut short"):
            desk.open_photo(Upload("temple.jpg", TEMPLE.read_bytes()[:50_000]), LABELS, how)

    @pytest.mark.parametrize("size", [(16000, 12500), (7100, 7100)])
    def test_too_many_pixels(self, desk, how, monkeypatch, size):
        """Refused by the header: 200 megapixels are never decoded."""
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG", compress_level=1)
        monkeypatch.setattr(page_upload, "decode_image", None)
        with pytest.raises(UserError, match="scale it down to 50"):
            desk.open_photo(Upload("huge.png", file.getvalue()), LABELS, how)

    def test_turned_by_exif(self, desk, how, tmp_path, seed):
        exif = Image.Exif()
        exif[274] = 6
        upload = read(save(tmp_path / "turned.jpg", seed, exif=exif))
        key, found = desk.open_photo(upload, LABELS, how)
        assert found["size"] == [70, 90] and pixels_of(desk.picture(key)).shape == (90, 70, 3)

    def test_large_photos_are_shown_small(self, desk, how, tmp_path, seed):
        key, found = desk.open_photo(read(save(tmp_path / "wide.png", seed, (3000, 1000))), LABELS, how)
        assert pixels_of(desk.picture(key)).shape == (427, 1280, 3) and found["size"] == [3000, 1000]
        labels = cv2.imdecode(np.frombuffer(desk.download(key, "labels")[1], np.uint8), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (1000, 3000)
        fractions = np.bincount(labels.ravel(), minlength=len(LABELS)) / labels.size
        assert [label["share"] for label in found["labels"]] == pytest.approx(fractions, abs=1e-6)

    def test_names_stay_names(self, desk, how, photo):
        """Of a path in an upload's name nothing but its last part counts."""
        key, _ = desk.open_photo(Upload("../../etc/x y.png", photo.data), LABELS, how)
        assert desk.download(key, "labels")[0] == "x y_labels.png"

    def test_visitors_at_once(self, desk, how, tmp_path, seed):
        photos = [read(save(tmp_path / f"{i}.png", seed + i)) for i in range(4)]
        words = [["cat", "dog"], ["sky", "tree", "road"], ["cat", "sky"], LABELS]

        def visit(i: int) -> bytes:
            key, _ = desk.open_photo(photos[i % 4], ["a", "b"], how)
            desk.answer(key, words[i % 4], how)
            return desk.download(key, "labels")[1]

        alone = [visit(i) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(visit, range(24))) == alone * 6

    def test_words_do_not_wait_for_others_photos(self, desk, how, photo, monkeypatch):
        """Long runs take nothing from a visitor whose embeddings are kept; more than the backend takes at once wait."""
        key, _ = desk.open_photo(photo, ["cat", "dog"], how)
        runner, go, inside = desk.segmenter(how).runner, threading.Event(), []
        encode = runner.encode_image

        def slow(pixels: np.ndarray) -> np.ndarray:
            inside.append(1)
            assert go.wait(30)
            return encode(pixels)

        monkeypatch.setattr(runner, "encode_image", slow)
        with ThreadPoolExecutor(3) as pool:
            runs = [pool.submit(desk.open_photo, photo, ["cat", "dog"], how) for _ in range(3)]
            try:
                assert desk.answer(key, ["cat", "sky"], how)["kept"]
                time.sleep(0.5)
                assert len(inside) == runner.callers
            finally:
                go.set()
            assert all(run.result()[1]["labels"] for run in runs)


class TestKept:
    def test_the_api_keeps_nothing(self, desk, how, photo, tmp_path):
        kept = len(desk.kept)
        desk.segment(photo, LABELS, how, tmp_path)
        assert len(desk.kept) == kept

    def test_embeddings_go_first_and_come_back(self, tiny, tmp_path, seed):
        with open_desk(tiny) as roomy:
            roomy.open_photo(read(save(tmp_path / "0.png", seed)), LABELS, roomy.usual)
            each = roomy.kept.bytes()
        with open_desk(tiny, limits=Limits(kept_bytes=2 * each)) as desk:
            photos = [read(save(tmp_path / f"{i}.png", seed + i)) for i in range(3)]
            keys = [desk.open_photo(photo, LABELS, desk.usual)[0] for photo in photos]
            assert len(desk.kept) == 3 and desk.kept.bytes() <= 2 * each
            before = desk.download(keys[0], "labels")
            found = desk.answer(keys[0], LABELS, desk.usual)
            assert not found["kept"] and desk.download(keys[0], "labels") == before
            assert desk.answer(keys[0], ["cat", "dog"], desk.usual)["kept"]

    def test_photos_go_when_embeddings_are_not_enough(self):
        kept = KeptPhotos(250_000)
        keys = [kept.add(self.of(100_000)) for _ in range(4)]
        assert len(kept) == 2 and kept.bytes() <= 250_000 and len(set(keys)) == 4
        with pytest.raises(UserError, match="no longer kept on the server: open it again"):
            kept.get(keys[0])
        kept.get(keys[2])  # used now: the other is older
        new = kept.add(self.of(100_000))
        assert kept.get(keys[2]) and kept.get(new)
        with pytest.raises(UserError):
            kept.get(keys[3])
        large = kept.add(self.of(900_000))
        assert kept.get(large) and len(kept) == 1  # the one in use stays
        kept.drop(large)
        kept.drop(large)
        kept.drop(None)
        assert len(kept) == 0

    @staticmethod
    def of(size: int) -> KeptPhoto:
        return KeptPhoto("x", np.zeros((1, size, 1), np.uint8), np.zeros((0, 0, 3), np.uint8))

    def test_photos_that_nobody_asks_for(self, monkeypatch):
        kept, clock = KeptPhotos(10**6, idle=100), [1000.0]
        monkeypatch.setattr("lseg.kept_photos.time.monotonic", lambda: clock[0])
        keys = [kept.add(self.of(10)) for _ in range(2)]
        clock[0] += 60
        kept.get(keys[0])
        clock[0] += 60
        kept.forget_idle()
        assert len(kept) == 1 and kept.get(keys[0])

    def test_a_bad_answer_keeps_no_photo(self, desk, how, photo):
        kept = len(desk.kept)
        with pytest.raises(UserError):
            desk.open_photo(photo, LABELS, how._replace(backend="cuda"))
        assert len(desk.kept) == kept


def test_weights_have_folders_of_their_own(tmp_path):
    from app import onnx_folders

    for name in ("a/lseg.pt", "b/lseg.pt", "c.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    weights = ["demo", *(str(tmp_path / name) for name in ("a/lseg.pt", "b/lseg.pt", "c.pt"))]
    folders = onnx_folders(weights, tmp_path)
    assert folders["demo"] == tmp_path and len(set(folders.values())) == 4
    with pytest.raises(UserError, match="none.pt does not exist"):
        onnx_folders(["none.pt"], tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--port", "70000"], "70000 is no port"),
        (["--host", "203.0.113.7"], r"203.0.113.7:\d+ cannot be listened on"),
        (["--max-labels", "1"], "--max-labels 1 is too small"),
        (["--weights", "demo", "none.pt"], "none.pt does not exist"),
    ],
)
def test_bad_options(options, message, tmp_path):
    """One sentence, before anything is exported or opened."""
    import app

    with pytest.raises(UserError, match=message):
        app.main(app.parse_args(["--port", str(free_port()), "--onnx", str(tmp_path / "onnx"), *options]))
    assert not (tmp_path / "onnx").exists()


def test_nothing_can_be_shared(capsys):
    import app

    with pytest.raises(SystemExit):
        app.parse_args(["--share"])
    assert app.parse_args([]).host == "127.0.0.1"


def test_read_image_is_the_only_way_in(desk, how, photo, tmp_path):
    """The photo that is kept is the one that enginerun.py would read."""
    path = tmp_path / "same.png"
    path.write_bytes(photo.data)
    key, _ = desk.open_photo(photo, LABELS, how)
    assert np.array_equal(desk.kept.get(key).photo, read_image(path))
