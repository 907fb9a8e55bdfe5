"""LSeg on PyTorch: in float32 the reference that the other backends are held against, in float16 their rival."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from lseg import checkpoint
from lseg.image import normalise
from lseg.runner import TEXTS_A_RUN, Identity, Segmentation, Timings, segment_in_stages
from lseg.similarity import Similarity
from lseg.windows import Inference, label_windows

PIPELINE_SCORES = 512  # images times labels that the float16 pipeline takes: 236 MB of scores, upsampled


class HalfPipeline(nn.Module):
    """Everything between the host's pixels and its label map in float16: what `torch.compile` takes as a whole.

    Args of a call:
        pixels: uint8 [B, S, S, 3], RGB.
        text: float16 [N, D].

    Returns of a call:
        labels [B, S, S], uint8 up to 256 texts, else int32; float16 [B, S, S] their cosines.
    """

    def __init__(self, image: nn.Module, scoring: nn.Module):
        super().__init__()
        self.image, self.scoring = image, scoring

    def forward(self, pixels: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = pixels.permute(0, 3, 1, 2).half() * (2 / 255) - 1  # [B, 3, S, S]
        labels, best, _ = self.scoring(self.image(images), text)
        return labels.to(torch.uint8) if len(text) <= 256 else labels, best


class TorchRunner:
    """See `lseg.runner.Runner`.

    Args:
        weights: as `--weights`.
        text_onnx: another CLIP text encoder, run by ONNX Runtime.
        device: "cpu", "cuda" or None for CUDA where it is.
        precision: "fp32", or "fp16" for the image encoder and the scoring in float16 (on a GPU).
        compiled: `torch.compile` the float16 pipeline, with CUDA graphs.
    """

    callers, features_at = 1, None

    def __init__(
        self,
        weights: str,
        text_onnx: Path | None = None,
        device: str | None = None,
        precision: str = "fp32",
        compiled: bool = False,
    ):
        loaded = checkpoint.load(weights)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.image = checkpoint.load_image_encoder(loaded).to(self.device)
        self.scoring = Similarity().eval()
        self.image_size = self.image.config.image_size
        self.pipeline = self._pinned = None
        if precision == "fp16":
            self.pipeline = HalfPipeline(self.image.half(), self.scoring)
            if compiled:
                # Each pair of shapes for itself: code for any shape is slower and has no CUDA graph.
                self.pipeline = torch.compile(self.pipeline, mode="reduce-overhead", dynamic=False)
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.text_encoder = None if text_onnx else loaded.sha256
        if text_onnx:
            from lseg.run_onnxruntime import TextSession

            self.text_session = TextSession(text_onnx, self.image.config.embedding)
        else:
            self.text_session = None
            self.text = checkpoint.load_text_encoder(loaded).to(self.device)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.identity = Identity(f"PyTorch {torch.__version__}{' compiled' if compiled else ''}", name, precision)

    @torch.inference_mode()
    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        if self.text_session:
            return self.text_session(tokens)
        parts = [
            self.text(torch.from_numpy(tokens[i : i + TEXTS_A_RUN]).to(self.device))
            for i in range(0, len(tokens), TEXTS_A_RUN)
        ]
        return torch.cat(parts).cpu().numpy()

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self._embed(normalise(pixels)).float().cpu().numpy()

    @torch.no_grad()
    def embed(self, pixels: np.ndarray) -> torch.Tensor:
        return self._encode(normalise(pixels))  # a plain tensor, which others may train with

    @torch.inference_mode()
    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        if self.pipeline is None or len(pixels) * len(text) > PIPELINE_SCORES:
            return segment_in_stages(pixels, text, self._embed, self._score)
        timings = Timings()
        # One call does it all: its time counts to encode_image.
        labels, cosines = timings.measure("encode_image", lambda: self._run_pipeline(pixels, text, best))
        timings.milliseconds.update({"preprocess": 0.0, "similarity": 0.0})
        return Segmentation(labels, cosines, timings)

    @torch.inference_mode()
    def scores(self, images: np.ndarray, text: np.ndarray) -> np.ndarray:
        return self.scoring(self._embed(images), self._text(text))[2].float().cpu().numpy()

    def label_windows(
        self, photo: np.ndarray, text: np.ndarray, how: Inference, best: bool, timings: Timings
    ) -> tuple[np.ndarray, np.ndarray]:
        return label_windows(self.scores, self.image_size, photo, text, how, timings)

    @torch.inference_mode()
    def _embed(self, images: np.ndarray) -> torch.Tensor:
        return self._encode(images)

    def _encode(self, images: np.ndarray) -> torch.Tensor:
        embeddings = self.image(torch.from_numpy(images).to(self.device, self.dtype))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return embeddings

    @torch.inference_mode()
    def _score(self, embeddings: torch.Tensor, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels, best, _ = self.scoring(embeddings, self._text(text))
        return labels.cpu().numpy(), best.float().cpu().numpy()

    def _run_pipeline(self, pixels: np.ndarray, text: np.ndarray, best: bool) -> tuple[np.ndarray, np.ndarray | None]:
        if self._pinned is None or self._pinned.shape != pixels.shape:
            self._pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self._pinned.numpy()[...] = pixels
        labels, cosines = self.pipeline(self._pinned.to(self.device, non_blocking=True), self._text(text))
        return labels.cpu().numpy(), cosines.float().cpu().numpy() if best else None

    def _text(self, text: np.ndarray) -> torch.Tensor:
        return torch.tensor(text).to(self.device, self.dtype)

    def close(self) -> None:
        self.image = self.text = self.pipeline = None

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
