"""Convert values to the bytes that a shard stores, and back again, on any device.

`encode` runs on the device of the encoder, and `decode` on the device that uses the values. Only stored bytes travel in
between, so int8 tokens need half the disk space, half the reading and half the copying to the GPU.

The tokens of one image, (196, 1024), take 401,408 bytes as float16 or bfloat16 and 206,976 bytes as int8.
`benchmarks/token_encodings.py` measures how much precision each encoding loses.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_FP16 = 2.0**-24
GROUP = 64  # in int8 so many channels share one scale; the width of every DINOv2 is a multiple


@dataclass(frozen=True)
class Encoding:
    """The three functions of one stored type. `decode` gives views, not copies, of plain types."""

    value_bytes: Callable[[Sequence[int]], int]  # the bytes of one value of this shape
    encode: Callable[[Tensor], Tensor]  # floats (n, *shape) to uint8 (n, value_bytes)
    decode: Callable[[Tensor, Sequence[int]], Tensor]  # uint8 (n, value_bytes) and a shape to (n, *shape)


def _plain(dtype: torch.dtype) -> Encoding:
    return Encoding(
        lambda shape: math.prod(shape) * dtype.itemsize,
        lambda values: values.to(dtype).contiguous().view(len(values), -1).view(torch.uint8),
        lambda raw, shape: raw.view(dtype).view(len(raw), *shape),
    )


def _int8_bytes(shape: Sequence[int]) -> int:
    if shape[-1] % GROUP:
        raise ValueError(f"int8 has a scale for {GROUP} channels each, and {shape[-1]} is no multiple")
    return math.prod(shape) * (GROUP + 2) // GROUP


def _encode_int8(values: Tensor) -> Tensor:
    """Encode as symmetric int8, with one fp16 scale for every 64 channels: a value is all its integers, then all its scales."""
    groups = values.float().view(len(values), -1, GROUP)  # (n, G, 64)
    # Rounded to fp16 before the division below, because that is what `decode` multiplies by.
    scale = (groups.abs().amax(-1, keepdim=True) / 127).half()  # (n, G, 1)
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
    "uint8": _plain(torch.uint8),
    "int8": Encoding(_int8_bytes, _encode_int8, _decode_int8),
}
