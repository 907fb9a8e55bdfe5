"""Scores of pixels against texts, and the label map they give."""

from __future__ import annotations

from torch import Tensor, nn

from lseg.model import upsample


class Similarity(nn.Module):
    """Pixel and text embeddings to a label map at the image's resolution.

    The scores are upsampled, not the embeddings: both are linear, so the result is the same, with N channels in
    place of 512.

    Args:
        embeddings: float32 [B, D, h, w], unit length over D.
        text: float32 [N, D], unit length.

    Returns:
        labels: int32 [B, 2h, 2w], the index of the text with the largest cosine (the first, where equal).
        best: float32 [B, 2h, 2w], that cosine: what merges the maps of several groups of labels.
        scores: float32 [B, N, 2h, 2w], every cosine.
    """

    def forward(self, embeddings: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = embeddings.shape[2:]
        scores = text @ embeddings.flatten(2)  # [B, N, h*w]
        scores = upsample(scores.unflatten(2, (height, width)))  # [B, N, 2h, 2w]
        labels = scores.argmax(dim=1, keepdim=True)  # [B, 1, 2h, 2w]
        best = scores.gather(1, labels)  # [B, 1, 2h, 2w]
        return labels[:, 0].int(), best[:, 0], scores
