"""From words to text embeddings: synonyms that count as one label, and prompt templates whose embeddings are averaged.

Source of the averaging: the zero-shot evaluation of Radford et al., "Learning Transferable Visual Models From Natural
Language Supervision", ICML 2021: the mean of unit embeddings, normalised again.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lseg.errors import UserError
from lseg.labels import LabelSet, label_key, parse_labels
from lseg.text_cache import TextCache
from lseg.tokenizer import Tokenizer

PROMPTS_A_RUN = 640  # prompts that are encoded between two steps of the progress bar


@dataclass(frozen=True)
class Vocabulary:
    """Labels, and the texts that stand for them: T texts for N labels, T >= N.

    Attributes:
        labels: their names, in order, and notes for the user.
        texts: each label's name first, then all synonyms.
        owner: int32 [T], the label of each text.
    """

    labels: LabelSet
    texts: tuple[str, ...]
    owner: np.ndarray

    @classmethod
    def of(cls, labels: LabelSet) -> Vocabulary:
        """Labels without synonyms."""
        return cls(labels, labels.names, np.arange(len(labels.names), dtype=np.int32))

    def to_labels(self, indices: np.ndarray) -> np.ndarray:
        """A map of texts' indices to one of labels' indices, of any shape."""
        return self.owner[indices] if len(self.texts) > len(self.labels.names) else indices


def with_synonyms(rows: Sequence[Sequence[str]]) -> Vocabulary:
    """A vocabulary of labels, each with its synonyms after its name.

    A synonym that another label has already, as its name or synonym, is dropped with a note.

    Raises:
        UserError: there is no label, "other" is the only one, or a label holds a comma.
    """
    for row in rows:
        if "," in row[0]:
            raise UserError(f'the label "{row[0]}" holds a comma: name it with one word or phrase, and add synonyms')
    labels = parse_labels([row[0] for row in rows])
    place = {label_key(name): index for index, name in enumerate(labels.names)}
    texts, owner, notes = list(labels.names), list(range(len(labels.names))), list(labels.notes)
    seen = {label_key(name) for name in texts}
    for row in rows:
        label = place[label_key(row[0])]
        for word in row[1:]:
            if label_key(word) in seen:
                notes.append(f'synonym "{word}" of "{row[0]}" is dropped: it is there already')
                continue
            seen.add(label_key(word))
            texts.append(word)
            owner.append(label)
    return Vocabulary(LabelSet(labels.names, tuple(notes)), tuple(texts), np.array(owner, np.int32))


def load_templates(name: str) -> list[str]:
    """Prompt templates, in each of which "{}" stands for the word.

    Args:
        name: "none" (the bare word, as the official code has it), "clip" (CLIP's 80 for ImageNet, which open_clip
            carries), or a file with one a line.

    Raises:
        UserError: the file cannot be read or holds no template, or one has no "{}"; or open_clip is not installed.
    """
    if name == "none":
        return ["{}"]
    if name == "clip":
        return [template("{}") for template in _open_clip_templates()]
    path = Path(name)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give 'none', 'clip' or a file of templates"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: write one template a line") from None
    templates = [line for line in lines if line]
    if not templates:
        raise UserError(f"{path} holds no template: write one a line, such as 'a photo of a {{}}.'")
    for number, line in enumerate(lines, 1):
        if line and "{}" not in line:
            raise UserError(f"line {number} of {path} has no {{}} where the word goes: {line[:60]}")
    return templates


def _open_clip_templates() -> Sequence[Callable[[str], str]]:
    """open_clip's list, read from its file alone: importing the package would import torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise UserError("open_clip, which carries CLIP's templates, is not installed: run './requirements.sh'")
    file = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("lseg_open_clip_templates", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OPENAI_IMAGENET_TEMPLATES


def embed_texts(
    texts: Sequence[str],
    templates: Sequence[str],
    encode: Callable[[np.ndarray], np.ndarray],
    cache: TextCache,
    tokenize: Tokenizer,
    progress: Callable[[Sequence], Iterator] = iter,
) -> np.ndarray:
    """Unit embeddings of texts, float32 [T, D]: of each in every template, averaged and normalised again.

    Args:
        texts: T words.
        templates: with "{}" for the word.
        encode: tokens int32 [n, 77] to unit vectors float32 [n, D].
        cache: keeps the averages.
        tokenize: texts to tokens.
        progress: wraps the steps that are left to do.

    Raises:
        UserError: a prompt has more than 77 tokens.
    """
    count = len(templates)
    variant = "" if list(templates) == ["{}"] else hashlib.sha256("\n".join(templates).encode()).hexdigest()

    def make(missing: list[int]) -> np.ndarray:
        step = max(1, PROMPTS_A_RUN // count)
        parts = []
        for start in progress(range(0, len(missing), step)):
            words = [texts[index] for index in missing[start : start + step]]
            prompts = [template.replace("{}", word) for word in words for template in templates]
            vectors = encode(tokenize(prompts)).reshape(len(words), count, -1).astype(np.float64)
            mean = vectors.mean(axis=1)
            parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(parts).astype(np.float32)

    return cache.get(tokenize(texts), make, variant)
