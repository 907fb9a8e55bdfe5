"""Accuracy of label maps: confusion matrix, pixel accuracy and intersection over union."""

from __future__ import annotations

import numpy as np


def confusion(predicted: np.ndarray, truth: np.ndarray, count: int) -> np.ndarray:
    """Pixels by true label (row) and predicted label (column).

    Args:
        predicted: integers [...], 0 to count - 1; anything else is a miss without a column.
        truth: integers of the same shape; pixels outside 0 to count - 1 are unlabelled and count nowhere.
        count: N.

    Returns:
        int64 [N, N + 1]; the last column holds misses without a label.
    """
    keep = (truth >= 0) & (truth < count)
    guess = predicted[keep].astype(np.int64)
    guess = np.where((guess < 0) | (guess >= count), count, guess)
    pairs = truth[keep].astype(np.int64) * (count + 1) + guess
    return np.bincount(pairs, minlength=count * (count + 1)).reshape(count, count + 1)


def class_iou(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of each label, float64 [N], from `confusion`'s matrix; NaN where a label never occurs."""
    hit = np.diagonal(matrix).astype(np.float64)
    union = matrix.sum(axis=1) + matrix[:, :-1].sum(axis=0) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


def pixel_accuracy(matrix: np.ndarray) -> float:
    """Share of the labelled pixels that are right."""
    return float(np.diagonal(matrix).sum() / max(matrix.sum(), 1))
