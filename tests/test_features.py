"""Features of pixels, points and regions against references in float64; what reads and writes them; their memory."""

from __future__ import annotations

import json
import math
import tracemalloc
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lseg import features
from lseg.errors import UserError
from lseg.features import (
    Features,
    query,
    read_features,
    read_points,
    read_region_mask,
    write_features,
)
from lseg.image import labels_to_photo, to_pixels
from lseg.runner import open_runner

SIZE, DIM = 16, 12  # of the random grids: S and D
PHOTOS = [(1, 1), (1, 7), (7, 1), (5, 9), (16, 16), (15, 17), (37, 50), (100, 3), (64, 33)]  # H, W
# A 16-bit float's rounding, and what 32-bit arithmetic adds to that.
HALF = {"rtol": 2.0**-11 + 1e-6, "atol": 1e-6}


def unit(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return values / np.linalg.norm(values, axis=axis, keepdims=True)


def random_features(seed: int, height: int, width: int, dim: int = DIM, size: int = SIZE, dtype=np.float32) -> Features:
    grid = np.random.default_rng(seed).standard_normal((dim, size // 2, size // 2))
    return Features(unit(grid, 0).astype(dtype), size, height, width)


def reference(found: Features) -> np.ndarray:
    """Every pixel's unit feature, float64 [H, W, D], by the definition: all of them at the network's size first."""
    size = found.image_size
    grid = torch.from_numpy(found.grid.astype(np.float64))[None]
    network = F.interpolate(grid, (size, size), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
    rows = [math.floor((row + Fraction(1, 2)) * size / found.height) for row in range(found.height)]
    columns = [math.floor((column + Fraction(1, 2)) * size / found.width) for column in range(found.width)]
    return unit(network)[rows][:, columns]


def error(work, *args) -> str:
    with pytest.raises(UserError) as caught:
        work(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPixels:
    @pytest.mark.parametrize("shape", PHOTOS)
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_every_pixel(self, shape, dtype, seed):
        found = random_features(seed, *shape, dtype=dtype)
        every = found.strided(1)
        assert (every.dtype, every.shape) == (np.float16, (*shape, DIM))
        np.testing.assert_allclose(every, reference(found), **HALF)

    def test_at_the_networks_own_sizes(self, seed):
        found = random_features(seed, 240, 320, dim=5, size=480)
        np.testing.assert_allclose(found.strided(1), reference(found), **HALF)

    @pytest.mark.parametrize("shape", PHOTOS)
    def test_strides(self, shape, seed):
        found = random_features(seed, *shape)
        every = found.strided(1)
        for stride in (2, 3, 7, 16, 1000):
            some = found.strided(stride)
            assert some.shape == (math.ceil(shape[0] / stride), math.ceil(shape[1] / stride), DIM)
            assert np.array_equal(some, every[::stride, ::stride])

    @pytest.mark.parametrize("dtype", [np.int64, np.int16, np.uint64])
    @pytest.mark.parametrize("shape", PHOTOS)
    def test_points(self, shape, dtype, seed):
        """In any order, again and again; the corners among them."""
        found = random_features(seed, *shape)
        height, width = shape
        points = np.random.default_rng(seed).integers(0, [width, height], (50, 2))
        points[10:14] = [(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)]
        vectors = found.at(points.astype(dtype))
        assert (vectors.dtype, vectors.shape) == (np.float16, (50, DIM))
        np.testing.assert_allclose(vectors, reference(found)[points[:, 1], points[:, 0]], **HALF)
        assert np.array_equal(vectors, found.strided(1)[points[:, 1], points[:, 0]])
        assert np.array_equal(vectors[:1], found.at(points[:1]))

    def test_no_points(self, seed):
        assert random_features(seed, 4, 5).at(np.empty((0, 2), np.int64)).shape == (0, DIM)

    def test_opposite_neighbours(self):
        """Midway between a vector and its opposite there is no direction: zeros, and no NaN."""
        grid = np.zeros((2, 2, 2), np.float32)
        grid[0] = [[1, -1], [1, -1]]
        found = Features(grid, 3, 3, 3)  # S of 3, so that a pixel of the network falls midway
        assert np.array_equal(found.strided(1)[0], [[1, 0], [0, 0], [-1, 0]])
        ids, vectors, pixels = found.regions(np.ones((3, 3), np.uint8))
        assert (ids.tolist(), vectors.tolist(), pixels.tolist()) == ([1], [[0, 0]], [9])
        labels, cosine = query(found.strided(1)[0], np.eye(2, dtype=np.float32))
        assert (labels.tolist(), cosine.tolist()) == ([0, 0, 1], [1, 0, 0])

    @pytest.mark.parametrize(
        "point", [(7, 0), (0, 5), (-1, 2), (2, -1), (2**40, 0)], ids=["right", "below", "left", "above", "far"]
    )
    def test_a_point_outside(self, point, seed):
        points = np.array([(6, 4), point, (-9, -9)])
        assert error(random_features(seed, 5, 7).at, points) == (
            f"the point (x, y) = ({point[0]}, {point[1]}) is outside the photo of 7 x 5 pixels: count from 0, top left"
        )

    @pytest.mark.parametrize(
        "points, what",
        [
            (np.zeros((3, 3), int), "int64 values of the shape [3, 3]"),
            (np.zeros(2, int), "int64 values of the shape [2]"),
            (np.array([[0.0, np.nan]]), "float64 values of the shape [1, 2]"),
            (np.array([[0.0, np.inf]], np.float32), "float32 values of the shape [1, 2]"),
            (np.zeros((1, 2), bool), "bool values of the shape [1, 2]"),
        ],
        ids=["columns", "flat", "nan", "infinite", "bool"],
    )
    def test_no_array_of_points(self, points, what, seed):
        assert error(random_features(seed, 5, 7).at, points) == (
            f"the array of points holds {what}: give integers [K, 2], an x and a y for each point"
        )

    @pytest.mark.parametrize("stride", [0, -3])
    def test_no_stride(self, stride, seed):
        assert error(random_features(seed, 5, 7).strided, stride) == (
            f"a stride of {stride} takes no steps: give 1 for every pixel, or more"
        )


class TestRegions:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
    @pytest.mark.parametrize("shape", PHOTOS)
    def test_means(self, shape, dtype, seed):
        """Scattered regions, so that some share each network pixel; the last pixel is in one in any case."""
        found = random_features(seed, *shape)
        mask = np.random.default_rng(seed).choice([0, 1, 3, 100], shape).astype(dtype)
        mask[-1, -1] = 100
        every = reference(found)
        ids, vectors, pixels = found.regions(mask)
        assert (ids.dtype, vectors.dtype, pixels.dtype) == (np.int64, np.float16, np.int64)
        assert ids.tolist() == [value for value in (1, 3, 100) if (mask == value).any()]
        for region, vector, count in zip(ids, vectors, pixels, strict=True):
            own = every[mask == region]
            assert count == len(own)
            # A short mean's rounding grows when it is normalised.
            tolerance = 2e-7 / np.linalg.norm(own.mean(axis=0))
            np.testing.assert_allclose(vector, unit(own.mean(axis=0)), rtol=HALF["rtol"], atol=1e-6 + tolerance)

    def test_means_are_of_unit_features(self):
        """Between neighbours at right angles the bilinear feature is short: it must count in full."""
        grid = np.zeros((2, 2, 2), np.float32)
        grid[0, :, 0] = grid[1, :, 1] = 1
        mask = np.array([[1, 1, 0]] * 3)
        expected = unit(np.array([1, 0]) + np.sqrt([0.5, 0.5]))
        np.testing.assert_allclose(Features(grid, 3, 3, 3).regions(mask)[1], [expected], **HALF)

    def test_a_region_of_each_pixel(self, seed, monkeypatch):
        """As many regions as pixels, far-apart ids, and sums cut into parts anywhere: the pixels' own features."""
        monkeypatch.setattr(features, "PAIRS", 7)
        found = random_features(seed, 33, 40)
        rng = np.random.default_rng(seed)
        mask = rng.permutation(33 * 40).reshape(33, 40) * (2**62 // 1320) + 1
        ids, vectors, pixels = found.regions(mask)
        assert np.array_equal(ids, np.sort(mask.ravel())) and (pixels == 1).all()
        np.testing.assert_allclose(vectors, reference(found).reshape(-1, DIM)[mask.ravel().argsort()], **HALF)

    def test_parts_do_not_matter(self, seed, monkeypatch):
        found = random_features(seed, 50, 70)
        mask = np.random.default_rng(seed).integers(0, 4, (50, 70))
        whole = found.regions(mask)
        monkeypatch.setattr(features, "PAIRS", 5)
        for first, second in zip(whole, found.regions(mask), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-3)

    def test_another_size(self, seed):
        assert error(random_features(seed, 5, 7).regions, np.ones((7, 5), int)) == (
            "the mask has 5 x 7 pixels and its photo 7 x 5: give a mask of the photo's size"
        )

    def test_no_region(self, seed):
        assert error(random_features(seed, 5, 7).regions, np.zeros((5, 7), np.uint16)) == (
            "the mask has no region, for it is 0 everywhere: give each region an id from 1 on"
        )

    @pytest.mark.parametrize("value, dtype", [(-1, np.int32), (2**63, np.uint64)])
    def test_no_ids(self, value, dtype, seed):
        mask = np.ones((5, 7), dtype)
        mask[2, 3] = value
        assert error(random_features(seed, 5, 7).regions, mask) == (
            f"the mask has the value {value}: give 0 for no region and ids from 1 to 2^63 - 1"
        )

    @pytest.mark.parametrize("mask", [np.ones((5, 7)), np.ones((5, 7, 1), int), np.ones((5, 7), bool)])
    def test_no_mask(self, mask, seed):
        assert error(random_features(seed, 5, 7).regions, mask) == (
            f"the mask holds {mask.dtype} values of the shape {list(mask.shape)}: "
            "give integers [H, W], an id for each pixel, 0 for no region"
        )


class TestMemory:
    """Of a photo of 2000 x 2000 pixels, D = 64: its features at every pixel would take 512 MB in 16 bits."""

    SIDE, DIM, SIZE = 2000, 64, 480
    BOUND = 24 * SIZE * DIM + 64 * 2 * SIDE  # as the class states it

    def peak(self, work) -> tuple[int, object]:
        tracemalloc.start()
        try:
            result = work()
            return tracemalloc.get_traced_memory()[1], result
        finally:
            tracemalloc.stop()

    @pytest.fixture
    def found(self, seed) -> Features:
        return random_features(seed, self.SIDE, self.SIDE, self.DIM, self.SIZE, np.float16)

    def test_strided(self, found):
        peak, result = self.peak(lambda: found.strided(4))
        print(f"{peak - result.nbytes:,} bytes beyond the result, of {self.BOUND:,}")
        assert result.shape == (500, 500, self.DIM)
        assert peak - result.nbytes <= self.BOUND

    def test_at(self, found, seed):
        points = np.random.default_rng(seed).integers(0, self.SIDE, (1000, 2))
        peak, result = self.peak(lambda: found.at(points))
        assert peak - result.nbytes <= self.BOUND + 100 * len(points)

    def test_regions(self, found, seed):
        mask = np.random.default_rng(seed).integers(0, 3, (self.SIDE, self.SIDE), dtype=np.uint8)
        peak, (ids, _, pixels) = self.peak(lambda: found.regions(mask))
        rows = math.ceil(self.SIDE / self.SIZE)
        bound = self.BOUND + 16 * (len(ids) + features.PAIRS) * self.DIM + 64 * rows * self.SIDE
        print(f"{peak:,} bytes, of {bound:,}")
        assert pixels.tolist() == np.bincount(mask.ravel())[1:].tolist()
        assert peak <= bound

    def test_query(self, seed, monkeypatch):
        monkeypatch.setattr(features, "SCORES", 2**18)
        rng = np.random.default_rng(seed)
        vectors = rng.standard_normal((100, 1000, 24)).astype(np.float16)
        text = unit(rng.standard_normal((100, 24))).astype(np.float32)
        peak, (labels, cosine) = self.peak(lambda: query(vectors, text))
        assert peak - labels.nbytes - cosine.nbytes <= 1.05 * 4 * features.SCORES


class TestQuery:
    @pytest.mark.parametrize("shape", [(), (1,), (50,), (0,), (7, 9), (3, 4, 5)])
    @pytest.mark.parametrize("scores", [1, 500, 2**22])
    def test_cosines(self, shape, scores, seed, monkeypatch):
        """In parts of one feature, of several, and whole; lengths do not count."""
        monkeypatch.setattr(features, "SCORES", scores)
        rng = np.random.default_rng(seed)
        vectors = (rng.standard_normal((*shape, DIM)) * 3).astype(np.float16)
        text = unit(rng.standard_normal((20, DIM))).astype(np.float32)
        expected = unit(vectors.astype(np.float64)) @ text.T.astype(np.float64)
        labels, cosine = query(vectors, text)
        assert (labels.dtype, cosine.dtype) == (np.int32, np.float32)
        assert labels.shape == cosine.shape == shape
        np.testing.assert_allclose(cosine, expected.max(axis=-1), atol=1e-6)
        chosen = np.take_along_axis(expected, labels[..., None].astype(int), axis=-1)[..., 0]
        np.testing.assert_allclose(chosen, expected.max(axis=-1), atol=1e-6)

    def test_the_first_of_equals(self, seed):
        text = unit(np.random.default_rng(seed).standard_normal((1, DIM))).astype(np.float32)
        assert query(text.astype(np.float16), np.repeat(text, 3, axis=0))[0].tolist() == [0]

    @pytest.mark.parametrize("one, other", [((4, 3), (2, 5)), ((4, 3), (0, 3)), ((), (1, 3)), ((3,), (3,))])
    def test_shapes(self, one, other):
        assert error(query, np.zeros(one, np.float16), np.zeros(other, np.float32)) == (
            f"features of the shape {list(one)} and texts of {list(other)} do not go together: "
            "give [..., D] and [N, D] of the same weights, N at least 1"
        )

    @pytest.mark.parametrize("shape", [(48, 64), (200, 150), (31, 97)])
    def test_equals_the_label_map(self, tiny, shape, seed):
        rng = np.random.default_rng(seed)
        photo = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        text = unit(rng.standard_normal((6, 24))).astype(np.float32)
        with open_runner("onnxruntime", *tiny) as runner:
            size = runner.image_size
            pixels = to_pixels(photo, size)[None]
            found = Features(runner.encode_image(pixels)[0], size, *shape)
            expected = labels_to_photo(runner.segment(pixels, text).labels[0], shape[1], shape[0])
        labels, _ = query(found.strided(1), text)
        scores = reference(found) @ text.T.astype(np.float64)
        assert (scores.argmax(axis=-1) == expected).mean() >= 0.999
        # 16 bits move a cosine's lead over another by up to 2^-11 times the texts' distance, at most 2. Random weights
        # give embeddings that are much alike, so some leads are shorter.
        second, first = np.moveaxis(np.sort(scores, axis=-1)[..., -2:], -1, 0)
        clear = first - second > 2**-10
        print(
            f"agreement {(labels == expected).mean():.5f}, {len(np.unique(expected))} labels, {clear.mean():.3f} clear"
        )
        assert clear.mean() > 0.8
        assert (labels == expected)[clear].mean() >= 0.999
        assert (labels == expected).mean() >= 0.997


class TestFiles:
    ABOUT = {"weights": "demo", "stride": 4, "size": [7, 5], "name": "é \udcff 'x'", "text": "5", "none": None}

    @pytest.mark.parametrize("suffix", [".npy", ".NPY", ".safetensors"])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_round_trip(self, suffix, dtype, tmp_path, seed):
        path = tmp_path / "new" / f"photo{suffix}"
        array = random_features(seed, 5, 7).strided(1).astype(dtype)[:, ::2]
        write_features(path, {"features": array}, self.ABOUT)
        names = sorted(file.name for file in path.parent.iterdir())
        assert names == sorted([path.name] + [f"{path.name}.json"] * (suffix != ".safetensors"))
        arrays, about = read_features(str(path))
        assert list(arrays) == ["features"] and about == self.ABOUT
        assert arrays["features"].dtype == dtype and np.array_equal(arrays["features"], array)

    def test_many_arrays(self, tmp_path, seed):
        ids, vectors, pixels = random_features(seed, 5, 7).regions(np.arange(35).reshape(5, 7))
        written = {"ids": ids, "features": vectors, "pixels": pixels, "turned": vectors.T}
        write_features(tmp_path / "a.safetensors", written, {})
        arrays, about = read_features(tmp_path / "a.safetensors")
        assert about == {} and sorted(arrays) == sorted(written)
        for name, array in written.items():
            assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)

    def test_others_read_them(self, tmp_path):
        """Plain NumPy and safetensors, and metadata that is text."""
        from safetensors import safe_open

        array = np.ones((2, 3), np.float16)
        for name in ("a.npy", "a.safetensors"):
            write_features(tmp_path / name, {"features": array}, self.ABOUT)
        assert np.array_equal(np.load(tmp_path / "a.npy"), array)
        assert json.loads((tmp_path / "a.npy.json").read_text("utf-8")) == self.ABOUT
        with safe_open(tmp_path / "a.safetensors", "np") as file:
            assert np.array_equal(file.get_tensor("features"), array)
            assert file.metadata()["size"] == "[7, 5]"

    def test_whole_or_not_at_all(self, tmp_path):
        """Where the JSON cannot be written, no .npy appears either."""
        (tmp_path / "a.npy.json").mkdir()
        assert error(write_features, tmp_path / "a.npy", {"features": np.ones(3)}, {}) == (
            f"{tmp_path / 'a.npy.json'} is a folder; choose another output name"
        )
        assert [file.name for file in tmp_path.iterdir()] == ["a.npy.json"]

    @pytest.mark.parametrize("name", ["a.npz", "a", "a.pt"])
    def test_another_suffix(self, name, tmp_path):
        expected = f"{tmp_path / name}: features are kept as NumPy or safetensors; give a name in .npy or .safetensors"
        assert error(write_features, tmp_path / name, {"features": np.ones(3)}, {}) == expected
        assert error(read_features, tmp_path / name) == expected
        assert not list(tmp_path.iterdir())

    def test_one_array_only(self, tmp_path):
        arrays = {"ids": np.ones(3), "features": np.ones(3)}
        assert error(write_features, tmp_path / "a.npy", arrays, {}) == (
            f"{tmp_path / 'a.npy'} holds one array and not ids, features: give a name that ends in .safetensors"
        )
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
    def test_missing(self, name, tmp_path):
        path = tmp_path / name
        assert error(read_features, path) == f"{path} cannot be read (No such file or directory): write it again"
        path.mkdir()
        assert error(read_features, path) == f"{path} cannot be read (Is a directory): write it again"

    @pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
    def test_damaged(self, name, tmp_path, seed):
        path = tmp_path / name
        write_features(path, {"features": np.ones((20, 30), np.float16)}, {"a": 1})
        whole = path.read_bytes()
        lengths = np.random.default_rng(seed).integers(0, len(whole), 10)
        contents = [whole[:length] for length in (0, 1, 9, len(whole) - 1, *lengths)]
        for content in (*contents, b"<html>", b"PK\x03\x04 zip", bytes(range(256))):
            path.write_bytes(content)
            message = error(read_features, path)
            assert message.startswith(f"{path} is damaged or of another kind ("), content[:20]
            assert message.endswith("): write it again")

    def test_no_pickles(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
        (tmp_path / "a.npy.json").write_text("{}")
        assert error(read_features, tmp_path / "a.npy") == (
            f"{tmp_path / 'a.npy'} is damaged or of another kind "
            "(Object arrays cannot be loaded when allow_pickle=False): write it again"
        )

    @pytest.mark.parametrize("content", [None, "", "{", "[]", "3", "null"])
    def test_the_json_beside(self, content, tmp_path):
        write_features(tmp_path / "a.npy", {"features": np.ones(3)}, {})
        beside = tmp_path / "a.npy.json"
        beside.unlink()
        what = "cannot be read (No such file"
        if content is not None:
            beside.write_text(content)
            what = "is damaged or of another kind ("
        message = error(read_features, tmp_path / "a.npy")
        assert message.startswith(f"{beside} {what}")
        assert message.endswith("): copy it along with a.npy, or write both again")


class TestPoints:
    def test_text(self, tmp_path):
        path = tmp_path / "points.txt"
        path.write_bytes(b"\xef\xbb\xbf# x y\r\n1 2\r\n\r\n 3,4 \n5 , 6 # a corner\n-7\t+8\n   # none\n00,9")
        points = read_points(path)
        assert points.dtype == np.int64 and points.tolist() == [[1, 2], [3, 4], [5, 6], [-7, 8], [0, 9]]

    @pytest.mark.parametrize("dtype", [np.int64, np.uint16])
    def test_npy(self, dtype, tmp_path):
        np.save(tmp_path / "points.npy", np.array([[1, 2], [3, 4]], dtype))
        points = read_points(str(tmp_path / "points.npy"))
        assert points.dtype == np.int64 and points.tolist() == [[1, 2], [3, 4]]

    @pytest.mark.parametrize(
        "line",
        ["1", "1 2 3", "1,,2", "1.5 2", "x y", "1;2", "nan 2", "1 99999999999999999999", "²,3", "١,٢", "1," + "9" * 50],
    )
    def test_a_line_that_is_no_point(self, line, tmp_path):
        path = tmp_path / "points.txt"
        path.write_text(f"# x y\n1 2\n{line}  # note\n", encoding="utf-8")
        assert error(read_points, path) == (
            f"{path}, line 3, is {line[:40]!r}: write whole numbers x and y, as in 120 45"
        )

    @pytest.mark.parametrize("content", ["", "\n \n# nothing\n"])
    def test_no_point(self, content, tmp_path):
        path = tmp_path / "points.txt"
        path.write_text(content)
        assert error(read_points, path) == f"{path} holds no point: write x and y of one a line, as in 120 45"

    def test_no_text(self, tmp_path):
        path = tmp_path / "points.txt"
        remedy = "give a text file, or an .npy"
        assert error(read_points, path) == f"{path} cannot be read (No such file or directory): {remedy}"
        path.write_bytes(b"\xff\xfe1 2")
        message = error(read_points, path)
        assert message.startswith(f"{path} is damaged or of another kind ('utf-8' codec") and message.endswith(remedy)

    @pytest.mark.parametrize("array", [np.zeros((2, 3), int), np.zeros((2, 2)), np.zeros(2, int)])
    def test_another_npy(self, array, tmp_path):
        path = tmp_path / "points.npy"
        np.save(path, array)
        assert error(read_points, path) == (
            f"{path} holds {array.dtype} values of the shape {list(array.shape)}: "
            "give integers [K, 2], an x and a y for each point"
        )


class TestRegionMask:
    REMEDY = "save the ids as a PNG of one channel with 8 or 16 bits, or as an .npy of integers"

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_png(self, dtype, tmp_path, seed):
        mask = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (9, 14), dtype, endpoint=True)
        cv2.imwrite(str(tmp_path / "mask.png"), mask)
        found = read_region_mask(str(tmp_path / "mask.png"))
        assert found.dtype == dtype and np.array_equal(found, mask)

    @pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
    def test_npy(self, dtype, tmp_path, seed):
        mask = np.random.default_rng(seed).integers(0, 100, (9, 14)).astype(dtype)
        np.save(tmp_path / "mask.npy", mask)
        found = read_region_mask(tmp_path / "mask.npy")
        assert found.dtype == dtype and np.array_equal(found, mask)

    def test_into_regions(self, tmp_path, seed):
        mask = np.random.default_rng(seed).integers(0, 65536, (9, 14), np.uint16)
        cv2.imwrite(str(tmp_path / "mask.png"), mask)
        ids, _, pixels = random_features(seed, 9, 14).regions(read_region_mask(tmp_path / "mask.png"))
        expected, counts = np.unique(mask[mask > 0], return_counts=True)
        assert np.array_equal(ids, expected) and np.array_equal(pixels, counts)

    @pytest.mark.parametrize(
        "kind", ["colours", "transparency", "one bit", "palette", "jpeg", "pgm", "text", "cut", "empty"]
    )
    def test_another_file(self, kind, tmp_path, seed):
        from PIL import Image

        path = tmp_path / "mask.png"
        mask = np.random.default_rng(seed).integers(0, 2, (9, 14), np.uint8)
        if kind == "colours":
            cv2.imwrite(str(path), cv2.merge([mask] * 3))
        elif kind == "transparency":
            Image.fromarray(cv2.merge([mask] * 2), "LA").save(path)
        elif kind == "one bit":
            cv2.imwrite(str(path), mask, [cv2.IMWRITE_PNG_BILEVEL, 1])
        elif kind == "palette":
            image = Image.fromarray(mask, "P")
            image.putpalette(list(range(200, 206)))
            image.save(path, bits=8)
        elif kind == "jpeg":
            path.write_bytes(cv2.imencode(".jpg", mask)[1].tobytes())
        elif kind == "pgm":  # whose bytes happen to say what a PNG's header would
            path.write_bytes(b"P5\n14 9\n255\n" + bytes([8, 0] * 63))
        elif kind == "cut":
            whole = cv2.imencode(".png", mask)[1].tobytes()
            path.write_bytes(whole[: len(whole) // 2])
        else:
            path.write_bytes(b"ids" if kind == "text" else b"")
        assert error(read_region_mask, path) == (
            f"{path} is damaged or no PNG of one channel with 8 or 16 bits: {self.REMEDY}"
        )

    def test_missing(self, tmp_path):
        path = tmp_path / "mask.png"
        assert error(read_region_mask, path) == f"{path} cannot be read (No such file or directory): {self.REMEDY}"

    @pytest.mark.parametrize("array", [np.zeros((2, 3)), np.zeros((2, 3, 1), int), np.zeros((2, 3), bool)])
    def test_another_npy(self, array, tmp_path):
        path = tmp_path / "mask.npy"
        np.save(path, array)
        assert error(read_region_mask, path) == (
            f"{path} holds {array.dtype} values of the shape {list(array.shape)}: "
            "give integers [H, W], an id for each pixel, 0 for no region"
        )
