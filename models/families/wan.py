"""Wan 2.1: text-to-video on the latents of a causal video autoencoder."""

import diffusers
import transformers
from torch import nn

from models.families.transformer import ATTENTION, VideoTransformer, lora_of

TOKENS = 512  # of a prompt, in UMT5


class Wan(VideoTransformer):
    """Wan 2.1, 1.3B and 14B. Wan 2.2 with two transformers is another pipeline in fact, if not in name."""

    name = "Wan 2.1"
    tags = ("wan", "crepa")
    pipeline = "WanPipeline"
    default_base = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assumed_config = {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "num_layers": 30,
    }
    text_fields = ("prompt_embeds", "negative_prompt_embeds")
    arguments = {"prompt_embeds": "encoder_hidden_states"}
    block_lists = ("blocks",)
    default_cells = (21, 60, 104)  # 81 frames of 480 × 832 px
    lora_targets = {"attention": lora_of(ATTENTION)}
    parts = {
        "transformer": lambda: diffusers.WanTransformer3DModel,
        "vae": lambda: diffusers.AutoencoderKLWan,
        "text_encoder": lambda: transformers.UMT5EncoderModel,
        "tokenizer": lambda: transformers.T5TokenizerFast,
        "scheduler": lambda: diffusers.UniPCMultistepScheduler,
    }

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, network.config.text_dim)}
