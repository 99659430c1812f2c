"""The training objective: L = L_diff + λ (L_token + w · L_manifold)."""

import torch
from torch import Tensor

from models.alignment import MANIFOLD_LOSSES, token_loss
from models.diffusion import NoiseSchedule, add_noise, error_weight, velocity

TERMS = ("loss", "loss_diff", "loss_token", "loss_manifold", "loss_align")


class SD15Loss:
    """Diffusion loss plus alignment of the tapped features with the teacher's tokens (U-REPA, arXiv 2503.18414).

    Args:
        schedule: the base model's noise schedule.
        prediction: space in which the diffusion loss is taken, "v" or "epsilon".
        parameterization: what the network outputs, "v" or "epsilon".
        align_coeff: λ. 0 means that alignment is absent: no tap listens and no head is evaluated.
        manifold_coeff: w.
        manifold: "sample", "token" or "both" Gram matrices.
        upper_only: compare only the strict upper triangle of the Gram matrices.
        v_weight_max: ceiling of the 1/α² weight of a v-loss on an ε-network (see `error_weight`).
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        prediction: str = "v",
        parameterization: str = "epsilon",
        align_coeff: float = 0.8,
        manifold_coeff: float = 3.0,
        manifold: str = "sample",
        upper_only: bool = False,
        v_weight_max: float = 5.0,
    ):
        self.schedule = schedule
        self.prediction, self.parameterization, self.v_weight_max = prediction, parameterization, v_weight_max
        self.align_coeff, self.manifold_coeff = align_coeff, manifold_coeff
        self.manifold_loss, self.upper_only = MANIFOLD_LOSSES[manifold], upper_only

    def __call__(
        self,
        unet,
        clean_latents: Tensor,
        dino_tokens: Tensor | None,
        encoder_hidden_states: Tensor,
        *,
        generator: torch.Generator | None = None,
        align_coeff: float | None = None,
    ) -> dict[str, Tensor]:
        """Draw noise and timesteps from `generator` and return the terms of the loss, each a scalar.

        Args:
            unet: an `SD15UNetAligned`, or anything with its `forward`, `get_aligned_tokens` and `clear_hooks`.
            clean_latents: `(B, 4, h, w)`, scaled.
            dino_tokens: `(B, N, D)`; not looked at while λ is 0.
            encoder_hidden_states: `(B, 77, 768)`.
            align_coeff: λ at this step, when it is scheduled.
        """
        coeff = self.align_coeff if align_coeff is None else align_coeff
        noise, timesteps = self.draw(clean_latents, generator)
        alpha, sigma = self.schedule.at(timesteps, clean_latents.ndim)  # (B, 1, 1, 1)
        noisy = add_noise(clean_latents, noise, alpha, sigma)  # (B, 4, h, w)
        output = unet(noisy, timesteps, encoder_hidden_states, capture=coeff > 0)  # (B, 4, h, w)

        loss_diff = self.diffusion_error(output, clean_latents, noise, timesteps).mean()
        if coeff == 0:
            zero = loss_diff.new_zeros(())
            return dict(zip(TERMS, (loss_diff, loss_diff, zero, zero, zero), strict=True))

        tokens = unet.get_aligned_tokens()  # {tap: (B, N, D)}
        unet.clear_hooks()
        loss_token = torch.stack([token_loss(x, dino_tokens) for x in tokens.values()]).mean()
        loss_manifold = loss_diff.new_zeros(())
        if self.manifold_coeff > 0:
            loss_manifold = torch.stack(
                [self.manifold_loss(x, dino_tokens, self.upper_only) for x in tokens.values()]
            ).mean()
        loss_align = loss_token + self.manifold_coeff * loss_manifold
        loss = loss_diff + coeff * loss_align
        return dict(zip(TERMS, (loss, loss_diff, loss_token, loss_manifold, loss_align), strict=True))

    def diffusion_error(
        self, output: Tensor, clean_latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        """The diffusion loss of each image `(B,)`, given what the network put out for it."""
        alpha, sigma = self.schedule.at(timesteps, clean_latents.ndim)  # (B, 1, 1, 1)
        target = velocity(clean_latents, noise, alpha, sigma) if self.parameterization == "v" else noise
        weight = error_weight(self.prediction, self.parameterization, alpha, self.v_weight_max)
        return (weight * (output.float() - target.float()).square()).flatten(1).mean(1)

    def draw(self, clean_latents: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Noise like the latents and uniform timesteps `(B,)`."""
        like = {"device": clean_latents.device, "generator": generator}
        noise = torch.randn(clean_latents.shape, dtype=clean_latents.dtype, **like)
        return noise, torch.randint(self.schedule.num_steps, (len(clean_latents),), **like)


def drop_captions(text: Tensor, null_text: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Replace each caption `(B, L, C)` by the null prompt `(L, C)` with the given probability (for guidance)."""
    dropped = torch.rand(len(text), device=text.device, generator=generator) < probability  # (B,)
    return torch.where(dropped[:, None, None], null_text, text)
