"""A tiny pipeline of every family, of the real classes with random weights, in the layout of the official folders.

    make_pipeline("sdxl", Path("data/demo/models/sdxl-mini"))

It takes seconds, a few megabytes and no network. All networks take latents of 8×8 cells, of 8 pixels each: images of 64 px.
"""

import math
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from torch import nn

from miniature.models import reproducible
from miniature.tokenizers import (
    chatglm_tokenizer,
    clip_tokenizer,
)

CELLS, WIDTH = 8, 16
SCALED_LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
IMAGES, FRAMES = 8, 9  # noise images or clips from which the scale of latents is measured
VIDEO_AUTOENCODERS = (
    diffusers.AutoencoderKLWan, diffusers.AutoencoderKLLTXVideo, diffusers.AutoencoderKLHunyuanVideo,
)  # fmt: skip


def make_pipeline(family: str, folder: Path, seed: int = 0) -> None:
    """Write the tiny pipeline of a family into a folder; equal seeds give equal files."""
    with reproducible(seed):
        pipeline = makers()[family]()
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                fill(part.eval(), gates=name in ("unet", "transformer"))
        normalise(pipeline.vae)
    pipeline.save_pretrained(folder)


@torch.no_grad()
def fill(module: nn.Module, *, gates: bool) -> None:
    """Draw every matrix of a network anew, so that none is 0 as at the start of a training or uninitialised."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and (gates or not parameter.isfinite().all()):
            parameter.normal_(std=0.7 / math.sqrt(parameter[0].numel()))


@torch.no_grad()
def normalise(vae: nn.Module) -> None:
    """Let the normalisation of the VAE's latents give them a standard deviation of 1."""
    clips = isinstance(vae, VIDEO_AUTOENCODERS)
    pixels = torch.rand(IMAGES, 3, *[FRAMES] * clips, 8 * CELLS, 8 * CELLS) * 2 - 1
    found = vae.encode(pixels)
    latents = found.latent if hasattr(found, "latent") else found.latent_dist.mode()
    if isinstance(vae, diffusers.AutoencoderKLLTXVideo):
        vae.latents_mean.normal_(std=latents.std().item())
        vae.latents_std.fill_(latents.std().item())
    elif isinstance(vae, diffusers.AutoencoderKLWan):
        mean = latents.mean((0, 2, 3, 4)).tolist()
        vae.register_to_config(latents_mean=mean, latents_std=[latents.std().item()] * len(mean))
    elif hasattr(vae, "bn"):
        vae.bn.running_mean.normal_(std=latents.std().item())
        vae.bn.running_var.fill_(latents.var().item())
    else:
        vae.register_to_config(scaling_factor=1 / latents.std().item())


def clip_encoder(kind: type = transformers.CLIPTextModel, length: int = 77) -> nn.Module:
    tokenizer = clip_tokenizer(length)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config)


def t5_encoder(kind: type = transformers.T5EncoderModel, width: int = 24) -> nn.Module:
    config = (transformers.UMT5Config if kind is transformers.UMT5EncoderModel else transformers.T5Config)(
        vocab_size=128,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return kind(config)


def gemma_encoder() -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=128, head_dim=8, hidden_size=WIDTH, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def autoencoder(channels: int = 4, **config) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=channels, sample_size=8 * CELLS, **config,
    )  # fmt: skip


def sd15() -> diffusers.StableDiffusionPipeline:
    unet = diffusers.UNet2DConditionModel(
        sample_size=CELLS, block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4,
        cross_attention_dim=WIDTH, attention_head_dim=2,
    )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SCALED_LINEAR)
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def xl_unet(**config) -> diffusers.UNet2DConditionModel:
    """The three levels of Stable Diffusion XL and Kolors."""
    return diffusers.UNet2DConditionModel(
        sample_size=CELLS, block_out_channels=(8, 16, 16), layers_per_block=2, norm_num_groups=4,
        attention_head_dim=(1, 2, 2), transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8, **config,
    )  # fmt: skip


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(transformers.CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        unet=xl_unet(cross_attention_dim=2 * WIDTH),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SCALED_LINEAR),
    )  # fmt: skip


def kolors() -> diffusers.KolorsPipeline:
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=160, hidden_size=WIDTH, ffn_hidden_size=32, kv_channels=8, num_attention_heads=2,
        seq_length=512, multi_query_attention=True, multi_query_group_num=1, add_bias_linear=False, add_qkv_bias=True,
        apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True, rmsnorm=True, post_layer_norm=True,
        original_rope=True, bias_dropout_fusion=True,
    )  # fmt: skip
    encoder = ChatGLMModel(config)
    for parameter in encoder.parameters():  # which the class leaves uninitialised
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else nn.init.ones_(parameter)
    noise = SCALED_LINEAR | {"beta_end": 0.014, "num_train_timesteps": 1100}
    return diffusers.KolorsPipeline(
        vae=autoencoder(), text_encoder=encoder, tokenizer=chatglm_tokenizer(),
        unet=xl_unet(cross_attention_dim=24, encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj"),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **noise),
    )  # fmt: skip


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def flow(**config) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "kolors": kolors,
}


def makers() -> dict[str, Callable[[], diffusers.DiffusionPipeline]]:
    """What makes the pipeline of each family: of the U-Nets here, and of transformers of images and of videos."""
    from miniature import image_transformers, video_transformers

    return PIPELINES | image_transformers.PIPELINES | video_transformers.PIPELINES
