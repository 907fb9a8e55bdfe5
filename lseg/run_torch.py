"""LSeg on PyTorch in float32: the reference that the other backends are held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lseg import checkpoint
from lseg.image import normalise
from lseg.runner import Segmentation, Timings, merge_passes
from lseg.similarity import Similarity


class TorchRunner:
    """See `lseg.runner.Runner`."""

    def __init__(self, weights: str, text_onnx: Path | None = None, device: str | None = None):
        loaded = checkpoint.load(weights)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.image = checkpoint.load_image_encoder(loaded).to(self.device)
        self.scoring = Similarity().eval()
        self.image_size = self.image.config.image_size
        if text_onnx:
            from lseg.run_onnxruntime import TextSession

            self.text_session = TextSession(text_onnx, self.image.config.embedding)
        else:
            self.text_session = None
            self.text = checkpoint.load_text_encoder(loaded).to(self.device)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.description = f"PyTorch {torch.__version__} ({name}), float32"

    @torch.inference_mode()
    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        if self.text_session:
            return self.text_session(tokens)
        parts = [self.text(torch.from_numpy(tokens[i : i + 256]).to(self.device)) for i in range(0, len(tokens), 256)]
        return torch.cat(parts).cpu().numpy()

    @torch.inference_mode()
    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self.image(torch.from_numpy(normalise(pixels)).to(self.device)).cpu().numpy()

    @torch.inference_mode()
    def segment(self, pixels: np.ndarray, text: np.ndarray) -> Segmentation:
        timings = Timings()
        images = timings.measure("preprocess", lambda: normalise(pixels))
        embeddings = timings.measure("encode_image", lambda: self._embed(images))
        score = lambda part: self._score(embeddings, part)  # noqa: E731
        labels, best = timings.measure("similarity", lambda: merge_passes(text, len(pixels), score))
        return Segmentation(labels, best, timings)

    def _embed(self, images: np.ndarray) -> torch.Tensor:
        embeddings = self.image(torch.from_numpy(images).to(self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return embeddings

    def _score(self, embeddings: torch.Tensor, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels, best, _ = self.scoring(embeddings, torch.from_numpy(text).to(self.device))
        return labels.cpu().numpy(), best.cpu().numpy()

    def close(self) -> None:
        self.image = self.text = None

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
