"""Tiny pipelines of the families of U-Nets."""

import diffusers
import transformers
from torch import nn

from miniature.parts import CELLS, WIDTH, autoencoder, clip_encoder
from miniature.tokenizers import chatglm_tokenizer, clip_tokenizer

SCALED_LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


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


PIPELINES = {"sd15": sd15, "sdxl": sdxl, "kolors": kolors}
