"""Accuracy of the backends against PyTorch in float32, on photos and on a data set with masks."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from lseg.dataset import Dataset
from lseg.errors import UserError
from lseg.files import write_files
from lseg.image import read_image
from lseg.inference import segment_photo
from lseg.metrics import class_iou, confusion, pixel_accuracy
from lseg.runner import Runner
from lseg.variants import Bound

STRIDE = 4  # embeddings are compared at every fourth row and column: a sample of 3,600 pixels a photo
RESAMPLES = 2000  # of the data set's photos, for the interval of an mIoU difference


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Writes what --save-reference keeps, whole or not at all."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_files({path: file.getvalue()})


@contextmanager
def saved_arrays(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The arrays that `save_arrays` wrote; what fails in the block is told of the file: UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        yield arrays
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): make it with --save-reference") from None
    except Exception:  # zip's, NumPy's and zlib's own errors
        raise UserError(f"{path} is no reference, or damaged: make it with --save-reference") from None


@dataclass
class Expected:
    """What the reference made of the photos and the data set."""

    text: np.ndarray  # float32 [N, D]
    embeddings: list[np.ndarray] = field(default_factory=list)  # of each photo, float32 [D, 60, 60]
    photo_labels: list[np.ndarray] = field(default_factory=list)  # of each photo, uint16 [S, S]
    labels: list[np.ndarray] = field(default_factory=list)  # of each image of the data set: a PNG's bytes, uint8

    def save(self, path: Path, inputs: str) -> None:
        """Writes it for a run where there is no torch. `inputs` says what it was made from."""
        arrays = {f"embeddings_{i}": value.astype(np.float32) for i, value in enumerate(self.embeddings)}
        arrays |= {f"photo_{i}": value for i, value in enumerate(self.photo_labels)}
        arrays |= {f"image_{i}": value for i, value in enumerate(self.labels)}
        save_arrays(path, text=self.text, inputs=np.array(inputs), **arrays)

    @classmethod
    def load(cls, path: Path, inputs: str) -> Expected:
        """Reads it; raises UserError where it is damaged or was made from other inputs."""
        with saved_arrays(path) as arrays:
            made_from = str(arrays.pop("inputs"))
            found = cls(arrays["text"], *(_numbered(arrays, prefix) for prefix in ("embeddings", "photo", "image")))
            if not found._is_whole():
                raise ValueError
        if made_from != inputs:
            raise UserError(f"{path} was made from other weights, photos, labels or data: make it again")
        return found

    def _is_whole(self) -> bool:
        """Whether the arrays are of the kinds that `save` writes."""
        parts = [([self.text], "f", 2), (self.embeddings, "f", 3), (self.photo_labels, "u", 2), (self.labels, "u", 1)]
        return all(one.dtype.kind == kind and one.ndim == axes for ones, kind, axes in parts for one in ones)

    def check_fits(self, own: Expected, images: int) -> None:
        """UserError unless it is of as many photos and images as another, of the same sizes."""
        pairs = [(self.embeddings, own.embeddings), (self.photo_labels, own.photo_labels), ([self.text], [own.text])]
        same = all([a.shape for a in mine] == [b.shape for b in theirs] for mine, theirs in pairs)
        if not same or len(self.labels) != images:
            raise UserError(
                "the reference has other sizes than what it is compared with: make it with --save-reference"
            )


def _numbered(arrays: dict[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    return [arrays[f"{prefix}_{i}"] for i in range(sum(name.startswith(f"{prefix}_") for name in arrays))]


def _label_map(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A label map of the reference, from its PNG's bytes."""
    found = cv2.imdecode(data.astype(np.uint8), cv2.IMREAD_UNCHANGED) if data.size else None
    if found is None or found.shape != shape:
        raise UserError("the reference has a damaged label map: make it with --save-reference")
    return found


@dataclass
class Score:
    """Hits and misses on a data set, by image: what IoU and its interval come from."""

    count: int  # N labels
    total: np.ndarray | int = 0  # confusion matrix, int64 [N, N + 1]
    parts: list[np.ndarray] = field(default_factory=list)  # of each image: hits, true and predicted pixels, [3, N]
    agreement: list[float] = field(default_factory=list)  # of each image: share of pixels as in the reference

    def add(self, labels: np.ndarray, truth: np.ndarray, expected: np.ndarray) -> None:
        matrix = confusion(labels, truth, self.count)
        self.total = self.total + matrix
        self.parts.append(np.stack([np.diagonal(matrix), matrix.sum(axis=1), matrix[:, :-1].sum(axis=0)]))
        self.agreement.append(float(np.mean(labels == expected)))

    def miou(self) -> float:
        return float(np.nanmean(class_iou(self.total)) * 100)


def measure_accuracy(
    runner: Runner,
    tokens: np.ndarray,
    photos: Sequence[np.ndarray],
    dataset: Dataset | None,
    mode: str,
    expected: Expected | None,
    progress: Callable[[Sequence], Iterator] = iter,
) -> tuple[dict, Expected]:
    """Runs a backend over photos and a data set and holds it against the reference.

    Args:
        runner: the backend.
        tokens: int32 [N, 77].
        photos: uint8 [S, S, 3] each.
        dataset: with N labels, or None.
        mode: of `lseg.inference`, for the data set.
        expected: the reference's results, or None where this is the reference.
        progress: wraps the data set's pairs.

    Returns:
        figures for the report, and what the reference gave.
    """
    text = runner.encode_text(tokens)
    own = Expected(text)
    for pixels in photos:
        own.embeddings.append(runner.encode_image(pixels[None])[0, :, ::STRIDE, ::STRIDE])
        own.photo_labels.append(runner.segment(pixels[None], text).labels[0].astype(np.uint16))
    reference = expected or own
    if expected is not None:
        expected.check_fits(own, len(dataset.pairs) if dataset else 0)
    figures: dict = {"is_reference": expected is None, "photos": len(photos)}
    figures["text_cosine_min"] = float((text * reference.text).sum(axis=1).min())
    if photos:
        ours, theirs = np.stack(own.embeddings).astype(np.float64), np.stack(reference.embeddings).astype(np.float64)
        cosine = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        figures |= {
            "cosine_min": float(cosine.min()),
            "max_difference": float(np.abs(ours - theirs).max()),
            "relative_difference": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
            "label_agreement": float(np.mean(np.stack(own.photo_labels) == np.stack(reference.photo_labels)) * 100),
        }
    if dataset is not None:
        score, reference_score = Score(len(dataset.labels)), Score(len(dataset.labels))
        for index, (photo, mask) in enumerate(progress(dataset.pairs)):
            image = read_image(photo)
            truth = dataset.mask(mask, image.shape)
            labels = segment_photo(runner, image, text, mode).astype(np.uint16)
            if expected is None:
                own.labels.append(cv2.imencode(".png", labels)[1])
            wanted = _label_map(reference.labels[index], labels.shape)
            score.add(labels, truth, wanted)
            if expected is not None:
                reference_score.add(wanted, truth, wanted)
        iou = np.round(class_iou(score.total) * 100, 2)
        figures["dataset"] = {
            "name": dataset.name,
            "images": len(dataset.pairs),
            "evaluation": mode,
            "pixel_accuracy": pixel_accuracy(score.total) * 100,
            "miou": score.miou(),
            "iou": {name: None if np.isnan(v) else float(v) for name, v in zip(dataset.labels, iou, strict=True)},
            "label_agreement": float(np.mean(score.agreement) * 100),
            "label_agreement_worst_image": float(np.min(score.agreement) * 100),
        }
        if expected is not None:
            figures["dataset"]["miou_difference"] = miou_difference(score, reference_score)
    return figures, own


def miou_difference(score: Score, reference: Score, seed: int = 0) -> dict[str, float]:
    """mIoU minus the reference's, in points, with a 95 % bootstrap interval over the data set's images (paired)."""
    ours, theirs = (np.stack(each.parts).astype(np.float64) for each in (score, reference))  # [images, 3, N]
    images = len(ours)
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)

    def miou(parts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        hits, true, predicted = np.tensordot(weights, parts, axes=(1, 0)).transpose(1, 0, 2)  # each [draws, N]
        union = true + predicted - hits
        with np.errstate(invalid="ignore"):
            return np.nanmean(np.where(union > 0, hits / np.where(union > 0, union, 1), np.nan), axis=1) * 100

    difference = miou(ours, draws) - miou(theirs, draws)
    low, high = np.percentile(difference, [2.5, 97.5])
    return {"value": score.miou() - reference.miou(), "low": float(low), "high": float(high)}


def broken_bounds(figures: dict, bound: Bound, random_weights: bool) -> list[str]:
    """What in the figures breaks a backend's bound, in words.

    Random weights make nearly equal scores, where rounding decides: then the embeddings alone are held to a bound.
    """
    broken = []
    if not figures.get("relative_difference", 0) <= bound.relative_difference:  # so that NaN breaks it too
        broken.append(f"embeddings {figures['relative_difference']:.1e} off, over {bound.relative_difference:.0e}")
    if random_weights:
        return broken
    for name, part in (("photos", figures), ("data set", figures.get("dataset", {}))):
        if not part.get("label_agreement", 100) >= bound.label_agreement:
            broken.append(
                f"labels of the {name} {part['label_agreement']:.2f} % equal, under {bound.label_agreement} %"
            )
    change = figures.get("dataset", {}).get("miou_difference", {}).get("value", 0)
    if not abs(change) <= bound.miou:
        broken.append(f"mIoU {change:+.2f}, beyond {bound.miou}")
    return broken
