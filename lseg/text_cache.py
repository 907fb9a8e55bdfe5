"""Text embeddings kept on disk, so that a label is encoded once for each text encoder."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lseg.onnx_file import FORMAT

FILE = "text_embeddings.sqlite"
# A view in its place might never end, or be of any size.
TABLE = "SELECT 1 FROM sqlite_master WHERE name = 'embeddings' AND type = 'table' AND sql LIKE 'CREATE TABLE %'"
STEPS = 10**8  # of SQLite's machine, beyond which it is stopped: a text takes some tens
WAIT = 5  # seconds for another process that is writing


class TextCache:
    """Embeddings by text encoder and tokens, in one SQLite file that any number of processes may share.

    A file that is damaged is begun anew, and one that cannot be opened or written is done without: what is kept is only
    ever a copy of what the encoder gives.

    Args:
        path: the file; made when there is something to keep.
        encoder: what tells text encoders apart: the SHA-256 of their weights. None keeps nothing.
    """

    def __init__(self, path: Path, encoder: str | None):
        self.path, self.encoder = path, encoder
        self.found = 0  # texts of the last call that were in the file

    def get(self, tokens: np.ndarray, make: Callable[[list[int]], np.ndarray], variant: str = "") -> np.ndarray:
        """Unit vectors of texts.

        Args:
            tokens: int32 [N, 77], which tell the texts apart.
            make: the places of texts that are not in the file to their vectors, float32 [n, D].
            variant: what else decides the vectors, such as the templates.

        Returns:
            float32 [N, D].
        """
        self.found = 0
        if self.encoder is None:
            return make(list(range(len(tokens))))
        about = f"{FORMAT} {self.encoder} {variant} ".encode()
        keys = [hashlib.sha256(about + row.tobytes()).digest() for row in tokens]
        kept = self._read(keys)
        if len({vector.shape for vector in kept.values()}) > 1:  # no encoder gives vectors of two lengths
            kept = {}
        missing = [index for index, key in enumerate(keys) if key not in kept]
        if missing:
            made = make(missing)
            if any(vector.shape != made.shape[1:] for vector in kept.values()):
                missing, kept = list(range(len(keys))), {}
                made = make(missing)
            fresh = dict(zip([keys[index] for index in missing], made, strict=True))
            kept |= fresh
            self._write(fresh)
        self.found = len(keys) - len(missing)
        return np.stack([kept[key] for key in keys])

    def _read(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        if not self.path.is_file():
            return {}
        try:
            with contextlib.closing(self._connect()) as file:
                if not file.execute(TABLE).fetchone():
                    return {}
                rows = [
                    (key, *row)
                    for key in keys
                    for row in file.execute("SELECT vector FROM embeddings WHERE key = ?", (key,))
                ]
        except sqlite3.OperationalError:  # locked, unreadable, or broken off
            return {}
        except sqlite3.DatabaseError:  # no SQLite file any more
            with contextlib.suppress(OSError):
                self.path.unlink()
            return {}
        blobs = {key: blob for key, blob in rows if isinstance(blob, bytes) and len(blob) % 4 == 0}
        vectors = {key: np.frombuffer(blob, np.float32) for key, blob in blobs.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            return {key: vector for key, vector in vectors.items() if abs(np.linalg.norm(vector) - 1) < 1e-3}

    def _connect(self) -> sqlite3.Connection:
        """The file. Work without end, such as a trigger of someone else's, is broken off."""
        file = sqlite3.connect(self.path, timeout=WAIT)
        steps = iter(range(STEPS // 1000))
        file.set_progress_handler(lambda: next(steps, None) is None, 1000)
        return file

    def _write(self, vectors: dict[bytes, np.ndarray]) -> None:
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._connect()) as file:
            with file:  # one transaction
                file.execute("CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
                rows = ((key, vector.astype(np.float32).tobytes()) for key, vector in vectors.items())
                file.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", rows)
