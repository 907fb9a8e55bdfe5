"""CLIP's text encoder: byte-pair tokens to one unit vector per text.

N texts, L = 77 tokens each, W the transformer's width, D the embedding size. Parameter names are OpenAI CLIP's, so its
weights load as they are.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021 (ViT-B/32).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder. The defaults are CLIP ViT-B/32's."""

    vocabulary: int = 49408
    context: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    embedding: int = 512
    token_width: int | None = None  # a narrower token table, widened by a linear layer (the demo weights')

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> TextConfig:
        """Builds a config from JSON values; raises ValueError on a name it does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown size(s) in the text encoder's config: {', '.join(unknown)}")
        config = cls(**values)
        for name, value in config.to_dict().items():
            most = {"layers": 256, "vocabulary": 1 << 24, "context": 1 << 12}.get(name, 1 << 16)  # far beyond any model
            if not (isinstance(value, int) and 0 < value <= most or (name == "token_width" and value is None)):
                raise ValueError(f"{name} is {value}, and may be 1 to {most}")
        return config


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): what OpenAI's CLIP was trained with; the exact GELU gives other embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Multi-head self-attention with nn.MultiheadAttention's parameter names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [N, L, 3W]
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # each [N, heads, L, W/heads]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [N, heads, L, W/heads]
        return self.out_proj(y.transpose(1, 2).flatten(2))  # [N, L, W]


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class CLIPTextEncoder(nn.Module):
    """Tokens to unit-length text embeddings.

    Args:
        tokens: int32 or int64 [N, 77], CLIP's byte-pair ids: start 49406, end 49407, then zeros.

    Returns:
        float32 [N, D]: L2-normalised, read at each row's end token (its largest id).
    """

    def __init__(self, config: TextConfig | None = None):
        super().__init__()
        self.config = config = config or TextConfig()
        self.token_embedding = nn.Embedding(config.vocabulary, config.token_width or config.width)
        self.token_projection = nn.Linear(config.token_width, config.width) if config.token_width else nn.Identity()
        self.positional_embedding = nn.Parameter(torch.randn(config.context, config.width) * 0.01)
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.randn(config.width, config.embedding) * config.width**-0.5)
        # Each token sees itself and what stands before it. Kept off the "meta" device: no checkpoint holds it.
        mask = torch.full((config.context, config.context), float("-inf"), device="cpu").triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_projection(self.token_embedding(tokens)) + self.positional_embedding  # [N, 77, W]
        x = self.ln_final(self.transformer(x, self.mask))  # [N, 77, W]
        # As float32 the ids stay exact, and every ONNX backend has an ArgMax for it.
        end = tokens.float().argmax(dim=1)  # [N]
        x = x.gather(1, end[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]  # [N, W]
        x = x @ self.text_projection  # [N, D]
        return x / x.norm(dim=1, keepdim=True)
