"""ONNX files: written whole or not at all, and carrying what made them. No torch here."""

from __future__ import annotations

import glob
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lseg.errors import UserError, short
from lseg.files import locked_folder, unfinished
from lseg.tensorfile import sha256_once
from lseg.weights import resolve

if TYPE_CHECKING:
    import onnx

TEXT_ONNX, IMAGE_ONNX, SIMILARITY_ONNX = "clip_textual.onnx", "lseg.onnx", "similarity.onnx"  # in their folder
ROOT = Path(__file__).resolve().parent.parent
PREFIX = "lseg."  # of every metadata key that is ours
FORMAT = 1  # of what exported files compute and how they say so: raised when an older file no longer serves
LIMIT = 2**31 - 2**24  # bytes of weights: protobuf stops at 2 GiB, graph included; more go to a file beside it


def write_onnx(model: onnx.ModelProto, path: Path, metadata: dict[str, object], limit: int = LIMIT) -> Path:
    """Writes `model` with `metadata` (JSON values) to `path`.

    The file appears under its name only when it is complete. Weights beyond `limit` bytes go to one file beside it,
    whose name is new each time, so that an older model never meets newer weights.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    import onnx

    del model.metadata_props[:]
    for key, value in {**metadata, **({"format": FORMAT} if metadata else {})}.items():
        model.metadata_props.add(key=PREFIX + key, value=json.dumps(value))
    data, orphan = "", None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path.parent) as folder:
            part = folder / path.name
            if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > limit:
                data = f"{path.name}.{os.urandom(6).hex()}.data"
                onnx.save(model, part, save_as_external_data=True, location=data, size_threshold=1024)
            else:
                onnx.save(model, part)
            with locked_folder(path.parent):
                if data:
                    orphan = path.with_name(data)
                    os.replace(part.with_name(data), orphan)
                os.replace(part, path)
                orphan = None
                for file in data_files(path):
                    if file.name != data:  # an older model's
                        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): choose another folder") from error
    finally:
        if orphan:
            orphan.unlink(missing_ok=True)
    return path


def data_files(path: Path) -> list[Path]:
    """The files beside an ONNX file that `write_onnx` wrote its weights to."""
    return list(path.parent.glob(f"{glob.escape(path.name)}.*.data"))


def parse_metadata(properties: dict[str, str]) -> dict[str, object]:
    """The metadata that `write_onnx` wrote, from a file's own properties; empty for a file of another maker."""
    try:
        return {k.removeprefix(PREFIX): json.loads(v) for k, v in properties.items() if k.startswith(PREFIX)}
    except (ValueError, RecursionError):  # it only looks like ours
        return {}


def check_weights(path: Path, metadata: dict[str, object], kind: str, digest: str, remedy: str) -> None:
    """Checks that a file is `kind` and was exported from the weights asked for.

    Raises:
        UserError: it is another model, or comes from other weights; the sentence ends with `remedy`.
    """
    if metadata.get("kind") != kind:
        found = (
            f"holds '{str(metadata['kind'])[:80]}', not '{kind}'" if "kind" in metadata else "is another project's file"
        )
        raise UserError(f"{path} {found}: {remedy}")
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was exported by another version of this project: {remedy}")
    if metadata.get("weights_sha256") != digest:
        name = str(metadata.get("weights", "unknown"))[:80]
        raise UserError(f"{path} was exported from other weights ({name}) than asked for: {remedy}")


def sizes(path: Path, metadata: dict[str, object], remedy: str) -> dict[str, int]:
    """The image encoder's sizes, as its metadata has them; UserError, ending in `remedy`, where it lacks one."""
    config = metadata.get("image_config")
    wanted = ("image_size", "patch_size", "embedding")
    if not isinstance(config, dict) or not all(isinstance(config.get(k), int) and config[k] > 0 for k in wanted):
        raise UserError(f"{path} does not tell the sizes of its model: {remedy}")
    return config


def check_text(
    path: Path, metadata: dict[str, object], image_metadata: dict[str, object], digest: str, remedy: str
) -> None:
    """`check_weights` for a text encoder; CLIP's own serves weights that hold none.

    Args:
        path: the text encoder's file.
        metadata: of that file.
        image_metadata: of the image encoder's file, which says whether its weights hold a text encoder.
        digest: SHA-256 of the weights asked for.
        remedy: how a UserError ends.
    """
    if image_metadata.get("text_config") is None:
        remedy = remedy_for("clip_onnx_export.py", "openai", path.parent)
        if metadata.get("source") == "clip":
            digest = str(metadata.get("weights_sha256"))
    check_weights(path, metadata, "clip_textual", digest, remedy)


def checked_image(folder: Path, weights: str) -> tuple[str, dict[str, object]]:
    """The SHA-256 of weights, and the metadata of the image encoder in a folder, which is theirs.

    Raises:
        UserError: the file is missing, damaged, or of other weights.
    """
    digest, metadata = sha256_once(resolve(weights)), read_metadata(folder / IMAGE_ONNX)
    remedy = remedy_for("lseg_export.py", weights, folder)
    check_weights(folder / IMAGE_ONNX, metadata, "lseg", digest, remedy)
    sizes(folder / IMAGE_ONNX, metadata, remedy)
    return digest, metadata


def checked_text(folder: Path, weights: str, digest: str, image_metadata: dict[str, object]) -> dict[str, object]:
    """The same of the text encoder: its metadata; `digest` and `image_metadata` as `checked_image` gives them."""
    metadata = read_metadata(folder / TEXT_ONNX)
    remedy = remedy_for("clip_onnx_export.py", weights, folder)
    check_text(folder / TEXT_ONNX, metadata, image_metadata, digest, remedy)
    return metadata


def read_metadata(path: Path) -> dict[str, object]:
    """The metadata of an ONNX file, without its external weights; UserError where it is missing or damaged."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: export it with 'python lseg_export.py'") from None
    except Exception as error:  # protobuf has its own errors
        raise UserError(f"{path} is damaged or cut short: export it again") from error
    return parse_metadata({entry.key: entry.value for entry in model.metadata_props})


def remedy_for(script: str, weights: str, folder: Path) -> str:
    """The command that exports the right file, as it works from the current directory."""
    words = ["python", str(short(ROOT / script)), "--weights", weights]
    if folder.resolve() != (ROOT / "onnx").resolve():
        words += ["--output", str(folder)]
    return f"run '{shlex.join(words)}'"
