"""Photos to files: pictures, label maps, scores and lines of JSON, read and written beside the network."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from lseg.draw import overlay, panel, shares
from lseg.errors import UserError
from lseg.files import write_files
from lseg.image import decode_image, encode_image, normalise, to_pixels
from lseg.inference import Labelled, label_photos
from lseg.labels import label_map_files, palette
from lseg.made_with import made_with, stamped
from lseg.pipeline import overlapped
from lseg.results import JsonLines, describe, mark_unknown, photos_in
from lseg.runner import Runner, Timings
from lseg.sources import LABEL_MAP, MEANING, PICTURE, SCORES, Photo, output_names
from lseg.vocabulary import Vocabulary

MANY = 20  # photos beyond which a progress bar alone tells of them
SCORES_A_RUN = 256  # texts scored at once: 236 MB at 480 x 480

Task = tuple[Photo, Path]  # a photo, and what its files begin with
Group = Sequence[tuple[Task, tuple[np.ndarray, Timings]]]  # photos that are decoded, uint8 [H, W, 3]


@dataclass(frozen=True)
class Wanted:
    """What is made of each photo, beside its picture.

    Attributes:
        output: folder of the files.
        inference: mode of `lseg.inference`.
        unknown: pixels whose best cosine is below it stay unlabelled; None labels all.
        labels: write the label map.
        scores: write every label's cosines, float16 [N, S, S].
        lines: file of a JSON line a photo, or None.
        rle: add masks to the lines.
        resume: leave out photos whose files are there, and go on with the lines.
        quiet: no progress bar.
        made_with: the digest of what decides the labels, which pictures tell: to resume, one with another is not done.
            Empty: pictures tell nothing, and those that do are not done.
        batch: photos that the network sees at once, if it sees them whole.
    """

    output: Path
    inference: str = "whole"
    unknown: float | None = None
    labels: bool = False
    scores: bool = False
    lines: Path | None = None
    rle: bool = False
    resume: bool = False
    quiet: bool = False
    made_with: str = ""
    batch: int = 1

    @property
    def besides(self) -> list[str]:
        """What is made beside the picture, in words that the picture tells."""
        kinds = {"labels": self.labels, "scores": self.scores, "lines": self.lines is not None, "rle": self.rle}
        return [kind for kind, wanted in kinds.items() if wanted]


class Made(NamedTuple):
    """A photo after the network."""

    photo: np.ndarray  # uint8 [H, W, 3]
    labels: np.ndarray  # integers [H, W]
    cosines: np.ndarray | None  # float32 [H, W]
    scores: np.ndarray | None  # float16 [N, S, S]
    taken: Timings


def open_tasks(photos: Sequence[Photo], wanted: Wanted, names: Sequence[str] = ()) -> list[Task]:
    """The photos to segment; to resume, without those that are done, with these labels' names."""
    tasks = list(zip(photos, output_names(photos, wanted.output), strict=True))
    if not wanted.resume:
        return tasks
    told = photos_in(wanted.lines, names) if wanted.lines else None
    ends = [PICTURE, *([LABEL_MAP, MEANING] if wanted.labels else []), *([SCORES] if wanted.scores else [])]

    def done(task: Task) -> bool:
        start = wanted.output / task[1]
        there = all(_with(start, end).exists() for end in ends)
        return there and _vouched(start, wanted) and (told is None or task[0].shown in told)

    return [task for task in tasks if not done(task)]


def made_otherwise(tasks: Sequence[Task], wanted: Wanted) -> int:
    """How many of the photos have a picture that another run made, with something else."""
    starts = [wanted.output / name for _, name in tasks]
    return sum(_with(start, PICTURE).exists() and not _made_alike(_told(start), wanted) for start in starts)


def _made_alike(told: list[str], wanted: Wanted) -> bool:
    return told[:1] == ([wanted.made_with] if wanted.made_with else [])


def _vouched(start: Path, wanted: Wanted) -> bool:
    """Whether the run that made the picture, alike, made all else that is wanted: what is there may be older."""
    told = _told(start)
    return _made_alike(told, wanted) and (not wanted.made_with or {*wanted.besides} <= {*told[1:]})


def _told(start: Path) -> list[str]:
    """What the picture tells of its run: the digest, and what was made beside it."""
    return (made_with(_with(start, PICTURE)) or "").split()


def _with(start: Path, end: str) -> Path:
    return start.with_name(f"{start.name}{end}")


def segment_photos(
    tasks: Sequence[Task],
    runner: Runner,
    text: np.ndarray,
    vocabulary: Vocabulary,
    wanted: Wanted,
    timings: Timings,
    say: Callable[[str], object],
) -> int:
    """Segments photos and writes their files; returns how many could not be read.

    Raises:
        UserError: none of them could be used, or a file cannot be written.
    """
    names = vocabulary.labels.names
    colours = palette(names)
    best = wanted.lines is not None

    def work(group: Group) -> list[Made]:
        photos, taken = [photo for _, (photo, _) in group], [taken for _, (_, taken) in group]
        # The network sees them at once: its time goes to the first one's.
        found = find_labels(runner, photos, text, vocabulary, wanted.inference, wanted.unknown, taken[0], best)
        scores = [None] * len(group)
        if wanted.scores:
            scores = [
                each.measure("similarity", lambda photo=photo: all_scores(runner, photo, text, vocabulary))
                for photo, each in zip(photos, taken, strict=True)
            ]
        parts = zip(photos, found, scores, taken, strict=True)
        return [Made(photo, *labelled, each, times) for photo, labelled, each, times in parts]

    def store(task: Task, made: Made) -> tuple[Path, dict, Timings]:
        start = wanted.output / task[1]
        picture = _with(start, PICTURE)

        def draw() -> None:
            """The picture comes last and vouches for the others: they are of the same run."""
            files: dict[Path, bytes] = {}
            fractions = shares(made.labels, len(names))
            if wanted.labels:
                path = _with(start, LABEL_MAP)
                png, meaning = label_map_files(path.name, made.labels, names, colours, fractions)
                files |= {path: png, _with(start, MEANING): meaning}
            if wanted.scores:
                file = io.BytesIO()
                np.save(file, made.scores)
                files[_with(start, SCORES)] = file.getvalue()
            overlaid = overlay(made.photo, made.labels, colours)
            drawn = encode_image(panel(made.photo, overlaid, names, colours, fractions))
            if wanted.made_with:
                drawn = stamped(drawn, " ".join([wanted.made_with, *wanted.besides]))
            write_files(files | {picture: drawn})

        made.taken.measure("draw", draw)
        line = {}
        if wanted.lines is not None:
            line = describe(task[0].shown, made.labels, made.cosines, names, wanted.rle) | {"picture": str(picture)}
        return picture, line, made.taken

    with JsonLines(wanted.lines, {photo.shown for photo, _ in tasks} if wanted.resume else None) as lines:
        how = {"callers": runner.callers, "group": wanted.batch}
        return run_tasks(tasks, work, store, lines.write, timings, say, wanted.quiet, **how)


def find_labels(
    runner: Runner,
    photos: Sequence[np.ndarray],
    text: np.ndarray,
    vocabulary: Vocabulary,
    inference: str,
    unknown: float | None,
    taken: Timings | None = None,
    best: bool = False,
) -> list[Labelled]:
    """`label_photos`, with synonyms as one label, and -1 where the cosine is below `unknown`, if that is given.

    Returns:
        of each photo integers [H, W], and the cosines float32 [H, W] where they are wanted (`best`) or needed.
    """

    def named(found: np.ndarray, cosines: np.ndarray | None) -> Labelled:
        labels = vocabulary.to_labels(found)
        return labels if unknown is None else mark_unknown(labels, cosines, unknown), cosines

    found = label_photos(runner, photos, text, inference, taken, best or unknown is not None)
    return [named(*each) for each in found]


def run_tasks(
    tasks: Sequence[Task],
    work: Callable[[Group], Sequence[Any]],
    store: Callable[[Task, Any], tuple[Path, Any, Timings]],
    finish: Callable[[Any], object],
    timings: Timings,
    say: Callable[[str], object],
    quiet: bool = False,
    check: Callable[[np.ndarray], object] = lambda photo: None,
    callers: int = 1,
    group: int = 1,
) -> int:
    """Decodes photos, does `work` with groups of them, stores what it gives, and tells of it.

    Args:
        tasks: the photos.
        work: called in turn with a group of photos, uint8 [H, W, 3], and their timings; gives as many results.
        store: called in threads with what `work` gave; gives a path to tell of, what `finish` takes, and the timings.
        finish: called here after each photo is stored.
        timings: to which each photo's are added.
        say: takes the lines for the user.
        quiet: no progress bar.
        check: raises UserError for a photo that is to be left out.
        callers: threads that `work`; one is this thread.
        group: photos of a group.

    Returns:
        how many were bad.

    Raises:
        UserError: none of the photos could be used; or whatever `work`, `store` and `finish` raise.
    """

    def load(task: Task) -> tuple[np.ndarray, Timings]:
        taken = Timings()
        photo = taken.measure("decode", lambda: decode_image(task[0].read(), task[0].shown))
        try:
            check(photo)
        except UserError as error:
            raise UserError(f"{task[0].shown}: {error}") from None
        return photo, taken

    bad = 0
    with tqdm(total=len(tasks), unit="photo", disable=True if quiet or len(tasks) == 1 else None) as bar:
        shown = len(tasks) <= MANY or bar.disable
        for (photo, _), result in overlapped(tasks, load, work, store, callers=callers, group=group):
            bar.update()
            with bar.external_write_mode():
                if isinstance(result, UserError):
                    if len(tasks) == 1:
                        raise result
                    bad += 1
                    print(f"error: {result}", file=sys.stderr)
                    continue
                path, found, taken = result
                finish(found)
                timings.add(taken)
                if shown:
                    say(f"{photo.shown} -> {path}")
    if bad == len(tasks):
        raise UserError(f"none of the {bad} photos could be used: see above")
    return bad


def all_scores(runner: Runner, photo: np.ndarray, text: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Every label's cosines for a photo seen whole, float16 [N, S, S]: of synonyms the best."""
    size = runner.image_size
    image = normalise(to_pixels(photo, size)[None])
    result = np.full((len(vocabulary.labels.names), size, size), -2, np.float16)
    for start in range(0, len(text), SCORES_A_RUN):
        found = runner.scores(image, text[start : start + SCORES_A_RUN])[0]
        for offset, scores in enumerate(found):
            label = vocabulary.owner[start + offset]
            np.maximum(result[label], scores.astype(np.float16), out=result[label])
    return result
