"""What the page does, without the page: photos and words in; label maps, scores, heat maps and files out."""

from __future__ import annotations

import base64
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from lseg.draw import overlay, panel, shares
from lseg.errors import UserError
from lseg.image import labels_to_photo, to_pixels, write_image
from lseg.inference import MODES, label_photo
from lseg.kept_photos import Answer, How, KeptPhoto, KeptPhotos
from lseg.kept_scores import heat_map, label_grid, scores_at, shares_in_photo
from lseg.labels import as_hex, palette, parse_labels, save_label_map
from lseg.page_upload import Upload, decode_upload
from lseg.results import describe
from lseg.runner import STAGES, Timings, available_backends
from lseg.segmenter import Segmenter
from lseg.sources import LABEL_MAP, MEANING, PICTURE

SHOWN_SIDE = 1280  # pixels of the longer side of what goes to the browser
TOP = 5  # labels that are named for a pixel
LONGEST_TEXT = 200_000  # characters of all labels together, before they are looked at
NOTES = 3  # of which more would fill the page
BACKENDS = {"tensorrt": "TensorRT", "onnxruntime": "ONNX Runtime", "torch": "PyTorch"}


class Limits(NamedTuple):
    """What one visitor may ask for, and what is kept of all of them."""

    megapixels: float = 50
    labels: int = 256
    kept_bytes: int = 2**30


class Desk:
    """Answers the page's visitors. Threads share one; close it, or use it as a context manager.

    Args:
        open_segmenter: weights and backend ("auto" the first time) to an open Segmenter.
        weights: those that visitors may choose; the first is opened now.
        backend: opened now, "auto" or a name.
        limits: the usual ones by default.

    Raises:
        UserError: the first weights or the backend cannot be opened.
    """

    def __init__(
        self,
        open_segmenter: Callable[[str, str], Segmenter],
        weights: Sequence[str] = ("demo",),
        backend: str = "auto",
        limits: Limits | None = None,
    ):
        self._open_segmenter, self.weights = open_segmenter, tuple(weights)
        self.limits = limits or Limits()
        self.kept = KeptPhotos(self.limits.kept_bytes)
        self._lock = threading.Lock()
        first = open_segmenter(self.weights[0], backend)
        library = first.runner.identity.library
        backend = next((name for name, title in BACKENDS.items() if library.startswith(title)), backend)
        self.backends = tuple(dict.fromkeys([backend, *available_backends()]))  # the one that is open comes first
        self._segmenters = {(self.weights[0], backend): first}
        # Of runs at once, on the CPU of all networks: more take memory and no less time. New words wait for none.
        self._turns: dict[object, threading.BoundedSemaphore] = {}
        self._opening: dict[tuple[str, str], threading.Lock] = {}

    @property
    def usual(self) -> How:
        return How("whole", self.weights[0], self.backends[0])

    def segmenter(self, how: How) -> Segmenter:
        """The one that is open for these weights and this backend, or a new one, which stays open."""
        if how.weights not in self.weights or how.backend not in self.backends:
            raise UserError(f"{how.weights} on {how.backend} is not offered here: choose from the lists")
        key = (how.weights, how.backend)
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:  # engines may take minutes to build: those who want others do not wait
            if key not in self._segmenters:
                self._segmenters[key] = self._open_segmenter(*key)
            return self._segmenters[key]

    def open_photo(
        self, upload: Upload, words: Sequence[str], how: How, once: bool = False
    ) -> tuple[str, dict[str, Any]]:
        """Keeps a new photo and answers: its key, and what `answer` gives. With `once` its embeddings are not kept.

        Raises:
            UserError: the file is no photo, too large, or the words do not do.
        """
        start = time.perf_counter()
        names, notes = self.read_words(words)
        timings = Timings()
        key = self.kept.add(self._load(upload, timings))
        try:
            found = self._answer(key, names, notes, how, timings, start, once)
        except BaseException:
            self.kept.drop(key)
            raise
        return key, found

    def picture(self, key: str) -> str:
        """The photo for the browser, as a data URL."""
        return _data_url(self.kept.get(key).shown, ".jpg")

    def answer(self, key: str, words: Sequence[str], how: How) -> dict[str, Any]:
        """Labels a kept photo with words; seen whole, from the embeddings that are kept.

        Returns:
            what the viewer shows, all of it JSON: "key", "name", "size", "labels" (of each "name", "colour", "share"),
            "map" (a picture), "whole", "kept" (the network did not run), "ran", "stages" (milliseconds), "notes".

        Raises:
            UserError: the photo is not kept any more, or the words do not do.
        """
        start = time.perf_counter()
        return self._answer(key, *self.read_words(words), how, Timings(), start)

    def is_answered(self, key: str, words: Sequence[str], how: How) -> bool:
        """Whether the last answer for a photo was to these words, looked at in this way."""
        answer = self.kept.get(key).answer
        return answer is not None and (answer.names, answer.how) == (self.read_words(words)[0], how)

    def read_words(self, words: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
        """Labels and notes on them; UserError where there is none, or too many, or too long a text."""
        if isinstance(words, str):  # a program's; its letters would be labels
            words = [words]
        if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
            raise UserError("the labels are no texts: give a list of words")
        if sum(map(len, words)) > LONGEST_TEXT:
            raise UserError(f"the labels are longer than {LONGEST_TEXT:,} characters: shorten the list")
        labels = parse_labels(list(words))
        if len(labels.names) > self.limits.labels:
            raise UserError(f"{len(labels.names):,} labels are too many: give at most {self.limits.labels}")
        more = len(labels.notes) - NOTES
        return labels.names, [*labels.notes[:NOTES], *([f"and {more} more notes of this kind"] if more > 0 else [])]

    def pixel(self, key: str, x: int, y: int) -> dict[str, Any]:
        """The labels of one pixel of the photo, best first: "x", "y", "scores" (of each "name", "colour", "cosine")."""
        photo = self.kept.get(key)
        height, width = photo.photo.shape[:2]
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"there is no pixel ({x}, {y}) in a photo of {width} x {height}")
        answer, grid = self._answered(photo), photo.grid
        if answer.is_whole and grid is not None:
            size = len(answer.labels)
            scores = scores_at(grid, answer.text, size, _middle(y, size, height), _middle(x, size, width))
            best = np.argsort(-scores, kind="stable")[:TOP]
        else:  # of windows the best alone is known
            rows, columns = answer.labels.shape
            at = _middle(y, rows, height), _middle(x, columns, width)
            best, scores = [answer.labels[at]], {answer.labels[at]: answer.cosines[at]}
        found = [
            {"name": answer.names[i], "colour": as_hex(answer.colours[i]), "cosine": round(float(scores[i]), 4)}
            for i in best
        ]
        return {"x": x, "y": y, "scores": found}

    def heat(self, key: str, index: int) -> dict[str, Any]:
        """How near every pixel is to one label: "map" (a picture), "low" and "high" (its cosines)."""
        photo = self.kept.get(key)
        answer, grid = self._answered(photo), photo.grid
        if not 0 <= index < len(answer.names):
            raise UserError("there is no such label any more: choose one of the list")
        if not answer.is_whole:
            raise UserError("heat maps are for photos seen whole: choose that inference")
        if grid is None:
            raise UserError("this photo's embeddings made room for others': change its labels, and it is seen again")
        colours, low, high = heat_map(grid, answer.text[index], len(answer.labels))
        return {"map": _data_url(colours, ".png"), "low": round(low, 4), "high": round(high, 4)}

    def download(self, key: str, kind: str, opacity: float = 0.55) -> tuple[str, bytes]:
        """A file's name and bytes: the "picture" as enginerun.py draws it, the "labels" or their "json"."""
        photo = self.kept.get(key)
        answer = self._answered(photo)
        with tempfile.TemporaryDirectory(prefix="lseg-") as folder:
            if kind == "picture":
                height, width = photo.shown.shape[:2]
                path = Path(folder) / f"{photo.name}{PICTURE}"
                overlaid = overlay(photo.shown, _labels_at(answer, width, height), answer.colours, opacity)
                fractions = self._shares(photo, answer)
                write_image(path, panel(photo.shown, overlaid, answer.names, answer.colours, fractions))
            elif kind in ("labels", "json"):
                path = self.write_labels(photo, Path(folder))
                path = path if kind == "labels" else path.with_suffix(".json")
            else:
                raise UserError(f"'{kind}' is no file to download: choose picture, labels or json")
            return path.name, path.read_bytes()

    def write_labels(self, photo: KeptPhoto, folder: Path) -> Path:
        """Writes the label map at the photo's size and its JSON, as enginerun.py --save-labels does; the PNG's path."""
        answer = self._answered(photo)
        height, width = photo.photo.shape[:2]
        path = folder / f"{photo.name}{LABEL_MAP}"
        save_label_map(path, _labels_at(answer, width, height), answer.names, answer.colours)
        assert path.with_suffix(".json").name.endswith(MEANING)
        return path

    def segment(self, upload: Upload, words: Sequence[str], how: How, folder: Path) -> tuple[dict[str, Any], Path]:
        """The API's one call: what a line of enginerun.py --jsonl says, with "ran", "milliseconds" and "notes"; a path.

        The path is the label map's, which goes to the folder with its JSON; nothing else is kept.
        """
        key, found = self.open_photo(upload, words, how, once=True)
        try:
            photo = self.kept.get(key)
            answer = self._answered(photo)
            height, width = photo.photo.shape[:2]
            folder.mkdir(parents=True, exist_ok=True)  # not before the run: empty folders are removed in time
            path = self.write_labels(photo, folder)
            cosines = labels_to_photo(answer.cosines, width, height)
            line = describe(upload.name, _labels_at(answer, width, height), cosines, answer.names)
            return {**line, "ran": found["ran"], "milliseconds": found["stages"], "notes": found["notes"]}, path
        finally:
            self.kept.drop(key)

    def _load(self, upload: Upload, timings: Timings) -> KeptPhoto:
        name, photo = decode_upload(upload, self.limits.megapixels, timings)
        return KeptPhoto(name, photo, _for_a_screen(photo))

    def _answer(
        self,
        key: str,
        names: tuple[str, ...],
        notes: list[str],
        how: How,
        timings: Timings,
        start: float,
        once: bool = False,
    ) -> dict[str, Any]:
        if how.inference not in MODES:
            raise UserError(f"'{how.inference}' is no inference mode: choose {', '.join(MODES)}")
        photo, lseg = self.kept.get(key), self.segmenter(how)
        whole = how.inference == "whole"
        with photo.lock:
            text = timings.measure("encode_text", lambda: lseg.embed(names))
            kept = whole and photo.grid is not None and photo.made_by == how[1:]
            if whole and once:  # labels alone leave the GPU then
                labels, cosines = self._label_once(photo, lseg, text, timings)
            elif whole:
                grid, size = self._grid(photo, lseg, how, timings), lseg.runner.image_size
                labels, cosines = timings.measure("similarity", lambda: label_grid(grid, text, size))
            else:
                with self._turn(lseg):
                    labels, cosines = label_photo(lseg.runner, photo.photo, text, how.inference, timings)
                cosines = cosines.astype(np.float16)
            labels = labels.astype(np.uint16)
            photo.answer = answer = Answer(names, text, palette(names), labels, cosines, how)
        self.kept.trim()
        height, width = photo.photo.shape[:2]
        found: dict[str, Any] = {"key": key, "name": photo.name, "size": [width, height], "whole": whole, "kept": kept}
        found.update(timings.measure("draw", lambda: self._draw(photo, answer)))
        found["ran"] = f"{lseg.runner.identity}; weights: {how.weights}; inference: {how.inference}"
        found["stages"] = {name: round(timings.milliseconds.get(name, 0.0), 1) for name in STAGES}
        found["stages"]["total"] = round((time.perf_counter() - start) * 1e3, 1)
        found["notes"] = notes
        return found

    def _turn(self, lseg: Segmenter) -> threading.BoundedSemaphore:
        where = "CPU" if lseg.runner.identity.device == "CPU" else lseg
        return self._turns.setdefault(where, threading.BoundedSemaphore(lseg.runner.callers))

    def _label_once(
        self, photo: KeptPhoto, lseg: Segmenter, text: np.ndarray, timings: Timings
    ) -> tuple[np.ndarray, np.ndarray]:
        pixels = timings.measure("preprocess", lambda: to_pixels(photo.photo, lseg.runner.image_size)[None])
        with self._turn(lseg):
            found = lseg.runner.segment(pixels, text, best=True)
        timings.add(found.timings)
        return found.labels[0], found.best[0]

    def _grid(self, photo: KeptPhoto, lseg: Segmenter, how: How, timings: Timings) -> np.ndarray:
        grid = photo.grid
        if grid is None or photo.made_by != how[1:]:
            size = lseg.runner.image_size
            pixels = timings.measure("preprocess", lambda: to_pixels(photo.photo, size)[None])
            with self._turn(lseg):
                # A copy: ONNX Runtime's own array lies in its arena, which never gets smaller, and would break it up.
                grid = timings.measure("encode_image", lambda: lseg.runner.encode_image(pixels)[0].copy())
            photo.grid, photo.made_by = grid, how[1:]
        return grid

    def _draw(self, photo: KeptPhoto, answer: Answer) -> dict[str, Any]:
        """The label map as a picture, which the browser stretches over the photo, and the legend."""
        labels = answer.labels
        if not answer.is_whole:
            height, width = photo.shown.shape[:2]
            labels = labels_to_photo(labels, width, height)
        each = zip(answer.names, answer.colours, self._shares(photo, answer), strict=True)
        legend = [
            {"name": name, "colour": as_hex(colour), "share": round(float(part), 6)} for name, colour, part in each
        ]
        return {"labels": legend, "map": _data_url(answer.colours[labels], ".png")}

    def _shares(self, photo: KeptPhoto, answer: Answer) -> np.ndarray:
        height, width = photo.photo.shape[:2]
        if answer.labels.shape == (height, width):
            return shares(answer.labels, len(answer.names))
        return shares_in_photo(answer.labels, len(answer.names), width, height)

    @staticmethod
    def _answered(photo: KeptPhoto) -> Answer:
        if photo.answer is None:
            raise UserError("the photo has no labels yet: wait for the answer")
        return photo.answer

    def close(self) -> None:
        for segmenter in self._segmenters.values():
            segmenter.close()

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _middle(place: int, side: int, length: int) -> int:
    """Where `labels_to_photo` looks for one row or column."""
    return (2 * place + 1) * side // (2 * length)


def _labels_at(answer: Answer, width: int, height: int) -> np.ndarray:
    """int32 [height, width]."""
    return labels_to_photo(answer.labels, width, height).astype(np.int32)


def _for_a_screen(photo: np.ndarray) -> np.ndarray:
    scale = SHOWN_SIDE / max(photo.shape[:2])
    if scale >= 1:
        return photo
    width, height = (max(1, round(side * scale)) for side in photo.shape[1::-1])
    return cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)


def _data_url(rgb: np.ndarray, suffix: str) -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[suffix]
    # Little compression: the picture goes over a local wire, and time counts.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 90]
    data = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1].tobytes()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
