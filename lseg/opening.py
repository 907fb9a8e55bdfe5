"""From weights to an open backend: what is missing of the exported files is made first."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from lseg.errors import UserError
from lseg.onnx_file import IMAGE_ONNX, SIMILARITY_ONNX, TEXT_ONNX

if TYPE_CHECKING:
    from lseg.runner import EngineOptions, Runner
    from lseg.sources import Photo

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Model:
    """Which LSeg, and where its exported files are.

    Attributes:
        weights: "demo", or a path: see the README.
        onnx: folder of the exported files.
        text_onnx: another CLIP text encoder as ONNX, in place of the weights' own.
        again: export what is there already, too.
        quiet: export without a word.
    """

    weights: str = "demo"
    onnx: Path = ROOT / "onnx"
    text_onnx: Path | None = None
    again: bool = False
    quiet: bool = False

    def files(self) -> dict[str, str]:
        """The exported files that a run needs, each with the script that writes it."""
        # The text encoder first: weights without one are refused in a moment.
        files = {TEXT_ONNX: "clip_onnx_export", IMAGE_ONNX: "lseg_export", SIMILARITY_ONNX: "lseg_export"}
        if self.text_onnx:
            del files[TEXT_ONNX]
        return files

    def missing(self) -> dict[str, str]:
        """Those of the files that are to be exported."""
        return {name: script for name, script in self.files().items() if self.again or not (self.onnx / name).exists()}


def check_before_export(model: Model, photos: Sequence[Photo]) -> None:
    """Says what a moment can find out to be wrong before minutes of exporting, and before anything is written.

    Raises:
        UserError: the weights are not there, an exported file is of other weights, the text encoder given is none, or
            the only photo cannot be read.
    """
    from lseg.image import decode_image
    from lseg.onnx_file import check_weights, read_metadata, remedy_for
    from lseg.tensorfile import read, sha256_once
    from lseg.weights import REMEDY, resolve

    weights, missing = resolve(model.weights), model.missing()
    if model.again or not missing:
        return  # nothing is exported, or nothing stays that could be wrong: the runner will tell
    if len(photos) == 1:
        decode_image(photos[0].read(), photos[0].shown)
    if importlib.util.find_spec("torch"):
        read(weights, REMEDY)
    kinds = {IMAGE_ONNX: "lseg", SIMILARITY_ONNX: "similarity"}
    present = [name for name in kinds if name not in missing]
    digest = sha256_once(weights) if present else ""
    for name in present:
        remedy = remedy_for("lseg_export.py", model.weights, model.onnx)
        check_weights(model.onnx / name, read_metadata(model.onnx / name), kinds[name], digest, remedy)
    if model.text_onnx:
        from lseg.run_onnxruntime import TextSession

        TextSession(model.text_onnx)


def export_missing(model: Model) -> None:
    """Exports what is not there; this is the one step that needs torch."""
    missing = model.missing()
    if missing and not importlib.util.find_spec("torch"):
        raise UserError(
            f"{model.onnx / next(iter(missing))} is to be exported, and torch is not installed: run "
            "'./requirements.sh', or bring the ONNX files from where they were exported"
        )
    options = [f"--weights={model.weights}", f"--output={model.onnx}", *(["--quiet"] if model.quiet else [])]
    for name in dict.fromkeys(missing.values()):
        script = _script(name)
        script.main(script.parse_args(options))


def _script(name: str) -> ModuleType:
    """One of the scripts at the root, which need not be on Python's path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def open_backend(backend: str, model: Model, engines: EngineOptions, say: Callable[[str], object] = print) -> Runner:
    """Opens a backend on exported files; under "auto", where TensorRT cannot be used, the next one with a note.

    Raises:
        UserError: see `lseg.runner.open_runner`.
    """
    from lseg.runner import available_backends, choose_backend, open_runner

    chosen = choose_backend(backend)
    if chosen != "torch":
        export_missing(model)
    try:
        return open_runner(chosen, model.weights, model.onnx, model.text_onnx, engines)
    except UserError as error:
        others = [name for name in available_backends() if name != "tensorrt"]
        if backend != "auto" or chosen != "tensorrt" or not others:
            raise
        say(f"note: TensorRT is left out ({error})")
        return open_runner(others[0], model.weights, model.onnx, model.text_onnx)
