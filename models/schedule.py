"""The coefficient λ(t): how strongly the alignment acts at each step. A pure function of the step."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CoefficientSchedule:
    """λ at a step: linear warm-up from 0 to `coeff`, then a decay to `coeff_end`, then `coeff_end` for good.

    The decay is counted from the end of the warm-up: 100 warm-up and 5000 decay steps end at step 5100. `decay_steps = 0`
    stretches it to `total_steps`. From `cutoff_step` on (0 = never) λ is 0.
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
        """λ at `step`, counted from 0."""
        if self.coeff == 0 or (self.cutoff_step and step >= self.cutoff_step):
            return 0.0
        if step < self.warmup_steps:
            return self.coeff * step / self.warmup_steps
        length = self.decay_steps or max(self.total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / length, 1.0)
        return self.coeff_end + (self.coeff - self.coeff_end) * DECAYS[self.schedule](progress, self.power)


# Share of the way from coeff_end back to coeff, at progress 0 … 1 through the decay.
DECAYS = {
    "constant": lambda progress, power: 1.0,
    "linear": lambda progress, power: 1 - progress,
    "cosine": lambda progress, power: (1 + math.cos(math.pi * progress)) / 2,
    "polynomial": lambda progress, power: (1 - progress) ** power,
}
