"""Times PyTorch on a GPU the ways LSeg is usually run, at the official size with random weights, and writes JSON.

    python tests/gpu/baseline_torch.py log/gpu_torch.json

From a uint8 image in host memory to a label map in host memory, 8 labels, batch 1; and the first TensorRT port's way:
512 x 480 x 480 float32 embeddings copied to pageable host memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from lseg.benchmark import machine, summarise  # noqa: E402
from lseg.export import FullResolution  # noqa: E402
from lseg.model import LSegImageEncoder  # noqa: E402
from lseg.similarity import Similarity  # noqa: E402

FORMS = (("float32", torch.float32, False), ("tf32", torch.float32, True), ("float16", torch.float16, False))


class Pipeline(torch.nn.Module):
    """uint8 [B, S, S, 3] and texts to labels uint8 [B, S, S]."""

    def __init__(self, encoder: LSegImageEncoder, dtype: torch.dtype):
        super().__init__()
        self.encoder, self.similarity, self.dtype = encoder.to(dtype), Similarity(), dtype

    def forward(self, pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        images = pixels.permute(0, 3, 1, 2).to(self.dtype) * (2 / 255) - 1
        return self.similarity(self.encoder(images), text.to(self.dtype))[0].to(torch.uint8)


def timed(call, repeats: int) -> dict:
    taken = []
    for turn in range(repeats + 10):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if turn >= 10:
            taken.append((time.perf_counter() - start) * 1e3)
    return summarise(taken)


@torch.inference_mode()
def main(output: Path) -> None:
    torch.manual_seed(0)
    report: dict = {"machine": machine(), "weights": "random, ViT-L/16", "milliseconds": {}}
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 480, 480, 3), dtype=np.uint8)).pin_memory()
    text = torch.nn.functional.normalize(torch.randn(150, 512), dim=1).cuda()

    def record(name: str, call, repeats: int = 200) -> None:
        report["milliseconds"][name] = timed(call, repeats)
        print(name, {k: round(v, 3) for k, v in report["milliseconds"][name].items()}, flush=True)
        output.write_text(json.dumps(report, indent=1) + "\n")

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    product = timed(lambda: a @ b, 30)["median"]
    report["float16_tflops_of_a_large_product"] = 2 * 8192**3 / product / 1e9

    def labels_on_host(model, batch: int, count: int):
        return lambda: model(pixels[:batch].cuda(non_blocking=True), text[:count].contiguous()).cpu()

    for name, dtype, tf32 in FORMS:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.manual_seed(0)
        pipeline = Pipeline(LSegImageEncoder().eval().cuda(), dtype)
        record(f"eager {name}", labels_on_host(pipeline, 1, 8))
    compiled = torch.compile(pipeline, mode="reduce-overhead")  # the last form: float16
    for batch, count in ((1, 8), (1, 150), (8, 8)):
        record(f"compiled float16, batch {batch}, {count} labels", labels_on_host(compiled, batch, count))
    full = FullResolution(LSegImageEncoder().eval().cuda())
    image = torch.randn(1, 3, 480, 480)
    record("first port's way, float32: 472 MB to pageable memory", lambda: full(image.cuda()).cpu(), 10)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
