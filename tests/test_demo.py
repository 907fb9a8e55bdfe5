"""The demo weights and how they are made: words, crops, figures of merit, and the training script on a few steps."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import enginerun
from demo import data, words
from demo.train import PROMPTS, class_iou, confusion
from demo.words import CLASSES, KIN, MADE, UNLABELLED, load_vocabulary
from lseg import checkpoint
from lseg.errors import UserError, run
from lseg.image import labels_to_photo, read_image, to_pixels
from lseg.model import LSegConfig
from lseg.runner import open_runner
from lseg.text import TextConfig
from lseg.tokenizer import Tokenizer
from lseg.weights import DEMO_WEIGHTS

ROOT = Path(enginerun.__file__).parent
needs_teacher = pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite_pytorch"),
    reason="efficientnet-lite-pytorch, which the teacher is made of, is not installed",
)


def needed_words() -> list[str]:
    """What a list of CLIP's names must have for the demo: all that is not made."""
    kin = [word for words in KIN.values() for word in words] + [word for words, _ in MADE.values() for word in words]
    return sorted({*CLASSES, *kin} - MADE.keys())


def write_names(folder: Path, seed: int, drop: str = "", extra: int = 30) -> Path:
    """names.json and embeddings.npy with random vectors, nearly as alike as CLIP's are, by as much with every seed.

    A longer common part would leave too few words that are far from all classes' words.
    """
    folder.mkdir(exist_ok=True)
    names = [name for name in needed_words() if name != drop] + [f"thing {n}" for n in range(extra)]
    rng = np.random.default_rng(seed)
    common = 1.4 * np.sqrt(512) * words.unit(rng.standard_normal(512))
    vectors = words.unit(common + rng.standard_normal((len(names), 512)))
    (folder / "names.json").write_text(json.dumps(names))
    np.save(folder / "embeddings.npy", vectors.astype(np.float16))
    return folder


def write_camvid(folder: Path, seed: int) -> Path:
    """train, val and test of three 96 x 72 images each: squares of all 11 classes and the unlabelled, each a colour."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (12, 3), dtype=np.uint8)
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
        for n in range(3):
            mask = np.kron(rng.permutation(12).reshape(3, 4), np.ones((24, 24), int)).astype(np.uint8)
            cv2.imwrite(str(folder / split / f"{n}.jpg"), colours[mask])
            cv2.imwrite(str(folder / split / f"{n}.png"), mask)
    return folder


class TestWords:
    def test_vectors(self, tmp_path, seed):
        folder = write_names(tmp_path / "names", seed)
        vocabulary = load_vocabulary(folder)
        names, genuine = json.loads((folder / "names.json").read_text()), np.load(folder / "embeddings.npy")
        assert vocabulary.names == (*names, *MADE) and len(set(vocabulary.names)) == len(vocabulary.names)
        assert vocabulary.vectors.dtype == np.float32 and vocabulary.vectors.shape == (len(names) + len(MADE), 512)
        assert np.abs(np.linalg.norm(vocabulary.vectors.astype(np.float64), axis=1) - 1).max() < 1e-6
        np.testing.assert_allclose(vocabulary.vectors[: len(names)], words.unit(genuine.astype(np.float64)), atol=1e-6)
        assert {*CLASSES, "other"} <= set(vocabulary.names)
        assert all(vocabulary.vectors[vocabulary.index(word)].any() for kin in KIN.values() for word in kin)

    def test_made_vectors_are_as_described(self, tmp_path, seed):
        """Each stands at an angle of atan(turn) to the mean of its kin, or of all words where it has none."""
        vocabulary = load_vocabulary(write_names(tmp_path / "names", seed))
        vector = dict(zip(vocabulary.names, vocabulary.vectors.astype(np.float64), strict=True))
        everything = np.mean([vector[name] for name in vocabulary.names if name not in MADE], axis=0)
        for word, (kin, turn) in MADE.items():
            start = words.unit(np.mean([vector[name] for name in kin], axis=0) if kin else everything)
            assert vector[word] @ start == pytest.approx((1 + turn**2) ** -0.5, abs=1e-3), word
        made = np.stack([vector[word] for word in ("sky", "road", "pavement", "fence")])
        assert (made @ made.T - np.eye(4)).max() < 0.9  # each turns a way of its own

    def test_the_same_in_every_process(self, tmp_path, seed):
        folder = write_names(tmp_path / "names", seed)
        code = "import sys; from pathlib import Path; from demo.words import load_vocabulary as load\n"
        code += "sys.stdout.buffer.write(load(Path(sys.argv[1])).vectors.tobytes())"
        found = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, check=True, cwd=ROOT).stdout
        assert found == load_vocabulary(folder).vectors.tobytes()

    def test_bad_folders(self, tmp_path, seed):
        with pytest.raises(UserError, match="none/names.json is missing: give the folder with names.json and embedd"):
            load_vocabulary(tmp_path / "none")
        folder = write_names(tmp_path / "names", seed, drop="tree")
        with pytest.raises(UserError, match="names.json lacks tree: give the full list of CLIP's names"):
            load_vocabulary(folder)
        np.save(folder / "embeddings.npy", np.ones((3, 512), np.float16))
        with pytest.raises(UserError, match="names for 3 vectors; the two files do not belong together"):
            load_vocabulary(folder)
        (folder / "embeddings.npy").unlink()
        with pytest.raises(UserError, match="embeddings.npy is missing"):
            load_vocabulary(folder)


def coordinates(count: int, size: int = 256) -> data.Split:
    """Photos whose red and green say where a pixel is, with blue 255, and masks of small cells."""
    y, x = np.mgrid[:size, :size]
    mask = (x // 16 + 3 * (y // 16)) % 12
    image = np.stack([x, y, np.full_like(x, 255)]).astype(np.uint8)
    images, masks = torch.from_numpy(image)[None], torch.from_numpy(mask)[None]
    return data.Split(images.repeat(count, 1, 1, 1), masks.repeat(count, 1, 1))


class TestCrops:
    def test_mask_and_image_stay_together(self, monkeypatch, seed):
        """Under zoom, turn, mirror, shift and CutMix. Colours change only later, and are left alone here."""
        monkeypatch.setattr(data, "jitter_colour", lambda images, generator: images)
        split, size = coordinates(2), 128
        generator = torch.Generator().manual_seed(seed)
        at = np.rint(np.linspace(0, size - 1, size // 2)).astype(int)
        agree, total, outside = 0, 0, 0
        for _ in range(12):
            images, masks = data.sample_crops(split, 4, size, generator)
            assert (images.shape, images.dtype) == ((4, 3, size, size), torch.float32)
            assert (masks.shape, masks.dtype) == ((4, size // 2, size // 2), torch.int64)
            x, y, inside = (images[:, channel].numpy()[:, at][:, :, at] * 255 for channel in range(3))
            whole, none = inside > 254.9, inside < 0.1  # between the two, the photo's edge is blended with black
            expected = split.masks[0].numpy()[np.rint(y).astype(int), np.rint(x).astype(int)]
            agree += (masks.numpy() == expected)[whole].sum()
            total += whole.sum()
            outside += none.sum()
            assert (masks.numpy()[none] == UNLABELLED).all()
        print(f"{agree / total:.4%} of {total} agree, {outside} outside")
        assert agree / total > 0.995  # where a coordinate is half-way between two pixels, either may be meant
        assert total > 50_000 and outside > 500

    def test_cut_mix(self, seed):
        """A rectangle of the neighbour, in image and mask alike; all else stays."""
        image = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 64, 64)
        masks = torch.arange(3).view(3, 1, 1).expand(3, 32, 32)
        mixed, mixed_masks = data.cut_mix(image, masks, torch.Generator().manual_seed(seed))
        assert torch.equal(mixed[:, 0, ::2, ::2].long(), mixed_masks) and torch.equal(mixed[:, 0], mixed[:, 2])
        for n in range(3):
            assert set(mixed_masks[n].unique().tolist()) == {n, (n - 1) % 3}
            share = (mixed_masks[n] != n).float().mean()
            assert 0.02 < share < 0.5

    def test_colours_change_and_places_do_not(self, seed):
        generator = torch.Generator().manual_seed(seed)
        flat = torch.full((8, 3, 16, 16), 0.5)
        changed = data.jitter_colour(flat, generator)
        assert changed.shape == flat.shape and (changed.std(dim=(2, 3))[..., None] < 0.2).all()
        middle = changed[:, :, 4:-4, 4:-4]
        assert (middle.amax(dim=(2, 3)) - middle.amin(dim=(2, 3))).max() < 1e-5
        assert len({round(float(value), 4) for value in middle.mean(dim=(1, 2, 3))}) > 4

    def test_the_same_seed_gives_the_same_crops(self, seed):
        split = coordinates(2)
        one, two, other = (
            data.sample_crops(split, 3, 64, torch.Generator().manual_seed(value)) for value in (seed, seed, seed + 1)
        )
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], other[0])

    def test_whole_images(self):
        images = data.whole_images(coordinates(2), 64)
        assert images.shape == (2, 3, 64, 64)
        np.testing.assert_allclose(images[0, 0, 5] * 255, np.arange(64) * 4 + 1.5, atol=1e-3)


class TestFolders:
    def test_reading(self, tmp_path, seed):
        split = data.load_split(write_camvid(tmp_path / "camvid", seed) / "val")
        assert (split.images.shape, split.images.dtype) == ((3, 3, 72, 96), torch.uint8)
        assert (split.masks.shape, split.masks.dtype) == ((3, 72, 96), torch.uint8)
        np.testing.assert_array_equal(
            split.images[2].permute(1, 2, 0), read_image(tmp_path / "camvid" / "val" / "2.jpg")
        )
        assert sorted(split.masks[0].unique().tolist()) == list(range(12))

    def test_bad_folders(self, tmp_path, seed):
        folder = write_camvid(tmp_path / "camvid", seed) / "train"
        with pytest.raises(UserError, match="none does not exist: give the folder that contains train, val and test"):
            data.load_split(tmp_path / "none")
        with pytest.raises(UserError, match="camvid holds no .jpg images: give the folder that contains train, val"):
            data.load_split(folder.parent)
        cv2.imwrite(str(folder / "1.png"), np.full((72, 96), 12, np.uint8))
        with pytest.raises(UserError, match="1.jpg: its mask 1.png must have its size and one value, 0 to 11, a pixel"):
            data.load_split(folder)
        cv2.imwrite(str(folder / "1.png"), np.zeros((72, 90), np.uint8))
        with pytest.raises(UserError, match="1.jpg: its mask 1.png must have its size"):
            data.load_split(folder)
        cv2.imwrite(str(folder / "1.jpg"), np.zeros((72, 90, 3), np.uint8))
        with pytest.raises(UserError, match="1.jpg has another size than 0.jpg: give images of one size"):
            data.load_split(folder)
        (folder / "1.png").unlink()
        with pytest.raises(UserError, match="1.jpg: the image or its mask 1.png cannot be read"):
            data.load_split(folder)


def naive_iou(predicted: np.ndarray, masks: np.ndarray) -> list[float]:
    values = []
    for c in range(11):
        a, b = (predicted == c) & (masks != 11), masks == c
        values.append((a & b).sum() / max((a | b).sum(), 1))
    return values


class TestFigures:
    def test_confusion_and_iou(self, seed):
        rng = np.random.default_rng(seed)
        masks = rng.integers(0, 12, (2, 20, 30))
        predicted = np.where(rng.random(masks.shape) < 0.6, masks % 11, rng.integers(0, 11, masks.shape))
        predicted[predicted == 9] = 8  # a class that is never predicted
        matrix = confusion(torch.from_numpy(predicted), torch.from_numpy(masks))
        assert matrix.shape == (11, 11) and matrix.sum() == (masks != 11).sum()
        for true in range(11):
            for found in range(11):
                assert matrix[true, found] == ((masks == true) & (predicted == found)).sum()
        np.testing.assert_allclose(class_iou(matrix), naive_iou(predicted, masks), rtol=1e-12)
        assert class_iou(matrix)[9] == 0

    def test_a_perfect_result(self):
        masks = torch.arange(12).view(1, 3, 4)
        assert class_iou(confusion(masks % 11, masks)).tolist() == [1.0] * 11


class TestTraining:
    SIZES = LSegConfig(
        image_size=64, width=32, depth=4, heads=2, taps=(0, 1, 2, 3), reassemble=(8, 12, 16, 16), features=16
    )
    TEXT = TextConfig(width=32, layers=2, heads=2, token_width=8)

    def train(self, folder: Path, output: Path, *more: str) -> int:
        from demo import train

        options = ["--camvid", folder / "camvid", "--clip-names", folder / "names", "--output", output, *more]
        options += "--random-teacher --text-steps 2 --teacher-steps 2 --steps 2 --batch 2 --device cpu".split()
        with pytest.raises(SystemExit) as end:
            run(lambda: train.main(train.parse_args(list(map(str, options)))))
        return end.value.code

    @pytest.fixture
    def small(self, monkeypatch):
        from demo import train

        monkeypatch.setattr(train, "IMAGE_CONFIG", self.SIZES)
        monkeypatch.setattr(train, "TEXT_CONFIG", self.TEXT)

    @needs_teacher
    def test_a_few_steps(self, small, tmp_path, seed, capsys):
        write_names(tmp_path / "names", seed)
        write_camvid(tmp_path / "camvid", seed)
        for name in "ab":
            assert self.train(tmp_path, tmp_path / name) == 0
        printed = capsys.readouterr()
        assert "teacher: mIoU" in printed.out and "test mIoU" in printed.out
        assert not printed.err  # progress bars are for a terminal, and warnings for nobody
        files = ["lseg_demo.safetensors", "training.json", "training.png"]
        assert sorted(file.name for file in (tmp_path / "a").iterdir()) == files

        weights = checkpoint.load(tmp_path / "a" / files[0])
        assert (weights.image_config, weights.text_config) == (self.SIZES, self.TEXT)
        image, text = checkpoint.load_image_encoder(weights), checkpoint.load_text_encoder(weights)
        assert image(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 32, 32)
        assert text(torch.from_numpy(Tokenizer()(CLASSES))).shape == (11, 512)
        assert all(torch.isfinite(tensor).all() for tensor in weights.tensors.values())
        report = json.loads((tmp_path / "a" / files[1]).read_text())
        assert list(report["test_iou"]) == list(CLASSES)
        assert report["test_miou"] == pytest.approx(np.mean(list(report["test_iou"].values())))
        assert [row["step"] for row in report["history"]] == [1, 2]
        assert all(np.isfinite(row[name]) for row in report["history"] for name in ("hard", "soft", "hint", "val_miou"))
        assert read_image(tmp_path / "a" / files[2]).std() > 5

        again = load_file(tmp_path / "b" / files[0])
        assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(tmp_path / "a" / files[0]).items())

    @needs_teacher
    @pytest.mark.parametrize("missing", ["train", "val", "test", "names"])
    def test_missing_folders(self, small, tmp_path, seed, capsys, missing):
        """Said at the start, for all of them: the test images are read only after hours of training."""
        write_names(tmp_path / "names", seed)
        write_camvid(tmp_path / "camvid", seed)
        gone = tmp_path / "names" if missing == "names" else tmp_path / "camvid" / missing
        gone.rename(tmp_path / "elsewhere")
        assert self.train(tmp_path, tmp_path / "out") == 2
        out, err = capsys.readouterr()
        sentence = (
            f"{gone}/names.json is missing: give the folder with names.json and embeddings.npy"
            if missing == "names"
            else f"{gone} does not exist: give the folder that contains train, val and test"
        )
        assert (out, err) == ("", f"error: {sentence}\n")
        assert not (tmp_path / "out").exists()

    def test_missing_packages(self, small, tmp_path, capsys, monkeypatch):
        from demo import train

        monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
        assert self.train(tmp_path, tmp_path / "out") == 2
        assert capsys.readouterr().err == (
            "error: training needs efficientnet-lite-pytorch and matplotlib: "
            "run 'pip install efficientnet-lite-pytorch matplotlib'\n"
        )

    @needs_teacher
    def test_an_output_folder_that_cannot_be(self, small, tmp_path, seed, capsys):
        write_names(tmp_path / "names", seed)
        write_camvid(tmp_path / "camvid", seed)
        (tmp_path / "file").touch()
        assert self.train(tmp_path, tmp_path / "file" / "out") == 2
        assert "out cannot be written (Not a directory); choose another output folder" in capsys.readouterr().err


class TestDemoWeights:
    def test_size_and_contents(self):
        assert DEMO_WEIGHTS.stat().st_size <= 16_000_000
        weights = checkpoint.load("demo")
        assert weights.name == "demo" and weights.image_config.image_size == 480
        assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.float16, torch.int64}
        checkpoint.load_image_encoder(weights)
        assert checkpoint.load_text_encoder(weights).config.embedding == 512

    def test_texts_against_clips_own(self, clip_names):
        """The words' vectors, genuine and made, as the text encoder gives them; prompts come close to the bare word."""
        vocabulary = load_vocabulary(clip_names)
        encoder = checkpoint.load_text_encoder(checkpoint.load("demo"))
        with torch.no_grad():
            found = encoder(torch.from_numpy(Tokenizer()(vocabulary.names))).numpy()
            prompted = encoder(torch.from_numpy(Tokenizer()([PROMPTS[0].format(name) for name in CLASSES]))).numpy()
        cosine = (found * vocabulary.vectors).sum(axis=1)
        classes = [vocabulary.index(name) for name in CLASSES]
        print(f"cosine: mean {cosine.mean():.4f}, worst {cosine.min():.3f}, classes {cosine[classes].min():.4f}")
        assert cosine.mean() > 0.95 and cosine[classes].min() > 0.9
        assert (prompted * vocabulary.vectors[classes]).sum(axis=1).min() > 0.9
        near = (
            vocabulary.vectors[classes] @ found[[vocabulary.index(name) for name in ("truck", "man", "bus", "house")]].T
        )
        assert [CLASSES[n] for n in near.argmax(axis=0)] == ["car", "pedestrian", "car", "building"]

    def test_accuracy(self, demo, camvid):
        """On the first 20 test images: a check of the whole way from photo to labels, not the reported figure."""
        photos = sorted((camvid / "test").glob("*.jpg"))[:20]
        assert len(photos) == 20
        hits, unions = np.zeros(11), np.zeros(11)
        with open_runner("onnxruntime", "demo", demo.folder) as runner:
            text = runner.encode_text(Tokenizer()(CLASSES))
            for photo in photos:
                image = read_image(photo)
                mask = cv2.imread(str(photo.with_suffix(".png")), cv2.IMREAD_UNCHANGED)
                labels = runner.segment(to_pixels(image)[None], text).labels[0]
                labels = np.where(
                    mask == UNLABELLED, UNLABELLED, labels_to_photo(labels, image.shape[1], image.shape[0])
                )
                for c in range(11):
                    hits[c] += ((labels == c) & (mask == c)).sum()
                    unions[c] += ((labels == c) | (mask == c)).sum()
        iou = 100 * hits / np.maximum(unions, 1)
        print(f"mIoU {iou.mean():.2f}:", dict(zip(CLASSES, iou.round(1).tolist(), strict=True)))
        assert iou.mean() >= 55
