"""enginerun.py from its arguments to its files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import enginerun
from lseg.errors import short
from lseg.image import labels_to_photo, read_image, to_pixels
from lseg.labels import palette
from lseg.onnx_file import IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX
from lseg.run_onnxruntime import OnnxRuntimeRunner
from lseg.text_cache import FILE
from lseg.tokenizer import Tokenizer

ROOT = Path(enginerun.__file__).parent
LABELS = ("sky", "building", "tree", "road", "pavement", "person", "car", "other")


@pytest.fixture
def photo(tmp_path, seed) -> Path:
    return save(tmp_path / "photo.jpg", seed)


def save(path: Path, seed: int, size: tuple[int, int] = (90, 70), mode: str = "RGB", **options) -> Path:
    """A random smooth photo of (width, height), in the format of the path's suffix."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    pixels = cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, "RGBA").convert(mode).save(path, **options)
    return path


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def read_map(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


class TestRuns:
    def test_default(self, demo, tmp_path):
        """As the README has it, but for where the files are: a process of its own."""
        (demo.folder / FILE).unlink(missing_ok=True)  # words that another test has embedded would be told as kept
        command = [sys.executable, str(ROOT / "enginerun.py"), "--onnx", str(demo.folder), "--output", str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        first, second, third = result.stdout.splitlines()
        assert first.startswith("ONNX Runtime ") and first.endswith(
            "; weights: demo (they know street scenes; see the README for the official ones)"
        )
        assert second.endswith("temple.jpg -> temple_lseg.png")
        stages = ("decode", "preprocess", "encode_text", "encode_image", "similarity", "draw")
        assert third.startswith("milliseconds: ")
        assert [part.split()[-2] for part in third.removeprefix("milliseconds:").split(",")] == list(stages)
        assert names(tmp_path) == ["temple_lseg.png"]
        picture = read_image(tmp_path / "temple_lseg.png")
        assert max(picture.shape) <= 1280 and picture.std() > 20

    def test_default_paths(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        args = enginerun.parse_args([])
        assert (args.photos, args.weights, args.backend) == ([str(ROOT / "image" / "temple.jpg")], "demo", "auto")
        assert (args.onnx.resolve(), args.output.resolve()) == (ROOT / "onnx", ROOT / "image")
        monkeypatch.chdir(ROOT)
        args = enginerun.parse_args([])
        assert (args.photos, args.onnx, args.output) == (["image/temple.jpg"], Path("onnx"), Path("image"))

    def test_exports_what_is_missing(self, tiny, photo, tmp_path, segment):
        folder = tmp_path / "onnx"
        code, out, err = segment(photo, "--onnx", folder)
        assert (code, err) == (0, []) and sum(line.startswith("wrote ") for line in out) == 3
        assert [name for name in names(folder) if name.endswith(".onnx")] == sorted(
            [IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX]
        )
        (folder / TEXT_ONNX).unlink()
        before = (folder / IMAGE_ONNX).stat().st_mtime_ns
        code, out, _ = segment(photo, "--onnx", folder)
        assert code == 0 and [line.split(":")[0] for line in out if "wrote" in line] == [
            f"wrote {short(folder) / TEXT_ONNX}"
        ]
        assert (folder / IMAGE_ONNX).stat().st_mtime_ns == before
        (folder / IMAGE_ONNX).write_bytes(b"broken")
        code, out, _ = segment(photo, "--onnx", folder, "--re-export", "--quiet")
        assert (code, out) == (0, [])

    def test_the_torch_backend_exports_nothing(self, photo, tmp_path, segment):
        code, out, err = segment(photo, "--onnx", tmp_path / "onnx", "--backend", "torch")
        assert (code, err) == (0, []) and out[0].startswith("PyTorch ")
        assert not (tmp_path / "onnx").exists()

    @pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
    def test_the_label_map(self, tiny, photo, tmp_path, segment, backend):
        """At the photo's own size: the network's labels by nearest neighbour, 0-based in the list's order."""
        code, out, err = segment(photo, "--labels", ",".join(LABELS), "--save-labels", "--backend", backend)
        assert (code, err) == (0, [])
        assert names(tmp_path / "out") == ["photo_labels.json", "photo_labels.png", "photo_lseg.png"]
        labels = read_map(tmp_path / "out" / "photo_labels.png")
        assert (labels.shape, labels.dtype) == ((70, 90), np.uint8)
        with OnnxRuntimeRunner(*tiny) as runner:
            text = runner.encode_text(Tokenizer()(LABELS))
            result = runner.segment(to_pixels(read_image(photo), 64)[None], text)
        assert (labels == labels_to_photo(result.labels[0], 90, 70)).mean() >= 0.999
        meaning = json.loads((tmp_path / "out" / "photo_labels.json").read_text())
        assert [entry["name"] for entry in meaning["labels"]] == list(LABELS)
        assert [entry["index"] for entry in meaning["labels"]] == list(range(8))
        for entry, colour in zip(meaning["labels"], palette(LABELS), strict=True):
            assert entry["colour"] == "#" + bytes(colour).hex()
            assert entry["share"] == pytest.approx((labels == entry["index"]).mean(), abs=1e-6)

    def test_more_than_255_labels(self, photo, tmp_path, segment):
        words = [f"thing {n}" for n in range(1000)]
        code, out, err = segment(photo, "--labels", ",".join(words), "--save-labels")
        assert (code, err) == (0, [])
        labels = read_map(tmp_path / "out" / "photo_labels.png")
        assert (labels.shape, labels.dtype) == ((70, 90), np.uint16) and labels.max() < 1000
        meaning = json.loads((tmp_path / "out" / "photo_labels.json").read_text())
        assert [entry["name"] for entry in meaning["labels"]] == words and meaning["unlabelled"] == 65535
        used = {entry["index"] for entry in meaning["labels"] if entry["share"] > 0}
        assert used == set(np.unique(labels).tolist())

    def test_one_label_and_repeats(self, photo, tmp_path, segment):
        code, out, _ = segment(photo, "--labels", "cat", "--save-labels")
        assert code == 0
        assert out[0] == 'note: "other" is added to the labels: "cat" alone would be every pixel\'s'
        meaning = json.loads((tmp_path / "out" / "photo_labels.json").read_text())
        assert [entry["name"] for entry in meaning["labels"]] == ["cat", "other"]
        code, out, _ = segment(photo, "--labels", "cat, dog, Cat, ,dog", "--save-labels")
        notes = ['label "Cat" is dropped: it repeats "cat"', 'label "dog" is dropped: it repeats "dog"']
        assert code == 0 and out[:2] == [f"note: {note}" for note in notes]
        assert segment(photo, "--labels", "a, b, a")[1][0] == 'note: label "a" is dropped: it repeats "a"'
        meaning = json.loads((tmp_path / "out" / "photo_labels.json").read_text())
        assert [entry["name"] for entry in meaning["labels"]] == ["cat", "dog"]

    @pytest.mark.parametrize("content", ["tree\n sky\n\ncar\n", '[["tree", "oak"], "sky", "car"]'])
    def test_labels_from_a_file(self, photo, tmp_path, segment, content):
        (tmp_path / "words.txt").write_text(content)
        code, _, err = segment(photo, "--labels-file", tmp_path / "words.txt", "--save-labels")
        meaning = json.loads((tmp_path / "out" / "photo_labels.json").read_text())
        assert (code, err) == (0, []) and [entry["name"] for entry in meaning["labels"]] == ["tree", "sky", "car"]
        code, out, err = segment(photo, "--labels", tmp_path / "words.txt")
        assert (code, out) == (2, [])
        assert err == [f"error: {tmp_path / 'words.txt'} is a file, not a label: give it with --labels-file"]

    def test_synonyms_and_templates(self, tiny, photo, tmp_path, segment):
        """The label of the nearest text, over all synonyms, each averaged over the templates."""
        (tmp_path / "words.json").write_text('{"tree": ["oak", "fir"], "sky": ["cloud"], "car": []}')
        (tmp_path / "templates.txt").write_text("a photo of a {}.\nmany {}\n")
        options = ["--labels-file", tmp_path / "words.json", "--templates", tmp_path / "templates.txt", "--save-labels"]
        code, _, err = segment(photo, *options)
        meaning = json.loads((tmp_path / "out" / "photo_labels.json").read_text())
        assert (code, err) == (0, []) and [entry["name"] for entry in meaning["labels"]] == ["tree", "sky", "car"]
        words, owner = ("tree", "sky", "car", "oak", "fir", "cloud"), np.array([0, 1, 2, 0, 0, 1])
        with OnnxRuntimeRunner(*tiny) as runner:
            prompts = [runner.encode_text(Tokenizer()([f"a photo of a {w}." for w in words]))]
            prompts.append(runner.encode_text(Tokenizer()([f"many {w}" for w in words])))
            text = np.mean(prompts, axis=0)
            text /= np.linalg.norm(text, axis=1, keepdims=True)
            result = runner.segment(to_pixels(read_image(photo), 64)[None], text.astype(np.float32))
        expected = labels_to_photo(owner[result.labels[0]], 90, 70)
        assert (read_map(tmp_path / "out" / "photo_labels.png") == expected).mean() >= 0.999
        assert segment(photo, "--templates", "none.txt")[2] == [
            "error: none.txt cannot be read (No such file or directory): give 'none', 'clip' or a file of templates"
        ]

    @pytest.mark.parametrize("mode", ["window", "multiscale"])
    def test_in_windows(self, tiny, photo, tmp_path, segment, mode):
        from lseg.inference import segment_photo

        code, out, err = segment(photo, "--inference", mode, "--save-labels")
        assert (code, err) == (0, []) and "similarity" in out[-1]
        with OnnxRuntimeRunner(*tiny) as runner:
            text = runner.encode_text(Tokenizer()(LABELS))
            expected = segment_photo(runner, read_image(photo), text, mode)
        np.testing.assert_array_equal(read_map(tmp_path / "out" / "photo_labels.png"), expected)

    def test_texts_are_kept(self, photo, tmp_path, segment):
        """A second run encodes only the words that are new, and gives the same map."""
        options = ["--onnx", tmp_path / "onnx", "--save-labels"]
        code, out, _ = segment(photo, *options, "--labels", "cat, dog")
        assert code == 0 and "kept" not in out[-1]
        first = read_map(tmp_path / "out" / "photo_labels.png")
        code, out, _ = segment(photo, *options, "--labels", "cat, dog")
        assert code == 0 and "(2 of 2 kept)" in out[-1]
        np.testing.assert_array_equal(read_map(tmp_path / "out" / "photo_labels.png"), first)
        assert "(1 of 2 kept)" in segment(photo, *options, "--labels", "bird, dog")[1][-1]

    def test_nobody_reads_what_it_prints(self, tiny, photo, tmp_path):
        """Behind `| head` the work goes on, in silence."""
        command = [sys.executable, str(ROOT / "enginerun.py"), str(photo), "--weights", tiny.weights]
        command += ["--onnx", str(tiny.folder), "--output", str(tmp_path / "out"), "--labels", "a, a, b"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            process.stdout.close()
            assert (process.wait(timeout=120), process.stderr.read()) == (0, b"")
        assert names(tmp_path / "out") == ["photo_lseg.png"]

    def test_an_argument_too_many(self, photo, capsys):
        with pytest.raises(SystemExit, match="2"):
            enginerun.parse_args([str(photo), "--labels", "car,", "road", "--quiett"])
        assert capsys.readouterr().err == (
            "error: unrecognized arguments: road --quiett; quote what holds spaces; see --help\n"
        )

    def test_quiet(self, photo, segment):
        assert segment(photo, "--labels", "cat, cat", "--quiet") == (0, [], [])

    def test_a_ready_made_text_encoder(self, tiny, photo, tmp_path, segment):
        code, _, _ = segment(photo, "--save-labels")
        expected = read_map(tmp_path / "out" / "photo_labels.png")
        alone = Path(shutil.copytree(tiny.folder, tmp_path / "onnx"))
        text = (alone / TEXT_ONNX).rename(tmp_path / "text.onnx")
        code, out, err = segment(photo, "--save-labels", "--onnx", alone, "--text-onnx", text)
        assert (code, err) == (0, []) and not any("wrote" in line for line in out)
        np.testing.assert_array_equal(read_map(tmp_path / "out" / "photo_labels.png"), expected)


class TestPhotos:
    KINDS = {
        "grey": ("photo.jpg", dict(mode="L")),
        "rgba": ("photo.png", dict(mode="RGBA")),
        "cmyk": ("photo.jpg", dict(mode="CMYK")),
        "palette": ("photo.png", dict(mode="P")),
        "16 bits": ("photo.png", dict(mode="I;16")),
        "one pixel": ("photo.png", dict(size=(1, 1))),
        "one row": ("photo.png", dict(size=(300, 1))),
        "tall": ("photo.bmp", dict(size=(3, 900))),
        "webp": ("photo.webp", dict(size=(31, 17))),
        "tiff": ("photo.tif", dict(size=(31, 17))),
        "name": ("photo été 日本.png", dict(size=(31, 17))),
    }

    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, tmp_path, segment, seed, kind):
        name, options = self.KINDS[kind]
        if kind == "16 bits":
            path = tmp_path / name
            values = np.random.default_rng(seed).integers(0, 65536, (70, 90, 3), dtype=np.uint16)
            assert cv2.imwrite(str(path), values)
        else:
            path = save(tmp_path / name, seed, **options)
        code, _, err = segment(path, "--save-labels")
        assert (code, err) == (0, [])
        width, height = options.get("size", (90, 70))
        assert read_map(tmp_path / "out" / f"{path.stem}_labels.png").shape == (height, width)
        assert read_image(tmp_path / "out" / f"{path.stem}_lseg.png").shape[2] == 3

    def test_exif_rotation(self, tmp_path, segment, seed):
        exif = Image.Exif()
        exif[0x0112] = 6
        path = save(tmp_path / "turned.jpg", seed, exif=exif)
        assert segment(path, "--save-labels")[0] == 0
        turned = read_map(tmp_path / "out" / "turned_labels.png")
        assert turned.shape == (90, 70)
        cv2.imwrite(str(tmp_path / "upright.png"), read_image(path)[..., ::-1])
        assert segment(tmp_path / "upright.png", "--save-labels")[0] == 0
        np.testing.assert_array_equal(turned, read_map(tmp_path / "out" / "upright_labels.png"))

    @pytest.mark.slow
    def test_12000_by_12000(self, tmp_path, segment):
        path = tmp_path / "large.jpg"
        tile = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((6000, 6000), np.uint8))
        path.write_bytes(cv2.imencode(".jpg", tile)[1].tobytes())
        code, _, err = segment(path, "--save-labels")
        assert (code, err) == (0, [])
        assert read_map(tmp_path / "out" / "large_labels.png").shape == (12000, 12000)
        assert max(read_image(tmp_path / "out" / "large_lseg.png").shape) <= 1280

    def test_several_and_a_folder(self, tmp_path, segment, seed):
        one, two = save(tmp_path / "one.jpg", seed), save(tmp_path / "two.png", seed + 1)
        for name in ("b.png", "a.jpg", ".hidden.jpg"):
            save(tmp_path / "photos" / name, seed + 2)
        (tmp_path / "photos" / "notes.txt").write_text("no photo")
        code, out, _ = segment(two, tmp_path / "photos", one)
        assert code == 0 and names(tmp_path / "out") == ["a_lseg.png", "b_lseg.png", "one_lseg.png", "two_lseg.png"]
        order = [line.split(" -> ")[0] for line in out if " -> " in line]
        assert order == [str(short(path)) for path in (two, tmp_path / "photos/a.jpg", tmp_path / "photos/b.png", one)]
        assert out[-2].startswith("milliseconds in all for 4 photos: decode ")

    @pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
    def test_a_batch(self, tmp_path, segment, seed, backend):
        """Photos that the network sees three at a time, one of them bad, and a rest: the files are the same."""
        for index, size in enumerate([(90, 70), (64, 64), (31, 80)] * 3):
            save(tmp_path / "in" / f"{index}.png", seed + index, size)
        (tmp_path / "in" / "4.png").write_text("no photo")
        for name, options in (("alone", []), ("batches", ["--batch", "3"])):
            out = tmp_path / name
            more = ["--backend", backend, "--output", out, "--save-labels", "--jsonl", out / "lines.jsonl"]
            code, lines, err = segment(tmp_path / "in", *more, *options)
            assert code == 2 and len(err) == 2 and "4.png" in err[0]
            told = [line.split(" -> ")[0][-5:] for line in lines if " -> " in line]
            assert told == [f"{n}.png" for n in range(9) if n != 4]
        alone, batches = tmp_path / "alone", tmp_path / "batches"
        assert names(alone) == names(batches)
        for file in alone.glob("*_labels.png"):
            assert (read_map(file) == read_map(batches / file.name)).mean() > 0.999
        first, second = ((out / "lines.jsonl").read_text().splitlines() for out in (alone, batches))
        assert [json.loads(line)["photo"] for line in first] == [json.loads(line)["photo"] for line in second]

    def test_one_name_in_two_folders(self, tmp_path, segment, seed):
        """Numbered in the order given; each picture is of its own photo."""
        paths = [save(tmp_path / folder / "x.png", seed + n, (90 + n, 70)) for n, folder in enumerate("abc")]
        paths.append(save(tmp_path / "a" / "x_2.jpg", seed + 3, (93, 70)))
        paths.append(save(tmp_path / "a" / "x.jpg", seed + 4, (94, 70)))
        code, out, _ = segment(*paths, "--save-labels")
        assert code == 0
        written = [Path(line.split(" -> ")[1]).name for line in out if " -> " in line]
        assert written == ["x_lseg.png", "x_2_lseg.png", "x_3_lseg.png", "x_2_2_lseg.png", "x_4_lseg.png"]
        assert len(names(tmp_path / "out")) == 15
        for n, name in enumerate(written):
            labels = read_map(tmp_path / "out" / name.replace("_lseg", "_labels"))
            assert labels.shape == (70, 90 + n)
        code, _, _ = segment(paths[1], "--save-labels", output=tmp_path / "alone")
        alone, among = (tmp_path / folder / f"{name}_labels.png" for folder, name in (("alone", "x"), ("out", "x_2")))
        np.testing.assert_array_equal(read_map(alone), read_map(among))

    def test_no_photo_is_overwritten(self, tmp_path, segment, seed):
        folder = tmp_path / "out"
        photos = [
            save(folder / name, seed + n) for n, name in enumerate(("a.png", "a_lseg.png", "b.jpg", "b_labels.png"))
        ]
        (folder / "link_lseg.png").symlink_to(save(tmp_path / "elsewhere.png", seed))
        linked = save(tmp_path / "link.jpg", seed)
        before = {path: path.read_bytes() for path in photos}
        code, out, _ = segment(*photos, linked, folder / "link_lseg.png", "--save-labels")
        assert code == 0
        assert {path: path.read_bytes() for path in photos} == before
        assert (folder / "link_lseg.png").is_symlink()
        written = [Path(line.split(" -> ")[1]).name for line in out if " -> " in line]
        assert written == [
            "a_2_lseg.png",
            "a_lseg_lseg.png",
            "b_2_lseg.png",
            "b_labels_lseg.png",
            "link_2_lseg.png",
            "link_lseg_lseg.png",
        ]

    def test_a_folder_that_is_its_own_output(self, tmp_path, segment, seed):
        """Run twice, it gives the same files: what the first run wrote is not taken for photos."""
        folder = tmp_path / "photos"
        save(folder / "a.png", seed)
        assert segment(folder, "--save-labels", output=folder)[0] == 0
        first = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert sorted(first) == ["a.png", "a_labels.json", "a_labels.png", "a_lseg.png"]
        code, out, _ = segment(folder, "--save-labels", output=folder)
        assert out[0] == f"note: 2 in {short(folder)} left out: files of that name are what this program wrote"
        assert code == 0 and {path.name: path.read_bytes() for path in folder.iterdir()} == first
        (folder / "a.png").unlink()
        code, _, err = segment(folder, output=folder)
        assert code == 2
        assert err == [
            f"error: the folder {short(folder)} holds no photo, only what this program wrote; give one with photos"
        ]

    def test_a_photo_given_twice(self, photo, tmp_path, segment):
        code, out, _ = segment(photo, tmp_path / "." / "photo.jpg", tmp_path)
        assert code == 0 and names(tmp_path / "out") == ["photo_lseg.png"]
        assert out[0] == f"note: {short(photo)} is given more than once, and segmented once"

    def test_a_bad_photo_is_told_and_left_out(self, tmp_path, segment, seed):
        good, late = save(tmp_path / "good.jpg", seed), save(tmp_path / "late.jpg", seed)
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(good.read_bytes()[:200])
        code, out, err = segment(good, bad, late)
        told = f"error: {short(bad)} is cut short: it is a JPEG without its end; copy or download it again"
        assert (code, err[0]) == (2, told)
        assert err[1:] == ["error: 1 of 3 photos could not be read and are left out: see above"]
        assert names(tmp_path / "out") == ["good_lseg.png", "late_lseg.png"]
        assert out[-1].startswith("2 photos in ")
        code, _, err = segment(bad, shutil.copy(bad, tmp_path / "worse.jpg"), output=tmp_path / "none")
        assert code == 2 and len(err) == 3 and err[2] == "error: none of the 2 photos could be used: see above"
        assert not (tmp_path / "none").exists()

    def test_a_tree_and_resume(self, tmp_path, segment, seed):
        """Results mirror the tree; a second run does what is missing."""
        for name in ("a.jpg", "sub/a.jpg", "sub/deeper/b.png", ".hidden/c.png"):
            save(tmp_path / "photos" / name, seed)
        code, out, _ = segment(tmp_path / "photos", "--save-labels")
        written = sorted(
            path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*_lseg.png")
        )
        assert code == 0 and written == ["a_lseg.png", "sub/a_lseg.png", "sub/deeper/b_lseg.png"]
        code, out, _ = segment(tmp_path / "photos", "--save-labels", "--resume")
        assert (code, out) == (0, ["note: 3 of 3 photos are done already"])
        (tmp_path / "out" / "sub" / "a_labels.json").unlink()
        before = (tmp_path / "out" / "a_lseg.png").stat().st_mtime_ns
        code, out, _ = segment(tmp_path / "photos", "--save-labels", "--resume")
        assert code == 0 and out[0] == "note: 2 of 3 photos are done already"
        assert (tmp_path / "out" / "sub" / "a_labels.json").exists()
        assert (tmp_path / "out" / "a_lseg.png").stat().st_mtime_ns == before

    def test_resume_with_something_else(self, tmp_path, segment, seed):
        """What an earlier run made with other labels or options is made anew: each picture tells of them."""
        for name in ("a.png", "b.png"):
            save(tmp_path / "photos" / name, seed)
        lines, out = tmp_path / "found.jsonl", tmp_path / "out"

        def go(labels: str, *more: object) -> list[str]:
            code, told, err = segment(tmp_path / "photos", "--labels", labels, "--save-labels", *more)
            assert (code, err) == (0, [])
            return told

        go("wall, floor", "--jsonl", lines)
        old = {path.name: path.read_bytes() for path in out.iterdir()}
        other = "note: {} pictures were made with other labels, weights or options, and are made anew"
        assert go("sky, tree", "--resume", "--jsonl", lines)[0] == other.format(2)
        new = {path.name: path.read_bytes() for path in out.iterdir()}
        go("sky, tree", "--quiet", "--jsonl", lines)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == new
        assert all({e["name"] for e in json.loads(line)["labels"]} <= {"sky", "tree"} for line in open(lines))
        assert go("sky, tree", "--resume", "--jsonl", lines) == ["note: 2 of 2 photos are done already"]
        for name in ("b_lseg.png", "b_labels.png", "b_labels.json"):  # as a run leaves it that is killed after a photo
            (out / name).write_bytes(old[name])
        assert go("sky, tree", "--resume", "--jsonl", lines)[:2] == [
            other.format(1),
            "note: 1 of 2 photos are done already",
        ]
        assert {path.name: path.read_bytes() for path in out.iterdir()} == new
        for more in (("--unknown", 0.5), ("--inference", "window"), ("--templates", "clip")):
            assert go("sky, tree", "--resume", *more)[0] == other.format(2)
        (out / "a_lseg.png").write_bytes(cv2.imencode(".png", read_map(out / "a_lseg.png"))[1].tobytes())
        assert go("sky, tree", "--resume", "--templates", "clip")[0] == other.format(1)  # it tells nothing

    def test_resume_beside_what_is_older(self, tmp_path, segment, seed):
        """Files that an earlier run made, beside a picture that a later one made without them, are made anew."""
        photo, lines, out = save(tmp_path / "a.png", seed), tmp_path / "found.jsonl", tmp_path / "out"
        everything = ("--save-labels", "--save-scores", "--jsonl", lines, "--rle")
        found = []
        for unknown in (0.9, -1):
            assert segment(photo, "--labels", "sky, tree", "--unknown", unknown, *everything)[0] == 0
            found.append({path.name: path.read_bytes() for path in (*out.iterdir(), lines)})
        assert all(found[0][name] != found[1][name] for name in ("a_lseg.png", "a_labels.png", lines.name))
        for more in (("--save-labels",), ("--save-scores",), ("--jsonl", lines), everything):
            for name, data in found[0].items():
                (lines if name == lines.name else out / name).write_bytes(data)
            assert segment(photo, "--labels", "sky, tree", "--unknown", -1)[0] == 0  # the picture alone
            again = (photo, "--labels", "sky, tree", "--unknown", -1, "--resume", *more)
            assert segment(*again)[1][0] != "note: 1 of 1 photos are done already"
            assert segment(*again)[1] == ["note: 1 of 1 photos are done already"]
            if "--save-labels" in more:
                assert (out / "a_labels.png").read_bytes() == found[1]["a_labels.png"]
            if "--jsonl" in more:
                told = [json.loads(text) for text in (lines.read_bytes(), found[1][lines.name])]
                for line in told:
                    for label in line["labels"]:
                        label.pop("rle", None)
                assert told[0] == told[1]
        assert segment(*again[:6])[1] == ["note: 1 of 1 photos are done already"]  # less is wanted than there is

    def test_an_archive_gives_what_its_folder_gives(self, tmp_path, segment, seed):
        for index, name in enumerate(("x/1.png", "x/2.jpg", "3.png")):
            save(tmp_path / "photos" / name, seed + index)
        with tarfile.open(tmp_path / "photos.tar", "w") as archive:
            archive.add(tmp_path / "photos", "x/../..")  # a name that would lead out of the output folder
        assert segment(tmp_path / "photos", "--save-labels", output=tmp_path / "a")[0] == 0
        code, out, _ = segment(tmp_path / "photos.tar", "--save-labels", output=tmp_path / "b")
        assert code == 0 and sum(" -> " in line for line in out) == 3
        files = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.png")}
        found = {p.relative_to(tmp_path / "b" / "x"): p.read_bytes() for p in (tmp_path / "b").rglob("*.png")}
        assert len(files) == 6 and found == files
        assert names(tmp_path) == ["a", "b", "photos", "photos.tar"]


class TestShortPaths:
    def test_relative_where_shorter(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert short(tmp_path / "a" / "b.png") == short(str(tmp_path / "a" / "b.png")) == Path("a/b.png")
        assert short(tmp_path) == Path(".")
        assert short("/a") == Path("/a") and short("a/../b") == Path("a/../b")
        assert short(tmp_path / "link" / ".." / "b") == tmp_path / "link" / ".." / "b"
        assert short(tmp_path.parent / "b") == Path("../b")

    def test_without_a_current_directory(self, tmp_path, monkeypatch):
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        assert short(tmp_path / "a") == tmp_path / "a"
