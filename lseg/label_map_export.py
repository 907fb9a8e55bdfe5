"""The label-map graph as a file: uint8 pixels and texts in, labels out, for other runtimes and for trtexec."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from lseg.checkpoint import Weights, load_image_encoder
from lseg.errors import UserError
from lseg.export import difference, versions, working_folder
from lseg.image import normalise, read_image, to_pixels
from lseg.onnx_file import read_metadata, write_onnx
from lseg.recipes import Recipe
from lseg.similarity import Similarity
from lseg.specs import PHOTO

BOUNDS = {"fp32": 1e-4, "fp16": 1e-2}  # of the cosines, relative
CHECKED_LABELS = 8


def export_label_map(weights: Weights, image_onnx: Path, precision: str, matmul: str, quiet: bool = False) -> Path:
    """Composes lseg_labels.onnx from the image encoder's file, and compares it with PyTorch before it stays.

    Args:
        weights: what the image encoder was exported from.
        image_onnx: lseg.onnx.
        precision: "fp32" or "fp16".
        matmul: "4d", "3d" or "2d" (one image at a time).
        quiet: without a word.

    Returns:
        the file: `pixels` uint8 [B, S, S, 3], RGB, and `text` float32 [N, D], unit length, N up to 256, to `labels`
        uint8 [B, S, S] and `best` float32 [B, S, S], their cosines.

    Raises:
        UserError: the cosines are off PyTorch's by more than the bound, or the file cannot be written.
    """
    import onnxruntime

    start = time.perf_counter()
    config = read_metadata(image_onnx)["image_config"]
    usual = (precision, matmul) == ("fp32", "4d")
    path = image_onnx.with_name("lseg_labels.onnx" if usual else f"lseg_labels_{precision}_{matmul}.onnx")
    model = Recipe(image_onnx.parent, config, precision, matmul).prepare("labels")
    size, dimension = config["image_size"], config["embedding"]
    rng = np.random.default_rng(0)
    text = rng.standard_normal((CHECKED_LABELS, dimension)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    pixels = to_pixels(read_image(PHOTO), size)[None]
    with torch.inference_mode():
        embeddings = load_image_encoder(weights)(torch.from_numpy(normalise(pixels)))
        _, best, _ = Similarity()(embeddings, torch.from_numpy(text))
    with working_folder(path) as folder:
        trial = write_onnx(model, folder / "trial.onnx", {})
        session = onnxruntime.InferenceSession(trial, providers=["CPUExecutionProvider"])
        off = difference(session.run(["best"], {"pixels": pixels, "text": text})[0], best.numpy())
        if not off <= BOUNDS[precision]:
            bound = f"{BOUNDS[precision]:.0e}"
            raise UserError(f"{path} was not written: its cosines are {off:.1e} off PyTorch's, more than {bound}")
        about = {"weights_sha256": weights.sha256, "image_config": config, "precision": precision, "matmul": matmul}
        write_onnx(model, path, {"kind": "labels", **about, "versions": versions()})
    if not quiet:
        mib, seconds = path.stat().st_size / 2**20, time.perf_counter() - start
        print(f"wrote {path}: {mib:.1f} MiB in {seconds:.1f} s; largest difference from PyTorch: best {off:.1e}")
    return path
