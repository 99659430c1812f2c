"""The order in which training reads images, and the seeds of its random numbers: pure functions of step and rank."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from common.errors import UserError


@dataclass
class StepSampler(Sampler[list[int]]):
    """Yields batches of indices that depend only on the step. The order of an epoch is a permutation drawn from (seed, epoch).

    Iteration starts at `first_step` and ends before `last_step`. With n ranks a step uses `accumulate` · n consecutive batches.
    Of every n batches, the rank with `ranks = (r, n)` reads number r, so that ranks read disjoint images. A step sees the same
    images however they are divided between accumulation and ranks. If too few images for a whole step are left at the end of an
    epoch, they are dropped.
    """

    num_samples: int
    _: KW_ONLY
    batch_size: int
    seed: int
    first_step: int
    last_step: int
    accumulate: int = 1
    ranks: tuple[int, int] = (0, 1)

    def __post_init__(self):
        world, accumulate = self.ranks[1], self.accumulate
        if self.num_samples < self.batch_size * accumulate * world:
            fewer = f"{self.num_samples} images are fewer than data.batch_size = {self.batch_size}"
            times = f" × optim.accumulate = {accumulate}" if accumulate > 1 else ""
            raise UserError(f"{fewer}{times} on {world} process(es): lower it")

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = self.ranks
        steps_per_epoch = self.num_samples // (self.batch_size * self.accumulate * world)
        order, order_epoch = None, -1
        for step in range(self.first_step, self.last_step):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
                order, order_epoch = torch.randperm(self.num_samples, generator=generator), epoch
            for part in range(self.accumulate):
                first = ((position * self.accumulate + part) * world + rank) * self.batch_size
                yield order[first : first + self.batch_size].tolist()


def seed_of(purpose: str, seed: int, counter: int, rank: int = 0) -> int:
    """Return a seed of `torch.Generator` for "order", where `counter` is the epoch, or "noise", where it is the step."""
    key = ({"order": 0, "noise": 1}[purpose], seed, counter, rank)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
