"""Shares, overlays and panels."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

import lseg.draw
from lseg.draw import overlay, panel, shares
from lseg.labels import palette

NAMES = ["sky", "road", "café", "日本", "other"]


@pytest.fixture(params=["own font", "Pillow's font"])
def any_font(request, monkeypatch):
    """OpenCV 5 draws text itself; with OpenCV 4 Pillow does."""
    if request.param == "Pillow's font":
        monkeypatch.delattr(cv2, "FontFace", raising=False)
    elif not hasattr(cv2, "FontFace"):
        pytest.skip("OpenCV 4 has no such font")


def scene(seed: int, height: int, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return photo, rng.integers(-1, count, (height, width)).astype(np.int32)


def contains(picture: np.ndarray, colour: np.ndarray) -> bool:
    return bool((picture == colour).all(2).any())


def make(photo: np.ndarray, parts: list[float], **options) -> np.ndarray:
    names = (NAMES + [f"label {index}" for index in range(len(parts))])[: len(parts)]
    return panel(photo, 255 - photo, names, palette(names), np.array(parts), **options)


class TestShares:
    @pytest.mark.parametrize("height", [1, 480, 1300])
    @pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
    def test_equals_counting(self, seed, height, dtype):
        labels = scene(seed, height, 37, 6)[1]
        labels = (abs(labels) if dtype == np.uint8 else labels).astype(dtype)
        result = shares(labels, 8)
        assert result.dtype == np.float64
        np.testing.assert_allclose(result, [(labels == index).mean() for index in range(8)], atol=1e-12)
        assert result.sum() == pytest.approx((labels >= 0).mean() if dtype != np.uint8 else 1)


class TestOverlay:
    def test_tint_inside_regions(self, seed):
        photo = scene(seed, 90, 120, 3)[0]
        labels = np.zeros((90, 120), np.int32)
        labels[:, 40:], labels[:, 80:] = 2, -1
        colours = palette(["sky", "road", "tree"])
        result = overlay(photo, labels, colours, opacity=0.4)
        for columns, colour in ((slice(0, 38), colours[0]), (slice(42, 78), colours[2])):
            expected = 0.4 * colour + 0.6 * photo[:, columns]
            assert np.abs(result[:, columns] - expected).max() <= 1
        np.testing.assert_array_equal(result[:, 82:], photo[:, 82:])

    def test_borders_between_regions_only(self):
        photo = np.zeros((60, 60, 3), np.uint8)
        labels = np.zeros((60, 60), np.int32)
        labels[20:40, 20:40] = 1
        colours = np.array([[0, 0, 0], [0, 0, 0]], np.uint8)
        bright = overlay(photo, labels, colours).max(2) > 100
        assert not overlay(photo, np.zeros_like(labels), colours).any()
        expected = np.zeros((60, 60), bool)
        expected[19, 20:40] = expected[39, 20:40] = expected[20:40, 19] = expected[20:40, 39] = True
        np.testing.assert_array_equal(bright, expected)

    def test_borders_grow_with_the_photo_and_pass_strips(self, monkeypatch, seed):
        photo = np.zeros((1440, 1440, 3), np.uint8)
        labels = cv2.resize(
            np.random.default_rng(seed).integers(0, 4, (9, 9)).astype(np.uint8),
            (1440, 1440),
            interpolation=cv2.INTER_NEAREST_EXACT,
        ).astype(np.int32)
        labels[:, :160], labels[:, 160:320] = 0, 1
        colours = palette(["a", "b", "c", "d"])
        result = overlay(photo, labels, colours)
        row = (result[720, 100:220] > 180).all(1)
        assert row.sum() == 3
        monkeypatch.setattr(lseg.draw, "ROWS_AT_ONCE", 100_000)
        np.testing.assert_array_equal(result, overlay(photo, labels, colours))

    def test_photo_is_left_alone(self, seed):
        photo, labels = scene(seed, 33, 44, 5)
        before = photo.copy()
        result = overlay(photo, labels, palette(NAMES))
        np.testing.assert_array_equal(photo, before)
        assert result.shape == photo.shape and result.dtype == np.uint8
        np.testing.assert_array_equal(overlay(photo, labels, palette(NAMES), opacity=0), photo)

    def test_one_pixel(self):
        result = overlay(np.full((1, 1, 3), 100, np.uint8), np.zeros((1, 1), np.int32), np.array([[200, 0, 0]]), 0.5)
        np.testing.assert_array_equal(result, [[[150, 50, 50]]])


@pytest.mark.usefixtures("any_font")
class TestPanel:
    @pytest.mark.parametrize(
        ("height", "width"), [(1, 1), (427, 640), (640, 427), (300, 900), (5, 3000), (3000, 5), (2000, 3000), (20, 20)]
    )
    @pytest.mark.parametrize("max_side", [320, 1280])
    def test_fits(self, seed, height, width, max_side):
        photo = scene(seed, height, width, 5)[0]
        result = make(photo, [0.5, 0.3, 0.1, 0.1, 0.0], max_side=max_side)
        assert result.dtype == np.uint8 and result.ndim == 3
        assert max_side // 2 < max(result.shape) <= max_side
        assert (result[:10] == 255).all() and (result[:, :10] == 255).all() and (result[:, -10:] == 255).all()

    def test_photo_and_overlay_are_beside_or_above_each_other(self):
        for height, width in ((300, 400), (100, 400)):
            photo = np.zeros((height, width, 3), np.uint8)
            result = panel(photo, photo + 99, ["car", "other"], palette(["car", "other"]), np.array([1.0, 0.0]))
            dark, light = (result == 0).all(2), (result == 99).all(2)
            boxes = []
            for mask in (dark, light):
                rows, columns = np.flatnonzero(mask.mean(1) > 0.2), np.flatnonzero(mask.mean(0) > 0.2)
                boxes.append((rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
                assert (columns[-1] + 1 - columns[0]) / (rows[-1] + 1 - rows[0]) == pytest.approx(
                    width / height, rel=0.02
                )
            first, second = boxes
            if width / height < 2.2:
                assert first[:2] == second[:2] and first[3] < second[2]
            else:
                assert first[2:] == second[2:] and first[1] < second[0]

    def test_swatches_of_what_was_found(self):
        photo = np.zeros((300, 400, 3), np.uint8)
        colours = palette(NAMES)
        result = make(photo, [0.5, 0.0, 0.4999, 0.0001, 0.0])
        assert [contains(result, colour) for colour in colours] == [True, False, True, True, False]
        rows = [np.argwhere((result == colours[index]).all(2)).min(0) for index in (0, 2, 3)]
        assert sorted(map(tuple, rows), key=lambda place: (place[1], place[0])) == [tuple(row) for row in rows]

    def test_names_and_shares_are_written(self):
        photo = np.zeros((300, 400, 3), np.uint8)

        def text(names, parts):
            colours = np.full((len(names), 3), 99, np.uint8)
            return panel(photo, photo, names, colours, np.array(parts))[-60:]

        first = text(["cat", "dog"], [0.6, 0.4])
        assert (first < 100).any()
        assert (first != text(["cat", "cow"], [0.6, 0.4])).any()
        assert (first != text(["cat", "dog"], [0.7, 0.3])).any()

    def test_a_thousand_labels(self, seed):
        photo = scene(seed, 300, 400, 5)[0]
        parts = np.random.default_rng(seed).random(1000)
        parts[300:] = 0
        parts /= parts.sum()
        names = [f"label number {index} with a name as long as they come" for index in range(1000)]
        colours = palette(names)
        result = panel(photo, photo * 0, names, colours, parts)
        assert max(result.shape) <= 1280
        legend = result[-400:]
        order = np.argsort(-parts)
        swatches = [(legend == colours[index]).all(2).sum() > 200 for index in order[:60]]
        assert all(swatches[:24]) and not any(swatches[24:])

    def test_nothing_found(self):
        assert max(make(np.zeros((30, 40, 3), np.uint8), [0.0, 0.0]).shape) <= 1280

    def test_quick(self):
        photo = np.zeros((480, 640, 3), np.uint8)
        labels = np.random.default_rng(0).integers(0, 5, (480, 640)).astype(np.int32)
        times = []
        for _ in range(3):
            start = time.process_time()
            over = overlay(photo, labels, palette(NAMES))
            panel(photo, over, NAMES, palette(NAMES), shares(labels, 5))
            times.append(time.process_time() - start)
        assert min(times) < 0.3, times


@pytest.mark.parametrize(("share", "text"), [(0, "0.0%"), (0.0001, "<0.1%"), (0.3456, "34.6%"), (1, "100.0%")])
def test_percent(share, text):
    assert lseg.draw._percent(share) == text
