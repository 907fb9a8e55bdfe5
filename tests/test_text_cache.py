"""Text embeddings on disk: kept once for each encoder and text, and never worse than none."""

from __future__ import annotations

import sqlite3
import threading

import numpy as np
import pytest

from lseg.text_cache import FILE, TextCache
from lseg.tokenizer import Tokenizer


@pytest.fixture
def encoder(seed):
    """An encoder that counts what it is asked for; each row of tokens has a vector of its own."""

    class Encoder:
        asked = 0

        def __call__(self, tokens: np.ndarray) -> np.ndarray:
            self.asked += len(tokens)
            rows = [np.random.default_rng([seed, *map(int, row)]).standard_normal(16) for row in tokens]
            vectors = np.array(rows, np.float32)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return Encoder()


def encode(cache: TextCache, tokens: np.ndarray, encoder, variant: str = "") -> np.ndarray:
    return cache.get(tokens, lambda places: encoder(tokens[places]), variant)


def test_a_text_is_encoded_once(tmp_path, encoder):
    tokens = Tokenizer()(["sky", "car", "road", "dog"])
    expected = encoder(tokens)
    encoder.asked = 0
    first = TextCache(tmp_path / FILE, "a")
    assert np.array_equal(encode(first, tokens[:2], encoder), expected[:2]) and first.found == 0
    again = TextCache(tmp_path / FILE, "a")  # as another process would
    assert np.array_equal(encode(again, tokens[::-1], encoder), expected[::-1])
    assert (again.found, encoder.asked) == (2, 4)
    assert np.array_equal(encode(again, tokens, encoder), expected) and encoder.asked == 4
    assert encode(TextCache(tmp_path / FILE, "b"), tokens, encoder).shape == (4, 16)  # another encoder's are others
    assert encoder.asked == 8
    encode(again, tokens, encoder, "in templates")
    assert encoder.asked == 12


def test_nothing_is_kept_without_a_name(tmp_path, encoder):
    tokens = Tokenizer()(["sky"])
    for _ in range(2):
        encode(TextCache(tmp_path / FILE, None), tokens, encoder)
    assert encoder.asked == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "table", "vector", "folder", "nowhere"])
def test_a_file_that_does_not_serve(tmp_path, encoder, damage, seed):
    """Whatever is wrong with the file, the embeddings are right; what can be mended is kept from then on."""
    tokens, path = Tokenizer()(["sky", "car"]), tmp_path / FILE
    expected = encode(TextCache(path, "a"), tokens, encoder)
    if damage == "text":
        path.write_text("no database, but long enough to be taken for one" * 100)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "nowhere":
        path = tmp_path / "none" / FILE
    else:
        with sqlite3.connect(path) as file:
            file.execute(
                "DROP TABLE embeddings" if damage == "table" else "UPDATE embeddings SET vector = zeroblob(64)"
            )
    encoder.asked = 0
    for _ in range(2):
        assert np.array_equal(encode(TextCache(path, "a"), tokens, encoder), expected)
    assert encoder.asked == (4 if damage in ("folder", "nowhere") else 2)


def test_several_at_once(tmp_path, encoder):
    tokens = Tokenizer()([f"word {index}" for index in range(40)])
    expected, wrong = encoder(tokens), []

    def work(start: int) -> None:
        for _ in range(5):
            rows = np.roll(np.arange(40), start)
            if not np.array_equal(encode(TextCache(tmp_path / FILE, "a"), tokens[rows], encoder), expected[rows]):
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
