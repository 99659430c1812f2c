"""Communication among the processes of one training, which `accelerate launch` or torchrun started.

With a single process nothing here communicates. Gradients are averaged by `gradient_mean.py`, and not by
DistributedDataParallel: at a step whose λ is 0 the heads have no gradients, and heads run outside the network's forward, both
of which DDP treats as errors. All ranks use the same λ.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from common.errors import UserError, run_script

PATIENCE = timedelta(hours=2)  # how long ranks wait for one that works alone: it may be writing 40 GB


class Ranks:
    """This process's rank among `world` processes, and what the processes exchange."""

    def __init__(self, cpu: bool = False):
        self._state = PartialState(cpu=cpu, timeout=PATIENCE)
        self.rank: int = self._state.process_index
        self.world: int = self._state.num_processes
        # `accelerate launch` sets these variables when it was asked for several processes but silently started one.
        if self.world == 1 and {"ACCELERATE_DYNAMO_BACKEND", "MASTER_ADDR"} <= os.environ.keys():
            raise UserError(
                "accelerate launch was asked for several processes and started one, as it does where it sees no second GPU: "
                f"use torchrun --nproc_per_node N {Path(sys.argv[0]).name} …"
            )

    @property
    def main(self) -> bool:
        return self.rank == 0

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do `work` on the first rank while the others wait, and return its result on all ranks.

        Where it raises `UserError` or `OSError`, the first rank raises `UserError` and the other ranks exit.
        """
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
            raise SystemExit(2)  # the first rank prints the reason
        return outcome[0]

    @contextmanager
    def only_main_speaks(self) -> Iterator[None]:
        """Hide what all ranks but the first print."""
        with nullcontext() if self.main else redirect_stdout(io.StringIO()):
            yield

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return on all ranks whether `flag` is true on any rank."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def gather(self, what: list) -> list:
        """Return the lists of all ranks, joined in the order of the ranks."""
        if self.world == 1:
            return what
        gathered: list[list] = [[] for _ in range(self.world)]
        dist.all_gather_object(gathered, what)
        return [item for part in gathered for item in part]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, which must have the same tensors in the same order."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def run_ranks(main: Callable[[], None]) -> None:
    """Run the `main` of a command that several processes may share, as `run_script` does, and let them end together.

    One that ended earlier could break the others' connections; and a process that ends in the group may be aborted by a thread
    of Gloo, which drops the last collective's tensors when Python is gone.
    """
    run_script(main)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
