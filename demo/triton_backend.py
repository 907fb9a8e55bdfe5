"""What `demo/triton_server.py` gives to Triton as its backend "onnxruntime": each model's file, in ONNX Runtime on CPU.

Triton runs it in a process of its own for each model, with the `triton_python_backend_utils` of its Python backend.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """The class of this name is what Triton looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs = [one["name"] for one in config["input"]]
        self.outputs = [one["name"] for one in config["output"]]
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.enable_mem_pattern = False  # else each new shape keeps a block of memory for good
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Requests that Triton put together, [B, ...] each and alike after that, as one run; a response for each."""
        parts = {
            name: [triton.get_input_tensor_by_name(one, name).as_numpy() for one in requests] for name in self.inputs
        }
        try:
            made = self.session.run(self.outputs, {name: np.concatenate(arrays) for name, arrays in parts.items()})
        except Exception as error:  # ONNX Runtime has a class for each of its codes
            return [triton.InferenceResponse(error=triton.TritonError(str(error))) for _ in requests]
        ends = np.cumsum([len(array) for array in parts[self.inputs[0]]])[:-1]
        split = [np.split(array, ends) for array in made]
        return [
            triton.InferenceResponse([triton.Tensor(*pair) for pair in zip(self.outputs, arrays, strict=True)])
            for arrays in zip(*split, strict=True)
        ]
