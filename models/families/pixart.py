"""PixArt-Σ: a DDPM on a transformer, which also puts out variances."""

from collections.abc import Mapping

import diffusers
import transformers
from torch import Tensor, nn

from models.families.transformer import ATTENTION, Transformer, lora_of

TOKENS = 300  # of a prompt, in T5


class PixArt(Transformer):
    """PixArt-Σ."""

    name = "PixArt-Σ"
    tags = ("pixart-sigma", "repa")
    pipeline = "PixArtSigmaPipeline"
    default_base = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
    assumed_config = {
        "sample_size": 128,
        "caption_channels": 4096,
        "use_additional_conditions": False,
        "cross_attention_dim": 1152,
        "out_channels": 8,
    }
    flow, loads_lora = False, False
    trimmed_text = {"prompt_embeds": "prompt_attention_mask"}
    lora_targets = {"attention": lora_of(ATTENTION)}
    parts = {
        "transformer": lambda: diffusers.PixArtTransformer2DModel,
        "vae": lambda: diffusers.AutoencoderKL,
        "text_encoder": lambda: transformers.T5EncoderModel,
        "tokenizer": lambda: transformers.T5TokenizerFast,
        "scheduler": lambda: diffusers.DDPMScheduler,
    }

    def conditions(self, network: nn.Module, x: Tensor, text: Mapping[str, Tensor]) -> dict[str, object]:
        return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        return {
            "prompt_embeds": (TOKENS, network.config.caption_channels),
            "prompt_attention_mask": (TOKENS,),
        }
