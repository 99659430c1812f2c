"""An MMDiT for the digits: Stable Diffusion 3's pipeline around the miniature's autoencoder and text encoder."""

from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from miniature.parts import t5_encoder
from miniature.tokenizers import t5_tokenizer

CELLS, PATCH = 16, 4  # of the latents on a side; the 4×4 tokens of the picture are as many as the teacher's
LENGTH = 8  # tokens of a prompt in CLIP; "three" is three of them, with those of begin and end


def build_mmdit(text_width: int) -> diffusers.SD3Transformer2DModel:
    """Return an untrained MMDiT of 2 million weights, whose blocks begin as the identity.

    diffusers fills the modulation of the blocks as any linear layer; from scratch it begins at 0, as adaLN-Zero has it.
    """
    network = diffusers.SD3Transformer2DModel(
        sample_size=CELLS, patch_size=PATCH, in_channels=4, out_channels=4, num_layers=6, num_attention_heads=3,
        attention_head_dim=32, joint_attention_dim=2 * text_width, caption_projection_dim=96,
        pooled_projection_dim=2 * text_width, qk_norm="rms_norm", pos_embed_max_size=CELLS // PATCH,
    )  # fmt: skip
    zero = [network.proj_out, network.norm_out.linear]
    for block in network.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for layer in zero:
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return network


def save_mmdit(stable_diffusion: Path, folder: Path) -> None:
    """Save a Stable Diffusion 3 folder of the trained parts of the miniature's Stable Diffusion 1.5 and an untrained MMDiT."""
    vae = diffusers.AutoencoderKL.from_pretrained(stable_diffusion / "vae")
    vae.register_to_config(shift_factor=0.0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(stable_diffusion / "tokenizer")
    tokenizer.model_max_length = LENGTH
    encoder = projected(transformers.CLIPTextModel.from_pretrained(stable_diffusion / "text_encoder"))
    width = encoder.config.hidden_size
    diffusers.StableDiffusion3Pipeline(
        transformer=build_mmdit(width), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
        text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=encoder, tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder(width=2 * width), tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)  # fmt: skip


@torch.no_grad()
def projected(encoder: transformers.CLIPTextModel) -> transformers.CLIPTextModelWithProjection:
    """Return the text encoder as the class that Stable Diffusion 3 reads, whose projection keeps what it is given."""
    found = transformers.CLIPTextModelWithProjection(encoder.config)
    inner = getattr(encoder, "text_model", encoder)  # as some versions of transformers have it
    found.text_model.load_state_dict(inner.state_dict())
    found.text_projection.weight.copy_(torch.eye(encoder.config.hidden_size))
    return found.eval()
