"""What a step of a network costs, counted on shapes alone: nothing is computed and no weight is read.

One multiply-add is two operations; norms, activations, softmax and resizing are not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class StepCost:
    """Of one image: operations of forward and backward, and of forward by the name of each module inside the network."""

    forward: float
    backward: float
    modules: dict[str, float]

    @property
    def flops(self) -> float:
        return self.forward + self.backward


def count_step(forward: Callable[[int], Tensor], batch: int = 1) -> StepCost:
    """Count `forward(batch)`, which returns a loss, and its backward; all of it on the device "meta"."""
    with FlopCounterMode(display=False) as there:
        loss = forward(batch)
    with FlopCounterMode(display=False) as back:
        loss.backward()
    modules = {
        name.partition(".")[2]: sum(flops.values()) / batch for name, flops in there.get_flop_counts().items()
    }
    return StepCost(there.get_total_flops() / batch, back.get_total_flops() / batch, modules)


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once and weights left out, with attention as a GPU does it."""
    known = {_storage(p) for p in parameters}
    saved: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no storage is used again while we count

    def pack(tensor: Tensor) -> Tensor:
        if (place := _storage(tensor)) not in known:
            saved[place] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FlashAttention():
        forward()
    return sum(saved.values())


class _FlashAttention(TorchFunctionMode):
    """Attention that keeps no N×N matrix: on "meta" PyTorch would choose the one that does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value")
        query, key, value = (*args, *(kwargs[name] for name in names[len(args) :]))[:3]
        if query.device.type != "meta":
            return function(*args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
