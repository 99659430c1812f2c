"""Stable Diffusion 3 and 3.5: an MMDiT, whose blocks keep text and picture apart, with three text encoders."""

from collections.abc import Sequence

import diffusers
import transformers
from torch import nn

from models.families.transformer import JOINT, Transformer, lora_of

TOKENS = 77 + 256  # of a prompt, in CLIP and T5
LAYERS = [rf"attn\.{name}" for name in JOINT]
FEED_FORWARD = [rf"{stream}\.net\.{layer}" for stream in ("ff", "ff_context") for layer in (r"0\.proj", "2")]


class SD3(Transformer):
    """Stable Diffusion 3 medium, 3.5 medium and large."""

    name = "Stable Diffusion 3"
    tags = ("stable-diffusion-3", "repa")
    pipeline = "StableDiffusion3Pipeline"
    default_base = "stabilityai/stable-diffusion-3.5-medium"
    assumed_config = {
        "sample_size": 128,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "in_channels": 16,
        "out_channels": 16,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    }
    text_fields = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    arguments = {
        "prompt_embeds": "encoder_hidden_states",
        "pooled_prompt_embeds": "pooled_projections",
    }
    lora_targets = {
        "attention": lora_of(LAYERS),
        "attention+ff": lora_of([*LAYERS, *FEED_FORWARD]),
    }
    parts = {
        "transformer": lambda: diffusers.SD3Transformer2DModel,
        "vae": lambda: diffusers.AutoencoderKL,
        "text_encoder": lambda: transformers.CLIPTextModelWithProjection,
        "tokenizer": lambda: transformers.CLIPTokenizer,
        "text_encoder_2": lambda: transformers.CLIPTextModelWithProjection,
        "tokenizer_2": lambda: transformers.CLIPTokenizer,
        "text_encoder_3": lambda: transformers.T5EncoderModel,
        "tokenizer_3": lambda: transformers.T5TokenizerFast,
        "scheduler": lambda: diffusers.FlowMatchEulerDiscreteScheduler,
    }

    own_sigmas = False

    def check(self, network: nn.Module) -> None:
        super().check(network)
        self.patch = (network.config.patch_size,) * 2

    def mu_of(self, shape: Sequence[int], steps: int) -> float | None:
        h, w = self.cells(shape)
        return self.shifted_mu(h * w) if self.scheduler.config.get("use_dynamic_shifting") else None

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        config = network.config
        return {
            "prompt_embeds": (TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
