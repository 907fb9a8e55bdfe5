"""`enginerun.py --features`, and asking what it wrote with new words."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from test_enginerun import names, save

from lseg import Segmenter
from lseg.errors import short
from lseg.features import query, read_features, write_features
from lseg.image import read_image
from tests.checkpoints import write_tiny


@pytest.fixture
def photo(tmp_path, seed) -> Path:
    return save(tmp_path / "photo.png", seed)


def test_of_a_folder(tiny, tmp_path, segment, seed):
    """Of each photo, in the folder's tree, as fine as the grid; a bad one is left out; --resume does no work twice."""
    for index, name in enumerate(("a.png", "deep/b.png", "deep/c.png")):
        save(tmp_path / "in" / name, seed + index)
    (tmp_path / "in" / "bad.png").write_bytes(b"nothing")
    out = tmp_path / "features"
    code, _, err = segment(tmp_path / "in", "--features", out)
    assert code == 2 and "bad.png" in err[0] and len(err) == 2
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*.safetensors"))
    assert files == ["a_features.safetensors", "deep/b_features.safetensors", "deep/c_features.safetensors"]
    arrays, about = read_features(out / files[1])
    with Segmenter(tiny.weights, "onnxruntime", onnx=tiny.folder) as lseg:
        wanted = lseg.features(tmp_path / "in" / "deep" / "b.png").strided(3)
    assert np.array_equal(arrays["features"], wanted) and wanted.shape[:2] == (24, 30)
    assert (about["size"], about["stride"]) == ([90, 70], 3) and about["photo"].endswith("deep/b.png")
    (tmp_path / "in" / "bad.png").unlink()
    code, lines, _ = segment(tmp_path / "in", "--features", out, "--resume")
    assert (code, lines) == (0, ["note: 3 of 3 photos are done already"])


def test_resume_with_something_else(tiny, tmp_path, segment, seed):
    """What was made with another stride, other points or weights, or tells of nothing, is made anew."""
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name, seed)
    np.save(tmp_path / "points.npy", np.array([[1, 2], [30, 40]]))
    out, done = tmp_path / "out", ["note: 2 of 2 photos are done already"]
    other = "note: {} files were made with something else, or do not tell, and are made anew"

    def go(*more: object) -> list[str]:
        code, told, err = segment(tmp_path / "in", "--features", out, "--resume", *more)
        assert (code, err) == (0, [])
        return told

    assert "are made anew" not in " ".join(go())
    assert go() == done
    for more in (("--stride", 5), ("--points", tmp_path / "points.npy")):
        assert go(*more)[0] == other.format(2)
        assert go(*more) == done
    np.save(tmp_path / "points.npy", np.array([[1, 2], [30, 41]]))
    assert go("--points", tmp_path / "points.npy")[0] == other.format(2)
    file = out / "b_features.safetensors"
    arrays, about = read_features(file)
    assert about["points"] == [[1, 2], [30, 41]]
    write_features(file, arrays, {**about, "made_with": "another run's"})
    assert go("--points", tmp_path / "points.npy")[:2] == [other.format(1), "note: 1 of 2 photos are done already"]
    file.write_bytes(file.read_bytes()[:20])
    assert go("--points", tmp_path / "points.npy")[:2] == [other.format(1), "note: 1 of 2 photos are done already"]
    assert read_features(file)[1] == about
    weights = tmp_path / "other.safetensors"
    write_tiny(weights, seed)
    more = ("--points", tmp_path / "points.npy", "--weights", weights, "--backend", "torch")
    assert go(*more)[0] == other.format(2)
    assert go(*more) == done


def test_resume_of_one_array(photo, tmp_path, segment):
    """An .npy is done with the JSON beside it, not without."""
    other = save(tmp_path / "other.png", 1)
    again = (photo, "--features", tmp_path / "f.npy", "--resume")
    assert segment(*again)[0] == 0
    assert segment(*again)[1] == ["note: 1 of 1 photos are done already"]
    for missing in ("f.npy", "f.npy.json"):
        (tmp_path / missing).unlink()
        assert segment(*again)[1][-1].startswith("milliseconds")
        assert segment(*again)[1] == ["note: 1 of 1 photos are done already"]
    assert segment(other, *again[1:])[1][-1].startswith("milliseconds")  # another photo
    assert read_features(tmp_path / "f.npy")[1]["photo"].endswith("other.png")


def test_a_map_asked_with_new_words(tiny, photo, tmp_path, segment):
    """What the README's example does: the stored features of a photo, and words thought of later."""
    assert segment(photo, "--features", tmp_path / "map.npy", "--stride", 1)[0] == 0
    stored = read_features(tmp_path / "map.npy")[0]["features"]
    with Segmenter(tiny.weights, "onnxruntime", onnx=tiny.folder) as lseg:
        words = ["chair", "door", "window"]
        labels, cosines = query(stored, lseg.embed(words))
        found = lseg.segment(photo, words)
    assert (labels == found.labels).mean() > 0.98 and np.abs(cosines - found.cosines).max() < 5e-2
    assert names(tmp_path) == ["map.npy", "map.npy.json", "photo.png"]


def test_points_and_regions(tiny, photo, tmp_path, segment, seed):
    rng = np.random.default_rng(seed)
    points = np.stack([rng.integers(0, 90, 7), rng.integers(0, 70, 7)], axis=1)
    (tmp_path / "points.txt").write_text("# x y\n" + "\n".join(f"{x} {y}" for x, y in points))
    mask = rng.integers(0, 4, (7, 9), dtype=np.uint8).repeat(10, axis=0).repeat(10, axis=1)
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    at, over = tmp_path / "at.safetensors", tmp_path / "over.safetensors"
    assert segment(photo, "--features", at, "--points", tmp_path / "points.txt")[0] == 0
    assert segment(photo, "--features", over, "--regions", tmp_path / "mask.png")[0] == 0
    with Segmenter(tiny.weights, "onnxruntime", onnx=tiny.folder) as lseg:
        features = lseg.features(read_image(photo))
    arrays, about = read_features(at)
    assert np.array_equal(arrays["features"], features.at(points)) and about["points"] == points.tolist()
    arrays, _ = read_features(over)
    ids, vectors, pixels = features.regions(mask)
    assert np.array_equal(arrays["features"], vectors) and arrays["ids"].tolist() == ids.tolist()
    assert arrays["pixels"].tolist() == pixels.tolist() == [int((mask == i).sum()) for i in ids]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "0", "--features", "x"], "--stride 0 cannot be: give 1 or more"),
        (["--stride", "2"], "--stride is for --features: name that too"),
        (["--points", "p"], "--points is for --features: name that too"),
        (["--frames", "3"], "--frames is for --video: name that too"),
        (
            ["--features", "x", "--points", "p", "--regions", "m"],
            "--points and --regions ask for two kinds of features",
        ),
        (["--features", "x", "--points", "p"], "p cannot be read"),
        (["--features", "x", "--save-labels"], "--save-labels has no meaning beside --features, which makes no"),
        (["--features", "x", "--batch", "2"], "--batch is for pictures: --features looks at photos"),
        (["--features", "x", "--labels", "a, b"], "--labels has no meaning beside --features"),
        (["--features", "x", "--unknown", "0.1"], "--unknown has no meaning beside --features"),
        (["--features", "x", "--stride", "2", "--regions", "mask.png"], "--stride has no meaning beside --points or"),
        (["--features", "x.npz"], "x.npz: name a .npy or .safetensors file, or a folder"),
        (["--features", "p.npy", "--points", "p.npy"], "p.npy is read and would be written"),
        (["--features", "x", "--points", "none.npy"], "none.npy holds no point"),
        (["--features", "x", "--inference", "window"], "--features is for photos seen whole, not --inference window"),
        (["--features", "x.npy", "--regions", "mask.png"], "x.npy: regions have ids too, so give a name that ends in"),
        (["other.png", "--features", "x.npy"], "x.npy is one file for 2 photos: name a folder"),
    ],
)
def test_what_cannot_be(photo, tmp_path, segment, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("mask.png", np.ones((70, 90), np.uint8))
    np.save("p.npy", np.ones((2, 2), np.int64))
    np.save("none.npy", np.ones((0, 2), np.int64))
    save(tmp_path / "other.png", 1)
    code, lines, err = segment("photo.png", *options)
    assert (code, lines) == (2, []) and err[0].startswith(f"error: {message}") and len(err) == 1
    assert names(tmp_path) == ["mask.png", "none.npy", "other.png", "p.npy", "photo.png"]


def test_weights_are_not_written_over(tiny, photo, tmp_path, segment):
    """Named by mistake as the file to write."""
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(Path(tiny.weights).read_bytes())
    for more in ((), ("--resume",)):
        code, _, err = segment(photo, "--features", weights, "--weights", weights, *more)
        assert code == 2 and err == [f"error: {weights} is read and would be written: choose another --features"]
    assert weights.read_bytes() == Path(tiny.weights).read_bytes()


def test_the_mask_counts(photo, tmp_path, segment):
    """Its values and their place decide what is done already."""
    masks, out = [np.ones((70, 90), np.uint8) for _ in range(3)], tmp_path / "f.safetensors"
    masks[1][0, 0] = masks[2][0, 1] = 2
    for mask in masks:
        cv2.imwrite(str(tmp_path / "mask.png"), mask)
        again = (photo, "--features", out, "--regions", tmp_path / "mask.png", "--resume")
        assert segment(*again)[1][-1].startswith("milliseconds")
        assert segment(*again)[1] == ["note: 1 of 1 photos are done already"]


def test_a_point_outside(photo, tmp_path, segment):
    (tmp_path / "p.txt").write_text("3 4\n90 0\n")
    code, _, err = segment(photo, "--features", tmp_path / "f.npy", "--points", tmp_path / "p.txt")
    assert code == 2 and "(90, 0) is outside the photo of 90 x 70 pixels" in err[0] and len(err) == 1
    assert not (tmp_path / "f.npy").exists()


def test_a_photo_that_does_not_fit(tmp_path, segment, seed):
    """It is told by name and left out; the others are done."""
    for index, size in enumerate(((90, 70), (40, 30), (90, 70))):
        save(tmp_path / "in" / f"{index}.png", seed + index, size)
    cv2.imwrite(str(tmp_path / "mask.png"), np.ones((70, 90), np.uint8))
    (tmp_path / "p.txt").write_text("80 60\n")
    for options in (["--regions", tmp_path / "mask.png"], ["--points", tmp_path / "p.txt"]):
        out = tmp_path / options[0].strip("-")
        code, _, err = segment(tmp_path / "in", "--features", out, *options)
        assert code == 2 and len(err) == 2 and f"{short(tmp_path / 'in' / '1.png')}: " in err[0]
        assert names(out) == ["0_features.safetensors", "2_features.safetensors"]


def test_more_than_fits(tmp_path, segment, monkeypatch, seed):
    monkeypatch.setattr("lseg.photo_features.LARGEST", 10 << 20)
    photo = save(tmp_path / "large.png", seed, (400, 300))
    code, _, err = segment(photo, "--features", tmp_path / "x", "--stride", 1)
    assert code == 2 and "large.png: --stride 1 makes 0.1 GiB of it: give --stride 4 or more" in err[0]
    assert segment(photo, "--features", tmp_path / "x", "--stride", 4)[0] == 0
