"""Synonyms that count as one label, and templates whose embeddings are averaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest

from lseg.errors import UserError
from lseg.labels import parse_labels
from lseg.text_cache import TextCache
from lseg.tokenizer import Tokenizer
from lseg.vocabulary import Vocabulary, embed_texts, load_templates, with_synonyms

ROOT = Path(__file__).resolve().parent.parent
TOKENIZE = Tokenizer()


class TestSynonyms:
    def test_texts_and_their_labels(self):
        found = with_synonyms([("car", "automobile", "auto"), ("sky",), ("person", "human being")])
        assert found.labels.names == ("car", "sky", "person") and found.labels.notes == ()
        assert found.texts == ("car", "sky", "person", "automobile", "auto", "human being")
        assert found.owner.tolist() == [0, 1, 2, 0, 0, 2]
        assert found.to_labels(np.array([[5, 4], [1, 0]])).tolist() == [[2, 0], [1, 0]]

    def test_repeats_are_dropped_with_a_note(self):
        found = with_synonyms([("car", "Sky", "automobile"), ("sky", "automobile"), ("car", "wagon")])
        assert found.texts == ("car", "sky", "automobile", "wagon") and found.owner.tolist() == [0, 1, 0, 0]
        assert found.labels.notes == (
            'label "car" is dropped: it repeats "car"',
            'synonym "Sky" of "car" is dropped: it is there already',
            'synonym "automobile" of "sky" is dropped: it is there already',
        )

    def test_one_label_gets_other(self):
        assert with_synonyms([("car", "auto")]).texts == ("car", "other", "auto")

    def test_without_synonyms_nothing_is_copied(self):
        found = Vocabulary.of(parse_labels("a, b"))
        indices = np.array([1, 0], np.uint8)
        assert found.to_labels(indices) is indices


class TestTemplates:
    def test_clips_own(self):
        """As open_clip has them, and read without importing it."""
        expected = [template("word") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
        assert [template.replace("{}", "word") for template in load_templates("clip")] == expected
        code = (
            "import sys; from lseg import vocabulary; vocabulary.load_templates('clip'); print('torch' in sys.modules)"
        )
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "False\n"

    def test_a_file(self, tmp_path):
        (tmp_path / "t.txt").write_text("a photo of a {}.\n\n  {} in the rain \n")
        assert load_templates(str(tmp_path / "t.txt")) == ["a photo of a {}.", "{} in the rain"]

    @pytest.mark.parametrize(
        "content, sentence",
        [
            (None, r"t.txt cannot be read \(No such file or directory\): give 'none', 'clip' or a file of templates"),
            (b"\n", "t.txt holds no template: write one a line, such as 'a photo of a {}.'"),
            (b"a {}\na photo\n", "line 2 of .*t.txt has no {} where the word goes: a photo"),
            (b"\xff\xfe", "t.txt is no text in UTF-8: write one template a line"),
        ],
    )
    def test_sentences(self, tmp_path, content, sentence):
        if content is not None:
            (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            load_templates(str(tmp_path / "t.txt"))


class TestEmbedding:
    @pytest.fixture
    def encode(self, seed):
        def encode(tokens: np.ndarray) -> np.ndarray:
            encode.rows += len(tokens)
            vectors = np.array([np.random.default_rng([seed, *map(int, row)]).standard_normal(8) for row in tokens])
            return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

        encode.rows = 0
        return encode

    def test_the_mean_of_unit_embeddings(self, encode, tmp_path):
        words, templates = ["cat", "{odd}", "dog"], ["a {}.", "{} {}", "the {}"]
        found = embed_texts(words, templates, encode, TextCache(tmp_path / "x", None), TOKENIZE)
        for word, vector in zip(words, found, strict=True):
            prompts = [template.replace("{}", word) for template in templates]
            mean = encode(TOKENIZE(prompts)).astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)

    def test_bare_words(self, encode, tmp_path):
        words = ["cat", "dog"]
        found = embed_texts(words, ["{}"], encode, TextCache(tmp_path / "x", None), TOKENIZE)
        np.testing.assert_allclose(found, encode(TOKENIZE(words)), atol=1e-6)

    def test_a_second_run_encodes_nothing(self, encode, tmp_path):
        words, templates = [f"word {n}" for n in range(50)], [f"{n} {{}}" for n in range(20)]
        first = embed_texts(words, templates, encode, TextCache(tmp_path / "x", "a"), TOKENIZE)
        assert encode.rows == 1000
        assert np.array_equal(embed_texts(words, templates, encode, TextCache(tmp_path / "x", "a"), TOKENIZE), first)
        assert encode.rows == 1000
        embed_texts(
            words[:1], templates[:1], encode, TextCache(tmp_path / "x", "a"), TOKENIZE
        )  # other templates, other vectors
        assert encode.rows == 1001

    def test_in_any_number_of_steps(self, encode, tmp_path, monkeypatch):
        from lseg import vocabulary

        words, cache = [f"word {n}" for n in range(7)], TextCache(tmp_path / "x", None)
        whole = embed_texts(words, ["a {}", "the {}"], encode, cache, TOKENIZE)
        monkeypatch.setattr(vocabulary, "PROMPTS_A_RUN", 5)
        steps = []
        again = embed_texts(
            words, ["a {}", "the {}"], encode, cache, TOKENIZE, lambda s: steps.append(len(s)) or iter(s)
        )
        assert np.array_equal(again, whole) and steps == [4]
