"""CLIP's encoders from wherever the user has them: an LSeg checkpoint, open_clip, a CLIP file, or the demo weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lseg import checkpoint, tensorfile
from lseg.errors import UserError
from lseg.text import CLIPTextEncoder, TextConfig, Transformer
from lseg.weights import resolve

# The image tower's sizes: ViT-B/32, the one that goes with LSeg's text encoder.
VISUAL = {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12, "heads": 12, "embedding": 512}


@dataclass(frozen=True)
class CLIP:
    """A text encoder, the image tower where asked for and present, and what the exported files should say of them."""

    text: CLIPTextEncoder
    visual: CLIPImageEncoder | None
    metadata: dict[str, object]


class CLIPImageEncoder(nn.Module):
    """Images to unit-length image embeddings. Parameter names are OpenAI CLIP's, as in `lseg.text`.

    Args:
        images: float32 [B, 3, S, S], RGB in [0, 1], normalised with CLIP's mean and deviation.

    Returns:
        float32 [B, D], L2-normalised.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, embedding: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (image_size // patch_size) ** 2, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(TextConfig(width=width, layers=layers, heads=heads))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, embedding))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, 49, W]
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding  # [B, 50, W]
        x = self.transformer(self.ln_pre(x), None)  # every token sees every other
        x = self.ln_post(x[:, 0]) @ self.proj  # [B, D]
        return x / x.norm(dim=1, keepdim=True)


def load_clip(source: str, visual: bool = False) -> CLIP:
    """Loads CLIP from "demo", "openai", an LSeg checkpoint, or a CLIP file (a file's tensors tell which it is).

    Raises:
        UserError: it cannot be had or read, is another model, or has no image tower where `visual` asks for one.
    """
    path = checkpoint.fetch_openai_clip() if source == "openai" else resolve(source)
    stored = tensorfile.read(path, checkpoint.CLIP_REMEDY).tensors
    if any(name.removeprefix("net.").startswith("scratch.") for name in stored):
        weights = checkpoint.load(path)
        text, metadata = checkpoint.load_text_encoder(weights), {"weights": weights.name}
        prefix, stored, sha256 = checkpoint.CLIP_PREFIX, weights.tensors, weights.sha256
    else:
        state, name, sha256 = checkpoint.clip_text_state_dict(source)
        text, metadata, prefix = _text(state), {"weights": name, "source": "clip"}, ""
    tower = _visual(stored, prefix, source) if visual else None
    metadata |= {"weights_sha256": sha256, "text_config": text.config.to_dict()}
    return CLIP(text, tower, metadata)


def _text(state: dict[str, Tensor]) -> CLIPTextEncoder:
    with torch.device("meta"):
        encoder = CLIPTextEncoder()
    encoder.load_state_dict(state, assign=True)
    return encoder.requires_grad_(False).eval()


def _visual(tensors: dict[str, Tensor], prefix: str, source: str) -> CLIPImageEncoder:
    prefix += "visual."
    state = {name.removeprefix(prefix): t.float() for name, t in tensors.items() if name.startswith(prefix)}
    if not state:
        raise UserError(f"{source} holds no CLIP image tower: leave --visual out, or give --weights openai")
    with torch.device("meta"):
        tower = CLIPImageEncoder(**VISUAL)
    try:
        tower.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} does not hold CLIP ViT-B/32's image tower ({reason})") from error
    return tower.requires_grad_(False).eval()
