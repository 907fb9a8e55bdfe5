"""Recent photos of the page's visitors, in memory alone: as many as a number of bytes holds."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lseg.errors import UserError


class How(NamedTuple):
    """How a photo is looked at."""

    inference: str = "whole"
    weights: str = "demo"
    backend: str = "onnxruntime"


@dataclass
class Answer:
    """What a photo's pixels were found to be.

    `labels` and `cosines` are [S, S], of the network's input, where the photo was seen whole, else [H, W].
    """

    names: tuple[str, ...]
    text: np.ndarray  # float32 [N, D]
    colours: np.ndarray  # uint8 [N, 3]
    labels: np.ndarray  # uint16
    cosines: np.ndarray  # float32 of the network's input, float16 of the photo
    how: How

    @property
    def is_whole(self) -> bool:
        return self.how.inference == "whole"


@dataclass
class KeptPhoto:
    """A photo, what the network made of it, and the last answer. Whoever works with these holds the lock."""

    name: str
    photo: np.ndarray  # uint8 [H, W, 3]
    shown: np.ndarray  # uint8 [h, w, 3], small enough for a screen
    # Float32 as the network gives them: 118 MB at 512 x 240 x 240. Float16 takes half, but turning it back for every
    # change of words takes longer than all the rest, and pixels between two labels would change sides.
    grid: np.ndarray | None = None  # float32 [D, G, G]
    made_by: tuple[str, str] | None = None  # weights and backend that the grid is of
    answer: Answer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    used: float = 0.0  # when it was asked for last, in seconds of the monotonic clock

    def bytes(self) -> int:
        answer = self.answer
        arrays = (self.photo, self.shown, self.grid, *((answer.labels, answer.cosines) if answer else ()))
        return sum(array.nbytes for array in arrays if array is not None)


class KeptPhotos:
    """Photos by a key that nobody can guess; threads share it.

    Beyond the limit the embeddings of photos unused for longest go first, which costs their owner one run of the
    network, then those photos themselves. The photo used last stays whatever its size.

    Args:
        limit: bytes.
        idle: seconds after which `forget_idle` forgets a photo that nobody asked for.
    """

    def __init__(self, limit: int, idle: float = 3600):
        self.limit, self.idle = limit, idle
        self._photos: OrderedDict[str, KeptPhoto] = OrderedDict()  # the one used last is the last
        self._lock = threading.Lock()

    def add(self, photo: KeptPhoto) -> str:
        key = secrets.token_urlsafe(16)
        photo.used = time.monotonic()
        with self._lock:
            self._photos[key] = photo
        self.trim()
        return key

    def get(self, key: object) -> KeptPhoto:
        """The photo, which counts as used now; UserError where it is not kept (any more)."""
        with self._lock:
            if not isinstance(key, str) or key not in self._photos:
                raise UserError("the photo is no longer kept on the server: open it again")
            self._photos.move_to_end(key)
            self._photos[key].used = time.monotonic()
            return self._photos[key]

    def drop(self, key: object) -> None:
        """Forgets a photo; one that is not there is no error."""
        with self._lock:
            if isinstance(key, str):
                self._photos.pop(key, None)

    def forget_idle(self) -> None:
        """To be called now and then."""
        with self._lock:
            for key in [key for key, photo in self._photos.items() if time.monotonic() - photo.used > self.idle]:
                del self._photos[key]

    def trim(self) -> None:
        """Keeps to the limit: to be called after a photo has grown."""
        with self._lock:
            older = list(self._photos)[:-1]
            over = sum(photo.bytes() for photo in self._photos.values()) - self.limit
            for key in older:
                if over <= 0:
                    return
                photo = self._photos[key]
                over -= photo.grid.nbytes if photo.grid is not None else 0
                photo.grid = photo.made_by = None  # who works with the grid at the moment has it in hand
            for key in older:
                if over <= 0:
                    return
                over -= self._photos.pop(key).bytes()

    def bytes(self) -> int:
        with self._lock:
            return sum(photo.bytes() for photo in self._photos.values())

    def __len__(self) -> int:
        return len(self._photos)
