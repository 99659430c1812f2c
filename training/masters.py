"""fp32 master weights of a network that computes in bf16, and nothing at all for one that computes in fp32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Masters:
    """What is trained, in fp32, by name: what the optimiser, the moving average and checkpoints hold.

    In bf16 the whole network is turned to bf16, frozen weights included, so that nothing is cast from step to step; of what is
    trained an fp32 copy is kept, because an update of one part in a thousand is lost in bf16's eight bits. Where the network
    computes in fp32, `parameters` are its own.

    Args:
        model: anything with `trained_parameters()`, on its device; it is turned to `dtype` in place.
        dtype: torch.float32 or torch.bfloat16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        own: dict[str, nn.Parameter] = model.trained_parameters()
        self.dtype = dtype
        self.parameters = own
        if dtype != torch.float32:
            self.parameters = {name: nn.Parameter(p.detach().float().clone()) for name, p in own.items()}
            model.to(dtype)
        self._working = list(own.values())
        self._masters = list(self.parameters.values())

    @property
    def separate(self) -> bool:
        """Whether the network's own weights are copies."""
        return self.dtype != torch.float32

    @torch.no_grad()
    def collect(self) -> None:
        """Add the network's gradients to the masters', in fp32, and forget them; where there is none, nothing changes."""
        if not self.separate:
            return
        fresh, added, onto = [], [], []
        for master, working in zip(self._masters, self._working, strict=True):
            if working.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
                fresh.append((master.grad, working.grad))
            else:
                onto.append(master.grad)
                added.append(working.grad)
            working.grad = None
        if fresh:
            torch._foreach_copy_(*map(list, zip(*fresh, strict=True)))
        if added:
            torch._foreach_add_(onto, added)

    @torch.no_grad()
    def publish(self) -> None:
        """Give the network the masters' values."""
        if self.separate:
            torch._foreach_copy_(self._working, self._masters)

    @contextmanager
    def showing(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the network have other values, in the order of `parameters`, and take them back unchanged at the end."""
        with torch.no_grad():
            before = [p.detach().clone() for p in self._working]
            torch._foreach_copy_(self._working, list(values))
            try:
                yield
            finally:
                torch._foreach_copy_(self._working, before)
