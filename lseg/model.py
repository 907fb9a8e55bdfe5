"""The LSeg image encoder: a ViT whose intermediate tokens a DPT decoder turns into one CLIP embedding per pixel.

B images, g x g patches (g = image size / patch size: 30), C the ViT's width, F the decoder's channels, D CLIP's
embedding size. Numbers in shape comments are the official ViT-L/16 at 480 x 480.

Source: Li et al., "Language-driven Semantic Segmentation", ICLR 2022; Ranftl et al., "Vision Transformers for Dense
Prediction", ICCV 2021.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MOST_BLOCKS, LARGEST, MOST_POSITIONS = 256, 1 << 16, 1 << 28  # of what a file may ask for: far beyond any model
LOGIT_SCALE = 1 / 0.07  # LSeg's fixed temperature: a positive factor, so it never changes which label wins


@dataclass(frozen=True)
class LSegConfig:
    """Sizes of the image encoder. The defaults are the official ViT-L/16 at 480 x 480."""

    image_size: int = 480
    patch_size: int = 16
    width: int = 1024
    depth: int = 24
    heads: int = 16
    taps: tuple[int, int, int, int] = (5, 11, 17, 23)  # blocks (0-based) whose output the decoder reads
    reassemble: tuple[int, int, int, int] = (256, 512, 1024, 1024)  # channels per level, finest first
    features: int = 256
    embedding: int = 512

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> LSegConfig:
        """Builds a config from JSON values; raises ValueError on a name it does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown size(s) in the model's config: {', '.join(unknown)}")
        config = cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        taps = config.taps
        if len(taps) != 4 or sorted(set(taps)) != list(taps) or taps[0] < 0 or taps[-1] >= config.depth:
            raise ValueError(f"taps {list(taps)} are not four blocks of {config.depth}, in order")
        if len(config.reassemble) != 4:
            raise ValueError(f"reassemble {list(config.reassemble)} does not name four levels")
        for name, value in config.to_dict().items():
            most = MOST_BLOCKS if name == "depth" else LARGEST
            sizes = () if name == "taps" else value if isinstance(value, tuple) else (value,)
            if not all(isinstance(size, int) and 0 < size <= most for size in sizes):
                raise ValueError(f"{name} is {value}, and may be 1 to {most}")
        if (1 + config.grid**2) * config.width > MOST_POSITIONS:
            raise ValueError(f"{config.grid} x {config.grid} patches of width {config.width} are too many")
        return config


def upsample(x: Tensor) -> Tensor:
    """Doubles height and width bilinearly; the corners of both maps coincide (align_corners)."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)  # [B, c, h, w] -> [B, c, 2h, 2w]


class Readout(nn.Module):
    """Mixes the class token into every patch token: GELU(Linear([patch, class]))."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, patches: Tensor, class_token: Tensor) -> Tensor:
        # Linear([p, c]) = p W1^T + (c W2^T + b): the class token's half is computed once, not once per patch.
        w_patch, w_class = self.linear.weight.chunk(2, dim=1)  # each [C, C]
        shared = F.linear(class_token, w_class, self.linear.bias)  # [B, 1, C]
        return F.gelu(F.linear(patches, w_patch) + shared)  # [B, g*g, C]


class Reassemble(nn.Module):
    """Turns one tap's tokens into a feature map at one level's resolution, with the decoder's channels."""

    def __init__(self, config: LSegConfig, level: int):
        super().__init__()
        channels = config.reassemble[level]
        self.shape = (-1, config.width, config.grid, config.grid)
        self.readout = Readout(config.width)
        self.project = nn.Conv2d(config.width, channels, 1)
        self.resize = (
            nn.ConvTranspose2d(channels, channels, 4, stride=4),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.Identity(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        )[level]
        self.out = nn.Conv2d(channels, config.features, 3, padding=1, bias=False)

    def forward(self, patches: Tensor, class_token: Tensor) -> Tensor:
        x = self.readout(patches, class_token)  # [B, g*g, C]
        x = x.transpose(1, 2).reshape(self.shape)  # [B, C, g, g]
        x = self.resize(self.project(x))  # [B, 256 | 512 | 1024 | 1024, 4g | 2g | g | g/2 (both sides)]
        return self.out(x)  # [B, F, same]


class ResidualUnit(nn.Module):
    """x + BN(conv(ReLU(BN(conv(ReLU(x)))))): both convolutions 3 x 3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(F.relu(x)))
        y = self.bn2(self.conv2(F.relu(y)))
        return x + y


class Fusion(nn.Module):
    """Adds a level's features to what comes from the coarser level and refines the sum.

    The original upsamples and then applies the 1 x 1 convolution. Bilinear weights sum to one, so the two commute:
    here the convolution runs first, on a quarter of the pixels, and the caller upsamples.
    """

    def __init__(self, channels: int, with_skip: bool):
        super().__init__()
        self.skip_unit = ResidualUnit(channels) if with_skip else None
        self.unit = ResidualUnit(channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_unit is not None:
            x = x + self.skip_unit(skip)
        return self.out_conv(self.unit(x))


class LSegImageEncoder(nn.Module):
    """Images to unit-length pixel embeddings.

    Args:
        images: float32 [B, 3, S, S], RGB, each channel (value / 255 - 0.5) / 0.5, S the config's image size.

    Returns:
        float32 [B, D, 8g, 8g] ([B, 512, 240, 240]): L2-normalised over D, without LSeg's factor 1 / 0.07.
    """

    def __init__(self, config: LSegConfig | None = None):
        super().__init__()
        self.config = config = config or LSegConfig()
        self.vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            num_classes=0,
            global_pool="",
            final_norm=False,  # the decoder reads blocks as they leave, so a final norm has no effect
        )
        self.reassemble = nn.ModuleList(Reassemble(config, level) for level in range(4))
        self.fusion = nn.ModuleList(Fusion(config.features, with_skip=level < 3) for level in range(4))
        self.head = nn.Conv2d(config.features, config.embedding, 1)

    def taps(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Four blocks' output as they leave: ([B, g*g, C] patch tokens, [B, 1, C] class token) each."""
        return self.vit.forward_intermediates(
            images,
            indices=list(self.config.taps),
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )

    def decode(self, taps: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Taps to the decoder's finest features, float [B, F, 4g, 4g]: what the head turns into embeddings."""
        levels = [layer(*tap) for layer, tap in zip(self.reassemble, taps, strict=True)]  # [B, F, 4g | 2g | g | g/2, ]
        x = self.fusion[3](levels[3])  # [B, F, g/2, g/2]
        for level in (2, 1, 0):
            x = self.fusion[level](upsample(x), levels[level])  # [B, F, g | 2g | 4g, ...]
        return x

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(self.decode(self.taps(images)))  # [B, D, 4g, 4g]; before the upsampling, with which it commutes
        x = upsample(x)  # [B, D, 8g, 8g]
        return x / x.norm(dim=1, keepdim=True)

    def scores(self, features: Tensor, text: Tensor) -> Tensor:
        """Cosine of every pixel with every text without making the [B, D, 8g, 8g] embeddings.

        With z = W u + b the head's output for upsampled features u: <z, t> = u . (W^T t) + b . t, and |z| = |W u + b|
        = |R [u; 1]| for the triangular R of [W b] = Q R, so D drops out of every large tensor. Differentiable.

        Args:
            features: float [B, F, 4g, 4g], from `decode`.
            text: float [N, D], unit length.

        Returns:
            float [B, N, 8g, 8g], in [-1, 1].
        """
        u = upsample(features)  # [B, F, 8g, 8g]
        weight = torch.cat([self.head.weight.flatten(1), self.head.bias[:, None]], dim=1)  # [D, F + 1]
        basis = torch.linalg.qr(weight.float()).R.to(u.dtype)  # [min(D, F + 1), F + 1]
        dot = F.conv2d(u, (text @ weight[:, :-1])[..., None, None], text @ weight[:, -1])  # [B, N, 8g, 8g]
        z = F.conv2d(u, basis[:, :-1, None, None], basis[:, -1])  # [B, F + 1, 8g, 8g]
        return dot / z.norm(dim=1, keepdim=True)
