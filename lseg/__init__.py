"""LSeg: language-driven semantic segmentation, exported to ONNX and run by PyTorch, ONNX Runtime or TensorRT."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lseg.segmenter import LabelMap, Segmenter

__version__ = "0.1.0"
__all__ = ["LabelMap", "Segmenter"]


def __getattr__(name: str) -> object:
    """`from lseg import Segmenter`, imported when it is asked for: the scripts need none of it to print their help."""
    if name in __all__:
        from lseg import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module 'lseg' has no attribute '{name}'")
