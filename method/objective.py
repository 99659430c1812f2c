"""The training objective: L = L_diff + λ (L_token + w · L_manifold)."""

import torch
from torch import Tensor

from method.alignment import AlignmentLoss
from method.paths import NoiseSchedule, add_noise, error_weight, velocity

PER_IMAGE = ("errors", "timesteps")
TERMS = ("loss", "loss_diff", "loss_token", "loss_manifold", "loss_align")


class SD15Loss:
    """Diffusion loss plus alignment of the tapped features with the teacher's tokens (U-REPA, arXiv 2503.18414).

    Args:
        schedule: the base model's noise schedule.
        prediction: space in which the diffusion loss is taken, "v" or "epsilon".
        parameterization: what the network outputs, "v" or "epsilon".
        align_coeff: λ. 0 means that alignment is absent: no tap listens and no head is evaluated.
        v_weight_max: ceiling of the 1/α² weight of a v-loss on an ε-network (see `error_weight`).
        snr_gamma: γ of min-SNR weighting, or None (see `error_weight`).
        alignment: knobs of `AlignmentLoss`, such as manifold_coeff = w.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        prediction: str = "v",
        parameterization: str = "epsilon",
        align_coeff: float = 0.8,
        v_weight_max: float = 5.0,
        snr_gamma: float | None = None,
        **alignment,
    ):
        self.schedule = schedule
        self.prediction, self.parameterization = prediction, parameterization
        self.v_weight_max, self.snr_gamma = v_weight_max, snr_gamma
        self.align_coeff = align_coeff
        self.alignment = AlignmentLoss(**alignment)

    def __call__(
        self,
        unet,
        clean_latents: Tensor,
        dino_tokens: Tensor | None,
        encoder_hidden_states: Tensor,
        *,
        generator: torch.Generator | None = None,
        align_coeff: float | None = None,
        measure: bool = False,
    ) -> dict[str, Tensor]:
        """Draw noise and timesteps from `generator` and return the terms of the loss.

        These are `TERMS` and, where the heads were evaluated, `AlignmentLoss`'s terms of each tap, all of them scalars; and of
        each image, both `(B,)`, its `errors`, whose mean is loss_diff, and its `timesteps`.

        Args:
            unet: an `SD15UNetAligned`, or anything with its `forward`, `get_aligned_tokens` and `clear_hooks`.
            clean_latents: `(B, 4, h, w)`, scaled.
            dino_tokens: `(B, N, D)`; not looked at while λ is 0, when no tap listens and no head is evaluated.
            encoder_hidden_states: `(B, 77, 768)`.
            align_coeff: λ at this step, when it is scheduled.
            measure: where λ is 0, evaluate the heads all the same; the alignment then has no part in `loss`, and no gradient.
        """
        coeff = self.align_coeff if align_coeff is None else align_coeff
        aligned = coeff > 0 or measure
        if aligned and dino_tokens is None:
            raise ValueError("the alignment needs the teacher's tokens")
        noise, timesteps = self.draw(clean_latents, generator)
        alpha, sigma = self.schedule.at(timesteps, clean_latents.ndim)  # (B, 1, 1, 1)
        noisy = add_noise(clean_latents, noise, alpha, sigma)  # (B, 4, h, w)
        output = unet(noisy, timesteps, encoder_hidden_states, capture=aligned)  # (B, 4, h, w)

        errors = self.diffusion_error(output, clean_latents, noise, timesteps)  # (B,)
        loss_diff = errors.mean()
        per_image = dict(zip(PER_IMAGE, (errors.detach(), timesteps), strict=True))
        if not aligned:
            zero = loss_diff.new_zeros(())
            return dict(zip(TERMS, (loss_diff, loss_diff, zero, zero, zero), strict=True)) | per_image

        with torch.set_grad_enabled(torch.is_grad_enabled() and coeff > 0):
            terms = self.alignment(unet.get_aligned_tokens(), dino_tokens)
        unet.clear_hooks()
        loss = loss_diff + coeff * terms["loss_align"] if coeff > 0 else loss_diff
        return {"loss": loss, "loss_diff": loss_diff} | terms | per_image

    def diffusion_error(
        self, output: Tensor, clean_latents: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        """The diffusion loss of each image `(B,)`, given what the network put out for it."""
        alpha, sigma = self.schedule.at(timesteps, clean_latents.ndim)  # (B, 1, 1, 1)
        target = velocity(clean_latents, noise, alpha, sigma) if self.parameterization == "v" else noise
        weight = error_weight(
            self.prediction, self.parameterization, alpha, self.v_weight_max, self.snr_gamma
        )
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
