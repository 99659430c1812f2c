"""The plan's name for Stable Diffusion 1.5's U-Net with taps and heads: `models/aligned.py` with `models/families/sd15.py`.

from models.sd15_unet_aligned import AlignHead, SD15UNetAligned

model = SD15UNetAligned(unet, ["mid"], D=1024, grid=14, train="lora", lora_config=lora_config())
prediction = model(latents, timesteps, encoder_hidden_states)
"""

from method.alignment import AlignHead
from models.aligned import AlignedModel, family_lora
from models.families.sd15 import SD15

__all__ = ["AlignHead", "SD15UNetAligned", "lora_config"]


def lora_config(rank: int = 32, alpha: float = 32, targets: str = "attention+conv"):
    """The plan's LoRA."""
    return family_lora(SD15(), rank, alpha, targets)


class SD15UNetAligned(AlignedModel):
    """An `AlignedModel` of a U-Net, called with the arguments of the plan."""

    def __init__(self, unet, align_layers=("mid",), D=1024, *, grid=14, lora_config=None, **options):
        super().__init__(SD15(), unet, align_layers, D, lora=lora_config, **options)
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)

    def forward(self, latents, timesteps, encoder_hidden_states, *, capture=True):
        """The U-Net's output `(B, 4, h, w)` for latents `(B, 4, h, w)`, timesteps `(B,)` and text `(B, 77, 768)`."""
        return self.predict(latents, timesteps, {"prompt_embeds": encoder_hidden_states}, capture=capture)

    def get_aligned_tokens(self, grid=None):
        """Tokens `(B, N, D)` of each head, on the grid of the constructor unless another is given."""
        return super().get_aligned_tokens(self.grid if grid is None else grid)
