"""LSeg's weights: from a checkpoint's names and types to the models of this package, and back.

A checkpoint holds tensors under the official code's names: the official `demo_e200.ckpt` (a PyTorch Lightning pickle,
whose names begin with `net.`), a plain state dict, or this package's own safetensors, whose metadata holds the models'
sizes. Nothing here runs code from a file.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lseg import tensorfile
from lseg.errors import UserError
from lseg.files import unfinished
from lseg.model import LSegConfig, LSegImageEncoder
from lseg.text import CLIPTextEncoder, TextConfig
from lseg.weights import DEMO_WEIGHTS, OFFICIAL_ID, OFFICIAL_URL, REMEDY, resolve

CLIP_REMEDY = "give another copy of CLIP's ViT-B/32, or 'openai' to fetch it with open_clip"

# Where the models' parameters stand in the official code: level 0 here is its 1.
LEVEL_PREFIXES = {
    "reassemble.{}.readout.linear.": "pretrained.act_postprocess{}.0.project.0.",
    "reassemble.{}.project.": "pretrained.act_postprocess{}.3.",
    "reassemble.{}.resize.": "pretrained.act_postprocess{}.4.",
    "reassemble.{}.out.": "scratch.layer{}_rn.",
    "fusion.{}.skip_unit.": "scratch.refinenet{}.resConfUnit1.",
    "fusion.{}.unit.": "scratch.refinenet{}.resConfUnit2.",
    "fusion.{}.out_conv.": "scratch.refinenet{}.out_conv.",
}
IMAGE_PREFIXES = {"vit.": "pretrained.model.", "head.": "scratch.head1."} | {
    ours.format(level): official.format(level + 1) for ours, official in LEVEL_PREFIXES.items() for level in range(4)
}
CLIP_PREFIX = "clip_pretrained."
POSITIONS = "pretrained.model.pos_embed"
# In the official file and without effect on the image encoder: the ViT's final norm and classifier, the coarsest fusion
# block's residual unit for a skip that it does not have, and CLIP.
UNUSED = ("pretrained.model.norm.", "pretrained.model.head.", "scratch.refinenet4.resConfUnit1.", CLIP_PREFIX)
TEXT_TOWER = ("token_", "positional_embedding", "transformer.", "ln_final.", "text_projection")


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors under the official names (without `net.`), as stored, and the sizes of its models."""

    name: str  # the file's stem, or "demo"
    sha256: str
    image_config: LSegConfig
    text_config: TextConfig | None  # None: the file holds no text encoder
    tensors: dict[str, Tensor]
    path: Path


def load(path: str | Path) -> Weights:
    """Reads a checkpoint: the official Lightning pickle, a state dict (with or without `net.`), or safetensors.

    The tensors are views of the file. image_state_dict and text_state_dict check them against the models.

    Raises:
        UserError: missing, empty, cut short, a web page, not a checkpoint, or another model's checkpoint.
    """
    return _load(resolve(path), REMEDY)


def _load(path: Path, remedy: str) -> Weights:
    stored, metadata = tensorfile.read(path, remedy)
    tensors = {name.removeprefix("net."): tensor for name, tensor in stored.items()}
    if not any(name.startswith(("pretrained.", "scratch.")) for name in tensors):
        raise UserError(
            f"{path} holds {len(stored)} tensors but none of LSeg's (it has {tensorfile.listing(stored, 3)}; "
            f"LSeg has scratch.head1.weight): {remedy}"
        )
    image_config, text_config = LSegConfig(), TextConfig()
    try:
        if "image_config" in metadata:
            image_config = LSegConfig.from_dict(json.loads(metadata["image_config"]))
        if "text_config" in metadata:
            text_config = TextConfig.from_dict(json.loads(metadata["text_config"]))
        if metadata:
            with torch.device("meta"):
                LSegImageEncoder(image_config)
                CLIPTextEncoder(text_config)
    except Exception as error:  # numbers that do not go together fail wherever the model first meets them
        raise UserError(f"{path} describes its model wrongly ({_one_line(error)}): {remedy}") from error
    return Weights(
        name="demo" if path == DEMO_WEIGHTS else path.stem,
        sha256=tensorfile.sha256(path),
        image_config=image_config,
        text_config=text_config if _text_tower(tensors, CLIP_PREFIX) else None,
        tensors=tensors,
        path=path,
    )


def official_name(name: str) -> str:
    """The official name of an LSegImageEncoder parameter; raises KeyError where there is none."""
    for ours, official in IMAGE_PREFIXES.items():
        if name.startswith(ours):
            return official + name.removeprefix(ours)
    raise KeyError(name)


def to_official_names(image_state: dict[str, Tensor], text_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dicts of an LSegImageEncoder and a CLIPTextEncoder as one, under the official names."""
    image = {official_name(name): tensor for name, tensor in image_state.items()}
    return image | {CLIP_PREFIX + name: tensor for name, tensor in text_state.items()}


def image_state_dict(weights: Weights) -> dict[str, Tensor]:
    """The weights as an LSegImageEncoder's state dict, in float32, the position grid at the config's size.

    Raises:
        UserError: lists every tensor that is missing, extra or mis-shaped.
    """
    with torch.device("meta"):
        expected = LSegImageEncoder(weights.image_config).state_dict()
    found = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(UNUSED)}
    if POSITIONS in found and found[POSITIONS].shape[-1:] == (weights.image_config.width,):
        found[POSITIONS] = resize_positions(found[POSITIONS], weights.image_config.grid)
    official = {official_name(name): tensor for name, tensor in expected.items()}
    fitted = _fit(found, official, f"{weights.path} does not fit LSeg's image encoder", REMEDY)
    return {name: fitted[official_name(name)] for name in expected}


def text_state_dict(weights: Weights) -> dict[str, Tensor]:
    """The weights' own CLIP text tower as a CLIPTextEncoder's state dict, in float32.

    Raises:
        UserError: there is none, or some of it is missing, extra or mis-shaped.
    """
    found = _text_tower(weights.tensors, CLIP_PREFIX)
    if not found or weights.text_config is None:
        raise UserError(
            f"{weights.path} holds no CLIP text encoder: "
            "export that from open_clip with 'python clip_onnx_export.py --weights openai', and where it is asked for "
            "give it with --text-onnx"
        )
    where = f"{weights.path} does not fit CLIP's text encoder"
    return _fit_text(found, weights.text_config, CLIP_PREFIX, where, REMEDY)


def clip_text_state_dict(source: str | Path, config: TextConfig | None = None) -> tuple[dict[str, Tensor], str, str]:
    """CLIP's own text tower, as a CLIPTextEncoder's state dict in float32.

    Args:
        source: "openai" (open_clip's ViT-B-32-quickgelu, fetched on first use), or a file: OpenAI's TorchScript archive
            (whose code is not run), or a state dict with OpenAI's or open_clip's names.
        config: the sizes it must have; CLIP ViT-B/32's by default.

    Returns:
        The state dict, the source's name ("openai" or the file's stem) and the file's SHA-256.

    Raises:
        UserError: it cannot be fetched or read, or is another model.
    """
    if str(source) == "openai":
        name, path = "openai", fetch_openai_clip()
    else:
        name, path = Path(source).stem, Path(source)
        if path.is_dir():
            raise UserError(f"{path} is a folder: {CLIP_REMEDY}")
    stored, _ = tensorfile.read(path, CLIP_REMEDY)
    found = _text_tower(stored, "")
    if not found:
        raise UserError(
            f"{path} holds {len(stored)} tensors but no CLIP text encoder (it has {tensorfile.listing(stored, 3)}; "
            f"CLIP has token_embedding.weight): {CLIP_REMEDY}"
        )
    where = f"{path} does not fit CLIP ViT-B/32's text encoder"
    return _fit_text(found, config or TextConfig(), "", where, CLIP_REMEDY), name, tensorfile.sha256(path)


def load_image_encoder(weights: Weights) -> LSegImageEncoder:
    """The image encoder with these weights: in eval mode, on the CPU, not trainable. Raises UserError on a misfit."""
    with torch.device("meta"):
        model = LSegImageEncoder(weights.image_config)
    return _assign(model, image_state_dict(weights))


def load_text_encoder(weights: Weights) -> CLIPTextEncoder:
    """The text encoder in these weights: in eval mode, on the CPU, not trainable. Raises UserError on a misfit."""
    state = text_state_dict(weights)
    with torch.device("meta"):
        model = CLIPTextEncoder(weights.text_config)
    return _assign(model, state)


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Resizes position embeddings bilinearly, the class token's apart; leaves alone what is no square grid.

    Args:
        positions: float [1, 1 + n*n, C].
        grid: positions along one side of the new grid.

    Returns:
        float32 [1, 1 + grid*grid, C].
    """
    side = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    if side in (0, grid) or side * side != positions.shape[1] - 1 or positions.shape[0] != 1:
        return positions
    positions = positions.float()
    patches = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # [1, C, n, n]
    patches = F.interpolate(patches, size=(grid, grid), mode="bilinear", align_corners=False)  # [1, C, grid, grid]
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def save_safetensors(
    path: Path, tensors: dict[str, Tensor], image_config: LSegConfig, text_config: TextConfig | None
) -> None:
    """Writes a checkpoint that `load` reads: official names, floating tensors as float16, the sizes as metadata.

    Raises:
        ValueError: a number is beyond float16 (65504).
        UserError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "lseg", "image_config": json.dumps(image_config.to_dict())}
    if text_config is not None:
        metadata["text_config"] = json.dumps(text_config.to_dict())
    stored = {}
    for name, tensor in tensors.items():
        dtype = torch.float16 if tensor.is_floating_point() else tensor.dtype
        stored[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if not stored[name].isfinite().all():
            raise ValueError(f"{name} has numbers that float16 cannot hold")
    try:
        with unfinished(path.parent) as folder:
            save_file(stored, folder / path.name, metadata)
            os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}): choose another folder or free some space") from error


def download(destination: str | Path) -> Path:
    """Fetches the official checkpoint from Google Drive with progress, checks it whole, and only then keeps it.

    Raises:
        UserError: it cannot be fetched or is not the official checkpoint; then nothing is left behind.
    """
    destination = Path(destination)
    if destination.is_dir():
        destination = destination / "demo_e200.ckpt"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own, since gdown keeps files of its own beside the one it writes.
        with unfinished(destination.parent) as folder:
            partial = folder / destination.name
            try:
                _fetch_official(partial)
                weights = _load(partial, "Google Drive sent something else")
                image_state_dict(weights)
                text_state_dict(weights)
            except UserError as error:
                reason = str(error).replace(str(partial), "the file")
                raise UserError(
                    f"{destination} was not downloaded and nothing was kept ({reason}): "
                    f"open {OFFICIAL_URL} in a browser and save the file as {destination}"
                ) from error
            os.replace(partial, destination)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{destination} cannot be written ({reason}): choose another folder") from error
    return destination


def _fetch_official(path: Path) -> None:
    try:
        import gdown

        gdown.download(id=OFFICIAL_ID, output=str(path), quiet=False)
    except Exception as error:  # gdown passes on whatever the network, the server or the disk raised
        raise UserError(_one_line(error)) from error
    if not path.exists():  # older gdown reports a failure in this way
        raise UserError("gdown brought no file")


def fetch_openai_clip() -> Path:
    """OpenAI's ViT-B/32 as open_clip fetches and keeps it; raises UserError where it cannot be fetched."""
    try:
        import open_clip

        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")))
    except Exception as error:  # open_clip passes on whatever the network or the hub's client raised
        raise UserError(
            f"open_clip could not fetch CLIP's weights 'openai' ({_one_line(error)}): "
            "go online once, or give a local CLIP file (OpenAI's ViT-B-32.pt) or an LSeg checkpoint"
        ) from error


def _text_tower(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """CLIP's text tensors without the prefix. CLIP's other parts are passed over, as is the mask: no weight."""
    cut = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: t for name, t in cut.items() if name.startswith(TEXT_TOWER) and not name.endswith("attn_mask")}


def _fit_text(found: dict[str, Tensor], config: TextConfig, prefix: str, where: str, remedy: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = {prefix + name: tensor for name, tensor in CLIPTextEncoder(config).state_dict().items()}
    found = {prefix + name: tensor for name, tensor in found.items()}  # errors give the names as they are in the file
    return {name.removeprefix(prefix): tensor for name, tensor in _fit(found, expected, where, remedy).items()}


def _fit(found: dict[str, Tensor], expected: dict[str, Tensor], where: str, remedy: str) -> dict[str, Tensor]:
    """Casts tensors to the expected types; raises UserError unless names, shapes and kinds of number all agree."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misfits = [
        f"{name} (expected {_shape(expected[name])}, found {_shape(tensor)})"
        for name, tensor in found.items()
        if name in expected and _shape(tensor) != _shape(expected[name])
    ]
    groups = (("missing", missing), ("extra", extra), ("mis-shaped", misfits))
    problems = [f"{len(names)} {kind}: {tensorfile.listing(names, 8)}" for kind, names in groups if names]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; use a checkpoint of the same model, or {remedy}")
    return {name: found[name].to(tensor.dtype) for name, tensor in expected.items()}


def _shape(tensor: Tensor) -> str:
    """A shape like 256x512x1x1; whole numbers are marked, as no weight may be stored so."""
    size = "x".join(map(str, tensor.shape)) or "scalar"
    return size if tensor.is_floating_point() else f"{size} of whole numbers"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _assign(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Makes the tensors themselves the parameters of a model built on the "meta" device."""
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()
