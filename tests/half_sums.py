"""PyTorch's float16 with products that are added up in float16 too, as TensorRT 8.6's fastest kernels add them up.

A tensor core adds up sixteen products more exactly and rounds each such sum, with the one before, to float16 where its
accumulators are of that type. Linear layers and convolutions are done so here, step by step, on any device; attention,
transposed convolutions and all else stay PyTorch's, whose sums are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 16  # products that are added up before rounding


@contextmanager
def half_sums(layers: str = "all") -> Iterator[None]:
    """Within it float16 layers have float16 sums. One thread at a time.

    `layers`: "all" linear ones and convolutions; "patches", the convolution that embeds them; "others", all but that.
    """
    plain_linear, plain_convolution = F.linear, F.conv2d

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float16 or layers == "patches":
            return plain_linear(x, weight, bias)
        result = product(x.reshape(-1, x.shape[-1]), weight.T).reshape(*x.shape[:-1], -1)
        return result if bias is None else result + bias

    def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
        embeds = weight.shape[2:] == torch.Size(_pair(stride)) and weight.shape[2] > 3  # patches beside each other
        chosen = layers == "all" or embeds == (layers == "patches")
        if x.dtype != torch.float16 or groups != 1 or not chosen:
            return plain_convolution(x, weight, bias, stride, padding, dilation, groups)
        stride, padding, dilation = (_pair(each) for each in (stride, padding, dilation))
        columns = F.unfold(x, weight.shape[2:], dilation, padding, stride)  # [B, K, places]
        found = product(columns.transpose(1, 2).flatten(0, 1), weight.flatten(1).T)  # [B * places, N]
        high, wide = (
            (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis]
            + 1
            for axis in (0, 1)
        )
        found = found.reshape(len(x), high, wide, -1).permute(0, 3, 1, 2)
        return found if bias is None else found + bias[:, None, None]

    F.linear, F.conv2d = linear, convolution
    try:
        yield
    finally:
        F.linear, F.conv2d = plain_linear, plain_convolution


def product(a: Tensor, b: Tensor) -> Tensor:
    """float16 [M, K] times float16 [K, N], summed up in float16 every sixteen products."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float16, device=a.device)
    for start in range(0, a.shape[1], STEP):
        part = a[:, start : start + STEP].float(), b[start : start + STEP].float()
        total = torch.addmm(total.float(), *part).half()
    return total


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
