"""fp32 master weights for a network that computes in bf16; a network that computes in fp32 is its own master."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Masters:
    """Holds the trained weights in fp32, by name. The optimiser, the moving average and checkpoints use these.

    For bf16 the whole network is converted, frozen weights included, so that no step has to cast weights. An fp32 copy of the
    trained weights is kept, because bf16 has eight bits of precision and would lose an update of one part in a thousand. Where
    the network computes in fp32, `parameters` are the network's own. `masters` and `working` list both in one order.

    Args:
        model: a module with `trained_parameters()`, already on its device; it is converted to `dtype` in place.
        dtype: torch.float32 or torch.bfloat16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        own: dict[str, nn.Parameter] = model.trained_parameters()
        self.parameters = own
        self._separate = dtype != torch.float32  # from the network's own weights
        if self._separate:
            self.parameters = {name: nn.Parameter(p.detach().float().clone()) for name, p in own.items()}
            model.to(dtype)
        self.working = list(own.values())
        self.masters = list(self.parameters.values())

    @torch.no_grad()
    def collect(self, members: Iterable[int] | None = None) -> None:
        """Add the network's gradients to those of the masters, in fp32, and remove them from the network.

        `members` are the numbers of those to collect; None takes all.
        """
        if not self._separate:
            return
        fresh, added, onto = [], [], []
        for member in range(len(self.masters)) if members is None else members:
            master, working = self.masters[member], self.working[member]
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
        """Copy the masters' values into the network."""
        if self._separate:
            torch._foreach_copy_(self.working, self.masters)

    @contextmanager
    def showing(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Put `values` into the network, in the order of `parameters`; at the end of the block restore the values it had."""
        with torch.no_grad():
            before = [p.detach().clone() for p in self.working]
            torch._foreach_copy_(self.working, list(values))
            try:
                yield
            finally:
                torch._foreach_copy_(self.working, before)
