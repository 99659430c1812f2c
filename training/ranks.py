"""The processes of one training, started by `accelerate launch` or torchrun, and what they do together.

One process alone is a group of one, for which everything here is free. Gradients are averaged after backward, and not by
DistributedDataParallel: a step whose λ is 0 has heads without gradients, and heads run outside the network's forward, which
DDP takes for an error. All ranks agree about λ, so that they agree about which gradients there are.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from common.errors import UserError

PATIENCE = timedelta(hours=2)  # with a rank that works alone: it may be writing 40 GB
BUCKET = 2**25  # entries of gradients that travel together: 128 MiB


class Ranks:
    """This process's place among `world` processes."""

    def __init__(self, cpu: bool = False):
        self._state = PartialState(cpu=cpu, timeout=PATIENCE)
        self.rank: int = self._state.process_index
        self.world: int = self._state.num_processes
        # What `accelerate launch` leaves behind when it was asked for several processes and starts one, in silence.
        if self.world == 1 and {"ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR"} <= os.environ.keys():
            raise UserError(
                "accelerate launch was asked for several processes and started one, as it does where it sees no second GPU: "
                f"use torchrun --nproc_per_node N {Path(sys.argv[0]).name} …"
            )

    @property
    def main(self) -> bool:
        return self.rank == 0

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do `work` on the first rank while the others wait; its result, or its `UserError`, is everyone's."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except (UserError, OSError) as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            if self.main:
                raise UserError(outcome[1])
            raise SystemExit(2)  # the first rank has said why
        return outcome[0]

    @contextmanager
    def only_main_speaks(self) -> Iterator[None]:
        """What the other ranks print is not shown."""
        with nullcontext() if self.main else redirect_stdout(io.StringIO()):
            yield

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any rank says so; all ranks get the same answer."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def gather(self, what: list) -> list:
        """The lists of all ranks, one after the other."""
        if self.world == 1:
            return what
        gathered: list[list] = [[] for _ in range(self.world)]
        dist.all_gather_object(gathered, what)
        return [item for part in gathered for item in part]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, which must have the same tensors in the same order."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks."""
        if self.world > 1:
            self.sum(tensors)
            torch._foreach_div_(list(tensors), float(self.world))


def part() -> None:
    """Leave the group once all are done: a process that ends first can take the others' connections, and them, with it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
