"""The coefficient λ, the weight of the alignment loss at each step: a schedule, which a cutoff by similarity may end."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CoefficientSchedule:
    """The schedule of λ: a linear warm-up from 0 to `coeff`, then a decay to `coeff_end`, then `coeff_end` until the end.

    Where the schedule is "constant", λ stays `coeff` instead. The decay is counted from the end of the warm-up: 100 warm-up
    and 5000 decay steps end at step 5100. `decay_steps = 0` stretches it to `total_steps`. From `cutoff_step` on
    (0 = never) λ is 0.
    """

    coeff: float
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    coeff_end: float = 0.0
    power: float = 1.0
    cutoff_step: int = 0
    total_steps: int

    def __call__(self, step: int) -> float:
        """Return λ at `step`, which is counted from 0."""
        if self.coeff == 0 or (self.cutoff_step and step >= self.cutoff_step):
            return 0.0
        if step < self.warmup_steps:
            return self.coeff * step / self.warmup_steps
        length = self.decay_steps or max(self.total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / length, 1.0)
        return self.coeff_end + (self.coeff - self.coeff_end) * DECAYS[self.schedule](progress, self.power)


# From the progress of the decay (0 to 1) to a factor that is 1 where λ is coeff and 0 where it is coeff_end.
DECAYS = {
    "constant": lambda progress, power: 1.0,
    "linear": lambda progress, power: 1 - progress,
    "cosine": lambda progress, power: (1 + math.cos(math.pi * progress)) / 2,
    "polynomial": lambda progress, power: (1 - progress) ** power,
}


class SimilarityCutoff:
    """Turns the alignment off once the moving average of the similarity has reached a threshold.

    The similarity is the mean cosine between the heads' tokens and the teacher's, in [−1, 1]. Its exponential moving average is
    corrected for its start at 0, as Adam's moments are. Nothing is decided before the average has seen as many values as it
    averages over, 1 / (1 − decay), so that no single batch can end the alignment. Under torch.distributed the cutoff uses the
    mean over ranks, so that all ranks decide the same.

    Args:
        threshold: the average at which the alignment is turned off, in [−1, 1].
        ema_decay: in [0, 1); 0.99 averages over about 100 values.
        mode: "permanent" stays off; "recoverable" turns the alignment on again when the average falls below the threshold.
        every: while the alignment is off in the mode "recoverable", the similarity is measured every `every` steps.
    """

    def __init__(
        self, threshold: float, *, ema_decay: float = 0.99, mode: str = "permanent", every: int = 10
    ):
        self.threshold, self.decay, self.mode, self.every = threshold, ema_decay, mode, every
        self.enough = math.ceil((1 - 1e-9) / (1 - ema_decay))
        self._sum, self._count, self._off = 0.0, 0, False
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def observe(self, similarity: Tensor) -> None:
        """Record the similarity of a step, a scalar on any device. It is read later, so that nothing waits for the device."""
        value = similarity.detach().float().clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(value)
            value /= dist.get_world_size()
        self._settle()
        if value.is_cuda:
            host = torch.empty((), pin_memory=True).copy_(value, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._pending = (host, copied)
        else:
            self._pending = (value, None)

    @property
    def off(self) -> bool:
        """Whether λ must be 0, according to the similarities observed so far."""
        self._settle()
        return self._off

    @property
    def average(self) -> float | None:
        """Return the bias-corrected moving average, or None before the first value."""
        self._settle()
        return self._sum / (1 - self.decay**self._count) if self._count else None

    def measures(self, step: int) -> bool:
        """Whether the similarity must be measured at this step although λ is 0."""
        return self.mode == "recoverable" and step % self.every == 0

    def state_dict(self) -> dict:
        self._settle()
        return {"sum": self._sum, "count": self._count, "off": self._off}

    def load_state_dict(self, state: dict) -> None:
        self._sum, self._count, self._off = state["sum"], state["count"], state["off"]

    def _settle(self) -> None:
        if self._pending is None:
            return
        (value, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        if not math.isfinite(value.item()):
            return  # the optimiser skips this step, so its similarity does not count
        self._sum = self.decay * self._sum + (1 - self.decay) * value.item()
        self._count += 1
        if self._count >= self.enough:
            reached = self._sum / (1 - self.decay**self._count) >= self.threshold
            self._off = reached or (self._off and self.mode == "permanent")


class Coefficient:
    """λ at each step of a training: that of the schedule, or 0 while the cutoff has turned the alignment off."""

    def __init__(self, schedule: CoefficientSchedule, cutoff: SimilarityCutoff | None = None):
        self.schedule, self.cutoff = schedule, cutoff

    def __call__(self, step: int) -> float:
        """Return λ at `step`. Steps must be asked for in their order."""
        return 0.0 if self.cutoff is not None and self.cutoff.off else self.schedule(step)

    def evaluates_heads(self, step: int) -> bool:
        """Whether this step must evaluate the heads, for the alignment loss or only to measure the similarity."""
        if self.schedule(step) == 0:
            return False
        return self.cutoff is None or not self.cutoff.off or self.cutoff.measures(step)

    def observe(self, similarity: Tensor) -> None:
        """Record the mean cosine of a step that evaluated the heads."""
        if self.cutoff is not None:
            self.cutoff.observe(similarity)

    def metrics(self) -> dict[str, float]:
        """Return the values to log beside λ: the moving average of the similarity, where there is a cutoff."""
        average = None if self.cutoff is None else self.cutoff.average
        return {} if average is None else {"similarity_ema": average}

    def state_dict(self) -> dict:
        return {} if self.cutoff is None else self.cutoff.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if self.cutoff is not None and state:  # the state is empty where the run had no cutoff before
            self.cutoff.load_state_dict(state)
