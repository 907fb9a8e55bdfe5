"""CamVid in memory, and crops of it drawn on the training device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.words import UNLABELLED
from lseg.errors import UserError


@dataclass(frozen=True)
class Split:
    """Images uint8 [M, 3, H, W] (RGB) and masks uint8 [M, H, W] of one split, on one device."""

    images: Tensor
    masks: Tensor

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.masks.to(device))


def load_split(folder: Path) -> Split:
    """Reads every NAME.jpg with its NAME.png mask.

    Raises:
        UserError: the folder is missing or holds no images, an image has no mask, or they do not go together.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give the folder that contains train, val and test")
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise UserError(f"{folder} holds no .jpg images: give the folder that contains train, val and test")
    images, masks = [], []
    for path in paths:
        image, mask = cv2.imread(str(path)), cv2.imread(str(path.with_suffix(".png")), cv2.IMREAD_UNCHANGED)
        if image is None or mask is None:
            raise UserError(f"{path}: the image or its mask {path.stem}.png cannot be read")
        if mask.shape != image.shape[:2] or mask.max() > UNLABELLED:
            raise UserError(f"{path}: its mask {path.stem}.png must have its size and one value, 0 to 11, a pixel")
        if images and image.shape != images[0].shape:
            raise UserError(f"{path} has another size than {paths[0].name}: give images of one size")
        images.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        masks.append(mask)
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.stack(masks)))


def affine(count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random maps from crop to photo in grid_sample's coordinates, [count, 2, 3]: zoom, turn, mirror, shift."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator, device=device) * (high - low) + low

    zoom = torch.exp(uniform(math.log(0.45), math.log(1.25)))  # side of the crop as a share of the photo's
    stretch = torch.exp(uniform(-0.2, 0.2))
    angle = uniform(-0.12, 0.12)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    sx, sy = zoom * stretch, zoom / stretch
    room_x, room_y = (1 - sx).clamp_min(0.1), (1 - sy).clamp_min(0.1)
    tx, ty = uniform(-1, 1) * room_x, uniform(-1, 1) * room_y
    rows = [mirror * sx * angle.cos(), -sy * angle.sin(), tx, mirror * sx * angle.sin(), sy * angle.cos(), ty]
    return torch.stack(rows, dim=1).view(count, 2, 3)


def jitter_colour(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast, saturation, tint, gamma and blur of images float [B, 3, H, W] in [0, 1]."""

    def factor(spread: float, channels: int = 1) -> Tensor:
        noise = torch.rand(len(x), channels, 1, 1, generator=generator, device=x.device) * 2 - 1
        return torch.exp(spread * noise)

    x = x * factor(0.35) * factor(0.08, channels=3)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * factor(0.35)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * factor(0.5)
    x = x.clamp(0, 1) ** factor(0.3)
    blurred = F.avg_pool2d(x, 3, stride=1, padding=1)
    amount = (torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) * 1.6 - 1).clamp_min(0)
    return x + (blurred - x) * amount


def sample_crops(split: Split, batch: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws augmented crops.

    Returns:
        images float32 [batch, 3, size, size] in [0, 1] and masks int64 [batch, size / 2, size / 2], sampled at the
        points of the model's 240 x 240 output (its corners are the image's corners).
    """
    device = split.images.device
    index = torch.randint(len(split.images), (batch,), generator=generator, device=device)
    theta = affine(batch, device, generator)
    grid = F.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    images = F.grid_sample(split.images[index].float() / 255, grid, mode="bilinear", align_corners=False)
    at = torch.linspace(0, size - 1, size // 2, device=device).round().long()
    coarse = grid[:, at][:, :, at]  # [batch, size/2, size/2, 2]
    shifted = split.masks[index][:, None].float() + 1  # 0 is then what lies outside the photo
    masks = F.grid_sample(shifted, coarse, mode="nearest", align_corners=False)[:, 0].round().long() - 1
    masks = torch.where(masks < 0, UNLABELLED, masks)
    if torch.rand((), generator=generator, device=device) < 0.5:  # CutMix: a rectangle of another crop
        images, masks = cut_mix(images, masks, generator)
    return jitter_colour(images, generator), masks


def cut_mix(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pastes one random rectangle of each image's neighbour in the batch over it, mask included."""
    size, device = images.shape[-1], images.device
    sides = (torch.rand(2, generator=generator, device=device) * 0.4 + 0.2) * size
    corner = torch.rand(2, generator=generator, device=device) * (size - sides)
    y0, x0 = (corner / 2).long().tolist()
    y1, x1 = ((corner + sides) / 2).long().tolist()
    images, masks = images.clone(), masks.clone()
    images[:, :, 2 * y0 : 2 * y1, 2 * x0 : 2 * x1] = images.roll(1, 0)[:, :, 2 * y0 : 2 * y1, 2 * x0 : 2 * x1]
    masks[:, y0:y1, x0:x1] = masks.roll(1, 0)[:, y0:y1, x0:x1]
    return images, masks


def whole_images(split: Split, size: int) -> Tensor:
    """Every photo squashed to size x size, as at inference: float32 [M, 3, size, size] in [0, 1]."""
    return F.interpolate(split.images.float() / 255, size=(size, size), mode="bilinear", align_corners=False)
