"""The tokenizer against open_clip's, and what a start of the program may import."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest

from lseg.errors import UserError
from lseg.tokenizer import CONTEXT, END, START, Tokenizer

TEXTS = [
    "",
    "car",
    "a photo of a dog",
    "Traffic Light",
    "  two   words\t",
    "line\nbreak",
    "café",
    "cafe\u0301",
    "naïve façade, Łódź, Straße, İstanbul, ſmall's",
    "it's we're I'VE don't he'll she'd I'm 'tis rock'n'roll 'S 'ſ",
    "2024 1234567890 ½ ² ⅷ 三百",
    "hello!!! ... ?!? (a) [b] {c} #d @e $5.00 a_b-c/d\\e",
    "Tom &amp; Jerry &lt;b&gt; &eacute; &amp;lt; &#x1f697; AT&T &nbsp;x",
    "😀 🚗🚌 👩\u200d👩\u200d👧 🇬🇧 👍🏽",
    "日本語 中文 한국어 русский ελληνικά עברית العربية हिन्दी ไทย",
    "‘curly’ “quotes” — dash… ﬁne ﬂow ＦＵＬＬ",
    "schÃ¶n donâ€™t",
    "pneumonoultramicroscopicsilicovolcanoconiosis" + "x" * 60,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u0345 α\u0345 x\u0345!",
    "zero\u200bwidth non\u00a0breaking soft\u00adhyphen \ufeffmark",
    "\x00 \x1b[31mred\x1b[0m \x7f",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def reference():
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


def random_texts(seed: int, number: int) -> list[str]:
    """Texts of words, CLIP-like pieces and any characters that Unicode 3.2 knew: newer ones depend on the libraries."""
    rng = random.Random(seed)
    every = map(chr, range(0x110000))
    known = [sign for sign in every if unicodedata.ucd_3_2_0.category(sign) not in ("Cn", "Cs", "Co")]
    latin = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    kinds = [
        lambda: "".join(rng.choices(latin, k=rng.randint(1, 14))),
        lambda: "".join(rng.choices("etaoin shrdlu'", k=rng.randint(1, 20))),
        lambda: "".join(rng.choices("0123456789.,-+%", k=rng.randint(1, 6))),
        lambda: "".join(rng.choices("!?.,'\"&;#<>/()", k=rng.randint(1, 6))),
        lambda: "".join(rng.choices(known, k=rng.randint(1, 4))),
        lambda: "".join(rng.choices("éèüßñçåøÉŁλжשن日本あ가😀🚗", k=rng.randint(1, 4))),
        lambda: rng.choice(["&amp;", "&eacute;", "&#233;", "'s", "n't", "'LL"]),
    ]
    return [rng.choice(["", " "]).join(rng.choice(kinds)() for _ in range(rng.randint(1, 4))) for _ in range(number)]


def expected(reference, text: str) -> list[int]:
    ids = [START, *reference.encode(text), END]
    return ids + [0] * (CONTEXT - len(ids))


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_equals_open_clip(tokenizer, reference, text):
    assert tokenizer([text])[0].tolist() == expected(reference, text)


def test_rows_equal_open_clips_tensor(tokenizer):
    open_clip = pytest.importorskip("open_clip")
    rows = tokenizer(TEXTS)
    assert rows.dtype == np.int32
    assert rows.shape == (len(TEXTS), 77)
    np.testing.assert_array_equal(rows, open_clip.tokenize(TEXTS).numpy())


def test_random_texts_equal_open_clip(tokenizer, reference, seed):
    compared = 0
    for text in random_texts(seed, 6000):
        ids = [START, *reference.encode(text), END]
        if len(ids) > CONTEXT:
            with pytest.raises(UserError):
                tokenizer([text])
        else:
            compared += 1
            assert tokenizer([text])[0].tolist() == expected(reference, text), ascii(text)
    assert compared > 5000


def test_one_text_and_none(tokenizer):
    np.testing.assert_array_equal(tokenizer("car"), tokenizer(["car"]))
    assert tokenizer([]).shape == (0, 77)


def test_names_of_special_tokens_are_plain_text(tokenizer):
    ids = tokenizer(["a <end_of_text> b <|endoftext|> <start_of_text>"])[0]
    assert (ids == END).sum() == 1
    assert (ids == START).sum() == 1


def test_77_tokens_pass_and_78_are_refused(tokenizer):
    row = tokenizer(["car " * 75])[0]
    assert row[-1] == END
    assert (row > 0).all()
    with pytest.raises(UserError) as error:
        tokenizer(["road", "car " * 76])
    assert str(error.value) == (
        'the label "car car car car car car car car car car…" takes 78 tokens with its start and end, and CLIP reads '
        "at most 77: shorten it"
    )


def test_loads_quickly():
    times = []
    for _ in range(3):
        start = time.process_time()
        Tokenizer()
        times.append(time.process_time() - start)
    assert min(times) < 0.3, times


def test_host_side_imports_neither_torch_nor_what_it_may_not_need():
    code = """
import sys
import lseg.draw, lseg.image, lseg.labels, lseg.tokenizer
rows = lseg.tokenizer.Tokenizer()(["car", "traffic light"])
assert rows[0, 1] == 1615, rows
print(sorted({"torch", "open_clip", "timm", "torchvision", "regex", "ftfy", "scipy"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
