"""Checkpoints with random weights for the tests: full size as the official file has them, and tiny ones.

The official names and shapes come from lseg_checkpoint_keys.tsv, a table of every tensor in the official file.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lseg import specs
from lseg.checkpoint import Weights, load, load_text_encoder, save_safetensors, to_official_names
from lseg.export import export_onnx
from lseg.model import LSegConfig, LSegImageEncoder
from lseg.onnx_file import IMAGE_ONNX, TEXT_ONNX, read_metadata
from lseg.recipes import Recipe
from lseg.text import CLIPTextEncoder, TextConfig

TABLE = Path(__file__).parent / "lseg_checkpoint_keys.tsv"
# What CLIP's own conversion to half precision touches; its norms, embeddings and temperature stay float32.
HALF_IN_CLIP = re.compile(r"clip_pretrained\.(.*\.(attn|mlp)\..*|visual\.conv1\.weight|visual\.proj|text_projection)")


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the official checkpoint: its name, with `net.`, and its shape."""
    rows = (line.split("\t") for line in TABLE.read_text().splitlines())
    return {name: () if size == "scalar" else tuple(map(int, size.split("x"))) for name, size, _ in rows}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights that keep signals near unit size, so that every part of a network shows in its output."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1234)
    mean, spread = 0.0, 0.1
    if name.endswith("running_var"):
        return torch.empty(shape).uniform_(0.5, 2, generator=generator)
    if name.endswith(("pos_embed", "positional_embedding", "cls_token")):
        spread = 0.3
    elif len(shape) > 1:
        spread = math.prod(shape[1:]) ** -0.5
    elif name.endswith("weight"):  # of a norm: no other weight has one dimension
        mean = 1.0
    return torch.empty(shape).normal_(mean, spread, generator=generator)


def official_state_dict(seed: int, half_clip: bool) -> dict[str, Tensor]:
    """A full-size state dict as in the official file (2 GB): the same numbers for one seed, CLIP halved or not."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: random_tensor(name, shape, generator) for name, shape in official_shapes().items()}
    return halve_clip(state) if half_clip else state


def halve_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict with the tensors in float16 that CLIP's conversion halves."""
    return {name: tensor.half() if HALF_IN_CLIP.search(name) else tensor for name, tensor in state.items()}


def write_lightning(path: Path, state_dict: dict[str, Tensor], legacy: bool = False) -> None:
    """Writes what PyTorch Lightning's trainer does: the state dict among leftovers, some of classes found nowhere.

    `legacy` chooses torch.save's format before PyTorch 1.6.
    """
    module = types.ModuleType("vanished_trainer")
    exec("class ModelCheckpoint: ...\nclass AttributeDict(dict): ...\ndef schedule(): ...", module.__dict__)
    callback = module.ModelCheckpoint()
    callback.monitor, callback.best = "val_acc", torch.tensor(0.7)
    content = {
        "epoch": 199,
        "global_step": np.int64(252600),
        "pytorch-lightning_version": "1.3.5",
        "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(0.7), "instance": callback}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3, 2)}}, "param_groups": [{"lr": 0.004}]}],
        "lr_schedulers": [{"base_lrs": [0.004], "lr_lambdas": [None, module.schedule]}],
        "state_dict": OrderedDict(state_dict),
        "loops": {
            "fit_loop": {"state_dict": {}, "seen": {1, 2}, "dtype": torch.float16, "device": torch.device("cpu")}
        },
        "hparams_name": "hparams",
        "hyper_parameters": module.AttributeDict(args=argparse.Namespace(backbone="clip_vitl16_384", size=480)),
    }
    sys.modules[module.__name__] = module
    try:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules[module.__name__]


def tiny_config() -> tuple[LSegConfig, TextConfig]:
    """Sizes that run in milliseconds, no two alike that the official model's code could confuse."""
    image = LSegConfig(
        image_size=64,
        patch_size=16,
        width=32,
        depth=6,
        heads=4,
        taps=(0, 2, 3, 5),
        reassemble=(8, 12, 20, 28),
        features=16,
        embedding=24,
    )
    return image, TextConfig(vocabulary=49408, width=16, layers=2, heads=2, embedding=24, token_width=4)


def export_tiny(folder: Path, seed: int) -> Weights:
    """Exports tiny random encoders to a folder, as engines are built from, and returns their weights."""
    weights = load(write_tiny(folder / "tiny.safetensors", seed).path)
    export_onnx(specs.image_spec(weights), folder / IMAGE_ONNX)
    export_onnx(specs.text_spec(load_text_encoder(weights), specs.weights_metadata(weights)), folder / TEXT_ONNX)
    return weights


def tiny_recipe(folder: Path, precision: str = "fp32", matmul: str = "4d") -> Recipe:
    """How engines come from the encoders in that folder."""
    return Recipe(folder, read_metadata(folder / IMAGE_ONNX)["image_config"], precision, matmul)


def tiny_weights(seed: int, positions: int | None = None) -> dict[str, Tensor]:
    """Random tensors of tiny_config's sizes under the official names (without `net.`), the unused ones among them.

    `positions` is the side of the checkpoint's position grid, by default the config's own, which is 4.
    """
    image, text = tiny_config()
    with torch.device("meta"):
        models = LSegImageEncoder(image).state_dict(), CLIPTextEncoder(text).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in to_official_names(*models).items()}
    shapes["pretrained.model.pos_embed"] = (1, 1 + (positions or image.grid) ** 2, image.width)
    shapes |= {f"pretrained.model.norm.{kind}": (image.width,) for kind in ("weight", "bias")}
    shapes |= {"pretrained.model.head.weight": (10, image.width), "pretrained.model.head.bias": (10,)}
    unit = "scratch.refinenet3.resConfUnit1."
    shapes |= {name.replace("net3", "net4"): shape for name, shape in shapes.items() if name.startswith(unit)}
    shapes |= {"clip_pretrained.logit_scale": (), "clip_pretrained.visual.proj": (12, 24)}
    generator = torch.Generator().manual_seed(seed)
    return {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}


def write_tiny(path: Path, seed: int) -> Weights:
    """Writes tiny_weights as safetensors (float16) and loads them."""
    save_safetensors(path, tiny_weights(seed), *tiny_config())
    return load(path)
