"""Sana-Video: Sana's linear attention over space and time."""

import diffusers
from torch import nn

from models.families.sana import Sana
from models.families.transformer import VideoTransformer


class SanaVideo(VideoTransformer):
    """Sana-Video 2B."""

    name = "Sana-Video"
    tags = ("sana-video", "crepa")
    pipeline = "SanaVideoPipeline"
    default_base = "Efficient-Large-Model/SANA-Video_2B_480p_diffusers"
    assumed_config = {}
    default_cells = (21, 60, 104)  # 81 frames of 480 × 832 px
    lora_targets, trimmed_text = Sana.lora_targets, Sana.trimmed_text
    parts = Sana.parts | {
        "transformer": lambda: diffusers.SanaVideoTransformer3DModel,
        "vae": lambda: diffusers.AutoencoderKLWan,
    }

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return Sana.text_shapes(self, network)
