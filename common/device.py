"""Choose the device and the precision that a command computes with."""

import os
import re
from contextlib import AbstractContextManager

import torch

from common.errors import UserError


def check_device_name(name: str) -> str:
    """Return the name of a device; raises `UserError` for anything but auto, cpu, cuda and cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"device {name!r} cannot be used: choose auto, cpu, cuda or cuda:N")
    return name


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of this name; `auto` is cuda when present (under torchrun this rank's GPU), else cpu.

    Raises `UserError` for a device that cannot be used.
    """
    if check_device_name(name) == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # pinned memory, streams and events are those of the current GPU
    return device


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the dtype in which `autocast` would compute; raises the same errors."""
    with autocast(device, precision):
        on = torch.is_autocast_enabled(device.type)
    return torch.bfloat16 if on else torch.float32


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a bf16 autocast, switched off where the precision is fp32. `auto` is bf16 on a GPU that has it, fp32 elsewhere."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("this GPU has no bf16: choose the precision fp32")
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
