"""The kernels, compiled for the CPU, against PyTorch in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lseg.cuda import Buffer, Device
from lseg.gpu_windows import cover, plan
from lseg.kernels import PTX, Kernels
from lseg.nvrtc import SOURCE, library_path
from lseg.windows import resize_aligned, scaled_size
from tests.gpu_stand_in import compile_kernels, kernel_names, stand_in

STREAM = SimpleNamespace(synchronize=lambda: None)
BFLOAT = np.uint16
BOUNDS = {np.float32: 1e-6, np.float16: 1e-3, BFLOAT: 8e-3}  # of results in that type, relative


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(library, monkeypatch):
    driver = stand_in(monkeypatch, library)
    with Device() as device:
        device.sent = []  # what is sent stays as long as the test
        yield device
    assert driver.depth == 0


def send(device: Device, values: np.ndarray) -> Buffer:
    buffer = Buffer(device, values.shape, values.dtype, host=False)
    buffer.put(STREAM, values)
    device.sent.append(buffer)
    return buffer


def encode(values: np.ndarray, kind: type) -> tuple[np.ndarray, torch.Tensor]:
    """Random numbers rounded to a type, as the kernels take them and in float64."""
    if kind is BFLOAT:
        rounded = torch.from_numpy(values).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16), rounded.double()
    return values.astype(kind), torch.from_numpy(values.astype(kind)).double()


def double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def draw(rng: np.random.Generator, kind: type, batch: int, texts: int, side: int, dimension: int = 20):
    """z and its dot products with texts, both in the type; and the cosines at the full grid in float64."""
    z, exact = encode(rng.standard_normal((batch, dimension, side, side)).astype(np.float32), kind)
    text = torch.from_numpy(rng.standard_normal((texts, dimension)))
    text /= text.norm(dim=1, keepdim=True)
    dots, products = encode((text @ exact.flatten(2)).float().numpy().reshape(batch, texts, side, side), kind)
    length = double(exact).norm(dim=1, keepdim=True)
    return z, dots, exact, double(double(products) / length)


@pytest.mark.parametrize("kind", [np.float32, np.float16, BFLOAT])
@pytest.mark.parametrize("batch, side", [(1, 4), (2, 9), (1, 30)])
def test_lengths_and_embeddings(gpu, seed, kind, batch, side):
    rng, dimension = np.random.default_rng(seed), 70  # no multiple of the groups of channels
    z, _, exact, _ = draw(rng, kind, batch, 1, side, dimension)
    kernels = Kernels(gpu, None, kind, dimension, side)
    count = batch * 4 * side**2
    sizes = kernels.sums_size(batch), count
    source, sums, inverse = send(gpu, z), *(Buffer(gpu, (size,), np.float32, host=False) for size in sizes)
    kernels.inverse_lengths(source.address, sums.address, inverse.address, batch)
    wide = double(exact)
    lengths = wide.norm(dim=1)
    np.testing.assert_allclose(inverse.read(STREAM, count).reshape(lengths.shape), 1 / lengths.numpy(), rtol=1e-5)
    result = Buffer(gpu, (count * dimension,), kind, host=False)
    kernels.embeddings(source.address, inverse.address, result.address, batch)
    found = result.read(STREAM, count * dimension)
    if kind is BFLOAT:
        found = (found.astype(np.uint32) << 16).view(np.float32)
    expected = (wide / lengths[:, None]).numpy()
    assert np.abs(found.reshape(expected.shape) - expected).max() <= BOUNDS[kind]


def test_lengths_of_what_cancels_out_and_of_what_is_no_number(gpu, seed):
    """Between opposite neighbours and of zeros there is no direction: 0, no infinity; what is NaN stays NaN."""
    rng, side, dimension = np.random.default_rng(seed), 2, 16
    one = rng.standard_normal(dimension).astype(np.float32)
    z = np.zeros((4, dimension, side, side), np.float32)
    z[0, :, 0], z[0, :, 1] = one[:, None], -one[:, None]  # rows cancel out in the middle
    z[1, :, :, 0] = one[:, None]
    z[2, 3, 1, 1] = np.nan
    kernels, count = Kernels(gpu, None, np.float32, dimension, side), 4 * 4 * side**2
    sums, inverse = (Buffer(gpu, (n,), np.float32, host=False) for n in (kernels.sums_size(4), count))
    kernels.inverse_lengths(send(gpu, z).address, sums.address, inverse.address, 4)
    found, length = inverse.read(STREAM, count).reshape(4, 4, 4), np.linalg.norm(one)
    np.testing.assert_allclose(found[0] * length, np.repeat([[1], [3], [3], [1]], 4, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found[1, :, :3] * length, np.repeat([[1, 1.5, 3]], 4, axis=0), rtol=1e-5)
    assert (found[1, :, 3] == 0).all() and (found[3] == 0).all()
    assert np.isnan(found[2, 3, 3])


@pytest.mark.parametrize("kind", [np.float32, np.float16, BFLOAT])
@pytest.mark.parametrize("side", [4, 9, 30])
def test_picked_embeddings(gpu, seed, kind, side):
    """Every pixel of the full grid, in any order, some twice: as upsampling, normalising, upsampling, normalising."""
    rng, dimension = np.random.default_rng(seed), 20
    z, _, exact, _ = draw(rng, kind, 1, 1, side, dimension)
    wide = double(exact)
    unit = wide / wide.norm(dim=1, keepdim=True)
    full = F.normalize(double(unit), dim=1)[0].permute(1, 2, 0).numpy()
    every = np.stack(np.meshgrid(*[np.arange(4 * side)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    places = np.concatenate([rng.permutation(every), every[:5]]).astype(np.int32)
    inverse = send(gpu, (1 / wide.norm(dim=1)).float().numpy())
    result = Buffer(gpu, (len(places), dimension), np.float16, host=False)
    kernels = Kernels(gpu, None, kind, dimension, side)
    kernels.pick(send(gpu, z).address, inverse.address, send(gpu, places).address, len(places), result.address)
    found = result.read(STREAM, result.size).reshape(-1, dimension)
    assert np.abs(found - full[places[:, 0], places[:, 1]]).max() <= 1e-3


def test_picked_embeddings_of_nothing(gpu, seed):
    """Where z is 0 everywhere there is no direction."""
    side, dimension, places = 4, 6, np.array([[0, 0], [15, 15]], np.int32)
    z, inverse = (send(gpu, np.zeros(shape, np.float32)) for shape in ((dimension, side, side), (2 * side, 2 * side)))
    result = Buffer(gpu, (2, dimension), np.float16, host=False)
    kernels = Kernels(gpu, None, np.float32, dimension, side)
    kernels.pick(z.address, inverse.address, send(gpu, places).address, 2, result.address)
    assert (result.read(STREAM, 2 * dimension) == 0).all()


@pytest.mark.parametrize("kind", [np.float32, np.float16, BFLOAT])
@pytest.mark.parametrize("batch, texts, side", [(1, 1, 4), (2, 7, 5), (1, 30, 16)])
def test_labels(gpu, seed, kind, batch, texts, side):
    """At once and in groups that keep a running maximum, which gives the same bits."""
    rng = np.random.default_rng(seed)
    z, dots, exact, cosines = draw(rng, kind, batch, texts, side)
    kernels = Kernels(gpu, None, kind, exact.shape[1], side)
    inverse = send(gpu, (1 / double(exact).norm(dim=1)).float().numpy())
    shape = (batch, 4 * side, 4 * side)
    labels, best = Buffer(gpu, shape, np.uint8, host=False), Buffer(gpu, shape, np.float32, host=False)
    kernels.label(send(gpu, dots).address, inverse.address, labels.address, best.address, batch, texts)
    found, top = labels.read(STREAM, labels.size).reshape(shape), best.read(STREAM, best.size).reshape(shape)
    assert np.abs(top - cosines.max(dim=1).values.numpy()).max() <= 1e-5
    chosen = cosines.gather(1, torch.from_numpy(found).long()[:, None])[:, 0]
    assert (cosines.max(dim=1).values - chosen).max() <= 1e-5  # another label only where two are as good

    many = Buffer(gpu, shape, np.int32, host=False)
    for start in range(0, texts, 3):
        group = np.ascontiguousarray(dots[:, start : start + 3])
        address = send(gpu, group).address
        kernels.label(address, inverse.address, many.address, best.address, batch, group.shape[1], offset=start)
    np.testing.assert_array_equal(many.read(STREAM, many.size).reshape(shape), found)
    np.testing.assert_array_equal(best.read(STREAM, best.size).reshape(shape), top)


def test_the_first_of_equal_labels_wins(gpu, seed):
    rng, side = np.random.default_rng(seed), 6
    _, dots, exact, _ = draw(rng, np.float32, 1, 2, side)
    dots = np.concatenate([dots, dots], axis=1)
    inverse = send(gpu, (1 / double(exact).norm(dim=1)).float().numpy())
    kernels = Kernels(gpu, None, np.float32, exact.shape[1], side)
    labels, best = (Buffer(gpu, (24 * 24,), dtype, host=False) for dtype in (np.uint8, np.float32))
    kernels.label(send(gpu, dots).address, inverse.address, labels.address, best.address, 1, 4)
    assert set(labels.read(STREAM, labels.size)) <= {0, 1}


@pytest.mark.parametrize("photo_size", [(37, 50), (70, 23), (1, 1), (16, 16), (3, 200)])
def test_windows_are_cut_as_on_the_host(gpu, seed, photo_size):
    rng, side = np.random.default_rng(seed), 16
    photos = rng.integers(0, 256, (2, *photo_size, 3), dtype=np.uint8)
    size = scaled_size(*photo_size, rng.uniform(0.5, 3), side)
    places = plan(size, side, mirror=True) + [(1, 0, 0, True)]
    source, at = send(gpu, photos), send(gpu, np.array(places, np.int32))
    images = Buffer(gpu, (len(places), 3, side, side), np.float32, host=False)
    shape = (len(places), 3, side, side)
    Kernels(gpu, None, np.float32, 8, 4).cut_windows(
        source.address, photo_size, size, at.address, images.address, shape
    )
    found = images.read(STREAM, images.size).reshape(shape)
    for image, (photo, top, left, mirrored) in zip(found, places, strict=True):
        scaled = resize_aligned(photos[photo].transpose(2, 0, 1).astype(np.float32), *size) * np.float32(2 / 255) - 1
        expected = np.full((3, side, side), -1, np.float32)
        piece = scaled[:, top : top + side, left : left + side]
        expected[:, : piece.shape[1], : piece.shape[2]] = piece
        assert np.abs(image - (expected[..., ::-1] if mirrored else expected)).max() <= 1e-6


def test_windows_add_up_to_a_photo(gpu, seed):
    """Scores of mirrored and overlapping windows, averaged, and several maps summed up: against PyTorch."""
    rng, side, texts = np.random.default_rng(seed), 4, 5
    kernels = Kernels(gpu, None, np.float32, 20, side)
    photo_size = (31, 45)
    total, table = torch.zeros(1, texts, *photo_size, dtype=torch.float64), []
    for scale in (1.0, 1.75, 2.5):
        size = scaled_size(*photo_size, scale, 4 * side)
        places = plan(size, 4 * side, mirror=True)
        rows, columns = cover(size, 4 * side)
        scores = Buffer(gpu, (texts, *size), np.float32, host=False)
        scores.zero(None, scores.size)
        expected, count = torch.zeros(texts, *size, dtype=torch.float64), torch.zeros(*size)
        for start in range(0, len(places), 3):
            batch = places[start : start + 3]
            _, dots, exact, cosines = draw(rng, np.float32, len(batch), texts, side)
            inverse = send(gpu, (1 / double(exact).norm(dim=1)).float().numpy())
            shares = tuple(send(gpu, share) for share in (rows, columns))
            kernels.add_scores(
                send(gpu, dots).address, inverse.address, texts, send(gpu, np.array(batch, np.int32)).address,
                len(batch), tuple(share.address for share in shares), size, scores.address,
            )  # fmt: skip
            for window, (_, top, left, mirrored) in zip(cosines, batch, strict=True):
                here = np.s_[top : top + 4 * side, left : left + 4 * side]
                piece = (window.flip(2) if mirrored else window)[:, : size[0] - top, : size[1] - left]
                expected[(slice(None), *here)] += piece
                count[here] += 0 if mirrored else 1
        expected /= count
        found = scores.read(STREAM, scores.size).reshape(expected.shape)
        assert np.abs(found - expected.numpy()).max() <= 1e-5
        total += F.interpolate(expected[None], photo_size, mode="bilinear", align_corners=True)
        table.append((scores.address, *size))
        gpu.sent.append(scores)
    labels, best = (Buffer(gpu, photo_size, dtype, host=False) for dtype in (np.int32, np.float32))
    maps = send(gpu, np.array(table, np.int64))
    kernels.combine(maps.address, len(table), texts, photo_size, 0, labels.address, best.address)
    chosen = total.gather(1, torch.from_numpy(labels.read(STREAM, labels.size).reshape(1, 1, *photo_size)).long())
    highest = total.max(dim=1).values
    assert (highest - chosen[0]).max() <= 1e-5
    assert np.abs(best.read(STREAM, best.size).reshape(photo_size) - highest[0].numpy()).max() <= 1e-5


def compile_file(source: Path, output: Path) -> subprocess.CompletedProcess:
    if library_path() is None:
        pytest.skip("NVRTC is not installed (see requirements-dev.txt)")
    command = [sys.executable, "-m", "lseg.nvrtc", source, output]
    return subprocess.run(command, cwd=SOURCE.parent.parent, capture_output=True, text=True)


def test_the_compiled_kernels_are_those_of_the_source(tmp_path):
    assert compile_file(SOURCE, tmp_path / "kernels.ptx").returncode == 0
    assert PTX.read_bytes() == (tmp_path / "kernels.ptx").read_bytes(), "run 'python -m lseg.nvrtc'"
    names = [line.split()[2].rstrip("(") for line in PTX.read_text().splitlines() if line.startswith(".visible .entry")]
    assert sorted(names) == sorted(kernel_names())


def test_a_source_that_does_not_compile_is_told(tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void broken( {")
    done = compile_file(tmp_path / "broken.cu", tmp_path / "broken.ptx")
    assert done.returncode == 1 and "kernels.cu(1): error" in done.stderr
    assert not (tmp_path / "broken.ptx").exists()
