"""Reading photos against Pillow, the way to the network's input and back, and what bad files are told."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from lseg.errors import UserError
from lseg.image import (
    ENLARGE,
    SHRINK,
    labels_to_photo,
    normalise,
    read_image,
    to_pixels,
    write_image,
)


def smooth(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels]: blobs, so that lossy formats stay close."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def message(path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        read_image(path)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestRead:
    @pytest.mark.parametrize(
        ("suffix", "mode"),
        [(suffix, mode) for suffix in (".jpg", ".png", ".bmp", ".tif", ".webp") for mode in ("RGB", "L")]
        + [(suffix, mode) for suffix in (".png", ".bmp", ".tif") for mode in ("P", "1")]
        + [(".jpg", "CMYK"), (".tif", "CMYK")],
    )
    def test_equals_pillow(self, tmp_path, seed, suffix, mode):
        path = save(tmp_path / f"photo{suffix}", Image.fromarray(smooth(seed, 43, 61)).convert(mode))
        image = read_image(path)
        assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
        # Rounding: OpenCV converts CMYK with a shift, and each has its own WebP decoder.
        np.testing.assert_allclose(
            image.astype(int), pillow(path), atol=2 if mode == "CMYK" or suffix == ".webp" else 0
        )

    def test_progressive_jpeg(self, tmp_path, seed):
        path = save(tmp_path / "photo.jpg", Image.fromarray(smooth(seed, 43, 61)), progressive=True)
        np.testing.assert_array_equal(read_image(path), pillow(path))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
    def test_exif_rotation(self, tmp_path, seed, suffix, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / f"photo{suffix}", Image.fromarray(smooth(seed, 43, 61)), exif=exif)
        image = read_image(path)
        assert image.shape == ((43, 61, 3) if orientation < 5 else (61, 43, 3))
        np.testing.assert_array_equal(image, pillow(path))

    @pytest.mark.parametrize("suffix", [".png", ".webp"])
    def test_transparency_is_dropped(self, tmp_path, seed, suffix):
        rgba = np.dstack([smooth(seed, 20, 30), np.random.default_rng(seed).integers(0, 256, (20, 30), dtype=np.uint8)])
        options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
        path = save(tmp_path / f"photo{suffix}", Image.fromarray(rgba), **options)
        np.testing.assert_array_equal(read_image(path), rgba[..., :3])

    def test_grey_with_transparency(self, tmp_path, seed):
        path = save(tmp_path / "photo.png", Image.fromarray(smooth(seed, 20, 30, 2), "LA"))
        np.testing.assert_array_equal(read_image(path), pillow(path))

    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_16_bits_are_scaled(self, tmp_path, seed, suffix, channels):
        values = np.random.default_rng(seed).integers(0, 65536, (50, 70, channels), dtype=np.uint16)
        values[0, :4, 0] = 0, 65535, 128, 129
        assert cv2.imwrite(str(tmp_path / f"photo{suffix}"), values)
        expected = np.rint(values / 257.0)[..., ::-1]
        np.testing.assert_array_equal(read_image(tmp_path / f"photo{suffix}"), np.broadcast_to(expected, (50, 70, 3)))

    def test_one_pixel(self, tmp_path):
        path = save(tmp_path / "dot.png", Image.new("RGB", (1, 1), (10, 20, 30)))
        image = read_image(path)
        np.testing.assert_array_equal(image, [[[10, 20, 30]]])
        np.testing.assert_array_equal(to_pixels(image), np.broadcast_to(image, (480, 480, 3)))

    def test_12000_by_12000(self, tmp_path):
        path = tmp_path / "large.jpg"
        tile = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((6000, 6000), np.uint8))
        path.write_bytes(cv2.imencode(".jpg", tile)[1].tobytes())
        image = read_image(path)
        assert image.shape == (12000, 12000, 3)
        pixels = to_pixels(image)
        assert pixels[10, 10].max() < 3 and pixels[10, 470].min() > 252 and pixels[470, 10].min() > 252

    def test_bytes_after_the_end_do_not_matter(self, tmp_path, seed):
        path = save(tmp_path / "photo.jpg", Image.fromarray(smooth(seed, 43, 61)))
        expected = read_image(path)
        path.write_bytes(path.read_bytes() + b"\0" * 5000 + b"more")
        np.testing.assert_array_equal(read_image(path), expected)

    def test_fill_bytes_before_a_marker(self, tmp_path, seed):
        path = save(tmp_path / "photo.jpg", Image.fromarray(smooth(seed, 43, 61)))
        expected = read_image(path)
        data = path.read_bytes()
        path.write_bytes(data[:2] + b"\xff\xff" + data[2:])
        np.testing.assert_array_equal(read_image(path), expected)

    def test_names_beyond_ascii(self, tmp_path):
        path = save(tmp_path / "фото 日本.png", Image.new("RGB", (2, 3), "red"))
        assert read_image(str(path)).shape == (3, 2, 3)


class TestBadFiles:
    def test_missing(self, tmp_path):
        path = tmp_path / "no.jpg"
        assert message(path) == f"{path} does not exist; check the name"
        (tmp_path / "file").write_text("x")
        assert message(tmp_path / "file" / "a.jpg") == f"{tmp_path / 'file' / 'a.jpg'} does not exist; check the name"

    def test_folder(self, tmp_path):
        assert message(tmp_path) == f"{tmp_path} is a folder; give an image file"

    def test_empty(self, tmp_path):
        path = tmp_path / "empty.jpg"
        path.touch()
        assert message(path) == f"{path} is empty; copy or download it again"

    def test_pipe_is_not_waited_for(self, tmp_path):
        path = tmp_path / "pipe.jpg"
        os.mkfifo(path)
        assert message(path) == f"{path} is not a regular file; give an image file"

    def test_name_too_long(self, tmp_path):
        path = tmp_path / ("x" * 300 + ".jpg")
        assert message(path) == f"{path} cannot be read (File name too long); check its name and permissions"

    @pytest.mark.parametrize("data", [b"just some text\n" * 20, b"\xff", b"\0" * 1000, bytes(range(256)), b"BLURB"])
    def test_not_an_image(self, tmp_path, data):
        path = tmp_path / "notes.jpg"
        path.write_bytes(data)
        assert message(path) == f"{path} is not an image that OpenCV reads; give a JPEG, PNG, BMP, TIFF or WebP file"

    @pytest.mark.parametrize(
        "start", [b"<!DOCTYPE html><html>", b"\xef\xbb\xbf\n <html lang='en'>", b"<!doctype HTML>"]
    )
    def test_web_page(self, tmp_path, start):
        path = tmp_path / "photo.png"
        path.write_bytes(start + b"<body>sign in</body></html>")
        assert message(path) == f"{path} is a web page, not an image; download the image itself"

    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("end", ["cut", "zeros"])
    def test_truncated_jpeg(self, tmp_path, seed, progressive, end):
        thumbnail = io.BytesIO()  # inside the header, with an end marker of its own
        Image.new("RGB", (16, 16)).save(thumbnail, "JPEG")
        whole = io.BytesIO()
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        image.save(whole, "JPEG", progressive=progressive, exif=b"Exif\0\0" + thumbnail.getvalue())
        whole = whole.getvalue()
        path = tmp_path / "photo.jpg"
        path.write_bytes(whole)
        assert read_image(path).shape == (64, 64, 3)
        for length in (
            4,
            len(whole) // 10,
            len(whole) // 3,
            len(whole) // 2,
            len(whole) - 30,
            len(whole) - 2,
            len(whole) - 1,
        ):
            path.write_bytes(whole[:length] + (bytes(len(whole) - length) if end == "zeros" else b""))
            assert message(path) == f"{path} is cut short: it is a JPEG without its end; copy or download it again"

    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
    def test_truncated(self, tmp_path, seed, suffix):
        path = save(tmp_path / f"photo{suffix}", Image.fromarray(smooth(seed, 300, 400)))
        whole = path.read_bytes()
        for length in (8, 20, len(whole) // 10, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert message(path) == f"{path} is damaged or cut short; copy or download it again"

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int32])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_other_values(self, tmp_path, dtype, channels):
        path = tmp_path / "photo.tif"
        if not cv2.imwrite(str(path), np.ones((20, 30, channels), dtype)):
            pytest.skip("this OpenCV does not write such a TIFF")
        kind = np.dtype(dtype).name
        assert message(path) == f"{path} holds {kind} values; save it with 8 or 16 bits per channel"

    def test_more_pixels_than_opencv_takes(self, tmp_path):
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0))
        path = tmp_path / "huge.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
        assert message(path) == (
            f"{path} is too large to decode; scale it down to at most 1,073,741,824 pixels, or what memory holds"
        )

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
    def test_libraries_say_nothing_of_their_own(self, tmp_path, seed, suffix):
        path = save(tmp_path / f"photo{suffix}", Image.fromarray(smooth(seed, 300, 400)))
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 64] = np.random.default_rng(seed).bytes(64)
        path.write_bytes(data)
        (tmp_path / f"cut{suffix}").write_bytes(data[: len(data) // 2])
        code = """
import sys
from lseg.errors import UserError
from lseg.image import read_image
for path in sys.argv[1:]:
    try:
        read_image(path)
    except UserError:
        pass
print("last words", file=sys.stderr)
"""
        command = [sys.executable, "-c", code, str(path), str(tmp_path / f"cut{suffix}")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stderr == "last words\n"


class TestPixels:
    @pytest.mark.parametrize(("height", "width"), [(480, 480), (1440, 960), (480, 960)])
    def test_whole_shrinking_is_the_mean(self, seed, height, width):
        image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        blocks = image.reshape(480, height // 480, 480, width // 480, 3).astype(np.float64)
        assert np.abs(to_pixels(image) - blocks.mean((1, 3))).max() <= 0.51

    @pytest.mark.parametrize(("height", "width"), [(360, 480), (1, 7), (240, 300), (479, 479)])
    def test_enlarging_is_bilinear(self, seed, height, width):
        torch = pytest.importorskip("torch")
        image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
        expected = torch.nn.functional.interpolate(planes, (480, 480), mode="bilinear", align_corners=False)
        assert np.abs(to_pixels(image) - expected[0].permute(1, 2, 0).numpy()).max() <= 1

    def test_one_axis_each(self, seed):
        image = np.random.default_rng(seed).integers(0, 256, (240, 1920, 3), dtype=np.uint8)
        narrow = cv2.resize(image, (480, 240), interpolation=SHRINK)
        np.testing.assert_array_equal(to_pixels(image), cv2.resize(narrow, (480, 480), interpolation=ENLARGE))

    def test_other_size_and_own_size(self, seed):
        image = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        np.testing.assert_array_equal(to_pixels(image, 96), image)
        assert to_pixels(image, 32).shape == (32, 32, 3)

    def test_normalise(self, seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
        pixels[0, 0, :2] = [[0] * 3, [255] * 3]
        values = normalise(pixels)
        assert values.dtype == np.float32 and values.shape == (2, 3, 48, 48) and values.flags.c_contiguous
        expected = ((pixels.astype(np.float64) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
        assert np.abs(values - expected).max() <= 1e-6

    @pytest.mark.parametrize("size", [(1, 1), (480, 480), (640, 427), (333, 1000), (7, 2000), (960, 960)])
    @pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
    def test_labels_to_photo(self, seed, size, dtype):
        width, height = size
        labels = np.random.default_rng(seed).integers(0, 200, (480, 480)).astype(dtype)
        result = labels_to_photo(labels, width, height)
        assert result.dtype == dtype
        rows = np.floor((np.arange(height) + 0.5) * 480 / height).astype(int)
        columns = np.floor((np.arange(width) + 0.5) * 480 / width).astype(int)
        np.testing.assert_array_equal(result, labels[rows[:, None], columns])
        # OpenCV's is the same but for centres right on a border, where its fixed-point numbers fall short.
        exact = cv2.resize(labels.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT)
        clear_rows = (2 * np.arange(height) + 1) * 480 % (2 * height) != 0
        clear_columns = (2 * np.arange(width) + 1) * 480 % (2 * width) != 0
        clear = clear_rows[:, None] & clear_columns
        np.testing.assert_array_equal(result[clear], exact[clear])


class TestWrite:
    def test_png_comes_back_and_folders_are_made(self, tmp_path, seed):
        image = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        path = tmp_path / "a" / "b" / "picture.PNG"
        write_image(path, image)
        np.testing.assert_array_equal(pillow(path), image)
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
    def test_jpeg_is_close(self, tmp_path, seed, suffix):
        image = smooth(seed, 100, 120)
        write_image(tmp_path / f"picture{suffix}", image)
        assert np.abs(pillow(tmp_path / f"picture{suffix}").astype(int) - image).mean() < 3

    def test_other_suffix(self, tmp_path):
        for name in ("picture.gif", "picture"):
            with pytest.raises(UserError) as error:
                write_image(tmp_path / name, np.zeros((2, 2, 3), np.uint8))
            assert str(error.value) == (
                f"{tmp_path / name}: pictures are written as PNG or JPEG; give a name that ends in .png or .jpg"
            )
        assert not list(tmp_path.iterdir())

    def test_too_long_for_jpeg(self, tmp_path):
        path = tmp_path / "strip.jpg"
        with pytest.raises(UserError) as error:
            write_image(path, np.zeros((1, 65536, 3), np.uint8))
        assert str(error.value) == (f"{path}: a JPEG holds at most 65535 pixels a side; give a name that ends in .png")
        write_image(tmp_path / "strip.png", np.zeros((1, 65536, 3), np.uint8))

    def test_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        path = tmp_path / "file" / "picture.png"
        with pytest.raises(UserError, match="choose another output folder$") as error:
            write_image(path, np.zeros((2, 2, 3), np.uint8))
        assert str(error.value).startswith(f"{path} cannot be written (")

    def test_failure_leaves_what_was_there(self, tmp_path, monkeypatch):
        path = tmp_path / "picture.png"
        path.write_bytes(b"before")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(UserError) as error:
            write_image(path, np.zeros((2, 2, 3), np.uint8))
        assert str(error.value) == f"{path} cannot be written (No space left on device); choose another output folder"
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]
