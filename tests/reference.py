"""LSeg's image encoder in plain tensor operations, written from its description, to hold the model against.

It reads a checkpoint's tensors under their official names and keeps the official order of operations: the class token
is concatenated to each patch, every upsampling comes before the 1 x 1 convolution, and the head comes last.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lseg.model import LSegConfig


def pixel_embeddings(tensors: dict[str, Tensor], config: LSegConfig, images: Tensor) -> Tensor:
    """Normalised images [B, 3, S, S] to unit pixel embeddings [B, D, S/2, S/2] (patches of 16), in float64."""
    p = {name: tensor.double() for name, tensor in tensors.items()}
    taps = vit_taps(p, config, images.double())
    levels = [reassemble(p, level, tap) for level, tap in enumerate(taps, start=1)]

    path = fuse(p, 4, levels[3], None)
    for level in (3, 2, 1):
        path = fuse(p, level, path, levels[level - 1])
    out = F.conv2d(path, p["scratch.head1.weight"], p["scratch.head1.bias"])
    return out / out.square().sum(dim=1, keepdim=True).sqrt()


def vit_taps(p: dict[str, Tensor], config: LSegConfig, images: Tensor) -> list[Tensor]:
    """The tokens [B, 1 + g*g, C] that leave each tapped block, the class token first."""
    vit = "pretrained.model."
    patches = F.conv2d(
        images, p[vit + "patch_embed.proj.weight"], p[vit + "patch_embed.proj.bias"], stride=config.patch_size
    )
    grid = patches.shape[-1]
    patches = patches.flatten(2).transpose(1, 2)
    x = torch.cat([p[vit + "cls_token"].expand(len(images), -1, -1), patches], dim=1)
    x = x + bilinear_positions(p[vit + "pos_embed"], grid)

    taps = []
    for n in range(config.depth):
        block = f"{vit}blocks.{n}."
        x = x + attention(p, block + "attn.", layer_norm(p, block + "norm1.", x), config.heads)
        hidden = linear(p, block + "mlp.fc1.", layer_norm(p, block + "norm2.", x))
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(p, block + "mlp.fc2.", hidden)
        if n in config.taps:
            taps.append(x)
    return taps


def bilinear_positions(positions: Tensor, grid: int) -> Tensor:
    """Positions [1, 1 + n*n, C] on a grid x grid raster in float64: pixel centres aligned, edges repeated."""
    positions = positions.double()
    side = math.isqrt(positions.shape[1] - 1)
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) * side / grid - 0.5
    distance = (centres.clamp(0, side - 1)[:, None] - torch.arange(side, dtype=torch.float64)).abs()
    weights = (1 - distance).clamp(min=0)  # [grid, side], rows sum to one
    raster = positions[0, 1:].unflatten(0, (side, side))  # [n, n, C]
    resized = torch.einsum("yi,xj,ijc->yxc", weights, weights, raster)
    return torch.cat([positions[:, :1], resized.flatten(0, 1)[None]], dim=1)


def attention(p: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    batch, length, width = x.shape
    qkv = linear(p, name + "qkv.", x).reshape(batch, length, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(dim=-1)
    return linear(p, name + "proj.", (weights @ v).transpose(1, 2).reshape(batch, length, width))


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[name + "weight"].T + p[name + "bias"]


def layer_norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * p[name + "weight"] + p[name + "bias"]


def reassemble(p: dict[str, Tensor], level: int, tokens: Tensor) -> Tensor:
    """Tokens to a feature map of the decoder's width, at 4, 2, 1 or 1/2 times the patch grid for levels 1 to 4."""
    name = f"pretrained.act_postprocess{level}."
    patches, class_token = tokens[:, 1:], tokens[:, :1]
    joined = torch.cat([patches, class_token.expand_as(patches)], dim=-1)
    x = linear(p, name + "0.project.0.", joined)
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    grid = math.isqrt(x.shape[1])
    x = x.transpose(1, 2).unflatten(2, (grid, grid))
    x = F.conv2d(x, p[name + "3.weight"], p[name + "3.bias"])
    if level < 3:
        x = F.conv_transpose2d(x, p[name + "4.weight"], p[name + "4.bias"], stride={1: 4, 2: 2}[level])
    if level == 4:
        x = F.conv2d(x, p[name + "4.weight"], p[name + "4.bias"], stride=2, padding=1)
    return F.conv2d(x, p[f"scratch.layer{level}_rn.weight"], padding=1)


def fuse(p: dict[str, Tensor], level: int, x: Tensor, skip: Tensor | None) -> Tensor:
    name = f"scratch.refinenet{level}."
    if skip is not None:
        x = x + residual_unit(p, name + "resConfUnit1.", skip)
    x = residual_unit(p, name + "resConfUnit2.", x)
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    return F.conv2d(x, p[name + "out_conv.weight"], p[name + "out_conv.bias"])


def residual_unit(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x
    for n in "12":
        y = batch_norm(p, f"{name}bn{n}.", F.conv2d(y.clamp(min=0), p[f"{name}conv{n}.weight"], padding=1))
    return x + y


def batch_norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        p[name + kind][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias
