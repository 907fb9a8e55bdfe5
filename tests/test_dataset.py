"""Data sets on disk: layouts, what masks mean, and a sentence for each that is broken. And files of labels."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from lseg.dataset import CAMVID, VOID, Dataset, find_dataset
from lseg.errors import UserError
from lseg.labels import read_labels_file

ADE_TABS = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t116\t117\t1\twall\n2\t0.11\t604\t61\t1\tbuilding, edifice\n"
ADE_COMMAS = "Idx,Ratio,Train,Val,Stuff,Name\n1,0.1576,11664,1172,1,wall\n2,0.1072,6046,612,1,building;edifice\n"


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def pair(photo: Path, mask: Path, values: np.ndarray) -> None:
    write(photo, np.zeros((*values.shape, 3), np.uint8))
    write(mask, values.astype(np.uint8))


class TestLayouts:
    def test_side_by_side(self, tmp_path, seed):
        values = np.random.default_rng(seed).integers(0, 12, (6, 8))
        for name in "ba":
            pair(tmp_path / f"{name}.jpg", tmp_path / f"{name}.png", values)
        data = find_dataset(tmp_path)
        assert [(photo.name, mask.name) for photo, mask in data.pairs] == [("a.jpg", "a.png"), ("b.jpg", "b.png")]
        assert data.labels == CAMVID and data.name == tmp_path.name
        mask = data.mask(data.pairs[0][1], (6, 8, 3))
        assert np.array_equal(mask, np.where(values == 11, VOID, values))
        assert len(find_dataset(tmp_path, limit=1).pairs) == 1

    def test_annotations_beside(self, tmp_path):
        pair(tmp_path / "test" / "x.png", tmp_path / "testannot" / "x.png", np.array([[0, 10, 11, 255]]))
        data = find_dataset(tmp_path / "test")
        assert data.pairs == ((tmp_path / "test" / "x.png", tmp_path / "testannot" / "x.png"),)
        assert data.mask(data.pairs[0][1], (1, 4)).tolist() == [[0, 10, VOID, VOID]]

    @pytest.mark.parametrize("split", ["", "validation"])
    def test_ade20k(self, tmp_path, split):
        photo, mask = tmp_path / "images" / split / "x.jpg", tmp_path / "annotations" / split / "x.png"
        pair(photo, mask, np.array([[0, 1, 2, 255]]))
        with pytest.raises(UserError, match="holds no objectInfo150.txt: name the masks' values with --labels-file"):
            find_dataset(tmp_path)
        (tmp_path / "objectInfo150.txt").write_text(ADE_TABS)
        data = find_dataset(tmp_path)
        assert (data.labels, data.pairs) == (("wall", "building"), ((photo, mask),))
        assert data.mask(mask, (1, 4)).tolist() == [[VOID, 0, 1, VOID]]


class TestValues:
    @pytest.mark.parametrize("bits, count", [(1, 2), (2, 4), (4, 16)])
    def test_masks_of_few_bits(self, tmp_path, bits, count, seed):
        """As they are in the file, not stretched to 0..255."""
        values = np.random.default_rng(seed).integers(0, count, (6, 8), dtype=np.uint8)
        rows = b"".join(b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:]).tobytes() for row in values)
        head = struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        png = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
        (tmp_path / "grey.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
        data = Dataset("x", (), tuple(map(str, range(count))))
        assert np.array_equal(data.mask(tmp_path / "grey.png", (6, 8)), values)

    def test_255_is_a_label_in_16_bits(self, tmp_path):
        assert cv2.imwrite(str(tmp_path / "a.png"), np.array([[255, 299, 300]], np.uint16))
        data = Dataset("x", (), tuple(map(str, range(300))))
        assert data.mask(tmp_path / "a.png", (1, 3)).tolist() == [[255, 299, VOID]]


class TestBroken:
    def broken(self, folder: Path, **options) -> str:
        with pytest.raises(UserError) as error:
            data = find_dataset(folder, **options)
            for photo, mask in data.pairs:
                data.mask(mask, cv2.imread(str(photo)).shape)
        return str(error.value).replace(str(folder), "DATA")

    def test_no_folder_and_no_photo(self, tmp_path):
        assert self.broken(tmp_path / "none") == "DATA is no folder: give the data set's"
        (tmp_path / "train").mkdir()
        assert self.broken(tmp_path) == "DATA holds no photo, only folders (train): give one of them"
        assert self.broken(tmp_path / "train") == "DATA holds no photo: give a folder of NAME.jpg with masks NAME.png"

    def test_a_mask_is_missing(self, tmp_path):
        pair(tmp_path / "a.jpg", tmp_path / "a.png", np.zeros((2, 2)))
        write(tmp_path / "b.jpg", np.zeros((2, 2, 3), np.uint8))
        assert self.broken(tmp_path) == "DATA/b.jpg has no mask DATA/b.png: add it, or take the photo out"

    @pytest.mark.parametrize(
        "mask, sentence",
        [
            (np.zeros((3, 2), np.uint8), "has 2 x 3 pixels and its photo 2 x 2: give a mask of the photo's size"),
            (np.zeros((2, 2, 3), np.uint8), "is no mask: it has 3 channels, and a mask has one value a pixel"),
            (
                np.full((2, 2), 12, np.uint8),
                "has the value 12, beyond the 11 labels: give the labels that it was made for",
            ),
        ],
    )
    def test_a_mask_that_does_not_fit(self, tmp_path, mask, sentence):
        write(tmp_path / "a.jpg", np.zeros((2, 2, 3), np.uint8))
        write(tmp_path / "a.png", mask)
        assert self.broken(tmp_path) == f"DATA/a.png {sentence}"

    def test_a_mask_that_is_none(self, tmp_path):
        write(tmp_path / "a.jpg", np.zeros((2, 2, 3), np.uint8))
        (tmp_path / "a.png").write_text("no")
        assert self.broken(tmp_path) == "DATA/a.png cannot be read as a mask: restore it"


class TestLabelsFile:
    @pytest.mark.parametrize(
        "text, labels",
        [
            ("sky\n\n  traffic   light \ncar\n", [("sky",), ("traffic light",), ("car",)]),
            ("\ufeffsky\r\ncar", [("sky",), ("car",)]),
            ("car, road\nsky", [("car",), ("road",), ("sky",)]),
            (ADE_TABS, [("wall",), ("building", "edifice")]),
            (ADE_COMMAS, [("wall",), ("building", "edifice")]),
            (json.dumps(["sky", ["car", "automobile"]]), [("sky",), ("car", "automobile")]),
            (json.dumps({"sky": [], "car": ["automobile"]}), [("sky",), ("car", "automobile")]),
            (json.dumps({"dog": "hound"}), [("dog", "hound")]),
        ],
    )
    def test_layouts(self, tmp_path, text, labels):
        (tmp_path / "labels").write_text(text, encoding="utf-8")
        assert read_labels_file(tmp_path / "labels") == labels

    @pytest.mark.parametrize(
        "content, sentence",
        [
            (b"", "holds no label: write one a line"),
            (b" \n\n", "holds no label: write one a line"),
            (b"[]", "holds no label: write one a line"),
            (b"\xff\xfe\x00s", "is no text in UTF-8: give a file of labels, one a line"),
            (b"[1, 2]", "holds something that is no word: give a list of labels, or labels with their synonyms"),
            (
                b'{"a": {"b": 1}}',
                "holds something that is no word: give a list of labels, or labels with their synonyms",
            ),
            (b"[" * 100_000, "is malformed JSON"),
            (b'["a"', "is malformed JSON"),
            (None, "cannot be read (No such file or directory): give a file of labels"),
        ],
    )
    def test_sentences(self, tmp_path, content, sentence):
        path = tmp_path / "labels"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_labels_file(path)
        assert str(error.value).startswith(f"{path} {sentence}") and "\n" not in str(error.value)
