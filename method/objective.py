"""The training objective: L = L_diff + λ L_align, with L_align = L_token + w · L_manifold."""

from collections.abc import Mapping

import torch
from torch import Tensor

from method.alignment import AlignmentLoss
from method.paths import DiffusionPath

PER_IMAGE = ("errors", "timesteps")
TERMS = ("loss", "loss_diff", "loss_token", "loss_manifold", "loss_align")


class Objective:
    """Diffusion loss plus alignment of the tapped features with the teacher's tokens (U-REPA, arXiv 2503.18414).

    Args:
        path: maps x_0, noise and t to x_t, target and weight.
        align_coeff: λ. With 0 there is no alignment: no head is evaluated.
        alignment: options of `AlignmentLoss`, such as manifold_coeff = w.
    """

    def __init__(self, path: DiffusionPath, *, align_coeff: float = 0.8, **alignment):
        self.path, self.align_coeff = path, align_coeff
        self.alignment = AlignmentLoss(**alignment)

    def __call__(
        self,
        model,
        x_0: Tensor,
        tokens: Tensor | None,
        text: Mapping[str, Tensor],
        *,
        grid: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        align_coeff: float | None = None,
        measure: bool = False,
    ) -> dict[str, Tensor]:
        """Draw noise and timesteps from `generator` and return the terms of the loss.

        These are the scalars `TERMS` and, where the heads were evaluated, the scalars of each tap from `AlignmentLoss`.
        Two more are `(B,)`, one value per image: `errors`, whose mean is loss_diff, and `timesteps`.

        Args:
            model: an `AlignedModel`, or anything with its `predict`, `get_aligned_tokens`, `clear_hooks`, `teacher_block` and,
                unless that is None, `get_teacher_tokens`.
            x_0: clean latents `(B, C, h, w)`.
            tokens: the teacher's tokens `(B, N, D)`; None where the heads are not evaluated, or the model has them itself.
            text: the fields of the prompts, each `(B, …)`.
            grid: (h, w) of the teacher's tokens, (f, h, w) of clips; None where they are a square.
            align_coeff: λ at this step; None takes the λ of the constructor.
            measure: evaluate the heads even where λ is 0; the alignment is then not part of `loss` and has no gradient.
        """
        coeff = self.align_coeff if align_coeff is None else align_coeff
        heads = coeff > 0 or measure
        if heads and tokens is None and model.teacher_block is None:
            raise ValueError("the alignment needs the teacher's tokens")
        noise = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device, generator=generator)
        t = self.path.draw(len(x_0), x_0.device, generator)  # (B,)

        x_t, target, weight = self.path(x_0, noise, t)  # (B, C, h, w), the same, (B, 1, 1, 1)
        # The taps listen also where λ is 0, so that a compiled network has one graph and not two.
        errors = squared_error(model.predict(x_t, t, text, capture=True), target, weight)  # (B,)
        loss_diff = errors.mean()
        per_image = {"errors": errors.detach(), "timesteps": t}
        if not heads:
            model.clear_hooks()
            zero = loss_diff.new_zeros(())
            return dict(zip(TERMS, (loss_diff, loss_diff, zero, zero, zero), strict=True)) | per_image

        if tokens is None:
            tokens, grid = model.get_teacher_tokens()
        grid = grid or square(tokens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and coeff > 0):
            terms = self.alignment(model.get_aligned_tokens(grid), tokens, grid)
        model.clear_hooks()
        loss = loss_diff + coeff * terms["loss_align"] if coeff > 0 else loss_diff
        return {"loss": loss, "loss_diff": loss_diff} | terms | per_image


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted squared error of each image `(B,)`, averaged over its values, in fp32."""
    return (weight * (prediction.float() - target.float()).square()).flatten(1).mean(1)


def square(tokens: Tensor) -> tuple[int, int]:
    """Return the grid (h, w) of tokens `(B, N, D)` that form a square; raises ValueError where N is no square number."""
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no square: say which grid they lie on")
    return side, side
