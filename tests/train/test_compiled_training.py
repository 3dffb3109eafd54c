"""Compilation of a UNet for training."""

import pytest
import torch
from torch import nn

from ip2p.models.compiled import compile_for_training


def test_a_unet_is_compiled_for_training_on_gpus_only(monkeypatch):
    """On CPUs, torch 2.13 computes wrong gradients in bf16."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    network = nn.Conv2d(1, 1, 1)
    with pytest.warns(UserWarning, match="not compiled for training"):
        compile_for_training(network, torch.device("cpu"))
    assert compiled == []
    compile_for_training(network, torch.device("cuda"))
    assert compiled == [network]
