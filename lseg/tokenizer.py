"""CLIP's byte-pair tokenizer on Hugging Face `tokenizers`: the same ids as OpenAI CLIP and open_clip, without torch.

`clip_bpe.txt.gz` is `bpe_simple_vocab_16e6.txt.gz` of OpenAI CLIP (https://github.com/openai/CLIP), MIT licence,
Copyright (c) 2021 OpenAI. Its lines are the merges in order of rank; the vocabulary follows from them.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from lseg.errors import UserError

CONTEXT = 77  # tokens in a row, start and end included
LONGEST = 10_000  # characters, far beyond 77 tokens: finding out how many they are would take its time
START = 49406
END = 49407
MERGES_FILE = Path(__file__).with_name("clip_bpe.txt.gz")
MERGES = START - 2 * 256  # the file holds more than CLIP uses
SUFFIX = "</w>"  # marks the last token of a word
# Contractions, runs of letters, single digits, runs of other signs. CLIP ignores case here, though the text is in lower
# case by then; what that changes is written out: the long s matches s, and the iota subscript U+0345 matches nothing.
WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"


class Tokenizer:
    """Texts to rows of CLIP token ids.

    The names of CLIP's start and end tokens, written out in a text, are read as plain characters.

    Args of a call:
        texts: N texts, or one.

    Returns of a call:
        int32 [N, 77]: start 49406, the text's ids, end 49407, then zeros.

    Raises:
        UserError: a text takes more than 77 tokens with its start and end (CLIP would cut it short in silence).
    """

    def __init__(self) -> None:
        with gzip.open(MERGES_FILE, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : 1 + MERGES]  # the first line is a version
        merges = [tuple(line.split()) for line in lines]
        letters = _byte_letters()
        words = [*letters, *(letter + SUFFIX for letter in letters), *("".join(merge) for merge in merges)]
        model = tokenizers.models.BPE(
            vocab={word: index for index, word in enumerate(words)}, merges=merges, end_of_word_suffix=SUFFIX
        )
        self._bpe = tokenizers.Tokenizer(model)
        self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = np.zeros((len(texts), CONTEXT), np.int32)
        for row, text in zip(rows, texts, strict=True):
            if len(text) > LONGEST:
                raise UserError(
                    f'the label "{text[:39].rstrip()}…" has {len(text)} characters, and CLIP reads at most {CONTEXT} '
                    "tokens: shorten it"
                )
            ids = self._bpe.encode(_clean(text)).ids
            if len(ids) + 2 > CONTEXT:
                shown = text if len(text) <= 40 else text[:39].rstrip() + "…"
                raise UserError(
                    f'the label "{shown}" takes {len(ids) + 2} tokens with its start and end, and CLIP reads at most '
                    f"{CONTEXT}: shorten it"
                )
            row[: len(ids) + 2] = [START, *ids, END]
        return rows


def _clean(text: str) -> str:
    """Mends mis-decoded text, resolves HTML entities, collapses white space and lower-cases, as CLIP does."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # ftfy changes nothing else: spare its import
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte, in the vocabulary's order: printable bytes first, as they are."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
