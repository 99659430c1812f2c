"""Sana: linear attention on the latents of a deep-compression autoencoder."""

import diffusers
import transformers
from torch import Tensor, nn

from models.families.transformer import Transformer, lora_of

TOKENS = 300  # of a prompt, in Gemma


class Sana(Transformer):
    """Sana 0.6B and 1.6B."""

    name = "Sana"
    tags = ("sana", "repa")
    pipeline = "SanaPipeline"
    default_base = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
    assumed_config = {}
    patch = (1, 1)
    trimmed_text = {"prompt_embeds": "prompt_attention_mask"}
    lora_targets = {"attention": lora_of(["to_q", "to_k", "to_v", r"to_out\.0"])}
    parts = {
        "transformer": lambda: diffusers.SanaTransformer2DModel,
        "vae": lambda: diffusers.AutoencoderDC,
        "text_encoder": lambda: transformers.Gemma2Model,
        "tokenizer": lambda: transformers.GemmaTokenizer,
        "scheduler": lambda: diffusers.DPMSolverMultistepScheduler,
    }

    def clock(self, network: nn.Module, t: Tensor) -> Tensor:
        return super().clock(network, t) * network.config.timestep_scale

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (TOKENS, network.config.caption_channels),
            "prompt_attention_mask": (TOKENS,),
        }
