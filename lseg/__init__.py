"""LSeg: language-driven semantic segmentation, exported to ONNX and run by PyTorch, ONNX Runtime or TensorRT."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lseg.errors import UserError
    from lseg.segmenter import LabelMap, Segmenter

# ONNX Runtime (1.31 and 1.32, for two) counts its uses and keeps an identifier in the home folder, unless told before
# its import not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["LabelMap", "Segmenter", "UserError"]


def __getattr__(name: str) -> object:
    """`from lseg import Segmenter`, imported when it is asked for: the scripts need none of it to print their help."""
    if name in __all__:
        from lseg import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module 'lseg' has no attribute '{name}'")
