"""Label lists, their colours and their files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import cv2
import numpy as np
import pytest

from lseg.errors import UserError
from lseg.labels import COLOURS, COMMON, LabelSet, label_dtype, palette, parse_labels, save_label_map


def cielab(rgb: np.ndarray) -> np.ndarray:
    """float32 [N, 3], by OpenCV, which the table of colours was not made with."""
    return cv2.cvtColor((rgb[None] / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[0]


def nearest(rgb: np.ndarray) -> float:
    """The smallest CIELAB distance between two of the colours."""
    lab = cielab(rgb)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return float(distances[np.triu_indices(len(rgb), 1)].min())


def words(seed: int, number: int) -> list[str]:
    """Different ones, none of the common words that have a colour of their own."""
    rng = random.Random(seed)
    found = set()
    while len(found) < number:
        found.add("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 12))))
        found -= COMMON.keys()
    return sorted(found, key=lambda _: rng.random())


class TestParse:
    def test_commas_newlines_and_white_space(self):
        assert parse_labels("car,  traffic \t light ,,\n road\r\n, \n sky,") == LabelSet(
            ("car", "traffic light", "road", "sky")
        )

    def test_many_texts(self):
        assert parse_labels(["car,", "road, sky", "", "tree"]).names == ("car", "road", "sky", "tree")

    def test_repeats_are_dropped_with_a_note(self):
        labels = parse_labels("Car, road, CAR, road , caf\u00e9, Cafe\u0301, straße, STRASSE")
        assert labels.names == ("Car", "road", "caf\u00e9", "straße", "STRASSE")
        assert labels.notes == (
            'label "CAR" is dropped: it repeats "Car"',
            'label "road" is dropped: it repeats "road"',
            'label "Cafe\u0301" is dropped: it repeats "caf\u00e9"',
        )

    @pytest.mark.parametrize("text", ["dog", " dog ,", "dog, DOG"])
    def test_one_label_gets_other(self, text):
        labels = parse_labels(text)
        assert labels.names == ("dog", "other")
        assert labels.notes[-1] == '"other" is added to the labels: "dog" alone would be every pixel\'s'

    def test_other_stays_where_it_is(self):
        assert parse_labels("other, car") == LabelSet(("other", "car"))
        assert parse_labels("sky, Other, car") == LabelSet(("sky", "Other", "car"))

    @pytest.mark.parametrize("text", ["other", " Other,,OTHER "])
    def test_other_alone_is_refused(self, text):
        with pytest.raises(UserError) as error:
            parse_labels(text)
        assert str(error.value) == '"other" is the only label: name at least one more, for example "car, other"'

    @pytest.mark.parametrize("text", ["", " ", ",,\n ,\t", "\x00, \ufeff", "\u200b", [], ["", ","]])
    def test_no_label_is_refused(self, text):
        with pytest.raises(UserError) as error:
            parse_labels(text)
        assert str(error.value) == 'no label is given: name at least one, for example "car, road, sky, other"'

    def test_signs_that_do_not_show_are_removed(self):
        assert parse_labels("\ufeffcar\x00, ro\x07ad, 👩\u200d🚀").names == ("car", "road", "👩\u200d🚀")

    def test_text_that_is_not_unicode_is_refused(self):
        with pytest.raises(UserError) as error:
            parse_labels("car, caf\udce9")  # what Python makes of a Latin-1 argument
        assert str(error.value) == "the label 'caf\\udce9' is not valid text: write it in UTF-8"

    def test_a_thousand_labels(self, seed):
        names = words(seed, 1000)
        assert parse_labels("\n".join(names)) == LabelSet(tuple(names))


class TestPalette:
    def test_table(self):
        table = np.array([list(bytes.fromhex(word)) for word in COLOURS.split()])
        assert table.shape == (120, 3)
        assert nearest(table[:40]) > 24
        assert nearest(table) > 14.9
        lab = cielab(table)
        assert lab[:, 0].min() > 41 and lab[:, 0].max() < 76
        chroma = np.hypot(lab[:, 1], lab[:, 2])
        assert chroma[COMMON["other"]] < 1  # grey, and the only one
        assert np.delete(chroma, COMMON["other"]).min() > 30

    def test_common_words_have_their_own(self):
        names = ["sky", "road", "building", "tree", "car", "person", "grass", "water", "other"]
        colours = palette(names)
        sky, _, _, tree, _, person, grass, _, other = colours.astype(int)
        assert sky.argmax() == 2 and tree.argmax() == 1 and grass.argmax() == 1 and person.argmax() == 0
        assert np.ptp(other) == 0
        assert nearest(colours) > 24
        for name, colour in zip(names, colours, strict=True):  # whatever else is in the list
            assert (palette(["zebra", name.upper(), "dragon"])[1] == colour).all()

    def test_colours_are_for_good(self):
        """These must never change: pictures of different days are compared."""
        colours = palette(["zebra", "Sky", "traffic  light", "café", "dog"])
        assert [bytes(colour).hex() for colour in colours] == ["fa912d", "50a5f0", "00cd7d", "aa7800", "2864c8"]

    def test_same_in_another_process(self, seed):
        names = words(seed, 100)
        code = f"from lseg.labels import palette; print(palette({names!r}).tobytes().hex())"
        env = {**os.environ, "PYTHONHASHSEED": "7"}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert result.stdout.strip() == palette(names).tobytes().hex()

    @pytest.mark.parametrize(("number", "distance"), [(2, 24), (10, 24), (20, 24), (26, 24), (60, 14.9), (106, 14.9)])
    def test_labels_are_apart(self, seed, number, distance):
        colours = palette([*words(seed, number), "sky", "road", "other"])
        assert nearest(colours) > distance
        lightness = cielab(colours)[:, 0]
        assert lightness.min() > 41 and lightness.max() < 76

    def test_order_plays_no_part_and_few_collide(self, seed):
        names = [*words(seed, 30), "person", "pedestrian", "sky"]
        colours = dict(zip(names, palette(names).tolist(), strict=True))
        random.Random(seed).shuffle(names)
        assert dict(zip(names, palette(names).tolist(), strict=True)) == colours

    def test_a_colour_changes_only_for_one_who_wants_the_same(self, seed):
        alone = {}
        for name in words(seed, 200):
            alone[name] = tuple(palette([name])[0])
        rng = random.Random(seed)
        for _ in range(50):
            names = rng.sample(sorted(alone), 12)
            for name, colour in zip(names, palette(names), strict=True):
                if tuple(colour) != alone[name]:
                    assert [alone[other] for other in names].count(alone[name]) > 1

    def test_a_thousand_labels_all_differ(self, seed):
        colours = palette([*words(seed, 1000), *COMMON])
        assert colours.dtype == np.uint8
        assert len(np.unique(colours, axis=0)) == 1000 + len(COMMON)
        lightness = cielab(colours)[:, 0]
        assert lightness.min() > 30 and lightness.max() < 85

    def test_no_labels(self):
        assert palette([]).shape == (0, 3)


class TestFiles:
    def test_types(self):
        assert [label_dtype(number) for number in (1, 255, 256, 65535)] == [np.uint8, np.uint8, np.uint16, np.uint16]
        with pytest.raises(
            UserError, match="^65536 labels are more than a 16-bit label map holds: give at most 65535$"
        ):
            label_dtype(65536)

    @pytest.mark.parametrize(
        ("number", "dtype", "unlabelled"), [(3, np.uint8, 255), (255, np.uint8, 255), (256, np.uint16, 65535)]
    )
    def test_label_map(self, tmp_path, seed, number, dtype, unlabelled):
        rng = np.random.default_rng(seed)
        labels = rng.integers(-1, number, (40, 60)).astype(np.int32)
        labels[0, :2] = -1, number - 1
        names = ["café", "car", *words(seed, number - 2)]
        colours = palette(names)
        path = tmp_path / "new" / "photo.labels.png"
        save_label_map(path, labels, names, colours)
        assert sorted(file.name for file in path.parent.iterdir()) == ["photo.labels.json", "photo.labels.png"]

        read = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert read.dtype == dtype and read.shape == labels.shape
        np.testing.assert_array_equal(read, np.where(labels < 0, unlabelled, labels))

        meaning = json.loads(path.with_suffix(".json").read_text("utf-8"))
        assert meaning["unlabelled"] == unlabelled
        assert meaning["image"] == "photo.labels.png"
        assert meaning["size"] == [60, 40]
        assert [entry["index"] for entry in meaning["labels"]] == list(range(number))
        assert [entry["name"] for entry in meaning["labels"]] == names
        for entry, colour in zip(meaning["labels"], colours, strict=True):
            assert entry["colour"] == "#{:02x}{:02x}{:02x}".format(*colour)
            assert entry["share"] == pytest.approx((labels == entry["index"]).mean(), abs=1e-6)

    def test_folder_that_cannot_be_written(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("in the way")
        path = file / "labels.png"
        with pytest.raises(UserError) as error:
            save_label_map(path, np.zeros((2, 2), np.int32), ["car", "other"], palette(["car", "other"]))
        assert str(error.value).startswith(f"{path} cannot be written (")
        assert str(error.value).endswith("); choose another output folder")

    def test_nothing_is_left_when_the_second_file_fails(self, tmp_path):
        (tmp_path / "labels.json").mkdir()
        with pytest.raises(UserError, match="labels.json is a folder; choose another output name"):
            save_label_map(tmp_path / "labels.png", np.zeros((2, 2), np.int32), ["a", "b"], palette(["a", "b"]))
        assert [file.name for file in tmp_path.iterdir()] == ["labels.json"]

    def test_other_suffix(self, tmp_path):
        path = tmp_path / "labels.jpg"
        with pytest.raises(UserError) as error:
            save_label_map(path, np.zeros((2, 2), np.int32), ["a", "b"], palette(["a", "b"]))
        assert str(error.value) == f"{path}: a label map is a PNG; give a name that ends in .png"
