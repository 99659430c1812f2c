"""The paths from data to noise, x_t = α_t x_0 + σ_t ε: of a DDPM, and of flow matching.

A path draws times t, and a call with x_0, noise and t returns what a training step needs: x_t, the target of the network's
output, and the weight of its squared error. Its noise level runs from 0 (data) to 1 (noise).

Conversions between the predictions ε, v and x_0 of a DDPM: with α² + σ² = 1 and v = α ε − σ x_0 (Salimans & Ho, arXiv
2202.00512),

    ε   = α v + σ x_t         v = (ε − σ x_t) / α
    x_0 = α x_t − σ v
"""

import torch
from torch import Tensor

PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' names -> ours
QUARTERS = 4  # the diffusion loss is also logged for each quarter of the path
SCHEDULER_TYPES = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}


class NoiseSchedule:
    """α_t and σ_t of a discrete diffusion with `num_steps` noise levels, computed from its cumulative products ᾱ_t.

    Every scheduler of diffusers has the `alphas_cumprod (T,)`.
    """

    def __init__(self, alphas_cumprod: Tensor):
        self.alpha = alphas_cumprod.double().sqrt().float()  # (T,)
        self.sigma = (1 - alphas_cumprod.double()).sqrt().float()  # (T,)

    @property
    def num_steps(self) -> int:
        return len(self.alpha)

    def at(self, timesteps: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """Return α and σ at `timesteps (B,)`, each `(B, 1, …)` with `ndim` dimensions: `(B, 1, 1, 1)` for image latents."""
        if self.alpha.device != timesteps.device:
            self.alpha, self.sigma = self.alpha.to(timesteps.device), self.sigma.to(timesteps.device)
        shape = (-1, *[1] * (ndim - 1))
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)


def velocity(x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return v = α ε − σ x_0."""
    return alpha * noise - sigma * x_0


def error_weight(
    prediction: str, parameterization: str, alpha: Tensor, v_weight_max: float, snr_gamma: float | None = None
) -> Tensor:
    """Return the weight that turns the squared error of the network's own output into a loss in the space `prediction`.

    At fixed x_t the error of v is that of ε divided by α: v = α ε − σ x_0 with x_0 = (x_t − σ ε) / α is

        v = α ε − σ x_t / α + (σ² / α) ε = ((α² + σ²) ε − σ x_t) / α = (ε − σ x_t) / α,

    in which only ε is the network's, so v − v̂ = (ε − ε̂) / α and

        |v − v̂|² = |ε − ε̂|² / α²   for a network that outputs ε under a v-loss,
        |ε − ε̂|² = α² |v − v̂|²     for a network that outputs v under an ε-loss.

    1/α² = 1 + 1/SNR grows without bound towards pure noise (214 at SD-1.5's last step), so it is clipped at `v_weight_max`,
    in the manner of min-SNR (Hang et al., arXiv 2303.09556). Weighting the network's own error, instead of converting its
    output, also avoids dividing by a small α.

    With `snr_gamma` γ the loss is min-SNR's own, min(SNR, γ) |x_0 − x̂_0|², whichever space is asked for. From
    |x_0 − x̂_0|² = |ε − ε̂|² / SNR = σ² |v − v̂|² and SNR = α² / σ² follow its weights,

        min(SNR, γ) / SNR = min(1, γ σ² / α²)          for a network that outputs ε,
        min(SNR, γ) / (SNR + 1) = min(α², γ σ²)        for a network that outputs v.

    Returns a tensor shaped like `alpha`.
    """
    if snr_gamma is not None:
        signal, noise = alpha.square(), 1 - alpha.square()
        if parameterization == "v":
            return torch.minimum(signal, snr_gamma * noise)
        return (snr_gamma * noise / signal).clamp(max=1)
    if prediction == parameterization:
        return torch.ones_like(alpha)
    if (prediction, parameterization) == ("v", "epsilon"):
        return alpha.pow(-2).clamp(max=v_weight_max)
    if (prediction, parameterization) == ("epsilon", "v"):
        return alpha.square()
    raise ValueError(
        f"prediction and parameterization must be v or epsilon, got {prediction!r} and {parameterization!r}"
    )


class DiffusionPath:
    """The path of a DDPM from x_0 to noise: x_t = α_t x_0 + σ_t ε at integer timesteps t, and the loss along it.

    A call with x_0, noise and t returns what a training step needs: x_t, the target of the network's output, and the weight
    of its squared error.

    Args:
        alphas_cumprod: ᾱ_t `(T,)`, an attribute of every diffusers scheduler.
        output: what the network outputs, "epsilon" or "v".
        prediction: the space in which the loss is taken, "epsilon" or "v" (see `error_weight`).
        v_weight_max: upper limit of the weight 1/α² of a v-loss on an ε-network.
        snr_gamma: γ of min-SNR weighting, or None.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        *,
        output: str = "epsilon",
        prediction: str = "v",
        v_weight_max: float = 5.0,
        snr_gamma: float | None = None,
    ):
        self.schedule = NoiseSchedule(alphas_cumprod)
        self.output, self.prediction = output, prediction
        self.v_weight_max, self.snr_gamma = v_weight_max, snr_gamma

    @property
    def num_steps(self) -> int:
        """Noise levels of the path: timesteps t are 0 (clean) to `num_steps` − 1 (noise)."""
        return self.schedule.num_steps

    def draw(self, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw uniform timesteps `(count,)`, int64."""
        return torch.randint(self.schedule.num_steps, (count,), device=device, generator=generator)

    def __call__(self, x_0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t and the target, shaped like `x_0 (B, C, …)`, and the weight `(B, 1, …)` of the error at t `(B,)`."""
        alpha, sigma = self.schedule.at(t, x_0.ndim)  # (B, 1, …)
        x_t = alpha * x_0 + sigma * noise
        target = velocity(x_0, noise, alpha, sigma) if self.output == "v" else noise
        weight = error_weight(self.prediction, self.output, alpha, self.v_weight_max, self.snr_gamma)
        return x_t, target, weight

    def quarter(self, t: Tensor) -> Tensor:
        """Return the quarter of the path in which each timestep of t `(B,)` lies, from 0 (little noise) to 3."""
        return t * QUARTERS // self.schedule.num_steps

    def spread(self, count: int) -> Tensor:
        """Return `count` timesteps, spread evenly between the two ends of the path but without these."""
        return torch.linspace(0, self.schedule.num_steps - 1, count + 2)[1:-1].long()

    def times(self, steps: Tensor) -> Tensor:
        """Return the times at whole `steps` of the path, from 0 to `num_steps` − 1: of a DDPM the timesteps themselves."""
        return steps


DRAWS = ("uniform", "logit_normal")


class FlowPath:
    """The straight path of flow matching: x_t = (1 − t) x_0 + t ε at times t in (0, 1), with the target ε − x_0.

    Times are drawn as SD3 has it (Esser et al., arXiv 2403.03206): u uniform in (0, 1), or the sigmoid of a normal number, then
    t = s u / (1 + (s − 1) u), which a shift s > 1 moves towards noise, as images of more pixels need.

    Args:
        shift: s.
        draw: how u is drawn, one of `DRAWS`.
        logit_mean, logit_std: of the normal number.
    """

    output = prediction = "flow"
    snr_gamma = None
    num_steps = 1000  # of the noise levels that diffusers' schedulers count

    def __init__(
        self, *, shift: float = 1.0, draw: str = "uniform", logit_mean: float = 0.0, logit_std: float = 1.0
    ):
        if draw not in DRAWS:
            raise ValueError(f"draw must be one of {', '.join(DRAWS)}, not {draw!r}")
        self.shift, self.how = shift, draw
        self.logit_mean, self.logit_std = logit_mean, logit_std

    def draw(self, count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Draw times `(count,)`, fp32."""
        if self.how == "logit_normal":
            normal = torch.randn(count, device=device, generator=generator)
            u = (self.logit_mean + self.logit_std * normal).sigmoid()
        else:
            u = torch.rand(count, device=device, generator=generator)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def __call__(self, x_0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t and the target, shaped like `x_0 (B, C, …)`, and the weight 1 `(B, 1, …)` of the error at t `(B,)`."""
        t = t.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1))  # (B, 1, …)
        return (1 - t) * x_0 + t * noise, noise - x_0, torch.ones_like(t)

    def quarter(self, t: Tensor) -> Tensor:
        """Return the quarter of the path in which each time of t `(B,)` lies, from 0 (little noise) to 3."""
        return (t * QUARTERS).long().clamp(max=QUARTERS - 1)

    def spread(self, count: int) -> Tensor:
        """Return `count` times, spread evenly between the two ends of the path but without these."""
        return torch.linspace(0, 1, count + 2)[1:-1]

    def times(self, steps: Tensor) -> Tensor:
        """Return the times at whole `steps` of the path, from 0 to `num_steps` − 1."""
        return steps / self.num_steps


Path = DiffusionPath | FlowPath
