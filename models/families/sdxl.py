"""Stable Diffusion XL: what its U-Net, its text and its LoRA have beyond those of Stable Diffusion 1.5."""

import re
from collections.abc import Mapping, Sequence

import torch
import transformers
from torch import Tensor, nn

from models.families.sd15 import SD15, TOKENS

ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
# kohya's tools and Stability's own code name the same blocks by their place in three lists.
PLACES = {"down_blocks": ("input_blocks", 1), "up_blocks": ("output_blocks", 0)}
INNER = {"conv1": "in_layers.2", "conv2": "out_layers.3"}


class SDXL(SD15):
    """Stable Diffusion XL, a U-Net of three levels with two text encoders, told the size and crop of its images."""

    name = "Stable Diffusion XL"
    tags = ("stable-diffusion-xl", "u-repa")
    pipeline = "StableDiffusionXLPipeline"
    default_base = "stabilityai/stable-diffusion-xl-base-1.0"
    text_fields = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    image_conditions = ("time_ids",)
    down_blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_blocks = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    assumed_config = {
        "sample_size": 128,
        "down_block_types": down_blocks,
        "up_block_types": up_blocks,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    # (B, 1280, 32, 32) for a 128×128 latent. Unlike those of SD-1.5, the outer two blocks end in a transformer.
    blocks = {"enc_last": "down_blocks.2", "mid": "mid_block", "dec_first": "up_blocks.0"}
    lora_targets = {
        "attention+conv": rf"^(mid_block|down_blocks\.2|up_blocks\.0)\..*\.({ATTENTION}|conv1|conv2)$",
        "attention": rf".*\.{ATTENTION}$",  # of the whole network, as other trainers have it
    }
    load_options = {}
    kohya_base = "sdxl_base_v1-0"
    final_settings = {}
    parts = SD15.parts | {
        "text_encoder_2": lambda: transformers.CLIPTextModelWithProjection,
        "tokenizer_2": lambda: transformers.CLIPTokenizer,
    }

    def check_trained(self, taps: Sequence[str], train: str, lora_targets: str) -> None:
        """Each choice of LoRA trains something before each tap."""

    def forward(self, network: nn.Module, x_t: Tensor, t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        added = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": self.time_ids(x_t, text)}
        return network(x_t, t, text["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]

    def time_ids(self, x_t: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """Size before resizing, top left of the crop, and size of each image in pixels (height first) `(B, 6)`.

        They are in fp32 until the network embeds them. Where there are none, as in sampling, the images are whole and of their
        own size, as in the pipeline.
        """
        if "time_ids" in text:
            return text["time_ids"]
        height, width = (side * self.pixels_of_cell for side in x_t.shape[2:])
        whole = [height, width, 0, 0, height, width]
        return torch.tensor(whole, dtype=torch.float32, device=x_t.device).expand(len(x_t), 6)

    pixels_of_cell = 8  # on a side, of the VAE that the network was trained with

    def text_shapes(self, network: nn.Module) -> dict[str, tuple[int, ...]]:
        config = network.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            "prompt_embeds": (TOKENS, config.cross_attention_dim),
            "pooled_prompt_embeds": (pooled,),
        }

    def kohya_name(self, path: str) -> str:
        found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", path)
        if found:
            side, level, kind, number, rest = found.groups()
            name, first = PLACES[f"{side}_blocks"]
            place = f"{name}.{3 * int(level) + int(number) + first}.{int(kind == 'attentions')}"
        else:
            kind, number, rest = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", path).groups()
            place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
        return f"{place}.{INNER.get(rest, rest)}"
