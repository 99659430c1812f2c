"""The plan's name for the training objective: `method/objective.py`.

    from loss_sd15 import SD15Loss

L = L_diff + λ (L_token + w · L_manifold). The manifold loss of the plan is `manifold_gram_loss`.
"""

from method.alignment import manifold_gram_loss
from method.objective import SD15Loss

__all__ = ["SD15Loss", "manifold_gram_loss"]
