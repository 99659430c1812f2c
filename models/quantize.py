"""Frozen weights in fewer bits, as diffusers loads them: the table for `model.quantize`.

All linear layers are quantised, as in diffusers' own examples; convolutions, norms and LoRA are not.
"""

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import torch
from torch import nn

from common.errors import UserError


def _torchao_int8(_dtype: torch.dtype):
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig(version=2))


def _bitsandbytes_nf4(dtype: torch.dtype):
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


class Quantization(NamedTuple):
    package: str  # of pip
    build: Callable[[torch.dtype], object]  # diffusers' config, from the precision of the forward
    bits: float  # of a weight, scales included, for `--plan`
    needs_gpu: bool  # to quantise, by diffusers' rule
    unpacks: (
        bool  # whether backward keeps weights in the precision of the forward, unless blocks are recomputed
    )


QUANTIZATIONS = {
    "int8": Quantization("torchao", _torchao_int8, 8, False, True),  # one scale for each row
    # QLoRA's (https://arxiv.org/abs/2305.14314): a scale of 8 bits for 64 weights, one of 32 bits for 256 of these.
    "nf4": Quantization("bitsandbytes", _bitsandbytes_nf4, 4 + 8 / 64 + 32 / (64 * 256), True, False),
}


def quantization_config(name: str, dtype: torch.dtype, device: torch.device | None):
    """diffusers' config of a quantisation by its name; raises `UserError` where its package is missing, or the GPU it needs."""
    found = QUANTIZATIONS[name]
    if dtype != torch.bfloat16:
        raise UserError(
            f"model.quantize = {name} computes in bf16: set train.precision=bf16, and eval.precision=bf16 to draw samples"
        )
    if found.needs_gpu and (device is None or device.type == "cpu"):
        raise UserError(f"model.quantize = {name} needs a GPU: choose model.quantize=int8 or none")
    try:
        importlib.import_module(found.package)
        return found.build(dtype)
    except ImportError as error:
        raise UserError(
            f"model.quantize = {name} needs {found.package} ({error}): pip install {found.package}, or choose "
            "model.quantize=none"
        ) from None


def quantized_weights(network: nn.Module) -> dict[int, nn.Parameter]:
    """The frozen weights that would be quantised, by their id: for a forecast, of a network that is not."""
    return {
        id(module.weight): module.weight
        for module in network.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    }


def count_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for; two of 4 bits lie in a byte."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes
    return parameter.numel() if state is None else math.prod(state.shape)
