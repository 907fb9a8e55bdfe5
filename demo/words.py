"""The words that the demo weights know, and the CLIP vector that each is trained towards.

Most vectors are genuine: OpenAI CLIP ViT-B/32 text embeddings of 1,612 object names. Street-scene words that the list
lacks get a fixed vector made here, by the rules in `MADE`.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lseg.errors import UserError

# CamVid's 11 classes in the order of its masks; 11 is "unlabelled" there and counts nowhere.
CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
UNLABELLED = 11

# Words with no genuine vector: the genuine words whose mean they start from, and how far a direction of their own
# (random, fixed by the word) turns them away from it. With no kin they start from the mean of all words.
MADE: dict[str, tuple[tuple[str, ...], float]] = {
    "sky": ((), 0.55),
    "road": ((), 0.55),
    "pavement": ((), 0.55),
    "fence": ((), 0.55),
    "sign": (("street sign", "traffic sign"), 0.0),
    "pedestrian": (("person", "girl", "boy"), 0.15),
    "bicyclist": (("person", "bicycle"), 0.15),
    "sidewalk": (("pavement",), 0.1),
    "street": (("road",), 0.1),
    "other": ((), 0.0),
}

# Words that may stand in for a class while the pixels are trained, so that an embedding points to the class's
# neighbourhood in CLIP's space. "truck", "bus", "house", "man" and "woman" are left out on purpose: they show how
# words behave that were never seen with pixels.
KIN: dict[str, tuple[str, ...]] = {
    "building": ("office building", "skyscraper", "tower"),
    "pole": ("telephone pole", "lamppost", "flagpole"),
    "road": ("street",),
    "pavement": ("sidewalk",),
    "tree": ("palm tree",),
    "sign": ("street sign", "traffic sign"),
    "car": ("car (automobile)", "suv", "taxi", "van", "sports car", "land vehicle"),
    "pedestrian": ("person", "girl", "boy"),
    "bicyclist": ("bicycle", "tricycle"),
}


@dataclass(frozen=True)
class Vocabulary:
    """Words and their unit vectors: names [W], vectors float32 [W, 512]."""

    names: tuple[str, ...]
    vectors: np.ndarray

    def index(self, word: str) -> int:
        return self.names.index(word)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def load_vocabulary(folder: Path) -> Vocabulary:
    """Reads names.json and embeddings.npy (float16 [W, 512]) from `folder` and adds the made vectors.

    Raises:
        UserError: a file is missing, the two do not belong together, or they lack words that are needed.
    """
    for name in ("names.json", "embeddings.npy"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: give the folder with names.json and embeddings.npy")
    names = json.loads((folder / "names.json").read_text())
    vectors = np.load(folder / "embeddings.npy").astype(np.float64)
    if len(names) != len(vectors):
        raise UserError(
            f"{folder}: {len(names)} names for {len(vectors)} vectors; the two files do not belong together"
        )
    known = dict(zip(names, unit(vectors), strict=True))
    needed = {*CLASSES, *(kin for words in KIN.values() for kin in words)} - MADE.keys()
    needed |= {kin for words, _ in MADE.values() for kin in words} - MADE.keys()
    if lacking := sorted(needed - known.keys()):
        raise UserError(f"{folder / 'names.json'} lacks {', '.join(lacking)}: give the full list of CLIP's names")
    mean = unit(vectors.mean(axis=0))
    for word, (kin, turn) in MADE.items():
        start = unit(np.mean([known[k] for k in kin], axis=0)) if kin else mean
        own = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(start.shape)
        known[word] = unit(start + turn * unit(own - (own @ start) * start))
    return Vocabulary(tuple(known), np.stack(list(known.values())).astype(np.float32))
