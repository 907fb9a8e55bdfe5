"""Times PyTorch on a GPU the ways that testlseg.py leaves out, and the first TensorRT port's way; writes JSON.

    python tests/gpu/baseline_torch.py WEIGHTS log/gpu_torch.json

From a uint8 image in host memory to a label map in host memory, 8 labels, batch 1: eager in TF32 and in float16. And as
the first port did it: 512 x 480 x 480 float32 embeddings copied to pageable host memory, nothing scored yet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from lseg.benchmark import gpu, interleaved, machine, segment_call  # noqa: E402
from lseg.export import FullResolution  # noqa: E402
from lseg.measure import unit_vectors  # noqa: E402
from lseg.run_torch import TorchRunner  # noqa: E402
from lseg.runner import Timings  # noqa: E402


@torch.inference_mode()
def main(weights: str, output: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 480, 480, 3), dtype=np.uint8)
    image, text = torch.randn(1, 3, 480, 480), unit_vectors(8, 512)
    exact, half = TorchRunner(weights), TorchRunner(weights, precision="fp16")
    full = FullResolution(exact.image)

    def tf32():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        taken = segment_call(exact, pixels, text)()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return taken

    def first_port():
        timings = Timings()
        timings.measure("total", lambda: full(image.cuda()).cpu())
        return timings.milliseconds

    found, errors = interleaved({"eager tf32": tf32, "eager fp16": segment_call(half, pixels, text)}, 20, 200)
    slow, more_errors = interleaved({"first port's way, fp32": first_port}, 3, 20)
    report = {"machine": machine(), "weights": Path(weights).stem, "batch": 1, "labels": 8}
    report |= {"milliseconds": found | slow, "errors": errors | more_errors}
    report["machine"] |= {"gpu": gpu()}  # its clocks when it has been at work
    output.write_text(json.dumps(report, indent=1) + "\n")
    for name, stages in report["milliseconds"].items():
        print(name, {stage: round(times["median"], 3) for stage, times in stages.items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
