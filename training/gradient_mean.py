"""Average gradients over the ranks while backward still computes others."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.aligned import HEADS
from training.masters import Masters
from training.ranks import PATIENCE, Ranks

BUCKET = 2**22  # entries of gradients that are sent together: 16 MiB
ALIGNED = 64  # entries; kernels read aligned gradients faster, and norms add them in the usual order


class GradientMean:
    """Replaces the gradients of the masters by their means over the ranks; with a single process it does nothing.

    After `start`, each bucket of gradients is sent as soon as backward has made them; `finish` sends what is left and waits,
    which on a GPU only the device does. The first step sends all at its end, and shows the order in which backward makes them.
    Every rank sends every bucket, in the first rank's order, and zeros where it has no gradient: so no rank waits for a bucket
    that another never sends. The hosts count which parameters have a gradient anywhere. One that has none, such as those of
    heads while λ is 0, keeps None, so that the optimiser leaves it alone.
    """

    def __init__(self, ranks: Ranks, masters: Masters):
        self._ranks, self._masters = ranks, masters
        self._sends = False
        self._order: list[int] = []  # parameters by number, as backward gave them their gradients
        self._buckets: list[_Bucket] = []
        self._of: dict[int, _Bucket] = {}
        if ranks.world == 1:
            return
        # NCCL sends nothing from hosts.
        self._hosts = (
            None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
        )
        for member, working in enumerate(masters.working):
            working.register_post_accumulate_grad_hook(partial(self._arrived, member))

    def start(self) -> None:
        """Send gradients from now on; to be called before the last backward of a step."""
        self._sends, self._sent = self._ranks.world > 1, 0
        self._order = []
        self._has = torch.zeros(len(self._masters.masters), dtype=torch.int32)
        for bucket in self._buckets:
            bucket.awaited = set(bucket.members)

    def _arrived(self, member: int, _parameter: nn.Parameter) -> None:
        if self._sends:
            self._order.append(member)
            if self._buckets:
                self._of[member].awaited.discard(member)
            while self._sent < len(self._buckets) and not self._buckets[self._sent].awaited:
                self._send()

    def _share_out(self) -> None:
        """Share the parameters out to buckets; heads come last, because at some steps they have no gradients."""
        order = self._ranks.on_main(lambda: list(dict.fromkeys(self._order)))
        names = list(self._masters.parameters)
        rest = [member for member in range(len(names)) if member not in set(order)]
        for member in sorted(order + rest, key=lambda member: names[member].startswith(HEADS)):
            room = _room(self._masters.masters[member])
            if not self._buckets or self._buckets[-1].size + room > BUCKET:
                self._buckets.append(_Bucket())
            self._of[member] = bucket = self._buckets[-1]
            bucket.members.append(member)
            bucket.size += room

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[self._sent]
        self._sent += 1
        self._masters.collect(bucket.members)
        masters = [self._masters.masters[member] for member in bucket.members]
        bucket.flat = torch.zeros(bucket.size, device=masters[0].device)
        # In the layout of the masters, which the optimiser's kernel expects of their gradients.
        means = [
            part[: master.numel()].as_strided(master.shape, master.stride())
            for master, part in zip(masters, bucket.flat.split([*map(_room, masters)]), strict=True)
        ]
        own = [(mean, m.grad) for mean, m in zip(means, masters, strict=True) if m.grad is not None]
        if own:
            torch._foreach_copy_(*map(list, zip(*own, strict=True)))
        for member, master, mean in zip(bucket.members, masters, means, strict=True):
            self._has[member] = master.grad is not None
            master.grad = mean
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)

    def finish(self) -> None:
        """Wait until all gradients are the means over the ranks."""
        if self._ranks.world == 1:
            return
        if not self._buckets:
            self._share_out()
        while self._sent < len(self._buckets):
            self._send()
        self._sends = False
        dist.all_reduce(self._has, group=self._hosts)
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.flat.div_(self._ranks.world)
            bucket.flat = bucket.work = None
        for master, count in zip(self._masters.masters, self._has.tolist(), strict=True):
            if count == 0:
                master.grad = None


class _Bucket:
    """Gradients that are sent together."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self.size = 0  # entries
        self.awaited: set[int] = set()  # members without a gradient of this backward
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None


def _room(parameter: Tensor) -> int:
    return -(-parameter.numel() // ALIGNED) * ALIGNED
