"""Asks a Triton server for a photo's labels, by the models that `enginerun.py --export-triton DIR` writes.

    tritonserver --model-repository=DIR
    python demo/triton_client.py street.jpg --labels "car, road, sky, other" --url localhost:8001

The words are embedded once, by the model lseg_text, and sent with each photo to lseg_labels. The ensemble lseg takes
tokens in their place, for who has new words for every photo. Needs `pip install "tritonclient[grpc]"`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from lseg.errors import Parser, UserError, run  # noqa: E402
from lseg.recipes import LABELS_A_PASS  # noqa: E402


def ask(client: Any, model: str, tensors: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
    """One request of a `tritonclient.grpc.InferenceServerClient`; raises UserError where the server refuses it."""
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException, np_to_triton_dtype

    inputs = []
    for name, array in tensors.items():
        inputs.append(grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    try:
        answer = client.infer(model, inputs, outputs=[grpc.InferRequestedOutput(name) for name in outputs])
    except InferenceServerException as error:
        raise UserError(f"the server did not answer for {model} ({error.message()}): check --url") from None
    return [answer.as_numpy(name) for name in outputs]


def embed(client: Any, words: Sequence[str]) -> np.ndarray:
    """Words' embeddings, float32 [1, N, D]: keep them, and send them with every photo."""
    from lseg.tokenizer import Tokenizer

    if len(words) > LABELS_A_PASS:
        raise UserError(f"{len(words)} labels are more than the served model tells apart: give at most {LABELS_A_PASS}")
    return ask(client, "lseg_text", {"tokens": Tokenizer()(list(words))[None]}, ["text"])[0]


def segment(client: Any, photo: np.ndarray, text: np.ndarray, size: int = 480) -> tuple[np.ndarray, np.ndarray]:
    """A photo uint8 [H, W, 3], RGB, and `embed`'s words to labels uint8 [H, W] and their cosines float32 [H, W]."""
    from lseg.image import labels_to_photo, to_pixels

    found = ask(client, "lseg_labels", {"pixels": to_pixels(photo, size)[None], "text": text}, ["labels", "best"])
    height, width = photo.shape[:2]
    return labels_to_photo(found[0][0], width, height), labels_to_photo(found[1][0], width, height)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", default=str(ROOT / "image" / "temple.jpg"))
    parser.add_argument("--labels", default="sky, building, tree, other")
    parser.add_argument("--url", default="localhost:8001", help="of the server's gRPC port")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    from lseg.draw import shares
    from lseg.image import read_image
    from lseg.labels import parse_labels

    try:
        import tritonclient.grpc as grpc
    except ImportError:
        raise UserError("tritonclient is not installed: run 'pip install \"tritonclient[grpc]\"'") from None
    client, names = grpc.InferenceServerClient(args.url), parse_labels(args.labels).names
    labels, _ = segment(client, read_image(args.photo), embed(client, names))
    for name, share in zip(names, shares(labels, len(names)), strict=True):
        print(f"{name}: {share:.1%}")


if __name__ == "__main__":
    run(lambda: main(parse_args()))
