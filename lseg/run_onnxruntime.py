"""LSeg on ONNX Runtime: CUDA where the installed build has it, else the CPU. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort

from lseg import tensorfile
from lseg.cuda import gpu_name
from lseg.device_array import DeviceArray
from lseg.errors import UserError
from lseg.image import normalise
from lseg.onnx_file import (
    IMAGE_ONNX,
    SIMILARITY_ONNX,
    TEXT_ONNX,
    check_text,
    check_weights,
    parse_metadata,
    remedy_for,
)
from lseg.runner import TEXTS_A_RUN, Identity, Segmentation, Timings, segment_in_stages
from lseg.weights import REMEDY, resolve
from lseg.windows import Inference, label_windows

TEXT_REMEDY = "give CLIP ViT-B/32's text encoder, or leave --text-onnx out"


def open_session(path: Path, remedy: str, providers: list | None = None) -> ort.InferenceSession:
    """Opens an ONNX file; raises UserError, ending in `remedy`, where it is missing, cut short or no ONNX file."""
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}: {remedy}")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors come as exceptions; the rest is not for the user
    # A plan of memory is kept for each shape, and run in a block of its own: each number of images and of labels would
    # take new memory, which is never given back.
    options.enable_mem_pattern = False
    options.intra_op_num_threads = int(os.environ.get("LSEG_THREADS", 0))  # 0: one a core; several processes share them
    try:
        providers = providers or default_providers()
        # Where there is nothing to fall back to, it would print of it and try the same again.
        session = ort.InferenceSession(path, options, providers=providers, enable_fallback=len(providers) > 1)
        _metadata(session), [value.name for value in (*session.get_inputs(), *session.get_outputs())]  # are they text?
        return session
    except Exception as error:  # ONNX Runtime has a class of its own for each cause
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is damaged, cut short or no ONNX file ({reason}): {remedy}") from error


def default_providers() -> list:
    """CUDA in full float32 (TF32 off), where this build of ONNX Runtime has it, then the CPU."""
    providers: list = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in ort.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    return providers


def _metadata(session: ort.InferenceSession) -> dict[str, object]:
    return parse_metadata(session.get_modelmeta().custom_metadata_map)


def _check_ends(
    path: Path, session: ort.InferenceSession, inputs: dict[str, int], outputs: dict[str, int], remedy: str
) -> None:
    """UserError unless a graph takes and gives exactly these tensors, by name and rank, the image's of fixed size."""
    for ends, wanted in ((session.get_inputs(), inputs), (session.get_outputs(), outputs)):
        found = {value.name: len(value.shape) for value in ends}
        sizes = [value.shape[1:] for value in ends if value.name in ("image", "embeddings") and "image" in inputs]
        if found != wanted or not all(isinstance(size, int) and size > 0 for size in sum(sizes, [])):
            raise UserError(f"{path} is no file that lseg_export.py wrote, for its inputs and outputs differ: {remedy}")


class TextSession:
    """A CLIP text encoder as ONNX: this project's, or a ready-made one (integer tokens in, vectors out)."""

    def __init__(
        self, path: Path, dimension: int | None = None, remedy: str = TEXT_REMEDY, providers: list | None = None
    ):
        self.session = open_session(path, remedy, providers)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        types = {"tensor(int32)": np.int32, "tensor(int64)": np.int64}
        if not outputs or len(inputs) != 1 or len(shape := inputs[0].shape) == 1 or len(shape) == 3:
            raise UserError(f"{path} is no text encoder, which takes one input of tokens [N, 77]: {remedy}")
        if len(shape) > 3:
            raise UserError(f"{path} takes images, not tokens, so it is an image encoder: {remedy}")
        if inputs[0].type not in types:
            raise UserError(f"{path} takes {inputs[0].type}, not int32 or int64 tokens: {remedy}")
        length = shape[-1] if shape else None  # ONNX Runtime gives [] where a file does not say
        if isinstance(length, int) and length != 77:
            raise UserError(f"{path} takes rows of {length} tokens, and CLIP's have 77: {remedy}")
        self.path, self.dimension, self.remedy = path, dimension, remedy
        self.input, self.dtype, self.output = inputs[0].name, types[inputs[0].type], outputs[0].name
        self.one_by_one = shape[:1] == [1]

    @property
    def metadata(self) -> dict[str, object]:
        return _metadata(self.session)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """tokens int32 [N, 77] to unit vectors float32 [N, D]; raises UserError where the vectors are unusable."""
        rows = tokens.astype(self.dtype)
        step = 1 if self.one_by_one else TEXTS_A_RUN
        try:
            parts = [
                self.session.run([self.output], {self.input: rows[i : i + step]})[0] for i in range(0, len(rows), step)
            ]
            text = np.concatenate(parts)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{self.path} does not take CLIP's tokens [{len(rows)}, 77] ({reason}): {self.remedy}"
            ) from error
        if text.ndim != 2 or len(text) != len(rows) or text.shape[1] != (self.dimension or text.shape[1]):
            wanted = f"[{len(rows)}, {self.dimension or 'D'}]"
            raise UserError(f"{self.path} gives vectors of shape {list(text.shape)}, not {wanted}: {self.remedy}")
        text = text.astype(np.float64)  # squares of large numbers stay finite
        length = np.linalg.norm(text, axis=1, keepdims=True)
        if not np.isfinite(length).all() or (length == 0).any():
            raise UserError(f"{self.path} gives vectors that are zero or not finite: {self.remedy}")
        return (text / length).astype(np.float32)


class OnnxRuntimeRunner:
    """See `lseg.runner.Runner`.

    Args:
        weights: as `--weights`.
        folder: of the exported ONNX files.
        text_onnx: another CLIP text encoder.
        device: "cpu", or None for CUDA where the installed build has it.
    """

    callers, features_at = 1, None

    def __init__(self, weights: str, folder: Path, text_onnx: Path | None = None, device: str | None = None):
        self._providers = default_providers() if device != "cpu" else ["CPUExecutionProvider"]
        sha256 = tensorfile.sha256_once(resolve(weights))
        self.remedy = remedy_for("lseg_export.py", weights, folder)
        try:
            self.image = self._open(folder / IMAGE_ONNX, "lseg", sha256)
            self.scoring = self._open(folder / SIMILARITY_ONNX, "similarity", sha256)
            _check_ends(folder / IMAGE_ONNX, self.image, {"image": 4}, {"embeddings": 4}, self.remedy)
            scores = {"labels": 3, "best": 3, "scores": 4}
            _check_ends(folder / SIMILARITY_ONNX, self.scoring, {"embeddings": 4, "text": 2}, scores, self.remedy)
            self.image_size = self.image.get_inputs()[0].shape[2]
            dimension = self.image.get_outputs()[0].shape[1]
            self.text_encoder = None
            if text_onnx is None:
                path, remedy = folder / TEXT_ONNX, remedy_for("clip_onnx_export.py", weights, folder)
                self.text = TextSession(path, dimension, remedy, self._providers)
                check_text(path, self.text.metadata, _metadata(self.image), sha256, remedy)
                self.text_encoder = str(self.text.metadata["weights_sha256"])
            else:
                self.text = TextSession(text_onnx, dimension, providers=self._providers)
        except UserError:
            if importlib.util.find_spec("torch"):
                tensorfile.read(resolve(weights), REMEDY)  # what is no checkpoint at all is better told so
            raise
        on_gpu = "CUDAExecutionProvider" in self.image.get_providers()
        self.device = "cuda" if on_gpu else "cpu"
        self.identity = Identity(f"ONNX Runtime {ort.__version__}", gpu_name() if on_gpu else "CPU")

    def _open(self, path: Path, kind: str, sha256: str) -> ort.InferenceSession:
        session = open_session(path, self.remedy, self._providers)
        check_weights(path, _metadata(session), kind, sha256, self.remedy)
        return session

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        return self.text(tokens)

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return self._embed(normalise(pixels)).numpy()

    def embed(self, pixels: np.ndarray) -> DeviceArray:
        value = self._embed(normalise(pixels))
        gpu = None if value.device_name() == "cpu" else 0
        return DeviceArray(value.data_ptr(), tuple(value.shape()), np.float32, value, gpu)

    def segment(self, pixels: np.ndarray, text: np.ndarray, best: bool = False) -> Segmentation:
        return segment_in_stages(pixels, text, self._embed, self._score)

    def scores(self, images: np.ndarray, text: np.ndarray) -> np.ndarray:
        return self._scoring(self._embed(images), text, ("scores",))[0]

    def label_windows(
        self, photo: np.ndarray, text: np.ndarray, how: Inference, best: bool, timings: Timings
    ) -> tuple[np.ndarray, np.ndarray]:
        return label_windows(self.scores, self.image_size, photo, text, how, timings)

    def _embed(self, images: np.ndarray) -> ort.OrtValue:
        """float32 [B, 3, S, S] to embeddings that stay on the device."""
        fixed = self.image.get_inputs()[0].shape[0]
        if isinstance(fixed, int) and fixed != len(images):
            raise UserError(
                f"the exported image encoder takes {fixed} image(s) at a time, not {len(images)}: {self.remedy}"
            )
        binding = self.image.io_binding()
        binding.bind_cpu_input("image", images)
        binding.bind_output("embeddings", self.device)
        self._run(self.image, binding)
        binding.synchronize_outputs()
        return binding.get_outputs()[0]

    def _score(self, embeddings: ort.OrtValue, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Copies: the arrays lie in ONNX Runtime's arena, which whoever keeps a label map would break up for good.
        labels, best = (array.copy() for array in self._scoring(embeddings, text, ("labels", "best")))
        return labels, best

    def _scoring(self, embeddings: ort.OrtValue, text: np.ndarray, outputs: tuple[str, ...]) -> list[np.ndarray]:
        binding = self.scoring.io_binding()
        binding.bind_ortvalue_input("embeddings", embeddings)
        binding.bind_cpu_input("text", np.ascontiguousarray(text))
        for name in outputs:
            binding.bind_output(name)
        self._run(self.scoring, binding)
        return [value.numpy() for value in binding.get_outputs()]

    def _run(self, session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has a class of its own for each cause
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"ONNX Runtime cannot run an exported file ({reason}): free memory, or {self.remedy}"
            ) from None

    def close(self) -> None:
        self.image = self.scoring = self.text = None

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
