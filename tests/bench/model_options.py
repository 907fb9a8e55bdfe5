"""The options that say which LSeg a script measures."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def add_model_options(parser: argparse.ArgumentParser, backend: str = "auto") -> None:
    """Adds --backend, --weights, --onnx and --engines."""
    parser.add_argument("--backend", default=backend)
    parser.add_argument("--weights", default="demo")
    parser.add_argument("--onnx", type=Path, default=ROOT / "onnx")
    parser.add_argument("--engines", type=Path, default=ROOT / "engines")
