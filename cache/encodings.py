"""How a value becomes the bytes that a shard stores, and back again, on any device.

`encode` runs where the encoder ran and `decode` where the values are used, so that only stored bytes travel: int8 tokens cost
half the disk, half the reading and half the copy to the GPU.

Bytes of one image's tokens (196, 1024): float16 and bfloat16 401,408, int8 206,976. What each loses is measured by
`benchmarks/token_encodings.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_FP16 = 2.0**-24
GROUP = 64  # channels that share one scale in int8; divides the width of every DINOv2


@dataclass(frozen=True)
class Encoding:
    """`value_bytes(shape)`; `encode`: float `(n, *shape)` to uint8 `(n, value_bytes)`; `decode` the other way, without a copy
    where the bytes already are numbers."""

    value_bytes: Callable[[Sequence[int]], int]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Sequence[int]], Tensor]


def _plain(dtype: torch.dtype) -> Encoding:
    return Encoding(
        lambda shape: math.prod(shape) * dtype.itemsize,
        lambda values: values.to(dtype).contiguous().view(len(values), -1).view(torch.uint8),
        lambda raw, shape: raw.view(dtype).view(len(raw), *shape),
    )


def _int8_bytes(shape: Sequence[int]) -> int:
    if shape[-1] % GROUP:
        raise ValueError(
            f"int8 shares a scale among {GROUP} channels, and {shape[-1]} is no multiple of that"
        )
    return math.prod(shape) * (GROUP + 2) // GROUP


def _encode_int8(values: Tensor) -> Tensor:
    """Symmetric int8 with one fp16 scale for every 64 channels: all integers of a value first, then all its scales."""
    groups = values.float().view(len(values), -1, GROUP)  # (n, G, 64)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()  # (n, G, 1); rounded before it is used
    integers = (groups / scale.float().clamp_min(SMALLEST_FP16)).round().clamp(-127, 127)
    parts = (integers.to(torch.int8), scale)
    return torch.cat([part.view(len(values), -1).view(torch.uint8) for part in parts], dim=1)


def _decode_int8(raw: Tensor, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    integers = raw[:, :count].view(torch.int8).view(len(raw), -1, GROUP)  # (n, G, 64)
    scale = raw[:, count:].contiguous().view(torch.float16).view(len(raw), -1, 1)  # (n, G, 1)
    return (integers * scale).view(len(raw), *shape)  # fp16


ENCODINGS = {
    "float16": _plain(torch.float16),
    "bfloat16": _plain(torch.bfloat16),
    "float32": _plain(torch.float32),
    "int8": Encoding(_int8_bytes, _encode_int8, _decode_int8),
}
