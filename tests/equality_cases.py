"""Random photos and labels for equality.py, and PyTorch's answers in float32: labels, and how clear they are."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lseg.accuracy import save_arrays, saved_arrays
from lseg.errors import UserError
from lseg.image import to_pixels
from lseg.windows import MODES, Inference, resize_aligned, scaled_size, windows

if TYPE_CHECKING:
    import torch

    from lseg.run_torch import TorchRunner

BATCHES = (1, 2, 3, 5, 8)
SIDE = 900  # of the largest photo
LABELS = {"whole": 300, "window": 300, "multiscale": 60}  # at most
STRIDE = 4  # cosines are compared at every fourth row and column; labels at every pixel
GROUP = 64  # labels whose score maps are held at a time
ADJECTIVES = "red old wooden wet small bright broken metal glass stone white".split()
NOUNS = (
    "car road tree house window door wall roof sky cloud river bridge street lamp sign fence dog cat horse bird person "
    "child bicycle bus truck boat chair table".split()
)
WORDS = tuple(NOUNS + [f"{a} {n}" for a in ADJECTIVES for n in NOUNS])[:300]
STEPS = 8  # of a stored gap, to a factor of two
SMALLEST = 1e-7


@dataclass(frozen=True)
class Group:
    """Photos that are run together, and their labels: some of `WORDS`, or random unit vectors."""

    mode: str
    photos: list[np.ndarray]  # each uint8 [H, W, 3]
    words: np.ndarray | None  # indices [N]
    vectors: np.ndarray | None  # float32 [N, D]

    def text(self, embedded: np.ndarray) -> np.ndarray:
        """float32 [N, D]; `embedded` are the embeddings of `WORDS`."""
        return self.vectors if self.words is None else embedded[self.words]

    def inputs(self, size: int) -> np.ndarray:
        """uint8 [B, S, S, 3]: the photos squashed to the network's square."""
        return np.stack([to_pixels(photo, size) for photo in self.photos])

    def digest(self, size: int) -> int:
        """Tells whether another machine drew and squashed the same."""
        value = zlib.crc32(self.inputs(size).tobytes())
        for photo in self.photos:
            value = zlib.crc32(np.ascontiguousarray(photo).tobytes(), value)
        return zlib.crc32((self.vectors if self.words is None else self.words.astype(np.int64)).tobytes(), value)


@dataclass(frozen=True)
class Expected:
    """What the reference makes of one photo, at the network's size for whole photos, else at the photo's own."""

    labels: np.ndarray  # uint16 [h, w]
    gaps: np.ndarray  # uint8 [h, w], the best cosine less the second, in steps: see `gap`
    best: np.ndarray  # float32, at every `STRIDE`-th row and column


def draw_groups(seed: int, mode: str, count: int, source: np.ndarray, dimension: int) -> Iterator[Group]:
    """`count` photos in all; whole ones in groups of `BATCHES`, in turn, the others alone. `source` is for crops."""
    index = 0
    while count > 0:
        rng = np.random.default_rng([seed, list(MODES).index(mode), index])
        batch = min(count, BATCHES[index % len(BATCHES)] if mode == "whole" else 1)
        labels = int(np.exp(rng.uniform(0, np.log(LABELS[mode] + 1))))  # 1 to LABELS, as often a tenth as ten times it
        labels = LABELS[mode] if index == 1 else labels
        photos = [_draw_photo(rng, source) for _ in range(batch)]
        words = vectors = None
        if rng.random() < 0.5:
            words = rng.permutation(len(WORDS))[:labels]
        else:
            vectors = rng.standard_normal((labels, dimension)).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield Group(mode, photos, words, vectors)
        count, index = count - batch, index + 1


def _draw_photo(rng: np.random.Generator, source: np.ndarray) -> np.ndarray:
    """Noise, a gradient between four colours, or a crop of `source`, 1 x 1 to `SIDE` x `SIDE`; uint8 [H, W, 3]."""
    largest = 8 if rng.random() < 0.15 else SIDE
    height, width = (int(side) for side in rng.integers(1, largest + 1, 2))
    kind = rng.integers(3)
    if kind == 0:
        low, high = np.sort(rng.integers(0, 256, 2))
        return rng.integers(low, high + 1, (height, width, 3), dtype=np.uint8)
    if kind == 1:
        corners = rng.integers(0, 256, (2, 2, 3)).astype(np.float32)
        return np.rint(resize_aligned(corners.transpose(2, 0, 1), height, width)).astype(np.uint8).transpose(1, 2, 0)
    height, width = min(height, source.shape[0]), min(width, source.shape[1])
    top, left = rng.integers(source.shape[0] - height + 1), rng.integers(source.shape[1] - width + 1)
    return source[top : top + height, left : left + width, rng.permutation(3)]


def expect(runner: TorchRunner, group: Group, text: np.ndarray) -> list[Expected]:
    """The reference's answers, from PyTorch's score maps: each photo, and each window, is encoded alone and once."""
    import torch

    texts, size = torch.from_numpy(text).to(runner.device), runner.image_size
    with torch.inference_mode():
        if MODES[group.mode].scales:
            return [_expect_windows(runner, photo, texts, MODES[group.mode]) for photo in group.photos]
        found = []
        for pixels in group.inputs(size):
            image = pixels.transpose(2, 0, 1)[None].astype(np.float32) * np.float32(2 / 255) - 1
            embeddings = runner._embed(np.ascontiguousarray(image))
            found.append(_top_two(lambda a, b, e=embeddings: runner.scoring(e, texts[a:b])[2][0], len(texts)))
        return found


def _expect_windows(runner: TorchRunner, photo: np.ndarray, texts: torch.Tensor, how: Inference) -> Expected:
    """Scores of windows, averaged where they overlap, brought to the photo's size by two products, and summed up."""
    import torch

    size, maps = runner.image_size, []
    for scale in how.scales:
        height, width = scaled_size(*photo.shape[:2], scale, size)
        image = resize_aligned(photo.transpose(2, 0, 1).astype(np.float32), height, width) * np.float32(2 / 255) - 1
        total = torch.zeros((len(texts), height, width), device=runner.device)
        count = torch.zeros((height, width), device=runner.device)
        for top, left in windows(height, width, size):
            piece = image[:, top : top + size, left : left + size]
            window = np.full((1, 3, size, size), np.float32(-1))
            window[0, :, : piece.shape[1], : piece.shape[2]] = piece
            scores = runner.scoring(runner._embed(window), texts)[2][0]
            if how.mirror:
                mirrored = np.ascontiguousarray(window[..., ::-1])
                scores = (scores + runner.scoring(runner._embed(mirrored), texts)[2][0].flip(2)) / 2
            here = np.s_[top : top + piece.shape[1], left : left + piece.shape[2]]
            total[(slice(None), *here)] += scores[:, : piece.shape[1], : piece.shape[2]]
            count[here] += 1
        maps.append(total / count / len(how.scales))
    hats = [[_hats(m.shape[1 + axis], photo.shape[axis], runner.device) for axis in (0, 1)] for m in maps]

    def score(start: int, stop: int) -> torch.Tensor:
        return sum(down @ m[start:stop] @ across.T for m, (down, across) in zip(maps, hats, strict=True))

    return _top_two(score, len(texts))


def _hats(source: int, target: int, device: torch.device) -> torch.Tensor:
    """float32 [target, source], what resizes an axis bilinearly, the ends of both grids coinciding."""
    import torch

    at = np.arange(target) * ((source - 1) / (target - 1) if target > 1 else 0.0)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(source)))
    return torch.from_numpy(weights.astype(np.float32)).to(device)


def _top_two(score: Callable[[int, int], torch.Tensor], texts: int) -> Expected:
    """From the cosines [n, h, w] of texts a to b to the first best label, and how far behind it the second is."""
    import torch

    labels = best = second = None
    for start in range(0, texts, GROUP):
        scores = score(start, min(start + GROUP, texts))
        more = scores.argmax(dim=0, keepdim=True)
        top = scores.gather(0, more)[0]
        behind = scores.scatter(0, more, -np.inf).amax(dim=0)
        if labels is None:
            labels, best, second = more[0], top, behind
            continue
        second = torch.maximum(torch.maximum(second, behind), torch.minimum(best, top))
        labels = torch.where(top > best, more[0] + start, labels)
        best = torch.maximum(best, top)
    steps = torch.ceil(STEPS * torch.log2((best - second).clamp(min=SMALLEST) / SMALLEST)).clamp(max=255)
    labels, steps, best = (values.cpu().numpy() for values in (labels, steps, best[::STRIDE, ::STRIDE]))
    return Expected(labels.astype(np.uint16), steps.astype(np.uint8), np.ascontiguousarray(best))


def gap(steps: np.ndarray) -> np.ndarray:
    """The difference of cosines that stored steps mean: never less than it was, at most 9 % more."""
    return SMALLEST * 2.0 ** (np.asarray(steps, np.float64) / STEPS)


@dataclass
class Reference:
    """The reference's answers to all groups, in order, and what they were made from."""

    about: str  # seed, numbers of photos, weights
    source: np.ndarray  # uint8 [H, W, 3], from which crops are cut
    words: np.ndarray  # float32, the embeddings of `WORDS`
    digests: list[int]
    found: list[list[Expected]]

    def save(self, path: Path) -> None:
        arrays = {}
        for index, expected in enumerate(one for group in self.found for one in group):
            arrays |= {f"{name}_{index}": getattr(expected, name) for name in ("labels", "gaps", "best")}
        arrays |= {"about": np.array(self.about), "source": self.source, "words": self.words}
        arrays |= {"digests": np.array(self.digests), "sizes": np.array([len(group) for group in self.found])}
        save_arrays(path, **arrays)

    @classmethod
    def load(cls, path: Path, about: str) -> Reference:
        """Raises UserError where it is missing, damaged or of other inputs."""
        with saved_arrays(path) as arrays:
            made, found, numbers = str(arrays["about"]), [], count()
            for size in arrays["sizes"].tolist():
                group = list(islice(numbers, size))
                found.append([Expected(*(arrays[f"{n}_{i}"] for n in ("labels", "gaps", "best"))) for i in group])
            result = cls(made, arrays["source"], arrays["words"], arrays["digests"].tolist(), found)
        if made != about:
            raise UserError(f"{path} was made for '{made}', not for '{about}': make it again, or give those options")
        return result
