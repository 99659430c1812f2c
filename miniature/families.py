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
    gemma_tokenizer,
    llama_tokenizer,
    mistral_processor,
    t5_tokenizer,
)

CELLS, WIDTH = 8, 16
SCALED_LINEAR = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
IMAGES = 8  # noise images from which the scale of latents is measured


def make_pipeline(family: str, folder: Path, seed: int = 0) -> None:
    """Write the tiny pipeline of a family into a folder; equal seeds give equal files."""
    with reproducible(seed):
        pipeline = PIPELINES[family]()
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
    found = vae.encode(torch.rand(IMAGES, 3, 8 * CELLS, 8 * CELLS) * 2 - 1)
    latents = found.latent if hasattr(found, "latent") else found.latent_dist.mode()
    if hasattr(vae, "bn"):
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


FLUX_VAE = {"shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def flow(**config) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def dynamic_flow() -> diffusers.FlowMatchEulerDiscreteScheduler:
    return flow(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def flux() -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, joint_attention_dim=24, pooled_projection_dim=WIDTH,
        guidance_embeds=True, axes_dims_rope=(4, 6, 6), **HEADS,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=dynamic_flow(), vae=autoencoder(**FLUX_VAE), text_encoder=clip_encoder(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


def chroma() -> diffusers.ChromaPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1, **HEADS,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=flow(), vae=autoencoder(**FLUX_VAE), text_encoder=t5_encoder(), tokenizer=t5_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def flux2() -> diffusers.Flux2Pipeline:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=3, joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), **HEADS,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=8 * CELLS,
    )  # fmt: skip
    text = {
        "model_type": "mistral", "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 31, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=8)
    return diffusers.Flux2Pipeline(
        scheduler=dynamic_flow(), vae=vae, text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=mistral_processor(), transformer=transformer,
    )  # fmt: skip


def sd3() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=CELLS, patch_size=2, in_channels=4, out_channels=4, num_layers=4, joint_attention_dim=48,
        caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16, **HEADS,
    )  # fmt: skip
    clip = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(shift=3.0), vae=autoencoder(**FLUX_VAE), text_encoder=clip_encoder(clip),
        tokenizer=clip_tokenizer(), text_encoder_2=clip_encoder(clip), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(width=48), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def sana() -> diffusers.SanaPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=WIDTH, sample_size=CELLS, patch_size=1, **HEADS,
    )  # fmt: skip
    facts = {"block_types": "ResBlock", "block_out_channels": 8, "qkv_multiscales": (), "layers_per_block": 1}
    blocks = {
        f"{side}_{what}": (value,) * 4 for side in ("encoder", "decoder") for what, value in facts.items()
    }
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, downsample_block_type="conv", decoder_act_fns="silu",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", **blocks,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma_encoder(),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def pixart() -> diffusers.PixArtSigmaPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=32, sample_size=CELLS, patch_size=2,
        caption_channels=24, use_additional_conditions=False, **HEADS,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, solver_order=2)
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=scheduler,
    )


def hidream() -> diffusers.HiDreamImagePipeline:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_single_layers=3, caption_channels=[24, WIDTH],
        text_emb_dim=2 * WIDTH, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(8, 8),
        llama_layers=(0, 1, 2, 3, 3, 3), **HEADS,
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    clip = transformers.CLIPTextModelWithProjection
    return diffusers.HiDreamImagePipeline(
        scheduler=flow(shift=3.0), vae=autoencoder(**FLUX_VAE), text_encoder=clip_encoder(clip, 248),
        tokenizer=clip_tokenizer(218), text_encoder_2=clip_encoder(clip, 248), tokenizer_2=clip_tokenizer(218),
        text_encoder_3=t5_encoder(), tokenizer_3=t5_tokenizer(), text_encoder_4=transformers.LlamaForCausalLM(config),
        tokenizer_4=llama_tokenizer(), transformer=transformer,
    )  # fmt: skip


def auraflow() -> diffusers.AuraFlowPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=CELLS, patch_size=2, in_channels=4, num_mmdit_layers=3, num_single_dit_layers=3, joint_attention_dim=24,
        caption_projection_dim=32, out_channels=4, pos_embed_max_size=64, **HEADS,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(transformers.UMT5EncoderModel), vae=autoencoder(),
        transformer=transformer, scheduler=flow(shift=1.73),
    )  # fmt: skip


def lumina2() -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=CELLS, patch_size=2, in_channels=4, hidden_size=32, num_layers=3, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=flow(shift=6.0), vae=autoencoder(**FLUX_VAE), text_encoder=gemma_encoder(),
        tokenizer=gemma_tokenizer(),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "kolors": kolors,
    "flux": flux,
    "flux2": flux2,
    "sd3": sd3,
    "chroma": chroma,
    "sana": sana,
    "pixart": pixart,
    "hidream": hidream,
    "auraflow": auraflow,
    "lumina2": lumina2,
}
