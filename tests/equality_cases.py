"""Random photos and labels for equality.py, and PyTorch's answers in float32: labels, and how clear they are."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np

from lseg.accuracy import save_arrays, saved_arrays
from lseg.errors import UserError
from lseg.image import to_pixels
from lseg.runner import Runner, Timings
from lseg.windows import MODES, _scale_scores, resize_aligned

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


def expect(runner: Runner, group: Group, text: np.ndarray) -> list[Expected]:
    """The reference's answers, from its score maps."""
    how, size = MODES[group.mode], runner.image_size
    if not how.scales:
        images = group.inputs(size).transpose(0, 3, 1, 2).astype(np.float32) * np.float32(2 / 255) - 1
        return [
            _top_two(lambda part, image=image: runner.scores(image[None], part)[0], text)
            for image in np.ascontiguousarray(images)
        ]

    def score(photo: np.ndarray, part: np.ndarray) -> np.ndarray:
        maps = (_scale_scores(runner.scores, size, photo, part, s, how.mirror, Timings()) for s in how.scales)
        total = sum(resize_aligned(scores, *photo.shape[:2]) for scores in maps)
        return total / np.float32(len(how.scales) * (1 + how.mirror))

    return [_top_two(lambda part, photo=photo: score(photo, part), text) for photo in group.photos]


def _top_two(score, text: np.ndarray) -> Expected:
    """From `score`, texts [n, D] to cosines [n, h, w], to the first best label and how far the second is behind."""
    labels = best = second = None
    for start in range(0, len(text), GROUP):
        scores = score(text[start : start + GROUP])
        more = scores.argmax(axis=0)[None]
        top = np.take_along_axis(scores, more, 0)[0]
        np.put_along_axis(scores, more, -np.inf, 0)
        behind = scores.max(axis=0)
        if labels is None:
            labels, best, second = more[0], top, behind
            continue
        second = np.maximum(np.maximum(second, behind), np.minimum(best, top))
        labels = np.where(top > best, more[0] + start, labels)
        best = np.maximum(best, top)
    steps = np.ceil(STEPS * np.log2(np.maximum(best - second, SMALLEST) / SMALLEST))
    return Expected(labels.astype(np.uint16), np.minimum(steps, 255).astype(np.uint8), best[::STRIDE, ::STRIDE])


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
