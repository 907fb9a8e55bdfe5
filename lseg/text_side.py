"""A model's text encoder alone, where the image encoder runs elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from lseg.opening import Model, check_before_export, export_missing
from lseg.runner import choose_backend


class TextSide(NamedTuple):
    """See `lseg.runner.Runner` for the three."""

    encode_text: Callable[[np.ndarray], np.ndarray]
    text_encoder: str | None
    image_size: int


@contextmanager
def open_text_side(backend: str, model: Model) -> Iterator[TextSide]:
    """Opens the text encoder on the CPU, and exports what is missing of all files first, for whoever runs the rest.

    Args:
        backend: what the image encoder will run on; "torch" needs no exported files.
        model: which LSeg.

    Raises:
        UserError: files are missing and cannot be made, or do not belong together.
    """
    from lseg.onnx_file import TEXT_ONNX, check_text, checked_image, remedy_for

    if choose_backend(backend) == "torch":
        from lseg.run_torch import TorchRunner

        with TorchRunner(model.weights, model.text_onnx) as runner:
            yield TextSide(runner.encode_text, runner.text_encoder, runner.image_size)
        return
    from lseg.run_onnxruntime import TextSession

    check_before_export(model, [])
    export_missing(model)
    digest, image = checked_image(model.onnx, model.weights)
    size, dimension = (image["image_config"][key] for key in ("image_size", "embedding"))
    if model.text_onnx:
        text = TextSession(model.text_onnx, dimension, providers=["CPUExecutionProvider"])
        yield TextSide(text, None, size)
        return
    path, remedy = model.onnx / TEXT_ONNX, remedy_for("clip_onnx_export.py", model.weights, model.onnx)
    text = TextSession(path, dimension, remedy, ["CPUExecutionProvider"])
    check_text(path, text.metadata, image, digest, remedy)
    yield TextSide(text, str(text.metadata["weights_sha256"]), size)
