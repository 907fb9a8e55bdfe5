"""testlseg.py's random weights."""

from __future__ import annotations

import torch

import testlseg
from lseg.model import LSegConfig, LSegImageEncoder


def test_random_weights_leave_nothing_out(seed):
    """Of a new model all biases are zero and all norms plain: its exported graph would have fewer operations."""
    torch.manual_seed(seed)
    sizes = {"image_size": 32, "width": 16, "depth": 4, "heads": 2, "taps": (0, 1, 2, 3), "embedding": 8}
    new = LSegImageEncoder(LSegConfig(**sizes, reassemble=(8, 8, 8, 8), features=8))
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    plain = {name for name, tensor in before.items() if tensor.numel() > 1 and tensor.unique().numel() == 1}
    assert any("bias" in name for name in plain) and any("running_var" in name for name in plain)
    for name, tensor in testlseg.vary(new).state_dict().items():
        assert (tensor.numel() == 1) or tensor.unique().numel() > 1, name
        assert (name in plain) != torch.equal(tensor, before[name]), name
        assert (tensor - before[name]).abs().max() < 0.2, name
