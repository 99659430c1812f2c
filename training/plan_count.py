"""Count what a step computes and keeps on the device "meta", from shapes only; `plan.py` says what that means."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from training.plan_time import count_work


@dataclass(frozen=True)
class StepCost:
    """Operations per image: of forward, of backward, and of forward by the name of each module inside the network."""

    forward: float
    backward: float
    modules: dict[str, float]

    @property
    def flops(self) -> float:
        return self.forward + self.backward


def count_step(forward: Callable[[int], Tensor], batch: int = 1) -> StepCost:
    """Count the operations of `forward(batch)`, which returns a loss, and of its backward; both run on the device "meta"."""
    with FlopCounterMode(display=False) as there:
        loss = forward(batch)
    with FlopCounterMode(display=False) as back:
        loss.backward()
    modules = {
        name.partition(".")[2]: sum(flops.values()) / batch for name, flops in there.get_flop_counts().items()
    }
    return StepCost(there.get_total_flops() / batch, back.get_total_flops() / batch, modules)


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Return the bytes that autograd keeps for backward, for a GPU's attention.

    Each storage counts once, and the weights are left out.
    """
    known = {_storage(p) for p in parameters}
    kept: dict[int, Tensor] = {}  # holds the tensors, because a freed storage could be reused

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FlashAttention():
        forward()
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)


def work_of(forward: Callable[[int], Tensor], again: float = 0.0) -> dict[str, float]:
    """Return what `count_work` counts with a GPU's attention."""
    with _FlashAttention():
        return count_work(forward, again)


class _FlashAttention(TorchFunctionMode):
    """Use attention that keeps no N×N matrix; on the device "meta" PyTorch would choose the kernel that does."""

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
