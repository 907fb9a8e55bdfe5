"""Writes what PyTorch in float32 makes of a data set, for `check_tensorrt.py` to agree with.

python tests/gpu/make_reference.py camvid/test REF.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from lseg.dataset import find_dataset  # noqa: E402
from lseg.image import read_image, to_pixels  # noqa: E402
from lseg.inference import label_photo  # noqa: E402
from lseg.run_torch import TorchRunner  # noqa: E402
from lseg.tokenizer import Tokenizer  # noqa: E402


def main(dataset: Path, output: Path) -> None:
    data = find_dataset(dataset)
    tokens = Tokenizer()(data.labels)
    rng = np.random.default_rng(7)
    random_text = rng.standard_normal((1000, 512)).astype(np.float32)
    random_text /= np.linalg.norm(random_text, axis=1, keepdims=True)
    with TorchRunner("demo") as runner:
        text = runner.encode_text(tokens)
        photos = [photo for photo, _ in data.pairs]
        labels = [runner.segment(to_pixels(read_image(photo))[None], text).labels[0] for photo in photos]
        temple = to_pixels(read_image(ROOT / "image" / "temple.jpg"))[None]
        whole = read_image(ROOT / "image" / "temple.jpg")
        modes = {mode: label_photo(runner, whole, random_text[:150], mode) for mode in ("window", "multiscale")}
        found = {n: runner.segment(temple, random_text[:n], best=True) for n in (1, 2, 8, 150, 1000)}
        np.savez_compressed(
            output,
            tokens=tokens,
            text=text,
            names=np.array([photo.name for photo in photos]),
            labels=np.array(labels, np.uint8),
            photo_labels=runner.segment(temple, text).labels[0].astype(np.uint8),
            photo_embeddings=runner.encode_image(temple)[0][:, ::8, ::8],
            random_text=random_text,
            **{f"{mode}_labels": labels.astype(np.uint8) for mode, (labels, _) in modes.items()},
            **{f"{mode}_best": best.astype(np.float16) for mode, (_, best) in modes.items()},
            **{f"random_labels_{n}": each.labels[0].astype(np.uint16) for n, each in found.items()},
            **{f"random_best_{n}": each.best[0].astype(np.float16) for n, each in found.items()},
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
