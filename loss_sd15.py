"""The plan's name for the training objective: `method/objective.py` on the path of a DDPM.

    from loss_sd15 import SD15Loss

    loss = SD15Loss(scheduler.alphas_cumprod, prediction="v", align_coeff=0.8, manifold_coeff=3.0)
    terms = loss(model, latents, dino_tokens, {"prompt_embeds": encoder_hidden_states})

L = L_diff + λ (L_token + w · L_manifold). The manifold loss of the plan is `manifold_gram_loss`.
"""

from method.alignment import manifold_gram_loss
from method.objective import Objective
from method.paths import DiffusionPath

__all__ = ["SD15Loss", "manifold_gram_loss"]


class SD15Loss(Objective):
    """An `Objective` built from ᾱ_t `(T,)` and the plan's names; the other options are those of `Objective`."""

    def __init__(
        self,
        alphas_cumprod,
        *,
        prediction="v",
        parameterization="epsilon",
        v_weight_max=5.0,
        snr_gamma=None,
        **options,
    ):
        weighting = {"prediction": prediction, "v_weight_max": v_weight_max, "snr_gamma": snr_gamma}
        super().__init__(DiffusionPath(alphas_cumprod, output=parameterization, **weighting), **options)
