"""Devices and precisions."""

import pytest
import torch

from common.device import autocast


@pytest.mark.parametrize("native", [False, True])
def test_bf16_that_a_gpu_only_emulates_does_not_count(native, monkeypatch):
    """A T4 or a V100 runs bf16 many times slower than fp32, and says that it supports it."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype, enabled: enabled)
    assert autocast(torch.device("cuda"), "auto") is native
